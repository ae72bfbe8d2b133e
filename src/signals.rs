//! Signals that stop a worker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::error::{Error, Result};
use crate::outside::outside;
use crate::slot::lock;
use crate::stopping::{Cause, Stopping};

/// Listens for signals until it is dropped.
pub(crate) struct Listening {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

/// Once a signal has been listened for, it does not end the process by itself any more. So while no worker
/// listens, this one does.
struct Exit {
    armed: Arc<AtomicBool>,
    listening: Mutex<usize>,
}

fn exit() -> Result<&'static Exit> {
    static EXIT: OnceLock<Exit> = OnceLock::new();
    if let Some(exit) = EXIT.get() {
        return Ok(exit);
    }
    let armed = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&armed))
            .map_err(failed)?;
    }
    Ok(EXIT.get_or_init(|| Exit { armed, listening: Mutex::new(0) }))
}

fn failed(error: std::io::Error) -> Error {
    Error::invalid(format!("cannot listen for signals: {error}"))
}

impl Listening {
    pub(crate) fn start(stopping: &Arc<Stopping>) -> Result<Self> {
        let exit = exit()?;
        let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(failed)?;
        let handle = signals.handle();
        let stopping = Arc::clone(stopping);
        let thread = thread::Builder::new().name("pushpop-signals".into()).spawn(move || {
            let mut heard = false;
            for signal in signals.forever() {
                let name = if signal == SIGTERM { "SIGTERM" } else { "SIGINT" };
                if std::mem::replace(&mut heard, true) {
                    outside(|| {
                        tracing::error!("{name} again: exiting at once, leases that are held will expire")
                    });
                    signal_hook::low_level::exit(128 + signal);
                }
                stopping.stop(Cause::Signal(signal));
                let said = "no more messages are popped; waiting for handlers that run";
                outside(|| tracing::info!("{name}: {said}"));
            }
        });
        let thread = Some(thread.map_err(failed)?);
        *lock(&exit.listening) += 1;
        exit.armed.store(false, Ordering::Relaxed);
        Ok(Listening { handle, thread })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Ok(exit) = exit() {
            let mut listening = lock(&exit.listening);
            *listening -= 1;
            if *listening == 0 {
                exit.armed.store(true, Ordering::Relaxed);
            }
        }
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
