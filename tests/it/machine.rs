//! The whole public interface against a reference in memory: whatever is called in whatever order, the queue does what
//! the contract says. The reference knows the contract, and nothing of the SQL.
//!
//! A case is a topic, and 40 calls. Delays are none, an hour, or a time long past, so that nothing has to be waited
//! for; leases end when their rows say so, which the test, as the owner of the schema, writes there.
//!
//! A failure prints the seed and the smallest case that fails: `PUSHPOP_MACHINE_SEED` runs it again, and
//! `PUSHPOP_MACHINE_CASES` says how many there are instead of 500.

use std::cmp::Reverse;
use std::thread;
use std::time::Duration;

use postgres::Client;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::uuid::Uuid;
use pushpop_pg::{Error, ErrorKind, Lease, Message, NewMessage, Queue, SettleError, State, TopicSettings};

use crate::world::{World, unique, until};

/// Threads with cases of their own.
const PARTS: u64 = 4;

const HOUR: Duration = Duration::from_secs(3600);

/// Attempts where neither the message nor the topic says.
const MOST: u16 = 3;

/// When something is ready.
#[derive(Clone, Copy, Debug)]
enum When {
    Now,
    InAnHour,
    /// So many days after the first of 2020.
    Past(u8),
}

#[derive(Clone, Debug)]
struct Push {
    when: When,
    /// The id of a message that was pushed before.
    again: Option<usize>,
    header: bool,
    /// `Some(0)`: without end.
    most: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Complete,
    Discard,
    Defer(bool),
    Release,
    Fail,
}

impl Verb {
    /// For good, so that it can be repeated.
    fn end(self) -> Option<Is> {
        match self {
            Verb::Complete => Some(Is::Completed),
            Verb::Discard => Some(Is::Discarded),
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Push(Push),
    PushMany(Vec<Push>),
    /// In a transaction, which is committed or not.
    PushIn(Push, bool),
    Pop,
    PopMany(usize),
    PopAny,
    Settle(usize, Verb),
    CompleteMany(Vec<usize>),
    /// Completes or discards in a transaction, which is committed or not.
    SettleIn(usize, bool, bool),
    Extend(usize),
    /// All leases end.
    Expire,
    /// What upkeep does once a second is done now.
    Upkeep,
    Find(usize),
    Peek(usize),
    Stats,
    Purge,
    Cancel(usize),
    Reschedule(usize, When),
    Pause,
    Resume,
    /// Whether a failed message waits an hour; attempts.
    Set(bool, Option<u16>),
    Dead,
    Redrive(Vec<usize>),
    RedriveAll,
    PurgeDead,
}

fn when() -> impl Strategy<Value = When> {
    prop_oneof![4 => Just(When::Now), 1 => Just(When::InAnHour), 1 => (0..9u8).prop_map(When::Past)]
}

fn push() -> impl Strategy<Value = Push> {
    let again = prop_oneof![4 => Just(None), 1 => any::<usize>().prop_map(Some)];
    let most = prop_oneof![2 => Just(None), 2 => (1..3u16).prop_map(Some), 1 => Just(Some(0))];
    (when(), again, any::<bool>(), most).prop_map(|(when, again, header, most)| Push {
        when,
        again,
        header,
        most,
    })
}

fn op() -> impl Strategy<Value = Op> {
    let verb = prop_oneof![
        Just(Verb::Complete),
        Just(Verb::Discard),
        any::<bool>().prop_map(Verb::Defer),
        Just(Verb::Release),
        Just(Verb::Fail),
    ];
    let one = any::<usize>;
    prop_oneof![
        5 => push().prop_map(Op::Push),
        2 => vec(push(), 0..7).prop_map(Op::PushMany),
        1 => (push(), any::<bool>()).prop_map(|(push, commits)| Op::PushIn(push, commits)),
        4 => Just(Op::Pop),
        3 => (1..5usize).prop_map(Op::PopMany),
        1 => Just(Op::PopAny),
        8 => (one(), verb).prop_map(|(of, verb)| Op::Settle(of, verb)),
        2 => vec(one(), 1..5).prop_map(Op::CompleteMany),
        2 => (one(), any::<bool>(), any::<bool>()).prop_map(|(of, done, commits)| Op::SettleIn(of, done, commits)),
        1 => one().prop_map(Op::Extend),
        2 => Just(Op::Expire),
        2 => Just(Op::Upkeep),
        1 => one().prop_map(Op::Find),
        1 => (1..20usize).prop_map(Op::Peek),
        1 => Just(Op::Stats),
        1 => Just(Op::Purge),
        2 => one().prop_map(Op::Cancel),
        2 => (one(), when()).prop_map(|(of, when)| Op::Reschedule(of, when)),
        1 => Just(Op::Pause),
        2 => Just(Op::Resume),
        1 => (any::<bool>(), prop_oneof![Just(None), (0..3u16).prop_map(Some)]).prop_map(|(hour, most)| Op::Set(hour, most)),
        1 => Just(Op::Dead),
        1 => vec(one(), 0..4).prop_map(Op::Redrive),
        1 => Just(Op::RedriveAll),
        1 => Just(Op::PurgeDead),
    ]
}

// The reference.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    Waiting,
    Leased,
    /// Its lease has ended. Whether that was noticed yet is for nobody to know.
    Expired,
    Completed,
    Discarded,
    Cancelled,
    Dead,
    /// Deleted.
    Gone,
}

/// The order of the queue: the time at which it is ready; that of its push; its place among those pushed with it.
/// Times are those of a clock that goes on by one with each statement.
type Place = (i64, i64, usize);

/// What is as far ahead as an hour.
const LATER: i64 = 1 << 40;

#[derive(Clone, Debug)]
struct Known {
    payload: Vec<u8>,
    header: Option<String>,
    most: Option<u16>,
    place: Place,
    /// It became free behind the front: for up to a second it may be overtaken.
    behind: bool,
    is: Is,
    /// Deliveries and attempts that are over.
    fence: i64,
    attempt: u32,
    failures: usize,
}

impl Known {
    fn is_ready(&self) -> bool {
        self.is == Is::Waiting && self.place.0 < LATER
    }

    /// Whether one attempt more is the last.
    fn is_doomed(&self) -> bool {
        self.most.is_some_and(|most| self.attempt + 1 >= u32::from(most))
    }

    fn is_poppable(&self) -> bool {
        self.is_ready() || self.is == Is::Expired && !self.is_doomed()
    }

    /// A delivery ends, and counts as a failed attempt.
    fn fail(&mut self) {
        self.is = if self.is_doomed() { Is::Dead } else { Is::Waiting };
        self.fence += 1;
        self.attempt += 1;
        self.failures = (self.failures + 1).min(10);
    }

    /// Somebody has noticed that its lease ended.
    fn expire(&mut self) {
        self.fail();
        self.behind = true;
    }
}

struct Held {
    lease: Lease,
    of: Delivery,
}

#[derive(Clone, Copy)]
struct Delivery {
    /// Of which message, and when that was pushed: its id may have been used again.
    at: usize,
    born: i64,
    fence: i64,
    /// How it was settled, when the lease is still here.
    settled: Option<Is>,
}

struct Machine<'a> {
    queue: &'a Queue,
    world: &'a World,
    client: &'a mut Client,
    topic: String,
    clock: i64,
    messages: Vec<(Uuid, Known)>,
    held: Vec<Held>,
    paused: bool,
    most: Option<u16>,
    hour: bool,
}

impl<'a> Machine<'a> {
    fn new(world: &'a World, queue: &'a Queue, client: &'a mut Client) -> Self {
        let mut machine = Machine {
            queue,
            world,
            client,
            topic: unique("case"),
            clock: 0,
            messages: Vec::new(),
            held: Vec::new(),
            paused: false,
            most: None,
            hour: false,
        };
        machine.set(true, None);
        machine
    }

    fn run(&mut self, op: Op) {
        self.clock += 1;
        match op {
            Op::Push(push) => {
                let (message, known) = self.message(&push, 0);
                let new = self.queue.push_once(&self.topic, message.clone()).unwrap();
                assert_eq!(new, self.store(message.id(), known), "new");
            }
            Op::PushMany(pushes) => {
                let all: Vec<(NewMessage, Known)> =
                    pushes.iter().enumerate().map(|(place, push)| self.message(push, place)).collect();
                let ids = self.queue.push_many(&self.topic, all.iter().map(|m| m.0.clone())).unwrap();
                assert_eq!(ids, all.iter().map(|m| m.0.id()).collect::<Vec<_>>());
                for (message, known) in all {
                    self.store(message.id(), known);
                }
            }
            Op::PushIn(push, commits) => {
                let (message, known) = self.message(&push, 0);
                let done = self.queue.transaction(|tx| {
                    self.queue.push_in(tx, &self.topic, message.clone())?;
                    if commits { Ok(()) } else { Err(Error::other("no")) }
                });
                assert_eq!(done.is_ok(), commits);
                if commits {
                    self.store(message.id(), known);
                }
            }
            Op::Pop => {
                let lease = self.pops(1, |queue, topic| Ok(Vec::from_iter(queue.try_pop(topic)?)));
                assert!(lease <= 1);
            }
            Op::PopMany(max) => {
                self.pops(max, |queue, topic| queue.pop_many(topic, max, Duration::ZERO));
            }
            Op::PopAny => {
                self.pops(1, |queue, topic| {
                    Ok(Vec::from_iter(queue.pop_any(&["nothing is here", topic], Duration::ZERO)?))
                });
            }
            Op::Settle(of, verb) => self.settle(of, verb),
            Op::CompleteMany(of) => self.complete_many(&of),
            Op::SettleIn(of, completes, commits) => self.settle_in(of, completes, commits),
            Op::Extend(of) => {
                let Some(mut held) = self.take(of) else { return };
                let answer = held.lease.extend(HOUR);
                if self.check(held.of, None, answer.err().map(|e| e.kind()), None) {
                    self.messages[held.of.at].1.is = Is::Leased;
                    assert!(held.lease.remaining() > HOUR / 2);
                }
                self.held.push(held);
            }
            Op::Expire => {
                let sql = "update pushpop.leases set lease_until = clock_timestamp() - interval '1 second' where topic = $1";
                self.client.execute(&self.world.sql(sql), &[&self.topic]).unwrap();
                for (_, known) in self.messages.iter_mut().filter(|(_, known)| known.is == Is::Leased) {
                    known.is = Is::Expired;
                }
            }
            Op::Upkeep => self.upkeep(),
            Op::Find(of) => {
                if !self.messages.is_empty() {
                    self.find(of % self.messages.len());
                }
            }
            Op::Peek(max) => self.peek(max),
            Op::Stats => self.stats(),
            Op::Purge => self.purge(),
            Op::Cancel(of) => self.cancel(of),
            Op::Reschedule(of, when) => self.reschedule(of, when),
            Op::Pause => {
                self.queue.topic(&self.topic).pause().unwrap();
                self.paused = true;
            }
            Op::Resume => self.resume(),
            Op::Set(hour, most) => self.set(hour, most),
            Op::Dead => self.dead(),
            Op::Redrive(of) => {
                let of: Vec<usize> = of.iter().filter_map(|of| of.checked_rem(self.messages.len())).collect();
                let ids: Vec<Uuid> = of.iter().map(|at| self.messages[*at].0).collect();
                let redriven = self.queue.topic(&self.topic).redrive(&ids).unwrap();
                self.redriven(redriven, |at| of.contains(&at));
            }
            Op::RedriveAll => {
                let redriven = self.queue.topic(&self.topic).redrive_all().unwrap();
                self.redriven(redriven, |_| true);
            }
            Op::PurgeDead => {
                let purged = self.queue.topic(&self.topic).purge_dead(Duration::ZERO).unwrap();
                let dead = self.count(|known| known.is == Is::Dead);
                let doomed = self.count(|known| known.is == Is::Expired && known.is_doomed());
                assert!((dead..=dead + doomed).contains(&purged), "{purged} purged of {dead} and {doomed}");
                self.each(|known| {
                    if known.is == Is::Dead {
                        known.is = Is::Gone;
                    }
                });
                self.look_at_expired();
            }
        }
    }

    fn each(&mut self, change: impl FnMut(&mut Known)) {
        self.messages.iter_mut().map(|(_, known)| known).for_each(change);
    }

    fn count(&self, what: impl Fn(&Known) -> bool) -> u64 {
        u64::try_from(self.messages.iter().filter(|(_, known)| what(known)).count()).unwrap()
    }

    /// Times come later than all that was given out so far; long past ones before all.
    fn ready(&self, when: When) -> i64 {
        match when {
            When::Now => self.clock,
            When::InAnHour => self.clock + LATER,
            When::Past(day) => i64::from(day) - 1000,
        }
    }

    fn time(when: When) -> Option<OffsetDateTime> {
        let When::Past(day) = when else { return None };
        let start = OffsetDateTime::from_unix_timestamp(1_577_836_800).unwrap();
        Some(start + Duration::from_secs(u64::from(day) * 86_400))
    }

    // Push.

    fn message(&self, push: &Push, place: usize) -> (NewMessage, Known) {
        let payload = format!("{} {place}", self.clock).into_bytes();
        let mut message = NewMessage::new(payload.clone());
        let again = push.again.and_then(|of| of.checked_rem(self.messages.len()));
        if let Some(at) = again {
            message = message.with_id(self.messages[at].0);
        }
        message = match (push.when, Self::time(push.when)) {
            (When::InAnHour, _) => message.delay(HOUR),
            (_, Some(time)) => message.ready_at(time),
            _ => message,
        };
        let header = push.header.then(|| format!("value \" {place}"));
        if let Some(value) = &header {
            message = message.header("näme", value);
        }
        let most = match push.most {
            Some(most) => Some(most).filter(|most| *most > 0),
            None => self.most.map_or(Some(MOST), |most| Some(most).filter(|most| *most > 0)),
        };
        if push.most.is_some() {
            message = message.max_attempts(most);
        }
        let known = Known {
            payload,
            header,
            most,
            place: (self.ready(push.when), self.clock, place),
            behind: matches!(push.when, When::Past(_)),
            is: Is::Waiting,
            fence: 0,
            attempt: 0,
            failures: 0,
        };
        (message, known)
    }

    /// Whether it is new.
    fn store(&mut self, id: Uuid, known: Known) -> bool {
        match self.messages.iter_mut().find(|(other, _)| *other == id) {
            Some((_, old)) if old.is == Is::Gone => *old = known,
            Some(_) => return false,
            None => self.messages.push((id, known)),
        }
        true
    }

    // Pop.

    /// Returns how many there were.
    fn pops(&mut self, max: usize, pop: impl Fn(&Queue, &str) -> Result<Vec<Lease>, Error>) -> usize {
        let mut leases = pop(self.queue, &self.topic).unwrap();
        if leases.is_empty() && !self.paused {
            // Upkeep may have an expired lease in its hands just now.
            let expired = self.count(|known| known.is == Is::Expired && !known.is_doomed());
            assert_eq!(self.count(Known::is_ready), 0, "there was nothing to pop");
            if expired > 0 {
                until("what expired is popped", || {
                    leases = pop(self.queue, &self.topic).unwrap();
                    !leases.is_empty()
                });
            }
        }
        assert!(leases.len() <= max);
        assert!(leases.is_empty() || !self.paused, "a paused topic handed out {leases:?}");
        let count = leases.len();
        for lease in leases {
            let at = self.messages.iter().position(|(id, _)| *id == lease.id()).expect("it was pushed");
            let known = &self.messages[at].1;
            assert!(known.is_poppable(), "{known:?} was popped");
            for (_, other) in &self.messages {
                let overtaken = other.is_poppable() && other.place < known.place;
                assert!(
                    !overtaken || other.behind || other.is == Is::Expired,
                    "{other:?} was overtaken by {known:?}"
                );
            }
            let known = &mut self.messages[at].1;
            if known.is == Is::Expired {
                known.fail();
            }
            known.is = Is::Leased;
            known.behind = false;
            assert!(lease.remaining() > HOUR / 2 && matches!(lease.state(), State::Leased { .. }));
            let fence = known.fence + 1;
            let (born, attempt) = (known.place.1, known.attempt + 1);
            self.same(&lease, at, attempt, fence);
            self.held.push(Held { lease, of: Delivery { at, born, fence, settled: None } });
        }
        if count > 0 && count < max {
            let left = self.messages.iter().find(|(_, known)| known.is_ready() && !known.behind);
            assert!(left.is_none(), "{left:?} was left behind");
        }
        count
    }

    fn same(&self, message: &Message, at: usize, attempt: u32, fence: i64) {
        let (id, known) = &self.messages[at];
        assert_eq!(message.id(), *id);
        assert_eq!(message.topic(), self.topic);
        assert_eq!(message.payload(), known.payload, "the first payload wins");
        assert_eq!(message.header("näme"), known.header.as_deref());
        assert_eq!(message.max_attempts(), known.most);
        assert_eq!((message.attempt(), message.fence()), (attempt, fence), "attempt and fence of {known:?}");
        if known.is != Is::Expired {
            assert_eq!(message.failures().len(), known.failures, "failures of {known:?}");
        }
    }

    // Settle.

    fn take(&mut self, of: usize) -> Option<Held> {
        of.checked_rem(self.held.len()).map(|at| self.held.remove(at))
    }

    /// Whether the answer to a settle is right, where that to a repetition would be `again`; returns whether it took effect
    /// now.
    fn check(
        &mut self,
        of: Delivery,
        wanted: Option<Is>,
        kind: Option<ErrorKind>,
        again: Option<ErrorKind>,
    ) -> bool {
        let known = &mut self.messages[of.at].1;
        let same = known.place.1 == of.born;
        let current = same && known.fence + 1 == of.fence;
        match known.is {
            Is::Leased if current => assert_eq!(kind, None, "settles {known:?}"),
            // Nobody can know whether that was noticed yet.
            Is::Expired if current => {
                assert!(matches!(kind, None | Some(ErrorKind::LeaseLost)), "{kind:?}");
                if kind.is_some() {
                    known.expire();
                }
            }
            Is::Gone => assert_eq!(kind, Some(ErrorKind::NotFound), "{known:?}"),
            // Repeated, or too late.
            _ if same && wanted.is_some() && of.settled == wanted => {
                assert_eq!(kind, again, "repeats what was done to {known:?}");
            }
            _ => assert_eq!(kind, Some(ErrorKind::LeaseLost), "{known:?}"),
        }
        current && kind.is_none() && matches!(known.is, Is::Leased | Is::Expired)
    }

    fn settle(&mut self, of: usize, verb: Verb) {
        let Some(Held { lease, of }) = self.take(of) else { return };
        let answer = match verb {
            Verb::Complete => lease.complete(),
            Verb::Discard => lease.discard(),
            Verb::Defer(hour) => lease.defer(if hour { HOUR } else { Duration::ZERO }),
            Verb::Release => lease.release(),
            Verb::Fail => lease.fail("why"),
        };
        let (lease, error) = answer.map_err(SettleError::into_parts).err().unzip();
        if self.check(of, verb.end(), error.map(|e: Error| e.kind()), None) {
            self.apply(of.at, verb);
        }
        self.held.extend(lease.map(|lease| Held { lease, of }));
    }

    fn apply(&mut self, at: usize, verb: Verb) {
        let (now, later, hour) = (self.ready(When::Now), self.ready(When::InAnHour), self.hour);
        let known = &mut self.messages[at].1;
        known.behind = verb == Verb::Release;
        match verb {
            Verb::Complete | Verb::Discard => {
                known.is = verb.end().unwrap();
                known.attempt += 1;
                known.fence += 1;
            }
            Verb::Release | Verb::Defer(_) => {
                known.is = Is::Waiting;
                known.fence += 1;
            }
            Verb::Fail => known.fail(),
        }
        match verb {
            Verb::Defer(hour) => known.place.0 = if hour { later } else { now },
            // One that is dead has no backoff; it gets another time when it is redriven.
            Verb::Fail => known.place.0 = if hour { later } else { now },
            _ => {}
        }
    }

    fn complete_many(&mut self, of: &[usize]) {
        let mut held: Vec<Held> = Vec::new();
        for of in of {
            held.extend(self.take(*of));
        }
        let token = |lease: &Lease| (lease.id(), lease.pushed_at(), lease.fence());
        let all: Vec<_> = held.iter().map(|held| (token(&held.lease), held.of)).collect();
        let leases = held.into_iter().map(|held| held.lease).collect();
        // Those that are not stored are an error, which comes with those that are lost.
        let (mut back, error) = match self.queue.complete_many(leases).map_err(SettleError::into_parts) {
            Ok(lost) => (lost, None),
            Err((back, error)) => (back, Some(error)),
        };
        for (known, of) in all {
            let found = back.iter().position(|lease| token(lease) == known);
            let lease = found.map(|found| back.remove(found));
            let kind = match &error {
                Some(error) if self.messages[of.at].1.is == Is::Gone => Some(error.kind()),
                _ => lease.as_ref().map(|_| ErrorKind::LeaseLost),
            };
            if self.check(of, Some(Is::Completed), kind, None) {
                self.apply(of.at, Verb::Complete);
            }
            self.held.extend(lease.map(|lease| Held { lease, of }));
        }
        assert!(back.is_empty());
    }

    fn settle_in(&mut self, of: usize, completes: bool, commits: bool) {
        let Some(mut held) = self.take(of) else { return };
        let verb = if completes { Verb::Complete } else { Verb::Discard };
        let mut settled = None;
        let ended = self.queue.transaction(|tx| {
            let answer = if completes { held.lease.complete_in(tx) } else { held.lease.discard_in(tx) };
            settled = Some(answer.is_ok());
            answer?;
            if commits { Ok(()) } else { Err(Error::other("no")) }
        });
        let settled = settled.unwrap();
        assert_eq!(ended.is_ok(), settled && commits, "{ended:?}");
        let gone = self.messages[held.of.at].1.is == Is::Gone;
        if settled && !commits {
            assert!(!gone);
        } else if gone {
            assert!(!settled);
        } else if self.check(held.of, verb.end(), ended.err().map(|e| e.kind()), Some(ErrorKind::LeaseLost)) {
            self.apply(held.of.at, verb);
            held.of.settled = verb.end();
        }
        self.held.push(held);
    }

    // Look.

    /// What upkeep does: gives back what expired, and finds what became free behind the front. Nobody else's
    /// upkeep is in its way, as the row of the topic is locked.
    fn upkeep(&mut self) {
        let lock = self.world.sql("select from pushpop.topics where topic = $1 for update");
        let upkeep = self.world.sql("select pushpop.upkeep($1)");
        let mut tx = self.client.transaction().unwrap();
        tx.query(&lock, &[&self.topic]).unwrap();
        tx.query(&upkeep, &[&self.topic]).unwrap();
        tx.commit().unwrap();
        self.each(|known| {
            if known.is == Is::Expired {
                known.expire();
            }
            known.behind = false;
        });
    }

    fn find(&mut self, at: usize) {
        let (id, known) = &self.messages[at];
        let found = self.queue.find(&self.topic, *id).unwrap();
        if known.is == Is::Gone {
            assert!(found.is_none(), "{found:?}");
            return;
        }
        let found = found.unwrap_or_else(|| panic!("{known:?} is lost"));
        let out = i64::from(matches!(known.is, Is::Leased | Is::Expired));
        self.same(&found, at, known.attempt + u32::try_from(out).unwrap(), known.fence + out);
        let right = match found.state() {
            State::Ready => known.is_poppable(),
            State::Delayed { .. } => known.is == Is::Waiting && !known.is_ready(),
            State::Leased { .. } => known.is == Is::Leased,
            State::Completed { .. } => known.is == Is::Completed,
            State::Discarded { .. } => matches!(known.is, Is::Discarded | Is::Cancelled),
            State::Dead { .. } => known.is == Is::Dead || known.is == Is::Expired && known.is_doomed(),
            _ => false,
        };
        assert!(right, "{known:?} is found {found:?}");
    }

    /// What expired is shown only when that was noticed; of those that wait for an hour the order is not known,
    /// as a backoff is a little less.
    fn peek(&mut self, max: usize) {
        let shown = self.queue.topic(&self.topic).peek(max).unwrap();
        let expired =
            |id: Uuid| self.messages.iter().any(|(other, known)| *other == id && known.is == Is::Expired);
        let ids: Vec<Uuid> = shown.iter().map(Message::id).filter(|id| !expired(*id)).collect();
        let mut ready: Vec<&(Uuid, Known)> =
            self.messages.iter().filter(|(_, known)| known.is_ready()).collect();
        ready.sort_by_key(|(_, known)| known.place);
        for (id, wanted) in ids.iter().zip(&ready) {
            assert_eq!(*id, wanted.0, "{shown:?}");
        }
        for id in ids.iter().skip(ready.len()) {
            assert!(
                self.messages.iter().any(|(other, known)| other == id && known.is == Is::Waiting),
                "{shown:?}"
            );
        }
        let waiting = usize::try_from(self.count(|known| known.is == Is::Waiting)).unwrap();
        assert!(shown.len() >= max.min(waiting) && shown.len() <= max, "{shown:?}");
    }

    fn stats(&mut self) {
        let before: OffsetDateTime = self.client.query_one("select clock_timestamp()", &[]).unwrap().get(0);
        let stats = self.queue.topic(&self.topic).stats().unwrap();
        assert_eq!(stats.paused(), self.paused);
        // Figures that took long to take are shared for two seconds.
        if stats.at() < before {
            return;
        }
        let dead = self.count(|known| known.is == Is::Dead || known.is == Is::Expired && known.is_doomed());
        let over = |known: &Known| matches!(known.is, Is::Completed | Is::Discarded | Is::Cancelled);
        assert_eq!(stats.ready(), self.count(Known::is_poppable), "ready");
        assert_eq!(
            stats.delayed(),
            self.count(|known| known.is == Is::Waiting && !known.is_ready()),
            "delayed"
        );
        assert_eq!(stats.leased(), self.count(|known| known.is == Is::Leased), "leased");
        assert_eq!(stats.settled(), self.count(over), "settled");
        assert_eq!(stats.dead(), dead, "dead");
        assert_eq!(stats.oldest_ready_age().is_some(), stats.ready() > 0);
    }

    // The operator's side.

    /// Whatever was done to all that wait: what has expired may have been among them.
    fn look_at_expired(&mut self) {
        for (id, known) in self.messages.iter_mut().filter(|(_, known)| known.is == Is::Expired) {
            if self.queue.find(&self.topic, *id).unwrap().is_none() {
                known.is = Is::Gone;
            }
        }
    }

    fn purge(&mut self) {
        let purged = self.queue.topic(&self.topic).purge().unwrap();
        let waiting = self.count(|known| known.is == Is::Waiting);
        let expired = self.count(|known| known.is == Is::Expired && !known.is_doomed());
        assert!(
            (waiting..=waiting + expired).contains(&purged),
            "{purged} purged of {waiting} and {expired}"
        );
        self.each(|known| {
            if known.is == Is::Waiting {
                known.is = Is::Gone;
            }
        });
        self.look_at_expired();
    }

    fn cancel(&mut self, of: usize) {
        let Some(at) = of.checked_rem(self.messages.len()) else { return };
        let cancelled = self.queue.topic(&self.topic).cancel(self.messages[at].0).unwrap();
        let known = &mut self.messages[at].1;
        if known.is == Is::Expired {
            // To look whether it waits is to notice.
            known.expire();
        }
        assert_eq!(cancelled, matches!(known.is, Is::Waiting | Is::Cancelled), "{known:?}");
        if cancelled {
            known.is = Is::Cancelled;
        }
    }

    fn reschedule(&mut self, of: usize, when: When) {
        let Some(at) = of.checked_rem(self.messages.len()) else { return };
        let topic = self.queue.topic(&self.topic);
        let id = self.messages[at].0;
        let moved = match (when, Self::time(when)) {
            (When::InAnHour, _) => topic.reschedule(id, HOUR),
            (_, Some(time)) => topic.reschedule_at(id, time),
            _ => topic.reschedule(id, Duration::ZERO),
        };
        let moved = moved.unwrap();
        let ready = self.ready(when);
        let known = &mut self.messages[at].1;
        if known.is == Is::Expired {
            known.expire();
        }
        assert_eq!(moved, known.is == Is::Waiting, "{known:?}");
        if moved {
            known.place.0 = ready;
            known.behind = matches!(when, When::Past(_));
        }
    }

    fn resume(&mut self) {
        self.queue.topic(&self.topic).resume().unwrap();
        self.paused = false;
    }

    /// A backoff is an hour or none; attempts as for a push.
    fn set(&mut self, hour: bool, most: Option<u16>) {
        let backoff = if hour { HOUR } else { Duration::ZERO };
        let mut settings = TopicSettings::default().with_lease(HOUR).with_backoff(backoff, backoff);
        if let Some(most) = most {
            settings = settings.with_max_attempts(Some(most).filter(|most| *most > 0));
        }
        let topic = self.queue.topic(&self.topic);
        topic.set(&settings).unwrap();
        assert_eq!(topic.settings().unwrap(), settings);
        (self.hour, self.most) = (hour, most);
    }

    fn dead(&mut self) {
        let shown = self.queue.topic(&self.topic).dead(1000).unwrap();
        let died: Vec<Reverse<OffsetDateTime>> = shown
            .iter()
            .map(|message| match message.state() {
                State::Dead { at } => Reverse(at),
                state => panic!("{state:?}"),
            })
            .collect();
        assert!(died.is_sorted(), "newest first: {died:?}");
        let ids: Vec<Uuid> = shown.iter().map(Message::id).collect();
        for (id, known) in &self.messages {
            match known.is {
                Is::Dead => assert!(ids.contains(id), "{known:?}"),
                Is::Expired if known.is_doomed() => {}
                _ => assert!(!ids.contains(id), "{known:?}"),
            }
        }
    }

    /// Of those that were asked for, all that were dead are ready.
    fn redriven(&mut self, count: u64, asked: impl Fn(usize) -> bool) {
        let now = self.ready(When::Now);
        let mut dead = 0;
        let mut noticed = 0;
        for (at, (id, known)) in self.messages.iter_mut().enumerate().filter(|(at, _)| asked(*at)) {
            if known.is == Is::Expired && known.is_doomed() {
                let found =
                    self.queue.find(&self.topic, *id).unwrap().unwrap_or_else(|| panic!("{at} is lost"));
                if !matches!(found.state(), State::Dead { .. }) {
                    known.fail();
                    noticed += 1;
                }
            } else if known.is == Is::Dead {
                dead += 1;
            } else {
                continue;
            }
            if known.is == Is::Dead {
                known.is = Is::Waiting;
                known.attempt = 0;
                known.place.0 = now;
                known.behind = false;
            }
        }
        assert_eq!(count, dead + noticed, "redriven");
    }

    /// All that was pushed is there, and can be brought to its end.
    fn finish(&mut self) {
        self.clock += 1;
        for at in 0..self.messages.len() {
            self.find(at);
        }
        self.resume();
        self.run(Op::Expire);
        self.run(Op::Upkeep);
        self.run(Op::Stats);
        while self.pops(1000, |queue, topic| queue.pop_many(topic, 1000, Duration::ZERO)) > 0 {}
        self.complete_many(&vec![0; self.held.len()]);
        self.held.clear();
        self.run(Op::Stats);
        for at in 0..self.messages.len() {
            self.find(at);
            let known = &self.messages[at].1;
            assert!(!known.is_ready() && !matches!(known.is, Is::Leased | Is::Expired), "{known:?} is left");
        }
    }
}

#[test]
fn whatever_is_called_the_queue_does_what_the_contract_says() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = number("PUSHPOP_MACHINE_SEED").unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0);
    let cases = u32::try_from(number("PUSHPOP_MACHINE_CASES").unwrap_or(500)).unwrap();
    println!("PUSHPOP_MACHINE_SEED={seed}");
    let world = World::new();
    let queue = world.open(world.builder().max_attempts(MOST));
    // Each thread has cases of its own: a quarter of them.
    thread::scope(|scope| {
        for part in 0..PARTS {
            let (world, queue) = (&world, &queue);
            scope.spawn(move || {
                let config = Config {
                    cases: cases.div_ceil(u32::try_from(PARTS).unwrap()),
                    rng_seed: RngSeed::Fixed(seed.wrapping_add(part)),
                    failure_persistence: None,
                    max_shrink_iters: 500,
                    ..Config::default()
                };
                // Hardly ever none, but that makes a case that fails smaller.
                let calls = vec(option::weighted(0.999, op()), 40);
                let ran = TestRunner::new(config).run(&calls, |calls| {
                    let mut client = world.client();
                    let mut machine = Machine::new(world, queue, &mut client);
                    calls.into_iter().flatten().for_each(|op| machine.run(op));
                    machine.finish();
                    Ok(())
                });
                ran.unwrap_or_else(|e| panic!("PUSHPOP_MACHINE_SEED={seed}: {e}"));
            });
        }
    });
}
