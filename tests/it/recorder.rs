//! A recorder of the `metrics` crate: the figures by their series, as Prometheus would name them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::{
    Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};

#[derive(Clone, Debug, Default)]
pub(crate) struct Figures(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    described: BTreeSet<String>,
    values: BTreeMap<String, f64>,
}

impl Figures {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That of a series, such as `name{label="value"}`. A histogram has two: `name_sum` and `name_count`.
    pub(crate) fn get(&self, series: &str) -> Option<f64> {
        self.seen().values.get(series).copied()
    }

    /// All series.
    pub(crate) fn series(&self) -> Vec<String> {
        self.seen().values.keys().cloned().collect()
    }

    pub(crate) fn described(&self) -> BTreeSet<String> {
        self.seen().described.clone()
    }

    fn describe(&self, name: &KeyName) {
        self.seen().described.insert(name.as_str().to_owned());
    }

    fn register(&self, key: &Key, suffixes: &[&str]) -> Arc<Series> {
        let labels: Vec<String> = key.labels().map(|l| format!("{}={:?}", l.key(), l.value())).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let series = Series { figures: self.clone(), name: key.name().to_owned(), labels };
        suffixes.iter().for_each(|suffix| series.add(suffix, 0.0));
        Arc::new(series)
    }
}

impl Recorder for Figures {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.describe(&name);
    }
    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.describe(&name);
    }
    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.describe(&name);
    }
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.register(key, &[""]))
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.register(key, &["_sum", "_count"]))
    }
}

/// Adds to a counter, or to the two parts of a histogram.
struct Series {
    figures: Figures,
    name: String,
    labels: String,
}

impl Series {
    fn add(&self, suffix: &str, n: f64) {
        let series = format!("{}{suffix}{}", self.name, self.labels);
        *self.figures.seen().values.entry(series).or_default() += n;
    }
}

impl CounterFn for Series {
    fn increment(&self, n: u64) {
        self.add("", n as f64);
    }
    fn absolute(&self, _: u64) {}
}

impl HistogramFn for Series {
    fn record(&self, value: f64) {
        self.add("_sum", value);
        self.add("_count", 1.0);
    }
}
