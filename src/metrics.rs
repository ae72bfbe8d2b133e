//! The figures of a queue, for the `metrics` crate.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use metrics::{Counter, Histogram, Label, Unit, counter, describe_counter, describe_histogram, histogram};

use crate::observer::{Abandoned, Flight, Handled, LeaseLost, Observer, Popped, Pushed, Settled, Stuck};

/// Counts what a queue does, by the `metrics` crate: its exporters have the figures for Prometheus, StatsD
/// and others.
///
/// ```no_run
/// use pushpop_pg::{Metrics, Queue};
///
/// # fn main() -> Result<(), pushpop_pg::Error> {
/// // First comes an exporter, such as that of metrics-exporter-prometheus:
/// // PrometheusBuilder::new().install()?;
/// let queue = Queue::builder().observer(Metrics::new()).connect("postgres://localhost/app")?;
/// # Ok(())
/// # }
/// ```
///
/// Install the exporter before the queue is opened: a figure that was first told without one stays uncounted.
/// `examples/metrics` serves the figures over HTTP, together with how many messages there are, which
/// only the server knows.
///
/// | counter | labels | counts |
/// |---|---|---|
/// | `pushpop_pushed_messages_total` | topic | messages that were pushed, and were new |
/// | `pushpop_duplicate_pushes_total` | topic | messages that were not, because their id was stored already |
/// | `pushpop_popped_messages_total` | topic | messages that were handed out |
/// | `pushpop_settled_messages_total` | topic, outcome | messages that were settled: `complete`, `discard`, `defer`, `release`, `fail` |
/// | `pushpop_extended_leases_total` | topic | extensions of leases |
/// | `pushpop_lost_leases_total` | topic | settles and extensions that were refused, because the lease was lost |
/// | `pushpop_abandoned_messages_total` | topic | messages popped for callers that were gone; their releases count as settles too |
/// | `pushpop_reconnects_total` | | connections opened in place of broken ones |
/// | `pushpop_failed_flights_total` | kind | statements that failed for all calls that shared them |
/// | `pushpop_handled_messages_total` | topic, outcome | messages that a worker has handled: see [`Handled::outcome`] |
/// | `pushpop_stuck_handlers_total` | topic | times that a handler was found to run for too long: see [`Observer::stuck`] |
///
/// | histogram | labels | of |
/// |---|---|---|
/// | `pushpop_flight_duration_seconds` | kind | the time that a statement took, its commit included |
/// | `pushpop_flight_callers` | kind | how many calls shared a statement |
/// | `pushpop_flight_messages` | kind | how many messages a statement carried |
/// | `pushpop_handler_duration_seconds` | topic, outcome | the time that a handler ran |
///
/// `kind` is `push`, `pop`, `settle` or `turn`, which is a worker's settles and pops. A histogram's own count is that of all statements, or handlers.
/// What is done in a transaction of the caller's is not counted: nobody tells whether it was committed.
///
/// The first 100 topics that something is told of have a `topic` of their own, all later ones share `other`:
/// see [`topics`](Self::topics).
#[derive(Debug)]
pub struct Metrics {
    most: usize,
    topics: Handles<Arc<Figures>>,
    common: OnceLock<Common>,
}

const PUSHED: &str = "pushpop_pushed_messages_total";
const DUPLICATES: &str = "pushpop_duplicate_pushes_total";
const POPPED: &str = "pushpop_popped_messages_total";
const SETTLED: &str = "pushpop_settled_messages_total";
const EXTENDED: &str = "pushpop_extended_leases_total";
const LOST: &str = "pushpop_lost_leases_total";
const ABANDONED: &str = "pushpop_abandoned_messages_total";
const RECONNECTS: &str = "pushpop_reconnects_total";
const FAILED_FLIGHTS: &str = "pushpop_failed_flights_total";
const HANDLED: &str = "pushpop_handled_messages_total";
const STUCK: &str = "pushpop_stuck_handlers_total";
const FLIGHT_DURATION: &str = "pushpop_flight_duration_seconds";
const FLIGHT_CALLERS: &str = "pushpop_flight_callers";
const FLIGHT_MESSAGES: &str = "pushpop_flight_messages";
const HANDLER_DURATION: &str = "pushpop_handler_duration_seconds";

/// The topic of those that have no figures of their own.
const OTHER: &str = "other";

impl Default for Metrics {
    fn default() -> Self {
        Metrics { most: 100, topics: Handles::default(), common: OnceLock::new() }
    }
}

impl Metrics {
    /// For [`Builder::observer`](crate::Builder::observer).
    pub fn new() -> Self {
        Self::default()
    }

    /// How many topics have figures of their own; later ones share the topic `other`. Each of them costs
    /// the exporter some tens of series, for as long as the program runs. Default: 100.
    pub fn topics(mut self, max: usize) -> Self {
        self.most = max;
        self
    }

    fn common(&self) -> &Common {
        self.common.get_or_init(Common::new)
    }

    fn topic(&self, name: &str) -> Arc<Figures> {
        self.topics.get(name, self.most, |name| {
            // Describes them all.
            self.common();
            Arc::new(Figures::new(name))
        })
    }
}

impl Observer for Metrics {
    fn pushed(&self, event: &Pushed<'_>) {
        let topic = self.topic(event.topic());
        topic.pushed.increment((event.count() - event.duplicates()) as u64);
        topic.duplicates.increment(event.duplicates() as u64);
    }

    fn popped(&self, event: &Popped<'_>) {
        self.topic(event.topic()).popped.increment(event.count() as u64);
    }

    fn settled(&self, event: &Settled<'_>) {
        let topic = self.topic(event.topic());
        if event.outcome() == "extend" {
            topic.extended.increment(1);
        } else {
            topic.settled(event.outcome()).increment(1);
        }
    }

    fn flight(&self, event: &Flight<'_>) {
        let kind = event.kind();
        let flights = self.common().flights.get(kind, usize::MAX, |_| Flights::new(kind));
        flights.duration.record(event.duration());
        flights.callers.record(event.callers() as f64);
        flights.messages.record(event.rows() as f64);
        if !event.succeeded() {
            flights.failed.increment(1);
        }
    }

    fn reconnected(&self) {
        self.common().reconnects.increment(1);
    }

    fn lease_lost(&self, event: &LeaseLost<'_>) {
        self.topic(event.topic()).lost.increment(1);
    }

    fn abandoned(&self, event: &Abandoned<'_>) {
        self.topic(event.topic()).abandoned.increment(event.count() as u64);
    }

    fn handled(&self, event: &Handled<'_>) {
        let (messages, duration) = self.topic(event.topic()).handled(event.outcome());
        messages.increment(1);
        duration.record(event.duration());
    }

    fn stuck(&self, event: &Stuck<'_>) {
        self.topic(event.topic()).stuck.increment(1);
    }
}

/// What is counted of a topic.
#[derive(Debug)]
struct Figures {
    name: String,
    pushed: Counter,
    duplicates: Counter,
    popped: Counter,
    extended: Counter,
    lost: Counter,
    abandoned: Counter,
    stuck: Counter,
    settled: Handles<Counter>,
    handled: Handles<(Counter, Histogram)>,
}

impl Figures {
    fn new(name: &str) -> Self {
        let counter = |figure: &'static str| counter!(figure, "topic" => name.to_owned());
        Figures {
            name: name.to_owned(),
            pushed: counter(PUSHED),
            duplicates: counter(DUPLICATES),
            popped: counter(POPPED),
            extended: counter(EXTENDED),
            lost: counter(LOST),
            abandoned: counter(ABANDONED),
            stuck: counter(STUCK),
            settled: Handles::default(),
            handled: Handles::default(),
        }
    }

    fn settled(&self, outcome: &'static str) -> Counter {
        let register = |_: &str| counter!(SETTLED, "topic" => self.name.clone(), "outcome" => outcome);
        self.settled.get(outcome, usize::MAX, register)
    }

    fn handled(&self, outcome: &'static str) -> (Counter, Histogram) {
        self.handled.get(outcome, usize::MAX, |_| {
            let labels = [Label::new("topic", self.name.clone()), Label::new("outcome", outcome)].to_vec();
            (counter!(HANDLED, labels.clone()), histogram!(HANDLER_DURATION, labels))
        })
    }
}

/// What is counted of all topics together.
#[derive(Debug)]
struct Common {
    reconnects: Counter,
    flights: Handles<Flights>,
}

impl Common {
    fn new() -> Self {
        describe();
        Common { reconnects: counter!(RECONNECTS), flights: Handles::default() }
    }
}

/// What is counted of one kind of flight.
#[derive(Clone, Debug)]
struct Flights {
    duration: Histogram,
    callers: Histogram,
    messages: Histogram,
    failed: Counter,
}

impl Flights {
    fn new(kind: &'static str) -> Self {
        Flights {
            duration: histogram!(FLIGHT_DURATION, "kind" => kind),
            callers: histogram!(FLIGHT_CALLERS, "kind" => kind),
            messages: histogram!(FLIGHT_MESSAGES, "kind" => kind),
            failed: counter!(FAILED_FLIGHTS, "kind" => kind),
        }
    }
}

fn describe() {
    let count = |name: &'static str, what: &'static str| describe_counter!(name, Unit::Count, what);
    count(PUSHED, "Messages that were pushed, and were new");
    count(DUPLICATES, "Messages that were not pushed, because their id was stored already");
    count(POPPED, "Messages that were handed out");
    count(SETTLED, "Messages that were settled");
    count(EXTENDED, "Extensions of leases");
    count(LOST, "Settles and extensions that were refused, because the lease was lost");
    count(ABANDONED, "Messages popped for callers that were gone");
    count(RECONNECTS, "Connections opened in place of broken ones");
    count(FAILED_FLIGHTS, "Statements that failed for all calls that shared them");
    count(HANDLED, "Messages that a worker has handled");
    count(STUCK, "Times that a handler was found to run for too long");
    describe_histogram!(
        FLIGHT_DURATION,
        Unit::Seconds,
        "The time that a statement took, its commit included"
    );
    describe_histogram!(FLIGHT_CALLERS, Unit::Count, "How many calls shared a statement");
    describe_histogram!(FLIGHT_MESSAGES, Unit::Count, "How many messages a statement carried");
    describe_histogram!(HANDLER_DURATION, Unit::Seconds, "The time that a handler ran");
}

/// Handles by the value of a label, registered when they are first needed.
#[derive(Debug)]
struct Handles<T>(RwLock<HashMap<String, T>>);

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Handles(RwLock::default())
    }
}

impl<T: Clone> Handles<T> {
    /// Those of a label; or, if there are `most` without it, those that all others share.
    fn get(&self, label: &str, most: usize, register: impl FnOnce(&str) -> T) -> T {
        let find = |known: &HashMap<String, T>| {
            let shared = || known.get(OTHER).filter(|_| known.len() >= most);
            known.get(label).or_else(shared).cloned()
        };
        let found = find(&self.0.read().unwrap_or_else(PoisonError::into_inner));
        found.unwrap_or_else(|| {
            let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
            // Somebody may have been quicker.
            find(&known).unwrap_or_else(|| {
                let label = if known.len() < most { label } else { OTHER };
                known.entry(label.to_owned()).or_insert_with(|| register(label)).clone()
            })
        })
    }
}

/// The tests have it too.
#[cfg(test)]
#[path = "../tests/it/recorder.rs"]
mod recorder;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use uuid::Uuid;

    use super::*;

    /// What comes of events that are told on this thread.
    fn figures(metrics: Metrics, tell: impl FnOnce(&Metrics)) -> recorder::Figures {
        let figures = recorder::Figures::default();
        metrics::with_local_recorder(&figures, || tell(&metrics));
        figures
    }

    #[test]
    fn every_event_is_counted() {
        let (topic, id) = ("t", Uuid::nil());
        let figures = figures(Metrics::new(), |metrics| {
            metrics.pushed(&Pushed { topic, count: 5, duplicates: 2 });
            metrics.popped(&Popped { topic, count: 3 });
            for outcome in ["complete", "complete", "fail", "extend"] {
                metrics.settled(&Settled { topic, id, outcome });
            }
            metrics.lease_lost(&LeaseLost { topic, id, outcome: "complete" });
            metrics.abandoned(&Abandoned { topic, count: 4 });
            metrics.reconnected();
            let flight = Flight {
                topic,
                kind: "push",
                callers: 2,
                rows: 5,
                duration: Duration::from_millis(1500),
                succeeded: true,
            };
            metrics.flight(&flight);
            metrics.flight(&Flight { succeeded: false, ..flight });
            let duration = Duration::from_secs(2);
            for outcome in ["panic", "complete", "panic"] {
                metrics.handled(&Handled { topic, id, outcome, attempt: 1, duration });
            }
            metrics.stuck(&Stuck { topic, id, age: duration });
        });
        let expected = [
            (r#"pushpop_abandoned_messages_total{topic="t"}"#, 4.0),
            (r#"pushpop_duplicate_pushes_total{topic="t"}"#, 2.0),
            (r#"pushpop_extended_leases_total{topic="t"}"#, 1.0),
            (r#"pushpop_failed_flights_total{kind="push"}"#, 1.0),
            (r#"pushpop_flight_callers_count{kind="push"}"#, 2.0),
            (r#"pushpop_flight_callers_sum{kind="push"}"#, 4.0),
            (r#"pushpop_flight_duration_seconds_count{kind="push"}"#, 2.0),
            (r#"pushpop_flight_duration_seconds_sum{kind="push"}"#, 3.0),
            (r#"pushpop_flight_messages_count{kind="push"}"#, 2.0),
            (r#"pushpop_flight_messages_sum{kind="push"}"#, 10.0),
            (r#"pushpop_handled_messages_total{topic="t",outcome="complete"}"#, 1.0),
            (r#"pushpop_handled_messages_total{topic="t",outcome="panic"}"#, 2.0),
            (r#"pushpop_handler_duration_seconds_count{topic="t",outcome="complete"}"#, 1.0),
            (r#"pushpop_handler_duration_seconds_count{topic="t",outcome="panic"}"#, 2.0),
            (r#"pushpop_handler_duration_seconds_sum{topic="t",outcome="complete"}"#, 2.0),
            (r#"pushpop_handler_duration_seconds_sum{topic="t",outcome="panic"}"#, 4.0),
            (r#"pushpop_lost_leases_total{topic="t"}"#, 1.0),
            (r#"pushpop_popped_messages_total{topic="t"}"#, 3.0),
            (r#"pushpop_pushed_messages_total{topic="t"}"#, 3.0),
            (r#"pushpop_reconnects_total"#, 1.0),
            (r#"pushpop_settled_messages_total{topic="t",outcome="complete"}"#, 2.0),
            (r#"pushpop_settled_messages_total{topic="t",outcome="fail"}"#, 1.0),
            (r#"pushpop_stuck_handlers_total{topic="t"}"#, 1.0),
        ];
        for (series, value) in expected {
            assert_eq!(figures.get(series), Some(value), "{series}");
        }
        assert_eq!(figures.series(), expected.map(|(series, _)| series));

        // The labels of a row of the tables.
        for (series, _) in expected {
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels.split(',').filter_map(|label| Some(label.split_once('=')?.0));
            let name = name.trim_end_matches("_sum").trim_end_matches("_count");
            let row = format!("/// | `{name}` |");
            let row = include_str!("metrics.rs").lines().find(|line| line.starts_with(&row));
            let shown = row.and_then(|row| row.split('|').nth(2)).unwrap_or("no row");
            let shown = shown.split(',').map(str::trim).filter(|label| !label.is_empty());
            assert_eq!(shown.collect::<Vec<_>>(), labels.collect::<Vec<_>>(), "{name}");
        }
    }

    #[test]
    fn all_figures_are_described_and_documented() {
        let described = figures(Metrics::new(), Observer::reconnected).described();
        let source = include_str!("metrics.rs");
        let named = source.lines().filter_map(|line| line.strip_prefix("const ")?.split('"').nth(1));
        let named: BTreeSet<String> = named.filter(|name| *name != OTHER).map(str::to_owned).collect();
        let rows = source.lines().filter_map(|line| line.strip_prefix("/// | `pushpop_")?.split('`').next());
        let documented: BTreeSet<String> = rows.map(|name| format!("pushpop_{name}")).collect();
        assert_eq!(named.len(), 15);
        assert_eq!(named, described);
        assert_eq!(named, documented);
    }

    #[test]
    fn topics_beyond_the_first_ones_share_their_figures() {
        let figures = figures(Metrics::new().topics(2), |metrics| {
            for topic in ["a", "b", "c", "d", "a", "c"] {
                metrics.popped(&Popped { topic, count: 1 });
            }
        });
        let popped = ["a", "b", "c", "d", "other"]
            .map(|topic| figures.get(&format!("pushpop_popped_messages_total{{topic={topic:?}}}")));
        assert_eq!(popped, [Some(2.0), Some(1.0), None, None, Some(3.0)]);
    }

    #[test]
    fn all_topics_may_share_their_figures() {
        let figures = figures(Metrics::new().topics(0), |metrics| {
            metrics.popped(&Popped { topic: "a", count: 1 });
            metrics.popped(&Popped { topic: "b", count: 1 });
        });
        assert_eq!(figures.get(r#"pushpop_popped_messages_total{topic="other"}"#), Some(2.0));
        assert_eq!(figures.get(r#"pushpop_popped_messages_total{topic="a"}"#), None);
    }
}
