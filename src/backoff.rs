//! How long a message rests after a failed attempt.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::limits;
use crate::message::Message;

/// How long a message whose attempt has failed waits for the next one: for
/// [`Worker::backoff`](crate::Worker::backoff).
///
/// ```
/// use std::time::Duration;
/// use pushpop_pg::Backoff;
///
/// let patient = Backoff::exponential(Duration::from_secs(10), Duration::from_secs(86_400));
/// let steady = Backoff::fixed(Duration::from_secs(30));
/// // By the attempt that has failed, which counts from 1.
/// let own = Backoff::by(|message| Duration::from_secs(u64::from(message.attempt()) * 60));
/// ```
#[derive(Clone)]
pub struct Backoff(Arc<dyn Fn(&Message) -> Duration + Send + Sync>);

impl Backoff {
    /// `first`, doubling with each attempt up to `most`, less up to a quarter, so that messages that
    /// failed together do not come back together.
    pub fn exponential(first: Duration, most: Duration) -> Self {
        Self::by(move |message| {
            let doubled = 2_u32.saturating_pow(message.attempt().saturating_sub(1));
            let wait = first.saturating_mul(doubled).min(most).min(limits::DELAY);
            wait.mul_f64(1.0 - f64::from(Uuid::new_v4().as_bytes()[0]) / 1024.0)
        })
    }

    /// Always the same time.
    pub fn fixed(wait: Duration) -> Self {
        Self::by(move |_| wait)
    }

    /// A function of the message, which has failed at [`Message::attempt`]. One that panics leaves it to the
    /// topic's default.
    pub fn by(wait: impl Fn(&Message) -> Duration + Send + Sync + 'static) -> Self {
        Backoff(Arc::new(wait))
    }

    /// In seconds, within the limits.
    pub(crate) fn seconds(&self, message: &Message) -> Option<f64> {
        let wait = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.0)(message)));
        wait.ok().map(|wait| wait.min(limits::DELAY).as_secs_f64())
    }
}

impl fmt::Debug for Backoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Backoff(..)")
    }
}
