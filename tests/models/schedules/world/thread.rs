//! In place of `std::thread`.

use std::cell::{Cell, RefCell};
use std::io;
use std::time::Duration;

use shuttle::thread::JoinHandle;

use super::clock::{Instant, pass};
use super::sync::{Condvar, Mutex, PoisonError};

thread_local! {
    static RUNNING: RefCell<Vec<JoinHandle<()>>> = RefCell::default();
    static FAILURES: Cell<u64> = const { Cell::new(0) };
}

/// The next so many starts of threads fail.
pub(crate) fn fail(starts: u64) {
    FAILURES.set(starts);
}

pub(crate) fn reset() {
    FAILURES.set(0);
    RUNNING.with_borrow_mut(Vec::clear);
}

/// Waits for all threads that were started by a [`Builder`], and those that they start.
pub(crate) fn join_all() {
    while let Some(thread) = RUNNING.with_borrow_mut(Vec::pop) {
        assert!(thread.join().is_ok());
    }
}

pub(crate) struct Builder(shuttle::thread::Builder);

impl Builder {
    pub(crate) fn new() -> Self {
        Builder(shuttle::thread::Builder::new())
    }

    pub(crate) fn name(self, name: String) -> Self {
        Builder(self.0.name(name))
    }

    pub(crate) fn spawn(self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        if let Some(left) = FAILURES.get().checked_sub(1) {
            FAILURES.set(left);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let thread = self.0.spawn(work)?;
        RUNNING.with_borrow_mut(|running| running.push(thread));
        Ok(())
    }
}

/// A turn of the scheduler.
pub(crate) fn yield_now() {
    pass(Duration::from_micros(40));
    shuttle::thread::yield_now();
}

pub(crate) fn sleep(time: Duration) {
    let (lock, bell, until) = (Mutex::new(()), Condvar::new(), Instant::now() + time);
    let mut guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        guard = bell.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}
