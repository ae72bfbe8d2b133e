//! Pushes and completes messages in the transactions of the work they belong to: both happen, or
//! neither.

use std::error::Error;

use pushpop_pg::Queue;

fn main() -> Result<(), Box<dyn Error>> {
    let (url, _server) = pushpop_server::database_url("DATABASE_URL")?;
    let schema = format!("pushpop_transactional_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;
    queue.transaction(|tx| {
        Ok(tx.batch_execute(&format!(
            "create table {schema}.orders (id integer primary key, amount integer check (amount > 0));
             create table {schema}.shipped (id integer primary key)"
        ))?)
    })?;

    // An order and the message about it are stored together ...
    let order = |id: i32, amount: i32| {
        queue.transaction(|tx| {
            queue.push_in(tx, "orders", id.to_string())?;
            let insert = format!("insert into {schema}.orders (id, amount) values ($1, $2)");
            tx.execute(&insert, &[&id, &amount])?;
            Ok(())
        })
    };
    order(1, 100)?;
    // ... or not at all: this insert fails, so the message before it is rolled back.
    let refused = order(2, -5).err().ok_or("an amount below zero was accepted")?;
    println!("rolled back: {refused}");
    assert_eq!(refused.sqlstate(), Some("23514"));
    let stats = queue.topic("orders").stats()?;
    println!("{} order waits", stats.ready());
    assert_eq!(stats.ready(), 1);

    // The message is completed in the transaction of its effect. If that is rolled back, the lease is
    // as good as before.
    let lease = queue.pop("orders")?;
    let id: i32 = String::from_utf8_lossy(lease.payload()).parse()?;
    let ship = |in_stock: bool| {
        queue.transaction(|tx| {
            lease.complete_in(tx)?;
            tx.execute(&format!("insert into {schema}.shipped (id) values ($1)"), &[&id])?;
            if in_stock { Ok(()) } else { Err(pushpop_pg::Error::other("out of stock")) }
        })
    };
    let refused = ship(false).err().ok_or("shipped without stock")?;
    println!("rolled back: {refused}");
    assert_eq!(queue.topic("orders").stats()?.leased(), 1);
    ship(true)?;
    println!("order {id} is shipped, and its message completed");
    let stats = queue.topic("orders").stats()?;
    assert_eq!((stats.ready(), stats.leased(), stats.settled()), (0, 0, 1));

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}
