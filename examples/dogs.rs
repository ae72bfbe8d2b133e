//! Takes the messages about dogs, and leaves those about birds and cats to people who like them.

use std::error::Error;
use std::time::Duration;

use pushpop_pg::Queue;

fn main() -> Result<(), Box<dyn Error>> {
    let (url, _server) = pushpop_server::database_url("DATABASE_URL")?;
    let schema = format!("pushpop_dogs_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;

    for kind in ["birds", "cats", "dogs"] {
        queue.push("mytopic", format!("{kind} are the best"))?;
    }

    let mut others = Vec::new();
    for lease in queue.iter("mytopic") {
        let lease = lease?;
        let text = String::from_utf8_lossy(lease.payload()).into_owned();
        if text == "dogs are the best" {
            println!("got our message: {text}");
            lease.complete()?;
            break;
        }
        // A cat person may deal with it later. A message that is deferred loses no attempt.
        println!("got another message: {text}");
        lease.defer(Duration::from_secs(60))?;
        others.push(text);
    }

    assert_eq!(others, ["birds are the best", "cats are the best"]);
    let stats = queue.topic("mytopic").stats()?;
    assert_eq!((stats.ready(), stats.delayed(), stats.settled()), (0, 2, 1));
    println!("{} messages wait for somebody else", stats.delayed());

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}
