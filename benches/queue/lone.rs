//! The single calls of one thread, each beside an insert of one row by a prepared statement.

use std::time::Instant;

use pushpop_measure::{Check, FLOOR, Histogram, Line, Result, Tally};
use pushpop_pg::Queue;

use crate::Bench;
use crate::floor::Floor;
use crate::ours;

/// So many inserts, and so many lives of each queue, take turns.
const BLOCK: usize = 50;

const TOPIC: &str = "lone";

/// A queue, and the times of its pushes, pops and settles.
struct Ours {
    name: String,
    queue: Queue,
    times: [Histogram; 3],
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let rounds = (0..bench.args.rounds()).map(|_| round(bench)).collect::<Result<Vec<_>>>()?;
    for i in 0..rounds[0].len() {
        let of_one: Vec<Line> = rounds.iter().map(|lines| lines[i].clone()).collect();
        bench.report.extend(Line::median(&of_one));
    }
    Ok(())
}

fn round(bench: &mut Bench) -> Result<Vec<Line>> {
    let blocks = bench.args.pick(4, 20, 60);
    let keeps = bench.args.keeps();
    let check = Check::new();
    let floor = Floor::open(&mut bench.bed, 1, 1)?;
    let mut queues = Vec::new();
    for (schema, keep) in ours::PAIR.into_iter().zip(keeps) {
        let queue = ours::open_in(&mut bench.bed, schema, keep)?;
        queues.push(Ours { name: ours::name(keep), queue, times: Default::default() });
    }
    let mut inserts = Histogram::new();
    for block in 0..=blocks {
        let mut tally = check.tally();
        insert(&floor, &mut inserts, &mut tally)?;
        for ours in &mut queues {
            ours.live(&mut tally)?;
        }
        if block == 0 {
            // That was to warm up.
            inserts = Histogram::new();
            queues.iter_mut().for_each(|ours| ours.times = Default::default());
        }
    }
    check.finish()?;

    let mut lines = vec![Line::new("lone insert", FLOOR).times(&inserts)];
    for ours in &queues {
        for (name, times) in ["lone push", "lone try_pop", "lone complete"].into_iter().zip(&ours.times) {
            lines.push(Line::new(name, &ours.name).times(times));
        }
    }
    let floor = lines[0].clone();
    lines.iter_mut().for_each(|line| line.compare(&floor));
    Ok(lines)
}

/// Inserts rows, and deletes them when all were timed.
fn insert(floor: &Floor, times: &mut Histogram, tally: &mut Tally<'_>) -> Result<()> {
    floor.with(0, |connection| {
        let mut ids = Vec::new();
        for _ in 0..BLOCK {
            let begun = Instant::now();
            ids.push(connection.push(tally)?);
            times.record(begun.elapsed());
        }
        connection.take_many(&ids, tally)
    })
}

impl Ours {
    fn live(&mut self, tally: &mut Tally<'_>) -> Result<()> {
        for _ in 0..BLOCK {
            let begun = Instant::now();
            ours::push(&self.queue, TOPIC, tally)?;
            let pushed = Instant::now();
            let lease = self.queue.try_pop(TOPIC)?.ok_or_else(|| ours::lost(&self.queue, TOPIC, 1))?;
            let popped = Instant::now();
            ours::complete(lease, tally)?;
            let times = [pushed - begun, popped - pushed, popped.elapsed()];
            self.times.iter_mut().zip(times).for_each(|(all, time)| all.record(time));
        }
        Ok(())
    }
}
