//! A standby takes the place of its server, and has a new standby made of it.
//!
//! The server is killed, its standby promoted, and a new standby takes the address of the dead. All clients have one
//! URL with both addresses. Synchronous: nothing that was acknowledged may be lost, so nothing is exempt. Asynchronous:
//! the standby is cut off for up to a second before. What was acknowledged meanwhile may be lost, and
//! nothing else; from when on is said by the newest of the director's beats that the standby has. A message of which a
//! call falls into that window is exempt from 1 and 8 if its push was acknowledged there, and from 3, 4 and 5: its next delivery may
//! have the same number, and begin before the deadline of the one that is forgotten. No key of a token may come again, not
//! even one that is forgotten: the director writes them down before it kills.

use std::time::{Duration, Instant};

use pushpop_pg::BoxError;
use pushpop_pg::postgres::{Client, NoTls};
use pushpop_pg::time::OffsetDateTime;
use pushpop_server::{Network, Proxy, Server, Setup};

use crate::director::Director;
use crate::journal::now;
use crate::plan::{Fault, Replication};
use crate::store::micros;

const BEAT: &str = "insert into campaign.beats (at) values (clock_timestamp()) returning at";

/// How long a standby is cut off before its server dies.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(1);

/// How late a client may write down what it was answered before.
const LATE: i64 = 1_000_000;

pub(crate) struct Standby {
    pub(crate) server: Server,
    /// Between it and its server.
    network: Proxy,
}

impl Standby {
    /// What the server knows it by.
    pub(crate) const NAME: &str = "standby";

    /// Makes a standby, and returns when it follows.
    pub(crate) fn start(primary: &Server, setup: &Setup, port: Option<u16>) -> Result<Standby, BoxError> {
        let network = Proxy::before(primary)?;
        let (host, to, name) = (primary.host(), network.port(), Standby::NAME);
        let from = format!("host={host} port={to} user=postgres application_name={name}");
        let setup = setup.clone().standby_of(&from);
        let server = match port {
            Some(port) => setup.port(port).start()?,
            None => setup.start()?,
        };
        let mut client = Client::connect(&primary.url(), NoTls)?;
        let sql = "select from pg_stat_replication where application_name = $1 and state = 'streaming'
                   and (sync_state = 'sync' or current_setting('synchronous_standby_names') = '')";
        let deadline = Instant::now() + Duration::from_secs(60);
        while client.query(sql, &[&Standby::NAME])?.is_empty() {
            if Instant::now() > deadline {
                return Err("the standby does not follow".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Standby { server, network })
    }
}

impl Director<'_> {
    pub(crate) fn promote(&mut self) -> Result<(), BoxError> {
        let Some(standby) = self.stage.standby.take() else { return Ok(()) };
        let forgets = self.plan.replication == Some(Replication::Asynchronous);
        if forgets || self.args.is_broken("not-synchronous") {
            self.fall_behind(&standby, forgets)?;
        }
        self.stage.server.kill()?;
        let killed = now();
        self.journal.line("fault kill server");
        let pause = self.chance.up_to(Duration::from_millis(300));
        self.rest(Instant::now() + pause)?;

        let mut client = Client::connect(&standby.server.url(), NoTls)?;
        if !client.query_one("select pg_promote()", &[])?.get::<_, bool>(0) {
            return Err("the standby is not promoted".into());
        }
        self.journal.line("fault standby is promoted");
        if forgets {
            let last: OffsetDateTime = client.query_one("select max(at) from campaign.beats", &[])?.get(0);
            self.journal.line(format!("window {} {}", micros(last), killed + LATE));
        }
        let dead = std::mem::replace(&mut self.stage.server, standby.server);
        let port = dead.port();
        drop((dead, standby.network));
        if forgets {
            self.mended(Fault::Promote)?;
        }
        self.stage.standby = Some(Standby::start(&self.stage.server, &self.stage.setup, Some(port))?);
        self.journal.line("fault standby follows");
        // Until then nothing could be acknowledged.
        if forgets { Ok(()) } else { self.mended(Fault::Promote) }
    }

    /// Cuts the standby off, and lets its server go on for a while.
    fn fall_behind(&mut self, standby: &Standby, noted: bool) -> Result<(), BoxError> {
        let mut client = self.connect()?;
        let first: OffsetDateTime = client.query_one(BEAT, &[])?.get(0);
        let sql = "select from campaign.beats where at = $1";
        let mut behind = Client::connect(&standby.server.url(), NoTls)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while behind.query(sql, &[&first])?.is_empty() {
            if Instant::now() > deadline {
                return Err("the standby does not follow".into());
            }
            self.rest(Instant::now() + Duration::from_millis(5))?;
        }
        drop(behind);
        let time = SHORTEST + self.chance.up_to(LONGEST - SHORTEST);
        standby.network.set(Network::Lost);
        self.journal.line(format!("fault standby is cut off for {time:?}"));
        let until = Instant::now() + time;
        while Instant::now() < until {
            client.execute(BEAT, &[])?;
            self.rest(Instant::now() + Duration::from_millis(20))?;
        }
        if noted {
            let sql = "select encode(key, 'hex'), at from campaign.grants where at >= $1";
            let keys = client.query(sql, &[&first])?;
            self.journal.lines(keys.iter().map(|row| {
                let (key, at): (String, OffsetDateTime) = (row.get(0), row.get(1));
                format!("granted {key} {}", micros(at))
            }));
        }
        Ok(())
    }
}
