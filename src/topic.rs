//! The operator's side of a topic.

use std::time::Duration;

use postgres::Row;
use postgres::types::ToSql;
use time::OffsetDateTime;

use crate::calls::Calls;
use crate::error::{Error, Result};
use crate::limits;
use crate::link::Call;
use crate::message::Message;
use crate::queue::Queue;
use crate::text::Raw;

/// One topic, as its operator sees it: figures, a look at what waits, its settings, dead letters, a purge.
///
/// ```no_run
/// use pushpop_pg::Queue;
///
/// # fn main() -> Result<(), pushpop_pg::Error> {
/// let queue = Queue::connect("postgres://localhost/app")?;
/// let mail = queue.topic("mail");
/// println!("{} ready", mail.stats()?.ready());
/// for message in mail.peek(10)? {
///     println!("{} since {}", message.id(), message.pushed_at());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Topic<'a> {
    queue: &'a Queue,
    name: &'a str,
}

/// Figures of a topic, as of [`at`](Self::at).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    pub(crate) topic: String,
    pub(crate) at: OffsetDateTime,
    pub(crate) ready: u64,
    pub(crate) delayed: u64,
    pub(crate) leased: u64,
    pub(crate) settled: u64,
    pub(crate) dead: u64,
    pub(crate) oldest_ready_at: Option<OffsetDateTime>,
    pub(crate) paused: bool,
    pub(crate) upkept_at: Option<OffsetDateTime>,
    pub(crate) upkeep_time: Duration,
    pub(crate) upkeep_rows: u64,
}

impl Stats {
    /// The topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// When the figures were taken, by the server's clock.
    pub fn at(&self) -> OffsetDateTime {
        self.at
    }

    /// Messages that may be popped now.
    pub fn ready(&self) -> u64 {
        self.ready
    }

    /// Messages that may be popped later.
    pub fn delayed(&self) -> u64 {
        self.delayed
    }

    /// Messages that a consumer holds. Above 10,000 leases, those that were settled in a transaction
    /// of their holder's count until they would have expired.
    pub fn leased(&self) -> u64 {
        self.leased
    }

    /// Messages that were completed or discarded, and are still stored.
    pub fn settled(&self) -> u64 {
        self.settled
    }

    /// Messages that are out of attempts.
    pub fn dead(&self) -> u64 {
        self.dead
    }

    /// How long the oldest ready message could have been popped.
    pub fn oldest_ready_age(&self) -> Option<Duration> {
        self.oldest_ready_at.map(|since| (self.at - since).try_into().unwrap_or_default())
    }

    /// Whether the topic is [paused](Topic::pause). Its ready messages may be popped once it is resumed.
    pub fn paused(&self) -> bool {
        self.paused
    }

    /// When upkeep of the topic was done last, by whichever client: old history deleted, and messages
    /// of expired leases given back.
    pub fn upkept_at(&self) -> Option<OffsetDateTime> {
        self.upkept_at
    }

    /// How much time of the server upkeep has taken so far, in all.
    pub fn upkeep_time(&self) -> Duration {
        self.upkeep_time
    }

    /// How many messages upkeep has deleted or given back so far.
    pub fn upkeep_rows(&self) -> u64 {
        self.upkeep_rows
    }
}

/// For how long one statement takes the figures of topics.
const STEP: Duration = Duration::from_secs(1);

impl Queue {
    /// The operator's side of a topic. Sends nothing.
    pub fn topic<'a>(&'a self, name: &'a str) -> Topic<'a> {
        Topic { queue: self, name }
    }

    /// The figures of all topics in which a message is stored, or that have settings, in the order of
    /// their names.
    ///
    /// Takes about 0.3 s for 10,000 topics. Works in steps of about a second, each with the operation time-out.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the connection.
    pub fn topics(&self) -> Result<Vec<Stats>> {
        let (mut topics, mut after): (Vec<Stats>, Raw) = Default::default();
        loop {
            let (more, last) = self
                .call(move |engine, link, deadline| {
                    let seconds = STEP.min(engine.settings.operation_timeout / 4).as_secs_f64();
                    let rows = link.run(deadline, &engine.calls.topics, &[&after, &seconds])?;
                    let more: Result<Vec<Stats>> = rows.iter().map(|row| Ok(Stats::read(row)?)).collect();
                    // As the server has it: a name that is shown with a replacement is another one.
                    let last: Option<Raw> = rows.last().map(|row| row.try_get(0)).transpose()?;
                    Ok((more?, last))
                })
                .map_err(|e| e.during("topics", None))?;
            topics.extend(more);
            match last {
                Some(last) => after = last,
                None => return Ok(topics),
            }
        }
    }
}

impl Topic<'_> {
    /// The name of the topic.
    pub fn name(&self) -> &str {
        self.name
    }

    /// The figures of the topic, at most 2 s old: see [`Stats::at`]. All are 0 if nothing is stored in
    /// it.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for a topic outside the limits; whatever is wrong with
    /// the connection.
    pub fn stats(&self) -> Result<Stats> {
        self.ask(
            |calls| &calls.stats,
            vec![],
            |rows| {
                let row = rows.first().ok_or_else(Error::panicked)?;
                Ok(Stats::read(row)?)
            },
        )
    }

    /// The first `max` messages that wait, 1 to 1,000, in the order in which they will be popped:
    /// ready ones, then delayed ones. Takes none of them.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn peek(&self, max: usize) -> Result<Vec<Message>> {
        self.look(|calls| &calls.peek, max)
    }

    /// Deletes all messages that wait, ready and delayed, and returns how many. Leased ones stay, to
    /// be settled; so do the dead and the history.
    ///
    /// Works in steps of about 10,000 messages, each with the operation time-out; what was deleted
    /// before an error stays deleted.
    ///
    /// # Errors
    ///
    /// Those of [`stats`](Self::stats).
    pub fn purge(&self) -> Result<u64> {
        self.in_steps(|| self.ask(|calls| &calls.purge, vec![], count))
    }

    pub(crate) fn keep_settled(&self) -> Duration {
        self.queue.engine().settings.keep_settled
    }

    /// Asks for up to `max` messages.
    pub(crate) fn look(&self, call: Which, max: usize) -> Result<Vec<Message>> {
        let name = call(&self.queue.engine().calls).name;
        limits::batch(max).map_err(|e| e.during(name, Some(self.name)))?;
        let most = i32::try_from(max).unwrap_or(i32::MAX);
        self.ask(call, vec![Box::new(most)], |rows| {
            rows.iter().map(|row| Message::read(self.name, row).map_err(Error::from)).collect()
        })
    }

    /// Repeats a step until it finds nothing more to do; returns how many messages it was.
    pub(crate) fn in_steps(&self, mut step: impl FnMut() -> Result<u64>) -> Result<u64> {
        let mut total = 0;
        loop {
            match step()? {
                0 => return Ok(total),
                done => total += done,
            }
        }
    }

    /// Runs a call about this topic, which is its first parameter, and reads what it returns.
    pub(crate) fn ask<R>(
        &self,
        call: Which,
        rest: Vec<Box<dyn ToSql + Send + Sync>>,
        read: impl FnOnce(Vec<Row>) -> Result<R>,
    ) -> Result<R> {
        let name = call(&self.queue.engine().calls).name;
        let topic = self.name.to_owned();
        limits::topic(self.name)
            .and_then(|()| {
                self.queue.call(move |engine, link, deadline| {
                    let mut params: Vec<&(dyn ToSql + Sync)> = vec![&topic];
                    params.extend(rest.iter().map(|param| param.as_ref() as &(dyn ToSql + Sync)));
                    link.run(deadline, call(&engine.calls), &params)
                })
            })
            .and_then(read)
            .map_err(|e| e.blame(self.name, std::iter::empty()).during(name, Some(self.name)))
    }
}

/// One of the calls.
pub(crate) type Which = fn(&Calls) -> &Call;

/// The number of messages that a call says it has dealt with.
pub(crate) fn count(rows: Vec<Row>) -> Result<u64> {
    let count = rows.first().map_or(Ok(0), |row| row.try_get::<_, i64>(0))?;
    Ok(u64::try_from(count).unwrap_or_default())
}
