//! The connection threads: each takes the next flight, carries it out, and sees to it that its lane
//! goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::engine::{Engine, STRAYS};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{ALONE, Airborne, Cargo, Load, Part, PopJob, Pops, State};
use crate::link::Links;
use crate::observer::Event;
use crate::slot::{FlightId, Guard, lock};

/// How long a connection thread looks for more work before it goes to sleep.
const SPIN: Duration = Duration::from_micros(100);

/// How long a connection thread without work stays.
const IDLE: Duration = Duration::from_secs(30);

impl Engine {
    pub(crate) fn fly(self: Arc<Self>) {
        let mut answered = None;
        while let Some((id, load)) = self.next_flight(answered) {
            let started = Instant::now();
            let own = match load {
                Load::Task(task) => {
                    let ran = catch_unwind(AssertUnwindSafe(|| match self.link() {
                        Ok(mut link) => task.run(id, Ok(&mut link)),
                        Err(e) => task.run(id, Err(e)),
                    }));
                    if ran.is_err() {
                        task.run(id, Err(Error::panicked()));
                    }
                    answered = Some(1);
                    self.landed(id, &[], &[])
                }
                Load::Shared(parts) => {
                    let mut noted = Vec::new();
                    let carried = catch_unwind(AssertUnwindSafe(|| self.carry(id, &parts, &mut noted)));
                    let outcomes =
                        carried.unwrap_or_else(|_| Outcome::all_failed(&parts, &Error::panicked()));
                    // Gone before the outcomes, to which some events refer.
                    let mut events = noted;
                    answered = Some(parts.iter().map(|part| part.cargo.callers()).sum());
                    self.answer(id, &parts, &outcomes, started, &mut events);
                    let own = self.landed(id, &parts, &outcomes);
                    // Callers have their answers, and others may have the connection: however long this takes.
                    events.iter().for_each(|event| self.tell(event));
                    own
                }
            };
            if !own {
                return;
            }
        }
    }

    fn next_flight(self: &Arc<Self>, answered: Option<usize>) -> Option<(FlightId, Load)> {
        let mut rested = false;
        let mut state = lock(&self.state);
        state.telling -= usize::from(answered.is_some());
        loop {
            if state.has_work() && state.in_use < self.settings.pool_size {
                state = self.gather(state, answered.unwrap_or_default());
            }
            if state.in_use < self.settings.pool_size {
                state.flights += 1;
                let id = state.flights;
                if let Some(load) = state.take(id) {
                    self.take_off(&mut state, id, &load);
                    return Some((id, load));
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
            let timed_out;
            (state, timed_out) = state.wait_timeout(&self.work, IDLE);
            state.idle -= 1;
            if timed_out && !state.has_work() {
                break;
            }
        }
        state.threads -= 1;
        None
    }

    /// Lets those who were just answered come back before the next flight leaves, for as long as
    /// each turn of theirs brings requests. It is no timer: a lone caller waits for nobody, and callers
    /// that do not come cost two turns of the scheduler.
    fn gather<'a>(&'a self, mut state: Guard<'a, State>, answered: usize) -> Guard<'a, State> {
        if answered < 2 {
            return state;
        }
        let (mut calm, until) = (0, Instant::now() + SPIN * 3);
        state.spinning += 1;
        while calm < 2 && Instant::now() < until {
            let before = state.gathered;
            drop(state);
            thread::yield_now();
            state = lock(&self.state);
            calm = if state.gathered > before { 0 } else { calm + 1 };
        }
        state.spinning -= 1;
        state
    }

    fn take_off(self: &Arc<Self>, state: &mut State, id: FlightId, load: &Load) {
        let since = Instant::now();
        let topics = match load {
            Load::Shared(parts) => {
                parts.iter().map(|part| (Arc::clone(&part.topic), part.waiting())).collect()
            }
            Load::Task(_) => Vec::new(),
        };
        let alone = matches!(load, Load::Shared(parts) if parts.iter().all(|part| !part.cargo.is_large()));
        state.in_use += 1;
        state.took_off = Some(since);
        state.airborne.insert(id, Airborne { topics, since, alone });
        self.wake_keeper(state, since + ALONE);
        if state.has_work() {
            self.start(state);
        }
    }

    /// A connection, or a place for one.
    pub(crate) fn link(&self) -> Result<r2d2::PooledConnection<Links>> {
        self.pool
            .get()
            .map_err(|_| Error::connection(format!("{STRAYS} connections do not answer; no more are opened")))
    }

    fn carry<'p>(
        self: &Arc<Self>,
        id: FlightId,
        parts: &'p [Part],
        events: &mut Vec<Event<'p>>,
    ) -> Vec<Outcome> {
        let mut link = match self.link() {
            Ok(link) => link,
            Err(e) => return Outcome::all_failed(parts, &e),
        };
        let deadline = Instant::now() + self.settings.operation_timeout;
        let flight = crate::flight::Flight { engine: self, link: &mut link, id, deadline, events };
        let outcomes = flight.carry(parts);
        if link.was_renewed() {
            events.push(Event::Reconnected);
        }
        outcomes
    }

    /// Answers those whom an error leaves without an answer, and notes what is to be told.
    fn answer<'p>(
        &self,
        id: FlightId,
        parts: &'p [Part],
        outcomes: &'p [Outcome],
        started: Instant,
        events: &mut Vec<Event<'p>>,
    ) {
        let duration = started.elapsed();
        for (Part { topic, cargo }, outcome) in parts.iter().zip(outcomes) {
            if let Some(error) = &outcome.error {
                match cargo {
                    Cargo::Push(jobs) => {
                        jobs.iter().for_each(|job| drop(job.slot.land(id, Err(error.clone()))))
                    }
                    Cargo::Settle(jobs) => {
                        jobs.iter().for_each(|job| drop(job.slot.land(id, Err(error.clone()))))
                    }
                    Cargo::Turn(turns) => {
                        turns.jobs.iter().for_each(|job| drop(job.settle.slot.land(id, Err(error.clone()))))
                    }
                    Cargo::Pop(_) => {}
                }
                cargo
                    .pops()
                    .filter(|job| !job.waits || !error.is_retryable())
                    .for_each(|job| drop(job.slot.land(id, Err(error.clone()))));
            }
            let topics: Vec<(&'p str, usize)> = match cargo {
                // Those that had something; or, as there is no other, the first.
                Cargo::Pop(Pops { any: Some(any), .. }) if outcome.of.is_empty() => {
                    any.group.topics.iter().take(1).map(|topic| (&**topic, 0)).collect()
                }
                Cargo::Pop(Pops { any: Some(_), .. }) => {
                    outcome.of.iter().map(|(topic, rows)| (&**topic, *rows)).collect()
                }
                _ => vec![(topic, outcome.rows)],
            };
            for (topic, rows) in topics {
                events.push(Event::Flight(crate::observer::Flight {
                    topic,
                    kind: cargo.kind().word(),
                    callers: cargo.callers(),
                    rows,
                    duration,
                    succeeded: outcome.error.is_none(),
                }));
            }
        }
    }

    /// Ends a flight. Returns whether its thread still belongs to the queue.
    fn landed(self: &Arc<Self>, id: FlightId, parts: &[Part], outcomes: &[Outcome]) -> bool {
        let mut state = lock(&self.state);
        let own = state.airborne.remove(&id).is_some();
        if own {
            state.in_use -= 1;
            state.telling += 1;
        }
        for (Part { topic, cargo }, outcome) in parts.iter().zip(outcomes) {
            self.note_outage(&mut state, outcome.error.as_ref());
            if let Cargo::Settle(jobs) = cargo {
                state.unwanted -= jobs.iter().filter(|job| job.unwanted).count();
            }
            if own {
                let pops = cargo.pops().cloned().collect();
                self.release_lane(&mut state, topic, id, pops, outcome);
            }
            let popped = outcome.of.iter().map(|(topic, rows)| (topic, *rows));
            let used = (outcome.rows > 0).then_some((topic, outcome.rows));
            for (topic, rows) in used.into_iter().chain(popped) {
                let at = state.note_use(topic, rows, self.settings.keep_settled);
                self.wake_keeper(&mut state, at);
            }
            if let Some(ready) = outcome.pushed {
                self.wake(&mut state, topic, ready);
            }
        }
        if state.closed {
            self.grounded.notify_all();
        }
        if state.outside_waits > 0 {
            self.work.notify_all();
        }
        if state.has_work() {
            // Most likely this thread takes it, once it has told what is to be told.
            self.wake_keeper(&mut state, Instant::now() + ALONE);
        }
        own
    }

    /// Lets the next flight of a lane begin, and puts those back into it that go on waiting.
    pub(crate) fn release_lane(
        self: &Arc<Self>,
        state: &mut State,
        topic: &Arc<str>,
        id: FlightId,
        jobs: Vec<PopJob>,
        outcome: &Outcome,
    ) {
        let closed = state.closed;
        let lane = state.lanes.entry(Arc::clone(topic)).or_default();
        lane.flights = lane.flights.saturating_sub(1);
        lane.flying.take_if(|flight| *flight == id);
        let popped = !jobs.is_empty();
        let mut short = false;
        for job in jobs.into_iter().rev() {
            if (job.waits || outcome.again) && job.slot.leave(id, outcome.error.clone()) {
                short = true;
                if closed {
                    job.slot.refuse(Error::closed());
                } else {
                    lane.pops.push_front(job);
                }
            }
        }
        lane.signal |= short && outcome.again;
        lane.calm = outcome.calm && outcome.error.is_none();
        lane.first = outcome.first.unwrap_or(lane.first);
        lane.signal |= short && std::mem::take(&mut lane.unheard);
        lane.signal |= popped && !short && outcome.error.is_none();
        let mut look_at = None;
        if popped && !lane.pops.is_empty() {
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
            let at = if wait == self.settings.poll_interval { self.tick_after(now) } else { now + wait };
            lane.look_at = Some(lane.look_at.map_or(at, |earlier| earlier.min(at)));
            look_at = lane.look_at;
        }
        state.list(topic);
        state.tidy(topic);
        if let Some(at) = look_at {
            self.wake_keeper(state, at);
            self.start_listener(state);
        }
        if state.has_work() {
            self.work.notify_one();
        }
    }

    /// The last of the moments, a poll interval apart, that comes within a poll interval: all lanes have the same ones, so
    /// that they look together.
    fn tick_after(&self, now: Instant) -> Instant {
        let interval = self.settings.poll_interval;
        let since = (now + interval).saturating_duration_since(self.began).as_nanos();
        let beyond = since % interval.as_nanos().max(1);
        now + interval.saturating_sub(Duration::from_nanos(u64::try_from(beyond).unwrap_or_default()))
    }

    fn note_outage(&self, state: &mut State, error: Option<&Error>) {
        match error {
            Some(e) if e.kind() == ErrorKind::Connection && !state.outage => {
                state.outage = true;
                let e = e.clone();
                self.teller.note(move || tracing::warn!("lost the server, trying again: {e}"));
            }
            None if state.outage => {
                state.outage = false;
                self.teller.note(|| tracing::info!("the server is back"));
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
    /// Pushes, and settles that give back: in how long the first message is ready.
    pub(crate) pushed: Option<Duration>,
    /// Pops: when it is worth looking again.
    pub(crate) look_in: Option<Duration>,
    /// Pops: the server knows that somebody waits.
    pub(crate) registered: bool,
    /// Pops: there may be more for those that got nothing, also for those that do not wait.
    pub(crate) again: bool,
    /// Pops of several topics: how many messages of each.
    pub(crate) of: Vec<(Arc<str>, usize)>,
    /// Pops of several topics: which is asked first the next time.
    pub(crate) first: Option<usize>,
    /// Pops of several topics: nothing is ready, and what comes is told us.
    pub(crate) calm: bool,
}

impl Outcome {
    pub(crate) fn failed(error: Error) -> Self {
        Outcome { error: Some(error), ..Outcome::default() }
    }

    fn all_failed(parts: &[Part], error: &Error) -> Vec<Self> {
        parts.iter().map(|_| Outcome::failed(error.clone())).collect()
    }
}

/// 50 ms, doubling up to 5 s, less up to a half.
pub(crate) fn backoff(failures: u32) -> Duration {
    let most = Duration::from_millis(50 << failures.saturating_sub(1).min(7)).min(Duration::from_secs(5));
    most.mul_f64(1.0 - f64::from(Uuid::new_v4().as_bytes()[0]) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_five_seconds() {
        for (failures, most) in
            [(0, 50), (1, 50), (2, 100), (5, 800), (7, 3_200), (8, 5_000), (u32::MAX, 5_000)]
        {
            let most = Duration::from_millis(most);
            let waits: Vec<Duration> = (0..64).map(|_| backoff(failures)).collect();
            assert!(waits.iter().all(|wait| (most / 2..=most).contains(wait)), "{failures}: {waits:?}");
            assert!(waits.iter().any(|wait| *wait < most.mul_f64(0.9)), "{failures}: no two are told apart");
            assert!(waits.iter().any(|wait| *wait > most.mul_f64(0.6)), "{failures}: {waits:?}");
        }
    }
}
