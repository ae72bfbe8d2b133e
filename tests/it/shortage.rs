//! A process that can start no more threads for a while.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use pushpop_pg::{Error, ErrorKind, Queue, Worker};

use crate::world::{
    SOON, World, apart, builder_apart, drain, is_apart, pop, stats, succeeds, text, until, url,
};

/// Runs a test apart as a user to whom limits apply: to root they do not.
fn limited(test: &str) {
    let world = World::new();
    world.queue().push_many("stored", ["a", "b", "c"]).unwrap();
    let mut command = apart(test, &world);
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let program = std::env::temp_dir().join(&world.schema);
    if is_root {
        // Of which root's directories are not to be read by others.
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let mut other = Command::new(&program);
        other.args(command.get_args()).uid(61_234).gid(61_234).current_dir("/");
        command.get_envs().for_each(|(name, value)| _ = other.env(name, value.unwrap()));
        command = other;
    }
    let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| succeeds(command)));
    let _ = std::fs::remove_file(program);
    said.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// How many threads and processes this user may have from now on, at most.
fn allow(count: &str) {
    let me = std::process::id().to_string();
    let status = Command::new("prlimit").args(["--pid", &me, &format!("--nproc={count}:")]).status();
    assert!(status.unwrap().success());
}

#[track_caller]
fn cannot(result: Result<(), Error>) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
    assert!(error.to_string().contains("cannot start a thread"), "{error}");
    assert!(error.is_retryable() && !error.is_indeterminate(), "{error:?}");
}

/// The threads for flights of this process.
fn flights() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with("pushpop-flight")).count()
}

/// Begins with a queue that has no thread for flights yet. Afterwards `allow` cannot be called: it takes a process.
fn open_without_threads() -> Queue {
    let queue = builder_apart().connect(url()).unwrap();
    allow("1");
    queue
}

/// Raises the limit again, by a process that was there before.
struct Relief(std::process::Child);

impl Relief {
    fn prepared() -> Self {
        let me = std::process::id();
        let script = format!("read pause; sleep $pause; exec prlimit --pid {me} --nproc=500:");
        let shell = Command::new("sh").args(["-c", &script]).stdin(std::process::Stdio::piped()).spawn();
        Relief(shell.unwrap())
    }

    fn comes_in(&mut self, seconds: u64) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{seconds}").unwrap();
    }

    fn comes(mut self) {
        self.comes_in(0);
        assert!(self.0.wait().unwrap().success());
    }
}

#[test]
fn smoke() {
    if !is_apart() {
        return limited("shortage::smoke");
    }
    let relief = Relief::prepared();
    let queue = open_without_threads();
    cannot(queue.push("t", "m").map(drop));
    relief.comes();
    queue.push("t", "m").unwrap();
}

#[test]
fn what_failed_for_want_of_a_thread_is_not_carried_out_later() {
    if !is_apart() {
        return limited("shortage::what_failed_for_want_of_a_thread_is_not_carried_out_later");
    }
    let relief = Relief::prepared();
    let queue = open_without_threads();
    cannot(queue.push("t", "m").map(drop));
    cannot(queue.push_many("t", ["m", "n"]).map(drop));
    cannot(queue.try_pop("stored").map(drop));
    cannot(queue.topic("stored").purge().map(drop));
    cannot(queue.topic("stored").pause());
    cannot(queue.transaction(|tx| queue.push_in(tx, "t", "m")).map(drop));
    cannot(Worker::new(&queue).handle("stored", 2, |_| Ok(())).run().map(drop));
    relief.comes();
    queue.push("t", "the one").unwrap();
    assert_eq!(drain(&queue, "t"), ["the one"]);
    let figures = stats(&queue, "stored");
    assert_eq!((figures.ready(), figures.leased(), figures.paused()), (3, 0, false));
}

#[test]
fn a_settle_that_failed_for_want_of_a_thread_has_not_settled() {
    if !is_apart() {
        return limited("shortage::a_settle_that_failed_for_want_of_a_thread_has_not_settled");
    }
    let relief = Relief::prepared();
    let queue = builder_apart().connect(url()).unwrap();
    let lease = pop(&queue, "stored");
    // Half a minute without work, and there is none for flights.
    let since = Instant::now();
    while flights() > 0 {
        assert!(since.elapsed() < SOON * 4, "they go on");
        std::thread::sleep(Duration::from_millis(100));
    }
    allow("1");
    let (lease, error) = lease.discard().unwrap_err().into_parts();
    cannot(Err(error));
    relief.comes();
    queue.push("t", "m").unwrap();
    lease.complete().unwrap();
    assert_eq!(stats(&queue, "stored").settled(), 1);
}

/// Those that wait for a message wait for a thread as well.
#[test]
fn waiting_pops_wait_for_a_thread() {
    if !is_apart() {
        return limited("shortage::waiting_pops_wait_for_a_thread");
    }
    let mut relief = Relief::prepared();
    let queue = open_without_threads();
    let error = queue.pop_timeout("stored", Duration::from_millis(300)).map(drop).unwrap_err();
    cannot(Err(error));
    let begun = Instant::now();
    cannot(queue.pop_any(&["stored", "t"], Duration::from_millis(300)).map(drop));
    assert!(begun.elapsed() >= Duration::from_millis(300), "at the end of its time");
    relief.comes_in(1);
    assert_eq!(text(queue.pop_timeout("stored", SOON).unwrap().unwrap().payload()), "a");
    until("all is well", || queue.push("t", "m").is_ok());
}
