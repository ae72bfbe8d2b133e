//! Other processes: their states, and signals to them.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;

struct Process {
    pid: u32,
    parent: u32,
    state: char,
}

impl Process {
    /// Whether it is stopped or dead: in any case, runs no more.
    fn is_still(&self) -> bool {
        matches!(self.state, 'T' | 't') || self.is_dead()
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// Sends a signal. A process that is gone already is no error: the state afterwards counts.
pub(crate) fn signal(name: &str, pids: &[u32]) -> Result<(), Error> {
    // The shell's own `kill`, as small images lack the program.
    Command::new("/bin/sh")
        .args(["-c", r#"kill -s "$0" -- "$@""#, name])
        .args(pids.iter().map(u32::to_string))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map(drop)
        .map_err(Error::doing(format!("sending SIG{name}")))
}

/// Stops a process, and returns its children: no more of them can come while it is stopped.
pub(crate) fn freeze(pid: u32) -> Result<Vec<u32>, Error> {
    signal("STOP", &[pid])?;
    wait_until_all("stopped", &[pid], Process::is_still)?;
    children(pid)
}

/// Stops processes, and returns when they are stopped.
pub(crate) fn stop(pids: &[u32]) -> Result<(), Error> {
    signal("STOP", pids)?;
    wait_until_all("stopped", pids, Process::is_still)
}

/// Kills processes, and returns when they are dead, if perhaps not yet reaped.
pub(crate) fn kill(pids: &[u32]) -> Result<(), Error> {
    signal("KILL", pids)?;
    wait_until_all("dead", pids, Process::is_dead)
}

pub(crate) fn children(pid: u32) -> Result<Vec<u32>, Error> {
    let all = processes()?.into_iter();
    Ok(all.filter(|p| p.parent == pid).map(|p| p.pid).collect())
}

/// Looks again and again until `look` finds something, and gives up after `limit` with `None`.
pub(crate) fn poll<T>(
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<Option<T>, Error> {
    let deadline = Instant::now() + limit;
    loop {
        let found = look()?;
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn wait_until_all(what: &str, pids: &[u32], holds: fn(&Process) -> bool) -> Result<(), Error> {
    poll(Duration::from_secs(30), || {
        let awaited = |p: &Process| pids.contains(&p.pid) && !holds(p);
        Ok((!processes()?.iter().any(awaited)).then_some(()))
    })?
    .ok_or_else(|| Error::new(format!("processes {pids:?} are not all {what} after 30 s")))
}

/// Lists the processes, from `/proc` where it is Linux's: small images lack `ps`.
fn processes() -> Result<Vec<Process>, Error> {
    if !fs::exists("/proc/self/stat").unwrap_or(false) {
        let output = Command::new("ps")
            .args(["-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="])
            .output()
            .map_err(Error::doing("running ps"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        return Ok(text.lines().filter_map(from_ps).collect());
    }
    Ok(fs::read_dir("/proc")
        .map_err(Error::doing("reading /proc"))?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .filter_map(|entry| from_proc(&fs::read(entry.path().join("stat")).ok()?))
        .collect())
}

/// Reads one line of `ps`: process, parent, state.
fn from_ps(line: &str) -> Option<Process> {
    let mut fields = line.split_whitespace();
    Some(Process {
        pid: fields.next()?.parse().ok()?,
        parent: fields.next()?.parse().ok()?,
        state: fields.next()?.chars().next()?,
    })
}

/// Reads `/proc/PID/stat`: process, name in brackets, state, parent, and more. A name may hold
/// anything, brackets too.
fn from_proc(stat: &[u8]) -> Option<Process> {
    let stat = String::from_utf8_lossy(stat);
    let (head, tail) = stat.rsplit_once(") ")?;
    let mut fields = tail.split(' ');
    Some(Process {
        pid: head.split(' ').next()?.parse().ok()?,
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}
