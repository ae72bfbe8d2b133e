//! Messages: as they are pushed, and as they are found.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

#[cfg(feature = "json")]
use crate::error::Error;
use crate::error::Result;
use crate::limits;

/// A message to be pushed: a payload, and how it is to be treated.
///
/// Anything that turns into a `Vec<u8>` turns into a message, so that
/// `queue.push("mail", "hello")` works; `NewMessage` is for those who want more.
///
/// ```
/// use std::time::Duration;
/// use pushpop_pg::NewMessage;
///
/// let message = NewMessage::new("hello")
///     .delay(Duration::from_secs(60))
///     .header("trace", "4bf92f")
///     .max_attempts(3);
/// # let _ = message.id();
/// ```
#[derive(Clone)]
pub struct NewMessage {
    pub(crate) id: Uuid,
    pub(crate) payload: Vec<u8>,
    pub(crate) due: Due,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) max_attempts: Attempts,
}

#[derive(Clone, Copy)]
pub(crate) enum Due {
    Now,
    In(Duration),
    At(OffsetDateTime),
}

/// How often a message is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempts {
    /// As the topic or the queue says.
    Default,
    AtMost(u16),
    Unlimited,
}

impl NewMessage {
    /// A message with this payload, and an id of its own (a UUID of version 7).
    pub fn new(payload: impl Into<Vec<u8>>) -> Self {
        NewMessage {
            id: Uuid::now_v7(),
            payload: payload.into(),
            due: Due::Now,
            headers: BTreeMap::new(),
            max_attempts: Attempts::Default,
        }
    }

    /// A message whose payload is `value` as JSON.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) when the value cannot be written as JSON.
    ///
    /// ```
    /// use pushpop_pg::NewMessage;
    ///
    /// let message = NewMessage::json(&["birds", "cats"])?;
    /// # Ok::<(), pushpop_pg::Error>(())
    /// ```
    #[cfg(feature = "json")]
    pub fn json<T: serde::Serialize + ?Sized>(value: &T) -> Result<Self> {
        match serde_json::to_vec(value) {
            Ok(payload) => Ok(Self::new(payload)),
            Err(e) => Err(Error::invalid(format!("the payload cannot be written as JSON: {e}")).caused_by(e)),
        }
    }

    /// Gives the message an id of the caller's. Pushing a message with an id that is still stored
    /// in its topic changes nothing, so a push with such an id can be repeated.
    ///
    /// Once the message is deleted, its id may be used again.
    pub fn with_id(mut self, id: Uuid) -> Self {
        self.id = id;
        self
    }

    /// Makes the message ready only after this time. Default: at once.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.due = Due::In(delay);
        self
    }

    /// Makes the message ready at this time, by the server's clock. A time in the past puts it
    /// at that place in the order. Default: at once.
    pub fn ready_at(mut self, at: OffsetDateTime) -> Self {
        self.due = Due::At(at);
        self
    }

    /// Adds a header. A message has at most 64 headers, of 16 KiB together.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Says how often the message is tried before it is dead: 1 to 32,767, or `None` for no
    /// limit. Default: what the [topic](crate::Topic::set) says, else the
    /// [queue](crate::Builder::max_attempts), which says 25 unless it was told otherwise.
    pub fn max_attempts(mut self, most: impl Into<Option<u16>>) -> Self {
        self.max_attempts = match most.into() {
            Some(most) => Attempts::AtMost(most),
            None => Attempts::Unlimited,
        };
        self
    }

    /// The id of the message.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The delay in seconds and the time, as the functions of the schema take them.
    pub(crate) fn due(&self) -> (Option<f64>, Option<OffsetDateTime>) {
        match self.due {
            Due::Now => (None, None),
            Due::In(delay) => (Some(delay.as_secs_f64()), None),
            Due::At(at) => (None, Some(at)),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.payload.len() + self.headers.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
    }

    pub(crate) fn check(&self, max_payload: usize) -> Result<()> {
        limits::payload(self.payload.len(), max_payload)?;
        limits::headers(&self.headers)?;
        match self.due {
            Due::Now => {}
            Due::In(delay) => limits::delay(delay)?,
            Due::At(at) => limits::ready_at(at)?,
        }
        match self.max_attempts {
            Attempts::AtMost(most) => limits::max_attempts(most),
            Attempts::Default | Attempts::Unlimited => Ok(()),
        }
    }
}

impl<T: Into<Vec<u8>>> From<T> for NewMessage {
    fn from(payload: T) -> Self {
        NewMessage::new(payload)
    }
}

impl fmt::Debug for NewMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewMessage")
            .field("id", &self.id)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// A message as it is stored.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    pub(crate) topic: String,
    pub(crate) id: Uuid,
    pub(crate) payload: Vec<u8>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) state: State,
    pub(crate) attempt: u32,
    pub(crate) max_attempts: Option<u16>,
    pub(crate) fence: i64,
    pub(crate) pushed_at: OffsetDateTime,
    pub(crate) ready_at: OffsetDateTime,
    pub(crate) failures: Vec<Failure>,
}

/// An attempt at a message that failed, or whose lease expired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub(crate) attempt: u32,
    pub(crate) at: OffsetDateTime,
    pub(crate) error: String,
}

impl Failure {
    /// The number of the attempt.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// When it failed, by the server's clock; of a lease that expired, when that was noticed.
    pub fn at(&self) -> OffsetDateTime {
        self.at
    }

    /// What was said, up to 8,192 characters.
    pub fn error(&self) -> &str {
        &self.error
    }
}

/// What has become of a message, as of the moment it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It may be popped now.
    Ready,
    /// It may be popped from then on.
    Delayed {
        /// The time from which on it is ready.
        until: OffsetDateTime,
    },
    /// A consumer owns it.
    Leased {
        /// The deadline of the lease.
        until: OffsetDateTime,
    },
    /// It was completed.
    Completed {
        /// When that was.
        at: OffsetDateTime,
        /// When it will be deleted, or soon after.
        until: OffsetDateTime,
    },
    /// It was discarded, or [cancelled](crate::Topic::cancel).
    Discarded {
        /// When that was.
        at: OffsetDateTime,
        /// When it will be deleted, or soon after.
        until: OffsetDateTime,
    },
    /// It is out of attempts.
    Dead {
        /// When the last attempt ended.
        at: OffsetDateTime,
    },
}

impl Message {
    /// The topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// The id, unique within the topic.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The payload, read as JSON.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) when the payload is no JSON, or none of this type.
    #[cfg(feature = "json")]
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.payload).map_err(|e| {
            // The words of the parser may quote the payload.
            let text =
                format!("the payload is not the expected JSON (line {}, column {})", e.line(), e.column());
            Error::invalid(text).during("read a payload", Some(&self.topic))
        })
    }

    /// A header by its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The headers, in the order of their names.
    pub fn headers(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The number of this attempt, or of the last one: 1 at the first delivery. Deferring and
    /// releasing give an attempt back.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How often it is tried before it is dead; `None`: without end.
    pub fn max_attempts(&self) -> Option<u16> {
        self.max_attempts
    }

    /// The number of deliveries so far. It grows with each delivery of the message, so a system
    /// downstream can refuse an older one.
    pub fn fence(&self) -> i64 {
        self.fence
    }

    /// When it was pushed, by the server's clock.
    pub fn pushed_at(&self) -> OffsetDateTime {
        self.pushed_at
    }

    /// From when on it may be, or might have been, popped. Messages are handed out in the order
    /// of these times.
    pub fn ready_at(&self) -> OffsetDateTime {
        self.ready_at
    }

    /// What has become of it.
    pub fn state(&self) -> State {
        self.state
    }

    /// What was said when it failed last.
    pub fn last_error(&self) -> Option<&str> {
        self.failures.last().map(Failure::error)
    }

    /// Its failures, oldest first: the newest ten.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("topic", &self.topic)
            .field("id", &self.id)
            .field("state", &self.state)
            .field("attempt", &self.attempt)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_counted() {
        assert_eq!(NewMessage::new("").bytes(), 0);
        assert_eq!(NewMessage::new("abc").header("key", "value").header("k", "").bytes(), 12);
    }
}
