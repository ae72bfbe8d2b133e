//! The engine of a queue: requests pile up in lanes; connection threads carry out what has piled up
//! in one, in a single statement and commit, and wake the callers.
//!
//! A lane holds the requests of one kind for one topic, and has at most one flight under way, so
//! that requests gather while it is: the more callers, the larger the flights. Callers never touch a
//! connection. A flight that hangs is written off when it is overdue: its thread is left to end by
//! itself, and another takes its place.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::calls::{Calls, Grant, Settle, Verb, Verdict};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::link::{Link, Links, Route};
use crate::message::NewMessage;
use crate::observer::Observer;
use crate::slot::{FlightId, Slot, Waited, lock};

/// How many threads may hang on connections that do not answer, beside those that work.
const STRAYS: usize = 16;

/// How long a connection thread looks for more work before it goes to sleep.
const SPIN: Duration = Duration::from_micros(100);

/// How long a connection thread without work stays.
const IDLE: Duration = Duration::from_secs(30);

/// What the builder decided.
pub(crate) struct Settings {
    pub(crate) pool_size: usize,
    pub(crate) operation_timeout: Duration,
    pub(crate) poll_interval: Duration,
    pub(crate) lease: Duration,
    pub(crate) keep_settled: Duration,
    pub(crate) max_attempts: Option<u16>,
    pub(crate) max_payload: usize,
    pub(crate) listens: bool,
}

pub(crate) struct PushJob {
    pub(crate) messages: Vec<NewMessage>,
    pub(crate) bytes: usize,
    /// For each message, whether it was a duplicate.
    pub(crate) slot: Arc<Slot<Vec<bool>>>,
}

pub(crate) struct PopJob {
    pub(crate) max: usize,
    /// Whether it stays until there is something.
    pub(crate) waits: bool,
    pub(crate) slot: Arc<Slot<Vec<Grant>>>,
}

pub(crate) struct SettleJob {
    pub(crate) settles: Vec<Settle>,
    pub(crate) slot: Arc<Slot<Vec<Verdict>>>,
}

/// A request that shares its flight with no other.
pub(crate) trait Task: Send {
    fn board(&self, flight: FlightId) -> bool;
    fn run(&self, flight: FlightId, link: Result<&mut Link>);
}

/// Which lane.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Key {
    Push(Arc<str>),
    Pop(Arc<str>, u64),
    Settle(Arc<str>),
}

impl Key {
    fn topic(&self) -> &Arc<str> {
        match self {
            Key::Push(topic) | Key::Pop(topic, _) | Key::Settle(topic) => topic,
        }
    }
}

#[derive(Default)]
struct Lane {
    pushes: VecDeque<PushJob>,
    pops: VecDeque<PopJob>,
    settles: VecDeque<SettleJob>,
    flying: bool,
    listed: bool,
    /// Pops only: there may be something for those that wait.
    signal: bool,
    /// Pops only: the signal is only that of the clock.
    poll: bool,
    /// Pops only: when to look next for those that wait.
    look_at: Option<Instant>,
    /// Pops only: until when the server knows that somebody waits.
    registered: Option<Instant>,
    /// Pops only: flights that failed, one after the other.
    failures: u32,
}

impl Lane {
    fn has_work(&self) -> bool {
        !self.pushes.is_empty() || !self.settles.is_empty() || (self.signal && !self.pops.is_empty())
    }

    fn is_empty(&self) -> bool {
        self.pushes.is_empty() && self.settles.is_empty() && self.pops.is_empty()
    }
}

enum Load {
    Push(Vec<PushJob>),
    Pop { jobs: Vec<PopJob>, poll: bool, registered: bool },
    Settle(Vec<SettleJob>),
    Task(Box<dyn Task>),
}

/// What a flight that is under way would leave behind if it were written off.
struct Airborne {
    key: Option<Key>,
    since: Instant,
    waiting: Vec<PopJob>,
}

#[derive(Default)]
struct State {
    lanes: HashMap<Key, Lane>,
    tasks: VecDeque<Box<dyn Task>>,
    ready: VecDeque<Key>,
    airborne: HashMap<FlightId, Airborne>,
    flights: FlightId,
    threads: usize,
    idle: usize,
    spinning: usize,
    strays: usize,
    /// Connections that fly, or that a caller's transaction has.
    in_use: usize,
    outside_waits: usize,
    /// Topics that were used since their last upkeep, and when the next is due.
    used: HashMap<Arc<str>, Instant>,
    keeper_until: Option<Instant>,
    outage: bool,
    listening: bool,
    closed: bool,
    ended: bool,
}

pub(crate) struct Engine {
    pub(crate) settings: Settings,
    pub(crate) calls: Calls,
    pub(crate) client: Uuid,
    observer: Arc<dyn Observer>,
    route: Arc<Route>,
    pool: r2d2::Pool<Links>,
    state: Mutex<State>,
    /// There is a flight to start, for a thread that has not gone to sleep yet.
    hint: AtomicBool,
    /// There is a flight to start, or a connection free.
    work: Condvar,
    /// The keeper has something earlier to do.
    tick: Condvar,
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
            .error_handler(Box::new(r2d2::NopErrorHandler))
            .build(links)
            .map_err(|e| Error::connection(format!("cannot make the pool: {e}")))?;
        Ok(Arc::new(Engine {
            route,
            settings,
            calls,
            client: Uuid::now_v7(),
            observer,
            pool,
            state: Mutex::default(),
            hint: AtomicBool::new(false),
            work: Condvar::new(),
            tick: Condvar::new(),
        }))
    }

    pub(crate) fn observe(&self, tell: impl FnOnce(&dyn Observer)) {
        if catch_unwind(AssertUnwindSafe(|| tell(self.observer.as_ref()))).is_err() {
            tracing::error!("an observer panicked");
        }
    }

    // Requests.

    pub(crate) fn push(self: &Arc<Self>, topic: &str, job: PushJob) -> Result<()> {
        let mut state = self.open()?;
        self.enqueue(&mut state, Key::Push(topic.into()), |lane| lane.pushes.push_back(job))
    }

    pub(crate) fn pop(self: &Arc<Self>, topic: &str, lease: Duration, job: PopJob) -> Result<()> {
        let mut state = self.open()?;
        let lease = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        self.enqueue(&mut state, Key::Pop(topic.into(), lease), |lane| {
            lane.signal = true;
            lane.poll = false;
            lane.pops.push_back(job);
        })
    }

    pub(crate) fn settle(self: &Arc<Self>, topic: &str, job: SettleJob) -> Result<()> {
        let mut state = lock(&self.state);
        self.enqueue(&mut state, Key::Settle(topic.into()), |lane| lane.settles.push_back(job))
    }

    pub(crate) fn task(self: &Arc<Self>, task: Box<dyn Task>) -> Result<()> {
        let mut state = lock(&self.state);
        state.tasks.push_back(task);
        self.start(&mut state)
    }

    fn open(&self) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        if state.closed { Err(Error::closed()) } else { Ok(state) }
    }

    fn enqueue(self: &Arc<Self>, state: &mut State, key: Key, add: impl FnOnce(&mut Lane)) -> Result<()> {
        add(state.lanes.entry(key.clone()).or_default());
        state.list(&key);
        self.start(state)
    }

    /// Makes sure that somebody takes the next flight.
    fn start(self: &Arc<Self>, state: &mut State) -> Result<()> {
        if state.spinning > 0 {
            self.hint.store(true, Ordering::Release);
            return Ok(());
        }
        if state.idle > 0 {
            self.work.notify_one();
            return Ok(());
        }
        if state.threads >= self.settings.pool_size {
            return Ok(());
        }
        let engine = Arc::clone(self);
        match thread::Builder::new().name("pushpop-flight".into()).spawn(move || engine.fly()) {
            Ok(_) => state.threads += 1,
            Err(e) if state.threads == 0 => {
                return Err(Error::connection(format!("cannot start a thread: {e}")));
            }
            Err(e) => tracing::warn!("cannot start another thread: {e}"),
        }
        Ok(())
    }

    // Threads.

    fn fly(self: Arc<Self>) {
        loop {
            let Some((id, key, load)) = self.next_flight() else { return };
            let started = Instant::now();
            let outcome = match &load {
                Load::Task(task) => {
                    let ran = catch_unwind(AssertUnwindSafe(|| match self.link() {
                        Ok(mut link) => task.run(id, Ok(&mut link)),
                        Err(e) => task.run(id, Err(e)),
                    }));
                    if ran.is_err() {
                        task.run(id, Err(Error::panicked()));
                    }
                    Outcome::default()
                }
                load => {
                    let topic = key.as_ref().map(Key::topic).cloned().unwrap_or_default();
                    let lease = match &key {
                        Some(Key::Pop(_, lease)) => Duration::from_millis(*lease),
                        _ => Duration::ZERO,
                    };
                    let carried = catch_unwind(AssertUnwindSafe(|| self.carry(id, &topic, lease, load)));
                    carried.unwrap_or_else(|_| Outcome::failed(Error::panicked()))
                }
            };
            if !self.landed(id, key, load, outcome, started) {
                return;
            }
        }
    }

    fn next_flight(self: &Arc<Self>) -> Option<(FlightId, Option<Key>, Load)> {
        let mut rested = false;
        let mut state = lock(&self.state);
        loop {
            if state.in_use < self.settings.pool_size {
                state.flights += 1;
                let id = state.flights;
                if let Some((key, load)) = state.take(id) {
                    let waiting = match &load {
                        Load::Pop { jobs, .. } => jobs
                            .iter()
                            .filter(|job| job.waits)
                            .map(|job| PopJob { max: job.max, waits: true, slot: Arc::clone(&job.slot) })
                            .collect(),
                        _ => Vec::new(),
                    };
                    state.in_use += 1;
                    state.airborne.insert(id, Airborne { key: key.clone(), since: Instant::now(), waiting });
                    if state.has_work() {
                        // A failure to start another thread leaves the work to this one.
                        let _ = self.start(&mut state);
                    }
                    return Some((id, key, load));
                }
            }
            if state.ended {
                break;
            }
            if !rested {
                // A caller that was just answered often asks again at once: not to be asleep then saves
                // it a wake-up.
                rested = true;
                state.spinning += 1;
                drop(state);
                let until = Instant::now() + SPIN;
                while !self.hint.swap(false, Ordering::Acquire) && Instant::now() < until {
                    thread::yield_now();
                }
                state = lock(&self.state);
                state.spinning -= 1;
                continue;
            }
            state.idle += 1;
            let (guard, timeout) =
                self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if timeout.timed_out() && !state.has_work() {
                break;
            }
        }
        state.threads -= 1;
        None
    }

    /// A connection, or a place for one.
    fn link(&self) -> Result<r2d2::PooledConnection<Links>> {
        self.pool
            .get()
            .map_err(|_| Error::connection(format!("{STRAYS} connections do not answer; no more are opened")))
    }

    fn carry(self: &Arc<Self>, id: FlightId, topic: &Arc<str>, lease: Duration, load: &Load) -> Outcome {
        let mut link = match self.link() {
            Ok(link) => link,
            Err(e) => return Outcome::failed(e),
        };
        let deadline = Instant::now() + self.settings.operation_timeout;
        let mut flight = crate::flight::Flight { engine: self, link: &mut link, topic, id, deadline };
        match load {
            Load::Push(jobs) => flight.push(jobs),
            Load::Settle(jobs) => flight.settle(jobs),
            Load::Pop { jobs, poll, registered } => flight.pop(jobs, lease, *poll, *registered),
            Load::Task(_) => Outcome::default(),
        }
    }

    /// Ends a flight. Returns whether its thread still belongs to the queue.
    fn landed(
        self: &Arc<Self>,
        id: FlightId,
        key: Option<Key>,
        load: Load,
        outcome: Outcome,
        started: Instant,
    ) -> bool {
        let (kind, callers) = match &load {
            Load::Push(jobs) => ("push", jobs.len()),
            Load::Pop { jobs, .. } => ("pop", jobs.len()),
            Load::Settle(jobs) => ("settle", jobs.len()),
            Load::Task(_) => ("other", 1),
        };
        if let Some(error) = &outcome.error {
            match &load {
                Load::Push(jobs) => jobs.iter().for_each(|job| drop(job.slot.land(id, Err(error.clone())))),
                Load::Settle(jobs) => jobs.iter().for_each(|job| drop(job.slot.land(id, Err(error.clone())))),
                Load::Pop { jobs, .. } => jobs
                    .iter()
                    .filter(|job| !job.waits || !error.is_retryable())
                    .for_each(|job| drop(job.slot.land(id, Err(error.clone())))),
                Load::Task(_) => {}
            }
        }
        if let Some(key) = &key {
            let event = crate::observer::Flight {
                topic: key.topic(),
                kind,
                callers,
                rows: outcome.rows,
                duration: started.elapsed(),
                succeeded: outcome.error.is_none(),
            };
            self.observe(|observer| observer.flight(&event));
        }

        let mut state = lock(&self.state);
        self.note_outage(&mut state, outcome.error.as_ref(), key.is_some());
        let own = state.airborne.remove(&id).is_some();
        if own {
            state.in_use -= 1;
        } else {
            state.strays -= 1;
        }
        if let (Some(key), true) = (&key, own) {
            let waiting = match load {
                Load::Pop { jobs, .. } => jobs,
                _ => Vec::new(),
            };
            self.release_lane(&mut state, key, id, waiting, &outcome);
        }
        if let Some(key) = &key {
            if outcome.rows > 0 && !matches!(key, Key::Settle(_)) || matches!(key, Key::Settle(_)) {
                let now = Instant::now();
                state.used.entry(Arc::clone(key.topic())).or_insert(now + Duration::from_secs(1));
                self.wake_keeper(&mut state, now + Duration::from_secs(1));
            }
            if let (Key::Push(topic), Some(ready)) = (key, outcome.pushed) {
                let topic = Arc::clone(topic);
                self.wake(&mut state, &topic, ready);
            }
        }
        if state.outside_waits > 0 {
            self.work.notify_all();
        }
        if state.has_work() && !own {
            let _ = self.start(&mut state);
        }
        own
    }

    /// Lets the next flight of a lane begin, and puts those back into it that go on waiting.
    fn release_lane(
        self: &Arc<Self>,
        state: &mut State,
        key: &Key,
        id: FlightId,
        jobs: Vec<PopJob>,
        outcome: &Outcome,
    ) {
        let closed = state.closed;
        let Some(lane) = state.lanes.get_mut(key) else { return };
        lane.flying = false;
        for job in jobs.into_iter().rev() {
            if job.waits && job.slot.leave(id, outcome.error.clone()) {
                if closed {
                    job.slot.refuse(Error::closed());
                } else {
                    lane.pops.push_front(job);
                }
            }
        }
        let mut look_at = None;
        if !lane.pops.is_empty() {
            let now = Instant::now();
            let wait = if outcome.error.is_some() {
                lane.failures = lane.failures.saturating_add(1);
                backoff(lane.failures)
            } else {
                lane.failures = 0;
                if outcome.registered {
                    // A push that began before the server knew of us did not see us.
                    lane.signal |= lane.registered.is_none();
                    lane.registered = Some(now + Duration::from_secs(14));
                }
                outcome.look_in.unwrap_or(self.settings.poll_interval).min(self.settings.poll_interval)
            };
            let at = now + wait;
            lane.look_at =
                Some(lane.look_at.filter(|earlier| *earlier > now).map_or(at, |earlier| earlier.min(at)));
            look_at = lane.look_at;
        }
        if state.lanes.get(key).is_some_and(|lane| lane.is_empty() && !lane.flying) {
            state.lanes.remove(key);
        }
        state.list(key);
        if let Some(at) = look_at {
            self.wake_keeper(state, at);
            self.start_listener(state);
        }
        if state.has_work() && state.idle > 0 {
            self.work.notify_one();
        }
    }

    fn note_outage(&self, state: &mut State, error: Option<&Error>, flew: bool) {
        match error {
            Some(e) if e.kind() == ErrorKind::Connection && !state.outage => {
                state.outage = true;
                tracing::warn!("lost the server, trying again: {e}");
            }
            None if flew && state.outage => {
                state.outage = false;
                tracing::info!("the server is back");
            }
            _ => {}
        }
    }

    /// Looks for those that wait for a message of the topic, at once or later.
    fn wake(self: &Arc<Self>, state: &mut State, topic: &Arc<str>, ready_in: Duration) {
        let keys: Vec<Key> = state
            .lanes
            .iter()
            .filter(|(key, lane)| {
                matches!(key, Key::Pop(t, _) if t == topic) && !(lane.pops.is_empty() && !lane.flying)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            let Some(lane) = state.lanes.get_mut(&key) else { continue };
            if ready_in.is_zero() {
                lane.signal = true;
                lane.poll = false;
                state.list(&key);
                let _ = self.start(state);
            } else {
                let at = Instant::now() + ready_in;
                lane.look_at = Some(lane.look_at.map_or(at, |earlier| earlier.min(at)));
                self.wake_keeper(state, at);
            }
        }
    }

    /// Something was pushed to the topic by somebody else.
    pub(crate) fn notified(self: &Arc<Self>, topic: &str) {
        let mut state = lock(&self.state);
        self.wake(&mut state, &topic.into(), Duration::ZERO);
    }

    /// Notifications may have been lost: look for everybody who waits.
    pub(crate) fn look_everywhere(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        let topics: Vec<Arc<str>> = state
            .lanes
            .keys()
            .filter_map(|key| if let Key::Pop(topic, _) = key { Some(Arc::clone(topic)) } else { None })
            .collect();
        for topic in topics {
            self.wake(&mut state, &topic, Duration::ZERO);
        }
    }

    fn start_listener(self: &Arc<Self>, state: &mut State) {
        if self.settings.listens && !state.listening && !state.closed {
            state.listening = crate::listener::start(self, &self.route);
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        let state = lock(&self.state);
        state.ended || state.closed
    }

    // Upkeep and clock.

    fn wake_keeper(&self, state: &mut State, at: Instant) {
        if state.keeper_until.is_none_or(|until| at < until) {
            state.keeper_until = Some(at);
            self.tick.notify_one();
        }
    }

    /// What has to be done at a certain time: looks for those that wait, overdue flights, upkeep.
    pub(crate) fn keep(self: Arc<Self>) {
        let everywhere = self.settings.keep_settled.clamp(Duration::from_secs(1), Duration::from_secs(60));
        let mut look_around = Instant::now() + everywhere;
        let mut state = lock(&self.state);
        while !state.ended {
            let now = Instant::now();
            let mut next = look_around;

            let overdue: Vec<FlightId> = state
                .airborne
                .iter()
                .filter(|(_, flight)| flight.since + self.patience() <= now)
                .map(|(id, _)| *id)
                .collect();
            for id in overdue {
                self.write_off(&mut state, id);
            }
            for flight in state.airborne.values() {
                next = next.min(flight.since + self.patience());
            }

            let mut due = Vec::new();
            for (key, lane) in &mut state.lanes {
                match lane.look_at {
                    Some(at) if at <= now && !lane.flying => {
                        lane.look_at = None;
                        lane.poll = !lane.signal;
                        lane.signal = true;
                        due.push(key.clone());
                    }
                    Some(at) if !lane.flying => next = next.min(at),
                    _ => {}
                }
            }
            for key in due {
                state.list(&key);
                let _ = self.start(&mut state);
            }

            let mut topics = Vec::new();
            state.used.retain(|topic, at| {
                let later = *at > now;
                if later {
                    next = next.min(*at);
                } else {
                    topics.push(Arc::clone(topic));
                }
                later
            });
            if look_around <= now {
                look_around = now + everywhere;
                next = next.min(look_around);
                state.tasks.push_back(Box::new(crate::upkeep::Everywhere::new(&self)));
                let _ = self.start(&mut state);
            }
            for topic in topics {
                state.tasks.push_back(Box::new(crate::upkeep::Upkeep::new(&self, topic)));
                let _ = self.start(&mut state);
            }

            state.keeper_until = Some(next);
            let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            state = self.tick.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How long a flight may take before it is written off.
    fn patience(&self) -> Duration {
        self.settings.operation_timeout + Duration::from_millis(100)
    }

    /// Gives a flight up for lost: others take its place.
    fn write_off(self: &Arc<Self>, state: &mut State, id: FlightId) {
        let Some(flight) = state.airborne.remove(&id) else { return };
        tracing::warn!(
            "a call has not been answered for {:?}; its connection is left behind",
            self.settings.operation_timeout
        );
        state.in_use -= 1;
        state.threads -= 1;
        state.strays += 1;
        if let Some(key) = &flight.key {
            let error =
                Error::new(ErrorKind::Timeout, "the server did not answer in time").indeterminate(true);
            self.release_lane(state, key, id, flight.waiting, &Outcome::failed(error));
        }
        if state.has_work() {
            let _ = self.start(state);
        }
    }

    // The end.

    /// Ends waiting pops, and refuses new requests other than settles.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        for lane in state.lanes.values_mut() {
            for job in lane.pops.drain(..) {
                job.slot.refuse(Error::closed());
            }
        }
        let airborne: Vec<Arc<Slot<Vec<Grant>>>> =
            state.airborne.values().flat_map(|f| f.waiting.iter().map(|job| Arc::clone(&job.slot))).collect();
        let ids: Vec<FlightId> = state.airborne.keys().copied().collect();
        drop(state);
        // What those flights bring is released.
        for slot in airborne {
            for id in &ids {
                drop(slot.land(*id, Err(Error::closed())));
            }
        }
        tracing::debug!("closed");
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    /// The last handle is gone: threads finish what has piled up, and end.
    pub(crate) fn end(&self) {
        lock(&self.state).ended = true;
        self.work.notify_all();
        self.tick.notify_all();
    }

    /// Gives messages back that nobody waits for any more.
    pub(crate) fn abandon(self: &Arc<Self>, topic: &str, grants: Vec<Grant>) {
        if grants.is_empty() {
            return;
        }
        tracing::debug!(topic, count = grants.len(), "releasing messages that nobody waits for any more");
        let event = crate::observer::Abandoned { topic, count: grants.len() };
        self.observe(|observer| observer.abandoned(&event));
        let settles = grants
            .into_iter()
            .map(|grant| Settle { id: grant.message.id, token: grant.token, verb: Verb::Release })
            .collect();
        if let Err(e) = self.settle(topic, SettleJob { settles, slot: Arc::new(Slot::new()) }) {
            tracing::warn!(topic, "cannot release messages, their leases will expire: {e}");
        }
    }

    /// A connection for the caller's own thread, for a transaction of its own.
    pub(crate) fn borrow_link(self: &Arc<Self>, deadline: Instant) -> Result<Borrowed> {
        let mut state = self.open()?;
        while state.in_use >= self.settings.pool_size {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, "no connection became free"));
            }
            state.outside_waits += 1;
            state = self.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.outside_waits -= 1;
        }
        state.in_use += 1;
        drop(state);
        let borrowed = self.link().map(|link| Borrowed { engine: Arc::clone(self), link });
        if borrowed.is_err() {
            self.give_back();
        }
        borrowed
    }

    fn give_back(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        state.in_use -= 1;
        if state.has_work() || state.outside_waits > 0 {
            self.work.notify_all();
        }
        if state.has_work() {
            let _ = self.start(&mut state);
        }
    }
}

/// A connection on a caller's thread.
pub(crate) struct Borrowed {
    engine: Arc<Engine>,
    pub(crate) link: r2d2::PooledConnection<Links>,
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.engine.give_back();
    }
}

/// What came of a flight, for its lane.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) rows: usize,
    /// The error that all who were aboard get.
    pub(crate) error: Option<Error>,
    /// Pushes: in how long the first message is ready.
    pub(crate) pushed: Option<Duration>,
    /// Pops: when it is worth looking again.
    pub(crate) look_in: Option<Duration>,
    /// Pops: the server knows that somebody waits.
    pub(crate) registered: bool,
}

impl Outcome {
    pub(crate) fn failed(error: Error) -> Self {
        Outcome { error: Some(error), ..Outcome::default() }
    }
}

/// 50 ms, doubling up to 5 s, less up to a half.
pub(crate) fn backoff(failures: u32) -> Duration {
    let most = Duration::from_millis(50 << failures.saturating_sub(1).min(7)).min(Duration::from_secs(5));
    most.mul_f64(1.0 - f64::from(Uuid::new_v4().as_bytes()[0]) / 512.0)
}

impl State {
    fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.tasks.is_empty()
    }

    /// Puts a lane on the list of those that have work, if that is true and it is not there.
    fn list(&mut self, key: &Key) {
        if let Some(lane) = self.lanes.get_mut(key) {
            if lane.has_work() && !lane.flying && !lane.listed {
                lane.listed = true;
                self.ready.push_back(key.clone());
            }
        }
    }

    /// The next flight: as many requests of one lane as it may carry.
    fn take(&mut self, id: FlightId) -> Option<(Option<Key>, Load)> {
        while let Some(task) = self.tasks.pop_front() {
            if task.board(id) {
                return Some((None, Load::Task(task)));
            }
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(lane) = self.lanes.get_mut(&key) else { continue };
            lane.listed = false;
            let load = match key {
                Key::Push(_) => lane.board_pushes(id),
                Key::Pop(..) => lane.board_pops(id),
                Key::Settle(_) => lane.board_settles(id),
            };
            if let Some(load) = load {
                lane.flying = true;
                return Some((Some(key), load));
            }
            if lane.is_empty() {
                self.lanes.remove(&key);
            }
        }
        None
    }
}

impl Lane {
    fn board_pushes(&mut self, id: FlightId) -> Option<Load> {
        let (mut jobs, mut rows, mut bytes) = (Vec::new(), 0, 0);
        while let Some(job) = self.pushes.front() {
            let full =
                rows + job.messages.len() > limits::FLIGHT_ROWS || bytes + job.bytes > limits::FLIGHT_BYTES;
            if full && !jobs.is_empty() {
                break;
            }
            let Some(job) = self.pushes.pop_front() else { break };
            if job.slot.board(id) {
                rows += job.messages.len();
                bytes += job.bytes;
                jobs.push(job);
            }
        }
        (!jobs.is_empty()).then_some(Load::Push(jobs))
    }

    fn board_settles(&mut self, id: FlightId) -> Option<Load> {
        let (mut jobs, mut rows) = (Vec::new(), 0);
        while let Some(job) = self.settles.front() {
            if rows + job.settles.len() > limits::FLIGHT_ROWS && !jobs.is_empty() {
                break;
            }
            let Some(job) = self.settles.pop_front() else { break };
            if job.slot.board(id) {
                rows += job.settles.len();
                jobs.push(job);
            }
        }
        (!jobs.is_empty()).then_some(Load::Settle(jobs))
    }

    fn board_pops(&mut self, id: FlightId) -> Option<Load> {
        self.pops.retain(|job| job.slot.is_queued());
        let (mut jobs, mut rows) = (Vec::new(), 0);
        while let Some(job) = self.pops.front() {
            if rows + job.max > limits::FLIGHT_ROWS && !jobs.is_empty() {
                break;
            }
            let Some(job) = self.pops.pop_front() else { break };
            if job.slot.board(id) {
                rows += job.max;
                jobs.push(job);
            }
        }
        // Those that did not find room are next.
        self.signal = !self.pops.is_empty();
        let poll = std::mem::take(&mut self.poll);
        let registered = self.registered.is_some_and(|until| until > Instant::now());
        (!jobs.is_empty()).then_some(Load::Pop { jobs, poll, registered })
    }
}

/// Waits for an answer, and says how it ended.
pub(crate) fn wait<T>(slot: &Slot<T>, deadline: Option<Instant>) -> Result<T> {
    match slot.wait(deadline) {
        Waited::Done(result) => result,
        Waited::Unsent(Some(error)) => Err(error),
        Waited::Unsent(None) => Err(Error::new(ErrorKind::Timeout, "the call was not begun in time")),
        Waited::Unknown => {
            Err(Error::new(ErrorKind::Timeout, "the server did not answer in time").indeterminate(true))
        }
    }
}
