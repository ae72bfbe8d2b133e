//! What can go wrong, and what a caller may conclude from it.

use std::fmt;
use std::sync::Arc;

use postgres::error::{DbError, Severity};

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
    /// The server has answered it, and the session goes on.
    answered: bool,
    trouble: Option<Trouble>,
    indeterminate: bool,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// What stands behind some errors of the server's, other than the statement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// The server has no room for more notifications, and so undoes whatever notifies.
    Notifying,
    /// The session knows other statements than those that were prepared in it.
    MixedUp,
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
            answered: false,
            trouble: None,
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

    /// A thread of the queue's ended before it had an answer.
    pub(crate) fn died(thread: &str) -> Self {
        Self::new(ErrorKind::Database, format!("thread {thread} of the queue panicked; this is a defect"))
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

    /// The character that the encoding of the database does not have, if that is the reason. The server names its bytes,
    /// in whatever language it speaks.
    pub(crate) fn unstorable(&self) -> Option<char> {
        if self.sqlstate() != Some("22P05") {
            return None;
        }
        let bytes: Vec<u8> = self
            .0
            .message
            .split_whitespace()
            .map(|word| word.strip_prefix("0x").and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .skip_while(Option::is_none)
            .map_while(|byte| byte)
            .collect();
        std::str::from_utf8(&bytes).ok()?.chars().next()
    }

    /// Blames the topic, or one of the headers, if it has a character that the database cannot store.
    pub(crate) fn blame<'a>(
        self,
        topic: &str,
        mut headers: impl Iterator<Item = (&'a String, &'a String)>,
    ) -> Self {
        let Some(c) = self.unstorable() else { return self };
        let what = if topic.contains(c) {
            "the topic".to_owned()
        } else if let Some((name, _)) = headers.find(|(name, value)| name.contains(c) || value.contains(c)) {
            format!("the header {name:?}")
        } else {
            return self;
        };
        self.explained_as(
            ErrorKind::Invalid,
            format!("{what} cannot be stored: the encoding of the database has no {c:?}"),
        )
    }

    /// Whether it says that this topic cannot be stored.
    pub(crate) fn is_about(&self, topic: &str) -> bool {
        self.unstorable().is_some_and(|c| topic.contains(c))
    }

    /// The topic that cannot be stored, if that is what the error says.
    pub(crate) fn impossible_topic(&self) -> Option<&str> {
        let topic = self.0.topic.as_deref()?;
        (self.0.kind == ErrorKind::Invalid && self.is_about(topic)).then_some(topic)
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

    /// Adds what may have ended the session of a transaction: the driver tells that once, and to whoever asks first.
    pub(crate) fn cut_off(mut self) -> Self {
        if self.0.kind == ErrorKind::Connection && self.0.sqlstate.is_none() {
            self.0.message.push_str(
                "; the server may have ended it, as idle_in_transaction_session_timeout and transaction_timeout do",
            );
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
            ErrorKind::Database => self.0.trouble.is_some() || self.sqlstate().is_some_and(is_transient),
            _ => false,
        }
    }

    /// Whether the call may have taken effect: the reply that would have said so never came, or somebody between has
    /// answered in the server's place that he lost it (SQLSTATE 08006 and its like).
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

    /// Whether the connection that gave this error is of no use any more: it has ended, or its server only reads.
    pub(crate) fn breaks_connection(&self) -> bool {
        self.ends_session() || self.sqlstate() == Some(ONLY_READS)
    }

    /// Whether the session ended with it, so that an answer which is missing will not come.
    pub(crate) fn ends_session(&self) -> bool {
        !self.0.answered && (self.0.kind == ErrorKind::Connection || self.0.sqlstate.is_some())
    }

    /// Whether the statement was undone in favour of another, and can be repeated.
    pub(crate) fn is_conflict(&self) -> bool {
        self.sqlstate().is_some_and(is_conflict)
    }

    /// Whether the call was undone for no other reason than that it notifies.
    pub(crate) fn is_of_notifying(&self) -> bool {
        self.0.trouble == Some(Trouble::Notifying)
    }

    /// Whether somebody else uses the same session, which a pooler makes possible.
    pub(crate) fn is_mixed_up(&self) -> bool {
        self.0.trouble == Some(Trouble::MixedUp)
    }
}

/// Codes of a server that has undone a statement in favour of another.
fn is_conflict(code: &str) -> bool {
    matches!(code, "40001" | "40P01" | "55P03")
}

/// Codes of a server that may answer otherwise next time, on the same connection.
fn is_transient(code: &str) -> bool {
    is_conflict(code) || matches!(code, "40000" | "40003" | "53000" | "53200" | "53400" | "58000" | "58030")
}

/// The code of a server that only reads.
const ONLY_READS: &str = "25006";

/// Codes of a server that cannot be used for now: one that starts or stops, is full, or only reads.
fn is_unavailable(code: &str) -> bool {
    code.starts_with("08")
        || matches!(
            code,
            "57P01" | "57P02" | "57P03" | "57P05" | "25P03" | "25P04" | "53100" | "53300" | ONLY_READS
        )
}

/// Codes of somebody between who does not know what became of a statement.
fn is_unknown(code: &str) -> bool {
    code.starts_with("08") || code == "40003"
}

fn is_denied(code: &str) -> bool {
    code.starts_with("28") || code == "42501"
}

fn is_missing(code: &str) -> bool {
    matches!(code, "3F000" | "42P01" | "42883" | "42703" | "3D000")
}

impl Trouble {
    /// By codes, and names in the server's sources: its words may be those of another language.
    fn of(error: &DbError) -> Option<Self> {
        match (error.code().code(), error.routine()) {
            ("42P05" | "26000", _) | ("08P01", Some("exec_bind_message")) => Some(Trouble::MixedUp),
            ("54000", Some("PreCommit_Notify")) => Some(Trouble::Notifying),
            ("54000", _) if error.message().contains("NOTIFY") => Some(Trouble::Notifying),
            _ => None,
        }
    }
}

/// Whether the session goes on. Poolers send the severity in plain English only.
fn is_answered(error: &DbError) -> bool {
    match error.parsed_severity() {
        Some(severity) => severity == Severity::Error,
        None => error.severity() == "ERROR",
    }
}

/// What a pooler refuses for good when a session begins, all under one code, and what to do about it.
fn refused_by_pooler(error: &DbError) -> Option<(ErrorKind, &'static str)> {
    if error.code().code() != "08P01" || is_answered(error) {
        return None;
    }
    let says = |words: &str| error.message().to_lowercase().contains(words);
    if says("unsupported startup parameter") {
        Some((
            ErrorKind::Invalid,
            "; a pooler takes no options: leave them out, and set them by alter role or alter database",
        ))
    } else if says("no such database") {
        Some((ErrorKind::Schema, ""))
    } else if says("no such user") || says("authentication failed") || says("auth failed") {
        Some((ErrorKind::Denied, ""))
    } else {
        None
    }
}

/// The code that the functions of the schema raise for a lost lease.
const LEASE_LOST: &str = "PP001";

/// What to do when others use the same session.
const MIXED_UP: &str =
    "; behind a pooler in transaction mode set Builder::pooler, and use query_typed in transactions";

fn kind_of(code: &str) -> ErrorKind {
    match code {
        LEASE_LOST => ErrorKind::LeaseLost,
        "22023" => ErrorKind::Invalid,
        "57014" => ErrorKind::Timeout,
        code if is_unavailable(code) => ErrorKind::Connection,
        code if is_denied(code) => ErrorKind::Denied,
        code if is_missing(code) => ErrorKind::Schema,
        _ => ErrorKind::Database,
    }
}

impl From<postgres::Error> for Error {
    fn from(error: postgres::Error) -> Self {
        if let Some(db) = error.as_db_error() {
            let code = db.code().code();
            let (trouble, refused) = (Trouble::of(db), refused_by_pooler(db));
            let kind = match refused {
                Some((kind, _)) => kind,
                None if trouble.is_some() => ErrorKind::Database,
                None => kind_of(code),
            };
            let mut message = format!("{} (SQLSTATE {code})", db.message());
            if let Some(detail) = db.detail().filter(|_| kind == ErrorKind::LeaseLost) {
                message = format!("{message}: {detail}");
            }
            message.push_str(match (trouble, refused) {
                (Some(Trouble::MixedUp), _) => MIXED_UP,
                (_, Some((_, hint))) => hint,
                _ => "",
            });
            let mut new = Error::new(kind, message);
            new.0.sqlstate = Some(code.to_owned());
            new.0.answered = is_answered(db);
            new.0.trouble = trouble;
            new.0.indeterminate = new.0.answered && trouble.is_none() && is_unknown(code);
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
