//! Tries to make pushpop-pg break its contract.
//!
//! `campaign NAME [--seed N] [--messages N] [--kills N] ..` starts a throwaway server and clients, each a process
//! that writes to a log of its own what it is about to do and what came of it; kills, stops and cuts off what it
//! can; lets the rest be worked off; and checks the logs and the store against the promises of the queue. The exit
//! status is 1 when one is broken. `tests/RELIABILITY.md` says what was found.

mod args;
mod audit;
mod bounce;
mod broken;
mod chance;
mod check;
mod clock;
mod director;
mod failover;
mod history;
mod journal;
mod network;
mod plain;
mod plan;
mod producer;
mod pulse;
mod resources;
mod scratch;
mod soak;
mod stage;
mod store;
#[cfg(test)]
mod synthetic;
mod worker;

use std::process::ExitCode;

use pushpop_pg::BoxError;

use crate::args::Args;
use crate::plan::{Fault, Plan};

/// Options of a campaign, and those with which it starts its children.
const OPTIONS: [&str; 39] = [
    "audit",
    "backend-kills",
    "batch",
    "bouncers",
    "broken",
    "clock-steps",
    "cuts",
    "effects-share",
    "forget",
    "full-disks",
    "full-servers",
    "idle-kills",
    "in-transaction",
    "interval",
    "kills",
    "lease",
    "log",
    "lost-answers",
    "messages",
    "minutes",
    "name",
    "order-share",
    "plain-share",
    "plains",
    "poll",
    "promotions",
    "rate",
    "read-onlys",
    "scratch",
    "seed",
    "server-kills",
    "share",
    "spread",
    "stops",
    "terminations",
    "url",
    "wakes-only",
    "work",
    "workers",
];

/// What a child process does.
type Role = fn(&Plan, &Args) -> Result<(), BoxError>;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("campaign: {e}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, BoxError> {
    let mut words = std::env::args().skip(1);
    let word = words.next().unwrap_or_default();
    if word.is_empty() || word == "--help" {
        println!("campaign NAME [--OPTION VALUE ..]");
        println!("names: {}, soak, bloat", Plan::names().collect::<Vec<_>>().join(", "));
        println!("options: {}", OPTIONS.join(", "));
        println!("faults for --broken: {}", broken::ALL.map(|broken| broken.name).join(", "));
        return Ok(true);
    }
    let role: Option<Role> = match word.as_str() {
        "producer" => Some(producer::run),
        "worker" | "bounce" => Some(worker::run),
        "plain" => Some(plain::run),
        _ => None,
    };
    let name = if role.is_some() { words.next().unwrap_or_default() } else { word };
    let args = Args::read(words)?;
    if let Some(unknown) = args.names().find(|name| !OPTIONS.contains(name)) {
        return Err(format!("there is no option --{unknown}").into());
    }
    match name.as_str() {
        "soak" => return soak::soak(&args),
        "bloat" => return soak::bloat(&args),
        _ => {}
    }
    let plan = Plan::read(&name, &args)?;
    match role {
        Some(run) => {
            scratch::end_with_parent();
            run(&plan, &args).map(|()| true)
        }
        None if plan.count(Fault::FillDisk) > 0 && !resources::has_disk() => Err(resources::enter_disk()),
        None => director::run(&plan, &args),
    }
}
