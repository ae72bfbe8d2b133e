//! Dead letters.

use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::{ErrorKind, NewMessage, Queue, State, uuid::Uuid};

use crate::audit::audit;
use crate::world::{SOON, World, drain, pop, pop_many, stats, text, until, until_wanted};

/// Pushes messages and has them die by failure, one after the other, or all at once.
fn kill(queue: &Queue, topic: &str, payloads: &[&str]) -> Vec<Uuid> {
    let fatal = |payload: &&str| NewMessage::new(*payload).max_attempts(1);
    let ids = queue.push_many(topic, payloads.iter().map(fatal)).unwrap();
    for lease in pop_many(queue, topic, payloads.len()) {
        lease.fail("fatal").unwrap();
    }
    assert_eq!(stats(queue, topic).ready(), 0);
    ids
}

/// The same at one moment, which ends the attempts of all.
fn kill_at_once(world: &World, topic: &str, n: usize) {
    world.queue().push_many(topic, (0..n).map(|i| NewMessage::new(format!("{i}")).max_attempts(1))).unwrap();
    let sql = world.sql(
        "with p as materialized (select id, token from pushpop.pop($1, 1000))
         select pushpop.settle_many($1, array_agg(id), array_agg(token), array_fill('fail'::text, array[count(*)::integer]))
         from p having count(*) > 0",
    );
    let mut client = world.client();
    while stats(&world.queue(), topic).ready() > 0 {
        client.query(&sql, &[&topic]).unwrap();
    }
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    let id = kill(&queue, "t", &["m"])[0];
    let dead = topic.dead(10).unwrap();
    assert_eq!((dead.len(), dead[0].id(), dead[0].last_error()), (1, id, Some("fatal")));
    assert!(matches!(dead[0].state(), State::Dead { .. }));
    assert_eq!(Some(&dead[0]), queue.find("t", id).unwrap().as_ref());

    assert_eq!(topic.redrive(&[id]).unwrap(), 1);
    assert!(topic.dead(10).unwrap().is_empty());
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert_eq!((lease.id(), lease.attempt(), lease.fence()), (id, 1, 2));
    assert_eq!(lease.failures().len(), 1, "its failures stay");
    lease.complete().unwrap();
    audit(&world, &mut world.client());
}

#[test]
fn the_dead_are_shown_newest_first() {
    let world = World::new();
    let queue = world.queue();
    let payloads: Vec<String> = (0..30).map(|i| format!("{i:02}")).collect();
    kill(&queue, "t", &payloads.iter().map(String::as_str).collect::<Vec<_>>());
    kill(&queue, "other", &["other"]);
    let shown = |max| -> Vec<String> {
        queue.topic("t").dead(max).unwrap().iter().map(|m| text(m.payload())).collect()
    };
    let expected: Vec<String> = payloads.into_iter().rev().collect();
    assert_eq!(shown(1000), expected);
    assert_eq!(shown(3), expected[..3]);
    assert!(queue.topic("none").dead(10).unwrap().is_empty());
}

#[test]
fn pages_of_the_dead_miss_none_that_died_at_the_same_time() {
    let world = World::new();
    kill_at_once(&world, "t", 25);
    let mut client = world.client();
    let sql = world.sql("select id, done_at from pushpop.dead_letters('t', 10, $1, $2)");
    let mut seen = Vec::new();
    let (mut before, mut id) = (OffsetDateTime::now_utc() + Duration::from_secs(3600), None::<Uuid>);
    loop {
        let page = client.query(&sql, &[&before, &id]).unwrap();
        let Some(last) = page.last() else { break };
        (id, before) = (last.get(0), last.get(1));
        seen.extend(page.iter().map(|row| row.get::<_, Uuid>(0)));
    }
    assert_eq!((seen.len(), seen.iter().collect::<HashSet<_>>().len()), (25, 25));
}

#[test]
fn redriving_takes_what_is_dead_and_nothing_else() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    let mut ids = kill(&queue, "t", &["a", "b", "c"]);
    let alive = queue.push("t", "alive").unwrap();
    let settled = queue.push("t", "settled").unwrap();
    pop_many(&queue, "t", 2).remove(1).complete().unwrap();
    let other = kill(&queue, "other", &["x"])[0];
    ids.extend([alive, settled, other, Uuid::new_v4(), ids[0]]);
    ids.remove(1);
    assert_eq!(topic.redrive(&ids).unwrap(), 2);
    assert_eq!(topic.redrive(&ids).unwrap(), 0, "they are not dead any more");
    assert_eq!(drain(&queue, "t"), ["a", "c"], "in the order of their pushes");
    assert_eq!((stats(&queue, "t").dead(), stats(&queue, "other").dead()), (1, 1));
    assert_eq!(topic.redrive(&[]).unwrap(), 0);
    audit(&world, &mut world.client());
}

#[test]
fn a_repeated_settle_of_a_redriven_message_is_answered_truly() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let message = NewMessage::new("m").max_attempts(1);
    queue.push("failed", message.clone()).unwrap();
    let fail = world.sql("select pushpop.fail('failed', $1, $2, 'why')");
    let row = client.query_one(&world.sql("select id, token from pushpop.pop('failed')"), &[]).unwrap();
    let (id, token): (Uuid, Vec<u8>) = (row.get(0), row.get(1));
    client.execute(&fail, &[&id, &token]).unwrap();
    assert_eq!(queue.topic("failed").redrive_all().unwrap(), 1);
    client.execute(&fail, &[&id, &token]).unwrap();

    queue.push("expired", message).unwrap();
    let lease = pop(&queue.with_lease(Duration::from_secs(1)), "expired");
    until("it is dead", || !queue.topic("expired").dead(1).unwrap().is_empty());
    assert_eq!(queue.topic("expired").redrive(&[id]).unwrap(), 1);
    let late = lease.fail("too late").unwrap_err();
    assert_eq!(late.error().kind(), ErrorKind::LeaseLost);
    assert_eq!(stats(&queue, "expired").ready(), 1);
}

/// Nobody had come by since the lease ended, so the message was not in the list yet.
#[test]
fn one_that_its_lease_has_just_killed_is_redriven() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    drop(pop(&queue.with_lease(Duration::from_secs(1)), "t"));
    until("it is dead", || matches!(queue.find("t", id).unwrap().unwrap().state(), State::Dead { .. }));
    assert_eq!(queue.topic("t").redrive(&[id]).unwrap(), 1);
    assert_eq!(drain(&queue, "t"), ["m"]);
}

#[test]
fn redriving_wakes() {
    let world = World::new();
    let waiting = world.open(world.builder().poll_interval(Duration::from_secs(60)));
    let other = world.queue();
    let ids = kill(&other, "t", &["m"]);
    thread::scope(|scope| {
        let popped = scope.spawn(|| waiting.pop_timeout("t", SOON).unwrap());
        until_wanted(&world, &mut world.client(), "t");
        crate::world::until_listening(&world, &mut world.client());
        other.topic("t").redrive(&ids).unwrap();
        assert!(popped.join().unwrap().is_some());
    });
}

/// What is redriven dies again at once: only those that were dead when it began are taken.
#[test]
fn redriving_all_ends_while_messages_die_again() {
    let world = World::new();
    let queue = world.queue();
    let n = 3000;
    kill_at_once(&world, "t", n);
    let done = AtomicBool::new(false);
    let killed = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) || killed.load(Ordering::Relaxed) == 0 {
                    for lease in queue.pop_many("t", 10, Duration::from_millis(20)).unwrap() {
                        lease.fail("again").unwrap();
                        killed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        assert_eq!(queue.topic("t").redrive_all().unwrap(), n as u64);
        done.store(true, Ordering::Relaxed);
    });
    audit(&world, &mut world.client());
}

/// The same by SQL: each step waits until what the one before it redrove is dead again.
#[test]
fn steps_of_redriving_all_take_what_was_dead_at_the_first() {
    let world = World::new();
    drop(world.queue());
    kill_at_once(&world, "t", 25);
    let mut client = world.client();
    let step = world.sql("select redriven, until from pushpop.redrive_all('t', $1, 10)");
    let kill = world.sql("select pushpop.fail('t', p.id, p.token, 'again') from pushpop.pop('t', 100) p");
    let mut until: Option<OffsetDateTime> = None;
    for expected in [10, 10, 5, 0] {
        let row = client.query_one(&step, &[&until]).unwrap();
        assert_eq!(row.get::<_, i64>(0), expected);
        assert_eq!(client.query(&kill, &[]).unwrap().len(), usize::try_from(expected).unwrap());
        until = row.get(1);
    }
    assert_eq!(client.query_one(&step, &[&None::<OffsetDateTime>]).unwrap().get::<_, i64>(0), 10);
}

#[test]
fn redrivers_at_once_take_each_message_once() {
    let world = World::new();
    let queues = [world.queue(), world.queue()];
    kill_at_once(&world, "t", 3000);
    let ids: Vec<Uuid> = queues[0].topic("t").dead(1000).unwrap().iter().map(|m| m.id()).collect();
    let start = Barrier::new(8);
    let redriven: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let (start, ids, topic) = (&start, &ids, queues[i % 2].topic("t"));
                scope.spawn(move || {
                    start.wait();
                    match i % 4 {
                        0 => topic.redrive_all().unwrap(),
                        1 => topic.redrive(ids).unwrap(),
                        2 => topic.redrive(&ids.iter().rev().copied().collect::<Vec<_>>()).unwrap(),
                        _ => ids.chunks(50).map(|some| topic.redrive(some).unwrap()).sum(),
                    }
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(redriven, 3000);
    audit(&world, &mut world.client());
    assert_eq!(drain(&queues[0], "t").len(), 3000);
}

#[test]
fn the_dead_are_purged_by_their_age() {
    let world = World::new();
    let queue = world.queue();
    let topic = queue.topic("t");
    kill_at_once(&world, "t", 50);
    let old = world.sql(
        "with m as (update pushpop.messages set done_at = done_at - interval '1 day'
           where topic = 't' and convert_from(payload, 'UTF8')::integer < 20 returning topic, done_at, id)
         update pushpop.dead d set died_at = m.done_at from m where d.topic = m.topic and d.id = m.id",
    );
    assert_eq!(world.client().execute(&old, &[]).unwrap(), 20);
    queue.push("t", "alive").unwrap();
    assert_eq!(topic.purge_dead(Duration::from_secs(250_000_000_000)).unwrap(), 0);
    assert_eq!(topic.purge_dead(Duration::from_secs(2 * 86_400)).unwrap(), 0);
    assert_eq!(topic.purge_dead(Duration::from_secs(3600)).unwrap(), 20);
    assert_eq!(stats(&queue, "t").dead(), 30);
    assert_eq!(topic.purge_dead(Duration::ZERO).unwrap(), 30);
    assert!(topic.dead(10).unwrap().is_empty());
    assert_eq!(drain(&queue, "t"), ["alive"]);
    audit(&world, &mut world.client());
}

#[test]
fn bad_input_is_refused() {
    let world = World::new();
    let queue = world.queue();
    let bad = queue.topic("");
    for error in [
        bad.dead(1).unwrap_err(),
        bad.redrive(&[Uuid::nil()]).unwrap_err(),
        bad.redrive_all().unwrap_err(),
        bad.purge_dead(Duration::ZERO).unwrap_err(),
        queue.topic("t").dead(0).unwrap_err(),
        queue.topic("t").dead(1001).unwrap_err(),
        queue.topic("t").redrive(&vec![Uuid::nil(); 10_001]).unwrap_err(),
        queue.topic("t").purge_dead(Duration::MAX).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    }
}
