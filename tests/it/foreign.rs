//! Code of others that the queue's threads run: observers, subscribers of `tracing`, a panic hook. They call the queue, are
//! slow, or panic.

use std::cell::Cell;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use pushpop_pg::{
    Abandoned, ErrorKind, Flight, Handled, LeaseLost, NewMessage, Observer, Popped, Pushed, Queue, Settled,
    Stuck, Worker,
};
use pushpop_server::Server;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

use crate::world::{World, apart, builder_apart, drain, is_apart, pop, stats, succeeds, text, until, url};

const SECOND: Duration = Duration::from_secs(1);

/// What all of them have been told, but for what is about the topic `log`.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What they do then.
static REACTION: OnceLock<Reaction> = OnceLock::new();

type Reaction = Box<dyn Fn(&str) + Send + Sync>;

thread_local! {
    static REACTS: Cell<bool> = const { Cell::new(false) };
}

fn told(what: String) {
    TOLD.lock().unwrap().push(what.clone());
    // A call of theirs is told as well.
    if !REACTS.replace(true) {
        if let Some(react) = REACTION.get() {
            react(&what);
        }
        REACTS.set(false);
    }
}

fn was_told(words: &str) -> bool {
    TOLD.lock().unwrap().iter().any(|told| told.contains(words))
}

struct Told;

impl Told {
    fn of(&self, topic: &str, event: &dyn Debug) {
        if topic != "log" {
            told(format!("{event:?}"));
        }
    }
}

impl Observer for Told {
    fn pushed(&self, event: &Pushed<'_>) {
        self.of(event.topic(), event);
    }
    fn popped(&self, event: &Popped<'_>) {
        self.of(event.topic(), event);
    }
    fn settled(&self, event: &Settled<'_>) {
        self.of(event.topic(), event);
    }
    fn flight(&self, event: &Flight<'_>) {
        self.of(event.topic(), event);
    }
    fn lease_lost(&self, event: &LeaseLost<'_>) {
        self.of(event.topic(), event);
    }
    fn abandoned(&self, event: &Abandoned<'_>) {
        self.of(event.topic(), event);
    }
    fn handled(&self, event: &Handled<'_>) {
        self.of(event.topic(), event);
    }
    fn stuck(&self, event: &Stuck<'_>) {
        self.of(event.topic(), event);
    }
    fn reconnected(&self) {
        told("Reconnected".into());
    }
}

#[derive(Default)]
struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!(" {field}={value:?}"));
    }
}

impl<S: Subscriber> Layer<S> for Told {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("pushpop_pg") {
            let mut words = Words::default();
            event.record(&mut words);
            told(words.0);
        }
    }
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        if attributes.metadata().target().starts_with("pushpop_pg") {
            told(format!("span {}", attributes.metadata().name()));
        }
    }
}

/// For all threads of this process, from now on.
fn listen(reaction: impl Fn(&str) + Send + Sync + 'static) {
    assert!(REACTION.set(Box::new(reaction)).is_ok());
    tracing::subscriber::set_global_default(Registry::default().with(Told)).unwrap();
}

/// A server and a queue of which all that can be told is told.
fn through_all(builder: pushpop_pg::Builder) {
    let mut server = Server::start().unwrap();
    let queue = builder
        .observer(Told)
        .operation_timeout(SECOND)
        .connect_timeout(SECOND)
        .lease(SECOND)
        .connect(&server.url())
        .unwrap();
    let _ = QUEUE.set(queue.clone());
    let mut admin = postgres::Client::connect(&server.url(), postgres::NoTls).unwrap();

    // Calls, and leases that are lost.
    queue.push_many("t", ["m", "n"]).unwrap();
    let stale = pop(&queue, "t");
    pop(&queue, "t").complete().unwrap();
    pop(&queue, "t").complete().unwrap();
    stale.complete().unwrap_err();
    for words in ["Pushed {", "Popped {", "Settled {", "Flight {", "LeaseLost {"] {
        until(words, || was_told(words));
    }

    // A message that comes when its caller is gone.
    queue.push("t", "m").unwrap();
    admin.batch_execute("begin; lock table pushpop.leases in access exclusive mode").unwrap();
    assert!(queue.pop_timeout("t", SECOND / 10).unwrap().is_none());
    admin.batch_execute("commit").unwrap();
    until("it is given back", || was_told("Abandoned {"));
    pop(&queue, "t").complete().unwrap();

    // Handlers that fail, panic, run for too long, and outlive the end.
    let worker = Worker::new(&queue).limit(SECOND * 3).grace(Duration::ZERO).handle("w", 4, |job| {
        match job.payload() {
            b"fails" => return Err("on purpose".into()),
            b"panics" => panic!("on purpose"),
            b"takes long" => until("it has taken too long", || job.is_lost()),
            b"outlives" => until("it is taken away", || job.is_lost()),
            _ => {}
        }
        Ok(())
    });
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        for payload in ["fails", "panics", "takes long"] {
            queue.push("w", NewMessage::new(payload).max_attempts(1)).unwrap();
        }
        for words in ["a handler failed", "a handler panicked", "is dead", "Stuck {", "is still running"] {
            until(words, || was_told(words));
        }
        until("its limit is told", || was_told("has run longer than"));
        queue.push("w", "outlives").unwrap();
        until("it is popped", || queue.topic("w").stats().is_ok_and(|stats| stats.leased() == 1));
        thread::sleep(SECOND / 2);
        worker.stopper().stop();
        assert!(running.join().unwrap().unfinished() <= 1);
    });

    // A server that does not answer, and one that is not there.
    server.pause().unwrap();
    assert!(queue.push("t", "lost?").unwrap_err().is_retryable());
    until("the flight is written off", || was_told("has not been answered"));
    server.resume().unwrap();
    until("pushes succeed again", || queue.push("t", "m").is_ok());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pop(&queue, "u"));
        server.stop().unwrap();
        queue.push("t", "m").unwrap_err();
        until("the outage is told", || was_told("lost the server"));
        until("that of the listener too", || was_told("cannot listen"));
        server.start_again().unwrap();
        until("pushes succeed again", || queue.push("u", "m").is_ok());
        until("the end is told", || was_told("the server is back") && was_told("Reconnected"));
        waiting.join().unwrap().complete().unwrap();
    });

    // A worker that cannot go on, and the end.
    let worker = Worker::new(&queue).handle("w", 2, |_| Ok(()));
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().map(drop));
        let mut admin = postgres::Client::connect(&server.url(), postgres::NoTls).unwrap();
        until("the schema is dropped", || admin.batch_execute("drop schema pushpop cascade").is_ok());
        assert_eq!(running.join().unwrap().unwrap_err().kind(), ErrorKind::Schema);
    });
    until("the worker's end is told", || was_told("the worker stops"));
    queue.close();
    until("the end is told", || was_told("closed"));
}

static QUEUE: OnceLock<Queue> = OnceLock::new();

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.open(world.builder().observer(Told));
    queue.push("foreign", "m").unwrap();
    until("it is told", || was_told("Pushed { topic: \"foreign\""));
}

/// Under a lock of the queue's it would wait for itself.
#[test]
fn they_may_call_the_queue_whatever_they_are_told() {
    if !is_apart() {
        let world = World::new();
        return drop(succeeds(apart("foreign::they_may_call_the_queue_whatever_they_are_told", &world)));
    }
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    listen(move |what| {
        let Some(queue) = QUEUE.get() else { return };
        drop(queue.push("log", what.as_bytes()));
        drop(queue.topic("log").stats());
        if what.contains("the worker stops") || what.contains("closed") {
            queue.close();
        }
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        told(format!("panic hook {info}"));
        hook(info);
    }));
    through_all(Queue::builder());
    assert!(was_told("panic hook"));
    assert!(calls.load(Ordering::Relaxed) > 20, "{calls:?}");
}

#[test]
fn subscribers_that_panic_break_nothing() {
    if !is_apart() {
        let world = World::new();
        return drop(succeeds(apart("foreign::subscribers_that_panic_break_nothing", &world)));
    }
    // Spans begin on the threads of their callers, and in a worker's: it is told of that below.
    listen(|what| assert!(what.starts_with("span "), "a subscriber panics on purpose"));
    through_all(Queue::builder());
}

/// A worker's thread that dies ends the worker, with an error that says so.
#[test]
fn a_worker_whose_thread_dies_says_so() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        return drop(succeeds(apart("foreign::a_worker_whose_thread_dies_says_so", &world)));
    }
    listen(|what| assert!(what != "span pushpop.handle", "a subscriber panics on purpose"));
    let queue = builder_apart().connect(url()).unwrap();
    let worker = Worker::new(&queue).handle("t", 3, |_| Ok(()));
    let died = |result: Result<(), pushpop_pg::Error>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Database, "{error:?}");
        assert!(error.to_string().contains("thread pushpop-work of the queue panicked"), "{error}");
    };
    queue.push("t", "m").unwrap();
    died(worker.run_until_idle().map(drop));
    queue.push("t", "m").unwrap();
    died(worker.run().map(drop));
}

/// The function that extends leases is replaced by one whose answer cannot be read.
#[test]
fn a_heartbeat_that_dies_is_not_told_as_a_time_out() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        let mut client = world.client();
        let broken = "create or replace function pushpop.heartbeat(topics text[], ids uuid[], tokens bytea[],
                          leases double precision[])
                      returns table (place int, result text, lease_until timestamptz) language sql
                      as 'select null::int, null::text, null::timestamptz'";
        let drop_it = "drop function pushpop.heartbeat(text[], uuid[], bytea[], double precision[])";
        client.batch_execute(&world.sql(&format!("{drop_it}; {broken}"))).unwrap();
        return drop(succeeds(apart("foreign::a_heartbeat_that_dies_is_not_told_as_a_time_out", &world)));
    }
    listen(|_| {});
    let queue = builder_apart().lease(SECOND * 3).connect(url()).unwrap();
    queue.push("t", "m").unwrap();
    let words = "leases were not extended, trying again: thread pushpop-beat of the queue panicked";
    let worker = Worker::new(&queue).handle("t", 1, |_| {
        until("it is told", || was_told(words));
        Ok(())
    });
    worker.work_once().unwrap();
    assert!(!was_told("in time"), "it was no time-out");
}

/// Closed until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn pass(&self) {
        let open = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(open, |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

/// Opens it at the end of a test, however that ends.
struct Opens(Gate);

impl Drop for Opens {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Does not come back from what is told of a topic.
struct Slow {
    gate: Gate,
    held: Arc<AtomicUsize>,
}

impl Slow {
    fn of(&self, topic: &str) {
        if topic == "slow" {
            self.held.fetch_add(1, Ordering::SeqCst);
            self.gate.pass();
        }
    }
}

impl Observer for Slow {
    fn pushed(&self, event: &Pushed<'_>) {
        self.of(event.topic());
    }
    fn stuck(&self, event: &Stuck<'_>) {
        self.of(event.topic());
    }
}

#[test]
fn a_slow_observer_holds_up_neither_callers_nor_connections() {
    let world = World::new();
    let (gate, held) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
    let observer = Slow { gate: gate.clone(), held: Arc::clone(&held) };
    let queue = world.open(world.builder().pool_size(1).observer(observer));
    let opens = Opens(gate);
    for n in 1..=5 {
        queue.push("slow", "m").unwrap();
        until("it is told", || held.load(Ordering::SeqCst) == n);
        queue.push("t", format!("{n}")).unwrap();
        let lease = pop(&queue, "t");
        assert_eq!(text(lease.payload()), format!("{n}"));
        lease.complete().unwrap();
    }
    drop(opens);
    assert_eq!(drain(&queue, "slow").len(), 5);
}

#[test]
fn a_slow_observer_of_stuck_handlers_costs_no_lease() {
    let world = World::new();
    let (gate, held) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
    let observer = Slow { gate: gate.clone(), held: Arc::clone(&held) };
    let queue = world.open(world.builder().lease(SECOND).observer(observer));
    let (over, handled) = (AtomicBool::new(false), AtomicUsize::new(0));
    let worker = Worker::new(&queue)
        .handle("slow", 1, |job| {
            until("the test is over", || over.load(Ordering::SeqCst));
            assert!(!job.is_lost(), "its lease was not extended");
            Ok(())
        })
        .handle("t", 2, |_| {
            handled.fetch_add(1, Ordering::SeqCst);
            Ok(())
        });
    thread::scope(|scope| {
        let opens = Opens(gate);
        scope.spawn(|| worker.run().unwrap());
        queue.push("slow", "m").unwrap();
        until("it is told", || held.load(Ordering::SeqCst) == 1);
        // Some leases long.
        for n in 1..=30 {
            queue.push("t", "m").unwrap();
            until("another is handled", || handled.load(Ordering::SeqCst) == n);
            thread::sleep(SECOND / 10);
        }
        over.store(true, Ordering::SeqCst);
        until("it is settled", || stats(&queue, "slow").settled() == 1);
        worker.stopper().stop();
        drop(opens);
    });
}

/// A subscriber that does not come back from the first thing it is told of an outage.
#[test]
fn a_slow_subscriber_holds_up_nobody() {
    if !is_apart() {
        let world = World::new();
        return drop(succeeds(apart("foreign::a_slow_subscriber_holds_up_nobody", &world)));
    }
    let gate = Gate::default();
    let (opens, held) = (Opens(gate.clone()), Arc::new(AtomicBool::new(false)));
    let is_held = Arc::clone(&held);
    listen(move |what| {
        if what.contains("lost the server") {
            is_held.store(true, Ordering::SeqCst);
            gate.pass();
        }
    });
    let mut server = Server::start().unwrap();
    let queue = Queue::builder().pool_size(1).operation_timeout(SECOND * 5).connect(&server.url()).unwrap();
    queue.push("t", "m").unwrap();
    server.stop().unwrap();
    queue.push("t", "m").unwrap_err();
    until("it is told", || held.load(Ordering::SeqCst));
    server.start_again().unwrap();
    until("pushes succeed again", || queue.push("u", "m").is_ok());
    pop(&queue, "u").complete().unwrap();
    assert_eq!(stats(&queue, "u").settled(), 1);
    drop(opens);
    until("all is told in the end", || was_told("the server is back"));
}
