//! Looking at messages and topics.

use std::time::{Duration, Instant};

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::{NewMessage, Queue, State, Stats, uuid::Uuid};

use crate::world::{World, pop, pop_many, stats, text, until};

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    let found = queue.find("t", id).unwrap().unwrap();
    assert_eq!(
        (found.id(), found.topic(), found.payload(), found.state()),
        (id, "t", b"m".as_slice(), State::Ready)
    );
    assert!(queue.find("t", Uuid::new_v4()).unwrap().is_none());
    assert!(queue.find("other", id).unwrap().is_none());
}

#[test]
fn a_message_is_found_in_every_state() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::from_secs(1000)));
    let state = |id| queue.find("t", id).unwrap().unwrap();
    let before = OffsetDateTime::now_utc() - Duration::from_secs(3600);

    let id = queue.push("t", NewMessage::new("m").header("k", "v").max_attempts(3)).unwrap();
    let found = state(id);
    assert_eq!(
        (found.state(), found.attempt(), found.fence(), found.max_attempts()),
        (State::Ready, 0, 0, Some(3))
    );
    assert_eq!((found.header("k"), found.last_error()), (Some("v"), None));
    assert!(found.pushed_at() > before && found.ready_at() == found.pushed_at());

    let lease = pop(&queue, "t");
    let found = state(id);
    assert_eq!(found.state(), State::Leased { until: lease.deadline() });
    assert_eq!((found.attempt(), found.fence()), (1, 1));
    assert_eq!((lease.pushed_at(), lease.ready_at()), (found.pushed_at(), found.ready_at()));

    lease.defer(Duration::from_secs(100)).unwrap();
    let found = state(id);
    assert_eq!(found.state(), State::Delayed { until: found.ready_at() });
    assert_eq!((found.attempt(), found.fence()), (0, 1));

    let id = queue.push("t", "m").unwrap();
    pop(&queue, "t").complete().unwrap();
    let State::Completed { at, until } = state(id).state() else { panic!("{:?}", state(id)) };
    assert_eq!(until - at, Duration::from_secs(1000));
    assert_eq!((state(id).attempt(), state(id).payload()), (1, b"m".as_slice()));

    let id = queue.push("t", "m").unwrap();
    pop(&queue, "t").discard().unwrap();
    let State::Discarded { at, until } = state(id).state() else { panic!("{:?}", state(id)) };
    assert_eq!(until - at, Duration::from_secs(1000));

    let id = queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    pop(&queue, "t").fail("broken").unwrap();
    let State::Dead { at } = state(id).state() else { panic!("{:?}", state(id)) };
    assert!(at > before);
    assert_eq!(state(id).last_error(), Some("broken"));
}

#[test]
fn an_expired_lease_is_seen_as_what_it_is_at_once() {
    let world = World::new();
    let queue = world.queue();
    let short = queue.with_lease(Duration::from_secs(1));
    queue.push_many("t", [NewMessage::new("a"), NewMessage::new("b").max_attempts(1)]).unwrap();
    let leases = pop_many(&short, "t", 2);
    std::thread::sleep(Duration::from_millis(1100));
    let state = |i: usize| queue.find("t", leases[i].id()).unwrap().unwrap().state();
    assert_eq!(state(0), State::Ready);
    assert!(matches!(state(1), State::Dead { .. }), "{:?}", state(1));
    let stats = stats(&queue, "t");
    assert_eq!((stats.ready(), stats.leased(), stats.dead()), (1, 0, 1));
    assert_eq!(text(pop(&queue, "t").payload()), "a");
}

fn figures(stats: &Stats) -> [u64; 5] {
    [stats.ready(), stats.delayed(), stats.leased(), stats.settled(), stats.dead()]
}

#[test]
fn stats_count_what_is_there() {
    let world = World::new();
    let queue = world.queue();
    let stats = || stats(&queue, "t");
    assert_eq!(figures(&stats()), [0; 5]);
    assert_eq!(stats().oldest_ready_age(), None);

    queue.push_many("t", (0..30).map(|i| format!("{i}"))).unwrap();
    queue.push_many("t", (0..7).map(|_| NewMessage::new("d").delay(Duration::from_secs(60)))).unwrap();
    assert_eq!(figures(&stats()), [30, 7, 0, 0, 0]);
    let mut leases = pop_many(&queue, "t", 20);
    assert_eq!(figures(&stats()), [10, 7, 20, 0, 0]);
    leases.remove(0).complete().unwrap();
    leases.remove(0).discard().unwrap();
    leases.remove(0).release().unwrap();
    leases.remove(0).defer(Duration::from_secs(60)).unwrap();
    leases[0].extend(Duration::from_secs(600)).unwrap();
    queue.transaction(|tx| leases[1].complete_in(tx)).unwrap();
    assert_eq!(figures(&stats()), [11, 8, 15, 3, 0]);
    queue
        .push(
            "t",
            NewMessage::new("m")
                .ready_at(OffsetDateTime::now_utc() - Duration::from_secs(500))
                .max_attempts(1),
        )
        .unwrap();
    let age = stats().oldest_ready_age().unwrap();
    assert!(age >= Duration::from_secs(499) && age < Duration::from_secs(560), "{age:?}");
    // A time in the past may be overtaken for a second.
    std::thread::sleep(Duration::from_millis(1100));
    pop(&queue, "t").fail("m").unwrap();
    assert_eq!(figures(&stats()), [11, 8, 15, 3, 1]);

    let at = stats().at();
    let now: OffsetDateTime = world.client().query_one("select clock_timestamp()", &[]).unwrap().get(0);
    assert!(now - at < Duration::from_secs(15), "as of now");
}

#[test]
fn topics_lists_each_with_its_figures() {
    let world = World::new();
    let queue = world.queue();
    for topic in ["b", "a", "c", "é", "A"] {
        queue.push(topic, "m").unwrap();
    }
    pop(&queue, "a").complete().unwrap();
    let topics = queue.topics().unwrap();
    let names: Vec<&str> = topics.iter().map(Stats::topic).collect();
    assert_eq!(names, ["A", "a", "b", "c", "é"]);
    assert_eq!(figures(&topics[1]), [0, 0, 0, 1, 0]);
    assert_eq!(figures(&topics[2]), [1, 0, 0, 0, 0]);
}

/// It used to take a millisecond for each.
#[test]
fn the_figures_of_many_topics_are_cheap() {
    let world = World::new();
    let queue = world.open(world.builder().operation_timeout(Duration::from_secs(3)));
    let mut client = world.client();
    let push = "select from generate_series(1, 30000) i, pushpop.push('topic ' || i, 'm')";
    client.batch_execute(&world.sql(push)).unwrap();
    queue.topic("a").pause().unwrap();
    queue.topic("z").pause().unwrap();
    pop(&queue, "topic 77").complete().unwrap();
    drop(pop(&queue, "topic 78"));
    let topics = queue.topics().unwrap();
    assert_eq!(topics.len(), 30_002);
    assert!(topics.is_sorted_by_key(|stats| stats.topic().to_owned()));
    let of = |name: &str| figures(topics.iter().find(|stats| stats.topic() == name).unwrap());
    assert_eq!(of("topic 1"), [1, 0, 0, 0, 0]);
    assert_eq!([of("topic 77"), of("topic 78")], [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]);
    assert!(topics[0].paused() && topics[30_001].paused() && !topics[1].paused());

    // However short its time is, it comes to the end.
    let sql = world.sql("select count(*)::int, max(topic) from pushpop.all_stats($1, 0)");
    let (mut after, mut seen) = (String::new(), 0);
    for _ in 0..100 {
        let row = client.query_one(&sql, &[&after]).unwrap();
        assert_eq!(row.get::<_, i32>(0), 1, "one at least");
        after = row.get(1);
        seen += 1;
    }
    assert_eq!((seen, &*after), (100, topics[99].topic()));
    let row = client.query_one(&sql, &[&"z"]).unwrap();
    assert_eq!(row.get::<_, i32>(0), 0, "there is no more");
}

/// What a topic has much of is counted once for all who ask within two seconds, however they ask.
#[test]
fn figures_that_cost_much_are_shared() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    client
        .batch_execute(
            &world.sql("select from generate_series(1, 21000) i, pushpop.push('much', int4send(i))"),
        )
        .unwrap();
    queue.push("little", "m").unwrap();
    let mut taken = |name: &str, sql: &str| -> OffsetDateTime {
        client.query_one(&world.sql(sql), &[&name]).unwrap().get(0)
    };
    let all = "select at from pushpop.all_stats() where topic = $1";
    let one = "select at from pushpop.stats($1)";
    // A busy machine may take more than the two seconds.
    for (first, second) in [(all, all), (all, one), (one, all), (one, one)] {
        until("they are shared", || taken("much", first) == taken("much", second));
        assert_ne!(taken("little", first), taken("little", second));
    }
    let ready = |topic: &str| queue.topic(topic).stats().unwrap().ready();
    assert_eq!((ready("much"), ready("little")), (21_000, 1));
}

#[test]
fn peek_shows_the_order_and_takes_nothing() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..40).map(|i| format!("{i:02}"))).unwrap();
    queue.push("t", NewMessage::new("later").delay(Duration::from_secs(60)).header("k", "v")).unwrap();
    pop_many(&queue, "t", 5).remove(0).release().unwrap();
    let shown = queue.topic("t").peek(1000).unwrap();
    let payloads: Vec<String> = shown.iter().map(|m| text(m.payload())).collect();
    let mut expected: Vec<String> = (5..40).map(|i| format!("{i:02}")).collect();
    expected.insert(0, "00".into());
    expected.push("later".into());
    assert_eq!(payloads, expected);
    assert_eq!(shown[0].state(), State::Ready);
    assert_eq!(
        (shown[36].state(), shown[36].header("k")),
        (State::Delayed { until: shown[36].ready_at() }, Some("v"))
    );
    assert_eq!(queue.topic("t").peek(3).unwrap().len(), 3);
    assert!(queue.topic("none").peek(10).unwrap().is_empty());
    assert_eq!(stats(&queue, "t").ready(), 36);
    assert_eq!(queue.topic("t").name(), "t");
}

#[test]
fn purge_deletes_what_waits_and_nothing_else() {
    let world = World::new();
    let queue = world.queue();
    queue.push("other", "m").unwrap();
    queue.push_many("t", (0..2500).map(|i| format!("{i}"))).unwrap();
    queue.push_many("t", (0..100).map(|_| NewMessage::new("d").delay(Duration::from_secs(60)))).unwrap();
    let mut leases = pop_many(&queue, "t", 10);
    leases.remove(0).complete().unwrap();
    queue.push("z", NewMessage::new("z").max_attempts(1)).unwrap();
    pop(&queue, "z").fail("m").unwrap();
    assert_eq!(queue.topic("z").purge().unwrap(), 0);
    assert_eq!(queue.topic("t").purge().unwrap(), 2590);
    assert_eq!(figures(&stats(&queue, "t")), [0, 0, 9, 1, 0]);
    assert_eq!(figures(&stats(&queue, "z")), [0, 0, 0, 0, 1]);
    assert_eq!(figures(&stats(&queue, "other")), [1, 0, 0, 0, 0]);
    assert!(queue.try_pop("t").unwrap().is_none());
    assert!(queue.complete_many(leases).unwrap().is_empty());
    queue.push("t", "after").unwrap();
    assert_eq!(text(pop(&queue, "t").payload()), "after");
}

#[test]
fn figures_of_a_large_topic_are_cheap() {
    let world = World::new();
    let queue = world.queue();
    fill(&world, "t", 100_000);
    let started = Instant::now();
    let stats = queue.topic("t").stats().unwrap();
    let took = started.elapsed();
    assert_eq!(figures(&stats), [100_000, 0, 0, 0, 0]);
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(queue.topic("t").peek(1).unwrap().len(), 1);
    assert_eq!(queue.topic("t").purge().unwrap(), 100_000);
}

#[test]
fn figures_are_at_most_two_seconds_old() {
    let world = World::new();
    let queue = world.queue();
    fill(&world, "t", 50_000);
    let mut client = world.client();
    let ends = Instant::now() + Duration::from_secs(4);
    while Instant::now() < ends {
        queue.push("t", "m").unwrap();
        let asked: OffsetDateTime = client.query_one("select clock_timestamp()", &[]).unwrap().get(0);
        let count = "select count(*) from pushpop.messages where pushed_at < $1";
        let stats = queue.topic("t").stats().unwrap();
        assert!(asked - stats.at() <= Duration::from_secs(2), "{} asked for at {asked}", stats.at());
        // And they are what was there at that time.
        let then: i64 = client.query_one(&world.sql(count), &[&stats.at()]).unwrap().get(0);
        assert_eq!(stats.ready(), u64::try_from(then).unwrap());
    }
}

/// Pushes so many messages by SQL, in batches of 10,000.
pub(crate) fn fill(world: &World, topic: &str, n: u32) {
    let mut client = world.client();
    let sql = world.sql(
        "select from pushpop.push_many($1,
           array(select gen_random_uuid() from generate_series(1, 10000)), array_fill('payload'::bytea, '{10000}'))",
    );
    for _ in 0..n / 10_000 {
        client.execute(&sql, &[&topic]).unwrap();
    }
}

// History.

fn settle_some(queue: &Queue, topic: &str) -> Vec<Uuid> {
    let mut ids = queue.push_many(topic, (0..300).map(|i| format!("{i}"))).unwrap();
    assert!(queue.complete_many(pop_many(queue, topic, 299)).unwrap().is_empty());
    pop(queue, topic).discard().unwrap();
    ids.extend(queue.push_many(topic, ["stays"]).unwrap());
    ids
}

#[test]
fn history_is_deleted_after_its_time() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::from_secs(2)));
    let ids = settle_some(&queue, "t");
    assert!(queue.find("t", ids[0]).unwrap().is_some(), "it is kept first");
    until("the history is deleted", || queue.find("t", ids[0]).unwrap().is_none());
    until("all of it", || figures(&stats(&queue, "t")) == [1, 0, 0, 0, 0]);
    assert!(queue.find("t", ids[300]).unwrap().is_some());
}

#[test]
fn history_of_a_topic_that_nobody_uses_is_deleted_by_whoever_is_there() {
    let world = World::new();
    let ids = settle_some(&world.open(world.builder().keep_settled(Duration::from_secs(1))), "left alone");
    // That queue is gone. Another one, which uses other topics or none, notices.
    let other = world.open(world.builder().keep_settled(Duration::from_secs(2)));
    let mut client = world.client();
    let sql = world.sql("select count(*) from pushpop.messages where topic = 'left alone'");
    until("the history is deleted", || client.query_one(&sql, &[]).unwrap().get::<_, i64>(0) == 1);
    assert!(other.find("left alone", ids[300]).unwrap().is_some());
}

#[test]
fn messages_of_expired_leases_are_returned_by_whoever_is_there() {
    let world = World::new();
    let queue = world.queue();
    queue.push("left alone", "m").unwrap();
    drop(pop(&queue.with_lease(Duration::from_secs(1)), "left alone"));
    drop(queue);
    let _other = world.open(world.builder().keep_settled(Duration::from_secs(1)));
    let mut client = world.client();
    let sql = world
        .sql("select (select count(*) from pushpop.leases) = 0 and (select count(*) from pushpop.runs) = 1");
    until("the lease is reclaimed", || client.query_one(&sql, &[]).unwrap().get(0));
}
