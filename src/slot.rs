//! A place where a caller waits for the answer to its request, with a deadline.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::outside::Held;

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

/// A lock of ours that is held. No code runs under it that is not ours: see [`crate::outside`].
pub(crate) struct Guard<'a, T> {
    guard: MutexGuard<'a, T>,
    held: Held,
}

/// A mutex is poisoned only if a thread panicked while holding it, which is a defect of ours.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> Guard<'_, T> {
    Guard { guard: mutex.lock().unwrap_or_else(PoisonError::into_inner), held: Held::new() }
}

impl<T> Guard<'_, T> {
    /// Lets go of the lock until it is woken.
    pub(crate) fn wait(self, until: &Condvar) -> Self {
        Guard { guard: until.wait(self.guard).unwrap_or_else(PoisonError::into_inner), held: self.held }
    }

    /// The same for a time; and whether that has passed.
    pub(crate) fn wait_timeout(self, until: &Condvar, time: Duration) -> (Self, bool) {
        let (guard, timeout) = until.wait_timeout(self.guard, time).unwrap_or_else(PoisonError::into_inner);
        (Guard { guard, held: self.held }, timeout.timed_out())
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
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
                state = state.wait(&self.changed);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = state.wait_timeout(&self.changed, left).0;
        }
        match std::mem::replace(&mut *state, State::Left) {
            State::Done(result) => Waited::Done(result),
            State::Queued(error) => Waited::Unsent(error),
            State::Flying(_) | State::Ending(..) | State::Left => Waited::Unknown,
        }
    }

    /// Notes why a request that is about to be put into a lane waits there.
    pub(crate) fn put_off(&self, error: Error) {
        let mut state = lock(&self.state);
        if let State::Queued(reason) = &mut *state {
            *reason = Some(error);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn now<T>(slot: &Slot<T>) -> Waited<T> {
        slot.wait(Some(Instant::now()))
    }

    #[test]
    fn an_answer_comes_from_the_flight_that_has_the_request() {
        let slot = Slot::new();
        assert!(slot.is_queued() && slot.is_awaited());
        assert!(slot.board(1) && !slot.board(2), "on one flight at a time");
        assert!(!slot.is_queued() && slot.is_awaited());
        assert!(slot.land(2, Ok("another's")).is_err());
        assert!(slot.land(1, Ok("its own")).is_ok());
        assert!(!slot.is_awaited() && slot.land(1, Ok("again")).is_err());
        assert!(matches!(now(&slot), Waited::Done(Ok("its own"))));
        assert!(slot.land(1, Ok("late")).is_err(), "nobody waits");
    }

    #[test]
    fn a_request_that_goes_on_waiting_keeps_the_error_of_its_flight() {
        let slot = Slot::<()>::new();
        assert!(slot.board(1));
        assert!(!slot.leave(2, None) && !slot.is_queued(), "of another flight");
        assert!(slot.leave(1, Some(Error::panicked())) && slot.is_queued());
        assert!(matches!(now(&slot), Waited::Unsent(Some(_))));
        let slot = Slot::<()>::new();
        assert!(matches!(now(&slot), Waited::Unsent(None)));
        let slot = Slot::<()>::new();
        assert!(slot.board(1));
        assert!(matches!(now(&slot), Waited::Unknown));
    }

    #[test]
    fn what_is_called_off_ends_with_its_flight_at_the_latest() {
        let slot = Slot::<()>::new();
        slot.cancel();
        assert!(!slot.board(1));
        assert!(matches!(now(&slot), Waited::Done(Err(e)) if e.kind() == ErrorKind::Closed));

        let slot = Slot::<()>::new();
        assert!(slot.board(1));
        slot.cancel();
        assert!(!slot.leave(2, None) && !slot.leave(1, None));
        assert!(matches!(now(&slot), Waited::Done(Err(e)) if e.kind() == ErrorKind::Closed));

        let slot = Slot::new();
        assert!(slot.board(1));
        slot.cancel();
        assert!(!slot.leave(2, None), "of another flight");
        assert!(slot.land(2, Ok(2)).is_err() && slot.land(1, Ok(1)).is_ok());
        assert!(matches!(now(&slot), Waited::Done(Ok(1))), "what it brings is taken");

        let (slot, begun) = (Slot::<()>::new(), Instant::now());
        assert!(slot.board(1));
        slot.cancel();
        assert!(matches!(slot.wait(None), Waited::Unknown));
        assert!(begun.elapsed() >= ENDING);
    }
}
