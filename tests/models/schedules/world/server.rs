//! In place of PostgreSQL: messages in memory, and the statements of the queue. Each happens at one moment, between a
//! time on its way there and a time on its way back, or fails as its scenario says.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ::time::OffsetDateTime;

use super::clock::Instant;
use super::postgres::{DbError, Error, Row, Value};
use super::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use super::uuid::Uuid;

/// A payload with which every statement fails.
pub(crate) const POISON: &[u8] = b"poison";

/// A payload that fills a flight.
pub(crate) const LARGE: &[u8] = b"large";

/// For how long the server knows that somebody waits.
const WANTED: Duration = Duration::from_secs(30);

/// What becomes of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Done,
    /// It changes nothing.
    Refused(&'static str),
    /// It is done, and nobody is told.
    Lost,
    /// The code that waits for it panics; it changes nothing.
    Panics,
}

/// How long a statement takes to the moment at which it happens, and from then on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Course {
    pub(crate) there: Duration,
    pub(crate) fate: Fate,
    pub(crate) back: Duration,
}

impl Course {
    pub(crate) fn done(there: Duration, back: Duration) -> Self {
        Course { there, fate: Fate::Done, back }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// With the number of its delivery.
    Leased(u64),
    Completed(u64),
}

struct Stored {
    id: Uuid,
    payload: Vec<u8>,
    ready_at: Instant,
    state: State,
}

#[derive(Default)]
struct Topic {
    /// In the order of their pushes.
    messages: Vec<Stored>,
    /// Until when somebody waits, and who that is if it is only one.
    wanted: Option<(Instant, Option<Uuid>)>,
}

#[derive(Default)]
struct Store {
    topics: BTreeMap<String, Topic>,
    deliveries: u64,
    /// What those that listen have not heard yet.
    ears: Vec<VecDeque<String>>,
}

pub(crate) struct Server {
    store: Mutex<Store>,
    heard: Condvar,
    course: Box<dyn Fn(&str) -> Course + Send + Sync>,
    /// Whether those that listen are told.
    notifies: bool,
}

/// How a message was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Ready,
    Leased,
    Completed,
}

impl Server {
    /// A server that treats the statement of each name as it is told to.
    pub(crate) fn new(notifies: bool, course: impl Fn(&str) -> Course + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Server {
            store: Mutex::default(),
            heard: Condvar::new(),
            course: Box::new(course),
            notifies,
        })
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that is stored.
    pub(crate) fn all(&self) -> Vec<(Uuid, Found)> {
        let store = self.store();
        let messages = store.topics.values().flat_map(|topic| &topic.messages);
        let found = |state| match state {
            State::Ready => Found::Ready,
            State::Leased(_) => Found::Leased,
            State::Completed(_) => Found::Completed,
        };
        messages.map(|message| (message.id, found(message.state))).collect()
    }

    pub(crate) fn listen(&self) -> usize {
        let mut store = self.store();
        store.ears.push(VecDeque::new());
        store.ears.len() - 1
    }

    pub(crate) fn hear(&self, ear: usize, until: Instant) -> Option<String> {
        let mut store = self.store();
        loop {
            let heard = store.ears.get_mut(ear)?.pop_front();
            let left = until.saturating_duration_since(Instant::now());
            if heard.is_some() || left.is_zero() {
                return heard;
            }
            store = self.heard.wait_timeout(store, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs the statement of a call.
    pub(crate) fn run(&self, name: &str, params: Vec<Value>) -> Result<Vec<Row>, Error> {
        let Course { there, fate, back } = (self.course)(name);
        if std::env::var("DBG").is_ok() {
            eprintln!(
                "{:?} {:?} {name} {there:?} {fate:?} {back:?} {params:?}",
                Instant::now(),
                shuttle::current::me()
            );
        }
        if !there.is_zero() {
            super::thread::sleep(there);
        }
        let done = match fate {
            Fate::Done | Fate::Lost => {
                let done = self.store().run(name, &mut Params(params.into_iter()), self.notifies);
                self.heard.notify_all();
                done
            }
            Fate::Refused(code) => Err(Error(Some(DbError(code)))),
            // No panic that the hook would report: it is caught.
            Fate::Panics => std::panic::resume_unwind(Box::new("it was to panic")),
        };
        if !back.is_zero() {
            super::thread::sleep(back);
        }
        if fate == Fate::Lost { Err(Error(None)) } else { done }
    }
}

/// Parameters, one after the other.
struct Params(std::vec::IntoIter<Value>);

impl Params {
    fn next(&mut self) -> Value {
        self.0.next().unwrap_or(Value::Null)
    }

    fn text(&mut self) -> String {
        text(self.next())
    }

    fn list(&mut self) -> Vec<Value> {
        list(self.next())
    }

    fn proofs(&mut self) -> Proofs {
        Proofs { ids: self.list(), tokens: self.list(), words: self.list(), delays: self.list() }
    }

    /// Topics, each with its slice of the arrays that follow.
    fn slices(&mut self) -> Vec<(String, usize, usize)> {
        let (topics, firsts, lasts) = (self.list(), self.list(), self.list());
        let slices = topics.into_iter().zip(firsts).zip(lasts);
        slices.map(|((topic, first), last)| (text(topic), int(&first) - 1, int(&last))).collect()
    }
}

/// Settles, as arrays.
struct Proofs {
    ids: Vec<Value>,
    tokens: Vec<Value>,
    words: Vec<Value>,
    delays: Vec<Value>,
}

fn text(value: Value) -> String {
    match value {
        Value::Text(text) => text,
        other => panic!("{other:?} is no text"),
    }
}

fn list(value: Value) -> Vec<Value> {
    match value {
        Value::Array(values) => values,
        Value::Null => Vec::new(),
        one => vec![one],
    }
}

fn int(value: &Value) -> usize {
    match value {
        Value::Int(n) => usize::try_from(*n).unwrap_or_default(),
        other => panic!("{other:?} is no number"),
    }
}

fn id(value: &Value) -> Option<Uuid> {
    if let Value::Id(id) = value { Some(*id) } else { None }
}

fn bytes(value: &Value) -> &[u8] {
    if let Value::Bytes(bytes) = value { bytes } else { &[] }
}

fn seconds(value: Option<&Value>) -> Duration {
    if let Some(Value::Float(seconds)) = value { Duration::from_secs_f64(*seconds) } else { Duration::ZERO }
}

fn count(n: usize) -> Value {
    Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
}

fn time(at: Instant) -> Value {
    Value::Time(OffsetDateTime::UNIX_EPOCH + at.since_the_beginning())
}

impl Store {
    fn topic(&mut self, name: &str) -> &mut Topic {
        self.topics.entry(name.to_owned()).or_default()
    }

    fn run(&mut self, name: &str, params: &mut Params, notifies: bool) -> Result<Vec<Row>, Error> {
        Ok(match name {
            "push" | "push_many" => {
                let topic = params.text();
                let (first, second) = (params.list(), params.list());
                let (payloads, ids) = if name == "push" { (first, second) } else { (second, first) };
                let delays = params.list();
                let sender = id(&params.0.nth(3).unwrap_or(Value::Null));
                let duplicates =
                    self.push(&[(topic, 0, ids.len())], &ids, &payloads, &delays, sender, notifies)?;
                let pushed = duplicates.is_empty();
                let one = vec![Row(vec![("pushed", ids[0].clone()), ("duplicate", Value::Bool(!pushed))])];
                if name == "push" { one } else { places(&duplicates) }
            }
            "push_topics" => {
                let slices = params.slices();
                let (ids, payloads, delays) = (params.list(), params.list(), params.list());
                let sender = id(&params.0.nth(3).unwrap_or(Value::Null));
                places(&self.push(&slices, &ids, &payloads, &delays, sender, notifies)?)
            }
            "pop" => {
                let (topic, max) = (params.text(), int(&params.next()));
                self.pop(&topic, max, 1)
            }
            "pop_topics" => {
                let (topics, asked) = (params.list(), params.list());
                self.pop_each(topics.into_iter().map(text), &asked)
            }
            "pop_any" => {
                let (topics, max) = (params.list(), int(&params.next()));
                self.pop_any(topics.into_iter().map(text), max)
            }
            "wait_for" => {
                let (topics, waiter) = (params.list(), id(&params.next()));
                let topics = topics.into_iter().map(text);
                topics.zip(1..).map(|(topic, place)| self.wait_for(&topic, waiter, place)).collect()
            }
            "settle_many" => {
                let topic = params.text();
                let proofs = params.proofs();
                self.settle(&[(topic, 0, proofs.ids.len())], &proofs)
            }
            "settle_topics" => {
                let slices = params.slices();
                self.settle(&slices, &params.proofs())
            }
            "turn" | "turn_topic" => {
                let (slices, proofs) = (params.slices(), params.proofs());
                let wanted = list(params.0.nth(2).unwrap_or(Value::Null));
                let mut rows = self.settle(&slices, &proofs);
                rows.extend(self.pop_each(slices.into_iter().map(|(topic, ..)| topic), &wanted));
                rows
            }
            "upkeep" => params.list().iter().map(|_| Row(vec![("upkeep", Value::Int(0))])).collect(),
            "purge" => vec![Row(vec![("purge", Value::Int(0))])],
            "upkeep_due" => Vec::new(),
            other => panic!("there is no call {other}"),
        })
    }

    /// Pushes all, or nothing. Returns the places of those that are stored already.
    fn push(
        &mut self,
        slices: &[(String, usize, usize)],
        ids: &[Value],
        payloads: &[Value],
        delays: &[Value],
        sender: Option<Uuid>,
        notifies: bool,
    ) -> Result<Vec<usize>, Error> {
        if payloads.iter().any(|payload| bytes(payload) == POISON) {
            return Err(Error(Some(DbError("22000"))));
        }
        let (now, mut duplicates) = (Instant::now(), Vec::new());
        for (name, first, last) in slices {
            let topic = self.topic(name);
            let before = topic.messages.len();
            for place in *first..*last {
                let Some(id) = id(&ids[place]) else { panic!("a message without an id") };
                if topic.messages.iter().any(|message| message.id == id) {
                    duplicates.push(place);
                    continue;
                }
                let payload = bytes(&payloads[place]).to_vec();
                let ready_at = now + seconds(delays.get(place));
                topic.messages.push(Stored { id, payload, ready_at, state: State::Ready });
            }
            let wanted = topic.wanted.is_some_and(|(until, by)| until > now && by != sender);
            if wanted && notifies && topic.messages.len() > before {
                self.ears.iter_mut().for_each(|ear| ear.push_back(name.clone()));
            }
        }
        Ok(duplicates)
    }

    fn pop_each(&mut self, topics: impl Iterator<Item = String>, asked: &[Value]) -> Vec<Row> {
        let mut rows = Vec::new();
        for ((topic, max), part) in topics.zip(asked).zip(1..).filter(|((_, max), _)| int(max) > 0) {
            if rows.iter().any(is_large) {
                rows.push(not_asked(part));
                break;
            }
            rows.extend(self.pop(&topic, int(max), part));
        }
        rows
    }

    fn pop_any(&mut self, topics: impl Iterator<Item = String>, max: usize) -> Vec<Row> {
        let mut rows = Vec::new();
        for (topic, part) in topics.zip(1..) {
            if rows.iter().any(is_large) {
                rows.push(not_asked(part));
                break;
            }
            rows.extend(self.pop(&topic, max - rows.len(), part));
            if rows.len() == max {
                break;
            }
        }
        rows
    }

    fn pop(&mut self, name: &str, max: usize, part: i64) -> Vec<Row> {
        let now = Instant::now();
        let mut delivery = self.deliveries;
        let topic = self.topics.entry(name.to_owned()).or_default();
        let mut ready: Vec<&mut Stored> = topic
            .messages
            .iter_mut()
            .filter(|message| message.state == State::Ready && message.ready_at <= now)
            .collect();
        ready.sort_by_key(|message| message.ready_at);
        // Nothing goes with a large one, and nothing comes behind it.
        let large = ready.iter().position(|message| message.payload == LARGE);
        let max = max.min(large.map_or(max, |first| first.max(1)));
        let rows = ready.into_iter().take(max).map(|message| {
            delivery += 1;
            message.state = State::Leased(delivery);
            Row(vec![
                ("id", Value::Id(message.id)),
                ("payload", Value::Bytes(message.payload.clone())),
                ("headers", Value::Null),
                ("token", Value::Bytes(delivery.to_be_bytes().to_vec())),
                ("lease_until", time(now + Duration::from_secs(3600))),
                ("attempt", Value::Int(1)),
                ("max_attempts", Value::Null),
                ("fence", Value::Int(1)),
                ("pushed_at", time(message.ready_at)),
                ("ready_at", time(message.ready_at)),
                ("failures", Value::Null),
                ("asked_at", time(now)),
                ("part", Value::Int(part)),
                ("place", Value::Null),
            ])
        });
        let rows = rows.collect();
        self.deliveries = delivery;
        rows
    }

    fn wait_for(&mut self, name: &str, waiter: Option<Uuid>, place: i64) -> Row {
        let now = Instant::now();
        let topic = self.topic(name);
        let others = topic.wanted.is_some_and(|(until, by)| until >= now && by != waiter);
        topic.wanted = Some((now + WANTED, if others { None } else { waiter }));
        let mut ready = false;
        let mut due = None;
        for message in topic.messages.iter().filter(|message| message.state == State::Ready) {
            ready |= message.ready_at <= now;
            if message.ready_at > now {
                due = Some(due.map_or(message.ready_at, |due: Instant| due.min(message.ready_at)));
            }
        }
        let due =
            due.map_or(Value::Null, |due| Value::Float(due.saturating_duration_since(now).as_secs_f64()));
        Row(vec![
            ("place", Value::Int(place)),
            ("ready", Value::Bool(ready)),
            ("due_in", due),
            ("noted", Value::Bool(true)),
        ])
    }

    /// What was not settled, and why.
    fn settle(&mut self, slices: &[(String, usize, usize)], proofs: &Proofs) -> Vec<Row> {
        let (now, mut rows) = (Instant::now(), Vec::new());
        for (name, first, last) in slices {
            for place in *first..*last {
                let messages = &mut self.topic(name).messages;
                let stored = messages.iter_mut().find(|message| Some(message.id) == id(&proofs.ids[place]));
                let token = <[u8; 8]>::try_from(bytes(&proofs.tokens[place])).map_or(0, u64::from_be_bytes);
                let result = match stored {
                    None => "gone",
                    Some(message) if message.state == State::Leased(token) => {
                        match &*text(proofs.words[place].clone()) {
                            "complete" => message.state = State::Completed(token),
                            "release" => message.state = State::Ready,
                            "defer" => {
                                message.state = State::Ready;
                                message.ready_at = now + seconds(proofs.delays.get(place));
                            }
                            word => panic!("there is no {word}"),
                        }
                        continue;
                    }
                    Some(message) if message.state == State::Completed(token) => continue,
                    Some(_) => "lost",
                };
                rows.push(Row(vec![
                    ("place", count(place + 1)),
                    ("result", Value::Text(result.into())),
                    ("lease_until", Value::Null),
                ]));
            }
        }
        rows
    }
}

fn is_large(row: &Row) -> bool {
    row.get::<_, Option<Vec<u8>>>("payload").is_some_and(|payload| payload == LARGE)
}

/// The first topic that was not asked.
fn not_asked(part: i64) -> Row {
    Row(vec![
        ("id", Value::Null),
        ("payload", Value::Null),
        ("part", Value::Int(part)),
        ("place", Value::Null),
    ])
}

/// The places of duplicates, from one on.
fn places(duplicates: &[usize]) -> Vec<Row> {
    duplicates.iter().map(|place| Row(vec![("place", count(place + 1))])).collect()
}
