//! A network between a queue and its server, for tests that break it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pushpop_server::Server;

/// What becomes of bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Network {
    Works,
    /// Connections are taken, and nothing is heard of them: a server that hangs, or a packet filter.
    Silent,
    /// What is sent arrives; no answer does.
    OneWay,
    /// Connections end as soon as they are made, as do those that are open.
    Reset,
    /// One connection ends when this many more bytes of answers have been passed on; then all is well.
    CutAfter(usize),
}

/// A TCP proxy before a server.
pub(crate) struct Proxy {
    port: u16,
    network: Arc<Mutex<Network>>,
    cuts: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) fn before(server: &Server) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (network, cuts) = (Arc::new(Mutex::new(Network::Works)), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&cuts);
        let (state, to) = (Arc::clone(&network), (server.host().to_owned(), server.port()));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect((to.0.as_str(), to.1)) else { continue };
                for (from, to, is_answer) in [(&client, &server, false), (&server, &client, true)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let (network, cuts) = (Arc::clone(&state), Arc::clone(&counted));
                    thread::spawn(move || pump(from, to, is_answer, &network, &cuts));
                }
            }
        });
        Proxy { port, network, cuts }
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    pub(crate) fn set(&self, network: Network) {
        *self.network.lock().unwrap() = network;
    }

    /// How many connections were cut within an answer.
    pub(crate) fn cuts(&self) -> usize {
        self.cuts.load(Ordering::Relaxed)
    }
}

/// Passes bytes on as the network allows. What it holds back arrives when it works again.
fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    is_answer: bool,
    network: &Mutex<Network>,
    cuts: &AtomicUsize,
) {
    from.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut buffer = [0; 65536];
    let mut held = 0;
    'open: loop {
        let state = *network.lock().unwrap();
        let silent = state == Network::Silent || state == Network::OneWay && is_answer;
        if state == Network::Reset {
            break;
        }
        if silent {
            thread::sleep(Duration::from_millis(5));
            continue;
        }
        if held == 0 {
            held = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                Err(_) => break,
            };
            // The network may have changed while there was nothing to read.
            continue;
        }
        if is_answer {
            let mut state = network.lock().unwrap();
            if let Network::CutAfter(left) = *state {
                if left < held {
                    *state = Network::Works;
                    drop(state);
                    cuts.fetch_add(1, Ordering::Relaxed);
                    let _ = to.write_all(&buffer[..left]);
                    break 'open;
                }
                *state = Network::CutAfter(left - held);
            }
        }
        if to.write_all(&buffer[..held]).is_err() {
            break;
        }
        held = 0;
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
