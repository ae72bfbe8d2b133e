//! Pushes a message, pops it, settles it: on a throwaway server, or the one that `DATABASE_URL` names.

use std::error::Error;

use pushpop_pg::{Queue, State};

fn main() -> Result<(), Box<dyn Error>> {
    let (url, server) = pushpop_server::database_url("DATABASE_URL")?;
    match &server {
        Some(server) => println!("a private server runs on port {}", server.port()),
        None => println!("using the server that DATABASE_URL names"),
    }
    // In a schema of its own, so that nothing is left behind on a server that is not ours.
    let schema = format!("pushpop_quickstart_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;

    let id = queue.push("mail", "hello")?;
    println!("pushed {id}");

    let lease = queue.pop("mail")?;
    println!("popped {:?}, attempt {}", String::from_utf8_lossy(lease.payload()), lease.attempt());
    assert_eq!((lease.id(), lease.payload()), (id, &b"hello"[..]));

    lease.complete()?;
    let message = queue.find("mail", id)?.ok_or("the message is gone")?;
    println!("completed: {}", matches!(message.state(), State::Completed { .. }));
    assert!(matches!(message.state(), State::Completed { .. }));

    assert!(queue.try_pop("mail")?.is_none());
    println!("the topic is empty");

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}
