//! The queue itself.

use std::time::Duration;

use pushpop_measure::{Bed, Error, Result, Tally, number, payload};
use pushpop_pg::{Lease, Queue};

use crate::life::System;

pub(crate) const SCHEMA: &str = "pushpop_bench";

/// Of two queues that are compared.
pub(crate) const PAIR: [&str; 2] = ["pushpop_bench_0", "pushpop_bench_1"];

/// Longer than any message can be under way: what is not there by then was lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What the queue is called in the results.
pub(crate) fn name(keep: Option<Duration>) -> String {
    match keep {
        None => "ours".to_owned(),
        Some(keep) => format!("ours, keep {}", keep.as_secs_f64()),
    }
}

/// Opens an empty queue.
pub(crate) fn open(bed: &mut Bed, keep: Option<Duration>) -> Result<Queue> {
    open_in(bed, SCHEMA, keep)
}

/// Opens an empty queue beside others.
pub(crate) fn open_in(bed: &mut Bed, schema: &str, keep: Option<Duration>) -> Result<Queue> {
    bed.reset(schema)?;
    join(bed.url(), schema, keep)
}

/// Opens a queue as it is.
pub(crate) fn join(url: &str, schema: &str, keep: Option<Duration>) -> Result<Queue> {
    let mut builder = Queue::builder().schema(schema);
    if let Some(keep) = keep {
        builder = builder.keep_settled(keep);
    }
    Ok(builder.connect(url)?)
}

/// Lives of messages in a number of topics, in calls of one or of many.
pub(crate) struct Ours {
    queue: Queue,
    topics: Vec<String>,
    batch: usize,
}

impl Ours {
    pub(crate) fn open(bed: &mut Bed, keep: Option<Duration>, topics: usize, batch: usize) -> Result<Ours> {
        let topics = (0..topics).map(|i| format!("topic {i}")).collect();
        Ok(Ours { queue: open(bed, keep)?, topics, batch })
    }
}

impl System for Ours {
    fn threads(&self, asked: usize) -> usize {
        asked
    }

    fn live(&self, thread: usize, turn: usize, tally: &mut Tally<'_>) -> Result<u64> {
        let topic = &self.topics[(thread + turn * 61) % self.topics.len()];
        if self.batch == 1 {
            push(&self.queue, topic, tally)?;
            take(&self.queue, topic, tally)?;
        } else {
            push_many(&self.queue, topic, self.batch, tally)?;
            take_many(&self.queue, topic, self.batch, tally)?;
        }
        Ok(self.batch as u64)
    }
}

/// Pushes one.
pub(crate) fn push(queue: &Queue, topic: &str, tally: &mut Tally<'_>) -> Result<()> {
    let number = tally.next();
    queue.push(topic, payload(number))?;
    tally.pushed(number);
    Ok(())
}

/// Pops and completes one that must be there.
pub(crate) fn take(queue: &Queue, topic: &str, tally: &mut Tally<'_>) -> Result<()> {
    let lease = queue.pop_timeout(topic, PATIENCE)?.ok_or_else(|| lost(queue, topic, 1))?;
    complete(lease, tally)
}

/// Completes a lease.
pub(crate) fn complete(lease: Lease, tally: &mut Tally<'_>) -> Result<()> {
    let number = number(lease.payload())?;
    lease.complete()?;
    tally.done(number);
    Ok(())
}

/// Pushes many in one call.
pub(crate) fn push_many(queue: &Queue, topic: &str, count: usize, tally: &mut Tally<'_>) -> Result<()> {
    let numbers = tally.next_many(count);
    queue.push_many(topic, numbers.clone().map(payload))?;
    numbers.for_each(|number| tally.pushed(number));
    Ok(())
}

/// Pops and completes so many, which must be there, in as few calls as it takes.
///
/// Each thread takes as many as it pushed, so what is there is always enough for all.
pub(crate) fn take_many(queue: &Queue, topic: &str, count: usize, tally: &mut Tally<'_>) -> Result<()> {
    let mut missing = count;
    while missing > 0 {
        let leases = queue.pop_many(topic, missing, PATIENCE)?;
        if leases.is_empty() {
            return Err(lost(queue, topic, missing));
        }
        missing -= leases.len();
        complete_many(queue, leases, tally)?;
    }
    Ok(())
}

/// An error for messages that were pushed and cannot be popped, with what the queue says of them.
pub(crate) fn lost(queue: &Queue, topic: &str, count: usize) -> Error {
    match queue.topic(topic).stats() {
        Ok(stats) => {
            let (ready, leased, settled) = (stats.ready(), stats.leased(), stats.settled());
            format!("{count} messages were lost: {ready} are ready, {leased} leased, {settled} settled")
                .into()
        }
        Err(e) => e.into(),
    }
}

/// Completes leases in one call.
pub(crate) fn complete_many(queue: &Queue, leases: Vec<Lease>, tally: &mut Tally<'_>) -> Result<()> {
    let numbers = leases.iter().map(|lease| number(lease.payload())).collect::<Result<Vec<_>>>()?;
    let lost = queue.complete_many(leases)?;
    if !lost.is_empty() {
        return Err(format!("{} leases were lost", lost.len()).into());
    }
    numbers.into_iter().for_each(|number| tally.done(number));
    Ok(())
}
