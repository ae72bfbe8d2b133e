//! The spans around calls.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use pushpop_pg::{NewMessage, Outcome, Worker};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Registry;
use tracing_subscriber::filter::{LevelFilter, dynamic_filter_fn};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

use crate::world::{SOON, World, pop, pop_many};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const SECRET: &str = "hunter2";

/// Writes down the spans that are closed, a line each, and whatever else is logged.
#[derive(Clone, Default)]
pub(crate) struct Notes {
    closed: Arc<Mutex<Vec<String>>>,
    events: Arc<Mutex<String>>,
}

/// What a span says of itself.
#[derive(Default)]
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!(" {field}={value:?}"));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Notes {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        context.span(id).unwrap().extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        values.record(span.extensions_mut().get_mut::<Fields>().unwrap());
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.events.lock().unwrap().push_str(&fields.0);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).unwrap();
        // Those of the driver, for one.
        if span.metadata().target().starts_with("pushpop_pg") {
            let extensions = span.extensions();
            let fields = &extensions.get::<Fields>().unwrap().0;
            self.closed.lock().unwrap().push(format!("{} {}{fields}", span.metadata().level(), span.name()));
        }
    }
}

/// Has each span ask whether it is wanted, whenever it begins. Without it one that begins in one test for the first time,
/// just when another begins to take notes, may be taken for unwanted from then on.
pub(crate) fn ask_each_time() {
    static ASKED: Once = Once::new();
    ASKED.call_once(|| {
        let nobody = Registry::default().with(dynamic_filter_fn(|_, _| false));
        tracing::subscriber::set_global_default(nobody).unwrap();
    });
}

impl Notes {
    /// Those of what is called on this thread.
    pub(crate) fn of<R>(&self, level: LevelFilter, work: impl FnOnce() -> R) -> R {
        let subscriber = Registry::default().with(self.clone().with_filter(level));
        tracing::subscriber::with_default(subscriber, work)
    }

    /// What was logged, but for the spans.
    pub(crate) fn logged(&self) -> String {
        self.events.lock().unwrap().clone()
    }

    #[track_caller]
    fn assert(&self, expected: &[String]) {
        assert_eq!(std::mem::take(&mut *self.closed.lock().unwrap()), expected);
    }
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    let id = notes.of(LevelFilter::DEBUG, || {
        let id = queue.push("t", "m").unwrap();
        pop(&queue, "t").complete().unwrap();
        id
    });
    notes.assert(&[
        format!("DEBUG pushpop.push topic=\"t\" count=1 id={id}"),
        format!("DEBUG pushpop.pop topic=\"t\" count=1 id={id} attempt=1"),
        format!("DEBUG pushpop.settle topic=\"t\" outcome=\"complete\" count=1 id={id}"),
    ]);
}

#[test]
fn a_traceparent_is_shown_by_every_call_on_its_message() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    let message = || NewMessage::new(SECRET).header("traceparent", TRACEPARENT).header("other", SECRET);
    notes.of(LevelFilter::TRACE, || {
        let trace = format!("traceparent={TRACEPARENT:?}");
        let settle = |outcome, id| {
            format!("DEBUG pushpop.settle topic=\"t\" outcome={outcome:?} count=1 id={id} {trace}")
        };
        for outcome in ["complete", "discard", "defer", "release", "fail"] {
            let id = queue.push("t", message()).unwrap();
            let mut lease = pop(&queue, "t");
            lease.extend(Duration::from_secs(600)).unwrap();
            match outcome {
                "complete" => lease.complete().unwrap(),
                "discard" => lease.discard().unwrap(),
                "defer" => lease.defer(Duration::from_secs(60)).unwrap(),
                "release" => {
                    lease.release().unwrap();
                    assert!(queue.complete_many(pop_many(&queue, "t", 1)).unwrap().is_empty());
                }
                _ => lease.fail(SECRET).unwrap(),
            }
            let popped = format!("DEBUG pushpop.pop topic=\"t\" count=1 id={id} attempt=1 {trace}");
            let mut expected = vec![
                format!("DEBUG pushpop.push topic=\"t\" count=1 id={id} {trace}"),
                popped.clone(),
                settle("extend", id),
                settle(outcome, id),
            ];
            if outcome == "release" {
                expected.extend([popped, settle("complete", id)]);
            }
            notes.assert(&expected);
        }
    });
}

#[test]
fn a_worker_has_spans_for_all_that_it_does() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    let worker = Worker::new(&queue).handle("t", 1, |_| {
        // So that spans of the handler's own are within it.
        assert_eq!(tracing::Span::current().metadata().unwrap().name(), "pushpop.handle");
        Ok(Outcome::Discard)
    });
    let id = queue.push("t", NewMessage::new(SECRET).header("traceparent", TRACEPARENT)).unwrap();
    assert!(notes.of(LevelFilter::DEBUG, || worker.work_once().unwrap()));
    let trace = format!("id={id} attempt=1 traceparent={TRACEPARENT:?}");
    notes.assert(&[
        format!("DEBUG pushpop.pop topic=\"t\" count=1 {trace}"),
        format!("INFO pushpop.handle topic=\"t\" {trace}"),
        format!(
            "DEBUG pushpop.settle topic=\"t\" outcome=\"discard\" count=1 id={id} traceparent={TRACEPARENT:?}"
        ),
    ]);
    queue.push("b", "m").unwrap();
    let leases = notes.of(LevelFilter::DEBUG, || queue.pop_any(&["a", "b"], SOON).unwrap());
    notes.assert(&[format!(
        "DEBUG pushpop.pop topic=[\"a\", \"b\"] count=1 id={} attempt=1",
        leases.unwrap().id()
    )]);
}

#[test]
fn calls_in_a_transaction_have_spans_too() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    notes.of(LevelFilter::DEBUG, || {
        let id = queue.transaction(|tx| queue.push_in(tx, "t", "m")).unwrap();
        notes.assert(&[format!("DEBUG pushpop.push topic=\"t\" count=1 id={id}")]);
        let lease = queue.try_pop("t").unwrap().unwrap();
        notes.assert(&[format!("DEBUG pushpop.pop topic=\"t\" count=1 id={id} attempt=1")]);
        queue.transaction(|tx| lease.discard_in(tx)).unwrap();
        notes.assert(&[format!("DEBUG pushpop.settle topic=\"t\" outcome=\"discard\" count=1 id={id}")]);
    });
}

#[test]
fn calls_on_many_messages_say_how_many() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    notes.of(LevelFilter::DEBUG, || {
        let message = || NewMessage::new("m").header("traceparent", TRACEPARENT);
        queue.push_many("t", [message(), message()]).unwrap();
        assert!(queue.complete_many(pop_many(&queue, "t", 10)).unwrap().is_empty());
        assert!(queue.try_pop("t").unwrap().is_none());
    });
    notes.assert(&[
        "DEBUG pushpop.push topic=\"t\" count=2".to_owned(),
        "DEBUG pushpop.pop topic=\"t\" count=2".to_owned(),
        "DEBUG pushpop.settle topic=\"t\" outcome=\"complete\" count=2".to_owned(),
        "DEBUG pushpop.pop topic=\"t\" count=0".to_owned(),
    ]);
}

#[test]
fn calls_that_fail_have_spans_too() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    queue.close();
    notes.of(LevelFilter::DEBUG, || {
        queue.pop("t").map(drop).unwrap_err();
        queue.push_many("", [""; 2]).unwrap_err();
    });
    notes.assert(&[
        "DEBUG pushpop.pop topic=\"t\"".to_owned(),
        "DEBUG pushpop.push topic=\"\" count=2".to_owned(),
    ]);
}

#[test]
fn a_span_lasts_as_long_as_its_call_waits() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    notes.of(LevelFilter::DEBUG, || {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                crate::world::until_wanted(&world, &mut world.client(), "t");
                notes.assert(&[]);
                queue.push("t", "m").unwrap();
            });
            let lease = pop(&queue, "t");
            notes.assert(&[format!("DEBUG pushpop.pop topic=\"t\" count=1 id={} attempt=1", lease.id())]);
        });
    });
}

#[test]
fn spans_show_no_payload_no_token_and_no_other_header() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    let key: Vec<u8> = notes.of(LevelFilter::TRACE, || {
        let message = || NewMessage::new(SECRET).header("secret", SECRET);
        queue.push("t", message()).unwrap();
        queue.push_many("t", [message(), message()]).unwrap();
        let leases = pop_many(&queue, "t", 10);
        let key = world.client().query_one(&world.sql("select key from pushpop.leases"), &[]).unwrap().get(0);
        for lease in leases {
            lease.fail(SECRET).unwrap();
        }
        key
    });
    // The ways in which bytes are shown.
    let bytes: Vec<String> = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let shown = [bytes.concat(), bytes.join(" "), format!("{key:?}").trim_matches(['[', ']']).to_owned()];
    assert_eq!(key.len(), 16);
    let said = format!("{:?} {}", notes.closed.lock().unwrap(), notes.events.lock().unwrap());
    assert_eq!(said.matches("pushpop.").count(), 6, "{said}");
    for secret in shown.iter().map(String::as_str).chain([SECRET]) {
        assert!(!said.contains(secret), "{said}");
    }
}

#[test]
fn spans_are_not_made_for_those_who_want_less() {
    let world = World::new();
    let queue = world.queue();
    let notes = Notes::default();
    notes.of(LevelFilter::INFO, || {
        queue.push("t", "m").unwrap();
        pop(&queue, "t").complete().unwrap();
    });
    notes.assert(&[]);
}
