//! The order of a topic, so small that all that can happen in it can be looked at: no message is ever behind the low
//! watermark without a committed late entry, however late what put it there is committed.
//!
//! What is modelled is `sql/0001/order.sql`, statement by statement: `enqueue`, `note_look`, `begin_sweep`, and a pop from
//! the watermark. It is a check of the protocol, not of the code, and has to be kept as the SQL is. Each `Bug` has to be
//! refuted.

#![allow(clippy::panic, reason = "a test fails by panicking")]

mod model;
#[path = "../lease/row.rs"]
mod row;

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::model::{Bug, Protocol};

/// Three sessions: one may look while two others put the same message again and again.
const BASE: Protocol = Protocol {
    sessions: 3,
    clock: 3,
    messages: 2,
    pops: 2,
    slow_pops: false,
    looks: 2,
    apart: false,
    sweeps: 0,
    aborts: 0,
    bug: None,
};

/// Worlds that together have all that the protocol knows. The large ones are looked at breadth first up to a number of
/// steps, unless `PUSHPOP_MODELS=full` says that there is time and memory for all of them.
fn worlds() -> Vec<(&'static str, Protocol)> {
    vec![
        ("three sessions", BASE),
        ("three looks", Protocol { looks: 3, apart: true, messages: 1, ..BASE }),
        ("sweeps and rollbacks", Protocol { sweeps: 1, aborts: 1, ..BASE }),
        ("pops that are committed late", Protocol { slow_pops: true, ..BASE }),
        ("a message that bounces", Protocol { messages: 1, pops: 4, looks: 3, ..BASE }),
    ]
}

#[test]
fn no_message_is_hidden_behind_the_watermark() {
    let full = std::env::var("PUSHPOP_MODELS").is_ok_and(|v| v == "full");
    let mut states = 0;
    for (name, world) in worlds() {
        let begun = Instant::now();
        let checker =
            world.checker().threads(2).target_state_count(if full { usize::MAX } else { 4_000_000 });
        let checker = checker.spawn_bfs().join();
        println!("{name}: {} states in {:.1?}", checker.unique_state_count(), begun.elapsed());
        checker.assert_properties();
        states += checker.unique_state_count();
    }
    println!("{states} states");
    assert!(states >= 500_000, "only {states} states");
}

/// The shortest way to what is broken. The right protocol takes the same steps without harm, as far as it can.
#[track_caller]
fn refuted(bug: Bug) {
    // The third look is the one that goes wrong there.
    let right = if bug == Bug::EntriesUnseen {
        Protocol { sessions: 2, messages: 1, pops: 0, looks: 3, ..BASE }
    } else {
        Protocol { messages: 1, apart: true, ..BASE }
    };
    let world = Protocol { bug: Some(bug), ..right.clone() };
    let property = "every message is in reach";
    let checker = world.checker().threads(2).target_state_count(5_000_000);
    let checker = checker.finish_when(HasDiscoveries::AnyOf([property].into())).spawn_bfs().join();
    let path = checker.discovery(property).unwrap_or_else(|| panic!("{bug:?} is not refuted"));
    let actions = path.into_actions();
    println!("{bug:?}: {} states; {actions:?}", checker.unique_state_count());
    let mut state = right.init_states().remove(0);
    for action in actions {
        state = right.next_state(&state, action).unwrap_or(state);
        for property in right.properties() {
            assert!((property.condition)(&right, &state), "{}", property.name);
        }
    }
}

#[test]
fn a_late_entry_that_is_shared_is_refuted() {
    refuted(Bug::SharedEntry);
}

#[test]
fn a_message_that_is_given_back_without_a_late_entry_is_refuted() {
    refuted(Bug::NoEntry);
}

#[test]
fn a_watermark_without_a_horizon_is_refuted() {
    refuted(Bug::NoHorizon);
}

#[test]
fn a_horizon_that_does_not_wait_for_all_is_refuted() {
    refuted(Bug::OneHasEnded);
}

#[test]
fn a_clock_that_is_read_before_the_lock_is_refuted() {
    refuted(Bug::ClockBeforeLock);
}

#[test]
fn a_look_in_an_old_snapshot_is_refuted() {
    refuted(Bug::OldSnapshot);
}

#[test]
fn late_entries_that_are_deleted_unseen_are_refuted() {
    refuted(Bug::EntriesUnseen);
}

#[test]
fn runs_that_are_read_before_the_late_entries_are_deleted_are_refuted() {
    refuted(Bug::RunsReadFirst);
}
