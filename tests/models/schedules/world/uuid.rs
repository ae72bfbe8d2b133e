//! In place of the crate of this name: ids that are the same each time, so that a schedule can be repeated.

use std::cell::Cell;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Uuid([u8; 16]);

thread_local! {
    static MADE: Cell<u128> = const { Cell::new(0) };
}

pub(crate) fn reset() {
    MADE.set(0);
}

impl Uuid {
    pub(crate) fn now_v7() -> Self {
        MADE.set(MADE.get() + 1);
        Uuid(MADE.get().to_be_bytes())
    }

    pub(crate) fn new_v4() -> Self {
        Uuid(u128::from(super::random(u64::MAX)).to_le_bytes())
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", u128::from_be_bytes(self.0))
    }
}
