//! A client that only bounces messages: it pops a few of them and gives them back, each many times a second, until the
//! faults are over. Then it completes them.
//!
//! It releases, defers by nothing, fails with no backoff, and lets a lease of a second end. Some of it is in SQL, in
//! transactions that take a while to commit. And it looks after its topic all the time: whoever moves the watermark
//! must not pass what is given back meanwhile.

use std::sync::atomic::Ordering;
use std::thread::{self, Scope};
use std::time::Duration;

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::uuid::Uuid;
use pushpop_pg::{Error, Lease};

use crate::chance::{Chance, hash};
use crate::journal::outcome;
use crate::plan::{BOUNCE, BOUNCE_LEASE};
use crate::worker::Worker;

/// Threads with the library and in SQL.
const THREADS: u64 = 4;
const SLOW: u64 = 4;

/// The longest pause between two rounds of a thread, and the longest time until a transaction commits.
const PAUSE: Duration = Duration::from_millis(20);
const LATE: Duration = Duration::from_millis(30);

const POP: &str = "select id, payload, token, lease_until, attempt, fence from pushpop.pop($1, 1, $2)";

const BACK: [&str; 2] = ["select pushpop.release($1, $2, $3)", "select pushpop.defer($1, $2, $3, 0)"];

pub(crate) fn spawn<'scope>(scope: &'scope Scope<'scope, '_>, worker: &'scope Worker<'scope>) {
    for n in 0..THREADS + SLOW {
        let mut chance = Chance::new(worker.seed ^ n);
        scope.spawn(move || {
            while !worker.is_over() {
                let calm = worker.calm.load(Ordering::Relaxed);
                if n < SLOW && !calm {
                    worker.bounce_slowly(&mut chance);
                } else {
                    worker.bounce(&mut chance, calm);
                }
                thread::sleep(chance.up_to(PAUSE));
            }
        });
    }
}

impl Worker<'_> {
    fn bounce(&self, chance: &mut Chance, calm: bool) {
        let max = [1, 1, 1, 3][chance.place(4)];
        for lease in self.popped(self.queue.pop_many(BOUNCE, max, Duration::from_secs(1))) {
            match chance.below(100) {
                _ if calm => self.complete(lease),
                0..85 => self.until_settled(lease, "release", Lease::release),
                85..90 => self.until_settled(lease, "defer", |lease| lease.defer(Duration::ZERO)),
                90..97 => self.until_settled(lease, "fail", |lease| lease.fail("as it was meant to")),
                _ => drop(lease),
            }
        }
        if chance.below(8) == 0 {
            let upkeep = "select pushpop.upkeep($1)";
            let done = self.queue.transaction(|tx| Ok(tx.execute(upkeep, &[&BOUNCE])?));
            self.note(done);
        }
    }

    /// A pop, and a release or a deferral that is long on its way.
    fn bounce_slowly(&self, chance: &mut Chance) {
        let lease = BOUNCE_LEASE.as_secs_f64();
        let popped = self.queue.transaction(|tx| Ok(tx.query_opt(POP, &[&BOUNCE, &lease])?));
        let Some(row) = self.note(popped).flatten() else { return };
        let (id, attempt, fence): (Uuid, i32, i64) = (row.get(0), row.get(4), row.get(5));
        let (token, deadline): (&[u8], OffsetDateTime) = (row.get(2), row.get(3));
        let (hash, deadline) = (hash(row.get(1)), deadline.unix_timestamp_nanos() / 1000);
        let (call, back) = (self.journal.call(), usize::from(chance.below(4) == 0));
        let verb = ["release", "defer"][back];
        self.journal.lines([
            format!("grant {BOUNCE} {id}:{fence} {attempt} {deadline} {hash:016x}"),
            format!("settle {call} {verb} {id}:{fence}"),
        ]);
        let late = chance.up_to(LATE);
        let done = self.queue.transaction(|tx| {
            tx.execute(BACK[back], &[&BOUNCE, &id, &token])?;
            thread::sleep(late);
            Ok(())
        });
        let outcome = done.map_or_else(|e| outcome(&e), |()| "ok".to_owned());
        self.journal.line(format!("settled {call} {outcome}"));
    }

    fn note<T>(&self, done: Result<T, Error>) -> Option<T> {
        done.map_err(|e| self.journal.line(format!("note bounce {e}"))).ok()
    }
}
