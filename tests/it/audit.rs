//! No message is ever without a place: it is in one run or in one lease, whatever clients do.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use postgres::Client;
use pushpop_pg::{Lease, NewMessage, Queue, uuid::Uuid};

use crate::world::{World, until};

#[path = "../rules/mod.rs"]
mod rules;

pub(crate) fn audit(world: &World, client: &mut Client) {
    let mut tx =
        client.build_transaction().isolation_level(postgres::IsolationLevel::RepeatableRead).start().unwrap();
    for (rule, sql) in rules::RULES {
        let broken: Vec<Uuid> =
            tx.query(&world.sql(sql), &[]).unwrap().iter().map(|row| row.get(0)).collect();
        assert!(broken.is_empty(), "{rule}: {broken:?}");
    }
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    queue.push_many("t", (0..60).map(|i| i.to_string())).unwrap();
    let leases = queue.pop_many("t", 30, Duration::ZERO).unwrap();
    assert_eq!(leases.len(), 30);
    audit(&world, &mut world.client());
}

#[test]
fn the_audit_can_fail() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "x").unwrap();
    let mut client = world.client();
    client.batch_execute(&world.sql("delete from pushpop.runs")).unwrap();
    let audited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| audit(&world, &mut client)));
    assert!(audited.is_err());
}

/// Threads of two queues do everything at once, leases are dropped and expire, backends are
/// terminated: every message keeps its place, and all are settled in the end.
#[test]
fn a_storm_leaves_no_message_without_a_place() {
    let world = World::new();
    let builder = || world.builder().lease(Duration::from_secs(1)).max_attempts(None).pool_size(3);
    let queues = [world.open(builder()), world.open(builder().keep_settled(Duration::ZERO))];
    let pushed = Mutex::new(HashSet::new());
    let calm = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);

    thread::scope(|scope| {
        for worker in 0..8_u64 {
            let (queue, pushed, calm, rounds) = (&queues[(worker % 2) as usize], &pushed, &calm, &rounds);
            scope.spawn(move || {
                let mut round = worker;
                while !calm.load(Ordering::Relaxed) {
                    work(queue, round, pushed);
                    round = round.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(worker * 2 + 1);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut client = world.client();
        for blow in 1..=10 {
            until("the workers go on", || rounds.load(Ordering::Relaxed) >= blow * 60);
            client
                .execute(
                    "select pg_terminate_backend(pid) from (select pid from pg_stat_activity
                     where application_name = $1 and pid <> pg_backend_pid() order by random() limit 2) a",
                    &[&world.schema],
                )
                .unwrap();
            audit(&world, &mut client);
        }
        calm.store(true, Ordering::Relaxed);
    });

    let mut client = world.client();
    audit(&world, &mut client);
    let pushed = pushed.into_inner().unwrap();
    assert!(pushed.len() > 200, "only {} were pushed", pushed.len());
    let left = world.sql("select count(*) from pushpop.messages where state in ('p', 'd', 'r', 'f', 'e')");
    until("all are settled", || {
        let leases = queues[0].pop_many("t", 500, Duration::from_millis(500)).unwrap();
        queues[0].complete_many(leases).map_or_else(|e| drop(e.into_parts()), drop);
        client.query_one(&left, &[]).unwrap().get::<_, i64>(0) == 0
    });
    audit(&world, &mut client);
}

/// One round of a worker's. Errors are part of the storm: what they leave open, the audit checks.
fn work(queue: &Queue, dice: u64, pushed: &Mutex<HashSet<Uuid>>) {
    let note = |ids: Vec<Uuid>| pushed.lock().unwrap().extend(ids);
    match dice >> 60 {
        0..=2 => note(queue.push("t", dice.to_string()).into_iter().collect()),
        3 => note(queue.push_many("t", (0..40).map(|i| i.to_string())).unwrap_or_default()),
        4 => {
            let late = NewMessage::new("late").delay(Duration::from_millis(dice % 300));
            note(queue.push("t", late).into_iter().collect());
        }
        n => {
            let max = if n % 2 == 0 { 1 } else { 7 };
            let leases = queue.pop_many("t", max, Duration::ZERO).unwrap_or_default();
            for (i, lease) in leases.into_iter().enumerate() {
                settle(lease, (dice >> (i * 3)) % 8);
            }
        }
    }
}

fn settle(mut lease: Lease, dice: u64) {
    let done = match dice {
        0 | 1 => lease.complete(),
        2 => lease.discard(),
        3 => lease.release(),
        4 => lease.defer(Duration::from_millis(20)),
        5 => lease.fail("thunder"),
        6 => {
            let _ = lease.extend(Duration::from_secs(1));
            lease.complete()
        }
        _ => return drop(lease),
    };
    drop(done);
}
