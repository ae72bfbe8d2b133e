//! A place where a caller waits for the answer to its request, with a deadline.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The number of a flight.
pub(crate) type FlightId = u64;

/// How long a caller waits for a flight that it does not need any more.
const ENDING: Duration = Duration::from_secs(1);

enum State<T> {
    /// In a lane; the error is that of the last flight it was in, if that failed.
    Queued(Option<Error>),
    Flying(FlightId),
    /// On a flight, and called off: ends with that, or at this time.
    Ending(FlightId, Instant),
    Done(Result<T>),
    /// Nobody waits any more.
    Left,
}

pub(crate) struct Slot<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

/// What a caller that waited has got.
pub(crate) enum Waited<T> {
    Done(Result<T>),
    /// The deadline passed while the request was in a lane: it was not sent.
    Unsent(Option<Error>),
    /// The deadline passed while the request was on its way.
    Unknown,
}

/// A mutex is poisoned only if a thread panicked while holding it, and none of those here hold one
/// while they run anything that is not theirs.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Slot<T> {
    pub(crate) fn new() -> Self {
        Slot { state: Mutex::new(State::Queued(None)), changed: Condvar::new() }
    }

    /// Waits for the answer, until the deadline if there is one. Afterwards nobody waits.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Waited<T> {
        let mut state = lock(&self.state);
        loop {
            let deadline = match *state {
                State::Done(_) => break,
                State::Ending(_, until) => Some(deadline.map_or(until, |deadline| until.min(deadline))),
                _ => deadline,
            };
            let Some(deadline) = deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match std::mem::replace(&mut *state, State::Left) {
            State::Done(result) => Waited::Done(result),
            State::Queued(error) => Waited::Unsent(error),
            State::Flying(_) | State::Ending(..) | State::Left => Waited::Unknown,
        }
    }

    /// Whether somebody waits, and the request is not on its way.
    pub(crate) fn is_queued(&self) -> bool {
        matches!(*lock(&self.state), State::Queued(_))
    }

    /// Whether somebody waits.
    pub(crate) fn is_awaited(&self) -> bool {
        matches!(*lock(&self.state), State::Queued(_) | State::Flying(_))
    }

    /// Calls the request off. If it is on a flight, its caller still waits for what that brings, for a second.
    pub(crate) fn cancel(&self) {
        let mut state = lock(&self.state);
        match *state {
            State::Queued(_) => *state = State::Done(Err(Error::closed())),
            State::Flying(flight) => *state = State::Ending(flight, Instant::now() + ENDING),
            _ => return,
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Takes the request onto a flight, if somebody still waits for it.
    pub(crate) fn board(&self, flight: FlightId) -> bool {
        let mut state = lock(&self.state);
        let waits = matches!(*state, State::Queued(_));
        if waits {
            *state = State::Flying(flight);
        }
        waits
    }

    /// Puts the request back into its lane, if it is on this flight and somebody waits for it.
    pub(crate) fn leave(&self, flight: FlightId, error: Option<Error>) -> bool {
        let mut state = lock(&self.state);
        match *state {
            State::Flying(id) if id == flight => {
                *state = State::Queued(error);
                return true;
            }
            State::Ending(id, _) if id == flight => *state = State::Done(Err(Error::closed())),
            _ => return false,
        }
        drop(state);
        self.changed.notify_one();
        false
    }

    /// Answers the request; gives the answer back if nobody waits for it from this flight.
    pub(crate) fn land(&self, flight: FlightId, result: Result<T>) -> Result<(), Result<T>> {
        let mut state = lock(&self.state);
        if !matches!(*state, State::Flying(id) | State::Ending(id, _) if id == flight) {
            return Err(result);
        }
        *state = State::Done(result);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Answers a request that is in a lane.
    pub(crate) fn refuse(&self, error: Error) {
        let mut state = lock(&self.state);
        if matches!(*state, State::Queued(_)) {
            *state = State::Done(Err(error));
            drop(state);
            self.changed.notify_one();
        }
    }
}
