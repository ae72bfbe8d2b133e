//! Waiting pops: who wakes them, and what waiting costs.

use std::collections::HashSet;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use pushpop_pg::{Error, ErrorKind, NewMessage, Queue};
use pushpop_server::Server;

use crate::world::{SOON, World, drain, pop, stats, text, until, until_listening, until_wanted};

/// A queue that looks for itself so seldom that a test would see it.
fn patient(world: &World) -> Queue {
    world.open(world.builder().poll_interval(Duration::from_secs(60)))
}

/// Well before the next poll, however busy the machine.
const WOKEN: Duration = Duration::from_secs(20);

/// Waits for a message in a thread, does something, and returns what was popped and how long after.
fn woken(world: &World, waiting: &Queue, topic: &str, wake: impl FnOnce()) -> (String, Duration) {
    let mut client = world.client();
    thread::scope(|scope| {
        let popped = scope.spawn(|| {
            let lease = pop_for(waiting, topic);
            (text(lease.payload()), Instant::now())
        });
        until_wanted(world, &mut client, topic);
        let started = Instant::now();
        wake();
        let (payload, at) = popped.join().unwrap();
        (payload, at.saturating_duration_since(started))
    })
}

fn pop_for(queue: &Queue, topic: &str) -> pushpop_pg::Lease {
    queue.pop_timeout(topic, SOON * 3).unwrap().expect("a message")
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = patient(&world);
    let (payload, took) = woken(&world, &queue, "t", || drop(queue.push("t", "m")));
    assert_eq!(payload, "m");
    assert!(took < WOKEN, "{took:?}");
}

#[test]
fn a_push_of_the_same_process_wakes() {
    let world = World::new();
    let queue = patient(&world);
    for i in 0..5 {
        let (payload, took) = woken(&world, &queue, "t", || drop(queue.push_many("t", [format!("{i}")])));
        assert!(payload == format!("{i}") && took < WOKEN, "{took:?}");
    }
}

#[test]
fn a_push_of_another_process_wakes() {
    let world = World::new();
    let (waiting, other) = (patient(&world), patient(&world));
    for i in 0..5 {
        let (payload, took) = woken(&world, &waiting, "t", || {
            until_listening(&world, &mut world.client());
            other.push("t", format!("{i}")).unwrap();
        });
        assert!(payload == format!("{i}") && took < WOKEN, "{took:?}");
    }
}

#[test]
fn a_push_by_sql_wakes() {
    let world = World::new();
    let waiting = patient(&world);
    let mut client = world.client();
    for call in [
        "select pushpop.push('t', 'm')",
        "select pushpop.push_many('t', array[gen_random_uuid()], array['m'::bytea])",
    ] {
        let (payload, took) = woken(&world, &waiting, "t", || {
            until_listening(&world, &mut world.client());
            client.batch_execute(&world.sql(call)).unwrap();
        });
        assert!(payload == "m" && took < WOKEN, "{took:?}");
    }
}

#[test]
fn two_processes_that_wait_are_both_woken() {
    let world = World::new();
    let (one, two, other) = (patient(&world), patient(&world), patient(&world));
    let mut client = world.client();
    thread::scope(|scope| {
        let first = scope.spawn(|| pop_for(&one, "t"));
        until_wanted(&world, &mut client, "t");
        let second = scope.spawn(|| pop_for(&two, "t"));
        until("both listen", || {
            let sql =
                "select count(*) from pg_stat_activity where application_name = $1 and query ilike 'listen%'";
            client.query_one(sql, &[&world.schema]).unwrap().get::<_, i64>(0) == 2
        });
        // Known to wait: by one client or by several.
        thread::sleep(Duration::from_millis(300));
        let started = Instant::now();
        other.push_many("t", ["a", "b"]).unwrap();
        let got: HashSet<_> =
            [first, second].into_iter().map(|t| text(t.join().unwrap().payload())).collect();
        assert_eq!(got.len(), 2);
        assert!(started.elapsed() < WOKEN, "{:?}", started.elapsed());
    });
}

#[test]
fn a_delayed_message_wakes_when_it_is_due() {
    let world = World::new();
    let (waiting, other) = (patient(&world), patient(&world));
    let delay = Duration::from_secs(1);
    for pushes in [&waiting, &other] {
        let (payload, took) = woken(&world, &waiting, "t", || {
            until_listening(&world, &mut world.client());
            pushes.push("t", NewMessage::new("m").delay(delay)).unwrap();
        });
        assert_eq!(payload, "m");
        assert!(took >= delay && took < WOKEN, "{took:?}");
    }
    // Pushed before anybody waited.
    other.push("early", NewMessage::new("m").delay(delay)).unwrap();
    let started = Instant::now();
    pop_for(&waiting, "early").complete().unwrap();
    assert!(started.elapsed() < WOKEN, "{:?}", started.elapsed());
}

#[test]
fn an_earlier_message_is_not_hidden_by_a_later_one() {
    let world = World::new();
    let queue = patient(&world);
    queue.push("t", NewMessage::new("later").delay(Duration::from_secs(45))).unwrap();
    let (payload, took) = woken(&world, &queue, "t", || {
        queue.push("t", NewMessage::new("earlier").delay(Duration::from_millis(500))).unwrap();
    });
    assert!(payload == "earlier" && took < WOKEN, "{took:?}");
}

#[test]
fn what_is_given_back_wakes() {
    let world = World::new();
    let (waiting, other) = (patient(&world), patient(&world));
    type Give = fn(pushpop_pg::Lease);
    let gives: [(&str, Give); 4] = [
        ("release", |lease| lease.release().unwrap()),
        ("defer", |lease| lease.defer(Duration::from_millis(200)).unwrap()),
        ("fail", |lease| lease.fail("m").unwrap()),
        ("drop", drop),
    ];
    thread::scope(|scope| {
        for (verb, give) in gives {
            for (who, holder) in [("same", &waiting), ("other", &other)] {
                let (world, waiting) = (&world, &waiting);
                scope.spawn(move || {
                    let topic = format!("{verb} {who}");
                    holder.push(&topic, "m").unwrap();
                    // Only one that is dropped comes back by the end of its lease.
                    let lease = Duration::from_secs(if verb == "drop" { 2 } else { 3600 });
                    let lease = pop(&holder.with_lease(lease), &topic);
                    let (_, took) = woken(world, waiting, &topic, || give(lease));
                    assert!(took < WOKEN, "{topic}: {took:?}");
                });
            }
        }
    });
}

#[test]
fn an_expired_lease_wakes() {
    let world = World::new();
    let queue = patient(&world);
    queue.push("t", "m").unwrap();
    let lease = pop(&queue.with_lease(Duration::from_secs(1)), "t");
    let started = Instant::now();
    assert_eq!(pop_for(&queue, "t").id(), lease.id());
    assert!(started.elapsed() < WOKEN, "{:?}", started.elapsed());
}

#[test]
fn a_waiting_batch_returns_with_the_first() {
    let world = World::new();
    let queue = patient(&world);
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop_many("t", 10, SOON * 3).unwrap());
        until_wanted(&world, &mut client, "t");
        let started = Instant::now();
        queue.push("t", "m").unwrap();
        assert_eq!(waiting.join().unwrap().len(), 1);
        assert!(started.elapsed() < WOKEN);
    });
}

fn count(client: &mut Client, world: &World, filter: &str) -> i64 {
    let sql = format!("select count(*) from pg_stat_activity where application_name = $1 and {filter}");
    client.query_one(&sql, &[&world.schema]).unwrap().get(0)
}

#[test]
fn many_waiting_threads_cost_one_listener_and_few_connections() {
    let world = World::new();
    let queue = patient(&world);
    let mut client = world.client();
    let n = 64;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..n)
            .map(|i| {
                scope.spawn({
                    let queue = &queue;
                    // All on some topics, each on its own, and with leases of several lengths.
                    move || {
                        text(
                            pop_for(
                                &queue.with_lease(Duration::from_secs(60 + i % 3)),
                                &format!("t{}", i % 16),
                            )
                            .payload(),
                        )
                    }
                })
            })
            .collect();
        for i in 0..16 {
            until_wanted(&world, &mut client, &format!("t{i}"));
        }
        until_listening(&world, &mut client);
        // Once all have looked for themselves, nothing is sent any more.
        let mut queries = || {
            let sql = "select max(query_start)::text from pg_stat_activity where application_name = $1";
            client.query_one(sql, &[&world.schema]).unwrap().get::<_, Option<String>>(0)
        };
        let mut seen = HashSet::new();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(100));
            seen.insert(queries());
        }
        assert!(seen.len() <= 6, "queries were sent at {} of 20 looks", seen.len());
        assert_eq!(count(&mut client, &world, "query ilike 'listen%'"), 1);
        let all = count(&mut client, &world, "true");
        assert!(all <= 5, "{all} connections");

        for i in 0..n {
            queue.push(&format!("t{}", i % 16), format!("{i}")).unwrap();
        }
        let got: HashSet<String> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(got.len(), usize::try_from(n).unwrap());
    });
}

#[test]
fn behind_a_pooler_waiting_pops_poll() {
    let world = World::new();
    let open = || {
        let mut config = world.config();
        config.application_name(&world.schema);
        world.builder().pooler(true).poll_interval(Duration::from_millis(100)).connect_with(config).unwrap()
    };
    let (waiting, other) = (open(), open());
    let (payload, took) = woken(&world, &waiting, "t", || drop(other.push("t", "m")));
    assert!(payload == "m" && took < WOKEN, "{took:?}");
    let mut client = world.client();
    assert_eq!(count(&mut client, &world, "query ilike 'listen%'"), 0, "no LISTEN");
    let prepared: i64 = waiting
        .transaction(|tx| Ok(tx.query_one("select count(*) from pg_prepared_statements where name !~ '^s[0-9]+$' or statement ~ 'pop\\('", &[])?.get(0)))
        .unwrap();
    assert_eq!(prepared, 0, "no named statements");
    // The rest works as well.
    other.push_many("t", ["a", "b", "c"]).unwrap();
    pop(&waiting, "t").complete().unwrap();
    pop(&waiting, "t").fail("m").unwrap();
    let mut lease = pop(&waiting, "t");
    lease.extend(SOON).unwrap();
    lease.release().unwrap();
    assert_eq!(stats(&waiting, "t").settled(), 1);
}

/// What a queue does itself it need not be told of.
#[test]
fn behind_a_pooler_a_queue_knows_what_it_has_done_itself() {
    let world = World::new();
    let mut config = world.config();
    config.application_name(&world.schema);
    let queue = world.builder().pooler(true).poll_interval(SOON * 4).connect_with(config).unwrap();
    let second = Duration::from_secs(1);
    type Push = fn(NewMessage) -> NewMessage;
    let pushes: [(&str, Push); 3] = [
        ("now", |message| message),
        ("delayed", |message| message.delay(Duration::from_secs(1))),
        ("at a time", |message| message.ready_at(time::OffsetDateTime::now_utc() + Duration::from_secs(1))),
    ];
    for (how, due) in pushes {
        let (payload, took) = woken(&world, &queue, "t", || {
            queue.push("t", due(NewMessage::new(how))).unwrap();
        });
        assert!(payload == how && took < WOKEN, "{how}: {took:?}");
    }
    for how in ["release", "defer", "fail"] {
        let topic = format!("t {how}");
        queue.push(&topic, how).unwrap();
        let lease = pop(&queue, &topic);
        let (payload, took) = woken(&world, &queue, &topic, || match how {
            "release" => lease.release().unwrap(),
            "defer" => lease.defer(second).unwrap(),
            _ => lease.fail("why").unwrap(),
        });
        assert!(payload == how && took < WOKEN, "{how}: {took:?}");
    }
}

/// Notifications that were lost cost a poll interval: nobody notifies here, as the row that says that
/// somebody waits is held.
#[test]
fn polling_finds_what_no_notification_told() {
    let world = World::new();
    let queue = world.open(world.builder().poll_interval(Duration::from_millis(200)));
    let (sent, popped) = mpsc::channel();
    let mut client = world.client();
    thread::scope(|scope| {
        scope.spawn(|| sent.send(text(pop_for(&queue, "t").payload())).unwrap());
        until_wanted(&world, &mut client, "t");
        // A sender that is the waiter notifies nobody; this client is another.
        let sql = world.sql(
            "select pushpop.push('t', 'm', sender => t.wanted_by) from pushpop.topics t where topic = 't'",
        );
        client.batch_execute(&sql).unwrap();
        assert_eq!(popped.recv_timeout(SOON).unwrap(), "m");
    });
}

/// Upkeep by another client has the topic's row just when somebody begins to wait: the server does not know of
/// him then.
#[test]
fn a_waiter_who_could_not_be_noted_at_first_is_noted_soon() {
    let world = World::new();
    let queue = world.open(world.builder().poll_interval(SOON * 2));
    let other = world.queue();
    let (mut client, mut holder) = (world.client(), world.client());
    other.push("t", "first").unwrap();
    pop(&other, "t").complete().unwrap();
    thread::scope(|scope| {
        let mut tx = holder.transaction().unwrap();
        tx.execute(&world.sql("select from pushpop.topics for update"), &[]).unwrap();
        let waiting = scope.spawn(|| pop(&queue, "t").complete().unwrap());
        until_listening(&world, &mut client);
        thread::sleep(Duration::from_millis(200));
        tx.rollback().unwrap();
        until_wanted(&world, &mut client, "t");
        other.push("t", "second").unwrap();
        waiting.join().unwrap();
    });
}

/// Whoever looks for himself once a minute used to be forgotten after half of one.
#[test]
fn a_waiter_is_known_until_he_looks_again() {
    let world = World::new();
    let waiting = patient(&world);
    let mut client = world.client();
    let known_for = |client: &mut Client, ask: &str| -> f64 {
        client.batch_execute(&world.sql(ask)).unwrap();
        let sql = "select extract(epoch from wanted_until - clock_timestamp())::float8 from pushpop.topics where topic = 't'";
        client.query_one(&world.sql(sql), &[]).unwrap().get(0)
    };
    thread::scope(|scope| {
        let popped = scope.spawn(|| pop_for(&waiting, "t").complete().unwrap());
        until_wanted(&world, &mut client, "t");
        let others = "select from pushpop.wait_for('t', gen_random_uuid())";
        for ask in ["", others, others] {
            let seconds = known_for(&mut client, ask);
            assert!((60.0..=90.0).contains(&seconds), "{seconds} s");
        }
        // The clock went back since.
        let seconds = known_for(
            &mut client,
            "update pushpop.topics set wanted_until = wanted_until + '1 day'; select from pushpop.wait_for('t')",
        );
        assert!((16.0..=31.0).contains(&seconds), "{seconds} s");
        client.batch_execute(&world.sql("select from pushpop.push('t', 'm')")).unwrap();
        popped.join().unwrap();
    });
}

/// The words in which a server refuses whatever notifies.
const FULL: &str = "too many notifications in the NOTIFY queue";

/// It is known at the commit only, where no function can help it.
#[test]
fn a_call_that_cannot_notify_goes_without() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    queue.push_many("t", ["released", "rescheduled"]).unwrap();
    let lease = pop(&queue, "t");
    let refuse = format!(
        "create function pushpop.refuse_it() returns trigger language plpgsql as $$
         begin
           if coalesce(current_setting('pushpop_pg.notify', true), '') <> 'off' then
             raise exception '{FULL}' using errcode = '54000';
           end if;
           return null;
         end $$;
         create constraint trigger refuse after insert or update on pushpop.messages
         deferrable initially deferred for each row execute function pushpop.refuse_it()"
    );
    client.batch_execute(&world.sql(&refuse)).unwrap();
    let pushed = queue.push("t", "pushed").unwrap();
    queue.push_many("t", ["one", "two"]).unwrap();
    assert!(!queue.push_once("t", NewMessage::new("again").with_id(pushed)).unwrap());
    lease.release().unwrap();
    assert!(queue.topic("t").reschedule(pushed, Duration::ZERO).unwrap());
    let lease = pop(&queue, "t");
    lease.fail("why").unwrap();

    // A transaction is for its owner to repeat.
    let tried = queue.transaction(|tx| queue.push_in(tx, "t", "in vain")).unwrap_err();
    assert_eq!((tried.sqlstate(), tried.kind()), (Some("54000"), ErrorKind::Database));
    assert!(tried.is_retryable() && !tried.is_indeterminate(), "{tried:?}");
    let without = "set local pushpop_pg.notify = off";
    queue
        .transaction(|tx| {
            tx.batch_execute(without)?;
            queue.push_in(tx, "t", "without")
        })
        .unwrap();
    // Other limits of the server's are no reason to try again.
    client.batch_execute(&world.sql("drop trigger refuse on pushpop.messages")).unwrap();
    let other = Error::from(
        client.batch_execute("do $$ begin raise '' using errcode = '54000'; end $$").unwrap_err(),
    );
    assert!(!other.is_retryable(), "{other:?}");
    assert_eq!(drain(&queue, "t").len(), 5);
    // What is off is off for one transaction.
    let setting = |tx: &mut postgres::Transaction<'_>| {
        let sql = "select coalesce(current_setting('pushpop_pg.notify', true), '')";
        Ok(tx.query_one(sql, &[])?.get::<_, String>(0))
    };
    assert_eq!(queue.transaction(setting).unwrap(), "");
}

/// One session that listens and leaves a transaction open is enough. Before PostgreSQL 17 that takes 8 GB.
#[test]
fn nobody_fails_for_a_full_queue_of_notifications() {
    let version: i32 = {
        let sql = "select current_setting('server_version_num')::int";
        World::new().client().query_one(sql, &[]).unwrap().get(0)
    };
    if version < 170_000 {
        return;
    }
    let server = Server::with(&[("max_notify_queue_pages", "64")]).unwrap();
    let world = World::on(&server.url());
    let queue = world.queue();
    let mut culprit = world.client();
    culprit.batch_execute("listen x").unwrap();
    culprit.batch_execute("begin; select 1").unwrap();
    let mut client = world.client();
    let flood = "select pg_notify('x', i || repeat('x', 4000)) from generate_series(1, 10) i";
    until("the queue is full", || client.batch_execute(flood).is_err());
    let refused = client.batch_execute("notify y").unwrap_err();
    assert!(Error::from(refused).is_retryable(), "by its codes");

    thread::scope(|scope| {
        let popped = scope.spawn(|| pop_for(&queue, "other").complete().unwrap());
        until_wanted(&world, &mut client, "other");
        let push = world.sql("select pushpop.push($1, $2)");
        client.execute(&push, &[&"other", &&b"by sql"[..]]).unwrap();
        popped.join().unwrap();
    });
    queue.push("t", "pushed").unwrap();
    queue.transaction(|tx| queue.push_in(tx, "t", "in a transaction")).unwrap();
    pop(&queue, "t").release().unwrap();
    queue.topic("t").pause().unwrap();
    queue.topic("t").resume().unwrap();
    assert_eq!(drain(&queue, "t"), ["pushed", "in a transaction"]);

    culprit.batch_execute("rollback").unwrap();
    until("the queue is read", || {
        client.query_one("select pg_notification_queue_usage()", &[]).unwrap().get::<_, f64>(0) < 0.5
    });
}

/// Each topic used to cost a query of its own.
#[test]
fn all_that_wait_cost_one_look_a_poll_interval() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let counted = "create sequence pushpop.looks;
        alter function pushpop.wait_for_any(text[], uuid, double precision) rename to looked;
        create function pushpop.wait_for_any(topics text[], waiter uuid, within double precision)
        returns table (place integer, ready boolean, due_in double precision, noted boolean)
        language plpgsql as $$
        begin
          perform nextval('pushpop.looks');
          return query select l.* from pushpop.looked(topics, waiter, within) l;
        end $$";
    client.batch_execute(&world.sql(counted)).unwrap();
    let many: Vec<String> = (0..700).map(|i| format!("group {i}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    thread::scope(|scope| {
        for i in 0..40 {
            let queue = &queue;
            scope.spawn(move || queue.pop(&format!("own {i}")).unwrap_err());
        }
        scope.spawn(|| queue.pop_any(&many, Duration::MAX).unwrap_err());
        let wanted = world.sql("select count(*) from pushpop.topics where wanted_until > clock_timestamp()");
        until("all are known", || client.query_one(&wanted, &[]).unwrap().get::<_, i64>(0) == 740);
        thread::sleep(Duration::from_secs(2));
        let mut looks = || -> i64 {
            client.query_one(&world.sql("select last_value from pushpop.looks"), &[]).unwrap().get(0)
        };
        let (before, begun) = (looks(), Instant::now());
        thread::sleep(Duration::from_secs(5));
        let (looks, seconds) = (looks() - before, begun.elapsed().as_secs_f64());
        assert!(looks >= 1, "nobody looked");
        assert!((looks as f64) <= seconds * 2.0 + 2.0, "{looks} looks in {seconds:.1} s");
        queue.close();
    });
}

/// Should the watermark ever be wrong, also those find the message that do nothing but wait.
#[test]
fn whoever_only_waits_looks_at_everything_once_a_minute() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    queue.push("t", "m").unwrap();
    let mut ready = |swept: &str| -> bool {
        let hide = format!(
            "insert into pushpop.topics as t (topic, low, swept_at) values ('t', clock_timestamp() + '1 hour', clock_timestamp() - interval '{swept}')
             on conflict (topic) do update set low = excluded.low, swept_at = excluded.swept_at, wanted_until = '-infinity'"
        );
        client.batch_execute(&world.sql(&hide)).unwrap();
        client.query_one(&world.sql("select ready from pushpop.wait_for('t')"), &[]).unwrap().get(0)
    };
    assert!(!ready("10 seconds"), "it is hidden");
    assert!(ready("70 seconds"));
}
