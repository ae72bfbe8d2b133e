//! What a connection thread does with the requests of a flight: one statement for all of them, and
//! to each its own answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::types::ToSql;
use uuid::Uuid;

use crate::calls::{Grant, Settle, Verdict, headers_json};
use crate::crew::Outcome;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::lane::{Cargo, Job, Pops, PushJob, SettleJob};
use crate::link::{Call, Link};
use crate::message::{Attempts, Due, NewMessage};
use crate::observer::{LeaseLost, Popped, Pushed, Settled};
use crate::slot::FlightId;

pub(crate) struct Flight<'a> {
    pub(crate) engine: &'a Arc<Engine>,
    pub(crate) link: &'a mut Link,
    pub(crate) topic: &'a str,
    pub(crate) id: FlightId,
    pub(crate) deadline: Instant,
}

impl Flight<'_> {
    pub(crate) fn carry(&mut self, cargo: &Cargo) -> Outcome {
        match cargo {
            Cargo::Push(jobs) => self.push(jobs),
            Cargo::Settle(jobs) => self.settle(jobs),
            Cargo::Pop(pops) => self.pop(pops),
        }
    }

    // Push.

    fn push(&mut self, jobs: &[PushJob]) -> Outcome {
        let mut outcome = Outcome::default();
        let answers = self.share(jobs, Self::push_together, &mut outcome);
        for (job, answer) in jobs.iter().zip(answers) {
            if let Ok(duplicates) = &answer {
                outcome.rows += job.messages.len();
                let first = job.messages.iter().map(|m| m.due.wait()).min();
                outcome.pushed = outcome.pushed.min(first).or(first).or(outcome.pushed);
                let event = Pushed {
                    topic: self.topic,
                    count: job.messages.len(),
                    duplicates: duplicates.iter().filter(|d| **d).count(),
                };
                self.engine.observe(|observer| observer.pushed(&event));
            }
            drop(job.slot.land(self.id, answer));
        }
        outcome
    }

    fn push_together(&mut self, jobs: &[PushJob]) -> Result<Vec<Vec<bool>>> {
        let messages: Vec<&NewMessage> = jobs.iter().flat_map(|job| &job.messages).collect();
        let topic = self.topic;
        let fallback = self.engine.settings.max_attempts;
        let sender = Some(self.engine.client);
        let mut duplicates = vec![false; messages.len()];
        if let [message] = messages[..] {
            let (delay, ready_at) = message.due();
            let rows = self.run(
                |calls| &calls.push,
                &[
                    &topic,
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
            duplicates[0] = rows.first().is_some_and(|row| row.get(1));
        } else {
            let batch = Batch::new(&messages);
            for row in self.run(|calls| &calls.push_many, &batch.params(&topic, &sender, &fallback))? {
                put(&mut duplicates, row.get(0), true);
            }
        }
        Ok(split(jobs, duplicates))
    }

    // Settle.

    fn settle(&mut self, jobs: &[SettleJob]) -> Outcome {
        let mut outcome = Outcome::default();
        let answers = self.share(jobs, Self::settle_together, &mut outcome);
        for (job, answer) in jobs.iter().zip(answers) {
            if let Ok(verdicts) = &answer {
                for (settle, verdict) in job.settles.iter().zip(verdicts) {
                    self.tell_settled(settle, *verdict);
                    outcome.rows += 1;
                }
            }
            drop(job.slot.land(self.id, answer));
        }
        outcome
    }

    fn settle_together(&mut self, jobs: &[SettleJob]) -> Result<Vec<Vec<Verdict>>> {
        let settles: Vec<&Settle> = jobs.iter().flat_map(|job| &job.settles).collect();
        let proofs = Proofs::new(&settles);
        let topic = self.topic;
        let keep = self.engine.settings.keep_settled.as_secs_f64();
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![&topic];
        params.extend(proofs.params(&keep));
        let mut verdicts = vec![Verdict::Settled; settles.len()];
        for row in self.run(|calls| &calls.settle_many, &params)? {
            put(&mut verdicts, row.get(0), Verdict::read(row.get(1), row.get(2)));
        }
        Ok(split(jobs, verdicts))
    }

    fn tell_settled(&self, settle: &Settle, verdict: Verdict) {
        let (id, outcome) = (settle.id, settle.verb.word());
        self.engine.observe(|observer| match verdict {
            Verdict::Settled | Verdict::Extended(_) => {
                observer.settled(&Settled { topic: self.topic, id, outcome })
            }
            Verdict::Lost | Verdict::Gone => {
                observer.lease_lost(&LeaseLost { topic: self.topic, id, outcome })
            }
        });
    }

    // Pop.

    fn pop(&mut self, pops: &Pops) -> Outcome {
        match self.pop_together(pops) {
            Ok(outcome) => outcome,
            Err(e) => Outcome::failed(e.during("pop", Some(self.topic))),
        }
    }

    /// Hands out what there is, in the order of the requests.
    fn pop_together(&mut self, pops: &Pops) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if pops.poll && !self.look(&mut outcome)? {
            return Ok(outcome);
        }
        let asked: usize = pops.jobs.iter().map(|job| job.max).sum();
        let asked = i32::try_from(asked.min(crate::limits::FLIGHT_ROWS)).unwrap_or(1);
        let topic = self.topic;
        let lease = pops.lease.map(|lease| lease.as_secs_f64());
        let fallback = self.engine.settings.lease.as_secs_f64();
        let sent = Instant::now();
        let rows = self.run(|calls| &calls.pop, &[&topic, &asked, &lease, &fallback])?;
        let mut grants = rows
            .iter()
            .map(|row| Grant::read(self.topic, row, sent).map_err(Error::from))
            .collect::<Result<Vec<_>>>()?
            .into_iter();
        outcome.rows = grants.len();

        let mut short = false;
        for job in &pops.jobs {
            let share: Vec<Grant> = grants.by_ref().take(job.max).collect();
            if share.is_empty() {
                if job.waits {
                    short = true;
                } else {
                    drop(job.slot.land(self.id, Ok(share)));
                }
                continue;
            }
            let event = Popped { topic: self.topic, count: share.len() };
            match job.slot.land(self.id, Ok(share)) {
                Ok(()) => self.engine.observe(|observer| observer.popped(&event)),
                Err(unwanted) => self.engine.abandon(self.topic, unwanted.unwrap_or_default()),
            }
        }
        if short {
            if outcome.rows == 0 || !pops.registered {
                if self.look(&mut outcome).unwrap_or(false) {
                    outcome.look_in = Some(Duration::ZERO);
                }
            } else {
                outcome.look_in = Some(Duration::from_millis(20));
            }
        }
        Ok(outcome)
    }

    /// Tells the server that somebody waits, and asks it whether there is something, or when.
    fn look(&mut self, outcome: &mut Outcome) -> Result<bool> {
        let topic = self.topic;
        let waiter = self.engine.client;
        let rows = self.run(|calls| &calls.wait_for, &[&topic, &waiter])?;
        outcome.registered = true;
        let Some(row) = rows.first() else { return Ok(false) };
        let due_in: Option<f64> = row.get(1);
        outcome.look_in = due_in.and_then(|s| Duration::try_from_secs_f64(s.max(0.0)).ok());
        Ok(row.get(0) || outcome.look_in.is_some_and(|wait| wait.is_zero()))
    }

    // All of them.

    /// Carries out all requests together. If that fails for a reason that may lie in one of them, then
    /// each by itself, so that no error reaches a neighbour.
    fn share<J, A>(
        &mut self,
        jobs: &[J],
        carry: impl Fn(&mut Self, &[J]) -> Result<Vec<A>>,
        outcome: &mut Outcome,
    ) -> Vec<Result<A>> {
        let error = match carry(self, jobs) {
            Ok(answers) => return answers.into_iter().map(Ok).collect(),
            Err(e) => e,
        };
        if jobs.len() > 1 && !error.is_of_all() {
            return jobs
                .iter()
                .map(|job| {
                    carry(self, std::slice::from_ref(job))
                        .and_then(|mut answer| answer.pop().ok_or_else(Error::panicked))
                })
                .collect();
        }
        outcome.error = Some(error.clone());
        jobs.iter().map(|_| Err(error.clone())).collect()
    }

    fn run(
        &mut self,
        call: impl Fn(&crate::calls::Calls) -> &Call,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<postgres::Row>> {
        self.link.run(self.deadline, call(&self.engine.calls), params)
    }
}

/// To each request its part of the answers.
fn split<A>(jobs: &[impl Job], answers: Vec<A>) -> Vec<Vec<A>> {
    let mut rest = answers.into_iter();
    jobs.iter().map(|job| rest.by_ref().take(job.rows()).collect()).collect()
}

/// Notes the answer for the row of a place, which counts from one.
fn put<A>(answers: &mut [A], place: i32, answer: A) {
    if let Some(slot) = usize::try_from(place - 1).ok().and_then(|i| answers.get_mut(i)) {
        *slot = answer;
    }
}

/// Settles as parallel arrays.
struct Proofs<'a> {
    ids: Vec<Uuid>,
    tokens: Vec<&'a [u8]>,
    words: Vec<&'a str>,
    delays: Option<Vec<Option<f64>>>,
    errors: Option<Vec<Option<&'a str>>>,
}

impl<'a> Proofs<'a> {
    fn new(settles: &[&'a Settle]) -> Self {
        let delays: Vec<Option<f64>> = settles.iter().map(|s| s.verb.delay()).collect();
        let errors: Vec<Option<&str>> = settles.iter().map(|s| s.verb.error()).collect();
        Proofs {
            ids: settles.iter().map(|s| s.id).collect(),
            tokens: settles.iter().map(|s| s.token.as_slice()).collect(),
            words: settles.iter().map(|s| s.verb.word()).collect(),
            delays: delays.iter().any(Option::is_some).then_some(delays),
            errors: errors.iter().any(Option::is_some).then_some(errors),
        }
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
