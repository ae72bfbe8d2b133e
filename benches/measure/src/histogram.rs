//! Times, and what share of them is shorter than which.

use std::time::Duration;

/// The longest time that is told apart from longer ones: ten minutes, in nanoseconds.
const LONGEST: u64 = 600_000_000_000;

/// Times to three digits, in little memory however many there are.
#[derive(Clone, Debug)]
pub struct Histogram(hdrhistogram::Histogram<u64>);

impl Histogram {
    /// No times yet.
    pub fn new() -> Self {
        let bounded = hdrhistogram::Histogram::new_with_bounds(1, LONGEST, 3);
        match bounded {
            Ok(histogram) => Histogram(histogram),
            Err(e) => unreachable!("the bounds are fixed: {e}"),
        }
    }

    /// Counts a time.
    pub fn record(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(LONGEST);
        self.0.saturating_record(nanos.clamp(1, LONGEST));
    }

    /// Counts the times of another one too.
    pub fn add(&mut self, other: &Histogram) {
        match self.0.add(&other.0) {
            Ok(()) => {}
            Err(e) => unreachable!("all have the same bounds: {e}"),
        }
    }

    /// All times of several.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a Histogram>) -> Self {
        let mut all = Histogram::new();
        for part in parts {
            all.add(part);
        }
        all
    }

    /// How many times there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The time, in microseconds, that this share (0 to 1) of all did not exceed; `None` without times.
    pub fn quantile_us(&self, share: f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.value_at_quantile(share) as f64 / 1e3)
    }

    /// The median, in microseconds.
    pub fn p50_us(&self) -> Option<f64> {
        self.quantile_us(0.5)
    }

    /// What 99 of 100 did not exceed, in microseconds.
    pub fn p99_us(&self) -> Option<f64> {
        self.quantile_us(0.99)
    }

    /// The longest, in microseconds.
    pub fn max_us(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.max() as f64 / 1e3)
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}
