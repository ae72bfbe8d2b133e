//! Upkeep: done by one client at a time, and what it costs.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;

use crate::audit::audit;
use crate::world::{World, drain, pop, stats, until};

/// Some history that may go, and some messages of a lease that ended: work for upkeep, and no client
/// that would do it.
fn leave_work(world: &World, client: &mut Client) {
    drop(world.queue());
    client
        .batch_execute(&world.sql(
            "select pushpop.push_many('t', array(select gen_random_uuid() from generate_series(1, 50)), array_fill('m'::bytea, '{50}'));
             select pushpop.complete('t', p.id, p.token, 0.001) from pushpop.pop('t', 40) p;
             select from pushpop.pop('t', 7, 1)",
        ))
        .unwrap();
    let ended = world.sql("select min(lease_until) < clock_timestamp() from pushpop.leases");
    until("the lease has ended", || client.query_one(&ended, &[]).unwrap().get(0));
}

fn upkeep(world: &World, client: &mut Client) -> i64 {
    client.query_one(&world.sql("select pushpop.upkeep('t')"), &[]).unwrap().get(0)
}

/// What there is: messages, history, leases with an end.
fn left(world: &World, client: &mut Client) -> (i64, i64, i64) {
    let sql = world.sql(
        "select (select count(*) from pushpop.messages), (select count(*) from pushpop.history),
                (select count(*) from pushpop.leases where lease_until <= clock_timestamp())",
    );
    let row = client.query_one(&sql, &[]).unwrap();
    (row.get(0), row.get(1), row.get(2))
}

#[test]
fn smoke() {
    let world = World::new();
    let mut client = world.client();
    leave_work(&world, &mut client);
    assert_eq!(upkeep(&world, &mut client), 40);
    assert_eq!(left(&world, &mut client), (10, 0, 0));
    assert_eq!(upkeep(&world, &mut client), 0);
    audit(&world, &mut client);
}

/// Upkeep of all topics comes once in the time for which history is kept, and not in a row.
#[test]
fn a_queue_without_work_looks_around_now_and_then() {
    let world = World::new();
    let _queue = world.open(world.builder().keep_settled(Duration::from_secs(1)));
    let mut client = world.client();
    let sql = "select query_start::text from pg_stat_activity where application_name = $1 and query like '%upkeep_due%'";
    let mut looks = HashSet::new();
    let until_then = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until_then || looks.is_empty() {
        looks.extend(client.query(sql, &[&world.schema]).unwrap().iter().map(|row| row.get::<_, String>(0)));
        assert!(looks.len() <= 8, "{looks:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// However much there is: other calls have their turn between its statements.
#[test]
fn one_statement_of_it_deletes_no_more_than_a_step() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::from_secs(1)));
    let mut client = world.client();
    client
        .batch_execute(&world.sql(
            "create table pushpop.steps (topic text, n bigint);
             create function pushpop.note_step() returns trigger language plpgsql as $$
             begin
               insert into pushpop.steps select topic, count(*) from gone group by topic;
               return null;
             end $$;
             create trigger note after delete on pushpop.messages referencing old table as gone
             for each statement execute function pushpop.note_step()",
        ))
        .unwrap();
    let (topics, many) = (["a", "b", "c"], 1_500);
    for topic in topics {
        queue.push_many(topic, vec!["m"; many]).unwrap();
        drain(&queue, topic);
    }
    let mut deleted = || {
        let row = client
            .query_one(&world.sql("select coalesce(sum(n), 0)::bigint, max(n) from pushpop.steps"), &[])
            .unwrap();
        (row.get::<_, i64>(0), row.get::<_, Option<i64>>(1))
    };
    until("all are deleted", || deleted().0 == 4_500);
    // A thousand for all topics of a statement, and the rest of a row of the history.
    assert!(deleted().1 <= Some(1_250), "{:?}", deleted());
}

/// Those whose names come first are held by somebody, so that something is due in them all the time.
#[test]
fn every_topic_has_its_turn() {
    let world = World::new();
    let mut client = world.client();
    drop(world.queue());
    let settle = "select from generate_series(1, 250) i, lateral (
                    select p.pushed from pushpop.push('a ' || i, 'm') p) q, lateral (
                    select from pushpop.pop('a ' || i) m, pushpop.complete('a ' || i, m.id, m.token, 0.001)) s";
    client.batch_execute(&world.sql(settle)).unwrap();
    client.batch_execute(&world.sql(&settle.replace("'a '", "'z '").replace("250", "1"))).unwrap();
    let mut holder = world.client();
    let mut tx = holder.transaction().unwrap();
    tx.batch_execute(&world.sql("select from pushpop.topics where topic < 'z' for update")).unwrap();
    let _queue = world.open(world.builder().keep_settled(Duration::from_secs(1)));
    let left = world.sql("select count(*) from pushpop.history where topic > 'z'");
    until("its history is deleted", || client.query_one(&left, &[]).unwrap().get::<_, i64>(0) == 0);
    tx.rollback().unwrap();
}

#[test]
fn its_cost_is_in_the_figures() {
    let world = World::new();
    let mut client = world.client();
    leave_work(&world, &mut client);
    let figures = |client: &mut Client| {
        let sql =
            world.sql("select upkept_at is not null, upkeep_seconds, upkeep_rows from pushpop.stats('t')");
        let row = client.query_one(&sql, &[]).unwrap();
        (row.get::<_, bool>(0), row.get::<_, f64>(1), row.get::<_, i64>(2))
    };
    assert_eq!(figures(&mut client), (false, 0.0, 0));
    upkeep(&world, &mut client);
    let (done, seconds, rows) = figures(&mut client);
    assert!(done && seconds > 0.0 && seconds < 30.0 && rows == 47, "{seconds} s for {rows}");
    upkeep(&world, &mut client);
    let again = figures(&mut client);
    assert!(again.1 > seconds && again.2 == 47, "{again:?}");

    // As a queue sees it, which does some itself.
    let queue = world.queue();
    let first = stats(&queue, "t");
    client.batch_execute(&world.sql("select from pushpop.push('untouched', 'm', delay => 3600)")).unwrap();
    assert!(queue.try_pop("untouched").unwrap().is_none());
    pop(&queue, "t").complete().unwrap();
    until("upkeep is done", || stats(&queue, "t").upkept_at() > first.upkept_at());
    let later = stats(&queue, "t");
    assert!(later.upkeep_time() > first.upkeep_time() && first.upkeep_time() > Duration::ZERO);
    assert_eq!(later.upkeep_rows(), 47);
    assert_eq!(stats(&queue, "untouched").upkept_at(), None, "nothing was done that could need it");
    let unknown = stats(&queue, "unknown");
    assert_eq!(
        (unknown.upkept_at(), unknown.upkeep_time(), unknown.upkeep_rows()),
        (None, Duration::ZERO, 0)
    );
}

/// The holder of the topic hangs in the middle of upkeep and dies there: others neither wait for it nor
/// do the same, and the next one finds everything as it was.
#[test]
fn one_that_dies_in_the_middle_leaves_everything_to_the_next() {
    let world = World::new();
    let (mut client, mut holder, mut victim) = (world.client(), world.client(), world.client());
    leave_work(&world, &mut client);
    let before = left(&world, &mut client);
    let mut tx = holder.transaction().unwrap();
    tx.batch_execute(&world.sql("lock table pushpop.history in access exclusive mode")).unwrap();
    let pid: i32 = victim.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
    thread::scope(|scope| {
        let dies = scope.spawn(|| victim.query(&world.sql("select pushpop.upkeep('t')"), &[]).is_err());
        until("it hangs", || {
            let sql = "select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock'";
            client.query_opt(sql, &[&pid]).unwrap().is_some()
        });
        client.batch_execute("set statement_timeout = '10s'").unwrap();
        assert_eq!(upkeep(&world, &mut client), 0, "one at a time");
        client.execute("select pg_terminate_backend($1::int)", &[&pid]).unwrap();
        assert!(dies.join().unwrap());
        // Its client knows of it before its locks are gone.
        until("it is gone", || {
            client.query_opt("select from pg_stat_activity where pid = $1", &[&pid]).unwrap().is_none()
        });
    });
    tx.commit().unwrap();
    assert_eq!(left(&world, &mut client), before);
    assert_eq!(upkeep(&world, &mut client), 40);
    assert_eq!(left(&world, &mut client), (10, 0, 0));
    audit(&world, &mut client);
}
