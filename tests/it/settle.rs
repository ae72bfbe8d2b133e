//! What the holder of a lease does with its message.

use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::uuid::Uuid;
use pushpop_pg::{Error, ErrorKind, Lease, NewMessage, Queue, SettleError, State};

use crate::world::{SOON, World, drain, pop, pop_many, stats, text, until, until_locked};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    pop(&queue, "t").complete().unwrap();
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Completed { .. }), "{found:?}");
    assert!(queue.try_pop("t").unwrap().is_none());
}

#[test]
fn a_discarded_message_is_told_apart() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    pop(&queue, "t").discard().unwrap();
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Discarded { .. }), "{found:?}");
    assert!(queue.try_pop("t").unwrap().is_none());
}

#[test]
fn a_deferred_message_comes_again_and_burns_no_attempt() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    for round in 1..4 {
        let lease = pop(&queue, "t");
        assert_eq!((lease.attempt(), lease.fence()), (1, round));
        lease.defer(Duration::from_millis(300)).unwrap();
        let found = queue.find("t", id).unwrap().unwrap();
        assert_eq!(found.attempt(), 0);
    }
    pop(&queue, "t").defer(Duration::from_secs(60)).unwrap();
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Delayed { .. }), "{found:?}");
    assert!(queue.try_pop("t").unwrap().is_none());
}

#[test]
fn a_message_deferred_by_nothing_is_ready() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    pop(&queue, "t").defer(Duration::ZERO).unwrap();
    assert_eq!(pop(&queue, "t").attempt(), 1);
}

#[test]
fn a_released_message_is_ready_and_burns_no_attempt() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    for round in 1..5 {
        let lease = pop(&queue, "t");
        assert_eq!((lease.attempt(), lease.fence()), (1, round));
        lease.release().unwrap();
    }
}

#[test]
fn a_failed_message_comes_again_after_its_backoff_until_it_is_dead() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", NewMessage::new("m").max_attempts(2)).unwrap();
    pop(&queue, "t").fail("first").unwrap();
    assert!(queue.try_pop("t").unwrap().is_none(), "not at once");
    let found = queue.find("t", id).unwrap().unwrap();
    assert_eq!((found.attempt(), found.last_error()), (1, Some("first")));
    let lease = pop(&queue, "t");
    assert_eq!((lease.attempt(), lease.last_error()), (2, Some("first")));
    lease.fail("second").unwrap();
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Dead { .. }), "{found:?}");
    assert_eq!((found.attempt(), found.last_error()), (2, Some("second")));
    assert!(queue.pop_timeout("t", SECOND).unwrap().is_none());
    assert_eq!(stats(&queue, "t").dead(), 1);
}

/// How long each of the messages has to wait after it failed.
fn backoffs(world: &World, attempt: u32) -> Vec<f64> {
    let queue = world.queue();
    let topic = format!("{attempt}");
    queue.push_many(&topic, (0..60).map(|_| NewMessage::new("m").max_attempts(None))).unwrap();
    let mut client = world.client();
    let update = world.sql("update pushpop.messages set attempt = $1 - 1 where topic = $2");
    client.execute(&update, &[&i32::try_from(attempt).unwrap(), &topic]).unwrap();
    for lease in pop_many(&queue, &topic, 60) {
        assert_eq!(lease.attempt(), attempt);
        lease.fail("m").unwrap();
    }
    let select = world.sql("select extract(epoch from ready_at - clock_timestamp())::float8 from pushpop.messages where topic = $1");
    client.query(&select, &[&topic]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn the_backoff_doubles_up_to_an_hour_with_jitter() {
    let world = World::new();
    for (attempt, most) in
        [(5, 16.0), (8, 128.0), (12, 2048.0), (13, 3600.0), (100, 3600.0), (30_000, 3600.0)]
    {
        let waits = backoffs(&world, attempt);
        let (least, longest) = waits.iter().fold((f64::MAX, f64::MIN), |(a, b), w| (a.min(*w), b.max(*w)));
        // Some time has passed since.
        assert!(longest <= most && least >= most * 0.5 - 15.0, "{attempt}: {least} to {longest}");
        assert!(longest - least > most / 100.0, "no jitter after attempt {attempt}: {least} to {longest}");
    }
}

type Verb = fn(Lease) -> Result<(), SettleError>;

/// The verbs, by name.
const VERBS: [(&str, Verb); 5] = [
    ("complete", Lease::complete),
    ("discard", Lease::discard),
    ("defer", |lease| lease.defer(Duration::from_secs(50))),
    ("release", Lease::release),
    ("fail", |lease| lease.fail("why")),
];

/// A lease that expired, and whose message somebody else has popped since.
fn stale(queue: &Queue, topic: &str) -> (Lease, Lease) {
    let stale = pop(&queue.with_lease(SECOND), topic);
    let fresh = pop(queue, topic);
    assert_eq!((stale.id(), stale.fence() + 1), (fresh.id(), fresh.fence()));
    (stale, fresh)
}

#[track_caller]
fn assert_lost(error: &Error, verb: &str) {
    assert_eq!(error.kind(), ErrorKind::LeaseLost, "{verb}: {error:?}");
    assert!(!error.is_retryable() && !error.is_indeterminate(), "{error:?}");
    assert!(error.to_string().starts_with(verb), "{error}");
}

#[test]
fn a_lease_that_was_handed_on_settles_nothing() {
    let world = World::new();
    let queue = world.queue();
    thread::scope(|scope| {
        for (verb, settle) in VERBS {
            let queue = &queue;
            scope.spawn(move || {
                queue.push(verb, "m").unwrap();
                let (mut stale, fresh) = stale(queue, verb);
                let before = queue.find(verb, fresh.id()).unwrap();
                assert_lost(&stale.extend(Duration::from_secs(100)).unwrap_err(), "extend");
                let (stale, error) = settle(stale).unwrap_err().into_parts();
                assert_lost(&error, verb);
                assert_eq!(stale.id(), fresh.id());
                let error = queue.transaction(|tx| stale.complete_in(tx)).unwrap_err();
                assert_lost(&error, "complete");
                let error = queue.transaction(|tx| stale.discard_in(tx)).unwrap_err();
                assert_lost(&error, "discard");
                assert_eq!(queue.find(verb, fresh.id()).unwrap(), before, "nothing changed");
                // The other is the holder still.
                fresh.complete().unwrap();
                let (_, error) = settle(stale).map_err(SettleError::into_parts).unwrap_err();
                assert_lost(&error, verb);
            });
        }
    });
}

/// An expired lease whose message nobody has popped since may still be settled, or is lost: either
/// way the answer is the truth.
#[test]
fn a_lease_that_expired_tells_the_truth() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    let lease = pop(&queue.with_lease(SECOND), "t");
    until("it has expired", || lease.remaining().is_zero());
    thread::sleep(SECOND / 5);
    let settled = lease.complete();
    let completed = matches!(queue.find("t", id).unwrap().unwrap().state(), State::Completed { .. });
    match settled {
        Ok(()) => assert!(completed),
        Err(e) => assert!(e.error().kind() == ErrorKind::LeaseLost && !completed, "{e:?}"),
    }
}

/// A settle whose answer was lost is sent again: through SQL, as the client would.
#[test]
fn repeating_a_settle_that_succeeded_is_fine() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let pop_sql = world.sql("select id, token from pushpop.pop('t')");
    let repeat = world.sql("select place, result from pushpop.settle_many('t', array[$1::uuid], array[$2::bytea], array[$3::text], array[$4::float8], array['why'], 3600, true)");
    for (verb, delay) in [
        ("complete", None),
        ("discard", None),
        ("defer", Some(50.0)),
        ("release", None),
        ("fail", Some(50.0)),
        ("fail", None),
    ] {
        let id = queue.push("t", NewMessage::new("m")).unwrap();
        let row = client.query_one(&pop_sql, &[]).unwrap();
        let token: Vec<u8> = row.get(1);
        assert_eq!(row.get::<_, pushpop_pg::uuid::Uuid>(0), id);
        for expected in [&[][..], &["again"], &["again"]] {
            let results = client.query(&repeat, &[&id, &token, &verb, &delay]).unwrap();
            let results: Vec<String> = results.iter().map(|row| row.get(1)).collect();
            assert_eq!(results, expected, "{verb}");
        }
        let state = queue.find("t", id).unwrap().unwrap();
        // Another verb is not a repetition.
        let other = if verb == "complete" { "discard" } else { "complete" };
        let problems = client.query(&repeat, &[&id, &token, &other, &delay]).unwrap();
        assert_eq!(problems[0].get::<_, String>(1), "lost", "{verb} then {other}");
        assert_eq!(queue.find("t", id).unwrap().unwrap(), state);
        if verb == "release" {
            pop(&queue, "t").complete().unwrap();
        }
    }
}

/// The row of the lease outlives the message, as a second one was popped with it.
#[test]
fn a_lease_has_no_hold_on_a_later_message_with_the_same_id() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::ZERO));
    let mut client = world.client();
    let mut settle = |ids: &[Uuid], tokens: &[&[u8]], verb: &str, delay: Option<f64>| -> Vec<String> {
        let sql = world.sql(
            "select result from pushpop.settle_many('t', $1, $2, array_fill($3::text, array[cardinality($1::uuid[])]),
                                                    array_fill($4::float8, array[cardinality($1::uuid[])]), null, 0)",
        );
        client.query(&sql, &[&ids, &tokens, &verb, &delay]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let (id, sibling) = (Uuid::now_v7(), Uuid::now_v7());
    queue.push_many("t", [id, sibling].map(|id| NewMessage::new("old").with_id(id))).unwrap();
    let old = world.client().query(&world.sql("select token from pushpop.pop('t', 2, 1)"), &[]).unwrap();
    let tokens: Vec<&[u8]> = old.iter().map(|row| row.get(0)).collect();
    assert!(settle(&[id], &tokens[..1], "complete", None).is_empty());
    queue.push("t", NewMessage::new("new").with_id(id)).unwrap();
    let new = pop(&queue, "t");
    assert_eq!((new.id(), new.attempt(), new.fence()), (id, 1, 1));

    for (verb, delay) in [
        ("complete", None),
        ("discard", None),
        ("defer", Some(0.0)),
        ("release", None),
        ("fail", None),
        ("extend", Some(9.0)),
    ] {
        assert_eq!(settle(&[id], &tokens[..1], verb, delay), ["lost"], "{verb}");
        assert_eq!(settle(&[id, id], &[tokens[0], tokens[0]], verb, delay), ["lost", "lost"], "{verb}");
    }
    let beat = world.sql("select result from pushpop.heartbeat(array['t'], array[$1::uuid], array[$2::bytea], array[9::float8])");
    let said = world.client().query_one(&beat, &[&id, &tokens[0]]).unwrap();
    assert_eq!(said.get::<_, &str>(0), "lost");

    // The old lease ends: its other message comes again, and the new one does not.
    let again = queue.pop_timeout("t", SOON).unwrap().unwrap();
    assert_eq!(again.id(), sibling);
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Leased { until } if until == new.deadline()), "{found:?}");
    assert_eq!((stats(&queue, "t").leased(), stats(&queue, "t").ready()), (2, 0));
    new.complete().unwrap();
    again.complete().unwrap();
}

#[test]
fn a_lease_whose_message_is_gone_is_indeterminate() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::ZERO));
    let mut client = world.client();
    for (verb, settle) in VERBS {
        queue.push(verb, "m").unwrap();
        let lease = pop(&queue, verb);
        // As if this had been our own call, whose answer was lost.
        client.execute(&world.sql("delete from pushpop.messages where topic = $1"), &[&verb]).unwrap();
        let (mut lease, error) = settle(lease).unwrap_err().into_parts();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{verb}: {error:?}");
        assert!(error.is_indeterminate() && !error.is_retryable(), "{error:?}");
        assert_eq!(lease.extend(SECOND).unwrap_err().kind(), ErrorKind::NotFound);
        let failed = queue.complete_many(vec![lease]).unwrap_err();
        assert!(failed.error().is_indeterminate() && failed.into_parts().0.len() == 1);
    }
}

#[test]
fn what_is_settled_without_history_is_deleted() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::ZERO));
    queue.push_many("t", ["a", "b", "c", "d"]).unwrap();
    pop(&queue, "t").complete().unwrap();
    pop(&queue, "t").discard().unwrap();
    assert!(queue.complete_many(pop_many(&queue, "t", 2)).unwrap().is_empty());
    let left: i64 =
        world.client().query_one(&world.sql("select count(*) from pushpop.messages"), &[]).unwrap().get(0);
    assert_eq!(left, 0);
}

// Extend.

#[test]
fn extending_keeps_the_lease() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let mut lease = pop(&queue.with_lease(SECOND), "t");
    let first = lease.deadline();
    lease.extend(Duration::from_secs(60)).unwrap();
    assert!(lease.deadline() > first + Duration::from_secs(50));
    assert!(lease.remaining() > Duration::from_secs(45) && lease.remaining() <= Duration::from_secs(60));
    let found = queue.find("t", lease.id()).unwrap().unwrap();
    assert_eq!(found.state(), State::Leased { until: lease.deadline() });
    assert!(queue.pop_timeout("t", SECOND * 2).unwrap().is_none(), "it did not expire at the first deadline");
    lease.complete().unwrap();
}

#[test]
fn extending_never_shortens() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["a", "b"]).unwrap();
    for mut lease in pop_many(&queue, "t", 2) {
        let deadline = lease.deadline();
        let left = lease.remaining();
        lease.extend(SECOND).unwrap();
        assert_eq!(lease.deadline(), deadline);
        assert!(lease.remaining() + SOON > left);
        lease.extend(Duration::from_secs(3600)).unwrap();
        let longest = lease.deadline();
        lease.extend(Duration::from_secs(400)).unwrap();
        assert_eq!(lease.deadline(), longest);
        assert_eq!(queue.find("t", lease.id()).unwrap().unwrap().state(), State::Leased { until: longest });
    }
}

/// Extending a lease counted as settling it: two extensions cleared away the row that it shared with
/// another, whose message was never handed out again.
#[test]
fn extending_one_lease_leaves_its_siblings_alone() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["a", "b", "c"]).unwrap();
    let mut leases = pop_many(&queue.with_lease(SECOND * 3), "t", 3);
    for _ in 0..4 {
        leases[0].extend(Duration::from_secs(60)).unwrap();
    }
    leases.remove(0).complete().unwrap();
    leases.remove(1).complete().unwrap();
    let again = pop(&queue, "t");
    assert_eq!(text(again.payload()), "b", "it expired, and came again");
    assert_eq!(leases.remove(0).complete().unwrap_err().error().kind(), ErrorKind::LeaseLost);
    again.complete().unwrap();
}

#[test]
fn an_extended_lease_expires_in_the_end() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["a", "b"]).unwrap();
    let mut leases = pop_many(&queue.with_lease(SECOND), "t", 2);
    leases[0].extend(SECOND * 2).unwrap();
    leases[0].extend(SECOND * 3).unwrap();
    let again = pop(&queue, "t");
    assert_eq!(text(again.payload()), "b", "its sibling expired first");
    let again = pop(&queue, "t");
    assert_eq!((text(again.payload()).as_str(), again.attempt()), ("a", 2));
    assert!(leases[0].remaining().is_zero());
    assert_eq!(leases.remove(0).complete().unwrap_err().error().kind(), ErrorKind::LeaseLost);
}

#[test]
fn every_verb_settles_an_extended_lease() {
    let world = World::new();
    let queue = world.queue();
    thread::scope(|scope| {
        for (verb, settle) in VERBS {
            let queue = &queue;
            scope.spawn(move || {
                queue.push_many(verb, ["a", "b"]).unwrap();
                let mut leases = pop_many(&queue.with_lease(SECOND), verb, 2);
                leases[1].extend(SOON).unwrap();
                let second = leases.remove(1);
                // Once the first has expired, the row that both shared is gone.
                let again = pop(queue, verb);
                assert_eq!(again.id(), leases[0].id());
                settle(second).unwrap_or_else(|e| panic!("{verb}: {e}"));
                again.complete().unwrap();
            });
        }
    });
}

// Many.

#[test]
fn complete_many_settles_several_topics_and_returns_the_lost() {
    let world = World::new();
    let queue = world.queue();
    for topic in ["a", "b", "c"] {
        queue.push_many(topic, (0..30).map(|i| format!("{topic}{i}"))).unwrap();
    }
    let stale = pop(&queue.with_lease(SECOND), "b");
    let mut leases = pop_many(&queue, "a", 30);
    leases.extend(pop_many(&queue, "b", 29));
    let fresh = pop(&queue, "b");
    assert_eq!(stale.id(), fresh.id());
    leases.push(stale);
    leases.extend(pop_many(&queue, "c", 7));
    // Interleaved, so that topics are not in a row.
    leases.sort_by_key(|l| text(l.payload()).chars().rev().collect::<String>());
    let lost = queue.complete_many(leases).unwrap();
    assert_eq!(lost.iter().map(|l| l.id()).collect::<Vec<_>>(), [fresh.id()]);
    let settled = |t: &str| stats(&queue, t).settled();
    assert_eq!((settled("a"), settled("b"), settled("c")), (30, 29, 7));
    fresh.complete().unwrap();
}

#[test]
fn complete_many_settles_thousands() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..5000).map(|i| format!("{i}"))).unwrap();
    let mut leases = Vec::new();
    while leases.len() < 5000 {
        leases.extend(pop_many(&queue, "t", 700));
    }
    assert!(queue.complete_many(leases).unwrap().is_empty());
    let stats = stats(&queue, "t");
    assert_eq!((stats.settled(), stats.leased(), stats.ready()), (5000, 0, 0));
}

#[test]
fn settles_of_one_batch_in_all_ways() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..600).map(|i| format!("{i:03}"))).unwrap();
    let leases = pop_many(&queue, "t", 600);
    thread::scope(|scope| {
        for lease in leases {
            scope.spawn(move || {
                let i: usize = text(lease.payload()).parse().unwrap();
                VERBS[i % 5].1(lease).unwrap();
            });
        }
    });
    let stats = stats(&queue, "t");
    assert_eq!((stats.settled(), stats.leased(), stats.dead()), (240, 0, 0));
    // 120 deferred and 120 that failed wait for their time; those that failed may have come already.
    assert_eq!(stats.ready() + stats.delayed(), 360);
    let found = drain(&queue, "t");
    assert!(found.len() >= 120, "{}", found.len());
}

/// A handler inside a long transaction that has settled its message held up the settles, extensions
/// and expiry of all that were popped with it.
#[test]
fn a_long_transaction_does_not_hold_up_siblings() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..8).map(|i| format!("{i}"))).unwrap();
    let mut leases = pop_many(&queue.with_lease(SECOND * 2), "t", 8);
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    let held = leases.remove(0);
    held.complete_in(&mut tx).unwrap();

    let patience = Duration::from_secs(15);
    let started = Instant::now();
    leases.remove(0).complete().unwrap();
    leases.remove(0).release().unwrap();
    leases.remove(0).fail("m").unwrap();
    assert!(queue.complete_many(vec![leases.remove(0)]).unwrap().is_empty());
    leases[0].extend(Duration::from_secs(60)).unwrap();
    let extended = leases.remove(0);
    assert!(started.elapsed() < patience, "settles waited {:?}", started.elapsed());

    // Released, failed and expired ones come again.
    let mut come = Vec::new();
    while come.len() < 4 {
        come.push(text(pop(&queue, "t").payload()));
    }
    come.sort_unstable();
    assert_eq!(come, ["2", "3", "6", "7"]);
    extended.complete().unwrap();
    assert!(queue.pop_timeout("t", SECOND * 2).unwrap().is_none(), "the one in the transaction is not free");
    tx.commit().unwrap();
    assert!(matches!(queue.find("t", held.id()).unwrap().unwrap().state(), State::Completed { .. }));
    assert!(queue.pop_timeout("t", SECOND * 2).unwrap().is_none());
}

#[test]
fn fences_grow_with_each_delivery() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let mut last = 0;
    for round in 0..6 {
        let lease = pop(&queue, "t");
        assert!(lease.fence() > last);
        last = lease.fence();
        match round % 3 {
            0 => lease.release().unwrap(),
            1 => lease.defer(Duration::from_millis(10)).unwrap(),
            _ => lease.fail("m").unwrap(),
        }
    }
}

#[test]
fn a_dropped_lease_is_not_settled() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    drop(pop(&queue, "t"));
    assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Leased { .. }));
}

// Failures.

#[test]
fn the_newest_ten_failures_are_kept() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let id = queue.push("t", NewMessage::new("m").max_attempts(12)).unwrap();
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert!(lease.failures().is_empty() && lease.last_error().is_none());
    lease.release().unwrap();
    let fail = world.sql(
        "with p as materialized (select id, token from pushpop.pop('t'))
         select pushpop.fail('t', p.id, p.token, $1, 0) from p",
    );
    for attempt in 1..=12 {
        assert_eq!(client.execute(&fail, &[&format!("no {attempt}")]).unwrap(), 1);
    }
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Dead { .. }), "{found:?}");
    let told: Vec<(u32, &str)> = found.failures().iter().map(|f| (f.attempt(), f.error())).collect();
    let expected: Vec<(u32, String)> = (3..=12).map(|n| (n, format!("no {n}"))).collect();
    assert_eq!(told, expected.iter().map(|(n, error)| (*n, error.as_str())).collect::<Vec<_>>());
    assert_eq!(found.last_error(), Some("no 12"));
    assert!(found.failures().is_sorted_by_key(pushpop_pg::Failure::at));
    let State::Dead { at } = found.state() else { panic!("{found:?}") };
    assert_eq!(found.failures()[9].at(), at, "to the microsecond");

    // For other languages: text of the same time.
    let sql = world.sql(
        "select last_error, (failures -> 9 ->> 'at')::timestamptz, failures -> 9 ->> 'at' like '%Z'
         from pushpop.find('t', $1)",
    );
    let row = client.query_one(&sql, &[&id]).unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get(1), row.get(2)), ("no 12", at, true));
}

#[test]
fn failures_are_seen_by_pops_of_one_and_of_many() {
    let world = World::new();
    let queue = world.queue();
    for max in [1, 2] {
        let topic = &max.to_string();
        let all_ready = || stats(&queue, topic).ready() == u64::try_from(max).unwrap();
        queue.push_many(topic, vec!["m"; max]).unwrap();
        drop(pop_many(&queue.with_lease(SECOND), topic, max));
        until("all come again", all_ready);
        for lease in pop_many(&queue, topic, max) {
            lease.fail("quo\"te, {brace} and \\").unwrap();
        }
        until("all come again", all_ready);
        let leases = pop_many(&queue, topic, max);
        assert_eq!(leases.len(), max);
        for lease in leases {
            let told: Vec<(u32, &str)> = lease.failures().iter().map(|f| (f.attempt(), f.error())).collect();
            assert_eq!(told, [(1, "the lease expired"), (2, "quo\"te, {brace} and \\")]);
            assert_eq!(lease.last_error(), Some(told[1].1));
        }
    }
}

/// A message that its expired lease had killed looked like one that had failed: a late `fail` was told Ok.
#[test]
fn failing_after_the_lease_has_killed_the_message_is_lost() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    let lease = pop(&queue.with_lease(SECOND), "t");
    until("the lease has killed it", || {
        // A pop that finds nothing looks at leases that ended.
        assert!(queue.try_pop("t").unwrap().is_none());
        matches!(queue.find("t", id).unwrap().unwrap().state(), State::Dead { .. })
    });
    assert!(queue.try_pop("t").unwrap().is_none());
    let before = queue.find("t", id).unwrap().unwrap();
    assert_eq!(before.last_error(), Some("the lease expired"));
    assert_lost(lease.fail("too late").unwrap_err().error(), "fail");
    assert_eq!(queue.find("t", id).unwrap().unwrap(), before);
}

/// Servers before November 2025 (15.15 and its like) did not look again whether `ctid = any (..)` is true of a row that
/// they had waited for: a batch then completed messages that were handed on meanwhile.
#[test]
fn a_batch_that_waited_while_its_messages_were_handed_on_is_lost() {
    let world = World::new();
    let queue = world.queue();
    let (mut other, mut watcher) = (world.client(), world.client());
    let ids = queue.push_many("t", ["a", "b"]).unwrap();
    let leases = pop_many(&queue, "t", 2);
    let expire = world.sql("update pushpop.leases set lease_until = clock_timestamp() - interval '1 second'");
    other.batch_execute(&expire).unwrap();
    let mut handing_on = other.transaction().unwrap();
    assert_eq!(handing_on.query(&world.sql("select id from pushpop.pop('t', 2)"), &[]).unwrap().len(), 2);
    thread::scope(|scope| {
        let settling = scope.spawn(|| queue.complete_many(leases));
        until_locked(&world, &mut watcher);
        handing_on.commit().unwrap();
        assert_eq!(settling.join().unwrap().unwrap().len(), 2);
    });
    for id in ids {
        let found = queue.find("t", id).unwrap().unwrap();
        assert!(matches!(found.state(), State::Leased { .. }), "{found:?}");
    }
}
