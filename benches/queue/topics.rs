//! One message a call by 64 threads, over few topics and over many.

use pushpop_measure::{Line, Result};

use crate::Bench;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for topics in [1, 10, 1_000] {
        let line = Line::new("topics", "").threads(64).with("topics", topics as f64);
        bench.compare_lives(&line, topics)?;
    }
    Ok(())
}
