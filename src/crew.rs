//! The connection threads: each takes the next flight, carries it out, and sees to it that its lane
//! goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::engine::{Engine, STRAYS};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{Airborne, Key, Load, PopJob, State};
use crate::link::Links;
use crate::slot::{FlightId, lock};

/// How long a connection thread looks for more work before it goes to sleep.
const SPIN: Duration = Duration::from_micros(100);

/// How long a connection thread without work stays.
const IDLE: Duration = Duration::from_secs(30);

impl Engine {
    pub(crate) fn fly(self: Arc<Self>) {
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

    pub(crate) fn next_flight(self: &Arc<Self>) -> Option<(FlightId, Option<Key>, Load)> {
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
                    let since = Instant::now();
                    state.in_use += 1;
                    state.airborne.insert(id, Airborne { key: key.clone(), since, waiting });
                    self.wake_keeper(&mut state, since + self.patience());
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
    pub(crate) fn link(&self) -> Result<r2d2::PooledConnection<Links>> {
        self.pool
            .get()
            .map_err(|_| Error::connection(format!("{STRAYS} connections do not answer; no more are opened")))
    }

    pub(crate) fn carry(
        self: &Arc<Self>,
        id: FlightId,
        topic: &Arc<str>,
        lease: Duration,
        load: &Load,
    ) -> Outcome {
        let mut link = match self.link() {
            Ok(link) => link,
            Err(e) => return Outcome::failed(e),
        };
        let deadline = Instant::now() + self.settings.operation_timeout;
        let mut flight = crate::flight::Flight { engine: self, link: &mut link, topic, id, deadline };
        let outcome = match load {
            Load::Push(jobs) => flight.push(jobs),
            Load::Settle(jobs) => flight.settle(jobs),
            Load::Pop { jobs, poll, registered } => flight.pop(jobs, lease, *poll, *registered),
            Load::Task(_) => Outcome::default(),
        };
        if link.was_renewed() {
            self.observe(|observer| observer.reconnected());
        }
        outcome
    }

    /// Ends a flight. Returns whether its thread still belongs to the queue.
    pub(crate) fn landed(
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
            if outcome.rows > 0 {
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
    pub(crate) fn release_lane(
        self: &Arc<Self>,
        state: &mut State,
        key: &Key,
        id: FlightId,
        jobs: Vec<PopJob>,
        outcome: &Outcome,
    ) {
        let closed = state.closed;
        state.make_room(key);
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
                let look_in = outcome.look_in.unwrap_or(Duration::MAX);
                look_in.max(Duration::from_millis(2)).min(self.settings.poll_interval)
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

    pub(crate) fn note_outage(&self, state: &mut State, error: Option<&Error>, flew: bool) {
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
