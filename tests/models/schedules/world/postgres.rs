//! In place of the crate of this name: values, rows and errors, and a connection that listens.

use std::fmt;
use std::marker::PhantomData;

use ::time::OffsetDateTime;

use super::clock::Instant;
use super::server::Server;
use super::sync::Arc;
use super::uuid::Uuid;

/// What a parameter or a column holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    Id(Uuid),
    Time(OffsetDateTime),
    Array(Vec<Value>),
}

pub(crate) mod types {
    //! Types and parameters.

    use super::*;

    pub(crate) struct Type;

    impl Type {
        pub(crate) const TEXT: Type = Type;
        pub(crate) const BYTEA: Type = Type;
        pub(crate) const UUID: Type = Type;
        pub(crate) const FLOAT8: Type = Type;
        pub(crate) const TIMESTAMPTZ: Type = Type;
        pub(crate) const INT4: Type = Type;
        pub(crate) const TEXT_ARRAY: Type = Type;
        pub(crate) const BYTEA_ARRAY: Type = Type;
        pub(crate) const UUID_ARRAY: Type = Type;
        pub(crate) const FLOAT8_ARRAY: Type = Type;
        pub(crate) const TIMESTAMPTZ_ARRAY: Type = Type;
        pub(crate) const INT4_ARRAY: Type = Type;
    }

    pub(crate) trait ToSql {
        fn value(&self) -> Value;
    }

    macro_rules! to_sql {
        ($($type:ty, $this:ident => $value:expr;)*) => {$(
            impl ToSql for $type {
                fn value(&self) -> Value {
                    let $this = self;
                    $value
                }
            }
        )*};
    }

    to_sql! {
        i32, n => Value::Int((*n).into());
        f64, x => Value::Float(*x);
        &str, text => Value::Text((*text).to_owned());
        String, text => Value::Text(text.clone());
        Vec<u8>, bytes => Value::Bytes(bytes.clone());
        &[u8], bytes => Value::Bytes(bytes.to_vec());
        std::borrow::Cow<'_, str>, text => Value::Text(text.to_string());
        Uuid, id => Value::Id(*id);
        OffsetDateTime, time => Value::Time(*time);
    }

    impl<T: ToSql> ToSql for Option<T> {
        fn value(&self) -> Value {
            self.as_ref().map_or(Value::Null, T::value)
        }
    }

    impl<T: ToSql> ToSql for Vec<T> {
        fn value(&self) -> Value {
            Value::Array(self.iter().map(T::value).collect())
        }
    }
}

/// What a column is read as.
pub(crate) trait FromSql<'a>: Sized {
    fn read(value: &'a Value) -> Option<Self>;
}

macro_rules! from_sql {
    ($($type:ty: $pattern:pat => $read:expr;)*) => {$(
        impl<'a> FromSql<'a> for $type {
            fn read(value: &'a Value) -> Option<Self> {
                match value {
                    $pattern => $read,
                    _ => None,
                }
            }
        }
    )*};
}

from_sql! {
    bool: Value::Bool(yes) => Some(*yes);
    i32: Value::Int(n) => i32::try_from(*n).ok();
    i64: Value::Int(n) => Some(*n);
    f64: Value::Float(x) => Some(*x);
    &'a str: Value::Text(text) => Some(text);
    String: Value::Text(text) => Some(text.clone());
    Vec<u8>: Value::Bytes(bytes) => Some(bytes.clone());
    Uuid: Value::Id(id) => Some(*id);
    OffsetDateTime: Value::Time(time) => Some(*time);
}

impl<'a, T: FromSql<'a>> FromSql<'a> for Vec<T> {
    fn read(value: &'a Value) -> Option<Self> {
        match value {
            Value::Array(values) => values.iter().map(T::read).collect(),
            _ => None,
        }
    }
}

impl<'a, T: FromSql<'a>> FromSql<'a> for Option<T> {
    fn read(value: &'a Value) -> Option<Self> {
        if *value == Value::Null { Some(None) } else { T::read(value).map(Some) }
    }
}

/// Columns by their names.
pub(crate) struct Row(pub(crate) Vec<(&'static str, Value)>);

pub(crate) trait Column: Copy + fmt::Debug {
    fn find(self, row: &Row) -> Option<&Value>;
}

impl Column for usize {
    fn find(self, row: &Row) -> Option<&Value> {
        row.0.get(self).map(|(_, value)| value)
    }
}

impl Column for &str {
    fn find(self, row: &Row) -> Option<&Value> {
        row.0.iter().find(|(name, _)| *name == self).map(|(_, value)| value)
    }
}

impl Row {
    pub(crate) fn get<'a, I: Column, T: FromSql<'a>>(&'a self, column: I) -> T {
        column.find(self).and_then(T::read).unwrap_or_else(|| panic!("column {column:?} of {:?}", self.0))
    }

    #[allow(clippy::unnecessary_wraps, reason = "as the driver has it")]
    pub(crate) fn try_get<'a, I: Column, T: FromSql<'a>>(&'a self, column: I) -> Result<T, Error> {
        Ok(self.get(column))
    }
}

/// The server's, with its code, or that of a connection that broke.
#[derive(Debug)]
pub(crate) struct Error(pub(crate) Option<DbError>);

pub(crate) mod error {
    //! What the server answers.

    pub(crate) use super::DbError;

    #[derive(PartialEq)]
    pub(crate) enum Severity {
        Error,
    }
}

#[derive(Debug)]
pub(crate) struct DbError(pub(crate) &'static str);

pub(crate) struct SqlState(&'static str);

impl Error {
    pub(crate) fn as_db_error(&self) -> Option<&DbError> {
        self.0.as_ref()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_none()
    }
}

impl DbError {
    pub(crate) fn code(&self) -> SqlState {
        SqlState(self.0)
    }

    pub(crate) fn severity(&self) -> &'static str {
        "ERROR"
    }

    #[allow(clippy::unnecessary_wraps, reason = "as the driver has it")]
    pub(crate) fn parsed_severity(&self) -> Option<error::Severity> {
        Some(error::Severity::Error)
    }

    pub(crate) fn routine(&self) -> Option<&'static str> {
        None
    }

    pub(crate) fn message(&self) -> &'static str {
        "it was to fail"
    }

    pub(crate) fn detail(&self) -> Option<&'static str> {
        None
    }
}

impl SqlState {
    pub(crate) fn code(&self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "it was to fail" } else { "the connection broke" })
    }
}

impl std::error::Error for Error {}

/// Only a name: nothing here runs in a caller's transaction.
pub(crate) struct Transaction<'a>(PhantomData<&'a ()>);

/// A connection that listens.
pub(crate) struct Client {
    server: Arc<Server>,
    /// Its number among those that listen.
    ear: Option<usize>,
}

impl Client {
    pub(crate) fn new(server: &Arc<Server>) -> Self {
        Client { server: Arc::clone(server), ear: None }
    }

    #[allow(clippy::unnecessary_wraps, reason = "as the driver has it")]
    pub(crate) fn batch_execute(&mut self, sql: &str) -> Result<(), Error> {
        assert!(sql.starts_with("listen "), "{sql}");
        self.ear = Some(self.server.listen());
        Ok(())
    }

    pub(crate) fn notifications(&mut self) -> Notifications<'_> {
        Notifications(self)
    }
}

pub(crate) struct Notifications<'a>(&'a mut Client);

impl<'a> Notifications<'a> {
    pub(crate) fn timeout_iter(self, time: std::time::Duration) -> TimeoutIter<'a> {
        TimeoutIter(self.0, Instant::now() + time)
    }
}

pub(crate) struct TimeoutIter<'a>(&'a mut Client, Instant);

pub(crate) struct Notification(String);

impl Notification {
    pub(crate) fn payload(&self) -> &str {
        &self.0
    }
}

impl super::fallible_iterator::FallibleIterator for TimeoutIter<'_> {
    type Item = Notification;
    type Error = Error;

    fn next(&mut self) -> Result<Option<Notification>, Error> {
        let Some(ear) = self.0.ear else { return Ok(None) };
        Ok(self.0.server.hear(ear, self.1).map(Notification))
    }
}
