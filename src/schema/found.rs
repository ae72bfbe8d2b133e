//! What a role finds where the schema is, or should be.

use postgres::Transaction;
use postgres::types::Type;

use crate::error::{Error, ErrorKind, Result};
use crate::outside::outside;
use crate::schema::Schema;
use crate::text::Text;

/// One row, whatever there is.
const LOOK: &str = "
    select n.oid is not null, coalesce(has_schema_privilege(n.oid, 'usage'), false),
           coalesce(has_schema_privilege(n.oid, 'create'), false), has_database_privilege(d.oid, 'create'),
           coalesce(pg_has_role(n.nspowner, 'usage'), false),
           current_user::text, d.datname::text, coalesce(pg_get_userbyid(n.nspowner)::text, ''),
           exists (select from pg_class c where c.relnamespace = n.oid and c.relname = 'migrations'),
           exists (select from pg_proc p where p.pronamespace = n.oid and p.proname = 'schema_version'),
           f.open > 0, coalesce(f.owned, false) and not f.shared, pg_encoding_to_char(d.encoding) = 'SQL_ASCII'
    from pg_database d left join pg_namespace n on n.nspname = $1
    cross join lateral (
      select count(*) filter (where p.prosecdef and p.proname = any ($2) and has_function_privilege('public', p.oid, 'execute')) as open,
             bool_and(pg_has_role(p.proowner, 'usage')) as owned, bool_or(p.proname <> all ($2)) as shared
      from pg_proc p where p.pronamespace = n.oid
    ) f
    where d.datname = current_database()";

pub(super) struct Found {
    exists: bool,
    may_use: bool,
    /// Tables and functions in it.
    may_create: bool,
    /// The schema itself.
    may_create_schema: bool,
    owns: bool,
    role: String,
    database: String,
    owner: String,
    has_versions: bool,
    tells_version: bool,
    /// Functions that act with the rights of their owner can be executed by everyone.
    pub(super) is_open: bool,
    /// All functions in the schema are the queue's, and this role owns them.
    pub(super) may_revoke: bool,
    /// The database does not know what its text means.
    has_no_encoding: bool,
}

impl Found {
    pub(super) fn look(tx: &mut Transaction<'_>, schema: &Schema) -> Result<Self> {
        let functions = schema.functions();
        let rows = tx.query_typed(LOOK, &[(&schema.name, Type::TEXT), (&functions, Type::TEXT_ARRAY)])?;
        let row = rows.first().ok_or_else(Error::panicked)?;
        let text = |i| -> Result<String> { Ok(row.try_get::<_, Text>(i)?.0) };
        Ok(Found {
            exists: row.try_get(0)?,
            may_use: row.try_get(1)?,
            may_create: row.try_get(2)?,
            may_create_schema: row.try_get(3)?,
            owns: row.try_get(4)?,
            role: text(5)?,
            database: text(6)?,
            owner: text(7)?,
            has_versions: row.try_get(8)?,
            tells_version: row.try_get(9)?,
            is_open: row.try_get(10)?,
            may_revoke: row.try_get(11)?,
            has_no_encoding: row.try_get(12)?,
        })
    }

    pub(super) fn exists(&self) -> bool {
        self.exists
    }

    /// Says which right on what is missing, where the server has refused something.
    pub(super) fn explain(&self, schema: &Schema, error: Error) -> Error {
        if error.kind() != ErrorKind::Denied {
            return error;
        }
        let (name, identifier) = (&schema.name, schema.identifier());
        let role = quoted(&self.role);
        let words = if !self.exists && !self.may_create_schema {
            format!(
                "this role may not create the schema {name:?}; have its owner run what Builder::install_sql() returns, \
                 or grant this role the right: grant create on database {} to {role}",
                quoted(&self.database)
            )
        } else if self.exists && !self.may_use {
            format!("this role may not use the schema {name:?}: grant usage on schema {identifier} to {role}")
        } else if self.has_versions && self.tells_version && !self.owns {
            format!(
                "this role may not read or migrate the schema {name:?}: grant execute on function \
                 {identifier}.schema_version to {role}, and have its owner {:?} migrate it",
                self.owner
            )
        } else if self.exists && !self.may_create {
            format!(
                "this role may not create tables in the schema {name:?}; have its owner {:?} run what \
                 Builder::install_sql() returns, or grant this role the right: grant create on schema {identifier} to {role}",
                self.owner
            )
        } else {
            return error;
        };
        error.explained(words)
    }

    /// Warns of what no error tells.
    pub(super) fn warn(&self, schema: &str) {
        if self.is_open {
            outside(|| {
                tracing::warn!(
                    schema,
                    "functions of the schema can be executed by everyone who may use it, as after a restore without \
                 privileges; let their owner connect with migrate(true), or run what Builder::install_sql() returns"
                )
            });
        }
        if self.has_no_encoding {
            outside(|| {
                tracing::warn!(
                    database = self.database,
                    "the encoding of the database is SQL_ASCII: it does not check text, and text that is no UTF-8 is shown \
                 with replacement characters"
                )
            });
        }
    }
}

impl Schema {
    /// The version of the schema and the oldest crate that it serves, if it is installed.
    pub(super) fn version(&self, tx: &mut Transaction<'_>, found: &Found) -> Result<Option<(i32, String)>> {
        let schema = |words| Err(Error::new(ErrorKind::Schema, words));
        match (found.has_versions, found.tells_version) {
            (false, false) => return Ok(None),
            (true, true) => {}
            (has_versions, _) => {
                let lacks = if has_versions {
                    "has the table migrations, but not the function schema_version"
                } else {
                    "has the function schema_version, but not the table migrations"
                };
                return schema(format!(
                    "schema {:?} {lacks}: it is not whole, or belongs to something else",
                    self.name
                ));
            }
        }
        // Typed, so that no statement has a name: a pooler may have another session for the next message.
        let sql = format!("select version, oldest_crate from {}.schema_version()", self.identifier());
        let rows = tx.query_typed(&sql, &[]).map_err(|e| found.explain(self, e.into()))?;
        match rows.first().map(|row| (row.try_get(0), row.try_get(1))) {
            Some((Ok(version), Ok(oldest))) => Ok(Some((version, oldest))),
            _ => schema(self.empty()),
        }
    }
}

/// A name as SQL takes it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
