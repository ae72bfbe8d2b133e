//! Who is measured: the floor, and the queue with one history or another.

use std::time::Duration;

use pushpop_measure::{FLOOR, Line, Result, rounds};

use crate::Bench;
use crate::floor::Floor;
use crate::life::measure;
use crate::ours::{self, Ours};

/// How many messages a call has in bulk.
const BULK: usize = 100;

#[derive(Clone, Copy)]
pub(crate) enum Contender {
    Floor,
    /// How long it keeps what is settled, unless as by default.
    Ours(Option<Duration>),
    /// The queue with one thread that takes many messages a call, whatever the others do.
    Bulk(Option<Duration>),
}

impl Contender {
    /// What it is called in the results.
    pub(crate) fn name(self) -> String {
        match self {
            Contender::Floor => FLOOR.to_owned(),
            Contender::Ours(keep) => ours::name(keep),
            Contender::Bulk(keep) => format!("{} in bulk", ours::name(keep)),
        }
    }
}

impl Bench {
    /// Everyone, the floor first.
    pub(crate) fn contenders(&self) -> Vec<Contender> {
        let ours = self.args.keeps().into_iter().map(Contender::Ours);
        [Contender::Floor].into_iter().chain(ours).collect()
    }

    /// Reports the medians of rounds of whole lives in a number of topics.
    pub(crate) fn compare_lives(&mut self, line: &Line, topics: usize) -> Result<()> {
        let contenders = self.contenders();
        self.compare(&contenders, line, topics)
    }

    /// The same for these contenders.
    pub(crate) fn compare(&mut self, contenders: &[Contender], line: &Line, topics: usize) -> Result<()> {
        let time = self.args.time();
        let lines = rounds(self.args.rounds(), contenders, |contender| {
            let bed = &mut self.bed;
            let line = Line { system: contender.name(), ..line.clone() };
            match contender {
                Contender::Floor => {
                    let floor = Floor::open(bed, line.threads, line.batch)?;
                    measure(bed, line, time, floor)
                }
                Contender::Ours(keep) => {
                    let ours = Ours::open(bed, *keep, topics, line.batch)?;
                    measure(bed, line, time, ours)
                }
                Contender::Bulk(keep) => {
                    let line = line.threads(1).batch(BULK);
                    let ours = Ours::open(bed, *keep, 1, line.batch)?;
                    measure(bed, line, time, ours)
                }
            }
        })?;
        self.report.extend(lines);
        Ok(())
    }
}
