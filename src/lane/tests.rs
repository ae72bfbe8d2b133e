//! What boards a flight together, and what is left for the next one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use uuid::Uuid;

use super::*;
use crate::calls::Verb;
use crate::error::Error;

fn push(rows: usize) -> PushJob {
    let messages = (0..rows).map(|_| NewMessage::new("m")).collect();
    PushJob { messages, bytes: rows, slot: Arc::new(Slot::new()) }
}

fn pop(max: usize, lease: Option<u64>) -> PopJob {
    PopJob {
        max,
        lease: lease.map(Duration::from_secs),
        waits: true,
        patient: false,
        slot: Arc::new(Slot::new()),
    }
}

fn settle(rows: usize) -> SettleJob {
    let one = Settle { id: Uuid::nil(), token: Vec::new(), verb: Verb::Release };
    SettleJob { settles: vec![one; rows], unwanted: false, slot: Arc::new(Slot::new()) }
}

fn turn(rows: usize, max: usize, lease: Option<u64>) -> TurnJob {
    TurnJob { settle: settle(rows), pop: pop(max, lease) }
}

/// A state in which each of these topics has what is added, and is listed.
fn with<const N: usize>(topics: [&str; N], add: impl Fn(&mut Lane)) -> State {
    let mut state = State::default();
    for topic in topics {
        add(state.lanes.entry(topic.into()).or_default());
        assert!(state.list(topic));
    }
    state
}

/// Kind, requests and rows of each part of the next flight.
fn next(state: &mut State) -> Vec<(Kind, usize, usize)> {
    state.flights += 1;
    let id = state.flights;
    let Some(Load::Shared(parts)) = state.take(id) else { return Vec::new() };
    let next = parts.iter().map(|Part { topic, cargo }| {
        let rows = match cargo {
            Cargo::Push(jobs) => jobs.iter().map(Job::sent).sum(),
            Cargo::Settle(jobs) => jobs.iter().map(Job::sent).sum(),
            Cargo::Turn(turns) => turns.jobs.iter().map(Job::sent).sum(),
            Cargo::Pop(pops) => pops.jobs.iter().map(Job::rows).sum(),
        };
        assert_eq!(state.lanes[topic].flying, (!cargo.is_large()).then_some(id));
        (cargo.kind(), cargo.callers(), rows)
    });
    let next = next.collect();
    // They land at once.
    for Part { topic, .. } in &parts {
        let lane = state.lanes.get_mut(topic).unwrap();
        lane.flights -= 1;
        lane.flying = None;
        state.list(topic);
        state.tidy(topic);
    }
    next
}

#[test]
fn the_kind_of_which_there_are_most_leaves_first() {
    let mut state = with(["t"], |lane| {
        lane.pushes.extend([push(1), push(2), push(1)]);
        lane.settles.extend([settle(1), settle(3)]);
        lane.turns.extend([turn(1, 1, None)]);
    });
    assert_eq!(next(&mut state), [(Kind::Push, 3, 4)]);
    assert_eq!(next(&mut state), [(Kind::Settle, 2, 4)]);
    assert_eq!(next(&mut state), [(Kind::Turn, 1, 1)]);
    assert_eq!(next(&mut state), []);
    assert!(state.lanes.is_empty() && state.ready.is_empty());
}

#[test]
fn of_as_many_pushes_leave_first() {
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.pops.push_back(pop(1, None));
        lane.settles.push_back(settle(1));
        lane.pushes.push_back(push(1));
    });
    let kinds: Vec<Kind> = (0..3).map(|_| next(&mut state)[0].0).collect();
    assert_eq!(kinds, [Kind::Push, Kind::Settle, Kind::Pop]);
}

#[test]
fn pops_that_wait_come_along_with_turns_and_are_served_first() {
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.turns.push_back(turn(1, 1, Some(9)));
        lane.pops.extend([pop(2, Some(9)), pop(3, Some(9))]);
        lane.pops.push_back(PopJob { waits: false, ..pop(4, Some(9)) });
        lane.pops.push_back(pop(5, Some(9)));
    });
    let Some(Load::Shared(parts)) = state.take(1) else { panic!("nothing leaves") };
    let Cargo::Turn(turns) = &parts[0].cargo else { panic!("no turn leaves") };
    assert_eq!(turns.pops().map(|job| job.max).collect::<Vec<_>>(), [2, 3, 1]);
    assert_eq!(asked(turns.pops()), 6);
    let left = &state.lanes["t"].pops;
    assert_eq!(
        left.iter().map(|job| job.max).collect::<Vec<_>>(),
        [4, 5],
        "one that does not wait, and what is behind it"
    );
}

/// They would be in front again after each flight that finds nothing.
#[test]
fn pops_that_wait_do_not_hold_up_those_that_do_not() {
    let look = |lease| PopJob { waits: false, ..pop(1, Some(lease)) };
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.pops.extend([pop(1, Some(7)), look(8), pop(1, Some(7)), look(9), pop(1, Some(8))]);
    });
    let mut seen = Vec::new();
    while let Some(Load::Shared(parts)) = state.take(state.flights) {
        let Cargo::Pop(pops) = &parts[0].cargo else { panic!("no pop leaves") };
        seen.push((pops.lease.unwrap().as_secs(), pops.jobs.len()));
        let lane = state.lanes.get_mut("t").unwrap();
        lane.flying = None;
        // There was nothing.
        for job in pops.jobs.iter().rev().filter(|job| job.waits) {
            assert!(job.slot.leave(state.flights, None));
            lane.pops.push_front(job.clone());
        }
        state.flights += 1;
        state.list("t");
    }
    assert_eq!(seen, [(7, 1), (8, 2), (9, 1)], "each kind of those that do not wait, and then none");
    assert_eq!(state.lanes["t"].pops.len(), 3);
}

/// Nor can turns hold them up for ever.
#[test]
fn pops_with_another_lease_do_not_come_along_with_turns() {
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.pops.push_back(pop(1, Some(7)));
    });
    let kinds: Vec<(Kind, usize)> = (0..4)
        .map(|_| {
            let lane = state.lanes.entry("t".into()).or_default();
            lane.turns.extend([turn(1, 1, Some(9)), turn(1, 1, Some(9))]);
            state.list("t");
            let (kind, callers, _) = next(&mut state)[0];
            (kind, callers)
        })
        .collect();
    assert_eq!(kinds, [(Kind::Turn, 2), (Kind::Turn, 2), (Kind::Pop, 1), (Kind::Turn, 4)]);
}

#[test]
fn no_kind_is_passed_over_three_times() {
    let mut state = with(["t"], |lane| lane.settles.push_back(settle(1)));
    let kinds: Vec<Kind> = (0..4)
        .map(|_| {
            state.lanes.get_mut("t").unwrap().pushes.extend([push(1), push(1)]);
            next(&mut state)[0].0
        })
        .collect();
    assert_eq!(kinds, [Kind::Push, Kind::Push, Kind::Settle, Kind::Push]);
}

/// A kind of which there is nothing is not passed over, however often another leaves.
#[test]
fn nothing_is_not_passed_over() {
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.pops.push_back(pop(1, None));
        lane.pushes.extend([push(1), push(1)]);
    });
    for _ in 0..300 {
        assert_eq!(next(&mut state)[0].0, Kind::Push);
        let lane = state.lanes.get_mut("t").unwrap();
        lane.pushes.extend([push(1), push(1)]);
        lane.passed[Kind::Pop as usize] = 2;
        lane.signal = false;
        state.list("t");
    }
}

#[test]
fn a_flight_has_room_for_a_thousand_rows() {
    let mut state = with(["t"], |lane| lane.pushes.extend((0..11).map(|_| push(99)).chain([push(10)])));
    assert_eq!(next(&mut state), [(Kind::Push, 10, 990)]);
    assert_eq!(next(&mut state), [(Kind::Push, 2, 109)]);
    let mut state = with(["t"], |lane| lane.settles.extend((0..21).map(|_| settle(50))));
    assert_eq!(next(&mut state), [(Kind::Settle, 20, 1_000)]);
    assert_eq!(next(&mut state), [(Kind::Settle, 1, 50)]);
}

#[test]
fn a_flight_has_room_for_so_many_bytes() {
    let bytes = [10 << 20, 6 << 20, 1, 17 << 20, 1];
    let mut state = with(["t"], |lane| {
        lane.pushes.extend(bytes.map(|bytes| PushJob { bytes, ..push(1) }));
    });
    assert_eq!(next(&mut state), [(Kind::Push, 2, 2)]);
    assert_eq!(next(&mut state), [(Kind::Push, 1, 1)]);
    assert_eq!(next(&mut state), [(Kind::Push, 1, 1)], "what is larger than a flight goes alone");
    assert_eq!(next(&mut state), [(Kind::Push, 1, 1)]);
}

#[test]
fn what_is_large_shares_its_flight_with_nothing() {
    let mut state = with(["t"], |lane| lane.pushes.extend([99, 100, 1].map(push)));
    assert_eq!(next(&mut state), [(Kind::Push, 1, 99)]);
    assert_eq!(next(&mut state), [(Kind::Push, 1, 100)]);
    assert_eq!(next(&mut state), [(Kind::Push, 1, 1)]);
    // Nor with other topics.
    let mut state = with(["a", "b", "c"], |lane| lane.settles.push_back(settle(100)));
    assert_eq!(next(&mut state), [(Kind::Settle, 1, 100)]);
    let mut state = with(["a", "b"], |lane| lane.pushes.push_back(push(1)));
    state.lanes.get_mut("a").unwrap().pushes[0].messages = push(100).messages;
    assert_eq!(next(&mut state), [(Kind::Push, 1, 100)]);
    let mut state = with(["a", "b"], |lane| lane.turns.push_back(turn(1, 100, None)));
    assert_eq!(next(&mut state), [(Kind::Turn, 1, 1)]);
}

#[test]
fn topics_share_a_flight_if_they_have_the_same_kind() {
    let mut state = with(["a", "b", "c"], |lane| lane.pushes.extend([push(1), push(2)]));
    state.lanes.get_mut("b").unwrap().settles.extend((0..3).map(|_| settle(1)));
    assert_eq!(next(&mut state), [(Kind::Push, 2, 3); 2]);
    assert_eq!(next(&mut state), [(Kind::Settle, 3, 3)]);
    assert_eq!(next(&mut state), [(Kind::Push, 2, 3)]);
    assert_eq!(next(&mut state), []);
}

/// That something may be there only because it was not looked for in a while is asked for by itself: it costs less.
#[test]
fn looks_by_the_clock_share_with_their_like() {
    let pops = |poll| {
        with(["a", "b"], |lane| {
            lane.signal = true;
            lane.poll = poll;
            lane.pops.push_back(pop(1, None));
        })
    };
    assert_eq!(next(&mut pops(false)), [(Kind::Pop, 1, 1); 2]);
    assert_eq!(next(&mut pops(true)), [(Kind::Pop, 1, 1); 2]);
    for (first, second) in [(false, true), (true, false)] {
        let mut state = pops(first);
        state.lanes.get_mut("b").unwrap().poll = second;
        assert_eq!(next(&mut state), [(Kind::Pop, 1, 1)]);
        assert_eq!(next(&mut state), [(Kind::Pop, 1, 1)]);
    }
}

/// A state with a lane for a group, in which somebody waits.
fn grouped(group: &Arc<Group>) -> State {
    let mut state = State::default();
    state.form(group);
    let lane = state.lanes.get_mut(&group.key).unwrap();
    lane.pops.push_back(pop(1, None));
    state
}

/// Which topics the next flight asks, in their order.
fn asks(state: &mut State, group: &Arc<Group>) -> Vec<usize> {
    state.list(&group.key);
    let Some(Load::Shared(parts)) = state.take(1) else { return Vec::new() };
    let Cargo::Pop(Pops { any: Some(any), .. }) = &parts[0].cargo else { panic!("no pop of several topics") };
    let lane = state.lanes.get_mut(&group.key).unwrap();
    lane.flights -= 1;
    lane.flying = None;
    any.order()
}

#[test]
fn a_group_asks_all_of_its_topics_or_those_of_which_it_heard() {
    let group = Group::new(&["a", "b", "a", "c"]);
    assert_eq!(group.topics.iter().map(|topic| &**topic).collect::<Vec<_>>(), ["a", "b", "c"]);
    let mut state = grouped(&group);
    assert!(asks(&mut state, &group).is_empty(), "nobody knows of anything");
    state.lanes.get_mut(&group.key).unwrap().hot = vec![2, 0];
    assert_eq!(asks(&mut state, &group), [2, 0]);
    let lane = state.lanes.get_mut(&group.key).unwrap();
    assert!(lane.hot.is_empty(), "once");
    lane.pops.push_back(pop(1, None));
    (lane.signal, lane.hot, lane.first) = (true, vec![0], 2);
    assert_eq!(asks(&mut state, &group), [2, 0, 1]);
    assert!(!state.lanes[&group.key].is_signalled());
}

#[test]
fn what_asks_several_topics_shares_its_looks_only() {
    let group = Group::new(&["a", "b"]);
    for (poll, parts) in [(true, 3), (false, 1)] {
        let mut state = grouped(&group);
        state.form(&Group::new(&["b", "c"]));
        let others = state.lanes.entry("t".into()).or_default();
        others.pops.push_back(pop(1, None));
        let keys: Vec<Arc<str>> = state.lanes.keys().cloned().collect();
        for key in keys {
            let lane = state.lanes.get_mut(&key).unwrap();
            (lane.signal, lane.poll) = (true, poll);
            if lane.pops.is_empty() {
                lane.pops.push_back(pop(1, None));
            }
            state.list(&key);
        }
        assert_eq!(next(&mut state).len(), parts);
    }
}

#[test]
fn the_lane_of_a_group_is_kept_for_its_worker() {
    let group = Group::new(&["a", "b"]);
    let mut state = State::default();
    state.form(&group);
    state.form(&Group::new(&["a", "b"]));
    assert_eq!((state.lanes.len(), state.members["a"].len()), (1, 1), "the same topics have the same lane");
    state.form(&Group::new(&["b"]));
    assert_eq!(state.lanes.len(), 1, "one topic is no group");
    state.tidy(&group.key);
    assert!(state.lanes.contains_key(&group.key));
    let key = Arc::clone(&group.key);
    drop(group);
    state.tidy(&key);
    assert!(state.lanes.is_empty() && state.members.is_empty());
}

/// Else the first one would have all, if each pop made a lane of its own.
#[test]
fn lanes_of_groups_begin_with_other_topics() {
    let mut state = State::default();
    let firsts: Vec<usize> = (0..4)
        .map(|_| {
            let group = Group::new(&["a", "b", "c"]);
            state.form(&group);
            let first = state.lanes[&group.key].first;
            let key = Arc::clone(&group.key);
            drop(group);
            state.tidy(&key);
            first
        })
        .collect();
    assert_eq!(firsts, [1, 2, 0, 1]);
}

#[test]
fn leases_of_different_lengths_are_of_different_flights() {
    let leases = [Some(60), Some(60), None, Some(60)];
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.pops.extend(leases.map(|lease| pop(2, lease)));
    });
    assert_eq!(next(&mut state), [(Kind::Pop, 2, 4)]);
    state.lanes.get_mut("t").unwrap().signal = true;
    state.list("t");
    assert_eq!(next(&mut state), [(Kind::Pop, 1, 2)]);
    let mut state = with(["t"], |lane| lane.turns.extend(leases.map(|lease| turn(1, 1, lease))));
    let callers: Vec<usize> = (0..3).map(|_| next(&mut state)[0].1).collect();
    assert_eq!(callers, [2, 1, 1]);
}

#[test]
fn whoever_is_gone_stays_behind() {
    let mut state = with(["t"], |lane| {
        lane.pushes.extend([push(1), push(1), push(1)]);
        lane.pushes.iter().for_each(|job| job.slot.cancel());
        lane.settles.push_back(settle(1));
    });
    assert_eq!(next(&mut state), [(Kind::Settle, 1, 1)], "the rest leaves at once");
    let mut state = with(["t"], |lane| {
        lane.pushes.push_back(push(1));
        lane.pushes[0].slot.cancel();
    });
    assert_eq!(next(&mut state), []);
    assert!(state.lanes.is_empty(), "a lane that nobody needs is forgotten");
    // Of a turn whichever half is still wanted.
    for (settles, pops) in [(true, true), (true, false), (false, true), (false, false)] {
        let job = turn(2, 1, None);
        if !settles {
            job.settle.slot.cancel();
        }
        if !pops {
            job.pop.slot.cancel();
        }
        assert_eq!(Job::board(&job, 1), settles || pops);
        assert_eq!((job.settle.slot.is_queued(), job.pop.slot.is_queued()), (false, false));
    }
}

/// Those that wait may be on a flight, while the only one in the lane is gone.
#[test]
fn a_signal_that_nobody_hears_is_kept() {
    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.flights = 1;
        lane.pops.push_back(pop(1, None));
        lane.pops[0].slot.refuse(Error::closed());
    });
    assert_eq!(next(&mut state), []);
    let lane = &state.lanes["t"];
    assert_eq!((lane.unheard, lane.signal, lane.pops.len()), (true, false, 0));

    let mut state = with(["t"], |lane| {
        lane.signal = true;
        lane.pops.push_back(pop(1, None));
    });
    let lane = state.lanes.get_mut("t").unwrap();
    let mut room = Room { kind: None, poll: false, rows: 1_000, bytes: 1_000 };
    assert!(lane.board(1, &mut room).is_some());
    assert_eq!((lane.unheard, lane.signal), (false, false));
}

#[test]
fn the_server_knows_of_those_that_wait_for_a_while() {
    let minute = Duration::from_secs(60);
    let now = Instant::now();
    for (until, known) in [(None, false), (now.checked_sub(minute), false), (Some(now + minute), true)] {
        assert_eq!(Lane { registered: until, ..Lane::default() }.is_registered(), known);
    }
}

#[test]
fn a_flight_that_is_alone_holds_the_next_one_up() {
    let mut state = State::default();
    assert!(!state.has_work());
    let airborne = Airborne { topics: Vec::new(), since: Instant::now(), alone: true };
    state.airborne.insert(1, airborne);
    assert!(!state.has_work());
    for topic in 0..MANY {
        assert!(!state.has_work(), "{topic} topics");
        let topic = topic.to_string();
        state.lanes.entry(topic.as_str().into()).or_default().pushes.push_back(push(1));
        assert!(state.list(&topic));
    }
    assert!(state.has_work(), "many topics wait for nobody");
    state.ready.truncate(1);
    assert!(!state.has_work() && state.take(2).is_none());
    state.airborne.get_mut(&1).unwrap().alone = false;
    assert!(state.has_work() && state.take(2).is_some());
}

#[test]
fn a_lane_is_kept_while_it_is_needed() {
    let mut state = with(["listed"], |lane| lane.pushes.push_back(push(1)));
    assert!(!state.list("never seen"));
    assert!(state.list("listed") && state.ready.len() == 1, "once is enough");
    let lane = |flights| Lane { flights, ..Lane::default() };
    state.lanes.insert("flying".into(), lane(1));
    state.lanes.insert("waited for".into(), Lane { pops: [pop(1, None)].into(), ..lane(0) });
    state.lanes.insert("empty".into(), lane(0));
    for topic in ["listed", "flying", "waited for", "empty"] {
        state.tidy(topic);
        assert_eq!(state.lanes.contains_key(topic), topic != "empty", "{topic}");
    }
}

#[test]
fn requests_are_counted_as_they_are() {
    assert_eq!((push(3).rows(), push(3).sent(), push(3).bytes()), (3, 3, 3));
    assert_eq!((settle(4).rows(), settle(4).sent(), settle(4).bytes()), (4, 4, 0));
    assert_eq!((turn(2, 5, None).rows(), turn(2, 5, None).sent()), (5, 2));
    assert_eq!((turn(6, 5, None).rows(), turn(6, 5, None).sent()), (6, 6));
    let jobs = [pop(700, None), pop(200, None), pop(50, None)];
    assert_eq!(asked(jobs.iter()), 950);
    assert!(jobs[1].slot.board(1), "who is aboard is asked for");
    assert_eq!(asked(jobs.iter().chain([&pop(60, None)])), 1_000, "as many as a flight carries");
    jobs[0].slot.refuse(Error::closed());
    assert_eq!(asked(jobs.iter()), 250);
    let words = [Kind::Push, Kind::Settle, Kind::Turn, Kind::Pop].map(Kind::word);
    assert_eq!(words, ["push", "settle", "turn", "pop"]);
}
