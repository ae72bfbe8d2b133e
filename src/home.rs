//! The process that a queue lives in.

use std::process;

use crate::error::{Error, Result};

/// The process that opened a queue. A child that it forks has copies of its memory and of its sockets, but none of
/// its threads: there no call is let in, nothing is sent, and no connection is closed, as they are the parent's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Home(u32);

impl Home {
    /// This process.
    pub(crate) fn here() -> Self {
        Home(process::id())
    }

    pub(crate) fn is_here(self) -> bool {
        self == Self::here()
    }

    /// Refuses whatever a child asks of its parent's queue. Before any lock: threads that held one are gone there.
    pub(crate) fn check(self) -> Result<()> {
        let here = Self::here();
        if self == here {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the queue was opened by process {}, of which this process, {}, is a fork; open another one after the fork",
            self.0, here.0
        )))
    }
}
