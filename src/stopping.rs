//! How a worker comes to its end.

use std::collections::HashMap;
use std::fmt;
use std::process::{ExitCode, Termination};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::calls::Grant;
use crate::error::{Error, Result};
use crate::outside::outside;
use crate::slot::{Slot, Waited, lock};

/// Stops a [`Worker`](crate::Worker), from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(pub(crate) Arc<Stopping>);

impl Stopper {
    /// Has the worker pop no more messages, and come to its end. Returns at once; again it does nothing.
    pub fn stop(&self) {
        self.0.stop(Cause::Stopped);
    }
}

/// Why a worker has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Stopped,
    Closed,
    #[cfg_attr(not(feature = "signals"), expect(dead_code, reason = "nobody listens to signals"))]
    Signal(i32),
}

/// How a worker has ended. As the value of `main` it is the exit status: 0, or 1 when handlers have outlived the grace
/// period.
///
/// ```no_run
/// use pushpop_pg::{Ended, Error, Queue, Worker};
///
/// fn main() -> Result<Ended, Error> {
///     let queue = Queue::connect("postgres://localhost/app")?;
///     Worker::new(&queue).handle("mail", 4, |_| Ok(())).run()
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says whether all handlers have finished in time"]
pub struct Ended {
    cause: Cause,
    unfinished: usize,
}

impl Ended {
    /// The signal that stopped the worker, if it was one.
    pub fn signal(&self) -> Option<i32> {
        match self.cause {
            Cause::Signal(signal) => Some(signal),
            _ => None,
        }
    }

    /// Whether its queue was closed.
    pub fn is_closed(&self) -> bool {
        self.cause == Cause::Closed
    }

    /// How many handlers have outlived the grace period; their messages were given back.
    pub fn unfinished(&self) -> usize {
        self.unfinished
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            Cause::Stopped => f.write_str("stopped")?,
            Cause::Closed => f.write_str("the queue was closed")?,
            Cause::Signal(signal) => write!(f, "stopped by signal {signal}")?,
        }
        match self.unfinished {
            0 => f.write_str(", all handlers have finished"),
            1 => f.write_str(", one handler has outlived the grace period"),
            n => write!(f, ", {n} handlers have outlived the grace period"),
        }
    }
}

impl Termination for Ended {
    fn report(self) -> ExitCode {
        if self.unfinished == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// What the threads of a worker have in common.
#[derive(Default)]
pub(crate) struct Stopping {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    cause: Option<Cause>,
    failed: Option<Error>,
    /// Why a thread has nothing to do any more.
    quit: Option<Error>,
    threads: usize,
    /// Pops that wait.
    waiting: HashMap<u64, Arc<Slot<Vec<Grant>>>>,
    pops: u64,
}

impl Stopping {
    pub(crate) fn stop(&self, cause: Cause) {
        let mut state = lock(&self.state);
        state.cause.get_or_insert(cause);
        for slot in state.waiting.values() {
            slot.cancel();
        }
        self.changed.notify_all();
    }

    /// Stops the worker for an error that waiting does not mend.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = lock(&self.state);
        let is_first = state.failed.is_none();
        state.failed.get_or_insert_with(|| error.clone());
        drop(state);
        self.stop(Cause::Stopped);
        if is_first {
            outside(|| tracing::error!("the worker stops: {error}"));
        }
    }

    /// Notes that a thread ends, for an error that is no reason for the others to end. It is the worker's if they all do.
    pub(crate) fn quit(&self, error: Error) {
        lock(&self.state).quit.get_or_insert(error);
    }

    pub(crate) fn is_set(&self) -> bool {
        lock(&self.state).cause.is_some()
    }

    /// Waits for a pop, until the worker is stopped.
    pub(crate) fn wait(&self, slot: &Arc<Slot<Vec<Grant>>>) -> Result<Vec<Grant>> {
        let mut state = lock(&self.state);
        state.pops += 1;
        let number = state.pops;
        if state.cause.is_some() {
            slot.cancel();
        } else {
            state.waiting.insert(number, Arc::clone(slot));
        }
        drop(state);
        let waited = slot.wait(None);
        lock(&self.state).waiting.remove(&number);
        match waited {
            Waited::Done(result) => result,
            Waited::Unsent(_) | Waited::Unknown => Err(Error::closed()),
        }
    }

    pub(crate) fn enter(&self) {
        lock(&self.state).threads += 1;
    }

    pub(crate) fn leave(&self) {
        lock(&self.state).threads -= 1;
        self.changed.notify_all();
    }

    pub(crate) fn await_stop(&self) {
        let mut state = lock(&self.state);
        while state.cause.is_none() && state.threads > 0 {
            state = state.wait(&self.changed);
        }
    }

    /// Whether all threads end within a time.
    pub(crate) fn await_threads(&self, time: Duration) -> bool {
        let until = Instant::now().checked_add(time);
        let mut state = lock(&self.state);
        while state.threads > 0 {
            let left = until.map_or(time, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            state = state.wait_timeout(&self.changed, left).0;
        }
        true
    }

    pub(crate) fn ended(&self, unfinished: usize) -> Result<Ended> {
        let state = lock(&self.state);
        match state.failed.as_ref().or(state.quit.as_ref().filter(|_| state.cause.is_none())) {
            Some(error) => Err(error.clone()),
            None => Ok(Ended { cause: state.cause.unwrap_or(Cause::Stopped), unfinished }),
        }
    }
}

impl fmt::Debug for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopping").field("cause", &lock(&self.state).cause).finish_non_exhaustive()
    }
}

/// A thread of a worker, which leaves when this is dropped.
pub(crate) struct Leaving<'a>(pub(crate) &'a Stopping);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}
