//! One message a call: each thread pushes one, pops one and completes it, in turn.

use pushpop_measure::{Line, Result};

use crate::Bench;
use crate::contender::Contender;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for threads in [1, 8, 32, 128, 256] {
        let mut contenders = bench.contenders();
        if [32, 128].contains(&threads) {
            // What many threads with one message each are to come near to.
            contenders.push(Contender::Bulk(bench.args.keep()));
        }
        bench.compare(&contenders, &Line::new("single", "").threads(threads), 1)?;
    }
    Ok(())
}
