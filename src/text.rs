//! Text of the server's.

use std::error::Error;

use postgres::types::{FromSql, Type};

/// Text that need not be UTF-8: a database of the encoding SQL_ASCII stores any bytes. Those that are not are
/// replaced, so that no row of others makes a result unreadable.
#[derive(Debug)]
pub(crate) struct Text(pub(crate) String);

impl<'a> FromSql<'a> for Text {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Text(String::from_utf8_lossy(raw).into_owned()))
    }

    fn accepts(ty: &Type) -> bool {
        <&str as FromSql<'_>>::accepts(ty)
    }
}
