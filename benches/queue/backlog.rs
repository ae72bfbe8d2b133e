//! A pop beside few and beside very many messages that are ready.

use pushpop_measure::Result;

use crate::Bench;
use crate::beside::{compare, fill};

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let many = bench.args.pick(20_000, 200_000, 10_000_000);
    compare(bench, "backlog", "ready", [1_000, many], |queue, size, check| {
        fill(queue, size, check)?;
        Ok(Vec::new())
    })
}
