//! A network between clients and a server, which can be broken and mended.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, HOST, Server};

/// How long a connection that has lost something stays open, and silent, at least, and once the network works again: in
/// earnest it is the time-outs of TCP at both ends that close it, some of them later.
const LINGER: Duration = Duration::from_secs(3);

/// What becomes of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// They arrive.
    Works,
    /// Connections are taken, and nothing is heard of them: a server that hangs. What is held back arrives when the
    /// network works again.
    Silent,
    /// What is sent arrives; answers are held back.
    OneWay,
    /// They are lost, in both directions: a packet filter that forgets its connections. One that was open then, idle or
    /// not, passes nothing more, nor does anybody tell; some time after it was tried it is closed.
    Lost,
    /// Only what is sent is lost.
    RequestsLost,
    /// Only answers are lost.
    AnswersLost,
    /// Connections end as soon as they are made, as do those that are open.
    Reset,
    /// One connection ends when this many more bytes of answers have been passed on; then all is well.
    CutAfter(usize),
}

impl Network {
    fn holds(self, is_answer: bool) -> bool {
        self == Network::Silent || self == Network::OneWay && is_answer
    }

    fn loses(self, is_answer: bool) -> bool {
        match self {
            Network::Lost => true,
            Network::RequestsLost => !is_answer,
            Network::AnswersLost => is_answer,
            _ => false,
        }
    }
}

/// A TCP proxy before a server.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// And since when.
    network: Mutex<(Network, Instant)>,
    cuts: AtomicUsize,
    ended: AtomicBool,
}

impl Shared {
    fn network(&self) -> MutexGuard<'_, (Network, Instant)> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Proxy {
    /// Starts a proxy before a server, wherever that is stopped and started again.
    pub fn before(server: &Server) -> Result<Proxy, Error> {
        let listener = TcpListener::bind((HOST, 0)).map_err(Error::doing("opening a port for a proxy"))?;
        let port = listener.local_addr().map_err(Error::doing("opening a port for a proxy"))?.port();
        let shared = Arc::new(Shared {
            network: Mutex::new((Network::Works, Instant::now())),
            cuts: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        });
        let (taking, to) = (Arc::clone(&shared), server.port());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if taking.ended.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(server) = TcpStream::connect((HOST, to)) else { continue };
                for (from, to, is_answer) in [(&client, &server, false), (&server, &client, true)] {
                    let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { continue };
                    let shared = Arc::clone(&taking);
                    thread::spawn(move || pump(from, to, is_answer, &shared));
                }
            }
        });
        Ok(Proxy { port, shared })
    }

    /// Returns the URL of the server's database `postgres` by way of the proxy, for its superuser.
    pub fn url(&self) -> String {
        format!("postgres://postgres@{HOST}:{}/postgres", self.port)
    }

    /// Returns the TCP port that the proxy listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes what becomes of bytes from now on.
    pub fn set(&self, network: Network) {
        *self.shared.network() = (network, Instant::now());
    }

    /// Returns how many connections were cut within an answer.
    pub fn cuts(&self) -> usize {
        self.shared.cuts.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // The thread that takes connections is woken by one.
        drop(TcpStream::connect((HOST, self.port)));
    }
}

/// Passes bytes on as the network allows.
fn pump(mut from: TcpStream, mut to: TcpStream, is_answer: bool, shared: &Shared) {
    let _ = from.set_read_timeout(Some(Duration::from_millis(20)));
    let mut buffer = [0; 65536];
    let mut held = 0;
    // Whether it is forgotten, and since when that has cost something; and whether no more will come.
    let (mut lost, mut cost, mut over) = (false, None::<Instant>, false);
    while !shared.ended.load(Ordering::Relaxed) {
        let (state, since) = *shared.network();
        let loses = state.loses(is_answer);
        lost |= loses;
        let is_noticed = cost.is_some_and(|at| at.max(since).elapsed() > LINGER);
        if state == Network::Reset || !loses && (over || is_noticed) {
            break;
        }
        if over || state.holds(is_answer) {
            thread::sleep(Duration::from_millis(5));
            continue;
        }
        if held == 0 {
            match from.read(&mut buffer) {
                Ok(0) => over = true,
                Ok(n) => held = n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => over = true,
            }
            // The network may have changed while there was nothing to read.
            continue;
        }
        if lost {
            cost = cost.or_else(|| Some(Instant::now()));
            held = 0;
            continue;
        }
        if is_answer {
            let mut network = shared.network();
            if let Network::CutAfter(left) = network.0 {
                if left < held {
                    network.0 = Network::Works;
                    drop(network);
                    shared.cuts.fetch_add(1, Ordering::Relaxed);
                    let _ = to.write_all(&buffer[..left]);
                    break;
                }
                network.0 = Network::CutAfter(left - held);
            }
        }
        if to.write_all(&buffer[..held]).is_err() {
            break;
        }
        held = 0;
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
