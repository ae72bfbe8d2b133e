//! Nothing that waits is ever hidden behind the low watermark of its topic, whoever puts it there, and however late that
//! is committed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, IsolationLevel, NoTls};
use pushpop_pg::uuid::Uuid;
use pushpop_server::Server;

use crate::audit::audit;
use crate::world::{SOON, World, until, until_wanted};

const UPKEEP: &str = "select pushpop.upkeep('t')";

/// A topic in use, by SQL alone: its watermark moves with each upkeep, and it was looked at from the beginning just now, which
/// is done again only after a minute.
fn in_use(world: &World) -> Client {
    drop(world.queue());
    let mut client = world.client();
    client.batch_execute(&world.sql("select pushpop.push('t', 'first')")).unwrap();
    for found in [1, 0] {
        assert_eq!(client.query(&world.sql("select from pushpop.pop('t')"), &[]).unwrap().len(), found);
    }
    upkeep(world, &mut client);
    client
}

fn push(world: &World, client: &mut Client, arguments: &str) -> Uuid {
    let sql = world.sql(&format!("select pushed from pushpop.push('t', 'm' {arguments})"));
    client.query_one(&sql, &[]).unwrap().get(0)
}

/// Pops one message by SQL: its id and token.
fn pop(world: &World, client: &mut Client) -> Option<(Uuid, Vec<u8>)> {
    let sql = world.sql("select id, token from pushpop.pop('t')");
    client.query_opt(&sql, &[]).unwrap().map(|row| (row.get(0), row.get(1)))
}

fn release(world: &World, client: &mut impl postgres::GenericClient, (id, token): &(Uuid, Vec<u8>)) {
    client.query(&world.sql("select pushpop.release('t', $1, $2)"), &[id, token]).unwrap();
}

/// Two upkeeps: the first notes which transactions run, the second moves the watermark to that time.
fn upkeep(world: &World, client: &mut Client) {
    for _ in 0..2 {
        client.batch_execute(&world.sql(UPKEEP)).unwrap();
    }
}

/// The message is popped at once: a sweep, which finds everything, is almost a minute away.
#[track_caller]
fn is_found(world: &World, client: &mut Client, id: Uuid) {
    audit(world, client);
    assert_eq!(pop(world, client).map(|message| message.0), Some(id));
}

#[test]
fn smoke() {
    let world = World::new();
    let mut client = in_use(&world);
    let id = push(&world, &mut client, "");
    upkeep(&world, &mut client);
    is_found(&world, &mut client, id);
}

/// The second release of a message found the late entry of the first, and relied on it. The next look deleted that, could
/// not see the run of the second, and moved the watermark past it: the message was out of reach for a minute.
#[test]
fn what_is_released_twice_to_the_same_place_is_found() {
    let world = World::new();
    let (mut client, mut other) = (in_use(&world), world.client());
    let id = push(&world, &mut client, "");
    upkeep(&world, &mut client);
    let first = pop(&world, &mut client).unwrap();
    release(&world, &mut client, &first);
    let second = pop(&world, &mut client).unwrap();
    let mut tx = other.transaction().unwrap();
    release(&world, &mut tx, &second);
    upkeep(&world, &mut client);
    tx.commit().unwrap();
    is_found(&world, &mut client, id);
}

/// The same by a lease that ends: its message is put back by a transaction that takes long to commit.
#[test]
fn what_expires_twice_to_the_same_place_is_found() {
    let world = World::new();
    let (mut client, mut other) = (in_use(&world), world.client());
    let id = push(&world, &mut client, "");
    upkeep(&world, &mut client);
    let first = pop(&world, &mut client).unwrap();
    release(&world, &mut client, &first);
    client.batch_execute(&world.sql("select from pushpop.pop('t', lease => 1)")).unwrap();
    let mut tx = other.transaction().unwrap();
    let returns = world.sql("select upkeep_rows from pushpop.topics where topic = 't'");
    let before: i64 = tx.query_one(&returns, &[]).unwrap().get(0);
    until("the lease has ended", || {
        tx.batch_execute(&world.sql("select pushpop.redrive('t', array[gen_random_uuid()])")).unwrap();
        tx.query_opt(&world.sql("select from pushpop.runs"), &[]).unwrap().is_some()
    });
    upkeep(&world, &mut client);
    tx.commit().unwrap();
    assert_eq!(client.query_one(&returns, &[]).unwrap().get::<_, i64>(0), before, "upkeep returned nothing");
    is_found(&world, &mut client, id);
}

/// A time in the past that is used again, by a push and by a message that is rescheduled.
#[test]
fn what_is_put_twice_to_the_same_time_in_the_past_is_found() {
    let past = "'2020-01-01 00:00:00+00'";
    let push_again = format!("select pushpop.push('t', 'm', id => $1, ready_at => {past})");
    let reschedule = format!("select pushpop.reschedule('t', $1, ready_at => {past})");
    for (n, put_again) in [push_again, reschedule].iter().enumerate() {
        let world = World::new();
        let (mut client, mut other) = (in_use(&world), world.client());
        let id = push(&world, &mut client, &format!(", ready_at => {past}"));
        if n == 0 {
            // Deleted at once: the id may be used again.
            let settled = "select pushpop.complete('t', p.id, p.token, keep => 0) from pushpop.pop('t') p";
            client.batch_execute(&world.sql(settled)).unwrap();
        }
        let mut tx = other.transaction().unwrap();
        tx.query(&world.sql(put_again), &[&id]).unwrap();
        upkeep(&world, &mut client);
        tx.commit().unwrap();
        is_found(&world, &mut client, id);
    }
}

/// Twice within one transaction, the second time within a savepoint that is rolled back.
#[test]
fn what_is_released_again_in_a_savepoint_that_is_rolled_back_is_found() {
    let world = World::new();
    let (mut client, mut other) = (in_use(&world), world.client());
    let id = push(&world, &mut client, "");
    upkeep(&world, &mut client);
    let mut tx = other.transaction().unwrap();
    let popped = world.sql("select pushpop.release('t', p.id, p.token) from pushpop.pop('t') p");
    tx.batch_execute(&popped).unwrap();
    let mut savepoint = tx.transaction().unwrap();
    savepoint.batch_execute(&popped).unwrap();
    savepoint.rollback().unwrap();
    upkeep(&world, &mut client);
    tx.commit().unwrap();
    is_found(&world, &mut client, id);
}

/// A look in a transaction with an old snapshot knew from the list of locks that a push had ended, and could not see what
/// it had pushed.
#[test]
fn a_look_with_an_old_snapshot_moves_no_watermark() {
    for level in [IsolationLevel::RepeatableRead, IsolationLevel::Serializable] {
        let world = World::new();
        let (mut client, mut pusher, mut looker) = (in_use(&world), world.client(), world.client());
        let mut late = pusher.transaction().unwrap();
        let sql = world.sql("select pushed from pushpop.push('t', 'late')");
        let id: Uuid = late.query_one(&sql, &[]).unwrap().get(0);
        upkeep(&world, &mut client);
        let mut old = looker.build_transaction().isolation_level(level).start().unwrap();
        old.batch_execute("select 1").unwrap();
        late.commit().unwrap();
        old.batch_execute(&world.sql(UPKEEP)).unwrap();
        old.commit().unwrap();
        is_found(&world, &mut client, id);
    }
}

/// Somebody's pop, in a transaction that goes on for long, has the topic's row: nobody can move its watermark. What is
/// released meanwhile is overtaken for a second at most.
#[test]
fn what_is_released_while_another_transaction_has_the_topic_is_popped_first() {
    let world = World::new();
    let (mut client, mut other) = (in_use(&world), world.client());
    let id = push(&world, &mut client, "");
    let held = pop(&world, &mut client).unwrap();
    for _ in 0..50 {
        push(&world, &mut client, "");
    }
    upkeep(&world, &mut client);
    let mut tx = other.transaction().unwrap();
    tx.batch_execute(&world.sql(UPKEEP)).unwrap();
    release(&world, &mut client, &held);
    thread::sleep(Duration::from_millis(1200));
    is_found(&world, &mut client, id);
    tx.commit().unwrap();
}

/// Threads that do nothing but pop and release the same few messages: at any moment each of them is in one run that a
/// pop would find, or in a lease. At defaults all six were out of reach for 46 seconds.
#[test]
fn messages_that_bounce_are_never_hidden() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["a", "b", "c", "d", "e", "f"]).unwrap();
    let calm = AtomicBool::new(false);
    let popped = thread::scope(|scope| {
        let bouncers: Vec<_> = (0..12)
            .map(|_| {
                scope.spawn(|| {
                    let mut popped = HashMap::<Uuid, u32>::new();
                    while !calm.load(Ordering::Relaxed) {
                        // Far less than the minute after which a sweep finds everything.
                        let lease = queue.pop_timeout("t", SOON / 2).unwrap().expect("one of six messages");
                        *popped.entry(lease.id()).or_default() += 1;
                        lease.release().unwrap();
                    }
                    popped
                })
            })
            .collect();
        let (mut client, until) = (world.client(), Instant::now() + Duration::from_secs(8));
        while Instant::now() < until {
            client.batch_execute(&world.sql(UPKEEP)).unwrap();
            audit(&world, &mut client);
        }
        calm.store(true, Ordering::Relaxed);
        bouncers.into_iter().flat_map(|bouncer| bouncer.join().unwrap()).collect::<Vec<_>>()
    });
    let mut each = HashMap::<Uuid, u32>::new();
    for (id, times) in popped {
        *each.entry(id).or_default() += times;
    }
    assert_eq!(each.len(), 6);
    assert!(each.values().all(|times| *times > 20), "{each:?}");
}

/// A server that takes prepared transactions, with a topic in use, and a transaction that is prepared before it crashes.
fn crashed_with(world: impl FnOnce(&World, &mut Client)) -> (Server, World, Client) {
    let mut server = Server::with(&[("max_prepared_transactions", "4")]).unwrap();
    let made = World::on(&server.url());
    let mut client = in_use(&made);
    world(&made, &mut client);
    upkeep(&made, &mut client);
    server.kill().unwrap();
    server.start_again().unwrap();
    let client = Client::connect(&server.url(), NoTls).unwrap();
    (server, made, client)
}

/// After a crash a prepared transaction goes by another name, and was taken for one that had ended.
#[test]
fn what_was_prepared_before_a_crash_is_found_once_it_is_committed() {
    let mut id = None;
    let (_server, world, mut client) = crashed_with(|world, client| {
        let sql = world.sql("select pushed from pushpop.push('t', 'late', sender => $1)");
        client.batch_execute("begin").unwrap();
        id = Some(client.query_one(&sql, &[&Uuid::new_v4()]).unwrap().get(0));
        client.batch_execute("prepare transaction 'late'").unwrap();
    });
    for _ in 0..3 {
        upkeep(&world, &mut client);
        assert!(pop(&world, &mut client).is_none());
    }
    client.batch_execute("commit prepared 'late'").unwrap();
    is_found(&world, &mut client, id.unwrap());
}

/// A transaction that notifies cannot be prepared: whoever waits looks for himself then.
#[test]
fn what_is_pushed_by_a_prepared_transaction_reaches_those_that_wait() {
    let server = Server::with(&[("max_prepared_transactions", "4")]).unwrap();
    let world = World::on(&server.url());
    let (queue, mut client) = (world.queue(), world.client());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop_timeout("t", SOON).unwrap().map(|lease| lease.id()));
        until_wanted(&world, &mut client, "t");
        let push = world.sql("select pushed from pushpop.push('t', 'm')");
        client.batch_execute("begin").unwrap();
        client.query_one(&push, &[]).unwrap();
        let refused = client.batch_execute("prepare transaction 'told'").unwrap_err();
        assert_eq!(refused.code().map(|code| code.code()), Some("0A000"));
        client.batch_execute("rollback; begin; set local pushpop_pg.notify = off").unwrap();
        let id: Uuid = client.query_one(&push, &[]).unwrap().get(0);
        client.batch_execute("prepare transaction 'quiet'").unwrap();
        client.batch_execute("commit prepared 'quiet'").unwrap();
        assert_eq!(waiting.join().unwrap(), Some(id));
    });
}

/// Its lease has long ended when the transaction that popped it is committed.
#[test]
fn what_was_popped_by_a_prepared_transaction_comes_back() {
    let mut id = None;
    let (_server, world, mut client) = crashed_with(|world, client| {
        id = Some(push(world, client, ""));
        upkeep(world, client);
        let pop = world.sql("select from pushpop.pop('t', lease => 1)");
        client.batch_execute(&format!("begin; {pop}; prepare transaction 'popped'")).unwrap();
    });
    thread::sleep(Duration::from_millis(2500));
    upkeep(&world, &mut client);
    assert!(pop(&world, &mut client).is_none(), "it is not committed");
    client.batch_execute("commit prepared 'popped'").unwrap();
    until("it comes back", || pop(&world, &mut client).map(|message| message.0) == id);
}
