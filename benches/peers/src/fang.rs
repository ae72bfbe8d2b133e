//! fang, by its blocking queue.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Instant;

use diesel::r2d2::{ConnectionManager, Pool};
use diesel::{Connection, QueryableByName, RunQueryDsl, sql_query, sql_types::BigInt};
use fang::{FangError, PgConnection, Queue, Queueable, Runnable, Worker, run_migrations_postgres, typetag};
use pushpop_measure::{Result, Tally, together};

use crate::message::Message;
use crate::system::{Peer, System};
use crate::work::{LOOKS, MOMENT, Work, starved};

const KIND: &str = "peers";

/// More are slower.
const CONNECTIONS: u32 = 32;

thread_local! {
    /// What the handler was given on this thread: it has no other way to tell.
    static HANDLED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

#[typetag::serde]
impl Runnable for Message {
    fn run(&self, _queue: &dyn Queueable) -> std::result::Result<(), FangError> {
        HANDLED.with_borrow_mut(|handled| handled.push(self.number));
        Ok(())
    }

    fn task_type(&self) -> String {
        KIND.to_owned()
    }
}

/// Its own worker on each thread, and up to 32 connections. Finished tasks are removed, as by default.
pub(crate) struct Fang;

impl Peer for Fang {
    fn name(&self) -> &'static str {
        "fang"
    }

    fn schema(&self) -> &'static str {
        "fang"
    }

    fn install(&self, url: &str) -> Result<()> {
        let mut connection = PgConnection::establish(&within(url))?;
        sql_query("create schema fang").execute(&mut connection)?;
        run_migrations_postgres(&mut connection).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn open(&self, url: &str, threads: usize) -> Result<Box<dyn System>> {
        let pool = Pool::builder()
            .max_size(u32::try_from(threads)?.clamp(2, CONNECTIONS))
            .test_on_check_out(false)
            .build(ConnectionManager::new(within(url)))?;
        Ok(Box::new(Open { queue: Queue::builder().connection_pool(pool).build() }))
    }
}

/// fang names no schema: its tables are made in the first one of the path.
fn within(url: &str) -> String {
    let sign = if url.contains('?') { '&' } else { '?' };
    format!("{url}{sign}options=-csearch_path%3Dfang")
}

struct Open {
    queue: Queue,
}

impl System for Open {
    fn push(&self, work: &Arc<Work>, threads: usize) -> Result<()> {
        together(threads, |_| {
            let mut tally = work.tally();
            for number in std::iter::from_fn(|| work.next_push()).flatten() {
                self.queue.insert_task(&Message::new(number))?;
                tally.pushed(number);
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Does what the loop of fang's worker does, which has no end.
    fn drain(&self, work: &Arc<Work>, threads: usize, up: Sender<()>) -> Result<Instant> {
        work.begin();
        let _ = up.send(());
        together(threads, |_| {
            let mut tally = work.tally();
            let worker = self.worker();
            while work.next_share().is_some() {
                self.work_one(&worker, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(Instant::now())
    }

    fn in_turn(&self, work: &Arc<Work>, threads: usize) -> Result<bool> {
        together(threads, |_| {
            let mut tally = work.tally();
            let worker = self.worker();
            for number in std::iter::from_fn(|| work.next_push()).flatten() {
                self.queue.insert_task(&Message::new(number))?;
                tally.pushed(number);
                self.work_one(&worker, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(true)
    }

    fn unsettled(&mut self) -> Result<u64> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = BigInt)]
            tasks: i64,
        }
        let mut connection = self.queue.connection_pool.get()?;
        let row: Row = sql_query("select count(*) as tasks from fang_tasks").get_result(&mut connection)?;
        Ok(u64::try_from(row.tasks)?)
    }
}

impl Open {
    fn worker(&self) -> Worker<Queue> {
        Worker::builder().queue(self.queue.clone()).task_type(KIND).build()
    }

    fn work_one(&self, worker: &Worker<Queue>, tally: &mut Tally<'_>) -> Result<()> {
        worker.run(&self.fetch()?).map_err(|e| format!("{e:?}"))?;
        HANDLED.take().into_iter().for_each(|n| tally.done(n));
        Ok(())
    }

    /// Fetches a task, and looks again where there is none.
    fn fetch(&self) -> Result<fang::Task> {
        for _ in 0..LOOKS {
            if let Some(task) = self.queue.fetch_and_touch_task(KIND.to_owned())? {
                return Ok(task);
            }
            thread::sleep(MOMENT);
        }
        Err(starved(1))
    }
}
