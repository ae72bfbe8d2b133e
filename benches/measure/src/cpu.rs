//! CPU time of processes, from `/proc`.

use std::fs;
use std::time::Duration;

/// The unit of the times in `/proc/PID/stat`: a hundredth of a second, on every Linux.
const TICK: Duration = Duration::from_millis(10);

struct Stat {
    parent: u32,
    own: u64,
    /// Of children that have ended.
    ended: u64,
}

/// What this process has used so far.
pub(crate) fn own() -> Option<Duration> {
    Some(time(stat("self")?.own))
}

/// What a process and all its children have used so far, those that have ended included.
pub(crate) fn family(pid: u32) -> Option<Duration> {
    let first = stat(&pid.to_string())?;
    let children = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        if !name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        stat(&name).filter(|stat| stat.parent == pid)
    });
    Some(time(first.own + first.ended + children.map(|child| child.own).sum::<u64>()))
}

/// What a process has used so far, to the nanosecond.
pub(crate) fn exact(pid: i32) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

fn stat(process: &str) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in brackets, may hold anything. The fields after it begin with the third, the state.
    let (_, fields) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = |i: usize| -> Option<u64> { fields.get(i)?.parse().ok() };
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        own: ticks(11)? + ticks(12)?,
        ended: ticks(13)? + ticks(14)?,
    })
}

fn time(ticks: u64) -> Duration {
    TICK * u32::try_from(ticks).unwrap_or(u32::MAX)
}
