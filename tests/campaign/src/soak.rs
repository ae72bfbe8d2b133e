//! Does anything grow? One process of producers and consumers, for long: `soak` at half of the speed that it can reach, and
//! `bloat` under a snapshot that somebody holds, so that no deleted row can be removed, first slowly and then at
//! full speed.
//!
//! There are no faults here, and the account is simple: what was completed is what was pushed, each message once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, iter};

use pushpop_pg::postgres::{Client, NoTls};
use pushpop_pg::{BoxError, Queue};
use pushpop_server::Server;

use crate::args::Args;
use crate::chance::Chance;

const TOPIC: &str = "soak";

/// Threads that push, and as many that pop and complete.
const EACH: u64 = 8;

/// How many messages may wait when nothing limits the rate.
const AHEAD: u64 = 2_000;

/// How long completed messages are kept: much shorter than a run, so that as many are deleted as are pushed.
const KEEP: Duration = Duration::from_secs(60);

/// Nor do leases last for a whole run: what was leased at its beginning would have come to its end.
const LEASE: Duration = Duration::from_secs(60);

/// Parts of a run that are compared.
const QUARTERS: usize = 4;

/// What is there at a moment, and what was done since the last one.
#[derive(Clone, Copy, Debug)]
struct Sample {
    files: u64,
    threads: u64,
    memory_mb: f64,
    connections: u64,
    tables_mb: f64,
    waiting: u64,
    rate: f64,
    /// Milliseconds from the time at which a push was due to the end of its message: the median, and 99 of 100.
    p50: f64,
    p99: f64,
}

/// Half an hour at half of the top speed.
pub(crate) fn soak(args: &Args) -> Result<bool, BoxError> {
    let (server, queue) = start()?;
    let minutes = args.number("minutes", 30.0)?;
    let top = Load::new(&queue, None).run(&server, Duration::from_secs(10).min(minute(minutes)))?;
    let rate = args.number("rate", median(top.iter().map(|s| s.rate)) / 2.0)?;
    println!("soak: {minutes} minutes at {rate:.0} messages a second, half of the top speed");
    let samples = Load::new(&queue, Some(rate)).run(&server, minute(minutes))?;
    Ok(is_flat(&samples, rate))
}

/// Five minutes of a snapshot at 500 messages a second, and five at full speed.
pub(crate) fn bloat(args: &Args) -> Result<bool, BoxError> {
    let (server, queue) = start()?;
    let minutes = args.number("minutes", 5.0)?;
    let rate = args.number("rate", 500.0)?;
    let mut fine = true;
    for rate in [Some(rate), None] {
        let mut holder = Client::connect(&server.url(), NoTls)?;
        holder.batch_execute(
            "begin isolation level repeatable read; select from pg_catalog.pg_class limit 1",
        )?;
        let speed = rate.map_or_else(|| "full speed".to_owned(), |rate| format!("{rate} messages a second"));
        println!("bloat: {minutes} minutes at {speed} under a held snapshot");
        let samples = Load::new(&queue, rate).run(&server, minute(minutes))?;
        holder.batch_execute("commit")?;
        let [first, .., last] = quarters(&samples);
        // Generously: how flat it is, is for the benchmarks to say.
        let figure = match rate {
            Some(_) => median(last.iter().map(|s| s.p50)) / median(first.iter().map(|s| s.p50)).max(5.0),
            None => median(first.iter().map(|s| s.rate)) / median(last.iter().map(|s| s.rate)).max(1.0),
        };
        println!("bloat: the last quarter took {figure:.2} times as long as the first");
        fine &= figure < 2.0;
    }
    Ok(fine)
}

fn minute(minutes: f64) -> Duration {
    Duration::from_secs_f64(minutes.max(0.1) * 60.0)
}

fn start() -> Result<(Server, Queue), BoxError> {
    let server = Server::start()?;
    let queue =
        Queue::builder().application_name(TOPIC).keep_settled(KEEP).lease(LEASE).connect(&server.url())?;
    Ok((server, queue))
}

/// Messages by number and in all, told by a sum in which each has its own share.
#[derive(Default)]
struct Account {
    count: AtomicU64,
    sum: AtomicU64,
}

impl Account {
    fn note(&self, number: u64) {
        self.sum.fetch_add(Chance::new(number).next(), Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

struct Load<'a> {
    queue: &'a Queue,
    rate: Option<f64>,
    begun: Instant,
    pushed: Account,
    done: Account,
    times: Mutex<Vec<f64>>,
    ends: AtomicBool,
    failed: Mutex<Option<BoxError>>,
}

impl<'a> Load<'a> {
    fn new(queue: &'a Queue, rate: Option<f64>) -> Self {
        Load {
            queue,
            rate,
            begun: Instant::now(),
            pushed: Account::default(),
            done: Account::default(),
            times: Mutex::default(),
            ends: AtomicBool::new(false),
            failed: Mutex::default(),
        }
    }

    /// Runs for so long, and until all is done.
    fn run(&self, server: &Server, time: Duration) -> Result<Vec<Sample>, BoxError> {
        let mut client = Client::connect(&server.url(), NoTls)?;
        let pause = (time / 24).min(Duration::from_secs(10));
        let mut samples = Vec::new();
        thread::scope(|scope| {
            for producer in 0..EACH {
                scope.spawn(move || self.keep(self.produce(producer)));
                scope.spawn(move || self.keep(self.consume()));
            }
            let mut last = (Instant::now(), 0);
            while self.begun.elapsed() < time && !self.ends.load(Ordering::Relaxed) {
                thread::sleep(pause);
                match self.sample(&mut client, &mut last) {
                    Ok(sample) => {
                        samples.push(sample);
                        if samples.len() % 6 == 0 {
                            println!("{:.0?} {sample:.1?}", self.begun.elapsed());
                        }
                    }
                    Err(e) => self.keep(Err(e)),
                }
            }
            self.ends.store(true, Ordering::Relaxed);
        });
        if let Some(e) = self.failed.lock().map_err(|_| "a thread panicked")?.take() {
            return Err(e);
        }
        let [pushed, done] = [&self.pushed, &self.done].map(|a| (a.count(), a.sum.load(Ordering::Relaxed)));
        if pushed != done {
            return Err(format!("pushed {}, completed {}: not the same messages", pushed.0, done.0).into());
        }
        println!("{} messages, each completed once", done.0);
        Ok(samples)
    }

    /// Ends the run with the first error.
    fn keep(&self, result: Result<(), BoxError>) {
        if let (Err(e), Ok(mut failed)) = (result, self.failed.lock()) {
            failed.get_or_insert(e);
            self.ends.store(true, Ordering::Relaxed);
        }
    }

    fn produce(&self, producer: u64) -> Result<(), BoxError> {
        for number in (producer..).step_by(usize::try_from(EACH)?) {
            let due = match self.rate {
                Some(rate) => Duration::from_secs_f64(number as f64 / rate),
                None => self.begun.elapsed(),
            };
            thread::sleep(due.saturating_sub(self.begun.elapsed()));
            while self.rate.is_none() && self.pushed.count().saturating_sub(self.done.count()) > AHEAD {
                thread::sleep(Duration::from_millis(1));
            }
            if self.ends.load(Ordering::Relaxed) {
                return Ok(());
            }
            let mut payload = [0; 64];
            payload[..8].copy_from_slice(&number.to_le_bytes());
            payload[8..16].copy_from_slice(&u64::try_from(due.as_micros())?.to_le_bytes());
            self.queue.push(TOPIC, payload)?;
            self.pushed.note(number);
        }
        Ok(())
    }

    fn consume(&self) -> Result<(), BoxError> {
        let word = |payload: &[u8], at: usize| -> Result<u64, BoxError> {
            Ok(u64::from_le_bytes(payload.get(at..at + 8).ok_or("a short payload")?.try_into()?))
        };
        loop {
            let ends = self.ends.load(Ordering::Relaxed);
            let Some(lease) = self.queue.pop_timeout(TOPIC, Duration::from_millis(500))? else {
                // Nothing came since the last push, if that was the last.
                if ends && self.pushed.count() <= self.done.count() {
                    return Ok(());
                }
                continue;
            };
            let (number, due) = (word(lease.payload(), 0)?, word(lease.payload(), 8)?);
            lease.complete()?;
            self.done.note(number);
            let late = self.begun.elapsed().saturating_sub(Duration::from_micros(due));
            self.times.lock().map_err(|_| "a thread panicked")?.push(late.as_secs_f64() * 1e3);
        }
    }

    fn sample(&self, client: &mut Client, last: &mut (Instant, u64)) -> Result<Sample, BoxError> {
        let mut times = std::mem::take(&mut *self.times.lock().map_err(|_| "a thread panicked")?);
        times.sort_by(f64::total_cmp);
        let quantile = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or(0.0);
        let entries = |dir| Ok::<u64, BoxError>(u64::try_from(fs::read_dir(dir)?.count())?);
        let status = fs::read_to_string("/proc/self/status")?;
        let kilobytes =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let row = client.query_one(
            "select (select pg_catalog.count(*) from pg_catalog.pg_stat_activity where application_name = $1),
                    (select pg_catalog.sum(pg_catalog.pg_total_relation_size(c.oid))::float8
                     from pg_catalog.pg_class c where c.relnamespace = 'pushpop'::regnamespace and c.relkind = 'r')",
            &[&TOPIC],
        )?;
        let done = self.done.count();
        let (since, before) = std::mem::replace(last, (Instant::now(), done));
        Ok(Sample {
            files: entries("/proc/self/fd")?,
            threads: entries("/proc/self/task")?,
            memory_mb: kilobytes.ok_or("no memory is told")?.parse::<f64>()? / 1e3,
            connections: u64::try_from(row.get::<_, i64>(0))?,
            tables_mb: row.get::<_, f64>(1) / 1e6,
            waiting: self.pushed.count().saturating_sub(done),
            rate: (done - before) as f64 / since.elapsed().as_secs_f64(),
            p50: quantile(0.5),
            p99: quantile(0.99),
        })
    }
}

fn quarters(samples: &[Sample]) -> [&[Sample]; QUARTERS] {
    std::array::from_fn(|i| &samples[samples.len() * i / QUARTERS..samples.len() * (i + 1) / QUARTERS])
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

/// Compares the last quarter with the second: in the first, caches fill and the history comes to its length.
fn is_flat(samples: &[Sample], rate: f64) -> bool {
    let [_, early, _, late] = quarters(samples);
    let most = |part: &[Sample], figure: fn(&Sample) -> f64| part.iter().map(figure).fold(0.0, f64::max);
    type Row = (&'static str, fn(&Sample) -> f64, f64, f64);
    let rows: [Row; 5] = [
        ("files", |s| s.files as f64, 1.0, 2.0),
        ("threads", |s| s.threads as f64, 1.0, 2.0),
        ("connections", |s| s.connections as f64, 1.0, 1.0),
        ("memory, MB", |s| s.memory_mb, 1.1, 8.0),
        ("tables, MB", |s| s.tables_mb, 1.2, 16.0),
    ];
    let mut flat = true;
    for (name, figure, times, more) in rows {
        let (before, after) = (most(early, figure), most(late, figure));
        let grows = after > before * times + more;
        println!("{name}: at most {before:.1}, then {after:.1}{}", if grows { ": GROWS" } else { "" });
        flat &= !grows;
    }
    let waiting = most(late, |s| s.waiting as f64);
    let behind = waiting > rate * 5.0;
    println!("waiting: at most {waiting}{}", if behind { ": IT DOES NOT KEEP UP" } else { "" });
    for (name, part) in iter::zip(["second", "last"], [early, late]) {
        let [rate, p50, p99] = [|s: &Sample| s.rate, |s: &Sample| s.p50, |s: &Sample| s.p99]
            .map(|figure| median(part.iter().map(figure)));
        println!("{name} quarter: {rate:.0} a second, p50 {p50:.1} ms, p99 {p99:.1} ms");
    }
    flat && !behind
}
