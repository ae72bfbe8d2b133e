//! Upkeep: what is due in the topics that this queue uses, and now and then in all the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::error::Result;
use crate::lane::Task;
use crate::link::Link;
use crate::slot::FlightId;

/// How long one round of upkeep goes on for a topic that has more to do.
const ROUND: Duration = Duration::from_millis(200);

/// Upkeep of one topic.
pub(crate) struct Upkeep {
    engine: Arc<Engine>,
    topic: Arc<str>,
}

impl Upkeep {
    pub(crate) fn new(engine: &Arc<Engine>, topic: Arc<str>) -> Self {
        Upkeep { engine: Arc::clone(engine), topic }
    }

    fn step(engine: &Engine, topic: &str, link: &mut Link, deadline: Instant) -> Result<()> {
        let until = Instant::now() + ROUND;
        loop {
            let rows = link.run(deadline, &engine.calls.upkeep, &[&topic])?;
            let deleted: i64 = rows.first().map_or(0, |row| row.get(0));
            if deleted < 1000 || Instant::now() > until {
                return Ok(());
            }
        }
    }
}

impl Task for Upkeep {
    fn board(&self, _: FlightId) -> bool {
        true
    }

    fn run(&self, _: FlightId, link: Result<&mut Link>) {
        let deadline = Instant::now() + self.engine.settings.operation_timeout;
        let done = link.and_then(|link| Self::step(&self.engine, &self.topic, link, deadline));
        if let Err(e) = done {
            tracing::debug!(topic = &*self.topic, "upkeep is put off: {e}");
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

    fn step(&self, link: &mut Link) -> Result<()> {
        let deadline = Instant::now() + self.engine.settings.operation_timeout;
        let topics: Vec<String> =
            link.run(deadline, &self.engine.calls.upkeep_due, &[])?.iter().map(|row| row.get(0)).collect();
        topics.iter().try_for_each(|topic| Upkeep::step(&self.engine, topic, link, deadline))
    }
}

impl Task for Everywhere {
    fn board(&self, _: FlightId) -> bool {
        true
    }

    fn run(&self, _: FlightId, link: Result<&mut Link>) {
        if let Err(e) = link.and_then(|link| self.step(link)) {
            tracing::debug!("upkeep is put off: {e}");
        }
    }
}
