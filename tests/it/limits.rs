//! Bad input is refused before anything is written, in Rust and in SQL, by an error that names the
//! limit.

use std::time::Duration;

use postgres::Client;
use pushpop_pg::time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time, UtcOffset};
use pushpop_pg::{Error, ErrorKind, NewMessage, Queue, TopicSettings, Worker, uuid::Uuid};

use crate::world::{World, pop, stats};

#[track_caller]
fn assert_invalid(error: &Error, limit: &str) {
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    assert!(!error.is_retryable() && !error.is_indeterminate());
    assert!(error.to_string().contains(limit), "{error} does not name {limit}");
}

#[test]
fn smoke() {
    let world = World::new();
    assert_invalid(&world.queue().push("", "m").unwrap_err(), "1 to 255 bytes");
}

#[test]
fn topics_have_1_to_255_bytes() {
    let world = World::new();
    let queue = world.queue();
    let longest = ["t".repeat(255), format!("{}t", "é".repeat(127))];
    for topic in &longest {
        queue.push(topic, "m").unwrap();
        pop(&queue, topic).complete().unwrap();
        assert_eq!(stats(&queue, topic).settled(), 1);
    }
    for topic in [String::new(), "t".repeat(256), "é".repeat(128)] {
        let limit = "1 to 255 bytes";
        assert_invalid(&queue.push(&topic, "m").unwrap_err(), limit);
        assert_invalid(&queue.push_once(&topic, "m").unwrap_err(), limit);
        assert_invalid(&queue.push_many(&topic, ["m"]).unwrap_err(), limit);
        assert_invalid(&queue.try_pop(&topic).unwrap_err(), limit);
        assert_invalid(&queue.pop(&topic).unwrap_err(), limit);
        assert_invalid(&queue.pop_timeout(&topic, Duration::MAX).unwrap_err(), limit);
        assert_invalid(&queue.pop_many(&topic, 1, Duration::MAX).unwrap_err(), limit);
        assert_invalid(&queue.iter(&topic).next().unwrap().unwrap_err(), limit);
        assert_invalid(&queue.find(&topic, NewMessage::new("").id()).unwrap_err(), limit);
        assert_invalid(&queue.topic(&topic).stats().unwrap_err(), limit);
        assert_invalid(&queue.topic(&topic).peek(1).unwrap_err(), limit);
        assert_invalid(&queue.topic(&topic).purge().unwrap_err(), limit);
        assert_invalid(&queue.transaction(|tx| queue.push_in(tx, &topic, "m")).unwrap_err(), limit);
    }
    assert_invalid(&queue.push("a\0b", "m").unwrap_err(), "NUL");
}

#[test]
fn messages_have_limits() {
    let world = World::new();
    let queue = world.queue();
    let m = || NewMessage::new("m");
    let wide = |n: usize| (0..n).fold(m(), |m, i| m.header(format!("{i}"), ""));
    let at = |year: i32| {
        let date =
            pushpop_pg::time::Date::from_calendar_date(year, pushpop_pg::time::Month::June, 1).unwrap();
        m().ready_at(OffsetDateTime::new_utc(date, pushpop_pg::time::Time::MIDNIGHT))
    };
    let good = [
        wide(64),
        m().header("n", "v".repeat(16_383)),
        m().delay(Duration::from_secs(250_000_000_000)),
        at(2),
        at(9998),
        m().max_attempts(1),
        m().max_attempts(32_767),
    ];
    for message in good {
        let (id, due) = (message.id(), format!("{message:?}"));
        queue.push("good", message).unwrap_or_else(|e| panic!("{due}: {e}"));
        assert!(queue.find("good", id).unwrap().is_some());
    }
    let bad = [
        ("64 headers", wide(65)),
        ("16384 bytes", m().header("n", "v".repeat(16_384))),
        ("NUL", m().header("a\0", "b")),
        ("NUL", m().header("a", "\0b")),
        ("250000000000 seconds", m().delay(Duration::MAX)),
        ("250000000000 seconds", m().delay(Duration::from_secs(250_000_000_001))),
        ("years", at(-100)),
        ("years", at(9999)),
        ("1 to 32767", m().max_attempts(0)),
        ("1 to 32767", m().max_attempts(32_768)),
    ];
    for (limit, message) in bad {
        assert_invalid(&queue.push("bad", message.clone()).unwrap_err(), limit);
        assert_invalid(&queue.push_many("bad", [m(), message.clone()]).unwrap_err(), limit);
        assert_invalid(&queue.transaction(|tx| queue.push_in(tx, "bad", message)).unwrap_err(), limit);
    }
    assert_invalid(&queue.push_many("bad", vec![""; 10_001]).unwrap_err(), "10000 messages");
    assert!(queue.topics().unwrap().iter().all(|t| t.topic() != "bad"), "nothing was written");
}

#[test]
fn pops_have_limits() {
    let world = World::new();
    let queue = world.queue();
    let now = Duration::ZERO;
    for max in [0, 1001, usize::MAX] {
        assert_invalid(&queue.pop_many("t", max, now).unwrap_err(), "1 to 1000");
        assert_invalid(&queue.topic("t").peek(max).unwrap_err(), "1 to 1000");
    }
    assert!(queue.pop_many("t", 1000, now).unwrap().is_empty());
    for lease in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(86_401), Duration::MAX] {
        let other = queue.with_lease(lease);
        assert_invalid(&other.try_pop("t").unwrap_err(), "1 s to 24 h");
        assert_invalid(&other.pop("t").unwrap_err(), "1 s to 24 h");
    }
    queue.push("t", "m").unwrap();
    assert!(queue.with_lease(Duration::from_secs(86_400)).try_pop("t").unwrap().is_some());
}

#[test]
fn settles_have_limits() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let mut lease = pop(&queue, "t");
    for length in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(86_401), Duration::MAX] {
        assert_invalid(&lease.extend(length).unwrap_err(), "1 s to 24 h");
    }
    let (lease, error) = lease.defer(Duration::MAX).unwrap_err().into_parts();
    assert_invalid(&error, "250000000000 seconds");
    lease.defer(Duration::from_secs(250_000_000_000)).unwrap();
}

#[test]
fn a_reason_may_be_any_text() {
    let world = World::new();
    let queue = world.queue();
    let long = "🦀".repeat(10_000);
    for why in ["", "nul\0nul", "quo\"te '\\", long.as_str()] {
        let id = queue.push(why.get(..3).unwrap_or("t"), NewMessage::new("m").max_attempts(1)).unwrap();
        let topic = why.get(..3).unwrap_or("t");
        pop(&queue, topic).fail(why).unwrap();
        let found = queue.find(topic, id).unwrap().unwrap();
        let expected: String = why.replace('\0', "\u{fffd}").chars().take(8192).collect();
        assert_eq!(found.last_error(), Some(expected.as_str()));
    }
}

/// Runs a call that must be refused with these words; says what happened instead.
fn refused(client: &mut Client, call: &str, limit: &str) -> Option<String> {
    let Err(error) = client.query(call, &[]) else { return Some(format!("{call}: accepted")) };
    let db = error.as_db_error().unwrap();
    let right = db.code().code() == "22023" && db.message().contains(limit);
    (!right).then(|| format!("{call}: {} ({}) instead of {limit}", db.message(), db.code().code()))
}

#[test]
fn sql_has_the_same_limits() {
    let world = World::new();
    let queue = world.queue();
    queue.push("leased", "m").unwrap();
    let lease = pop(&queue, "leased");
    let mut client = world.client();
    let id = "'67e55044-10b1-426f-9247-bb680e5fe0c8'";
    let token = "'\\x00'";
    let ids = format!("array[{id}::uuid]");
    let many_headers = "(select jsonb_object_agg(i::text, '') from generate_series(1, 65) i)";
    let calls = [
        ("1 to 255 bytes", "push('', 'x')".to_owned()),
        ("1 to 255 bytes", "push(null, 'x')".to_owned()),
        ("1 to 255 bytes", "push(repeat('é', 128), 'x')".to_owned()),
        ("not null", "push('t', null)".to_owned()),
        ("16777216", "push('t', convert_to(repeat('x', 16777217), 'UTF8'))".to_owned()),
        ("seconds", "push('t', 'x', delay => -1)".to_owned()),
        ("seconds", "push('t', 'x', delay => 'NaN')".to_owned()),
        ("seconds", "push('t', 'x', delay => 'infinity')".to_owned()),
        ("seconds", "push('t', 'x', delay => 250000000001)".to_owned()),
        ("years", "push('t', 'x', ready_at => 'infinity')".to_owned()),
        ("years", "push('t', 'x', ready_at => '-infinity')".to_owned()),
        ("years", "push('t', 'x', ready_at => '0044-03-15 BC')".to_owned()),
        ("not both", "push('t', 'x', delay => 1, ready_at => now())".to_owned()),
        ("32767", "push('t', 'x', fallback => 32768)".to_owned()),
        ("32767", "push('t', 'x', fallback => -1)".to_owned()),
        ("32767", "push('t', 'x', max_attempts => 32768)".to_owned()),
        ("32767", "push('t', 'x', max_attempts => -1)".to_owned()),
        ("object", "push('t', 'x', headers => '[]')".to_owned()),
        ("object", "push('t', 'x', headers => '1')".to_owned()),
        ("object", "push('t', 'x', headers => 'null')".to_owned()),
        ("object", "push('t', 'x', headers => '{\"a\": 1}')".to_owned()),
        ("object", "push('t', 'x', headers => '{\"a\": null}')".to_owned()),
        ("64", format!("push('t', 'x', headers => {many_headers})")),
        ("16384", "push('t', 'x', headers => jsonb_build_object('n', repeat('v', 16384)))".to_owned()),
        ("1 to 255 bytes", format!("push_many('', {ids}, array['x'::bytea])")),
        ("1 to 10000", "push_many('t', '{}', '{}'::bytea[])".to_owned()),
        ("1 to 10000", "push_many('t', null, null::bytea[])".to_owned()),
        (
            "1 to 10000",
            "push_many('t', array(select gen_random_uuid() from generate_series(1, 10001)), array_fill('x'::bytea, '{10001}'))"
                .to_owned(),
        ),
        ("same length", format!("push_many('t', {ids}, array['x', 'y']::bytea[])")),
        ("same length", format!("push_many('t', {ids}, null::bytea[])")),
        ("same length", format!("push_many('t', {ids}, array['x'::bytea], delays => '{{}}')")),
        ("same length", format!("push_many('t', {ids}, array['x'::bytea], max_attempts => '{{1,2}}')")),
        ("not null", "push_many('t', array[null::uuid], array['x'::bytea])".to_owned()),
        ("not null", format!("push_many('t', {ids}, array[null::bytea])")),
        ("16777216", format!("push_many('t', {ids}, array[convert_to(repeat('x', 16777217), 'UTF8')])")),
        ("seconds", format!("push_many('t', {ids}, array['x'::bytea], delays => '{{-1}}')")),
        ("32767", format!("push_many('t', {ids}, array['x'::bytea], max_attempts => '{{-1}}')")),
        ("32767", format!("push_many('t', {ids}, array['x'::bytea], fallback => -1)")),
        ("object", format!("push_many('t', {ids}, array['x'::bytea], headers => array['[]'::jsonb])")),
        ("years", format!("push_many('t', {ids}, array['x'::bytea], ready_ats => '{{infinity}}')")),
        (
            "not both",
            format!("push_many('t', {ids}, array['x'::bytea], delays => '{{1}}', ready_ats => array[now()])"),
        ),
        ("1 to 255 bytes", "pop('')".to_owned()),
        ("1 to 255 bytes", "pop(null)".to_owned()),
        ("1 to 1000", "pop('t', 0)".to_owned()),
        ("1 to 1000", "pop('t', 1001)".to_owned()),
        ("1 to 1000", "pop('t', null)".to_owned()),
        ("1 to 86400", "pop('t', 1, 0.5)".to_owned()),
        ("1 to 86400", "pop('t', 1, 86401)".to_owned()),
        ("1 to 86400", "pop('t', 1, 'NaN')".to_owned()),
        ("1 to 86400", "pop('t', fallback => null)".to_owned()),
        ("1 to 86400", "pop('t', fallback => 0)".to_owned()),
        ("1 to 255 bytes", "pause('')".to_owned()),
        ("1 to 255 bytes", "resume('')".to_owned()),
        ("1 to 255 bytes", "topic_settings('')".to_owned()),
        ("1 to 255 bytes", "set_topic('', null, null, null, null)".to_owned()),
        ("1 to 86400", "set_topic('t', 0.5, null, null, null)".to_owned()),
        ("1 to 86400", "set_topic('t', 'NaN', null, null, null)".to_owned()),
        ("32767", "set_topic('t', null, 32768, null, null)".to_owned()),
        ("32767", "set_topic('t', null, -1, null, null)".to_owned()),
        ("backoff", "set_topic('t', null, null, -1, null)".to_owned()),
        ("backoff", "set_topic('t', null, null, 2, 1)".to_owned()),
        ("backoff", "set_topic('t', null, null, 3601, null)".to_owned()),
        ("backoff", "set_topic('t', null, null, null, 'NaN')".to_owned()),
        ("250000000000", "set_topic('t', null, null, null, 250000000001)".to_owned()),
        ("1 to 255 bytes", format!("cancel('', {id})")),
        ("seconds", format!("cancel('t', {id}, -1)")),
        ("seconds", format!("cancel('t', {id}, null)")),
        ("1 to 255 bytes", format!("reschedule('', {id})")),
        ("seconds", format!("reschedule('t', {id}, -1)")),
        ("years", format!("reschedule('t', {id}, ready_at => 'infinity')")),
        ("not both", format!("reschedule('t', {id}, 1, now())")),
        ("1 to 255 bytes", format!("complete('', {id}, {token})")),
        ("seconds", format!("complete('t', {id}, {token}, -1)")),
        ("seconds", format!("complete('t', {id}, {token}, 'NaN')")),
        ("seconds", format!("complete('t', {id}, {token}, null)")),
        ("seconds", format!("defer('t', {id}, {token}, -1)")),
        ("seconds", format!("defer('t', {id}, {token}, null)")),
        ("seconds", format!("defer('t', {id}, {token}, 'NaN')")),
        ("seconds", format!("fail('t', {id}, {token}, 'why', 'infinity')")),
        ("1 to 86400", format!("extend('t', {id}, {token}, 0)")),
        ("1 to 86400", format!("extend('t', {id}, {token}, null)")),
        ("1 to 10000", "settle_many('t', '{}', '{}', '{}')".to_owned()),
        ("same length", format!("settle_many('t', {ids}, '{{}}', '{{}}')")),
        ("one of", format!("settle_many('t', {ids}, array[{token}::bytea], '{{explode}}')")),
        ("1 to 255 bytes", format!("find('', {id})")),
        ("1 to 255 bytes", "peek('')".to_owned()),
        ("1 to 1000", "peek('t', 0)".to_owned()),
        ("1 to 255 bytes", "stats('')".to_owned()),
        ("1 to 255 bytes", "wait_for('')".to_owned()),
        ("0 to 3600", "wait_for('t', within => 3601)".to_owned()),
        ("0 to 3600", "wait_for('t', within => null)".to_owned()),
        ("1 to 255 bytes", "upkeep('')".to_owned()),
        ("1 to 100000", "upkeep('t', 0)".to_owned()),
        ("1 to 255 bytes", "purge('')".to_owned()),
        ("1 to 100000", "purge('t', null)".to_owned()),
        ("1 to 255 bytes", "dead_letters('')".to_owned()),
        ("1 to 1000", "dead_letters('t', 0)".to_owned()),
        ("not null", "dead_letters('t', before => null)".to_owned()),
        ("1 to 255 bytes", format!("redrive('', {ids})")),
        ("1 to 10000", "redrive('t', '{}')".to_owned()),
        ("1 to 10000", "redrive('t', null)".to_owned()),
        ("1 to 255 bytes", "redrive_all('')".to_owned()),
        ("1 to 10000", "redrive_all('t', max => 10001)".to_owned()),
        ("1 to 255 bytes", "purge_dead('')".to_owned()),
        ("seconds", "purge_dead('t', -1)".to_owned()),
        ("seconds", "purge_dead('t', 'NaN')".to_owned()),
        ("seconds", "purge_dead('t', null)".to_owned()),
        ("1 to 100000", "purge_dead('t', 0, 0)".to_owned()),
    ];
    let wrong: Vec<String> = calls
        .iter()
        .filter_map(|(limit, call)| {
            refused(&mut client, &world.sql(&format!("select pushpop.{call}")), limit)
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let topics = queue.topics().unwrap();
    assert_eq!(topics.iter().map(|t| t.topic()).collect::<Vec<_>>(), ["leased"], "nothing was written");
    lease.complete().unwrap();
}

/// The first and the last moment at which a message may be ready, and those beside them.
#[test]
fn times_end_at_the_same_moments_in_rust_and_sql() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let at = |year: i32, end: bool| {
        let (month, day) = if end { (Month::December, 31) } else { (Month::January, 1) };
        let time = if end { Time::from_hms_micro(23, 59, 59, 999_999).unwrap() } else { Time::MIDNIGHT };
        PrimitiveDateTime::new(Date::from_calendar_date(year, month, day).unwrap(), time).assume_utc()
    };
    let moments =
        [(at(1, true), false), (at(2, false), true), (at(9998, true), true), (at(9999, false), false)];
    for (moment, is_good) in moments {
        // Of another offset the year is another one.
        for hours in [-12, 0, 12] {
            let Some(there) = moment.checked_to_offset(UtcOffset::from_hms(hours, 0, 0).unwrap()) else {
                continue;
            };
            let pushed = queue.push("t", NewMessage::new("m").ready_at(there));
            assert_eq!(pushed.is_ok(), is_good, "{there}: {pushed:?}");
        }
        let mut accepts = |sql: &str, id: Option<Uuid>| {
            let sql = world.sql(&format!("select pushpop.{sql}"));
            let called = client.query(&sql, &[&moment, &id]);
            let refused = called.err().map(|e| e.as_db_error().unwrap().clone());
            assert!(refused.iter().all(|e| e.code().code() == "22023"), "{sql}: {refused:?}");
            refused.is_none()
        };
        assert_eq!(accepts("push('t', 'm', id => $2, ready_at => $1)", None), is_good, "{moment}");
        let many = "push_many('t', array[coalesce($2, gen_random_uuid())], array['m'], ready_ats => array[$1::timestamptz])";
        assert_eq!(accepts(many, None), is_good, "{moment}");
        let id = queue.push("other", NewMessage::new("m").delay(Duration::from_secs(600))).unwrap();
        assert_eq!(queue.topic("other").reschedule_at(id, moment).is_ok(), is_good, "{moment}");
        assert_eq!(accepts("reschedule('other', $2, ready_at => $1)", Some(id)), is_good, "{moment}");
    }
}

#[test]
fn sql_takes_what_is_just_within_the_limits() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    queue.push("t", "m").unwrap();
    for call in [
        "push(repeat('t', 255), 'x')",
        "push('t', repeat('x', 16777216))",
        "push('t', '')",
        "push('t', 'x', delay => 0)",
        "push('t', 'x', delay => 250000000000)",
        "push('t', 'x', max_attempts => 0)",
        "push('t', 'x', max_attempts => 32767, fallback => 0)",
        "push('t', 'x', headers => (select jsonb_object_agg(i::text, '') from generate_series(1, 64) i))",
        "push('t', 'x', headers => jsonb_build_object('n', repeat('v', 16383)))",
        "push_many('t', array(select gen_random_uuid() from generate_series(1, 10000)), array_fill('x'::text, '{10000}'))",
        "pop('t', 1, 1)",
        "pop('t', 1, 86400)",
        "pop('t', 1000)",
        "peek('t', 1000)",
        "dead_letters('t', 1000)",
        "set_topic('t', 86400, 32767, 250000000000, 250000000000)",
        "purge_dead('t', 250000000000, 100000)",
        "redrive_all('t', max => 10000)",
        "wait_for('t', within => 3600)",
        "upkeep('t', 100000)",
    ] {
        client
            .query(&world.sql(&format!("select pushpop.{call}")), &[])
            .unwrap_or_else(|e| panic!("{call}: {e:?}"));
    }
}

/// The numbers in a text, those of bytes and times in bytes and seconds.
fn numbers(text: &str) -> Vec<u64> {
    let mut numbers = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        rest = &rest[at..];
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != ',').unwrap_or(rest.len());
        let (number, behind) = rest.split_at(end);
        let number: u64 = number.replace(',', "").parse().unwrap();
        let unit = [(" MiB", 1 << 20), (" KiB", 1 << 10), (" h", 3_600)];
        let is_word = |rest: &str| !rest.starts_with(char::is_alphanumeric);
        let unit = unit.iter().find(|(name, _)| behind.strip_prefix(name).is_some_and(is_word));
        let unit = unit.map_or(1, |(_, of)| *of);
        numbers.push(number * unit);
        rest = behind;
    }
    numbers
}

/// The limits that an error names, without the value that was given.
fn limits(error: &str) -> Vec<u64> {
    numbers(error.rsplit_once("not ").map_or(error, |(limits, _)| limits))
}

/// A row of the tables of limits: what it says there, and what happens beyond.
type Row<'a> = (&'a str, Box<dyn Fn() -> Error + 'a>, Option<&'a str>);

/// A limit stands in the code, in the schema, and on the page.
#[test]
fn limits_are_the_same_in_rust_in_sql_and_on_the_page() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    let m = || NewMessage::new("m");
    let long = Duration::from_secs(250_000_000_001);
    let id = Uuid::new_v4();
    let push = |message: NewMessage| queue.push("t", message).unwrap_err();
    let open = |builder: pushpop_pg::Builder| builder.connect(&world.url).map(drop).unwrap_err();
    let of = |queue: &Queue, settings: TopicSettings| queue.topic("t").set(&settings).unwrap_err();
    let rows: Vec<Row<'_>> = vec![
        ("| topic |", Box::new(|| queue.push("", "m").unwrap_err()), Some("push('', 'm')")),
        (
            "| payload |",
            Box::new(|| push(NewMessage::new(vec![0; (16 << 20) + 1]))),
            Some("push('t', convert_to(repeat('x', 16777217), 'UTF8'))"),
        ),
        ("| payload |", Box::new(|| open(world.builder().max_payload((256 << 20) + 1))), None),
        (
            "| headers of a message |",
            Box::new(|| push((0..65).fold(m(), |m, i| m.header(i.to_string(), "")))),
            Some(
                "push('t', 'm', headers => (select jsonb_object_agg(i::text, '') from generate_series(1, 65) i))",
            ),
        ),
        (
            "| headers of a message |",
            Box::new(|| push(m().header("n", "v".repeat(16_384)))),
            Some("push('t', 'm', headers => jsonb_build_object('n', repeat('v', 16384)))"),
        ),
        (
            "| messages and bytes in one [`push_many`]",
            Box::new(|| queue.push_many("t", vec![""; 10_001]).unwrap_err()),
            Some(
                "push_many('t', array(select gen_random_uuid() from generate_series(1, 10001)),
                           array_fill('x'::text, '{10001}'))",
            ),
        ),
        (
            "| messages in one [`pop_many`]",
            Box::new(|| queue.pop_many("t", 1_001, Duration::ZERO).unwrap_err()),
            Some("pop('t', 1001)"),
        ),
        (
            "| messages in one [`pop_many`]",
            Box::new(|| queue.topic("t").peek(1_001).unwrap_err()),
            Some("peek('t', 1001)"),
        ),
        (
            "| messages in one [`pop_many`]",
            Box::new(|| queue.topic("t").dead(1_001).unwrap_err()),
            Some("dead_letters('t', 1001)"),
        ),
        (
            "| topics of one [`pop_any`]",
            Box::new(|| queue.pop_any(&vec!["t"; 1_001], Duration::ZERO).map(drop).unwrap_err()),
            None,
        ),
        (
            "| threads of one handler",
            Box::new(|| Worker::new(&queue).handle("t", 10_001, |_| Ok(())).run().map(drop).unwrap_err()),
            None,
        ),
        (
            "| ids in one [`redrive`]",
            Box::new(|| queue.topic("t").redrive(&vec![id; 10_001]).unwrap_err()),
            Some("redrive('t', array(select gen_random_uuid() from generate_series(1, 10001)))"),
        ),
        (
            "| delay, backoff, age |",
            Box::new(|| push(m().delay(long))),
            Some("push('t', 'm', delay => 250000000001)"),
        ),
        (
            "| delay, backoff, age |",
            Box::new(|| of(&queue, TopicSettings::default().with_backoff(Duration::ZERO, long))),
            Some("set_topic('t', null, null, 0, 250000000001)"),
        ),
        (
            "| delay, backoff, age |",
            Box::new(|| queue.topic("t").purge_dead(long).unwrap_err()),
            Some("purge_dead('t', 250000000001)"),
        ),
        (
            "| delay, backoff, age |",
            Box::new(|| queue.topic("t").reschedule(id, long).unwrap_err()),
            Some("reschedule('t', gen_random_uuid(), 250000000001)"),
        ),
        (
            "| [`ready_at`]",
            Box::new(|| push(m().ready_at(OffsetDateTime::UNIX_EPOCH.replace_year(9999).unwrap()))),
            Some("push('t', 'm', ready_at => '9999-01-01 00:00+00')"),
        ),
        (
            "| max attempts of the [message]",
            Box::new(|| push(m().max_attempts(32_768))),
            Some("push('t', 'm', max_attempts => 32768)"),
        ),
        (
            "| [`with_lease`]",
            Box::new(|| queue.with_lease(Duration::from_secs(86_401)).try_pop("t").map(drop).unwrap_err()),
            Some("pop('t', 1, 86401)"),
        ),
        ("| [`pool_size`]", Box::new(|| open(world.builder().pool_size(1_001))), None),
    ];
    let page = include_str!("../../src/lib.rs");
    for (row, call, sql) in &rows {
        let line =
            page.lines().find_map(|line| line.strip_prefix("//! ").filter(|line| line.starts_with(row)));
        let mut shown = numbers(line.unwrap_or_else(|| panic!("no row {row}")));
        // To be empty, or none of it, is not said everywhere.
        shown.extend([0, 1]);
        let error = call();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{row} {error}");
        let ours = limits(&error.to_string());
        assert!(
            ours.iter().any(|n| *n > 1) && ours.iter().all(|n| shown.contains(n)),
            "{row} {error}: {ours:?}, not {shown:?}"
        );
        let Some(sql) = sql else { continue };
        let refused = client.query(&world.sql(&format!("select pushpop.{sql}")), &[]).unwrap_err();
        let refused = refused.as_db_error().unwrap();
        assert_eq!(refused.code().code(), "22023", "{row} {refused:?}");
        let theirs = limits(refused.message());
        assert!(theirs.iter().all(|n| shown.contains(n)), "{row} {refused}: {theirs:?}, not {shown:?}");
        assert_eq!(ours.iter().max(), theirs.iter().max(), "{row} {error}, but {refused}");
    }
    let readme =
        include_str!("../../README.md").lines().find(|line| line.starts_with("| payload, headers, topic |"));
    assert_eq!(numbers(readme.unwrap()), [16 << 20, 64, 16 << 10, 255]);
}

#[test]
fn sql_takes_nonsense_for_a_token_as_lost() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    let mut client = world.client();
    let sql = world.sql("select pushpop.complete('t', $1, $2)");
    let other = vec![7_u8; 26];
    for token in [&[][..], &[0; 15], &[0; 16], &[0xff; 26], &other, &[1; 1000]] {
        let error = client.query(&sql, &[&lease.id(), &token]).unwrap_err();
        assert_eq!(error.code().unwrap().code(), "PP001", "{token:?}");
    }
    let error = client.query(&sql, &[&lease.id(), &None::<Vec<u8>>]).unwrap_err();
    assert!(error.as_db_error().is_some());
    lease.complete().unwrap();
}
