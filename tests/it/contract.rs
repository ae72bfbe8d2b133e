//! The guarantees of the contract, by their numbers. What a test of another module shows in detail
//! is shown here in short.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use pushpop_pg::{ErrorKind, NewMessage, Queue, State, uuid::Uuid};
use pushpop_server::Server;

use crate::world::{SOON, World, drain, pop, stats, text, until, until_wanted};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    pop(&queue, "t").complete().unwrap();
}

/// The log is written out as late as can be, so that a commit that did not wait for it is lost.
#[test]
fn guarantee_01_durable() {
    let mut server = Server::with(&[("synchronous_commit", "off"), ("wal_writer_delay", "10s")]).unwrap();
    let world = World::on(&server.url());
    let queue = world.queue();
    let mut client = world.client();
    let mut acknowledged = vec![queue.push("t", "single").unwrap()];
    acknowledged.extend(queue.push_many("t", ["a", "b", "c"]).unwrap());
    let mut tx = client.transaction().unwrap();
    tx.batch_execute("set local synchronous_commit = off").unwrap();
    acknowledged.push(queue.push_in(&mut tx, "t", "in").unwrap());
    tx.commit().unwrap();
    let by_sql = client.query_one(&world.sql("select pushed from pushpop.push('t', 'sql')"), &[]).unwrap();
    acknowledged.push(by_sql.get(0));
    // To show that this server does lose what is not waited for.
    client.batch_execute("create table lost (n int); checkpoint; insert into lost values (1)").unwrap();
    let message = NewMessage::new("last");
    acknowledged.push(message.id());
    queue.push("t", message).unwrap();
    client.batch_execute("insert into lost values (2)").unwrap();
    server.kill().unwrap();
    server.start_again().unwrap();
    let kept: i64 = world.client().query_one("select count(*) from lost", &[]).unwrap().get(0);
    assert!(kept < 2, "nothing was lost, so nothing was shown");
    let after = world.queue();
    for id in acknowledged {
        assert!(after.find("t", id).unwrap().is_some(), "{id} is lost");
    }
}

#[test]
fn guarantee_02_pushed_once() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(SECOND));
    let id = Uuid::new_v4();
    let push = |payload: &str| queue.push_once("t", NewMessage::new(payload).with_id(id)).unwrap();
    assert!(push("first"));
    assert!(!push("second"), "live");
    let lease = pop(&queue, "t");
    assert!(!push("second"), "leased");
    assert_eq!(lease.payload(), b"first");
    lease.complete().unwrap();
    assert!(!push("second"), "settled");
    until("the window ends", || push("third"));
    assert_eq!(text(pop(&queue, "t").payload()), "third");
}

/// The same ids from many threads at once, by all ways.
#[test]
fn guarantee_02_pushed_once_by_many_at_once() {
    let world = World::new();
    let (one, two) = (world.queue(), world.queue());
    let ids: Vec<Uuid> = (0..100).map(|_| Uuid::new_v4()).collect();
    let new = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for t in 0..8 {
            let (queue, ids, new) = (if t % 2 == 0 { &one } else { &two }, &ids, &new);
            scope.spawn(move || {
                for id in ids {
                    // A twin that is on its way may make it wait, or fail by a lock time-out.
                    let message = NewMessage::new(format!("{t}")).with_id(*id);
                    if queue.push_once("t", message).unwrap() {
                        new.lock().unwrap().push((*id, format!("{t}")));
                    }
                }
            });
        }
    });
    let new: HashMap<Uuid, String> = {
        let new = new.into_inner().unwrap();
        assert_eq!(new.len(), 100, "each id was new to one caller");
        new.into_iter().collect()
    };
    let leases = one.pop_many("t", 1000, SOON).unwrap();
    assert_eq!(leases.len(), 100);
    assert!(leases.iter().all(|l| new[&l.id()] == text(l.payload())), "the first payload wins");
}

/// Consumers die with their leases, connections are cut, and every message is completed in the end.
#[test]
fn guarantee_03_at_least_once() {
    let world = World::new();
    let queue = world.open(world.builder().lease(SECOND * 2));
    let n = 300;
    queue.push_many("t", (0..n).map(|i| NewMessage::new(format!("{i}")).max_attempts(None))).unwrap();
    let completed = Mutex::new(BTreeSet::new());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for t in 0..4 {
            let (queue, completed, stop) = (&queue, &completed, &stop);
            scope.spawn(move || {
                let mut round = t;
                while !stop.load(Ordering::Relaxed) {
                    let Ok(leases) = queue.pop_many("t", 20, SECOND / 5) else { continue };
                    for lease in leases {
                        round += 1;
                        match round % 7 {
                            0 => drop(lease),
                            1 => drop(lease.release()),
                            2 => drop(lease.defer(SECOND / 10)),
                            _ => {
                                let payload = text(lease.payload());
                                if lease.complete().is_ok() {
                                    completed.lock().unwrap().insert(payload);
                                }
                            }
                        }
                    }
                }
            });
        }
        let mut client = world.client();
        let sql = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1";
        for _ in 0..30 {
            client.query(sql, &[&world.schema]).unwrap();
            thread::sleep(SECOND / 10);
        }
        let deadline = Instant::now() + SOON;
        while !queue.topic("t").stats().is_ok_and(|s| s.settled() == n) && Instant::now() < deadline {
            thread::sleep(SECOND / 10);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = stats(&queue, "t");
    assert_eq!((stats.settled(), stats.ready(), stats.leased(), stats.dead()), (n, 0, 0, 0));
}

#[test]
fn guarantee_04_one_live_lease() {
    let world = World::new();
    let (one, two) = (world.queue(), world.queue());
    one.push_many("t", (0..50).map(|i| format!("{i}"))).unwrap();
    let until_when: Mutex<HashMap<Uuid, Instant>> = Mutex::new(HashMap::new());
    let ends = Instant::now() + SECOND * 5;
    thread::scope(|scope| {
        for t in 0..6 {
            let (queue, until_when) = (if t % 2 == 0 { &one } else { &two }, &until_when);
            let queue = queue.with_lease(SECOND);
            scope.spawn(move || {
                while Instant::now() < ends {
                    for lease in queue.pop_many("t", 5, SECOND / 10).unwrap() {
                        // By the local clock, which never says more than the server grants.
                        let popped = Instant::now();
                        let before =
                            until_when.lock().unwrap().insert(lease.id(), popped + lease.remaining());
                        assert!(before.is_none_or(|end| end <= popped), "two hold {lease:?}");
                    }
                }
            });
        }
    });
    let seen = until_when.into_inner().unwrap();
    assert_eq!(seen.len(), 50);
}

#[test]
fn guarantee_05_proved_settles() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    let stale = pop(&queue.with_lease(SECOND), "t");
    let fresh = pop(&queue, "t");
    let (stale, error) = stale.complete().unwrap_err().into_parts();
    assert_eq!(error.kind(), ErrorKind::LeaseLost);
    let (stale, error) = stale.fail("m").unwrap_err().into_parts();
    assert_eq!(error.kind(), ErrorKind::LeaseLost);
    assert_eq!(queue.find("t", id).unwrap().unwrap().state(), State::Leased { until: fresh.deadline() });
    // Repeated: after the transaction form, which leaves the lease. That one itself is refused, as what is done beside
    // it would be done twice.
    queue.transaction(|tx| fresh.complete_in(tx)).unwrap();
    let error = queue.transaction(|tx| fresh.complete_in(tx)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseLost);
    fresh.complete().unwrap();
    assert_eq!(stale.complete().unwrap_err().error().kind(), ErrorKind::LeaseLost);
    // The row is gone: nobody knows.
    let gone = world.open(world.builder().keep_settled(Duration::ZERO));
    gone.push("u", "m").unwrap();
    let lease = pop(&gone, "u");
    gone.transaction(|tx| lease.complete_in(tx)).unwrap();
    let error: pushpop_pg::Error = lease.complete().unwrap_err().into();
    assert!(error.is_indeterminate() && error.kind() != ErrorKind::LeaseLost, "{error:?}");
}

/// Strict order with batches is in `pop`; here, that the order is stored, not guessed from ids.
#[test]
fn guarantee_06_ordered() {
    let world = World::new();
    let queue = world.queue();
    let mut expected = Vec::new();
    for i in 0..20_u128 {
        let ids = [u128::MAX - i * 7, i, 1 << (100 - i)];
        let batch = ids.map(|id| NewMessage::new(format!("{id}")).with_id(Uuid::from_u128(id)));
        expected.extend(ids.iter().map(u128::to_string));
        queue.push_many("t", batch).unwrap();
        queue.push("t", NewMessage::new(format!("single {i}")).with_id(Uuid::from_u128(1000 - i))).unwrap();
        expected.push(format!("single {i}"));
    }
    assert_eq!(drain(&queue, "t"), expected);
}

/// What commits behind the front is overtaken for at most one second.
#[test]
fn guarantee_06_ordered_though_late() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    queue.push_in(&mut tx, "t", "late").unwrap();
    // A deep topic, so that the front never runs dry.
    queue.push_many("t", (0..5000).map(|i| format!("{i}"))).unwrap();
    for _ in 0..20 {
        assert_ne!(pop(&queue, "t").payload(), b"late");
        thread::sleep(SECOND / 10);
    }
    tx.commit().unwrap();
    thread::sleep(SECOND + SECOND / 10);
    assert_eq!(text(pop(&queue, "t").payload()), "late");
}

/// By hand, everything that makes pops fast is set so that it hides a message.
#[test]
fn guarantee_07_nothing_starves() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    queue.push_many("t", ["a", "b"]).unwrap();
    assert_eq!(text(pop(&queue, "t").payload()), "a");
    drop(queue);
    // The mark lies in the future, and no client of ours is there.
    client.batch_execute(&world.sql(
        "update pushpop.topics set low = clock_timestamp() + interval '1 hour', looked_at = clock_timestamp() + interval '1 hour',
                swept_at = clock_timestamp() - interval '2 minutes', reclaimed_to = clock_timestamp() + interval '1 hour'",
    )).unwrap();
    let sql = world.sql("select convert_from(payload, 'UTF8') from pushpop.pop('t')");
    until("another language finds it", || {
        client.query_opt(&sql, &[]).unwrap().is_some_and(|row| row.get::<_, String>(0) == "b")
    });
    // The same for a topic of which nothing is known.
    client
        .batch_execute(
            &world
                .sql("select pushpop.push('u', 'm'); delete from pushpop.topics; delete from pushpop.behind"),
        )
        .unwrap();
    assert!(client.query_opt(&world.sql("select from pushpop.pop('u')"), &[]).unwrap().is_some());
}

/// An expired lease is returned by a pop, from any language, with no other client alive.
#[test]
fn guarantee_07_nothing_starves_without_our_clients() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    client.batch_execute(&world.sql("select pushpop.push('t', 'm')")).unwrap();
    let pop = world.sql("select id, token, attempt from pushpop.pop('t', lease => 1)");
    let first = client.query_one(&pop, &[]).unwrap();
    let mut second = None;
    until("it comes again", || {
        second = client.query_opt(&pop, &[]).unwrap();
        second.is_some()
    });
    let second = second.unwrap();
    assert_eq!(first.get::<_, Uuid>(0), second.get::<_, Uuid>(0));
    assert_eq!(second.get::<_, i32>(2), 2);
    let complete = world.sql("select pushpop.complete('t', $1, $2)");
    let stale =
        client.query(&complete, &[&first.get::<_, Uuid>(0), &first.get::<_, Vec<u8>>(1)]).unwrap_err();
    assert_eq!(stale.code().unwrap().code(), "PP001");
    client.query(&complete, &[&second.get::<_, Uuid>(0), &second.get::<_, Vec<u8>>(1)]).unwrap();
}

/// All times are PostgreSQL's: here its clock as the test's own connection reads it.
#[test]
fn guarantee_08_one_clock() {
    use pushpop_pg::time::OffsetDateTime;
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let mut now = || client.query_one("select clock_timestamp()", &[]).unwrap().get::<_, OffsetDateTime>(0);
    let before = now();
    let id = queue.push("t", "m").unwrap();
    let between = now();
    let lease = queue.with_lease(SECOND * 30).try_pop("t").unwrap().unwrap();
    // First the local clock, then the server's: so a difference is never in our favour.
    let by_server = lease.deadline() - now();
    let after = now();
    assert!(lease.pushed_at() >= before && lease.pushed_at() <= between);
    assert!(lease.deadline() >= between + SECOND * 30 && lease.deadline() <= after + SECOND * 30);
    assert!(lease.remaining() <= Duration::try_from(by_server).unwrap() + SECOND / 100);
    lease.complete().unwrap();
    let State::Completed { at, .. } = queue.find("t", id).unwrap().unwrap().state() else { panic!() };
    assert!(at >= after && at <= now());
}

#[test]
fn guarantee_09_transactional() {
    let world = World::new();
    let queue = world.queue();
    queue.push("in", "m").unwrap();
    let lease = pop(&queue, "in");
    let rolled_back: Result<(), pushpop_pg::Error> = queue.transaction(|tx| {
        queue.push_in(tx, "out", "m")?;
        lease.complete_in(tx)?;
        Err(pushpop_pg::Error::other("no"))
    });
    assert_eq!(rolled_back.unwrap_err().kind(), ErrorKind::Other);
    assert!(queue.try_pop("out").unwrap().is_none());
    assert!(matches!(queue.find("in", lease.id()).unwrap().unwrap().state(), State::Leased { .. }));
    queue
        .transaction(|tx| {
            queue.push_in(tx, "out", "m")?;
            lease.complete_in(tx)
        })
        .unwrap();
    assert_eq!(drain(&queue, "out"), ["m"]);
    assert!(matches!(queue.find("in", lease.id()).unwrap().unwrap().state(), State::Completed { .. }));
}

/// In more detail, with a server that is frozen, in `outage`; here with one query that hangs.
#[test]
fn guarantee_10_deadlines() {
    let world = World::new();
    let timeout = SECOND;
    let queue = world.open(world.builder().operation_timeout(timeout).pool_size(1));
    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    tx.batch_execute(&world.sql("lock table pushpop.messages in access exclusive mode")).unwrap();
    let started = Instant::now();
    let error = queue.push("t", "m").unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    let (lease, error) = lease.complete().unwrap_err().into_parts();
    assert!(error.is_retryable(), "{error:?}");
    assert!(queue.find("t", lease.id()).unwrap_err().is_retryable());
    assert!(started.elapsed() < timeout * 3 + SECOND * 5, "{:?}", started.elapsed());
    tx.rollback().unwrap();
    lease.complete().unwrap();
    queue.push("t", "m").unwrap();
}

/// Restarts and crashes are in `outage`; here every connection is cut, again and again.
#[test]
fn guarantee_11_blocking_pops_ride_through() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| queue.pop("t").unwrap())).collect();
        let sql = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1";
        until_wanted(&world, &mut client, "t");
        for _ in 0..10 {
            client.query(sql, &[&world.schema]).unwrap();
            thread::sleep(SECOND / 20);
        }
        let ids: BTreeSet<Uuid> = (0..4).map(|_| queue.push("t", "m").unwrap()).collect();
        let popped: BTreeSet<Uuid> = waiting.into_iter().map(|t| t.join().unwrap().id()).collect();
        assert_eq!(ids, popped);
    });
}

#[test]
fn guarantee_12_polling_is_the_guarantee() {
    let world = World::new();
    let queue = world.open(world.builder().poll_interval(SECOND / 4));
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pop(&queue, "t"));
        until_wanted(&world, &mut client, "t");
        // Pushed so that nobody is told.
        client.batch_execute(&world.sql("update pushpop.topics set wanted_until = '-infinity'")).unwrap();
        client
            .batch_execute(&world.sql("select pushpop.push('t', 'm', sender => gen_random_uuid())"))
            .unwrap();
        assert_eq!(waiting.join().unwrap().payload(), b"m");
    });
}

/// Whichever client is there does the upkeep, as a role without any special right.
#[test]
fn guarantee_13_no_daemon() {
    let mut admin =
        Client::connect(&crate::world::guarded_url("postgres", "correct", "postgres"), NoTls).unwrap();
    let (role, url) = crate::world::guarded_role(&mut admin);
    admin.batch_execute(&format!("grant create on database postgres to {role}")).unwrap();
    let world = World::on(&url);
    let queue = world.open(world.builder().keep_settled(SECOND));
    queue.push_many("t", (0..2500).map(|i| format!("{i}"))).unwrap();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let leases = queue.pop_many("t", 1000, SOON).unwrap();
        ids.extend(leases.iter().map(|l| l.id()));
        assert!(queue.complete_many(leases).unwrap().is_empty());
    }
    until("the history is deleted", || queue.topics().unwrap().is_empty());
    assert!(queue.find("t", ids[0]).unwrap().is_none());
    let mut client = world.client();
    for table in ["messages", "runs", "leases", "history"] {
        let left: i64 = client
            .query_one(&world.sql(&format!("select count(*) from pushpop.{table}")), &[])
            .unwrap()
            .get(0);
        assert_eq!(left, 0, "{table}");
    }
    let extensions: i64 =
        client.query_one("select count(*) from pg_extension where extname <> 'plpgsql'", &[]).unwrap().get(0);
    assert_eq!(extensions, 0);
}

#[test]
fn guarantee_14_orderly_end() {
    let world = World::new();
    let queue = world.queue();
    queue.push("held", "m").unwrap();
    let lease = pop(&queue, "held");
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop("t").map(drop));
        let iterating = scope.spawn(|| queue.iter("t").count());
        until_wanted(&world, &mut client, "t");
        queue.close();
        assert_eq!(waiting.join().unwrap().unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(iterating.join().unwrap(), 0);
    });
    lease.complete().unwrap();
    assert_eq!(queue.push("t", "m").unwrap_err().kind(), ErrorKind::Closed);
}

/// Rendered in full in `errors`; here, that they can be told apart.
#[test]
fn guarantee_15_honest_errors() {
    let world = World::new();
    let queue = world.queue();
    assert!(queue.try_pop("t").unwrap().is_none(), "empty is no error");
    let mut kinds = vec![queue.push("", "m").unwrap_err().kind()];
    let nobody = Queue::connect("postgres://postgres@127.0.0.1:1/postgres");
    kinds.push(nobody.map(drop).unwrap_err().kind());
    queue.push("t", "m").unwrap();
    let stale = pop(&queue.with_lease(SECOND), "t");
    pop(&queue, "t").complete().unwrap();
    kinds.push(stale.complete().unwrap_err().error().kind());
    kinds.push(queue.transaction(|tx| Ok(tx.batch_execute("select 1/0")?)).unwrap_err().kind());
    let slow = world.open(world.builder().pool_size(1).operation_timeout(SECOND));
    slow.transaction(|_| {
        kinds.push(slow.push("t", "m").unwrap_err().kind());
        Ok(())
    })
    .unwrap();
    queue.close();
    kinds.push(queue.push("t", "m").unwrap_err().kind());
    let expected = [
        ErrorKind::Invalid,
        ErrorKind::Connection,
        ErrorKind::LeaseLost,
        ErrorKind::Database,
        ErrorKind::Timeout,
        ErrorKind::Closed,
    ];
    assert_eq!(kinds, expected);
}

/// All limits are in `limits`.
#[test]
fn guarantee_16_bad_input_is_refused() {
    let world = World::new();
    let queue = world.queue();
    let error = queue.push(&"t".repeat(256), "m").unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("255"), "{error}");
    let mut client = world.client();
    let error = client.query(&world.sql("select pushpop.push(repeat('t', 256), 'm')"), &[]).unwrap_err();
    let db = error.as_db_error().unwrap();
    assert!(db.code().code() == "22023" && db.message().contains("255"), "{}", db.message());
    assert!(queue.topics().unwrap().is_empty());
}
