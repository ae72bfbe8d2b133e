//! A connection to one shape's queue, which checks what goes through it.

use std::collections::HashSet;
use std::error::Error;
use std::fs;
use std::time::Instant;

use postgres::{Client, NoTls, Statement};
use uuid::Uuid;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

const LEASE: f64 = 300.0;

/// What a call cost: CPU of the server process, and time, both in microseconds.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) cpu: f64,
    pub(crate) wall: f64,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Shape {
    Floor,
    Hot,
    Partial,
    Runs,
}

impl Shape {
    pub(crate) const ALL: [Shape; 4] = [Shape::Floor, Shape::Hot, Shape::Partial, Shape::Runs];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Shape::Floor => "floor",
            Shape::Hot => "hot",
            Shape::Partial => "partial",
            Shape::Runs => "runs",
        }
    }

    fn sql(self) -> &'static str {
        match self {
            Shape::Floor => include_str!("../sql/floor.sql"),
            Shape::Hot => include_str!("../sql/hot.sql"),
            Shape::Partial => include_str!("../sql/partial.sql"),
            Shape::Runs => include_str!("../sql/runs.sql"),
        }
    }

    /// The statements that push, pop and settle.
    fn statements(self) -> [&'static str; 3] {
        match self {
            Shape::Floor => [
                "insert into messages select id, payload from unnest($1::uuid[], $2::bytea[]) u(id, payload)
                 where $3::float8 is null",
                "select id, payload, ''::bytea from messages where $2 > 0::float8 order by id limit $1::int4",
                "with gone as (delete from messages where id = any($1) returning 1)
                 select count(*) from gone where $2::bytea[] is not null and $3::bool is not null",
            ],
            _ => [
                "select push('t', $1, $2, clock_timestamp() + $3::float8 * interval '1 second')",
                "select id, payload, token, fence, attempt, ready_at from pop('t', $1, $2)",
                "select settle('t', $1, $2, $3)",
            ],
        }
    }
}

/// A popped message's id and the token of its lease.
pub(crate) struct Lease {
    pub(crate) id: Uuid,
    token: Vec<u8>,
}

pub(crate) struct Queue {
    pub(crate) client: Client,
    pid: i32,
    push: Statement,
    pop: Statement,
    settle: Statement,
    waiting: HashSet<Uuid>,
    leased: HashSet<Uuid>,
    /// Of all pushes, pops (with upkeep) and settles since they were taken last.
    costs: [Cost; 3],
    cpu_before: f64,
    pub(crate) lease: f64,
}

impl Queue {
    /// Makes the shape's tables anew.
    pub(crate) fn create(url: &str, shape: Shape) -> Result<Queue> {
        let name = shape.name();
        let mut client = Client::connect(url, NoTls)?;
        client.batch_execute(&format!(
            "drop schema if exists {name} cascade; create schema {name}; set search_path = {name}"
        ))?;
        client.batch_execute(shape.sql())?;
        client.batch_execute("checkpoint")?;
        Self::open(url, shape)
    }

    /// Connects to tables that are there.
    pub(crate) fn open(url: &str, shape: Shape) -> Result<Queue> {
        let mut client = Client::connect(url, NoTls)?;
        client.batch_execute(&format!("set search_path = {}", shape.name()))?;
        let [push, pop, settle] = shape.statements();
        Ok(Queue {
            pid: client.query_one("select pg_backend_pid()", &[])?.get(0),
            push: client.prepare(push)?,
            pop: client.prepare(pop)?,
            settle: client.prepare(settle)?,
            client,
            waiting: HashSet::new(),
            leased: HashSet::new(),
            costs: Default::default(),
            cpu_before: 0.0,
            lease: LEASE,
        })
    }

    pub(crate) fn push(&mut self, n: usize) -> Result<()> {
        let ids: Vec<Uuid> = (0..n).map(|_| Uuid::now_v7()).collect();
        self.push_ids(&ids, None)?;
        self.waiting.extend(ids);
        Ok(())
    }

    /// Pushes messages with 64 bytes each, which the queue is not to know of.
    pub(crate) fn push_ids(&mut self, ids: &[Uuid], delay: Option<f64>) -> Result<()> {
        let payloads: Vec<Vec<u8>> = ids.iter().map(|id| id.as_bytes().repeat(4)).collect();
        self.timed(0, |q| Ok(q.client.execute(&q.push, &[&ids, &payloads, &delay])?))?;
        Ok(())
    }

    pub(crate) fn expect(&mut self, id: Uuid) {
        self.waiting.insert(id);
    }

    pub(crate) fn pop(&mut self, most: usize) -> Result<Vec<Lease>> {
        let most = i32::try_from(most)?;
        let rows = self.timed(1, |q| Ok(q.client.query(&q.pop, &[&most, &q.lease])?))?;
        let mut leases = Vec::with_capacity(rows.len());
        for row in rows {
            let id: Uuid = row.get(0);
            let payload: &[u8] = row.get(1);
            if !self.waiting.remove(&id) || payload != id.as_bytes().repeat(4) {
                return Err("popped a message that nobody pushed, or twice".into());
            }
            if leases.last().is_some_and(|l: &Lease| l.id > id) {
                return Err("popped messages in another order than pushed".into());
            }
            self.leased.insert(id);
            leases.push(Lease { id, token: row.get(2) });
        }
        Ok(leases)
    }

    /// Pops as many messages as there must be.
    pub(crate) fn pop_all(&mut self, n: usize) -> Result<Vec<Lease>> {
        let leases = self.pop(n)?;
        if leases.len() < n {
            return Err(format!("popped {} of {n} messages", leases.len()).into());
        }
        Ok(leases)
    }

    /// Settles as many leases as hold, and returns how many did.
    pub(crate) fn try_settle(&mut self, leases: &[Lease], keep: bool) -> Result<i64> {
        let ids: Vec<Uuid> = leases.iter().map(|l| l.id).collect();
        let tokens: Vec<&[u8]> = leases.iter().map(|l| l.token.as_slice()).collect();
        self.timed(2, |q| {
            let row = q.client.query_one(&q.settle, &[&ids, &tokens, &keep])?;
            Ok(row.get(0))
        })
    }

    pub(crate) fn settle(&mut self, leases: &[Lease], keep: bool) -> Result<()> {
        let n = self.try_settle(leases, keep)?;
        if usize::try_from(n)? != leases.len() {
            return Err(format!("settled {n} of {} messages", leases.len()).into());
        }
        for lease in leases {
            self.leased.remove(&lease.id);
        }
        Ok(())
    }

    pub(crate) fn upkeep(&mut self) -> Result<()> {
        self.timed(1, |q| Ok(q.client.batch_execute("select upkeep('t')")?))
    }

    /// Does all that becomes due within two hours, and returns what it cost.
    pub(crate) fn sweep(&mut self) -> Result<Cost> {
        let sweep = "select sweep('t', 1000, now() + interval '2 hours')";
        let sweep = self.client.prepare(sweep)?;
        self.take_costs()?;
        loop {
            let n: i64 = self.timed(0, |q| Ok(q.client.query_one(&sweep, &[])?.get(0)))?;
            if n == 0 {
                return Ok(self.take_costs()?[0]);
            }
        }
    }

    /// Fails if a message is missing, or left over, in the queue or its tables, apart from `kept`.
    pub(crate) fn check(&mut self, kept: i64) -> Result<()> {
        let stored: i64 = self.client.query_one("select count(*) from messages", &[])?.get(0);
        let open = i64::try_from(self.waiting.len() + self.leased.len())?;
        if stored != open + kept {
            return Err(format!("{stored} messages are stored, not {}", open + kept).into());
        }
        Ok(())
    }

    /// Pops and settles what is left, and checks that it was all.
    pub(crate) fn drain(&mut self, kept: i64) -> Result<()> {
        loop {
            let leases = self.pop(1000)?;
            if leases.is_empty() {
                break;
            }
            self.settle(&leases, false)?;
        }
        if !self.waiting.is_empty() || !self.leased.is_empty() {
            return Err(format!("{} messages are lost", self.waiting.len()).into());
        }
        self.check(kept)
    }

    pub(crate) fn take_costs(&mut self) -> Result<[Cost; 3]> {
        self.cpu_before = self.cpu()?;
        Ok(std::mem::take(&mut self.costs))
    }

    pub(crate) fn wal(&mut self) -> Result<f64> {
        let sql = "select (pg_current_wal_insert_lsn() - '0/0')::float8";
        Ok(self.client.query_one(sql, &[])?.get(0))
    }

    fn timed<T>(&mut self, part: usize, call: impl FnOnce(&mut Queue) -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = call(self)?;
        self.costs[part].wall += start.elapsed().as_secs_f64() * 1e6;
        // What the process does after its reply counts for the next call.
        let cpu = self.cpu()?;
        self.costs[part].cpu += cpu - self.cpu_before;
        self.cpu_before = cpu;
        Ok(result)
    }

    /// CPU that the server process has used, in microseconds.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/schedstat", self.pid))?;
        let nanos: f64 = stat.split(' ').next().unwrap_or_default().parse()?;
        Ok(nanos / 1000.0)
    }
}
