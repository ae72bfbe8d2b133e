//! Where a campaign is played: a server, and what stands between it and its clients, or behind it.

use std::path::Path;

use pushpop_pg::BoxError;
use pushpop_server::{Network, Proxy, Server, Setup};

use crate::args::Args;
use crate::clock::Clock;
use crate::failover::Standby;
use crate::plan::{Fault, Plan, Replication};
use crate::resources;

pub(crate) struct Stage {
    pub(crate) server: Server,
    pub(crate) standby: Option<Standby>,
    /// Networks, each of some of the clients.
    pub(crate) networks: Vec<Proxy>,
    pub(crate) clock: Option<Clock>,
    pub(crate) setup: Setup,
    /// The ports of the server and of its standby, whichever of them has which.
    ports: Option<[u16; 2]>,
}

impl Stage {
    pub(crate) fn set(plan: &Plan, args: &Args, dir: &Path) -> Result<Stage, BoxError> {
        // What is killed here is processes; still, the server that is killed runs as one in earnest would.
        let crashes = [Fault::KillServer, Fault::KillBackend, Fault::FillDisk].map(|fault| plan.count(fault));
        let fsync = if crashes.iter().sum::<u64>() > 0 { "on" } else { "off" };
        let clients = if plan.count(Fault::TakeConnections) > 0 { "90" } else { "300" };
        let mut setup = Setup::new().setting("fsync", fsync).setting("max_connections", clients);
        if plan.replication == Some(Replication::Synchronous) && !args.is_broken("not-synchronous") {
            setup = setup.setting("synchronous_standby_names", Standby::NAME);
        }
        if plan.count(Fault::FillDisk) > 0 {
            setup = resources::on_small_disk(setup);
        }
        let mut clock = None;
        if plan.count(Fault::StepClock) > 0 {
            let (set, with) = Clock::before(setup, dir)?;
            (clock, setup) = (Some(set), with);
        }
        let server = setup.clone().start()?;
        let networks = if plan.count(Fault::CutNetwork) > 0 { 2 } else { 0 };
        let networks = (0..networks).map(|_| Proxy::before(&server)).collect::<Result<_, _>>()?;
        let (mut standby, mut ports) = (None, None);
        if plan.replication.is_some() {
            let second = Standby::start(&server, &setup, None)?;
            ports = Some([server.port(), second.server.port()]);
            standby = Some(second);
        }
        Ok(Stage { server, standby, networks, clock, setup, ports })
    }

    /// How a client of this number reaches the server, wherever that is.
    pub(crate) fn url(&self, number: usize) -> String {
        if let Some([one, other]) = self.ports {
            let host = self.server.host();
            return format!(
                "postgres://postgres@{host}:{one},{host}:{other}/postgres?target_session_attrs=read-write"
            );
        }
        match self.networks.get(number % self.networks.len().max(1)) {
            Some(network) => network.url(),
            None => self.server.url(),
        }
    }

    /// How the server is reached from here, wherever it is.
    pub(crate) fn own_url(&self) -> String {
        if self.ports.is_some() { self.url(0) } else { self.server.url() }
    }

    pub(crate) fn set_networks(&self, which: &[usize], state: Network) {
        for network in which.iter().filter_map(|n| self.networks.get(*n)) {
            network.set(state);
        }
    }
}
