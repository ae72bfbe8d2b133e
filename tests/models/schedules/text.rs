//! In place of `text.rs`: all text of the world is UTF-8.

use crate::world::postgres::types::ToSql;
use crate::world::postgres::{FromSql, Value};

pub(crate) struct Text(pub(crate) String);

#[derive(Clone, Default)]
pub(crate) struct Raw(String);

impl<'a> FromSql<'a> for Text {
    fn read(value: &'a Value) -> Option<Self> {
        String::read(value).map(Text)
    }
}

impl<'a> FromSql<'a> for Raw {
    fn read(value: &'a Value) -> Option<Self> {
        String::read(value).map(Raw)
    }
}

impl ToSql for Raw {
    fn value(&self) -> Value {
        self.0.value()
    }
}
