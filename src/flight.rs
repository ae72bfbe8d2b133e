//! What a connection thread does with the requests of a flight: one statement for all of them, and
//! to each its own answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::types::ToSql;
use uuid::Uuid;

use crate::calls::{Grant, Settle, Verdict, headers_json};
use crate::crew::Outcome;
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{PopJob, PushJob, SettleJob};
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
    // Push.

    pub(crate) fn push(&mut self, jobs: &[PushJob]) -> Outcome {
        let mut outcome = Outcome::default();
        let answers = self.share(jobs, |flight, jobs| flight.push_together(jobs), &mut outcome);
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
        let default = self.engine.settings.max_attempts;
        let sender = self.engine.client;
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
                    &message.max_attempts.or(default),
                    &sender,
                ],
            )?;
            duplicates[0] = rows.first().is_some_and(|row| row.get(1));
        } else {
            let batch = Batch::new(&messages, default);
            for row in self.run(|calls| &calls.push_many, &batch.params(&topic, &Some(sender)))? {
                let place: i32 = row.get(0);
                if let Some(duplicate) = usize::try_from(place - 1).ok().and_then(|i| duplicates.get_mut(i)) {
                    *duplicate = true;
                }
            }
        }
        let mut rest = duplicates.into_iter();
        Ok(jobs.iter().map(|job| rest.by_ref().take(job.messages.len()).collect()).collect())
    }

    // Settle.

    pub(crate) fn settle(&mut self, jobs: &[SettleJob]) -> Outcome {
        let mut outcome = Outcome::default();
        let answers = self.share(jobs, |flight, jobs| flight.settle_together(jobs), &mut outcome);
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

    fn settle_together(&mut self, jobs: &[SettleJob]) -> Result<Vec<Vec<Verdict>>> {
        let settles: Vec<&Settle> = jobs.iter().flat_map(|job| &job.settles).collect();
        let ids: Vec<Uuid> = settles.iter().map(|s| s.id).collect();
        let tokens: Vec<&[u8]> = settles.iter().map(|s| s.token.as_slice()).collect();
        let words: Vec<&str> = settles.iter().map(|s| s.verb.word()).collect();
        let delays: Vec<Option<f64>> = settles.iter().map(|s| s.verb.delay()).collect();
        let errors: Vec<Option<&str>> = settles.iter().map(|s| s.verb.error()).collect();
        let delays = delays.iter().any(Option::is_some).then_some(delays);
        let errors = errors.iter().any(Option::is_some).then_some(errors);
        let topic = self.topic;
        let keep = self.engine.settings.keep_settled.as_secs_f64();
        let mut verdicts = vec![Verdict::Settled; settles.len()];
        let rows =
            self.run(|calls| &calls.settle_many, &[&topic, &ids, &tokens, &words, &delays, &errors, &keep])?;
        for row in rows {
            let place: i32 = row.get(0);
            let verdict = match row.get(1) {
                "extended" => Verdict::Extended(row.get(2)),
                "gone" => Verdict::Gone,
                _ => Verdict::Lost,
            };
            if let Some(slot) = usize::try_from(place - 1).ok().and_then(|i| verdicts.get_mut(i)) {
                *slot = verdict;
            }
        }
        let mut rest = verdicts.into_iter();
        Ok(jobs.iter().map(|job| rest.by_ref().take(job.settles.len()).collect()).collect())
    }

    // Pop.

    /// Hands out what there is, in the order of the requests.
    pub(crate) fn pop(&mut self, jobs: &[PopJob], lease: Duration, poll: bool, registered: bool) -> Outcome {
        match self.try_pop(jobs, lease, poll, registered) {
            Ok(outcome) => outcome,
            Err(e) => Outcome::failed(e.during("pop", Some(self.topic))),
        }
    }

    fn try_pop(&mut self, jobs: &[PopJob], lease: Duration, poll: bool, registered: bool) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if poll && !self.look(&mut outcome)? {
            return Ok(outcome);
        }
        let asked: usize = jobs.iter().map(|job| job.max).sum();
        let asked = i32::try_from(asked.min(crate::limits::FLIGHT_ROWS)).unwrap_or(1);
        let topic = self.topic;
        let sent = Instant::now();
        let rows = self.run(|calls| &calls.pop, &[&topic, &asked, &lease.as_secs_f64()])?;
        let mut grants = rows
            .iter()
            .map(|row| Grant::read(self.topic, row, sent).map_err(Error::from))
            .collect::<Result<Vec<_>>>()?
            .into_iter();
        outcome.rows = grants.len();

        let mut unserved = false;
        for job in jobs {
            let share: Vec<Grant> = grants.by_ref().take(job.max).collect();
            if share.is_empty() {
                if job.waits {
                    unserved = true;
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
        if unserved {
            if outcome.rows == 0 || !registered {
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
        if jobs.len() > 1 && !matches!(error.kind(), ErrorKind::Connection | ErrorKind::Timeout) {
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
    pub(crate) fn new(messages: &[&'a NewMessage], default: Option<u16>) -> Self {
        let due = || messages.iter().map(|m| m.due());
        let max_attempts: Vec<Option<i32>> = messages.iter().map(|m| m.max_attempts.or(default)).collect();
        let headers: Vec<Option<String>> = messages.iter().map(|m| headers_json(&m.headers)).collect();
        Batch {
            ids: messages.iter().map(|m| m.id).collect(),
            payloads: messages.iter().map(|m| m.payload.as_slice()).collect(),
            delays: due().any(|d| d.0.is_some()).then(|| due().map(|d| d.0).collect()),
            ready_ats: due().any(|d| d.1.is_some()).then(|| due().map(|d| d.1).collect()),
            headers: headers.iter().any(Option::is_some).then_some(headers),
            // 25 is what the functions of the schema take for granted.
            max_attempts: max_attempts.iter().any(|m| *m != Some(25)).then_some(max_attempts),
        }
    }

    pub(crate) fn params<'p>(
        &'p self,
        topic: &'p &str,
        sender: &'p Option<Uuid>,
    ) -> [&'p (dyn ToSql + Sync); 8] {
        [
            topic,
            &self.ids,
            &self.payloads,
            &self.delays,
            &self.ready_ats,
            &self.headers,
            &self.max_attempts,
            sender,
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
    pub(crate) fn or(self, default: Option<u16>) -> Option<i32> {
        match self {
            Attempts::Default => default.map(i32::from),
            Attempts::AtMost(most) => Some(i32::from(most)),
            Attempts::Unlimited => None,
        }
    }
}
