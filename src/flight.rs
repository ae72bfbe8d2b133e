//! What a connection thread does with the requests of a flight: one statement for all of them, and
//! to each its own answer.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::types::ToSql;
use uuid::Uuid;

use crate::calls::{Grant, Settle, Verdict, headers_json};
use crate::crew::Outcome;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::lane::{Cargo, Job, Kind, Lane, Part, PopJob, Pops, PushJob, SettleJob, TurnJob, Turns, asked};
use crate::limits;
use crate::link::{Call, Link};
use crate::message::{Attempts, Due, NewMessage};
use crate::observer::{Event, LeaseLost, Pushed, Settled};
use crate::slot::{FlightId, lock};

/// When it is worth looking again for those whose part of a flight was short, or of whom the server does not know yet.
const SOON: Duration = Duration::from_millis(20);

/// How many characters of the reasons of failures are replaced one by one, a round trip each.
const REPLACED: usize = 8;

pub(crate) struct Flight<'a, 'p> {
    pub(crate) engine: &'a Arc<Engine>,
    pub(crate) link: &'a mut Link,
    pub(crate) id: FlightId,
    pub(crate) deadline: Instant,
    /// To be told once it has landed.
    pub(crate) events: &'a mut Vec<Event<'p>>,
}

/// How many topics a look asks in one statement.
const TOGETHER: usize = 5_000;

/// No pops: those of turns look for one topic each.
static NOBODY: Pops = Pops { jobs: Vec::new(), lease: None, poll: false, any: None };

/// Pops that are aboard, and what comes of them.
struct Aboard<'a> {
    topic: &'a str,
    pops: &'a Pops,
    outcome: &'a mut Outcome,
}

impl Aboard<'_> {
    fn fail(&mut self, error: &Error) {
        let topic = match &self.pops.any {
            None => Some(self.topic),
            Some(any) => any.group.topics.iter().map(|topic| &**topic).find(|topic| error.is_about(topic)),
        };
        let error = match topic {
            Some(topic) => error.clone().blame(topic, std::iter::empty()),
            None => error.clone(),
        };
        *self.outcome = Outcome::failed(error.during("pop", topic));
    }
}

impl Pops {
    /// In seconds.
    fn lease(&self) -> Option<f64> {
        self.lease.map(|lease| lease.as_secs_f64())
    }
}

/// Requests for one topic.
#[derive(Clone, Copy)]
struct Group<'a, J> {
    topic: &'a str,
    jobs: &'a [J],
}

impl<'p> Flight<'_, 'p> {
    /// Carries out all parts, which are of one kind, in one statement; an outcome for each of them.
    pub(crate) fn carry(mut self, parts: &'p [Part]) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = parts.iter().map(|_| Outcome::default()).collect();
        let (mut pushes, mut settles, mut turns, mut pops) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for Part { topic, cargo } in parts {
            match cargo {
                Cargo::Push(jobs) => pushes.push(Group { topic, jobs }),
                Cargo::Settle(jobs) => settles.push(Group { topic, jobs }),
                Cargo::Turn(jobs) => turns.push((&**topic, jobs)),
                Cargo::Pop(jobs) => pops.push((&**topic, jobs)),
            }
        }
        match parts.first().map(|part| part.cargo.kind()) {
            Some(Kind::Push) => self.push(&pushes, &mut outcomes),
            Some(Kind::Settle) => self.settle(&settles, &mut outcomes),
            Some(Kind::Turn) => self.turn(&turns, &mut outcomes),
            Some(Kind::Pop) => self.pop(&pops, &mut outcomes),
            None => {}
        }
        outcomes
    }

    // Push.

    fn push(&mut self, groups: &[Group<'p, PushJob>], outcomes: &mut [Outcome]) {
        let answers = self.share(groups, Self::push_together, outcomes);
        for ((Group { topic, jobs }, answers), outcome) in groups.iter().zip(answers).zip(outcomes) {
            for (job, answer) in jobs.iter().zip(answers) {
                if let Ok(duplicates) = &answer {
                    outcome.rows += job.messages.len();
                    let first = job.messages.iter().map(|m| m.due.wait()).min();
                    outcome.pushed = outcome.pushed.min(first).or(first).or(outcome.pushed);
                    self.events.push(Event::Pushed(Pushed {
                        topic,
                        count: job.messages.len(),
                        duplicates: duplicates.iter().filter(|d| **d).count(),
                    }));
                }
                let headers = || job.messages.iter().flat_map(|message| &message.headers);
                drop(job.slot.land(self.id, answer.map_err(|e| e.blame(topic, headers()))));
            }
        }
    }

    fn push_together(&mut self, groups: &[Group<'_, PushJob>]) -> Result<Vec<Vec<bool>>> {
        let jobs = || groups.iter().flat_map(|group| group.jobs);
        let messages: Vec<&NewMessage> = jobs().flat_map(|job| &job.messages).collect();
        let fallback = self.engine.settings.max_attempts;
        let sender = Some(self.engine.client);
        let mut duplicates = vec![false; messages.len()];
        match groups {
            [Group { topic, .. }] if messages.len() == 1 => {
                let message = messages[0];
                let (delay, ready_at) = message.due();
                let rows = self.run(
                    |calls| &calls.push,
                    &[
                        topic,
                        &message.payload,
                        &message.id,
                        &delay,
                        &ready_at,
                        &headers_json(&message.headers),
                        &message.max_attempts.wanted(),
                        &sender,
                        &fallback,
                    ],
                )?;
                duplicates[0] = rows.first().map_or(Ok(false), |row| row.try_get(1))?;
            }
            [Group { topic, .. }] => {
                let batch = Batch::new(&messages);
                for row in self.run(|calls| &calls.push_many, &batch.params(topic, &sender, &fallback))? {
                    put(&mut duplicates, row.try_get(0)?, true);
                }
            }
            _ => {
                let (slices, batch) = (Slices::new(groups), Batch::new(&messages));
                let params = [&slices.params()[..], &batch.params(&"", &sender, &fallback)[1..]].concat();
                for row in self.run(|calls| &calls.push_topics, &params)? {
                    put(&mut duplicates, row.try_get(0)?, true);
                }
            }
        }
        Ok(split(jobs(), duplicates))
    }

    // Settle.

    fn settle(&mut self, groups: &[Group<'p, SettleJob>], outcomes: &mut [Outcome]) {
        let answers = self.share(groups, Self::settle_together, outcomes);
        for ((Group { topic, jobs }, answers), outcome) in groups.iter().zip(answers).zip(outcomes) {
            for (job, answer) in jobs.iter().zip(answers) {
                self.answer_settle(topic, job, answer, outcome);
            }
        }
    }

    fn answer_settle(
        &mut self,
        topic: &'p str,
        job: &SettleJob,
        answer: Result<Vec<Verdict>>,
        outcome: &mut Outcome,
    ) {
        if let Ok(verdicts) = &answer {
            for (settle, verdict) in job.settles.iter().zip(verdicts) {
                self.tell_settled(topic, settle, *verdict);
                outcome.rows += 1;
                if let (Verdict::Settled, Some(wait)) = (verdict, settle.verb.comes_back_in()) {
                    outcome.pushed = Some(outcome.pushed.map_or(wait, |first| first.min(wait)));
                }
            }
        }
        drop(job.slot.land(self.id, answer));
    }

    fn settle_together(&mut self, groups: &[Group<'_, SettleJob>]) -> Result<Vec<Vec<Verdict>>> {
        let jobs = || groups.iter().flat_map(|group| group.jobs);
        let settles: Vec<&Settle> = jobs().flat_map(|job| &job.settles).collect();
        let mut proofs = Proofs::new(&settles);
        let keep = self.engine.settings.keep_settled.as_secs_f64();
        let rows = if let [Group { topic, jobs }] = groups {
            loop {
                let params = [&[topic as &(dyn ToSql + Sync)][..], &proofs.params(&keep)[..]].concat();
                match self.run(|calls| &calls.settle_many, &params) {
                    // Each by itself first, so that the words of others stay as they are.
                    Err(e) if jobs.len() == 1 && proofs.replace(&e) => {}
                    other => break other?,
                }
            }
        } else {
            let slices = Slices::new(groups);
            let params = [&slices.params()[..], &proofs.params(&keep)[..]].concat();
            self.run(|calls| &calls.settle_topics, &params)?
        };
        let mut verdicts = vec![Verdict::Settled; settles.len()];
        for row in rows {
            put(&mut verdicts, row.try_get(0)?, Verdict::read(row.try_get(1)?, row.try_get(2)?));
        }
        Ok(split(jobs(), verdicts))
    }

    fn tell_settled(&mut self, topic: &'p str, settle: &Settle, verdict: Verdict) {
        let (id, outcome) = (settle.id, settle.verb.word());
        self.events.push(match verdict {
            Verdict::Settled | Verdict::Extended(_) => Event::Settled(Settled { topic, id, outcome }),
            Verdict::Lost | Verdict::Gone => Event::LeaseLost(LeaseLost { topic, id, outcome }),
        });
    }

    // Pop.

    fn pop(&mut self, parts: &[(&str, &Pops)], outcomes: &mut [Outcome]) {
        let aboard =
            parts.iter().zip(outcomes).map(|((topic, pops), outcome)| Aboard { topic, pops, outcome });
        self.pop_all(aboard.collect());
    }

    fn pop_all(&mut self, mut aboard: Vec<Aboard<'_>>) {
        if aboard.first().is_some_and(|part| part.pops.poll) {
            match self.look(&mut aboard) {
                Ok(ready) => {
                    let mut ready = ready.into_iter();
                    aboard.retain(|_| ready.next() == Some(true));
                }
                // The reason may lie in one of them: no error reaches a neighbour.
                Err(e) if aboard.len() > 1 && !e.is_of_all() => {
                    return aboard.into_iter().for_each(|part| self.pop_all(vec![part]));
                }
                Err(e) => return aboard.into_iter().for_each(|mut part| part.fail(&e)),
            }
        }
        let (groups, mut topics): (Vec<_>, Vec<_>) =
            aboard.into_iter().partition(|part| part.pops.any.is_some());
        for part in groups {
            self.pop_any(part);
        }
        self.pop_each(&mut topics);
    }

    /// Pops from one topic each.
    fn pop_each(&mut self, aboard: &mut [Aboard<'_>]) {
        if aboard.is_empty() {
            return;
        }
        match self.pop_together(aboard) {
            Ok(grants) => {
                let mut short = Vec::new();
                for (part, grants) in aboard.iter_mut().zip(grants) {
                    let jobs = part.pops.jobs.iter();
                    if self.hand_out(jobs, grants, part.outcome) {
                        short.push(Aboard { topic: part.topic, pops: part.pops, outcome: part.outcome });
                    }
                }
                self.look_for_the_rest(short);
            }
            Err(e) if aboard.len() > 1 && !e.is_of_all() => {
                for part in aboard.chunks_mut(1) {
                    self.pop_each(part);
                }
            }
            Err(e) => aboard.iter_mut().for_each(|part| part.fail(&e)),
        }
    }

    /// As many messages as are asked for, in their order, for each part; `None` for those that were not asked,
    /// because the others had so many bytes.
    fn pop_together(&mut self, parts: &[Aboard<'_>]) -> Result<Vec<Option<Vec<Grant>>>> {
        let asked: Vec<i32> = parts.iter().map(|part| asked(part.pops.jobs.iter())).collect();
        let leases: Vec<Option<f64>> = parts.iter().map(|part| part.pops.lease()).collect();
        let fallback = self.engine.settings.lease.as_secs_f64();
        let sent = Instant::now();
        if let ([part], true) = (parts, asked[0] > 0) {
            let topic = part.topic;
            let rows = self.run(|calls| &calls.pop, &[&topic, &asked[0], &leases[0], &fallback])?;
            let grants = rows.iter().map(|row| Grant::read(topic, row, sent)).collect::<Result<_, _>>()?;
            return Ok(vec![Some(grants)]);
        }
        let topics: Vec<&str> = parts.iter().map(|part| part.topic).collect();
        let rows = self.run(|calls| &calls.pop_topics, &[&topics, &asked, &leases, &fallback])?;
        read_parts(&topics, rows, sent)
    }

    /// Pops from whichever of several topics has something.
    fn pop_any(&mut self, mut part: Aboard<'_>) {
        let Some(any) = &part.pops.any else { return };
        let order = any.order();
        let topics: Vec<&str> = order.iter().map(|place| &*any.group.topics[*place]).collect();
        let wanted = asked(part.pops.jobs.iter());
        if wanted == 0 {
            return;
        }
        let fallback = self.engine.settings.lease.as_secs_f64();
        let sent = Instant::now();
        let rows = self.run(|calls| &calls.pop_any, &[&topics, &wanted, &part.pops.lease(), &fallback]);
        let grants = match rows.and_then(|rows| read_parts(&topics, rows, sent)) {
            Ok(grants) => grants,
            Err(e) => return part.fail(&e),
        };
        let had = |grants: &Option<Vec<Grant>>| grants.as_ref().is_none_or(|grants| !grants.is_empty());
        if let Some(last) = grants.iter().rposition(had).filter(|_| any.hot.is_empty()) {
            part.outcome.first = order.get((last + 1) % order.len()).copied();
        }
        let rows = |(place, grants): (&usize, &Option<Vec<Grant>>)| {
            let rows = grants.as_ref().map_or(0, Vec::len);
            (rows > 0).then(|| (Arc::clone(&any.group.topics[*place]), rows))
        };
        part.outcome.of = order.iter().zip(&grants).filter_map(rows).collect();
        let cut = grants.iter().any(Option::is_none);
        let grants = grants.into_iter().flatten().flatten().collect();
        if self.hand_out(part.pops.jobs.iter(), Some(grants), part.outcome) {
            part.outcome.again |= cut;
            part.outcome.calm = any.calm;
            self.look_for_the_rest(vec![part]);
        }
    }

    /// Hands out what there is, in the order of the requests. Returns whether some of them go on waiting.
    fn hand_out<'j>(
        &mut self,
        jobs: impl Iterator<Item = &'j PopJob>,
        grants: Option<Vec<Grant>>,
        outcome: &mut Outcome,
    ) -> bool {
        let Some(grants) = grants else {
            outcome.again = true;
            return true;
        };
        if outcome.of.is_empty() {
            outcome.rows = grants.len();
        }
        let came = !grants.is_empty();
        let bytes: usize = grants.iter().map(|grant| grant.message.payload.len()).sum();
        let mut grants = grants.into_iter();
        let mut short = false;
        for job in jobs {
            let share: Vec<Grant> = grants.by_ref().take(job.max).collect();
            if share.is_empty() {
                // What came may have been all that a flight carries.
                if job.waits {
                    short = true;
                    outcome.again |= bytes >= limits::FLIGHT_BYTES / 2;
                } else if came {
                    short = true;
                    outcome.again = true;
                } else {
                    drop(job.slot.land(self.id, Ok(share)));
                }
                continue;
            }
            let (topic, count) = (share[0].message.topic.clone(), share.len());
            match job.slot.land(self.id, Ok(share)) {
                Ok(()) => self.events.push(Event::Popped { topic, count }),
                Err(unwanted) => self.events.extend(self.engine.abandon(unwanted.unwrap_or_default())),
            }
        }
        // One that was called off since may have been counted.
        self.events.extend(self.engine.abandon(grants.collect()));
        short
    }

    /// Sees to it that there is another look for those who go on waiting: a little later if there was something, or a
    /// push is next, and others notify us.
    fn look_for_the_rest(&mut self, short: Vec<Aboard<'_>>) {
        let mut unknown = Vec::new();
        {
            let state = lock(&self.engine.state);
            for part in short {
                let lane = state.lanes.get(part.topic);
                let registered = lane.is_some_and(Lane::is_registered);
                let busy = part.outcome.rows > 0 || lane.is_some_and(|lane| !lane.pushes.is_empty());
                if part.outcome.again {
                    continue;
                }
                // To look at the few topics of which we heard costs little.
                if registered && busy && !part.outcome.calm {
                    part.outcome.look_in = Some(SOON);
                } else {
                    unknown.push(part);
                }
            }
        }
        match self.look(&mut unknown) {
            Ok(ready) => {
                for (part, ready) in unknown.iter_mut().zip(ready) {
                    if ready {
                        part.outcome.look_in = Some(Duration::ZERO);
                    }
                }
            }
            // The next look, each by its own, tells them what is wrong.
            Err(_) => {
                for part in unknown {
                    part.outcome.registered = false;
                    part.outcome.look_in = Some(SOON);
                }
            }
        }
    }

    // Turn.

    fn turn(&mut self, parts: &[(&'p str, &'p Turns)], outcomes: &mut [Outcome]) {
        let error = match self.turn_together(parts) {
            Ok((verdicts, grants)) => {
                let mut verdicts = verdicts.into_iter();
                let mut short = Vec::new();
                for (((topic, turns), grants), outcome) in parts.iter().zip(grants).zip(outcomes) {
                    // Its thread waits for the settle first: so it is woken once for both.
                    let is_short = self.hand_out(turns.pops(), grants, outcome);
                    for (TurnJob { settle, .. }, verdicts) in turns.jobs.iter().zip(verdicts.by_ref()) {
                        self.answer_settle(topic, settle, Ok(verdicts), outcome);
                    }
                    if is_short {
                        short.push(Aboard { topic, pops: &NOBODY, outcome });
                    }
                }
                self.look_for_the_rest(short);
                return;
            }
            Err(e) => e,
        };
        if error.is_of_all() {
            for outcome in outcomes {
                outcome.error = Some(error.clone());
            }
            return;
        }
        // One of the settles may be the reason. The pops take the next flight.
        for ((topic, turns), outcome) in parts.iter().zip(outcomes) {
            for TurnJob { settle, .. } in &turns.jobs {
                let group = Group { topic, jobs: std::slice::from_ref(settle) };
                let verdicts = self
                    .settle_together(&[group])
                    .and_then(|mut answers| answers.pop().ok_or_else(Error::panicked));
                self.answer_settle(topic, settle, verdicts, outcome);
            }
            outcome.look_in = Some(Duration::ZERO);
        }
    }

    /// Settles first, then pops; for each settle its verdicts, for each group its messages.
    #[allow(clippy::type_complexity, reason = "answers to two requests")]
    fn turn_together(
        &mut self,
        parts: &[(&str, &Turns)],
    ) -> Result<(Vec<Vec<Verdict>>, Vec<Option<Vec<Grant>>>)> {
        let groups: Vec<Group<'_, TurnJob>> =
            parts.iter().map(|(topic, turns)| Group { topic, jobs: &turns.jobs }).collect();
        let settled = || groups.iter().flat_map(|group| group.jobs).map(|job| &job.settle);
        let settles: Vec<&Settle> = settled().flat_map(|job| &job.settles).collect();
        let (proofs, slices) = (Proofs::new(&settles), Slices::new(&groups));
        let keep = self.engine.settings.keep_settled.as_secs_f64();
        let wanted: Vec<i32> = parts.iter().map(|(_, turns)| asked(turns.pops())).collect();
        let leases: Vec<Option<f64>> =
            groups.iter().map(|group| group.jobs[0].pop.lease.map(|lease| lease.as_secs_f64())).collect();
        let fallback = self.engine.settings.lease.as_secs_f64();
        let pops: [&(dyn ToSql + Sync); 3] = [&wanted, &leases, &fallback];
        let params = [&slices.params()[..], &proofs.params(&keep)[..], &pops[..]].concat();
        let sent = Instant::now();
        let is_one = matches!(wanted[..], [wanted] if wanted > 0);
        let rows = self.run(|calls| if is_one { &calls.turn_topic } else { &calls.turn }, &params)?;

        let mut verdicts = vec![Verdict::Settled; settles.len()];
        let mut popped = Vec::new();
        for row in rows {
            match row.try_get("place")? {
                Some(place) => {
                    put(
                        &mut verdicts,
                        place,
                        Verdict::read(row.try_get("result")?, row.try_get("lease_until")?),
                    );
                }
                None => popped.push(row),
            }
        }
        let topics: Vec<&str> = groups.iter().map(|group| group.topic).collect();
        Ok((split(settled(), verdicts), read_parts(&topics, popped, sent)?))
    }

    /// Tells the server that somebody waits, and asks it for each part whether there is something, or when.
    fn look(&mut self, aboard: &mut [Aboard<'_>]) -> Result<Vec<bool>> {
        // Which part each of the topics is of.
        let mut of: Vec<usize> = Vec::new();
        let mut topics: Vec<&str> = Vec::new();
        for (i, part) in aboard.iter_mut().enumerate() {
            part.outcome.registered = true;
            part.outcome.look_in = None;
            match &part.pops.any {
                // Where nothing else can have come, of these alone.
                Some(any) if any.calm => {
                    topics.extend(any.order().iter().map(|place| &*any.group.topics[*place]))
                }
                Some(any) => topics.extend(any.group.topics.iter().map(|topic| &**topic)),
                None => topics.push(part.topic),
            }
            of.resize(topics.len(), i);
        }
        let waiter = self.engine.client;
        let within = self.engine.settings.poll_interval.as_secs_f64();
        let mut ready = vec![false; aboard.len()];
        for (topics, of) in topics.chunks(TOGETHER).zip(of.chunks(TOGETHER)) {
            let topics = topics.to_vec();
            for row in self.run(|calls| &calls.wait_for, &[&topics, &waiter, &within])? {
                let place = usize::try_from(row.try_get::<_, i32>(0)? - 1).unwrap_or(usize::MAX);
                let Some(part) = of.get(place).copied() else { continue };
                let outcome = &mut aboard[part].outcome;
                let due_in: Option<f64> = row.try_get(2)?;
                let due_in = due_in.and_then(|s| Duration::try_from_secs_f64(s.max(0.0)).ok());
                ready[part] |= row.try_get(1)? || due_in.is_some_and(|wait| wait.is_zero());
                outcome.look_in = outcome.look_in.min(due_in).or(outcome.look_in).or(due_in);
                outcome.registered &= row.try_get::<_, bool>(3)?;
            }
        }
        for (part, ready) in aboard.iter_mut().zip(&ready) {
            let listens = self.engine.settings.listens;
            part.outcome.calm = part.pops.any.is_some() && part.outcome.registered && !ready && listens;
            if !part.outcome.registered {
                part.outcome.look_in = part.outcome.look_in.min(Some(SOON)).or(Some(SOON));
            }
        }
        Ok(ready)
    }

    // All of them.

    /// Carries out all requests together. If that fails for a reason that may lie in one of them, then
    /// each by itself, so that no error reaches a neighbour.
    fn share<J: Job, A>(
        &mut self,
        groups: &[Group<'_, J>],
        carry: impl Fn(&mut Self, &[Group<'_, J>]) -> Result<Vec<A>>,
        outcomes: &mut [Outcome],
    ) -> Vec<Vec<Result<A>>> {
        let error = match carry(self, groups) {
            Ok(answers) => {
                let mut answers = answers.into_iter().map(Ok);
                return groups
                    .iter()
                    .map(|group| answers.by_ref().take(group.jobs.len()).collect())
                    .collect();
            }
            Err(e) => e,
        };
        if groups.iter().map(|group| group.jobs.len()).sum::<usize>() > 1 && !error.is_of_all() {
            let mut alone = |topic, job| {
                let group = Group { topic, jobs: std::slice::from_ref(job) };
                carry(self, &[group]).and_then(|mut answer| answer.pop().ok_or_else(Error::panicked))
            };
            return groups
                .iter()
                .map(|group| group.jobs.iter().map(|job| alone(group.topic, job)).collect())
                .collect();
        }
        for outcome in outcomes {
            outcome.error = Some(error.clone());
        }
        groups.iter().map(|group| group.jobs.iter().map(|_| Err(error.clone())).collect()).collect()
    }

    fn run(
        &mut self,
        call: impl Fn(&crate::calls::Calls) -> &Call,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<postgres::Row>> {
        self.link.run(self.deadline, call(&self.engine.calls), params)
    }
}

/// Messages by the part of their topic; `None` for the parts that were not asked: a row without an id says which is the
/// first of them.
fn read_parts(topics: &[&str], rows: Vec<postgres::Row>, sent: Instant) -> Result<Vec<Option<Vec<Grant>>>> {
    let mut grants: Vec<Option<Vec<Grant>>> = topics.iter().map(|_| Some(Vec::new())).collect();
    for row in rows {
        let part = usize::try_from(row.try_get::<_, i64>("part")? - 1).unwrap_or(usize::MAX);
        if row.try_get::<_, Option<Uuid>>("id")?.is_none() {
            grants.iter_mut().skip(part).for_each(|part| *part = None);
        } else if let (Some(topic), Some(Some(grants))) = (topics.get(part), grants.get_mut(part)) {
            grants.push(Grant::read(topic, &row, sent)?);
        }
    }
    Ok(grants)
}

/// To each request its part of the answers.
fn split<'a, J: Job + 'a, A>(jobs: impl Iterator<Item = &'a J>, answers: Vec<A>) -> Vec<Vec<A>> {
    let mut rest = answers.into_iter();
    jobs.map(|job| rest.by_ref().take(job.sent()).collect()).collect()
}

/// Notes the answer for the row of a place, which counts from one.
fn put<A>(answers: &mut [A], place: i32, answer: A) {
    if let Some(slot) = usize::try_from(place - 1).ok().and_then(|i| answers.get_mut(i)) {
        *slot = answer;
    }
}

/// Which slice of the arrays is for which topic.
struct Slices<'a> {
    topics: Vec<&'a str>,
    firsts: Vec<i32>,
    lasts: Vec<i32>,
}

impl<'a> Slices<'a> {
    fn new<J: Job>(groups: &[Group<'a, J>]) -> Self {
        let mut slices = Slices { topics: Vec::new(), firsts: Vec::new(), lasts: Vec::new() };
        let mut last = 0;
        for group in groups {
            let rows: usize = group.jobs.iter().map(Job::sent).sum();
            slices.topics.push(group.topic);
            slices.firsts.push(last + 1);
            last += i32::try_from(rows).unwrap_or_default();
            slices.lasts.push(last);
        }
        slices
    }

    fn params(&self) -> [&(dyn ToSql + Sync); 3] {
        [&self.topics, &self.firsts, &self.lasts]
    }
}

/// Settles as parallel arrays.
struct Proofs<'a> {
    ids: Vec<Uuid>,
    tokens: Vec<&'a [u8]>,
    words: Vec<&'a str>,
    delays: Option<Vec<Option<f64>>>,
    errors: Option<Vec<Option<Cow<'a, str>>>>,
    /// How many characters were replaced in them.
    replaced: usize,
}

impl<'a> Proofs<'a> {
    fn new(settles: &[&'a Settle]) -> Self {
        let delays: Vec<Option<f64>> = settles.iter().map(|s| s.verb.delay()).collect();
        let errors: Vec<Option<Cow<'a, str>>> =
            settles.iter().map(|s| s.verb.error().map(Cow::Borrowed)).collect();
        Proofs {
            ids: settles.iter().map(|s| s.id).collect(),
            tokens: settles.iter().map(|s| s.token.as_slice()).collect(),
            words: settles.iter().map(|s| s.verb.word()).collect(),
            delays: delays.iter().any(Option::is_some).then_some(delays),
            errors: errors.iter().any(Option::is_some).then_some(errors),
            replaced: 0,
        }
    }

    /// Replaces what the database cannot store in the reasons of failures, which must not be lost with it: the
    /// character that it has refused, and after a few of them all that are not ASCII. Returns whether there was any.
    fn replace(&mut self, refused: &Error) -> bool {
        let Some(refused) = refused.unstorable() else { return false };
        self.replaced += 1;
        let all = self.replaced > REPLACED;
        let goes = |c: char| c == refused || all && !c.is_ascii();
        let mut any = false;
        for error in self.errors.iter_mut().flatten().flatten().filter(|error| error.contains(goes)) {
            any = true;
            let written = |c: char| if goes(c) { c.escape_unicode().to_string() } else { c.to_string() };
            *error = Cow::Owned(error.chars().map(written).collect());
        }
        any
    }

    fn params<'p>(&'p self, keep: &'p f64) -> [&'p (dyn ToSql + Sync); 6] {
        [&self.ids, &self.tokens, &self.words, &self.delays, &self.errors, keep]
    }
}

/// Messages as parallel arrays; those that are the default for all of them are left out.
pub(crate) struct Batch<'a> {
    ids: Vec<Uuid>,
    payloads: Vec<&'a [u8]>,
    delays: Option<Vec<Option<f64>>>,
    ready_ats: Option<Vec<Option<time::OffsetDateTime>>>,
    headers: Option<Vec<Option<String>>>,
    max_attempts: Option<Vec<Option<i32>>>,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(messages: &[&'a NewMessage]) -> Self {
        let due = || messages.iter().map(|m| m.due());
        let max_attempts: Vec<Option<i32>> = messages.iter().map(|m| m.max_attempts.wanted()).collect();
        let headers: Vec<Option<String>> = messages.iter().map(|m| headers_json(&m.headers)).collect();
        Batch {
            ids: messages.iter().map(|m| m.id).collect(),
            payloads: messages.iter().map(|m| m.payload.as_slice()).collect(),
            delays: due().any(|d| d.0.is_some()).then(|| due().map(|d| d.0).collect()),
            ready_ats: due().any(|d| d.1.is_some()).then(|| due().map(|d| d.1).collect()),
            headers: headers.iter().any(Option::is_some).then_some(headers),
            max_attempts: max_attempts.iter().any(Option::is_some).then_some(max_attempts),
        }
    }

    pub(crate) fn params<'p>(
        &'p self,
        topic: &'p &str,
        sender: &'p Option<Uuid>,
        fallback: &'p i32,
    ) -> [&'p (dyn ToSql + Sync); 9] {
        [
            topic,
            &self.ids,
            &self.payloads,
            &self.delays,
            &self.ready_ats,
            &self.headers,
            &self.max_attempts,
            sender,
            fallback,
        ]
    }
}

impl Due {
    /// In how long, as far as this client knows.
    fn wait(self) -> Duration {
        match self {
            Due::Now => Duration::ZERO,
            Due::In(delay) => delay,
            Due::At(at) => (at - time::OffsetDateTime::now_utc()).try_into().unwrap_or_default(),
        }
    }
}

impl Attempts {
    /// As the functions of the schema take it.
    pub(crate) fn wanted(self) -> Option<i32> {
        match self {
            Attempts::Default => None,
            Attempts::AtMost(most) => Some(i32::from(most)),
            Attempts::Unlimited => Some(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn a_message_is_looked_for_when_it_is_due() {
        let minute = Duration::from_secs(60);
        assert_eq!(NewMessage::new("").due.wait(), Duration::ZERO);
        assert_eq!(NewMessage::new("").delay(minute).due.wait(), minute);
        let wait = |at| NewMessage::new("").ready_at(at).due.wait();
        let later = wait(OffsetDateTime::now_utc() + minute);
        assert!((minute / 2..=minute).contains(&later), "{later:?}");
        assert_eq!(wait(OffsetDateTime::now_utc() - minute), Duration::ZERO);
    }
}
