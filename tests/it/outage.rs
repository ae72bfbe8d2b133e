//! The server dies, stops, freezes; connections break.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use pushpop_pg::{ErrorKind, Job, NewMessage, Queue, Worker};
use pushpop_server::Server;

use crate::world::{
    SOON, World, drain, has_connection, pop, stats, text, until, until_listening, until_wanted,
};

/// What a call may need beyond its time-out on a busy machine.
const ALLOWANCE: Duration = Duration::from_secs(5);

fn own() -> Server {
    Server::with(&[]).unwrap()
}

#[test]
fn smoke() {
    let mut server = own();
    let world = World::on(&server.url());
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    server.kill().unwrap();
    server.start_again().unwrap();
    until("the message is back", || queue.try_pop("t").is_ok_and(|lease| lease.is_some()));
}

/// Waits in a pop while something happens to the server, then pushes.
fn rides_through(mut server: Server, what: impl FnOnce(&mut Server)) {
    let world = World::on(&server.url());
    let queue = world.queue();
    let (sent, popped) = mpsc::channel();
    let mut client = world.client();
    thread::scope(|scope| {
        let queue = &queue;
        let by_pop = sent.clone();
        scope.spawn(move || by_pop.send(queue.pop("t").map(|l| text(l.payload()))).unwrap());
        scope.spawn(move || sent.send(queue.iter("t").next().unwrap().map(|l| text(l.payload()))).unwrap());
        until_wanted(&world, &mut client, "t");
        drop(client);
        what(&mut server);
        until("pushes succeed again", || queue.push("t", "m").is_ok());
        queue.push("t", "m").unwrap();
        for _ in 0..2 {
            assert_eq!(popped.recv_timeout(SOON * 2).unwrap().unwrap(), "m");
        }
    });
}

#[test]
fn pops_ride_through_a_crash_of_the_server() {
    rides_through(own(), |server| {
        server.kill().unwrap();
        thread::sleep(Duration::from_millis(500));
        server.start_again().unwrap();
    });
}

#[test]
fn pops_ride_through_a_restart_of_the_server() {
    rides_through(own(), |server| {
        server.stop().unwrap();
        thread::sleep(Duration::from_millis(500));
        server.start_again().unwrap();
    });
}

/// Workers while something happens to the server: handlers that outlast their leases, and short ones whose settles travel
/// with the next pop.
fn workers_ride_through(mut server: Server, what: impl FnOnce(&mut Server)) {
    let world = World::on(&server.url());
    let lease = Duration::from_secs(6);
    let builder = || world.builder().operation_timeout(Duration::from_secs(2)).lease(lease);
    let (queue, producer) = (world.open(builder()), world.open(builder()));
    let runs = Mutex::new(Vec::new());
    let worker = Worker::new(&queue)
        .handle("long", 2, |job: &Job| {
            runs.lock().unwrap().push(job.id());
            thread::sleep(lease * 3 / 2);
            Ok(())
        })
        .handle("short", 4, |job: &Job| {
            runs.lock().unwrap().push(job.id());
            thread::sleep(Duration::from_millis(20));
            Ok(())
        });
    let long = producer.push_many("long", ["1", "2"]).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stopper = worker.stopper();
        let ended = scope.spawn(|| worker.run());
        let pushes = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                let message = NewMessage::new("m");
                until("it is pushed", || producer.push("short", message.clone()).is_ok());
                count += 1;
                thread::sleep(Duration::from_millis(10));
            }
            count
        });
        until("all of them work", || runs.lock().unwrap().len() > 20);
        let begun = Instant::now();
        what(&mut server);
        until("the server is back", || producer.push("other", "m").is_ok());
        let away = begun.elapsed();
        let before = runs.lock().unwrap().len();
        until("all of them work again", || runs.lock().unwrap().len() > before + 20);
        done.store(true, Ordering::Relaxed);
        let pushed: u64 = pushes.join().unwrap();
        let settled = |topic, count| producer.topic(topic).stats().is_ok_and(|s| s.settled() >= count);
        until("all are completed", || settled("long", 2) && settled("short", pushed));
        stopper.stop();
        assert_eq!(ended.join().unwrap().unwrap().unfinished(), 0);
        let short = stats(&producer, "short");
        assert_eq!((short.settled(), short.ready(), short.leased(), short.dead()), (pushed, 0, 0, 0));
        // Two thirds of a lease are left when an extension is due.
        if away < lease / 2 {
            let runs = runs.lock().unwrap();
            for id in long {
                assert_eq!(runs.iter().filter(|run| **run == id).count(), 1, "its lease was extended");
            }
        }
    });
}

#[test]
fn workers_ride_through_a_crash_of_the_server() {
    workers_ride_through(own(), |server| {
        server.kill().unwrap();
        thread::sleep(Duration::from_millis(2_100));
        server.start_again().unwrap();
    });
}

#[test]
fn workers_ride_through_a_frozen_server() {
    workers_ride_through(own(), |server| {
        server.pause().unwrap();
        thread::sleep(Duration::from_millis(2_500));
        server.resume().unwrap();
    });
}

#[test]
fn calls_fail_honestly_while_the_server_is_down() {
    let mut server = own();
    let world = World::on(&server.url());
    let timeout = Duration::from_secs(3);
    let queue =
        world.open(world.builder().operation_timeout(timeout).connect_timeout(Duration::from_secs(1)));
    queue.push_many("t", ["a", "b"]).unwrap();
    let lease = pop(&queue, "t");
    server.stop().unwrap();

    let started = Instant::now();
    let push = queue.push("t", "m").unwrap_err();
    let pop_error = queue.try_pop("t").map(drop).unwrap_err();
    let (lease, settle) = lease.complete().unwrap_err().into_parts();
    let find = queue.find("t", lease.id()).map(drop).unwrap_err();
    let tx = queue.transaction(|_| Ok(())).unwrap_err();
    for error in [&push, &pop_error, &settle, &find, &tx] {
        assert!(matches!(error.kind(), ErrorKind::Connection | ErrorKind::Timeout), "{error:?}");
        assert!(error.is_retryable(), "{error:?}");
    }
    assert!(started.elapsed() < timeout * 5 + ALLOWANCE, "{:?}", started.elapsed());
    // Nothing listens: nothing can have been sent.
    let again = queue.push("t", "m").unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Connection);
    assert!(!again.is_indeterminate(), "{again:?}");
    assert!(std::error::Error::source(&again).is_some());

    // With a time-out a pop rides through until then, and returns the error.
    let started = Instant::now();
    let error = queue.pop_timeout("t", Duration::from_secs(1)).map(drop).unwrap_err();
    assert!(started.elapsed() >= Duration::from_secs(1) && started.elapsed() < timeout + ALLOWANCE);
    assert!(error.is_retryable(), "{error:?}");

    server.start_again().unwrap();
    until("the queue works again", || queue.push("t", "after").is_ok());
    lease.complete().unwrap();
    let left: HashSet<String> = drain(&queue, "t").into_iter().collect();
    assert_eq!(left, ["b", "after"].map(str::to_owned).into());
}

/// Pushes with their own ids, repeated until they are acknowledged, through crashes.
#[test]
fn every_acknowledged_push_is_delivered_once_though_the_server_crashes() {
    let mut server = own();
    let world = World::on(&server.url());
    let queue = world.queue();
    let stop = AtomicBool::new(false);
    let pushed: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|t| {
                let (queue, stop) = (&queue, &stop);
                scope.spawn(move || {
                    let mut done = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let payload = format!("{t}-{}", done.len());
                        let message = NewMessage::new(payload.as_str());
                        let deadline = Instant::now() + SOON * 2;
                        while let Err(e) = queue.push("t", message.clone()) {
                            assert!(e.is_retryable() && Instant::now() < deadline, "{e:?}");
                            thread::sleep(Duration::from_millis(20));
                        }
                        done.push(payload);
                    }
                    done
                })
            })
            .collect();
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(400));
            server.kill().unwrap();
            server.start_again().unwrap();
        }
        thread::sleep(Duration::from_millis(400));
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    let delivered = drain(&queue, "t");
    let unique: HashSet<&String> = delivered.iter().collect();
    assert_eq!(unique.len(), delivered.len(), "none twice");
    assert_eq!(unique, pushed.iter().collect());
}

/// A stopped process acknowledges TCP: no keepalive and no statement time-out ends the wait.
#[test]
fn every_call_returns_in_time_while_the_server_is_frozen() {
    let server = own();
    let world = World::on(&server.url());
    let timeout = Duration::from_secs(1);
    let queue = world.open(world.builder().operation_timeout(timeout).connect_timeout(timeout).pool_size(3));
    queue.push_many("t", (0..10).map(|i| format!("{i}"))).unwrap();
    let mut leases = queue.pop_many("t", 4, SOON).unwrap();
    let id = leases[0].id();
    server.pause().unwrap();

    type Call<'a> = Box<dyn FnOnce() -> Result<(), pushpop_pg::Error> + Send + 'a>;
    let q = &queue;
    let mut extended = leases.remove(0);
    let (one, two, three) = (leases.remove(0), leases.remove(0), leases.remove(0));
    let calls: Vec<(&str, Call<'_>)> = vec![
        ("push", Box::new(move || q.push("t", "m").map(drop))),
        ("push_many", Box::new(move || q.push_many("u", ["m", "n"]).map(drop))),
        ("push_once", Box::new(move || q.push_once("v", "m").map(drop))),
        ("try_pop", Box::new(move || q.try_pop("t").map(drop))),
        ("complete", Box::new(move || one.complete().map_err(Into::into))),
        ("fail", Box::new(move || two.fail("m").map_err(Into::into))),
        ("complete_many", Box::new(move || q.complete_many(vec![three]).map(drop).map_err(Into::into))),
        ("extend", Box::new(move || extended.extend(SOON))),
        ("find", Box::new(move || q.find("t", id).map(drop))),
        ("stats", Box::new(move || q.topic("t").stats().map(drop))),
        ("topics", Box::new(move || q.topics().map(drop))),
        ("peek", Box::new(move || q.topic("t").peek(5).map(drop))),
        ("purge", Box::new(move || q.topic("none").purge().map(drop))),
    ];
    thread::scope(|scope| {
        let running: Vec<_> = calls
            .into_iter()
            .map(|(name, call)| {
                scope.spawn(move || {
                    let started = Instant::now();
                    (name, call(), started.elapsed())
                })
            })
            .collect();
        for call in running {
            let (name, result, took) = call.join().unwrap();
            let error = result.expect_err(name);
            assert!(matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Connection), "{name}: {error:?}");
            assert!(error.is_retryable(), "{name}: {error:?}");
            assert!(took < timeout + ALLOWANCE, "{name} took {took:?}");
        }
    });
    let started = Instant::now();
    let _ = queue.pop_timeout("t", timeout);
    assert!(started.elapsed() < timeout + ALLOWANCE, "{:?}", started.elapsed());
    let started = Instant::now();
    queue.close();
    assert!(started.elapsed() < ALLOWANCE);

    server.resume().unwrap();
    let after = world.queue();
    until("the queue works again", || after.push("t", "after").is_ok());
    assert!(drain(&after, "t").contains(&"after".to_owned()));
}

#[test]
fn a_queue_works_again_after_the_server_was_frozen() {
    let server = own();
    let world = World::on(&server.url());
    let timeout = Duration::from_millis(500);
    let queue = world.open(world.builder().operation_timeout(timeout).connect_timeout(timeout).pool_size(1));
    queue.push("t", "before").unwrap();
    server.pause().unwrap();
    // More than there are connections, and often enough to use up places for those that hang.
    let repeated = NewMessage::new("repeated");
    for _ in 0..4 {
        let error = queue.push("t", repeated.clone()).unwrap_err();
        assert!(error.is_retryable(), "{error:?}");
    }
    server.resume().unwrap();
    until("pushes succeed", || queue.push("t", repeated.clone()).is_ok());
    assert_eq!(drain(&queue, "t"), ["before", "repeated"]);
}

#[test]
fn a_pop_rides_through_a_frozen_server() {
    let server = own();
    let world = World::on(&server.url());
    let timeout = Duration::from_millis(500);
    let queue = world.open(world.builder().operation_timeout(timeout).connect_timeout(timeout));
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop("t"));
        until_wanted(&world, &mut client, "t");
        server.pause().unwrap();
        thread::sleep(timeout * 5);
        server.resume().unwrap();
        until("pushes succeed", || queue.push("t", "m").is_ok());
        assert_eq!(waiting.join().unwrap().unwrap().payload(), b"m");
    });
}

#[test]
fn dropping_a_queue_does_not_wait_for_a_frozen_server() {
    let server = own();
    let world = World::on(&server.url());
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    server.pause().unwrap();
    let started = Instant::now();
    drop(lease);
    drop(queue);
    assert!(started.elapsed() < ALLOWANCE, "{:?}", started.elapsed());
    server.resume().unwrap();
}

#[test]
fn connecting_to_a_frozen_server_ends_in_time() {
    let server = own();
    server.pause().unwrap();
    let timeout = Duration::from_millis(500);
    let started = Instant::now();
    let error = Queue::builder()
        .connect_timeout(timeout)
        .operation_timeout(timeout)
        .connect(&server.url())
        .map(drop)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
    assert!(started.elapsed() < timeout * 5 + ALLOWANCE, "{:?}", started.elapsed());
    server.resume().unwrap();
}

// Broken connections, on the shared server.

fn terminate(world: &World, filter: &str) -> u64 {
    let sql = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1 and {filter}"
    );
    world.client().execute(&sql, &[&world.schema]).unwrap()
}

#[test]
fn terminated_backends_go_unnoticed() {
    let world = World::new();
    let queue = world.queue();
    let mut kills = 0;
    for round in 0..5 {
        queue.push("t", format!("{round}")).unwrap();
        kills += terminate(&world, "true");
        queue.push_many("t", [format!("{round}a"), format!("{round}b")]).unwrap();
        kills += terminate(&world, "true");
        let lease = queue.try_pop("t").unwrap().unwrap();
        kills += terminate(&world, "true");
        lease.complete().unwrap();
        kills += terminate(&world, "true");
        let leases = queue.pop_many("t", 2, Duration::ZERO).unwrap();
        assert_eq!(leases.len(), 2);
        kills += terminate(&world, "true");
        assert!(queue.complete_many(leases).unwrap().is_empty());
        kills += terminate(&world, "true");
        assert_eq!(stats(&queue, "t").ready(), 0);
        kills += terminate(&world, "true");
    }
    assert!(kills >= 20, "{kills}");
}

/// As long as nothing of the caller's has run, a connection that broke while it was idle can be
/// replaced.
#[test]
fn a_transaction_begins_on_a_live_connection() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    for _ in 0..3 {
        queue.push("t", "m").unwrap();
        assert!(terminate(&world, "true") >= 1);
        queue.transaction(|tx| Ok(tx.batch_execute("select 1")?)).unwrap();
    }
}

#[test]
fn many_threads_do_not_notice_terminated_backends() {
    let world = World::new();
    let queue = world.queue();
    let stop = AtomicBool::new(false);
    let n: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|t| {
                let (queue, stop) = (&queue, &stop);
                scope.spawn(move || {
                    let mut n = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let message = NewMessage::new(format!("{t}-{n}"));
                        while let Err(e) = queue.push("t", message.clone()) {
                            // Only when the second connection was cut, too.
                            assert!(e.kind() == ErrorKind::Connection && e.is_retryable(), "{e:?}");
                        }
                        n += 1;
                    }
                    n
                })
            })
            .collect();
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(50));
            terminate(&world, "true");
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    let all: HashSet<String> = drain(&queue, "t").into_iter().collect();
    assert_eq!(all.len(), n);
}

#[test]
fn a_listener_that_was_cut_off_listens_again() {
    let world = World::new();
    let waiting = world.open(world.builder().poll_interval(Duration::from_secs(60)));
    let other = world.queue();
    let mut client = world.client();
    for round in 0..2 {
        thread::scope(|scope| {
            let popped = scope.spawn(|| waiting.pop_timeout("t", SOON * 3).unwrap().unwrap());
            until_wanted(&world, &mut client, "t");
            until_listening(&world, &mut client);
            assert!(terminate(&world, "query ilike 'listen%'") >= 1);
            until_listening(&world, &mut client);
            let started = Instant::now();
            other.push("t", format!("{round}")).unwrap();
            assert_eq!(text(popped.join().unwrap().payload()), format!("{round}"));
            assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
        });
    }
}

/// What was pushed while nobody listened is found when somebody does again.
#[test]
fn a_push_while_the_listener_is_away_is_found() {
    let world = World::new();
    let waiting = world.open(world.builder().poll_interval(Duration::from_secs(60)));
    let other = world.queue();
    let mut client = world.client();
    thread::scope(|scope| {
        let popped = scope.spawn(|| waiting.pop_timeout("t", SOON * 3).unwrap().unwrap());
        until_wanted(&world, &mut client, "t");
        until_listening(&world, &mut client);
        let started = Instant::now();
        terminate(&world, "query ilike 'listen%'");
        other.push("t", "m").unwrap();
        assert_eq!(text(popped.join().unwrap().payload()), "m");
        assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    });
}

/// The child's log is the whole process's, with all threads of its queue.
#[test]
fn an_outage_is_logged_once_and_waited_out_with_patience() {
    const CHILD: &str = "PUSHPOP_TEST_LOGS_AN_OUTAGE";
    if std::env::var_os(CHILD).is_some() {
        return outage_of_a_worker();
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "outage::an_outage_is_logged_once_and_waited_out_with_patience", "--nocapture"])
        .env(CHILD, "yes")
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    let times = |words: &str| log.matches(words).count();
    assert_eq!((times("lost the server"), times("the server is back")), (1, 1), "{log}");
    assert_eq!(times("leases were not extended in time"), 0, "{log}");
    // Two seconds and more, with pauses that double.
    for words in ["cannot listen", "leases were not extended, trying again"] {
        assert!((1..=30).contains(&times(words)), "{words}: {}\n{log}", times(words));
    }
}

fn outage_of_a_worker() {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let mut server = own();
    let queue = Queue::builder().lease(Duration::from_secs(3)).connect(&server.url()).unwrap();
    let (over, begun) = (AtomicBool::new(false), AtomicBool::new(false));
    let worker = Worker::new(&queue).handle("t", 1, |_| {
        begun.store(true, Ordering::Relaxed);
        until("the outage is over", || over.load(Ordering::Relaxed));
        Ok(())
    });
    thread::scope(|scope| {
        scope.spawn(|| worker.run().unwrap());
        let waiting = scope.spawn(|| pop(&queue, "u"));
        queue.push("t", "m").unwrap();
        until("its handler runs", || begun.load(Ordering::Relaxed));
        server.stop().unwrap();
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(3) {
            queue.push("u", "m").unwrap_err();
            thread::sleep(Duration::from_millis(300));
        }
        server.start_again().unwrap();
        until("pushes succeed again", || queue.push("u", "m").is_ok());
        waiting.join().unwrap().complete().unwrap();
        over.store(true, Ordering::Relaxed);
        worker.stopper().stop();
    });
}

/// In a transaction of the caller's, the break is the caller's to know.
#[test]
fn a_transaction_whose_connection_breaks_is_an_error() {
    let world = World::new();
    let queue = world.queue();
    let error = queue
        .transaction(|tx| {
            queue.push_in(tx, "t", "m")?;
            let pid: i32 = tx.query_one("select pg_backend_pid()", &[])?.get(0);
            world.client().execute("select pg_terminate_backend($1::int)", &[&pid]).unwrap();
            Ok(())
        })
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
    assert!(error.is_retryable());
    assert!(queue.try_pop("t").unwrap().is_none());
    assert_eq!(queue.transaction(|_| Ok(7)).unwrap(), 7);
}

/// The schema is gone: waiting does not mend that.
#[test]
fn a_schema_that_is_gone_is_an_error_at_once() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop("t"));
        until_wanted(&world, &mut client, "t");
        world.drop_schema(&mut client);
        let error = waiting.join().unwrap().map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
    });
    let error = queue.push("t", "m").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "{error:?}");
    assert!(!error.is_retryable());
}

/// Its kernel goes on acknowledging: without a time-out of the server's own, the session and all that comes after its last
/// notification stay for as long as it is stopped.
#[test]
fn a_client_that_is_stopped_is_let_go_of() {
    const CHILD: &str = "PUSHPOP_TEST_IS_STOPPED";
    if let Ok(schema) = std::env::var(CHILD) {
        let url = std::env::var("PUSHPOP_TEST_STOPPED_URL").unwrap();
        let builder = Queue::builder().schema(&schema).application_name(&schema);
        let queue = builder.operation_timeout(Duration::from_secs(2)).connect(&url).unwrap();
        return drop(queue.pop_timeout("t", SOON * 4));
    }
    let server = own();
    let world = World::on(&server.url());
    let mut client = world.client();
    world.queue();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "outage::a_client_that_is_stopped_is_let_go_of"])
        .env(CHILD, &world.schema)
        .env("PUSHPOP_TEST_STOPPED_URL", server.url())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until_listening(&world, &mut client);
    let signal = |name: &str| {
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    };
    signal("STOP");
    let flood = "select pg_notify($1, i || repeat('x', 4000)) from generate_series(1, 5000) i";
    until("nothing more is taken", || {
        client.execute(flood, &[&world.schema]).unwrap();
        has_connection(&world, &mut client, "wait_event = 'ClientWrite'")
    });
    until("it is let go of", || !has_connection(&world, &mut client, "wait_event = 'ClientWrite'"));
    assert!(server.log().contains("could not send data to client: Connection timed out"), "{}", server.log());
    signal("KILL");
    child.wait().unwrap();
}

/// Two servers that change their roles, as after a failover that closes no connection.
struct Pair {
    servers: [Server; 2],
    world: World,
}

impl Pair {
    /// The first may be written to.
    fn new() -> Pair {
        let servers = [own(), own()];
        let world = World::on(&servers[0].url());
        // Each has the schema.
        servers.iter().for_each(|server| drop(world.builder().connect(&server.url()).unwrap()));
        let pair = Pair { servers, world };
        pair.only_reads(1, true);
        pair
    }

    /// A queue on whichever server may be written to.
    fn queue(&self, builder: pushpop_pg::Builder) -> Queue {
        let ports = self.servers.each_ref().map(Server::port);
        let url = format!(
            "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
            ports[0], ports[1]
        );
        builder.connect(&url).unwrap()
    }

    fn client(&self, i: usize) -> Client {
        Client::connect(&self.servers[i].url(), NoTls).unwrap()
    }

    fn only_reads(&self, i: usize, yes: bool) {
        let mut client = self.client(i);
        client.batch_execute(&format!("alter system set default_transaction_read_only = {yes}")).unwrap();
        client.batch_execute("select pg_reload_conf()").unwrap();
        until("the server has its other role", || {
            let row = self.client(i).query_one("select current_setting('transaction_read_only')::bool", &[]);
            row.unwrap().get::<_, bool>(0) == yes
        });
    }

    fn swap(&self) {
        self.only_reads(1, false);
        self.only_reads(0, true);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Where the world is to be dropped.
        self.only_reads(0, false);
    }
}

#[test]
fn the_listener_leaves_a_server_that_is_not_what_was_asked_for() {
    let pair = Pair::new();
    let builder = pair.world.builder().operation_timeout(Duration::from_secs(2));
    let queue = pair.queue(builder.poll_interval(Duration::from_secs(3600)));
    thread::scope(|scope| {
        let popped = scope.spawn(|| text(queue.pop("t").unwrap().payload()));
        until_listening(&pair.world, &mut pair.client(0));
        pair.swap();
        until_listening(&pair.world, &mut pair.client(1));
        until_wanted(&pair.world, &mut pair.client(1), "t");
        let push = pair.world.sql("select pushpop.push('t', 'm')");
        pair.client(1).batch_execute(&push).unwrap();
        assert_eq!(popped.join().unwrap(), "m");
        assert!(!has_connection(&pair.world, &mut pair.client(0), "query ilike 'listen%'"));
    });
}

/// What only reads does not fail there, and would see what was true before.
#[test]
fn idle_connections_leave_a_server_that_is_not_what_was_asked_for() {
    let pair = Pair::new();
    let queue = pair.queue(pair.world.builder().pool_size(1).operation_timeout(Duration::from_secs(2)));
    assert!(queue.topics().unwrap().is_empty());
    pair.swap();
    let push = pair.world.sql("select pushpop.push('t', 'm')");
    pair.client(1).batch_execute(&push).unwrap();
    until("the other server is read", || !queue.topics().unwrap().is_empty());
}

/// So does the one that a transaction has found to be so.
#[test]
fn a_transaction_leaves_a_server_that_only_reads() {
    let pair = Pair::new();
    let queue = pair.queue(pair.world.builder().pool_size(1));
    let push = || queue.transaction(|tx| queue.push_in(tx, "t", "m"));
    push().unwrap();
    pair.swap();
    let error = push().unwrap_err();
    assert_eq!((error.sqlstate(), error.is_retryable()), (Some("25006"), true), "{error:?}");
    push().unwrap();
    assert_eq!(drain(&queue, "t"), ["m"]);
}
