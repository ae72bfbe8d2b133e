//! The queue: what a program holds, shares between its threads, and calls.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::Transaction;
use uuid::Uuid;

use crate::builder::Builder;
use crate::calls::{Grant, Settle, Verb, Verdict};
use crate::engine::Engine;
use crate::error::{Error, Result, SettleError};
use crate::lane::{Group, PopJob, PushJob, SettleJob};
use crate::lease::Lease;
use crate::limits;
use crate::link::Call;
use crate::message::{Message, NewMessage};
use crate::slot::{Slot, Waited};
use crate::span;

/// A message queue in PostgreSQL.
///
/// Cheap to clone, and meant to be shared: clones are the same queue. Concurrent calls on one queue
/// share statements and commits. When the last clone and the last [`Lease`] are gone, its threads
/// and connections end.
///
/// ```no_run
/// use pushpop_pg::Queue;
///
/// # fn main() -> Result<(), pushpop_pg::Error> {
/// let queue = Queue::connect("postgres://localhost/app")?;
/// queue.push("mail", "hello")?;
/// let lease = queue.pop("mail")?;
/// assert_eq!(lease.payload(), b"hello");
/// lease.complete()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Queue {
    pub(crate) handle: Arc<Handle>,
    /// That of its pops; `None`: as the topic or the builder says.
    pub(crate) lease: Option<Duration>,
}

/// The engine, as long as somebody holds a queue or a lease.
pub(crate) struct Handle {
    pub(crate) engine: Arc<Engine>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.engine.end();
    }
}

impl Handle {
    /// When a call that begins now must have ended.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.engine.settings.operation_timeout
    }

    pub(crate) fn settle(&self, topic: &str, settles: Vec<Settle>) -> Result<Vec<Verdict>> {
        let (slot, deadline) = (Arc::new(Slot::new()), self.deadline());
        self.engine.settle(topic, SettleJob { settles, unwanted: false, slot: Arc::clone(&slot) })?;
        self.engine.wait(&slot, Some(deadline))
    }

    /// Settles a lease in a caller's transaction, on its thread.
    pub(crate) fn settle_in(&self, tx: &mut Transaction<'_>, lease: &Lease, call: &Call) -> Result<()> {
        let _span = span::settle(std::slice::from_ref(lease), call.name).entered();
        self.engine.home.check().map_err(|e| e.during(call.name, Some(lease.topic())))?;
        let keep = self.engine.settings.keep_settled.as_secs_f64();
        call.run_in(tx, &[&lease.topic(), &lease.id(), &lease.token(), &keep])
            .map(drop)
            .map_err(|e| e.during(call.name, Some(lease.topic())))
    }
}

impl Queue {
    /// Opens a queue: connects, installs or migrates the schema, with the default settings.
    ///
    /// Blocks for as long as that takes; fails at once, with the cause, when the server, the
    /// database, the user or the password is wrong.
    ///
    /// # Errors
    ///
    /// Those of [`Builder::connect`].
    pub fn connect(url: &str) -> Result<Queue> {
        Self::builder().connect(url)
    }

    /// A builder, for other settings than the default ones.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The same queue with another length of lease, for all forms of pop: 1 s to 24 h. It goes before
    /// what the topic says. A length outside these limits is refused by the pop.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use pushpop_pg::Queue;
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// let lease = queue.with_lease(Duration::from_secs(30)).try_pop("mail")?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    #[doc(alias = "visibility")]
    pub fn with_lease(&self, lease: Duration) -> Queue {
        Queue { handle: Arc::clone(&self.handle), lease: Some(lease) }
    }

    /// Ends waiting pops with [`Closed`](crate::ErrorKind::Closed), and iterators. Afterwards pushes,
    /// pops and transactions are refused; leases that are held can still be settled, and messages and
    /// topics looked at. Closing again does nothing.
    ///
    /// Blocks until messages that were on their way to waiting pops are given back, up to a second. Those
    /// of a server that does not answer in that time are free again when their leases end.
    pub fn close(&self) {
        self.engine().close();
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.handle.engine
    }

    // Push.

    /// Pushes a message, and returns its id. A message whose id is still stored in the topic, waiting
    /// or settled, changes nothing.
    ///
    /// Blocks until the message is durable, at most the operation time-out.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) when the topic or the message is outside the
    /// [limits](crate#limits): nothing was sent. [`Closed`](crate::ErrorKind::Closed).
    /// [`Timeout`](crate::ErrorKind::Timeout), [`Connection`](crate::ErrorKind::Connection):
    /// [`is_indeterminate`](Error::is_indeterminate) says whether it may have been pushed; pushing
    /// the same [`NewMessage`] again is safe.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use pushpop_pg::{NewMessage, Queue};
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// queue.push("mail", "at once")?;
    /// queue.push("mail", NewMessage::new("in a minute").delay(Duration::from_secs(60)))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn push(&self, topic: &str, message: impl Into<NewMessage>) -> Result<Uuid> {
        let message = message.into();
        let id = message.id;
        self.push_all(topic, vec![message]).map(|_| id).map_err(|e| e.during("push", Some(topic)))
    }

    /// Pushes a message, and says whether it is new: `false` when a message with its id was stored
    /// already, so that nothing was changed.
    ///
    /// After an error that [is indeterminate](Error::is_indeterminate), a repeated call may also
    /// find the message that the first one had pushed.
    ///
    /// # Errors
    ///
    /// Those of [`push`](Self::push).
    ///
    /// ```no_run
    /// use pushpop_pg::uuid::uuid;
    /// use pushpop_pg::{NewMessage, Queue};
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// let message = NewMessage::new("once").with_id(uuid!("67e55044-10b1-426f-9247-bb680e5fe0c8"));
    /// assert!(queue.push_once("mail", message.clone())?);
    /// assert!(!queue.push_once("mail", message)?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn push_once(&self, topic: &str, message: impl Into<NewMessage>) -> Result<bool> {
        self.push_all(topic, vec![message.into()])
            .map(|duplicates| duplicates.first() == Some(&false))
            .map_err(|e| e.during("push", Some(topic)))
    }

    /// Pushes messages in one statement, all or none, and returns their ids in the same order.
    ///
    /// Up to 10,000 messages, of 256 MiB together. An empty batch is `Ok`, and sends nothing.
    ///
    /// # Errors
    ///
    /// Those of [`push`](Self::push).
    pub fn push_many<M: Into<NewMessage>>(
        &self,
        topic: &str,
        messages: impl IntoIterator<Item = M>,
    ) -> Result<Vec<Uuid>> {
        let messages: Vec<NewMessage> = messages.into_iter().map(Into::into).collect();
        let ids = messages.iter().map(|m| m.id).collect();
        self.push_all(topic, messages).map(|_| ids).map_err(|e| e.during("push", Some(topic)))
    }

    fn push_all(&self, topic: &str, messages: Vec<NewMessage>) -> Result<Vec<bool>> {
        let _span = span::push(topic, &messages).entered();
        limits::topic(topic)?;
        let bytes = self.check_messages(&messages)?;
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let (slot, deadline) = (Arc::new(Slot::new()), self.handle.deadline());
        self.engine().push(topic, PushJob { messages, bytes, slot: Arc::clone(&slot) })?;
        self.engine().wait(&slot, Some(deadline))
    }

    /// Checks messages against the limits, and returns the bytes they have together.
    fn check_messages(&self, messages: &[NewMessage]) -> Result<usize> {
        limits::push_batch(messages.len())?;
        let most = self.engine().settings.max_payload;
        messages.iter().try_for_each(|message| message.check(most))?;
        let bytes = messages.iter().map(NewMessage::bytes).sum();
        limits::push_bytes(bytes)?;
        Ok(bytes)
    }

    /// Pushes a message if the caller's transaction commits; nobody sees it before.
    ///
    /// Runs on the caller's thread and connection, without the queue's time-outs. After an error the
    /// transaction is aborted; the driver's `commit()` then returns `Ok` although nothing was
    /// committed. [`Queue::transaction`] tells the truth.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) as for [`push`](Self::push): nothing was sent. Any error
    /// of the server's.
    ///
    /// ```no_run
    /// use pushpop_pg::Queue;
    /// use pushpop_pg::postgres::{Client, NoTls};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// let mut client = Client::connect("postgres://localhost/app", NoTls)?;
    /// let mut tx = client.transaction()?;
    /// tx.execute("insert into orders (id) values (7)", &[])?;
    /// queue.push_in(&mut tx, "orders", "7")?;
    /// tx.commit()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn push_in(
        &self,
        tx: &mut Transaction<'_>,
        topic: &str,
        message: impl Into<NewMessage>,
    ) -> Result<Uuid> {
        let message = message.into();
        let _span = span::push(topic, std::slice::from_ref(&message)).entered();
        let during = |e: Error| e.during("push", Some(topic));
        self.engine().home.check().map_err(during)?;
        limits::topic(topic).map_err(during)?;
        self.check_messages(std::slice::from_ref(&message)).map_err(during)?;
        let fallback = self.engine().settings.max_attempts;
        let (delay, ready_at) = message.due();
        self.engine()
            .calls
            .push
            .run_in(
                tx,
                &[
                    &topic,
                    &message.payload,
                    &message.id,
                    &delay,
                    &ready_at,
                    &crate::calls::headers_json(&message.headers),
                    &message.max_attempts.wanted(),
                    &None::<Uuid>,
                    &fallback,
                ],
            )
            .map_err(|e| during(e.blame(topic, message.headers.iter())))?;
        Ok(message.id)
    }

    // Pop.

    /// Pops the oldest message that is ready, if there is one. Does not wait for one; blocks for one
    /// round trip, at most the operation time-out.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for a topic or a lease outside the limits,
    /// [`Closed`](crate::ErrorKind::Closed), and at once whatever is wrong with the connection.
    pub fn try_pop(&self, topic: &str) -> Result<Option<Lease>> {
        self.pop_timeout(topic, Duration::ZERO)
    }

    fn pop_once(&self, topic: &str, max: usize) -> Result<Vec<Lease>> {
        let slot = self.ask(topic, max, false)?;
        self.engine().wait(&slot, Some(self.handle.deadline())).map(|grants| self.leases(grants))
    }

    /// Pops the oldest message that is ready, and waits for one if there is none, for as long as it
    /// takes. Rides through restarts and failovers of the server.
    ///
    /// A waiting thread holds no connection and sends no queries; all those that wait cost one query a poll interval,
    /// whatever their topics.
    ///
    /// # Errors
    ///
    /// [`Closed`](crate::ErrorKind::Closed) once the queue is closed; errors that no waiting mends:
    /// a topic or lease outside the limits, missing rights, a schema that is gone.
    pub fn pop(&self, topic: &str) -> Result<Lease> {
        let leases = self.pop_until(topic, 1, None).map_err(|e| e.during("pop", Some(topic)))?;
        leases.into_iter().next().ok_or_else(|| Error::panicked().during("pop", Some(topic)))
    }

    /// Pops the oldest message that is ready, and waits for one until `timeout` has passed; `None`
    /// when there was none. [`Duration::MAX`] waits for ever.
    ///
    /// # Errors
    ///
    /// Those of [`pop`](Self::pop); and what was wrong with the connection, if that was so until the
    /// end.
    pub fn pop_timeout(&self, topic: &str, timeout: Duration) -> Result<Option<Lease>> {
        self.pop_until(topic, 1, Some(timeout))
            .map(|leases| leases.into_iter().next())
            .map_err(|e| e.during("pop", Some(topic)))
    }

    /// Pops up to `max` messages, oldest first, 1 to 1,000. Waits until there is at least one or
    /// `timeout` has passed, and returns what there is then; it does not wait for more.
    ///
    /// # Errors
    ///
    /// Those of [`pop_timeout`](Self::pop_timeout).
    pub fn pop_many(&self, topic: &str, max: usize, timeout: Duration) -> Result<Vec<Lease>> {
        self.pop_until(topic, max, Some(timeout)).map_err(|e| e.during("pop", Some(topic)))
    }

    fn pop_until(&self, topic: &str, max: usize, timeout: Option<Duration>) -> Result<Vec<Lease>> {
        let span = span::pop(topic);
        let popped = span.in_scope(|| self.wait_until(topic, max, timeout));
        if let Ok(leases) = &popped {
            span::popped(&span, leases);
        }
        popped
    }

    fn wait_until(&self, topic: &str, max: usize, timeout: Option<Duration>) -> Result<Vec<Lease>> {
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return self.pop_once(topic, max);
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let slot = self.ask(topic, max, true)?;
        self.await_grants(&slot, deadline)
    }

    fn await_grants(&self, slot: &Slot<Vec<Grant>>, deadline: Option<Instant>) -> Result<Vec<Lease>> {
        match slot.wait(deadline) {
            Waited::Done(result) => result.map(|grants| self.leases(grants)),
            Waited::Unsent(Some(error)) => Err(error),
            // What a flight under way may still bring is released.
            Waited::Unsent(None) | Waited::Unknown => Ok(Vec::new()),
        }
    }

    /// Pops the oldest message of whichever topic has one, and waits for one until `timeout` has passed; `None` when
    /// there was none. No order is promised between the topics, and none of them starves. 1 to 1,000 topics.
    ///
    /// It costs one statement for all topics, and while it waits, one query a poll interval. A zero `timeout` asks each
    /// once.
    ///
    /// # Errors
    ///
    /// Those of [`pop_timeout`](Self::pop_timeout).
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use pushpop_pg::Queue;
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// if let Some(lease) = queue.pop_any(&["mail", "fax"], Duration::from_secs(10))? {
    ///     println!("a message of {}", lease.topic());
    ///     lease.complete()?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn pop_any(&self, topics: &[&str], timeout: Duration) -> Result<Option<Lease>> {
        self.pop_any_until(topics, timeout).map_err(|e| e.during("pop", None))
    }

    fn pop_any_until(&self, topics: &[&str], timeout: Duration) -> Result<Option<Lease>> {
        if timeout.is_zero() {
            return self.try_pop_any(topics);
        }
        limits::topics(topics)?;
        let deadline = Instant::now().checked_add(timeout);
        let span = span::pop_any(topics);
        let leases = span.in_scope(|| {
            let slot = self.ask_any(&Group::new(topics), true, false)?;
            self.await_grants(&slot, deadline)
        })?;
        span::popped(&span, &leases);
        Ok(leases.into_iter().next())
    }

    fn try_pop_any(&self, topics: &[&str]) -> Result<Option<Lease>> {
        limits::topics(topics)?;
        self.try_pop_group(&Group::new(topics))
    }

    pub(crate) fn try_pop_group(&self, group: &Arc<Group>) -> Result<Option<Lease>> {
        let span = span::pop_any(&group.topics);
        let leases = span.in_scope(|| {
            let slot = self.ask_any(group, false, false)?;
            self.engine().wait(&slot, Some(self.handle.deadline())).map(|grants| self.leases(grants))
        })?;
        span::popped(&span, &leases);
        Ok(leases.into_iter().next())
    }

    /// Asks for a message of whichever topic has one.
    pub(crate) fn ask_any(
        &self,
        group: &Arc<Group>,
        waits: bool,
        patient: bool,
    ) -> Result<Arc<Slot<Vec<Grant>>>> {
        self.lease.map_or(Ok(()), limits::lease)?;
        let slot = Arc::new(Slot::new());
        self.engine().pop_any(group, PopJob { patient, ..self.pop_job(1, waits, &slot) })?;
        Ok(slot)
    }

    fn ask(&self, topic: &str, max: usize, waits: bool) -> Result<Arc<Slot<Vec<Grant>>>> {
        limits::topic(topic)?;
        self.lease.map_or(Ok(()), limits::lease)?;
        limits::batch(max)?;
        let slot = Arc::new(Slot::new());
        self.engine().pop(topic, self.pop_job(max, waits, &slot))?;
        Ok(slot)
    }

    pub(crate) fn pop_job(&self, max: usize, waits: bool, slot: &Arc<Slot<Vec<Grant>>>) -> PopJob {
        PopJob { max, lease: self.lease, waits, patient: false, slot: Arc::clone(slot) }
    }

    pub(crate) fn leases(&self, grants: Vec<Grant>) -> Vec<Lease> {
        grants.into_iter().map(|grant| Lease::new(&self.handle, grant)).collect()
    }

    /// Pops messages one after the other, waiting for each; ends when the queue is closed.
    ///
    /// After an error that waiting does not mend the iterator returns it, and goes on at the next
    /// call, at most once a second.
    pub fn iter(&self, topic: &str) -> Iter<'_> {
        Iter { queue: self, topic: topic.to_owned(), failed: None }
    }

    // Settle many.

    /// Completes leases in one statement for each topic, and returns those that were lost.
    ///
    /// # Errors
    ///
    /// As for [`Lease::complete`], with all leases that may not have been completed.
    pub fn complete_many(&self, leases: Vec<Lease>) -> Result<Vec<Lease>, SettleError<Vec<Lease>>> {
        let mut topics: Vec<(String, Vec<Lease>)> = Vec::new();
        for lease in leases {
            match topics.iter_mut().find(|(topic, _)| topic == lease.topic()) {
                Some((_, same)) => same.push(lease),
                None => topics.push((lease.topic().to_owned(), vec![lease])),
            }
        }
        let mut lost = Vec::new();
        let mut failed: (Vec<Lease>, Option<Error>) = (Vec::new(), None);
        for (topic, leases) in topics {
            let _span = span::settle(&leases, Verb::Complete.word()).entered();
            let settles = leases.iter().map(|lease| lease.proof(Verb::Complete)).collect();
            match self.handle.settle(&topic, settles) {
                Ok(verdicts) => {
                    for (lease, verdict) in leases.into_iter().zip(verdicts) {
                        match verdict {
                            Verdict::Settled | Verdict::Extended(_) => {}
                            Verdict::Lost => lost.push(lease),
                            Verdict::Gone => {
                                failed.0.push(lease);
                                failed.1 = Some(Error::gone().during("complete", Some(&topic)));
                            }
                        }
                    }
                }
                Err(e) => {
                    failed.0.extend(leases);
                    failed.1 = Some(e.during("complete", Some(&topic)));
                }
            }
        }
        match failed.1 {
            None => Ok(lost),
            Some(error) => {
                failed.0.extend(lost);
                Err(SettleError::new(failed.0, error))
            }
        }
    }

    // Look.

    /// A message by its id, if it is still stored: waiting, leased, settled or dead.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for a topic outside the limits; whatever is wrong with
    /// the connection.
    pub fn find(&self, topic: &str, id: Uuid) -> Result<Option<Message>> {
        let during = |e: Error| e.blame(topic, std::iter::empty()).during("find", Some(topic));
        limits::topic(topic).map_err(during)?;
        let owned = topic.to_owned();
        self.call(move |engine, link, deadline| {
            let rows = link.run(deadline, &engine.calls.find, &[&owned, &id])?;
            rows.first().map(|row| Message::read(&owned, row)).transpose().map_err(Error::from)
        })
        .map_err(during)
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("lease", &self.lease)
            .field("closed", &self.engine().is_closed())
            .finish_non_exhaustive()
    }
}

/// The messages of a topic, as they come: see [`Queue::iter`].
#[derive(Debug)]
pub struct Iter<'a> {
    queue: &'a Queue,
    topic: String,
    failed: Option<Instant>,
}

impl Iterator for Iter<'_> {
    type Item = Result<Lease>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(failed) = self.failed.take() {
            let patience = (failed + Duration::from_secs(1)).saturating_duration_since(Instant::now());
            std::thread::sleep(patience);
        }
        match self.queue.pop(&self.topic) {
            Err(e) if e.kind() == crate::error::ErrorKind::Closed => None,
            Err(e) => {
                self.failed = Some(Instant::now());
                Some(Err(e))
            }
            ok => Some(ok),
        }
    }
}
