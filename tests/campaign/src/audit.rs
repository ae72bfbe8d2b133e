//! The tables, looked at all the time while a campaign runs: at any moment each message has exactly one place, and a
//! pop would find it there.
//!
//! A session of its own asks all rules in one snapshot, again and again. That the server is away now and then is part of a
//! campaign; a rule that is broken ends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pushpop_pg::BoxError;
use pushpop_pg::postgres::{self, Client, Config, IsolationLevel, NoTls};
use pushpop_pg::uuid::Uuid;

use crate::journal::Journal;

#[path = "../../rules/mod.rs"]
mod rules;

/// Of the time no more than one part in so many is spent with audits, as they grow with the messages that are stored.
const SHARE: u32 = 5;

/// How many messages that broke a rule are shown with their rows.
const SHOWN: usize = 3;

/// All rows that speak of some messages, and those of their topics.
const ROWS: &str = "
    select 'message ' || (to_jsonb(m) - '{payload,headers,failures}'::text[])::text from pushpop.messages m where m.id = any ($1)
    union all select 'run ' || to_jsonb(q)::text from pushpop.runs q where q.ids && $1
    union all select 'lease ' || (to_jsonb(l) - 'key')::text from pushpop.leases l where l.ids && $1
    union all select 'late entry ' || to_jsonb(b)::text from pushpop.behind b
      where b.topic in (select m.topic from pushpop.messages m where m.id = any ($1))
    union all select 'topic ' || to_jsonb(t)::text from pushpop.topics t
      where t.topic in (select m.topic from pushpop.messages m where m.id = any ($1))";

/// What the auditor and the director know of each other.
struct Shared {
    url: String,
    ends: AtomicBool,
    found: AtomicBool,
    journal: Journal,
}

pub(crate) struct Auditor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), BoxError>>>,
}

impl Auditor {
    /// Audits each `period` from now on; not at all where that is zero.
    pub(crate) fn start(url: String, period: Duration, journal: Journal) -> Auditor {
        let (ends, found) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { url, ends, found, journal });
        let thread = (!period.is_zero()).then(|| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.run(period))
        });
        Auditor { shared, thread }
    }

    /// Whether a rule was broken.
    pub(crate) fn has_found(&self) -> bool {
        self.shared.found.load(Ordering::Acquire)
    }

    /// Whether there are no more audits, though they were not ended: a rule was broken, or could not be asked.
    pub(crate) fn has_stopped(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// One audit more, then no others.
    pub(crate) fn end(&mut self) -> Result<(), BoxError> {
        self.shared.ends.store(true, Ordering::Release);
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err("the auditor has panicked".into()),
            Some(Ok(ended)) => ended,
            None => Ok(()),
        }
    }
}

impl Drop for Auditor {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

impl Shared {
    fn run(&self, period: Duration) -> Result<(), BoxError> {
        let mut client = None;
        while !self.found.load(Ordering::Acquire) {
            let last = self.ends.load(Ordering::Acquire);
            let begun = Instant::now();
            match self.audit(&mut client) {
                Ok(true) => self.journal.line(format!("audited {}", begun.elapsed().as_micros())),
                Ok(false) => self.found.store(true, Ordering::Release),
                Err(e) if is_outage(&e) => {
                    self.journal.line(format!("note audit {e}"));
                    client = None;
                }
                Err(e) => return Err(format!("an audit has failed: {e}").into()),
            }
            if last {
                break;
            }
            let until = Instant::now() + period.max(begun.elapsed() * SHARE);
            while Instant::now() < until && !self.ends.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Whether all rules hold; those that do not are written down, with the rows.
    fn audit(&self, client: &mut Option<Client>) -> Result<bool, postgres::Error> {
        let client = match client {
            Some(client) => client,
            None => client.insert(self.url.parse::<Config>()?.application_name("auditor").connect(NoTls)?),
        };
        let mut tx = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start()?;
        // What a planner knows of the tables of a queue is always wrong.
        tx.batch_execute("set local enable_nestloop = off; set local jit = off")?;
        let mut holds = true;
        for (rule, sql) in rules::RULES {
            let ids: Vec<Uuid> = tx.query(sql, &[])?.iter().map(|row| row.get(0)).collect();
            if ids.is_empty() {
                continue;
            }
            holds = false;
            let shown = &ids[..ids.len().min(SHOWN)];
            let rows = tx.query(ROWS, &[&shown])?;
            let rows = rows.iter().map(|row| format!("row {}", row.get::<_, String>(0)));
            let first = format!("broken {} of {rule}: {shown:?}", ids.len());
            self.journal.lines([first].into_iter().chain(rows));
        }
        tx.rollback()?;
        Ok(holds)
    }
}

/// Whether an audit failed for what is done to the server, or to its connections.
fn is_outage(error: &postgres::Error) -> bool {
    let classes = ["08", "25", "53", "57", "58"];
    error.code().is_none_or(|code| classes.iter().any(|class| code.code().starts_with(class)))
}
