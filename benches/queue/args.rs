//! What was asked for.

use std::str::FromStr;
use std::time::Duration;

use pushpop_measure::Result;

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// A few seconds for each workload: shows that it works, not how fast it is.
    Quick,
    Moderate,
    Full,
}

pub(crate) struct Args {
    pub(crate) json: bool,
    pub(crate) size: Size,
    /// How long settled messages are kept, where that was asked for.
    keep: Option<Duration>,
    /// Pushes a second of the workload `mixed`.
    pub(crate) rate: Option<f64>,
    workloads: Vec<String>,
}

impl Args {
    pub(crate) fn read(words: Vec<String>, known: &[&str]) -> Result<Args> {
        let mut args =
            Args { json: false, size: Size::Moderate, keep: None, rate: None, workloads: Vec::new() };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                // Cargo adds it.
                "--bench" => {}
                "--json" => args.json = true,
                "--quick" => args.size = Size::Quick,
                "--full" => args.size = Size::Full,
                "--keep" => args.keep = Some(Duration::try_from_secs_f64(figure(&word, words.next())?)?),
                "--rate" => args.rate = Some(figure(&word, words.next())?).filter(|rate: &f64| *rate > 0.0),
                name if known.contains(&name) => args.workloads.push(word),
                _ => return Err(format!("{word} is none of {}", known.join(", ")).into()),
            }
        }
        Ok(args)
    }

    pub(crate) fn asks_for(&self, workload: &str) -> bool {
        self.workloads.is_empty() || self.workloads.iter().any(|name| name == workload)
    }

    /// One of three, by the size.
    pub(crate) fn pick<T>(&self, quick: T, moderate: T, full: T) -> T {
        match self.size {
            Size::Quick => quick,
            Size::Moderate => moderate,
            Size::Full => full,
        }
    }

    pub(crate) fn rounds(&self) -> usize {
        self.pick(1, 3, 5)
    }

    /// How long one system is measured in one round.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_millis(self.pick(200, 2_000, 3_000))
    }

    /// How long settled messages are kept: `None` for as long as the crate has it by default.
    pub(crate) fn keep(&self) -> Option<Duration> {
        self.keep
    }

    /// Each history that is compared, the headline first.
    pub(crate) fn keeps(&self) -> Vec<Option<Duration>> {
        match self.keep {
            None => vec![None, Some(Duration::ZERO)],
            keep => vec![keep],
        }
    }
}

fn figure<T: FromStr>(name: &str, word: Option<String>) -> Result<T> {
    word.and_then(|word| word.parse().ok()).ok_or_else(|| format!("{name} wants a number").into())
}
