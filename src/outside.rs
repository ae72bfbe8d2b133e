//! Code that is not ours: observers, subscribers of `tracing`. It may be slow, panic, or call the queue.
//!
//! The rule: it is run by [`outside`] only, by no thread that holds a lock of ours, and never by one that keeps the
//! time for others. What such a thread has to tell it leaves to the [`Teller`].

use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::slot::lock;

thread_local! {
    /// How many locks of ours this thread holds.
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// Counts a lock for as long as it is held, in builds with debug assertions.
#[derive(Debug)]
pub(crate) struct Held(());

impl Held {
    pub(crate) fn new() -> Self {
        if cfg!(debug_assertions) {
            HELD.set(HELD.get() + 1);
        }
        Held(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            HELD.set(HELD.get() - 1);
        }
    }
}

/// Runs code that is not ours. A panic in it ends here; returns whether there was none.
pub(crate) fn outside(tell: impl FnOnce()) -> bool {
    debug_assert!(HELD.get() == 0, "a lock is held while foreign code runs");
    catch_unwind(AssertUnwindSafe(tell)).is_ok()
}

/// Runs what a thread is there for, and again if it panics: others rely on it, and a defect must not end it.
pub(crate) fn steadily(mut work: impl FnMut()) {
    while catch_unwind(AssertUnwindSafe(&mut work)).is_err() {
        outside(|| tracing::error!("a thread of the queue panicked and goes on; this is a defect"));
        thread::sleep(Duration::from_secs(1));
    }
}

/// How many notes wait to be told at most; what comes meanwhile is not told.
const UNTOLD: usize = 1_000;

type Note = Box<dyn FnOnce() + Send>;

/// Tells what others have noted, in this order, on a thread that is there as long as there is something to tell.
#[derive(Default)]
pub(crate) struct Teller {
    /// With nothing in it but while a thread tells, or none could be started.
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    untold: VecDeque<Note>,
    telling: bool,
}

impl Teller {
    /// Has something told, soon. May be called under a lock.
    pub(crate) fn note(self: &Arc<Self>, note: impl FnOnce() + Send + 'static) {
        let mut notes = lock(&self.notes);
        if notes.untold.len() < UNTOLD {
            notes.untold.push_back(Box::new(note));
        }
        if notes.telling {
            return;
        }
        let teller = Arc::clone(self);
        // Without a thread it is told with the next note for which there is one.
        let started = thread::Builder::new().name("pushpop-tell".into()).spawn(move || teller.tell_all());
        notes.telling = started.is_ok();
    }

    fn tell_all(&self) {
        while let Some(note) = self.next() {
            outside(note);
        }
    }

    fn next(&self) -> Option<Note> {
        let mut notes = lock(&self.notes);
        let next = notes.untold.pop_front();
        notes.telling = next.is_some();
        next
    }
}
