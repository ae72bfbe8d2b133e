//! What a worker's handler is given, and what it says.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use postgres::Transaction;

use crate::error::Result;
use crate::lease::Lease;
use crate::message::Message;
use crate::watch::{Running, Watch};

/// Any error: what a handler returns when its attempt has failed. `?` works on every error type.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What becomes of a message whose handler has returned. `()` stands for [`Complete`](Self::Complete).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It is done: see [`Lease::complete`](crate::Lease::complete).
    Complete,
    /// It is of no further value: see [`Lease::discard`](crate::Lease::discard).
    Discard,
    /// It is handed out again after this time, and the attempt is not counted: see
    /// [`Lease::defer`](crate::Lease::defer).
    Defer(Duration),
    /// The handler has settled it in a transaction of its own: see [`Job::complete_in`].
    Settled,
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Outcome::Complete
    }
}

/// A message in the hands of a worker's handler. Dereferences to the [`Message`].
///
/// Its lease is extended for as long as the handler runs, so there is no need to think of it.
///
/// ```no_run
/// use pushpop_pg::{BoxError, Job, Outcome};
///
/// fn handle(job: &Job) -> Result<Outcome, BoxError> {
///     for line in std::str::from_utf8(job.payload())?.lines() {
///         // Somebody else may have the message by now, or the program is to end.
///         if job.is_lost() || job.should_stop() {
///             return Err("interrupted".into());
///         }
///         if line.is_empty() {
///             return Ok(Outcome::Discard);
///         }
///         println!("{line}");
///     }
///     Ok(Outcome::Complete)
/// }
/// ```
pub struct Job {
    pub(crate) lease: Lease,
    pub(crate) running: Arc<Running>,
    pub(crate) watch: Arc<Watch>,
}

impl Job {
    /// Whether the message is not the handler's any more: its lease could not be extended in time and
    /// may have been handed on, or the worker has taken it away because the handler ran longer than the
    /// [limit](crate::Worker::limit) or the [grace period](crate::Worker::grace). What the handler returns then
    /// changes nothing. Sends nothing.
    pub fn is_lost(&self) -> bool {
        self.running.is_lost()
    }

    /// Whether the handler should come to an end soon: the worker is stopping, or the message
    /// [is lost](Self::is_lost). Sends nothing.
    pub fn should_stop(&self) -> bool {
        self.watch.is_stopping() || self.is_lost()
    }

    /// Completes the message if the handler's own transaction commits, so that its effects happen exactly
    /// once. The handler then returns [`Outcome::Settled`]. See
    /// [`Lease::complete_in`](crate::Lease::complete_in).
    ///
    /// # Errors
    ///
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost), so that what was done without the lease cannot be
    /// committed; any error of the server's.
    ///
    /// ```no_run
    /// use pushpop_pg::{Outcome, Queue, Worker};
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// Worker::new(&queue)
    ///     .handle("orders", 4, |job| {
    ///         queue.transaction(|tx| {
    ///             tx.execute("insert into shipped (id) values ($1)", &[&job.id()])?;
    ///             job.complete_in(tx)
    ///         })?;
    ///         Ok(Outcome::Settled)
    ///     })
    ///     .run()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn complete_in(&self, tx: &mut Transaction<'_>) -> Result<()> {
        self.lease.complete_in(tx)
    }
}

impl Deref for Job {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.lease
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("message", &**self).field("lost", &self.is_lost()).finish_non_exhaustive()
    }
}
