//! In place of `outside.rs`: nobody logs, and the observer is the scenario's.

use crate::world::sync::Arc;

pub(crate) struct Held;

impl Held {
    pub(crate) fn new() -> Self {
        Held
    }
}

pub(crate) fn outside(tell: impl FnOnce()) -> bool {
    tell();
    true
}

pub(crate) fn steadily(mut work: impl FnMut()) {
    work();
}

#[derive(Default)]
pub(crate) struct Teller {}

impl Teller {
    pub(crate) fn note(self: &Arc<Self>, note: impl FnOnce() + Send + 'static) {
        drop(note);
    }
}
