//! The limits of everything that a caller hands in. The functions of the schema check them too;
//! here they are refused before anything is sent.

use std::collections::BTreeMap;
use std::time::Duration;

use time::OffsetDateTime;

use crate::error::{Error, Result};

/// Rows and bytes that one flight carries at most.
pub(crate) const FLIGHT_ROWS: usize = 1_000;
pub(crate) const FLIGHT_BYTES: usize = 16 << 20;

pub(crate) const PAYLOAD: usize = 16 << 20;
const PAYLOAD_SETTABLE: usize = 256 << 20;
const HEADERS: usize = 16 << 10;

/// As good as for ever, and no clock overflows.
pub(crate) const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The longest time after which somebody who waits looks again.
pub(crate) const POLL: Duration = Duration::from_secs(3_600);

/// About 7,900 years: the longest delay that ends before the year 10000.
pub(crate) const DELAY: Duration = Duration::from_secs(250_000_000_000);

fn check(within: bool, message: impl FnOnce() -> String) -> Result<()> {
    if within { Ok(()) } else { Err(Error::invalid(message())) }
}

pub(crate) fn topic(topic: &str) -> Result<()> {
    check((1..=255).contains(&topic.len()), || format!("a topic has 1 to 255 bytes, not {}", topic.len()))?;
    check(!topic.contains('\0'), || "a topic has no NUL character".into())
}

pub(crate) fn schema(schema: &str) -> Result<()> {
    check((1..=63).contains(&schema.len()), || {
        format!("the name of a schema has 1 to 63 bytes, not {}", schema.len())
    })?;
    check(!schema.contains(['\0', '$']), || "the name of a schema has no NUL and no dollar sign".into())?;
    check(!schema.starts_with("pg_"), || {
        "the names of schemas that begin with pg_ are PostgreSQL's own".into()
    })
}

pub(crate) fn payload(bytes: usize, most: usize) -> Result<()> {
    check(bytes <= most, || format!("a payload has at most {most} bytes, not {bytes}"))
}

pub(crate) fn headers(headers: &BTreeMap<String, String>) -> Result<()> {
    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    check(headers.len() <= 64, || format!("a message has at most 64 headers, not {}", headers.len()))?;
    check(bytes <= HEADERS, || {
        format!("the headers of a message have at most {HEADERS} bytes, not {bytes}")
    })?;
    check(!headers.iter().any(|(name, value)| name.contains('\0') || value.contains('\0')), || {
        "a header has no NUL character".into()
    })
}

pub(crate) fn delay(delay: Duration) -> Result<()> {
    check(delay <= DELAY, || {
        format!("a delay has at most {} seconds, not {}", DELAY.as_secs(), delay.as_secs())
    })
}

pub(crate) fn age(age: Duration) -> Result<()> {
    check(age <= DELAY, || format!("an age has at most {} seconds, not {}", DELAY.as_secs(), age.as_secs()))
}

pub(crate) fn backoff(first: Duration, most: Duration) -> Result<()> {
    check(first <= most && most <= DELAY, || {
        let longest = DELAY.as_secs();
        format!("the first backoff is at most the longest, that {longest} seconds: not {first:?} to {most:?}")
    })
}

pub(crate) fn ready_at(at: OffsetDateTime) -> Result<()> {
    let year = at.to_offset(time::UtcOffset::UTC).year();
    check((2..=9998).contains(&year), || {
        format!("a message is ready between the years 2 and 9998, not in {year}")
    })
}

pub(crate) fn max_attempts(most: u16) -> Result<()> {
    check((1..=32_767).contains(&most), || format!("a message has 1 to 32767 attempts, not {most}"))
}

pub(crate) fn lease(lease: Duration) -> Result<()> {
    let (least, most) = (Duration::from_secs(1), Duration::from_secs(86_400));
    check((least..=most).contains(&lease), || format!("a lease has 1 s to 24 h, not {lease:?}"))
}

/// The topics that one pop asks.
pub(crate) fn topics(topics: &[impl AsRef<str>]) -> Result<()> {
    check((1..=1_000).contains(&topics.len()), || {
        format!("a pop asks 1 to 1000 topics, not {}", topics.len())
    })?;
    topics.iter().try_for_each(|name| topic(name.as_ref()))
}

/// The threads of a worker for one handler.
pub(crate) fn threads(threads: usize) -> Result<()> {
    check((1..=10_000).contains(&threads), || format!("a handler has 1 to 10000 threads, not {threads}"))
}

/// How many leases one `pop_many` may ask for.
pub(crate) fn batch(max: usize) -> Result<()> {
    check((1..=FLIGHT_ROWS).contains(&max), || format!("a pop takes 1 to {FLIGHT_ROWS} messages, not {max}"))
}

/// How many messages one `push_many` may carry, and how many bytes.
const BATCH_ROWS: usize = 10_000;
const BATCH_BYTES: usize = 256 << 20;

pub(crate) fn push_batch(messages: usize) -> Result<()> {
    check(messages <= BATCH_ROWS, || format!("a batch has at most {BATCH_ROWS} messages, not {messages}"))
}

pub(crate) fn push_bytes(bytes: usize) -> Result<()> {
    check(bytes <= BATCH_BYTES + HEADERS, || format!("a batch has at most {BATCH_BYTES} bytes, not {bytes}"))
}

/// A setting of the builder's that is a length of time.
pub(crate) fn at_least(what: &str, least: Duration, value: Duration) -> Result<()> {
    check(value >= least, || format!("{what} is at least {least:?}, not {value:?}"))
}

pub(crate) fn pool_size(size: usize) -> Result<()> {
    check((1..=1_000).contains(&size), || format!("a pool has 1 to 1000 connections, not {size}"))
}

pub(crate) fn max_payload(bytes: usize) -> Result<()> {
    check(bytes <= PAYLOAD_SETTABLE, || {
        format!("payloads may have up to {PAYLOAD_SETTABLE} bytes, not {bytes}")
    })
}

pub(crate) fn keep(time: Duration) -> Result<()> {
    check(time <= DELAY, || {
        format!("history is kept for at most {} seconds, not {}", DELAY.as_secs(), time.as_secs())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first value that is refused, and the last one that is not.
    #[track_caller]
    fn ends<T: std::fmt::Debug>(check: impl Fn(T) -> Result<()>, within: T, beyond: T) {
        assert!(check(within).is_ok());
        assert!(check(beyond).is_err());
    }

    /// Those that a test through the queue would take a quarter of a gigabyte for.
    #[test]
    fn sizes_end_where_they_say() {
        ends(|bytes| payload(bytes, 10), 10, 11);
        ends(max_payload, 256 << 20, (256 << 20) + 1);
        ends(push_bytes, (256 << 20) + (16 << 10), (256 << 20) + (16 << 10) + 1);
        ends(push_batch, 10_000, 10_001);
        ends(batch, 1_000, 1_001);
        ends(batch, 1, 0);
        ends(pool_size, 1_000, 1_001);
        ends(pool_size, 1, 0);
        ends(threads, 10_000, 10_001);
        ends(threads, 1, 0);
    }

    #[test]
    fn headers_end_where_they_say() {
        let of = |count: usize, value: usize| -> BTreeMap<String, String> {
            (0..count).map(|i| (format!("{i:04}"), "v".repeat(value))).collect()
        };
        let check = |(count, value)| headers(&of(count, value));
        ends(check, (64, 252), (64, 253));
        ends(check, (64, 0), (65, 0));
        ends(check, (1, HEADERS - 4), (1, HEADERS - 3));
    }

    #[test]
    fn times_end_where_they_say() {
        let more = Duration::from_nanos(1);
        ends(delay, DELAY, DELAY + more);
        ends(age, DELAY, DELAY + more);
        ends(keep, DELAY, DELAY + more);
        ends(lease, Duration::from_secs(1), Duration::from_secs(1) - more);
        ends(lease, Duration::from_secs(86_400), Duration::from_secs(86_400) + more);
        ends(|most| backoff(DELAY, most), DELAY, DELAY + more);
        ends(|most| backoff(Duration::from_secs(2), most), Duration::from_secs(2), Duration::from_secs(1));
        ends(
            |value| at_least("a time", Duration::from_secs(1), value),
            Duration::from_secs(1),
            Duration::ZERO,
        );
    }
}
