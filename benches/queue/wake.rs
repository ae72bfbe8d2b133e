//! Messages for threads of another process: how long until one that waits has its message, and what
//! those that wait cost those that push.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_measure::{Check, Histogram, Line, Result, Tally, payload, rounds, together};
use pushpop_pg::Queue;

use crate::Bench;
use crate::listeners::{Listeners, now};
use crate::ours;

const QUIET: &str = "quiet";
const BUSY: &str = "busy";

const PUSHERS: usize = 8;
const LISTENERS: usize = 64;

/// A wake-up that took longer is late: the notification was not what woke the thread, or was slow.
const LATE: Duration = Duration::from_millis(100);

/// Who waits while others push.
#[derive(Clone, Copy, PartialEq)]
enum Waiting {
    Nobody,
    Elsewhere,
    Here,
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let lines = rounds(bench.args.rounds(), &[0, PUSHERS], |pushers| wake(bench, *pushers))?;
    bench.report.extend(lines);

    let who = [Waiting::Nobody, Waiting::Elsewhere, Waiting::Here];
    let mut lines = rounds(bench.args.rounds(), &who, |waiting| push(bench, *waiting))?;
    let alone = lines[0].msgs_per_s;
    for line in &mut lines {
        let ratio = line.msgs_per_s.zip(alone).map(|(rate, alone)| rate / alone);
        line.more.extend(ratio.map(|ratio| ("ratio_to_nobody".to_owned(), ratio)));
    }
    bench.report.extend(lines);
    Ok(())
}

/// One thread of the other process waits, and gets one message after another, while so many threads
/// push to another topic.
fn wake(bench: &mut Bench, pushers: usize) -> Result<Line> {
    let times = bench.args.pick(10, 100, 400);
    let keep = bench.args.keep();
    let queue = ours::open(&mut bench.bed, keep)?;
    let listeners = Listeners::start(&bench.bed, keep, QUIET, 1, false)?;
    let check = Check::new();
    let stop = AtomicBool::new(false);
    let sent = thread::scope(|scope| -> Result<_> {
        let noise = scope.spawn(|| {
            together(pushers, |_| {
                let mut tally = check.tally();
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    ours::push(&queue, BUSY, &mut tally)?;
                    count += 1;
                }
                Ok(count)
            })
        });
        let sent = send(&queue, times, &mut check.tally());
        stop.store(true, Ordering::Relaxed);
        let (_, counts) = noise.join().map_err(|_| "the pushers panicked")??;
        drain(&queue, BUSY, counts.iter().sum(), &mut check.tally())?;
        sent
    })?;
    // The last one has its time to come.
    thread::sleep(2 * LATE);
    let heard = listeners.finish()?;
    drop(queue);

    let mut tally = check.tally();
    let mut delays = Histogram::new();
    let mut late = 0;
    for (number, at) in heard {
        tally.done(number);
        let delay = at.saturating_sub(*sent.get(&number).ok_or("a message came that nobody pushed")?);
        delays.record(delay);
        late += u32::from(delay > LATE);
    }
    drop(tally);
    check.finish()?;
    Ok(Line::new("wake", ours::name(keep))
        .times(&delays)
        .with("pushers", pushers as f64)
        .with("wakes", f64::from(times))
        .with("late", f64::from(late))
        .with("max_us", delays.max_us().unwrap_or_default()))
}

/// Pushes messages, each when the one before must long have come, and returns when it did.
fn send(queue: &Queue, times: u32, tally: &mut Tally<'_>) -> Result<HashMap<u64, Duration>> {
    let mut sent = HashMap::new();
    for i in 0..times {
        // Not in step with anything that the server or the queue does at regular times.
        thread::sleep(Duration::from_millis(u64::from(40 + i * 7 % 23)));
        let number = tally.next();
        sent.insert(number, now());
        queue.push(QUIET, payload(number))?;
        tally.pushed(number);
    }
    Ok(sent)
}

/// Eight threads push, while threads of another process wait, or not.
fn push(bench: &mut Bench, waiting: Waiting) -> Result<Line> {
    let time = bench.args.time();
    let keep = bench.args.keep();
    let queue = ours::open(&mut bench.bed, keep)?;
    let listeners = match waiting {
        Waiting::Nobody => None,
        Waiting::Elsewhere => Some(Listeners::start(&bench.bed, keep, QUIET, LISTENERS, true)?),
        Waiting::Here => Some(Listeners::start(&bench.bed, keep, BUSY, LISTENERS, false)?),
    };
    let check = Check::new();
    let (took, parts) = together(PUSHERS, |_| {
        let mut tally = check.tally();
        let mut times = Histogram::new();
        let until = Instant::now() + time;
        while Instant::now() < until {
            let begun = Instant::now();
            ours::push(&queue, BUSY, &mut tally)?;
            times.record(begun.elapsed());
        }
        Ok(times)
    })?;
    let ended = now();
    let times = Histogram::of(&parts);
    let pushed = times.count() as usize;
    if waiting == Waiting::Here {
        until_empty(&queue)?;
    }
    let heard = listeners.map_or(Ok(Vec::new()), Listeners::finish)?;
    let mut tally = check.tally();
    heard.iter().for_each(|(number, _)| tally.done(*number));
    drain(&queue, BUSY, pushed - heard.len(), &mut tally)?;
    drop(tally);
    check.finish()?;
    let meanwhile = heard.iter().filter(|(_, at)| *at < ended).count();
    let line = Line::new("push", ours::name(keep)).threads(PUSHERS).times(&times);
    Ok(Line { msgs_per_s: Some(pushed as f64 / took.as_secs_f64()), ..line }
        .with("listeners", if waiting == Waiting::Nobody { 0.0 } else { LISTENERS as f64 })
        .with("on_its_topic", f64::from(waiting == Waiting::Here))
        .with("popped_per_s", meanwhile as f64 / took.as_secs_f64()))
}

/// Waits until others have completed all messages. A process that ends with one on its way to it
/// would leave it leased.
fn until_empty(queue: &Queue) -> Result<()> {
    let deadline = Instant::now() + ours::PATIENCE;
    loop {
        let stats = queue.topic(BUSY).stats()?;
        if stats.ready() + stats.leased() == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(ours::lost(queue, BUSY, 1));
        }
        thread::sleep(LATE);
    }
}

/// Pops and completes what is left.
fn drain(queue: &Queue, topic: &str, mut count: usize, tally: &mut Tally<'_>) -> Result<()> {
    while count > 0 {
        let part = count.min(1_000);
        ours::take_many(queue, topic, part, tally)?;
        count -= part;
    }
    Ok(())
}
