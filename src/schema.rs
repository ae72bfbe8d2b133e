//! The schema: its migrations, its version, and who may use it.

use postgres::types::Type;
use postgres::{Client, Transaction};

use crate::error::{Error, ErrorKind, Result};

/// A step of the schema's history. Its files are run in this order, in one transaction.
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
        include_str!("../sql/0001/rights.sql"),
    ],
}];

const CRATE: &str = env!("CARGO_PKG_VERSION");

/// The name of a schema, and what depends on it.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    name: String,
}

impl Schema {
    pub(crate) fn new(name: &str) -> Self {
        Schema { name: name.to_owned() }
    }

    pub(crate) fn identifier(&self) -> String {
        format!("\"{}\"", self.name.replace('"', "\"\""))
    }

    fn literal(&self) -> String {
        // With a backslash a plain literal would depend on standard_conforming_strings.
        let escaped = self.name.replace('\'', "''").replace('\\', "\\\\");
        if self.name.contains('\\') { format!("e'{escaped}'") } else { format!("'{escaped}'") }
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

    /// Everything as one script, for those who migrate by other means.
    pub(crate) fn install_sql(&self) -> String {
        let mut script = format!("begin;\n\ncreate schema if not exists {};\n", self.identifier());
        for migration in MIGRATIONS {
            script.push('\n');
            script.push_str(&self.migration_sql(migration));
        }
        script.push_str("\ncommit;\n");
        script
    }

    fn migration_sql(&self, migration: &Migration) -> String {
        // Views and defaults are bound when they are made: to nothing of the installer's own.
        let mut sql = String::from("set local search_path = pg_catalog, pg_temp;\n\n");
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

    /// Brings the schema up to date if `migrate` says so, and makes sure that it serves this crate.
    pub(crate) fn prepare(&self, client: &mut Client, migrate: bool) -> Result<()> {
        if self.check(self.version(client)?)? {
            return Ok(());
        }
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
        self.migrate(client)
    }

    fn migrate(&self, client: &mut Client) -> Result<()> {
        let mut tx = client.transaction()?;
        // However long another process takes: the caller has a deadline of its own.
        tx.batch_execute("set local lock_timeout = 0; set local statement_timeout = 0")?;
        // One at a time: concurrent `create .. if not exists` collide in the catalogs.
        tx.query_typed(
            "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1, 5706))",
            &[(&self.name, Type::TEXT)],
        )?;
        let found = self.version(&mut tx)?;
        if self.check(found.clone())? {
            return Ok(());
        }
        let installed = found.map_or(0, |version| version.0);
        for migration in MIGRATIONS.iter().filter(|m| m.version > installed) {
            self.apply(&mut tx, migration).map_err(|e| self.explain(e))?;
        }
        tx.commit()?;
        tracing::info!(schema = %self.name, "installed or migrated the schema");
        Ok(())
    }

    fn apply(&self, tx: &mut Transaction<'_>, migration: &Migration) -> Result<()> {
        if migration.version == 1 {
            let sql = "select from pg_catalog.pg_namespace where nspname = $1";
            if tx.query_typed(sql, &[(&self.name, Type::TEXT)])?.is_empty() {
                tx.batch_execute(&format!("create schema {}", self.identifier()))?;
            }
        }
        tx.batch_execute(&self.migration_sql(migration))?;
        Ok(())
    }

    fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Denied {
            return error;
        }
        Error::new(
            ErrorKind::Denied,
            format!(
                "this role may not create the schema {:?}; have its owner run what Builder::install_sql() returns, \
                 or grant this role the right: grant create on database .. to ..",
                self.name
            ),
        )
        .caused_by(error)
    }

    /// The version of the schema and the oldest crate that it serves, if it is installed.
    fn version(&self, client: &mut impl postgres::GenericClient) -> Result<Option<(i32, String)>> {
        // Typed, so that no statement has a name: a pooler may have another session for the next message.
        let installed =
            "select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                         where n.nspname = $1 and c.relname = 'migrations'";
        if client.query_typed(installed, &[(&self.name, Type::TEXT)])?.is_empty() {
            return Ok(None);
        }
        let version = format!("select version, oldest_crate from {}.schema_version()", self.identifier());
        let rows = client.query_typed(&version, &[])?;
        Ok(rows.first().map(|row| (row.get(0), row.get(1))))
    }

    /// Whether the schema is as new as this crate needs it; an error if it does not serve it.
    fn check(&self, found: Option<(i32, String)>) -> Result<bool> {
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
        Ok(MIGRATIONS.iter().all(|m| m.version <= version))
    }
}

/// A release number, to be compared.
fn release(text: &str) -> Vec<u64> {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    core.split('.').map(|part| part.parse().unwrap_or_default()).collect()
}
