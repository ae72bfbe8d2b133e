//! Many threads on one queue.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::{ErrorKind, Flight, NewMessage, Observer, Queue, State};

use crate::world::{
    SOON, World, drain, has_connection, pop, pop_many, stats, text, until, until_listening, until_locked,
    until_wanted,
};

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    thread::scope(|scope| {
        for i in 0..4 {
            let queue = queue.clone();
            scope.spawn(move || queue.push("t", format!("{i}")).unwrap());
        }
    });
    assert_eq!(drain(&queue, "t").len(), 4);
}

#[test]
fn a_queue_is_shared_and_sent() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    fn sent<T: Send + 'static>() {}
    shared::<Queue>();
    shared::<pushpop_pg::Error>();
    sent::<pushpop_pg::Lease>();
    sent::<NewMessage>();
}

/// The original's own test.
#[test]
fn ten_threads_push_and_pop_a_thousand_each() {
    let world = World::new();
    let queue = world.queue();
    let seen = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        for t in 0..10 {
            let queue = queue.clone();
            scope.spawn(move || (0..1000).for_each(|i| assert!(queue.push("t", format!("{t}-{i}")).is_ok())));
        }
        for _ in 0..10 {
            let (queue, seen) = (queue.clone(), &seen);
            scope.spawn(move || {
                for _ in 0..1000 {
                    let lease = pop(&queue, "t");
                    assert!(seen.lock().unwrap().insert(text(lease.payload())), "twice: {lease:?}");
                    lease.complete().unwrap();
                }
            });
        }
    });
    assert_eq!(seen.lock().unwrap().len(), 10_000);
    assert!(queue.try_pop("t").unwrap().is_none());
    let stats = stats(&queue, "t");
    assert_eq!((stats.ready(), stats.leased(), stats.settled()), (0, 0, 10_000));
}

/// A flight: its kind, its callers, its rows.
type Told = (&'static str, usize, usize);

/// Keeps what is told of flights.
#[derive(Clone, Default)]
struct Flights(Arc<Mutex<Vec<Told>>>);

impl Observer for Flights {
    fn flight(&self, event: &Flight<'_>) {
        self.0.lock().unwrap().push((event.kind(), event.callers(), event.rows()));
    }
}

#[test]
fn calls_of_many_threads_share_flights() {
    let world = World::new();
    let flights = Flights::default();
    let queue = world.open(world.builder().observer(flights.clone()));
    let barrier = Barrier::new(64);
    let seen = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        for t in 0..64 {
            let (queue, barrier, seen) = (&queue, &barrier, &seen);
            scope.spawn(move || {
                for i in 0..10 {
                    barrier.wait();
                    queue.push("t", format!("{t}-{i}")).unwrap();
                    let lease = pop(queue, "t");
                    assert!(seen.lock().unwrap().insert(text(lease.payload())));
                    lease.complete().unwrap();
                }
            });
        }
    });
    assert_eq!(seen.lock().unwrap().len(), 640);
    for kind in ["push", "pop", "settle"] {
        let told = |f: &dyn Fn(&Told) -> usize| {
            flights.0.lock().unwrap().iter().filter(|e| e.0 == kind).map(f).collect::<Vec<_>>()
        };
        // The last caller may be back before its flight is told.
        until("all flights are told", || told(&|e| e.2).iter().sum::<usize>() == 640);
        // A few for each round of 64 callers, instead of one for each caller.
        let flights = told(&|e| e.1).len();
        assert!(flights <= 640 / 4, "640 calls took {flights} flights to {kind}");
    }
}

#[test]
fn one_connection_serves_64_threads() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for t in 0..64 {
            let (queue, done) = (&queue, &done);
            scope.spawn(move || {
                let topic = format!("t{}", t % 8);
                for _ in 0..5 {
                    queue.push(&topic, "m").unwrap();
                    pop(queue, &topic).complete().unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(done.into_inner(), 320);
    let mut client = world.client();
    let sql =
        "select count(*) from pg_stat_activity where application_name = $1 and query not ilike 'listen%'";
    assert_eq!(client.query_one(sql, &[&world.schema]).unwrap().get::<_, i64>(0), 1);
}

#[test]
fn waiting_pops_of_one_topic_do_not_hold_up_another() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..16).map(|_| scope.spawn(|| pop(&queue, "empty"))).collect();
        until_wanted(&world, &mut client, "empty");
        for _ in 0..10 {
            queue.push("busy", "m").unwrap();
            pop(&queue, "busy").complete().unwrap();
        }
        queue.push_many("empty", vec!["m"; 16]).unwrap();
        waiting.into_iter().for_each(|t| t.join().unwrap().complete().unwrap());
    });
}

/// One of many callers of a flight whose message the server refuses: by a trigger, as nothing that
/// passes the limits is refused otherwise.
#[test]
fn an_error_in_a_shared_flight_reaches_its_own_caller_only() {
    let world = World::new();
    let flights = Flights::default();
    let queue = world.open(world.builder().observer(flights.clone()));
    let mut client = world.client();
    client
        .batch_execute(&world.sql(
            "create function pushpop.refuse_poison() returns trigger language plpgsql as $$
             begin
               if new.payload = 'poison' then raise exception 'poisoned' using errcode = 'P0042'; end if;
               return new;
             end $$;
             create trigger poison before insert on pushpop.messages for each row execute function pushpop.refuse_poison()",
        ))
        .unwrap();
    let barrier = Barrier::new(33);
    let mut holder = world.client();
    thread::scope(|scope| {
        // While the table is locked, everything gathers behind the first flight.
        let mut tx = holder.transaction().unwrap();
        tx.batch_execute(&world.sql("lock table pushpop.messages in exclusive mode")).unwrap();
        let calls: Vec<_> = (0..32)
            .map(|i| {
                let (queue, barrier) = (&queue, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    let payload = if i % 8 == 3 { "poison" } else { "fine" };
                    (payload, queue.push("t", payload))
                })
            })
            .collect();
        barrier.wait();
        thread::sleep(Duration::from_millis(200));
        tx.rollback().unwrap();
        for call in calls {
            let (payload, result) = call.join().unwrap();
            match payload {
                "poison" => assert_eq!(result.unwrap_err().sqlstate(), Some("P0042")),
                _ => drop(result.unwrap().to_string()),
            }
        }
    });
    // The last caller may be back before its flight is told.
    until("a shared flight is told", || flights.0.lock().unwrap().iter().any(|f| f.1 > 1));
    assert_eq!(drain(&queue, "t").len(), 28);
}

/// Leases that are settled together while one of them is lost.
#[test]
fn a_lost_lease_in_a_shared_flight_fails_alone() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "lost").unwrap();
    let stale = pop(&queue.with_lease(Duration::from_secs(1)), "t");
    let fresh = pop(&queue, "t");
    queue.push_many("t", (0..31).map(|i| format!("{i}"))).unwrap();
    let barrier = Barrier::new(32);
    thread::scope(|scope| {
        for lease in pop_many(&queue, "t", 31).into_iter().chain([stale]) {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                let lost = lease.payload() == b"lost";
                match lease.complete() {
                    Ok(()) => assert!(!lost),
                    Err(e) => assert!(lost && e.error().kind() == ErrorKind::LeaseLost, "{e:?}"),
                }
            });
        }
    });
    fresh.complete().unwrap();
    assert_eq!(stats(&queue, "t").settled(), 32);
}

// The end.

#[test]
fn close_ends_waiting_pops_and_iterators() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("held", ["a", "b", "c", "d"]).unwrap();
    let mut leases = pop_many(&queue, "held", 4);
    let mut client = world.client();
    thread::scope(|scope| {
        let pops = scope.spawn(|| queue.pop("t").unwrap_err().kind());
        let timeouts = scope.spawn(|| queue.pop_timeout("t", Duration::MAX).unwrap_err().kind());
        let many = scope.spawn(|| queue.pop_many("t", 9, SOON * 9).unwrap_err().kind());
        let iter = scope.spawn(|| queue.iter("u").count());
        until_wanted(&world, &mut client, "t");
        until_wanted(&world, &mut client, "u");
        let started = Instant::now();
        queue.clone().close();
        assert_eq!(pops.join().unwrap(), ErrorKind::Closed);
        assert_eq!(timeouts.join().unwrap(), ErrorKind::Closed);
        assert_eq!(many.join().unwrap(), ErrorKind::Closed);
        assert_eq!(iter.join().unwrap(), 0);
        assert!(started.elapsed() < SOON / 2);
    });
    // Leases that are held can be settled.
    leases[3].extend(Duration::from_secs(60)).unwrap();
    leases.remove(0).complete().unwrap();
    leases.remove(0).fail("m").unwrap();
    leases.remove(0).release().unwrap();
    assert!(queue.complete_many(leases).unwrap().is_empty());

    let closed = |e: pushpop_pg::Error| assert_eq!(e.kind(), ErrorKind::Closed, "{e:?}");
    closed(queue.push("t", "m").unwrap_err());
    closed(queue.push_many("t", ["m"]).unwrap_err());
    closed(queue.try_pop("t").map(drop).unwrap_err());
    closed(queue.pop("t").map(drop).unwrap_err());
    closed(queue.pop_timeout("t", SOON).map(drop).unwrap_err());
    closed(queue.transaction(|_| Ok(())).unwrap_err());
    assert!(queue.iter("t").next().is_none());
    // Looking is still possible.
    assert!(queue.find("t", NewMessage::new("").id()).unwrap().is_none());
    assert_eq!(stats(&queue, "held").settled(), 2);
    queue.close();
}

#[test]
fn closing_ends_the_threads_in_the_end() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    assert!(queue.pop_timeout("u", Duration::from_millis(100)).unwrap().is_none());
    queue.close();
    drop(queue);
    let mut client = world.client();
    until("connections end", || !has_connection(&world, &mut client, "true"));
}

#[test]
fn closing_waits_only_for_what_is_on_its_way() {
    let world = World::new();
    let started = Instant::now();
    for _ in 0..60 {
        let queue = world.open(world.builder().pool_size(1));
        queue.push("t", "m").unwrap();
        queue.close();
    }
    // A second each, if there were something to wait for.
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
}

#[test]
fn a_queue_that_is_closed_listens_no_longer() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop("t"));
        until_listening(&world, &mut client);
        queue.close();
        assert_eq!(waiting.join().unwrap().unwrap_err().kind(), ErrorKind::Closed);
    });
    until("it does not listen", || !has_connection(&world, &mut client, "query ilike 'listen%'"));
}

/// The threads of this process whose names begin so.
#[cfg(target_os = "linux")]
fn threads(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|comm| comm.starts_with(name)).count()
}

/// Runs a test once more in a process of its own, where no other has queues, and returns the schema to the one there.
#[cfg(target_os = "linux")]
fn alone(test: &str) -> Option<String> {
    const CHILD: &str = "PUSHPOP_TEST_THREADS_OF";
    if let Ok(schema) = std::env::var(CHILD) {
        return Some(schema);
    }
    let world = World::new();
    world.queue();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("threads::{test}"), "--nocapture"])
        .env(CHILD, &world.schema)
        .env("PUSHPOP_TEST_DATABASE_URL", &world.url)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    None
}

#[test]
#[cfg(target_os = "linux")]
fn threads_without_work_end_and_others_begin_with_it() {
    let Some(schema) = alone("threads_without_work_end_and_others_begin_with_it") else { return };
    let queue = Queue::builder().schema(schema).pool_size(2).connect(crate::world::url()).unwrap();
    let work = || {
        thread::scope(|scope| {
            for topic in ["a", "b", "c"] {
                let queue = &queue;
                scope.spawn(move || {
                    queue.push(topic, "m").unwrap();
                    pop(queue, topic).complete().unwrap();
                });
            }
        });
        assert!((1..=2).contains(&threads("pushpop-flight")));
    };
    work();
    // Half a minute without any.
    let since = Instant::now();
    while threads("pushpop-flight") > 0 {
        assert!(since.elapsed() < SOON * 4, "they go on");
        thread::sleep(Duration::from_millis(100));
    }
    work();
}

#[test]
#[cfg(target_os = "linux")]
fn a_queue_has_a_thread_for_each_connection_and_they_end_with_it() {
    let Some(schema) = alone("a_queue_has_a_thread_for_each_connection_and_they_end_with_it") else {
        return;
    };
    let queue = Queue::builder().schema(schema).pool_size(3).connect(crate::world::url()).unwrap();
    for round in 0..3 {
        thread::scope(|scope| {
            for i in 0..40 {
                let queue = &queue;
                scope.spawn(move || {
                    let topic = format!("{}", i % 8);
                    for _ in 0..5 {
                        queue.push(&topic, "m").unwrap();
                        pop(queue, &topic).complete().unwrap();
                    }
                    let flights = threads("pushpop-flight");
                    assert!((1..=3).contains(&flights), "{flights} threads for 3 connections");
                });
            }
        });
        assert_eq!((threads("pushpop-keep"), threads("pushpop-listen") <= 1), (1, true), "round {round}");
    }
    drop(queue);
    until("its threads end", || threads("pushpop-") == 0);
}

/// One flight of a topic at a time is a rule for flights that get on.
#[test]
fn a_flight_that_waits_for_a_lock_does_not_hold_up_the_next() {
    let world = World::new();
    let queue = world.queue();
    let twin = NewMessage::new("twin");
    let (mut holder, mut admin) = (world.client(), world.client());
    let mut tx = holder.transaction().unwrap();
    queue.push_in(&mut tx, "t", twin.clone()).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.push("t", twin.clone()));
        until_locked(&world, &mut admin);
        queue.push("t", "other").unwrap();
        assert!(!waiting.is_finished(), "it went before the flight that waited");
        tx.rollback().unwrap();
        waiting.join().unwrap().unwrap();
    });
    let mut delivered = drain(&queue, "t");
    delivered.sort();
    assert_eq!(delivered, ["other", "twin"]);
}

/// More than one flight can carry, and with leases of different lengths: those who were left behind
/// used to send the same ones again and again.
#[test]
fn pops_that_do_not_fit_one_flight_wait_quietly_and_are_served() {
    let world = World::new();
    let flights = Flights::default();
    let queue = world.open(world.builder().observer(flights.clone()));
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..24)
            .map(|i| {
                let queue = queue.with_lease(Duration::from_secs(60 + i % 2));
                scope.spawn(move || queue.pop_many("t", 90, SOON).unwrap().len())
            })
            .collect();
        until_wanted(&world, &mut world.client(), "t");
        thread::sleep(Duration::from_secs(1));
        let before = flights.0.lock().unwrap().len();
        thread::sleep(Duration::from_secs(2));
        let polls = flights.0.lock().unwrap().len() - before;
        assert!(polls <= 20, "{polls} flights in 2 s with nothing to do");
        queue.push_many("t", (0..24 * 90).map(|i| format!("{i}"))).unwrap();
        let served: Vec<usize> = waiting.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(served.iter().sum::<usize>(), 24 * 90, "{served:?}");
    });
}

/// Counts what was handed out to nobody.
#[derive(Clone, Default)]
struct Abandoned(Arc<AtomicUsize>);

impl Observer for Abandoned {
    fn abandoned(&self, event: &pushpop_pg::Abandoned<'_>) {
        self.0.fetch_add(event.count(), Ordering::SeqCst);
    }
}

/// The pop is held up in the server until its caller has gone.
#[test]
fn a_grant_that_nobody_waits_for_is_released_and_uncounted() {
    let world = World::new();
    let abandoned = Abandoned::default();
    let queue = world.open(world.builder().observer(abandoned.clone()));
    let id = queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    let mut holder = world.client();
    let mut tx = holder.transaction().unwrap();
    tx.batch_execute(&world.sql("lock table pushpop.leases in access exclusive mode")).unwrap();
    assert!(queue.pop_timeout("t", Duration::from_millis(200)).unwrap().is_none());
    tx.commit().unwrap();
    until("the grant is given back", || abandoned.0.load(Ordering::SeqCst) == 1);
    let lease = pop(&queue, "t");
    assert_eq!((lease.id(), lease.attempt()), (id, 1));
    lease.complete().unwrap();
}

#[test]
fn a_message_popped_while_closing_is_released() {
    let world = World::new();
    let abandoned = Abandoned::default();
    let queue = world.open(world.builder().observer(abandoned.clone()));
    let id = queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    let mut holder = world.client();
    let mut tx = holder.transaction().unwrap();
    tx.batch_execute(&world.sql("lock table pushpop.leases in access exclusive mode")).unwrap();
    let mut admin = world.client();
    thread::scope(|scope| {
        let popping = scope.spawn(|| queue.pop("t").unwrap_err());
        until_locked(&world, &mut admin);
        queue.close();
        assert_eq!(popping.join().unwrap().kind(), ErrorKind::Closed);
    });
    tx.commit().unwrap();
    let other = world.queue();
    let lease = pop(&other, "t");
    assert_eq!((lease.id(), lease.attempt()), (id, 1));
    until("it was told", || abandoned.0.load(Ordering::SeqCst) == 1);
}

/// A program may end right after it closed its queue: messages that were on their way to waiting
/// threads used to stay leased then.
#[test]
fn when_closing_returns_nothing_is_left_on_its_way() {
    let world = World::new();
    let other = world.queue();
    for round in 0..20 {
        let queue = world.queue();
        let start = Barrier::new(17);
        thread::scope(|scope| {
            for _ in 0..16 {
                let (queue, start) = (&queue, &start);
                scope.spawn(move || {
                    start.wait();
                    while let Ok(lease) = queue.pop("t") {
                        lease.complete().unwrap();
                    }
                });
            }
            start.wait();
            other.push_many("t", (0..40).map(|i| format!("{i}"))).unwrap();
            thread::sleep(Duration::from_millis(round));
            queue.close();
        });
        assert_eq!(stats(&other, "t").leased(), 0, "round {round}");
    }
}

/// The same when the queue is dropped: the pop of a thread that was left behind.
#[test]
fn pops_with_timeouts_lose_nothing() {
    let world = World::new();
    let queue = world.queue();
    let n = 400;
    let (sent, popped) = mpsc::channel();
    thread::scope(|scope| {
        for t in 0..8 {
            let (queue, sent) = (&queue, sent.clone());
            scope.spawn(move || {
                let patience = Duration::from_micros(200 + 700 * t);
                let idle = Instant::now();
                while idle.elapsed() < Duration::from_secs(4) {
                    if let Some(lease) = queue.pop_timeout("t", patience).unwrap() {
                        assert_eq!(lease.attempt(), 1, "giving up burns no attempt");
                        sent.send(lease.id()).unwrap();
                        lease.complete().unwrap();
                    }
                }
            });
        }
        for i in 0..n {
            queue.push("t", format!("{i}")).unwrap();
        }
    });
    let mut ids: HashSet<_> = popped.try_iter().collect();
    until("all are popped", || {
        ids.extend(pop_many(&queue, "t", 1000).iter().map(|l| l.id()));
        ids.len() == n
    });
    assert_eq!(stats(&queue, "t").ready(), 0);
}

#[test]
fn an_iterator_goes_on_until_the_queue_is_closed() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..20).map(|i| format!("{i}"))).unwrap();
    let mut seen = Vec::new();
    for lease in queue.iter("t") {
        let lease = lease.unwrap();
        seen.push(text(lease.payload()));
        lease.complete().unwrap();
        if seen.len() == 20 {
            queue.close();
        }
    }
    assert_eq!(seen, (0..20).map(|i| format!("{i}")).collect::<Vec<_>>());
}

#[test]
fn an_iterator_does_not_spin_on_errors() {
    let world = World::new();
    let queue = world.queue();
    let bad = queue.with_lease(Duration::ZERO);
    let started = Instant::now();
    let errors =
        bad.iter("t").take(3).filter(|r| r.as_ref().is_err_and(|e| e.kind() == ErrorKind::Invalid)).count();
    assert_eq!(errors, 3);
    assert!(started.elapsed() >= Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn threads_that_share_a_topic_with_slow_ones_are_served() {
    let world = World::new();
    let queue = world.queue();
    // A transaction holds a connection of the pool for long; the others go on.
    queue
        .transaction(|_| {
            for _ in 0..20 {
                queue.push("t", "m")?;
                queue.pop_timeout("t", SOON)?.unwrap().complete()?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(stats(&queue, "t").settled(), 20);
}

#[test]
fn a_lease_outlives_its_queue() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    drop(queue);
    lease.complete().unwrap();
    let state = world.queue().find("t", id).unwrap().unwrap().state();
    assert!(matches!(state, State::Completed { .. }));
}
