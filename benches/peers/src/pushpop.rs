//! pushpop-pg itself.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use pushpop_measure::{Result, Tally, together};
use pushpop_pg::{Builder, Error, Lease, Outcome, Queue, Worker};

use crate::message::Message;
use crate::system::{Peer, System};
use crate::work::{PATIENCE, Work, starved};

/// With its defaults: the one that the others are compared with.
pub(crate) const NAME: &str = "pushpop-pg";

const TOPIC: &str = "peers";

/// One queue, shared by all threads, with the defaults: 4 connections, and settled messages kept for an hour.
pub(crate) struct Pushpop {
    /// One message a call, or as many as the work says.
    pub(crate) many: bool,
    pub(crate) history: bool,
    /// Its worker pops and settles, as the worker of a framework does.
    pub(crate) worker: bool,
}

impl Pushpop {
    fn builder(&self) -> Builder {
        let builder = Queue::builder();
        if self.history { builder } else { builder.keep_settled(Duration::ZERO) }
    }
}

impl Peer for Pushpop {
    fn name(&self) -> &'static str {
        match (self.worker, self.history) {
            (true, _) => "pushpop-pg, worker",
            (false, true) => NAME,
            (false, false) => "pushpop-pg, no history",
        }
    }

    fn schema(&self) -> &'static str {
        "pushpop"
    }

    fn install(&self, url: &str) -> Result<()> {
        self.builder().connect(url)?;
        Ok(())
    }

    fn open(&self, url: &str, _threads: usize) -> Result<Box<dyn System>> {
        let queue = self.builder().migrate(false).connect(url)?;
        Ok(Box::new(Open { queue, many: self.many, worker: self.worker }))
    }
}

struct Open {
    queue: Queue,
    many: bool,
    worker: bool,
}

impl System for Open {
    fn push(&self, work: &Arc<Work>, threads: usize) -> Result<()> {
        together(threads, |_| {
            let mut tally = work.tally();
            while let Some(numbers) = work.next_push() {
                self.push_some(numbers, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    fn drain(&self, work: &Arc<Work>, threads: usize, up: Sender<()>) -> Result<Instant> {
        work.begin();
        let _ = up.send(());
        if self.worker {
            return self.handle_all(work, threads);
        }
        together(threads, |_| {
            let mut tally = work.tally();
            while let Some(share) = work.next_share() {
                self.work_some(share, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(Instant::now())
    }

    fn in_turn(&self, work: &Arc<Work>, threads: usize) -> Result<bool> {
        if self.worker {
            return Ok(false);
        }
        together(threads, |_| {
            let mut tally = work.tally();
            while let Some(numbers) = work.next_push() {
                let share = numbers.clone().count();
                self.push_some(numbers, &mut tally)?;
                self.work_some(share, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(true)
    }

    fn unsettled(&mut self) -> Result<u64> {
        let stats = self.queue.topic(TOPIC).stats()?;
        Ok(stats.ready() + stats.delayed() + stats.leased() + stats.dead())
    }
}

impl Open {
    fn push_some(&self, numbers: Range<u64>, tally: &mut Tally<'_>) -> Result<()> {
        let messages: Vec<_> = numbers.clone().map(|n| Message::new(n).bytes()).collect::<Result<_>>()?;
        if self.many {
            self.queue.push_many(TOPIC, messages)?;
        } else {
            for message in messages {
                self.queue.push(TOPIC, message)?;
            }
        }
        numbers.for_each(|n| tally.pushed(n));
        Ok(())
    }

    /// All messages by a worker, which returns when the last of them is settled.
    fn handle_all(&self, work: &Arc<Work>, threads: usize) -> Result<Instant> {
        let worker = Worker::new(&self.queue).handle(TOPIC, threads, |job| {
            work.handle(Message::read(job.payload()).map_err(|e| e.to_string())?.number);
            Ok(Outcome::Complete)
        });
        let stopper = worker.stopper();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| worker.run());
            let handled = work.wait_handled();
            stopper.stop();
            let ended = running.join().map_err(|_| "the worker panicked")?;
            handled?;
            let _ = ended?;
            Ok(Instant::now())
        })
    }

    fn work_some(&self, mut share: usize, tally: &mut Tally<'_>) -> Result<()> {
        while share > 0 {
            let numbers = if self.many { self.work_many(share)? } else { vec![self.work_one()?] };
            share = share.saturating_sub(numbers.len());
            numbers.into_iter().for_each(|n| tally.done(n));
        }
        Ok(())
    }

    fn work_one(&self) -> Result<u64> {
        let lease = self.queue.pop_timeout(TOPIC, PATIENCE)?.ok_or_else(|| starved(1))?;
        let number = number(&lease)?;
        lease.complete().map_err(Error::from)?;
        Ok(number)
    }

    fn work_many(&self, most: usize) -> Result<Vec<u64>> {
        let leases = self.queue.pop_many(TOPIC, most, PATIENCE)?;
        if leases.is_empty() {
            return Err(starved(most as u64));
        }
        let numbers = leases.iter().map(number).collect::<Result<_>>()?;
        let lost = self.queue.complete_many(leases).map_err(Error::from)?;
        if !lost.is_empty() {
            return Err(format!("{} leases were lost", lost.len()).into());
        }
        Ok(numbers)
    }
}

fn number(lease: &Lease) -> Result<u64> {
    Ok(Message::read(lease.payload())?.number)
}
