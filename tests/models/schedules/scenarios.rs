//! What callers do at the same time, and what must be true whatever the schedule. Each is run in a world of its own.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::thread::JoinHandle;

use crate::world::clock::{Instant, may_leap};
use crate::world::server::{Course, Fate, Found, LARGE, POISON, Server};
use crate::world::sync::Arc;
use crate::world::thread;
use crate::world::time::Duration;
use crate::world::uuid::Uuid;
use crate::world::{one_of, random};

use super::builder;
use super::calls::{Settle, Verb, Verdict};
use super::engine::Settings;
use super::error::{ErrorKind, Result};
use super::lane::{Group, SettleJob, TurnJob};
use super::lease::Lease;
use super::message::NewMessage;
use super::observer::{Abandoned, Flight, Observer};
use super::queue::Queue;
use super::slot::{Slot, Waited};
use super::stopping::{Cause, Stopping};

const LONG: Duration = Duration::from_secs(100);

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// How often what the scenarios are for came about, on this thread.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) flights: usize,
    /// With more than one caller.
    pub(crate) shared: usize,
    pub(crate) failed: usize,
    /// Calls whose time was over.
    pub(crate) late: usize,
    /// Messages that came for nobody.
    pub(crate) given_back: usize,
}

thread_local! {
    pub(crate) static SEEN: Cell<Seen> = Cell::default();
}

fn see(note: impl FnOnce(&mut Seen)) {
    let mut seen = SEEN.get();
    note(&mut seen);
    SEEN.set(seen);
}

struct Witness;

impl Observer for Witness {
    fn flight(&self, event: &Flight<'_>) {
        see(|seen| {
            seen.flights += 1;
            seen.shared += usize::from(event.callers() > 1);
            seen.failed += usize::from(!event.succeeded());
        });
    }

    fn abandoned(&self, event: &Abandoned<'_>) {
        see(|seen| seen.given_back += event.count());
    }
}

/// What the callers know.
#[derive(Default)]
struct Book {
    /// Acknowledged.
    pushed: BTreeSet<Uuid>,
    /// Popped, and not settled yet.
    held: BTreeSet<Uuid>,
    completed: BTreeSet<Uuid>,
    /// Their settles may have happened: how many. One caller may give a message back, and another
    /// be in doubt of it before the first one comes to write that down.
    doubtful: BTreeMap<Uuid, usize>,
}

impl Book {
    fn doubts(&mut self, id: Uuid) {
        *self.doubtful.entry(id).or_default() += 1;
    }

    fn doubts_no_more(&mut self, id: Uuid) {
        self.doubtful.entry(id).and_modify(|doubts| *doubts -= 1);
        self.doubtful.retain(|_, doubts| *doubts > 0);
    }
}

/// Some queues on one server, and what their callers know.
#[derive(Clone)]
struct Market {
    server: Arc<Server>,
    queue: Queue,
    book: Arc<std::sync::Mutex<Book>>,
}

/// A pool of one or two, and nobody looks again unless it is told to.
fn settings() -> Settings {
    Settings {
        pool_size: one_of(&[1, 2]),
        operation_timeout: Duration::from_secs(30),
        poll_interval: Duration::from_secs(3_600),
        lease: Duration::from_secs(3_600),
        keep_settled: Duration::from_secs(3_600),
        max_attempts: 25,
        max_payload: 1_000,
        listens: false,
    }
}

impl Market {
    fn open(server: &Arc<Server>, settings: Settings) -> Self {
        let queue = open(server, settings);
        Market { server: Arc::clone(server), queue, book: Arc::default() }
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap()
    }

    fn caller(&self, work: impl FnOnce(&Market) + Send + 'static) -> JoinHandle<()> {
        let market = self.clone();
        shuttle::thread::spawn(move || work(&market))
    }

    fn push(&self, topic: &str, message: &NewMessage) -> Result<bool> {
        let pushed = self.queue.push_once(topic, message.clone());
        if pushed.is_ok() {
            self.book().pushed.insert(message.id());
        }
        pushed
    }

    fn got(&self, leases: Vec<Lease>) -> Vec<Lease> {
        let mut book = self.book();
        for lease in &leases {
            let id = lease.id();
            assert!(!book.completed.contains(&id), "{id} was completed, and comes again");
            assert!(book.held.insert(id), "{id} is somebody else's");
        }
        leases
    }

    /// Afterwards it is not the caller's any more, whatever the answer.
    fn settle(&self, lease: &Lease, verb: Verb) -> Result<Vec<Verdict>> {
        self.settles(lease, &verb, || {
            self.queue.handle.settle(lease.topic(), vec![lease.proof(verb.clone())])
        })
    }

    fn settles(
        &self,
        lease: &Lease,
        verb: &Verb,
        send: impl FnOnce() -> Result<Vec<Verdict>>,
    ) -> Result<Vec<Verdict>> {
        let id = lease.id();
        self.book().held.remove(&id);
        self.book().doubts(id);
        let verdicts = send();
        if let Ok(verdicts) = &verdicts {
            let mut book = self.book();
            assert_eq!(verdicts[..], [Verdict::Settled], "{id} was held");
            book.doubts_no_more(id);
            if matches!(verb, Verb::Complete) {
                book.completed.insert(id);
            }
        }
        verdicts
    }

    /// Completes until that is answered.
    fn complete(&self, lease: &Lease) {
        until(|| self.settle(lease, Verb::Complete));
    }

    /// To the end of all calls and of all threads: what the callers know is what the server has.
    fn close_up(self, callers: Vec<JoinHandle<()>>) {
        for caller in callers {
            assert!(caller.join().is_ok());
        }
        let Market { server, queue, book } = self;
        drop(queue);
        thread::join_all();
        let book = book.lock().unwrap();
        let stored: BTreeMap<Uuid, Found> = server.all().into_iter().collect();
        for id in &book.pushed {
            assert!(stored.contains_key(id), "{id} was pushed, and is lost");
        }
        for (id, found) in stored {
            match found {
                Found::Ready => {
                    assert!(!book.held.contains(&id) && !book.completed.contains(&id), "{id} is there again");
                }
                Found::Leased => {
                    assert!(
                        book.held.contains(&id) || book.doubtful.contains_key(&id),
                        "{id} is leased, to nobody"
                    );
                }
                Found::Completed => {
                    assert!(book.completed.contains(&id) || book.doubtful.contains_key(&id), "{id} is gone");
                }
            }
        }
    }
}

fn open(server: &Arc<Server>, settings: Settings) -> Queue {
    builder::open(server, settings, Arc::new(Witness)).unwrap()
}

/// Tries until it succeeds.
fn until<T>(mut call: impl FnMut() -> Result<T>) -> T {
    for _ in 0..20 {
        if let Ok(value) = call() {
            return value;
        }
    }
    panic!("it never succeeds");
}

/// Whether there is still one to come.
fn count_down(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

fn even() -> bool {
    random(2) == 0
}

/// A time on the way: none, less or more than a flight is alone.
fn on_the_way() -> Duration {
    one_of(&[ms(0), ms(0), ms(1), ms(25)])
}

/// All went on at once, but for the time on the way: nobody waited for a clock.
fn soon(limit: Duration) {
    let now = Instant::now().since_the_beginning();
    assert!(now < limit, "it took {now:?}");
}

/// Producer and number, so that the order can be told.
fn payload(producer: usize, number: usize) -> Vec<u8> {
    vec![u8::try_from(producer).unwrap(), u8::try_from(number).unwrap()]
}

/// Pops a number of messages, one way or the other, and settles them. Some are given back first, unless all is to come
/// in order.
fn consume(market: &Market, topic: &str, quota: usize, in_order: bool) {
    let style = random(4);
    // Pops with other leases take other flights.
    let queue =
        if random(4) == 0 { market.queue.with_lease(Duration::from_secs(60)) } else { market.queue.clone() };
    let (mut got, mut last) = (0, BTreeMap::new());
    let mut next: Option<Arc<Slot<_>>> = None;
    while got < quota {
        let leases = match (next.take(), style) {
            (Some(slot), _) => match slot.wait(None) {
                Waited::Done(grants) => grants.map(|grants| market.queue.leases(grants)),
                Waited::Unsent(_) | Waited::Unknown => panic!("there is no deadline"),
            },
            (None, 0) => queue.pop_many(topic, quota - got, LONG),
            (None, 1) => queue.pop_timeout(topic, LONG).map(|lease| lease.into_iter().collect()),
            (None, _) => queue.pop(topic).map(|lease| vec![lease]),
        };
        let Ok(leases) = leases else { continue };
        assert!(!leases.is_empty(), "a pop came back with nothing");
        for lease in market.got(leases) {
            got += 1;
            if let [producer, number] = *lease.payload() {
                let before = last.insert(producer, number);
                assert!(!in_order || before < Some(number), "{number} of {producer} after {before:?}");
            }
            if !in_order && random(4) == 0 {
                until(|| market.settle(&lease, Verb::Release));
                got -= 1;
            } else if style == 3 && got < quota {
                next = Some(turn(market, &lease));
            } else {
                market.complete(&lease);
            }
        }
    }
}

/// Completes, and asks for the next message in the same flight, as a worker does.
fn turn(market: &Market, lease: &Lease) -> Arc<Slot<Vec<super::calls::Grant>>> {
    let (settled, asked) = (Arc::new(Slot::new()), Arc::new(Slot::new()));
    let settles = vec![lease.proof(Verb::Complete)];
    let job = TurnJob {
        settle: SettleJob { settles, unwanted: false, slot: Arc::clone(&settled) },
        pop: market.queue.pop_job(1, true, &asked),
    };
    let until = market.queue.handle.deadline();
    let sent = market.queue.engine().turn(lease.topic(), job);
    let wait = || sent.and_then(|()| market.queue.engine().wait(&settled, Some(until)));
    let answer = market.settles(lease, &Verb::Complete, wait);
    if answer.is_err() {
        market.complete(lease);
    }
    asked
}

/// Pushes some messages, each again until that is answered.
fn produce(market: &Market, topic: &str, producer: usize, count: usize) {
    let messages = (0..count).map(|number| NewMessage::new(payload(producer, number)));
    for message in messages {
        until(|| market.push(topic, &message));
    }
}

/// Producers and consumers, and whoever else wants a connection: all are served at once, each with what is its own.
pub(crate) fn all_are_served() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, settings());
    let topics: &[&str] = one_of(&[&["a"][..], &["a", "b"]]);
    let (mut callers, in_order) = (Vec::new(), even());
    for n in 0..2 {
        let topic = topics[n % topics.len()];
        callers.push(market.caller(move |market| consume(market, topic, 2, in_order)));
        callers.push(market.caller(move |market| {
            let (first, second) = (NewMessage::new(payload(n, 0)), NewMessage::new(payload(n, 1)));
            assert!(market.push(topic, &first).unwrap(), "it is new");
            if even() {
                assert!(!market.push(topic, &first).unwrap(), "it is stored already");
            }
            assert!(market.push(topic, &second).unwrap(), "it is new");
        }));
    }
    callers.push(market.caller(|market| match random(5) {
        0 => {
            let borrowed = market.queue.engine().borrow_link(Instant::now() + LONG);
            thread::sleep(on_the_way());
            drop(borrowed.unwrap_or_else(|e| panic!("{e}")));
        }
        1 => {
            let proof = Settle { id: Uuid::now_v7(), token: vec![1; 8], verb: Verb::Complete };
            assert_eq!(market.queue.handle.settle("a", vec![proof]).unwrap(), [Verdict::Gone]);
        }
        2 => assert_eq!(market.queue.topic("c").purge().unwrap(), 0),
        3 => assert!(market.queue.try_pop("c").unwrap().is_none()),
        // So many that they share no flight.
        _ => {
            let messages: Vec<NewMessage> = (0..100).map(|_| NewMessage::new("x")).collect();
            assert_eq!(market.queue.push_many("c", messages).unwrap().len(), 100);
            assert_eq!(market.got(market.queue.pop_many("c", 100, LONG).unwrap()).len(), 100);
        }
    }));
    market.close_up(callers);
    soon(Duration::from_secs(2));
}

/// The first statements fail. Whoever was aboard is told, or goes on waiting, and then all are served.
fn all_go_on(fates: &'static [Fate]) {
    let failures = AtomicUsize::new(usize::try_from(random(3)).unwrap());
    let fate = one_of(fates);
    let server = Server::new(true, move |name| {
        let pops = matches!(name, "pop" | "pop_topics" | "turn" | "turn_topic" | "wait_for");
        // What was popped and not answered comes back when its lease ends, which is not tried here.
        let may_fail = !(pops && fate == Fate::Lost);
        let fate = if may_fail && count_down(&failures) { fate } else { Fate::Done };
        Course { there: on_the_way(), fate, back: on_the_way() }
    });
    let market = Market::open(&server, settings());
    let mut callers = Vec::new();
    for n in 0..2 {
        callers.push(market.caller(|market| consume(market, "a", 2, true)));
        callers.push(market.caller(move |market| produce(market, "a", n, 2)));
    }
    callers.push(market.caller(|market| {
        let poisoned = market.queue.push("a", NewMessage::new(POISON));
        assert!(poisoned.is_err(), "an answer that is not its own");
    }));
    market.close_up(callers);
    soon(Duration::from_secs(5));
}

pub(crate) fn a_flight_that_fails() {
    all_go_on(&[Fate::Refused("57P01"), Fate::Refused("40001"), Fate::Refused("42501"), Fate::Lost]);
}

pub(crate) fn a_flight_that_panics() {
    all_go_on(&[Fate::Panics]);
}

/// The queue is closed while calls wait and fly. All of them end, and nothing is left on its way.
pub(crate) fn closing() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, settings());
    let mut callers = Vec::new();
    for n in 0..2 {
        callers.push(market.caller(move |market| {
            let popped = match random(3) {
                0 => market.queue.pop("a").map(|lease| vec![lease]),
                1 => market.queue.pop_many("a", 2, LONG),
                _ => market.queue.pop_any(&["a", "b"], LONG).map(|lease| lease.into_iter().collect()),
            };
            match popped {
                Err(e) => assert_eq!(e.kind(), ErrorKind::Closed),
                Ok(leases) => {
                    let lease = market.got(leases).remove(0);
                    if even() {
                        return;
                    }
                    let next = turn(market, &lease);
                    match next.wait(None) {
                        Waited::Done(Ok(grants)) => drop(market.got(market.queue.leases(grants))),
                        Waited::Done(Err(e)) => assert_eq!(e.kind(), ErrorKind::Closed),
                        Waited::Unsent(_) | Waited::Unknown => panic!("there is no deadline"),
                    }
                }
            }
        }));
        callers.push(market.caller(move |market| {
            for number in 0..2 {
                match market.push("a", &NewMessage::new(payload(n, number))) {
                    Ok(new) => assert!(new),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Closed),
                }
            }
        }));
    }
    let closing = market.caller(|market| {
        thread::sleep(one_of(&[ms(0), ms(1), ms(26)]));
        let begun = Instant::now();
        market.queue.close();
        assert!(begun.elapsed() < Duration::from_secs(1), "closing waits for nothing");
    });
    assert!(closing.join().is_ok());
    let leased: Vec<Uuid> =
        server.all().into_iter().filter(|(_, found)| *found == Found::Leased).map(|(id, _)| id).collect();
    let book = Arc::clone(&market.book);
    market.close_up(callers);
    let book = book.lock().unwrap();
    for id in leased {
        let known =
            book.held.contains(&id) || book.completed.contains(&id) || book.doubtful.contains_key(&id);
        assert!(known, "{id} was on its way to nobody when closing had ended");
    }
    soon(Duration::from_secs(2));
}

/// Calls whose time is over before their flight begins, or at the moment at which it ends. They end in time, and what
/// their flights bring is given back.
pub(crate) fn deadlines() {
    let times = [ms(0), ms(0), ms(0), ms(1), ms(20), ms(50), ms(150)];
    let server = Server::new(true, move |_| Course::done(one_of(&times), one_of(&[ms(0), ms(0), ms(50)])));
    let leaps = random(4) == 0;
    if leaps {
        may_leap(8);
    }
    let timeout = ms(50);
    let market = Market::open(&server, Settings { operation_timeout: timeout, ..settings() });
    let in_time = move |limit: Duration, begun: Instant, ended: Option<ErrorKind>| {
        let took = begun.elapsed();
        assert!(leaps || took <= limit + ms(1), "{took:?} instead of {limit:?}");
        see(|seen| seen.late += usize::from(ended == Some(ErrorKind::Timeout)));
    };
    let mut callers = Vec::new();
    for n in 0..2 {
        callers.push(market.caller(move |market| {
            for _ in 0..2 {
                let (begun, limit) = (Instant::now(), one_of(&[ms(0), ms(20), ms(50), ms(120)]));
                let popped = match random(3) {
                    0 => market.queue.pop_any(&["a", "b"], limit.max(ms(1))),
                    _ => market.queue.pop_timeout("a", limit),
                };
                let ended = popped.as_ref().err().map(super::error::Error::kind);
                let limit = if limit.is_zero() { timeout } else { limit };
                if let Ok(Some(lease)) = popped {
                    in_time(limit, begun, ended);
                    let lease = market.got(vec![lease]).remove(0);
                    let begun = Instant::now();
                    let settled = market.settle(&lease, if even() { Verb::Complete } else { Verb::Release });
                    in_time(timeout, begun, settled.err().map(|e| e.kind()));
                } else {
                    in_time(limit, begun, ended.or(Some(ErrorKind::Timeout)));
                }
            }
        }));
        callers.push(market.caller(move |market| {
            for number in 0..2 {
                let begun = Instant::now();
                let pushed = market.push(one_of(&["a", "b"]), &NewMessage::new(payload(n, number)));
                in_time(timeout, begun, pushed.err().map(|e| e.kind()));
            }
        }));
    }
    market.close_up(callers);
}

/// Pops that are called off while they wait or fly, as a worker's are when it is stopped.
pub(crate) fn called_off() {
    let server = Server::new(true, |_| Course::done(on_the_way(), one_of(&[ms(0), ms(25), ms(1_000)])));
    let market = Market::open(&server, settings());
    let stopping = Arc::new(Stopping::default());
    let mut callers = Vec::new();
    for n in 0..2 {
        let waiting = Arc::clone(&stopping);
        callers.push(market.caller(move |market| {
            let group = Group::new(one_of(&[&["a"][..], &["a", "b"]]));
            let slot = market.queue.ask_any(&group, true, even()).unwrap();
            match waiting.wait(&slot) {
                Ok(grants) => drop(market.got(market.queue.leases(grants))),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Closed),
            }
            // A second after it was called off, at the latest.
            soon(ms(1_200));
        }));
        callers.push(market.caller(move |market| produce(market, one_of(&["a", "b"]), n, 2)));
    }
    callers.push(market.caller(move |_| {
        thread::sleep(one_of(&[ms(0), ms(1), ms(25), ms(60)]));
        stopping.stop(Cause::Stopped);
    }));
    market.close_up(callers);
}

/// Pops that wait in two topics: a push to either is found by one that waits, and by one only.
pub(crate) fn several_topics() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, Settings { pool_size: one_of(&[1, 2, 3]), ..settings() });
    let (mut callers, one_waits_in_b) = (Vec::new(), even());
    for _ in 0..2 {
        callers.push(market.caller(|market| {
            let topics = one_of(&[["a", "b"], ["b", "a"]]);
            let lease = market.queue.pop_any(&topics, LONG).unwrap().unwrap();
            market.complete(&market.got(vec![lease])[0]);
        }));
    }
    if one_waits_in_b {
        callers.push(market.caller(|market| consume(market, "b", 1, true)));
    }
    if even() {
        // One that does not wait for long. What it gets, it pushes again.
        callers.push(market.caller(|market| {
            let popped = market.queue.pop_any(&["a", "b"], one_of(&[ms(1), ms(26), ms(60)])).unwrap();
            for lease in market.got(popped.into_iter().collect()) {
                market.complete(&lease);
                assert!(market.push(lease.topic(), &NewMessage::new("y")).unwrap());
            }
        }));
    }
    callers.push(market.caller(move |market| {
        // As many as are waited for: one that is overlooked is missed.
        for _ in 0..if one_waits_in_b { 3 } else { 2 } {
            let topic = if one_waits_in_b { "b" } else { one_of(&["a", "b"]) };
            thread::sleep(one_of(&[ms(0), ms(1), ms(3), ms(60)]));
            let message = NewMessage::new("x");
            let message = if random(4) == 0 { message.delay(ms(5)) } else { message };
            assert!(market.push(topic, &message).unwrap());
        }
    }));
    market.close_up(callers);
    soon(Duration::from_secs(2));
}

/// Workers that wait in two topics for as long as it takes, and know what they were told: pushes by this process and by
/// another one. Nobody looks again unless it is told to.
pub(crate) fn workers_of_several_topics() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, Settings { listens: true, ..settings() });
    let other = Market { queue: open(&server, settings()), ..market.clone() };
    let (mut callers, group) = (Vec::new(), Group::new(&["a", "b"]));
    for _ in 0..2 {
        let group = Arc::clone(&group);
        callers.push(market.caller(move |market| {
            thread::sleep(one_of(&[ms(0), ms(0), ms(90)]));
            for _ in 0..2 {
                let slot = market.queue.ask_any(&group, true, true).unwrap();
                let Waited::Done(Ok(grants)) = slot.wait(None) else { panic!("there is no deadline") };
                for lease in market.got(market.queue.leases(grants)) {
                    thread::sleep(one_of(&[ms(0), ms(1), ms(30)]));
                    market.complete(&lease);
                }
            }
        }));
    }
    if even() {
        // One that is stopped. What it gets, it pushes again.
        callers.push(market.caller(move |market| {
            let slot = market.queue.ask_any(&group, true, true).unwrap();
            if let Waited::Done(Ok(grants)) =
                slot.wait(Some(Instant::now() + one_of(&[ms(1), ms(26), ms(60)])))
            {
                for lease in market.got(market.queue.leases(grants)) {
                    market.complete(&lease);
                    assert!(market.push(lease.topic(), &NewMessage::new("y")).unwrap());
                }
            }
        }));
    }
    for there in [&market, &other] {
        callers.push(there.caller(|there| {
            for _ in 0..2 {
                thread::sleep(one_of(&[ms(0), ms(1), ms(26), ms(60)]));
                let message = NewMessage::new("x");
                let message = if random(4) == 0 { message.delay(ms(5)) } else { message };
                assert!(there.push(one_of(&["a", "b"]), &message).unwrap());
            }
        }));
    }
    drop(other);
    market.close_up(callers);
    soon(Duration::from_secs(2));
}

/// Messages of which one fills a flight: those that share it are served by the next ones, and nobody is told that there
/// is nothing.
pub(crate) fn large_messages() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, settings());
    for topic in ["a", "a", "b", "b"] {
        assert!(market.push(topic, &NewMessage::new(one_of(&[LARGE, b"small"]))).unwrap());
    }
    let mut callers = Vec::new();
    for topic in ["a", "a", "b", "b"] {
        callers.push(market.caller(move |market| {
            let popped = match random(4) {
                0 => market.queue.pop_any(&[topic, "c"], LONG).unwrap(),
                1 => market.queue.pop_any(&[topic, "c"], Duration::ZERO).unwrap(),
                2 => market.queue.pop_timeout(topic, LONG).unwrap(),
                _ => market.queue.try_pop(topic).unwrap(),
            };
            let lease = popped.unwrap_or_else(|| panic!("there is one for each"));
            market.complete(&market.got(vec![lease])[0]);
        }));
    }
    market.close_up(callers);
    soon(Duration::from_secs(1));
}

/// The first statements, or their answers, take longer than a call may take, or than a flight is alone. Others take
/// their place.
pub(crate) fn overdue_flights() {
    let hangs = AtomicUsize::new(1 + usize::try_from(random(2)).unwrap());
    let (long, hangs_there) = (one_of(&[ms(40), ms(299), ms(300), ms(301), ms(5_000)]), even());
    let server = Server::new(true, move |_| {
        let time = if count_down(&hangs) { long } else { on_the_way() };
        if hangs_there { Course::done(time, ms(0)) } else { Course::done(ms(0), time) }
    });
    let timeout = ms(200);
    let poll_interval = Duration::from_secs(2);
    let market = Market::open(&server, Settings { operation_timeout: timeout, poll_interval, ..settings() });
    let mut callers = Vec::new();
    for n in 0..2 {
        callers.push(market.caller(|market| {
            let lease = match random(2) {
                0 => market.queue.pop("a").unwrap(),
                _ => market.queue.pop_any(&["a", "b"], LONG).unwrap().unwrap(),
            };
            let lease = market.got(vec![lease]).remove(0);
            market.complete(&lease);
        }));
        callers.push(market.caller(move |market| {
            let message = NewMessage::new(payload(n, 0));
            until(|| {
                let begun = Instant::now();
                let pushed = market.push("a", &message);
                assert!(begun.elapsed() <= timeout + ms(1), "{:?}", begun.elapsed());
                pushed
            });
        }));
    }
    market.close_up(callers);
    // What a hung flight took from the server comes back with it.
    soon(if hangs_there || long < ms(5_000) { Duration::from_secs(6) } else { Duration::from_secs(12) });
}

/// Two processes: what one pushes is found by the other's pops, by notifications; without them, by polling.
pub(crate) fn two_processes() {
    let notifies = random(4) > 0;
    let poll_interval = Duration::from_secs(if notifies { 3_600 } else { 2 });
    let server = Server::new(notifies, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, Settings { poll_interval, listens: true, ..settings() });
    let other = open(&server, Settings { listens: true, ..settings() });
    let mut callers = Vec::new();
    for _ in 0..2 {
        callers.push(market.caller(|market| {
            let popped = if even() {
                market.queue.pop("a").unwrap()
            } else {
                market.queue.pop_any(&["a", "b"], LONG).unwrap().unwrap()
            };
            market.complete(&market.got(vec![popped])[0]);
        }));
    }
    let there = Market { queue: other, ..market.clone() };
    callers.push(there.caller(|there| {
        for _ in 0..2 {
            thread::sleep(one_of(&[ms(0), ms(1), ms(60)]));
            assert!(there.push("a", &NewMessage::new("x")).unwrap());
        }
    }));
    drop(there);
    market.close_up(callers);
    soon(Duration::from_secs(if notifies { 2 } else { 6 }));
}

/// A message that becomes ready while the pop that waits is on a flight, which was told before that there is none.
pub(crate) fn a_delayed_push_during_a_flight() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, settings());
    let popping = market.caller(|market| consume(market, "a", 1, true));
    let pushing = market.caller(|market| {
        thread::sleep(one_of(&[ms(0), ms(1), ms(30)]));
        market.push("a", &NewMessage::new("x").delay(one_of(&[ms(1), ms(5), ms(25)]))).unwrap();
    });
    market.close_up(vec![popping, pushing]);
    soon(Duration::from_secs(1));
}

/// A connection that was slow, and calls of all kinds that were over before they had begun; behind them one that
/// still waits.
pub(crate) fn piled_up_behind_calls_that_are_over() {
    let (timeout, slow) = (ms(50), AtomicUsize::new(1));
    let server =
        Server::new(true, move |_| Course::done(if count_down(&slow) { ms(60) } else { ms(0) }, ms(0)));
    let market = Market::open(&server, Settings { pool_size: 1, operation_timeout: timeout, ..settings() });
    let mut callers = vec![market.caller(|market| drop(market.push("a", &NewMessage::new("x"))))];
    for n in 0..2 {
        callers.push(market.caller(move |market| {
            thread::sleep(ms(1));
            drop(market.push("a", &NewMessage::new(payload(n, 0))));
        }));
        callers.push(market.caller(|market| {
            thread::sleep(ms(1));
            let proof = Settle { id: Uuid::now_v7(), token: vec![1; 8], verb: Verb::Complete };
            drop(market.queue.handle.settle("a", vec![proof]));
        }));
    }
    callers.push(market.caller(|market| {
        thread::sleep(ms(1));
        market.complete(&market.got(vec![market.queue.pop("a").unwrap()])[0]);
    }));
    market.close_up(callers);
    soon(ms(100));
}

/// A push that comes while one that waits is on a flight, which may have asked before, and the only other one has waited
/// for too long.
pub(crate) fn a_push_while_all_are_on_flights() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, Settings { pool_size: 3, ..settings() });
    let mut callers = vec![market.caller(|market| consume(market, "a", 1, true))];
    callers.push(market.caller(|market| {
        thread::sleep(one_of(&[ms(0), ms(1)]));
        let popped = market.queue.pop_timeout("a", one_of(&[ms(1), ms(20), ms(26)])).unwrap();
        for lease in market.got(popped.into_iter().collect()) {
            // It was to be the other's.
            market.complete(&lease);
            assert!(market.push("a", &NewMessage::new("x")).unwrap());
        }
    }));
    callers.push(market.caller(move |market| {
        thread::sleep(one_of(&[ms(0), ms(1), ms(25), ms(26), ms(51)]));
        assert!(market.push("a", &NewMessage::new("x")).unwrap());
    }));
    market.close_up(callers);
    soon(Duration::from_secs(1));
}

/// A message that is given back while others wait.
pub(crate) fn what_is_given_back() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, settings());
    market.push("a", &NewMessage::new("x")).unwrap();
    let lease = market.got(vec![market.queue.pop("a").unwrap()]).remove(0);
    let waiting = market.caller(|market| consume(market, "a", 1, true));
    let giving = market.caller(move |market| {
        thread::sleep(one_of(&[ms(0), ms(1), ms(26), ms(60)]));
        let verb = if even() { Verb::Release } else { Verb::Defer(0.005) };
        market.settle(&lease, verb).unwrap();
    });
    market.close_up(vec![waiting, giving]);
    soon(Duration::from_secs(1));
}

/// Pops that wait in vain, also beside a flight that takes long.
pub(crate) fn waiting_costs_little() {
    let slow = AtomicUsize::new(usize::try_from(random(2)).unwrap());
    let server = Server::new(true, move |_| {
        Course::done(if count_down(&slow) { ms(2_000) } else { on_the_way() }, on_the_way())
    });
    let market = Market::open(&server, settings());
    let before = SEEN.get().flights;
    let topics: [&[&str]; 3] = [&["a"], &["b"], &["a", "b"]];
    let waiting = topics.map(|topics| {
        market.caller(move |market| {
            thread::sleep(one_of(&[ms(0), ms(1), ms(26)]));
            assert!(market.queue.pop_any(topics, Duration::from_secs(4)).unwrap().is_none());
        })
    });
    market.close_up(waiting.into());
    let flights = SEEN.get().flights - before;
    assert!(flights <= 40, "{flights} flights");
}

/// No thread can be started for a while. Whoever is told that a call failed can rely on it; pops wait for a thread too.
pub(crate) fn threads_that_cannot_be_started() {
    let server = Server::new(true, |_| Course::done(on_the_way(), on_the_way()));
    let market = Market::open(&server, settings());
    // In half of them the messages are there already: nobody but those who pop has need of a thread.
    let before = even();
    if before {
        let there = Market { queue: open(&server, settings()), ..market.clone() };
        (0..2).for_each(|_| assert!(there.push("a", &NewMessage::new("x")).unwrap()));
    }
    thread::fail(random(6));
    let refused: Arc<std::sync::Mutex<BTreeSet<Uuid>>> = Arc::default();
    let mut callers = Vec::new();
    for _ in 0..2 {
        callers.push(market.caller(|market| {
            thread::sleep(one_of(&[ms(0), ms(1), ms(60)]));
            consume(market, "a", 1, false);
        }));
        let refused = Arc::clone(&refused);
        callers.push(market.caller(move |market| {
            for _ in 0..if before { 0 } else { 20 } {
                let message = NewMessage::new("x");
                match market.push("a", &message) {
                    Ok(_) => return,
                    Err(e) => assert!(e.is_retryable() && !e.is_indeterminate(), "{e:?}"),
                }
                refused.lock().unwrap().insert(message.id());
                thread::sleep(one_of(&[ms(0), ms(1)]));
            }
            assert!(before, "it never succeeds");
        }));
    }
    let there = Arc::clone(&server);
    market.close_up(callers);
    let refused = refused.lock().unwrap();
    assert!(
        there.all().into_iter().all(|(id, _)| !refused.contains(&id)),
        "it was pushed although it failed"
    );
    soon(Duration::from_secs(2));
}
