//! Rows that somebody has edited or restored by hand hold up nobody: what cannot be delivered is set aside as dead, and
//! everything can still be looked at.

use std::time::Duration;

use pushpop_pg::{ErrorKind, NewMessage, Queue, State, TopicSettings};

use crate::world::{World, drain, pop, text};

/// A message in each state that its row can be damaged in, by the update that damages it.
const DAMAGE: [(&str, &str); 11] = [
    ("headers that are a list", "headers = '[1]'"),
    ("headers that are text", "headers = '\"text\"'"),
    ("a header that is a number", "headers = '{\"a\": 1}'"),
    ("a header that is null", "headers = '{\"a\": null}'"),
    ("failures that are an object", "failures = '{\"attempt\": 1}'"),
    ("the last attempt that can be counted", "attempt = 2147483647, max_attempts = null"),
    ("a negative attempt", "attempt = -1"),
    ("the last fence that can be counted", "fence = 2147483647"),
    ("a push for ever ago", "pushed_at = '-infinity'"),
    ("a time that never comes", "ready_at = 'infinity'"),
    ("a state that there is not", "state = 'q'"),
];

fn damage(world: &World, change: &str) {
    let changed = world
        .client()
        .execute(&world.sql(&format!("update pushpop.messages set {change} where payload = 'bad'")), &[]);
    assert_eq!(changed.unwrap(), 1);
}

/// Everything that looks at messages and topics works.
fn look(world: &World, queue: &Queue) {
    let topic = queue.topic("t");
    topic.peek(100).unwrap();
    topic.dead(100).unwrap();
    topic.stats().unwrap();
    queue.topics().unwrap();
    let mut client = world.client();
    for row in client.query(&world.sql("select id from pushpop.messages"), &[]).unwrap() {
        queue.find("t", row.get(0)).unwrap().unwrap();
    }
    for view in ["overview", "in_flight", "dead_messages"] {
        client.query(&world.sql(&format!("select * from pushpop.{view}")), &[]).unwrap();
    }
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["bad", "good"]).unwrap();
    damage(&world, "headers = '[]'");
    assert_eq!(drain(&queue, "t"), ["good"]);
}

/// One by one, among others, and alone.
#[test]
fn a_message_that_cannot_be_delivered_is_set_aside() {
    for (what, change) in DAMAGE {
        for max in [1, 10] {
            let world = World::new();
            let queue = world.queue();
            queue.push_many("t", ["a", "bad", "b"]).unwrap();
            damage(&world, change);
            look(&world, &queue);
            let mut popped = Vec::new();
            loop {
                let leases = queue.pop_many("t", max, Duration::ZERO).unwrap();
                if leases.is_empty() {
                    break;
                }
                popped.extend(leases.iter().map(|lease| text(lease.payload())));
                assert!(queue.complete_many(leases).unwrap().is_empty());
            }
            assert_eq!(popped, ["a", "b"], "{what}");
            look(&world, &queue);
            let dead = queue.topic("t").dead(10).unwrap();
            if what.starts_with("a state") {
                // It is in no state that anybody would know what to do with.
                assert!(dead.is_empty());
                continue;
            }
            assert_eq!(dead.len(), 1, "{what}");
            assert!(matches!(dead[0].state(), State::Dead { .. }) && dead[0].payload() == b"bad", "{what}");
            assert!(dead[0].last_error().unwrap().contains("damaged"), "{what}: {:?}", dead[0].last_error());

            // Redriven it is dead again, and again nobody is held up.
            queue.push("t", "c").unwrap();
            queue.topic("t").redrive(&[dead[0].id()]).unwrap();
            let again = drain(&queue, "t");
            assert!(again == ["c"] || again == ["c", "bad"], "{what}: {again:?}");
        }
    }
}

/// Edited while somebody holds it: the lease ends, and the message is returned or set aside.
#[test]
fn a_message_that_is_damaged_while_it_is_leased_holds_up_nobody() {
    for (what, change) in DAMAGE {
        let world = World::new();
        let queue = world.open(world.builder().lease(Duration::from_secs(1)));
        queue.push("t", "bad").unwrap();
        let lease = pop(&queue, "t");
        damage(&world, change);
        look(&world, &queue);
        // Whether it can still be settled depends on the damage: in no case is that an error of the server's own.
        if let Err(e) = lease.complete() {
            assert!(matches!(e.error().kind(), ErrorKind::LeaseLost | ErrorKind::NotFound), "{what}: {e}");
        }
        std::thread::sleep(Duration::from_millis(1100));
        queue.push("t", "good").unwrap();
        assert_eq!(pop(&queue, "t").payload(), b"good", "{what}");
        look(&world, &queue);
    }
}

/// Failures that nobody can read are shown as none, and the next one is written all the same.
#[test]
fn failures_that_cannot_be_read_are_none() {
    for failures in
        ["[1, 2]", "[{\"attempt\": 1, \"at\": \"yesterday or so\", \"error\": \"x\"}]", "[null]", "[]"]
    {
        let world = World::new();
        let queue = world.open(world.builder().max_attempts(None));
        queue.push("t", "bad").unwrap();
        damage(&world, &format!("failures = '{failures}'"));
        let lease = pop(&queue, "t");
        assert_eq!(lease.failures().len(), 0, "{failures}");
        lease.fail("why").unwrap();
        look(&world, &queue);
        let stored = world.sql("select failures -> -1 ->> 'error' from pushpop.messages");
        assert_eq!(world.client().query_one(&stored, &[]).unwrap().get::<_, String>(0), "why");
    }
}

/// A row of the order whose message is gone, and times that no calendar has.
#[test]
fn what_is_left_in_the_order_without_a_message_is_skipped() {
    let world = World::new();
    let queue = world.queue();
    for payload in ["bad", "good"] {
        queue.push("t", payload).unwrap();
    }
    world.client().batch_execute(&world.sql("delete from pushpop.messages where payload = 'bad'")).unwrap();
    assert_eq!(queue.try_pop("t").unwrap().unwrap().payload(), b"good");

    queue.push("t", NewMessage::new("bad").delay(Duration::from_secs(3600))).unwrap();
    world
        .client()
        .batch_execute(&world.sql("update pushpop.runs set ready_at = 'infinity', pushed_at = 'infinity'"))
        .unwrap();
    assert!(
        queue.pop_timeout("t", Duration::from_millis(1500)).unwrap().is_none(),
        "waiting for it fails nobody"
    );
    look(&world, &queue);
    world.client().batch_execute(&world.sql("update pushpop.runs set ready_at = '-infinity'")).unwrap();
    look(&world, &queue);
    queue.push("t", "last").unwrap();
    assert_eq!(drain(&queue, "t"), ["last"]);
}

/// Settings outside their limits would fail every pop of their topic.
#[test]
fn the_table_of_topics_refuses_settings_outside_their_limits() {
    let world = World::new();
    let queue = world.queue();
    queue.topic("t").set(&TopicSettings::default().with_lease(Duration::from_secs(9))).unwrap();
    for change in [
        "lease = '-1 s'",
        "lease = '1 year'",
        "max_attempts = -1",
        "backoff_first = 'nan'",
        "backoff_first = -1",
        "backoff_most = 'infinity'",
        "backoff_first = 9, backoff_most = 8",
        "low = 'infinity'",
    ] {
        let edited = world.client().batch_execute(&world.sql(&format!("update pushpop.topics set {change}")));
        assert_eq!(edited.unwrap_err().code().map(|code| code.code()), Some("23514"), "{change}");
    }
}
