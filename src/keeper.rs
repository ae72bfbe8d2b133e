//! The keeper: the one thread that does what is due at a certain time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::crew::Outcome;
use crate::engine::{Engine, SHORTAGE, STRAYS};
use crate::error::{Error, ErrorKind};
use crate::lane::{ALONE, State, TELLING};
use crate::outside::steadily;
use crate::slot::{FlightId, lock};
use crate::upkeep::{Everywhere, Upkeep};

impl Engine {
    pub(crate) fn wake_keeper(&self, state: &mut State, at: Instant) {
        if state.keeper_until.is_none_or(|until| at < until) {
            state.keeper_until = Some(at);
            self.tick.notify_one();
        }
    }

    /// What has to be done at a certain time: looks for those that wait, overdue flights, upkeep.
    pub(crate) fn keep(self: Arc<Self>) {
        steadily(|| self.keep_on());
    }

    fn keep_on(self: &Arc<Self>) {
        let minute = Duration::from_secs(60);
        let everywhere = match self.settings.keep_settled {
            Duration::ZERO => minute,
            keep => keep.clamp(Duration::from_secs(1), minute),
        };
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
            let mut due = Vec::new();
            let State { airborne, lanes, .. } = &mut *state;
            for (id, flight) in airborne {
                let alone_until = flight.since + ALONE;
                if flight.alone && alone_until <= now {
                    flight.alone = false;
                    for (topic, _) in &flight.topics {
                        if let Some(lane) = lanes.get_mut(topic) {
                            lane.flying.take_if(|flight| flight == id);
                        }
                        due.push(Arc::clone(topic));
                    }
                } else if flight.alone {
                    next = next.min(alone_until);
                }
                next = next.min(flight.since + self.patience());
            }
            for (topic, lane) in lanes {
                match lane.look_at {
                    Some(at) if at <= now => {
                        lane.look_at = None;
                        lane.calm = false;
                        // Those that are on a flight may have been told before that there is nothing.
                        if !lane.pops.is_empty() || lane.flights > 0 {
                            lane.poll = !lane.is_signalled();
                            lane.signal = true;
                            due.push(Arc::clone(topic));
                        }
                    }
                    Some(at) => next = next.min(at),
                    None => {}
                }
            }
            for topic in due {
                state.list(&topic);
            }
            if look_around <= now {
                look_around = now + everywhere;
                let groups: Vec<Arc<str>> =
                    state.members.values().flatten().map(|(key, _)| Arc::clone(key)).collect();
                groups.iter().for_each(|key| state.tidy(key));
                next = next.min(look_around);
                state.tasks.push_back(Box::new(Everywhere::new(self)));
            }
            next = Upkeep::due(self, &mut state, now).map_or(next, |due| next.min(due));
            if state.has_work() {
                self.start(&mut state);
                next = self.stand_in(&mut state, now).map_or(next, |again| next.min(again));
            }

            state.keeper_until = Some(next);
            let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            state = state.wait_timeout(&self.tick, wait).0;
        }
    }

    /// Another thread for what is queued, when all that there are tell what came of their flights, and have been at it
    /// for a while. Returns when to look again, if that is not sure to do.
    fn stand_in(self: &Arc<Self>, state: &mut State, now: Instant) -> Option<Instant> {
        let most = self.settings.pool_size;
        let is_free = state.idle > 0 || state.spinning > 0;
        if state.telling > 0
            && !is_free
            && state.in_use < most
            && (most..most + STRAYS).contains(&state.threads)
        {
            let again = state.took_off.map_or(now, |at| at + TELLING);
            if again > now {
                return Some(again);
            }
            let _ = self.launch(state);
        }
        (state.threads == 0).then_some(now + SHORTAGE)
    }

    /// How long a flight may take before it is written off.
    pub(crate) fn patience(&self) -> Duration {
        self.settings.operation_timeout + Duration::from_millis(100)
    }

    /// Gives a flight up for lost: others take its place.
    pub(crate) fn write_off(self: &Arc<Self>, state: &mut State, id: FlightId) {
        let Some(flight) = state.airborne.remove(&id) else { return };
        let patience = self.settings.operation_timeout;
        self.teller.note(move || {
            tracing::warn!("a call has not been answered for {patience:?}; its connection is left behind");
        });
        self.route.doubt(flight.since);
        state.in_use -= 1;
        state.threads -= 1;
        let error = Error::new(ErrorKind::Timeout, "the server did not answer in time").indeterminate(true);
        for (topic, waiting) in flight.topics {
            self.release_lane(state, &topic, id, waiting, &Outcome::failed(error.clone()));
        }
        if state.has_work() {
            self.start(state);
        }
    }
}
