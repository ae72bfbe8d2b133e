//! Many messages a call: whole lives, and the drain of a queue that was filled before.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pushpop_measure::{Bed, Check, Histogram, Line, Result, Tally, rounds, together};

use crate::Bench;
use crate::contender::Contender;
use crate::floor::Floor;
use crate::life::System;
use crate::ours;

const TOPIC: &str = "bulk";

/// How many threads drain.
const DRAINERS: usize = 8;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for (threads, batch) in [(1, 100), (1, 1_000), (8, 100), (8, 1_000)] {
        bench.compare_lives(&Line::new("bulk", "").threads(threads).batch(batch), 1)?;
    }
    for batch in [100, 1_000] {
        drain(bench, batch)?;
    }
    Ok(())
}

/// A queue is filled, and then emptied by eight threads: a pop and a settle for each batch.
fn drain(bench: &mut Bench, batch: usize) -> Result<()> {
    let calls = bench.args.pick(5_000, 80_000, 200_000) / batch;
    let contenders = bench.contenders();
    let lines = rounds(bench.args.rounds(), &contenders, |contender| {
        let bed = &mut bench.bed;
        let check = Check::new();
        let line = Line::new("drain", contender.name()).batch(batch);
        match contender {
            Contender::Floor => {
                let floor = Floor::open(bed, DRAINERS, batch)?;
                let threads = floor.threads(DRAINERS);
                let (_, ids) = together(threads, |thread| {
                    let mut tally = check.tally();
                    let share = (thread..calls).step_by(threads);
                    floor.with(thread, |c| {
                        share.map(|_| c.push_many(batch, &mut tally)).collect::<Result<Vec<_>>>()
                    })
                })?;
                let ids = ids.concat();
                empty(bed, line.threads(threads), calls, check, floor, |floor, thread, call, tally| {
                    floor.with(thread, |c| c.take_many(&ids[call], tally))
                })
            }
            Contender::Ours(keep) | Contender::Bulk(keep) => {
                let queue = ours::open(bed, *keep)?;
                together(DRAINERS, |thread| {
                    let mut tally = check.tally();
                    let mut share = (thread..calls).step_by(DRAINERS);
                    share.try_for_each(|_| ours::push_many(&queue, TOPIC, batch, &mut tally))
                })?;
                empty(bed, line.threads(DRAINERS), calls, check, queue, |queue, _, _, tally| {
                    ours::take_many(queue, TOPIC, batch, tally)
                })
            }
        }
    })?;
    bench.report.extend(lines);
    Ok(())
}

/// Lets threads take so many batches, measures that, and checks that no message was lost or doubled.
fn empty<S: Sync>(
    bed: &mut Bed,
    line: Line,
    calls: usize,
    check: Check,
    system: S,
    take: impl Fn(&S, usize, usize, &mut Tally<'_>) -> Result<()> + Sync,
) -> Result<Line> {
    let next = AtomicUsize::new(0);
    let begun = bed.reading()?;
    let (_, parts) = together(line.threads, |thread| {
        let mut tally = check.tally();
        let mut times = Histogram::new();
        loop {
            let call = next.fetch_add(1, Ordering::Relaxed);
            if call >= calls {
                return Ok(times);
            }
            let begun = Instant::now();
            take(&system, thread, call, &mut tally)?;
            times.record(begun.elapsed());
        }
    })?;
    let spent = bed.since(&begun)?;
    drop(system);
    let messages = check.finish()?;
    Ok(line.spent(messages, &spent).left(messages, &bed.left()?).times(&Histogram::of(&parts)))
}
