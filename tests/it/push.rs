//! Putting messages in.

use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::{ErrorKind, NewMessage, Queue, State, uuid::Uuid};

use crate::world::{World, drain, pop, pop_many, text, until_locked};

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let message = NewMessage::new("hello").header("k", "v").max_attempts(3);
    let id = message.id();
    assert_eq!(queue.push("t", message).unwrap(), id);
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert_eq!((lease.id(), lease.topic(), lease.payload()), (id, "t", b"hello".as_slice()));
    assert_eq!(
        (lease.header("k"), lease.max_attempts(), lease.attempt(), lease.fence()),
        (Some("v"), Some(3), 1, 1)
    );
}

#[test]
fn anything_that_turns_into_bytes_is_pushed() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "str").unwrap();
    queue.push("t", String::from("string")).unwrap();
    queue.push("t", vec![b'v']).unwrap();
    queue.push("t", b"bytes".as_slice()).unwrap();
    queue.push("t", [b'a'; 2]).unwrap();
    assert_eq!(drain(&queue, "t"), ["str", "string", "v", "bytes", "aa"]);
}

#[test]
fn payloads_are_any_bytes() {
    let world = World::new();
    let queue = world.queue();
    let payloads: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        b"a\0b".to_vec(),
        vec![0xff, 0xfe, 0x80],
        (0..=255).collect(),
        b"\\x00".to_vec(),
        b"\\".to_vec(),
        vec![7; 1 << 20],
    ];
    for payload in &payloads {
        queue.push("one", payload.clone()).unwrap();
    }
    queue.push_many("many", payloads.clone()).unwrap();
    for topic in ["one", "many"] {
        let leases = pop_many(&queue, topic, 100);
        assert_eq!(leases.len(), payloads.len());
        for (lease, payload) in leases.iter().zip(&payloads) {
            assert_eq!(lease.payload(), payload);
        }
    }
}

#[test]
fn the_largest_payload_is_pushed_and_a_larger_one_refused() {
    let world = World::new();
    let queue = world.queue();
    let most = vec![0xab; 16 << 20];
    let id = queue.push("t", most.clone()).unwrap();
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert!(lease.id() == id && lease.payload() == most);
    lease.complete().unwrap();

    let error = queue.push("t", vec![0; (16 << 20) + 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("16777216"), "{error}");
    let error = queue.push_many("t", [vec![], vec![0; (16 << 20) + 1]]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(queue.try_pop("t").unwrap().is_none(), "all or none");
}

#[test]
fn larger_payloads_are_pushed_by_a_queue_that_allows_them() {
    let world = World::new();
    let large = world.open(world.builder().max_payload(32 << 20));
    let payload = vec![0x5a; 20 << 20];
    let id = large.push("t", payload.clone()).unwrap();
    // Another queue, without that setting, can work it.
    let lease = pop(&world.queue(), "t");
    assert!(lease.id() == id && lease.payload() == payload);
    lease.complete().unwrap();
    let error = large.push("t", vec![0; (32 << 20) + 1]).unwrap_err();
    assert!(error.to_string().contains("33554432"), "{error}");
}

#[test]
fn headers_are_any_text() {
    let world = World::new();
    let queue = world.queue();
    let odd = [
        ("", "empty name"),
        ("empty value", ""),
        ("quo\"te", "\"'`\\"),
        ("back\\slash", "\\u0041 \\n"),
        ("control", "\u{1}\u{1f}\u{7f}\n\r\t\u{8}\u{c}"),
        ("unicode", "é🦀\u{2028}\u{feff}\u{10ffff}"),
        ("ключ", "{\"a\": [1]}"),
        ("spaces ", " in front"),
    ];
    let message = || odd.iter().fold(NewMessage::new("m"), |m, (k, v)| m.header(*k, *v));
    queue.push("t", message()).unwrap();
    queue.push_many("t", [message(), NewMessage::new("none")]).unwrap();
    let id = queue.push("t", message()).unwrap();
    let check = |m: &pushpop_pg::Message| {
        for (name, value) in odd {
            assert_eq!(m.header(name), Some(value), "{name}");
        }
        assert_eq!(m.headers().len(), odd.len());
    };
    check(&queue.find("t", id).unwrap().unwrap());
    let leases = pop_many(&queue, "t", 10);
    for i in [0, 1, 3] {
        check(&leases[i]);
    }
    assert_eq!(leases[2].headers().len(), 0);
    assert_eq!(leases[2].header("unicode"), None);
}

#[test]
fn a_delay_holds_a_message_back() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", NewMessage::new("later").delay(Duration::from_millis(1500))).unwrap();
    queue.push("t", "now").unwrap();
    assert_eq!(drain(&queue, "t"), ["now"]);
    let message = queue.find("t", id).unwrap().unwrap();
    let State::Delayed { until } = message.state() else { panic!("{:?}", message.state()) };
    assert_eq!(until, message.ready_at());
    assert_eq!(until - message.pushed_at(), Duration::from_millis(1500));
    let lease = pop(&queue, "t");
    assert!(lease.id() == id && lease.deadline() >= until);
}

#[test]
fn a_time_places_a_message_in_the_order() {
    let world = World::new();
    let queue = world.queue();
    let now = OffsetDateTime::now_utc();
    queue.push("t", "now").unwrap();
    queue.push("t", NewMessage::new("past").ready_at(now - Duration::from_secs(3600))).unwrap();
    queue.push("t", NewMessage::new("future").ready_at(now + Duration::from_secs(3600))).unwrap();
    queue
        .push_many(
            "t",
            [
                NewMessage::new("long past").ready_at(now - Duration::from_secs(7200)),
                NewMessage::new("batch"),
                NewMessage::new("middle").ready_at(now - Duration::from_secs(1800)),
            ],
        )
        .unwrap();
    assert_eq!(drain(&queue, "t"), ["long past", "past", "middle", "now", "batch"]);
}

#[test]
fn the_number_of_attempts_is_the_messages_else_the_queues() {
    let world = World::new();
    let queue = world.open(world.builder().max_attempts(7));
    let most = |q: &Queue, m: NewMessage| {
        let single = q.push("t", m.clone()).unwrap();
        let batch = q.push_many("t", [m.with_id(Uuid::now_v7()), NewMessage::new("x")]).unwrap();
        let found = |id| q.find("t", id).unwrap().unwrap().max_attempts();
        assert_eq!(found(single), found(batch[0]));
        found(single)
    };
    assert_eq!(most(&queue, NewMessage::new("m")), Some(7));
    assert_eq!(most(&queue, NewMessage::new("m").max_attempts(3)), Some(3));
    assert_eq!(most(&queue, NewMessage::new("m").max_attempts(32_767)), Some(32_767));
    assert_eq!(most(&queue, NewMessage::new("m").max_attempts(None)), None);
    assert_eq!(most(&world.queue(), NewMessage::new("m")), Some(25));
    assert_eq!(most(&world.open(world.builder().max_attempts(None)), NewMessage::new("m")), None);
}

#[test]
fn ids_are_drawn_in_the_order_of_time() {
    let world = World::new();
    let queue = world.queue();
    let ids: Vec<Uuid> = (0..5).map(|_| queue.push("t", "m").unwrap()).collect();
    assert!(ids.iter().all(|id| id.get_version_num() == 7));
    let by_server: Uuid = world
        .client()
        .query_one(&world.sql("select pushed from pushpop.push('t', 'x')"), &[])
        .unwrap()
        .get(0);
    assert_eq!(by_server.get_version_num(), 7);
}

// Pushed once.

/// Pushes the id again, in all forms, and checks that nothing changes.
#[track_caller]
fn repeat(queue: &Queue, id: Uuid) {
    let before = queue.find("t", id).unwrap().unwrap();
    let again = || NewMessage::new("another payload").with_id(id).header("k", "v");
    assert_eq!(queue.push("t", again()).unwrap(), id);
    assert!(!queue.push_once("t", again()).unwrap());
    assert_eq!(queue.push_many("t", [again(), NewMessage::new("neighbour")]).unwrap()[0], id);
    queue.transaction(|tx| queue.push_in(tx, "t", again())).unwrap();
    let after = queue.find("t", id).unwrap().unwrap();
    assert_eq!(before, after);
    assert_eq!(after.payload(), b"first");
}

#[test]
fn an_id_that_is_stored_is_not_pushed_again() {
    let world = World::new();
    let queue = world.queue();
    let first = || NewMessage::new("first").with_id(Uuid::new_v4());

    let message = first();
    assert!(queue.push_once("t", message.clone()).unwrap());
    repeat(&queue, message.id()); // ready
    let lease = pop(&queue, "t");
    assert_eq!(lease.id(), message.id());
    repeat(&queue, message.id()); // leased
    lease.complete().unwrap();
    repeat(&queue, message.id()); // completed

    let delayed = first().delay(Duration::from_secs(3600));
    queue.push("t", delayed.clone()).unwrap();
    repeat(&queue, delayed.id());

    let discarded = first();
    queue.push("d", discarded.clone()).unwrap();
    pop(&queue, "d").discard().unwrap();
    assert!(!queue.push_once("d", discarded).unwrap());

    let dead = first().max_attempts(1);
    queue.push("z", dead.clone()).unwrap();
    pop(&queue, "z").fail("broken").unwrap();
    assert!(matches!(queue.find("z", dead.id()).unwrap().unwrap().state(), State::Dead { .. }));
    assert!(!queue.push_once("z", dead).unwrap());
    assert!(queue.try_pop("z").unwrap().is_none());
}

#[test]
fn an_id_is_unique_within_its_topic_only() {
    let world = World::new();
    let queue = world.queue();
    let message = NewMessage::new("m");
    assert!(queue.push_once("a", message.clone()).unwrap());
    assert!(queue.push_once("b", message).unwrap());
}

#[test]
fn a_deleted_id_can_be_pushed_again() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::ZERO));
    let message = NewMessage::new("m");
    queue.push("t", message.clone()).unwrap();
    pop(&queue, "t").complete().unwrap();
    assert!(queue.find("t", message.id()).unwrap().is_none());
    assert!(queue.push_once("t", message).unwrap());
}

#[test]
fn the_first_of_an_id_within_a_batch_wins() {
    let world = World::new();
    let queue = world.queue();
    let id = Uuid::new_v4();
    let ids = queue
        .push_many(
            "t",
            [
                NewMessage::new("a"),
                NewMessage::new("first").with_id(id),
                NewMessage::new("b"),
                NewMessage::new("second").with_id(id),
                NewMessage::new("c"),
            ],
        )
        .unwrap();
    assert_eq!((ids.len(), ids[1], ids[3]), (5, id, id));
    assert_eq!(drain(&queue, "t"), ["a", "first", "b", "c"]);
}

#[test]
fn a_batch_that_is_partly_stored_stores_the_rest_in_order() {
    let world = World::new();
    let queue = world.queue();
    let messages: Vec<NewMessage> = (0..100).map(|i| NewMessage::new(format!("{i:03}"))).collect();
    queue.push_many("t", messages.iter().step_by(3).cloned()).unwrap();
    assert_eq!(drain(&queue, "t").len(), 34);
    queue.push_many("t", messages).unwrap();
    let rest: Vec<String> = (0..100).filter(|i| i % 3 != 0).map(|i| format!("{i:03}")).collect();
    assert_eq!(drain(&queue, "t"), rest);
}

// Batches.

#[test]
fn batches_keep_their_order() {
    let world = World::new();
    let queue = world.queue();
    for n in [1, 24, 25, 26, 250, 1000, 10_000] {
        let payloads: Vec<String> = (0..n).map(|i| format!("{i:05}")).collect();
        let ids = queue.push_many("t", payloads.clone()).unwrap();
        assert_eq!(ids.len(), n);
        assert_eq!(drain(&queue, "t"), payloads, "{n}");
    }
}

#[test]
fn ids_of_the_callers_do_not_change_the_order_of_a_batch() {
    let world = World::new();
    let queue = world.queue();
    let payloads: Vec<String> = (0..300).map(|i| format!("{i:03}")).collect();
    queue
        .push_many("t", payloads.iter().map(|p| NewMessage::new(p.as_str()).with_id(Uuid::new_v4())))
        .unwrap();
    assert_eq!(drain(&queue, "t"), payloads);
}

#[test]
fn an_empty_batch_is_fine() {
    let world = World::new();
    let queue = world.queue();
    assert!(queue.push_many("t", Vec::<NewMessage>::new()).unwrap().is_empty());
    assert!(queue.complete_many(Vec::new()).unwrap().is_empty());
    assert!(queue.topics().unwrap().is_empty());
}

#[test]
fn a_batch_with_one_bad_message_stores_none() {
    let world = World::new();
    let queue = world.queue();
    let error =
        queue.push_many("t", [NewMessage::new("good"), NewMessage::new("bad").max_attempts(0)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(queue.try_pop("t").unwrap().is_none());
}

// Neighbours.

/// `on conflict do nothing` waits for an uncommitted duplicate: one such transaction would have held
/// every push of its topic in the process.
#[test]
fn an_uncommitted_twin_delays_only_its_own_push() {
    let world = World::new();
    let queue = world.open(world.builder().operation_timeout(Duration::from_secs(8)).pool_size(2));
    let (first, twin) = (NewMessage::new("first"), NewMessage::new("twin"));
    let (mut one, mut two, mut admin) = (world.client(), world.client(), world.client());
    let mut holds_first = one.transaction().unwrap();
    queue.push_in(&mut holds_first, "t", first.clone()).unwrap();
    let mut holds_twin = two.transaction().unwrap();
    queue.push_in(&mut holds_twin, "t", twin.clone()).unwrap();

    thread::scope(|scope| {
        // The first flight waits for a lock, so that the others gather in one behind it.
        let ahead = scope.spawn(|| queue.push("t", first.clone()));
        until_locked(&world, &mut admin);
        let started = Instant::now();
        let alike = scope.spawn(|| queue.push("t", twin.clone()));
        let neighbours: Vec<_> = (0..20)
            .map(|i| {
                scope.spawn({
                    let queue = &queue;
                    move || queue.push("t", format!("n{i}"))
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(100));
        holds_first.rollback().unwrap();
        for neighbour in neighbours {
            neighbour.join().unwrap().unwrap();
        }
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        ahead.join().unwrap().unwrap();
        let failed = alike.join().unwrap().unwrap_err();
        assert!(failed.is_retryable(), "{failed:?}");
    });
    holds_twin.commit().unwrap();
    assert!(!queue.push_once("t", twin).unwrap(), "the transaction's own came first");
    assert_eq!(drain(&queue, "t").len(), 22);
}

#[test]
fn a_message_is_seen_once_its_push_has_returned_by_everybody() {
    let world = World::new();
    let (queue, other) = (world.queue(), world.queue());
    for i in 0..50 {
        let id = queue.push("t", format!("{i}")).unwrap();
        assert!(other.find("t", id).unwrap().is_some());
        assert_eq!(text(other.try_pop("t").unwrap().unwrap().payload()), format!("{i}"));
    }
}
