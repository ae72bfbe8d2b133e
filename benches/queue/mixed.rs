//! Producers and consumers at a steady rate: how long from the push to the pop, and to the end.
//!
//! Each push has a time at which it is due. Its message's times begin there, even if the push itself
//! came late: a queue that stalls cannot make its figures better by letting fewer messages come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_measure::{Check, Histogram, Line, Result, number, payload, together};
use pushpop_pg::Queue;

use crate::Bench;
use crate::life::measure;
use crate::ours::{self, Ours};

const TOPIC: &str = "mixed";

/// How long a consumer waits before it looks whether all is done.
const PAUSE: Duration = Duration::from_millis(100);

/// The pushes of one run: each has a number, and is due at a time that follows from it.
struct Plan {
    producers: usize,
    consumers: usize,
    rate: f64,
    messages: u64,
}

/// The times of one run.
struct Times {
    to_pop: Histogram,
    to_done: Histogram,
    /// When the last message was done.
    ended: Instant,
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let keep = bench.args.keep();
    for each in [4, 32] {
        let rate = match bench.args.rate {
            Some(rate) => rate,
            None => half_of_single(bench, keep, each)?,
        };
        let mut to_pop = Vec::new();
        let mut to_done = Vec::new();
        for _ in 0..bench.args.rounds() {
            let messages = (rate * bench.args.pick(1.0, 5.0, 20.0)) as u64;
            let plan = Plan { producers: each, consumers: each, rate, messages };
            let (line, times) = plan.measure(bench, keep)?;
            to_pop.push(Line { workload: "mixed push to pop".into(), ..line.clone() }.times(&times.to_pop));
            to_done.push(Line { workload: "mixed push to done".into(), ..line }.times(&times.to_done));
        }
        bench.report.extend(Line::median(&to_pop));
        bench.report.extend(Line::median(&to_done));
    }
    Ok(())
}

/// Half of what `single` reaches with so many threads.
fn half_of_single(bench: &mut Bench, keep: Option<Duration>, threads: usize) -> Result<f64> {
    let ours = Ours::open(&mut bench.bed, keep, 1, 1)?;
    let line = Line::new("single", ours::name(keep)).threads(threads);
    let line = measure(&mut bench.bed, line, bench.args.time(), ours)?;
    line.msgs_per_s.map(|rate| rate / 2.0).ok_or_else(|| "nothing was measured".into())
}

impl Plan {
    fn measure(&self, bench: &mut Bench, keep: Option<Duration>) -> Result<(Line, Times)> {
        let bed = &mut bench.bed;
        let queue = ours::open(bed, keep)?;
        let check = Check::new();
        // Connections are made, and whatever is done once.
        let mut tally = check.tally();
        tally.next_many(usize::try_from(self.messages)?);
        ours::push(&queue, TOPIC, &mut tally)?;
        ours::take(&queue, TOPIC, &mut tally)?;
        drop(tally);

        let begun = bed.reading()?;
        // A little later, when all threads are there.
        let start = Instant::now() + Duration::from_millis(50);
        let done = AtomicU64::new(0);
        let (_, parts) = together(self.producers + self.consumers, |thread| {
            if thread < self.producers {
                self.produce(&queue, thread, start, &check)?;
                Ok(None)
            } else {
                self.consume(&queue, start, &done, &check).map(Some)
            }
        })?;
        let spent = bed.since(&begun)?;
        drop(queue);
        let passed = check.finish()?;
        let ended = parts.iter().flatten().map(|times| times.ended).max().unwrap_or(start);
        let times = Times {
            ended,
            to_pop: Histogram::of(parts.iter().flatten().map(|times| &times.to_pop)),
            to_done: Histogram::of(parts.iter().flatten().map(|times| &times.to_done)),
        };
        let rate = self.messages as f64 / (ended - start).as_secs_f64();
        let line = Line::new("mixed", ours::name(keep))
            .threads(self.producers + self.consumers)
            .spent(self.messages, &spent)
            .left(passed, &bed.left()?)
            .with("asked_per_s", self.rate);
        Ok((Line { msgs_per_s: Some(rate), ..line }, times))
    }

    fn due(&self, start: Instant, number: u64) -> Instant {
        start + Duration::from_secs_f64(number as f64 / self.rate)
    }

    fn produce(&self, queue: &Queue, thread: usize, start: Instant, check: &Check) -> Result<()> {
        let mut tally = check.tally();
        for number in (thread as u64..self.messages).step_by(self.producers) {
            thread::sleep(self.due(start, number).saturating_duration_since(Instant::now()));
            queue.push(TOPIC, payload(number))?;
            tally.pushed(number);
        }
        Ok(())
    }

    fn consume(&self, queue: &Queue, start: Instant, done: &AtomicU64, check: &Check) -> Result<Times> {
        let mut times = Times { to_pop: Histogram::new(), to_done: Histogram::new(), ended: start };
        let mut tally = check.tally();
        let last = self.due(start, self.messages) + ours::PATIENCE;
        while done.load(Ordering::Relaxed) < self.messages && Instant::now() < last {
            let Some(lease) = queue.pop_timeout(TOPIC, PAUSE)? else { continue };
            let due = self.due(start, number(lease.payload())?);
            times.to_pop.record(due.elapsed());
            ours::complete(lease, &mut tally)?;
            times.ended = Instant::now();
            times.to_done.record(times.ended.saturating_duration_since(due));
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(times)
    }
}
