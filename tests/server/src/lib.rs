//! Starts a private, throwaway PostgreSQL server for examples, tests and benches.
//!
//! ```
//! let server = pushpop_server::Server::start()?;
//! println!("{}", server.url());
//! # Ok::<(), pushpop_server::Error>(())
//! ```
//!
//! The server, its data and its processes are gone when the [`Server`] is dropped. They are gone
//! soon after the program's end too, be it an exit, a panic or `kill -9`: a watchdog process, which
//! notices that end by a pipe, removes them.
//!
//! The server programs are looked for in the directory that `PUSHPOP_PG_BINDIR` names, or else
//! where `pg_config`, `PATH` and the usual packages have them. Any user can start a server; for
//! root, it runs as user `postgres` or `nobody`.

mod error;
mod process;
mod program;
mod proxy;
mod setup;

use std::collections::hash_map::RandomState;
use std::env;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

pub use error::Error;
use program::Account;
pub use proxy::{Network, Proxy};
pub use setup::Setup;

const HOST: &str = "127.0.0.1";

/// Below the ports that systems give to clients: one of those could take the port of a stopped
/// server, or even connect to itself there.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// Holds its program back until the watchdog knows of it, and ends if that never comes to pass.
const GATE: &str = r#"read -r go && exec "$0" "$@" </dev/null >>log 2>&1"#;

/// Returns the URL that an environment variable holds or, where it is unset or empty, starts a
/// server and returns its URL and the server.
pub fn database_url(variable: &str) -> Result<(String, Option<Server>), Error> {
    match env::var(variable) {
        Ok(url) if !url.is_empty() => Ok((url, None)),
        Err(env::VarError::NotUnicode(_)) => Err(Error::new(format!("{variable} is no valid Unicode"))),
        _ => {
            let server = Server::start()?;
            Ok((server.url(), Some(server)))
        }
    }
}

/// A PostgreSQL server of this process's own, which ends when it is dropped or the process ends.
#[derive(Debug)]
pub struct Server {
    bin_dir: PathBuf,
    account: Account,
    setup: Setup,
    dir: PathBuf,
    port: u16,
    watchdog: Child,
    postmaster: Option<Child>,
}

impl Server {
    /// Starts a server with PostgreSQL's own settings, and returns when it takes connections.
    pub fn start() -> Result<Server, Error> {
        Self::with(&[])
    }

    /// Starts a server with the given settings, such as `("max_connections", "20")`.
    ///
    /// Those of its address, port and socket directory cannot be changed.
    pub fn with(settings: &[(&str, &str)]) -> Result<Server, Error> {
        settings.iter().fold(Setup::new(), |setup, (name, value)| setup.setting(name, value)).start()
    }

    /// Returns the one server that all tests of this process share, which the first call starts.
    ///
    /// # Panics
    ///
    /// Panics if the server cannot be started, with the reason.
    pub fn shared() -> &'static Server {
        static SHARED: OnceLock<Result<Server, Error>> = OnceLock::new();
        match SHARED.get_or_init(Server::start) {
            Ok(server) => server,
            Err(error) => panic!("{error}"),
        }
    }

    /// Returns the URL of the server's database `postgres`, for its superuser.
    pub fn url(&self) -> String {
        format!("postgres://postgres@{HOST}:{}/postgres", self.port)
    }

    /// Returns the address that the server listens on.
    pub fn host(&self) -> &str {
        HOST
    }

    /// Returns the TCP port that the server listens on, which it keeps for its whole life.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the directory of the server's Unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the server's data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Returns the directory of the server's programs, where `psql` and others are too.
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// Returns the path of a client program, such as `psql`: the one beside the server, or else that of `PATH`.
    pub fn program(&self, name: &str) -> PathBuf {
        let beside = self.bin_dir.join(name);
        if beside.is_file() { beside } else { PathBuf::from(name) }
    }

    /// Returns the process of the postmaster, unless the server is stopped.
    pub fn pid(&self) -> Option<u32> {
        self.postmaster.as_ref().map(Child::id)
    }

    /// Returns what the server has logged.
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Stops the server in order, without waiting for its clients, and returns when it has ended.
    pub fn stop(&mut self) -> Result<(), Error> {
        let Some(pid) = self.pid() else { return Ok(()) };
        self.resume()?;
        process::signal("INT", &[pid])?;
        if self.reap(Duration::from_secs(60))?.is_none() {
            return Err(self.failed("the server has not stopped after 60 s"));
        }
        self.watch(&[])
    }

    /// Kills the server with all its processes (`SIGKILL`), and returns when they have ended: the next
    /// start has to recover the data from the log.
    pub fn kill(&mut self) -> Result<(), Error> {
        let Some(pid) = self.pid() else { return Ok(()) };
        let mut pids = process::freeze(pid)?;
        pids.push(pid);
        process::kill(&pids)?;
        self.reap(Duration::from_secs(30))?;
        self.watch(&[])
    }

    /// Starts a stopped or killed server again, on the same port and data.
    pub fn start_again(&mut self) -> Result<(), Error> {
        self.reap(Duration::ZERO)?;
        match self.pid() {
            Some(_) => Err(Error::new("the server is running already")),
            None => self.launch(),
        }
    }

    /// Halts the server with all its processes, until [`resume`](Self::resume): it keeps its
    /// connections, and answers nothing.
    pub fn pause(&self) -> Result<(), Error> {
        let pid = self.running()?;
        let children = process::freeze(pid)?;
        self.watch(&[&[pid], children.as_slice()].concat())?;
        process::stop(&children)
    }

    /// Lets a paused server go on.
    pub fn resume(&self) -> Result<(), Error> {
        let pid = self.running()?;
        let mut pids = process::children(pid)?;
        pids.push(pid);
        process::signal("CONT", &pids)?;
        self.watch(&[pid])
    }

    fn running(&self) -> Result<u32, Error> {
        self.pid().ok_or_else(|| Error::new("the server is not running"))
    }

    fn make_cluster(&mut self) -> Result<(), Error> {
        self.run(
            "initdb",
            &[
                "--pgdata=data",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
        )
    }

    /// Copies the cluster of a running server, whose standby this one will be. Under another name than the standby's,
    /// which the server might wait for.
    fn copy_cluster(&mut self, from: &str) -> Result<(), Error> {
        let from = format!("{from} application_name=copy");
        self.run(
            "pg_basebackup",
            &["--pgdata=data", "--dbname", &from, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"],
        )
    }

    /// Runs one of the server's programs to its end.
    fn run(&mut self, program: &str, args: &[&str]) -> Result<(), Error> {
        let mut child = self.spawn(program, args)?;
        let status = child.wait().map_err(Error::doing(format!("waiting for {program}")))?;
        self.watch(&[])?;
        if !status.success() {
            return Err(self.failed(&format!("{program} failed")));
        }
        Ok(())
    }

    /// Starts the postmaster on a port that `find` finds: another one where someone else took the
    /// port first.
    fn launch_on(&mut self, mut find: impl FnMut() -> Result<u16, Error>) -> Result<(), Error> {
        let mut tries = 20;
        loop {
            tries -= 1;
            self.port = find()?;
            match self.launch() {
                Err(error) if tries > 0 && error.to_string().contains("already in use") => {}
                done => return done,
            }
        }
    }

    fn launch(&mut self) -> Result<(), Error> {
        // The shared memory that lies in the data directory goes with it, even after a kill.
        let mut settings = vec!["dynamic_shared_memory_type=mmap".to_owned()];
        settings.extend_from_slice(&self.setup.settings);
        settings.push(format!("listen_addresses={HOST}"));
        settings.push(format!("port={}", self.port));
        settings.push(format!("unix_socket_directories={}", self.dir.display()));
        let mut args = vec!["-D", "data"];
        args.extend(settings.iter().flat_map(|s| ["-c", s.as_str()]));
        self.postmaster = Some(self.spawn("postgres", &args)?);

        let ready = process::poll(Duration::from_secs(60), || {
            if let Some(status) = self.reap(Duration::ZERO)? {
                return Err(self.failed(&format!("the server did not start ({status})")));
            }
            Ok(self.is_ready().then_some(()))
        });
        match ready {
            Ok(Some(())) => Ok(()),
            Ok(None) => Err(self.failed("the server is not ready after 60 s")),
            Err(error) => self.watch(&[]).and(Err(error)),
        }
    }

    /// Reads the lock file, whose first line names the process and eighth its state. A killed
    /// server's file stays until the next has written its own.
    fn is_ready(&self) -> bool {
        let lock = fs::read_to_string(self.data_dir().join("postmaster.pid")).unwrap_or_default();
        let mut lines = lock.lines().map(str::trim);
        lines.next().and_then(|pid| pid.parse().ok()) == self.pid() && lines.nth(6) == Some("ready")
    }

    /// Waits for the postmaster's end, if it is running, and forgets it then.
    fn reap(&mut self, limit: Duration) -> Result<Option<ExitStatus>, Error> {
        let Some(postmaster) = &mut self.postmaster else {
            return Ok(None);
        };
        let status = process::poll(limit, || {
            let status = postmaster.try_wait();
            status.map_err(Error::doing("waiting for the server"))
        })?;
        if status.is_some() {
            self.postmaster = None;
        }
        Ok(status)
    }

    /// Starts one of the server's programs, once the watchdog knows of it.
    fn spawn(&self, program: &str, args: &[&str]) -> Result<Child, Error> {
        let mut child = self
            .account
            .shell(GATE)
            .envs(self.setup.variables.iter().map(|(name, value)| (name, value)))
            .arg(self.bin_dir.join(program))
            .args(args)
            .current_dir(&self.dir)
            .spawn()
            .map_err(Error::doing(format!("starting {program}")))?;
        let gate = child.stdin.take();
        let opened = self.watch(&[child.id()]).and_then(|()| {
            gate.as_ref()
                .map_or(Ok(()), |mut gate| gate.write_all(b"go\n"))
                .map_err(Error::doing(format!("starting {program}")))
        });
        drop(gate);
        if opened.is_err() {
            let _ = child.wait();
        }
        opened.map(|()| child)
    }

    /// Tells the watchdog which processes it has to end.
    fn watch(&self, pids: &[u32]) -> Result<(), Error> {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let line = pids.join(" ") + "\n";
        self.watchdog
            .stdin
            .as_ref()
            .map_or(Ok(()), |mut pipe| pipe.write_all(line.as_bytes()))
            .map_err(Error::doing("telling the watchdog"))
    }

    fn failed(&self, what: &str) -> Error {
        let log = self.log();
        let lines: Vec<&str> = log.lines().map(str::trim).collect();
        let tail = &lines[lines.len().saturating_sub(8)..];
        Error::new(format!("{what}: {}", tail.join(" | ")))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The watchdog does all of it. The rest is for the case that something ended it before.
        self.watchdog.stdin = None;
        if let Ok(None) = self.reap(Duration::from_secs(20)) {
            let _ = self.kill();
        }
        let _ = self.watchdog.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Starts the watchdog, which makes the server's directory.
fn start_watchdog(account: Account) -> Result<(Child, PathBuf), Error> {
    // The path of a Unix socket has at most 103 bytes: `/pushpop-XXXXXX/.s.PGSQL.12345` is added.
    let bases = [env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
    let bases = bases.iter().filter(|b| b.is_absolute() && b.as_os_str().len() <= 72);
    let mut watchdog = account
        .shell(include_str!("watchdog.sh"))
        .arg("pushpop-watchdog")
        .args(bases)
        .current_dir("/")
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Error::doing("starting the watchdog"))?;
    let mut dir = String::new();
    if let Some(stdout) = watchdog.stdout.take() {
        let read = BufReader::new(stdout).read_line(&mut dir);
        read.map_err(Error::doing("starting the watchdog"))?;
    }
    if dir.is_empty() {
        let _ = watchdog.wait();
        return Err(Error::new(format!(
            "no temporary directory can be made in {} or /tmp",
            env::temp_dir().display()
        )));
    }
    Ok((watchdog, PathBuf::from(dir.trim_end_matches('\n'))))
}

fn free_port() -> Result<u16, Error> {
    let count = u64::from(PORTS.end - PORTS.start);
    (0..100)
        .map(|_| PORTS.start + (RandomState::new().build_hasher().finish() % count) as u16)
        .find(|port| TcpListener::bind((HOST, *port)).is_ok())
        .ok_or_else(|| Error::new("no free TCP port found"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn takes_another_port_where_one_is_taken() {
        let mut server = Server::start().unwrap();
        server.stop().unwrap();
        let taken = free_port().unwrap();
        let _listener = TcpListener::bind((HOST, taken)).unwrap();
        let mut ports = [taken, taken, free_port().unwrap()].into_iter();
        server.launch_on(|| Ok(ports.next().unwrap())).unwrap();
        assert_ne!(server.port(), taken);
        assert_eq!(server.log().matches("Address already in use").count(), 2);
    }
}
