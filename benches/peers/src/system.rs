//! What every queue that takes part can do.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use pushpop_measure::Result;

use crate::work::Work;

/// A queue in one of its configurations.
pub(crate) trait Peer {
    fn name(&self) -> &'static str;

    /// Whether its figures may stand beside the others': its adapter gets out of it what a plain program does. If not,
    /// it takes part only when it is named.
    fn is_fair(&self) -> bool {
        true
    }

    /// The schema that holds all it has, and nothing else.
    fn schema(&self) -> &'static str;

    /// Makes the tables. The schema is not there.
    fn install(&self, url: &str) -> Result<()>;

    /// Connects for so many threads, which is not measured.
    fn open(&self, url: &str, threads: usize) -> Result<Box<dyn System>>;
}

/// A queue with its connections. What takes turns to call it, `threads`, are threads where its calls
/// block, and tasks of its runtime where they don't.
pub(crate) trait System: Sync {
    /// Pushes all messages, each call committed before the next of the same thread.
    fn push(&self, work: &Arc<Work>, threads: usize) -> Result<()>;

    /// Works all messages, and returns the moment at which the last of them was settled. Says when it is
    /// `up`, and would work what is pushed: neither its start nor its stop is measured.
    fn drain(&self, work: &Arc<Work>, threads: usize, up: Sender<()>) -> Result<Instant>;

    /// Pushes, pops and settles in turn on each thread. Does nothing, and returns `false`, where it is the
    /// framework's worker that pops.
    fn in_turn(&self, work: &Arc<Work>, threads: usize) -> Result<bool> {
        let _ = (work, threads);
        Ok(false)
    }

    /// How many messages the tables hold that are not settled.
    fn unsettled(&mut self) -> Result<u64>;
}
