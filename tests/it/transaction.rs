//! Pushes and settles in the caller's own transaction.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::{Error, ErrorKind, Lease, NewMessage, State};

use crate::world::{
    SOON, World, drain, has_connection, pop, stats, text, until, until_listening, until_locked,
};

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.transaction(|tx| queue.push_in(tx, "t", "m")).unwrap();
    let lease = pop(&queue, "t");
    assert_eq!(lease.id(), id);
    queue.transaction(|tx| lease.complete_in(tx)).unwrap();
    assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Completed { .. }));
}

/// Whoever repeats a transaction because its commit was not answered used to have its effect twice.
#[test]
fn a_transaction_that_is_repeated_has_its_effect_once() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    client.batch_execute(&world.sql("create table pushpop.effects (n int)")).unwrap();
    let effect = world.sql("insert into pushpop.effects values (1)");
    let count = world.sql("select count(*) from pushpop.effects");
    queue.push_many("t", ["completed", "discarded", "completed outside"]).unwrap();

    let lease = pop(&queue, "t");
    let work = |lease: &Lease| {
        queue.transaction(|tx| {
            lease.complete_in(tx)?;
            Ok(tx.execute(&effect, &[])?)
        })
    };
    work(&lease).unwrap();
    let error = work(&lease).unwrap_err();
    assert_eq!((error.kind(), error.is_indeterminate()), (ErrorKind::LeaseLost, false), "{error:?}");
    assert_eq!(client.query_one(&count, &[]).unwrap().get::<_, i64>(0), 1);
    lease.complete().unwrap();

    let lease = pop(&queue, "t");
    queue.transaction(|tx| lease.discard_in(tx)).unwrap();
    assert_eq!(queue.transaction(|tx| lease.discard_in(tx)).unwrap_err().kind(), ErrorKind::LeaseLost);

    // In SQL it is for the caller to say, as nobody knows there what else a transaction does.
    let lease = pop(&queue, "t");
    let row = client
        .query_one(&world.sql("select key, fences[1] from pushpop.leases where ids[1] = $1"), &[&lease.id()]);
    let row = row.unwrap();
    let token = [row.get::<_, Vec<u8>>(0), vec![0, 1], row.get::<_, i64>(1).to_be_bytes().to_vec()].concat();
    let complete = world.sql("select pushpop.complete('t', $1, $2)");
    for _ in 0..2 {
        client.execute(&complete, &[&lease.id(), &token]).unwrap();
    }
    let once = world.sql("select pushpop.complete('t', $1, $2, once => true)");
    let error = client.execute(&once, &[&lease.id(), &token]).unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "PP001");
    assert!(error.detail().unwrap().contains("with this lease before"), "{error:?}");
}

#[test]
fn a_push_joins_the_callers_transaction() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    client.batch_execute(&world.sql("create table pushpop.effects (n int)")).unwrap();

    let mut tx = client.transaction().unwrap();
    tx.execute(&world.sql("insert into pushpop.effects values (1)"), &[]).unwrap();
    let message = NewMessage::new("m").header("k", "v").max_attempts(2);
    let id = queue.push_in(&mut tx, "t", message).unwrap();
    assert!(queue.try_pop("t").unwrap().is_none(), "nobody sees it before");
    assert!(queue.find("t", id).unwrap().is_none());
    tx.commit().unwrap();
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert_eq!((lease.id(), lease.header("k"), lease.max_attempts()), (id, Some("v"), Some(2)));

    let mut tx = client.transaction().unwrap();
    let id = queue.push_in(&mut tx, "t", "rolled back").unwrap();
    tx.rollback().unwrap();
    assert!(queue.find("t", id).unwrap().is_none());
    assert!(queue.try_pop("t").unwrap().is_none());
}

#[test]
fn a_push_in_a_transaction_that_failed_is_an_error() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    tx.batch_execute("select 1/0").unwrap_err();
    let error = queue.push_in(&mut tx, "t", "m").unwrap_err();
    assert_eq!(error.sqlstate(), Some("25P02"), "{error:?}");
    drop(tx);
    // A refusal before anything is sent leaves the transaction as it is.
    let mut tx = client.transaction().unwrap();
    assert_eq!(queue.push_in(&mut tx, "", "m").unwrap_err().kind(), ErrorKind::Invalid);
    queue.push_in(&mut tx, "t", "m").unwrap();
    tx.commit().unwrap();
    assert_eq!(drain(&queue, "t"), ["m"]);
}

#[test]
fn a_push_of_a_stored_id_changes_nothing_in_a_transaction() {
    let world = World::new();
    let queue = world.queue();
    let message = NewMessage::new("first");
    queue.push("t", message.clone()).unwrap();
    let again = NewMessage::new("second").with_id(message.id());
    queue.transaction(|tx| queue.push_in(tx, "t", again)).unwrap();
    assert_eq!(drain(&queue, "t"), ["first"]);
}

#[test]
fn nobody_is_woken_before_the_commit() {
    let world = World::new();
    let queue = world.open(world.builder().poll_interval(SOON));
    let mut client = world.client();
    let (popped, wait) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| popped.send(text(pop(&queue, "t").payload())).unwrap());
        crate::world::until_wanted(&world, &mut client, "t");
        until_listening(&world, &mut client);
        let mut tx = client.transaction().unwrap();
        queue.push_in(&mut tx, "t", "m").unwrap();
        assert!(wait.recv_timeout(Duration::from_millis(500)).is_err());
        tx.commit().unwrap();
        assert_eq!(wait.recv_timeout(SOON / 2).unwrap(), "m");
    });
}

#[test]
fn a_settle_joins_the_callers_transaction() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    queue.push_many("t", ["a", "b"]).unwrap();
    for (discard, lease) in [(false, pop(&queue, "t")), (true, pop(&queue, "t"))] {
        let id = lease.id();
        let settle = |tx: &mut postgres::Transaction<'_>| {
            if discard { lease.discard_in(tx) } else { lease.complete_in(tx) }
        };
        let state = || queue.find("t", id).unwrap().unwrap().state();

        let mut tx = client.transaction().unwrap();
        settle(&mut tx).unwrap();
        assert!(matches!(state(), State::Leased { .. }), "nobody sees it before");
        tx.rollback().unwrap();
        assert!(matches!(state(), State::Leased { .. }));

        // The lease is usable still, in every way.
        let mut tx = client.transaction().unwrap();
        settle(&mut tx).unwrap();
        tx.commit().unwrap();
        match state() {
            State::Completed { .. } => assert!(!discard),
            State::Discarded { .. } => assert!(discard),
            other => panic!("{other:?}"),
        }
        // Beside that it may be repeated.
        if discard { lease.discard().unwrap() } else { lease.complete().unwrap() }
    }
}

#[test]
fn a_lease_can_be_settled_otherwise_after_a_rollback() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let mut lease = pop(&queue, "t");
    let failed: Result<(), Error> = queue.transaction(|tx| {
        lease.complete_in(tx)?;
        tx.batch_execute("select 1/0")?;
        Ok(())
    });
    assert_eq!(failed.unwrap_err().sqlstate(), Some("22012"));
    lease.extend(Duration::from_secs(60)).unwrap();
    lease.release().unwrap();
    assert_eq!(drain(&queue, "t"), ["m"]);
}

#[test]
fn push_and_settle_commit_together() {
    let world = World::new();
    let queue = world.queue();
    queue.push("in", "m").unwrap();
    let lease = pop(&queue, "in");
    queue
        .transaction(|tx| {
            queue.push_in(tx, "out", lease.payload())?;
            queue.push_in(tx, "out", "second")?;
            lease.complete_in(tx)
        })
        .unwrap();
    assert_eq!(drain(&queue, "out"), ["m", "second"]);
    assert_eq!(stats(&queue, "in").settled(), 1);
}

/// The driver's `commit()` returns `Ok` for a transaction that a failed statement had aborted, and
/// the server rolled it back.
#[test]
fn a_failed_statement_that_was_ignored_is_an_error() {
    let world = World::new();
    let queue = world.queue();
    let result = queue.transaction(|tx| {
        queue.push_in(tx, "t", "m")?;
        let _ = tx.batch_execute("select 1/0");
        Ok(())
    });
    let error = result.unwrap_err();
    assert_eq!(error.sqlstate(), Some("25P02"), "{error:?}");
    assert!(!error.is_indeterminate());
    assert!(queue.try_pop("t").unwrap().is_none());
}

#[test]
fn a_stale_lease_poisons_its_transaction() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let stale = pop(&queue.with_lease(Duration::from_secs(1)), "t");
    let fresh = pop(&queue, "t");
    for ignore in [true, false] {
        let result = queue.transaction(|tx| {
            queue.push_in(tx, "effect", "m")?;
            let settled = stale.complete_in(tx);
            assert_eq!(settled.as_ref().unwrap_err().kind(), ErrorKind::LeaseLost);
            if ignore { Ok(()) } else { settled }
        });
        let error = result.unwrap_err();
        assert_eq!(error.kind() == ErrorKind::LeaseLost, !ignore, "{error:?}");
    }
    // The same with the driver's own transaction, whatever its commit says.
    let mut client = world.client();
    let mut tx = client.transaction().unwrap();
    queue.push_in(&mut tx, "effect", "m").unwrap();
    stale.discard_in(&mut tx).unwrap_err();
    let _ = tx.commit();
    assert!(queue.try_pop("effect").unwrap().is_none());
    fresh.complete().unwrap();
}

#[test]
fn an_error_or_a_panic_of_the_work_rolls_back() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    let mut client = world.client();
    let failed: Result<(), Error> = queue.transaction(|tx| {
        queue.push_in(tx, "t", "m")?;
        queue.push_in(tx, "", "bad").map(drop)
    });
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Invalid);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        queue.transaction(|tx| -> Result<(), Error> {
            queue.push_in(tx, "t", "m")?;
            panic!("on purpose")
        })
    }));
    assert!(panicked.is_err());
    // The only connection is free again, and not in a transaction.
    assert!(queue.try_pop("t").unwrap().is_none());
    queue.push("t", "after").unwrap();
    assert_eq!(drain(&queue, "t"), ["after"]);
    until("no transaction is left open", || {
        !has_connection(&world, &mut client, "state like 'idle in transaction%'")
    });
}

#[test]
fn the_transaction_gives_its_value() {
    let world = World::new();
    let queue = world.queue();
    let n: i32 = queue.transaction(|tx| Ok(tx.query_one("select 42", &[])?.get(0))).unwrap();
    assert_eq!(n, 42);
}

#[test]
fn a_transaction_waits_for_a_connection_no_longer_than_its_timeout() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1).operation_timeout(Duration::from_millis(500)));
    queue
        .transaction(|_| {
            let why = ": the whole pool of 1 is in transactions; use push_in and complete_in there, or a larger pool_size";
            let failed = [
                (queue.transaction(|_| Ok(())).unwrap_err(), "no connection became free"),
                (queue.push("t", "m").map(drop).unwrap_err(), "the call was not begun in time"),
                (queue.try_pop("t").map(drop).unwrap_err(), "the call was not begun in time"),
                (queue.topics().map(drop).unwrap_err(), "the call was not begun in time"),
            ];
            for (error, what) in failed {
                assert!(error.kind() == ErrorKind::Timeout && !error.is_indeterminate(), "{error:?}");
                assert!(error.to_string().ends_with(&format!("{what}{why}")), "{error}");
            }
            Ok(())
        })
        .unwrap();
    queue.push("t", "m").unwrap();
}

/// Whoever waits for the only connection gets it when it is free, and not when he looks again.
#[test]
fn a_transaction_begins_when_a_connection_is_free() {
    let world = World::new();
    let patience = SOON * 4;
    let queue = world.open(world.builder().pool_size(1).operation_timeout(patience));
    let waits = || {
        thread::sleep(Duration::from_millis(200));
        Instant::now()
    };
    let since = thread::scope(|scope| {
        let (begun, begins) = mpsc::channel();
        let (free, freed) = mpsc::channel();
        let queue = &queue;
        scope.spawn(move || {
            queue.transaction(|_| {
                begun.send(()).unwrap();
                freed.recv().unwrap();
                Ok(())
            })
        });
        begins.recv().unwrap();
        scope.spawn(|| queue.transaction(|_| Ok(())).unwrap());
        let since = waits();
        free.send(()).unwrap();
        since
    });
    assert!(since.elapsed() < patience / 2, "after a transaction: {:?}", since.elapsed());

    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    let (mut holder, mut client) = (world.client(), world.client());
    let mut tx = holder.transaction().unwrap();
    tx.execute(&world.sql("select from pushpop.messages for update"), &[]).unwrap();
    let since = thread::scope(|scope| {
        scope.spawn(|| lease.complete().unwrap());
        until_locked(&world, &mut client);
        scope.spawn(|| queue.transaction(|_| Ok(())).unwrap());
        let since = waits();
        tx.rollback().unwrap();
        since
    });
    // Upkeep, ten seconds after the push, would free whoever was forgotten.
    assert!(since.elapsed() < Duration::from_secs(7), "after a call: {:?}", since.elapsed());
}

#[test]
fn statements_of_the_transaction_have_no_timeout_of_the_queues() {
    let world = World::new();
    let queue = world.open(world.builder().operation_timeout(Duration::from_millis(300)));
    queue.transaction(|tx| Ok(tx.batch_execute("select pg_sleep(1)")?)).unwrap();
}

/// The driver tells whoever asks first why a session has ended, and the others nothing.
#[test]
fn a_transaction_that_was_cut_off_says_what_may_have_done_it() {
    let world = World::new();
    let queue = world.queue();
    let cut = |ignored: bool| {
        queue.transaction(|tx| {
            tx.batch_execute("set local idle_in_transaction_session_timeout = 50")?;
            while tx.batch_execute("select").is_ok() {
                thread::sleep(Duration::from_millis(200));
            }
            if ignored { Ok(()) } else { Ok(tx.batch_execute("select")?) }
        })
    };
    for ignored in [true, false] {
        let error = cut(ignored).unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Connection, true), "{error:?}");
        for setting in ["idle_in_transaction_session_timeout", "transaction_timeout"] {
            assert!(error.to_string().contains(setting), "{error}");
        }
        assert!(!error.is_indeterminate(), "{error:?}");
    }
    queue.transaction(|tx| queue.push_in(tx, "t", "m")).unwrap();
    assert_eq!(drain(&queue, "t"), ["m"]);
}
