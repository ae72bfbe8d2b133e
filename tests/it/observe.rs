//! What an observer is told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pushpop_pg::{Abandoned, Flight, LeaseLost, NewMessage, Observer, Popped, Pushed, Settled};

use crate::world::{World, pop, pop_many, stats, until};

/// Writes down what it is told, a line each.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    fn note(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Observer for Notes {
    fn pushed(&self, e: &Pushed<'_>) {
        self.note(format!("pushed {} {} {}", e.topic(), e.count(), e.duplicates()));
    }
    fn popped(&self, e: &Popped<'_>) {
        self.note(format!("popped {} {}", e.topic(), e.count()));
    }
    fn settled(&self, e: &Settled<'_>) {
        self.note(format!("settled {} {} {}", e.topic(), e.id(), e.outcome()));
    }
    fn flight(&self, e: &Flight<'_>) {
        assert!(e.duration() > Duration::ZERO);
        self.note(format!(
            "flight {} {} {} {} {}",
            e.topic(),
            e.kind(),
            e.callers(),
            e.rows(),
            e.succeeded()
        ));
    }
    fn lease_lost(&self, e: &LeaseLost<'_>) {
        self.note(format!("lost {} {} {}", e.topic(), e.id(), e.outcome()));
    }
    fn abandoned(&self, e: &Abandoned<'_>) {
        self.note(format!("abandoned {} {}", e.topic(), e.count()));
    }
    fn reconnected(&self) {
        self.note("reconnected".into());
    }
}

#[test]
fn smoke() {
    let world = World::new();
    let notes = Notes::default();
    let queue = world.open(world.builder().observer(notes.clone()));
    let id = queue.push("t", "m").unwrap();
    pop(&queue, "t").complete().unwrap();
    let expected = [
        "pushed t 1 0".to_owned(),
        "flight t push 1 1 true".to_owned(),
        "popped t 1".to_owned(),
        "flight t pop 1 1 true".to_owned(),
        format!("settled t {id} complete"),
        "flight t settle 1 1 true".to_owned(),
    ];
    // A caller may be back before the end of its flight is told.
    let mut told = Vec::new();
    until("all is told", || {
        told.extend(notes.take());
        told.len() >= expected.len()
    });
    told.sort_unstable();
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    assert_eq!(told, expected);
}

#[test]
fn all_that_happens_is_told() {
    let world = World::new();
    let notes = Notes::default();
    let queue = world.open(world.builder().observer(notes.clone()));
    let told = |line: &str| until(line, || notes.0.lock().unwrap().iter().any(|l| l == line));

    let message = NewMessage::new("m");
    queue.push_many("t", [message.clone(), NewMessage::new("n")]).unwrap();
    told("pushed t 2 0");
    queue.push_many("t", [message.clone(), NewMessage::new("o")]).unwrap();
    told("pushed t 2 1");
    queue.push("t", message).unwrap();
    told("pushed t 1 1");

    let mut leases = pop_many(&queue, "t", 10);
    told("popped t 3");
    for outcome in ["extend", "fail", "defer", "discard"] {
        let id = leases[0].id();
        match outcome {
            "extend" => leases[0].extend(Duration::from_secs(60)).unwrap(),
            "fail" => leases.remove(0).fail("m").unwrap(),
            "defer" => leases.remove(0).defer(Duration::from_secs(60)).unwrap(),
            _ => leases.remove(0).discard().unwrap(),
        }
        told(&format!("settled t {id} {outcome}"));
    }

    queue.push("lost", "m").unwrap();
    let stale = pop(&queue.with_lease(Duration::from_secs(1)), "lost");
    pop(&queue, "lost").release().unwrap();
    let id = stale.id();
    told(&format!("settled lost {id} release"));
    stale.complete().unwrap_err();
    told(&format!("lost lost {id} complete"));

    let sql = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1";
    world.client().query(sql, &[&world.schema]).unwrap();
    queue.push("t", "m").unwrap();
    told("reconnected");
}

/// Panics at everything.
struct Panics;

impl Observer for Panics {
    fn pushed(&self, _: &Pushed<'_>) {
        panic!("an observer panics on purpose")
    }
    fn popped(&self, _: &Popped<'_>) {
        panic!("an observer panics on purpose")
    }
    fn settled(&self, _: &Settled<'_>) {
        panic!("an observer panics on purpose")
    }
    fn flight(&self, _: &Flight<'_>) {
        panic!("an observer panics on purpose")
    }
    fn abandoned(&self, _: &Abandoned<'_>) {
        panic!("an observer panics on purpose")
    }
    fn lease_lost(&self, _: &LeaseLost<'_>) {
        panic!("an observer panics on purpose")
    }
}

#[test]
fn an_observer_that_panics_breaks_nothing() {
    let world = World::new();
    let queue = world.open(world.builder().observer(Panics).pool_size(1));
    for _ in 0..3 {
        queue.push_many("t", ["a", "b"]).unwrap();
        pop(&queue, "t").complete().unwrap();
        pop(&queue, "t").release().unwrap();
        pop(&queue, "t").discard().unwrap();
    }
    assert_eq!(stats(&queue, "t").settled(), 6);
}

struct Empty;

impl Observer for Empty {}

#[test]
fn an_observer_need_not_listen_to_anything() {
    let world = World::new();
    let queue = world.open(world.builder().observer(Empty));
    queue.push("t", "m").unwrap();
    pop(&queue, "t").complete().unwrap();
}
