//! Calls for many topics at once, which share flights as those for one do.

use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Duration;

use pushpop_pg::{ErrorKind, Lease};

use crate::world::{World, drain, pop, text};

/// Holds up the first flight, calls `work` for 24 topics from a thread each, and lets go: what came
/// meanwhile leaves together.
fn pile_up<T: Send>(world: &World, work: impl Fn(&str) -> T + Sync) -> Vec<(String, T)> {
    let mut holder = world.client();
    let barrier = Barrier::new(25);
    thread::scope(|scope| {
        let mut tx = holder.transaction().unwrap();
        tx.batch_execute(&world.sql("lock table pushpop.messages in access exclusive mode")).unwrap();
        let calls: Vec<_> = (0..24)
            .map(|i| {
                let (barrier, work, topic) = (&barrier, &work, format!("t{i}"));
                scope.spawn(move || {
                    barrier.wait();
                    let result = work(&topic);
                    (topic, result)
                })
            })
            .collect();
        barrier.wait();
        thread::sleep(Duration::from_millis(200));
        tx.rollback().unwrap();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    })
}

/// Has every transaction that writes messages or leases leave its number.
fn count_transactions(world: &World) {
    world
        .client()
        .batch_execute(&world.sql(
            "create table pushpop.seen (tx xid8);
             create function pushpop.note_tx() returns trigger language plpgsql as $$
             begin
               insert into pushpop.seen values (pg_current_xact_id());
               return null;
             end $$;
             create trigger seen after insert or update on pushpop.messages execute function pushpop.note_tx();
             create trigger seen after insert on pushpop.leases execute function pushpop.note_tx()",
        ))
        .unwrap();
}

fn transactions(world: &World) -> i64 {
    let sql = "with gone as (delete from pushpop.seen returning tx) select count(distinct tx) from gone";
    world.client().query_one(&world.sql(sql), &[]).unwrap().get(0)
}

#[test]
fn pushes_pops_and_settles_for_many_topics_share_commits() {
    let world = World::new();
    let queue = world.queue();
    count_transactions(&world);
    pile_up(&world, |topic| queue.push(topic, topic).unwrap());
    let pushed = transactions(&world);
    assert!(pushed < 24, "24 pushes took {pushed} transactions");

    let leases = pile_up(&world, |topic| pop(&queue, topic));
    let popped = transactions(&world);
    assert!(popped < 24, "24 pops took {popped} transactions");
    for (topic, lease) in &leases {
        assert_eq!((lease.topic(), text(lease.payload())), (&**topic, topic.clone()));
    }

    let leases = Mutex::new(leases);
    let settled = pile_up(&world, |_| {
        let (_, lease) = leases.lock().unwrap().pop().unwrap();
        lease.complete().is_ok()
    });
    assert!(settled.iter().all(|(_, ok)| *ok));
    let settled = transactions(&world);
    assert!(settled < 24, "24 settles took {settled} transactions");
}

/// Together these have more bytes than a flight carries: whoever is left behind is not told that there is nothing.
#[test]
fn flights_that_are_full_leave_nobody_empty_handed() {
    let world = World::new();
    let queue = world.queue();
    let payload = vec![7; 3 << 20];
    for i in 0..24 {
        queue.push(&format!("t{i}"), payload.clone()).unwrap();
    }
    for (topic, lease) in pile_up(&world, |topic| queue.try_pop(topic).unwrap()) {
        let lease = lease.unwrap_or_else(|| panic!("nothing in {topic}"));
        assert_eq!((lease.topic(), lease.payload() == payload), (&*topic, true));
        lease.release().unwrap();
    }
    let each: Vec<String> = (0..24).map(|i| format!("t{i}")).collect();
    let each: Vec<&str> = each.iter().map(String::as_str).collect();
    let popped = pile_up(&world, |_| {
        queue.pop_any(&each, Duration::ZERO).unwrap().map(|lease| lease.complete().unwrap())
    });
    assert!(popped.iter().all(|(_, popped)| popped.is_some()));
}

/// One of the topics has a message that the server refuses: by a trigger, as nothing that passes the
/// limits is refused otherwise.
#[test]
fn an_error_for_one_topic_reaches_its_own_caller_only() {
    let world = World::new();
    let queue = world.queue();
    world
        .client()
        .batch_execute(&world.sql(
            "create function pushpop.refuse_poison() returns trigger language plpgsql as $$
             begin
               if new.topic = 't7' then raise exception 'poisoned' using errcode = 'P0042'; end if;
               return new;
             end $$;
             create trigger poison before insert on pushpop.messages for each row execute function pushpop.refuse_poison();
             create trigger poison before insert on pushpop.leases for each row execute function pushpop.refuse_poison();
             alter table pushpop.leases disable trigger poison",
        ))
        .unwrap();
    for (topic, pushed) in pile_up(&world, |topic| queue.push(topic, "m")) {
        match &*topic {
            "t7" => assert_eq!(pushed.unwrap_err().sqlstate(), Some("P0042")),
            _ => drop(pushed.unwrap()),
        }
    }
    world
        .client()
        .batch_execute(&world.sql(
            "alter table pushpop.messages disable trigger poison; select pushpop.push('t7', 'm');
             alter table pushpop.leases enable trigger poison",
        ))
        .unwrap();
    for (topic, popped) in pile_up(&world, |topic| queue.try_pop(topic)) {
        match &*topic {
            "t7" => assert_eq!(popped.unwrap_err().sqlstate(), Some("P0042")),
            _ => popped.unwrap().unwrap().complete().unwrap(),
        }
    }
}

#[test]
fn a_lost_lease_of_one_topic_fails_alone() {
    let world = World::new();
    let queue = world.queue();
    let leases: Vec<Lease> = (0..24)
        .map(|i| {
            let seconds = if i == 7 { 1 } else { 300 };
            queue.push(&format!("t{i}"), format!("m{i}")).unwrap();
            pop(&queue.with_lease(Duration::from_secs(seconds)), &format!("t{i}"))
        })
        .collect();
    let fresh = pop(&queue, "t7");
    let leases = Mutex::new(leases);
    let settled = pile_up(&world, |_| {
        let lease = leases.lock().unwrap().pop().unwrap();
        (lease.topic().to_owned(), lease.complete())
    });
    for (_, (topic, settled)) in settled {
        match settled {
            Ok(()) => assert_ne!(topic, "t7"),
            Err(e) => assert_eq!((&*topic, e.error().kind()), ("t7", ErrorKind::LeaseLost)),
        }
    }
    fresh.complete().unwrap();
}

/// A producer and a consumer for each topic, all on one queue.
#[test]
fn every_topic_keeps_its_order() {
    let world = World::new();
    let queue = world.queue();
    thread::scope(|scope| {
        for t in 0..12 {
            let queue = &queue;
            scope.spawn(move || {
                for i in 0..60 {
                    let topic = format!("t{t}");
                    match i % 5 {
                        0 => drop(queue.push_many(&topic, [format!("{i:02}a"), format!("{i:02}b")]).unwrap()),
                        _ => drop(queue.push(&topic, format!("{i:02}")).unwrap()),
                    }
                }
            });
        }
    });
    for t in 0..12 {
        let seen = drain(&queue, &format!("t{t}"));
        assert_eq!(seen.len(), 72);
        assert!(seen.is_sorted(), "{seen:?}");
    }
}
