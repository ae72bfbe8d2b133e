//! Which thread goes on next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};

use super::clock;

/// Numbers that follow from a seed (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap_or_default()
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// How the next thread is chosen: one way finds what the other does not.
#[derive(Clone, Copy)]
enum Manner {
    /// All are alike.
    Even,
    /// Mostly the one that went on last.
    Sticky,
    /// By rank; now and then, and when it yields, the one that goes on becomes the last of all.
    Ranked,
}

/// How far it has come.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) begun: AtomicUsize,
    /// Of the schedule that was begun last.
    pub(crate) seed: AtomicU64,
}

/// Schedules at random, each by a seed of its own. Time passes only when nobody can go on.
pub(crate) struct Schedules {
    left: usize,
    seeds: Numbers,
    seed: u64,
    progress: Arc<Progress>,
    choices: Numbers,
    data: Numbers,
    manner: Manner,
    /// Those that became the last of all, the last one last.
    demoted: Vec<TaskId>,
}

impl Schedules {
    /// So many schedules, the first of which is the one of this seed.
    pub(crate) fn new(first: u64, count: usize, progress: &Arc<Progress>) -> Self {
        Schedules {
            left: count,
            seeds: Numbers(first),
            seed: first,
            progress: Arc::clone(progress),
            choices: Numbers(0),
            data: Numbers(0),
            manner: Manner::Even,
            demoted: Vec::new(),
        }
    }

    fn demote(&mut self, task: TaskId) {
        self.demoted.retain(|other| *other != task);
        self.demoted.push(task);
    }

    /// The lower, the sooner.
    fn rank(&self, task: TaskId) -> (Option<usize>, u64) {
        let demoted = self.demoted.iter().position(|other| *other == task);
        (demoted, mix(self.seed.wrapping_add(usize::from(task) as u64)))
    }
}

impl Scheduler for Schedules {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.left = self.left.checked_sub(1)?;
        let seed = self.seeds.0;
        self.seeds.next();
        self.seed = seed;
        self.progress.seed.store(seed, Ordering::Relaxed);
        self.progress.begun.fetch_add(1, Ordering::Relaxed);
        self.choices = Numbers(mix(seed));
        self.data = Numbers(mix(!seed));
        self.manner = [Manner::Even, Manner::Sticky, Manner::Ranked][self.choices.below(3)];
        self.demoted.clear();
        Some(Schedule::new(seed))
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, yields: bool) -> Option<TaskId> {
        let clock = clock::task();
        let mut tasks: Vec<TaskId> =
            runnable.iter().map(|task| task.id()).filter(|id| Some(*id) != clock).collect();
        if let Some(clock) = clock.filter(|_| tasks.len() < runnable.len()) {
            if tasks.is_empty() {
                return Some(clock);
            }
            if clock::is_due() {
                tasks.push(clock);
            } else if clock::can_leap() && self.choices.below(64) == 0 {
                clock::leap();
                return Some(clock);
            }
        }
        let stays = current.filter(|current| tasks.contains(current) && !yields);
        let any = tasks[self.choices.below(tasks.len())];
        Some(match self.manner {
            Manner::Even => any,
            Manner::Sticky => stays.filter(|_| self.choices.below(8) > 0).unwrap_or(any),
            Manner::Ranked => {
                let tires = yields || self.choices.below(48) == 0;
                if let Some(current) = current.filter(|_| tires) {
                    self.demote(current);
                }
                tasks.iter().copied().min_by_key(|task| self.rank(*task)).unwrap_or(any)
            }
        })
    }

    fn next_u64(&mut self) -> u64 {
        self.data.next()
    }
}
