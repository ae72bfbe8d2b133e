//! A transaction of the caller's, on a connection of the queue's.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use postgres::{Client, Transaction};

use crate::engine::{Borrowed, Engine};
use crate::error::{Error, Result};
use crate::queue::Queue;

impl Queue {
    /// Runs `work` in a transaction, commits it, and tells the truth about that: `Ok` means that it
    /// is committed. If `work` returns an error or panics, or a statement in it had failed, everything
    /// is rolled back.
    ///
    /// Runs on the caller's thread, with a connection of the pool, for which it waits up to the
    /// operation time-out. The statements themselves have no time-out. As long as it runs, the queue
    /// has one connection less: with a pool of one, other calls wait, and those that `work` makes wait in vain. It takes
    /// [`push_in`](Self::push_in) and [`complete_in`](crate::Lease::complete_in) instead.
    ///
    /// # Errors
    ///
    /// The error of `work`. [`Invalid`](crate::ErrorKind::Invalid) within an async runtime, whose
    /// threads must not block. An error of the commit; it [is
    /// indeterminate](Error::is_indeterminate) when its answer did not come. It can be repeated then: with
    /// the same lease it [has its effect once](crate::Lease::complete_in), and a [`NewMessage`](crate::NewMessage)
    /// that was made outside of `work` has the same id, and is pushed once.
    ///
    /// ```no_run
    /// use pushpop_pg::Queue;
    ///
    /// # fn main() -> Result<(), pushpop_pg::Error> {
    /// let queue = Queue::connect("postgres://localhost/app")?;
    /// let lease = queue.pop("orders")?;
    /// queue.transaction(|tx| {
    ///     tx.execute("insert into shipped (id) values ($1)", &[&lease.id()])?;
    ///     queue.push_in(tx, "mail", "shipped")?;
    ///     lease.complete_in(tx)
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn transaction<R>(&self, work: impl FnOnce(&mut Transaction<'_>) -> Result<R>) -> Result<R> {
        self.transact(work).map_err(|e| e.during("transaction", None))
    }

    fn transact<R>(&self, work: impl FnOnce(&mut Transaction<'_>) -> Result<R>) -> Result<R> {
        if tokio::runtime::Handle::try_current().is_ok() {
            return Err(Error::invalid("a transaction cannot run on a thread of an async runtime"));
        }
        let engine = self.engine();
        let deadline = Instant::now() + engine.settings.operation_timeout;
        let mut session = Session { borrowed: engine.borrow_link(deadline)?, engine, client: None };
        // Until the end is known, nobody else gets this connection: it may be in a transaction.
        session.take(deadline)?;
        // An idle connection may have died; better to know before the work begins.
        if session.client()?.batch_execute("").is_err() {
            session.bury();
            session.take(deadline)?;
        }
        let result = session.run(work);
        let result = if session.is_closed() { result.map_err(Error::cut_off) } else { result };
        // One whose server only reads is left, too: another may be what was asked for.
        if !result.as_ref().is_err_and(Error::breaks_connection) {
            session.put_back();
        }
        result
    }
}

/// A connection that is out of the pool. In a child of its process it is left as it is.
struct Session<'q> {
    engine: &'q Engine,
    borrowed: Borrowed,
    client: Option<Client>,
}

impl Session<'_> {
    fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().ok_or_else(|| Error::connection("not connected"))
    }

    fn take(&mut self, deadline: Instant) -> Result<()> {
        if let Some(link) = &mut self.borrowed.link {
            self.client = Some(link.take_client(deadline)?);
        }
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.client.as_ref().is_some_and(Client::is_closed)
    }

    fn put_back(&mut self) {
        if let Some(link) = &mut self.borrowed.link
            && let Some(client) = self.client.take_if(|client| !client.is_closed())
        {
            link.put_back(client);
        }
    }

    fn bury(&mut self) {
        if let Some(client) = self.client.take() {
            self.engine.route.bury(client);
        }
    }

    fn run<R>(&mut self, work: impl FnOnce(&mut Transaction<'_>) -> Result<R>) -> Result<R> {
        let (home, has_session) = (self.engine.home, self.engine.settings.listens);
        let mut tx = self.client()?.transaction()?;
        if has_session {
            tx.batch_execute(
                "set local statement_timeout = 0; set local lock_timeout = 0; set local jit to default",
            )?;
        }
        let worked = catch_unwind(AssertUnwindSafe(|| work(&mut tx)));
        if let Err(e) = home.check() {
            // The transaction is the parent's, which goes on with it: not even a rollback is sent.
            std::mem::forget(tx);
            return worked.map_or_else(|panic| resume_unwind(panic), |_| Err(e));
        }
        let value = worked.unwrap_or_else(|panic| resume_unwind(panic))?;
        // The driver's commit returns Ok for a transaction that a failed statement had aborted.
        tx.batch_execute("select")?;
        tx.commit().map_err(crate::link::unanswered)?;
        Ok(value)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.bury();
    }
}
