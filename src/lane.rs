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
use crate::upkeep::Used;

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
    /// It waits for as long as it takes: where others have just been told that there is nothing, it waits with them.
    pub(crate) patient: bool,
    pub(crate) slot: Arc<Slot<Vec<Grant>>>,
}

/// Topics of which a pop takes whichever has something. Pops for the same ones share a lane.
pub(crate) struct Group {
    /// The name of its lane: no topic has such a name.
    pub(crate) key: Arc<str>,
    pub(crate) topics: Vec<Arc<str>>,
}

impl Group {
    /// Each topic once, in their order. One topic is no group: it has its own name as its key.
    pub(crate) fn new(names: &[impl AsRef<str>]) -> Arc<Self> {
        let mut known: HashMap<&str, ()> = HashMap::default();
        let names = names.iter().map(AsRef::as_ref).filter(|name| known.insert(name, ()).is_none());
        let topics: Vec<Arc<str>> = names.map(Arc::from).collect();
        Arc::new(Group { key: topics.join("\0").into(), topics })
    }
}

pub(crate) struct SettleJob {
    pub(crate) settles: Vec<Settle>,
    /// Messages that came for somebody who was gone.
    pub(crate) unwanted: bool,
    pub(crate) slot: Arc<Slot<Vec<Verdict>>>,
}

/// A settle, and a pop by the same caller, which waits: they share a flight.
pub(crate) struct TurnJob {
    pub(crate) settle: SettleJob,
    pub(crate) pop: PopJob,
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

/// For so long the threads may be busy with telling observers before another one stands in for them. Long enough that a
/// thread which was only not scheduled meanwhile has none.
pub(crate) const TELLING: Duration = Duration::from_millis(200);

/// A request of so many messages has a flight of its own beside others: sharing would save it nothing.
const LARGE: usize = 100;

/// With so many topics waiting, another flight leaves beside one that is still alone.
const MANY: usize = 32;

#[derive(Default)]
pub(crate) struct Lane {
    pub(crate) pushes: VecDeque<PushJob>,
    pub(crate) pops: VecDeque<PopJob>,
    pub(crate) settles: VecDeque<SettleJob>,
    pub(crate) turns: VecDeque<TurnJob>,
    /// A flight that is still alone.
    pub(crate) flying: Option<FlightId>,
    /// All flights under way.
    pub(crate) flights: usize,
    pub(crate) listed: bool,
    /// There may be something for those that wait.
    pub(crate) signal: bool,
    /// The signal is only that of the clock.
    pub(crate) poll: bool,
    /// For pops from whichever of several topics has something.
    pub(crate) group: Option<Arc<Group>>,
    /// Of a group, the topic that is asked first: the one behind the last that had something.
    pub(crate) first: usize,
    /// Of a group, the topics for which there may be something, when that is not known of all.
    pub(crate) hot: Vec<usize>,
    /// Of a group, the last look at all has found nothing, and what comes since is told us.
    pub(crate) calm: bool,
    /// A signal found nobody in the lane: those on flights may have looked before it came.
    pub(crate) unheard: bool,
    /// The last flight with pops left one behind that does not wait.
    hurry: bool,
    /// When to look next for those that wait.
    pub(crate) look_at: Option<Instant>,
    /// Until when the server knows that somebody waits.
    pub(crate) registered: Option<Instant>,
    /// Flights with pops that failed, one after the other.
    pub(crate) failures: u32,
    /// How often another kind was preferred to each.
    passed: [u8; 4],
}

/// What a flight carries: requests of one kind for one topic, and pops beside turns.
pub(crate) enum Cargo {
    Push(Vec<PushJob>),
    Settle(Vec<SettleJob>),
    Turn(Turns),
    Pop(Pops),
}

/// Turns, and pops that have waited longer: all of one length of lease.
pub(crate) struct Turns {
    pub(crate) jobs: Vec<TurnJob>,
    pub(crate) pops: Vec<PopJob>,
}

impl Turns {
    /// All pops of it, in the order in which they get something.
    pub(crate) fn pops(&self) -> impl Iterator<Item = &PopJob> {
        self.pops.iter().chain(self.jobs.iter().map(|job| &job.pop))
    }
}

/// Pops of one length of lease.
pub(crate) struct Pops {
    pub(crate) jobs: Vec<PopJob>,
    pub(crate) lease: Option<Duration>,
    /// Only the clock says that it is time to look.
    pub(crate) poll: bool,
    /// The topics to ask, if these are several.
    pub(crate) any: Option<Any>,
}

/// Which of a group's topics are asked.
pub(crate) struct Any {
    pub(crate) group: Arc<Group>,
    pub(crate) first: usize,
    /// Only these; if there are none, all of them.
    pub(crate) hot: Vec<usize>,
    /// Whether all others are known to have nothing.
    pub(crate) calm: bool,
}

impl Any {
    /// The topics in the order in which they are asked, by their places in the group.
    pub(crate) fn order(&self) -> Vec<usize> {
        if !self.hot.is_empty() {
            return self.hot.clone();
        }
        let all = 0..self.group.topics.len();
        all.clone().cycle().skip(self.first).take(all.len()).collect()
    }
}

/// How many messages some pops want together.
pub(crate) fn asked<'a>(jobs: impl Iterator<Item = &'a PopJob>) -> i32 {
    let asked: usize = jobs.filter(|job| job.slot.is_awaited()).map(|job| job.max).sum();
    i32::try_from(asked.min(limits::FLIGHT_ROWS)).unwrap_or(1)
}

/// The part of a flight that is for one topic.
pub(crate) struct Part {
    pub(crate) topic: Arc<str>,
    pub(crate) cargo: Cargo,
}

impl Part {
    /// Those aboard that stay until there is something.
    pub(crate) fn waiting(&self) -> Vec<PopJob> {
        self.cargo.pops().filter(|job| job.waits).cloned().collect()
    }
}

pub(crate) enum Load {
    /// Parts of one kind.
    Shared(Vec<Part>),
    Task(Box<dyn Task>),
}

/// What a flight that is under way would leave behind if it were written off.
pub(crate) struct Airborne {
    /// With the pops that wait.
    pub(crate) topics: Vec<(Arc<str>, Vec<PopJob>)>,
    pub(crate) since: Instant,
    /// No other leaves beside it yet.
    pub(crate) alone: bool,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) lanes: HashMap<Arc<str>, Lane>,
    /// For each topic the lanes of the groups that it belongs to, and its place in them.
    pub(crate) members: HashMap<Arc<str>, Vec<(Arc<str>, usize)>>,
    /// How many lanes of groups there have been.
    pub(crate) formed: usize,
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
    /// Threads that tell what came of their flights: nobody knows how long that takes.
    pub(crate) telling: usize,
    /// When the last flight took off.
    pub(crate) took_off: Option<Instant>,
    /// The last thread for flights could not be started.
    pub(crate) shortage: bool,
    /// Connections that fly, or that a caller's transaction has.
    pub(crate) in_use: usize,
    /// Those of them that a caller's transaction has.
    pub(crate) lent: usize,
    pub(crate) outside_waits: usize,
    pub(crate) used: HashMap<Arc<str>, Used>,
    /// The topic up to which upkeep of all topics has come.
    pub(crate) upkept: String,
    pub(crate) keeper_until: Option<Instant>,
    /// Requests to give unwanted messages back.
    pub(crate) unwanted: usize,
    pub(crate) outage: bool,
    pub(crate) listening: bool,
    /// The last thread to listen could not be started.
    pub(crate) deaf: bool,
    pub(crate) closed: bool,
    pub(crate) ended: bool,
}

impl State {
    /// Whether a flight could start. While one is alone, what comes gathers for the next, whatever its
    /// topic: the commit is what costs.
    pub(crate) fn has_work(&self) -> bool {
        let alone = || self.airborne.values().any(|flight| flight.alone);
        !self.tasks.is_empty() || self.ready.len() >= MANY || !self.ready.is_empty() && !alone()
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

    /// Makes the lane of a group, if it is not there.
    pub(crate) fn form(&mut self, group: &Arc<Group>) {
        if group.topics.len() < 2 || self.lanes.contains_key(&group.key) {
            return;
        }
        // Each lane begins with another topic, so that those with short lives starve nobody.
        self.formed += 1;
        let lane = Lane {
            group: Some(Arc::clone(group)),
            first: self.formed % group.topics.len(),
            ..Lane::default()
        };
        self.lanes.insert(Arc::clone(&group.key), lane);
        for (place, topic) in group.topics.iter().enumerate() {
            self.members.entry(Arc::clone(topic)).or_default().push((Arc::clone(&group.key), place));
        }
    }

    /// The next flight: as many requests as it may carry, for one topic or for several.
    pub(crate) fn take(&mut self, id: FlightId) -> Option<Load> {
        self.gathered = 0;
        while let Some(task) = self.tasks.pop_front() {
            if task.board(id) {
                return Some(Load::Task(task));
            }
        }
        let mut parts: Vec<Part> = Vec::new();
        let mut room =
            Room { kind: None, poll: false, rows: limits::FLIGHT_ROWS, bytes: limits::FLIGHT_BYTES };
        // Each that is listed now is asked once, in turn, whether it comes along.
        let mut left = if self.has_work() { self.ready.len() } else { 0 };
        while left > 0 {
            left -= 1;
            let Some(topic) = self.ready.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&topic) else { continue };
            lane.listed = false;
            if let Some(cargo) = lane.board(id, &mut room) {
                lane.flying = (!cargo.is_large()).then_some(id);
                lane.flights += 1;
                let shares = cargo.shares();
                parts.push(Part { topic: Arc::clone(&topic), cargo });
                self.list(&topic);
                if !shares {
                    break;
                }
            } else {
                // The callers of what it had most of are gone: it is asked again for the rest.
                left += usize::from(self.list(&topic) && parts.is_empty());
                self.tidy(&topic);
            }
        }
        (!parts.is_empty()).then_some(Load::Shared(parts))
    }

    /// Forgets a lane that nobody needs any more. That of a worker's group stays as long as the worker.
    pub(crate) fn tidy(&mut self, topic: &str) {
        let needed =
            |group: &Option<Arc<Group>>| group.as_ref().is_some_and(|group| Arc::strong_count(group) > 1);
        let done = |lane: &Lane| lane.is_empty() && lane.flights == 0 && !lane.listed && !needed(&lane.group);
        if !self.lanes.get(topic).is_some_and(done) {
            return;
        }
        let group = self.lanes.remove(topic).and_then(|lane| lane.group);
        for topic in group.iter().flat_map(|group| &group.topics) {
            if let Some(lanes) = self.members.get_mut(topic) {
                lanes.retain(|(key, _)| Some(key) != group.as_ref().map(|group| &group.key));
                if lanes.is_empty() {
                    self.members.remove(topic);
                }
            }
        }
    }
}

impl Lane {
    fn has_work(&self) -> bool {
        !self.pushes.is_empty()
            || !self.settles.is_empty()
            || !self.turns.is_empty()
            || (self.is_signalled() && !self.pops.is_empty())
    }

    /// Whether there may be something for those that wait.
    pub(crate) fn is_signalled(&self) -> bool {
        self.signal || !self.hot.is_empty()
    }

    /// Whether the server knows that somebody waits.
    pub(crate) fn is_registered(&self) -> bool {
        self.registered.is_some_and(|until| until > Instant::now())
    }

    fn is_empty(&self) -> bool {
        self.pushes.is_empty() && self.settles.is_empty() && self.turns.is_empty() && self.pops.is_empty()
    }

    /// What the next flight takes along. The kind of which there are most leaves first: threads that do the same
    /// things in turn then fall into step, and share all their flights. Of as many, pushes: a pop behind them finds
    /// something. None is passed over three times.
    ///
    /// Beside parts for other topics only what is of their kind, and is alike in its cost: those for which only the
    /// clock says that it is time share with their like, and what asks several topics in turn with nobody.
    fn board(&mut self, id: FlightId, room: &mut Room) -> Option<Cargo> {
        let pops = if self.is_signalled() { self.pops.len() } else { 0 };
        let turns = if self.turns.is_empty() { 0 } else { self.turns.len() + pops };
        let waiting = [self.pushes.len(), self.settles.len(), turns, pops];
        let order = |kind: Kind| {
            let (kind, waits) = (kind as usize, waiting[kind as usize]);
            (waits > 0, self.passed[kind] > 1, waits)
        };
        let next =
            [Kind::Pop, Kind::Turn, Kind::Settle, Kind::Push].into_iter().max_by_key(|kind| order(*kind))?;
        let differs = || self.poll != room.poll || self.group.is_some() && !self.poll;
        if room.kind.is_some_and(|kind| kind != next || kind == Kind::Pop && differs()) {
            return None;
        }
        room.poll = self.poll;
        for (kind, passed) in self.passed.iter_mut().enumerate() {
            *passed = if kind == next as usize || waiting[kind] == 0 { 0 } else { *passed + 1 };
        }
        match next {
            Kind::Push => room.board(&mut self.pushes, id, |_| true).map(Cargo::Push),
            Kind::Settle => room.board(&mut self.settles, id, |_| true).map(Cargo::Settle),
            Kind::Turn => {
                let lease = self.turns.front()?.pop.lease;
                let jobs = room.board(&mut self.turns, id, |job| job.pop.lease == lease)?;
                let pops = (pops > 0).then(|| self.board_pops(id, room, Some(lease))).flatten();
                Some(Cargo::Turn(Turns { jobs, pops: pops.map(|pops| pops.jobs).unwrap_or_default() }))
            }
            Kind::Pop => self.board_pops(id, room, None).map(Cargo::Pop),
        }
    }

    /// Those that are left behind, for want of room or with another lease, are next if there is enough for
    /// these, or if they want an answer in any case. Beside turns of some lease only those of the same that wait
    /// until there is something.
    fn board_pops(
        &mut self,
        id: FlightId,
        room: &mut Room,
        beside: Option<Option<Duration>>,
    ) -> Option<Pops> {
        self.pops.retain(|job| job.slot.is_queued());
        let mut here = std::mem::take(&mut self.pops);
        let all = self.signal;
        self.unheard |= here.is_empty();
        if self.hurry && beside.is_none() {
            // Those that wait are in front again after a flight that brought them nothing.
            let hurried = here.iter().find(|job| !job.waits).map(|job| job.lease);
            here.make_contiguous().sort_by_key(|job| Some(job.lease) != hurried);
        }
        let lease = beside.or(here.front().map(|job| job.lease));
        let alike = |job: &PopJob| Some(job.lease) == lease && (job.waits || beside.is_none());
        let jobs = room.board(&mut here, id, alike);
        self.hurry = here.iter().any(|job| !job.waits);
        self.pops = here;
        self.signal &= jobs.is_none() && lease.is_some() || self.hurry;
        if self.pops.is_empty() && jobs.is_none() {
            // Whoever comes next has to ask.
            self.hot.clear();
            self.calm = false;
        }
        let (jobs, lease) = jobs.zip(lease)?;
        let poll = std::mem::take(&mut self.poll);
        let hot = std::mem::take(&mut self.hot);
        let any = self.group.as_ref().map(|group| Any {
            group: Arc::clone(group),
            first: self.first,
            calm: self.calm && !all,
            hot: if all { Vec::new() } else { hot },
        });
        Some(Pops { jobs, lease, poll, any })
    }
}

/// How much a flight can still take along.
struct Room {
    /// Of which kind, once there is something aboard.
    kind: Option<Kind>,
    /// Whether only the clock says that it is time for its pops.
    poll: bool,
    rows: usize,
    bytes: usize,
}

impl Room {
    /// Requests from the front of a queue, as many as one flight may carry. The first of a flight always finds
    /// room.
    fn board<J: Job>(
        &mut self,
        queue: &mut VecDeque<J>,
        id: FlightId,
        alike: impl Fn(&J) -> bool,
    ) -> Option<Vec<J>> {
        let mut jobs = Vec::new();
        while let Some(job) = queue.front() {
            let large = job.rows() >= LARGE;
            let full = job.rows() > self.rows || job.bytes() > self.bytes;
            if !alike(job) || self.kind.is_some() && (large || full) {
                break;
            }
            let Some(job) = queue.pop_front() else { break };
            if job.board(id) {
                self.kind.get_or_insert(J::KIND);
                self.rows = self.rows.saturating_sub(job.rows());
                self.bytes = self.bytes.saturating_sub(job.bytes());
                jobs.push(job);
                if large {
                    break;
                }
            }
        }
        (!jobs.is_empty()).then_some(jobs)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Push,
    Settle,
    Turn,
    Pop,
}

impl Kind {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Kind::Push => "push",
            Kind::Settle => "settle",
            Kind::Turn => "turn",
            Kind::Pop => "pop",
        }
    }
}

/// A request that may share its flight.
pub(crate) trait Job {
    const KIND: Kind;

    /// How many messages it is about, at most.
    fn rows(&self) -> usize;

    /// How many it sends.
    fn sent(&self) -> usize {
        self.rows()
    }

    /// How many bytes it sends.
    fn bytes(&self) -> usize {
        0
    }

    /// Takes it along, if somebody still waits for it.
    fn board(&self, flight: FlightId) -> bool;
}

impl Job for PushJob {
    const KIND: Kind = Kind::Push;

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
    const KIND: Kind = Kind::Settle;

    fn rows(&self) -> usize {
        self.settles.len()
    }

    fn board(&self, flight: FlightId) -> bool {
        self.slot.board(flight)
    }
}

impl Job for PopJob {
    const KIND: Kind = Kind::Pop;

    fn rows(&self) -> usize {
        self.max
    }

    fn board(&self, flight: FlightId) -> bool {
        self.slot.board(flight)
    }
}

impl Job for TurnJob {
    const KIND: Kind = Kind::Turn;

    fn rows(&self) -> usize {
        self.sent().max(self.pop.max)
    }

    fn sent(&self) -> usize {
        self.settle.settles.len()
    }

    /// Both, or the one that somebody still waits for: settling twice does no harm.
    fn board(&self, flight: FlightId) -> bool {
        let settles = self.settle.board(flight);
        self.pop.board(flight) || settles
    }
}

impl Cargo {
    /// The pops aboard.
    pub(crate) fn pops(&self) -> Box<dyn Iterator<Item = &PopJob> + '_> {
        match self {
            Cargo::Push(_) | Cargo::Settle(_) => Box::new(std::iter::empty()),
            Cargo::Turn(turns) => Box::new(turns.pops()),
            Cargo::Pop(pops) => Box::new(pops.jobs.iter()),
        }
    }

    /// How many requests it has.
    pub(crate) fn callers(&self) -> usize {
        match self {
            Cargo::Push(jobs) => jobs.len(),
            Cargo::Settle(jobs) => jobs.len(),
            Cargo::Turn(turns) => turns.jobs.len() + turns.pops.len(),
            Cargo::Pop(pops) => pops.jobs.len(),
        }
    }

    pub(crate) fn is_large(&self) -> bool {
        let first = match self {
            Cargo::Push(jobs) => jobs.first().map(Job::rows),
            Cargo::Settle(jobs) => jobs.first().map(Job::rows),
            Cargo::Turn(turns) => turns.jobs.first().map(Job::rows),
            Cargo::Pop(pops) => pops.jobs.first().map(Job::rows),
        };
        first >= Some(LARGE)
    }

    /// Whether parts for other topics may fly along.
    fn shares(&self) -> bool {
        !self.is_large() && !matches!(self, Cargo::Pop(Pops { poll: false, any: Some(_), .. }))
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Cargo::Push(_) => Kind::Push,
            Cargo::Settle(_) => Kind::Settle,
            Cargo::Turn(_) => Kind::Turn,
            Cargo::Pop(_) => Kind::Pop,
        }
    }
}

#[cfg(test)]
mod tests;
