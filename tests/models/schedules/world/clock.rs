//! Time. It stands still while any thread can go on: calls take no time but what the server takes, and a thread that
//! yields. Where a scenario says so, it leaps now and then, as on a machine that gives a thread no turn.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, AddAssign};
use std::sync::Arc;
use std::time::Duration;

use shuttle::scheduler::TaskId;
use shuttle::sync::Condvar;

/// Whoever waits for so long waits for ever.
const HORIZON: Duration = Duration::from_secs(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(Duration);

#[derive(Default)]
struct Clock {
    now: Duration,
    timers: BTreeMap<(Duration, u64), Timer>,
    timers_so_far: u64,
    /// The thread that lets time pass.
    task: Option<TaskId>,
    leaps: u32,
    stopped: bool,
}

struct Timer {
    bell: Arc<Condvar>,
    rung: bool,
}

thread_local! {
    static CLOCK: RefCell<Clock> = RefCell::default();
}

fn with<T>(look: impl FnOnce(&mut Clock) -> T) -> T {
    CLOCK.with_borrow_mut(look)
}

pub(crate) fn reset() {
    with(|clock| *clock = Clock::default());
}

pub(crate) fn stop() {
    with(|clock| clock.stopped = true);
}

/// Time may pass so many times although somebody could go on.
pub(crate) fn may_leap(times: u32) {
    with(|clock| clock.leaps = times);
}

/// For the scheduler: which task lets time pass.
pub(crate) fn task() -> Option<TaskId> {
    with(|clock| clock.task)
}

/// For the scheduler: whether there is a timer to ring now.
pub(crate) fn is_due() -> bool {
    with(|clock| clock.due().is_some() || clock.stopped)
}

/// For the scheduler: whether time may pass although somebody can go on.
pub(crate) fn can_leap() -> bool {
    with(|clock| clock.leaps > 0 && !clock.timers.is_empty())
}

pub(crate) fn leap() {
    with(|clock| clock.leaps = clock.leaps.saturating_sub(1));
}

impl Clock {
    fn due(&self) -> Option<(Duration, u64)> {
        let due = self.timers.iter().take_while(|((at, _), _)| *at <= self.now);
        due.filter(|(_, timer)| !timer.rung).map(|(key, _)| *key).next()
    }
}

/// The thread that lets time pass. It gets no turn while another can go on, but for timers that are due. It ends when
/// all wait for no certain time, which `shuttle` then tells.
pub(crate) fn tick() {
    with(|clock| clock.task = Some(shuttle::current::me()));
    loop {
        shuttle::thread::yield_now();
        let bell = with(|clock| {
            if clock.stopped {
                return None;
            }
            // One that was rung before its thread slept is rung again.
            let next = clock.due().or_else(|| clock.timers.keys().next().copied());
            let (at, number) = next?;
            clock.now = clock.now.max(at);
            assert!(clock.now < HORIZON, "everybody waits, and nothing happens");
            let timer = clock.timers.get_mut(&(at, number))?;
            timer.rung = true;
            Some(Arc::clone(&timer.bell))
        });
        match bell {
            Some(bell) => bell.notify_all(),
            None => return,
        }
    }
}

/// Rings a bell at a certain time, until it is dropped.
pub(crate) struct Alarm((Duration, u64));

impl Alarm {
    pub(crate) fn set(at: Instant, bell: &Arc<Condvar>) -> Self {
        with(|clock| {
            clock.timers_so_far += 1;
            let key = (at.0, clock.timers_so_far);
            clock.timers.insert(key, Timer { bell: Arc::clone(bell), rung: false });
            Alarm(key)
        })
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        with(|clock| clock.timers.remove(&self.0));
    }
}

impl Instant {
    pub(crate) fn now() -> Self {
        Instant(with(|clock| clock.now))
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }

    pub(crate) fn saturating_duration_since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn checked_add(self, time: Duration) -> Option<Self> {
        self.0.checked_add(time).map(Instant)
    }

    pub(crate) fn since_the_beginning(self) -> Duration {
        self.0
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, time: Duration) -> Instant {
        Instant(self.0 + time)
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, time: Duration) {
        self.0 += time;
    }
}

/// Lets time pass, for who looks for something again and again.
pub(crate) fn pass(time: Duration) {
    with(|clock| clock.now += time);
}
