//! Dead letters: messages that are out of attempts.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::error::Result;
use crate::limits;
use crate::message::Message;
use crate::topic::{Topic, count};

impl Topic<'_> {
    /// The newest `max` messages that are dead, 1 to 1,000, newest first.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    ///
    /// ```no_run
    /// use pushpop_pg::Queue;
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// for message in queue.topic("mail").dead(10)? {
    ///     println!("{}: {}", message.id(), message.last_error().unwrap_or_default());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "dead letter")]
    pub fn dead(&self, max: usize) -> Result<Vec<Message>> {
        self.look(|calls| &calls.dead, max)
    }

    /// Makes those of the messages that are dead ready again, and returns how many that were. Their
    /// attempts begin anew, their failures stay. Up to 10,000; none of them sends nothing.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats), and [`Invalid`](crate::ErrorKind::Invalid) for too many.
    pub fn redrive(&self, ids: &[Uuid]) -> Result<u64> {
        limits::push_batch(ids.len()).map_err(|e| e.during("redrive", Some(self.name())))?;
        if ids.is_empty() {
            return Ok(0);
        }
        self.ask(|calls| &calls.redrive, vec![Box::new(ids.to_vec())], count)
    }

    /// Makes all messages ready again that are dead now, the oldest first, and returns how many that
    /// were. Those that die meanwhile stay dead.
    ///
    /// Works in steps of 1,000 messages, each with the operation time-out; what was redriven before an error
    /// stays so.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn redrive_all(&self) -> Result<u64> {
        let mut until: Option<OffsetDateTime> = None;
        self.in_steps(|| {
            self.ask(
                |calls| &calls.redrive_all,
                vec![Box::new(until)],
                |rows| {
                    until = rows.first().map(|row| row.try_get(1)).transpose()?;
                    count(rows)
                },
            )
        })
    }

    /// Deletes the messages that died at least so long ago, and returns how many.
    ///
    /// Works in steps of 10,000 messages, each with the operation time-out; what was deleted before an error
    /// stays deleted.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats), and [`Invalid`](crate::ErrorKind::Invalid) for more than 7,900
    /// years.
    pub fn purge_dead(&self, age: Duration) -> Result<u64> {
        limits::age(age).map_err(|e| e.during("purge_dead", Some(self.name())))?;
        self.in_steps(|| self.ask(|calls| &calls.purge_dead, vec![Box::new(age.as_secs_f64())], count))
    }
}
