//! The pulse of a client: small messages of its own, all the time, by which the log shows when it is served. They
//! are messages like the others to the checker.

use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::uuid::Uuid;
use pushpop_pg::{NewMessage, Queue};

use crate::chance::hash;
use crate::journal::{Journal, outcome};

/// The topic of those that have no consumer of their own.
pub(crate) const PULSE: &str = "pulse";

/// From one to the next.
pub(crate) const PERIOD: Duration = Duration::from_millis(250);

/// How long one is pushed again and again: longer than any fault lasts.
const PATIENCE: Duration = Duration::from_secs(60);

/// Pushes until it is over, each message until it is answered; `answered` is told of each.
pub(crate) fn push(
    queue: &Queue,
    journal: &Journal,
    (topic, name): (&str, &str),
    is_over: impl Fn() -> bool,
    answered: impl Fn(),
) {
    for count in 1.. {
        thread::sleep(PERIOD);
        if is_over() {
            return;
        }
        let name = format!("{topic}~{name}~{count}");
        let payload = format!("{name} ").into_bytes();
        let hash = hash(&payload);
        let message = NewMessage::new(payload).with_id(Uuid::now_v7());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let call = journal.call();
            journal.line(format!("push {call} {topic} {} {name} {hash:016x}", message.id()));
            match queue.push(topic, message.clone()) {
                Ok(_) => {
                    journal.line(format!("pushed {call} ok"));
                    answered();
                    break;
                }
                Err(e) => {
                    journal.line(format!("pushed {call} {}", outcome(&e)));
                    if !e.is_retryable() || Instant::now() > deadline {
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }
}
