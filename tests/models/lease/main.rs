//! The lease protocol of the queue, so small that all that can happen in it can be looked at.
//!
//! What is modelled is what the SQL does: the same statements in the same order, with the same locks and the same second
//! looks after a wait, under READ COMMITTED. It is a check of the protocol, not of the code, and has to be kept as
//! the SQL is. A `Bug` is a protocol that was not taken, or not kept: that each is refuted shows that the
//! model can tell.

#![allow(clippy::panic, reason = "a test fails by panicking")]

mod model;
mod row;

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::model::{Bug, Protocol, Verb};

/// Two consumers; calls go on when nobody waits for them.
const BASE: Protocol = Protocol {
    clients: 2,
    sessions: 2,
    pops: 2,
    clock: 2,
    verbs: &[Verb::Complete],
    extensions: 0,
    crashes: 0,
    cuts: 0,
    aborts: 0,
    attempts: 9,
    upkeeps: 0,
    bug: None,
};

/// Worlds that together have all that the protocol knows. The large ones are looked at breadth first up to a number of
/// steps, unless `PUSHPOP_MODELS=full` says that there is time and memory for all of them.
fn worlds() -> Vec<(&'static str, Protocol)> {
    let settles = |verb| Protocol { verbs: verb, clock: 1, attempts: 2, ..BASE };
    vec![
        ("complete", settles(&[Verb::Complete])),
        ("release", settles(&[Verb::Release])),
        ("fail", settles(&[Verb::Fail])),
        ("extend", Protocol { extensions: 1, ..BASE }),
        ("lost answers", Protocol { sessions: 3, cuts: 1, ..BASE }),
        ("crashes and rollbacks", Protocol { crashes: 1, aborts: 1, ..BASE }),
        ("upkeep and late commits", Protocol { upkeeps: 1, clock: 3, ..BASE }),
        ("three consumers", Protocol { clients: 3, sessions: 3, pops: 3, ..BASE }),
    ]
}

#[test]
fn nothing_is_lost_handed_out_twice_or_counted_twice() {
    let full = std::env::var("PUSHPOP_MODELS").is_ok_and(|v| v == "full");
    let mut states = 0;
    for (name, world) in worlds() {
        let begun = Instant::now();
        let checker = world.checker().threads(2).target_state_count(if full { usize::MAX } else { 500_000 });
        let checker = checker.spawn_bfs().join();
        println!("{name}: {} states in {:.1?}", checker.unique_state_count(), begun.elapsed());
        checker.assert_properties();
        states += checker.unique_state_count();
    }
    println!("{states} states");
    assert!(states >= 500_000, "only {states} states");
}

/// The shortest way to what is broken. The right protocol takes the same steps without harm, as far as it can.
fn refuted(world: Protocol, property: &'static str) {
    let bug = world.bug;
    let right = Protocol { bug: None, ..world.clone() };
    let checker = world.checker().threads(2).target_state_count(3_000_000);
    let checker = checker.finish_when(HasDiscoveries::AnyOf([property].into())).spawn_bfs().join();
    let path = checker.discovery(property).unwrap_or_else(|| panic!("{bug:?} is not refuted"));
    let actions = path.into_actions();
    println!("{bug:?}: {} states; {actions:?}", checker.unique_state_count());
    let mut state = right.init_states().remove(0);
    for action in actions {
        state = right.next_state(&state, action).unwrap_or(state);
    }
    for property in right.properties() {
        assert!((property.condition)(&right, &state), "{}", property.name);
    }
}

#[test]
fn an_unfenced_settle_is_refuted() {
    let world = Protocol { verbs: &[Verb::Complete], clock: 1, bug: Some(Bug::UnfencedSettle), ..BASE };
    refuted(world, "a stale settle changes nothing");
}

/// It was so in the code once: told that its lease was extended, and the message was somebody else's.
#[test]
fn an_extension_that_does_not_lock_the_message_is_refuted() {
    let world = Protocol { extensions: 1, verbs: &[], bug: Some(Bug::ExtendWithoutLock), ..BASE };
    refuted(world, "one live lease");
}

#[test]
fn a_reclaim_without_a_second_look_is_refuted() {
    let world = Protocol { extensions: 1, verbs: &[], bug: Some(Bug::NoSecondLook), ..BASE };
    refuted(world, "one live lease");
}

#[test]
fn a_lease_that_goes_with_the_first_of_its_messages_is_refuted() {
    refuted(Protocol { bug: Some(Bug::SiblingsForgotten), ..BASE }, "no message is lost");
}

#[test]
fn the_clock_of_a_client_is_refuted() {
    refuted(Protocol { verbs: &[], bug: Some(Bug::ClientClock), ..BASE }, "one live lease");
}

#[test]
fn a_settle_that_is_counted_again_when_it_is_repeated_is_refuted() {
    let world = Protocol { sessions: 3, cuts: 1, clock: 0, bug: Some(Bug::OpenTwice), ..BASE };
    refuted(world, "no message is lost");
}

#[test]
fn a_mark_that_is_never_begun_anew_is_refuted() {
    let world = Protocol { upkeeps: 1, clock: 3, verbs: &[], bug: Some(Bug::MarkForEver), ..BASE };
    refuted(world, "everything can come to an end");
}

#[test]
fn a_batch_that_writes_to_what_its_rows_have_become_is_refuted() {
    let world = Protocol { clock: 1, bug: Some(Bug::CtidNotLookedAtAgain), ..BASE };
    refuted(world, "a stale settle changes nothing");
}
