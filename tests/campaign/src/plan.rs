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

/// Where effects and the tokens that were handed out are written down.
pub(crate) const SCHEMA: &str = "campaign";

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

    // Faults, and the time from one to the next.
    pub(crate) kills: u64,
    pub(crate) server_kills: u64,
    pub(crate) stops: u64,
    pub(crate) terminations: u64,
    pub(crate) backend_kills: u64,
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
}

/// Name, messages, worker kills, server kills, stops, terminations, backend kills, milliseconds between faults.
const TABLE: [(&str, [u64; 7]); 7] = [
    ("quiet", [1_000, 0, 0, 0, 0, 0, 0]),
    ("smoke", [15_000, 200, 5, 0, 0, 0, 400]),
    ("kills", [60_000, 1_000, 100, 0, 0, 0, 300]),
    ("million", [1_000_000, 100, 0, 0, 0, 0, 2_000]),
    ("pauses", [12_000, 0, 0, 500, 0, 0, 450]),
    ("backends", [20_000, 0, 0, 0, 300, 50, 400]),
    ("effects", [111_112, 200, 0, 0, 0, 0, 1_000]),
];

impl Plan {
    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|(name, _)| *name)
    }

    /// The campaign of a name, with the numbers that the arguments say instead.
    pub(crate) fn read(name: &str, args: &Args) -> Result<Plan, BoxError> {
        let known = TABLE.iter().find(|(known, _)| *known == name);
        let (_, [messages, kills, server_kills, stops, terminations, backend_kills, interval]) =
            known.ok_or_else(|| format!("there is no campaign {name}"))?;
        let pauses = name == "pauses";
        let (shares, batch) = match name {
            "effects" => ([90, 0, 10], 20),
            "million" => ([0, 0, 2], 500),
            _ => ([15, 10, 10], 60),
        };
        let number = |option: &str, default: u64| args.number(option, default);
        let wakes_only = number("wakes-only", 0)? > 0;
        let poll = Duration::from_secs(if wakes_only { 3600 } else { 1 });
        let [kills, server_kills, stops, terminations, backend_kills] = [
            number("kills", *kills)?,
            number("server-kills", *server_kills)?,
            number("stops", *stops)?,
            number("terminations", *terminations)?,
            number("backend-kills", *backend_kills)?,
        ];
        let interval = number("interval", *interval)?;
        let faults = kills + server_kills + stops + terminations + backend_kills;
        // A server that was killed needs a moment to come back.
        let spread = interval * faults + 800 * (server_kills + backend_kills);
        let plan = Plan {
            name: name.to_owned(),
            seed: number("seed", 1)?,
            messages: number("messages", *messages)?,
            workers: args.number("workers", 8)?,
            plains: args.number("plains", usize::from(shares[1] > 0))?,
            kills,
            server_kills,
            stops,
            terminations,
            backend_kills,
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
        };
        if plan.shares.iter().sum::<u64>() > 100 {
            return Err("the shares of the topics are more than a hundred".into());
        }
        Ok(plan)
    }

    pub(crate) fn ordered(&self) -> u64 {
        self.messages * self.shares[2] / 100
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
