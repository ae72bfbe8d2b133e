//! The one connection that listens for pushes of other processes.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use fallible_iterator::FallibleIterator;
use postgres::Client;

use crate::crew::backoff;
use crate::engine::Engine;
use crate::error::Result;
use crate::link::{Route, bury};

/// How often the thread looks whether the queue has ended.
const TURN: Duration = Duration::from_millis(200);

/// How long a silent connection is trusted.
const TRUST: Duration = Duration::from_secs(30);

/// Starts the thread; false if that cannot be done, and polling has to do.
pub(crate) fn start(engine: &Arc<Engine>, route: &Arc<Route>) -> bool {
    let (engine, route) = (Arc::downgrade(engine), Arc::clone(route));
    let spawned = thread::Builder::new().name("pushpop-listen".into()).spawn(move || {
        let mut failures = 0;
        while let Some(patience) = patience(&engine) {
            match listen(&engine, &route, patience) {
                Ok(()) => failures = 0,
                Err(e) => {
                    failures += 1;
                    tracing::debug!("cannot listen, polling meanwhile: {e}");
                    rest(&engine, backoff(failures));
                }
            }
        }
    });
    if let Err(e) = &spawned {
        tracing::warn!("cannot start a thread to listen, polling instead: {e}");
    }
    spawned.is_ok()
}

/// The operation time-out, as long as the queue is in use.
fn patience(engine: &Weak<Engine>) -> Option<Duration> {
    engine.upgrade().filter(|engine| !engine.has_ended()).map(|engine| engine.settings.operation_timeout)
}

fn rest(engine: &Weak<Engine>, time: Duration) {
    let until = Instant::now() + time;
    while patience(engine).is_some() && Instant::now() < until {
        thread::sleep(TURN.min(until.saturating_duration_since(Instant::now())));
    }
}

/// Listens on a connection until it breaks or the queue ends.
fn listen(engine: &Weak<Engine>, route: &Arc<Route>, patience: Duration) -> Result<()> {
    let mut client = route.connect(Instant::now() + patience)?;
    let heard = hear(engine, &mut client);
    bury(client);
    heard
}

fn hear(engine: &Weak<Engine>, client: &mut Client) -> Result<()> {
    let Some(queue) = engine.upgrade() else { return Ok(()) };
    client.batch_execute(&queue.calls.listen)?;
    // First listen, then look: what was pushed before is not told.
    queue.look_everywhere();
    drop(queue);
    let mut proved = Instant::now();
    loop {
        let heard = client.notifications().timeout_iter(TURN).next()?;
        let Some(queue) = engine.upgrade().filter(|queue| !queue.has_ended()) else { return Ok(()) };
        match heard {
            Some(notification) => {
                proved = Instant::now();
                queue.notified(notification.payload());
            }
            None if proved.elapsed() > TRUST => {
                client.is_valid(queue.settings.operation_timeout)?;
                proved = Instant::now();
            }
            None => {}
        }
    }
}
