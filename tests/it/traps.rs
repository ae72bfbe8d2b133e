//! Traps between threads and PostgreSQL that belong to no one capability.

use std::thread;
use std::time::Duration;

use postgres::NoTls;
use pushpop_pg::{ErrorKind, NewMessage, State};

use crate::world::{World, pop, until, until_listening};

/// As during an upgrade: a statement that a connection has prepared "must not change result type" (0A000).
#[test]
fn a_function_that_was_made_anew_is_prepared_anew() {
    let world = World::new();
    // One connection, which has prepared it.
    let queue = world.open(world.builder().pool_size(1));
    let mut client = world.client();
    queue.push_many("t", ["1", "2"]).unwrap();
    pop(&queue, "t").complete().unwrap();
    let definition = "select pg_get_functiondef($1::text::regproc)";
    let old: String = client.query_one(definition, &[&world.sql("pushpop.settle_many")]).unwrap().get(0);
    let new = old.replace("result text", "result character varying");
    assert_ne!(old, new);
    let mut tx = client.transaction().unwrap();
    tx.batch_execute(&world.sql("drop function pushpop.settle_many")).unwrap();
    tx.batch_execute(&new).unwrap();
    tx.commit().unwrap();
    let lease = pop(&queue, "t");
    let id = lease.id();
    lease.complete().unwrap();
    assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Completed { .. }));
}

/// The server ends a session whose client is gone, also while that has rows locked.
#[test]
fn sessions_notice_that_their_client_has_vanished() {
    let world = World::new();
    let queue = world.queue();
    let settings = queue.transaction(|tx| {
        let sql = "select name, setting from pg_settings
                   where name like 'tcp_keepalives%' or name = 'client_connection_check_interval' order by 1";
        let rows = tx.query(sql, &[])?;
        Ok(rows
            .iter()
            .map(|row| format!("{} {}", row.get::<_, &str>(0), row.get::<_, &str>(1)))
            .collect::<Vec<_>>())
    });
    let mut settings = settings.unwrap();
    settings.retain(|setting| setting != "client_connection_check_interval 10000");
    assert_eq!(settings, ["tcp_keepalives_count 3", "tcp_keepalives_idle 30", "tcp_keepalives_interval 10"]);
}

/// Both wait for the first message, whose row a third transaction has, though one was given the second first.
#[test]
fn batches_in_different_orders_do_not_deadlock() {
    let world = World::new();
    let queue = world.queue();
    let (mut client, mut other) = (world.client(), world.client());
    for verbs in [["complete", "complete"], ["fail", "fail"], ["complete", "fail"]] {
        queue.push_many(verbs[1], (0..2).map(|i| NewMessage::new(format!("{i}")))).unwrap();
        let pop = world.sql("select array_agg(id), array_agg(token) from pushpop.pop($1, 2)");
        let row = client.query_one(&pop, &[&verbs[1]]).unwrap();
        let (ids, tokens): (Vec<pushpop_pg::uuid::Uuid>, Vec<Vec<u8>>) = (row.get(0), row.get(1));
        let mut first = client.transaction().unwrap();
        first.query(&world.sql("select from pushpop.messages where id = $1 for update"), &[&ids[0]]).unwrap();
        thread::scope(|scope| {
            let settle = |order: [usize; 2]| {
                let (world, ids, tokens) = (&world, &ids, &tokens);
                scope.spawn(move || {
                    let sql = world.sql(
                        "select result from pushpop.settle_many($1, $2, $3, array_fill($4::text, array[2]), null, null, 60)",
                    );
                    let ids = order.map(|i| ids[i]);
                    let tokens = order.map(|i| tokens[i].as_slice());
                    let verb = verbs[order[0]];
                    let mut client = world.config().application_name(&world.schema).connect(NoTls)?;
                    let results = client.query(&sql, &[&verbs[1], &&ids[..], &&tokens[..], &verb])?;
                    Ok::<usize, postgres::Error>(results.iter().filter(|row| row.get::<_, &str>(0) == "lost").count())
                })
            };
            let both = [settle([0, 1]), settle([1, 0])];
            let waits = "select count(*) from pg_stat_activity where application_name = $1 and wait_event_type = 'Lock'";
            until("both wait", || other.query_one(waits, &[&world.schema]).unwrap().get::<_, i64>(0) == 2);
            first.commit().unwrap();
            let both = both.map(|one| one.join().unwrap().unwrap());
            // The same verb twice is a repetition; of two, one came first.
            let lost = if verbs[0] == verbs[1] { 0 } else { 2 };
            assert_eq!(both[0] + both[1], lost, "{verbs:?}");
        });
    }
}

/// A listener that reads nothing would hold up the notifications of the whole server.
#[test]
fn notifications_that_nobody_waits_for_are_read() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    assert!(queue.pop_timeout("t", Duration::from_millis(300)).unwrap().is_none());
    until_listening(&world, &mut client);
    let flood = "select pg_notify($1, i || repeat('x', 4000)) from generate_series(1, 5000) i";
    client.execute(flood, &[&world.schema]).unwrap();
    until("all of them are read", || {
        client.batch_execute(&world.sql("select pushpop.push('other', 'm')")).unwrap();
        client.query_one("select pg_notification_queue_usage()", &[]).unwrap().get::<_, f64>(0) < 0.0001
    });
    queue.push("t", "m").unwrap();
    pop(&queue, "t").complete().unwrap();
}

/// The driver would panic there: its calls block.
#[test]
fn calls_from_an_async_runtime_work_or_are_refused() {
    let world = World::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let queue = world.queue();
        queue.push("t", "m").unwrap();
        pop(&queue, "t").complete().unwrap();
        assert!(queue.pop_timeout("t", Duration::from_millis(300)).unwrap().is_none());
        let refused = queue.transaction(|_| Ok(())).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        queue.close();
    });
}
