//! A topic and what waits in it, in the hands of an operator.

use std::time::Duration;

use postgres::Row;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::limits;
use crate::topic::Topic;

/// The defaults of a topic, which hold for all clients. What a message or a pop says goes before them;
/// what the [`Builder`](crate::Builder) says holds where they say nothing.
///
/// ```no_run
/// use std::time::Duration;
/// use pushpop_pg::{Queue, TopicSettings};
///
/// # fn main() -> Result<(), pushpop_pg::Error> {
/// let queue = Queue::connect("postgres://localhost/app")?;
/// queue.topic("mail").set(
///     &TopicSettings::default()
///         .with_lease(Duration::from_secs(60))
///         .with_max_attempts(5)
///         .with_backoff(Duration::from_secs(10), Duration::from_secs(600)),
/// )?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct TopicSettings {
    lease: Option<Duration>,
    max_attempts: Option<Option<u16>>,
    backoff: Option<(Duration, Duration)>,
}

impl TopicSettings {
    /// How long a popped message is its consumer's: 1 s to 24 h.
    #[doc(alias = "visibility")]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// How often a message is tried: 1 to 32,767, or `None` for no limit. Holds for messages that are
    /// pushed from then on.
    pub fn with_max_attempts(mut self, most: impl Into<Option<u16>>) -> Self {
        self.max_attempts = Some(most.into());
        self
    }

    /// How long a message that failed waits for its next attempt: `first`, doubled with each attempt up
    /// to `most`, less up to a quarter.
    pub fn with_backoff(mut self, first: Duration, most: Duration) -> Self {
        self.backoff = Some((first, most));
        self
    }

    /// The length of a lease, if the topic says.
    pub fn lease(&self) -> Option<Duration> {
        self.lease
    }

    /// How often a message is tried, if the topic says; `Some(None)`: without end.
    pub fn max_attempts(&self) -> Option<Option<u16>> {
        self.max_attempts
    }

    /// The first and the longest backoff, if the topic says.
    pub fn backoff(&self) -> Option<(Duration, Duration)> {
        self.backoff
    }

    fn check(&self) -> Result<()> {
        self.lease.map_or(Ok(()), limits::lease)?;
        self.max_attempts.flatten().map_or(Ok(()), limits::max_attempts)?;
        self.backoff.map_or(Ok(()), |(first, most)| limits::backoff(first, most))
    }

    fn read(row: &Row) -> Result<Self> {
        let seconds = |i| -> Result<Option<Duration>> {
            let seconds: Option<f64> = row.try_get(i)?;
            Ok(seconds.map(|s| Duration::try_from_secs_f64(s).unwrap_or_default()))
        };
        let attempts: Option<i32> = row.try_get(1)?;
        let backoff = match (seconds(2)?, seconds(3)?) {
            (None, None) => None,
            // By SQL one of them can be set alone.
            (first, most) => {
                Some((first.unwrap_or(Duration::from_secs(1)), most.unwrap_or(Duration::from_secs(3600))))
            }
        };
        Ok(TopicSettings {
            lease: seconds(0)?,
            max_attempts: attempts.map(|n| u16::try_from(n).ok().filter(|n| *n > 0)),
            backoff,
        })
    }
}

impl Topic<'_> {
    /// Hands out no message of the topic to anybody, until it is [resumed](Self::resume). It still takes
    /// pushes, and leases that are held can be settled. Pausing again does nothing.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn pause(&self) -> Result<()> {
        self.ask(|calls| &calls.pause, vec![], |_| Ok(()))
    }

    /// Ends a [pause](Self::pause), and wakes those that wait for a message.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn resume(&self) -> Result<()> {
        self.ask(|calls| &calls.resume, vec![], |_| Ok(()))
    }

    /// The defaults that the topic has of its own.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn settings(&self) -> Result<TopicSettings> {
        self.ask(
            |calls| &calls.topic_settings,
            vec![],
            |rows| rows.first().map_or_else(|| Err(Error::panicked()), TopicSettings::read),
        )
    }

    /// Sets the defaults of the topic, all of them: what is not said is not the topic's to say any
    /// more.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats), and [`Invalid`](crate::ErrorKind::Invalid) for settings
    /// outside the limits.
    pub fn set(&self, settings: &TopicSettings) -> Result<()> {
        settings.check().map_err(|e| e.during("set", Some(self.name())))?;
        let seconds = |time: Duration| time.as_secs_f64();
        let attempts = settings.max_attempts.map(|most| most.map_or(0, i32::from));
        let (first, most) = (settings.backoff.map(|b| seconds(b.0)), settings.backoff.map(|b| seconds(b.1)));
        self.ask(
            |calls| &calls.set_topic,
            vec![Box::new(settings.lease.map(seconds)), Box::new(attempts), Box::new(first), Box::new(most)],
            |_| Ok(()),
        )
    }

    /// Discards a message that waits, ready or delayed, so that it is not handed out any more; returns
    /// whether it did. `false` if the message is leased, settled, dead or not stored.
    ///
    /// It stays visible to [`Queue::find`](crate::Queue::find) for `keep_settled`; cancelling it again is
    /// `true` until then.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn cancel(&self, id: Uuid) -> Result<bool> {
        let keep = self.keep_settled().as_secs_f64();
        self.ask(|calls| &calls.cancel, vec![Box::new(id), Box::new(keep)], yes)
    }

    /// Makes a message that waits, ready or delayed, ready after `delay`; returns whether it did.
    /// `false` if the message is leased, settled, dead or not stored.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats), and [`Invalid`](crate::ErrorKind::Invalid) for a delay that is no
    /// time of this calendar.
    pub fn reschedule(&self, id: Uuid, delay: Duration) -> Result<bool> {
        let checked = limits::delay(delay);
        self.move_to(id, checked, Some(delay.as_secs_f64()), None)
    }

    /// The same for a time, by the server's clock. A time in the past puts the message at that place in the
    /// order.
    ///
    /// # Errors
    ///
    /// Those of [`reschedule`](Self::reschedule).
    pub fn reschedule_at(&self, id: Uuid, at: OffsetDateTime) -> Result<bool> {
        self.move_to(id, limits::ready_at(at), None, Some(at))
    }

    fn move_to(
        &self,
        id: Uuid,
        checked: Result<()>,
        delay: Option<f64>,
        at: Option<OffsetDateTime>,
    ) -> Result<bool> {
        checked.map_err(|e| e.during("reschedule", Some(self.name())))?;
        self.ask(|calls| &calls.reschedule, vec![Box::new(id), Box::new(delay), Box::new(at)], yes)
    }
}

fn yes(rows: Vec<Row>) -> Result<bool> {
    Ok(rows.first().map_or(Ok(false), |row| row.try_get(0))?)
}
