//! Tests of the throwaway server: its life, its deaths, and what it leaves behind, which is nothing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pushpop_server::{Network, Proxy, Server, Setup, database_url};

const NOBODY: u32 = 65_534;

#[test]
fn takes_connections_by_tcp_and_by_unix_socket() {
    let server = Server::with(&[("max_connections", "17")]).unwrap();
    assert_eq!(server.url(), format!("postgres://postgres@127.0.0.1:{}/postgres", server.port()));
    TcpStream::connect((server.host(), server.port())).unwrap();
    assert_eq!(query(&server, "show max_connections"), "17");
    assert_eq!(query(&server, "show fsync"), "on");
    assert_eq!(query(&server, "show server_encoding"), "UTF8");

    let by_socket = psql(server.bin_dir(), "show data_directory")
        .env("PGHOST", server.socket_dir())
        .env("PGPORT", server.port().to_string())
        .args(["-U", "postgres"])
        .output()
        .unwrap();
    let data_dir = String::from_utf8(by_socket.stdout).unwrap();
    assert_eq!(Path::new(data_dir.trim()), server.data_dir());
    assert!(server.log().contains("ready to accept connections"));
}

#[test]
fn leaves_nothing_when_dropped() {
    let server = Server::start().unwrap();
    let pids = pids(server.bin_dir(), &server.url(), server.pid().unwrap());
    let dir = server.socket_dir().to_path_buf();
    drop(server);
    assert!(!dir.exists());
    assert_eq!(living(&pids), []);
}

#[test]
fn a_standby_follows_and_takes_over() {
    let primary = Server::start().unwrap();
    let from = |server: &Server| format!("host={} port={} user=postgres", server.host(), server.port());
    let standby = Setup::new().standby_of(&from(&primary)).start().unwrap();
    query(&primary, "create table kept (x int)");
    let follows = "select count(*) from pg_class where relname = 'kept'";
    eventually(|| query(&standby, follows) == "1");
    assert_eq!(query(&standby, "select pg_is_in_recovery()"), "t");
    let port = primary.port();
    drop(primary);
    assert_eq!(query(&standby, "select pg_promote()"), "t");
    query(&standby, "insert into kept values (7)");
    let next = Setup::new().port(port).standby_of(&from(&standby)).start().unwrap();
    assert_eq!((next.port(), query(&next, "select x from kept").as_str()), (port, "7"));
}

#[test]
fn what_a_network_has_lost_a_connection_stays_silent_about() {
    const ASKS_FOR_ENCRYPTION: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    let server = Server::start().unwrap();
    let proxy = Proxy::before(&server).unwrap();
    let connect = || {
        let stream = TcpStream::connect((server.host(), proxy.port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    let answer = |stream: &mut TcpStream| {
        stream.write_all(&ASKS_FOR_ENCRYPTION).unwrap();
        let mut answer = [0];
        stream.read(&mut answer).map(|read| answer[..read].to_vec())
    };
    assert_eq!(answer(&mut connect()).unwrap(), b"N");
    let mut deaf = connect();
    proxy.set(Network::RequestsLost);
    thread::sleep(Duration::from_millis(100));
    let mended = thread::scope(|scope| {
        let asking = scope.spawn(|| answer(&mut deaf));
        thread::sleep(Duration::from_millis(300));
        proxy.set(Network::Works);
        let mended = Instant::now();
        // It is closed in the end, and has never heard anything.
        assert!(!asking.join().unwrap().is_ok_and(|answer| !answer.is_empty()));
        mended
    });
    assert!(mended.elapsed() > Duration::from_secs(2), "{:?}", mended.elapsed());
    assert_eq!(answer(&mut connect()).unwrap(), b"N");
}

#[test]
fn keeps_port_and_data_when_killed_or_stopped() {
    let mut server = Server::start().unwrap();
    let port = server.port();
    query(&server, "create table kept (x int)");
    for round in 1..=4 {
        query(&server, &format!("insert into kept values ({round})"));
        let pid = server.pid().unwrap();
        let pids = pids(server.bin_dir(), &server.url(), pid);
        if round % 2 == 0 {
            server.stop().unwrap();
        } else {
            server.kill().unwrap();
        }
        assert_eq!(server.pid(), None);
        assert_eq!(living(&pids), []);
        TcpStream::connect((server.host(), port)).unwrap_err();
        server.pause().unwrap_err();

        server.start_again().unwrap();
        server.start_again().unwrap_err();
        assert_eq!(server.port(), port);
        assert_ne!(server.pid(), Some(pid));
        let count = query(&server, "select count(*) from kept");
        assert_eq!(count, round.to_string());
    }
    assert!(server.log().contains("database system was interrupted"));
}

#[test]
fn leaves_no_shared_memory_when_dropped_after_a_kill() {
    let mut server = Server::start().unwrap();
    let lock = fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
    let id = lock.lines().nth(6).unwrap().split_whitespace().nth(1);
    let segments = || fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let has = |text: &str| text.lines().any(|l| l.split_whitespace().nth(1) == id);
    if cfg!(target_os = "linux") {
        assert!(has(&segments()));
    }
    server.kill().unwrap();
    drop(server);
    assert!(!has(&segments()));
}

#[test]
fn answers_nothing_while_paused() {
    let server = Server::start().unwrap();
    let (sender, answer) = mpsc::channel();
    server.pause().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| sender.send(query(&server, "select 7")).unwrap());
        answer.recv_timeout(Duration::from_millis(300)).unwrap_err();
        server.resume().unwrap();
        assert_eq!(answer.recv_timeout(Duration::from_secs(30)).unwrap(), "7");
    });
}

#[test]
fn can_be_stopped_killed_and_dropped_while_paused() {
    let mut server = Server::start().unwrap();
    server.pause().unwrap();
    server.stop().unwrap();
    server.start_again().unwrap();
    server.pause().unwrap();
    server.kill().unwrap();
    server.start_again().unwrap();
    let pids = pids(server.bin_dir(), &server.url(), server.pid().unwrap());
    server.pause().unwrap();
    let start = Instant::now();
    drop(server);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(living(&pids), []);
}

#[test]
fn shares_one_server() {
    assert!(std::ptr::eq(Server::shared(), Server::shared()));
    assert_eq!(query(Server::shared(), "select 1"), "1");
}

#[test]
fn reports_a_failed_start_in_one_line_with_the_log() {
    let error = Server::with(&[("max_connections", "many")]).unwrap_err();
    let error = error.to_string();
    assert!(error.contains(r#"invalid value for parameter "max_connections""#));
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn takes_a_url_from_the_environment_or_starts_a_server() {
    let (url, server) = database_url("PATH").unwrap();
    assert_eq!(url, std::env::var("PATH").unwrap());
    assert!(server.is_none());

    let (url, server) = database_url("PUSHPOP_NO_SUCH_VARIABLE").unwrap();
    assert_eq!(url, server.unwrap().url());
}

#[test]
fn says_how_to_get_a_server_where_there_is_none() {
    let empty = Scratch::new();
    let output = empty.hold(None).env("PUSHPOP_PG_BINDIR", &empty.0).output().unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8(output.stderr).unwrap();
    let start = format!("no PostgreSQL server program found in {}", empty.0.display());
    assert!(error.starts_with(&start), "{error}");
    assert!(error.contains("apt-get install postgresql"), "{error}");
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn uses_another_directory_where_the_server_cannot_use_the_temporary_one() {
    let scratch = Scratch::new();
    let private = scratch.0.join("a-name-that-is-too-long-for-a-unix-socket".repeat(3));
    fs::create_dir(&private).unwrap();
    let mut held = Held::start(scratch.hold(None).env("TMPDIR", &private));
    assert!(fs::read_dir(&private).unwrap().next().is_none());
    held.tell("exit");
    held.ends(Some(0));
}

#[test]
fn leaves_nothing_when_its_program_ends_in_order() {
    ends_and_leaves_nothing(None, &[], |held| drop(held.child.stdin.take()), Some(0));
}

#[test]
fn leaves_nothing_when_its_program_exits_without_a_drop() {
    ends_and_leaves_nothing(None, &[], |held| held.tell("exit"), Some(0));
}

#[test]
fn leaves_nothing_when_its_program_panics() {
    ends_and_leaves_nothing(None, &[], |held| held.tell("panic"), Some(101));
}

#[test]
fn leaves_nothing_of_the_shared_server() {
    ends_and_leaves_nothing(None, &["shared"], |held| drop(held.child.stdin.take()), Some(0));
}

#[test]
fn leaves_nothing_when_its_program_is_killed() {
    ends_and_leaves_nothing(None, &[], |held| held.child.kill().unwrap(), None);
}

#[test]
fn leaves_nothing_when_its_program_is_interrupted_from_the_terminal() {
    let interrupt = |held: &mut Held| kill("INT", &format!("-{}", held.child.id()));
    ends_and_leaves_nothing(None, &[], interrupt, None);
}

#[test]
fn leaves_nothing_when_its_program_is_killed_and_the_server_paused() {
    let kill = |held: &mut Held| {
        held.tell("pause");
        assert_eq!(held.line(), "paused");
        held.child.kill().unwrap();
    };
    ends_and_leaves_nothing(None, &[], kill, None);
}

#[test]
fn leaves_nothing_of_an_ordinary_user() {
    if !is_root() {
        return; // Then all the other tests are of one.
    }
    let stop = |held: &mut Held| drop(held.child.stdin.take());
    ends_and_leaves_nothing(Some(NOBODY), &[], stop, Some(0));
    let kill = |held: &mut Held| held.child.kill().unwrap();
    ends_and_leaves_nothing(Some(NOBODY), &[], kill, None);
}

#[test]
fn leaves_nothing_when_its_program_is_killed_at_any_moment_of_the_start() {
    for moment in (0..1000).step_by(90) {
        let scratch = Scratch::new();
        let mut child = scratch.hold(None).stdin(Stdio::piped()).spawn().unwrap();
        thread::sleep(Duration::from_millis(moment));
        child.kill().unwrap();
        child.wait().unwrap();
        eventually(|| scratch.is_empty() && scratch.users().is_empty());
    }
}

/// Starts a program that holds a server, as `user`, ends it, and looks for what is left.
fn ends_and_leaves_nothing(user: Option<u32>, args: &[&str], end: impl FnOnce(&mut Held), code: Option<i32>) {
    let scratch = Scratch::new();
    let mut held = Held::start(scratch.hold(user).args(args));
    assert!(!scratch.is_empty());
    assert_eq!(living(&held.pids), held.pids);
    let port: u16 = held.url.rsplit([':', '/']).nth(1).unwrap().parse().unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();

    end(&mut held);
    held.ends(code);
    eventually(|| scratch.is_empty() && living(&held.pids).is_empty());
    assert_eq!(scratch.users(), Vec::<String>::new());
}

/// A program that holds a server.
struct Held {
    child: Child,
    stdout: BufReader<ChildStdout>,
    url: String,
    pids: Vec<u32>,
}

impl Held {
    fn start(command: &mut Command) -> Held {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.process_group(0).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut held = Held { child, stdout, url: String::new(), pids: Vec::new() };
        held.url = held.line();
        let pid = held.line().parse().unwrap();
        held.pids = pids(Path::new(&held.line()), &held.url, pid);
        held
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{what}").unwrap();
    }

    /// Waits for its end, with an exit code or by a signal, and for its output's: no process of
    /// the server's may hold that open.
    fn ends(&mut self, code: Option<i32>) {
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), code);
        assert_eq!(status.signal().is_some(), code.is_none());
        self.stdout.read_to_end(&mut Vec::new()).unwrap();
    }
}

/// A directory that all users can write to, for the temporary files of one program.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let output = Command::new("mktemp").args(["-d", "/tmp/pushpop-test-XXXXXX"]).output().unwrap();
        let dir = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o1777)).unwrap();
        Scratch(dir)
    }

    /// Makes a command that holds a server, as `user`. Its program is a copy, for the user may have
    /// no way to where it was built; `cp` makes it, so that no fork has it open for writing.
    fn hold(&self, user: Option<u32>) -> Command {
        let mut program = PathBuf::from(env!("CARGO_BIN_EXE_hold"));
        if user.is_some() {
            let copy = self.0.with_extension("hold");
            let status = Command::new("cp").arg(&program).arg(&copy).status().unwrap();
            assert!(status.success());
            program = copy;
        }
        // What a shell has started in the background, these tests perhaps, inherits that it ignores interrupts.
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").arg(program);
        if let Some(id) = user {
            command.uid(id).gid(id).current_dir("/");
        }
        command.env("TMPDIR", &self.0).env("RUST_BACKTRACE", "0");
        command
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(&self.0).unwrap().next().is_none()
    }

    /// Lists the processes that name this directory or work in it.
    fn users(&self) -> Vec<String> {
        let name = self.0.to_str().unwrap();
        let mut users = Vec::new();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let path = process.path();
            let args = fs::read(path.join("cmdline")).unwrap_or_default();
            let args = String::from_utf8_lossy(&args).replace('\0', " ");
            let cwd = fs::read_link(path.join("cwd")).unwrap_or_default();
            if args.contains(name) || cwd.starts_with(&self.0) {
                users.push(args);
            }
        }
        users
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        let _ = fs::remove_file(self.0.with_extension("hold"));
    }
}

fn psql(bin_dir: &Path, sql: &str) -> Command {
    let mut psql = Command::new(bin_dir.join("psql"));
    psql.args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]);
    psql
}

fn query_at(bin_dir: &Path, url: &str, sql: &str) -> String {
    let output = psql(bin_dir, sql).arg(url).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn query(server: &Server, sql: &str) -> String {
    query_at(server.bin_dir(), &server.url(), sql)
}

/// Lists a server's lasting processes, the postmaster first.
fn pids(bin_dir: &Path, url: &str, postmaster: u32) -> Vec<u32> {
    let sql = "select pid from pg_stat_activity
               where backend_type in ('checkpointer', 'background writer', 'walwriter')";
    let mut pids = vec![postmaster];
    pids.extend(query_at(bin_dir, url, sql).lines().map(|pid| pid.parse::<u32>().unwrap()));
    assert_eq!(pids.len(), 4);
    pids
}

/// Those of the processes that live. A zombie does not: where no init reaps, it stays one.
fn living(pids: &[u32]) -> Vec<u32> {
    let lives = |pid: &&u32| {
        let mut sh = Command::new("/bin/sh");
        sh.args(["-c", r#"kill -s 0 "$0" 2>/dev/null"#, &pid.to_string()]);
        let found = sh.status().unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        found.success() && !stat.contains(") Z ")
    };
    pids.iter().filter(lives).copied().collect()
}

fn kill(signal: &str, target: &str) {
    let script = r#"kill -s "$0" -- "$1""#;
    let mut sh = Command::new("/bin/sh");
    assert!(sh.args(["-c", script, signal, target]).status().unwrap().success());
}

fn is_root() -> bool {
    let scratch = Scratch::new();
    fs::metadata(&scratch.0).unwrap().uid() == 0
}

fn eventually(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "not so after 60 s");
        thread::sleep(Duration::from_millis(20));
    }
}
