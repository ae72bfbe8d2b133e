//! A lease: the right to settle one delivery of one message.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::Transaction;
use time::OffsetDateTime;

use crate::calls::{Grant, Settle, Verb, Verdict};
use crate::error::{Error, Result, SettleError};
use crate::limits;
use crate::message::Message;
use crate::queue::Handle;
use crate::span;

/// A popped message, and the right to settle it until a deadline.
///
/// Settling consumes the lease; a settle that failed gives it back within the error. A lease that is
/// dropped is not settled: its message becomes free when the lease expires. Dropping does no I/O.
///
/// A lease keeps its queue alive, and can be settled after [`Queue::close`](crate::Queue::close).
///
/// ```no_run
/// use pushpop_pg::Queue;
///
/// # fn main() -> Result<(), pushpop_pg::Error> {
/// let queue = Queue::connect("postgres://localhost/app")?;
/// let lease = queue.pop("mail")?;
/// println!("{} bytes, attempt {}", lease.payload().len(), lease.attempt());
/// lease.complete()?;
/// # Ok(())
/// # }
/// ```
///
/// Settling twice does not compile:
///
/// ```compile_fail,E0382
/// use pushpop_pg::{Error, Lease};
///
/// fn twice(lease: Lease) -> Result<(), Error> {
///     lease.complete()?;
///     lease.complete()?;
///     Ok(())
/// }
/// ```
#[must_use = "a lease that is dropped keeps its message from others until it expires"]
pub struct Lease {
    queue: Arc<Handle>,
    message: Message,
    token: Vec<u8>,
    until: OffsetDateTime,
    /// How long it was at first.
    length: Duration,
    /// By the local clock; never later than the server's truth.
    ends: Instant,
}

impl Lease {
    pub(crate) fn new(queue: &Arc<Handle>, grant: Grant) -> Self {
        Lease {
            queue: Arc::clone(queue),
            message: grant.message,
            token: grant.token,
            until: grant.lease_until,
            length: grant.lease,
            ends: grant.asked + grant.lease,
        }
    }

    /// Settles the message as done.
    ///
    /// It stays visible to [`Queue::find`](crate::Queue::find) for `keep_settled`. Blocks for one
    /// round trip, at most the operation time-out.
    ///
    /// # Errors
    ///
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) when the lease expired and was handed on;
    /// a retryable error when the server could not be reached in time: the lease is in the error, and
    /// completing it again is right even if the first call had succeeded.
    #[doc(alias = "ack")]
    pub fn complete(self) -> Result<(), SettleError> {
        self.settle(Verb::Complete)
    }

    /// Settles the message as of no further value. The same as [`complete`](Self::complete), but
    /// told apart in its history.
    ///
    /// # Errors
    ///
    /// Those of [`complete`](Self::complete).
    pub fn discard(self) -> Result<(), SettleError> {
        self.settle(Verb::Discard)
    }

    /// Gives the message back, to be popped again after `delay`. Burns no attempt.
    ///
    /// # Errors
    ///
    /// Those of [`complete`](Self::complete), and [`Invalid`](crate::ErrorKind::Invalid) for a delay
    /// that is no time of this calendar.
    #[doc(alias = "snooze")]
    pub fn defer(self, delay: Duration) -> Result<(), SettleError> {
        match limits::delay(delay) {
            Ok(()) => self.settle(Verb::Defer(delay.as_secs_f64())),
            Err(e) => Err(SettleError::new(self, e)),
        }
    }

    /// Gives the message back now, to its old place in the order. Burns no attempt.
    ///
    /// # Errors
    ///
    /// Those of [`complete`](Self::complete).
    pub fn release(self) -> Result<(), SettleError> {
        self.settle(Verb::Release)
    }

    /// Ends the attempt as failed. The message is popped again after 1 s, doubling with each attempt
    /// up to 1 h, or as its [topic](crate::Topic::set) says, less up to a quarter; or is dead if this was its last attempt. `why`, up to 8,192
    /// characters of it, is kept among its [`failures`](Message::failures).
    ///
    /// # Errors
    ///
    /// Those of [`complete`](Self::complete).
    #[doc(alias = "nack")]
    pub fn fail(self, why: impl fmt::Display) -> Result<(), SettleError> {
        self.settle(Verb::fail(why, None))
    }

    fn settle(self, verb: Verb) -> Result<(), SettleError> {
        let word = verb.word();
        match self.ask(verb) {
            Ok(_) => Ok(()),
            Err(e) => {
                let error = e.during(word, Some(&self.message.topic));
                Err(SettleError::new(self, error))
            }
        }
    }

    fn ask(&self, verb: Verb) -> Result<Verdict> {
        let _span = span::settle(std::slice::from_ref(self), verb.word()).entered();
        let verdicts = self.queue.settle(&self.message.topic, vec![self.proof(verb)])?;
        match verdicts.first() {
            Some(Verdict::Lost) => Err(Error::lease_lost()),
            Some(Verdict::Gone) => Err(Error::gone()),
            Some(verdict) => Ok(*verdict),
            None => Err(Error::panicked()),
        }
    }

    pub(crate) fn proof(&self, verb: Verb) -> Settle {
        Settle { id: self.message.id, token: self.token.clone(), verb }
    }

    pub(crate) fn length(&self) -> Duration {
        self.length
    }

    pub(crate) fn token(&self) -> &[u8] {
        &self.token
    }

    /// Completes the message if the caller's transaction commits. The lease stays with the caller,
    /// so that it can be settled otherwise after a rollback.
    ///
    /// Runs on the caller's thread and connection, without the queue's time-outs. After an error the
    /// transaction is aborted; the driver's `commit()` then returns `Ok` although nothing was
    /// committed. [`Queue::transaction`](crate::Queue::transaction) tells the truth.
    ///
    /// # Errors
    ///
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost), so that what was done without the lease cannot
    /// be committed: also when the message was completed with this very lease before, so that a
    /// transaction whose commit was not answered can be repeated, and has its effect once. Any error of
    /// the server's.
    pub fn complete_in(&self, tx: &mut Transaction<'_>) -> Result<()> {
        self.queue.settle_in(tx, self, &self.queue.engine.calls.complete)
    }

    /// Discards the message if the caller's transaction commits: see
    /// [`complete_in`](Self::complete_in).
    ///
    /// # Errors
    ///
    /// Those of [`complete_in`](Self::complete_in).
    pub fn discard_in(&self, tx: &mut Transaction<'_>) -> Result<()> {
        self.queue.settle_in(tx, self, &self.queue.engine.calls.discard)
    }

    /// Moves the deadline to `lease` from now, or leaves it where it is if that is later. A lease has
    /// 1 s to 24 h.
    ///
    /// # Errors
    ///
    /// Those of [`complete`](Self::complete), and [`Invalid`](crate::ErrorKind::Invalid) for a
    /// length outside the limits.
    #[doc(alias = "visibility")]
    pub fn extend(&mut self, lease: Duration) -> Result<()> {
        let during = |e: Error| e.during("extend", Some(&self.message.topic));
        limits::lease(lease).map_err(during)?;
        let asked = Instant::now();
        if let Verdict::Extended(until) = self.ask(Verb::Extend(lease.as_secs_f64())).map_err(during)? {
            self.until = self.until.max(until);
            self.ends = self.ends.max(asked + lease);
            self.message.state = crate::message::State::Leased { until: self.until };
        }
        Ok(())
    }

    /// The deadline, by the server's clock.
    pub fn deadline(&self) -> OffsetDateTime {
        self.until
    }

    /// The time left, by the local monotonic clock: never more than the server grants.
    pub fn remaining(&self) -> Duration {
        self.ends.saturating_duration_since(Instant::now())
    }
}

impl Deref for Lease {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.message
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("message", &self.message)
            .field("until", &self.until)
            .finish_non_exhaustive()
    }
}
