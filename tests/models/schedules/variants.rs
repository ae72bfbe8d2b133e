//! Sources that are broken on purpose. Each is a piece of text that is found once in its file, and what stands in its
//! place when the variant is switched on.

/// The files that the schedules run, without their ending.
pub(crate) const FILES: [&str; 20] = [
    "calls", "crew", "engine", "error", "flight", "home", "keeper", "lane", "lease", "limits", "listener",
    "message", "observer", "queue", "slot", "span", "stopping", "task", "topic", "upkeep",
];

/// A piece of a source, and a wrong one. The name is that of its test.
pub(crate) struct Variant {
    pub(crate) name: &'static str,
    pub(crate) file: &'static str,
    pub(crate) right: &'static str,
    pub(crate) wrong: &'static str,
}

/// All variants.
pub(crate) const VARIANTS: &[Variant] = &[
    Variant {
        name: "an_answer_wakes_nobody",
        file: "slot",
        right: "self.changed.notify_one();\n        Ok(())",
        wrong: "Ok(())",
    },
    Variant {
        name: "a_thread_that_sleeps_is_not_woken",
        file: "engine",
        right: "self.work.notify_one();\n            return;",
        wrong: "return;",
    },
    Variant { name: "a_lane_is_not_listed_again", file: "crew", right: "state.list(topic);", wrong: "" },
    Variant {
        name: "answers_go_to_neighbours",
        file: "flight",
        right: "jobs.map(|job| rest.by_ref().take(job.sent()).collect()).collect()",
        wrong: "jobs.map(|job| rest.by_ref().take(job.sent()).collect()).collect::<Vec<_>>().into_iter().rev().collect()",
    },
    Variant {
        name: "pops_that_are_left_behind_are_not_next",
        file: "crew",
        right: "lane.signal |= popped && !short && outcome.error.is_none();",
        wrong: "",
    },
    Variant {
        name: "a_push_signals_no_pop_that_is_on_its_way",
        file: "engine",
        right: "lane.pops.is_empty() && lane.flights == 0",
        wrong: "lane.pops.is_empty()",
    },
    Variant {
        name: "a_pop_is_not_put_back",
        file: "crew",
        right: "lane.pops.push_front(job);",
        wrong: "drop(job);",
    },
    Variant {
        name: "a_landing_tells_nobody_outside",
        file: "crew",
        right: "if state.outside_waits > 0 {\n            self.work.notify_all();\n        }",
        wrong: "",
    },
    Variant {
        name: "nobody_is_told_of_a_panic",
        file: "crew",
        right: "Outcome::all_failed(&parts, &Error::panicked())",
        wrong: "parts.iter().map(|_| Outcome::default()).collect()",
    },
    Variant {
        name: "closing_does_not_wait",
        file: "engine",
        right: "state.unwanted > 0 || state.airborne.values().any(waits)",
        wrong: "state.airborne.is_empty() && !state.airborne.values().any(waits)",
    },
    Variant {
        name: "what_came_for_nobody_is_dropped",
        file: "flight",
        right: "self.engine.abandon(unwanted.unwrap_or_default())",
        wrong: "{ drop(unwanted); Vec::new() }",
    },
    Variant {
        name: "an_overdue_flight_is_not_written_off",
        file: "keeper",
        right: "self.write_off(&mut state, id);",
        wrong: "",
    },
    Variant {
        name: "a_flight_that_is_written_off_keeps_its_connection",
        file: "keeper",
        right: "state.in_use -= 1;",
        wrong: "",
    },
    Variant {
        name: "a_group_is_not_woken",
        file: "engine",
        right: "self.wake_lane(state, &key, Some(place), ready_in);",
        wrong: "",
    },
    Variant {
        name: "those_that_were_not_asked_are_told_that_there_is_nothing",
        file: "flight",
        right: "outcome.again = true;\n            return true;",
        wrong: "return self.hand_out(jobs, Some(Vec::new()), outcome);",
    },
    Variant {
        name: "a_signal_that_finds_nobody_is_dropped",
        file: "lane",
        right: "self.unheard |= here.is_empty();",
        wrong: "",
    },
    Variant {
        name: "a_signal_that_found_nobody_is_forgotten",
        file: "crew",
        right: "lane.signal |= short && std::mem::take(&mut lane.unheard);",
        wrong: "",
    },
    Variant {
        name: "a_look_that_falls_due_during_a_flight_is_dropped",
        file: "keeper",
        right: "!lane.pops.is_empty() || lane.flights > 0",
        wrong: "!lane.pops.is_empty()",
    },
    Variant {
        name: "a_look_that_is_overdue_at_a_landing_is_dropped",
        file: "crew",
        right: "lane.look_at.map_or(at, |earlier| earlier.min(at))",
        wrong: "lane.look_at.filter(|earlier| *earlier > now).map_or(at, |earlier| earlier.min(at))",
    },
    Variant {
        name: "a_lane_is_asked_once",
        file: "lane",
        right: "left += usize::from(self.list(&topic) && parts.is_empty());",
        wrong: "self.list(&topic);",
    },
    Variant {
        name: "what_is_given_back_wakes_nobody",
        file: "flight",
        right: "outcome.pushed = Some(outcome.pushed.map_or(wait, |first| first.min(wait)));",
        wrong: "",
    },
    Variant {
        name: "those_that_wait_look_again_and_again",
        file: "crew",
        right: "look_in.max(Duration::from_millis(2)).min(self.settings.poll_interval)",
        wrong: "look_in.min(Duration::from_millis(2))",
    },
    Variant {
        name: "a_calm_group_is_not_told_of_delays",
        file: "flight",
        right: "if part.outcome.again {\n                    continue;\n                }",
        wrong: "if part.outcome.again || part.outcome.calm {\n                    continue;\n                }",
    },
    Variant {
        name: "listening_begins_without_a_look",
        file: "listener",
        right: "queue.look_everywhere();",
        wrong: "",
    },
    Variant {
        name: "nobody_hears_a_notification",
        file: "listener",
        right: "queue.notified(notification.payload());",
        wrong: "",
    },
    Variant {
        name: "a_push_stays_queued_whose_caller_was_told_that_it_failed",
        file: "engine",
        right: "self.man(&mut state)?;\n        self.enqueue(&mut state, topic, |lane| lane.pushes.push_back(job));\n        Ok(())",
        wrong: "let manned = self.man(&mut state);\n        self.enqueue(&mut state, topic, |lane| lane.pushes.push_back(job));\n        manned",
    },
    Variant {
        name: "a_thread_that_could_not_be_started_is_not_tried_again",
        file: "keeper",
        right: "(state.threads == 0).then_some(now + SHORTAGE)",
        wrong: "None",
    },
];
