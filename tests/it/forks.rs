//! A process that forks after it has opened a queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use fork::{Fork, fork, waitpid_nohang};
use postgres::{Client, NoTls};
use pushpop_pg::{Error, ErrorKind, Lease, Queue, Worker};

use crate::world::{SOON, World, apart, builder_apart, is_apart, pop, stats, succeeds, text, until, url};

/// Runs something in a child of this process, which ends afterwards: with what that returns, or as it panics.
fn in_a_child(work: impl FnOnce()) {
    let child = match fork().unwrap() {
        Fork::Parent(child) => child,
        Fork::Child => exit(i32::from(catch_unwind(AssertUnwindSafe(work)).is_err())),
    };
    let mut status = None;
    until("the child ends", || {
        status = waitpid_nohang(child).unwrap();
        status.is_some()
    });
    assert_eq!(status, Some(0), "the child has failed");
}

#[track_caller]
fn refused(call: &str, result: Result<(), Error>) {
    let error = result.err().unwrap_or_else(|| panic!("{call} succeeds"));
    assert_eq!(error.kind(), ErrorKind::Invalid, "{call}: {error:?}");
    assert!(error.to_string().contains("open another one after the fork"), "{call}: {error}");
    assert!(!error.is_retryable() && !error.is_indeterminate(), "{call}: {error:?}");
}

/// What the server has seen of this queue's connections, and when.
fn seen(client: &mut Client) -> Vec<String> {
    let sql = "select a::text from (select pid, query, state, query_start, state_change from pg_stat_activity
               where application_name = $1 order by pid) a";
    let schema = std::env::var("PUSHPOP_TEST_APART").unwrap();
    client.query(sql, &[&schema]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// The parent's own upkeep apart.
#[track_caller]
fn assert_nothing_was_sent(before: &[String], client: &mut Client) {
    let now = seen(client);
    assert_eq!(now.len(), before.len(), "{now:?}");
    assert!(now.iter().all(|line| line.contains("upkeep") || before.contains(line)), "{before:?}\n{now:?}");
}

/// In the process that forks: a queue that polls once an hour, so that what is seen of it stands still.
fn open() -> Queue {
    builder_apart().poll_interval(SOON * 100).connect(url()).unwrap()
}

fn next(leases: &mut Vec<Lease>) -> Lease {
    leases.pop().unwrap()
}

#[test]
fn smoke() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        return drop(succeeds(apart("forks::smoke", &world)));
    }
    let queue = open();
    in_a_child(|| refused("push", queue.push("t", "m").map(drop)));
    queue.push("t", "m").unwrap();
}

/// Each call, at once: threads that could carry it out are not there.
#[test]
fn a_child_is_refused_and_sends_nothing() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        return drop(succeeds(apart("forks::a_child_is_refused_and_sends_nothing", &world)));
    }
    let queue = open();
    queue.push_many("t", (0..8).map(|i| format!("{i}"))).unwrap();
    let mut leases = queue.pop_many("t", 8, SOON).unwrap();
    let id = leases[7].id();
    let mut client = Client::connect(url(), NoTls).unwrap();
    until("nothing is under way", || seen(&mut client).iter().all(|line| line.contains("idle")));
    let before = seen(&mut client);
    let pushed = queue.topic("t").stats().unwrap();

    let mut held = leases.split_off(0);
    in_a_child(|| {
        refused("push", queue.push("t", "m").map(drop));
        refused("push_many", queue.push_many("t", ["m", "n"]).map(drop));
        refused("push_once", queue.push_once("t", "m").map(drop));
        refused("try_pop", queue.try_pop("t").map(drop));
        refused("pop", queue.pop("t").map(drop));
        refused("pop_timeout", queue.pop_timeout("t", SOON).map(drop));
        refused("pop_many", queue.pop_many("t", 5, SOON).map(drop));
        refused("pop_any", queue.pop_any(&["t", "u"], SOON).map(drop));
        refused("iter", queue.iter("t").next().unwrap().map(drop));
        refused("find", queue.find("t", id).map(drop));
        refused("topics", queue.topics().map(drop));
        refused("stats", queue.topic("t").stats().map(drop));
        refused("purge", queue.topic("t").purge().map(drop));
        refused("pause", queue.topic("t").pause());
        refused("transaction", queue.transaction(|_| Ok(())));
        refused("complete", next(&mut held).complete().map_err(Into::into));
        refused("discard", next(&mut held).discard().map_err(Into::into));
        refused("release", next(&mut held).release().map_err(Into::into));
        refused("defer", next(&mut held).defer(SOON).map_err(Into::into));
        refused("fail", next(&mut held).fail("m").map_err(Into::into));
        refused("extend", next(&mut held).extend(SOON));
        refused("complete_many", queue.complete_many(vec![next(&mut held)]).map(drop).map_err(Into::into));
        let worker = Worker::new(&queue).handle("t", 1, |_| Ok(()));
        refused("run", worker.run().map(drop));
        refused("run_until_idle", worker.run_until_idle().map(drop));
        refused("work_once", worker.work_once().map(drop));
        let mut own = Client::connect(url(), NoTls).unwrap();
        let mut tx = own.transaction().unwrap();
        refused("push_in", queue.push_in(&mut tx, "t", "m").map(drop));
        refused("complete_in", held[0].complete_in(&mut tx));
        refused("discard_in", held[0].discard_in(&mut tx));
        drop(tx);
        assert!(format!("{queue:?}").contains("Queue"));
        queue.close();
        drop(worker);
        drop(held.split_off(0));
        drop(queue.clone());
        // One of its own is as good as any.
        let own = open();
        own.push("own", "m").unwrap();
        pop(&own, "own").complete().unwrap();
    });
    until("the child's own connections end", || seen(&mut client).len() == before.len());
    assert_nothing_was_sent(&before, &mut client);
    assert_eq!(stats(&queue, "t").leased(), pushed.leased());
    held.drain(..).for_each(|lease| lease.complete().unwrap());
    queue.push("t", "m").unwrap();
    assert_eq!(text(pop(&queue, "t").payload()), "m");
    assert_eq!(stats(&queue, "own").settled(), 1);
}

/// The last clone and the last lease, as at the end of a child that returns from `main`.
#[test]
fn a_child_that_drops_the_queue_sends_nothing() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        return drop(succeeds(apart("forks::a_child_that_drops_the_queue_sends_nothing", &world)));
    }
    let queue = open();
    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    let mut client = Client::connect(url(), NoTls).unwrap();
    until("nothing is under way", || seen(&mut client).iter().all(|line| line.contains("idle")));
    let before = seen(&mut client);
    let mut mine = Some((queue, lease));
    in_a_child(|| drop(mine.take()));
    assert_nothing_was_sent(&before, &mut client);
    let (queue, lease) = mine.unwrap();
    lease.complete().unwrap();
    assert_eq!(stats(&queue, "t").settled(), 1);
}

/// The parent's own transaction goes on.
#[test]
fn a_fork_within_a_transaction_leaves_it_to_the_parent() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        return drop(succeeds(apart("forks::a_fork_within_a_transaction_leaves_it_to_the_parent", &world)));
    }
    for ends in ["ok", "err", "panic"] {
        let queue = open();
        let parent = std::process::id();
        let transaction = || {
            queue.transaction(|tx| {
                queue.push_in(tx, ends, "before")?;
                let child = match fork().unwrap() {
                    Fork::Parent(child) => child,
                    Fork::Child => match ends {
                        "ok" => return Ok(()),
                        "err" => return Err(Error::other("the child's own")),
                        _ => panic!("in the child, on purpose"),
                    },
                };
                let mut status = None;
                until("the child ends", || {
                    status = waitpid_nohang(child).unwrap();
                    status.is_some()
                });
                assert_eq!(status, Some(0), "{ends}");
                queue.push_in(tx, ends, "after").map(drop)
            })
        };
        let result = catch_unwind(AssertUnwindSafe(transaction));
        if std::process::id() != parent {
            let as_expected = match result {
                Ok(result) => ends != "panic" && result.is_err_and(|e| e.kind() == ErrorKind::Invalid),
                Err(_) => ends == "panic",
            };
            exit(i32::from(!as_expected));
        }
        result.unwrap().unwrap();
        let pushed = crate::world::drain(&queue, ends);
        assert_eq!(pushed, ["before", "after"]);
    }
}

/// A handler that forks, and whose child comes back from it as if it were the parent.
#[test]
fn a_child_that_returns_from_a_handler_settles_nothing() {
    if !is_apart() {
        let world = World::new();
        world.queue();
        return drop(succeeds(apart("forks::a_child_that_returns_from_a_handler_settles_nothing", &world)));
    }
    let queue = open();
    let id = queue.push("t", "m").unwrap();
    let over = AtomicBool::new(false);
    let worker = Worker::new(&queue).handle("t", 1, |_| {
        let child = match fork()? {
            Fork::Parent(child) => child,
            Fork::Child => return Err("the child has failed".into()),
        };
        let mut status = None;
        until("the child ends", || {
            status = waitpid_nohang(child).unwrap();
            status.is_some()
        });
        over.store(true, Ordering::SeqCst);
        Ok(())
    });
    thread::scope(|scope| {
        scope.spawn(|| worker.run().unwrap());
        until("the handler is done", || over.load(Ordering::SeqCst));
        until("it is settled", || stats(&queue, "t").settled() == 1);
        worker.stopper().stop();
    });
    assert!(queue.find("t", id).unwrap().unwrap().failures().is_empty());
}
