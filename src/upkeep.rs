//! Upkeep: what is due in the topics that this queue uses, and now and then in all the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::error::Result;
use crate::lane::{State, Task};
use crate::link::Link;
use crate::outside::outside;
use crate::slot::{FlightId, lock};

/// How long one round of upkeep goes on for topics that have more to do.
const ROUND: Duration = Duration::from_millis(200);

/// How many topics share a statement.
const TOGETHER: usize = 50;

/// How many messages a statement deletes, for all its topics.
const STEP: usize = 1000;

/// A topic through which so many messages went has its upkeep at once, a second after the last.
const BUSY: usize = 1000;

/// How many topics the server names at a time that have something due, unless there are no more.
const DUE: usize = 100;

/// A topic that was used since its last upkeep.
pub(crate) struct Used {
    since: Instant,
    rows: usize,
}

impl Used {
    /// When its upkeep is due. Others than busy ones can wait, but not for longer than their history is kept.
    fn due(&self, keep: Duration) -> Instant {
        let second = Duration::from_secs(1);
        let calm = match keep {
            Duration::ZERO => second * 10,
            keep => keep.clamp(second, second * 10),
        };
        self.since + if self.rows < BUSY { calm } else { second }
    }
}

impl State {
    /// Notes that messages of a topic were handled. Returns when its upkeep is due.
    pub(crate) fn note_use(&mut self, topic: &Arc<str>, rows: usize, keep: Duration) -> Instant {
        let used = match self.used.get_mut(topic) {
            Some(used) => used,
            None => self.used.entry(Arc::clone(topic)).or_insert(Used { since: Instant::now(), rows: 0 }),
        };
        used.rows += rows;
        used.due(keep)
    }
}

/// Upkeep of some topics.
pub(crate) struct Upkeep {
    engine: Arc<Engine>,
    topics: Vec<Arc<str>>,
}

impl Upkeep {
    /// Of those that were used, what is due. Returns when the next one is.
    pub(crate) fn due(engine: &Arc<Engine>, state: &mut State, now: Instant) -> Option<Instant> {
        let (mut next, mut topics) = (None, Vec::new());
        state.used.retain(|topic, used| {
            let due = used.due(engine.settings.keep_settled);
            if due > now {
                next = next.min(Some(due)).or(Some(due));
            } else {
                topics.push(Arc::clone(topic));
            }
            due > now
        });
        for topics in topics.chunks(TOGETHER) {
            let engine = Arc::clone(engine);
            state.tasks.push_back(Box::new(Upkeep { engine, topics: topics.to_vec() }));
        }
        next
    }

    fn step(engine: &Engine, topics: &[impl AsRef<str>], link: &mut Link) -> Result<()> {
        let until = Instant::now() + ROUND;
        let mut topics: Vec<&str> = topics.iter().map(AsRef::as_ref).collect();
        while !topics.is_empty() && Instant::now() < until {
            let deadline = Instant::now() + engine.settings.operation_timeout;
            let most = STEP / topics.len();
            let rows =
                link.run(deadline, &engine.calls.upkeep, &[&topics, &i32::try_from(most).unwrap_or(1)])?;
            let deleted: Result<Vec<i64>, postgres::Error> = rows.iter().map(|row| row.try_get(0)).collect();
            let mut deleted = deleted?.into_iter().map(|count| usize::try_from(count).unwrap_or(0));
            topics.retain(|_| deleted.next() >= Some(most));
        }
        Ok(())
    }
}

impl Task for Upkeep {
    fn board(&self, _: FlightId) -> bool {
        true
    }

    fn run(&self, _: FlightId, link: Result<&mut Link>) {
        if let Err(e) = link.and_then(|link| Self::step(&self.engine, &self.topics, link)) {
            outside(|| tracing::debug!("upkeep is put off: {e}"));
        }
    }
}

/// Upkeep of all topics that need it, whoever used them.
pub(crate) struct Everywhere {
    engine: Arc<Engine>,
}

impl Everywhere {
    pub(crate) fn new(engine: &Arc<Engine>) -> Self {
        Everywhere { engine: Arc::clone(engine) }
    }

    /// Goes on behind the topic with which the last round has ended: however many have something due all the time, each
    /// has its turn.
    fn step(&self, link: &mut Link) -> Result<()> {
        let until = Instant::now() + ROUND * 5;
        while Instant::now() < until {
            let deadline = Instant::now() + self.engine.settings.operation_timeout;
            let after = lock(&self.engine.state).upkept.clone();
            let rows = link.run(deadline, &self.engine.calls.upkeep_due, &[&after])?;
            // A name that is no UTF-8 cannot be sent back.
            let topics: Vec<String> = rows.iter().filter_map(|row| row.try_get(0).ok()).collect();
            for topics in topics.chunks(TOGETHER) {
                // Also when it fails: one topic does not hold up those behind it.
                lock(&self.engine.state).upkept = topics.last().cloned().unwrap_or_default();
                Upkeep::step(&self.engine, topics, link)?;
            }
            if rows.len() < DUE || topics.is_empty() {
                lock(&self.engine.state).upkept.clear();
                break;
            }
        }
        Ok(())
    }
}

impl Task for Everywhere {
    fn board(&self, _: FlightId) -> bool {
        true
    }

    fn run(&self, _: FlightId, link: Result<&mut Link>) {
        if let Err(e) = link.and_then(|link| self.step(link)) {
            outside(|| tracing::debug!("upkeep is put off: {e}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_topics_have_their_upkeep_first() {
        let since = Instant::now();
        for (keep, rows, seconds) in [
            (3_600, 1, 10),
            (3_600, BUSY - 1, 10),
            (3_600, BUSY, 1),
            (3_600, BUSY * 50, 1),
            (0, 1, 10),
            (0, BUSY, 1),
            (3, 1, 3),
            (3, BUSY, 1),
        ] {
            let due = Used { since, rows }.due(Duration::from_secs(keep));
            assert_eq!(due - since, Duration::from_secs(seconds), "{rows} rows, kept for {keep} s");
        }
        assert_eq!(Used { since, rows: 1 }.due(Duration::from_millis(10)) - since, Duration::from_secs(1));
    }

    #[test]
    fn what_is_used_adds_up() {
        let (mut state, keep) = (State::default(), Duration::from_secs(60));
        let topic: Arc<str> = "t".into();
        let first = state.note_use(&topic, BUSY - 1, keep);
        assert_eq!(state.note_use(&topic, 0, keep), first);
        assert_eq!(first - state.note_use(&topic, 1, keep), Duration::from_secs(9));
    }
}
