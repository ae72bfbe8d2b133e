//! The functions of the schema, as this crate calls them: their SQL, and the rows they return.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use postgres::Row;
use postgres::types::Type;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::link::Call;
use crate::message::{Failure, Message, State};
use crate::schema::Schema;
use crate::text::Text;
use crate::times::{time, time_or_null};
use crate::topic::Stats;

/// Every statement that the queue ever sends, apart from migrations and a caller's own.
pub(crate) struct Calls {
    pub(crate) push: Call,
    pub(crate) push_many: Call,
    /// The same for slices of the arrays, a topic each.
    pub(crate) push_topics: Call,
    pub(crate) pop: Call,
    pub(crate) pop_topics: Call,
    /// From whichever of the topics has something.
    pub(crate) pop_any: Call,
    pub(crate) wait_for: Call,
    pub(crate) settle_many: Call,
    pub(crate) settle_topics: Call,
    /// Settles, then pops.
    pub(crate) turn: Call,
    /// The same for a single topic, without what several take: a fifth less of the server's time.
    pub(crate) turn_topic: Call,
    pub(crate) heartbeat: Call,
    pub(crate) complete: Call,
    pub(crate) discard: Call,
    pub(crate) find: Call,
    pub(crate) peek: Call,
    pub(crate) stats: Call,
    pub(crate) topics: Call,
    pub(crate) purge: Call,
    pub(crate) dead: Call,
    pub(crate) redrive: Call,
    pub(crate) redrive_all: Call,
    pub(crate) purge_dead: Call,
    pub(crate) pause: Call,
    pub(crate) resume: Call,
    pub(crate) set_topic: Call,
    pub(crate) topic_settings: Call,
    pub(crate) cancel: Call,
    pub(crate) reschedule: Call,
    pub(crate) upkeep: Call,
    pub(crate) upkeep_due: Call,
    pub(crate) listen: String,
}

/// Headers as an array of names and values in turn: no JSON to be read here. Nothing is called where there are none.
const HEADERS: &str = "case when headers is not null then pushpop.header_pairs(headers) end";

/// Failures likewise: attempt, microseconds since 1970, and error in turn.
const FAILURES: &str = "case when failures is not null then pushpop.failure_list(failures) end";

/// The parameters of settles and pops together.
const TURN: &[Type] = &[
    Type::TEXT_ARRAY,
    Type::INT4_ARRAY,
    Type::INT4_ARRAY,
    Type::UUID_ARRAY,
    Type::BYTEA_ARRAY,
    Type::TEXT_ARRAY,
    Type::FLOAT8_ARRAY,
    Type::TEXT_ARRAY,
    Type::FLOAT8,
    Type::INT4_ARRAY,
    Type::FLOAT8_ARRAY,
    Type::FLOAT8,
];

impl Calls {
    pub(crate) fn new(schema: &Schema) -> Self {
        let call = |name, sql: &str, types: &'static [Type]| Call { name, sql: schema.localize(sql), types };
        let shown = format!(
            "select id, payload, {HEADERS}, state, attempt, max_attempts, fence, pushed_at, ready_at, \
             lease_until, done_at, delete_at, {FAILURES} from pushpop."
        );
        let popped = format!(
            "id, payload, {HEADERS}, token, lease_until, attempt, max_attempts, fence, pushed_at, ready_at, \
             {FAILURES}, pg_catalog.statement_timestamp() as asked_at"
        );
        // Which slice of the arrays is for which topic.
        let slices = "rows from (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) \
                      g(topic, first, last)";
        // Operators are looked up by the session's search path, unless they are qualified.
        let before = "g.first operator(pg_catalog.-) 1 operator(pg_catalog.+) ";
        let figures = "at, ready, delayed, leased, settled, dead, oldest_ready_at, paused, \
                       upkept_at, upkeep_seconds, upkeep_rows";
        // What came of settles, as rows of the form of those that a pop returns.
        let settled = format!(
            "select null::pg_catalog.uuid as id, null::pg_catalog.bytea as payload, \
             null::pg_catalog.text[] as headers, null::pg_catalog.bytea as token, s.lease_until, \
             null::pg_catalog.int4 as attempt, null::pg_catalog.int4 as max_attempts, \
             null::pg_catalog.int8 as fence, null::pg_catalog.timestamptz as pushed_at, \
             null::pg_catalog.timestamptz as ready_at, null::pg_catalog.text[] as failures, \
             null::pg_catalog.timestamptz as asked_at, \
             null::pg_catalog.int8 as part, {before}s.place as place, s.result \
             from {slices}, \
             pushpop.settle_many(g.topic, $4[g.first : g.last], $5[g.first : g.last], $6[g.first : g.last], \
             $7[g.first : g.last], $8[g.first : g.last], $9, true) s"
        );
        Calls {
            push: call(
                "push",
                "select pushed, duplicate from pushpop.push($1, $2, $3, $4, $5, $6::pg_catalog.text::pg_catalog.jsonb, $7, $8, $9)",
                &[
                    Type::TEXT,
                    Type::BYTEA,
                    Type::UUID,
                    Type::FLOAT8,
                    Type::TIMESTAMPTZ,
                    Type::TEXT,
                    Type::INT4,
                    Type::UUID,
                    Type::INT4,
                ],
            ),
            push_many: call(
                "push_many",
                "select pushpop.push_many($1, $2, $3, $4, $5, $6::pg_catalog.text[]::pg_catalog.jsonb[], $7, $8, $9)",
                &[
                    Type::TEXT,
                    Type::UUID_ARRAY,
                    Type::BYTEA_ARRAY,
                    Type::FLOAT8_ARRAY,
                    Type::TIMESTAMPTZ_ARRAY,
                    Type::TEXT_ARRAY,
                    Type::INT4_ARRAY,
                    Type::UUID,
                    Type::INT4,
                ],
            ),
            push_topics: call(
                "push_topics",
                &format!(
                    "select {before}p.place from {slices}, \
                     pushpop.push_many(g.topic, $4[g.first : g.last], $5[g.first : g.last], $6[g.first : g.last], \
                     $7[g.first : g.last], ($8::pg_catalog.text[]::pg_catalog.jsonb[])[g.first : g.last], \
                     $9[g.first : g.last], $10, $11) p(place)"
                ),
                &[
                    Type::TEXT_ARRAY,
                    Type::INT4_ARRAY,
                    Type::INT4_ARRAY,
                    Type::UUID_ARRAY,
                    Type::BYTEA_ARRAY,
                    Type::FLOAT8_ARRAY,
                    Type::TIMESTAMPTZ_ARRAY,
                    Type::TEXT_ARRAY,
                    Type::INT4_ARRAY,
                    Type::UUID,
                    Type::INT4,
                ],
            ),
            pop: call(
                "pop",
                &format!("select {popped} from pushpop.pop($1, $2, $3, $4)"),
                &[Type::TEXT, Type::INT4, Type::FLOAT8, Type::FLOAT8],
            ),
            pop_topics: call(
                "pop_topics",
                &format!(
                    "select {popped}, part from pushpop.pop_any($1, maxes => $2, leases => $3, fallback => $4)"
                ),
                &[Type::TEXT_ARRAY, Type::INT4_ARRAY, Type::FLOAT8_ARRAY, Type::FLOAT8],
            ),
            pop_any: call(
                "pop_any",
                &format!("select {popped}, part from pushpop.pop_any($1, $2, $3, $4)"),
                &[Type::TEXT_ARRAY, Type::INT4, Type::FLOAT8, Type::FLOAT8],
            ),
            wait_for: call(
                "wait_for",
                "select place, ready, due_in, noted from pushpop.wait_for_any($1, $2, $3)",
                &[Type::TEXT_ARRAY, Type::UUID, Type::FLOAT8],
            ),
            settle_many: call(
                "settle_many",
                "select place, result, lease_until from pushpop.settle_many($1, $2, $3, $4, $5, $6, $7, true)",
                &[
                    Type::TEXT,
                    Type::UUID_ARRAY,
                    Type::BYTEA_ARRAY,
                    Type::TEXT_ARRAY,
                    Type::FLOAT8_ARRAY,
                    Type::TEXT_ARRAY,
                    Type::FLOAT8,
                ],
            ),
            settle_topics: call(
                "settle_topics",
                &format!(
                    "select {before}s.place, s.result, s.lease_until from {slices}, \
                     pushpop.settle_many(g.topic, $4[g.first : g.last], $5[g.first : g.last], $6[g.first : g.last], \
                     $7[g.first : g.last], $8[g.first : g.last], $9, true) s"
                ),
                &[
                    Type::TEXT_ARRAY,
                    Type::INT4_ARRAY,
                    Type::INT4_ARRAY,
                    Type::UUID_ARRAY,
                    Type::BYTEA_ARRAY,
                    Type::TEXT_ARRAY,
                    Type::FLOAT8_ARRAY,
                    Type::TEXT_ARRAY,
                    Type::FLOAT8,
                ],
            ),
            turn: call(
                "turn",
                &format!(
                    "{settled} union all \
                     select {popped}, part, null, null \
                     from pushpop.pop_any($1, maxes => $10, leases => $11, fallback => $12)"
                ),
                TURN,
            ),
            turn_topic: call(
                "turn_topic",
                &format!(
                    "{settled} union all \
                     select {popped}, 1::pg_catalog.int8, null, null \
                     from pushpop.pop(($1)[1], ($10)[1], ($11)[1], $12)"
                ),
                TURN,
            ),
            heartbeat: call(
                "heartbeat",
                "select place, result, lease_until from pushpop.heartbeat($1, $2, $3, $4)",
                &[Type::TEXT_ARRAY, Type::UUID_ARRAY, Type::BYTEA_ARRAY, Type::FLOAT8_ARRAY],
            ),
            complete: call(
                "complete",
                "select pushpop.complete($1, $2, $3, $4, true)",
                &[Type::TEXT, Type::UUID, Type::BYTEA, Type::FLOAT8],
            ),
            discard: call(
                "discard",
                "select pushpop.discard($1, $2, $3, $4, true)",
                &[Type::TEXT, Type::UUID, Type::BYTEA, Type::FLOAT8],
            ),
            find: call("find", &format!("{shown}find($1, $2)"), &[Type::TEXT, Type::UUID]),
            peek: call("peek", &format!("{shown}peek($1, $2)"), &[Type::TEXT, Type::INT4]),
            stats: call("stats", &format!("select $1, {figures} from pushpop.stats($1)"), &[Type::TEXT]),
            topics: call(
                "topics",
                &format!("select topic, {figures} from pushpop.all_stats($1, $2)"),
                &[Type::TEXT, Type::FLOAT8],
            ),
            purge: call("purge", "select pushpop.purge($1)", &[Type::TEXT]),
            dead: call("dead", &format!("{shown}dead_letters($1, $2)"), &[Type::TEXT, Type::INT4]),
            redrive: call("redrive", "select pushpop.redrive($1, $2)", &[Type::TEXT, Type::UUID_ARRAY]),
            redrive_all: call(
                "redrive_all",
                "select redriven, until from pushpop.redrive_all($1, $2)",
                &[Type::TEXT, Type::TIMESTAMPTZ],
            ),
            purge_dead: call("purge_dead", "select pushpop.purge_dead($1, $2)", &[Type::TEXT, Type::FLOAT8]),
            pause: call("pause", "select pushpop.pause($1)", &[Type::TEXT]),
            resume: call("resume", "select pushpop.resume($1)", &[Type::TEXT]),
            set_topic: call(
                "set",
                "select pushpop.set_topic($1, $2, $3, $4, $5)",
                &[Type::TEXT, Type::FLOAT8, Type::INT4, Type::FLOAT8, Type::FLOAT8],
            ),
            topic_settings: call(
                "settings",
                "select lease, max_attempts, backoff_first, backoff_most from pushpop.topic_settings($1)",
                &[Type::TEXT],
            ),
            cancel: call(
                "cancel",
                "select pushpop.cancel($1, $2, $3)",
                &[Type::TEXT, Type::UUID, Type::FLOAT8],
            ),
            reschedule: call(
                "reschedule",
                "select pushpop.reschedule($1, $2, $3, $4)",
                &[Type::TEXT, Type::UUID, Type::FLOAT8, Type::TIMESTAMPTZ],
            ),
            upkeep: call(
                "upkeep",
                "select pushpop.upkeep(t.topic, $2) from pg_catalog.unnest($1) t(topic)",
                &[Type::TEXT_ARRAY, Type::INT4],
            ),
            upkeep_due: call("upkeep_due", "select pushpop.upkeep_due(after => $1)", &[Type::TEXT]),
            listen: format!("listen {}", schema.identifier()),
        }
    }
}

/// A message handed out: what a lease is made of.
pub(crate) struct Grant {
    pub(crate) message: Message,
    pub(crate) token: Vec<u8>,
    pub(crate) lease_until: OffsetDateTime,
    /// When the pop was sent, by the local clock.
    pub(crate) asked: Instant,
    /// From when its statement began, which was later, until the lease ends.
    pub(crate) lease: Duration,
}

impl Grant {
    pub(crate) fn read(topic: &str, row: &Row, asked: Instant) -> Result<Self, postgres::Error> {
        let (lease_until, began) = (time(row, 4)?, time(row, 11)?);
        Ok(Grant {
            asked,
            lease: (lease_until - began).try_into().unwrap_or_default(),
            token: row.try_get(3)?,
            lease_until,
            message: Message {
                topic: topic.to_owned(),
                id: row.try_get(0)?,
                payload: row.try_get(1)?,
                headers: headers(row.try_get(2)?),
                state: State::Leased { until: lease_until },
                attempt: count(row.try_get(5)?),
                max_attempts: limit(row.try_get(6)?),
                fence: row.try_get(7)?,
                pushed_at: time(row, 8)?,
                ready_at: time(row, 9)?,
                failures: failures(row.try_get(10)?),
            },
        })
    }
}

impl Message {
    pub(crate) fn read(topic: &str, row: &Row) -> Result<Self, postgres::Error> {
        let (pushed_at, ready_at) = (time(row, 7)?, time(row, 8)?);
        let lease_until = time_or_null(row, 9)?;
        let (done_at, delete_at) = (time_or_null(row, 10)?, time_or_null(row, 11)?);
        let at = done_at.unwrap_or(ready_at);
        let state = match row.try_get(3)? {
            "leased" => State::Leased { until: lease_until.unwrap_or(ready_at) },
            "delayed" => State::Delayed { until: ready_at },
            "completed" => State::Completed { at, until: delete_at.unwrap_or(at) },
            "discarded" => State::Discarded { at, until: delete_at.unwrap_or(at) },
            "dead" => State::Dead { at },
            _ => State::Ready,
        };
        Ok(Message {
            topic: topic.to_owned(),
            id: row.try_get(0)?,
            payload: row.try_get(1)?,
            headers: headers(row.try_get(2)?),
            state,
            attempt: count(row.try_get(4)?),
            max_attempts: limit(row.try_get(5)?),
            fence: row.try_get(6)?,
            pushed_at,
            ready_at,
            failures: failures(row.try_get(12)?),
        })
    }
}

impl Stats {
    pub(crate) fn read(row: &Row) -> Result<Self, postgres::Error> {
        let figure = |i| -> Result<u64, postgres::Error> {
            Ok(u64::try_from(row.try_get::<_, i64>(i)?).unwrap_or_default())
        };
        Ok(Stats {
            topic: row.try_get::<_, Text>(0)?.0,
            at: row.try_get(1)?,
            ready: figure(2)?,
            delayed: figure(3)?,
            leased: figure(4)?,
            settled: figure(5)?,
            dead: figure(6)?,
            oldest_ready_at: time_or_null(row, 7)?,
            paused: row.try_get(8)?,
            upkept_at: time_or_null(row, 9)?,
            upkeep_time: Duration::try_from_secs_f64(row.try_get(10)?).unwrap_or_default(),
            upkeep_rows: figure(11)?,
        })
    }
}

fn headers(pairs: Option<Vec<Text>>) -> BTreeMap<String, String> {
    let mut map = BTreeMap::new();
    let mut pairs = pairs.unwrap_or_default().into_iter();
    while let (Some(name), Some(value)) = (pairs.next(), pairs.next()) {
        map.insert(name.0, value.0);
    }
    map
}

fn failures(texts: Option<Vec<Text>>) -> Vec<Failure> {
    let mut failures = Vec::new();
    let mut texts = texts.unwrap_or_default().into_iter();
    while let (Some(attempt), Some(micros), Some(error)) = (texts.next(), texts.next(), texts.next()) {
        let micros: i128 = micros.0.parse().unwrap_or_default();
        failures.push(Failure {
            attempt: attempt.0.parse().unwrap_or_default(),
            at: OffsetDateTime::from_unix_timestamp_nanos(micros * 1000)
                .unwrap_or(OffsetDateTime::UNIX_EPOCH),
            error: error.0,
        });
    }
    failures
}

fn count(n: i32) -> u32 {
    u32::try_from(n).unwrap_or_default()
}

fn limit(most: Option<i32>) -> Option<u16> {
    most.and_then(|n| u16::try_from(n).ok())
}

/// Headers as the text of a JSON object; `None` if there are none.
pub(crate) fn headers_json(headers: &BTreeMap<String, String>) -> Option<String> {
    if headers.is_empty() {
        return None;
    }
    let mut json = String::from("{");
    for (name, value) in headers {
        if json.len() > 1 {
            json.push(',');
        }
        quote(name, &mut json);
        json.push(':');
        quote(value, &mut json);
    }
    json.push('}');
    Some(json)
}

fn quote(text: &str, json: &mut String) {
    json.push('"');
    for c in text.chars() {
        match c {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            c if c < ' ' => json.push_str(&format!("\\u{:04x}", c as u32)),
            c => json.push(c),
        }
    }
    json.push('"');
}

/// What the holder of a lease does with its message.
#[derive(Clone, Debug)]
pub(crate) enum Verb {
    Complete,
    Discard,
    Defer(f64),
    Release,
    /// Without a delay, after the backoff.
    Fail {
        why: String,
        delay: Option<f64>,
    },
    Extend(f64),
}

impl Verb {
    /// A failure, with as much of its reason as is stored.
    pub(crate) fn fail(why: impl fmt::Display, delay: Option<f64>) -> Self {
        let why = why.to_string().replace('\0', "\u{fffd}").chars().take(8192).collect();
        Verb::Fail { why, delay }
    }

    /// The word for it, as the functions of the schema take it.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Verb::Complete => "complete",
            Verb::Discard => "discard",
            Verb::Defer(_) => "defer",
            Verb::Release => "release",
            Verb::Fail { .. } => "fail",
            Verb::Extend(_) => "extend",
        }
    }

    pub(crate) fn delay(&self) -> Option<f64> {
        match self {
            Verb::Defer(seconds) | Verb::Extend(seconds) => Some(*seconds),
            Verb::Fail { delay, .. } => *delay,
            _ => None,
        }
    }

    /// In how long it is worth looking for the message again: after a backoff only the server knows, and says it
    /// to whoever looks.
    pub(crate) fn comes_back_in(&self) -> Option<Duration> {
        match self {
            Verb::Release | Verb::Fail { delay: None, .. } => Some(Duration::ZERO),
            Verb::Defer(seconds) | Verb::Fail { delay: Some(seconds), .. } => {
                Duration::try_from_secs_f64(*seconds).ok()
            }
            _ => None,
        }
    }

    pub(crate) fn error(&self) -> Option<&str> {
        match self {
            Verb::Fail { why, .. } => Some(why),
            _ => None,
        }
    }
}

/// A settle of one message, proved by its token.
#[derive(Clone)]
pub(crate) struct Settle {
    pub(crate) id: Uuid,
    pub(crate) token: Vec<u8>,
    pub(crate) verb: Verb,
}

/// What became of a settle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Settled,
    Extended(OffsetDateTime),
    /// Its lease was handed on, or settled otherwise.
    Lost,
    /// No such message is stored any more.
    Gone,
}

impl Verdict {
    pub(crate) fn read(result: &str, until: Option<OffsetDateTime>) -> Self {
        match (result, until) {
            ("extended", Some(until)) => Verdict::Extended(until),
            ("again", _) => Verdict::Settled,
            ("gone", _) => Verdict::Gone,
            _ => Verdict::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_json_has_no_sign_for_is_escaped() {
        let mut json = String::new();
        quote("a \"b\"\\\u{1f}\u{7f}\u{e9}", &mut json);
        assert_eq!(json, "\"a \\\"b\\\"\\\\\\u001f\u{7f}\u{e9}\"");
    }

    #[test]
    fn what_is_given_back_is_looked_for_in_time() {
        let fail = |delay| Verb::fail("why", delay);
        for (verb, seconds) in [
            (Verb::Complete, None),
            (Verb::Discard, None),
            (Verb::Extend(9.0), None),
            (Verb::Release, Some(0)),
            (Verb::Defer(9.0), Some(9)),
            (fail(Some(7.0)), Some(7)),
            (fail(None), Some(0)),
        ] {
            assert_eq!(verb.comes_back_in(), seconds.map(Duration::from_secs), "{}", verb.word());
            assert_eq!(verb.error(), (verb.word() == "fail").then_some("why"));
        }
    }
}
