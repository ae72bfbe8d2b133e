//! What a server can run out of.
//!
//! The disk: the server lives on a small file system, which a ballast file fills until it is removed. Every other time
//! the log of the server is moved on until it finds no room either, whereupon it ends, and is started
//! again once there is room. Connections: the director takes all that there are, and ends some of the clients', which find
//! no other. Idle connections are ended, all of them, several times. The server only reads for a while. All clients
//! are hit, and nothing is exempt.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use pushpop_pg::BoxError;
use pushpop_pg::postgres::{Client, Config, NoTls};
use pushpop_server::Setup;

use crate::director::Director;
use crate::plan::Fault;

/// Where the small file system is: only the processes of a campaign see it, and with the last of them it is gone.
const DISK: &str = "/mnt";
const SIZE: &str = "384m";

/// Says to a campaign that it has its own file system.
const VARIABLE: &str = "PUSHPOP_CAMPAIGN_DISK";

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(4);

const MOUNT: &str = r#"mount -t tmpfs -o "size=$1,mode=1777" pushpop "$2" && shift 2 && exec "$@""#;

pub(crate) fn has_disk() -> bool {
    env::var_os(VARIABLE).is_some()
}

/// Begins this program anew, with a small file system under the server. Returns only what is in the way of that.
pub(crate) fn enter_disk() -> BoxError {
    let own = ["--mount", "--propagation", "private"];
    let quiet = || Stdio::null();
    let mut tried = Command::new("unshare");
    tried.args(own).args(["/bin/sh", "-c", MOUNT, "sh", SIZE, DISK, "true"]);
    if !tried.stdout(quiet()).stderr(quiet()).status().is_ok_and(|status| status.success()) {
        return "who fills a disk has to mount one: run this as root, or with --full-disks 0".into();
    }
    let program = match env::current_exe() {
        Ok(program) => program,
        Err(e) => return e.into(),
    };
    let failed = Command::new("unshare")
        .args(own)
        .args(["/bin/sh", "-c", MOUNT, "sh", SIZE, DISK])
        .arg(program)
        .args(env::args_os().skip(1))
        .arg("--scratch")
        .arg(env::temp_dir())
        .env("TMPDIR", DISK)
        .env(VARIABLE, "1")
        .exec();
    failed.into()
}

/// As little of the log of the server as possible is on its disk.
pub(crate) fn on_small_disk(setup: Setup) -> Setup {
    setup.setting("min_wal_size", "32MB").setting("max_wal_size", "64MB")
}

/// A file that takes all the room there is, and gives it back in the end.
struct Ballast {
    path: PathBuf,
    file: File,
}

impl Ballast {
    fn new() -> Result<Ballast, BoxError> {
        let path = Path::new(DISK).join("ballast");
        let file = File::create(&path)?;
        Ok(Ballast { path, file })
    }

    fn grow(&mut self) -> Result<(), BoxError> {
        for size in [1 << 20, 4096] {
            let chunk = vec![0xff; size];
            loop {
                match self.file.write(&chunk) {
                    Err(e) if e.kind() == ErrorKind::StorageFull => break,
                    Err(e) => return Err(e.into()),
                    Ok(_) => {}
                }
            }
        }
        Ok(())
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Director<'_> {
    fn hold(&mut self) -> Instant {
        Instant::now() + SHORTEST + self.chance.up_to(LONGEST - SHORTEST)
    }

    pub(crate) fn fill_disk(&mut self) -> Result<(), BoxError> {
        self.full_disks += 1;
        let with_log = self.full_disks.is_multiple_of(2);
        let mut client = self.connect()?;
        let until = self.hold();
        let mut ballast = Ballast::new()?;
        self.journal.line(format!("fault disk is full, with the log: {with_log}"));
        while Instant::now() < until {
            ballast.grow()?;
            if with_log {
                // It may have ended already.
                let _ =
                    client.batch_execute("select pg_logical_emit_message(false, '', ''), pg_switch_wal()");
            }
            self.rest(Instant::now() + Duration::from_millis(50))?;
        }
        drop((client, ballast));
        self.journal.line("fault disk has room");
        self.start_if_ended()?;
        self.mended(Fault::FillDisk)
    }

    /// Starts the server if it has ended, as whoever watches over one would, and returns when it is there.
    fn start_if_ended(&mut self) -> Result<(), BoxError> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(e) = Client::connect(&self.stage.server.url(), NoTls) {
            if self.stage.server.start_again().is_ok() {
                self.journal.line("fault server was started again");
            }
            if Instant::now() > deadline {
                return Err(e.into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub(crate) fn take_connections(&mut self) -> Result<(), BoxError> {
        let mut config: Config = self.stage.server.url().parse()?;
        config.application_name("director");
        let until = self.hold();
        let (mut taken, mut refused) = (vec![self.connect()?], 0);
        self.journal.line("fault connections are taken");
        while Instant::now() < until {
            match config.connect(NoTls) {
                Ok(client) => taken.push(client),
                Err(_) => {
                    refused += 1;
                    // Others are to find none any more.
                    if refused % 20 == 1
                        && let Some(client) = taken.first_mut()
                    {
                        end_idle(client, 3)?;
                    }
                    self.rest(Instant::now() + Duration::from_millis(5))?;
                }
            }
        }
        let count = taken.len();
        drop(taken);
        self.journal.line(format!("fault {count} connections are given back, after {refused} were refused"));
        if refused == 0 {
            return Err("the server has never run out of connections".into());
        }
        self.mended(Fault::TakeConnections)
    }

    pub(crate) fn end_idle(&mut self) -> Result<(), BoxError> {
        let mut client = self.connect()?;
        let mut ended = 0;
        for _ in 0..3 + self.chance.below(8) {
            ended += end_idle(&mut client, 1000)?;
            let pause = self.chance.up_to(Duration::from_millis(400));
            self.rest(Instant::now() + pause)?;
        }
        self.journal.line(format!("fault {ended} idle backends ended"));
        self.mended(Fault::EndIdle)
    }

    pub(crate) fn only_read(&mut self) -> Result<(), BoxError> {
        let mut client = self.connect()?;
        client.batch_execute("set default_transaction_read_only = off")?;
        client.batch_execute("alter system set default_transaction_read_only = on")?;
        client.batch_execute("select pg_reload_conf()")?;
        self.journal.line("fault server only reads");
        let until = self.hold();
        self.rest(until)?;
        client.batch_execute("alter system reset default_transaction_read_only")?;
        client.batch_execute("select pg_reload_conf()")?;
        self.journal.line("fault server writes");
        self.mended(Fault::OnlyRead)
    }
}

/// Ends backends of clients that wait for something to do.
fn end_idle(client: &mut Client, most: i64) -> Result<i64, BoxError> {
    let sql = "select count(pg_terminate_backend(a.pid)) from (
                   select pid from pg_stat_activity
                   where application_name like 'campaign %' and state = 'idle' order by random() limit $1
               ) a";
    Ok(client.query_one(sql, &[&most])?.get(0))
}
