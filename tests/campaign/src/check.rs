//! The checker: the properties of the contract, against all logs and the store.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use pushpop_pg::uuid::Uuid;

use crate::history::{Grant, History, Known, Place, Pushed, Settle, Verb};
use crate::journal::Outcome;
use crate::plan::{BOUNCE, EFFECTS};
use crate::store::{Granted, Store, Stored};

/// How many violations of a property are shown with their lines.
const SHOWN: usize = 3;

/// How many lines are shown for one.
const LINES: usize = 16;

/// What the check of a property came to.
#[derive(Debug)]
pub(crate) struct Property {
    pub(crate) name: &'static str,
    /// What it was checked on, and what it could not be checked on.
    pub(crate) checked: String,
    pub(crate) found: usize,
    shown: Vec<(String, Vec<Place>)>,
}

impl Property {
    fn new(name: &'static str) -> Self {
        Property { name, checked: String::new(), found: 0, shown: Vec::new() }
    }

    /// Says on how many deliveries it was not checked, because commits that they depend on may have been lost.
    fn except(&mut self, doubtful: usize) {
        if doubtful > 0 {
            let _ = write!(self.checked, "; nor on {doubtful} that the server may have forgotten");
        }
    }

    fn violated(&mut self, what: String, places: Vec<Place>) {
        self.found += 1;
        if self.shown.len() < SHOWN {
            self.shown.push((what, places));
        }
    }
}

/// How many messages a run has at most, and how long a pop may be under way at most, in microseconds.
const RUN: usize = 25;
const LONGEST_POP: i64 = 15_000_000;

/// The number of the property that is checked during a campaign, too.
pub(crate) const IN_REACH: usize = 10;

/// Checks all properties.
pub(crate) fn check(history: &History, store: &Store) -> Vec<Property> {
    vec![
        no_loss(history, store),
        no_phantom(history, store),
        one_live_lease(history, store),
        tokens(history, store),
        order(history, store),
        liveness(history),
        exactly_one_effect(history, store),
        pushed_once(history, store),
        served_again(history),
        in_reach(history),
    ]
}

/// The properties as text, each with what it was checked on, and violations with the lines that prove them.
pub(crate) fn render(properties: &[Property], history: &History) -> String {
    let mut text = String::new();
    for (number, property) in properties.iter().enumerate() {
        text += &render_one(number + 1, property, history);
    }
    text
}

/// A property with its number.
pub(crate) fn render_one(number: usize, property: &Property, history: &History) -> String {
    let mut text = String::new();
    let verdict = match property.found {
        0 => "holds".to_owned(),
        found => format!("VIOLATED {found} times"),
    };
    let _ = writeln!(text, "{number} {}: {verdict}; {}", property.name, property.checked);
    for (what, places) in &property.shown {
        let _ = writeln!(text, "    {what}");
        for place in places.iter().take(LINES) {
            let _ = writeln!(text, "        {}", history.line(*place));
        }
        if places.len() > LINES {
            let _ = writeln!(text, "        and {} more", places.len() - LINES);
        }
    }
    text
}

/// Every acknowledged push is settled after its work was done, or dead of its attempts, once all is drained.
fn no_loss(history: &History, store: &Store) -> Property {
    let mut property = Property::new("no loss");
    let (mut answered, mut unanswered, mut completed, mut discarded, mut dead) = (0, 0, 0, 0, 0);
    let mut lost = 0;
    for (id, known) in &history.known {
        let Some(push) = &known.push else { continue };
        let stored = store.messages.get(id);
        if push.answered.is_some() {
            answered += 1;
        } else {
            unanswered += u64::from(stored.is_some());
        }
        match stored {
            None if push.answered.is_some_and(|at| history.may_be_lost(at, at)) => lost += 1,
            None if push.answered.is_some() => {
                property.violated(format!("{id} was acknowledged, and is not stored"), known.places());
            }
            None => {}
            Some(stored) if stored.is_settled() => {
                if stored.state == 'c' {
                    completed += 1
                } else {
                    discarded += 1
                }
                if !was_worked(known, stored.fence) {
                    let what = format!("{id} was settled before its work was done");
                    property.violated(what, known.places());
                }
            }
            Some(stored) if stored.is_dead() => {
                dead += 1;
                if stored.max_attempts.is_none_or(|most| stored.attempt < i32::from(most)) {
                    property.violated(format!("{id} is dead with attempts left"), known.places());
                }
            }
            Some(stored) => {
                let what = format!("{id} is stored as {:?}, and nobody gets it", stored.state);
                property.violated(what, known.places());
            }
        }
    }
    property.checked = format!(
        "{answered} acknowledged pushes and {unanswered} others that were stored: {completed} completed, \
         {discarded} discarded, {dead} dead"
    );
    if !history.windows.is_empty() {
        let _ = write!(
            property.checked,
            ", {lost} lost; by a standby that took over {} times, and had not got all of the last {} ms in all",
            history.windows.len(),
            history.windows.iter().map(|(from, to)| (to - from) / 1000).sum::<i64>()
        );
    }
    property
}

/// Whether the work of a delivery was done before its process asked for the end of the message.
fn was_worked(known: &Known, fence: i64) -> bool {
    let settles = known.settles.iter().filter(|s| s.fence == fence && s.verb.is_final());
    let Some((file, line)) = settles.map(|s| s.place).min() else { return false };
    known.works.iter().any(|(f, work)| *f == fence && work.0 == file && work.1 <= line)
}

/// What was popped, and what is stored, was pushed, with this payload.
fn no_phantom(history: &History, store: &Store) -> Property {
    let mut property = Property::new("no phantom");
    let mut deliveries = 0;
    for (id, known) in &history.known {
        for grant in &known.grants {
            deliveries += 1;
            match &known.push {
                None => property.violated(format!("{id} was never pushed"), vec![grant.place]),
                Some(push) if push.hash != grant.hash => {
                    let what = format!("{id} was delivered with another payload");
                    property.violated(what, vec![push.place, grant.place]);
                }
                Some(_) => {}
            }
        }
    }
    for (id, stored) in &store.messages {
        match history.known.get(id).and_then(|known| known.push.as_ref()) {
            None => property.violated(format!("{id} is stored, and was never pushed"), Vec::new()),
            Some(push) if push.hash != stored.hash => {
                property.violated(format!("{id} is stored with another payload"), vec![push.place]);
            }
            Some(_) => {}
        }
    }
    property.checked = format!("{deliveries} deliveries, {} stored messages", store.messages.len());
    property
}

/// No delivery of a message before the last one's deadline, unless that was settled.
fn one_live_lease(history: &History, store: &Store) -> Property {
    let mut property = Property::new("one live lease");
    let (mut checked, mut followed, mut unseen, mut doubtful) = (0, 0, 0, 0);
    for (id, known) in &history.known {
        if history.is_doubtful(known) {
            doubtful += known.grants.len();
            continue;
        }
        let deliveries = Deliveries::of(known, store.grants.get(id).map_or(&[][..], Vec::as_slice));
        for (fence, delivery) in &deliveries.0 {
            if delivery.seen.is_empty() {
                unseen += delivery.granted.len();
            }
            if let [_, _, ..] = delivery.seen[..] {
                let what = format!("delivery {fence} of {id} was handed out twice");
                property.violated(what, delivery.seen.iter().map(|grant| grant.place).collect());
            }
            if delivery.granted.len() > 1 {
                let what = format!("delivery {fence} of {id} was granted twice");
                property.violated(what, known.places());
            }
            for grant in &delivery.seen {
                checked += 1;
                let Some((at, place)) = deliveries.next(*fence) else { continue };
                followed += 1;
                // The clock of the server may not be that of its clients.
                let before = |s: &Settle| s.wall <= at || history.steps > 0;
                let ended = delivery.settles.iter().any(|s| s.may_have_ended() && before(s));
                if at < grant.deadline && !ended {
                    let what = format!(
                        "{id} was handed out again {} ms before the deadline of delivery {fence}",
                        (grant.deadline - at) / 1000
                    );
                    property.violated(what, [Some(grant.place), place].into_iter().flatten().collect());
                }
            }
        }
    }
    property.checked = format!(
        "{checked} deliveries that a client knows of, {followed} of them followed by another; not on {unseen} \
         whose client died or had gone before it could write"
    );
    property.except(doubtful);
    property
}

/// The deliveries of a message by their numbers: one that bounces has thousands.
struct Deliveries<'a>(BTreeMap<i64, Delivery<'a>>);

/// What clients saw of a delivery, when the server granted it, and how it was settled.
#[derive(Default)]
struct Delivery<'a> {
    seen: Vec<&'a Grant>,
    granted: Vec<Granted>,
    settles: Vec<&'a Settle>,
}

impl<'a> Deliveries<'a> {
    fn of(known: &'a Known, granted: &[Granted]) -> Deliveries<'a> {
        let mut deliveries: BTreeMap<i64, Delivery<'a>> = BTreeMap::new();
        for grant in &known.grants {
            deliveries.entry(grant.fence).or_default().seen.push(grant);
        }
        for grant in granted {
            deliveries.entry(grant.fence).or_default().granted.push(*grant);
        }
        for settle in &known.settles {
            deliveries.entry(settle.fence).or_default().settles.push(settle);
        }
        Deliveries(deliveries)
    }

    /// The delivery that followed another: by the server's clock where it is known, else when the client had it.
    fn next(&self, fence: i64) -> Option<(i64, Option<Place>)> {
        let later = || self.0.range(fence + 1..);
        let seen = later().find_map(|(fence, d)| Some((fence, *d.seen.first()?)));
        let granted = later().find_map(|(fence, d)| Some((fence, d.granted.first()?)));
        match (granted, seen) {
            (Some((at, granted)), Some((fence, seen))) if fence == at => Some((granted.at, Some(seen.place))),
            (Some((_, granted)), _) => Some((granted.at, None)),
            (None, Some((_, seen))) => Some((seen.wall, Some(seen.place))),
            (None, None) => None,
        }
    }

    fn settles(&self, fence: i64) -> &[&'a Settle] {
        self.0.get(&fence).map_or(&[], |delivery| &delivery.settles)
    }
}

/// Only the newest delivery's settle takes effect, at most once; no token is given twice.
fn tokens(history: &History, store: &Store) -> Property {
    let mut property = Property::new("tokens");
    let (mut settles, mut stale, mut lost, mut doubtful) = (0, 0, 0, 0);
    for (id, known) in &history.known {
        if history.is_doubtful(known) {
            doubtful += known.settles.len();
            continue;
        }
        let stored = store.messages.get(id);
        // By the clients' clock where that of the server was stepped.
        let granted = store.grants.get(id).filter(|_| history.steps == 0).map_or(&[][..], Vec::as_slice);
        let deliveries = Deliveries::of(known, granted);
        for settle in &known.settles {
            settles += 1;
            lost += usize::from(settle.outcome == Outcome::Lost);
            let late = deliveries.next(settle.fence).is_some_and(|(at, _)| at < settle.wall);
            stale += usize::from(late);
            if settle.outcome != Outcome::Ok {
                continue;
            }
            if let Some(what) = wrongly_accepted(&deliveries, stored, settle, late) {
                property.violated(format!("{id}: {what}"), known.places());
            }
        }
        if let Some(stored) = stored.filter(|stored| stored.is_settled()) {
            let verb = if stored.state == 'c' { Verb::Complete } else { Verb::Discard };
            if !known.settles.iter().any(|s| s.fence == stored.fence && s.verb == verb) {
                let what = format!("{id} was settled by delivery {}, which nobody asked for", stored.fence);
                property.violated(what, known.places());
            }
        }
    }
    let again = history.granted.iter().filter(|(key, at)| store.keys.get(*key).is_some_and(|now| now != *at));
    let repeated = store.repeated_tokens + again.count() as u64;
    if repeated > 0 {
        property.violated(format!("{repeated} keys of tokens were given twice"), Vec::new());
    }
    property.checked = format!(
        "{settles} settles; {stale} of them stale when tried, {lost} told that the lease was lost; {} keys of tokens",
        store.tokens
    );
    if !history.granted.is_empty() {
        let gone = history.granted.keys().filter(|key| !store.keys.contains_key(*key)).count();
        let _ = write!(property.checked, ", and {gone} that were lost");
    }
    property.except(doubtful);
    property
}

/// Why a settle that was answered with ok should not have been.
fn wrongly_accepted(
    deliveries: &Deliveries<'_>,
    stored: Option<&Stored>,
    settle: &Settle,
    late: bool,
) -> Option<String> {
    let fence = settle.fence;
    if settle.verb.is_final() {
        let state = if settle.verb == Verb::Complete { 'c' } else { 'x' };
        if deliveries.next(fence).is_some() {
            return Some(format!("delivery {fence} was settled, and another followed"));
        }
        if let Some(stored) = stored.filter(|stored| stored.fence != fence || stored.state != state) {
            let (state, over) = (stored.state, stored.fence);
            return Some(format!(
                "delivery {fence} was settled, but the message is {state:?} after {over} deliveries"
            ));
        }
    }
    let same = deliveries.settles(fence);
    let before = |s: &Settle| s.verb == settle.verb && s.wall < settle.wall && s.may_have_ended();
    if late && !same.iter().any(|s| before(s)) {
        return Some(format!("delivery {fence} was settled after it was handed on"));
    }
    let other = |s: &Settle| s.outcome == Outcome::Ok && s.verb != settle.verb && s.verb != Verb::Extend;
    (settle.verb != Verb::Extend && same.iter().any(|s| other(s)))
        .then(|| format!("delivery {fence} was settled in two ways"))
}

/// One consumer sees strict push order: a message that it gets for the first time was pushed after all such before.
fn order(history: &History, store: &Store) -> Property {
    let mut property = Property::new("order");
    if history.steps > 0 {
        property.checked = "not checked: the clock was stepped".into();
        return property;
    }
    let given_up = given_up(history, store);
    let (mut checked, mut again, mut held, mut doubtful) = (0, 0, 0, 0);
    let mut last: Option<(usize, Place, i64)> = None;
    for (id, fence, place) in &history.got_in_order {
        let Some(position) = history.pushed_in_order.get(id).copied() else { continue };
        let Some(known) = history.known.get(id) else { continue };
        if history.is_doubtful(known) {
            doubtful += 1;
            continue;
        }
        if *fence > 1 {
            again += 1;
            continue;
        }
        checked += 1;
        if let Some((before, at, got)) = last.filter(|(before, ..)| *before >= position) {
            let holds = |(front, since): &(usize, i64)| {
                (*front..front + RUN).contains(&position) && (*since..since + LONGEST_POP).contains(&got)
            };
            if given_up.iter().any(holds) {
                held += 1;
                continue;
            }
            let what = format!("{id}, pushed as number {position}, came after number {before}");
            property.violated(what, vec![at, *place]);
        }
        let got = known.grants.iter().find(|grant| grant.place == *place).map_or(0, |grant| grant.wall);
        last = Some((position, *place, got));
    }
    property.checked = format!(
        "{checked} first deliveries of {} messages, {held} of them behind what a pop that was given up still held; \
         not on {again} whose first delivery was lost with its answer",
        history.pushed_in_order.len()
    );
    property.except(doubtful);
    property
}

/// First deliveries that nobody knows of, by their places in the order, and when they were granted. A pop that was
/// given up may still be under way; until it has committed it holds the run of which it took the front, and the next
/// pop of the same consumer takes what comes after that.
fn given_up(history: &History, store: &Store) -> Vec<(usize, i64)> {
    let mut given_up = Vec::new();
    for (id, position) in &history.pushed_in_order {
        let known = history.known.get(id).map_or(&[][..], |known| &known.grants);
        let granted = store.grants.get(id).into_iter().flatten().filter(|granted| granted.fence == 1);
        let unseen = granted.filter(|granted| known.iter().all(|grant| grant.fence != granted.fence));
        given_up.extend(unseen.map(|granted| (*position, granted.at)));
    }
    given_up
}

/// When faults stop, the backlog reaches zero in time.
fn liveness(history: &History) -> Property {
    let mut property = Property::new("liveness");
    let Some((calm, bound)) = history.calm else {
        property.violated("the faults have not ended".into(), Vec::new());
        return property;
    };
    let seconds = |micros: i64| format!("{}.{} s", micros / 1_000_000, micros / 100_000 % 10);
    match history.drained {
        Some(drained) => {
            property.checked = format!("drained after {} of {}", seconds(drained - calm), seconds(bound));
            if drained - calm > bound {
                property.violated("the backlog took too long".into(), Vec::new());
            }
        }
        None => {
            property.checked = format!("not drained within {}", seconds(bound));
            property.violated("the backlog did not reach zero".into(), Vec::new());
        }
    }
    property
}

/// A completed message of the topic `effects` has one effect, and no other has any.
fn exactly_one_effect(history: &History, store: &Store) -> Property {
    let mut property = Property::new("exactly one effect");
    let mut checked = 0;
    for (id, known) in &history.known {
        if known.push.as_ref().is_none_or(|push| &*push.topic != EFFECTS) {
            continue;
        }
        let Some(stored) = store.messages.get(id) else { continue };
        checked += 1;
        let (is, should) =
            (store.effects.get(id).copied().unwrap_or_default(), u64::from(stored.state == 'c'));
        if is != should {
            property.violated(format!("{id} has {is} effects instead of {should}"), known.places());
        }
    }
    for id in store.effects.keys().filter(|id| !history.known.contains_key(id)) {
        property.violated(format!("{id} has an effect, and was never pushed"), Vec::new());
    }
    property.checked = format!("{checked} messages, {} effects", store.effects.values().sum::<u64>());
    property
}

/// What a producer pushed under one name, until it was answered, is one message.
fn pushed_once(history: &History, store: &Store) -> Property {
    let mut property = Property::new("pushed once");
    let mut names: HashMap<&str, Vec<Uuid>> = HashMap::new();
    for (id, stored) in &store.messages {
        names.entry(&stored.name).or_default().push(*id);
    }
    for (name, ids) in &names {
        if ids.len() > 1 {
            let known = ids.iter().filter_map(|id| history.known.get(id)?.push.as_ref());
            let places = known.map(|push| push.place).collect();
            property.violated(format!("{name} is stored {} times", ids.len()), places);
        }
    }
    let pushes = || history.known.values().filter_map(|known| known.push.as_ref());
    let repeated = pushes().filter(|push| push.calls > 1).count();
    let is_kept = |push: &&Pushed| push.answered.is_some_and(|at| !history.may_be_lost(at, at));
    for push in pushes().filter(is_kept).filter(|push| !names.contains_key(&*push.name)) {
        property.violated(format!("{} was acknowledged, and is not stored", push.name), vec![push.place]);
    }
    property.checked = format!("{} messages, {repeated} of them pushed more than once", names.len());
    property
}

/// When a fault has ended, every client that is there is served again in time, and nobody helps it.
fn served_again(history: &History) -> Property {
    let mut property = Property::new("served again");
    let (mut checked, mut slowest) = (0, 0);
    for (mended, within, place) in &history.mended {
        let until = mended + within;
        for client in history.clients.values() {
            if client.begun > *mended || client.ended.is_some_and(|ended| ended <= until) {
                continue;
            }
            checked += 1;
            let served = client.alive.iter().copied().find(|at| at > mended);
            slowest = slowest.max(served.map_or(*within, |served| served - mended));
            if served.is_none_or(|served| served > until) {
                let after =
                    served.map_or("never".to_owned(), |at| format!("after {} ms", (at - mended) / 1000));
                property.violated(format!("a client was served again {after}"), vec![*place, client.place]);
            }
        }
    }
    property.checked = match history.mended.len() {
        0 => "no fault that ends at a certain time".into(),
        ends => format!(
            "{ends} ends of faults, {checked} times a client, the slowest after {} ms",
            slowest / 1000
        ),
    };
    property
}

/// At any moment each message has exactly one place in the tables, and a pop would find it there; and one that does nothing
/// but bounce is seen all the time.
pub(crate) fn in_reach(history: &History) -> Property {
    let mut property = Property::new("in reach");
    let longest = history.audits.iter().map(|(_, took)| took).max().copied().unwrap_or_default();
    property.checked = format!("{} audits, the longest of {} ms", history.audits.len(), longest / 1000);
    for (place, rows) in &history.broken {
        let places = (0..=*rows).map(|row| (place.0, place.1 + row)).collect();
        property.violated("a rule of the tables was broken".into(), places);
    }
    if history.is_audited && history.audits.is_empty() && history.broken.is_empty() {
        property.violated("no audit has come to its end".into(), Vec::new());
    }
    let Some(within) = history.reach else { return property };
    if history.steps > 0 {
        property.checked += "; the clock was stepped, and messages may wait for it";
        return property;
    }
    let (mut messages, mut deliveries, mut slowest) = (0, 0, 0);
    for (id, known) in &history.known {
        if known.push.as_ref().is_none_or(|push| &*push.topic != BOUNCE) {
            continue;
        }
        messages += 1;
        deliveries += known.grants.len();
        let mut seen: Vec<(i64, Place)> =
            known.grants.iter().map(|grant| (grant.wall, grant.place)).collect();
        seen.extend(
            known.settles.iter().map(|settle| (settle.answered.unwrap_or(settle.wall), settle.place)),
        );
        seen.extend(known.push.iter().filter_map(|push| Some((push.answered?, push.place))));
        seen.sort_unstable();
        for pair in seen.windows(2) {
            let gap = pair[1].0 - pair[0].0;
            slowest = slowest.max(gap);
            if gap > within {
                let what = format!("{id} was out of reach for {} ms", gap / 1000);
                property.violated(what, pair.iter().map(|(_, place)| *place).collect());
            }
        }
    }
    let _ = write!(
        property.checked,
        "; {messages} messages bounced {deliveries} times, none out of sight for more than {} ms of {}",
        slowest / 1000,
        within / 1000
    );
    property
}

impl Known {
    /// Where it is spoken of.
    fn places(&self) -> Vec<Place> {
        let pushed = self.push.iter().map(|push| push.place);
        let others = self.grants.iter().map(|g: &Grant| g.place);
        let others = others.chain(self.works.iter().map(|(_, place)| *place));
        let mut others: Vec<Place> = others.chain(self.settles.iter().map(|s| s.place)).collect();
        others.sort_unstable();
        others.dedup();
        pushed.chain(others).collect()
    }
}
