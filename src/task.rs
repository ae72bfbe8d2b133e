//! Requests that share no flight: looks at messages and topics, upkeep.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::lane::Task;
use crate::link::Link;
use crate::queue::Queue;
use crate::slot::{FlightId, Slot, lock};

struct Once<T, F> {
    engine: Arc<Engine>,
    work: Mutex<Option<F>>,
    slot: Arc<Slot<T>>,
    deadline: Instant,
}

impl<T, F> Task for Once<T, F>
where
    T: Send,
    F: FnOnce(&Engine, &mut Link, Instant) -> Result<T> + Send,
{
    fn board(&self, flight: FlightId) -> bool {
        self.slot.board(flight)
    }

    fn run(&self, flight: FlightId, link: Result<&mut Link>) {
        let work = lock(&self.work).take();
        let result = match (work, link) {
            (Some(work), Ok(link)) => work(&self.engine, link, self.deadline),
            (_, Err(e)) => Err(e),
            (None, Ok(_)) => Err(Error::panicked()),
        };
        drop(self.slot.land(flight, result));
    }
}

impl Queue {
    /// Has a connection thread do something, and waits for it up to the operation time-out.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Engine, &mut Link, Instant) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let engine = self.engine();
        let deadline = Instant::now() + engine.settings.operation_timeout;
        let slot = Arc::new(Slot::new());
        engine.task(Box::new(Once {
            engine: Arc::clone(engine),
            work: Mutex::new(Some(work)),
            slot: Arc::clone(&slot),
            deadline,
        }))?;
        engine.wait(&slot, Some(deadline))
    }
}
