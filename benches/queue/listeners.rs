//! A process of its own whose threads wait for messages.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pushpop_measure::{Bed, Result, number};
use pushpop_pg::{ErrorKind, Queue};

use crate::ours;

/// The argument that makes this program the other process.
pub(crate) const CHILD: &str = "--listen";

/// How long the threads have until all of them wait.
const SETTLING: Duration = Duration::from_millis(300);

/// The other process.
pub(crate) struct Listeners(Child);

/// A message's number, and when it was popped.
pub(crate) type Heard = (u64, Duration);

/// The time, as any process has it.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Listeners {
    /// Starts so many threads: all on one topic, or each on one of its own that begins with this name.
    pub(crate) fn start(
        bed: &Bed,
        keep: Option<Duration>,
        topic: &str,
        threads: usize,
        apart: bool,
    ) -> Result<Listeners> {
        let child = Command::new(std::env::current_exe()?)
            .args([CHILD, bed.url(), topic, &threads.to_string(), &apart.to_string()])
            .args(keep.map(|keep| keep.as_secs_f64().to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut listeners = Listeners(child);
        let mut said = [0; 6];
        if let Some(stdout) = &mut listeners.0.stdout {
            stdout.read_exact(&mut said).map_err(|_| "the listening process did not start")?;
        }
        thread::sleep(SETTLING);
        Ok(listeners)
    }

    /// Ends the process, and returns what it popped and completed.
    pub(crate) fn finish(mut self) -> Result<Vec<Heard>> {
        drop(self.0.stdin.take());
        let mut heard = Vec::new();
        if let Some(stdout) = self.0.stdout.take() {
            for line in BufReader::new(stdout).lines() {
                heard.push(parse(&line?)?);
            }
        }
        if self.0.wait()?.success() { Ok(heard) } else { Err("the listening process failed".into()) }
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        // It ends by itself when its standard input does.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn parse(line: &str) -> Result<Heard> {
    let (number, nanos) = line.split_once(' ').ok_or("the listening process said something odd")?;
    Ok((number.parse()?, Duration::from_nanos(nanos.parse()?)))
}

/// Is the other process: pops and completes until its standard input ends, and then says what.
pub(crate) fn child(words: &[String]) -> Result<()> {
    let [url, topic, threads, apart, keep @ ..] = words else { return Err("too few words".into()) };
    let (threads, apart): (usize, bool) = (threads.parse()?, apart.parse()?);
    let keep = keep.first().map(|keep| keep.parse().map(Duration::from_secs_f64)).transpose()?;
    let queue = ours::join(url, ours::SCHEMA, keep)?;
    let heard = Mutex::new(Vec::new());
    thread::scope(|scope| -> Result<()> {
        let listeners: Vec<_> = (0..threads)
            .map(|i| {
                let (queue, heard) = (&queue, &heard);
                let topic = if apart { format!("{topic} {i}") } else { topic.clone() };
                scope.spawn(move || {
                    let mine = listen(queue, &topic)?;
                    heard.lock().unwrap_or_else(PoisonError::into_inner).extend(mine);
                    Ok(())
                })
            })
            .collect();
        println!("ready");
        std::io::stdin().lock().read_to_end(&mut Vec::new())?;
        queue.close();
        listeners.into_iter().try_for_each(|listener| listener.join().map_err(|_| "a listener panicked")?)
    })?;
    let mut out = std::io::stdout().lock();
    for (number, at) in heard.into_inner().unwrap_or_else(PoisonError::into_inner) {
        writeln!(out, "{number} {}", at.as_nanos())?;
    }
    Ok(out.flush()?)
}

fn listen(queue: &Queue, topic: &str) -> Result<Vec<Heard>> {
    let mut heard = Vec::new();
    loop {
        let lease = match queue.pop(topic) {
            Err(e) if e.kind() == ErrorKind::Closed => return Ok(heard),
            popped => popped?,
        };
        let at = now();
        let number = number(lease.payload())?;
        lease.complete()?;
        heard.push((number, at));
    }
}
