//! Messages pass, 100 a call, while an old snapshot is held, so that nothing that dies can be
//! cleaned up. Upkeep is what the queue does by itself.

use std::time::{Duration, Instant};

use pushpop_measure::{Bed, Check, Line, Result, Tally, median};
use pushpop_pg::Queue;

use crate::Bench;
use crate::ours;

const BATCH: usize = 100;

/// How many messages give one figure.
const STRETCH: usize = 1_000;

const TOPIC: &str = "snapshot";

/// Messages a second, and the server's CPU for the pop of one, in microseconds.
#[derive(Clone, Copy)]
struct Figure {
    rate: f64,
    pop_cpu: Option<f64>,
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let total = bench.args.pick(30_000, 300_000, 5_000_000);
    // The last hundred thousand messages are compared with those from fifty thousand on.
    let window = (total / 3).min(100_000) / STRETCH;
    let keep = bench.args.keep();
    let queue = ours::open(&mut bench.bed, keep)?;
    let mut holder = bench.bed.client()?;
    holder.batch_execute("begin isolation level repeatable read; select 1 from pg_class limit 1")?;
    let check = Check::new();
    let mut figures = Vec::new();
    let begun = bench.bed.reading()?;
    for _ in 0..total / STRETCH {
        figures.push(stretch(&mut bench.bed, &queue, &mut check.tally())?);
    }
    let spent = bench.bed.since(&begun)?;
    drop((queue, holder));
    let messages = check.finish()?;
    let left = bench.bed.left()?;

    for (i, part) in figures.chunks(window / 2).enumerate() {
        let line = Line::new("snapshot", ours::name(keep)).batch(BATCH);
        let line = Line { msgs_per_s: rate(part), ..line };
        let line = line.with("from", (i * window / 2 * STRETCH) as f64);
        bench.report.add(with_pop_cpu(line, part));
    }
    let early = &figures[window / 2..window * 3 / 2];
    let last = &figures[figures.len() - window..];
    let whole = Line::new("snapshot whole", ours::name(keep))
        .batch(BATCH)
        .spent(messages, &spent)
        .left(messages, &left);
    let ratio = rate(last).zip(rate(early)).map(|(last, early)| last / early);
    let whole = ratio.into_iter().fold(whole, |line, ratio| line.with("last_to_early", ratio));
    let ratio = pop_cpu(last).zip(pop_cpu(early)).map(|(last, early)| last / early);
    bench.report.add(ratio.into_iter().fold(whole, |line, ratio| line.with("pop_cpu_ratio", ratio)));
    Ok(())
}

/// Lets a thousand messages pass.
fn stretch(bed: &mut Bed, queue: &Queue, tally: &mut Tally<'_>) -> Result<Figure> {
    let backends = bed.backends("pushpop")?;
    let mut pop_cpu = Some(Duration::ZERO);
    let begun = Instant::now();
    for _ in 0..STRETCH / BATCH {
        ours::push_many(queue, TOPIC, BATCH, tally)?;
        let before = backends.cpu();
        let leases = queue.pop_many(TOPIC, BATCH, ours::PATIENCE)?;
        let used = backends.cpu().zip(before).map(|(after, before)| after.saturating_sub(before));
        pop_cpu = pop_cpu.zip(used).map(|(sum, used)| sum + used);
        if leases.len() < BATCH {
            return Err(ours::lost(queue, TOPIC, BATCH - leases.len()));
        }
        ours::complete_many(queue, leases, tally)?;
    }
    Ok(Figure {
        rate: STRETCH as f64 / begun.elapsed().as_secs_f64(),
        pop_cpu: pop_cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / STRETCH as f64),
    })
}

fn rate(part: &[Figure]) -> Option<f64> {
    median(part.iter().map(|figure| figure.rate).collect())
}

fn pop_cpu(part: &[Figure]) -> Option<f64> {
    median(part.iter().filter_map(|figure| figure.pop_cpu).collect())
}

fn with_pop_cpu(line: Line, part: &[Figure]) -> Line {
    match pop_cpu(part) {
        Some(cpu) => line.with("pop_cpu_us", cpu),
        None => line,
    }
}
