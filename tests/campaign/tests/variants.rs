//! The checker against systems that are broken on purpose: each must be caught, by the property that says so; and
//! against the same campaigns of a whole system, which must pass.

#![allow(clippy::unwrap_used)]

use std::process::Command;

const NO_LOSS: u8 = 1;
const NO_PHANTOM: u8 = 2;
const ONE_LIVE_LEASE: u8 = 3;
const TOKENS: u8 = 4;
const ORDER: u8 = 5;
const LIVENESS: u8 = 6;
const EXACTLY_ONE_EFFECT: u8 = 7;
const PUSHED_ONCE: u8 = 8;
const SERVED_AGAIN: u8 = 9;
const IN_REACH: u8 = 10;

/// Consumers are killed while they hold messages.
const KILLS: &str =
    "smoke --messages 600 --kills 12 --server-kills 0 --workers 4 --lease 1000 --interval 200 --work 20";
/// They are stopped until their leases are over, and go on.
const STOPS: &str = "pauses --messages 400 --stops 16 --workers 4 --lease 1000 --interval 200 --work 300 \
     --batch 4";
/// The server is killed under producers and consumers.
const SERVER: &str = "smoke --messages 400 --kills 0 --server-kills 2 --workers 3 --lease 1000 \
     --interval 300 --lost-answers 300 --batch 6";
/// Nothing happens; there is only work.
const QUIET: &str = "quiet --messages 800 --workers 3 --lease 1000";
/// One consumer, in SQL, that is woken or sleeps on; the server is killed early.
const WAKES: &str = "quiet --messages 60 --workers 0 --order-share 0 --plain-share 100 --effects-share 0 --wakes-only 1 \
     --in-transaction 0 --server-kills 1 --interval 800 --spread 6000 --batch 2 --lease 1000";
/// The same without a fault, by which it would look again, and with messages further apart than the end of a lease, by
/// which it would, too.
const CALM_WAKES: &str = "quiet --messages 8 --workers 0 --order-share 0 --plain-share 100 --effects-share 0 --wakes-only 1 \
     --in-transaction 0 --spread 8000 --batch 2 --lease 1000";
/// The same with the library, which has only its notifications to wake it.
const WAKES_LIBRARY: &str = "quiet --messages 100 --workers 1 --plains 0 --plain-share 0 --order-share 0 --effects-share 0 \
     --wakes-only 1 --in-transaction 0 --terminations 8 --interval 250 --batch 2 --lease 1000";

/// The network is cut, in each of the ways but one.
const NETWORK: &str = "network --messages 400 --cuts 4 --interval 200 --workers 3 --lease 1000";
/// A standby takes over.
const FAILOVER: &str = "failover --messages 400 --promotions 1 --interval 1000 --workers 3 --lease 1000";
const FAILOVER_ASYNC: &str =
    "failover-async --messages 400 --promotions 1 --interval 1000 --workers 3 --lease 1000";
/// What a server runs out of, but for the disk: that takes the right to mount one.
const RESOURCES: &str = "resources --messages 400 --full-disks 0 --full-servers 1 --idle-kills 1 --read-onlys 1 \
     --interval 300 --workers 3 --lease 1000";
const CLOCK: &str = "clock --messages 600 --clock-steps 6 --interval 500 --workers 3 --lease 1000";

/// Messages bounce, for as long as it takes to find what is wrong.
const BOUNCES: &str = "quiet --messages 200 --workers 2 --lease 1000 --spread 60000";

/// Runs a small campaign; returns its exit code and its words.
fn campaign(line: &str, broken: Option<&str>) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_campaign"));
    command.args(line.split_whitespace()).args(["--forget", "1"]);
    if let Some(broken) = broken {
        command.args(["--broken", broken]);
    }
    let output = command.output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

#[track_caller]
fn caught(broken: &str, line: &str, property: u8) {
    // An audit would end most of them before the logs show anything.
    let line = if property == IN_REACH { line.to_owned() } else { format!("{line} --audit 0") };
    let (code, text) = campaign(&line, Some(broken));
    let verdict = text.lines().find(|line| line.starts_with(&format!("{property} "))).unwrap_or_default();
    assert!(code == Some(1) && verdict.contains("VIOLATED"), "{broken} is not caught: {text}");
}

#[track_caller]
fn passes(line: &str) {
    let (code, text) = campaign(line, None);
    assert_eq!(code, Some(0), "{text}");
}

mod whole {
    use super::*;

    #[test]
    fn kills() {
        passes(KILLS);
    }

    #[test]
    fn stops() {
        passes(STOPS);
    }

    #[test]
    fn server() {
        passes(SERVER);
    }

    #[test]
    fn quiet() {
        passes(QUIET);
    }

    #[test]
    fn wakes() {
        passes(WAKES);
    }

    #[test]
    fn calm_wakes() {
        passes(CALM_WAKES);
    }

    #[test]
    fn wakes_of_the_library() {
        passes(WAKES_LIBRARY);
    }

    #[test]
    fn network() {
        passes(NETWORK);
    }

    #[test]
    fn failover() {
        passes(FAILOVER);
    }

    #[test]
    fn failover_async() {
        passes(FAILOVER_ASYNC);
    }

    #[test]
    fn resources() {
        passes(RESOURCES);
    }

    #[test]
    fn clock() {
        passes(CLOCK);
    }
}

mod clients {
    use super::*;

    #[test]
    fn one_that_settles_before_its_work_is_done() {
        caught("settle-before-work", KILLS, NO_LOSS);
    }

    #[test]
    fn one_that_repeats_a_push_under_a_new_id() {
        caught("new-id-on-retry", SERVER, PUSHED_ONCE);
    }

    #[test]
    fn one_that_takes_a_push_without_an_answer_for_done() {
        caught("trusting-producer", SERVER, NO_LOSS);
    }

    #[test]
    fn one_that_acknowledges_by_deleting_the_row() {
        caught("delete-the-row", QUIET, NO_LOSS);
    }

    #[test]
    fn one_whose_effect_is_not_in_the_transaction_of_the_settle() {
        caught("effect-apart", KILLS, EXACTLY_ONE_EFFECT);
    }

    #[test]
    fn one_that_does_not_listen_again_after_it_has_reconnected() {
        caught("no-listen-again", WAKES, LIVENESS);
    }

    #[test]
    fn one_that_does_not_look_again_before_it_sleeps() {
        caught("no-second-look", CALM_WAKES, LIVENESS);
    }

    #[test]
    fn one_that_does_not_try_again_after_an_error() {
        caught("gives-up", NETWORK, SERVED_AGAIN);
    }
}

mod servers {
    use super::*;

    #[test]
    fn one_that_does_not_wait_for_its_standby() {
        caught("not-synchronous", FAILOVER, NO_LOSS);
    }

    #[test]
    fn one_whose_marks_stay_when_its_clock_goes_back() {
        caught("marks-stay", CLOCK, SERVED_AGAIN);
        caught("marks-stay", CLOCK, IN_REACH);
    }
}

mod functions {
    use super::*;

    #[test]
    fn a_settle_without_a_fence() {
        caught("unfenced-settle", STOPS, TOKENS);
    }

    #[test]
    fn a_pop_that_does_not_write_its_lease() {
        caught("lease-not-written", QUIET, NO_LOSS);
    }

    #[test]
    fn leases_that_are_reclaimed_by_the_clock_of_the_client() {
        caught("client-clock", STOPS, ONE_LIVE_LEASE);
    }

    #[test]
    fn leases_that_are_reclaimed_before_their_deadline() {
        caught("reclaims-early", STOPS, ONE_LIVE_LEASE);
        caught("reclaims-early", CLOCK, ONE_LIVE_LEASE);
    }

    #[test]
    fn a_late_entry_that_is_shared() {
        caught("shared-entry", BOUNCES, IN_REACH);
    }

    #[test]
    fn a_watermark_that_passes_what_is_not_committed() {
        caught("no-horizon", BOUNCES, IN_REACH);
    }

    /// The same places in the tables that the logs show in the end are seen as soon as they are wrong.
    #[test]
    fn what_is_in_no_place() {
        caught("run-dropped", QUIET, IN_REACH);
        caught("lease-not-written", QUIET, IN_REACH);
    }

    #[test]
    fn leases_that_are_never_reclaimed() {
        caught("never-reclaims", KILLS, LIVENESS);
    }

    #[test]
    fn a_push_that_drops_the_place_in_the_order() {
        caught("run-dropped", QUIET, NO_LOSS);
    }

    #[test]
    fn a_waiter_that_is_never_noted() {
        caught("never-notes", CALM_WAKES, LIVENESS);
    }

    #[test]
    fn the_newest_first() {
        caught("newest-first", QUIET, ORDER);
    }

    #[test]
    fn tokens_that_can_be_guessed() {
        caught("same-token", KILLS, TOKENS);
    }

    #[test]
    fn a_payload_that_is_not_the_one_that_was_pushed() {
        caught("other-payload", QUIET, NO_PHANTOM);
    }

    #[test]
    fn a_push_that_stores_a_duplicate_under_another_id() {
        caught("duplicate-under-another-id", SERVER, PUSHED_ONCE);
    }

    #[test]
    fn a_settle_that_only_says_so() {
        caught("settle-only-said", QUIET, TOKENS);
    }

    #[test]
    fn a_batch_that_leaves_its_first_unsettled() {
        caught("forgets-the-first", QUIET, TOKENS);
    }
}

#[test]
fn what_is_not_there_is_refused() {
    assert_eq!(campaign("quiet", Some("no-such-fault")).0, Some(2));
    assert_eq!(campaign("no-such-campaign", None).0, Some(2));
    assert_eq!(campaign("quiet --no-such-option 1", None).0, Some(2));
}
