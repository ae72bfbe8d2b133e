//! The watch over a worker's handlers: extends the leases of those that run, all in one statement, and
//! notices those that run too long.
//!
//! It has a thread and a connection of its own, so that no handler and no call is in its way: the pool
//! may be in the hands of handlers with long transactions. The thread never waits for the server: each beat
//! runs on one that is left behind if it hangs.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use postgres::types::ToSql;
use r2d2::ManageConnection;
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::calls::{Settle, Verb};
use crate::crew::backoff;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::lane::SettleJob;
use crate::lease::Lease;
use crate::link::{Link, Links};
use crate::observer::Stuck;
use crate::outside::{outside, steadily};
use crate::slot::{Slot, lock};

/// A message whose handler runs.
pub(crate) struct Running {
    id: Uuid,
    topic: String,
    token: Vec<u8>,
    /// How long its lease was at first.
    length: Duration,
    since: Instant,
    /// In how many seconds it is tried again, should it exceed the limit.
    retry: Option<f64>,
    state: Mutex<State>,
}

struct State {
    /// When the lease ends, by the local clock.
    ends: Instant,
    beat_at: Instant,
    /// Another transaction has the message, most likely the handler's: nobody else gets it then.
    busy: bool,
    lost: bool,
    /// Its outcome is settled, or is being settled, by its handler or by the watch.
    over: bool,
    fate: &'static str,
    /// The age at which it is reported next.
    report_at: Duration,
}

impl State {
    fn new(ends: Instant, beat_at: Instant, report_at: Duration) -> Self {
        State { ends, beat_at, busy: false, lost: false, over: false, fate: "", report_at }
    }
}

impl Running {
    fn new(lease: &Lease, retry: Option<f64>) -> Self {
        let (since, length) = (Instant::now(), lease.length());
        let beat_at = since + (lease.remaining() / 3).min(length / 3);
        let state = State::new(since + lease.remaining(), beat_at, length);
        Running {
            id: lease.id(),
            topic: lease.topic().to_owned(),
            token: lease.token().to_vec(),
            length,
            since,
            retry,
            state: Mutex::new(state),
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        let state = lock(&self.state);
        state.lost || !state.busy && state.ends <= Instant::now()
    }

    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether it falls to the caller to settle the message: only the first who asks may.
    pub(crate) fn claim(&self) -> bool {
        !std::mem::replace(&mut lock(&self.state).over, true)
    }

    /// Claims it for the watch: the handler has lost it.
    fn take_away(&self, fate: &'static str) -> bool {
        let mut state = lock(&self.state);
        if state.over {
            return false;
        }
        state.over = true;
        state.lost = true;
        state.fate = fate;
        true
    }

    /// What the watch has done with it.
    pub(crate) fn fate(&self) -> &'static str {
        lock(&self.state).fate
    }

    fn settle(&self, verb: Verb) -> SettleJob {
        let settles = vec![Settle { id: self.id, token: self.token.clone(), verb }];
        SettleJob { settles, unwanted: false, slot: Arc::new(Slot::new()) }
    }

    /// Notes what a beat that was sent at a certain time has brought.
    fn note(&self, sent: Instant, result: &str) {
        let mut state = lock(&self.state);
        state.busy = result == "busy";
        match result {
            "extended" => {
                state.ends = state.ends.max(sent + self.length);
                state.beat_at = sent + self.length / 3;
            }
            "busy" => state.beat_at = Instant::now() + (self.length / 10).min(Duration::from_secs(1)),
            _ => {
                state.lost = true;
                state.beat_at = sent + Duration::from_secs(86_400);
            }
        }
    }
}

pub(crate) struct Watch {
    engine: Arc<Engine>,
    limit: Option<Duration>,
    pub(crate) backoff: Option<Backoff>,
    state: Mutex<Watched>,
    changed: Condvar,
}

#[derive(Default)]
struct Watched {
    running: HashMap<u64, Arc<Running>>,
    begun: u64,
    /// Until when the thread sleeps.
    sleeps_until: Option<Instant>,
    /// The beat under way, and until when it may take.
    beating: Option<(u64, Instant)>,
    beats: u64,
    failures: u32,
    not_before: Option<Instant>,
    link: Option<Link>,
    stopping: bool,
    ended: bool,
}

impl Watch {
    /// Begins a watch; it ends when [`end`](Self::end) is called.
    pub(crate) fn start(
        engine: &Arc<Engine>,
        limit: Option<Duration>,
        backoff: Option<Backoff>,
    ) -> Result<Arc<Self>> {
        let watch = Arc::new(Watch {
            engine: Arc::clone(engine),
            limit,
            backoff,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = Arc::clone(&watch);
        crate::link::spawn("pushpop-watch", move || steadily(|| thread.go_round()))?;
        Ok(watch)
    }

    pub(crate) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    pub(crate) fn stop(&self) {
        lock(&self.state).stopping = true;
    }

    pub(crate) fn is_stopping(&self) -> bool {
        lock(&self.state).stopping
    }

    /// Watches over a message whose handler is about to run.
    pub(crate) fn begin(&self, lease: &Lease) -> (u64, Arc<Running>) {
        let retry = self.limit.and(self.backoff.as_ref()).and_then(|backoff| backoff.seconds(lease));
        let running = Arc::new(Running::new(lease, retry));
        let due = self.due(&running);
        let mut state = lock(&self.state);
        state.begun += 1;
        let number = state.begun;
        state.running.insert(number, Arc::clone(&running));
        if state.sleeps_until.is_none_or(|until| due < until) {
            self.changed.notify_all();
        }
        (number, running)
    }

    /// It is settled: until then its lease is extended.
    pub(crate) fn finish(&self, number: u64) {
        lock(&self.state).running.remove(&number);
    }

    /// Takes the messages of all handlers that still run away, and gives them back uncounted. Returns how many.
    pub(crate) fn release_all(&self) -> usize {
        let running: Vec<Arc<Running>> = lock(&self.state).running.values().cloned().collect();
        let taken: Vec<&Arc<Running>> =
            running.iter().filter(|running| running.take_away("released")).collect();
        let mut slots = Vec::new();
        for running in &taken {
            let job = running.settle(Verb::Release);
            slots.push((Arc::clone(&job.slot), self.engine.settle(&running.topic, job)));
        }
        for running in &taken {
            outside(|| {
                tracing::error!(
                    topic = running.topic,
                    id = %running.id,
                    age = ?running.age(),
                    "a handler has outlived the grace period; its message is released"
                );
            });
        }
        let until = Instant::now() + self.engine.settings.operation_timeout;
        for (slot, sent) in slots {
            if let Err(e) = sent.and_then(|()| self.engine.wait(&slot, Some(until))) {
                outside(|| tracing::warn!("a message was not released, its lease will expire: {e}"));
            }
        }
        taken.len()
    }

    /// When something is to be done about it.
    fn due(&self, running: &Running) -> Instant {
        let state = lock(&running.state);
        let watched = [Some(state.report_at), self.limit].into_iter().flatten().filter(|_| !state.over);
        watched.filter_map(|age| running.since.checked_add(age)).fold(state.beat_at, Instant::min)
    }

    fn go_round(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        while !state.ended {
            let now = Instant::now();
            let running: Vec<Arc<Running>> = state.running.values().cloned().collect();
            // Looked at without the lock, so that handlers can begin and end meanwhile.
            drop(state);
            running.iter().for_each(|running| self.look_at(running, now));
            state = lock(&self.state);
            let running: Vec<Arc<Running>> = state.running.values().cloned().collect();
            self.beat(&mut state, &running, now);

            // What is due now waits for the beat under way, which says when it is done, or for the next try.
            let waits = |due: Instant| {
                let retry = if state.beating.is_some() { None } else { state.not_before };
                if due <= now { retry } else { Some(due) }
            };
            let next = running
                .iter()
                .filter(|running| !lock(&running.state).lost)
                .filter_map(|running| waits(self.due(running)))
                .chain(state.beating.map(|(_, until)| until))
                .min();
            state.sleeps_until = next;
            let pause = next.map_or(Duration::MAX, |next| next.saturating_duration_since(Instant::now()));
            let pause = pause.clamp(Duration::from_millis(5), Duration::from_secs(3600));
            state = state.wait_timeout(&self.changed, pause).0;
        }
    }

    /// Ends a handler's claim when the limit has passed, and reports it when it does not come to an end.
    fn look_at(&self, running: &Arc<Running>, now: Instant) {
        let age = now.saturating_duration_since(running.since);
        if let Some(limit) = self.limit.filter(|limit| age >= *limit)
            && running.take_away("timeout")
        {
            let verb = Verb::fail(format!("the handler ran longer than {limit:?}"), running.retry);
            let settled = self.engine.settle(&running.topic, running.settle(verb));
            let running = Arc::clone(running);
            self.engine.teller.note(move || {
                let (topic, id) = (&*running.topic, running.id);
                outside(|| {
                    tracing::error!(topic, %id, ?age, "a handler has run longer than {limit:?}; the attempt has failed");
                });
                if let Err(e) = settled {
                    outside(|| tracing::warn!(topic, %id, "an attempt was not ended, its lease will expire: {e}"));
                }
            });
        }
        let mut state = lock(&running.state);
        if age < state.report_at || state.over {
            return;
        }
        state.report_at = age * 2;
        drop(state);
        let (engine, running) = (Arc::clone(&self.engine), Arc::clone(running));
        self.engine.teller.note(move || {
            let (topic, id) = (&*running.topic, running.id);
            outside(|| tracing::warn!(topic, %id, ?age, "a handler is still running"));
            engine.observe(|observer| observer.stuck(&Stuck { topic, id, age }));
        });
    }

    /// Starts a beat if one is due: for all whose turn comes soon.
    fn beat(self: &Arc<Self>, state: &mut Watched, running: &[Arc<Running>], now: Instant) {
        if state.beating.is_some_and(|(_, until)| until <= now) {
            let late = "leases were not extended in time; the connection for it is left behind";
            self.engine.teller.note(move || tracing::warn!("{late}"));
            state.beating = None;
            state.fail(now);
        }
        if state.beating.is_some() || state.not_before.is_some_and(|at| at > now) {
            return;
        }
        let live = || {
            running.iter().filter_map(|running| {
                let state = lock(&running.state);
                (!state.lost).then_some((running, state.beat_at))
            })
        };
        if !live().any(|(_, beat_at)| beat_at <= now) {
            return;
        }
        let soon = |running: &Running| now + running.length / 6;
        let due: Vec<Arc<Running>> = live()
            .filter(|(running, at)| *at <= soon(running))
            .map(|(running, _)| Arc::clone(running))
            .collect();
        let third = due.iter().map(|running| running.length / 3).min().unwrap_or_default();
        let until = now + third.min(self.engine.settings.operation_timeout);
        state.beats += 1;
        let beat = state.beats;
        state.beating = Some((beat, until));
        let (watch, link) = (Arc::clone(self), state.link.take());
        if let Err(e) = crate::link::spawn("pushpop-beat", move || watch.send(beat, until, &due, link)) {
            self.engine.teller.note(move || tracing::warn!("leases were not extended: {e}"));
            state.beating = None;
            state.fail(now);
        }
    }

    fn send(&self, beat: u64, until: Instant, due: &[Arc<Running>], link: Option<Link>) {
        let sent = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| self.extend(until, due, link)))
            .unwrap_or_else(|_| Err(Error::died("pushpop-beat")));
        let mut state = lock(&self.state);
        let current = state.beating.is_some_and(|(current, _)| current == beat);
        match done {
            Ok((link, results)) => {
                due.iter().zip(results).for_each(|(running, result)| running.note(sent, &result));
                if current {
                    state.link = Some(link);
                    state.failures = 0;
                    state.not_before = None;
                }
            }
            Err(e) => {
                let said = "leases were not extended, trying again";
                self.engine.teller.note(move || tracing::warn!("{said}: {e}"));
                if current {
                    state.fail(Instant::now());
                }
            }
        }
        if current {
            state.beating = None;
            self.changed.notify_all();
        }
    }

    /// Extends leases by their own lengths; for each what came of it.
    fn extend(
        &self,
        until: Instant,
        due: &[Arc<Running>],
        link: Option<Link>,
    ) -> Result<(Link, Vec<String>)> {
        let mut link = match link {
            Some(link) => link,
            None => {
                let route = Arc::clone(&self.engine.route);
                Links { route, named_statements: self.engine.settings.listens }.connect()?
            }
        };
        let topics: Vec<&str> = due.iter().map(|running| &*running.topic).collect();
        let ids: Vec<Uuid> = due.iter().map(|running| running.id).collect();
        let tokens: Vec<&[u8]> = due.iter().map(|running| &*running.token).collect();
        let lengths: Vec<f64> = due.iter().map(|running| running.length.as_secs_f64()).collect();
        let params: [&(dyn ToSql + Sync); 4] = [&topics, &ids, &tokens, &lengths];
        let mut results = vec![String::new(); due.len()];
        for row in link.run(until, &self.engine.calls.heartbeat, &params)? {
            let place = usize::try_from(row.try_get::<_, i32>(0)? - 1).unwrap_or(usize::MAX);
            if let Some(result) = results.get_mut(place) {
                *result = row.try_get(1)?;
            }
        }
        Ok((link, results))
    }
}

impl Watched {
    fn fail(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + backoff(self.failures).min(Duration::from_secs(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_says_when_the_next_one_is_due() {
        let sent = Instant::now();
        let running = |length| Running {
            id: Uuid::nil(),
            topic: "t".to_owned(),
            token: Vec::new(),
            length,
            since: sent,
            retry: None,
            state: Mutex::new(State::new(sent + Duration::from_secs(5), sent, length)),
        };
        for (length, again) in [(Duration::from_secs(5), 500), (Duration::from_secs(30), 1_000)] {
            let running = running(length);
            running.note(sent, "busy");
            let due = lock(&running.state).beat_at;
            assert!(lock(&running.state).busy && due > sent, "it is asked again");
            assert!(due <= Instant::now() + Duration::from_millis(again), "soon: {:?}", due - sent);
        }
        let length = Duration::from_secs(30);
        let running = running(length);
        let due = || lock(&running.state).beat_at;
        running.note(sent, "extended");
        assert_eq!((due(), lock(&running.state).ends), (sent + length / 3, sent + length));
        running.note(sent, "busy");
        assert!(!running.is_lost());
        running.note(sent, "lost");
        assert!(running.is_lost() && due() > sent + length * 10, "it is asked no more");
        assert!(!lock(&running.state).busy);
    }
}
