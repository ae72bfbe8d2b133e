//! The one connection that listens for pushes of other processes.

use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use fallible_iterator::FallibleIterator;
use postgres::Client;

use crate::crew::backoff;
use crate::engine::Engine;
use crate::error::Result;
use crate::link::{Route, within};
use crate::outside::{outside, steadily};

/// How often the thread looks whether the queue has ended.
const TURN: Duration = Duration::from_millis(200);

/// Starts the thread. If that cannot be done, polling has to do.
pub(crate) fn start(engine: &Arc<Engine>, route: &Arc<Route>) -> io::Result<()> {
    let (engine, route) = (Arc::downgrade(engine), Arc::clone(route));
    let work = move || steadily(|| keep_listening(&engine, &route));
    thread::Builder::new().name("pushpop-listen".into()).spawn(work).map(drop)
}

fn keep_listening(engine: &Weak<Engine>, route: &Arc<Route>) {
    let mut failures = 0;
    while let Some(patience) = patience(engine) {
        match listen(engine, route, patience) {
            Ok(()) => failures = 0,
            Err(e) => {
                failures += 1;
                outside(|| tracing::debug!("cannot listen, polling meanwhile: {e}"));
                rest(engine, backoff(failures));
            }
        }
    }
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

/// Listens on a connection until it breaks, its server is not what was asked for any more, or the queue ends.
fn listen(engine: &Weak<Engine>, route: &Arc<Route>, patience: Duration) -> Result<()> {
    let Some(sql) = engine.upgrade().map(|queue| queue.calls.listen.clone()) else { return Ok(()) };
    let client = route.connect(Instant::now() + patience)?;
    let mut client = ask(route, client, patience, move |client| Ok(client.batch_execute(&sql)?))?;
    // First listen, then look: what was pushed before is not told.
    if let Some(queue) = engine.upgrade() {
        queue.look_everywhere();
    }
    loop {
        let heard = hear(engine, &mut client, Instant::now() + route.trust);
        if !matches!(heard, Ok(true)) {
            route.bury(client);
            return heard.map(drop);
        }
        let asked = Arc::clone(route);
        client = ask(route, client, patience, move |client| asked.prove(client))?;
    }
}

/// Has a server answer within a time. One that is frozen would hold this thread for as long as it is.
fn ask(
    route: &Arc<Route>,
    mut client: Client,
    patience: Duration,
    question: impl FnOnce(&mut Client) -> Result<()> + Send + 'static,
) -> Result<Client> {
    let route = Arc::clone(route);
    within(Instant::now() + patience, "pushpop-ask", move || match question(&mut client) {
        Ok(()) => Ok(client),
        Err(e) => {
            route.bury(client);
            Err(e)
        }
    })
}

/// Passes notifications on until a certain time; false if the queue ends before.
fn hear(engine: &Weak<Engine>, client: &mut Client, until: Instant) -> Result<bool> {
    while Instant::now() < until {
        let heard = client.notifications().timeout_iter(TURN).next()?;
        let Some(queue) = engine.upgrade().filter(|queue| !queue.has_ended()) else { return Ok(false) };
        if let Some(notification) = heard {
            queue.notified(notification.payload());
        }
    }
    Ok(true)
}
