//! Rounds in which the queues take turns, and the medians of each.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_measure::{Bed, Line, Result, Spent};

use crate::pushpop;
use crate::system::{Peer, System};
use crate::work::Work;

/// No schema has this name: so that dropping it only counts anew.
const NOTHING: &str = "pushpop_peers_nothing";

/// Who takes part, how, and how long.
pub(crate) struct Contest {
    pub(crate) workload: &'static str,
    pub(crate) threads: usize,
    pub(crate) batch: usize,
    pub(crate) peers: Vec<Box<dyn Peer>>,
    pub(crate) rounds: usize,
    /// About how long each phase of a round takes.
    pub(crate) phase: Duration,
}

/// What one queue did in one round: messages a second.
struct Rates {
    push: f64,
    drain: f64,
    life: f64,
}

impl Contest {
    /// Runs all rounds, and returns a line for each queue that handled each message once. What others did
    /// wrong goes to `failures`.
    pub(crate) fn run(&self, bed: &mut Bed, failures: &mut Vec<String>) -> Vec<Line> {
        // None once it has failed.
        let mut sizes: Vec<Option<u64>> = Vec::new();
        for peer in &self.peers {
            let size = self.size(bed, peer.as_ref());
            sizes.push(self.judge(peer.as_ref(), size, failures));
        }
        let mut lines: Vec<Vec<Line>> = self.peers.iter().map(|_| Vec::new()).collect();
        for round in 0..self.rounds {
            let mut order: Vec<usize> = (0..self.peers.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            let mut of_round: Vec<Option<Line>> = self.peers.iter().map(|_| None).collect();
            for i in order {
                let Some(size) = sizes[i] else { continue };
                let peer = self.peers[i].as_ref();
                of_round[i] = self.judge(peer, self.round(bed, peer, size).map(|(line, _)| line), failures);
                if of_round[i].is_none() {
                    sizes[i] = None;
                }
            }
            let ours = of_round.iter().flatten().find(|line| line.system == pushpop::NAME);
            let ours = ours.and_then(|line| line.msgs_per_s);
            for (line, lines) in of_round.into_iter().zip(&mut lines) {
                lines.extend(line.map(|line| compared(line, ours)));
            }
        }
        let whole = lines.iter().zip(&sizes).filter(|(_, size)| size.is_some());
        whole.filter_map(|(lines, _)| Line::median(lines)).collect()
    }

    fn judge<T>(&self, peer: &dyn Peer, result: Result<T>, failures: &mut Vec<String>) -> Option<T> {
        let failed = |e| {
            format!(
                "{}, {} threads, {} a call, {}: {e}",
                self.workload,
                self.threads,
                self.batch,
                peer.name()
            )
        };
        result.map_err(|e| failures.push(failed(e))).ok()
    }

    /// As many messages as the slowest phase passes in its time. Finds out with a few, which warms up, too.
    fn size(&self, bed: &mut Bed, peer: &dyn Peer) -> Result<u64> {
        let few = 500 * self.batch.min(10) as u64;
        let (_, rates) = self.round(bed, peer, few)?;
        let slowest = rates.push.min(rates.drain).min(rates.life);
        Ok(((slowest * self.phase.as_secs_f64()) as u64).clamp(few, 200_000))
    }

    /// Pushes all messages; works them; then does both at once with as many again, and in turn once more.
    fn round(&self, bed: &mut Bed, peer: &dyn Peer, size: u64) -> Result<(Line, Rates)> {
        bed.reset(peer.schema())?;
        peer.install(bed.url())?;
        bed.reset(NOTHING)?;
        let mut system = peer.open(bed.url(), self.threads)?;
        let rate = |took: Duration| size as f64 / took.as_secs_f64();

        let work = Work::new(size, self.batch);
        let begun = Instant::now();
        system.push(&work, self.threads)?;
        let push = rate(begun.elapsed());
        let ended = system.drain(&work, self.threads, mpsc::channel().0)?;
        let drain = rate(work.worked_until(ended));
        finish(work, system.as_mut())?;

        let work = Work::new(size, self.batch);
        let before = bed.reading()?;
        let life = at_once(system.as_ref(), &work, self.threads)?;
        let spent = Spent { wall: life, ..bed.since(&before)? };
        finish(work, system.as_mut())?;

        let work = Work::new(size, self.batch);
        let begun = Instant::now();
        let in_turn = system.in_turn(&work, self.threads)?.then(|| rate(begun.elapsed()));
        let mut passed = 2 * size;
        if in_turn.is_some() {
            finish(work, system.as_mut())?;
            passed += size;
        }

        drop(system);
        let line = Line::new(self.workload, peer.name()).threads(self.threads).batch(self.batch);
        let line =
            line.spent(size, &spent).left(passed, &bed.left()?).with("push", push).with("drain", drain);
        let line = in_turn.into_iter().fold(line, |line, rate| line.with("in_turn", rate));
        bed.reset(peer.schema())?;
        Ok((line, Rates { push, drain, life: rate(life) }))
    }
}

/// Fails if a message was lost, handled twice, or not settled.
fn finish(work: Arc<Work>, system: &mut dyn System) -> Result<()> {
    work.finish()?;
    match system.unsettled()? {
        0 => Ok(()),
        left => Err(format!("{left} messages are left in the tables").into()),
    }
}

/// Half of the threads push, and half of them work. With one thread, one each.
fn at_once(system: &dyn System, work: &Arc<Work>, threads: usize) -> Result<Duration> {
    let half = (threads / 2).max(1);
    let (up, is_up) = mpsc::channel();
    thread::scope(|scope| {
        let pushing = scope.spawn(move || {
            // An error where it never comes up, which the other thread has to tell.
            if is_up.recv().is_err() {
                return Ok(None);
            }
            let begun = Instant::now();
            system.push(work, half).map(|()| Some(begun))
        });
        let ended = system.drain(work, half, up);
        let begun = pushing.join().map_err(|_| "a thread panicked")??;
        Ok(ended? - begun.ok_or("nobody was up")?)
    })
}

/// Adds how many times as fast ours was in the same round.
fn compared(line: Line, ours: Option<f64>) -> Line {
    match ours.zip(line.msgs_per_s) {
        Some((ours, own)) => line.with("ours_is_times", ours / own),
        None => line,
    }
}
