//! The campaigns: one engine, with other numbers and other faults.

use std::time::Duration;

use pushpop_pg::BoxError;

use crate::args::Args;

/// The topics of a campaign.
pub(crate) const WORK: &str = "work";
/// Completed together with an effect, in one transaction.
pub(crate) const EFFECTS: &str = "effects";
/// Consumed by a hand-written client that calls the functions of the schema.
pub(crate) const PLAIN: &str = "plain";
/// One producer and one consumer, neither of which is killed or stopped.
pub(crate) const ORDER: &str = "order";

/// Popped and given back all the time, and completed only when the faults are over.
pub(crate) const BOUNCE: &str = "bounce";

/// How many messages bounce, and how long those are leased.
pub(crate) const BOUNCERS: u64 = 6;
pub(crate) const BOUNCE_LEASE: Duration = Duration::from_secs(1);

/// Where effects and the tokens that were handed out are written down.
pub(crate) const SCHEMA: &str = "campaign";

/// How long settled messages are kept: until the check, whatever the clock of the server shows.
pub(crate) const KEEP: Duration = Duration::from_secs(86_400);

/// What is allowed on a machine that does other things too.
pub(crate) const ALLOWANCE: Duration = Duration::from_secs(5);

/// How fast what is left when the faults end is worked off at least, one at a time as much of it is, and how long
/// that may take at most.
const LEFT_A_SECOND: u64 = 20;
const LEFT_MOST: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) seed: u64,
    pub(crate) messages: u64,
    /// Processes with the library, each with several threads, and hand-written ones.
    pub(crate) workers: usize,
    pub(crate) plains: usize,
    /// Processes that only bounce messages.
    pub(crate) bouncers: usize,
    /// The time from one audit of the tables to the next; zero: there are none.
    pub(crate) audit: Duration,

    /// How often each fault, and the time from one to the next.
    faults: Vec<(Fault, u64)>,
    pub(crate) interval: Duration,
    /// How long the producers take, so that there is something to do until the last fault.
    pub(crate) spread: Duration,

    pub(crate) lease: Duration,
    pub(crate) poll: Duration,
    /// The longest that the work on a message usually takes.
    pub(crate) work: Duration,
    /// Of a hundred pushes, how many are made in a transaction, which notifies whether anybody waits or not.
    pub(crate) in_transaction: u64,
    /// Of a thousand answers to a push, how many are taken for lost.
    pub(crate) lost_answers: u64,
    /// The most messages in one call.
    pub(crate) batch: u64,
    /// Of a hundred messages: those of the topics effects, plain and order. The others are work.
    pub(crate) shares: [u64; 3],
    /// Nobody polls: what is not woken sleeps on. For the variants that lose wake-ups.
    pub(crate) wakes_only: bool,

    /// How long clients wait for an answer, and for a connection.
    pub(crate) timeouts: [Duration; 2],
    /// The server has a standby, which takes its place.
    pub(crate) replication: Option<Replication>,
}

/// How a standby follows its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replication {
    /// A commit is answered when the standby has it.
    Synchronous,
    /// Commits may be lost when the standby takes over.
    Asynchronous,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Of a client.
    Kill,
    KillServer,
    Stop,
    Terminate,
    KillBackend,
    CutNetwork,
    Promote,
    FillDisk,
    TakeConnections,
    EndIdle,
    OnlyRead,
    StepClock,
}

impl Fault {
    /// All of them, with the options that say how many, and how long each takes together with its mending.
    pub(crate) const ALL: [(Fault, &'static str, u64); 12] = [
        (Fault::Kill, "kills", 0),
        // A server that was killed needs a moment to come back.
        (Fault::KillServer, "server-kills", 800),
        (Fault::Stop, "stops", 0),
        (Fault::Terminate, "terminations", 0),
        (Fault::KillBackend, "backend-kills", 800),
        (Fault::CutNetwork, "cuts", 3_300),
        (Fault::Promote, "promotions", 4_500),
        (Fault::FillDisk, "full-disks", 3_200),
        (Fault::TakeConnections, "full-servers", 3_200),
        (Fault::EndIdle, "idle-kills", 1_500),
        (Fault::OnlyRead, "read-onlys", 3_200),
        (Fault::StepClock, "clock-steps", 300),
    ];

    /// A fault that ends at a certain moment: in what time every client has to be served again, by itself. What is
    /// allowed for a loaded machine is in it.
    pub(crate) fn mended_within(self) -> Option<Duration> {
        match self {
            Fault::CutNetwork | Fault::Promote => Some(Duration::from_secs(10)),
            Fault::FillDisk
            | Fault::TakeConnections
            | Fault::EndIdle
            | Fault::OnlyRead
            | Fault::StepClock => Some(Duration::from_secs(5 + 2)),
            _ => None,
        }
    }
}

/// A network that is cut hides for good what is on its way: clients must not wait for long.
const SHORT_TIMEOUTS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(1)];
const TIMEOUTS: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(2)];

/// Name, messages, milliseconds between faults, and which of those.
type Row = (&'static str, u64, u64, &'static [(Fault, u64)]);

#[rustfmt::skip]
const TABLE: [Row; 12] = [
    ("quiet", 1_000, 0, &[]),
    ("smoke", 15_000, 400, &[(Fault::Kill, 200), (Fault::KillServer, 5)]),
    ("kills", 60_000, 300, &[(Fault::Kill, 1_000), (Fault::KillServer, 100)]),
    ("million", 1_000_000, 2_000, &[(Fault::Kill, 100)]),
    ("pauses", 12_000, 450, &[(Fault::Stop, 500)]),
    ("backends", 20_000, 400, &[(Fault::Terminate, 300), (Fault::KillBackend, 50)]),
    ("effects", 111_112, 1_000, &[(Fault::Kill, 200)]),
    ("network", 20_000, 1_000, &[(Fault::CutNetwork, 60)]),
    ("failover", 10_000, 2_000, &[(Fault::Promote, 20)]),
    ("failover-async", 10_000, 2_000, &[(Fault::Promote, 20)]),
    ("resources", 15_000, 1_000, &[
        (Fault::FillDisk, 10), (Fault::TakeConnections, 10), (Fault::EndIdle, 10), (Fault::OnlyRead, 10),
    ]),
    ("clock", 15_000, 2_000, &[(Fault::StepClock, 40)]),
];

impl Plan {
    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|(name, ..)| *name)
    }

    /// The campaign of a name, with the numbers that the arguments say instead.
    pub(crate) fn read(name: &str, args: &Args) -> Result<Plan, BoxError> {
        let known = TABLE.iter().find(|(known, ..)| *known == name);
        let (_, messages, interval, usual) = known.ok_or_else(|| format!("there is no campaign {name}"))?;
        let pauses = name == "pauses";
        let (shares, batch) = match name {
            "effects" => ([90, 0, 10], 20),
            "million" => ([0, 0, 2], 500),
            // One written by hand would need time-outs of its own to notice that nobody answers.
            "network" => ([15, 0, 10], 60),
            _ => ([15, 10, 10], 60),
        };
        let number = |option: &str, default: u64| args.number(option, default);
        let wakes_only = number("wakes-only", 0)? > 0;
        let poll = Duration::from_secs(if wakes_only { 3600 } else { 1 });
        let mut faults = Vec::new();
        for (fault, option, _) in Fault::ALL {
            let default = usual.iter().find(|(usual, _)| *usual == fault).map_or(0, |(_, count)| *count);
            faults.push((fault, number(option, default)?));
        }
        let interval = number("interval", *interval)?;
        let spread = faults.iter().zip(Fault::ALL).map(|((_, n), (.., takes))| n * (interval + takes)).sum();
        let synchronous = (name == "failover").then_some(Replication::Synchronous);
        let asynchronous = (name == "failover-async").then_some(Replication::Asynchronous);
        let plan = Plan {
            name: name.to_owned(),
            seed: number("seed", 1)?,
            messages: number("messages", *messages)?,
            workers: args.number("workers", 8)?,
            plains: args.number("plains", usize::from(shares[1] > 0))?,
            // Whoever only sleeps until it is woken does not bounce.
            bouncers: args.number("bouncers", usize::from(!wakes_only))?,
            audit: args.millis("audit", Duration::from_millis(250))?,
            faults,
            interval: Duration::from_millis(interval),
            spread: Duration::from_millis(number("spread", spread)?),
            lease: args.millis("lease", Duration::from_secs(if pauses { 1 } else { 2 }))?,
            poll: args.millis("poll", poll)?,
            work: args.millis("work", Duration::from_millis(if pauses { 150 } else { 3 }))?,
            in_transaction: number("in-transaction", 5)?.min(40),
            lost_answers: number("lost-answers", 5)?,
            batch: number("batch", batch)?,
            shares: [
                number("effects-share", shares[0])?,
                number("plain-share", shares[1])?,
                number("order-share", shares[2])?,
            ],
            wakes_only,
            timeouts: if name == "network" { SHORT_TIMEOUTS } else { TIMEOUTS },
            replication: synchronous.or(asynchronous),
        };
        if plan.shares.iter().sum::<u64>() > 100 {
            return Err("the shares of the topics are more than a hundred".into());
        }
        if plan.count(Fault::Promote) > 0 && plan.replication.is_none() {
            return Err("there is a standby in the campaigns failover and failover-async only".into());
        }
        if plan.has_pulse() && plan.count(Fault::Kill) > 0 {
            return Err("a client that is killed cannot be asked whether it is served again".into());
        }
        Ok(plan)
    }

    /// How often a fault comes.
    pub(crate) fn count(&self, fault: Fault) -> u64 {
        self.faults.iter().filter(|(known, _)| *known == fault).map(|(_, count)| count).sum()
    }

    /// All faults, one by one.
    pub(crate) fn all_faults(&self) -> Vec<Fault> {
        self.faults.iter().flat_map(|(fault, count)| (0..*count).map(|_| *fault)).collect()
    }

    /// The faults in words.
    pub(crate) fn faults_in_words(&self) -> String {
        let words = Fault::ALL.iter().filter(|(fault, ..)| self.count(*fault) > 0);
        let words: Vec<String> =
            words.map(|(fault, option, _)| format!("{} {option}", self.count(*fault))).collect();
        if words.is_empty() { "no faults".into() } else { words.join(", ") }
    }

    /// Whether clients say all the time that they are served, as there are faults after which that is asked.
    pub(crate) fn has_pulse(&self) -> bool {
        self.faults.iter().any(|(fault, count)| *count > 0 && fault.mended_within().is_some())
    }

    pub(crate) fn ordered(&self) -> u64 {
        self.messages * self.shares[2] / 100
    }

    /// For how long a message that bounces may be out of sight: a lease, a poll interval and two seconds; a fault, until all
    /// are served again; and what a loaded machine is allowed.
    pub(crate) fn reach(&self) -> Duration {
        let faults = Fault::ALL.iter().filter(|(fault, ..)| self.count(*fault) > 0);
        let longest = faults
            .map(|(fault, _, takes)| {
                Duration::from_millis(*takes) + fault.mended_within().unwrap_or_default()
            })
            .max();
        let poll = self.poll.min(Duration::from_secs(1));
        BOUNCE_LEASE + poll + Duration::from_secs(2) + longest.unwrap_or_default() + ALLOWANCE
    }

    /// How long the backlog may take to be gone once the faults have ended: a lease, a poll interval and two
    /// seconds; the longest work, which outlasts a lease; and what a loaded machine is allowed.
    pub(crate) fn bound(&self, left: u64) -> Duration {
        let poll = self.poll.min(Duration::from_secs(1));
        let usual = self.lease + poll + Duration::from_secs(2);
        let left = Duration::from_millis(left * 1_000 / LEFT_A_SECOND).min(LEFT_MOST);
        usual + self.lease * 3 / 2 + ALLOWANCE + left
    }
}
