//! Leases that are extended for consumers at work, by SQL.

use std::thread;
use std::time::Duration;

use postgres::Client;
use pushpop_pg::uuid::Uuid;

use crate::world::{World, until};

/// A message in the hands of somebody: its id and token.
type Held = (Uuid, Vec<u8>);

fn push_and_pop(world: &World, client: &mut Client, topic: &str, lease: f64) -> Held {
    client.execute(&world.sql("select pushpop.push($1, 'm')"), &[&topic]).unwrap();
    let sql = world.sql("select id, token from pushpop.pop($1, 1, $2)");
    let row = client.query_one(&sql, &[&topic, &lease]).unwrap();
    (row.get(0), row.get(1))
}

fn beat(world: &World, client: &mut Client, held: &[(&str, &Held)], lease: f64) -> Vec<String> {
    let topics: Vec<&str> = held.iter().map(|(topic, _)| *topic).collect();
    let ids: Vec<Uuid> = held.iter().map(|(_, held)| held.0).collect();
    let tokens: Vec<&[u8]> = held.iter().map(|(_, held)| &*held.1).collect();
    let sql = world.sql("select place, result from pushpop.heartbeat($1, $2, $3, $4) order by place");
    let rows = client.query(&sql, &[&topics, &ids, &tokens, &vec![lease; held.len()]]).unwrap();
    assert!(rows.iter().map(|row| row.get::<_, i32>(0)).eq(1..=held.len() as i32));
    rows.iter().map(|row| row.get(1)).collect()
}

/// Whether somebody else gets a message of the topic.
fn is_free(world: &World, client: &mut Client, topic: &str) -> bool {
    client.query_opt(&world.sql("select id from pushpop.pop($1)"), &[&topic]).unwrap().is_some()
}

#[test]
fn one_statement_for_many_topics_tells_each_apart() {
    let world = World::new();
    world.queue();
    let (mut client, mut other) = (world.client(), world.client());
    let [kept, busy, settled, expired] =
        ["kept", "busy", "settled", "expired"].map(|topic| push_and_pop(&world, &mut client, topic, 1.0));
    let unknown = (Uuid::now_v7(), vec![7; 26]);
    let complete = world.sql("select pushpop.complete($1, $2, $3)");
    client.execute(&complete, &[&"settled", &settled.0, &settled.1]).unwrap();
    let mut tx = other.transaction().unwrap();
    tx.execute(&complete, &[&"busy", &busy.0, &busy.1]).unwrap();
    let all =
        [("kept", &kept), ("unknown", &unknown), ("busy", &busy), ("settled", &settled), ("kept", &busy)];
    assert_eq!(beat(&world, &mut client, &all, 3600.0), ["extended", "lost", "busy", "lost", "lost"]);
    until("a lease expires", || is_free(&world, &mut client, "expired"));
    assert_eq!(beat(&world, &mut client, &[("expired", &expired)], 3600.0), ["lost"]);
    assert!(!is_free(&world, &mut client, "kept"));
    assert!(!is_free(&world, &mut client, "busy"), "its transaction has the row");
    tx.rollback().unwrap();
    until("the transaction is over", || is_free(&world, &mut client, "busy"));
}

/// The lease has ended, and is extended and reclaimed at the same time: only one of the two can be.
#[test]
fn an_extension_and_the_next_delivery_exclude_each_other() {
    let world = World::new();
    world.queue();
    let (mut client, mut holder) = (world.client(), world.client());
    let extend = world.sql("select pushpop.extend($1, $2, $3, 3600)");
    for by_heartbeat in [false, true] {
        let topic = if by_heartbeat { "beat" } else { "extend" };
        let held = push_and_pop(&world, &mut client, topic, 1.0);
        thread::sleep(Duration::from_millis(1200));
        let mut tx = holder.transaction().unwrap();
        if by_heartbeat {
            let sql = world
                .sql("select result from pushpop.heartbeat(array[$1::text], array[$2::uuid], array[$3::bytea], array[3600])");
            let result: String = tx.query_one(&sql, &[&topic, &held.0, &held.1]).unwrap().get(0);
            assert_eq!(result, "extended");
        } else {
            tx.execute(&extend, &[&topic, &held.0, &held.1]).unwrap();
        }
        assert!(!is_free(&world, &mut client, topic), "handed on while it is extended");
        tx.commit().unwrap();
        // What the look before has put off.
        thread::sleep(Duration::from_millis(1200));
        assert!(!is_free(&world, &mut client, topic), "handed on after it was extended");
    }
}

#[test]
fn bad_input_is_refused() {
    let world = World::new();
    world.queue();
    let mut client = world.client();
    for (arguments, words) in [
        ("null, null, null, null", "a batch has 1 to 10000 elements, not 0"),
        (
            "array['a', 'b'], array[gen_random_uuid()], array['t'::bytea], array[1]",
            "the arrays of a batch have the same length",
        ),
        (
            "array[''], array[gen_random_uuid()], array['t'::bytea], array[1]",
            "a topic has 1 to 255 bytes, not 0",
        ),
        (
            "array['a'], array[gen_random_uuid()], array['t'::bytea], array[0]",
            "a lease has 1 to 86400 seconds, not 0",
        ),
    ] {
        let sql = world.sql(&format!("select pushpop.heartbeat({arguments})"));
        let error = client.execute(&sql, &[]).unwrap_err();
        assert_eq!(error.as_db_error().unwrap().message(), words);
    }
}
