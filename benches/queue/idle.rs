//! What the server hears from threads that wait for messages that do not come.

use std::thread;
use std::time::Duration;

use pushpop_measure::{Line, Result};
use pushpop_pg::ErrorKind;

use crate::Bench;
use crate::ours;

const POPPERS: usize = 64;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for (threads, topics) in [(0, 0), (POPPERS, 1), (POPPERS, POPPERS)] {
        let queries = wait(bench, threads, topics)?;
        let line = Line::new("idle", ours::name(bench.args.keep())).threads(threads);
        bench.report.add(line.with("topics", topics as f64).with("queries_a_minute", queries));
    }
    Ok(())
}

/// Lets threads wait, and returns how many transactions the server commits in a minute. Outside of a
/// caller's transaction that is how many statements it is sent.
fn wait(bench: &mut Bench, threads: usize, topics: usize) -> Result<f64> {
    // By then the server has counted what it took to begin.
    let before = Duration::from_secs(bench.args.pick(2, 12, 12));
    let span = Duration::from_secs(bench.args.pick(2, 30, 120));
    let queue = ours::open(&mut bench.bed, bench.args.keep())?;
    thread::scope(|scope| {
        let poppers: Vec<_> = (0..threads)
            .map(|i| {
                let queue = &queue;
                scope.spawn(move || match queue.pop(&format!("idle {}", i % topics)) {
                    Err(e) if e.kind() == ErrorKind::Closed => Ok(()),
                    Err(e) => Err(e.to_string()),
                    Ok(_) => Err("popped a message that nobody pushed".into()),
                })
            })
            .collect();
        thread::sleep(before);
        let begun = bench.bed.commits();
        thread::sleep(span);
        let ended = bench.bed.commits();
        queue.close();
        poppers.into_iter().try_for_each(|popper| popper.join().map_err(|_| "a popper panicked")?)?;
        Ok((ended? - begun?) * 60.0 / span.as_secs_f64())
    })
}
