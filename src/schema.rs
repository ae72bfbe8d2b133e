//! The schema: its migrations, its version, and who may use it.

mod found;
mod migrate;
#[cfg(test)]
mod tests;

use std::time::Instant;

use postgres::Client;

use crate::error::{Error, ErrorKind, Result};
use crate::outside::outside;
use found::Found;

/// A step of the schema's history. Its files are run in this order, in one transaction.
#[derive(Clone, Copy)]
struct Migration {
    version: i32,
    /// The oldest release of this crate that works with the schema afterwards.
    oldest_crate: &'static str,
    files: &'static [&'static str],
}

const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    oldest_crate: "0.1.0",
    files: &[
        include_str!("../sql/0001/tables.sql"),
        include_str!("../sql/0001/tell.sql"),
        include_str!("../sql/0001/push.sql"),
        include_str!("../sql/0001/pop.sql"),
        include_str!("../sql/0001/settle.sql"),
        include_str!("../sql/0001/order.sql"),
        include_str!("../sql/0001/look.sql"),
        include_str!("../sql/0001/stats.sql"),
        include_str!("../sql/0001/upkeep.sql"),
        include_str!("../sql/0001/dead.sql"),
        include_str!("../sql/0001/control.sql"),
        include_str!("../sql/0001/views.sql"),
        include_str!("../sql/0001/text.sql"),
        RIGHTS,
    ],
}];

/// Who may do what; run again where rights were lost.
const RIGHTS: &str = include_str!("../sql/0001/rights.sql");

/// What a script or a migration says first. Nothing of its own session, role or database may change what it makes, or
/// end it half-way: names are bound to nothing of the installer's, tables are of the usual kind, and no time-out but
/// that for locks holds, so that nobody queues behind it for long.
const SETTINGS: &str = "set local search_path = pg_catalog, pg_temp;
set local statement_timeout = 0;
set local idle_in_transaction_session_timeout = 0;
set local lock_timeout = '2s';
set local default_table_access_method = heap;
do $$ begin perform set_config(s.name, '0', true) from pg_settings s where s.name = 'transaction_timeout'; end $$;
";

const CRATE: &str = env!("CARGO_PKG_VERSION");

/// The name of a schema, and what depends on it.
#[derive(Clone)]
pub(crate) struct Schema {
    name: String,
    migrations: &'static [Migration],
}

impl Schema {
    pub(crate) fn new(name: &str) -> Self {
        Schema { name: name.to_owned(), migrations: MIGRATIONS }
    }

    pub(crate) fn identifier(&self) -> String {
        format!("\"{}\"", self.name.replace('"', "\"\""))
    }

    fn literal(&self) -> String {
        literal(&self.name)
    }

    /// The files are written for a schema named pushpop, and run as they are by psql.
    pub(crate) fn localize(&self, sql: &str) -> String {
        let identifier = self.identifier();
        // A comment ends with its line, and so would a name with a line break in it.
        let without_comments: String;
        let sql = if self.name.contains(char::is_control) {
            without_comments =
                sql.lines().flat_map(|line| [line.split("--").next().unwrap_or_default(), "\n"]).collect();
            without_comments.as_str()
        } else {
            sql
        };
        let places = [
            ("'pushpop'", self.literal()),
            ("schema pushpop", format!("schema {identifier}")),
            ("pushpop.", format!("{identifier}.")),
        ];
        // In one pass: the name may itself contain what is looked for.
        let (mut text, mut rest) = (String::with_capacity(sql.len()), sql);
        while let Some((at, (found, name))) =
            places.iter().filter_map(|place| Some((rest.find(place.0)?, place))).min_by_key(|(at, _)| *at)
        {
            text.push_str(&rest[..at]);
            text.push_str(name);
            rest = &rest[at + found.len()..];
        }
        text + rest
    }

    /// Everything as one script, for those who migrate by other means. Run again it does what is missing, and restores
    /// the rights.
    pub(crate) fn install_sql(&self) -> String {
        let (identifier, name) = (self.identifier(), self.literal());
        // Not `create schema if not exists`: that takes a right on the database even where it exists.
        let mut script = format!(
            "begin;
{SETTINGS}
do $pushpop$
declare
  installed integer := 0;
begin
  if not exists (select from pg_namespace n where n.nspname = {name}) then
    create schema {identifier};
  end if;
  if exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = {name} and c.relname = 'migrations') then
    select max(m.version) into installed from {identifier}.migrations m;
    if installed is null then
      raise exception using errcode = 'object_not_in_prerequisite_state', message = {};
    end if;
  end if;
",
            literal(&self.empty())
        );
        for migration in self.migrations {
            script.push_str(&format!(
                "\n  if installed < {} then\n    execute $migration$\n{}$migration$;\n  end if;\n",
                migration.version,
                self.migration_sql(migration)
            ));
        }
        script.push_str(&format!("end\n$pushpop$;\n\n{}\ncommit;\n", self.localize(RIGHTS)));
        script
    }

    /// The names of the functions that the migrations make.
    fn functions(&self) -> Vec<&'static str> {
        let lines = self.migrations.iter().flat_map(|m| m.files).flat_map(|file| file.lines());
        let named = lines.filter_map(|line| line.strip_prefix("create ")?.split_once("function pushpop."));
        named.filter_map(|(_, rest)| rest.split('(').next()).collect()
    }

    fn migration_sql(&self, migration: &Migration) -> String {
        let mut sql = String::new();
        for file in migration.files {
            sql.push_str(&self.localize(file));
            sql.push('\n');
        }
        sql.push_str(&format!(
            "insert into {}.migrations (version, oldest_crate) values ({}, '{}');\n",
            self.identifier(),
            migration.version,
            migration.oldest_crate
        ));
        sql
    }

    /// Brings the schema up to date if `migrate` says so, makes sure that it serves this crate, and warns of what is
    /// wrong beside that.
    pub(crate) fn prepare(&self, client: &mut Client, migrate: bool, deadline: Instant) -> Result<()> {
        let (mut found, version) = self.look(client)?;
        if !self.is_current(version)? {
            if !migrate {
                return Err(Error::new(
                    ErrorKind::Schema,
                    format!(
                        "schema {:?} has not been installed or is older than this crate, and migrate(false) was said; \
                         run what Builder::install_sql() returns",
                        self.name
                    ),
                ));
            }
            self.migrate(client, deadline)?;
        } else if migrate && found.is_open && found.may_revoke {
            match self.restore_rights(client) {
                Ok(()) => found.is_open = false,
                Err(e) => {
                    outside(|| tracing::warn!(schema = %self.name, "the rights were not restored: {e}"));
                }
            }
        }
        found.warn(&self.name);
        Ok(())
    }

    /// What there is, and the version with the oldest crate that it serves, if it is installed.
    fn look(&self, client: &mut Client) -> Result<(Found, Option<(i32, String)>)> {
        let mut tx = migrate::begin(client)?;
        let found = Found::look(&mut tx, self)?;
        let version = self.version(&mut tx, &found)?;
        Ok((found, version))
    }

    /// Whether the schema is as new as this crate needs it; an error if it does not serve it.
    fn is_current(&self, found: Option<(i32, String)>) -> Result<bool> {
        let Some((version, oldest)) = found else {
            return Ok(false);
        };
        if release(&oldest) > release(CRATE) {
            return Err(Error::new(
                ErrorKind::Schema,
                format!(
                    "schema {:?} is of version {version}, which serves pushpop-pg {oldest} and newer; this is {CRATE}",
                    self.name
                ),
            ));
        }
        Ok(self.migrations.iter().all(|m| m.version <= version))
    }

    /// What to say of a schema whose version is not known.
    fn empty(&self) -> String {
        let last = self.migrations.last().map_or((0, CRATE), |last| (last.version, last.oldest_crate));
        format!(
            "schema {:?} has no version: its table migrations is empty, as after a dump without data or a truncate of \
             all tables; insert the row again, which of this release is ({}, '{}'), or drop the schema",
            self.name, last.0, last.1
        )
    }
}

/// A release number, to be compared.
fn release(text: &str) -> Vec<u64> {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    core.split('.').map(|part| part.parse().unwrap_or_default()).collect()
}

/// Text as SQL takes it.
fn literal(text: &str) -> String {
    // With a backslash a plain literal would depend on standard_conforming_strings.
    let escaped = text.replace('\'', "''").replace('\\', "\\\\");
    if text.contains('\\') { format!("e'{escaped}'") } else { format!("'{escaped}'") }
}
