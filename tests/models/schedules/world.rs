//! What the copies of the sources find in place of the standard library, of the driver and of the server.

pub(crate) mod clock;
pub(crate) mod postgres;
pub(crate) mod r2d2;
pub(crate) mod schedule;
pub(crate) mod server;
pub(crate) mod sync;
pub(crate) mod thread;
pub(crate) mod uuid;

pub(crate) mod time {
    //! In place of `std::time`.

    pub(crate) use std::time::Duration;

    pub(crate) use super::clock::Instant;
}

pub(crate) mod collections {
    //! In place of `std::collections`: the order of a map is the same each time, so that a schedule can be repeated.

    use std::hash::{BuildHasherDefault, DefaultHasher};

    pub(crate) use std::collections::{BTreeMap, VecDeque};

    pub(crate) type HashMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;
}

pub(crate) mod fallible_iterator {
    //! In place of the crate of this name.

    pub(crate) trait FallibleIterator {
        type Item;
        type Error;

        fn next(&mut self) -> Result<Option<Self::Item>, Self::Error>;
    }
}

use shuttle::rand::RngCore;

/// A number below another, as the schedule has it.
pub(crate) fn random(below: u64) -> u64 {
    shuttle::rand::thread_rng().next_u64() % below
}

/// One of a few.
pub(crate) fn one_of<T: Copy>(choices: &[T]) -> T {
    choices[random(choices.len() as u64) as usize]
}

/// Runs something in a new world, to the end of all its threads.
pub(crate) fn run(body: impl FnOnce()) {
    uuid::reset();
    thread::reset();
    clock::reset();
    let clock = shuttle::thread::spawn(clock::tick);
    body();
    thread::join_all();
    clock::stop();
    assert!(clock.join().is_ok());
}
