//! Lanes: where requests pile up, those of one kind for one topic in each, and how many of them board
//! the next flight.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::calls::{Grant, Settle, Verdict};
use crate::error::Result;
use crate::limits;
use crate::link::Link;
use crate::message::NewMessage;
use crate::slot::{FlightId, Slot};

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

/// How many flights one topic may have under way: with more of them each carries less, and all
/// together get less done; with only one, a flight that must wait for a lock would hold up the rest.
const FLIGHTS: usize = 2;

/// Which lane.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Key {
    Push(Arc<str>),
    Pop(Arc<str>, u64),
    Settle(Arc<str>),
}

impl Key {
    pub(crate) fn topic(&self) -> &Arc<str> {
        match self {
            Key::Push(topic) | Key::Pop(topic, _) | Key::Settle(topic) => topic,
        }
    }
}

#[derive(Default)]
pub(crate) struct Lane {
    pub(crate) pushes: VecDeque<PushJob>,
    pub(crate) pops: VecDeque<PopJob>,
    pub(crate) settles: VecDeque<SettleJob>,
    pub(crate) flying: bool,
    pub(crate) listed: bool,
    /// Pops only: there may be something for those that wait.
    pub(crate) signal: bool,
    /// Pops only: the signal is only that of the clock.
    pub(crate) poll: bool,
    /// Pops only: when to look next for those that wait.
    pub(crate) look_at: Option<Instant>,
    /// Pops only: until when the server knows that somebody waits.
    pub(crate) registered: Option<Instant>,
    /// Pops only: flights that failed, one after the other.
    pub(crate) failures: u32,
}

impl Lane {
    pub(crate) fn has_work(&self) -> bool {
        !self.pushes.is_empty() || !self.settles.is_empty() || (self.signal && !self.pops.is_empty())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pushes.is_empty() && self.settles.is_empty() && self.pops.is_empty()
    }
}

pub(crate) enum Load {
    Push(Vec<PushJob>),
    Pop { jobs: Vec<PopJob>, poll: bool, registered: bool },
    Settle(Vec<SettleJob>),
    Task(Box<dyn Task>),
}

/// What a flight that is under way would leave behind if it were written off.
pub(crate) struct Airborne {
    pub(crate) key: Option<Key>,
    pub(crate) since: Instant,
    pub(crate) waiting: Vec<PopJob>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) lanes: HashMap<Key, Lane>,
    pub(crate) tasks: VecDeque<Box<dyn Task>>,
    pub(crate) ready: VecDeque<Key>,
    /// How many flights each topic has under way.
    pub(crate) flying: HashMap<Arc<str>, usize>,
    pub(crate) airborne: HashMap<FlightId, Airborne>,
    pub(crate) flights: FlightId,
    pub(crate) threads: usize,
    pub(crate) idle: usize,
    pub(crate) spinning: usize,
    pub(crate) strays: usize,
    /// Connections that fly, or that a caller's transaction has.
    pub(crate) in_use: usize,
    pub(crate) outside_waits: usize,
    /// Topics that were used since their last upkeep, and when the next is due.
    pub(crate) used: HashMap<Arc<str>, Instant>,
    pub(crate) keeper_until: Option<Instant>,
    pub(crate) outage: bool,
    pub(crate) listening: bool,
    pub(crate) closed: bool,
    pub(crate) ended: bool,
}

impl State {
    /// Whether a flight could start.
    pub(crate) fn has_work(&self) -> bool {
        !self.tasks.is_empty() || self.ready.iter().any(|key| self.has_room(key))
    }

    /// Whether a flight of the topic could start.
    pub(crate) fn has_room(&self, key: &Key) -> bool {
        self.flying.get(key.topic()).is_none_or(|flights| *flights < FLIGHTS)
    }

    /// Notes that a flight of the topic has ended.
    pub(crate) fn make_room(&mut self, key: &Key) {
        if let Some(flights) = self.flying.get_mut(key.topic()) {
            *flights -= 1;
            if *flights == 0 {
                self.flying.remove(key.topic());
            }
        }
    }

    /// Puts a lane on the list of those that have work, if that is true and it is not there.
    pub(crate) fn list(&mut self, key: &Key) {
        if let Some(lane) = self.lanes.get_mut(key)
            && lane.has_work()
            && !lane.flying
            && !lane.listed
        {
            lane.listed = true;
            self.ready.push_back(key.clone());
        }
    }

    /// The next flight: as many requests of one lane as it may carry.
    pub(crate) fn take(&mut self, id: FlightId) -> Option<(Option<Key>, Load)> {
        while let Some(task) = self.tasks.pop_front() {
            if task.board(id) {
                return Some((None, Load::Task(task)));
            }
        }
        while let Some(next) = self.ready.iter().position(|key| self.has_room(key)) {
            let Some(key) = self.ready.remove(next) else { break };
            let Some(lane) = self.lanes.get_mut(&key) else { continue };
            lane.listed = false;
            let load = match key {
                Key::Push(_) => lane.board_pushes(id),
                Key::Pop(..) => lane.board_pops(id),
                Key::Settle(_) => lane.board_settles(id),
            };
            if let Some(load) = load {
                lane.flying = true;
                *self.flying.entry(Arc::clone(key.topic())).or_default() += 1;
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
    pub(crate) fn board_pushes(&mut self, id: FlightId) -> Option<Load> {
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

    pub(crate) fn board_settles(&mut self, id: FlightId) -> Option<Load> {
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

    pub(crate) fn board_pops(&mut self, id: FlightId) -> Option<Load> {
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
