//! Works a topic with several threads, and ends them cleanly with `close()`.

use std::error::Error;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use pushpop_pg::Queue;

const WORKERS: usize = 4;
const MESSAGES: u32 = 1_000;

fn main() -> Result<(), Box<dyn Error>> {
    let (url, _server) = pushpop_server::database_url("DATABASE_URL")?;
    let schema = format!("pushpop_worker_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;

    let mut handled = thread::scope(|scope| {
        let (done, handled) = channel();
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| {
                let (queue, done) = (&queue, done.clone());
                scope.spawn(move || work(queue, &done))
            })
            .collect();
        drop(done);

        queue.push_many("numbers", (0..MESSAGES).map(|n| n.to_string()))?;
        // Ends early if all workers have ended with an error.
        let handled: Vec<u32> = handled.iter().take(MESSAGES as usize).collect();

        // A service does this when it is told to stop: waiting pops end, and what is being worked
        // on can still be settled.
        queue.close();
        for worker in workers {
            worker.join().map_err(|_| "a worker panicked")??;
        }
        Ok::<_, Box<dyn Error>>(handled)
    })?;

    handled.sort_unstable();
    assert!(handled.into_iter().eq(0..MESSAGES), "each message is handled once");
    println!("{WORKERS} workers handled {MESSAGES} messages, each once, and have ended");

    // A closed queue can still be looked at.
    assert_eq!(queue.topic("numbers").stats()?.settled(), u64::from(MESSAGES));

    let queue = Queue::builder().schema(&schema).connect(&url)?;
    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}

/// Handles messages one after the other, until the queue is closed.
fn work(queue: &Queue, done: &Sender<u32>) -> Result<(), pushpop_pg::Error> {
    for lease in queue.iter("numbers") {
        let lease = lease?;
        match String::from_utf8_lossy(lease.payload()).parse() {
            Ok(number) => {
                lease.complete()?;
                // Nobody listens any more when the program is about to end.
                let _ = done.send(number);
            }
            // Tried again after a while; dead when it has failed too often.
            Err(why) => lease.fail(why)?,
        }
    }
    Ok(())
}
