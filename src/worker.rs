//! Workers: threads that pop messages, have them handled, and settle them.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::calls::{Grant, Settle, Verb, Verdict};
use crate::crew::backoff;
use crate::error::{Error, ErrorKind, Result};
use crate::job::{BoxError, Job, Outcome};
use crate::lane::{Group, SettleJob, TurnJob};
use crate::lease::Lease;
use crate::limits;
use crate::observer::Handled;
use crate::outside::outside;
use crate::queue::Queue;
use crate::slot::{Slot, Waited, lock};
use crate::span;
use crate::stopping::{Cause, Ended, Leaving, Stopper, Stopping};
use crate::watch::{Running, Watch};

/// Handles the messages of some topics, with a number of threads for each.
///
/// A handler says by its return value what becomes of the message: see [`Outcome`]. An error or a panic is a
/// failed attempt: the message comes again after a [backoff](Self::backoff), or is dead when it has no attempt left.
/// While a handler runs, its lease is extended by a thread of the queue's, so a lease need not be as long as the
/// longest handler. A handler may borrow from its surroundings.
///
/// ```no_run
/// use pushpop_pg::{Error, Outcome, Queue, Worker};
///
/// fn send(mail: &[u8]) -> Result<(), std::io::Error> {
///     println!("{} bytes", mail.len());
///     Ok(())
/// }
///
/// fn main() -> Result<(), Error> {
///     let queue = Queue::connect("postgres://localhost/app")?;
///     let worker = Worker::new(&queue).handle("mail", 8, |job| {
///         if job.payload().is_empty() {
///             return Ok(Outcome::Discard);
///         }
///         send(job.payload())?;
///         Ok(Outcome::Complete)
///     });
///     let stopper = worker.stopper();
///     std::thread::spawn(move || {
///         // Until somebody presses Enter.
///         let _ = std::io::stdin().read_line(&mut String::new());
///         stopper.stop();
///     });
///     worker.run()?;
///     Ok(())
/// }
/// ```
///
/// A worker needs one connection more than its queue, from the first lease on that has to be extended.
#[must_use = "a worker does nothing until it is run"]
pub struct Worker<'a> {
    queue: Queue,
    handlers: Vec<Handler<'a>>,
    backoff: Option<Backoff>,
    limit: Option<Duration>,
    grace: Duration,
    stopping: Arc<Stopping>,
    #[cfg(feature = "signals")]
    signals: bool,
}

/// How often a settle is tried again whose message may still be ours.
const RETRIES: u32 = 20;

/// A pop that is under way.
type Asked = Arc<Slot<Vec<Grant>>>;

type Call<'a> = dyn Fn(&Job) -> Result<Outcome, BoxError> + Send + Sync + 'a;

struct Handler<'a> {
    topics: Vec<String>,
    group: Arc<Group>,
    threads: usize,
    call: Box<Call<'a>>,
}

impl<'a> Worker<'a> {
    /// A worker on a queue, without handlers yet. The length of its leases is that of the queue.
    pub fn new(queue: &Queue) -> Self {
        Worker {
            queue: queue.clone(),
            handlers: Vec::new(),
            backoff: None,
            limit: None,
            grace: Duration::from_secs(30),
            stopping: Arc::default(),
            #[cfg(feature = "signals")]
            signals: false,
        }
    }

    /// Has the messages of a topic handled by `handler`, on so many threads: 1 to 10,000.
    ///
    /// A thread settles a message and pops the next in one round trip.
    pub fn handle<R: Into<Outcome>>(
        self,
        topic: &str,
        threads: usize,
        handler: impl Fn(&Job) -> Result<R, BoxError> + Send + Sync + 'a,
    ) -> Self {
        self.handle_any(&[topic], threads, handler)
    }

    /// The same for the messages of several topics, whichever has one, in no order between them.
    ///
    /// Up to 1,000 topics, each of which has its turn. It costs more than one topic does: settling a message takes a round
    /// trip of its own. While there is nothing, all of them cost one query a poll interval.
    pub fn handle_any<R: Into<Outcome>>(
        mut self,
        topics: &[&str],
        threads: usize,
        handler: impl Fn(&Job) -> Result<R, BoxError> + Send + Sync + 'a,
    ) -> Self {
        self.handlers.push(Handler {
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            group: Group::new(topics),
            threads,
            call: Box::new(move |job| handler(job).map(Into::into)),
        });
        self
    }

    /// How long a message rests after a failed attempt. Default: as for [`Lease::fail`].
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = Some(backoff);
        self
    }

    /// How long a handler may take for one message. Afterwards the attempt has failed, and the handler has
    /// [lost](Job::is_lost) its message. The handler itself is not ended: nothing can end a thread. Default: no limit.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// How long handlers may go on once the worker is stopped. Default: 30 s.
    ///
    /// The messages of those that take longer are given back then, which burns no attempt, and what they
    /// return is ignored. [`run`](Self::run) still waits for them, as they may borrow from its caller.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Has [`run`](Self::run) stop at the first SIGTERM or SIGINT. A second one ends the process at once, with
    /// status 128 + its number (143, 130); leases that are held then expire. So does the first one
    /// that comes when no worker runs any more. Default: signals are left alone.
    #[cfg(feature = "signals")]
    pub fn signals(mut self) -> Self {
        self.signals = true;
        self
    }

    /// Stops the worker, from any thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.stopping))
    }

    /// Handles messages until the worker is stopped or its queue closed.
    ///
    /// Blocks until all handlers have returned. When it is stopped, no more messages are popped; handlers
    /// that run may finish within the [grace period](Self::grace). A worker that was stopped stays so.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) for a topic or a number of threads outside the limits, or no
    /// handler at all. Errors of a pop that no waiting mends, such as missing rights: the worker has stopped then.
    pub fn run(&self) -> Result<Ended> {
        self.check().map_err(|e| e.during("run", None))?;
        #[cfg(feature = "signals")]
        let _signals = self
            .signals
            .then(|| crate::signals::Listening::start(&self.stopping))
            .transpose()
            .map_err(|e| e.during("run", None))?;
        let watch = self.watch()?;
        let unfinished = thread::scope(|scope| {
            for handler in &self.handlers {
                for _ in 0..handler.threads {
                    self.stopping.enter();
                    let (watch, stopping) = (&watch, &self.stopping);
                    let spawned =
                        thread::Builder::new().name("pushpop-work".into()).spawn_scoped(scope, move || {
                            let _leaves = Leaving(stopping);
                            let served = catch_unwind(AssertUnwindSafe(|| self.serve(handler, watch)));
                            if served.is_err() {
                                stopping.fail(Error::died("pushpop-work"));
                            }
                        });
                    if let Err(e) = spawned {
                        self.stopping.leave();
                        self.stopping.fail(Error::connection(format!("cannot start a thread: {e}")));
                    }
                }
            }
            self.stopping.await_stop();
            watch.stop();
            if self.stopping.await_threads(self.grace) { 0 } else { watch.release_all() }
        });
        watch.end();
        let ended = self.stopping.ended(unfinished).map_err(|e| e.during("run", None))?;
        outside(|| tracing::info!("the worker has ended: {ended}"));
        Ok(ended)
    }

    /// Handles messages until none is ready in any of its topics and no handler runs, and returns how many it
    /// has handled. For tests and scripts: does not wait for delayed messages, nor for those that others
    /// have leased.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run), and at once whatever is wrong with the connection.
    pub fn run_until_idle(&self) -> Result<usize> {
        self.check().map_err(|e| e.during("run", None))?;
        let watch = self.watch()?;
        let idle = Idle::default();
        thread::scope(|scope| {
            for handler in &self.handlers {
                for _ in 0..handler.threads {
                    idle.enter();
                    let (watch, idle) = (&watch, &idle);
                    let spawned =
                        thread::Builder::new().name("pushpop-work".into()).spawn_scoped(scope, move || {
                            let exhausted =
                                catch_unwind(AssertUnwindSafe(|| self.exhaust(handler, watch, idle)));
                            if exhausted.is_err() {
                                idle.fail(Error::died("pushpop-work"));
                            }
                        });
                    if let Err(e) = spawned {
                        idle.fail(Error::connection(format!("cannot start a thread: {e}")));
                    }
                }
            }
        });
        watch.end();
        idle.handled()
    }

    /// Handles one message on this thread, if one is ready in any of its topics, and returns whether
    /// there was one.
    ///
    /// # Errors
    ///
    /// Those of [`run_until_idle`](Self::run_until_idle).
    pub fn work_once(&self) -> Result<bool> {
        self.check().map_err(|e| e.during("run", None))?;
        for handler in &self.handlers {
            if let Some(lease) = self.queue.try_pop_group(&handler.group)? {
                let watch = self.watch()?;
                self.work(handler, lease, &watch, false);
                watch.end();
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn check(&self) -> Result<()> {
        self.queue.engine().home.check()?;
        if self.handlers.is_empty() {
            return Err(Error::invalid("a worker has at least one handler"));
        }
        for handler in &self.handlers {
            limits::topics(&handler.topics)?;
            limits::threads(handler.threads)?;
        }
        Ok(())
    }

    fn watch(&self) -> Result<Arc<Watch>> {
        Watch::start(self.queue.engine(), self.limit, self.backoff.clone())
    }

    /// Handles message after message until the worker stops.
    fn serve(&self, handler: &Handler<'a>, watch: &Arc<Watch>) {
        let (mut group, mut asked) = (Arc::clone(&handler.group), None);
        while let Some(lease) = self.next(&mut group, asked.take()) {
            asked = self.work(handler, lease, watch, true);
        }
    }

    /// The next message, from a pop that is under way already or a new one.
    fn next(&self, group: &mut Arc<Group>, asked: Option<Asked>) -> Option<Lease> {
        if asked.is_none() && self.stopping.is_set() {
            return None;
        }
        let span = span::pop_any(&group.topics).entered();
        let slot = asked.map_or_else(|| self.queue.ask_any(group, true, true), Ok);
        match slot.and_then(|slot| self.stopping.wait(&slot)) {
            Ok(grants) => {
                let mut leases = self.queue.leases(grants);
                span::popped(&span, &leases);
                let lease = leases.pop()?;
                if !self.stopping.is_set() {
                    return Some(lease);
                }
                // Handed out just when the worker was stopped.
                if let Err(e) = lease.release() {
                    outside(|| tracing::warn!("a message was not released, its lease will expire: {e}"));
                }
                None
            }
            Err(e) if leave_out(group, &e) => {
                drop(span);
                if !group.topics.is_empty() {
                    return self.next(group, None);
                }
                self.stopping.quit(e);
                None
            }
            Err(e) => self.give_up(e),
        }
    }

    fn give_up(&self, error: Error) -> Option<Lease> {
        if error.kind() == ErrorKind::Closed {
            self.stopping.stop(Cause::Closed);
        } else {
            self.stopping.fail(error);
        }
        None
    }

    fn exhaust(&self, handler: &Handler<'a>, watch: &Arc<Watch>, idle: &Idle) {
        let (mut group, mut seen) = (Arc::clone(&handler.group), None);
        while idle.begin(&mut seen) {
            while !self.stopping.is_set() && !group.topics.is_empty() {
                match self.queue.try_pop_group(&group) {
                    Ok(Some(lease)) => {
                        self.work(handler, lease, watch, false);
                        idle.worked();
                        seen = None;
                    }
                    Ok(None) => break,
                    Err(e)
                        if (group.topics.len() > 1 || self.handlers.len() > 1)
                            && leave_out(&mut group, &e) => {}
                    Err(e) => return idle.fail(e),
                }
            }
        }
    }

    /// Has a message handled, and settles it; at best with the pop of the next one, which it returns then.
    fn work(&self, handler: &Handler<'a>, lease: Lease, watch: &Arc<Watch>, goes_on: bool) -> Option<Asked> {
        let (number, running) = watch.begin(&lease);
        let job = Job { lease, running, watch: Arc::clone(watch) };
        let (verb, word) = span::handle(&job).in_scope(|| {
            let result = catch_unwind(AssertUnwindSafe(|| (handler.call)(&job)));
            self.verdict(&job, result)
        });
        if !self.queue.engine().home.is_here() {
            // The handler has forked, and this is the child: the message is its parent's.
            return None;
        }
        let Job { lease, running, .. } = job;
        let mine = running.claim();
        let event = Handled {
            topic: lease.topic(),
            id: lease.id(),
            outcome: if mine { word } else { running.fate() },
            attempt: lease.attempt(),
            duration: running.age(),
        };
        self.queue.engine().observe(|observer| observer.handled(&event));
        let asked = match verb {
            Some(verb) if mine => {
                let (topic, settle) = (lease.topic(), lease.proof(verb));
                let outcome = settle.verb.word();
                let _span = span::settle(std::slice::from_ref(&lease), outcome).entered();
                let alone = !goes_on || handler.group.topics.len() > 1 || self.stopping.is_set();
                let (settled, mut asked) = if alone { (None, None) } else { self.turn(topic, &settle) };
                if matches!(&settled, Some(Err(e)) if e.is_retryable())
                    && let Some(asked) = asked.take()
                {
                    // What comes meanwhile would lie here for as long as the settle is tried again.
                    self.call_off(&asked);
                }
                if let Err(e) = self.settle(topic, &settle, &running, settled) {
                    outside(
                        || tracing::error!(topic, id = %settle.id, outcome, "a message was not settled: {e}"),
                    );
                }
                asked
            }
            _ => None,
        };
        watch.finish(number);
        asked
    }

    /// Waits no longer for a pop; what it has brought, or brings yet, is released.
    fn call_off(&self, asked: &Asked) {
        if let Waited::Done(Ok(grants)) = asked.wait(Some(Instant::now())) {
            let engine = self.queue.engine();
            engine.abandon(grants).iter().for_each(|event| engine.tell(event));
        }
    }

    /// What is to be done about a message, and the word for it.
    fn verdict(
        &self,
        job: &Job,
        result: thread::Result<Result<Outcome, BoxError>>,
    ) -> (Option<Verb>, &'static str) {
        let (topic, id, attempt) = (job.topic(), job.id(), job.attempt());
        let (why, word) = match result {
            Ok(Ok(Outcome::Complete)) => return (Some(Verb::Complete), "complete"),
            Ok(Ok(Outcome::Discard)) => return (Some(Verb::Discard), "discard"),
            Ok(Ok(Outcome::Settled)) => return (None, "settled"),
            Ok(Ok(Outcome::Defer(delay))) => match limits::delay(delay) {
                Ok(()) => return (Some(Verb::Defer(delay.as_secs_f64())), "defer"),
                Err(e) => (e.to_string(), "fail"),
            },
            Ok(Err(e)) => (chain(&*e), "fail"),
            Err(panic) => (format!("panicked: {}", message(&*panic)), "panic"),
        };
        match word {
            "panic" => outside(|| tracing::error!(topic, %id, attempt, "a handler {why}")),
            _ => outside(|| tracing::warn!(topic, %id, attempt, "a handler failed: {why}")),
        };
        if job.max_attempts().is_some_and(|most| attempt >= u32::from(most)) {
            outside(|| tracing::error!(topic, %id, attempt, "a message is dead: that was its last attempt"));
        }
        let delay = self.backoff.as_ref().and_then(|backoff| backoff.seconds(job));
        (Some(Verb::fail(why, delay)), word)
    }

    /// Settles, and tries again while the message may still be ours.
    fn settle(
        &self,
        topic: &str,
        settle: &Settle,
        running: &Running,
        mut tried: Option<Result<Vec<Verdict>>>,
    ) -> Result<()> {
        let mut failures = 0;
        loop {
            let settled = match tried.take() {
                Some(settled) => settled,
                None => self.queue.handle.settle(topic, vec![settle.clone()]),
            };
            match settled {
                Ok(verdicts) if verdicts.contains(&Verdict::Lost) => return Err(Error::lease_lost()),
                Ok(_) => return Ok(()),
                Err(e) if e.is_retryable() && failures < RETRIES && !running.is_lost() => {
                    failures += 1;
                    thread::sleep(backoff(failures));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Settles, and asks for the next message.
    fn turn(&self, topic: &str, settle: &Settle) -> (Option<Result<Vec<Verdict>>>, Option<Asked>) {
        let (settled, asked) = (Arc::new(Slot::new()), Arc::new(Slot::new()));
        let job = TurnJob {
            settle: SettleJob { settles: vec![settle.clone()], unwanted: false, slot: Arc::clone(&settled) },
            pop: self.queue.pop_job(1, true, &asked),
        };
        let until = self.queue.handle.deadline();
        let sent = self.queue.engine().turn(topic, job);
        (Some(sent.and_then(|()| self.queue.engine().wait(&settled, Some(until)))), Some(asked))
    }
}

impl fmt::Debug for Worker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topics: Vec<&[String]> = self.handlers.iter().map(|handler| &*handler.topics).collect();
        f.debug_struct("Worker").field("topics", &topics).field("grace", &self.grace).finish_non_exhaustive()
    }
}

/// Goes on without a topic whose name the database cannot store: it has no messages, and must not end the work on
/// others. Returns whether that is what the error says.
fn leave_out(group: &mut Arc<Group>, error: &Error) -> bool {
    let Some(impossible) = error.impossible_topic() else { return false };
    outside(|| tracing::error!(topic = impossible, "the worker goes on without a topic: {error}"));
    let left: Vec<&Arc<str>> = group.topics.iter().filter(|topic| ***topic != *impossible).collect();
    *group = Group::new(&left);
    true
}

/// The words of an error and of all its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let more = e.to_string();
        // Some errors repeat the words of their cause.
        if !words.ends_with(&more) {
            words = format!("{words}: {more}");
        }
        cause = e.source();
    }
    words
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words")
}

/// How many threads of a worker are at work, until none is and none finds anything.
#[derive(Default)]
struct Idle {
    state: Mutex<AtWork>,
    changed: Condvar,
}

#[derive(Default)]
struct AtWork {
    threads: usize,
    handled: usize,
    failed: Option<Error>,
    done: bool,
}

impl Idle {
    /// One more thread looks for messages.
    fn enter(&self) {
        lock(&self.state).threads += 1;
    }

    /// Waits until it is worth looking, again or for the first time; false when all is done. `seen` is how
    /// many messages had been handled before the last look.
    fn begin(&self, seen: &mut Option<usize>) -> bool {
        let mut state = lock(&self.state);
        if seen.is_some() {
            // It found nothing; what is handled meanwhile may have brought something.
            state.threads -= 1;
            state.done |= state.threads == 0 && *seen == Some(state.handled);
            self.changed.notify_all();
            while !state.done && *seen == Some(state.handled) {
                state = state.wait(&self.changed);
            }
            state.threads += 1;
        }
        *seen = Some(state.handled);
        !state.done
    }

    fn worked(&self) {
        lock(&self.state).handled += 1;
        self.changed.notify_all();
    }

    fn fail(&self, error: Error) {
        let mut state = lock(&self.state);
        state.done = true;
        state.failed.get_or_insert(error);
        self.changed.notify_all();
    }

    fn handled(self) -> Result<usize> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.failed.map_or(Ok(state.handled), Err)
    }
}
