//! Compares pushpop-pg with other queues that live in PostgreSQL, side by side on one server.
//!
//! `cargo run --release --manifest-path benches/peers/Cargo.toml -- [single|batched|all] [--json] [--quick]`
//!
//! `--threads 1,8,256` has `single` run with other numbers of threads than 32 and 128, and `--only pgmq,fang`
//! only these take part; awa does only if it is named, as its adapter is not fair yet. A queue that loses or doubles a message gets no figures, and the program ends with an
//! error.

mod awa;
mod contest;
mod fang;
mod graphile;
mod message;
mod pgmq;
mod pushpop;
mod system;
mod tasks;
mod work;

use std::process::ExitCode;
use std::time::Duration;

use awa::Awa;
use contest::Contest;
use fang::Fang;
use graphile::Graphile;
use pgmq::Pgmq;
use pushpop::Pushpop;
use pushpop_measure::{Bed, Report, Result};
use system::Peer;

struct Arguments {
    single: bool,
    batched: bool,
    json: bool,
    quick: bool,
    threads: Vec<usize>,
    only: Vec<String>,
}

impl Arguments {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
        let mut read = Arguments {
            single: true,
            batched: true,
            json: false,
            quick: false,
            threads: vec![32, 128],
            only: Vec::new(),
        };
        while let Some(word) = words.next() {
            match word.as_str() {
                "single" => read.batched = false,
                "batched" => read.single = false,
                "all" => {}
                "--json" => read.json = true,
                "--quick" => read.quick = true,
                "--threads" => {
                    let numbers = list(words.next());
                    read.threads =
                        numbers.iter().map(|n| n.parse()).collect::<std::result::Result<_, _>>()?;
                }
                "--only" => read.only = list(words.next()),
                _ => {
                    return Err(format!(
                        "{word} is none of single, batched, all, --json, --quick, --threads, --only"
                    )
                    .into());
                }
            }
        }
        Ok(read)
    }

    fn contest(
        &self,
        workload: &'static str,
        threads: usize,
        batch: usize,
        mut peers: Vec<Box<dyn Peer>>,
    ) -> Contest {
        peers.retain(|peer| {
            let named = self.only.iter().any(|name| peer.name().starts_with(name));
            named || self.only.is_empty() && peer.is_fair()
        });
        let (rounds, millis) = if self.quick { (1, 0) } else { (5, 1_500) };
        Contest { workload, threads, batch, peers, rounds, phase: Duration::from_millis(millis) }
    }

    fn contests(&self) -> Vec<Contest> {
        let mut contests = Vec::new();
        if self.single {
            contests.extend(self.threads.iter().map(|n| self.contest("single", *n, 1, one_a_call())));
        }
        if self.batched {
            contests.push(self.contest("batched inside", 128, 1, batched_inside()));
            contests.push(self.contest("batched calls", 8, 100, batched_calls()));
        }
        contests
    }
}

fn list(word: Option<String>) -> Vec<String> {
    word.unwrap_or_default().split(',').map(str::to_owned).collect()
}

/// No peer combines messages of several callers. Where one can be kept from combining them, it is.
fn one_a_call() -> Vec<Box<dyn Peer>> {
    vec![
        Box::new(Pushpop { many: false, history: true, worker: false }),
        Box::new(Pushpop { many: false, history: false, worker: false }),
        Box::new(Pushpop { many: false, history: true, worker: true }),
        Box::new(Pgmq { many: false, archive: true }),
        Box::new(Pgmq { many: false, archive: false }),
        Box::new(Fang),
        Box::new(Graphile { batches: false, many: false }),
        Box::new(Awa { batches: false, many: false }),
    ]
}

/// One message a call, and each combines what it combines by itself.
fn batched_inside() -> Vec<Box<dyn Peer>> {
    vec![
        Box::new(Pushpop { many: false, history: true, worker: false }),
        Box::new(Pushpop { many: false, history: false, worker: false }),
        Box::new(Pushpop { many: false, history: true, worker: true }),
        Box::new(Graphile { batches: true, many: false }),
        Box::new(Awa { batches: true, many: false }),
    ]
}

/// As many messages a call as the work says.
fn batched_calls() -> Vec<Box<dyn Peer>> {
    vec![
        Box::new(Pushpop { many: true, history: true, worker: false }),
        Box::new(Pushpop { many: true, history: false, worker: false }),
        Box::new(Pgmq { many: true, archive: true }),
        Box::new(Pgmq { many: true, archive: false }),
        Box::new(Graphile { batches: true, many: true }),
        Box::new(Awa { batches: true, many: true }),
    ]
}

fn run() -> Result<ExitCode> {
    let arguments = Arguments::read(std::env::args().skip(1))?;
    let mut bed = Bed::start()?;
    eprintln!("{}", bed.describe()?);
    let mut report = Report::new(arguments.json);
    let mut failures = Vec::new();
    for contest in arguments.contests() {
        eprintln!("{}, {} threads, {} a call", contest.workload, contest.threads, contest.batch);
        report.extend(contest.run(&mut bed, &mut failures));
    }
    report.print()?;
    for failure in &failures {
        eprintln!("no figures: {failure}");
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn main() -> ExitCode {
    run().unwrap_or_else(|e| {
        eprintln!("{e}");
        ExitCode::FAILURE
    })
}
