//! How a migration takes its turn: one process at a time, and without holding up those that use the queue.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use postgres::types::Type;
use postgres::{Client, IsolationLevel, Row, Transaction};

use crate::error::{Error, ErrorKind, Result};
use crate::outside::outside;
use crate::schema::found::Found;
use crate::schema::{Migration, RIGHTS, SETTINGS, Schema};
use crate::text::Text;

/// How long a migration waits for a lock. Whoever wants a table after it waits as long: less than calls do (2 s).
const PATIENCE: Duration = Duration::from_millis(200);

/// How long it leaves the tables to others, until it tries again.
const PAUSE: Duration = Duration::from_secs(1);

/// How often it looks whether another process has migrated.
const TURN: Duration = Duration::from_millis(50);

/// Who holds the lock of those that migrate.
const MIGRATES: &str = "
    select a.pid, coalesce(a.application_name, ''), coalesce(a.usename::text, ''), coalesce(a.state, ''),
           coalesce(extract(epoch from clock_timestamp() - a.xact_start), 0)::float8, false, ''
    from pg_locks l join pg_stat_activity a on a.pid = l.pid
    where l.locktype = 'advisory' and l.granted and l.objsubid = 1
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended($1, 5706)
    limit 1";

/// Whose transaction has been in the way of an exclusive lock for the longest time: one that uses a table, or was
/// prepared and has no session.
const HOLDS: &str = "
    select coalesce(a.pid, 0), coalesce(a.application_name, ''), coalesce(a.usename::text, ''), coalesce(a.state, ''),
           coalesce(extract(epoch from clock_timestamp() - coalesce(a.xact_start, p.prepared)), 0)::float8,
           coalesce(a.backend_type = 'autovacuum worker', false), coalesce(p.gid, '')
    from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
    left join pg_stat_activity a on a.pid = l.pid
    left join pg_prepared_xacts p on l.pid is null and p.transaction::text = split_part(l.virtualtransaction, '/', 2)
    where n.nspname = $1 and l.granted and l.pid is distinct from pg_backend_pid()
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
    order by coalesce(a.xact_start, p.prepared) limit 1";

/// Who is waited for.
struct Blocker {
    words: String,
    /// Which gives way to those that wait for longer than `deadlock_timeout`.
    is_vacuum: bool,
}

impl Blocker {
    fn read(row: &Row) -> Result<Self> {
        let text = |i| -> Result<String> { Ok(row.try_get::<_, Text>(i)?.0) };
        let (pid, seconds): (i32, f64) = (row.try_get(0)?, row.try_get(4)?);
        let (application, role, state, gid) = (text(1)?, text(2)?, text(3)?, text(6)?);
        let words = match gid.as_str() {
            "" => format!(
                "pid {pid}, application {application:?}, role {role:?}, {}, its transaction open for {seconds:.1} s",
                if state.is_empty() { "state unknown" } else { &state }
            ),
            gid => format!("the prepared transaction {gid:?}, {seconds:.1} s old"),
        };
        Ok(Blocker { words, is_vacuum: row.try_get(5)? })
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

/// What came of a try to migrate.
enum Tried {
    Done,
    /// Another process migrates.
    Busy,
    /// A lock was not granted in time.
    Locked(Error),
}

impl Schema {
    /// Migrates, for as long as it takes until `deadline`. While somebody is in the way it holds no lock, but for short
    /// tries.
    pub(super) fn migrate(&self, client: &mut Client, deadline: Instant) -> Result<()> {
        // To say who was in the way takes time, too.
        let left = deadline.saturating_duration_since(Instant::now());
        let until = Instant::now() + left.mul_f64(0.9);
        let (mut told, mut patience) = (String::new(), PATIENCE);
        loop {
            let (error, query, pause) = match self.try_to_migrate(client, patience)? {
                Tried::Done => return Ok(()),
                Tried::Busy => (None, MIGRATES, TURN),
                Tried::Locked(error) => (Some(error), HOLDS, PAUSE),
            };
            let blocker = self.blocker(client, query)?;
            let who = blocker
                .as_ref()
                .map_or_else(|| "a transaction that has ended".to_owned(), ToString::to_string);
            let what = if error.is_some() { "uses its tables" } else { "is migrating it" };
            if Instant::now() + pause >= until {
                let words =
                    format!("the schema {:?} was not migrated within {left:.1?}: {who} {what}", self.name);
                return Err(match error {
                    Some(error) => error.explained_as(ErrorKind::Timeout, words),
                    None => Error::new(ErrorKind::Timeout, words),
                });
            }
            // Its age changes with each look.
            let name = who.split(", its transaction").next().unwrap_or_default();
            if told != name {
                name.clone_into(&mut told);
                outside(
                    || tracing::warn!(schema = %self.name, "waiting to migrate the schema: {who} {what}"),
                );
            }
            patience = if blocker.is_some_and(|blocker| blocker.is_vacuum) { PATIENCE * 6 } else { PATIENCE };
            thread::sleep(pause);
        }
    }

    fn try_to_migrate(&self, client: &mut Client, patience: Duration) -> Result<Tried> {
        let mut tx = begin(client)?;
        // One at a time: concurrent `create`s collide in the catalogs.
        if !self.take_turn(&mut tx)? {
            return Ok(Tried::Busy);
        }
        let found = Found::look(&mut tx, self)?;
        let version = self.version(&mut tx, &found)?;
        if self.is_current(version.clone())? {
            return Ok(Tried::Done);
        }
        tx.batch_execute(&format!("set local lock_timeout = {}", patience.as_millis()))?;
        let installed = version.map_or(0, |version| version.0);
        for migration in self.migrations.iter().filter(|m| m.version > installed) {
            match self.apply(&mut tx, migration, &found) {
                Err(e) if matches!(e.sqlstate(), Some("55P03" | "40P01")) => return Ok(Tried::Locked(e)),
                Err(e) => return Err(found.explain(self, e)),
                Ok(()) => {}
            }
        }
        tx.commit()?;
        outside(|| tracing::info!(schema = %self.name, "installed or migrated the schema"));
        Ok(Tried::Done)
    }

    fn apply(&self, tx: &mut Transaction<'_>, migration: &Migration, found: &Found) -> Result<()> {
        if migration.version == 1 && !found.exists() {
            tx.batch_execute(&format!("create schema {}", self.identifier()))?;
        }
        tx.batch_execute(&self.migration_sql(migration))?;
        Ok(())
    }

    /// Takes rights from everyone that a restore may have given them.
    pub(super) fn restore_rights(&self, client: &mut Client) -> Result<()> {
        let mut tx = begin(client)?;
        // Another process is at it otherwise.
        if self.take_turn(&mut tx)? {
            tx.batch_execute(&self.localize(RIGHTS))?;
            tx.commit()?;
            outside(|| tracing::info!(schema = %self.name, "restored the rights of the schema"));
        }
        Ok(())
    }

    /// Whether no other process migrates; none does then, until the transaction ends.
    fn take_turn(&self, tx: &mut Transaction<'_>) -> Result<bool> {
        let rows = tx.query_typed(
            "select pg_try_advisory_xact_lock(hashtextextended($1, 5706))",
            &[(&self.name, Type::TEXT)],
        )?;
        Ok(rows.first().map_or(Ok(false), |row| row.try_get(0))?)
    }

    fn blocker(&self, client: &mut Client, query: &str) -> Result<Option<Blocker>> {
        let rows = begin(client)?.query_typed(query, &[(&self.name, Type::TEXT)])?;
        rows.first().map(Blocker::read).transpose()
    }
}

/// A transaction in which nothing depends on the settings of the session, and each statement sees what was committed
/// before it.
pub(super) fn begin(client: &mut Client) -> Result<Transaction<'_>> {
    let mut tx = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start()?;
    tx.batch_execute(SETTINGS)?;
    Ok(tx)
}
