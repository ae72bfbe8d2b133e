//! Topics and what waits in them, in the hands of an operator.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::{ErrorKind, Lease, NewMessage, Queue, State, Stats, TopicSettings, uuid::Uuid};

use crate::audit::audit;
use crate::world::{
    SOON, World, drain, pop, pop_many, stats, text, until, until_listening, until_locked, until_wanted,
};

const SECOND: Duration = Duration::from_secs(1);

/// A queue that looks for itself so seldom that a test would see it.
fn patient(world: &World) -> Queue {
    world.open(world.builder().poll_interval(Duration::from_secs(60)))
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    assert!(!stats(&queue, "t").paused());
    topic.resume().unwrap();
    queue.push_many("t", ["a", "b"]).unwrap();
    let held = pop(&queue, "t");
    for _ in 0..2 {
        topic.pause().unwrap();
        assert!(queue.try_pop("t").unwrap().is_none());
        assert!(world.queue().pop_timeout("t", SECOND / 10).unwrap().is_none(), "whoever asks");
        assert!(stats(&queue, "t").paused());
    }
    queue.push("t", "c").unwrap();
    held.complete().unwrap();
    queue.push("other", "m").unwrap();
    assert_eq!(drain(&queue, "other"), ["m"]);
    for _ in 0..2 {
        topic.resume().unwrap();
        assert!(!stats(&queue, "t").paused());
    }
    assert_eq!(drain(&queue, "t"), ["b", "c"]);
}

// Pause.

#[test]
fn waiting_for_a_paused_topic_is_quiet_and_resuming_wakes() {
    let world = World::new();
    let (waiting, other) = (patient(&world), world.queue());
    let mut client = world.client();
    other.push("t", "m").unwrap();
    other.topic("t").pause().unwrap();
    thread::scope(|scope| {
        let popped = scope.spawn(|| waiting.pop_timeout("t", SOON * 3).unwrap().map(|l| text(l.payload())));
        until_wanted(&world, &mut client, "t");
        until_listening(&world, &mut client);
        let mut queries = || {
            let sql = "select max(query_start)::text from pg_stat_activity where application_name = $1";
            client.query_one(sql, &[&world.schema]).unwrap().get::<_, Option<String>>(0)
        };
        let mut seen = HashSet::new();
        for _ in 0..20 {
            thread::sleep(SECOND / 10);
            seen.insert(queries());
        }
        assert!(seen.len() <= 6, "queries were sent at {} of 20 looks", seen.len());
        let started = Instant::now();
        other.topic("t").resume().unwrap();
        assert_eq!(popped.join().unwrap().as_deref(), Some("m"));
        assert!(started.elapsed() < SECOND * 20, "{:?}", started.elapsed());
    });
}

#[test]
fn a_pause_under_load_stops_all_and_loses_nothing() {
    let world = World::new();
    let queues = [world.queue(), world.queue()];
    let n = 4000;
    let (popped, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let settled = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        for i in 0..8 {
            let (queue, popped, done, settled) = (&queues[i % 2], &popped, &done, &settled);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    for lease in queue.pop_many("t", 1 + i, SECOND / 50).unwrap() {
                        popped.fetch_add(1, Ordering::SeqCst);
                        assert!(settled.lock().unwrap().insert(lease.id()));
                        lease.complete().unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            for batch in 0..n / 100 {
                queues[0].push_many("t", (0..100).map(|i| format!("{batch} {i}"))).unwrap();
            }
        });
        for round in 1..=4 {
            until("some are popped", || popped.load(Ordering::SeqCst) >= round * n / 8);
            queues[1].topic("t").pause().unwrap();
            // What was under way arrives; nothing more is begun.
            until("what is held is settled", || stats(&queues[1], "t").leased() == 0);
            let before = popped.load(Ordering::SeqCst);
            thread::sleep(SECOND / 5);
            assert_eq!(popped.load(Ordering::SeqCst), before, "handed out while paused");
            queues[1].topic("t").resume().unwrap();
        }
        until("all are popped", || popped.load(Ordering::SeqCst) == n);
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(settled.lock().unwrap().len() as u64, n);
}

// Settings.

#[test]
fn settings_are_kept_and_taken_away() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    let none = TopicSettings::default();
    assert_eq!(topic.settings().unwrap(), none);
    let some = none
        .clone()
        .with_lease(SECOND * 90)
        .with_max_attempts(7)
        .with_backoff(Duration::from_millis(1), SECOND * 10);
    topic.set(&some).unwrap();
    let read = world.queue().topic("t").settings().unwrap();
    assert_eq!(read, some);
    assert_eq!((read.lease(), read.max_attempts()), (Some(SECOND * 90), Some(Some(7))));
    assert_eq!(read.backoff(), Some((Duration::from_millis(1), SECOND * 10)));
    topic.set(&none.clone().with_max_attempts(None)).unwrap();
    assert_eq!(topic.settings().unwrap().max_attempts(), Some(None));
    topic.pause().unwrap();
    assert_eq!(topic.settings().unwrap(), none.clone().with_max_attempts(None), "a pause leaves them");
    topic.set(&none).unwrap();
    assert_eq!(topic.settings().unwrap(), none);
    assert!(stats(&queue, "t").paused(), "and they leave the pause");
}

#[test]
fn topics_lists_those_with_settings_too() {
    let world = World::new();
    let queue = world.queue();
    let names =
        || -> Vec<String> { queue.topics().unwrap().iter().map(Stats::topic).map(str::to_owned).collect() };
    queue.push("m", "m").unwrap();
    assert!(queue.try_pop("only popped").unwrap().is_none());
    queue.topic("z").pause().unwrap();
    queue.topic("m").pause().unwrap();
    queue.topic("A").set(&TopicSettings::default().with_max_attempts(None)).unwrap();
    assert_eq!(names(), ["A", "m", "z"]);
    assert!(queue.topics().unwrap()[1].paused());
    queue.topic("z").resume().unwrap();
    queue.topic("A").set(&TopicSettings::default()).unwrap();
    assert_eq!(names(), ["m"]);
}

#[test]
fn attempts_are_the_messages_else_the_topics_else_the_queues() {
    let world = World::new();
    let (seven, endless) =
        (world.open(world.builder().max_attempts(7)), world.open(world.builder().max_attempts(None)));
    let topic = seven.topic("t");
    let most = |queue: &Queue, m: fn() -> NewMessage| {
        let find = |id| queue.find("t", id).unwrap().unwrap().max_attempts();
        let one = find(queue.push("t", m()).unwrap());
        let batch = queue.push_many("t", [m(), m()]).unwrap();
        let mixed = queue.push_many("t", [m(), NewMessage::new("x").max_attempts(9)]).unwrap();
        let inside = queue.transaction(|tx| queue.push_in(tx, "t", m())).unwrap();
        for id in [batch[0], batch[1], mixed[0], inside] {
            assert_eq!(find(id), one);
        }
        assert_eq!(find(mixed[1]), Some(9));
        one
    };
    let plain: fn() -> NewMessage = || NewMessage::new("m");
    let three: fn() -> NewMessage = || NewMessage::new("m").max_attempts(3);
    let unlimited: fn() -> NewMessage = || NewMessage::new("m").max_attempts(None);
    for (settings, by_seven, by_endless) in [
        (TopicSettings::default(), Some(7), None),
        (TopicSettings::default().with_max_attempts(5), Some(5), Some(5)),
        (TopicSettings::default().with_max_attempts(None), None, None),
    ] {
        topic.set(&settings).unwrap();
        assert_eq!((most(&seven, plain), most(&endless, plain)), (by_seven, by_endless));
        for queue in [&seven, &endless] {
            assert_eq!((most(queue, three), most(queue, unlimited)), (Some(3), None));
        }
    }
    let mut client = world.client();
    for (call, expected) in [
        ("push('t', 'x')", None),
        ("push('s', 'x')", Some(25)),
        ("push('s', 'x', max_attempts => 0)", None),
        ("push('s', 'x', fallback => 4)", Some(4)),
        ("push('s', 'x', fallback => 0)", None),
        ("push('s', 'x', max_attempts => 3, fallback => 4)", Some(3)),
    ] {
        let sql = world.sql(&format!(
            "with p as materialized (select p.pushed from pushpop.{call} p) select pushed from p"
        ));
        let id: Uuid = client.query_one(&sql, &[]).unwrap().get(0);
        let found = seven.find("t", id).unwrap().or(seven.find("s", id).unwrap()).unwrap();
        assert_eq!(found.max_attempts(), expected, "{call}");
    }
}

#[test]
fn a_lease_is_the_pops_else_the_topics_else_the_queues() {
    let world = World::new();
    let queue = world.open(world.builder().lease(SECOND * 500));
    queue.push_many("t", vec!["m"; 20]).unwrap();
    let mut client = world.client();
    // Asked for just now: its length to the second, by both clocks.
    let mut length = |lease: &Lease| {
        let now: OffsetDateTime = client.query_one("select clock_timestamp()", &[]).unwrap().get(0);
        let by_server: Duration = (lease.deadline() - now).try_into().unwrap();
        assert!(lease.remaining() <= by_server + SECOND / 2, "{lease:?}");
        by_server.as_secs() / 100
    };
    let own = queue.with_lease(SECOND * 900);
    let (three, seven) = (TopicSettings::default().with_lease(SECOND * 350), SECOND * 750);
    for (settings, by_default) in [(TopicSettings::default(), 4), (three, 3)] {
        queue.topic("t").set(&settings).unwrap();
        assert_eq!(length(&pop(&queue, "t")), by_default);
        assert_eq!(length(&pop_many(&queue, "t", 2)[1]), by_default);
        assert_eq!(length(&pop(&own, "t")), 8);
        assert_eq!(length(&pop(&own.with_lease(seven), "t")), 7);
    }
    let sql =
        world.sql("select extract(epoch from lease_until - clock_timestamp())::float8 from pushpop.pop($1)");
    queue.push("s", "m").unwrap();
    for (topic, least, most) in [("t", 300.0, 350.0), ("s", 250.0, 300.0)] {
        let seconds: f64 = world.client().query_one(&sql, &[&topic]).unwrap().get(0);
        assert!(seconds > least && seconds <= most, "{topic}: {seconds}");
    }
}

#[test]
fn the_backoff_is_the_topics() {
    let world = World::new();
    let queue = world.queue();
    let set = |first, most| {
        queue.topic("t").set(&TopicSettings::default().with_backoff(first, most)).unwrap();
    };
    let wait = || {
        let lease = pop(&queue, "t");
        let id = lease.id();
        lease.fail("m").unwrap();
        let found = queue.find("t", id).unwrap().unwrap();
        let waits = found.ready_at() - found.failures().last().unwrap().at();
        (found.attempt(), Duration::try_from(waits).unwrap())
    };
    set(SECOND * 1000, SECOND * 3000);
    queue.push("t", "m").unwrap();
    let (attempt, waits) = wait();
    assert_eq!(attempt, 1);
    assert!(waits >= SECOND * 750 && waits <= SECOND * 1000, "{waits:?}");

    set(Duration::ZERO, SECOND);
    queue.push("t", "m").unwrap();
    for attempt in 1..5 {
        assert_eq!(wait(), (attempt, Duration::ZERO));
    }
    set(SECOND * 1000, SECOND * 3000);
    let (attempt, waits) = wait();
    assert_eq!(attempt, 5);
    assert!(waits >= SECOND * 2250 && waits <= SECOND * 3000, "{waits:?}");
}

// Cancel.

fn settled(queue: &Queue, topic: &str, id: Uuid) -> bool {
    matches!(queue.find(topic, id).unwrap().unwrap().state(), State::Discarded { .. })
}

#[test]
fn a_message_that_waits_is_cancelled_wherever_it_stands() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    let ids = queue.push_many("t", (0..60).map(|i| format!("{i}"))).unwrap();
    let single = queue.push("t", "single").unwrap();
    let delayed = queue.push("t", NewMessage::new("delayed").delay(SECOND * 60)).unwrap();
    // The first, the last and one in the middle of a run; two that are neighbours; one by itself.
    let gone = [ids[0], ids[24], ids[30], ids[26], ids[25], ids[59], single, delayed];
    for id in gone {
        assert!(topic.cancel(id).unwrap());
        assert!(topic.cancel(id).unwrap(), "repeated");
        assert!(settled(&queue, "t", id));
        audit(&world, &mut world.client());
    }
    let before = queue.find("t", ids[1]).unwrap().unwrap();
    assert_eq!((before.state(), before.fence()), (State::Ready, 0));
    let figures = stats(&queue, "t");
    assert_eq!((figures.ready(), figures.delayed(), figures.settled()), (54, 0, 8));
    assert!(!queue.push_once("t", NewMessage::new("again").with_id(single)).unwrap(), "it is stored");
    let left: Vec<String> = (0..60).filter(|i| !gone.contains(&ids[*i])).map(|i| format!("{i}")).collect();
    let mut popped = Vec::new();
    while let Some(some) = Some(drain_some(&queue, 7)).filter(|some| !some.is_empty()) {
        popped.extend(some);
    }
    assert_eq!(popped, left);
    audit(&world, &mut world.client());
}

fn drain_some(queue: &Queue, n: usize) -> Vec<String> {
    let leases = queue.pop_many("t", n, Duration::ZERO).unwrap();
    let payloads = leases.iter().map(|lease| text(lease.payload())).collect();
    queue.complete_many(leases).unwrap();
    payloads
}

#[test]
fn a_message_that_does_not_wait_is_not_cancelled() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    let ids = queue.push_many("t", ["leased", "completed", "discarded"]).unwrap();
    let dead = queue.push("t", NewMessage::new("dead").max_attempts(1)).unwrap();
    let mut leases = pop_many(&queue, "t", 4);
    if leases.len() < 4 {
        leases.extend(pop_many(&queue, "t", 1));
    }
    leases.pop().unwrap().fail("m").unwrap();
    leases.pop().unwrap().discard().unwrap();
    leases.pop().unwrap().complete().unwrap();
    for id in [ids[0], ids[1], ids[2], dead, Uuid::new_v4()] {
        let before = queue.find("t", id).unwrap();
        assert!(!topic.cancel(id).unwrap());
        assert!(!topic.reschedule(id, SECOND).unwrap());
        assert_eq!(queue.find("t", id).unwrap(), before, "nothing changed");
    }
    leases.remove(0).complete().unwrap();
    audit(&world, &mut world.client());
}

#[test]
fn a_message_whose_lease_ended_waits() {
    let world = World::new();
    let queue = world.queue();
    let ids = queue.push_many("t", ["a", "b"]).unwrap();
    let mut leases = pop_many(&queue.with_lease(SECOND), "t", 2);
    // Nobody comes by to take it back.
    until("they have ended", || queue.find("t", ids[1]).unwrap().unwrap().state() == State::Ready);
    let topic = queue.topic("t");
    assert!(topic.cancel(ids[0]).unwrap() && topic.reschedule(ids[1], SECOND * 60).unwrap());
    let late = leases.remove(0).discard().unwrap_err();
    assert_eq!(late.error().kind(), ErrorKind::LeaseLost);
    let found = queue.find("t", ids[1]).unwrap().unwrap();
    assert!(matches!(found.state(), State::Delayed { .. }) && found.attempt() == 1, "{found:?}");
    audit(&world, &mut world.client());
}

#[test]
fn no_old_token_matches_what_was_cancelled() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let pop_sql = world.sql("select id, token from pushpop.pop('t')");
    let settle = world.sql("select result from pushpop.settle_many('t', array[$1::uuid], array[$2::bytea], array[$3::text], array[$4::float8], array['why'])");
    for verb in ["release", "defer", "fail"] {
        queue.push("t", "m").unwrap();
        let row = client.query_one(&pop_sql, &[]).unwrap();
        let (id, token): (Uuid, Vec<u8>) = (row.get(0), row.get(1));
        let delay = (verb != "release").then_some(60.0);
        assert!(client.query(&settle, &[&id, &token, &verb, &delay]).unwrap().is_empty());
        assert!(queue.topic("t").cancel(id).unwrap());
        for again in ["complete", "discard", "release", "defer", "fail"] {
            let delay = matches!(again, "defer" | "fail").then_some(60.0);
            let told = client.query(&settle, &[&id, &token, &again, &delay]).unwrap();
            assert_eq!(told[0].get::<_, &str>(0), "lost", "{verb} then {again}");
        }
        assert!(settled(&queue, "t", id));
    }
}

#[test]
fn what_is_cancelled_is_kept_as_long_as_what_is_settled() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(SECOND));
    let id = queue.push("t", "m").unwrap();
    assert!(queue.topic("t").cancel(id).unwrap());
    let at_once = world.open(world.builder().keep_settled(Duration::ZERO));
    let other = queue.push("t", "m").unwrap();
    assert!(at_once.topic("t").cancel(other).unwrap());
    assert!(queue.find("t", other).unwrap().is_none());
    assert!(!at_once.topic("t").cancel(other).unwrap());
    until("it is deleted", || queue.find("t", id).unwrap().is_none());
}

/// The run is in the hands of a pop whose end is open: the answer waits for it.
#[test]
fn cancelling_waits_for_a_pop_under_way() {
    let world = World::new();
    let queue = world.queue();
    let mut admin = world.client();
    for (commit, n, expected) in [(false, 1, true), (true, 1, false), (true, 2, true)] {
        let topic = format!("{commit} {n}");
        let ids = queue.push_many(&topic, vec!["m"; n]).unwrap();
        let mut holder = world.client();
        let mut tx = holder.transaction().unwrap();
        let pop = world.sql("select from pushpop.pop($1, 1)");
        assert_eq!(tx.query(&pop, &[&topic]).unwrap().len(), 1);
        thread::scope(|scope| {
            // The last one of the run: of two, the pop leaves it.
            let cancelled = scope.spawn(|| queue.topic(&topic).cancel(ids[n - 1]).unwrap());
            until_locked(&world, &mut admin);
            if commit {
                tx.commit().unwrap()
            } else {
                tx.rollback().unwrap()
            }
            assert_eq!(cancelled.join().unwrap(), expected, "{topic}");
        });
        audit(&world, &mut admin);
    }
}

// Reschedule.

#[test]
fn a_message_that_waits_gets_another_time() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    let ids = queue.push_many("t", ["a", "b", "c", "d"]).unwrap();
    let delayed = queue.push("t", NewMessage::new("delayed").delay(SECOND * 60)).unwrap();
    assert!(topic.reschedule(ids[0], SECOND * 60).unwrap());
    assert!(topic.reschedule(ids[2], Duration::ZERO).unwrap());
    assert!(topic.reschedule(delayed, Duration::ZERO).unwrap());
    audit(&world, &mut world.client());
    let found = queue.find("t", ids[0]).unwrap().unwrap();
    assert_eq!(found.state(), State::Delayed { until: found.ready_at() });
    // What went behind the front may be overtaken for a second.
    let at = OffsetDateTime::now_utc() - SECOND * 60;
    assert!(topic.reschedule_at(ids[3], at).unwrap());
    thread::sleep(SECOND + SECOND / 10);
    assert_eq!(drain(&queue, "t"), ["d", "b", "c", "delayed"]);
    assert!(topic.reschedule_at(ids[0], at).unwrap());
    assert_eq!(text(pop(&queue, "t").payload()), "a");
}

#[test]
fn an_earlier_time_wakes() {
    let world = World::new();
    let (waiting, other) = (patient(&world), world.queue());
    let id = other.push("t", NewMessage::new("m").delay(SECOND * 3600)).unwrap();
    let mut client = world.client();
    for delay in [Duration::ZERO, SECOND / 2] {
        thread::scope(|scope| {
            let popped = scope.spawn(|| waiting.pop_timeout("t", SOON * 3).unwrap());
            until_wanted(&world, &mut client, "t");
            until_listening(&world, &mut client);
            let started = Instant::now();
            assert!(other.topic("t").reschedule(id, delay).unwrap());
            popped.join().unwrap().unwrap().defer(SECOND * 3600).unwrap();
            assert!(started.elapsed() < SECOND * 20, "{:?}", started.elapsed());
        });
    }
}

#[test]
fn operators_at_once_agree() {
    let world = World::new();
    let queue = world.queue();
    let ids = queue.push_many("t", vec!["m"; 100]).unwrap();
    let start = Barrier::new(8);
    thread::scope(|scope| {
        for i in 0..8 {
            let (start, ids, topic) = (&start, &ids, queue.topic("t"));
            scope.spawn(move || {
                start.wait();
                for n in 0..50 {
                    // Nobody pops: whoever asks, the message waits.
                    let id = ids[(n * (i + 3)) % 50];
                    assert!(topic.reschedule(id, SECOND / 100 * n as u32).unwrap());
                    assert!(topic.cancel(ids[50 + (n * (2 * i + 1)) % 50]).unwrap());
                }
            });
        }
    });
    audit(&world, &mut world.client());
    let figures = stats(&queue, "t");
    assert_eq!((figures.ready() + figures.delayed(), figures.settled()), (50, 50));
}

/// Operators cancel and move what consumers pop, settle and drop. Each message is settled once in the
/// end, and none is handed out after a cancel that was true.
#[test]
fn cancelled_messages_are_not_handed_out_and_the_others_are_not_lost() {
    let world = World::new();
    let queues = [world.queue(), world.queue()];
    let topic = TopicSettings::default()
        .with_max_attempts(None)
        .with_backoff(Duration::ZERO, Duration::from_millis(20));
    queues[0].topic("t").set(&topic).unwrap();
    let mut ids = Vec::new();
    for batch in 0..40 {
        let delay = Duration::from_millis(batch * 30);
        ids.extend(queues[0].push_many("t", (0..50).map(|_| NewMessage::new("m").delay(delay))).unwrap());
    }
    let (cancelled, completed) = (Mutex::new(HashSet::new()), Mutex::new(HashSet::new()));
    let moved = AtomicU64::new(0);
    let left = || ids.len() - cancelled.lock().unwrap().len() - completed.lock().unwrap().len();
    thread::scope(|scope| {
        for worker in 0..4_usize {
            let (queue, cancelled, completed, left) = (&queues[worker % 2], &cancelled, &completed, &left);
            scope.spawn(move || {
                let short = queue.with_lease(SECOND);
                let mut dice = worker;
                while left() > 0 {
                    dice = dice.wrapping_mul(25_214_903_917).wrapping_add(11);
                    let queue = if dice % 11 == 0 { &short } else { queue };
                    for lease in queue.pop_many("t", 1 + (dice >> 20) % 12, SECOND / 20).unwrap() {
                        let id = lease.id();
                        // While it is held nobody cancels it, unless its lease has ended.
                        let held = lease.remaining() > Duration::ZERO;
                        assert!(
                            !held || !cancelled.lock().unwrap().contains(&id),
                            "handed out after a cancel"
                        );
                        dice = dice.wrapping_mul(25_214_903_917).wrapping_add(11);
                        let _ = match (dice >> 24) % 16 {
                            0..=3 => lease.complete().map(|()| assert!(completed.lock().unwrap().insert(id))),
                            4..=7 => lease.release(),
                            8..=10 => lease.fail("why"),
                            11 if lease.remaining() < SECOND * 2 => {
                                drop(lease);
                                Ok(())
                            }
                            _ => lease.defer(Duration::from_millis(30)),
                        };
                    }
                }
            });
        }
        for operator in 0..4_usize {
            let (topic, ids, cancelled, moved, left) =
                (queues[operator % 2].topic("t"), &ids, &cancelled, &moved, &left);
            scope.spawn(move || {
                let mut dice = operator + 100;
                while left() > 0 {
                    dice = dice.wrapping_mul(25_214_903_917).wrapping_add(11);
                    let id = ids[(dice >> 18) % ids.len()];
                    if (dice >> 40) % 4 == 0 {
                        if topic.cancel(id).unwrap() {
                            cancelled.lock().unwrap().insert(id);
                        }
                    } else if topic.reschedule(id, Duration::from_millis((dice >> 30) as u64 % 40)).unwrap() {
                        moved.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let (cancelled, completed) = (cancelled.into_inner().unwrap(), completed.into_inner().unwrap());
    assert!(cancelled.is_disjoint(&completed));
    assert!(cancelled.len() > 50 && completed.len() > 50, "{} and {}", cancelled.len(), completed.len());
    assert!(moved.into_inner() > 50);
    for id in ids {
        let state = queues[0].find("t", id).unwrap().unwrap().state();
        match state {
            State::Discarded { .. } => assert!(cancelled.contains(&id)),
            State::Completed { .. } => assert!(completed.contains(&id)),
            other => panic!("{other:?}"),
        }
    }
    audit(&world, &mut world.client());
}

#[test]
fn bad_input_is_refused() {
    let world = World::new();
    let queue = world.queue();
    let (bad, good, id) = (queue.topic(""), queue.topic("t"), Uuid::nil());
    let none = TopicSettings::default;
    for error in [
        bad.pause().unwrap_err(),
        bad.resume().unwrap_err(),
        bad.settings().unwrap_err(),
        bad.set(&none()).unwrap_err(),
        bad.cancel(id).unwrap_err(),
        bad.reschedule(id, SECOND).unwrap_err(),
        good.set(&none().with_lease(SECOND / 2)).unwrap_err(),
        good.set(&none().with_max_attempts(0)).unwrap_err(),
        good.set(&none().with_max_attempts(32_768)).unwrap_err(),
        good.set(&none().with_backoff(SECOND * 2, SECOND)).unwrap_err(),
        good.set(&none().with_backoff(SECOND, Duration::MAX)).unwrap_err(),
        good.reschedule(id, Duration::MAX).unwrap_err(),
        good.reschedule_at(
            id,
            OffsetDateTime::new_utc(pushpop_pg::time::Date::MAX, pushpop_pg::time::Time::MIDNIGHT),
        )
        .unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    }
    assert!(queue.topics().unwrap().is_empty(), "nothing was written");
}

/// The same with a batch out of which one was taken.
#[test]
fn what_is_returned_from_a_batch_with_a_gap_goes_to_its_old_place() {
    let world = World::new();
    let queue = world.queue();
    let ids = queue.push_many("t", ["a", "b", "c", "d", "e"]).unwrap();
    assert!(queue.topic("t").cancel(ids[1]).unwrap());
    assert_eq!(pop(&queue, "t").payload(), b"a");
    let released = pop(&queue, "t");
    assert_eq!(released.payload(), b"c");
    released.release().unwrap();
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(pop(&queue, "t").payload(), b"c");
    assert_eq!(pop(&queue, "t").payload(), b"d");
    assert_eq!(pop(&queue, "t").payload(), b"e");
}
