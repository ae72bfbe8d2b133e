//! What the hot functions read: never more than what they return calls for, whatever the
//! statistics say.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use postgres::{Client, Transaction};
use pushpop_pg::uuid::Uuid;

use crate::look::fill;
use crate::world::{World, pop, pop_many};

/// Rows that a call of this session has read, by table, and how many tables were read from end to end.
#[derive(Debug, Default)]
struct Read {
    rows: i64,
    scans: i64,
    tables: BTreeMap<String, (i64, i64)>,
}

/// Runs something in a session of its own, whose counters are its alone, and says what it read.
fn read<R>(world: &World, work: impl FnOnce(&mut Transaction<'_>) -> R) -> (R, Read) {
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    let result = work(&mut tx);
    let sql =
        "select relname::text, coalesce(seq_scan, 0), coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)
               from pg_stat_xact_user_tables where schemaname = $1";
    let mut read = Read::default();
    for row in tx.query(sql, &[&world.schema]).unwrap() {
        let (table, scans, rows): (String, i64, i64) = (row.get(0), row.get(1), row.get(2));
        read.rows += rows;
        read.scans += scans;
        if scans + rows > 0 {
            read.tables.insert(table, (scans, rows));
        }
    }
    tx.commit().unwrap();
    (result, read)
}

fn pop_and_settle(world: &World, tx: &mut Transaction<'_>, n: i32) {
    pops_and_settle(world, tx, &[n]);
}

/// Several pops, of so many messages each, and one settle of all of them.
fn pops_and_settle(world: &World, tx: &mut Transaction<'_>, pops: &[i32]) {
    let sql = world.sql("select id, token from pushpop.pop('t', $1)");
    let rows: Vec<_> = pops.iter().flat_map(|n| tx.query(&sql, &[n]).unwrap()).collect();
    assert_eq!(rows.len(), usize::try_from(pops.iter().sum::<i32>()).unwrap());
    let ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    let tokens: Vec<Vec<u8>> = rows.iter().map(|row| row.get(1)).collect();
    let words = vec!["complete"; rows.len()];
    let settle = world.sql("select place from pushpop.settle_many('t', $1, $2, $3, tidy => true)");
    assert!(tx.query(&settle, &[&ids, &tokens, &words]).unwrap().is_empty());
}

#[track_caller]
fn assert_few(what: &str, read: &Read, most: i64) {
    assert_eq!(read.scans, 0, "{what} reads a table from end to end: {read:?}");
    assert!(read.rows > 0, "{what}: nothing was measured");
    assert!(read.rows <= most, "{what} reads {} rows, more than {most}: {read:?}", read.rows);
}

/// Everything that is called all the time, with a topic whose front is ready.
#[track_caller]
fn assert_all_few(world: &World) {
    for n in [1, 1, 100, 1] {
        let (_, r) = read(world, |tx| pop_and_settle(world, tx, n));
        assert_few(&format!("pop and settle of {n}"), &r, 40 + 12 * i64::from(n));
    }
    let id: Uuid = Uuid::new_v4();
    let calls = [
        ("push", "select from pushpop.push('t', 'm'::bytea)"),
        (
            "push of a batch",
            "select from pushpop.push_many('t', array(select gen_random_uuid() from generate_series(1, 10)), array_fill('m'::bytea, '{10}'))",
        ),
        ("wait_for", "select from pushpop.wait_for('t')"),
        ("peek", "select from pushpop.peek('t', 10)"),
        ("upkeep", "select from pushpop.upkeep('t')"),
        (
            "cancel",
            "select from pushpop.cancel('t', (select id from pushpop.peek('t', 100) offset 60 limit 1))",
        ),
        (
            "reschedule",
            "select from pushpop.reschedule('t', (select id from pushpop.peek('t', 100) offset 60 limit 1), 0)",
        ),
        ("dead_letters", "select from pushpop.dead_letters('t', 10)"),
        ("redrive_all", "select from pushpop.redrive_all('t', max => 1)"),
        ("purge_dead", "select from pushpop.purge_dead('t', max => 1)"),
        (
            "settle of one",
            "with p as materialized (select id, token from pushpop.pop('t')) select pushpop.complete('t', p.id, p.token) from p",
        ),
        (
            "extend",
            "with p as materialized (select id, token from pushpop.pop('t')) select pushpop.extend('t', p.id, p.token, 400) from p",
        ),
        (
            "fail",
            "with p as materialized (select id, token from pushpop.pop('t')) select pushpop.fail('t', p.id, p.token, 'why') from p",
        ),
    ];
    for (what, call) in calls {
        let (_, r) = read(world, |tx| tx.batch_execute(&world.sql(call)).unwrap());
        assert_eq!(r.scans, 0, "{what}: {r:?}");
        assert!(r.rows <= 120, "{what}: {r:?}");
    }
    let (_, r) =
        read(world, |tx| tx.execute(&world.sql("select from pushpop.find('t', $1)"), &[&id]).unwrap());
    assert_eq!((r.scans, r.rows <= 20), (0, true), "find: {r:?}");
}

/// Statistics stay as they are.
fn without_autovacuum(world: &World) -> Client {
    drop(world.queue());
    let mut client = world.client();
    for table in ["messages", "runs", "leases", "history", "dead", "topics", "behind", "figures"] {
        client
            .batch_execute(&world.sql(&format!("alter table pushpop.{table} set (autovacuum_enabled = off)")))
            .unwrap();
    }
    client
}

fn analyze(world: &World, client: &mut Client) {
    for table in ["messages", "runs", "leases", "history", "dead", "topics", "behind", "figures"] {
        client.batch_execute(&world.sql(&format!("analyze pushpop.{table}"))).unwrap();
    }
}

#[test]
fn smoke() {
    let world = World::new();
    let _client = without_autovacuum(&world);
    fill(&world, "t", 10_000);
    let (_, r) = read(&world, |tx| pop_and_settle(&world, tx, 1));
    assert_few("pop and settle", &r, 60);
    // The counters do count.
    let (_, r) = read(&world, |tx| {
        tx.batch_execute(&world.sql("select count(payload) from pushpop.messages")).unwrap()
    });
    assert!(r.scans == 1 && r.rows == 10_000, "{r:?}");
}

#[test]
fn plans_made_for_empty_tables_serve_full_ones() {
    let world = World::new();
    let mut client = without_autovacuum(&world);
    analyze(&world, &mut client);
    fill(&world, "t", 100_000);
    fill(&world, "other", 20_000);
    assert_all_few(&world);
}

#[test]
fn plans_made_for_full_tables_serve_empty_ones() {
    let world = World::new();
    let mut client = without_autovacuum(&world);
    fill(&world, "t", 100_000);
    analyze(&world, &mut client);
    let queue = world.queue();
    assert_eq!(queue.topic("t").purge().unwrap(), 100_000);
    queue.push_many("t", vec!["m"; 200]).unwrap();
    assert_all_few(&world);
}

/// A session that has prepared its statements on an empty queue keeps them for ever.
#[test]
fn plans_made_by_a_session_before_the_tables_grew_still_serve() {
    let world = World::new();
    let _client = without_autovacuum(&world);
    let queue = world.queue();
    queue.push_many("t", vec!["m"; 10]).unwrap();
    let mut client = world.client();
    for _ in 0..8 {
        let mut tx = client.transaction().unwrap();
        pop_and_settle(&world, &mut tx, 1);
        tx.commit().unwrap();
    }
    fill(&world, "t", 100_000);
    let mut tx = client.transaction().unwrap();
    let scans = "select sum(seq_scan)::bigint, sum(idx_tup_fetch)::bigint from pg_stat_xact_user_tables where schemaname = $1";
    // Counters of earlier transactions may not have been handed in yet: only the difference counts.
    let figures = |tx: &mut Transaction<'_>| {
        let row = tx.query_one(scans, &[&world.schema]).unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    let before = figures(&mut tx);
    pop_and_settle(&world, &mut tx, 1);
    let after = figures(&mut tx);
    assert_eq!(after.0, before.0, "table scans");
    assert!(after.1 - before.1 <= 60, "{} rows", after.1 - before.1);
}

#[test]
fn a_pop_does_not_step_over_what_is_in_flight() {
    let world = World::new();
    let _client = without_autovacuum(&world);
    fill(&world, "t", 20_000);
    let queue = world.queue();
    let leases: Vec<_> = (0..10).flat_map(|_| pop_many(&queue, "t", 1000)).collect();
    let (_, r) = read(&world, |tx| pop_and_settle(&world, tx, 1));
    assert_few("pop and settle with 10,000 in flight", &r, 60);
    drop(leases);
}

/// Analyzed while it was empty, the table of leases used to be searched from the topic's first lease for
/// each settle, and under an old snapshot ever slower.
#[test]
fn a_settle_reads_one_lease_though_statistics_say_there_are_none() {
    let world = World::new();
    let mut client = without_autovacuum(&world);
    let queue = world.queue();
    queue.push_many("t", (0..500).map(|i| format!("{i}"))).unwrap();
    pop(&queue, "t").complete().unwrap();
    analyze(&world, &mut client);
    let leases: Vec<_> = (0..400).map(|_| pop(&queue, "t")).collect();
    for pops in [&[1][..], &[10], &[1, 1, 1]] {
        let (_, r) = read(&world, |tx| pops_and_settle(&world, tx, pops));
        assert_few("pop and settle beside 400 leases", &r, 100);
    }
    drop(leases);
}

#[test]
fn an_empty_pop_does_not_step_over_what_is_delayed() {
    let world = World::new();
    let mut client = without_autovacuum(&world);
    let sql = world.sql(
        "select from pushpop.push_many('t', array(select gen_random_uuid() from generate_series(1, 10000)),
           array_fill('m'::bytea, '{10000}'), delays => array(select 1000 + i from generate_series(1, 10000) i))",
    );
    for _ in 0..3 {
        client.batch_execute(&sql).unwrap();
    }
    let pop = world.sql("select from pushpop.pop('t')");
    let (rows, r) = read(&world, |tx| tx.query(&pop, &[]).unwrap().len());
    assert_eq!(rows, 0);
    assert!(r.scans == 0 && r.rows <= 60, "{r:?}");
    let (_, r) =
        read(&world, |tx| tx.query(&world.sql("select from pushpop.wait_for('t')"), &[]).unwrap().len());
    assert!(r.scans == 0 && r.rows <= 60, "{r:?}");
}

#[test]
fn a_settle_does_not_step_over_what_is_settled() {
    let world = World::new();
    let _client = without_autovacuum(&world);
    fill(&world, "t", 20_000);
    let queue = world.queue();
    for _ in 0..15 {
        assert!(queue.complete_many(pop_many(&queue, "t", 1000)).unwrap().is_empty());
    }
    let (_, r) = read(&world, |tx| pop_and_settle(&world, tx, 1));
    assert_few("pop and settle with 15,000 settled", &r, 60);
    let (_, r) = read(&world, |tx| pop_and_settle(&world, tx, 100));
    assert_few("pop and settle of 100", &r, 40 + 12 * 100);
    pop(&queue, "t").complete().unwrap();
}

#[test]
fn topics_that_nobody_has_set_cost_the_list_nothing() {
    let world = World::new();
    let mut client = without_autovacuum(&world);
    let known = "insert into pushpop.topics (topic) select 'popped ' || i from generate_series(1, 5000) i";
    client.batch_execute(&world.sql(known)).unwrap();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    queue.topic("paused").pause().unwrap();
    for analyzed in [false, true] {
        if analyzed {
            analyze(&world, &mut client);
        }
        let names = world.sql("select from pushpop.topic_names()");
        let (n, r) = read(&world, |tx| tx.query(&names, &[]).unwrap().len());
        assert_eq!(n, 2);
        assert_few("the list of topics", &r, 20);
    }
}

/// Under an old snapshot the leases of what was completed stay in the index, as far ahead as a lease is long. Each look
/// for the next one that ends used to step over all of them.
#[test]
fn under_an_old_snapshot_a_look_does_not_step_over_the_leases_that_were_settled() {
    let world = World::new();
    let mut client = without_autovacuum(&world);
    fill(&world, "t", 10_000);
    let mut holder = world.client();
    holder.batch_execute("begin isolation level repeatable read; select from pg_class limit 1").unwrap();
    // Each pop and each settle is a transaction, and each lease would have ended before the half minute is over in
    // which nobody has to ask again.
    let lives = world.sql(
        "do $$
         declare m record;
         begin
           for i in 1..1000 loop
             select p.id, p.token into m from pushpop.pop('t', lease => 20) p;
             commit;
             perform pushpop.settle_many('t', array[m.id], array[m.token], '{complete}', tidy => true);
             commit;
           end loop;
         end $$",
    );
    client.batch_execute(&lives).unwrap();
    // The marks move up to what they know to be over, and that was asked the last time.
    for _ in 0..2 {
        client.batch_execute(&world.sql("select from pushpop.upkeep('t')")).unwrap();
    }
    let entries = |client: &mut Client| -> i64 {
        // Counters are handed in once a second, and read half a second late.
        thread::sleep(Duration::from_millis(1_100));
        client.batch_execute("select 1").unwrap();
        thread::sleep(Duration::from_millis(700));
        let sql = "select sum(idx_tup_read)::bigint from pg_stat_user_indexes
                   where schemaname = $1 and relname = 'leases'";
        world.client().query_one(sql, &[&world.schema]).unwrap().get(0)
    };
    let mut read = |calls: &str| {
        let before = entries(&mut client);
        client.batch_execute(&world.sql(calls)).unwrap();
        entries(&mut client) - before
    };
    let few = read("select from pushpop.wait_for('t'); select from pushpop.pop('t')");
    assert!(few < 300, "{few} entries");
    // They are there, and would be counted.
    let all = read("select from pushpop.wait_for('t', within => 30)");
    assert!(all >= 1_000, "{all} entries");
}
