//! Workers: what handlers say, how they fail, how they end.

use std::collections::{HashMap, HashSet};
use std::process::{ExitCode, Termination as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use pushpop_pg::{
    Backoff, Ended, ErrorKind, Flight, Handled, LeaseLost, NewMessage, Observer, Outcome, Queue, State,
    Stuck, Worker,
};

use tracing_subscriber::filter::LevelFilter;

use crate::spans::Notes;
use crate::world::{SOON, World, has_connection, pop, stats, text, unique, until, until_wanted};

const SECOND: Duration = Duration::from_secs(1);

/// Keeps what is told of handlers: the outcome, the attempt.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<(String, u32)>>>, Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicUsize>);

impl Told {
    fn outcomes(&self) -> Vec<(String, u32)> {
        let mut outcomes = self.0.lock().unwrap().clone();
        outcomes.sort();
        outcomes
    }

    fn stuck(&self) -> usize {
        self.1.load(Ordering::Relaxed)
    }

    fn turns(&self) -> usize {
        self.2.load(Ordering::Relaxed)
    }

    fn lost(&self) -> usize {
        self.3.load(Ordering::Relaxed)
    }
}

impl Observer for Told {
    fn handled(&self, event: &Handled<'_>) {
        self.0.lock().unwrap().push((event.outcome().to_owned(), event.attempt()));
    }

    fn stuck(&self, _: &Stuck<'_>) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }

    fn flight(&self, event: &Flight<'_>) {
        self.2.fetch_add(usize::from(event.kind() == "turn"), Ordering::Relaxed);
    }

    fn lease_lost(&self, _: &LeaseLost<'_>) {
        self.3.fetch_add(1, Ordering::Relaxed);
    }
}

/// How a program ends that returns this.
fn status(ended: Ended) -> String {
    format!("{:?}", ended.report())
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    assert_eq!(Worker::new(&queue).handle("t", 2, |_| Ok(())).run_until_idle().unwrap(), 1);
    assert_eq!(stats(&queue, "t").settled(), 1);
}

#[test]
fn a_handler_says_what_becomes_of_its_message() {
    let world = World::new();
    let told = Told::default();
    let queue = world.open(world.builder().observer(told.clone()));
    let push = |payload: &str| queue.push("t", payload).unwrap();
    let ids: Vec<_> =
        ["complete", "unit", "discard", "defer", "settled", "error", "panic", "far"].map(push).into();
    let seen = Mutex::new(Vec::new());
    let handled = Worker::new(&queue)
        // Else those that failed may come again before all are through.
        .backoff(Backoff::fixed(SECOND * 60))
        .handle("t", 3, |job| {
            seen.lock().unwrap().push(job.id());
            Ok(match text(job.payload()).as_str() {
                "unit" => ().into(),
                "discard" => Outcome::Discard,
                "defer" => Outcome::Defer(SECOND * 60),
                "settled" => {
                    queue.transaction(|tx| job.complete_in(tx))?;
                    Outcome::Settled
                }
                "error" => "nonsense".parse::<u32>().map(|_| Outcome::Complete)?,
                "panic" => panic!("at {}", "the disco"),
                "far" => Outcome::Defer(Duration::MAX),
                _ => Outcome::Complete,
            })
        })
        .run_until_idle()
        .unwrap();
    assert_eq!((handled, seen.lock().unwrap().len()), (8, 8));

    let found = |i: usize| queue.find("t", ids[i]).unwrap().unwrap();
    for done in [0, 1, 4] {
        assert!(matches!(found(done).state(), State::Completed { .. }), "{:?}", found(done));
    }
    assert!(matches!(found(2).state(), State::Discarded { .. }));
    assert!(matches!(found(3).state(), State::Delayed { .. }));
    assert_eq!(found(3).attempt(), 0);
    for (failed, why) in [
        (5, "invalid digit found in string"),
        (6, "panicked: at the disco"),
        (7, "a delay has at most 250000000000 seconds, not 18446744073709551615"),
    ] {
        let message = found(failed);
        assert!(matches!(message.state(), State::Delayed { .. }), "{message:?}");
        assert_eq!((message.attempt(), message.last_error()), (1, Some(why)));
    }
    let outcomes: Vec<String> = told.outcomes().into_iter().map(|(outcome, _)| outcome).collect();
    assert_eq!(outcomes, ["complete", "complete", "defer", "discard", "fail", "fail", "panic", "settled"]);
}

/// The words of the causes are kept too.
#[test]
fn an_error_is_kept_with_its_causes() {
    #[derive(Debug)]
    struct Outer(std::io::Error);
    impl std::fmt::Display for Outer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("cannot send")
        }
    }
    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", "m").unwrap();
    let worker =
        Worker::new(&queue).handle("t", 1, |_| Err::<(), _>(Outer(std::io::Error::other("no route")).into()));
    assert!(worker.work_once().unwrap());
    let found = queue.find("t", id).unwrap().unwrap();
    assert_eq!(found.last_error(), Some("cannot send: no route"));
}

#[test]
fn a_backoff_is_the_workers_or_the_default() {
    let world = World::new();
    let queue = world.queue();
    let waits = |backoff: Option<Backoff>| {
        // A topic of its own: what has failed before may be ready again.
        let topic = &unique("t");
        let id = queue.push(topic, "m").unwrap();
        let mut worker = Worker::new(&queue).handle(topic, 1, |_| Err::<(), _>("no".into()));
        if let Some(backoff) = backoff {
            worker = worker.backoff(backoff);
        }
        assert!(worker.work_once().unwrap());
        let found = queue.find(topic, id).unwrap().unwrap();
        let now = stats(&queue, topic).at();
        (found.ready_at() - now).as_seconds_f64()
    };
    // The clock has gone on since.
    let about = |seconds: f64, waits: f64| waits <= seconds && waits > seconds * 0.74 - 30.0;
    assert!(about(1.0, waits(None)));
    assert!(about(7200.0, waits(Some(Backoff::fixed(SECOND * 7200)))));
    assert!(about(5000.0, waits(Some(Backoff::exponential(SECOND * 5000, SECOND * 9000)))));
    assert!(about(3000.0, waits(Some(Backoff::by(|message| SECOND * 3000 * message.attempt())))));
    assert!(about(1.0, waits(Some(Backoff::by(|_| panic!("no idea"))))));
    assert!(waits(Some(Backoff::fixed(Duration::MAX))) > 1e11);
}

#[test]
fn a_message_out_of_attempts_is_dead() {
    let world = World::new();
    let queue = world.queue();
    let id = queue.push("t", NewMessage::new("m").max_attempts(3)).unwrap();
    let tries = AtomicUsize::new(0);
    let worker = Worker::new(&queue).backoff(Backoff::fixed(Duration::ZERO)).handle("t", 2, |job| {
        assert_eq!(job.attempt() as usize, tries.fetch_add(1, Ordering::Relaxed) + 1);
        Err::<(), _>("no".into())
    });
    until("it is tried three times", || {
        worker.run_until_idle().unwrap() > 0 && tries.load(Ordering::Relaxed) == 3
    });
    assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Dead { .. }));
}

#[test]
fn a_worker_runs_until_it_is_stopped() {
    let world = World::new();
    let told = Told::default();
    let queue = world.open(world.builder().observer(told.clone()));
    let mut client = world.client();
    let seen = Mutex::new(HashMap::new());
    // Borrowed by the handlers.
    let worker = Worker::new(&queue).handle("t", 8, |job| {
        assert!(!job.should_stop() && !job.is_lost());
        *seen.lock().unwrap().entry(text(job.payload())).or_insert(0) += 1;
        Ok(())
    });
    let stopper = worker.stopper();
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        until_wanted(&world, &mut client, "t");
        for i in 0..500 {
            queue.push("t", format!("{i}")).unwrap();
        }
        until("all are handled", || stats(&queue, "t").settled() == 500);
        stopper.stop();
        stopper.stop();
        let ended = running.join().unwrap();
        assert_eq!((ended.unfinished(), ended.signal(), ended.is_closed()), (0, None, false));
        assert_eq!(ended.to_string(), "stopped, all handlers have finished");
    });
    assert!(told.turns() > 0, "no settle shared a flight with a pop");
    assert_eq!(told.stuck(), 0);
    assert!(seen.lock().unwrap().values().all(|times| *times == 1));
    assert_eq!(seen.lock().unwrap().len(), 500);
    queue.push("t", "late").unwrap();
    let ended = worker.run().unwrap();
    assert_eq!(ended.unfinished(), 0);
    assert_eq!(status(ended), format!("{:?}", ExitCode::SUCCESS));
    assert_eq!(stats(&queue, "t").ready(), 1, "a worker that was stopped stays so");
}

#[test]
fn a_worker_ends_with_its_queue() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let worker = Worker::new(&queue).handle("t", 4, |_| Ok(()));
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        until_wanted(&world, &mut client, "t");
        queue.close();
        assert!(running.join().unwrap().is_closed());
    });
}

/// While it is busy: what was popped and not begun goes back uncounted, and nothing is lost or done twice.
#[test]
fn stopping_loses_nothing_and_burns_no_attempt() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..3000).map(|i| format!("{i}"))).unwrap();
    let mut handled = 0;
    for _ in 0..4 {
        let count = AtomicUsize::new(0);
        let worker = Worker::new(&queue).handle("t", 8, |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        thread::scope(|scope| {
            let running = scope.spawn(|| worker.run().unwrap());
            until("some are handled", || count.load(Ordering::Relaxed) > 200);
            worker.stopper().stop();
            assert_eq!(running.join().unwrap().unfinished(), 0);
        });
        handled += count.load(Ordering::Relaxed) as u64;
        let now = stats(&queue, "t");
        assert_eq!((now.settled(), now.ready(), now.leased()), (handled, 3000 - handled, 0));
    }
    for message in queue.topic("t").peek(1000).unwrap() {
        assert_eq!(message.attempt(), 0, "{message:?}");
    }
}

#[test]
fn an_idle_worker_has_handled_what_its_handlers_pushed() {
    let world = World::new();
    let queue = world.queue();
    queue.push("odd", "9").unwrap();
    queue.push("odd", NewMessage::new("1").delay(SECOND * 3600)).unwrap();
    let pass_on = |to: &'static str| {
        let queue = &queue;
        move |job: &pushpop_pg::Job| {
            let left: u32 = text(job.payload()).parse()?;
            if left > 0 {
                queue.push(to, (left - 1).to_string())?;
            }
            Ok(())
        }
    };
    let worker = Worker::new(&queue).handle("odd", 2, pass_on("even")).handle("even", 3, pass_on("odd"));
    assert_eq!(worker.run_until_idle().unwrap(), 10);
    assert_eq!(worker.run_until_idle().unwrap(), 0);
    assert_eq!(stats(&queue, "odd").delayed(), 1);
}

#[test]
fn a_message_at_a_time_on_this_thread() {
    let world = World::new();
    let queue = world.queue();
    let this = thread::current().id();
    let seen = Mutex::new(Vec::new());
    let note = |job: &pushpop_pg::Job| {
        assert_eq!(thread::current().id(), this);
        seen.lock().unwrap().push(text(job.payload()));
        Ok(())
    };
    let worker = Worker::new(&queue).handle("a", 1, note).handle("b", 1, note);
    assert!(!worker.work_once().unwrap());
    queue.push("b", "b1").unwrap();
    queue.push("a", "a1").unwrap();
    assert!(worker.work_once().unwrap() && worker.work_once().unwrap());
    assert!(!worker.work_once().unwrap());
    assert_eq!(*seen.lock().unwrap(), ["a1", "b1"]);
}

#[test]
fn bad_input_is_refused_before_anything_runs() {
    let world = World::new();
    let queue = world.queue();
    let long = "t".repeat(256);
    let workers = [
        (Worker::new(&queue), "run: a worker has at least one handler"),
        (Worker::new(&queue).handle("", 1, |_| Ok(())), "run: a topic has 1 to 255 bytes, not 0"),
        (Worker::new(&queue).handle(&long, 1, |_| Ok(())), "run: a topic has 1 to 255 bytes, not 256"),
        (Worker::new(&queue).handle("t", 0, |_| Ok(())), "run: a handler has 1 to 10000 threads, not 0"),
        (Worker::new(&queue).handle_any(&[], 1, |_| Ok(())), "run: a pop asks 1 to 1000 topics, not 0"),
    ];
    for (worker, words) in workers {
        for error in [
            worker.run().map(drop).unwrap_err(),
            worker.run_until_idle().map(drop).unwrap_err(),
            worker.work_once().map(drop).unwrap_err(),
        ] {
            assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Invalid, words));
        }
    }
}

/// An error that no waiting mends ends the worker.
#[test]
fn a_schema_that_is_gone_stops_the_worker() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let worker = Worker::new(&queue).handle("t", 2, |_| Ok(()));
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run());
        until_wanted(&world, &mut client, "t");
        world.drop_schema(&mut client);
        let error = running.join().unwrap().unwrap_err();
        assert!(!error.is_retryable(), "{error}");
    });
}

// Leases of handlers that run.

/// Leases of a second, and handlers that run for four.
fn slow_worker<'a>(queue: &Queue, handler: impl Fn(&pushpop_pg::Job) + Send + Sync + 'a) -> Worker<'a> {
    Worker::new(&queue.with_lease(SECOND)).handle("t", 2, move |job| {
        let until = Instant::now() + SECOND * 4;
        while Instant::now() < until {
            assert!(!job.is_lost(), "lost after {:?}", SECOND * 4 - (until - Instant::now()));
            std::hint::spin_loop();
            thread::sleep(Duration::from_millis(10));
        }
        handler(job);
        Ok(())
    })
}

#[test]
fn the_lease_of_a_handler_is_extended_while_it_runs() {
    let world = World::new();
    let told = Told::default();
    let queue = world.open(world.builder().observer(told.clone()));
    let ids = queue.push_many("t", ["a", "b"]).unwrap();
    thread::scope(|scope| {
        let working = scope.spawn(|| slow_worker(&queue, |_| ()).run_until_idle().unwrap());
        until("both are at work", || stats(&queue, "t").leased() == 2);
        // Others look for them all the time.
        while !working.is_finished() {
            assert!(queue.try_pop("t").unwrap().is_none(), "handed out twice");
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(working.join().unwrap(), 2);
    });
    for id in ids {
        let found = queue.find("t", id).unwrap().unwrap();
        assert!(matches!(found.state(), State::Completed { .. }), "{found:?}");
        assert_eq!((found.attempt(), found.fence()), (1, 1));
    }
    assert!(told.stuck() >= 2, "handlers that outlast their leases are reported");
}

/// The pool is in the hands of handlers, and a row in those of a transaction.
#[test]
fn a_long_transaction_costs_nobody_a_lease() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    queue.push_many("t", ["in a transaction", "beside it"]).unwrap();
    let begun = AtomicBool::new(false);
    let worker = Worker::new(&queue.with_lease(SECOND)).handle("t", 2, |job| {
        if job.payload() == b"in a transaction" {
            queue.transaction(|tx| {
                job.complete_in(tx)?;
                begun.store(true, Ordering::Relaxed);
                thread::sleep(SECOND * 4);
                assert!(!job.is_lost());
                Ok(())
            })?;
            return Ok(Outcome::Settled);
        }
        until("the other one is in its transaction", || begun.load(Ordering::Relaxed));
        thread::sleep(SECOND * 3);
        assert!(!job.is_lost());
        Ok(Outcome::Complete)
    });
    assert_eq!(worker.run_until_idle().unwrap(), 2);
    let now = stats(&queue, "t");
    assert_eq!((now.settled(), now.ready(), now.delayed(), now.leased()), (2, 0, 0, 0));
}

#[test]
fn a_handler_learns_that_its_lease_is_lost() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let id = queue.push("t", "m").unwrap();
    let (told, hears) = mpsc::channel();
    let worker = Worker::new(&queue.with_lease(SECOND)).handle("t", 1, |job| {
        told.send(()).unwrap();
        until("it is lost", || job.is_lost() && job.should_stop());
        Ok(())
    });
    thread::scope(|scope| {
        let working = scope.spawn(|| worker.work_once().unwrap());
        hears.recv_timeout(SOON).unwrap();
        client
            .batch_execute(
                &world.sql("delete from pushpop.leases; update pushpop.messages set fence = fence + 1"),
            )
            .unwrap();
        assert!(working.join().unwrap());
    });
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(!matches!(found.state(), State::Completed { .. }), "{found:?}");
}

#[test]
fn a_handler_has_a_limit() {
    let world = World::new();
    let told = Told::default();
    let queue = world.open(world.builder().observer(told.clone()));
    let id = queue.push("t", "m").unwrap();
    let worker =
        Worker::new(&queue).limit(SECOND).backoff(Backoff::fixed(Duration::ZERO)).handle("t", 2, |job| {
            if job.attempt() == 1 {
                until("its time is up", || job.is_lost());
                thread::sleep(SECOND);
            } else {
                thread::sleep(SECOND / 3);
            }
            Ok(())
        });
    let handled = AtomicUsize::new(0);
    until("it is handled twice", || {
        handled.fetch_add(worker.run_until_idle().unwrap(), Ordering::Relaxed);
        handled.load(Ordering::Relaxed) == 2
    });
    let found = queue.find("t", id).unwrap().unwrap();
    assert!(matches!(found.state(), State::Completed { .. }), "{found:?}");
    assert_eq!((found.attempt(), found.last_error()), (2, Some("the handler ran longer than 1s")));
    assert_eq!(told.outcomes(), [("complete".into(), 2), ("timeout".into(), 1)]);
    assert_eq!(told.lost(), 0, "what was ended is not settled again");
}

#[test]
fn a_handler_that_outlives_the_grace_period_loses_its_message() {
    let world = World::new();
    let told = Told::default();
    let queue = world.open(world.builder().observer(told.clone()));
    let ids = queue.push_many("t", ["obedient", "stubborn"]).unwrap();
    let (begun, begins) = mpsc::channel();
    let free = AtomicBool::new(false);
    let worker = Worker::new(&queue).grace(SECOND).handle("t", 2, |job| {
        begun.send(()).unwrap();
        match job.payload() {
            b"obedient" => until("it is told to stop", || job.should_stop()),
            _ => until("it is set free", || free.load(Ordering::Relaxed)),
        }
        Ok(())
    });
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        begins.recv_timeout(SOON).unwrap();
        begins.recv_timeout(SOON).unwrap();
        worker.stopper().stop();
        let again = pop(&queue, "t");
        assert_eq!((again.payload(), again.attempt()), (&b"stubborn"[..], 1), "the attempt was burnt");
        assert!(!running.is_finished(), "its handler may still borrow");
        free.store(true, Ordering::Relaxed);
        let ended = running.join().unwrap();
        assert_eq!(ended.unfinished(), 1);
        assert_eq!(ended.to_string(), "stopped, one handler has outlived the grace period");
        assert_eq!(status(ended), format!("{:?}", ExitCode::FAILURE));
        again.complete().unwrap();
    });
    assert!(matches!(queue.find("t", ids[0]).unwrap().unwrap().state(), State::Completed { .. }));
    assert_eq!(told.outcomes(), [("complete".into(), 1), ("released".into(), 1)]);
}

#[test]
fn an_error_ends_a_run_until_idle() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", ["a", "b"]).unwrap();
    let worker = Worker::new(&queue).handle("t", 3, |_| {
        queue.close();
        Ok(())
    });
    let error = worker.run_until_idle().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
}

#[test]
fn a_worker_says_which_attempt_was_the_last() {
    let world = World::new();
    let queue = world.open(world.builder().max_attempts(2));
    let id = queue.push("t", "m").unwrap();
    let worker = Worker::new(&queue).backoff(Backoff::fixed(Duration::ZERO)).handle(
        "t",
        1,
        |_| -> Result<Outcome, _> { panic!("why") },
    );
    for dead in [0, 1] {
        let notes = Notes::default();
        until("it is handled", || notes.of(LevelFilter::WARN, || worker.work_once().unwrap()));
        let logged = notes.logged();
        assert_eq!(logged.matches("panicked: why").count(), 1, "{logged}");
        assert_eq!(logged.matches("a message is dead").count(), dead, "{logged}");
    }
    assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Dead { .. }));
}

#[test]
fn a_worker_says_what_it_could_not_settle() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let notes = Notes::default();
    let settles = Worker::new(&queue).handle("t", 1, |_| Ok(()));
    assert!(notes.of(LevelFilter::WARN, || settles.work_once().unwrap()));
    assert_eq!(notes.logged(), "");

    let id = queue.push("t", "m").unwrap();
    let mut client = world.client();
    let handed_on = world.sql("update pushpop.messages set fence = fence + 1");
    let client = Mutex::new(&mut client);
    let worker = Worker::new(&queue).handle("t", 1, |_| {
        client.lock().unwrap().batch_execute(&handed_on)?;
        Ok(())
    });
    let notes = Notes::default();
    assert!(notes.of(LevelFilter::ERROR, || worker.work_once().unwrap()));
    let logged = notes.logged();
    assert!(logged.contains("was not settled") && logged.contains(&id.to_string()), "{logged}");
}

/// A settle that is refused with a code that may pass is sent again, with pauses that grow, for as long as the
/// lease is held.
#[test]
fn a_settle_is_repeated_while_that_may_help() {
    let world = World::new();
    let queue = world.open(world.builder().lease(SECOND * 3));
    let client = Mutex::new(world.client());
    let mut settled = 0;
    // The code, how often it is refused, how often it is sent.
    for (code, refused, sent) in [
        ("40001", 3, 4..=4),
        ("53400", 3, 4..=4),
        ("P0001", 3, 1..=1),
        ("53400", 1_000, 2..=12),
        // Conflicts are repeated within a call, too.
        ("40001", 1_000, 2..=100),
    ] {
        let refuses = world.sql(&format!(
            "drop sequence if exists pushpop.sent;
            create sequence pushpop.sent;
            create or replace function pushpop.refuse() returns trigger language plpgsql as $$
            begin
              if nextval('pushpop.sent') <= {refused} then raise sqlstate '{code}'; end if;
              return new;
            end $$;
            drop trigger if exists refuse on pushpop.history;
            create trigger refuse before insert on pushpop.history
              for each row execute function pushpop.refuse();"
        ));
        let gone = world.sql("drop function if exists pushpop.heartbeat");
        queue.push("t", "m").unwrap();
        let worker = Worker::new(&queue).handle("t", 1, |_| {
            let mut client = client.lock().unwrap();
            client.batch_execute(&refuses)?;
            if refused == 1_000 {
                client.batch_execute(&gone)?;
            }
            Ok(())
        });
        let since = Instant::now();
        assert!(worker.work_once().unwrap());
        assert!(since.elapsed() < SOON, "{code}: {:?}", since.elapsed());
        let sql = world.sql("select case when is_called then last_value else 0 end from pushpop.sent");
        let times: i64 = client.lock().unwrap().query_one(&sql, &[]).unwrap().get(0);
        assert!(sent.contains(&times), "{code}, {refused} times: {times}");
        settled += u64::from(*sent.start() == 4);
        assert_eq!(stats(&queue, "t").settled(), settled, "{code}, {refused} times");
    }
}

#[test]
fn a_lease_is_extended_three_times_in_its_length() {
    let world = World::new();
    let queue = world.open(world.builder().lease(SECOND));
    queue.push("t", "m").unwrap();
    let client = Mutex::new(world.client());
    let sql = "select query_start::text from pg_stat_activity where application_name = $1 and query like '%heartbeat%'";
    let worker = Worker::new(&queue).handle("t", 1, |job| {
        let (mut beats, until_then) = (HashSet::new(), Instant::now() + SECOND * 3);
        while Instant::now() < until_then {
            let rows = client.lock().unwrap().query(sql, &[&world.schema])?;
            beats.extend(rows.iter().map(|row| row.get::<_, String>(0)));
            thread::sleep(SECOND / 100);
        }
        assert!(!job.is_lost() && (2..=15).contains(&beats.len()), "{beats:?}");
        Ok(())
    });
    assert!(worker.work_once().unwrap());
    assert_eq!(stats(&queue, "t").settled(), 1, "the handler failed");
}

/// What is settled is watched over no longer: nothing is sent for it.
#[test]
fn a_worker_without_work_extends_no_leases() {
    let world = World::new();
    let queue = world.open(world.builder().lease(SECOND));
    let worker = Worker::new(&queue).handle("t", 2, |_| Ok(()));
    let stopper = worker.stopper();
    let mut client = world.client();
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        queue.push_many("t", (0..50).map(|i| i.to_string())).unwrap();
        until("all are handled", || stats(&queue, "t").settled() == 50);
        thread::sleep(SECOND);
        assert!(!has_connection(&world, &mut client, "query like '%heartbeat%'"));
        stopper.stop();
        assert_eq!(running.join().unwrap().unfinished(), 0);
    });
}

// Several topics.

/// Of several that all have something none is served for ever before the others.
#[test]
fn one_message_at_a_time_each_topic_has_its_turn() {
    let world = World::new();
    let queue = world.queue();
    let topics = ["a", "b", "c"];
    for topic in topics {
        queue.push_many(topic, (0..40).map(|i| i.to_string())).unwrap();
    }
    let seen = Mutex::new(HashMap::new());
    let worker = Worker::new(&queue).handle_any(&topics, 1, |job| {
        *seen.lock().unwrap().entry(job.topic().to_owned()).or_insert(0) += 1;
        Ok(())
    });
    for _ in 0..40 {
        assert!(worker.work_once().unwrap());
    }
    assert_eq!(seen.lock().unwrap().len(), 3, "{seen:?}");
}

#[test]
fn a_pop_of_several_topics_takes_whichever_comes_first() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    assert!(queue.pop_any(&["a", "b"], Duration::ZERO).unwrap().is_none());
    assert!(queue.pop_any(&["a", "b"], Duration::from_millis(50)).unwrap().is_none());
    for topic in ["a", "b", "c"] {
        thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.pop_any(&["a", "b", "c"], SOON).unwrap().unwrap());
            ["a", "b", "c"].iter().for_each(|topic| until_wanted(&world, &mut client, topic));
            queue.push(topic, topic).unwrap();
            let lease = waiting.join().unwrap();
            assert_eq!((lease.topic(), text(lease.payload())), (topic, topic.to_owned()));
            lease.complete().unwrap();
        });
    }
    assert_eq!(queue.pop_any(&["a", ""], SOON).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(queue.pop_any(&[], SOON).unwrap_err().kind(), ErrorKind::Invalid);
    queue.push("a", "twice").unwrap();
    queue.pop_any(&["a", "a"], SOON).unwrap().unwrap().complete().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop_any(&["a", "b"], SOON).unwrap_err());
        thread::sleep(Duration::from_millis(50));
        queue.close();
        assert_eq!(waiting.join().unwrap().kind(), ErrorKind::Closed);
    });
}

/// Pushes to all topics at once, and pops from overlapping sets of them.
#[test]
fn pops_of_several_topics_lose_nothing_and_starve_nobody() {
    let world = World::new();
    let queue = world.queue();
    let topics = ["a", "b", "c", "d", "e"];
    let seen = Mutex::new(HashMap::new());
    thread::scope(|scope| {
        for topic in topics {
            let queue = &queue;
            scope.spawn(move || {
                for i in 0..100 {
                    queue.push(topic, format!("{topic}{i}")).unwrap();
                }
            });
        }
        for t in 0..10 {
            let (queue, seen) = (&queue, &seen);
            scope.spawn(move || {
                let mine: Vec<&str> = topics.iter().cycle().skip(t).take(3).copied().collect();
                while let Some(lease) = queue.pop_any(&mine, SECOND * 3).unwrap() {
                    assert!(mine.contains(&lease.topic()));
                    *seen.lock().unwrap().entry(text(lease.payload())).or_insert(0) += 1;
                    lease.complete().unwrap();
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), 500);
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
}

#[test]
fn a_worker_of_several_topics_serves_all() {
    let world = World::new();
    let queue = world.queue();
    let topics = ["a", "b", "c"];
    for topic in topics {
        queue.push_many(topic, (0..50).map(|i| format!("{i}"))).unwrap();
    }
    let worker = Worker::new(&queue).handle_any(&topics, 4, |_| Ok(()));
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        until("all are handled", || topics.iter().all(|topic| stats(&queue, topic).settled() == 50));
        worker.stopper().stop();
        assert_eq!(running.join().unwrap().unfinished(), 0);
    });
    assert!(topics.iter().all(|topic| stats(&queue, topic).leased() == 0));
}

/// Each pop used to ask the topics one after the other.
#[test]
fn a_worker_of_a_thousand_topics_serves_all_of_them() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let topics: Vec<String> = (0..1_000).map(|i| format!("t{i}")).collect();
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    let push = |client: &mut Client, each: i32| {
        let sql = world.sql(
            "select from generate_series(0, 999) i, generate_series(1, $1) j, pushpop.push('t' || i, j::text)",
        );
        client.execute(&sql, &[&each]).unwrap();
    };
    push(&mut client, 2);
    queue.push_many("t500", vec!["m"; 1_000]).unwrap();
    let seen = Mutex::new(HashMap::new());
    let handled = || seen.lock().unwrap().values().sum::<usize>();
    let worker = Worker::new(&queue).handle_any(&topics, 8, |job| {
        *seen.lock().unwrap().entry(job.topic().to_owned()).or_insert(0) += 1;
        Ok(())
    });
    thread::scope(|scope| {
        let running = scope.spawn(|| worker.run().unwrap());
        until("all are handled", || handled() == 3_000);
        // It waits now, and is told.
        thread::sleep(SECOND * 2);
        push(&mut client, 1);
        until("these, too", || handled() == 4_000);
        worker.stopper().stop();
        assert_eq!(running.join().unwrap().unfinished(), 0);
    });
    let seen = seen.lock().unwrap();
    assert!(
        seen.len() == 1_000 && seen.iter().all(|(topic, n)| *n == if topic == "t500" { 1_003 } else { 3 })
    );
}

/// The settles and pops of several handlers travel together: what keeps one of them from being settled is no matter of the
/// others. A message that was popped with such a settle used to lie in the handler's hands until that was done.
#[test]
fn a_settle_that_has_to_wait_holds_up_no_other_handler() {
    let world = World::new();
    // A settle waits for a lock for half a second.
    let queue = world.open(world.builder().operation_timeout(SECOND * 2));
    let mut client = world.client();
    let held = queue.push("t", "held").unwrap();
    let locked = AtomicBool::new(false);
    let handled = AtomicUsize::new(0);
    let worker = Worker::new(&queue).handle("t", 4, |job| {
        handled.fetch_add(1, Ordering::Relaxed);
        if job.payload() == b"held" {
            until("its row is locked", || locked.load(Ordering::Relaxed));
        }
        Ok(())
    });
    thread::scope(|scope| {
        let stopper = worker.stopper();
        let ended = scope.spawn(|| worker.run());
        until("it is at work", || handled.load(Ordering::Relaxed) == 1);
        let mut tx = client.transaction().unwrap();
        tx.query(&world.sql("select from pushpop.messages where id = $1 for update"), &[&held]).unwrap();
        locked.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        let mut pushed = 0;
        while begun.elapsed() < SECOND * 3 {
            queue.push_many("t", ["m"; 4]).unwrap();
            pushed += 4;
            until("the others are worked", || stats(&queue, "t").settled() == pushed);
        }
        assert!(matches!(queue.find("t", held).unwrap().unwrap().state(), State::Leased { .. }));
        tx.rollback().unwrap();
        until("it is settled, too", || stats(&queue, "t").settled() == pushed + 1);
        stopper.stop();
        assert_eq!(ended.join().unwrap().unwrap().unfinished(), 0);
        assert_eq!(handled.load(Ordering::Relaxed) as u64, pushed + 1, "nothing was handed out twice");
    });
}

// Signals.

#[cfg(feature = "signals")]
mod signals {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, ChildStdout, Command, Stdio};

    use super::*;

    /// What the child processes of these tests do.
    #[test]
    #[ignore = "is run by the tests of signals, as a process of its own"]
    fn child() {
        let Ok(url) = std::env::var("PUSHPOP_SIGNALS_URL") else { return };
        let schema = std::env::var("PUSHPOP_SIGNALS_SCHEMA").unwrap();
        let log = tracing_subscriber::fmt().with_max_level(LevelFilter::INFO).with_ansi(false);
        log.with_writer(std::io::stdout).init();
        let queue = Queue::builder().schema(schema).connect(&url).unwrap();
        let ended = Worker::new(&queue)
            .signals()
            .grace(SECOND * 2)
            .handle("t", 2, |job| {
                println!("begins");
                match job.payload() {
                    b"obedient" => until("it is told to stop", || job.should_stop()),
                    _ => loop {
                        thread::sleep(SECOND);
                        if job.is_lost() {
                            println!("lost");
                            break;
                        }
                    },
                }
                Ok(())
            })
            .run()
            .unwrap();
        println!("{ended} ({:?})", ended.signal());
        if std::env::var("PUSHPOP_SIGNALS_LINGER").is_ok() {
            thread::sleep(SOON);
        }
    }

    struct Process {
        child: Child,
        lines: std::io::Lines<BufReader<ChildStdout>>,
    }

    impl Process {
        fn start(world: &World, linger: bool) -> Self {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", "worker::signals::child", "--ignored", "--nocapture"])
                .env("PUSHPOP_SIGNALS_URL", &world.url)
                .env("PUSHPOP_SIGNALS_SCHEMA", &world.schema)
                .stdout(Stdio::piped());
            if linger {
                command.env("PUSHPOP_SIGNALS_LINGER", "yes");
            }
            let mut child = command.spawn().unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            Process { child, lines }
        }

        fn signal(&self, name: &str) {
            let kill = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
            assert!(kill.unwrap().success());
        }

        /// Waits for a line that ends like this: the first one has the harness's words before it.
        fn hears(&mut self, end: &str) {
            assert!(self.lines.by_ref().any(|line| line.unwrap().ends_with(end)), "it never said {end:?}");
        }

        fn status(&mut self) -> Option<i32> {
            self.lines.by_ref().for_each(drop);
            self.child.wait().unwrap().code()
        }
    }

    #[test]
    fn the_first_drains() {
        let world = World::new();
        let queue = world.queue();
        let id = queue.push("t", "obedient").unwrap();
        let mut process = Process::start(&world, false);
        process.hears("begins");
        process.signal("TERM");
        process.hears("SIGTERM: no more messages are popped; waiting for handlers that run");
        process.hears("stopped by signal 15, all handlers have finished (Some(15))");
        assert_eq!(process.status(), Some(0));
        assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Completed { .. }));
    }

    #[test]
    fn what_outlives_the_grace_period_is_released() {
        let world = World::new();
        let queue = world.queue();
        queue.push("t", "stubborn").unwrap();
        let mut process = Process::start(&world, false);
        process.hears("begins");
        process.signal("INT");
        process.hears("SIGINT: no more messages are popped; waiting for handlers that run");
        let lease = pop(&queue, "t");
        assert_eq!(lease.attempt(), 1);
        process.hears("lost");
        process.hears("stopped by signal 2, one handler has outlived the grace period (Some(2))");
        assert_eq!(process.status(), Some(0), "the status of the harness");
        lease.complete().unwrap();
    }

    #[test]
    fn the_second_ends_the_process_at_once() {
        let world = World::new();
        let queue = world.queue();
        let id = queue.push("t", "stubborn").unwrap();
        let mut process = Process::start(&world, false);
        process.hears("begins");
        process.signal("INT");
        thread::sleep(Duration::from_millis(300));
        process.signal("TERM");
        assert_eq!(process.status(), Some(143));
        assert!(matches!(queue.find("t", id).unwrap().unwrap().state(), State::Leased { .. }));
    }

    #[test]
    fn after_the_worker_the_first_ends_the_process() {
        let world = World::new();
        world.queue();
        let mut process = Process::start(&world, true);
        thread::sleep(SECOND);
        process.signal("TERM");
        process.hears("SIGTERM: no more messages are popped; waiting for handlers that run");
        process.hears("stopped by signal 15, all handlers have finished (Some(15))");
        process.signal("TERM");
        let heard = process.lines.by_ref().map(Result::unwrap).find(|line| line.contains("SIGTERM"));
        assert_eq!((heard, process.status()), (None, Some(143)), "the worker listens no longer");
    }
}
