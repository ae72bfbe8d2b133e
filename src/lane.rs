//! Lanes: where the requests for one topic pile up, and how many of them board the next flight.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

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

#[derive(Clone)]
pub(crate) struct PopJob {
    pub(crate) max: usize,
    /// `None`: as the topic or the queue says.
    pub(crate) lease: Option<Duration>,
    /// Whether it stays until there is something.
    pub(crate) waits: bool,
    pub(crate) slot: Arc<Slot<Vec<Grant>>>,
}

pub(crate) struct SettleJob {
    pub(crate) settles: Vec<Settle>,
    /// Messages that came for somebody who was gone.
    pub(crate) unwanted: bool,
    pub(crate) slot: Arc<Slot<Vec<Verdict>>>,
}

/// A request that shares its flight with no other.
pub(crate) trait Task: Send {
    fn board(&self, flight: FlightId) -> bool;
    fn run(&self, flight: FlightId, link: Result<&mut Link>);
}

/// For so long a flight is the only one of its topic: with more of them each carries less, and all
/// together get less done. One that takes longer, because it waits for a lock or is far from its
/// server, does not hold up the rest.
pub(crate) const ALONE: Duration = Duration::from_millis(20);

/// A request of so many messages has a flight of its own beside others: sharing would save it nothing.
const LARGE: usize = 100;

#[derive(Default)]
pub(crate) struct Lane {
    pub(crate) pushes: VecDeque<PushJob>,
    pub(crate) pops: VecDeque<PopJob>,
    pub(crate) settles: VecDeque<SettleJob>,
    /// A flight that is still alone.
    pub(crate) flying: Option<FlightId>,
    /// All flights under way.
    pub(crate) flights: usize,
    pub(crate) listed: bool,
    /// There may be something for those that wait.
    pub(crate) signal: bool,
    /// The signal is only that of the clock.
    pub(crate) poll: bool,
    /// When to look next for those that wait.
    pub(crate) look_at: Option<Instant>,
    /// Until when the server knows that somebody waits.
    pub(crate) registered: Option<Instant>,
    /// Flights with pops that failed, one after the other.
    pub(crate) failures: u32,
    /// How often another kind was preferred: to pushes, settles, pops.
    passed: [u8; 3],
}

/// What a flight carries: requests of one kind for one topic.
pub(crate) enum Cargo {
    Push(Vec<PushJob>),
    Settle(Vec<SettleJob>),
    Pop(Pops),
}

/// Pops of one length of lease.
pub(crate) struct Pops {
    pub(crate) jobs: Vec<PopJob>,
    pub(crate) lease: Option<Duration>,
    /// Only the clock says that it is time to look.
    pub(crate) poll: bool,
    /// The server knows that somebody waits.
    pub(crate) registered: bool,
}

pub(crate) enum Load {
    Shared(Arc<str>, Cargo),
    Task(Box<dyn Task>),
}

/// What a flight that is under way would leave behind if it were written off.
pub(crate) struct Airborne {
    pub(crate) topic: Option<Arc<str>>,
    pub(crate) since: Instant,
    pub(crate) waiting: Vec<PopJob>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) lanes: HashMap<Arc<str>, Lane>,
    pub(crate) tasks: VecDeque<Box<dyn Task>>,
    /// Topics with a flight to start.
    pub(crate) ready: VecDeque<Arc<str>>,
    /// Requests that came since the last flight left.
    pub(crate) gathered: usize,
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
    /// Requests to give unwanted messages back.
    pub(crate) unwanted: usize,
    pub(crate) outage: bool,
    pub(crate) listening: bool,
    pub(crate) closed: bool,
    pub(crate) ended: bool,
}

impl State {
    /// Whether a flight could start.
    pub(crate) fn has_work(&self) -> bool {
        !self.tasks.is_empty() || !self.ready.is_empty()
    }

    /// Puts a topic on the list of those that have a flight to start, if that is true and it is not
    /// there. Returns whether it is on the list now.
    pub(crate) fn list(&mut self, topic: &str) -> bool {
        let Some((topic, lane)) = self.lanes.get_key_value(topic) else { return false };
        if lane.listed || lane.flying.is_some() || !lane.has_work() {
            return lane.listed;
        }
        let topic = Arc::clone(topic);
        self.ready.push_back(Arc::clone(&topic));
        if let Some(lane) = self.lanes.get_mut(&topic) {
            lane.listed = true;
        }
        true
    }

    /// The next flight: as many requests as it may carry.
    pub(crate) fn take(&mut self, id: FlightId) -> Option<Load> {
        self.gathered = 0;
        while let Some(task) = self.tasks.pop_front() {
            if task.board(id) {
                return Some(Load::Task(task));
            }
        }
        while let Some(topic) = self.ready.pop_front() {
            let Some(lane) = self.lanes.get_mut(&topic) else { continue };
            lane.listed = false;
            if let Some(cargo) = lane.board(id) {
                lane.flying = (!cargo.is_large()).then_some(id);
                lane.flights += 1;
                self.list(&topic);
                return Some(Load::Shared(topic, cargo));
            }
            self.list(&topic);
            self.tidy(&topic);
        }
        None
    }

    /// Forgets a lane that nobody needs any more.
    pub(crate) fn tidy(&mut self, topic: &str) {
        if self.lanes.get(topic).is_some_and(|lane| lane.is_empty() && lane.flights == 0 && !lane.listed) {
            self.lanes.remove(topic);
        }
    }
}

impl Lane {
    fn has_work(&self) -> bool {
        !self.pushes.is_empty() || !self.settles.is_empty() || (self.signal && !self.pops.is_empty())
    }

    fn is_empty(&self) -> bool {
        self.pushes.is_empty() && self.settles.is_empty() && self.pops.is_empty()
    }

    /// The next flight. The kind of which there are most leaves first: threads that do the same things in turn
    /// then fall into step, and share all their flights. None is passed over three times.
    fn board(&mut self, id: FlightId) -> Option<Cargo> {
        let pops = if self.signal { self.pops.len() } else { 0 };
        let waiting = [self.pushes.len(), self.settles.len(), pops];
        let next = (0..3).max_by_key(|kind| (waiting[*kind] > 0, self.passed[*kind] > 1, waiting[*kind]))?;
        for (kind, passed) in self.passed.iter_mut().enumerate() {
            *passed = if kind == next || waiting[kind] == 0 { 0 } else { *passed + 1 };
        }
        match next {
            0 => self.board_pushes(id),
            1 => self.board_settles(id),
            _ => self.board_pops(id),
        }
    }

    fn board_pushes(&mut self, id: FlightId) -> Option<Cargo> {
        let jobs = board(&mut self.pushes, id, |_| true);
        (!jobs.is_empty()).then_some(Cargo::Push(jobs))
    }

    fn board_settles(&mut self, id: FlightId) -> Option<Cargo> {
        let jobs = board(&mut self.settles, id, |_| true);
        (!jobs.is_empty()).then_some(Cargo::Settle(jobs))
    }

    /// Those that are left behind, for want of room or with another lease, are next if there is enough for
    /// these.
    fn board_pops(&mut self, id: FlightId) -> Option<Cargo> {
        self.signal = false;
        self.pops.retain(|job| job.slot.is_queued());
        let lease = self.pops.front()?.lease;
        let jobs = board(&mut self.pops, id, |job| job.lease == lease);
        let poll = std::mem::take(&mut self.poll);
        let registered = self.registered.is_some_and(|until| until > Instant::now());
        (!jobs.is_empty()).then_some(Cargo::Pop(Pops { jobs, lease, poll, registered }))
    }
}

/// Requests from the front of a queue, as many as one flight may carry. One always finds room.
fn board<J: Job>(queue: &mut VecDeque<J>, id: FlightId, alike: impl Fn(&J) -> bool) -> Vec<J> {
    let (mut jobs, mut rows, mut bytes) = (Vec::new(), 0, 0);
    while let Some(job) = queue.front() {
        let large = job.rows() >= LARGE;
        let full = rows + job.rows() > limits::FLIGHT_ROWS || bytes + job.bytes() > limits::FLIGHT_BYTES;
        if !alike(job) || !jobs.is_empty() && (large || full) {
            break;
        }
        let Some(job) = queue.pop_front() else { break };
        if job.board(id) {
            rows += job.rows();
            bytes += job.bytes();
            jobs.push(job);
            if large {
                break;
            }
        }
    }
    jobs
}

/// A request that may share its flight.
pub(crate) trait Job {
    /// How many messages it is about, at most.
    fn rows(&self) -> usize;

    /// How many bytes it sends.
    fn bytes(&self) -> usize {
        0
    }

    /// Takes it along, if somebody still waits for it.
    fn board(&self, flight: FlightId) -> bool;
}

impl Job for PushJob {
    fn rows(&self) -> usize {
        self.messages.len()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn board(&self, flight: FlightId) -> bool {
        self.slot.board(flight)
    }
}

impl Job for SettleJob {
    fn rows(&self) -> usize {
        self.settles.len()
    }

    fn board(&self, flight: FlightId) -> bool {
        self.slot.board(flight)
    }
}

impl Job for PopJob {
    fn rows(&self) -> usize {
        self.max
    }

    fn board(&self, flight: FlightId) -> bool {
        self.slot.board(flight)
    }
}

impl Cargo {
    /// How many requests it has.
    pub(crate) fn callers(&self) -> usize {
        match self {
            Cargo::Push(jobs) => jobs.len(),
            Cargo::Settle(jobs) => jobs.len(),
            Cargo::Pop(pops) => pops.jobs.len(),
        }
    }

    fn is_large(&self) -> bool {
        let first = match self {
            Cargo::Push(jobs) => jobs.first().map(Job::rows),
            Cargo::Settle(jobs) => jobs.first().map(Job::rows),
            Cargo::Pop(pops) => pops.jobs.first().map(Job::rows),
        };
        first >= Some(LARGE)
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Cargo::Push(_) => "push",
            Cargo::Settle(_) => "settle",
            Cargo::Pop(_) => "pop",
        }
    }
}
