//! The views for operators.

use std::time::Duration;

use postgres::{Client, NoTls};
use pushpop_pg::{NewMessage, uuid::Uuid};

use crate::world::{World, guarded_role, guarded_url, pop, pop_many, quoted};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let sql = world.sql("select topic from pushpop.overview");
    assert!(client.query(&sql, &[]).unwrap().is_empty());
    queue.push("t", "m").unwrap();
    assert_eq!(client.query_one(&sql, &[]).unwrap().get::<_, &str>(0), "t");
}

#[test]
fn the_overview_has_a_row_for_each_topic() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("b", ["m", "m", "m", "m"]).unwrap();
    queue.push("b", NewMessage::new("m").delay(SECOND * 60)).unwrap();
    let mut leases = pop_many(&queue, "b", 2);
    leases.remove(0).complete().unwrap();
    queue.push("a", NewMessage::new("m").max_attempts(1)).unwrap();
    pop(&queue, "a").fail("why").unwrap();
    queue.topic("c").pause().unwrap();
    let sql = world.sql(
        "select format('%s %s %s %s %s %s %s', topic, ready, delayed, leased, dead, settled, paused), oldest_ready_age::text
         from pushpop.overview",
    );
    let rows = world.client().query(&sql, &[]).unwrap();
    let lines: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(lines, ["a 0 0 0 1 0 f", "b 2 1 1 0 1 f", "c 0 0 0 0 0 t"]);
    let age: Option<String> = rows[1].get(1);
    assert!(age.as_ref().is_some_and(|age| !age.contains('.')), "to the second: {age:?}");
    assert_eq!(rows[0].get::<_, Option<String>>(1), None);
}

#[test]
fn in_flight_are_the_leases_that_have_not_ended() {
    let world = World::new();
    let queue = world.queue();
    let ids = queue.push_many("t", ["extended", "settled", "plain", "waits"]).unwrap();
    let mut leases = pop_many(&queue.with_lease(SECOND * 100), "t", 3);
    leases[0].extend(SECOND * 1000).unwrap();
    leases.remove(1).complete().unwrap();
    queue.push("short", "m").unwrap();
    let ended = pop(&queue.with_lease(SECOND), "short");
    let mut client = world.client();
    let sql = world.sql(
        "select topic, id, lease_until, extract(epoch from time_left)::float8, attempt from pushpop.in_flight",
    );
    crate::world::until("the short one has ended", || client.query(&sql, &[]).unwrap().len() == 2);
    let rows = client.query(&sql, &[]).unwrap();
    let seen: Vec<(&str, Uuid, i32)> = rows.iter().map(|r| (r.get(0), r.get(1), r.get(4))).collect();
    assert_eq!(seen, [("t", ids[2], 1), ("t", ids[0], 1)], "soonest first");
    for (row, lease, most) in [(&rows[0], &leases[1], 100.0), (&rows[1], &leases[0], 1000.0)] {
        assert_eq!(row.get::<_, pushpop_pg::time::OffsetDateTime>(2), lease.deadline());
        let left: f64 = row.get(3);
        assert!(left <= most && left > most - 60.0, "{left}");
    }
    drop(ended);
}

#[test]
fn dead_messages_are_shown_newest_first_with_the_beginning_of_their_error() {
    let world = World::new();
    let queue = world.queue();
    for topic in ["b", "a", "c"] {
        queue.push(topic, NewMessage::new("m").max_attempts(1)).unwrap();
        pop(&queue, topic).fail(topic.repeat(300)).unwrap();
    }
    let rows = world
        .client()
        .query(&world.sql("select topic, error, attempt from pushpop.dead_messages"), &[])
        .unwrap();
    let seen: Vec<(&str, &str, i32)> = rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect();
    let (a, b, c) = ("a".repeat(200), "b".repeat(200), "c".repeat(200));
    assert_eq!(seen, [("c", c.as_str(), 1), ("a", a.as_str(), 1), ("b", b.as_str(), 1)]);
}

#[test]
fn a_role_sees_them_by_the_rights_that_the_documentation_names() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    let queue = world.queue();
    queue.push("t", NewMessage::new("m").max_attempts(1)).unwrap();
    pop(&queue, "t").fail("why").unwrap();
    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    let mut admin = Client::connect(&world.url, NoTls).unwrap();
    let (role, url) = guarded_role(&mut admin);
    let mut client = Client::connect(&url, NoTls).unwrap();
    let views = ["overview", "in_flight", "dead_messages"];
    let denied = |client: &mut Client, view: &str| match client
        .query(&world.sql(&format!("select topic from pushpop.{view}")), &[])
    {
        Ok(rows) => {
            assert_eq!((rows.len(), rows[0].get::<_, &str>(0)), (1, "t"), "{view}");
            false
        }
        Err(e) => {
            assert_eq!(e.code().unwrap().code(), "42501", "{view}: {e}");
            true
        }
    };
    assert!(views.iter().all(|view| denied(&mut client, view)));
    admin.batch_execute(&format!("grant usage on schema {} to {role}", quoted(&world.schema))).unwrap();
    assert!(views.iter().all(|view| denied(&mut client, view)));
    let select = "grant select on pushpop.overview, pushpop.in_flight, pushpop.dead_messages";
    admin.batch_execute(&world.sql(&format!("{select} to {role}"))).unwrap();
    assert_eq!(views.map(|view| denied(&mut client, view)), [true, false, false]);
    let execute = "grant execute on function pushpop.all_stats";
    admin.batch_execute(&world.sql(&format!("{execute} to {role}"))).unwrap();
    assert!(!views.iter().any(|view| denied(&mut client, view)));
    drop(lease);
}
