//! A pop of one from two queues in turn, of which one holds few messages and the other many.

use std::time::Instant;

use pushpop_measure::{Check, Histogram, Line, Result, Tally, median, together};
use pushpop_pg::{Lease, Queue};

use crate::Bench;
use crate::ours;

/// So many pops of each queue take turns.
const BLOCK: usize = 50;

const TOPIC: &str = "beside";

/// How many threads fill and empty a queue.
const THREADS: usize = 4;

/// What a queue is made to hold: the leases of those messages that are in flight.
pub(crate) type Prepare = fn(&Queue, usize, &Check) -> Result<Vec<Lease>>;

struct Side {
    queue: Queue,
    size: usize,
    held: Vec<Lease>,
    times: Histogram,
}

/// Reports the times of a pop beside so many messages, and the ratio of the second to the first.
pub(crate) fn compare(
    bench: &mut Bench,
    workload: &str,
    what: &str,
    sizes: [usize; 2],
    prepare: Prepare,
) -> Result<()> {
    let keep = bench.args.keep();
    let check = Check::new();
    let mut sides = Vec::new();
    for (schema, size) in ours::PAIR.into_iter().zip(sizes) {
        let queue = ours::open_in(&mut bench.bed, schema, keep)?;
        let held = prepare(&queue, size, &check)?;
        sides.push(Side { queue, size, held, times: Histogram::new() });
    }
    let mut of_each = vec![Vec::new(); sides.len()];
    let mut ratios = Vec::new();
    let blocks = bench.args.pick(4, 10, 20);
    for _ in 0..bench.args.rounds() {
        let mut tally = check.tally();
        for block in 0..=blocks {
            for side in &mut sides {
                side.pop(&mut tally)?;
                if block == 0 {
                    // That was to warm up.
                    side.times = Histogram::new();
                }
            }
        }
        let lines = sides.iter().map(|side| {
            Line::new(workload, ours::name(keep)).times(&side.times).with(what, side.size as f64)
        });
        of_each.iter_mut().zip(lines).for_each(|(all, line)| all.push(line));
        ratios.extend(sides[1].times.p50_us().zip(sides[0].times.p50_us()).map(|(many, few)| many / few));
    }
    for side in sides {
        side.finish(&check)?;
    }
    check.finish()?;
    let mut lines: Vec<Line> = of_each.iter().filter_map(|lines| Line::median(lines)).collect();
    if let (Some(line), Some(ratio)) = (lines.last_mut(), median(ratios)) {
        line.more.push(("p50_ratio".into(), ratio));
    }
    bench.report.extend(lines);
    Ok(())
}

/// Pushes so many.
pub(crate) fn fill(queue: &Queue, size: usize, check: &Check) -> Result<()> {
    together(THREADS, |thread| {
        let mut tally = check.tally();
        parts(size, thread).try_for_each(|part| ours::push_many(queue, TOPIC, part, &mut tally))
    })?;
    Ok(())
}

/// Pops so many, each by a call of its own.
pub(crate) fn hold(queue: &Queue, size: usize) -> Result<Vec<Lease>> {
    (0..size).map(|_| queue.try_pop(TOPIC)?.ok_or_else(|| ours::lost(queue, TOPIC, 1))).collect()
}

/// Pops and completes so many.
fn drain(queue: &Queue, size: usize, check: &Check) -> Result<()> {
    together(THREADS, |thread| {
        let mut tally = check.tally();
        parts(size, thread).try_for_each(|part| ours::take_many(queue, TOPIC, part, &mut tally))
    })?;
    Ok(())
}

/// One thread's share, in parts of at most a thousand.
fn parts(size: usize, thread: usize) -> impl Iterator<Item = usize> {
    let parts = size.div_ceil(1_000);
    (thread..parts).step_by(THREADS).map(move |i| (size - i * 1_000).min(1_000))
}

impl Side {
    /// Pops messages, one by one, and puts another in place of each.
    fn pop(&mut self, tally: &mut Tally<'_>) -> Result<()> {
        for _ in 0..BLOCK {
            ours::push(&self.queue, TOPIC, tally)?;
            let begun = Instant::now();
            let lease = self.queue.try_pop(TOPIC)?.ok_or_else(|| ours::lost(&self.queue, TOPIC, 1))?;
            self.times.record(begun.elapsed());
            ours::complete(lease, tally)?;
        }
        Ok(())
    }

    fn finish(mut self, check: &Check) -> Result<()> {
        let in_flight = self.held.len();
        let mut tally = check.tally();
        while !self.held.is_empty() {
            let rest = self.held.split_off(self.held.len().min(1_000));
            ours::complete_many(&self.queue, std::mem::replace(&mut self.held, rest), &mut tally)?;
        }
        drain(&self.queue, self.size - in_flight, check)
    }
}
