//! Imports a file of at least 100,000 lines, works it with eight threads in two processes, kills one of
//! them half-way, and accounts for every line.
//!
//! ```text
//! cargo run --release --example import [FILE]
//! ```
//!
//! Without a file, the lines of what this machine has are taken until there are enough: its
//! dictionary, the list of the files its packages have installed, the names of the packages it could
//! install, the sources of the crates that cargo has downloaded.
//!
//! The id of a message is the number of its line, so an import that was cut short can be repeated. A
//! worker pops messages, compares each payload with its line, notes the deliveries in a file of its own,
//! and completes them. What a killed worker held comes back when its leases expire, after five
//! seconds, and is delivered again.

use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::{NewMessage, Queue};
use uuid::Uuid;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

const TOPIC: &str = "lines";
const LEAST: usize = 100_000;
const WORKERS: usize = 2;
const THREADS: usize = 4;
const BATCH: usize = 100;
const LEASE: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["work", url, schema, file, log] => work(url, schema, Path::new(file), Path::new(log)),
        [] => import(None),
        [file] => import(Some(Path::new(file))),
        _ => Err("usage: import [FILE]".into()),
    }
}

fn import(file: Option<&Path>) -> Result<()> {
    let dir = Dir::make()?;
    let file = match file {
        Some(file) => file.to_owned(),
        None => find_lines(&dir.0.join("lines"))?,
    };
    let text = fs::read(&file)?;
    let lines = split(&text);
    assert!(lines.len() >= LEAST, "{} has {} lines, fewer than {LEAST}", file.display(), lines.len());

    let (url, _server) = pushpop_server::database_url("DATABASE_URL").map_err(|e| e.to_string())?;
    let schema = format!("pushpop_import_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;
    let topic = queue.topic(TOPIC);

    let begun = Instant::now();
    for (batch, part) in lines.chunks(1_000).enumerate() {
        queue.push_many(TOPIC, part.iter().zip(batch * 1_000..).map(message))?;
    }
    println!("{} lines pushed in {:.1?}", lines.len(), begun.elapsed());
    // A part that is imported again changes nothing.
    queue.push_many(TOPIC, lines[..1_000].iter().zip(0..).map(message))?;
    assert_eq!(topic.stats()?.ready(), lines.len() as u64);

    let begun = Instant::now();
    let logs: Vec<PathBuf> = (0..WORKERS).map(|n| dir.0.join(format!("worker-{n}"))).collect();
    let mut workers = Vec::new();
    for log in &logs {
        let mut command = Command::new(env::current_exe()?);
        command.args(["work", &url, &schema]).arg(&file).arg(log).stdin(Stdio::piped());
        workers.push(Worker(command.spawn()?));
    }
    wait_until_settled(&queue, lines.len() / 2, &mut workers)?;
    // SIGKILL: it can do nothing about what it holds.
    let mut killed = workers.swap_remove(0);
    killed.0.kill()?;
    killed.0.wait()?;
    println!("one of {WORKERS} workers killed after {:.1?}", begun.elapsed());

    wait_until_settled(&queue, lines.len(), &mut workers)?;
    println!("all lines settled after {:.1?}", begun.elapsed());
    for mut worker in workers {
        // The end of its input tells a worker to stop.
        drop(worker.0.stdin.take());
        assert!(worker.0.wait()?.success(), "a worker failed");
    }

    let tally = Tally::read(&logs)?;
    println!("{} lines", lines.len());
    println!("{} deliveries noted", tally.deliveries);
    println!("{} lines delivered again after the kill, {} of them noted before", tally.again, tally.twice);
    println!("{} lines lost", lines.len() - tally.lines);
    assert_eq!(tally.lines, lines.len(), "every line is delivered");
    assert_eq!(tally.deliveries, tally.lines + tally.twice, "no line more than twice");
    assert!((1..=THREADS * BATCH).contains(&tally.again), "what the killed worker held, and nothing else");
    let stats = topic.stats()?;
    assert_eq!((stats.settled(), stats.dead()), (lines.len() as u64, 0));
    assert_eq!((stats.ready(), stats.delayed(), stats.leased()), (0, 0, 0));

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}

fn message((line, number): (&&[u8], usize)) -> NewMessage {
    NewMessage::new(*line).with_id(Uuid::from_u128(number as u128))
}

/// Waits until so many messages are settled, as long as the workers run.
fn wait_until_settled(queue: &Queue, count: usize, workers: &mut [Worker]) -> Result<()> {
    while queue.topic(TOPIC).stats()?.settled() < count as u64 {
        for worker in &mut *workers {
            if let Some(status) = worker.0.try_wait()? {
                return Err(format!("a worker ended: {status}").into());
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A worker process, which ends with this one whatever happens.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// The worker process.

fn work(url: &str, schema: &str, file: &Path, log: &Path) -> Result<()> {
    let text = fs::read(file)?;
    let lines = split(&text);
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let queue = Queue::builder().schema(schema).lease(LEASE).connect(url)?;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                if let Err(e) = handle(&queue, &lines, &log) {
                    eprintln!("{e}");
                    std::process::exit(1);
                }
            });
        }
        // The end of the input says that it is time to stop.
        std::io::stdin().read_to_end(&mut Vec::new())?;
        queue.close();
        Ok(())
    })
}

fn handle(queue: &Queue, lines: &[&[u8]], mut log: &File) -> Result<()> {
    loop {
        let mut leases = match queue.pop_many(TOPIC, BATCH, Duration::MAX) {
            Err(e) if e.kind() == pushpop_pg::ErrorKind::Closed => return Ok(()),
            leases => leases?,
        };
        while !leases.is_empty() {
            let part: Vec<_> = leases.drain(..leases.len().min(10)).collect();
            let mut notes = String::new();
            for lease in &part {
                let number = usize::try_from(lease.id().as_u128())?;
                if lines.get(number) != Some(&lease.payload()) {
                    return Err(format!("line {number} was delivered with another payload").into());
                }
                writeln!(notes, "{number} {}", lease.attempt())?;
            }
            // In one piece, so that a kill leaves all of it or nothing.
            log.write_all(notes.as_bytes())?;
            // A lease that was lost meanwhile is somebody else's by now.
            queue.complete_many(part)?;
        }
    }
}

// The tally.

struct Tally {
    lines: usize,
    deliveries: usize,
    again: usize,
    twice: usize,
}

impl Tally {
    fn read(logs: &[PathBuf]) -> Result<Tally> {
        let mut noted: HashMap<usize, (usize, u32)> = HashMap::new();
        for log in logs {
            for note in fs::read_to_string(log)?.lines() {
                let (number, attempt) = note.split_once(' ').ok_or("a note without an attempt")?;
                let known = noted.entry(number.parse()?).or_default();
                *known = (known.0 + 1, known.1.max(attempt.parse()?));
            }
        }
        Ok(Tally {
            lines: noted.len(),
            deliveries: noted.values().map(|n| n.0).sum(),
            again: noted.values().filter(|n| n.1 > 1).count(),
            twice: noted.values().filter(|n| n.0 > 1).count(),
        })
    }
}

// The input.

/// The lines of a text, without their ends.
fn split(text: &[u8]) -> Vec<&[u8]> {
    text.strip_suffix(b"\n").unwrap_or(text).split(|byte| *byte == b'\n').collect()
}

/// Finds enough lines on this machine, and returns the file they are in: `own`, or a dictionary.
fn find_lines(own: &Path) -> Result<PathBuf> {
    let words = Path::new("/usr/share/dict/words");
    if fs::read(words).is_ok_and(|text| split(&text).len() >= LEAST) {
        println!("the lines of {}", words.display());
        return Ok(words.to_owned());
    }
    let mut text = Vec::new();
    for source in [installed_files, package_names, crate_sources] {
        text.extend(source());
        let lines = split(&text);
        if lines.len() >= LEAST {
            fs::write(own, lines[..lines.len().min(2 * LEAST)].join(&b'\n'))?;
            return Ok(own.to_owned());
        }
    }
    Err(format!("no {LEAST} lines were found: name a file").into())
}

fn installed_files() -> Vec<u8> {
    println!("the lines of the list of installed files");
    texts(Path::new("/var/lib/dpkg/info"), ".list")
}

fn package_names() -> Vec<u8> {
    println!("the names of packages");
    let names = Command::new("apt-cache").arg("pkgnames").stderr(Stdio::null()).output();
    names.map(|output| output.stdout).unwrap_or_default()
}

fn crate_sources() -> Vec<u8> {
    println!("the lines of the sources of downloaded crates");
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(env::home_dir()?.join(".cargo")));
    texts(&home.unwrap_or_default().join("registry/src"), ".rs")
}

/// All files in a directory and those below whose names end like that, one after the other.
fn texts(dir: &Path, end: &str) -> Vec<u8> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    let text = |path: PathBuf| match path.is_dir() {
        true => texts(&path, end),
        false if path.to_string_lossy().ends_with(end) => fs::read(path).unwrap_or_default(),
        false => Vec::new(),
    };
    paths.into_iter().flat_map(text).collect()
}

/// A directory that is gone when the program ends.
struct Dir(PathBuf);

impl Dir {
    fn make() -> Result<Dir> {
        let dir = env::temp_dir().join(format!("pushpop-import-{}", std::process::id()));
        fs::create_dir(&dir)?;
        Ok(Dir(dir))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
