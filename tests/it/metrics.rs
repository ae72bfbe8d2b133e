//! The figures for the `metrics` crate.

use std::sync::OnceLock;
use std::time::Duration;

use pushpop_pg::{Metrics, NewMessage, Queue};

use crate::recorder::Figures;
use crate::world::{World, pop, pop_many, unique, until};

/// Queues tell on their own threads, so all tests of a process share one recorder: each has topics of its own.
fn figures() -> &'static Figures {
    static FIGURES: OnceLock<Figures> = OnceLock::new();
    FIGURES.get_or_init(|| {
        let figures = Figures::default();
        metrics::set_global_recorder(figures.clone()).unwrap();
        figures
    })
}

fn open(world: &World, metrics: Metrics) -> Queue {
    figures();
    world.open(world.builder().observer(metrics))
}

fn shown(series: &str) -> Option<f64> {
    figures().get(series)
}

/// A caller may be back before its flight is told.
#[track_caller]
fn until_shown(series: &str, value: f64) {
    until(&format!("{series} {value}, instead of {:?}", shown(series)), || shown(series) == Some(value));
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = open(&world, Metrics::default());
    let topic = unique("smoke");
    queue.push(&topic, "m").unwrap();
    pop(&queue, &topic).complete().unwrap();
    for figure in ["pushed_messages", "popped_messages"] {
        until_shown(&format!("pushpop_{figure}_total{{topic=\"{topic}\"}}"), 1.0);
    }
    until_shown(&format!("pushpop_settled_messages_total{{topic=\"{topic}\",outcome=\"complete\"}}"), 1.0);
    assert!(figures().described().contains("pushpop_pushed_messages_total"));
}

#[test]
fn figures_agree_with_what_was_done() {
    let world = World::new();
    let queue = open(&world, Metrics::new());
    let topic = unique("t");
    let of = |figure: &str| format!("pushpop_{figure}_total{{topic=\"{topic}\"}}");
    let settled =
        |outcome| format!("pushpop_settled_messages_total{{topic=\"{topic}\",outcome=\"{outcome}\"}}");

    let twice = NewMessage::new("m");
    queue.push(&topic, twice.clone()).unwrap();
    queue.push_many(&topic, [twice, NewMessage::new("n"), NewMessage::new("o")]).unwrap();
    until_shown(&of("pushed_messages"), 3.0);
    until_shown(&of("duplicate_pushes"), 1.0);

    let mut leases = pop_many(&queue, &topic, 10);
    until_shown(&of("popped_messages"), 3.0);
    leases[0].extend(Duration::from_secs(600)).unwrap();
    leases.remove(0).discard().unwrap();
    leases.remove(0).fail("on purpose").unwrap();
    assert!(queue.complete_many(leases).unwrap().is_empty());
    for outcome in ["discard", "fail", "complete"] {
        until_shown(&settled(outcome), 1.0);
    }
    until_shown(&of("extended_leases"), 1.0);

    assert_eq!(shown(&of("lost_leases")), Some(0.0), "what has not happened yet is shown as well");
    let topic = unique("lost");
    let of = |figure: &str| format!("pushpop_{figure}_total{{topic=\"{topic}\"}}");
    queue.push(&topic, "m").unwrap();
    let stale = pop(&queue.with_lease(Duration::from_secs(1)), &topic);
    pop(&queue, &topic).release().unwrap();
    stale.complete().unwrap_err();
    until_shown(&of("lost_leases"), 1.0);
    until_shown(&format!("pushpop_settled_messages_total{{topic=\"{topic}\",outcome=\"release\"}}"), 1.0);
    assert_eq!(shown(&of("abandoned_messages")), Some(0.0));

    // Other tests have flights too.
    for kind in ["push", "pop", "settle"] {
        let of =
            |figure: &str| shown(&format!("pushpop_flight_{figure}{{kind=\"{kind}\"}}")).unwrap_or_default();
        until("the flights are told", || {
            let (flights, callers) = (of("duration_seconds_count"), of("callers_sum"));
            flights >= 2.0
                && callers >= flights
                && of("messages_sum") >= 4.0
                && of("duration_seconds_sum") > 0.0
        });
    }
    assert_eq!(shown("pushpop_failed_flights_total{kind=\"settle\"}").unwrap_or_default(), 0.0);

    let reconnects = || shown("pushpop_reconnects_total").unwrap();
    let before = reconnects();
    let sql = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1";
    world.client().query(sql, &[&world.schema]).unwrap();
    queue.push(&topic, "m").unwrap();
    until("a reconnect is counted", || reconnects() > before);
}

#[test]
fn statements_that_fail_are_counted() {
    let world = World::new();
    let queue = open(&world, Metrics::new());
    world.client().batch_execute(&world.sql("drop table pushpop.messages cascade")).unwrap();
    queue.push("t", "m").unwrap_err();
    until("a failure is counted", || {
        shown("pushpop_failed_flights_total{kind=\"push\"}").is_some_and(|failed| failed >= 1.0)
    });
}

#[test]
fn many_topics_end_in_other() {
    let world = World::new();
    let queue = open(&world, Metrics::new().topics(2));
    let topics = ["a", "b", "c", "d"].map(unique);
    let of = |topic: &str| format!("pushpop_pushed_messages_total{{topic=\"{topic}\"}}");
    for (i, topic) in topics.iter().enumerate() {
        queue.push(topic, "m").unwrap();
        // What is told first is told apart.
        until_shown(&of(if i < 2 { topic } else { "other" }), if i < 3 { 1.0 } else { 2.0 });
    }
    assert_eq!(topics.each_ref().map(|topic| shown(&of(topic))), [Some(1.0), Some(1.0), None, None]);
    assert!(!figures().series().iter().any(|series| series.contains(&topics[3])));
}
