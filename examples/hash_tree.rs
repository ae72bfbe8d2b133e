//! Walks a tree of files with three processes of eight threads, and hashes each file, while files vanish,
//! handlers panic, one process is killed and another is told to end; then accounts for every file.
//!
//! ```text
//! cargo run --release --features signals --example hash_tree -- [--tree DIR]
//! ```
//!
//! Without a tree, one of 2,000 files is made. What is walked is a copy of the tree by hard links (or a real one
//! where its files cannot be linked, as on another file system than the temporary directory), so that files can
//! vanish: nothing in the tree is changed, and nothing should change in it meanwhile. Symbolic links, special files
//! and what cannot be read are left out.
//!
//! The topic `directories` has a message for each directory, whose handler pushes a message for each directory and
//! each file in it, in the transaction that completes its own: so each directory is listed exactly once. The
//! topic `files` has a message for each file; its hash is stored in the transaction that completes the message.
//! A payload is a path below the root, in bytes: a path need not be UTF-8.

use std::collections::HashMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio, Termination};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::postgres::types::ToSql;
use pushpop_pg::{Backoff, BoxError, Failure, Job, Outcome, Queue, Worker};
use sha2::{Digest, Sha256};

type Result<T, E = BoxError> = std::result::Result<T, E>;

const DIRECTORIES: &str = "directories";
const FILES: &str = "files";
const PROCESSES: usize = 3;
/// Of each process, for directories and for files.
const THREADS: (usize, usize) = (2, 6);
/// Says how soon the messages of the process that is killed are free again.
const LEASE: Duration = Duration::from_secs(10);
/// Longer than anything here should take.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> Result<ExitCode> {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    match args.iter().map(OsString::as_os_str).collect::<Vec<_>>()[..] {
        [role, schema, root, number] if role == "work" => {
            work(&schema.to_string_lossy(), Path::new(root), number.to_string_lossy().parse()?)
        }
        [] => walk(None),
        [option, tree] if option == "--tree" => walk(Some(Path::new(tree))),
        _ => Err("usage: hash_tree [--tree DIR]".into()),
    }
}

fn walk(tree: Option<&Path>) -> Result<ExitCode> {
    let dir = Dir::make()?;
    let original = match tree {
        Some(tree) => fs::canonicalize(tree)?,
        None => make_tree(dir.0.join("made"))?,
    };
    let begun = Instant::now();
    let tree = Tree::copy(original, dir.0.join("tree"), &dir.0)?;
    println!(
        "{} files in {} directories, copied in {:.1?}; {} other things are left out",
        tree.files.len(),
        tree.directories,
        begun.elapsed(),
        tree.left_out
    );

    let (url, _server) = pushpop_server::database_url("DATABASE_URL").map_err(|e| e.to_string())?;
    let schema = format!("pushpop_hash_tree_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;
    // A message that had its effect twice would violate a key at its second attempt and all that follow: it
    // would be dead at the end, and nothing is to be.
    queue.transaction(|tx| {
        Ok(tx.batch_execute(&format!(
            "create table {schema}.hashes (
                 path bytea primary key,
                 sha256 bytea,  -- null: it had vanished
                 size bigint,
                 process integer not null,
                 failures text[] not null
             );
             create table {schema}.directories (
                 path bytea primary key,
                 process integer not null,
                 failures text[] not null
             )"
        ))?)
    })?;

    let begun = Instant::now();
    queue.push(DIRECTORIES, "")?;
    let mut crew =
        Crew { queue: &queue, tree: &tree, url: &url, schema: &schema, processes: vec![], started: 0 };
    for _ in 0..PROCESSES {
        crew.start()?;
    }
    let mut doomed = tree.doomed();
    let count = tree.files.len();

    crew.watch_until(count / 3, &mut doomed)?;
    // SIGKILL: it can do nothing about what it holds.
    let mut killed = crew.processes.remove(0);
    killed.child.kill()?;
    killed.child.wait()?;
    println!("process {} killed after {:.1?}", killed.number, begun.elapsed());
    crew.start()?;

    crew.watch_until(count * 2 / 3, &mut doomed)?;
    crew.processes.remove(0).end()?;
    crew.start()?;

    crew.watch_until_empty(&mut doomed)?;
    let took = begun.elapsed();
    for process in crew.processes.drain(..) {
        process.end()?;
    }
    account(&queue, &schema, &tree, &dir.0.join("names"), took)?;

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

// The processes.

struct Crew<'a> {
    queue: &'a Queue,
    tree: &'a Tree,
    url: &'a str,
    schema: &'a str,
    processes: Vec<Process>,
    started: i32,
}

impl Crew<'_> {
    fn start(&mut self) -> Result<()> {
        let mut child = Command::new(env::current_exe()?)
            .env("DATABASE_URL", self.url)
            .args(["work", self.schema])
            .arg(&self.tree.root)
            .arg(self.started.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().map(BufReader::new).ok_or("no pipe")?;
        self.processes.push(Process { number: self.started, child, _stdin: stdin, stdout });
        self.started += 1;
        Ok(())
    }

    /// Waits until so many files are in the table, and has those that are doomed vanish meanwhile.
    fn watch_until(&mut self, hashed: usize, doomed: &mut Vec<PathBuf>) -> Result<()> {
        self.watch(doomed, |_, done| Ok(done >= hashed))
    }

    /// Waits until nothing is left to do.
    fn watch_until_empty(&mut self, doomed: &mut Vec<PathBuf>) -> Result<()> {
        self.watch(doomed, |queue, _| {
            let directories = queue.topic(DIRECTORIES).stats()?;
            let files = queue.topic(FILES).stats()?;
            // Without directories there will be no more files; but figures may be up to 2 s old.
            Ok(files.at() >= directories.at()
                && [directories, files].iter().all(|s| s.ready() + s.delayed() + s.leased() == 0))
        })
    }

    fn watch(
        &mut self,
        doomed: &mut Vec<PathBuf>,
        is_done: impl Fn(&Queue, usize) -> Result<bool>,
    ) -> Result<()> {
        let count = format!("select count(*) from {}.hashes", self.schema);
        let (all, mut last, mut moved) = (self.tree.files.len(), 0, Instant::now());
        loop {
            let begun = Instant::now();
            let row = self.queue.transaction(|tx| Ok(tx.query_one(&count, &[])?))?;
            let done = usize::try_from(row.try_get::<_, i64>(0)?)?;
            // All of them have vanished when half of the work is done: so some are hashed before.
            let keep = self.tree.to_vanish * all.saturating_sub(2 * done) / all;
            for path in doomed.drain(keep.min(doomed.len())..) {
                fs::remove_file(path)?;
            }
            if is_done(self.queue, done)? {
                return Ok(());
            }
            for process in &mut self.processes {
                if let Some(status) = process.child.try_wait()? {
                    return Err(format!("process {} has ended: {status}", process.number).into());
                }
            }
            if done > last {
                (last, moved) = (done, Instant::now());
            }
            if moved.elapsed() > PATIENCE {
                return Err(format!("nothing has moved for {PATIENCE:?}, after {done} files").into());
            }
            // To look on costs a tenth of a processor at most.
            thread::sleep(Duration::from_millis(10).max(begun.elapsed() * 10));
        }
    }
}

/// A process, which ends with this one whatever happens.
struct Process {
    number: i32,
    child: Child,
    /// Its end says that there is no parent any more.
    _stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Sends SIGTERM, and waits for the process to finish what it is at.
    fn end(mut self) -> Result<()> {
        // It listens for signals from here on.
        self.stdout.read_line(&mut String::new())?;
        let begun = Instant::now();
        let pid = self.child.id().to_string();
        // The shell's own `kill`, as small images lack the program.
        Command::new("/bin/sh").args(["-c", r#"kill -s TERM "$0""#, &pid]).status()?;
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if begun.elapsed() > PATIENCE => return Err("a process does not end".into()),
                None => thread::sleep(Duration::from_millis(1)),
            }
        };
        let took = begun.elapsed();
        let mut words = String::new();
        self.stdout.read_to_string(&mut words)?;
        println!("process {}: {} after {took:.1?}, {status}", self.number, words.trim());
        assert!(status.success(), "a process that is told to end does so in order");
        assert!(words.contains("stopped by signal 15"), "it says why it has ended");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// The work.

fn work(schema: &str, root: &Path, process: i32) -> Result<ExitCode> {
    thread::spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        // The parent is gone, and its server with it.
        std::process::exit(1);
    });
    // Panics are part of this example; their words go to the log and to the message.
    std::panic::set_hook(Box::new(|_| {}));
    let queue = Queue::builder()
        .schema(schema)
        .lease(LEASE)
        .pool_size(THREADS.0 + THREADS.1) // each handler may be in a transaction of its own
        .connect(&env::var("DATABASE_URL")?)?;
    let site = Site { queue: &queue, schema, root, process };
    let worker = Worker::new(&queue)
        .signals()
        .backoff(Backoff::fixed(Duration::from_millis(100)))
        .handle(DIRECTORIES, THREADS.0, |job| site.list(job))
        .handle(FILES, THREADS.1, |job| site.hash(job));
    println!("works");
    let ended = worker.run()?;
    println!("{ended}");
    Ok(ended.report())
}

struct Site<'a> {
    queue: &'a Queue,
    schema: &'a str,
    root: &'a Path,
    process: i32,
}

impl Site<'_> {
    /// Pushes what is in a directory.
    fn list(&self, job: &Job) -> Result<Outcome> {
        let path = Path::new(OsStr::from_bytes(job.payload()));
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.root.join(path))? {
            let entry = entry?;
            let topic = if entry.file_type()?.is_dir() { DIRECTORIES } else { FILES };
            entries.push((topic, path.join(entry.file_name())));
        }
        bad_luck();
        self.queue.transaction(|tx| {
            for (topic, path) in entries {
                self.queue.push_in(tx, topic, path.into_os_string().into_vec())?;
            }
            let insert = format!(
                "insert into {}.directories (path, process, failures) values ($1, $2, $3)",
                self.schema
            );
            tx.execute(&insert, &[&job.payload(), &self.process, &failures(job)])?;
            job.complete_in(tx)?;
            bad_luck();
            Ok(())
        })?;
        Ok(Outcome::Settled)
    }

    /// Stores the hash of a file, or that it has vanished.
    fn hash(&self, job: &Job) -> Result<Outcome> {
        let path = job.payload();
        let found = match sha256(&self.root.join(OsStr::from_bytes(path))) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            found => Some(found?),
        };
        let vanished = found.is_none();
        let (sha256, size) = found.unzip();
        let failures = failures(job);
        let row: [&(dyn ToSql + Sync); 5] = [&path, &sha256, &size, &self.process, &failures];
        let insert = format!(
            "insert into {}.hashes (path, sha256, size, process, failures) values ($1, $2, $3, $4, $5)",
            self.schema
        );
        bad_luck();
        if vanished {
            // The other way to have one effect: not together with the settling, but it can be repeated.
            let insert = format!("{insert} on conflict do nothing");
            self.queue.transaction(|tx| Ok(tx.execute(&insert, &row)?))?;
            bad_luck();
            return Ok(Outcome::Discard);
        }
        self.queue.transaction(|tx| {
            tx.execute(&insert, &row)?;
            job.complete_in(tx)?;
            bad_luck();
            Ok(())
        })?;
        Ok(Outcome::Settled)
    }
}

fn sha256(path: &Path) -> io::Result<(Vec<u8>, i64)> {
    let (mut file, mut hash, mut size) = (File::open(path)?, Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hash.finalize().to_vec(), size)),
            n => {
                hash.update(&buffer[..n]);
                size += n as i64;
            }
        }
    }
}

/// Two of these strike one handler in two hundred.
fn bad_luck() {
    if random().is_multiple_of(400) {
        panic!("bad luck");
    }
}

fn random() -> u64 {
    RandomState::new().hash_one(0)
}

fn failures(job: &Job) -> Vec<&str> {
    job.failures().iter().map(Failure::error).collect()
}

// The account.

/// Compares the table with the tree, and with what `sha256sum` says.
fn account(queue: &Queue, schema: &str, tree: &Tree, names: &Path, took: Duration) -> Result<()> {
    let (rows, directories, figures) = queue.transaction(|tx| {
        let rows = tx.query(&format!("select path, encode(sha256, 'hex') from {schema}.hashes"), &[])?;
        let directories = tx.query_one(&format!("select count(*) from {schema}.directories"), &[])?;
        let figures = tx.query_one(
            &format!(
                "with messages as (
                     select failures from {schema}.hashes union all select failures from {schema}.directories
                 )
                 select (select sum(size) from {schema}.hashes)::bigint,
                        (select count(*) from messages where failures <> '{{}}'),
                        count(*) filter (where error = 'panicked: bad luck'),
                        count(*) filter (where error = 'the lease expired'),
                        array_agg(error) filter (where error not in ('panicked: bad luck', 'the lease expired'))
                 from messages cross join lateral unnest(failures) error"
            ),
            &[],
        )?;
        Ok((rows, directories, figures))
    })?;
    let mut hashes = HashMap::new();
    for row in &rows {
        hashes.insert(row.try_get::<_, Vec<u8>>(0)?, row.try_get::<_, Option<String>>(1)?);
    }

    let directories = usize::try_from(directories.try_get::<_, i64>(0)?)?;
    assert_eq!(directories, tree.directories, "each directory is listed");
    for (topic, effects) in [(DIRECTORIES, directories), (FILES, rows.len())] {
        let stats = queue.topic(topic).stats()?;
        assert_eq!(
            (stats.settled(), stats.dead()),
            (effects as u64, 0),
            "each message of {topic} has one row"
        );
    }
    // Of those that vanished, some were hashed before, and some gone before their directory was listed.
    let (mut vanished, mut unseen) = (0, 0);
    for path in &tree.files {
        match hashes.get(path) {
            Some(Some(_)) => continue,
            Some(None) => vanished += 1,
            None => unseen += 1,
        }
        assert!(!tree.path(path).exists(), "{:?} is there, but not hashed", OsStr::from_bytes(path));
    }
    assert_eq!(rows.len() + unseen, tree.files.len(), "there is no row but those of files");

    let said = sha256sum(&tree.original, hashes.iter().filter(|(_, h)| h.is_some()).map(|(p, _)| p), names)?;
    for (path, hash) in &hashes {
        let same = hash.as_ref() == said.get(path);
        assert!(same, "{:?} has another hash", OsStr::from_bytes(path));
    }

    let (bytes, again): (i64, i64) = (figures.try_get(0)?, figures.try_get(1)?);
    let (panics, expired): (i64, i64) = (figures.try_get(2)?, figures.try_get(3)?);
    let seconds = took.as_secs_f64();
    println!("{} files, {bytes} bytes hashed in {seconds:.1} s", said.len());
    println!("{:.0} files/s, {:.0} MB/s", said.len() as f64 / seconds, bytes as f64 / seconds / 1e6);
    println!(
        "{} files removed: {vanished} had vanished when their message came, {unseen} before it was pushed, {} were hashed before",
        tree.to_vanish,
        tree.to_vanish - vanished - unseen
    );
    println!("{again} messages delivered again: {panics} after a panic, {expired} from the killed process");
    println!("all hashes are those of sha256sum");
    assert_eq!(figures.try_get::<_, Option<Vec<String>>>(4)?, None, "nothing else has failed");
    // Some of its threads may have been waiting for a message just then.
    let threads = i64::try_from(THREADS.0 + THREADS.1)?;
    assert!(expired <= threads, "what the killed process held comes back, and nothing else");
    Ok(())
}

/// What `sha256sum` says about files below a directory.
fn sha256sum<'a>(
    dir: &Path,
    paths: impl Iterator<Item = &'a Vec<u8>>,
    names: &Path,
) -> Result<HashMap<Vec<u8>, String>> {
    let list: Vec<Vec<u8>> = paths.map(|path| [b"./", &path[..], b"\0"].concat()).collect();
    fs::write(names, list.concat())?;
    let output = Command::new("xargs")
        .args(["-0", "sha256sum", "--zero"])
        .current_dir(dir)
        .stdin(File::open(names)?)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("xargs sha256sum: {}", output.status).into());
    }
    let mut said = HashMap::new();
    for line in output.stdout.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
        // The hash, a blank, a blank or an asterisk, and the name.
        let (hash, name) = line.split_at_checked(64).ok_or("sha256sum says something else")?;
        said.insert(name[4..].to_vec(), String::from_utf8(hash.to_vec())?);
    }
    Ok(said)
}

// The tree.

struct Tree {
    original: PathBuf,
    /// The copy.
    root: PathBuf,
    /// The paths of all files below the root, in bytes.
    files: Vec<Vec<u8>>,
    directories: usize,
    left_out: usize,
    /// How many files are to vanish.
    to_vanish: usize,
}

impl Tree {
    /// Copies a tree by hard links, without the directory `except`.
    fn copy(original: PathBuf, root: PathBuf, except: &Path) -> Result<Tree> {
        let mut tree = Tree { original, root, files: vec![], directories: 0, left_out: 0, to_vanish: 0 };
        tree.copy_directory(Path::new(""), except)?;
        if tree.files.is_empty() {
            return Err(format!("there are no files in {}", tree.original.display()).into());
        }
        tree.to_vanish = tree.files.len().div_ceil(100);
        Ok(tree)
    }

    fn copy_directory(&mut self, path: &Path, except: &Path) -> Result<()> {
        let (from, to) = (self.original.join(path), self.root.join(path));
        let entries = match fs::read_dir(&from) {
            Ok(entries) if from != except => entries,
            _ => {
                self.left_out += 1;
                return Ok(());
            }
        };
        fs::create_dir(&to)?;
        self.directories += 1;
        for entry in entries {
            let entry = entry?;
            let path = path.join(entry.file_name());
            let (kind, from, to) = (entry.file_type()?, entry.path(), to.join(entry.file_name()));
            if kind.is_dir() {
                self.copy_directory(&path, except)?;
            } else if kind.is_file() && File::open(&from).is_ok() {
                if fs::hard_link(&from, &to).is_err() {
                    fs::copy(&from, &to)?;
                }
                self.files.push(path.into_os_string().into_vec());
            } else {
                self.left_out += 1;
            }
        }
        Ok(())
    }

    fn path(&self, path: &[u8]) -> PathBuf {
        self.root.join(OsStr::from_bytes(path))
    }

    /// The files that are to vanish, a random one in a hundred, in random order.
    fn doomed(&self) -> Vec<PathBuf> {
        let mut files: Vec<&Vec<u8>> = self.files.iter().collect();
        files.sort_by_cached_key(|_| random());
        files[..self.to_vanish].iter().map(|path| self.path(path)).collect()
    }
}

/// Makes a tree of files, some of which have odd names.
fn make_tree(root: PathBuf) -> Result<PathBuf> {
    for n in 0..2_000_usize {
        let dir = root.join((n % 10).to_string()).join((n / 10 % 10).to_string());
        let name = match n % 200 {
            0 => b"not UTF-8: \xff".to_vec(),
            1 => b"two\nlines".to_vec(),
            2 => b"back\\slash".to_vec(),
            3 => b"-".to_vec(),
            _ => b"file".to_vec(),
        };
        let name = [name, format!(" {n}").into_bytes()].concat();
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(OsStr::from_bytes(&name)), n.to_string().repeat(n))?;
    }
    Ok(root)
}

/// A directory that is gone when the program ends.
struct Dir(PathBuf);

impl Dir {
    fn make() -> Result<Dir> {
        let dir =
            fs::canonicalize(env::temp_dir())?.join(format!("pushpop-hash-tree-{}", std::process::id()));
        fs::create_dir(&dir)?;
        Ok(Dir(dir))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
