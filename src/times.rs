//! Times of the server's.

use std::error::Error;

use postgres::Row;
use postgres::types::{FromSql, Type};
use time::{OffsetDateTime, PrimitiveDateTime};

/// A time as it is read: one that no calendar of ours has (infinite, or of a year beyond 9999) is the nearest that it has. Only
/// hands write such times, and a message must not be unreadable for one.
struct Time(OffsetDateTime);

impl<'a> FromSql<'a> for Time {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let micros = i128::from(i64::from_sql(&Type::INT8, raw)?);
        let last = PrimitiveDateTime::MAX.assume_utc();
        let first = PrimitiveDateTime::MIN.assume_utc();
        debug_assert!(*ty == Type::TIMESTAMPTZ);
        let nanos = (micros + SINCE_2000) * 1000;
        let nanos = nanos.clamp(first.unix_timestamp_nanos(), last.unix_timestamp_nanos());
        Ok(Time(OffsetDateTime::from_unix_timestamp_nanos(nanos)?))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

/// From 1970, where our times begin, to 2000, where those of the server do, in microseconds.
const SINCE_2000: i128 = 946_684_800_000_000;

/// Reads a time of a row.
pub(crate) fn time(row: &Row, column: usize) -> Result<OffsetDateTime, postgres::Error> {
    row.try_get::<_, Time>(column).map(|time| time.0)
}

/// Reads a time of a row that may be null.
pub(crate) fn time_or_null(row: &Row, column: usize) -> Result<Option<OffsetDateTime>, postgres::Error> {
    row.try_get::<_, Option<Time>>(column).map(|time| time.map(|time| time.0))
}
