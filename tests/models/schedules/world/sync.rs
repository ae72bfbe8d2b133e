//! In place of `std::sync`: locks of `shuttle`, and waits that end.

use std::time::Duration;

pub(crate) use shuttle::sync::{Mutex, MutexGuard};
pub(crate) use std::sync::{Arc, LockResult, PoisonError, Weak};

use super::clock::{Alarm, Instant};

pub(crate) mod atomic {
    //! In place of `std::sync::atomic`.

    pub(crate) use shuttle::sync::atomic::{AtomicBool, Ordering};
}

/// Those of `shuttle` have no time-outs. Here a time-out wakes all that wait, which a condition variable may always do.
#[derive(Default)]
pub(crate) struct Condvar(Arc<shuttle::sync::Condvar>);

pub(crate) struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub(crate) fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        self.0.wait(guard)
    }

    pub(crate) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let until = Instant::now() + time;
        let _alarm = Alarm::set(until, &self.0);
        let result = |guard| (guard, WaitTimeoutResult(Instant::now() >= until));
        self.0.wait(guard).map(result).map_err(|e| PoisonError::new(result(e.into_inner())))
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}
