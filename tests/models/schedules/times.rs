//! In place of `times.rs`: all times of the world are in the calendar.

use ::time::OffsetDateTime;

use crate::world::postgres::{Error, Row};

pub(crate) fn time(row: &Row, column: usize) -> Result<OffsetDateTime, Error> {
    row.try_get(column)
}

pub(crate) fn time_or_null(row: &Row, column: usize) -> Result<Option<OffsetDateTime>, Error> {
    row.try_get(column)
}
