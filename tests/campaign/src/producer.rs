//! A process that pushes: every message until it is answered.

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pushpop_pg::uuid::Uuid;
use pushpop_pg::{BoxError, Error, NewMessage, Queue};

use crate::args::Args;
use crate::chance::{Chance, hash};
use crate::journal::{Journal, outcome};
use crate::plan::{EFFECTS, ORDER, PLAIN, Plan, WORK};
use crate::pulse::{self, PULSE};

/// How long a push is repeated before the producer gives up: longer than any fault lasts.
const PATIENCE: Duration = Duration::from_secs(120);

/// Attempts of a message that always fails.
const POISON: u16 = 3;

struct Producer<'a> {
    name: &'a str,
    plan: &'a Plan,
    args: &'a Args,
    journal: &'a Journal,
    queue: &'a Queue,
    chance: Chance,
    made: u64,
}

/// A message, as its producer knows it.
#[derive(Clone)]
struct Made {
    name: String,
    payload: Vec<u8>,
    message: NewMessage,
}

/// Pushes this producer's part of the plan, then ends. One of the name `order` pushes the topic of that name.
pub(crate) fn run(plan: &Plan, args: &Args) -> Result<(), BoxError> {
    let name = args.text("name")?;
    let journal = Journal::open(Path::new(args.text("log")?))?;
    let queue = crate::worker::open(plan, args, &format!("campaign {name}"))?;
    let over = AtomicBool::new(false);
    let pushed = thread::scope(|scope| {
        let (journal, queue, is_over) = (&journal, &queue, || over.load(Ordering::Relaxed));
        if plan.has_pulse() {
            journal.line("begun");
            scope
                .spawn(move || pulse::push(queue, journal, (PULSE, name), is_over, || journal.line("alive")));
        }
        let pushed = push_all(plan, args, (journal, queue));
        over.store(true, Ordering::Relaxed);
        pushed
    });
    if plan.has_pulse() {
        journal.line("ended");
    }
    pushed
}

fn push_all(plan: &Plan, args: &Args, (journal, queue): (&Journal, &Queue)) -> Result<(), BoxError> {
    let name = args.text("name")?;
    let chance = Chance::new(plan.seed ^ hash(name.as_bytes()));
    let share = args.number("share", plan.messages)?;
    let mut producer = Producer { name, plan, args, journal, queue, chance, made: 0 };
    let pace = plan.spread / u32::try_from(share.max(1))?;
    let begun = Instant::now();
    let mut kept = (share / 20).min(100);
    while producer.made < share {
        if kept > 0 && producer.made >= share - kept {
            // The last are kept until standard input ends: then come the last faults, too.
            std::io::stdin().read_to_end(&mut Vec::new())?;
            kept = 0;
        }
        let due = begun + pace * u32::try_from(producer.made)?;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        producer.push_some(share)?;
    }
    Ok(())
}

impl Producer<'_> {
    fn push_some(&mut self, share: u64) -> Result<(), BoxError> {
        let ordered = self.name == ORDER;
        let topic = if ordered { ORDER } else { self.topic() };
        let left = share - self.made;
        match self.chance.below(100) {
            0..50 => {
                let one = self.make(topic, share);
                self.until_answered(topic, vec![one], |queue, made| {
                    queue.push(topic, made.first().ok_or("nothing")?.message.clone()).map_err(Into::into)
                })
            }
            n if n < 50 + self.plan.in_transaction && !ordered => {
                let one = self.make(topic, share);
                self.until_answered(topic, vec![one], |queue, made| {
                    let one = made.first().ok_or("nothing")?;
                    queue.transaction(|tx| queue.push_in(tx, topic, one.message.clone())).map_err(Into::into)
                })
            }
            90..95 if !ordered => {
                let mut one = self.make(topic, share);
                one.message = one.message.delay(self.chance.up_to(Duration::from_millis(300)));
                self.until_answered(topic, vec![one], |queue, made| {
                    queue.push(topic, made.first().ok_or("nothing")?.message.clone()).map_err(Into::into)
                })
            }
            _ => {
                let count = (2 + self.chance.below(self.plan.batch.max(2) - 1)).min(left);
                let batch: Vec<Made> = (0..count).map(|_| self.make(topic, share)).collect();
                self.until_answered(topic, batch, |queue, made| {
                    let messages = made.iter().map(|made| made.message.clone());
                    queue.push_many(topic, messages)?.first().copied().ok_or_else(|| "nothing".into())
                })
            }
        }
    }

    fn topic(&mut self) -> &'static str {
        let [effects, plain, ordered] = self.plan.shares;
        match self.chance.below(100 - ordered.min(99)) {
            n if n < effects => EFFECTS,
            n if n < effects + plain => PLAIN,
            _ => WORK,
        }
    }

    fn make(&mut self, topic: &str, share: u64) -> Made {
        self.made += 1;
        // The last fifth has none, so that they are dead before the faults end.
        let poison = topic == WORK && self.made < share * 4 / 5 && self.chance.below(200) == 0;
        let name = format!("{}-{}{}", self.name, self.made, if poison { "!" } else { "" });
        let most = if self.chance.below(100) == 0 { 10_000 } else { 100 };
        let filler = self.chance.below(most);
        let mut payload = format!("{name} ").into_bytes();
        payload.extend((0..filler).map(|_| self.chance.next().to_le_bytes()[0]));
        let mut message = NewMessage::new(payload.clone());
        if poison {
            message = message.max_attempts(POISON);
        }
        Made { name, payload, message }
    }

    /// Makes a call again and again, until the answer is known.
    fn until_answered(
        &mut self,
        topic: &str,
        mut made: Vec<Made>,
        push: impl Fn(&Queue, &[Made]) -> Result<Uuid, BoxError>,
    ) -> Result<(), BoxError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let call = self.journal.call();
            self.journal.lines(made.iter().map(|made| {
                let (id, hash) = (made.message.id(), hash(&made.payload));
                format!("push {call} {topic} {id} {} {hash:016x}", made.name)
            }));
            let error = match push(self.queue, &made) {
                // Now and then as if the answer had been lost on its way.
                Ok(_) if self.chance.below(1000) < self.plan.lost_answers => {
                    self.journal.line(format!("pushed {call} unknown:Pretended"));
                    None
                }
                Ok(_) => {
                    self.journal.line(format!("pushed {call} ok"));
                    return Ok(());
                }
                Err(e) => Some(e),
            };
            if let Some(error) = error {
                let Some(known) = error.downcast_ref::<Error>() else { return Err(error) };
                if self.args.is_broken("trusting-producer") {
                    self.journal.line(format!("pushed {call} ok"));
                    return Ok(());
                }
                self.journal.line(format!("pushed {call} {}", outcome(known)));
                if !known.is_retryable() || Instant::now() > deadline {
                    return Err(error);
                }
                thread::sleep(Duration::from_millis(20));
            }
            if self.args.is_broken("new-id-on-retry") {
                for made in &mut made {
                    made.message = made.message.clone().with_id(Uuid::now_v7());
                }
            }
        }
    }
}
