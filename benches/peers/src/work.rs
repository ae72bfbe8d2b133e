//! The messages of one run: who pushes which, and whether each was handled once.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pushpop_measure::{Check, Result, Tally};

/// How long a run may go on without a message.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long somebody waits who has to look again and again.
pub(crate) const MOMENT: Duration = Duration::from_millis(1);

/// How often. It is not the time that is limited, as the whole program may be halted for a while.
pub(crate) const LOOKS: u32 = 20_000;

/// How many messages had been handled at the last look, and how many looks ago that was the news.
#[derive(Default)]
struct Seen {
    handled: u64,
    looks: u32,
}

/// Messages to be pushed and worked, by any number of threads.
#[derive(Debug)]
pub(crate) struct Work {
    total: u64,
    batch: u64,
    pushes: AtomicU64,
    shares: AtomicU64,
    handled: AtomicU64,
    begun: OnceLock<Instant>,
    check: Check,
}

impl Work {
    /// So many messages, of which a call takes at most `batch`.
    pub(crate) fn new(total: u64, batch: usize) -> Arc<Work> {
        Arc::new(Work {
            total,
            batch: batch as u64,
            pushes: AtomicU64::new(0),
            shares: AtomicU64::new(0),
            handled: AtomicU64::new(0),
            begun: OnceLock::new(),
            check: Check::new(),
        })
    }

    /// The numbers of the messages that the caller is to push next, in one call.
    pub(crate) fn next_push(&self) -> Option<Range<u64>> {
        self.next(&self.pushes)
    }

    /// How many messages the caller is to work next. As many shares are given out as there are messages,
    /// so nobody waits for one that does not come.
    pub(crate) fn next_share(&self) -> Option<usize> {
        self.next(&self.shares).map(|range| (range.end - range.start) as usize)
    }

    fn next(&self, counter: &AtomicU64) -> Option<Range<u64>> {
        let first = counter.fetch_add(self.batch, Ordering::Relaxed);
        (first < self.total).then(|| first..self.total.min(first + self.batch))
    }

    /// The list of one thread.
    pub(crate) fn tally(&self) -> Tally<'_> {
        self.check.tally()
    }

    /// Working begins. A framework's worker is up by then.
    pub(crate) fn begin(&self) {
        self.begun.get_or_init(Instant::now);
    }

    /// How long working took, if it has ended at that moment.
    pub(crate) fn worked_until(&self, ended: Instant) -> Duration {
        self.begun.get().map_or(Duration::ZERO, |begun| ended - *begun)
    }

    /// A handler has been given a message.
    pub(crate) fn handle(&self, number: u64) {
        self.tally().done(number);
        self.handled.fetch_add(1, Ordering::Release);
    }

    /// Returns when handlers have been given as many messages as there are. It is an error if none comes for
    /// a while.
    pub(crate) async fn handled(&self) -> Result<()> {
        let mut seen = Seen::default();
        while self.goes_on(&mut seen)? {
            tokio::time::sleep(MOMENT).await;
        }
        Ok(())
    }

    /// The same for threads.
    pub(crate) fn wait_handled(&self) -> Result<()> {
        let mut seen = Seen::default();
        while self.goes_on(&mut seen)? {
            std::thread::sleep(MOMENT);
        }
        Ok(())
    }

    fn goes_on(&self, seen: &mut Seen) -> Result<bool> {
        let handled = self.handled.load(Ordering::Acquire);
        let missing = self.total.saturating_sub(handled);
        seen.looks = if handled > seen.handled { 0 } else { seen.looks + 1 };
        seen.handled = handled;
        if missing > 0 && seen.looks > LOOKS { Err(starved(missing)) } else { Ok(missing > 0) }
    }

    /// Fails if a message was lost or handled twice.
    pub(crate) fn finish(self: Arc<Work>) -> Result<()> {
        let work = Arc::into_inner(self).ok_or("somebody still works")?;
        let done = work.check.finish()?;
        if done != work.total {
            return Err(format!("{done} messages were handled, not {}", work.total).into());
        }
        Ok(())
    }
}

/// There is no message, though some must be there.
pub(crate) fn starved(missing: u64) -> pushpop_measure::Error {
    format!("no message for {} s, and {missing} are missing", PATIENCE.as_secs()).into()
}
