//! Taking messages out.

use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::{NewMessage, Queue, State};

use crate::world::{SOON, World, drain, pop, pop_many, stats, text, until};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    assert!(queue.try_pop("t").unwrap().is_none());
    queue.push("t", "m").unwrap();
    let lease = queue.pop("t").unwrap();
    assert_eq!(lease.payload(), b"m");
    assert!(matches!(lease.state(), State::Leased { until } if until == lease.deadline()));
    assert!(queue.try_pop("t").unwrap().is_none(), "it is leased");
}

#[test]
fn all_forms_pop_the_oldest() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..9).map(|i| format!("{i}"))).unwrap();
    let payload = |lease: &pushpop_pg::Lease| text(lease.payload());
    assert_eq!(payload(&queue.try_pop("t").unwrap().unwrap()), "0");
    assert_eq!(payload(&queue.pop("t").unwrap()), "1");
    assert_eq!(payload(&queue.pop_timeout("t", Duration::ZERO).unwrap().unwrap()), "2");
    assert_eq!(payload(&queue.pop_timeout("t", Duration::MAX).unwrap().unwrap()), "3");
    let two = queue.pop_many("t", 2, Duration::MAX).unwrap();
    assert_eq!(two.iter().map(payload).collect::<Vec<_>>(), ["4", "5"]);
    assert_eq!(payload(&queue.iter("t").next().unwrap().unwrap()), "6");
    let rest = queue.pop_many("t", 1000, SOON).unwrap();
    assert_eq!(rest.iter().map(payload).collect::<Vec<_>>(), ["7", "8"], "it does not wait for more");
}

#[test]
fn a_timeout_passes_and_is_no_error() {
    let world = World::new();
    let queue = world.queue();
    let started = Instant::now();
    assert!(queue.pop_timeout("t", Duration::from_millis(300)).unwrap().is_none());
    assert!(queue.pop_many("t", 5, Duration::from_millis(300)).unwrap().is_empty());
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(600) && took < SOON, "{took:?}");
    assert!(queue.pop_timeout("t", Duration::ZERO).unwrap().is_none());
}

#[test]
fn messages_come_by_time_then_in_push_order() {
    let world = World::new();
    let queue = world.queue();
    let base = OffsetDateTime::now_utc() - Duration::from_secs(100);
    let at =
        |payload: &str, seconds: u64| NewMessage::new(payload).ready_at(base + Duration::from_secs(seconds));
    queue.push_many("t", [at("c1", 30), at("a1", 10), at("b1", 20), at("a2", 10)]).unwrap();
    queue.push("t", at("a3", 10)).unwrap();
    queue.push_many("t", [at("b2", 20), at("a4", 10), at("a0", 9)]).unwrap();
    assert_eq!(drain(&queue, "t"), ["a0", "a1", "a2", "a3", "a4", "b1", "b2", "c1"]);
}

/// A generator of numbers that look random and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn produce(queue: &Queue, n: u64) {
    let (mut numbers, mut next) = (Numbers(1), 0);
    while next < n {
        let size = match numbers.below(3) {
            0 => 1,
            1 => 1 + numbers.below(30),
            _ => 1 + numbers.below(300),
        };
        let end = n.min(next + size);
        if end - next == 1 {
            queue.push("t", format!("{next}")).unwrap();
        } else {
            queue.push_many("t", (next..end).map(|i| format!("{i}"))).unwrap();
        }
        next = end;
    }
}

fn consume(queue: &Queue, n: u64) {
    let (mut numbers, mut next) = (Numbers(2), 0);
    while next < n {
        let max = match numbers.below(3) {
            0 => 1,
            1 => 1 + numbers.below(40) as usize,
            _ => 1 + numbers.below(400) as usize,
        };
        let leases = pop_many(queue, "t", max);
        assert!(!leases.is_empty() && leases.len() <= max);
        for lease in &leases {
            assert_eq!(text(lease.payload()), format!("{next}"));
            next += 1;
        }
        assert!(queue.complete_many(leases).unwrap().is_empty());
    }
}

#[test]
fn one_producer_and_one_consumer_see_strict_order() {
    let world = World::new();
    let (producer, consumer) = (world.queue(), world.queue());
    let n = 6000;
    thread::scope(|scope| {
        scope.spawn(|| produce(&producer, n));
        consume(&consumer, n);
    });
    assert!(consumer.try_pop("t").unwrap().is_none());
}

#[test]
fn one_producer_and_one_consumer_see_strict_order_one_by_one() {
    let world = World::new();
    let queue = world.queue();
    thread::scope(|scope| {
        scope.spawn(|| (0..1000).for_each(|i| assert!(queue.push("t", format!("{i}")).is_ok())));
        for i in 0..1000 {
            let lease = pop(&queue, "t");
            assert_eq!(text(lease.payload()), format!("{i}"));
            lease.complete().unwrap();
        }
    });
}

#[test]
fn what_is_returned_goes_to_its_old_place() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..60).map(|i| format!("{i:02}"))).unwrap();
    let mut leases = pop_many(&queue, "t", 40);
    // From the middle of several runs, in another order than they were taken.
    for i in [33, 7, 20, 8] {
        leases
            .remove(leases.iter().position(|l| l.payload() == format!("{i:02}").as_bytes()).unwrap())
            .release()
            .unwrap();
    }
    // It may be overtaken for one second.
    thread::sleep(SECOND + Duration::from_millis(100));
    let order: Vec<String> = pop_many(&queue, "t", 6).iter().map(|l| text(l.payload())).collect();
    assert_eq!(order, ["07", "08", "20", "33", "40", "41"]);
}

#[test]
fn an_expired_lease_returns_its_message_to_its_old_place() {
    let world = World::new();
    let queue = world.queue();
    let short = queue.with_lease(SECOND);
    queue.push_many("t", (0..50).map(|i| format!("{i:02}"))).unwrap();
    let expiring = pop_many(&short, "t", 30);
    thread::sleep(SECOND * 2 + Duration::from_millis(200));
    let again = pop_many(&queue, "t", 50);
    let order: Vec<String> = again.iter().map(|l| text(l.payload())).collect();
    assert_eq!(order, (0..50).map(|i| format!("{i:02}")).collect::<Vec<_>>());
    for (i, lease) in again.iter().enumerate() {
        let counted = if i < expiring.len() { 2 } else { 1 };
        assert_eq!((lease.attempt(), lease.fence()), (counted, i64::from(counted)));
        assert_eq!(lease.last_error().is_some(), counted == 2, "{:?}", lease.last_error());
    }
}

#[test]
fn pop_many_takes_no_more_than_asked() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..3000).map(|i| format!("{i:04}"))).unwrap();
    let mut next = 0;
    for max in [1, 2, 24, 25, 26, 249, 250, 251, 999, 1000, 1000] {
        let leases = pop_many(&queue, "t", max);
        assert_eq!(leases.len(), max.min(3000 - next));
        for lease in leases {
            assert_eq!(text(lease.payload()), format!("{next:04}"));
            next += 1;
        }
    }
    assert_eq!(next, 3000);
    assert!(queue.try_pop("t").unwrap().is_none());
}

#[test]
fn a_lease_has_the_length_that_was_asked_for() {
    let world = World::new();
    let queue = world.open(world.builder().lease(Duration::from_secs(40)));
    queue.push_many("t", ["a", "b", "c"]).unwrap();
    for (queue, seconds) in [(&queue, 40), (&queue.with_lease(Duration::from_secs(7)), 7)] {
        let lease = queue.try_pop("t").unwrap().unwrap();
        let left = lease.remaining();
        let most = Duration::from_secs(seconds);
        assert!(left <= most && left > most - Duration::from_secs(6), "{left:?}");
        let now: OffsetDateTime = world.client().query_one("select clock_timestamp()", &[]).unwrap().get(0);
        let by_server: Duration = (lease.deadline() - now).try_into().unwrap();
        assert!(
            by_server <= most && lease.remaining() <= by_server + Duration::from_millis(500),
            "{by_server:?}"
        );
    }
}

#[test]
fn a_message_that_expires_at_its_last_attempt_is_dead() {
    let world = World::new();
    let queue = world.queue();
    let short = queue.with_lease(SECOND);
    let id = queue.push("t", NewMessage::new("m").max_attempts(2)).unwrap();
    let one = pop(&short, "t");
    assert_eq!(one.attempt(), 1);
    let two = pop(&short, "t");
    assert_eq!((two.id(), two.attempt()), (id, 2));
    assert!(queue.pop_timeout("t", SECOND * 2).unwrap().is_none(), "it is handed out no more");
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Dead { .. }), "{found:?}");
    assert_eq!(found.attempt(), 2);
    assert!(found.last_error().unwrap().contains("expired"), "{:?}", found.last_error());
    until("it is counted as dead", || stats(&queue, "t").dead() == 1);
    let stats = stats(&queue, "t");
    assert_eq!((stats.ready(), stats.leased()), (0, 0));
    assert!(queue.pop_many("t", 10, Duration::ZERO).unwrap().is_empty());
}

#[test]
fn a_message_without_a_limit_is_tried_on_and_on() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", NewMessage::new("m").max_attempts(None)).unwrap();
    let mut client = world.client();
    client.batch_execute(&world.sql("update pushpop.messages set attempt = 40000")).unwrap();
    let lease = pop(&queue, "t");
    assert_eq!((lease.attempt(), lease.max_attempts()), (40_001, None));
    lease.fail("again").unwrap();
    assert_eq!(stats(&queue, "t").dead(), 0);
}

#[test]
fn concurrent_consumers_get_different_messages() {
    let world = World::new();
    let queues: Vec<Queue> = (0..4).map(|_| world.open(world.builder().pool_size(2))).collect();
    queues[0].push_many("t", (0..2000).map(|i| format!("{i}"))).unwrap();
    let mut all: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let queue = &queues[i % 4];
                scope.spawn(move || {
                    let mut got = Vec::new();
                    loop {
                        let leases = queue.pop_many("t", 1 + i * 7, Duration::ZERO).unwrap();
                        if leases.is_empty() {
                            return got;
                        }
                        got.extend(leases.iter().map(|l| text(l.payload())));
                    }
                })
            })
            .collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(all.len(), 2000);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 2000, "none twice");
}

/// What commits late lies behind the front that others have passed.
#[test]
fn a_push_that_commits_late_is_found() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    queue.push_in(&mut tx, "t", "late").unwrap();
    for i in 0..3 {
        queue.push("t", format!("{i}")).unwrap();
        assert_eq!(drain(&queue, "t"), [format!("{i}")]);
        // So long that the front is moved.
        thread::sleep(Duration::from_millis(700));
    }
    tx.commit().unwrap();
    assert_eq!(text(pop(&queue, "t").payload()), "late");
}

#[test]
fn topics_are_independent() {
    let world = World::new();
    let queue = world.queue();
    let names = ["a", "A", "a ", " a", "a%", "é", "e\u{301}", "日本", "a'b\"c\\d", "\n"];
    for name in names {
        queue.push(name, name).unwrap();
    }
    for name in names {
        assert_eq!(drain(&queue, name), [name]);
    }
}

/// In one batch are messages for now and for later; then one of the first is given back. It used to come to a place
/// behind that of the next, which stands in the same run.
#[test]
fn what_is_returned_from_a_batch_of_several_times_goes_to_its_old_place() {
    let world = World::new();
    let queue = world.queue();
    let later = |payload: &str| NewMessage::new(payload).delay(Duration::from_secs(3600));
    let batch = [NewMessage::new("a"), later("b"), later("c"), NewMessage::new("d"), NewMessage::new("e")];
    queue.push_many("t", batch).unwrap();
    assert_eq!(pop(&queue, "t").payload(), b"a");
    let released = pop(&queue, "t");
    assert_eq!(released.payload(), b"d");
    released.release().unwrap();
    // What becomes free behind the front may be overtaken for a second.
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(pop(&queue, "t").payload(), b"d");
}

/// Its lease had ended when the transaction of the pop committed, and the mark of what was reclaimed had passed it: for
/// up to a minute nobody looked there.
#[test]
fn what_is_popped_in_a_transaction_that_outlasts_its_lease_comes_back_soon() {
    let world = World::new();
    drop(world.queue());
    let (mut client, mut holder) = (world.client(), world.client());
    let popped = world.sql("select from pushpop.pop('t', 2, 1)");
    let upkeep = world.sql("select pushpop.upkeep('t')");
    assert!(client.query(&popped, &[]).unwrap().is_empty());
    client.batch_execute(&world.sql("select pushpop.push('t', 'm'); select pushpop.upkeep('t')")).unwrap();
    let mut tx = holder.transaction().unwrap();
    assert_eq!(tx.query(&popped, &[]).unwrap().len(), 1);
    let until = Instant::now() + SECOND * 3;
    while Instant::now() < until {
        client.batch_execute(&upkeep).unwrap();
        thread::sleep(SECOND / 5);
    }
    tx.commit().unwrap();
    let committed = Instant::now();
    while client.query(&popped, &[]).unwrap().is_empty() {
        assert!(committed.elapsed() < SECOND * 20, "nobody gets it");
        thread::sleep(SECOND / 5);
    }
}

/// Sets marks as they are after the server's clock went back by an hour.
const CLOCK_WENT_BACK: &str = "
    update pushpop.topics set low = clock_timestamp() + interval '1 hour', sure_to = clock_timestamp() + interval '1 hour',
        checking_at = clock_timestamp() + interval '1 hour', looked_at = clock_timestamp() + interval '1 hour',
        swept_at = clock_timestamp() + interval '1 hour', reclaimed_to = clock_timestamp() + interval '1 hour'";

#[test]
fn what_is_pushed_after_the_clock_went_back_is_popped_at_once() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    client.batch_execute(&world.sql("select pushpop.push('t', 'm'); select from pushpop.pop('t')")).unwrap();
    client.batch_execute(&world.sql(CLOCK_WENT_BACK)).unwrap();
    let push = world.sql("select pushpop.push('t', 'm')");
    let push_many = world.sql(
        "select pushpop.push_many('t', array(select gen_random_uuid() from generate_series(1, 3)), array_fill('m'::bytea, '{3}'))",
    );
    let pop = world.sql("select from pushpop.pop('t', lease => 1)");
    for _ in 0..5 {
        client.batch_execute(&push).unwrap();
        client.batch_execute(&push_many).unwrap();
    }
    // Once a minute a pop looks at everything: that would be too seldom.
    for n in 0..20 {
        assert!(client.query_opt(&pop, &[]).unwrap().is_some(), "{n} of 20 are found");
    }
    assert!(client.query_opt(&pop, &[]).unwrap().is_none());
    until("the leases have ended", || client.query_opt(&pop, &[]).unwrap().is_some());
}

/// Nobody was there while the clock caught up with the marks: what was pushed meanwhile notes itself.
#[test]
fn what_was_pushed_before_the_clock_caught_up_is_not_hidden_by_what_came_after() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    client.batch_execute(&world.sql("select pushpop.push('t', 'm'); select from pushpop.pop('t')")).unwrap();
    client.batch_execute(&world.sql(CLOCK_WENT_BACK)).unwrap();
    client.batch_execute(&world.sql("select pushpop.push('t', 'early')")).unwrap();
    let caught_up = "update pushpop.topics set low = clock_timestamp(), sure_to = clock_timestamp(),
        checking_at = clock_timestamp(), looked_at = clock_timestamp(), swept_at = clock_timestamp()";
    client.batch_execute(&world.sql(caught_up)).unwrap();
    let pop = world.sql("select convert_from(payload, 'UTF8') from pushpop.pop('t')");
    let push = world.sql("select pushpop.push('t', 'late')");
    until("it is found", || {
        client.batch_execute(&push).unwrap();
        client.query_one(&pop, &[]).unwrap().get::<_, String>(0) == "early"
    });
}

/// However it came about: what a mark hides in a topic that never runs dry is found by upkeep.
#[test]
fn upkeep_finds_what_a_mark_hides() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    client
        .batch_execute(&world.sql("select pushpop.push('t', 'hidden'); select pushpop.upkeep('t')"))
        .unwrap();
    let hide = "update pushpop.topics set low = clock_timestamp(), cleared_at = clock_timestamp() - interval '2 minutes'";
    client.batch_execute(&world.sql(hide)).unwrap();
    let late = world.sql("select pushpop.push('t', 'late') from generate_series(1, 9)");
    client.batch_execute(&late).unwrap();
    let pop = world.sql("select convert_from(payload, 'UTF8') from pushpop.pop('t')");
    let mut popped = || client.query_one(&pop, &[]).unwrap().get::<_, String>(0);
    assert_eq!(popped(), "late");
    world.client().batch_execute(&world.sql("select pushpop.upkeep('t')")).unwrap();
    assert_eq!(popped(), "hidden");
}

/// Each holds what it has popped from one topic, and finds the front of the other in the hands of the other.
#[test]
fn pops_of_the_same_topics_do_not_wait_for_each_other() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["a", "b"]).unwrap();
    queue.push_many("u", ["a", "b"]).unwrap();
    let (mut one, mut other) = (world.client(), world.client());
    let (mut one, mut other) = (one.transaction().unwrap(), other.transaction().unwrap());
    let try_pop = world.sql("select from pushpop.pop($1)");
    assert!(one.query_opt(&try_pop, &[&"t"]).unwrap().is_some());
    assert!(other.query_opt(&try_pop, &[&"u"]).unwrap().is_some());
    let begun = Instant::now();
    assert!(one.query_opt(&try_pop, &[&"u"]).unwrap().is_none());
    assert!(other.query_opt(&try_pop, &[&"t"]).unwrap().is_none());
    assert!(begun.elapsed() < SECOND * 3 / 2, "{:?}", begun.elapsed());
    one.commit().unwrap();
    other.commit().unwrap();
    for topic in ["t", "u"] {
        assert_eq!(text(pop(&queue, topic).payload()), "b");
    }
}

/// Those that ask with a lease of another length have a flight of their own, and it is not held up.
#[test]
fn a_look_does_not_wait_behind_pops_with_another_lease() {
    let world = World::new();
    let queue = world.queue();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop_timeout("t", SOON));
        let waits = "select from pushpop.topics where topic = 't' and wanted_until > clock_timestamp()";
        until("somebody waits", || !world.client().query(&world.sql(waits), &[]).unwrap().is_empty());
        for _ in 0..3 {
            assert!(queue.with_lease(SECOND).try_pop("t").unwrap().is_none());
        }
        queue.push("t", "m").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap().unwrap().payload(), b"m");
    });
}

// Bytes.

const MIB: usize = 1 << 20;

fn large(name: &str, bytes: usize) -> NewMessage {
    NewMessage::new(vec![0; bytes]).header("name", name)
}

fn names(messages: &[pushpop_pg::Message]) -> Vec<&str> {
    messages.iter().map(|message| message.header("name").unwrap()).collect()
}

/// A flight used to bring all that was asked for, however much that was: too late for its caller, and again and again.
#[test]
fn a_pop_brings_no_more_bytes_than_a_flight_carries() {
    let world = World::new();
    let queue = world.queue();
    let mib = [5, 5, 0, 5, 0, 16, 1, 9, 0];
    let messages = mib.iter().enumerate().map(|(i, mib)| large(&i.to_string(), mib * MIB).max_attempts(1));
    queue.push_many("t", messages).unwrap();
    let parts: [&[&str]; 4] = [&["0", "1", "2", "3", "4"], &["5"], &["6", "7", "8"], &[]];
    assert_eq!(names(&queue.topic("t").peek(1000).unwrap()), parts[0]);
    // However it was given back.
    for round in 0..3 {
        let mut leases = Vec::new();
        for part in parts {
            let popped = queue.pop_many("t", 1000, Duration::ZERO).unwrap();
            assert_eq!(popped.iter().map(|m| m.header("name").unwrap()).collect::<Vec<_>>(), part, "{round}");
            leases.extend(popped);
        }
        for lease in leases {
            match round {
                0 => lease.release().unwrap(),
                1 => lease.defer(Duration::ZERO).unwrap(),
                _ => lease.fail("why").unwrap(),
            }
        }
        // What was given back goes to its old place within a second.
        until("all are back", || stats(&queue, "t").ready() == if round < 2 { 9 } else { 0 });
        thread::sleep(SECOND + SECOND / 10);
        if round == 1 {
            // Each now at a place of its own, by the time of its settle.
            assert_eq!(names(&queue.topic("t").peek(1000).unwrap()), parts[0]);
        }
    }
    let dead = queue.topic("t").dead(1000).unwrap();
    assert_eq!(names(&dead), ["8", "7", "6"], "newest first");
    assert_eq!(queue.topic("t").redrive_all().unwrap(), 9);
    assert_eq!(queue.pop_many("t", 1000, SOON).unwrap().len(), 5);
}

/// One that is alone too large for a flight comes alone.
#[test]
fn whatever_is_allowed_comes() {
    let world = World::new();
    let queue = world.open(world.builder().max_payload(20 * MIB));
    queue.push("t", "before").unwrap();
    queue.push("t", vec![1; 20 * MIB]).unwrap();
    queue.push("t", "behind").unwrap();
    let popped = || queue.pop_many("t", 1000, Duration::ZERO).unwrap();
    let sizes: Vec<Vec<usize>> =
        (0..4).map(|_| popped().iter().map(|lease| lease.payload().len()).collect()).collect();
    assert_eq!(sizes, [vec![6], vec![20 * MIB], vec![6], vec![]]);
}

/// What failed often has a long history, which comes along.
#[test]
fn failures_count_as_bytes() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    queue.push_many("t", vec!["m"; 300]).unwrap();
    let failures = "update pushpop.messages set failures = (
        select jsonb_agg(jsonb_build_object('attempt', i, 'at', '2026-01-01T00:00:00.000000Z', 'error', repeat('x', 8192)))
        from generate_series(1, 9) i)";
    client.batch_execute(&world.sql(failures)).unwrap();
    for lease in pop_many(&queue, "t", 1000) {
        lease.release().unwrap();
    }
    thread::sleep(SECOND + SECOND / 10);
    let popped = queue.pop_many("t", 1000, SOON).unwrap();
    assert!((200..250).contains(&popped.len()), "{} of 75 KB each", popped.len());
}
