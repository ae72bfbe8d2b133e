//! Logs written by hand, for what cannot be provoked quickly: each differs in one line from one in which everything
//! holds, and exactly one property must say so.

#![allow(clippy::unwrap_used)]

use std::fs;

use pushpop_pg::uuid::Uuid;

use crate::check::{check, render};
use crate::history::History;
use crate::store::{Granted, Store, Stored};

const NO_LOSS: usize = 1;
const NO_PHANTOM: usize = 2;
const ONE_LIVE_LEASE: usize = 3;
const TOKENS: usize = 4;
const ORDER: usize = 5;
const LIVENESS: usize = 6;
const EXACTLY_ONE_EFFECT: usize = 7;
const PUSHED_ONCE: usize = 8;
const SERVED_AGAIN: usize = 9;
const IN_REACH: usize = 10;

/// Message A, of the topic `effects`, is lost by one consumer and completed by another. B and C are in order.
const PRODUCER: &str = "
1000 0 push 1 effects A a-1 0a
1010 0 pushed 1 unknown:Connection
1020 0 push 2 effects A a-1 0a
1030 0 pushed 2 ok
1040 0 push 3 order B o-1 0b
1040 0 push 3 order C o-2 0c
1050 0 pushed 3 ok
";
const FIRST: &str = "
2000 0 grant effects A:1 1 5000 0a
6500 0 work A:1
6500 0 settle 1 complete A:1
6600 0 settled 1 failed:LeaseLost
";
const SECOND: &str = "
6100 0 grant effects A:2 2 9000 0a
6200 0 work A:2
6300 0 settle 1 complete A:2
6400 0 settled 1 ok
";
const CONSUMER: &str = "
2000 0 grant order B:1 1 5000 0b
2000 0 grant order C:1 1 5000 0c
2100 0 work B:1 C:1
2200 0 settle 1 complete B:1 C:1
2300 0 settled 1 ok
";
const DIRECTOR: &str = "
7000 0 fault kill worker1
8000 0 calm 1000
8900 0 drained
";

fn id(letter: char) -> Uuid {
    Uuid::from_u128(u128::from(u32::from(letter)))
}

struct World {
    logs: Vec<(&'static str, String)>,
    store: Store,
}

impl World {
    fn new() -> World {
        let logs = [
            ("a", PRODUCER),
            ("first", FIRST),
            ("second", SECOND),
            ("consumer", CONSUMER),
            ("director", DIRECTOR),
        ];
        let mut store = Store { tokens: 3, ..Store::default() };
        for (letter, name, fence, hash) in [('A', "a-1", 2, 10), ('B', "o-1", 1, 11), ('C', "o-2", 1, 12)] {
            let stored =
                Stored { name: name.into(), state: 'c', fence, attempt: 1, max_attempts: None, hash };
            store.messages.insert(id(letter), stored);
        }
        store.grants.insert(id('A'), vec![Granted { fence: 1, at: 1999 }, Granted { fence: 2, at: 6099 }]);
        store.effects.insert(id('A'), 1);
        World { logs: logs.map(|(name, text)| (name, text.to_owned())).into(), store }
    }

    /// The same with other words somewhere in the logs.
    fn with(mut self, from: &str, to: &str) -> World {
        let changed = self.logs.iter_mut().filter(|(_, text)| text.contains(from));
        assert_eq!(changed.map(|(_, text)| *text = text.replace(from, to)).count(), 1, "{from}");
        self
    }

    fn stored(&mut self, letter: char) -> &mut Stored {
        self.store.messages.get_mut(&id(letter)).unwrap()
    }

    /// The numbers of the properties that do not hold.
    fn judged(self) -> Vec<usize> {
        let dir = std::env::temp_dir().join(format!("pushpop-synthetic-{}", Uuid::now_v7()));
        fs::create_dir(&dir).unwrap();
        for (name, text) in &self.logs {
            let mut text = text.trim_start().to_owned();
            for letter in ['A', 'B', 'C', 'D'] {
                let id = id(letter);
                text = text.replace(&format!("{letter}:"), &format!("{id}:"));
                text = text.replace(&format!(" {letter} "), &format!(" {id} "));
            }
            fs::write(dir.join(format!("{name}.log")), text).unwrap();
        }
        let history = History::read(&dir).unwrap();
        let properties = check(&history, &self.store);
        let text = render(&properties, &history);
        fs::remove_dir_all(&dir).unwrap();
        let violated: Vec<usize> =
            properties.iter().enumerate().filter(|(_, p)| p.found > 0).map(|(n, _)| n + 1).collect();
        assert_eq!(text.matches("VIOLATED").count(), violated.len(), "{text}");
        violated
    }
}

#[test]
fn smoke() {
    assert_eq!(World::new().judged(), [0; 0]);
}

#[test]
fn a_torn_last_line_does_not_count() {
    let mut world = World::new();
    world.logs[1].1.push_str("6700 0 grant effects A:1");
    assert_eq!(world.judged(), [0; 0]);
}

#[test]
fn an_acknowledged_message_is_gone() {
    let mut world = World::new();
    world.store.messages.remove(&id('B'));
    // The settle of it was answered; what became of the message nobody can tell.
    assert_eq!(world.judged(), [NO_LOSS, PUSHED_ONCE]);
}

#[test]
fn a_message_that_was_never_answered_may_be_gone() {
    let mut world = World::new().with("1030 0 pushed 2 ok", "1030 0 pushed 2 unknown:Timeout");
    world.store.messages.remove(&id('A'));
    world.store.effects.clear();
    assert_eq!(world.judged(), [0; 0]);
}

#[test]
fn a_message_is_left_behind() {
    let mut world = World::new().with("6400 0 settled 1 ok", "6400 0 settled 1 unknown:Timeout");
    world.stored('A').state = 'e';
    world.store.effects.clear();
    assert_eq!(world.judged(), [NO_LOSS]);
}

#[test]
fn a_message_is_dead_with_attempts_left() {
    let mut world = World::new().with("6300 0 settle 1 complete", "6300 0 settle 1 fail");
    world.stored('A').state = 'z';
    world.stored('A').max_attempts = Some(3);
    world.store.effects.clear();
    assert_eq!(world.judged(), [NO_LOSS]);
}

#[test]
fn a_message_is_settled_without_its_work() {
    assert_eq!(World::new().with("6200 0 work A:2", "6200 0 note idle").judged(), [NO_LOSS]);
    let late = "6300 0 settle 1 complete A:2\n6300 0 work A:2";
    let world = World::new().with("6200 0 work A:2\n", "").with("6300 0 settle 1 complete A:2", late);
    assert_eq!(world.judged(), [NO_LOSS]);
}

#[test]
fn a_delivery_has_another_payload() {
    assert_eq!(World::new().with("A:2 2 9000 0a", "A:2 2 9000 0d").judged(), [NO_PHANTOM]);
}

#[test]
fn what_is_stored_was_never_pushed_or_is_another() {
    let mut world = World::new();
    world.stored('B').hash = 1;
    assert_eq!(world.judged(), [NO_PHANTOM]);
    let mut world = World::new();
    let stored = Stored { name: "x-1".into(), ..world.stored('B').clone() };
    world.store.messages.insert(id('D'), stored);
    assert_eq!(world.judged(), [NO_PHANTOM]);
}

#[test]
fn a_delivery_comes_before_the_deadline_of_the_last() {
    let mut world = World::new();
    world.store.grants.get_mut(&id('A')).unwrap()[1].at = 4999;
    assert_eq!(world.judged(), [ONE_LIVE_LEASE]);
}

#[test]
fn a_deadline_moves_when_the_lease_is_extended() {
    let extended = "2000 0 grant effects A:1 1 5000 0a\n2100 0 extend 9 A:1\n2200 0 extended 9 OK 7000";
    let world =
        |outcome| World::new().with("2000 0 grant effects A:1 1 5000 0a", &extended.replace("OK", outcome));
    assert_eq!(world("ok").judged(), [ONE_LIVE_LEASE]);
    assert_eq!(world("failed:LeaseLost").judged(), [0; 0]);
}

#[test]
fn a_delivery_may_follow_a_release_at_once() {
    let released = "2000 0 grant effects A:1 1 5000 0a\n2100 0 settle 9 release A:1\n2200 0 settled 9 OK";
    let world = |outcome| {
        let mut world =
            World::new().with("2000 0 grant effects A:1 1 5000 0a", &released.replace("OK", outcome));
        world.store.grants.get_mut(&id('A')).unwrap()[1].at = 2300;
        world
    };
    assert_eq!(world("ok").judged(), [0; 0]);
    assert_eq!(world("unknown:Timeout").judged(), [0; 0]);
    assert_eq!(world("failed:Connection").judged(), [ONE_LIVE_LEASE]);
}

#[test]
fn a_delivery_is_handed_out_twice() {
    let twice = "6100 0 grant effects A:2 2 9000 0a\n6100 0 grant effects A:2 2 9000 0a";
    assert_eq!(World::new().with("6100 0 grant effects A:2 2 9000 0a", twice).judged(), [ONE_LIVE_LEASE]);
}

#[test]
fn a_stale_settle_is_accepted() {
    assert_eq!(
        World::new().with("6600 0 settled 1 failed:LeaseLost", "6600 0 settled 1 ok").judged(),
        [TOKENS]
    );
    let world = World::new().with("6500 0 settle 1 complete A:1", "6500 0 settle 1 release A:1");
    assert_eq!(world.with("6600 0 settled 1 failed:LeaseLost", "6600 0 settled 1 ok").judged(), [TOKENS]);
}

#[test]
fn a_release_may_be_repeated() {
    let released =
        "2000 0 grant effects A:1 1 5000 0a\n2100 0 settle 9 release A:1\n2200 0 settled 9 unknown:Timeout";
    let world = World::new().with("2000 0 grant effects A:1 1 5000 0a", released);
    let world = world.with("6500 0 settle 1 complete A:1", "6500 0 settle 1 release A:1");
    assert_eq!(world.with("6600 0 settled 1 failed:LeaseLost", "6600 0 settled 1 ok").judged(), [0; 0]);
}

#[test]
fn a_message_is_settled_in_two_ways() {
    let world = World::new()
        .with("6400 0 settled 1 ok", "6400 0 settled 1 ok\n6410 0 settle 2 release A:2\n6420 0 settled 2 ok");
    assert_eq!(world.judged(), [TOKENS]);
}

#[test]
fn a_message_is_settled_by_nobody() {
    let world = World::new().with(
        "6300 0 settle 1 complete A:2\n6400 0 settled 1 ok",
        "6300 0 settle 1 fail A:2\n6400 0 settled 1 unknown:Timeout",
    );
    assert_eq!(world.judged(), [NO_LOSS, TOKENS]);
}

#[test]
fn a_token_is_given_twice() {
    let mut world = World::new();
    world.store.repeated_tokens = 1;
    assert_eq!(world.judged(), [TOKENS]);
}

#[test]
fn messages_come_out_of_order() {
    let world = World::new().with(
        "2000 0 grant order B:1 1 5000 0b\n2000 0 grant order C:1 1 5000 0c",
        "2000 0 grant order C:1 1 5000 0c\n2000 0 grant order B:1 1 5000 0b",
    );
    assert_eq!(world.judged(), [ORDER]);
}

/// The consumer gives up a pop that takes the front of a run, and is served the next run before the rest.
#[test]
fn a_pop_that_was_given_up_holds_the_rest_of_its_run() {
    let judged = |granted| {
        let mut world = World::new()
            .with("1040 0 push 3 order C o-2 0c", "1040 0 push 3 order C o-2 0c\n1040 0 push 3 order D o-3 0d")
            .with(
                "2000 0 grant order B:1 1 5000 0b\n2000 0 grant order C:1 1 5000 0c",
                "2000 0 grant order D:1 1 5000 0d\n2050 0 grant order C:1 1 5000 0c\n2060 0 grant order B:2 2 5000 0b",
            )
            .with("2100 0 work B:1 C:1", "2100 0 work B:2 C:1 D:1")
            .with("2200 0 settle 1 complete B:1 C:1", "2200 0 settle 1 complete B:2 C:1 D:1");
        world.stored('B').fence = 2;
        let last = Stored { name: "o-3".into(), hash: 13, ..world.stored('C').clone() };
        world.store.messages.insert(id('D'), last);
        world.store.grants.insert(id('B'), granted);
        world.judged()
    };
    let (first, second) = (Granted { fence: 1, at: 1900 }, Granted { fence: 2, at: 2055 });
    assert_eq!(judged(vec![first, second]), [0; 0]);
    // Nobody held anything, or only later.
    assert_eq!(judged(vec![second]), [ORDER]);
    assert_eq!(judged(vec![Granted { at: 2001, ..first }, second]), [ORDER]);
}

#[test]
fn the_backlog_is_gone_late_or_never() {
    assert_eq!(World::new().with("8900 0 drained", "9001 0 drained").judged(), [LIVENESS]);
    assert_eq!(World::new().with("8900 0 drained\n", "").judged(), [LIVENESS]);
}

#[test]
fn an_effect_is_there_twice_or_not_at_all() {
    for effects in [0, 2] {
        let mut world = World::new();
        world.store.effects.insert(id('A'), effects);
        assert_eq!(world.judged(), [EXACTLY_ONE_EFFECT]);
    }
}

#[test]
fn a_push_is_stored_twice() {
    let mut world = World::new();
    world.stored('C').name = "o-1".into();
    assert_eq!(world.judged(), [PUSHED_ONCE]);
}

/// A fault has ended at 7000, and within 500 the consumer has to be served again.
fn mended(consumer: &str) -> World {
    let consumer = format!("2300 0 settled 1 ok\n{consumer}");
    World::new()
        .with("7000 0 fault kill worker1", "7000 0 mended 500 CutNetwork")
        .with("2300 0 settled 1 ok", &consumer)
}

#[test]
fn a_client_is_served_again_late_or_never() {
    assert_eq!(mended("2300 0 begun\n6999 0 alive\n7500 0 alive").judged(), [0; 0]);
    assert_eq!(mended("2300 0 begun\n6999 0 alive\n7501 0 alive").judged(), [SERVED_AGAIN]);
    assert_eq!(mended("2300 0 begun\n6999 0 alive").judged(), [SERVED_AGAIN]);
    assert_eq!(mended("2300 0 begun").judged(), [SERVED_AGAIN]);
}

#[test]
fn a_client_that_was_not_there_need_not_be_served() {
    assert_eq!(mended("2300 0 begun\n7400 0 ended").judged(), [0; 0]);
    assert_eq!(mended("7001 0 begun").judged(), [0; 0]);
    assert_eq!(mended("2300 0 begun\n7501 0 ended").judged(), [SERVED_AGAIN]);
}

/// A standby took over that may have lost what was committed between two times.
fn taken_over(window: &str) -> World {
    let window = format!("7000 0 window {window}");
    World::new().with("7000 0 fault kill worker1", &window)
}

#[test]
fn what_was_acknowledged_within_a_window_may_be_gone() {
    let judged = |window, letter| {
        let mut world = taken_over(window);
        world.store.messages.remove(&id(letter));
        world.store.effects.retain(|of, _| *of != id(letter));
        world.judged()
    };
    assert_eq!(judged("1045 1055", 'B'), [0; 0]);
    assert_eq!(judged("1051 1100", 'B'), [NO_LOSS, PUSHED_ONCE]);
    assert_eq!(judged("1000 1049", 'B'), [NO_LOSS, PUSHED_ONCE]);
    // It was answered before, even if a part of it was done within.
    assert_eq!(judged("2000 7000", 'C'), [NO_LOSS, PUSHED_ONCE]);
}

#[test]
fn what_was_handed_out_within_a_window_may_be_handed_out_again() {
    let again = "6100 0 grant effects A:2 2 9000 0a\n6150 0 grant effects A:2 2 9000 0a";
    let judged = |window| taken_over(window).with("6100 0 grant effects A:2 2 9000 0a", again).judged();
    assert_eq!(judged("6090 6110"), [0; 0]);
    assert_eq!(judged("6601 6700"), [ONE_LIVE_LEASE]);
    let judged = |window| taken_over(window).with("settled 1 failed:LeaseLost", "settled 1 ok").judged();
    assert_eq!(judged("6390 6410"), [0; 0]);
    assert_eq!(judged("6601 6700"), [TOKENS]);
}

#[test]
fn a_lost_window_excuses_no_wrong_order_beside_it() {
    let judged = |window| {
        taken_over(window)
            .with(
                "2000 0 grant order B:1 1 5000 0b\n2000 0 grant order C:1 1 5000 0c",
                "2000 0 grant order C:1 1 5000 0c\n2000 0 grant order B:1 1 5000 0b",
            )
            .judged()
    };
    assert_eq!(judged("1990 2010"), [0; 0]);
    assert_eq!(judged("3000 4000"), [ORDER]);
}

#[test]
fn a_token_that_was_lost_comes_again() {
    let judged = |at| {
        let mut world = taken_over("6000 6200\n7000 0 granted aa 6099");
        world.store.keys.insert("aa".into(), at);
        world.judged()
    };
    assert_eq!(judged(6099), [0; 0]);
    assert_eq!(judged(6500), [TOKENS]);
}

#[test]
fn a_clock_that_is_stepped_excuses_order_and_no_early_lease() {
    let stepped = || World::new().with("7000 0 fault kill worker1", "7000 0 step -60 by -60");
    let early = |at| {
        let mut world = stepped();
        world.store.grants.get_mut(&id('A')).unwrap()[1].at = at;
        world.judged()
    };
    assert_eq!(early(5000), [0; 0]);
    assert_eq!(early(4999), [ONE_LIVE_LEASE]);
    let world = stepped().with(
        "2000 0 grant order B:1 1 5000 0b\n2000 0 grant order C:1 1 5000 0c",
        "2000 0 grant order C:1 1 5000 0c\n2000 0 grant order B:1 1 5000 0b",
    );
    assert_eq!(world.judged(), [0; 0]);
    // By the server's clock the next delivery came before this one was given back.
    let released = "2000 0 grant effects A:1 1 5000 0a\n2100 0 settle 9 release A:1\n2200 0 settled 9 ok";
    let mut world = stepped().with("2000 0 grant effects A:1 1 5000 0a", released);
    world.store.grants.get_mut(&id('A')).unwrap()[1].at = 1500;
    assert_eq!(world.judged(), [0; 0]);
    // Whether a settle was stale is known by the clock of the clients.
    assert_eq!(stepped().with("settled 1 failed:LeaseLost", "settled 1 ok").judged(), [TOKENS]);
}

#[test]
fn an_audit_finds_a_broken_rule_or_none_comes_to_its_end() {
    let audited = |lines: &str| {
        let lines = format!("{lines}\n2300 0 settled 1 ok");
        let reach = World::new().with("7000 0 fault kill worker1", "7000 0 reach 1000 250");
        reach.with("2300 0 settled 1 ok", lines.trim_start()).judged()
    };
    assert_eq!(audited("2250 0 audited 99"), [0; 0]);
    assert_eq!(audited("2250 0 audited 99\n2260 0 broken 1 of a run\n2260 0 row run {}"), [IN_REACH]);
    assert_eq!(audited(""), [IN_REACH]);
}

/// D is given back at once, and seen again after `gap`, of 1300 that are allowed.
fn bounced(director: &str, gap: i64) -> Vec<usize> {
    let again = 2320 + gap;
    let consumer = format!(
        "2300 0 settled 1 ok\n2300 0 grant bounce D:1 1 9000 0d\n2310 0 settle 8 release D:1\n2320 0 settled 8 ok\n\
         {again} 0 grant bounce D:2 1 9900 0d\n{again} 0 work D:2\n{again} 0 settle 9 complete D:2\n{again} 0 settled 9 ok"
    );
    let mut world = World::new()
        .with("1050 0 pushed 3 ok", "1050 0 pushed 3 ok\n1050 0 push 4 bounce D b-1 0d\n1060 0 pushed 4 ok")
        .with("2300 0 settled 1 ok", &consumer)
        .with("7000 0 fault kill worker1", director);
    let stored = Stored { name: "b-1".into(), hash: 13, fence: 2, ..world.stored('B').clone() };
    world.store.messages.insert(id('D'), stored);
    world.judged()
}

#[test]
fn a_message_that_bounces_is_out_of_sight() {
    assert_eq!(bounced("7000 0 reach 1300 0", 1300), [0; 0]);
    assert_eq!(bounced("7000 0 reach 1300 0", 1301), [IN_REACH]);
    // It may have to wait for the clock.
    assert_eq!(bounced("7000 0 reach 1300 0\n7000 0 step -60 by -60", 1301), [0; 0]);
}
