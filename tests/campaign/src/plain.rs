//! A process that consumes in SQL, as one in any other language would, until its standard input ends or it is
//! killed.

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::BoxError;
use pushpop_pg::postgres::fallible_iterator::FallibleIterator;
use pushpop_pg::postgres::{self, Client, Config, NoTls};
use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::uuid::Uuid;

use crate::args::Args;
use crate::chance::hash;
use crate::journal::Journal;
use crate::plan::{KEEP, PLAIN, Plan};
use crate::pulse::PERIOD;

/// `wait_for` is to be called again before its half minute is over.
const AGAIN: Duration = Duration::from_secs(25);

const POP: &str = "select id, payload, token, lease_until, attempt, fence from pushpop.pop($1, 5, $2)";

struct Plain<'a> {
    plan: &'a Plan,
    args: &'a Args,
    journal: Journal,
    stop: &'a AtomicBool,
}

pub(crate) fn run(plan: &Plan, args: &Args) -> Result<(), BoxError> {
    let mut config: Config = args.text("url")?.parse()?;
    config.application_name(&format!("campaign {}", args.text("name")?));
    let stop = AtomicBool::new(false);
    let plain = Plain { plan, args, journal: Journal::open(Path::new(args.text("log")?))?, stop: &stop };
    thread::scope(|scope| {
        let plain = &plain;
        if plan.has_pulse() {
            plain.journal.line("begun");
        }
        scope.spawn(move || plain.consume(&config));
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::Relaxed);
    });
    if plan.has_pulse() {
        plain.journal.line("ended");
    }
    Ok(())
}

impl Plain<'_> {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn consume(&self, config: &Config) {
        let mut again = false;
        while !self.is_over() {
            let served = config.connect(NoTls).and_then(|mut client| {
                if !(again && self.args.is_broken("no-listen-again")) {
                    client.batch_execute("listen pushpop")?;
                }
                again = true;
                self.serve(&mut client)
            });
            if let Err(e) = served {
                self.journal.line(format!("note plain {e}"));
                thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn serve(&self, client: &mut Client) -> Result<(), postgres::Error> {
        let mut alive = Instant::now();
        while !self.is_over() {
            let rows = client.query(POP, &[&PLAIN, &self.plan.lease.as_secs_f64()])?;
            if self.plan.has_pulse() && alive.elapsed() > PERIOD {
                self.journal.line("alive");
                alive = Instant::now();
            }
            self.journal.lines(rows.iter().map(|row| {
                let deadline = row.get::<_, OffsetDateTime>(3).unix_timestamp_nanos() / 1000;
                let (id, attempt, fence): (Uuid, i32, i64) = (row.get(0), row.get(4), row.get(5));
                let hash = hash(row.get(1));
                format!("grant {PLAIN} {id}:{fence} {attempt} {deadline} {hash:016x}")
            }));
            for row in &rows {
                self.complete(client, row.get(0), row.get(5), row.get(2))?;
            }
            if rows.is_empty() {
                self.wait(client)?;
            }
        }
        Ok(())
    }

    fn complete(
        &self,
        client: &mut Client,
        id: Uuid,
        fence: i64,
        token: &[u8],
    ) -> Result<(), postgres::Error> {
        thread::sleep(self.plan.work / 4);
        let call = self.journal.call();
        self.journal.lines([format!("work {id}:{fence}"), format!("settle {call} complete {id}:{fence}")]);
        let sql = "select pushpop.complete($1, $2, $3, $4)";
        match client.execute(sql, &[&PLAIN, &id, &token, &KEEP.as_secs_f64()]) {
            Ok(_) => self.journal.line(format!("settled {call} ok")),
            Err(e) if e.code().is_some_and(|code| code.code() == "PP001") => {
                self.journal.line(format!("settled {call} failed:LeaseLost"));
            }
            Err(e) => {
                self.journal.line(format!("settled {call} unknown:Connection"));
                return Err(e);
            }
        }
        Ok(())
    }

    /// Tells the queue that somebody waits, and sleeps until there is something, or might be.
    fn wait(&self, client: &mut Client) -> Result<(), postgres::Error> {
        let mut most = self.plan.poll.min(AGAIN);
        if !self.args.is_broken("no-second-look") {
            let row = client.query_one("select ready, due_in, noted from pushpop.wait_for($1)", &[&PLAIN])?;
            if row.get(0) {
                return Ok(());
            }
            let due_in = row.get::<_, Option<f64>>(1).unwrap_or(f64::MAX).clamp(0.0, AGAIN.as_secs_f64());
            most = most.min(Duration::from_secs_f64(due_in));
            if !row.get::<_, bool>(2) {
                most = most.min(Duration::from_millis(20));
            }
        } else if self.plan.wakes_only {
            most = Duration::from_secs(3600);
        }
        if self.args.is_broken("no-listen-again") && self.plan.wakes_only {
            most = Duration::from_secs(3600);
        }
        let until = Instant::now() + most;
        while !self.is_over() && Instant::now() < until {
            let slice = until.saturating_duration_since(Instant::now()).min(Duration::from_millis(200));
            if client.notifications().timeout_iter(slice).next()?.is_some() {
                while client.notifications().iter().next()?.is_some() {}
                break;
            }
        }
        Ok(())
    }
}
