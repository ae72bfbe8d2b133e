//! In place of `link.rs`: the way to the server of the world.

use crate::world::postgres::types::{ToSql, Type};
use crate::world::postgres::{Client, Row, Transaction};
use crate::world::r2d2::ManageConnection;
use crate::world::random;
use crate::world::server::Server;
use crate::world::sync::Arc;
use crate::world::thread;
use crate::world::time::{Duration, Instant};

use super::error::{Error, ErrorKind, Result};

pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) sql: String,
    pub(crate) types: &'static [Type],
}

impl Call {
    pub(crate) fn run_in(&self, _: &mut Transaction<'_>, _: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        Err(Error::invalid("there are no transactions here"))
    }
}

/// Nothing of this world hangs.
pub(crate) fn within<T>(_: Instant, _: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    work()
}

pub(crate) struct Route {
    pub(crate) server: Arc<Server>,
    pub(crate) trust: Duration,
}

impl Route {
    #[allow(clippy::unnecessary_wraps, reason = "as the real one has it")]
    pub(crate) fn connect(&self, _: Instant) -> Result<Client> {
        thread::sleep(Duration::from_millis(random(30)));
        Ok(Client::new(&self.server))
    }

    pub(crate) fn doubt(&self, _: Instant) {}

    #[allow(clippy::unnecessary_wraps, reason = "as the real one has it")]
    pub(crate) fn prove(&self, _: &mut Client) -> Result<()> {
        Ok(())
    }

    pub(crate) fn bury(&self, client: Client) {
        drop(client);
    }
}

pub(crate) struct Link(Arc<Server>);

impl Link {
    pub(crate) fn run(
        &mut self,
        _: Instant,
        call: &Call,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        let params = params.iter().map(|param| param.value()).collect();
        self.0.run(call.name, params).map_err(|e| {
            let error = Error::from(e);
            let unknown = matches!(error.kind(), ErrorKind::Connection | ErrorKind::Timeout);
            error.indeterminate(unknown)
        })
    }

    pub(crate) fn was_renewed(&mut self) -> bool {
        false
    }
}

pub(crate) struct Links {
    pub(crate) route: Arc<Route>,
}

impl ManageConnection for Links {
    type Connection = Link;

    fn connect(&self) -> Link {
        Link(Arc::clone(&self.route.server))
    }
}
