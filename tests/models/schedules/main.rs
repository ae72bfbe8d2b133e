//! The queue's own threads under many schedules: group commit, and who wakes whom.
//!
//! What runs is the crate's source, copied by `build.rs`, with the locks and threads of `shuttle`, a clock of its own and
//! a server in memory: see [`world`]. Variants that are broken on purpose show that a schedule can tell.
//!
//! `PUSHPOP_SCHEDULES` says how many schedules each scenario gets. A schedule that fails is named by its seed:
//! `PUSHPOP_SEED` begins with it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::duplicate_mod, reason = "the sources are there twice, and so is what stands around them")]

/// Copies of sources, as modules.
macro_rules! sources {
    ($copy:literal) => {
        sources! { $copy: calls crew engine error flight home keeper lane lease limits listener message observer queue
            slot span stopping task topic upkeep }
    };
    ($copy:literal: $($file:ident)*) => {$(
        pub(crate) mod $file {
            include!(concat!(env!("OUT_DIR"), "/", $copy, "/", stringify!($file), ".rs"));
        }
    )*};
}

#[allow(warnings, clippy::all, reason = "the switches of the variants are no good style")]
mod broken;
#[allow(dead_code, missing_docs, unexpected_cfgs, unreachable_pub, reason = "only a part of it is used here")]
mod real;
#[allow(dead_code, reason = "some of it is for `build.rs`")]
mod variants;
mod world;

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use crate::variants::VARIANTS;
use crate::world::schedule::{Progress, Schedules};

/// How many schedules each scenario gets.
const SCHEDULES: usize = 10_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

/// A schedule that fails.
struct Failure {
    seed: u64,
    message: String,
}

/// Runs a scenario so many times, or until it fails. Returns how often.
fn run(scenario: fn(), schedules: usize) -> (usize, Option<Failure>) {
    let mut config = Config::new();
    config.stack_size = 0x2_0000;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(50_000);
    config.silence_warnings = true;
    let first = number("PUSHPOP_SEED").unwrap_or_else(|| RandomState::new().hash_one(0));
    let progress = Arc::new(Progress::default());
    let runner = Runner::new(Schedules::new(first, schedules, &progress), config);
    let ran = catch_unwind(AssertUnwindSafe(|| runner.run(move || world::run(scenario))));
    let seed = progress.seed.load(Ordering::Relaxed);
    let failure = ran.err().map(|panic| Failure { seed, message: message(&*panic).to_owned() });
    (progress.begun.load(Ordering::Relaxed), failure)
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words")
}

fn holds(scenario: fn()) {
    let schedules =
        number("PUSHPOP_SCHEDULES").map_or(SCHEDULES, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let begun = Instant::now();
    real::scenarios::SEEN.take();
    let (ran, failure) = run(scenario, schedules);
    if let Some(Failure { seed, message }) = failure {
        panic!("{message}\nto repeat it, run this test with PUSHPOP_SEED={seed} PUSHPOP_SCHEDULES=1");
    }
    println!("{ran} schedules in {:.1?}: {:?}", begun.elapsed(), real::scenarios::SEEN.get());
}

fn refuted(variant: &'static str, scenario: fn()) {
    broken::switch_on(variant);
    let (ran, failure) = run(scenario, 200_000);
    let Some(Failure { message, .. }) = failure else { panic!("{variant}: not refuted by {ran} schedules") };
    println!("{variant}: {message}, after {ran} schedules");
}

macro_rules! scenarios {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            holds(real::scenarios::$name);
        }
    )*};
}

scenarios! {
    all_are_served
    a_flight_that_fails
    a_flight_that_panics
    closing
    deadlines
    called_off
    several_topics
    workers_of_several_topics
    large_messages
    overdue_flights
    two_processes
    a_delayed_push_during_a_flight
    piled_up_behind_calls_that_are_over
    what_is_given_back
    a_push_while_all_are_on_flights
    waiting_costs_little
    threads_that_cannot_be_started
}

mod refuted {
    //! Each variant fails by a schedule.

    use super::*;

    macro_rules! variants {
        ($($name:ident by $scenario:ident;)*) => {
            $(
                #[test]
                fn $name() {
                    refuted(stringify!($name), broken::scenarios::$scenario);
                }
            )*

            #[test]
            fn all_of_them() {
                let tested = [$(stringify!($name)),*];
                assert!(VARIANTS.iter().map(|variant| variant.name).eq(tested));
            }
        };
    }

    variants! {
        an_answer_wakes_nobody by all_are_served;
        a_thread_that_sleeps_is_not_woken by all_are_served;
        a_lane_is_not_listed_again by all_are_served;
        answers_go_to_neighbours by all_are_served;
        pops_that_are_left_behind_are_not_next by all_are_served;
        a_push_signals_no_pop_that_is_on_its_way by all_are_served;
        a_pop_is_not_put_back by all_are_served;
        a_landing_tells_nobody_outside by all_are_served;
        nobody_is_told_of_a_panic by a_flight_that_panics;
        closing_does_not_wait by closing;
        what_came_for_nobody_is_dropped by deadlines;
        an_overdue_flight_is_not_written_off by overdue_flights;
        a_flight_that_is_written_off_keeps_its_connection by overdue_flights;
        a_group_is_not_woken by several_topics;
        those_that_were_not_asked_are_told_that_there_is_nothing by large_messages;
        a_signal_that_finds_nobody_is_dropped by a_push_while_all_are_on_flights;
        a_signal_that_found_nobody_is_forgotten by a_push_while_all_are_on_flights;
        a_look_that_falls_due_during_a_flight_is_dropped by a_delayed_push_during_a_flight;
        a_look_that_is_overdue_at_a_landing_is_dropped by a_delayed_push_during_a_flight;
        a_lane_is_asked_once by piled_up_behind_calls_that_are_over;
        what_is_given_back_wakes_nobody by what_is_given_back;
        those_that_wait_look_again_and_again by waiting_costs_little;
        a_calm_group_is_not_told_of_delays by workers_of_several_topics;
        listening_begins_without_a_look by two_processes;
        nobody_hears_a_notification by two_processes;
        a_push_stays_queued_whose_caller_was_told_that_it_failed by threads_that_cannot_be_started;
        a_thread_that_could_not_be_started_is_not_tried_again by threads_that_cannot_be_started;
    }
}
