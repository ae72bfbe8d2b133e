//! What can go wrong, and what a caller may conclude from it.

use std::fmt;
use std::sync::Arc;

/// The result of a call on a [`Queue`](crate::Queue).
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed.
///
/// `Display` names the operation, the topic, and the server's own words with their SQLSTATE;
/// [`source`](std::error::Error::source) leads to the driver's error. No payload, token or
/// password appears in either.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    operation: Option<&'static str>,
    topic: Option<String>,
    sqlstate: Option<String>,
    indeterminate: bool,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// The kinds of [`Error`] that a program may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The queue was closed.
    Closed,
    /// The lease expired and was handed on, or was settled before: nothing was changed.
    LeaseLost,
    /// An argument is outside its limits, or the call cannot be made here: nothing was changed.
    Invalid,
    /// The call's own time-out passed.
    Timeout,
    /// The message is not stored any more, so that nobody can tell whether this lease settled it:
    /// the call may have taken effect.
    NotFound,
    /// The server could not be reached, or the connection to it was lost.
    Connection,
    /// The server refused the credentials or lacks a right.
    Denied,
    /// The schema is missing, or of a version that does not go with this crate.
    Schema,
    /// Any other error of the server's.
    Database,
    /// An error of the caller's own: see [`Error::other`].
    Other,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            operation: None,
            topic: None,
            sqlstate: None,
            indeterminate: false,
            source: None,
        }))
    }

    /// An error of the caller's own: to leave [`Queue::transaction`](crate::Queue::transaction)
    /// without a commit.
    ///
    /// ```
    /// use pushpop_pg::{Error, ErrorKind};
    ///
    /// let error = Error::other("out of stock");
    /// assert_eq!(error.kind(), ErrorKind::Other);
    /// assert_eq!(error.to_string(), "out of stock");
    /// ```
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let error = error.into();
        let mut new = Self::new(ErrorKind::Other, error.to_string());
        new.0.source = Some(Arc::from(error));
        new
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the queue is closed")
    }

    pub(crate) fn connection(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Connection, message)
    }

    pub(crate) fn panicked() -> Self {
        Self::new(ErrorKind::Database, "the call failed within the queue; this is a defect")
            .indeterminate(true)
    }

    pub(crate) fn lease_lost() -> Self {
        Self::new(ErrorKind::LeaseLost, "the lease expired and was handed on, or was settled before")
    }

    pub(crate) fn gone() -> Self {
        Self::new(ErrorKind::NotFound, "the message is not stored any more").indeterminate(true)
    }

    pub(crate) fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Arc::new(source));
        self
    }

    /// Says what it comes down to, before the server's own words.
    pub(crate) fn explained(self, words: impl fmt::Display) -> Self {
        let kind = self.0.kind;
        self.explained_as(kind, words)
    }

    /// The same, as another kind.
    pub(crate) fn explained_as(self, kind: ErrorKind, words: impl fmt::Display) -> Self {
        let mut new = Error::new(kind, format!("{words}: {}", self.0.message));
        new.0.sqlstate = self.0.sqlstate.clone();
        new.caused_by(self)
    }

    /// Adds what was being done, unless that is known already.
    pub(crate) fn during(mut self, operation: &'static str, topic: Option<&str>) -> Self {
        if self.0.operation.is_none() {
            self.0.operation = Some(operation);
            self.0.topic = topic.map(str::to_owned);
        }
        self
    }

    /// Adds which server could not be reached; what one has answered needs no such word.
    pub(crate) fn at(mut self, server: &str) -> Self {
        if self.0.kind == ErrorKind::Connection && self.0.sqlstate.is_none() {
            self.0.message = format!("{server}: {}", self.0.message);
        }
        self
    }

    /// Says that the call may have taken effect.
    pub(crate) fn indeterminate(mut self, yes: bool) -> Self {
        self.0.indeterminate |= yes;
        self
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later: the connection was lost, a time-out passed, the
    /// server is starting, out of connections, or chose this transaction to end a conflict.
    pub fn is_retryable(&self) -> bool {
        match self.0.kind {
            ErrorKind::Timeout | ErrorKind::Connection => true,
            ErrorKind::Database => self.sqlstate().is_some_and(is_transient),
            _ => false,
        }
    }

    /// Whether the call may have taken effect: the reply that would have said so never came.
    ///
    /// Repeat the call to know: a push with the same id changes nothing if the first one
    /// succeeded, and so does a settle of the same lease.
    pub fn is_indeterminate(&self) -> bool {
        self.0.indeterminate
    }

    /// The server's five-letter error code, if the error came from the server.
    pub fn sqlstate(&self) -> Option<&str> {
        self.0.sqlstate.as_deref()
    }

    /// Whether it would be the same for any other call.
    pub(crate) fn is_of_all(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Connection | ErrorKind::Timeout)
    }

    /// Whether the connection that gave this error is of no use any more.
    pub(crate) fn breaks_connection(&self) -> bool {
        self.0.kind == ErrorKind::Connection
    }
}

/// Codes of a server that may answer otherwise next time, on the same connection.
fn is_transient(code: &str) -> bool {
    matches!(code, "40001" | "40P01" | "55P03" | "53200" | "53400")
}

/// Codes of a server that cannot be used for now: one that starts or stops, is full, or only reads.
fn is_unavailable(code: &str) -> bool {
    code.starts_with("08")
        || matches!(
            code,
            "57P01" | "57P02" | "57P03" | "57P05" | "25P03" | "25P04" | "53100" | "53300" | "25006"
        )
}

fn is_denied(code: &str) -> bool {
    code.starts_with("28") || code == "42501"
}

fn is_missing(code: &str) -> bool {
    matches!(code, "3F000" | "42P01" | "42883" | "42703" | "3D000")
}

/// The code that the functions of the schema raise for a lost lease.
const LEASE_LOST: &str = "PP001";

impl From<postgres::Error> for Error {
    fn from(error: postgres::Error) -> Self {
        if let Some(db) = error.as_db_error() {
            let code = db.code().code();
            let kind = match code {
                LEASE_LOST => ErrorKind::LeaseLost,
                "22023" => ErrorKind::Invalid,
                "57014" => ErrorKind::Timeout,
                code if is_unavailable(code) => ErrorKind::Connection,
                code if is_denied(code) => ErrorKind::Denied,
                code if is_missing(code) => ErrorKind::Schema,
                _ => ErrorKind::Database,
            };
            let mut message = format!("{} (SQLSTATE {code})", db.message());
            if let Some(detail) = db.detail().filter(|_| kind == ErrorKind::LeaseLost) {
                message = format!("{message}: {detail}");
            }
            let mut new = Error::new(kind, message);
            new.0.sqlstate = Some(code.to_owned());
            new.caused_by(Redacted::from(error))
        } else {
            let kind = if error.is_closed() || caused_by_io(&error) {
                ErrorKind::Connection
            } else {
                ErrorKind::Database
            };
            let mut message = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                let text = cause.to_string();
                if !message.contains(&text) {
                    message = format!("{message}: {text}");
                }
                source = cause.source();
            }
            Error::new(kind, message).caused_by(Redacted::from(error))
        }
    }
}

fn caused_by_io(error: &postgres::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if cause.is::<std::io::Error>() {
            return true;
        }
        source = cause.source();
    }
    // The driver's own words for a failed connect, TLS and authentication without a code.
    let text = error.to_string();
    text.starts_with("error connecting") || text.starts_with("timeout") || text.contains("TLS handshake")
}

/// The driver's error. The server's `detail` may quote a row, so `Debug` leaves it out.
struct Redacted {
    text: String,
    source: postgres::Error,
}

impl From<postgres::Error> for Redacted {
    fn from(source: postgres::Error) -> Self {
        let text = match source.as_db_error() {
            Some(db) => format!("{}: {}", db.severity(), db.message()),
            None => source.to_string(),
        };
        Redacted { text, source }
    }
}

impl fmt::Display for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "postgres::Error({:?})", self.text)
    }
}

impl std::error::Error for Redacted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.source.as_db_error() {
            Some(_) => None,
            None => std::error::Error::source(&self.source),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        if let Some(operation) = inner.operation {
            f.write_str(operation)?;
            if let Some(topic) = &inner.topic {
                write!(f, " on topic {topic:?}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&inner.message)?;
        if inner.indeterminate {
            f.write_str("; the call may have taken effect")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("message", &self.to_string())
            .field("sqlstate", &self.0.sqlstate)
            .field("indeterminate", &self.0.indeterminate)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}

/// A settle that failed, with the lease it was for.
///
/// The lease can be settled again when [`Error::is_retryable`] says so. `?` turns this into an
/// [`Error`] and drops the lease, which then expires by itself.
pub struct SettleError<T = crate::Lease> {
    lease: Box<T>,
    error: Error,
}

impl<T> SettleError<T> {
    pub(crate) fn new(lease: T, error: Error) -> Self {
        SettleError { lease: Box::new(lease), error }
    }

    /// Why the settle failed.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The lease, or the leases, that were not settled, and why.
    pub fn into_parts(self) -> (T, Error) {
        (*self.lease, self.error)
    }
}

impl<T> From<SettleError<T>> for Error {
    fn from(failed: SettleError<T>) -> Self {
        failed.error
    }
}

impl<T> fmt::Display for SettleError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<T> fmt::Debug for SettleError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SettleError").field(&self.error).finish()
    }
}

impl<T> std::error::Error for SettleError<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}
