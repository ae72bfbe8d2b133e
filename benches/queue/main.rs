//! What the queue does in a second, and what each message costs, beside the floor: the same by
//! hand-written statements on a table with nothing but a primary key.
//!
//! `cargo bench --bench queue -- [WORKLOAD ..] [--json] [--quick | --full] [--keep SECONDS] [--rate N]`
//!
//! benches/README.md says what each workload does. A run that loses or doubles a message ends with
//! an error and prints no figures.

mod args;
mod backlog;
mod beside;
mod bulk;
mod contender;
mod floor;
mod idle;
mod inflight;
mod life;
mod listeners;
mod lone;
mod mixed;
mod ours;
mod single;
mod snapshot;
mod topics;
mod wake;

use std::process::ExitCode;

use args::Args;
use pushpop_measure::{Bed, Report, Result};

/// What a workload is given.
struct Bench {
    args: Args,
    bed: Bed,
    report: Report,
}

type Workload = fn(&mut Bench) -> Result<()>;

const WORKLOADS: [(&str, Workload); 10] = [
    ("single", single::run),
    ("lone", lone::run),
    ("bulk", bulk::run),
    ("mixed", mixed::run),
    ("topics", topics::run),
    ("backlog", backlog::run),
    ("inflight", inflight::run),
    ("snapshot", snapshot::run),
    ("wake", wake::run),
    ("idle", idle::run),
];

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == listeners::CHILD) {
        return listeners::child(&words[1..]);
    }
    let names = WORKLOADS.map(|(name, _)| name);
    let args = Args::read(words, &names)?;
    let mut bed = Bed::start()?;
    eprintln!("{}", bed.describe()?);
    let report = Report::new(args.json);
    let mut bench = Bench { args, bed, report };
    for (name, run) in WORKLOADS {
        if bench.args.asks_for(name) {
            eprintln!("{name} ..");
            run(&mut bench).map_err(|e| format!("{name}: {e}"))?;
        }
    }
    for schema in [floor::SCHEMA, ours::SCHEMA].into_iter().chain(ours::PAIR) {
        bench.bed.reset(schema)?;
    }
    bench.report.print()
}
