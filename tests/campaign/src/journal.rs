//! The log of one process: what it is about to do, and what came of it.
//!
//! A line is the wall time and the monotonic time, both in microseconds, a word, and what belongs to it. What
//! goes together is written by a single call, so a process that is killed leaves at most one torn line,
//! the last one; that one is not counted. An id stands with the number of its delivery, as `id:fence`.
//!
//! | word | what |
//! |---|---|
//! | `push CALL TOPIC ID NAME HASH` | a message is about to be pushed; NAME is what the producer calls it, whatever its id |
//! | `pushed CALL OUTCOME` | what came of that call |
//! | `grant TOPIC ID:FENCE ATTEMPT DEADLINE HASH` | a message was handed out |
//! | `work ID:FENCE ..` | the work was done, by which the message may be completed |
//! | `settle CALL VERB ID:FENCE ..` | deliveries are about to be settled |
//! | `settled CALL OUTCOME [ID ..]` | what came of it; ok but for those listed, which were lost |
//! | `extend CALL ID:FENCE` | a lease is about to be extended |
//! | `extended CALL OUTCOME DEADLINE` | what came of it |
//! | `fault ..`, `note ..` | by the director: what it did; by others: what they met |
//! | `begun`, `alive`, `ended` | a client is there from now on; a round of its pulse was answered; it ends as it was told |
//! | `mended WITHIN ..` | by the director: a fault has ended, and in what time all clients must be served again |
//! | `window FROM TO` | by the director: a standby took over, and what was committed between these two may be lost |
//! | `granted KEY AT` | by the director: such a lease was there before the server was killed |
//! | `step OFFSET` | by the director: how far the server's clock is ahead from now on |
//! | `reach WITHIN PERIOD` | by the director: for how long a message that bounces may be out of sight, and how often there are audits |
//! | `audited MICROS` | by the auditor: all rules held in one snapshot, which took so long |
//! | `broken ..`, `row ..` | by the auditor: a rule did not hold, and the rows that say so |
//! | `calm BOUND`, `drained` | faults have ended, and by when the backlog must be gone; it is gone |
//!
//! An outcome is `ok`, `failed:KIND`, or `unknown:KIND` when the reply that would have said so never came.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use pushpop_pg::uuid::Uuid;
use pushpop_pg::{BoxError, Error};

pub(crate) struct Journal {
    file: Mutex<File>,
    begun: Instant,
    calls: AtomicU64,
}

impl Journal {
    pub(crate) fn open(path: &Path) -> Result<Journal, BoxError> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Journal { file: Mutex::new(file), begun: Instant::now(), calls: AtomicU64::new(1) })
    }

    /// A number for a call, by which its end finds its beginning.
    pub(crate) fn call(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn line(&self, line: impl AsRef<str>) {
        self.lines([line]);
    }

    /// Writes lines at once. A process that cannot say what it does must not do it: it ends.
    pub(crate) fn lines(&self, lines: impl IntoIterator<Item = impl AsRef<str>>) {
        let stamp = format!("{} {} ", now(), self.begun.elapsed().as_micros());
        let mut text = String::new();
        for line in lines {
            text.push_str(&stamp);
            text.push_str(line.as_ref());
            text.push('\n');
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = file.write_all(text.as_bytes()) {
            eprintln!("the log cannot be written: {e}");
            std::process::exit(3);
        }
    }
}

/// The wall clock, in microseconds.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// What an error says about the call.
pub(crate) fn outcome(error: &Error) -> String {
    let word = if error.is_indeterminate() { "unknown" } else { "failed" };
    format!("{word}:{:?}", error.kind())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    /// It did not take effect, for the reason of the lease having been lost.
    Lost,
    /// It did not take effect.
    Failed,
    /// The reply never came; or the process did not live to write it down.
    Unknown,
}

/// A line, read.
#[derive(Debug, PartialEq)]
pub(crate) enum Entry {
    Push { call: u64, topic: String, id: Uuid, name: String, hash: u64 },
    Pushed { call: u64, outcome: Outcome },
    Grant { id: Uuid, fence: i64, deadline: i64, hash: u64 },
    Work(Vec<(Uuid, i64)>),
    Settle { call: u64, verb: String, deliveries: Vec<(Uuid, i64)> },
    Settled { call: u64, outcome: Outcome, lost: Vec<Uuid> },
    Extend { call: u64, id: Uuid, fence: i64 },
    Extended { call: u64, outcome: Outcome, deadline: i64 },
    Begun,
    Alive,
    Ended,
    Mended { within: i64 },
    Window { from: i64, to: i64 },
    Granted { key: String, at: i64 },
    Step,
    Audited { took: i64 },
    Broken,
    Row,
    Reach { within: i64, audits: u64 },
    Calm { bound: i64 },
    Drained,
    Other,
}

impl Outcome {
    fn read(word: &str) -> Option<Outcome> {
        match word.split_once(':').map_or(word, |(word, _)| word) {
            "ok" => Some(Outcome::Ok),
            "failed" if word == "failed:LeaseLost" => Some(Outcome::Lost),
            "failed" => Some(Outcome::Failed),
            "unknown" => Some(Outcome::Unknown),
            _ => None,
        }
    }
}

impl Entry {
    /// Reads a line: its wall time, and what it says. `None`: it is torn, or none of ours.
    pub(crate) fn read(line: &str) -> Option<(i64, Entry)> {
        let mut words = line.split(' ');
        let wall = words.next()?.parse().ok()?;
        let _monotonic: u64 = words.next()?.parse().ok()?;
        let entry = match words.next()? {
            "push" => Entry::Push {
                call: words.next()?.parse().ok()?,
                topic: words.next()?.to_owned(),
                id: words.next()?.parse().ok()?,
                name: words.next()?.to_owned(),
                hash: u64::from_str_radix(words.next()?, 16).ok()?,
            },
            "pushed" => {
                Entry::Pushed { call: words.next()?.parse().ok()?, outcome: Outcome::read(words.next()?)? }
            }
            "grant" => {
                let _topic = words.next()?;
                let (id, fence) = delivery(words.next()?)?;
                let _attempt: u32 = words.next()?.parse().ok()?;
                Entry::Grant {
                    id,
                    fence,
                    deadline: words.next()?.parse().ok()?,
                    hash: u64::from_str_radix(words.next()?, 16).ok()?,
                }
            }
            "work" => Entry::Work(words.map(delivery).collect::<Option<_>>()?),
            "settle" => Entry::Settle {
                call: words.next()?.parse().ok()?,
                verb: words.next()?.to_owned(),
                deliveries: words.map(delivery).collect::<Option<_>>()?,
            },
            "settled" => Entry::Settled {
                call: words.next()?.parse().ok()?,
                outcome: Outcome::read(words.next()?)?,
                lost: words.map(|id| id.parse().ok()).collect::<Option<_>>()?,
            },
            "extend" => {
                let call = words.next()?.parse().ok()?;
                let (id, fence) = delivery(words.next()?)?;
                Entry::Extend { call, id, fence }
            }
            "extended" => Entry::Extended {
                call: words.next()?.parse().ok()?,
                outcome: Outcome::read(words.next()?)?,
                deadline: words.next()?.parse().ok()?,
            },
            "begun" => Entry::Begun,
            "alive" => Entry::Alive,
            "ended" => Entry::Ended,
            "mended" => Entry::Mended { within: words.next()?.parse().ok()? },
            "window" => Entry::Window { from: words.next()?.parse().ok()?, to: words.next()?.parse().ok()? },
            "granted" => Entry::Granted { key: words.next()?.to_owned(), at: words.next()?.parse().ok()? },
            "step" => Entry::Step,
            "audited" => Entry::Audited { took: words.next()?.parse().ok()? },
            "broken" => Entry::Broken,
            "row" => Entry::Row,
            "reach" => {
                Entry::Reach { within: words.next()?.parse().ok()?, audits: words.next()?.parse().ok()? }
            }
            "calm" => Entry::Calm { bound: words.next()?.parse().ok()? },
            "drained" => Entry::Drained,
            "fault" | "note" => Entry::Other,
            _ => return None,
        };
        Some((wall, entry))
    }
}

fn delivery(word: &str) -> Option<(Uuid, i64)> {
    let (id, fence) = word.split_once(':')?;
    Some((id.parse().ok()?, fence.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_torn_line_is_none() {
        let id = Uuid::from_u128(7);
        let line = format!("5 6 settle 3 complete {id}:2");
        let settle = Entry::Settle { call: 3, verb: "complete".into(), deliveries: vec![(id, 2)] };
        assert_eq!(Entry::read(&line).unwrap(), (5, settle));
        assert_eq!(Entry::read(&line[..line.len() - 1]), None);
        assert_eq!(Entry::read("5 6 pushe"), None);
        assert_eq!(Entry::read("5"), None);
    }

    #[test]
    fn an_outcome_has_three_values() {
        let read = |outcome| match Entry::read(&format!("1 1 pushed 1 {outcome}")) {
            Some((_, Entry::Pushed { outcome, .. })) => Some(outcome),
            _ => None,
        };
        assert_eq!(read("ok"), Some(Outcome::Ok));
        assert_eq!(read("failed:Connection"), Some(Outcome::Failed));
        assert_eq!(read("failed:LeaseLost"), Some(Outcome::Lost));
        assert_eq!(read("unknown:Timeout"), Some(Outcome::Unknown));
        assert_eq!(read("unk"), None);
    }
}
