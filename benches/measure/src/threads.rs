//! Threads that begin together.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// Runs `work` on so many threads, each with its number, and returns the time from their common
/// start to the end of the last one, and what they returned. An error of one is returned when all
/// have ended.
pub fn together<T: Send>(
    threads: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<(Duration, Vec<T>)> {
    let start = Barrier::new(threads + 1);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|i| {
                let (start, work) = (&start, &work);
                scope.spawn(move || {
                    start.wait();
                    work(i)
                })
            })
            .collect();
        start.wait();
        let begun = Instant::now();
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        let took = begun.elapsed();
        let results = ended.into_iter().map(|end| end.map_err(|_| "a thread panicked")?);
        Ok((took, results.collect::<Result<_>>()?))
    })
}
