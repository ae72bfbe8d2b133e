//! Whole lives of messages, by any number of threads, for as long as the time lasts.

use std::time::{Duration, Instant};

use pushpop_measure::{Bed, Check, Histogram, Line, Result, Tally, together};

/// Something that can push, pop and settle.
pub(crate) trait System: Sync {
    /// How many threads of so many it lets work at the same time.
    fn threads(&self, asked: usize) -> usize;

    /// Pushes, pops and settles as many messages as one call has, and returns how many that are.
    fn live(&self, thread: usize, turn: usize, tally: &mut Tally<'_>) -> Result<u64>;
}

/// Warms the system up, measures it, and checks that no message was lost or doubled.
///
/// The times are those of whole lives.
pub(crate) fn measure(bed: &mut Bed, line: Line, time: Duration, system: impl System) -> Result<Line> {
    let check = Check::new();
    let threads = system.threads(line.threads);
    pass(&system, threads, time / 10, &check)?;
    let begun = bed.reading()?;
    let parts = pass(&system, threads, time, &check)?;
    let spent = bed.since(&begun)?;
    drop(system);
    let passed = check.finish()?;
    let measured = parts.iter().map(|(messages, _)| messages).sum();
    let times = Histogram::of(parts.iter().map(|(_, times)| times));
    Ok(line.threads(threads).spent(measured, &spent).left(passed, &bed.left()?).times(&times))
}

fn pass(
    system: &impl System,
    threads: usize,
    time: Duration,
    check: &Check,
) -> Result<Vec<(u64, Histogram)>> {
    let (_, parts) = together(threads, |thread| {
        let mut tally = check.tally();
        let mut times = Histogram::new();
        let mut messages = 0;
        let until = Instant::now() + time;
        for turn in 0.. {
            let begun = Instant::now();
            if begun >= until {
                break;
            }
            messages += system.live(thread, turn, &mut tally)?;
            times.record(begun.elapsed());
        }
        Ok((messages, times))
    })?;
    Ok(parts)
}
