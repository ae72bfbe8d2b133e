//! What callers see of a network that breaks.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::uuid::Uuid;
use pushpop_pg::{Error, ErrorKind, NewMessage, Queue, State};
use pushpop_server::{Network, Proxy, Server};

use crate::world::{SOON, World, drain, pop, stats, text, until};

/// What the issue allows beyond a call's time-out, and what a busy machine may add to it.
const ALLOWANCE: Duration = Duration::from_millis(250 + 1750);
const TIMEOUT: Duration = Duration::from_secs(1);

fn open(world: &World, proxy: &Proxy) -> Queue {
    let builder = world.builder().operation_timeout(TIMEOUT).connect_timeout(TIMEOUT);
    builder.connect(&proxy.url()).unwrap()
}

type Call<'a> = Box<dyn FnOnce() -> Result<(), Error> + Send + 'a>;

/// Every call of a queue, each to be made once.
fn all_calls(queue: &Queue) -> Vec<(&'static str, Call<'_>)> {
    let mut leases = queue.pop_many("leases", 8, SOON).unwrap().into_iter();
    let mut lease = || leases.next().unwrap();
    let id = Uuid::now_v7();
    let (one, two, three, four, five, mut six) = (lease(), lease(), lease(), lease(), lease(), lease());
    let topic = || queue.topic("t");
    vec![
        ("push", Box::new(|| queue.push("t", "m").map(drop))),
        ("push_many", Box::new(|| queue.push_many("t", ["m", "n"]).map(drop))),
        ("push_once", Box::new(|| queue.push_once("t", "m").map(drop))),
        ("try_pop", Box::new(|| queue.try_pop("t").map(drop))),
        ("pop_timeout", Box::new(|| queue.pop_timeout("t", TIMEOUT).map(drop))),
        ("pop_many", Box::new(|| queue.pop_many("t", 5, TIMEOUT).map(drop))),
        ("pop_any", Box::new(|| queue.pop_any(&["t", "u"], TIMEOUT).map(drop))),
        ("complete", Box::new(|| one.complete().map_err(Into::into))),
        ("discard", Box::new(|| two.discard().map_err(Into::into))),
        ("release", Box::new(|| three.release().map_err(Into::into))),
        ("defer", Box::new(|| four.defer(SOON).map_err(Into::into))),
        ("fail", Box::new(|| five.fail("m").map_err(Into::into))),
        ("extend", Box::new(move || six.extend(SOON))),
        ("find", Box::new(move || queue.find("t", id).map(drop))),
        ("topics", Box::new(|| queue.topics().map(drop))),
        ("stats", Box::new(move || topic().stats().map(drop))),
        ("peek", Box::new(move || topic().peek(5).map(drop))),
        ("purge", Box::new(move || topic().purge().map(drop))),
        ("dead", Box::new(move || topic().dead(5).map(drop))),
        ("redrive", Box::new(move || topic().redrive(&[id]).map(drop))),
        ("redrive_all", Box::new(move || topic().redrive_all().map(drop))),
        ("purge_dead", Box::new(move || topic().purge_dead(SOON).map(drop))),
        ("pause", Box::new(|| queue.topic("v").pause())),
        ("settings", Box::new(move || topic().settings().map(drop))),
        ("cancel", Box::new(move || topic().cancel(id).map(drop))),
        ("reschedule", Box::new(move || topic().reschedule(id, SOON).map(drop))),
        ("transaction", Box::new(|| queue.transaction(|_| Ok(())))),
    ]
}

/// Breaks the network, makes every call at once, and mends it.
fn every_call_ends_in_time(network: Network) {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    let queue = open(&world, &proxy);
    queue.push_many("leases", vec!["m"; 8]).unwrap();
    let calls = all_calls(&queue);
    proxy.set(network);
    thread::scope(|scope| {
        let running: Vec<_> = calls
            .into_iter()
            .filter(|(name, _)| *name != "transaction")
            .map(|(name, call)| {
                scope.spawn(move || {
                    let started = Instant::now();
                    (name, call(), started.elapsed())
                })
            })
            .collect();
        for call in running {
            let (name, result, took) = call.join().unwrap();
            assert!(took < TIMEOUT + ALLOWANCE, "{name} took {took:?} ({network:?})");
            let Err(e) = result else {
                // A pop that waits finds nothing when it was not on its way.
                assert!(name.starts_with("pop_"), "{name} succeeded ({network:?})");
                continue;
            };
            assert!(matches!(e.kind(), ErrorKind::Timeout | ErrorKind::Connection), "{name}: {e:?}");
            assert!(e.is_retryable(), "{name}: {e:?}");
            assert!(!e.to_string().contains("postgres@"), "{e}");
        }
    });
    proxy.set(Network::Works);
    let mended = Instant::now();
    let message = NewMessage::new("after");
    until("the queue works again", || queue.push("after", message.clone()).is_ok());
    assert!(mended.elapsed() < Duration::from_secs(10), "it took {:?}", mended.elapsed());
    assert_eq!(drain(&queue, "after"), ["after"]);
}

#[test]
fn every_call_ends_in_time_when_the_network_is_silent() {
    every_call_ends_in_time(Network::Silent);
}

#[test]
fn every_call_ends_in_time_when_no_answer_comes() {
    every_call_ends_in_time(Network::OneWay);
}

#[test]
fn every_call_ends_in_time_when_connections_are_reset() {
    every_call_ends_in_time(Network::Reset);
}

/// A push that was sent and not answered may have happened; one that was not sent has not.
#[test]
fn an_error_says_whether_the_call_may_have_taken_effect() {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    let queue = open(&world, &proxy);
    // Each with a connection that is open: one that has to be made first would not get as far as the call.
    let holder = open(&world, &proxy);
    queue.push("t", "first").unwrap();
    let lease = pop(&holder, "t");

    proxy.set(Network::OneWay);
    let sent = NewMessage::new("sent");
    assert!(queue.push("t", sent.clone()).unwrap_err().is_indeterminate());
    let (lease, error) = lease.complete().unwrap_err().into_parts();
    assert!(error.is_indeterminate(), "{error:?}");

    proxy.set(Network::Reset);
    until("the connections are gone", || {
        let refused = queue.push("u", "never").unwrap_err();
        assert!(refused.is_retryable(), "{refused:?}");
        !refused.is_indeterminate()
    });

    proxy.set(Network::Works);
    until("the queue works again", || queue.push("t", sent.clone()).is_ok());
    lease.complete().unwrap();
    assert_eq!(drain(&queue, "t"), ["sent"], "pushed twice and stored once");
}

/// A router forgets all connections, idle ones too, and tells nobody. The first call that is not answered shows it.
#[test]
fn connections_that_were_forgotten_together_are_given_up_together() {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    let builder = world.builder().operation_timeout(TIMEOUT).connect_timeout(TIMEOUT).pool_size(8);
    let queue = builder.connect(&proxy.url()).unwrap();
    let together = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let held = queue.transaction(|_| {
                    together.wait();
                    Ok(())
                });
                held.unwrap();
            });
        }
    });
    proxy.set(Network::Lost);
    thread::sleep(Duration::from_millis(200));
    proxy.set(Network::Works);
    let message = NewMessage::new("m");
    let mut failed = 0;
    until("the queue works again", || {
        let pushed = queue.push("t", message.clone()).is_ok();
        failed += usize::from(!pushed);
        pushed
    });
    // The second is on its way before the first is written off.
    assert!(failed <= 2, "{failed} calls have found out, one after the other");
}

/// Connecting: the silence may begin before the server is reached, or in the middle of the start-up.
#[test]
fn connecting_ends_in_time() {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    for network in [Network::Silent, Network::OneWay, Network::Reset, Network::CutAfter(30)] {
        let world = World::on(&server.url());
        proxy.set(network);
        let started = Instant::now();
        let connected = world.builder().connect_timeout(TIMEOUT).connect(&proxy.url());
        let took = started.elapsed();
        let error = connected.map(drop).expect_err("there is no network");
        assert!(took < TIMEOUT + ALLOWANCE, "{network:?}: {took:?}");
        assert_eq!(error.kind(), ErrorKind::Connection, "{network:?}: {error:?}");
    }
}

#[test]
fn dropping_a_queue_does_not_wait_for_a_silent_network() {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    for network in [Network::Silent, Network::OneWay] {
        let queue = world.builder().connect(&proxy.url()).unwrap();
        queue.push("t", "m").unwrap();
        let lease = pop(&queue, "t");
        proxy.set(network);
        let started = Instant::now();
        drop(lease);
        drop(queue);
        assert!(started.elapsed() < ALLOWANCE, "{:?}", started.elapsed());
        proxy.set(Network::Works);
    }
}

/// A pop that waits rides through, and is served when the network is back.
#[test]
fn waiting_pops_ride_through_cuts() {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    let queue = open(&world, &proxy);
    let other = world.queue();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..6).map(|_| scope.spawn(|| queue.pop("t").unwrap())).collect();
        for network in [Network::Reset, Network::Silent, Network::OneWay] {
            thread::sleep(Duration::from_millis(200));
            proxy.set(network);
            thread::sleep(TIMEOUT * 2);
            proxy.set(Network::Works);
        }
        other.push_many("t", (0..6).map(|i| format!("{i}"))).unwrap();
        let mut seen: Vec<String> = waiting
            .into_iter()
            .map(|pop| {
                let lease = pop.join().unwrap();
                let payload = text(lease.payload());
                lease.complete().unwrap();
                payload
            })
            .collect();
        seen.sort();
        assert_eq!(seen, ["0", "1", "2", "3", "4", "5"]);
    });
}

/// A connection that only listens would wait for ever for a router that has forgotten it.
#[test]
fn a_listener_that_was_forgotten_listens_again() {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    let builder = world.builder().operation_timeout(TIMEOUT).connect_timeout(TIMEOUT);
    let queue = builder.poll_interval(Duration::from_secs(3600)).connect(&proxy.url()).unwrap();
    let other = world.queue();
    let mut client = world.client();
    let sql = "select pid from pg_stat_activity where application_name = $1 and query ilike 'listen%'";
    let mut listeners = || -> HashSet<i32> {
        client.query(sql, &[&world.schema]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    thread::scope(|scope| {
        let waiting = scope.spawn(|| queue.pop("t").unwrap().complete().unwrap());
        until("it listens", || !listeners().is_empty());
        let forgotten = listeners();
        proxy.set(Network::Lost);
        thread::sleep(Duration::from_millis(200));
        proxy.set(Network::Works);
        let since = Instant::now();
        while listeners().is_subset(&forgotten) {
            assert!(since.elapsed() < SOON * 4, "it never listens again");
            thread::sleep(Duration::from_millis(100));
        }
        other.push("t", "m").unwrap();
        waiting.join().unwrap();
    });
}

/// Replies are cut at any byte: of a push, a pop, a settle, and of a transaction up to its commit. Whatever was repeated
/// has happened once. `PUSHPOP_CUTS` says how often; all bytes of a reply are tried in turn.
#[test]
fn a_reply_that_is_cut_leaves_exactly_one() {
    let cuts: usize = std::env::var("PUSHPOP_CUTS").map_or(120, |n| n.parse().unwrap());
    let parts: Vec<[usize; 4]> =
        (0..cuts).step_by(400).map(|first| cut_replies(first..cuts.min(first + 400))).collect();
    let [cut, repeated, in_doubt, effects] =
        [0, 1, 2, 3].map(|figure| parts.iter().map(|part| part[figure]).sum::<usize>());
    assert!(cut * 2 > cuts, "only {cut} replies were cut");
    assert!(in_doubt > 0, "no commit was without an answer, though {repeated} transactions were repeated");
    println!(
        "{cut} replies were cut; {repeated} transactions repeated, {in_doubt} after a commit without an answer; {effects} effects"
    );
}

/// Returns how many replies were cut, how many transactions repeated, how many of these after a commit without an answer, and
/// how many effects there are.
fn cut_replies(cuts: Range<usize>) -> [usize; 4] {
    let server = Server::shared();
    let proxy = Proxy::before(server).unwrap();
    let world = World::on(&server.url());
    let queue = world.builder().pool_size(1).connect(&proxy.url()).unwrap();
    let short = queue.with_lease(Duration::from_secs(1));
    let mut client = world.client();
    client.batch_execute(&world.sql("create table pushpop.effects (payload text)")).unwrap();
    let effect = world.sql("insert into pushpop.effects values ($1)");
    queue.push("t", "warm").unwrap();
    pop(&queue, "t").complete().unwrap();
    let mut pushed: HashSet<String> = HashSet::new();
    let mut seen: Vec<String> = Vec::new();
    let (mut repeated, mut in_doubt, mut in_transactions) = (0, 0, 0);
    for cut in cuts {
        let payload = format!("{cut}");
        // A reply has about 50 to 300 bytes; one that ends before is cut in the next call. Those of a transaction have
        // some 280 together, and the last of them is that of the commit.
        let at = if cut % 4 < 3 { cut / 4 * 7 % 240 } else { 170 + cut / 4 * 7 % 120 };
        let arm = |turn: usize| {
            if cut % 4 == turn {
                proxy.set(Network::CutAfter(at));
            }
        };
        arm(0);
        let message = NewMessage::new(payload.clone());
        queue.push("t", message.clone()).unwrap();
        assert!(!queue.push_once("t", message).unwrap(), "a push was lost: {payload}");
        pushed.insert(payload);
        arm(1);
        // What a reply that was cut had handed out comes again when its lease is over.
        if let Some(lease) = short.try_pop("t").unwrap() {
            let payload = text(lease.payload());
            arm(2);
            arm(3);
            if cut % 4 < 3 {
                match lease.complete() {
                    Ok(()) => seen.push(payload),
                    // It took so long that the lease was over.
                    Err(e) if e.error().kind() == ErrorKind::LeaseLost => {}
                    Err(e) => panic!("{e:?}"),
                }
            } else {
                let lost = loop {
                    match queue.transaction(|tx| {
                        tx.execute(&effect, &[&payload])?;
                        lease.complete_in(tx)
                    }) {
                        Ok(()) => break false,
                        Err(e) if e.kind() == ErrorKind::LeaseLost => break true,
                        Err(e) if e.is_retryable() => {
                            repeated += 1;
                            in_doubt += usize::from(e.is_indeterminate());
                        }
                        Err(e) => panic!("{e:?}"),
                    }
                };
                // Of a lease that was over, or of the transaction that had been committed before it was repeated.
                let settled = !lost
                    || queue
                        .find("t", lease.id())
                        .unwrap()
                        .is_some_and(|m| matches!(m.state(), State::Completed { .. }));
                if settled {
                    seen.push(payload);
                    in_transactions += 1;
                }
            }
        }
        proxy.set(Network::Works);
    }
    until("all are settled", || {
        if let Some(lease) = queue.try_pop("t").unwrap() {
            seen.push(text(lease.payload()));
            lease.complete().unwrap();
        }
        seen.len() >= pushed.len()
    });
    assert_eq!(seen.len(), pushed.len(), "settled twice");
    assert_eq!(seen.into_iter().collect::<HashSet<_>>(), pushed);
    assert_eq!(stats(&queue, "t").settled(), pushed.len() as u64 + 1);
    let sql = world.sql("select count(*), count(distinct payload) from pushpop.effects");
    let row = client.query_one(&sql, &[]).unwrap();
    let (effects, different) = (row.get::<_, i64>(0) as usize, row.get::<_, i64>(1) as usize);
    assert_eq!((effects, different), (in_transactions, in_transactions), "effects, and different ones");
    [proxy.cuts(), repeated, in_doubt, effects]
}
