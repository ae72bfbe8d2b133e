//! Runs a campaign: a server, its clients as processes, faults, a drain, the check.

use std::env;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::postgres::{Client, Config, NoTls};
use pushpop_pg::{BoxError, NewMessage, Queue, TopicSettings};

use crate::args::Args;
use crate::audit::Auditor;
use crate::broken;
use crate::chance::Chance;
use crate::chance::hash;
use crate::check::{self, IN_REACH, Property, check, render, render_one};
use crate::history::History;
use crate::journal::{Entry, Journal, now};
use crate::plan::{BOUNCE, BOUNCERS, Fault, ORDER, PLAIN, Plan, WORK};
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::store;

/// How long a process may take to end when it is told to.
const ENDING: Duration = Duration::from_secs(60);

/// What is little, and how long it may take until more is done than before.
const LITTLE: i64 = 500;
const PROGRESS: Duration = Duration::from_secs(15);

/// How many faults are kept for the end, and the time from one of them to the next.
const LAST: usize = 10;
const LAST_INTERVAL: Duration = Duration::from_millis(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Producer,
    Worker,
    Plain,
    /// The one consumer of the topic `order`: a worker that is left alone.
    Order,
    /// A worker that completes nothing until the faults are over. It may be killed, but is not stopped.
    Bouncer,
}

/// A child process.
struct Member {
    role: Role,
    name: String,
    args: Args,
    child: Child,
    lives: u32,
    log: Log,
    /// When it may go on, if it is stopped.
    stopped_until: Option<Instant>,
}

/// The log of a client, as far as it was read: when it was served last.
struct Log {
    path: PathBuf,
    read: u64,
    alive: i64,
}

pub(crate) struct Director<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) args: &'a Args,
    dir: PathBuf,
    pub(crate) journal: Journal,
    pub(crate) stage: Stage,
    members: Vec<Member>,
    auditor: Auditor,
    pub(crate) chance: Chance,
    /// How many there were so far.
    pub(crate) cuts: usize,
    pub(crate) full_disks: usize,
}

/// Runs a campaign and checks it; returns whether every property holds.
pub(crate) fn run(plan: &Plan, args: &Args) -> Result<bool, BoxError> {
    let begun = Instant::now();
    let scratch = Scratch::new(args)?;
    let mut director = Director::start(plan, args, scratch.path().to_owned())?;
    let played = director.play();
    let ran = director.auditor.end().and(played);
    let faulted = begun.elapsed();
    let checked = match ran {
        _ if director.auditor.has_found() => director.show_broken(),
        Ok(()) => director.check(),
        Err(e) => {
            let log = director.stage.server.log();
            let lines: Vec<&str> = log.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            Err(e)
        }
    };
    drop(director);
    let holds = checked.as_ref().is_ok_and(|properties| properties.iter().all(|p| p.found == 0));
    println!(
        "{} in {} s, of them {} s for the check",
        if holds { "all properties hold" } else { "NOT all properties hold" },
        begun.elapsed().as_secs(),
        (begun.elapsed() - faulted).as_secs()
    );
    if !holds && args.number("forget", 0)? == 0 {
        scratch.keep()?;
    }
    checked.map(|_| holds)
}

impl<'a> Director<'a> {
    fn start(plan: &'a Plan, args: &'a Args, dir: PathBuf) -> Result<Self, BoxError> {
        let stage = Stage::set(plan, args, &dir)?;
        let queue = Queue::connect(&stage.server.url())?;
        let backoff =
            TopicSettings::default().with_backoff(Duration::from_millis(50), Duration::from_millis(200));
        queue.topic(WORK).set(&backoff)?;
        let mut client = Client::connect(&stage.server.url(), NoTls)?;
        client.batch_execute(store::SETUP)?;
        if let Ok(name) = args.text("broken") {
            broken::apply(name, &mut client)?;
        }
        let sql = "select current_setting('server_version'), current_setting('fsync')";
        let row = client.query_one(sql, &[])?;
        let (version, fsync): (String, String) = (row.get(0), row.get(1));
        println!(
            "campaign {}: seed {}, {} messages, {} workers and {} in SQL; {}; leases of {:?}; PostgreSQL {version}, \
             fsync {fsync}",
            plan.name,
            plan.seed,
            plan.messages,
            plan.workers,
            plan.plains,
            plan.faults_in_words(),
            plan.lease
        );
        let journal = Journal::open(&dir.join("director.log"))?;
        journal.line(format!("reach {} {}", plan.reach().as_micros(), plan.audit.as_micros()));
        if plan.bouncers > 0 {
            push_bouncing(&queue, &journal)?;
        }
        let auditor = Auditor::start(stage.own_url(), plan.audit, Journal::open(&dir.join("audit.log"))?);
        Ok(Director {
            plan,
            args,
            dir,
            journal,
            stage,
            members: Vec::new(),
            auditor,
            chance: Chance::new(plan.seed),
            cuts: 0,
            full_disks: 0,
        })
    }

    fn play(&mut self) -> Result<(), BoxError> {
        let mixed = self.plan.messages - self.plan.ordered();
        for n in 0..self.plan.workers {
            self.join(Role::Worker, format!("worker{n}"), 0)?;
        }
        for n in 0..self.plan.plains {
            self.join(Role::Plain, format!("{PLAIN}{n}"), 0)?;
        }
        for n in 0..self.plan.bouncers {
            self.join(Role::Bouncer, format!("{BOUNCE}{n}"), 0)?;
        }
        for (name, share) in [("a", mixed / 2), ("b", mixed - mixed / 2)] {
            self.join(Role::Producer, name.into(), share)?;
        }
        if self.plan.ordered() > 0 {
            self.join(Role::Order, ORDER.into(), 0)?;
            self.join(Role::Producer, ORDER.into(), self.plan.ordered())?;
        }
        let (faults, last) = self.draw_faults();
        self.raise(faults, self.plan.interval)?;
        self.catch_up()?;
        // The last of the messages and of the faults come together, so that there is something left to do.
        for member in self.members.iter_mut().filter(|member| member.role == Role::Producer) {
            drop(member.child.stdin.take());
        }
        self.raise(last, LAST_INTERVAL)?;
        self.await_producers()?;
        self.let_go_on()?;
        self.right_clock()?;
        self.calm()?;
        self.drain()?;
        self.dismiss()
    }

    // Processes.

    fn join(&mut self, role: Role, name: String, share: u64) -> Result<(), BoxError> {
        let url = self.stage.url(self.members.len());
        let args = self.args.clone().with("url", url).with("name", &name).with("share", share);
        let (child, log) = self.spawn(role, &name, &args, 1)?;
        self.members.push(Member { role, name, args, child, lives: 1, log, stopped_until: None });
        Ok(())
    }

    fn spawn(&self, role: Role, name: &str, args: &Args, life: u32) -> Result<(Child, Log), BoxError> {
        let word = match role {
            Role::Producer => "producer",
            Role::Worker | Role::Order => "worker",
            Role::Plain => "plain",
            Role::Bouncer => "bounce",
        };
        let log = self.dir.join(format!("{word}-{name}-{life}.log"));
        let args = args.clone().with("log", log.display());
        let spawned = Command::new(env::current_exe()?)
            .args([word, &self.plan.name])
            .args(args.line())
            .stdin(Stdio::piped())
            .spawn()?;
        Ok((spawned, Log { path: log, read: 0, alive: 0 }))
    }

    /// Those of some roles that run.
    fn targets(&self, roles: &[Role]) -> Vec<usize> {
        let is_target = |member: &Member| roles.contains(&member.role) && member.stopped_until.is_none();
        (0..self.members.len()).filter(|n| is_target(&self.members[*n])).collect()
    }

    fn await_producers(&mut self) -> Result<(), BoxError> {
        let patience = Duration::from_secs(600) + self.plan.spread;
        let deadline = Instant::now() + patience;
        while let Some(at) = self.members.iter().position(|member| member.role == Role::Producer) {
            match self.members[at].child.try_wait()? {
                Some(status) if status.success() => drop(self.members.remove(at)),
                Some(status) => {
                    return Err(format!("producer {} has ended: {status}", self.members[at].name).into());
                }
                None if Instant::now() > deadline => return Err("the producers do not come to an end".into()),
                None => self.rest(Instant::now() + Duration::from_millis(20))?,
            }
        }
        Ok(())
    }

    fn dismiss(&mut self) -> Result<(), BoxError> {
        for member in &mut self.members {
            drop(member.child.stdin.take());
        }
        let deadline = Instant::now() + ENDING;
        while let Some(mut member) = self.members.pop() {
            loop {
                match member.child.try_wait()? {
                    Some(status) if status.success() => break,
                    Some(status) => return Err(format!("{} has ended: {status}", member.name).into()),
                    None if Instant::now() > deadline => {
                        self.members.push(member);
                        return Err("a worker does not end".into());
                    }
                    None => thread::sleep(Duration::from_millis(10)),
                }
            }
        }
        Ok(())
    }

    // Faults.

    /// All faults in a random order, and a few that are kept for the end.
    fn draw_faults(&mut self) -> (Vec<Fault>, Vec<Fault>) {
        let mut faults = self.plan.all_faults();
        for n in (1..faults.len()).rev() {
            faults.swap(n, self.chance.place(n + 1));
        }
        let last = faults.split_off(faults.len() - (faults.len() / 10).min(LAST));
        (faults, last)
    }

    fn raise(&mut self, faults: Vec<Fault>, interval: Duration) -> Result<(), BoxError> {
        for fault in faults {
            let pause = self.chance.around(interval);
            self.rest(Instant::now() + pause)?;
            match fault {
                Fault::Kill => self.kill_one()?,
                Fault::KillServer => self.kill_server()?,
                Fault::Stop => self.stop_one()?,
                Fault::Terminate => self.end_backend("terminate")?,
                Fault::KillBackend => self.end_backend("kill")?,
                Fault::CutNetwork => self.cut_network()?,
                Fault::Promote => self.promote()?,
                Fault::FillDisk => self.fill_disk()?,
                Fault::TakeConnections => self.take_connections()?,
                Fault::EndIdle => self.end_idle()?,
                Fault::OnlyRead => self.only_read()?,
                Fault::StepClock => self.step_clock()?,
            }
        }
        Ok(())
    }

    /// On a slow machine the faults may be over before the work is: waits until there is little left to do, so that
    /// what is measured at the end is not the speed of the machine.
    fn catch_up(&mut self) -> Result<(), BoxError> {
        let mut client = self.connect()?;
        let (mut most, mut since) = (0, Instant::now());
        loop {
            let asked = Instant::now();
            let row = client.query_one(store::LEFT, &[])?;
            let (left, done): (i64, i64) = (row.get(0), row.get(1));
            if done > most {
                (most, since) = (done, asked);
            }
            if left <= LITTLE || since.elapsed() > PROGRESS {
                return Ok(());
            }
            self.rest(Instant::now() + Duration::from_millis(200).max(asked.elapsed()))?;
        }
    }

    /// Waits until those that are stopped go on.
    fn let_go_on(&mut self) -> Result<(), BoxError> {
        while self.members.iter().any(|member| member.stopped_until.is_some()) {
            self.rest(Instant::now() + Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Sleeps, lets those go on whose time has come, and looks whether all live.
    pub(crate) fn rest(&mut self, until: Instant) -> Result<(), BoxError> {
        loop {
            if self.auditor.has_stopped() {
                return Err("there are no more audits".into());
            }
            let now = Instant::now();
            for member in &mut self.members {
                if member.stopped_until.is_some_and(|until| until <= now) {
                    signal("CONT", member.child.id())?;
                    self.journal.line(format!("fault cont {}", member.name));
                    member.stopped_until = None;
                }
                if let Some(status) = member.child.try_wait()?
                    && !(member.role == Role::Producer && status.success())
                {
                    return Err(format!("{} has ended: {status}", member.name).into());
                }
            }
            if now >= until {
                return Ok(());
            }
            thread::sleep((until - now).min(Duration::from_millis(10)));
        }
    }

    fn kill_one(&mut self) -> Result<(), BoxError> {
        let targets = self.targets(&[Role::Worker, Role::Plain, Role::Bouncer]);
        let Some(at) = targets.get(self.chance.place(targets.len())).copied() else { return Ok(()) };
        let member = &mut self.members[at];
        member.child.kill()?;
        member.child.wait()?;
        self.journal.line(format!("fault kill {}", member.name));
        member.lives += 1;
        let (role, name, args, life) = (member.role, member.name.clone(), member.args.clone(), member.lives);
        let (child, log) = self.spawn(role, &name, &args, life)?;
        (self.members[at].child, self.members[at].log) = (child, log);
        Ok(())
    }

    fn kill_server(&mut self) -> Result<(), BoxError> {
        self.stage.server.kill()?;
        self.journal.line("fault kill server");
        thread::sleep(self.chance.up_to(Duration::from_millis(300)));
        self.stage.server.start_again()?;
        self.journal.line("fault server is back");
        Ok(())
    }

    /// Stops one for half to three lengths of its lease; never more than half of them.
    fn stop_one(&mut self) -> Result<(), BoxError> {
        let most = (self.plan.workers + self.plan.plains) / 2;
        let stoppable = [Role::Worker, Role::Plain];
        let mut targets = self.targets(&stoppable);
        while self.plan.workers + self.plan.plains - targets.len() >= most.max(1) {
            self.rest(Instant::now() + Duration::from_millis(20))?;
            targets = self.targets(&stoppable);
        }
        let Some(at) = targets.get(self.chance.place(targets.len())).copied() else { return Ok(()) };
        let time = self.plan.lease / 2 + self.chance.up_to(self.plan.lease * 5 / 2);
        let member = &mut self.members[at];
        signal("STOP", member.child.id())?;
        member.stopped_until = Some(Instant::now() + time);
        self.journal.line(format!("fault stop {} {time:?}", member.name));
        Ok(())
    }

    /// Ends a backend of a client's, in order or by SIGKILL, upon which the server ends all the others too.
    fn end_backend(&mut self, how: &str) -> Result<(), BoxError> {
        let mut client = self.connect()?;
        let sql = "select pid from pg_stat_activity where application_name like 'campaign %' order by backend_start, pid";
        let pids: Vec<i32> = client.query(sql, &[])?.iter().map(|row| row.get(0)).collect();
        let Some(pid) = pids.get(self.chance.place(pids.len())).copied() else { return Ok(()) };
        if how == "terminate" {
            client.execute("select pg_terminate_backend($1::int)", &[&pid])?;
        } else {
            drop(client);
            signal("KILL", u32::try_from(pid)?)?;
        }
        self.journal.line(format!("fault {how} backend {pid}"));
        Ok(())
    }

    /// Notes that a fault has ended, and waits until all clients were served again, or should have been.
    pub(crate) fn mended(&mut self, fault: Fault) -> Result<(), BoxError> {
        let Some(within) = fault.mended_within() else { return Ok(()) };
        self.journal.line(format!("mended {} {fault:?}", within.as_micros()));
        let (since, deadline) = (now(), Instant::now() + within);
        while Instant::now() < deadline {
            let mut waiting = false;
            for member in &mut self.members {
                // A producer may have ended, as it should.
                waiting |= member.child.try_wait()?.is_none() && !member.log.is_alive_since(since)?;
            }
            if !waiting {
                return Ok(());
            }
            self.rest(Instant::now() + Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Tells the clients that the faults are over.
    fn calm(&mut self) -> Result<(), BoxError> {
        for member in &mut self.members {
            if let Some(stdin) = &mut member.child.stdin {
                stdin.write_all(b"calm\n")?;
            }
        }
        Ok(())
    }

    /// A connection of the director's own, as soon as the server takes it.
    pub(crate) fn connect(&self) -> Result<Client, BoxError> {
        let mut config: Config = self.stage.server.url().parse()?;
        config.application_name("director");
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match config.connect(NoTls) {
                Err(e) if Instant::now() > deadline => return Err(e.into()),
                Err(_) => thread::sleep(Duration::from_millis(20)),
                Ok(client) => return Ok(client),
            }
        }
    }

    // The end.

    fn drain(&mut self) -> Result<(), BoxError> {
        let mut client = self.connect()?;
        let mut left = || -> Result<u64, BoxError> {
            Ok(u64::try_from(client.query_one(store::LEFT, &[])?.get::<_, i64>(0))?)
        };
        let before = left()?;
        let bound = self.plan.bound(before);
        let deadline = Instant::now() + bound;
        self.journal
            .lines([format!("note {before} messages are left"), format!("calm {}", bound.as_micros())]);
        println!("the faults have ended; {before} messages are left");
        loop {
            let asked = Instant::now();
            if left()? == 0 {
                break;
            }
            if Instant::now() > deadline {
                return Ok(());
            }
            // With many messages the question is dear itself.
            self.rest(Instant::now() + Duration::from_millis(50).max(asked.elapsed()))?;
        }
        self.journal.line("drained");
        Ok(())
    }

    /// What an audit has found. Nothing else can be checked: the campaign has not come to its end.
    fn show_broken(&self) -> Result<Vec<Property>, BoxError> {
        let history = History::read(&self.dir)?;
        let property = check::in_reach(&history);
        print!("{}", render_one(IN_REACH, &property, &history));
        Ok(vec![property])
    }

    fn check(&mut self) -> Result<Vec<Property>, BoxError> {
        let store = store::read(&mut self.connect()?)?;
        let history = History::read(&self.dir)?;
        let properties = check(&history, &store);
        println!("{} lines in the logs, {} torn ones", history.lines, history.torn);
        print!("{}", render(&properties, &history));
        Ok(properties)
    }
}

/// Pushes the messages that bounce. They fail and come back at once.
fn push_bouncing(queue: &Queue, journal: &Journal) -> Result<(), BoxError> {
    queue.topic(BOUNCE).set(&TopicSettings::default().with_backoff(Duration::ZERO, Duration::ZERO))?;
    for n in 1..=BOUNCERS {
        let payload = format!("{BOUNCE}-{n} ");
        let (call, hash) = (journal.call(), hash(payload.as_bytes()));
        let message = NewMessage::new(payload).max_attempts(None);
        journal.line(format!("push {call} {BOUNCE} {} {BOUNCE}-{n} {hash:016x}", message.id()));
        queue.push(BOUNCE, message)?;
        journal.line(format!("pushed {call} ok"));
    }
    Ok(())
}

impl Log {
    /// Whether its client has noted since then that it was served.
    fn is_alive_since(&mut self, since: i64) -> Result<bool, BoxError> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(false) };
        file.seek(SeekFrom::Start(self.read))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        // A line that is not whole yet is read next time.
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        self.read += end as u64;
        for line in String::from_utf8_lossy(&text[..end]).lines() {
            if let Some((wall, Entry::Alive)) = Entry::read(line) {
                self.alive = wall;
            }
        }
        Ok(self.alive > since)
    }
}

impl Drop for Director<'_> {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}

/// Sends a signal, by the shell's own `kill`: small images lack the program.
fn signal(name: &str, pid: u32) -> Result<(), BoxError> {
    let status = Command::new("/bin/sh")
        .args(["-c", r#"kill -s "$0" -- "$1""#, name, &pid.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    // A backend may have ended by itself.
    if !status.success() && name != "KILL" {
        return Err(format!("SIG{name} cannot be sent to {pid}").into());
    }
    Ok(())
}
