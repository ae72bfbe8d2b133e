//! The engine of a queue: requests pile up in lanes; connection threads carry out what has piled up,
//! in a single statement and commit, and wake the callers.
//!
//! A lane holds the requests for one topic. One flight is under way at a time, so that requests gather
//! while it is: the more callers, the larger the flights. It carries requests of one kind, of as many lanes
//! as have some, and pops beside those that settle and pop. Callers never touch a connection. A flight that
//! hangs is written off when it is overdue: its thread is left to end by itself, and another takes its place.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::calls::{Calls, Grant, Settle, Verb};
use crate::error::{Error, ErrorKind, Result};
use crate::home::Home;
use crate::lane::{Airborne, Group, Lane, PopJob, PushJob, SettleJob, State, TELLING, Task, TurnJob};
use crate::link::{Links, Route};
use crate::observer::{Event, Observer};
use crate::outside::{Teller, outside};
use crate::slot::{FlightId, Guard, Slot, Waited, lock};

/// How many threads may hang on connections that do not answer, beside those that work.
pub(crate) const STRAYS: usize = 16;

/// How long closing waits for what is under way.
const CLOSING: Duration = Duration::from_secs(1);

/// When it is tried again to start a thread, for what is queued and has none.
pub(crate) const SHORTAGE: Duration = Duration::from_millis(100);

/// What the builder decided.
pub(crate) struct Settings {
    pub(crate) pool_size: usize,
    pub(crate) operation_timeout: Duration,
    pub(crate) poll_interval: Duration,
    /// Of a pop whose topic does not say either.
    pub(crate) lease: Duration,
    pub(crate) keep_settled: Duration,
    /// Of a message whose topic does not say either; 0: without end.
    pub(crate) max_attempts: i32,
    pub(crate) max_payload: usize,
    pub(crate) listens: bool,
}

pub(crate) struct Engine {
    pub(crate) settings: Settings,
    pub(crate) calls: Calls,
    pub(crate) client: Uuid,
    pub(crate) home: Home,
    pub(crate) began: Instant,
    observer: Arc<dyn Observer>,
    /// Logs what is noted under a lock.
    pub(crate) teller: Arc<Teller>,
    pub(crate) route: Arc<Route>,
    pub(crate) pool: r2d2::Pool<Links>,
    pub(crate) state: Mutex<State>,
    /// There is a flight to start, for a thread that has not gone to sleep yet.
    pub(crate) hint: AtomicBool,
    /// There is a flight to start, or a connection free.
    pub(crate) work: Condvar,
    /// The keeper has something earlier to do.
    pub(crate) tick: Condvar,
    /// A flight has ended after the queue was closed.
    pub(crate) grounded: Condvar,
}

impl Engine {
    pub(crate) fn new(
        settings: Settings,
        calls: Calls,
        links: Links,
        observer: Arc<dyn Observer>,
    ) -> Result<Arc<Self>> {
        let route = Arc::clone(&links.route);
        let pool = r2d2::Pool::builder()
            .max_size(u32::try_from(settings.pool_size + STRAYS).unwrap_or(u32::MAX))
            .min_idle(Some(0))
            .test_on_check_out(false)
            .connection_timeout(settings.operation_timeout)
            .error_handler(Box::new(r2d2::NopErrorHandler));
        // It panics when it cannot start its threads.
        let pool = catch_unwind(AssertUnwindSafe(|| pool.build(links)))
            .map_err(|_| Error::connection("cannot start the threads of the pool"))?
            .map_err(|e| Error::connection(format!("cannot make the pool: {e}")))?;
        Ok(Arc::new(Engine {
            route,
            settings,
            calls,
            client: Uuid::now_v7(),
            home: Home::here(),
            began: Instant::now(),
            observer,
            teller: Arc::default(),
            pool,
            state: Mutex::default(),
            hint: AtomicBool::new(false),
            work: Condvar::new(),
            tick: Condvar::new(),
            grounded: Condvar::new(),
        }))
    }

    /// Tells the observer. Not under a lock.
    pub(crate) fn observe(&self, tell: impl FnOnce(&dyn Observer)) {
        if !outside(|| tell(self.observer.as_ref())) {
            outside(|| tracing::error!("an observer panicked"));
        }
    }

    /// Tells the observer what happened on a flight.
    pub(crate) fn tell(&self, event: &Event<'_>) {
        if let Event::Abandoned { topic, count, closed } = event {
            if *closed {
                outside(|| {
                    tracing::debug!(
                        topic,
                        count,
                        "releasing messages that were on their way when the queue was closed"
                    )
                });
            } else {
                outside(|| {
                    tracing::warn!(topic, count, "releasing messages that came too late for their callers")
                });
            }
        }
        self.observe(|observer| event.tell(observer));
    }

    // Requests.

    /// The state, for what a caller asks.
    fn enter(&self) -> Result<Guard<'_, State>> {
        self.home.check()?;
        Ok(lock(&self.state))
    }

    /// The same, unless the queue is closed.
    fn open(&self) -> Result<Guard<'_, State>> {
        let state = self.enter()?;
        if state.closed { Err(Error::closed()) } else { Ok(state) }
    }

    pub(crate) fn push(self: &Arc<Self>, topic: &str, job: PushJob) -> Result<()> {
        let mut state = self.open()?;
        self.man(&mut state)?;
        self.enqueue(&mut state, topic, |lane| lane.pushes.push_back(job));
        Ok(())
    }

    pub(crate) fn pop(self: &Arc<Self>, topic: &str, job: PopJob) -> Result<()> {
        let mut state = self.open()?;
        self.man_for_pop(&mut state, &job)?;
        self.enqueue_pop(&mut state, topic, job);
        Ok(())
    }

    pub(crate) fn settle(self: &Arc<Self>, topic: &str, job: SettleJob) -> Result<()> {
        let mut state = self.enter()?;
        self.man(&mut state)?;
        self.enqueue(&mut state, topic, |lane| lane.settles.push_back(job));
        Ok(())
    }

    /// Pops from whichever of the topics has something first.
    pub(crate) fn pop_any(self: &Arc<Self>, group: &Arc<Group>, job: PopJob) -> Result<()> {
        let mut state = self.open()?;
        self.man_for_pop(&mut state, &job)?;
        state.form(group);
        self.enqueue(&mut state, &group.key, |lane| {
            if !(job.patient && lane.calm) {
                lane.signal = true;
                lane.poll = false;
            }
            lane.pops.push_back(job);
        });
        Ok(())
    }

    /// Settles, and pops in the same flight. Once the queue is closed the pop is refused, and the settle is not. When
    /// the settle is refused, so is the pop.
    pub(crate) fn turn(self: &Arc<Self>, topic: &str, job: TurnJob) -> Result<()> {
        let manned = self.enter().and_then(|mut state| self.man(&mut state).map(|()| state));
        let mut state = manned.inspect_err(|e| job.pop.slot.refuse(e.clone()))?;
        if state.closed {
            job.pop.slot.refuse(Error::closed());
            self.enqueue(&mut state, topic, |lane| lane.settles.push_back(job.settle));
        } else {
            self.enqueue(&mut state, topic, |lane| lane.turns.push_back(job));
        }
        Ok(())
    }

    pub(crate) fn task(self: &Arc<Self>, task: Box<dyn Task>) -> Result<()> {
        let mut state = self.enter()?;
        self.man(&mut state)?;
        state.tasks.push_back(task);
        self.start(&mut state);
        Ok(())
    }

    fn enqueue_pop(self: &Arc<Self>, state: &mut State, topic: &str, job: PopJob) {
        self.enqueue(state, topic, |lane| {
            lane.signal = true;
            lane.poll = false;
            lane.pops.push_back(job);
        });
    }

    fn enqueue(self: &Arc<Self>, state: &mut State, topic: &str, add: impl FnOnce(&mut Lane)) {
        match state.lanes.get_mut(topic) {
            Some(lane) => add(lane),
            None => add(state.lanes.entry(topic.into()).or_default()),
        }
        state.gathered += 1;
        state.list(topic);
        // Otherwise the thread whose flight is under way goes on with it.
        if state.has_work() {
            self.start(state);
        }
    }

    /// Makes sure that there is a thread for what is about to be queued: nothing is, if the caller is told that there
    /// is none.
    fn man(self: &Arc<Self>, state: &mut State) -> Result<()> {
        if state.threads > 0 { Ok(()) } else { self.launch(state) }
    }

    /// The same for a pop. One that waits does so for a thread too, and has the error if none comes.
    fn man_for_pop(self: &Arc<Self>, state: &mut State, job: &PopJob) -> Result<()> {
        match self.man(state) {
            Err(e) if job.waits => job.slot.put_off(e),
            other => return other,
        }
        self.wake_keeper(state, Instant::now() + SHORTAGE);
        Ok(())
    }

    /// Sees to it that somebody takes the next flight. If no thread can be started, others that there are take it, or
    /// the keeper tries again.
    pub(crate) fn start(self: &Arc<Self>, state: &mut State) {
        if state.spinning > 0 {
            self.hint.store(true, Ordering::Release);
            return;
        }
        if state.idle > 0 {
            self.work.notify_one();
            return;
        }
        if state.threads < self.settings.pool_size {
            let _ = self.launch(state);
        } else if state.telling > 0 {
            // Most likely they are back before; else the keeper starts another.
            self.wake_keeper(state, Instant::now() + TELLING);
        }
    }

    /// Starts a thread for flights.
    pub(crate) fn launch(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let engine = Arc::clone(self);
        match thread::Builder::new().name("pushpop-flight".into()).spawn(move || engine.fly()) {
            Ok(_) => {
                state.threads += 1;
                state.shortage = false;
                Ok(())
            }
            Err(e) => {
                let error = Error::connection(format!("cannot start a thread: {e}"));
                if !std::mem::replace(&mut state.shortage, true) {
                    self.teller.note(move || tracing::warn!("cannot start another thread: {e}"));
                }
                Err(error)
            }
        }
    }

    /// Looks for those that wait for a message of the topic, at once or later: in its own lane, and in those of groups.
    pub(crate) fn wake(self: &Arc<Self>, state: &mut State, topic: &str, ready_in: Duration) {
        let groups = state.members.get(topic).cloned().unwrap_or_default();
        self.wake_lane(state, topic, None, ready_in);
        for (key, place) in groups {
            self.wake_lane(state, &key, Some(place), ready_in);
        }
    }

    fn wake_lane(self: &Arc<Self>, state: &mut State, key: &str, hot: Option<usize>, ready_in: Duration) {
        let Some(lane) = state.lanes.get_mut(key) else { return };
        if lane.pops.is_empty() && lane.flights == 0 {
            // Whoever comes next has to ask.
            lane.calm = false;
            return;
        }
        if ready_in.is_zero() {
            match hot {
                Some(place) if !lane.hot.contains(&place) => lane.hot.push(place),
                Some(_) => {}
                None => lane.signal = true,
            }
            lane.poll = false;
            state.list(key);
            if state.has_work() {
                self.start(state);
            }
        } else {
            let at = Instant::now() + ready_in;
            lane.look_at = Some(lane.look_at.map_or(at, |earlier| earlier.min(at)));
            self.wake_keeper(state, at);
        }
    }

    /// Something was pushed to the topic by somebody else.
    pub(crate) fn notified(self: &Arc<Self>, topic: &str) {
        let mut state = lock(&self.state);
        self.wake(&mut state, topic, Duration::ZERO);
    }

    /// Notifications may have been lost: look for everybody who waits.
    pub(crate) fn look_everywhere(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        let lanes: Vec<Arc<str>> = state.lanes.keys().cloned().collect();
        for key in lanes {
            self.wake_lane(&mut state, &key, None, Duration::ZERO);
        }
    }

    pub(crate) fn start_listener(self: &Arc<Self>, state: &mut State) {
        if self.settings.listens && !state.listening && !state.closed {
            match crate::listener::start(self, &self.route) {
                Ok(()) => (state.listening, state.deaf) = (true, false),
                Err(e) if !std::mem::replace(&mut state.deaf, true) => {
                    self.teller.note(move || tracing::warn!("cannot listen, polling instead: {e}"));
                }
                Err(_) => {}
            }
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        let state = lock(&self.state);
        state.ended || state.closed
    }

    // The end.

    /// Ends waiting pops, and refuses new requests other than settles.
    pub(crate) fn close(&self) {
        let Ok(mut state) = self.enter() else { return };
        state.closed = true;
        for lane in state.lanes.values_mut() {
            for job in lane.pops.drain(..) {
                job.slot.refuse(Error::closed());
            }
            for job in lane.turns.drain(..) {
                job.pop.slot.refuse(Error::closed());
                lane.settles.push_back(job.settle);
            }
        }
        let waiting = state.airborne.values().flat_map(|flight| &flight.topics).flat_map(|(_, jobs)| jobs);
        let airborne: Vec<Arc<Slot<Vec<Grant>>>> = waiting.map(|job| Arc::clone(&job.slot)).collect();
        let ids: Vec<FlightId> = state.airborne.keys().copied().collect();
        drop(state);
        // What those flights bring is released.
        for slot in airborne {
            for id in &ids {
                drop(slot.land(*id, Err(Error::closed())));
            }
        }
        let until = Instant::now() + CLOSING;
        let mut state = lock(&self.state);
        let waits = |flight: &Airborne| flight.topics.iter().any(|(_, jobs)| !jobs.is_empty());
        while state.unwanted > 0 || state.airborne.values().any(waits) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = state.wait_timeout(&self.grounded, left).0;
        }
        drop(state);
        outside(|| tracing::debug!("closed"));
    }

    /// Whether it is closed; to a child of its process it is.
    pub(crate) fn is_closed(&self) -> bool {
        self.enter().map_or(true, |state| state.closed)
    }

    /// The last handle is gone: threads finish what has piled up, and end.
    pub(crate) fn end(&self) {
        let Ok(mut state) = self.enter() else { return };
        state.ended = true;
        drop(state);
        self.work.notify_all();
        self.tick.notify_all();
    }

    /// Gives messages back that nobody waits for any more; what is to be told of them.
    pub(crate) fn abandon(self: &Arc<Self>, mut grants: Vec<Grant>) -> Vec<Event<'static>> {
        let mut events = Vec::new();
        while let Some(first) = grants.first() {
            let topic = first.message.topic.clone();
            let (same, rest) = grants.into_iter().partition(|grant| grant.message.topic == topic);
            events.push(self.abandon_of(topic, same));
            grants = rest;
        }
        events
    }

    fn abandon_of(self: &Arc<Self>, topic: String, grants: Vec<Grant>) -> Event<'static> {
        let (count, closed) = (grants.len(), self.is_closed());
        let settles = grants
            .into_iter()
            .map(|grant| Settle { id: grant.message.id, token: grant.token, verb: Verb::Release })
            .collect();
        let job = SettleJob { settles, unwanted: true, slot: Arc::new(Slot::new()) };
        lock(&self.state).unwanted += 1;
        if let Err(e) = self.settle(&topic, job) {
            lock(&self.state).unwanted -= 1;
            outside(|| tracing::warn!(topic, "cannot release messages, their leases will expire: {e}"));
        }
        Event::Abandoned { topic, count, closed }
    }

    /// A connection for the caller's own thread, for a transaction of its own.
    pub(crate) fn borrow_link(self: &Arc<Self>, deadline: Instant) -> Result<Borrowed> {
        let mut state = self.open()?;
        while state.in_use >= self.settings.pool_size {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(state.no_room("no connection became free", self.settings.pool_size));
            }
            state.outside_waits += 1;
            state = state.wait_timeout(&self.work, left).0;
            state.outside_waits -= 1;
        }
        state.in_use += 1;
        state.lent += 1;
        drop(state);
        match self.link() {
            Ok(link) => Ok(Borrowed { engine: Arc::clone(self), link: Some(link) }),
            Err(e) => {
                self.give_back();
                Err(e)
            }
        }
    }

    fn give_back(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        state.in_use -= 1;
        state.lent -= 1;
        self.work.notify_all();
        if state.has_work() {
            self.start(&mut state);
        }
    }

    /// Waits for an answer, and says how it ended.
    pub(crate) fn wait<T>(&self, slot: &Slot<T>, deadline: Option<Instant>) -> Result<T> {
        match slot.wait(deadline) {
            Waited::Done(result) => result,
            Waited::Unsent(Some(error)) => Err(error),
            Waited::Unsent(None) => {
                Err(lock(&self.state).no_room("the call was not begun in time", self.settings.pool_size))
            }
            Waited::Unknown => {
                Err(Error::new(ErrorKind::Timeout, "the server did not answer in time").indeterminate(true))
            }
        }
    }
}

impl State {
    /// The error of a call that no connection became free for.
    fn no_room(&self, what: &str, pool_size: usize) -> Error {
        let mut text = what.to_owned();
        if self.lent >= pool_size {
            text.push_str(&format!(
                ": the whole pool of {pool_size} is in transactions; use push_in and complete_in there, or a larger pool_size"
            ));
        }
        Error::new(ErrorKind::Timeout, text)
    }
}

/// A connection on a caller's thread.
pub(crate) struct Borrowed {
    engine: Arc<Engine>,
    /// Until it is dropped.
    pub(crate) link: Option<r2d2::PooledConnection<Links>>,
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if self.engine.home.is_here() {
            drop(self.link.take());
            self.engine.give_back();
        } else {
            std::mem::forget(self.link.take());
        }
    }
}
