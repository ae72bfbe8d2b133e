//! Works a topic with several threads: some messages fail at first, some handlers panic, and the worker stops cleanly.

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pushpop_pg::{Backoff, Outcome, Queue, Worker};

const MESSAGES: u32 = 1_000;

fn main() -> Result<(), Box<dyn Error>> {
    let (url, _server) = pushpop_server::database_url("DATABASE_URL")?;
    let schema = format!("pushpop_worker_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;
    queue.push_many("numbers", (0..MESSAGES).map(|n| n.to_string()))?;
    queue.push("numbers", "not a number")?;

    // Panics are part of this example; their words go to the log and to the message.
    std::panic::set_hook(Box::new(|_| {}));
    let sum = AtomicU32::new(0);
    let worker =
        Worker::new(&queue).backoff(Backoff::fixed(Duration::from_millis(100))).handle("numbers", 8, |job| {
            // Nothing will make a number of this: no more attempts.
            let Ok(number) = String::from_utf8_lossy(job.payload()).parse::<u32>() else {
                return Ok(Outcome::Discard);
            };
            match (number % 100, job.attempt()) {
                (13, 1) => return Err("unlucky, try again".into()),
                (42, 1) => panic!("out of answers"),
                _ => {}
            }
            sum.fetch_add(number, Ordering::Relaxed);
            Ok(Outcome::Complete)
        });

    // A service would call `worker.run()` on its main thread, and be stopped by a signal.
    let stopper = worker.stopper();
    let ended = std::thread::scope(|scope| {
        let running = scope.spawn(|| worker.run());
        while queue.topic("numbers").stats()?.settled() <= u64::from(MESSAGES) {
            std::thread::sleep(Duration::from_millis(50));
        }
        stopper.stop();
        running.join().map_err(|_| "the worker panicked")?.map_err(Box::<dyn Error>::from)
    })?;
    println!("{ended}");

    assert_eq!(sum.load(Ordering::Relaxed), MESSAGES * (MESSAGES - 1) / 2, "each number counts once");
    println!("{MESSAGES} numbers added up, 20 of them at the second attempt, one message discarded");

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}
