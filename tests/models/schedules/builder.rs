//! In place of `builder.rs`: a queue on the server of the world.

use crate::world::server::Server;
use crate::world::sync::Arc;
use crate::world::thread;
use crate::world::time::Duration;

use super::calls::Calls;
use super::engine::{Engine, Settings};
use super::error::{Error, Result};
use super::link::{Links, Route};
use super::observer::Observer;
use super::queue::{Handle, Queue};
use super::schema::Schema;

#[derive(Default)]
pub(crate) struct Builder {}

impl Builder {
    pub(crate) fn connect(self, _: &str) -> Result<Queue> {
        Err(Error::invalid("there is no server but that of the world"))
    }
}

/// The end of `Builder::open_queue`.
pub(crate) fn open(server: &Arc<Server>, settings: Settings, observer: Arc<dyn Observer>) -> Result<Queue> {
    let route = Route { server: Arc::clone(server), trust: Duration::from_secs(30) };
    let links = Links { route: Arc::new(route) };
    let engine = Engine::new(settings, Calls::new(&Schema), links, observer)?;
    let keeper = Arc::clone(&engine);
    let handle = Arc::new(Handle { engine });
    thread::Builder::new()
        .name("pushpop-keep".into())
        .spawn(move || keeper.keep())
        .map_err(|e| Error::connection(format!("cannot start a thread: {e}")))?;
    Ok(Queue { handle, lease: None })
}
