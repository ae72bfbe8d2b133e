//! The server that is measured, and its counters.

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use pushpop_server::Server;

use crate::{Result, cpu};

/// The variable that names a server to measure in place of a throwaway one.
const VARIABLE: &str = "PUSHPOP_BENCH_DATABASE_URL";

/// No checkpoint falls into a run. All that makes a commit durable is as PostgreSQL has it.
const SETTINGS: [(&str, &str); 4] = [
    ("max_wal_size", "16GB"),
    ("checkpoint_timeout", "1h"),
    ("shared_buffers", "1GB"),
    ("max_connections", "400"),
];

/// How long the server may take to see that a client has left.
const PATIENCE: Duration = Duration::from_secs(5);

/// A throwaway server, or the one that `PUSHPOP_BENCH_DATABASE_URL` names.
///
/// Its schemas are dropped as [`reset`](Bed::reset) says.
pub struct Bed {
    url: String,
    server: Option<Server>,
    watcher: Client,
    commits: f64,
    dead_rows: f64,
}

/// The counters at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    at: Instant,
    wal: f64,
    cpu_client: Option<Duration>,
    cpu_server: Option<Duration>,
}

/// What was spent between two moments.
#[derive(Clone, Debug)]
pub struct Spent {
    /// The time that passed.
    pub wall: Duration,
    /// What was written to the log.
    pub wal_bytes: f64,
    /// CPU time of this process.
    pub cpu_client: Option<Duration>,
    /// CPU time of all processes of the server; `None` where it is not the throwaway one.
    pub cpu_server: Option<Duration>,
}

/// What the server counted since the last [`reset`](Bed::reset).
#[derive(Clone, Debug)]
pub struct Left {
    /// Transactions that were committed in the database, those that only read included.
    pub commits: f64,
    /// Rows that are dead, and not cleaned up yet.
    pub dead_rows: f64,
}

/// The server's processes for the connections of one application.
#[derive(Clone, Debug)]
pub struct Backends(Vec<i32>);

impl Backends {
    /// The CPU time that they have used so far; `None` where the server is not the throwaway one.
    pub fn cpu(&self) -> Option<Duration> {
        (!self.0.is_empty()).then(|| self.0.iter().filter_map(|pid| cpu::exact(*pid)).sum())
    }
}

impl Bed {
    /// Starts the throwaway server, or connects to the named one.
    pub fn start() -> Result<Bed> {
        let (url, server) = match env::var(VARIABLE) {
            Ok(url) if !url.is_empty() => (url, None),
            _ => {
                let server = Server::with(&SETTINGS).map_err(|e| e.to_string())?;
                (server.url(), Some(server))
            }
        };
        let watcher = Client::connect(&url, NoTls)?;
        Ok(Bed { url, server, watcher, commits: 0.0, dead_rows: 0.0 })
    }

    /// The server's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection of the caller's own.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.url, NoTls)?)
    }

    /// One line about the server: its version, and whether it makes commits durable.
    pub fn describe(&mut self) -> Result<String> {
        let row = self.watcher.query_one(
            "select current_setting('server_version'), current_setting('fsync'), \
             current_setting('synchronous_commit'), current_setting('shared_buffers')",
            &[],
        )?;
        let [version, fsync, commit, buffers] = [0, 1, 2, 3].map(|i| row.get::<_, String>(i));
        let cores = thread::available_parallelism()?;
        let whose = if self.server.is_some() { "throwaway" } else { "named" };
        Ok(format!(
            "PostgreSQL {version} ({whose}), fsync {fsync}, synchronous_commit {commit}, \
             shared_buffers {buffers}; the client has {cores} cores"
        ))
    }

    /// Drops a schema, writes out what is unwritten, and counts commits and dead rows anew.
    pub fn reset(&mut self, schema: &str) -> Result<()> {
        self.watcher.batch_execute(&format!(
            "set client_min_messages = warning; drop schema if exists \"{schema}\" cascade"
        ))?;
        // A user of a named server may lack the right to it.
        if let Err(e) = self.watcher.batch_execute("checkpoint")
            && self.server.is_some()
        {
            return Err(e.into());
        }
        self.commits = self.committed()?;
        self.dead_rows = self.dead()?;
        Ok(())
    }

    /// Reads the counters.
    pub fn reading(&mut self) -> Result<Reading> {
        let cpu_server = self.server.as_ref().and_then(Server::pid).and_then(cpu::family);
        Ok(Reading { wal: self.wal()?, cpu_client: cpu::own(), cpu_server, at: Instant::now() })
    }

    /// What was spent since a reading.
    pub fn since(&mut self, begun: &Reading) -> Result<Spent> {
        let wall = begun.at.elapsed();
        let now = self.reading()?;
        let used = |before: Option<Duration>, after: Option<Duration>| Some(after?.saturating_sub(before?));
        Ok(Spent {
            wall,
            wal_bytes: now.wal - begun.wal,
            cpu_client: used(begun.cpu_client, now.cpu_client),
            cpu_server: used(begun.cpu_server, now.cpu_server),
        })
    }

    /// Returns what the server counted since the last reset.
    ///
    /// Waits until the connections that were made since have ended, for a while: only then has the
    /// server counted all that they did. So drop the measured system first.
    pub fn left(&mut self) -> Result<Left> {
        self.wait_for_others()?;
        let commits = self.commits()?;
        let dead_rows = (self.dead()? - self.dead_rows).max(0.0);
        Ok(Left { commits, dead_rows })
    }

    /// Finds the processes of an application's connections, as it calls itself to the server.
    pub fn backends(&mut self, application: &str) -> Result<Backends> {
        if self.server.is_none() {
            return Ok(Backends(Vec::new()));
        }
        let sql = "select pid from pg_stat_activity where application_name = $1";
        let rows = self.watcher.query(sql, &[&application])?;
        Ok(Backends(rows.iter().map(|row| row.get(0)).collect()))
    }

    /// Returns how many transactions were committed since the last reset, as far as the server has
    /// counted. A connection's commits may be counted ten seconds late.
    pub fn commits(&mut self) -> Result<f64> {
        Ok(self.committed()? - self.commits)
    }

    /// One statement, so that however long it waits makes no difference to the commits.
    fn wait_for_others(&mut self) -> Result<()> {
        self.watcher.batch_execute(&format!(
            "do $$ begin \
               for i in 1 .. {} loop \
                 exit when not exists ( \
                   select from pg_stat_activity a, pg_stat_activity me \
                   where me.pid = pg_backend_pid() and a.datname = me.datname \
                     and a.backend_type = 'client backend' and a.backend_start > me.backend_start); \
                 perform pg_sleep(0.01); \
                 perform pg_stat_clear_snapshot(); \
               end loop; \
             end $$",
            PATIENCE.as_millis() / 10
        ))?;
        // Before version 15 a collector is told, and writes it down half a second later.
        if self.version()? < 150_000 {
            thread::sleep(Duration::from_millis(1_100));
        }
        Ok(())
    }

    fn version(&mut self) -> Result<i32> {
        Ok(self.watcher.query_one("select current_setting('server_version_num')::int", &[])?.get(0))
    }

    fn committed(&mut self) -> Result<f64> {
        // Its own commits are to be in every count, or else they would be in one by chance.
        if self.version()? >= 150_000 {
            self.watcher.batch_execute("select pg_stat_force_next_flush()")?;
        }
        self.figure("select xact_commit::float8 from pg_stat_database where datname = current_database()")
    }

    fn dead(&mut self) -> Result<f64> {
        self.figure("select coalesce(sum(n_dead_tup), 0)::float8 from pg_stat_user_tables")
    }

    fn wal(&mut self) -> Result<f64> {
        self.figure("select (pg_current_wal_insert_lsn() - '0/0')::float8")
    }

    fn figure(&mut self, sql: &str) -> Result<f64> {
        Ok(self.watcher.query_one(sql, &[])?.get(0))
    }
}
