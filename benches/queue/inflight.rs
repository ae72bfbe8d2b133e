//! A pop beside few and beside many messages that are leased, each by a pop of its own.

use pushpop_measure::Result;

use crate::Bench;
use crate::beside::{compare, fill, hold};

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let many = bench.args.pick(1_000, 10_000, 10_000);
    compare(bench, "inflight", "leased", [10, many], |queue, size, check| {
        fill(queue, size, check)?;
        hold(queue, size)
    })
}
