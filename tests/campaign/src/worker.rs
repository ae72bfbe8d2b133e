//! A process that consumes with the library, until its standard input ends or it is killed.

use std::io::BufRead;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::uuid::Uuid;
use pushpop_pg::{BoxError, ErrorKind, Lease, Queue, SettleError};

use crate::args::Args;
use crate::bounce;
use crate::chance::{Chance, hash};
use crate::journal::{Journal, outcome};
use crate::plan::{BOUNCE, BOUNCE_LEASE, EFFECTS, KEEP, ORDER, Plan, SCHEMA, WORK};
use crate::pulse::{self, PULSE};

/// How long a settle is repeated: longer than a server takes to come back.
const PATIENCE: Duration = Duration::from_secs(30);

/// Opens the queue, as soon as there is a server.
pub(crate) fn open(plan: &Plan, args: &Args, name: &str) -> Result<Queue, BoxError> {
    let url = args.text("url")?;
    let [operation, connect] = plan.timeouts;
    let lease = if args.text("name")?.starts_with(BOUNCE) { BOUNCE_LEASE } else { plan.lease };
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let opened = Queue::builder()
            .application_name(name)
            .lease(lease)
            .keep_settled(KEEP)
            .poll_interval(plan.poll)
            .operation_timeout(operation)
            .connect_timeout(connect)
            // Whoever dies of its attempts was meant to.
            .max_attempts(None)
            .connect(url);
        match opened {
            Err(e) if e.is_retryable() && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(50))
            }
            opened => return Ok(opened?),
        }
    }
}

pub(crate) struct Worker<'a> {
    plan: &'a Plan,
    args: &'a Args,
    pub(crate) journal: &'a Journal,
    pub(crate) queue: &'a Queue,
    name: &'a str,
    /// The faults have ended; there is no more to do.
    pub(crate) calm: &'a AtomicBool,
    stop: &'a AtomicBool,
    /// What becomes of a message depends on the seed, and on nothing else that differs between runs.
    pub(crate) seed: u64,
}

/// What is done with a delivery.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Complete,
    Discard,
    Defer,
    Release,
    Fail,
    /// Completed after work that outlasts the lease, which is extended.
    Long,
}

pub(crate) fn run(plan: &Plan, args: &Args) -> Result<(), BoxError> {
    let journal = Journal::open(Path::new(args.text("log")?))?;
    let name = args.text("name")?;
    let queue = open(plan, args, &format!("campaign {name}"))?;
    let calm = AtomicBool::new(false);
    let stop = AtomicBool::new(false);
    let worker = Worker {
        plan,
        args,
        journal: &journal,
        queue: &queue,
        name,
        calm: &calm,
        stop: &stop,
        seed: plan.seed ^ hash(name.as_bytes()),
    };
    thread::scope(|scope| {
        let worker = &worker;
        if name == ORDER {
            scope.spawn(|| worker.in_order());
        } else if name.starts_with(BOUNCE) {
            bounce::spawn(scope, worker);
        } else {
            scope.spawn(|| worker.one_by_one());
            scope.spawn(|| worker.one_by_one());
            scope.spawn(|| worker.in_batches());
            scope.spawn(|| worker.with_effects());
            if plan.shares[0] > 50 {
                scope.spawn(|| worker.with_effects());
                scope.spawn(|| worker.with_effects());
            }
        }
        if plan.has_pulse() {
            journal.line("begun");
            let topic = pulse_of(name);
            let is_over = || calm.load(Ordering::Relaxed);
            scope.spawn(move || pulse::push(worker.queue, worker.journal, (&topic, name), is_over, || {}));
            scope.spawn(|| worker.with_pulse());
        }
        // A line says that the faults have ended; the end, that there is no more to do.
        for line in std::io::stdin().lock().lines() {
            calm.store(true, Ordering::Relaxed);
            if line.is_err() {
                break;
            }
        }
        calm.store(true, Ordering::Relaxed);
        stop.store(true, Ordering::Relaxed);
        queue.close();
    });
    if plan.has_pulse() {
        journal.line("ended");
    }
    Ok(())
}

fn pulse_of(name: &str) -> String {
    format!("{PULSE}-{name}")
}

impl Worker<'_> {
    /// Consumes its own pulse, and that of the producers.
    fn with_pulse(&self) {
        let own = pulse_of(self.name);
        while !self.is_over() {
            let popped = self.queue.pop_any(&[&own, PULSE], Duration::from_secs(1));
            if popped.is_err() && self.args.is_broken("gives-up") {
                return;
            }
            for lease in self.popped(popped.map(|lease| lease.into_iter().collect())) {
                let is_own = lease.topic() == own;
                self.journal.line(format!("work {}", delivery(&lease)));
                if self.is_settled(lease, "complete", Lease::complete) && is_own {
                    self.journal.line("alive");
                }
            }
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn one_by_one(&self) {
        for popped in self.queue.iter(WORK) {
            match popped {
                Ok(lease) => self.treat(lease),
                Err(e) => self.journal.line(format!("note pop {e}")),
            }
        }
    }

    fn in_batches(&self) {
        let max = usize::try_from(self.plan.batch / 2).unwrap_or(1).max(2);
        while !self.is_over() {
            let leases = self.popped(self.queue.pop_many(WORK, max, Duration::from_secs(1)));
            // Work that outlasts the lease of one would cost all the others theirs.
            let completes = |lease: &Lease| matches!(self.fate(lease), Fate::Complete | Fate::Long);
            let (batch, others): (Vec<_>, Vec<_>) = leases.into_iter().partition(completes);
            if !batch.is_empty() {
                self.work(&batch);
                self.complete_many(batch);
            }
            others.into_iter().for_each(|lease| self.settle(lease));
        }
    }

    fn with_effects(&self) {
        let mut chance = Chance::new(self.seed);
        while !self.is_over() {
            let max = [1, 1, 4, 12][chance.place(4)];
            let leases = self.popped(self.queue.pop_many(EFFECTS, max, Duration::from_secs(1)));
            if !leases.is_empty() {
                self.complete_with_effects(leases);
            }
        }
    }

    /// Alone with its topic, so what it gets is in order. Everything is completed before the next pop.
    fn in_order(&self) {
        let mut chance = Chance::new(self.seed);
        while !self.is_over() {
            let max = [1, 1, 7, 40][chance.place(4)];
            let leases = self.popped(self.queue.pop_many(ORDER, max, Duration::from_secs(1)));
            if leases.len() > 1 {
                self.work(&leases);
                self.complete_many(leases);
            } else {
                for lease in leases {
                    self.work(std::slice::from_ref(&lease));
                    self.until_settled(lease, "complete", Lease::complete);
                }
            }
        }
    }

    /// Writes down what was handed out.
    pub(crate) fn popped(&self, popped: Result<Vec<Lease>, pushpop_pg::Error>) -> Vec<Lease> {
        match popped {
            Ok(leases) => {
                self.granted(&leases);
                leases
            }
            Err(e) => {
                if e.kind() != ErrorKind::Closed {
                    self.journal.line(format!("note pop {e}"));
                }
                thread::sleep(Duration::from_millis(20));
                Vec::new()
            }
        }
    }

    fn granted(&self, leases: &[Lease]) {
        self.journal.lines(leases.iter().map(|lease| {
            let deadline = lease.deadline().unix_timestamp_nanos() / 1000;
            let (topic, hash) = (lease.topic(), hash(lease.payload()));
            format!("grant {topic} {} {} {deadline} {hash:016x}", delivery(lease), lease.attempt())
        }));
    }

    fn treat(&self, lease: Lease) {
        self.granted(std::slice::from_ref(&lease));
        self.settle(lease);
    }

    /// The same delivery has the same fate in every process.
    fn fate(&self, lease: &Lease) -> Fate {
        let name = lease.payload().split(|b| *b == b' ').next().unwrap_or_default();
        if name.ends_with(b"!") {
            return Fate::Fail;
        }
        if lease.fence() > 1 {
            return Fate::Complete;
        }
        match Chance::new(self.plan.seed ^ hash(name)).below(200) {
            0..5 => Fate::Discard,
            5..10 => Fate::Defer,
            10..15 => Fate::Release,
            15..20 => Fate::Fail,
            20..22 => Fate::Long,
            _ => Fate::Complete,
        }
    }

    fn settle(&self, lease: Lease) {
        match self.fate(&lease) {
            Fate::Complete => self.complete(lease),
            Fate::Discard => {
                self.work(std::slice::from_ref(&lease));
                self.until_settled(lease, "discard", Lease::discard);
            }
            Fate::Defer => self.until_settled(lease, "defer", |l| l.defer(Duration::from_millis(50))),
            Fate::Release => self.until_settled(lease, "release", Lease::release),
            Fate::Fail => self.until_settled(lease, "fail", |l| l.fail("as it was meant to")),
            Fate::Long => self.complete_late(lease),
        }
    }

    pub(crate) fn complete(&self, lease: Lease) {
        if self.args.is_broken("settle-before-work") {
            // It works with what it remembers; the lease is used up.
            let delivery = delivery(&lease);
            self.until_settled(lease, "complete", Lease::complete);
            thread::sleep(self.plan.work);
            return self.journal.line(format!("work {delivery}"));
        }
        self.work(std::slice::from_ref(&lease));
        if self.args.is_broken("delete-the-row") {
            return self.delete(lease);
        }
        self.until_settled(lease, "complete", Lease::complete);
    }

    /// Takes its time, and writes down that the work was done.
    fn work(&self, leases: &[Lease]) {
        let Some(first) = leases.first() else { return };
        thread::sleep(Chance::new(self.seed ^ hash(first.id().as_bytes())).up_to(self.plan.work));
        let deliveries: Vec<String> = leases.iter().map(delivery).collect();
        self.journal.line(format!("work {}", deliveries.join(" ")));
    }

    fn complete_late(&self, mut lease: Lease) {
        let half = self.plan.lease / 2;
        for _ in 0..2 {
            thread::sleep(half);
            let call = self.journal.call();
            self.journal.line(format!("extend {call} {}", delivery(&lease)));
            let (outcome, deadline) = match lease.extend(self.plan.lease) {
                Ok(()) => ("ok".to_owned(), lease.deadline().unix_timestamp_nanos() / 1000),
                Err(e) => (outcome(&e), 0),
            };
            self.journal.line(format!("extended {call} {outcome} {deadline}"));
        }
        self.work(std::slice::from_ref(&lease));
        self.until_settled(lease, "complete", Lease::complete);
    }

    pub(crate) fn until_settled(
        &self,
        lease: Lease,
        verb: &str,
        settle: impl Fn(Lease) -> Result<(), SettleError>,
    ) {
        self.is_settled(lease, verb, settle);
    }

    /// Settles, and repeats that until the answer is known; returns whether it was ok.
    fn is_settled(
        &self,
        mut lease: Lease,
        verb: &str,
        settle: impl Fn(Lease) -> Result<(), SettleError>,
    ) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let call = self.journal.call();
            self.journal.line(format!("settle {call} {verb} {}", delivery(&lease)));
            match settle(lease) {
                Ok(()) => {
                    self.journal.line(format!("settled {call} ok"));
                    return true;
                }
                Err(failed) => {
                    let (again, error) = failed.into_parts();
                    self.journal.line(format!("settled {call} {}", outcome(&error)));
                    if !error.is_retryable() || Instant::now() > deadline {
                        return false;
                    }
                    lease = again;
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn complete_many(&self, mut leases: Vec<Lease>) {
        let deadline = Instant::now() + PATIENCE;
        while !leases.is_empty() {
            let call = self.journal.call();
            let deliveries: Vec<String> = leases.iter().map(delivery).collect();
            self.journal.line(format!("settle {call} complete {}", deliveries.join(" ")));
            match self.queue.complete_many(leases) {
                Ok(lost) => {
                    let lost: String = lost.iter().map(|lease| format!(" {}", lease.id())).collect();
                    return self.journal.line(format!("settled {call} ok{lost}"));
                }
                Err(failed) => {
                    let (again, error) = failed.into_parts();
                    self.journal.line(format!("settled {call} {}", outcome(&error)));
                    if !error.is_retryable() || Instant::now() > deadline {
                        return;
                    }
                    leases = again;
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    /// The effects and the ends of their messages are one transaction.
    fn complete_with_effects(&self, mut leases: Vec<Lease>) {
        let insert = format!("insert into {SCHEMA}.effects (id, fence) values ($1, $2)");
        self.work(&leases);
        if self.args.is_broken("effect-apart") {
            for lease in leases {
                let (id, fence) = (lease.id(), lease.fence());
                if self.queue.transaction(|tx| Ok(tx.execute(&insert, &[&id, &fence])?)).is_ok() {
                    thread::sleep(self.plan.lease / 10);
                    self.until_settled(lease, "complete", Lease::complete);
                }
            }
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while !leases.is_empty() {
            let call = self.journal.call();
            let deliveries: Vec<String> = leases.iter().map(delivery).collect();
            self.journal.line(format!("settle {call} complete {}", deliveries.join(" ")));
            let done = self.queue.transaction(|tx| {
                for lease in &leases {
                    tx.execute(&insert, &[&lease.id(), &lease.fence()])?;
                    lease.complete_in(tx)?;
                }
                Ok(())
            });
            match done {
                Ok(()) => return self.journal.line(format!("settled {call} ok")),
                // One of them was lost, and nothing is committed: the others are tried each by itself.
                Err(e) if e.kind() == ErrorKind::LeaseLost && leases.len() > 1 => {
                    self.journal.line(format!("settled {call} failed:Sibling"));
                    return leases.into_iter().for_each(|lease| self.complete_with_effects(vec![lease]));
                }
                Err(e) => {
                    self.journal.line(format!("settled {call} {}", outcome(&e)));
                    // Repeated after a commit that nobody answered it says that the lease is lost, if that was committed.
                    if !e.is_retryable() || Instant::now() > deadline {
                        return;
                    }
                    leases.retain(|lease| !lease.remaining().is_zero());
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    /// Whoever acknowledges by deleting the row has nothing to show for it.
    fn delete(&self, lease: Lease) {
        let (id, call): (Uuid, u64) = (lease.id(), self.journal.call());
        self.journal.line(format!("settle {call} complete {}", delivery(&lease)));
        let sql = "delete from pushpop.messages where topic = $1 and id = $2";
        let outcome = match self.queue.transaction(|tx| Ok(tx.execute(sql, &[&WORK, &id])?)) {
            Ok(_) => "ok".to_owned(),
            Err(e) => outcome(&e),
        };
        self.journal.line(format!("settled {call} {outcome}"));
    }
}

pub(crate) fn delivery(lease: &Lease) -> String {
    format!("{}:{}", lease.id(), lease.fence())
}
