//! awa, with its queue storage.
//!
//! Something in here is wrong: a plain program by awa's documentation was five times as fast and more. See "Not published"
//! in the README.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use awa::{
    Client, InsertOpts, InsertParams, JobArgs, JobResult, QueueConfig, QueueStorage, QueueStorageConfig,
};
use pushpop_measure::Result;
use sqlx08::PgPool;
use sqlx08::postgres::PgPoolOptions;
use tokio::runtime::Runtime;

use crate::message::Message;
use crate::system::{Peer, System};
use crate::tasks::{CONCURRENCY, none_left, runtime, tasks};
use crate::work::{PATIENCE, Work};

const QUEUE: &str = "peers";

/// Connections of its pool, as it recommends for one queue.
const CONNECTIONS: u32 = 24;

/// Its worker.
pub(crate) struct Awa {
    /// The worker claims in batches, or one job a call. It completes in batches in any case: no setting in code
    /// has it otherwise.
    pub(crate) batches: bool,
    /// Jobs are enqueued one a call, or as many as the work says.
    pub(crate) many: bool,
}

impl JobArgs for Message {
    fn kind() -> &'static str {
        "peers"
    }
}

impl Peer for Awa {
    fn name(&self) -> &'static str {
        if self.batches { "awa" } else { "awa, claiming one by one" }
    }

    fn is_fair(&self) -> bool {
        false
    }

    fn schema(&self) -> &'static str {
        "awa"
    }

    /// The first worker that starts switches a new database to the queue storage.
    fn install(&self, url: &str) -> Result<()> {
        runtime()?.block_on(async {
            let pool = pool(url).await?;
            awa::migrations::run(&pool).await?;
            let client = client(&pool, 1, 1, |_| {})?;
            client.start().await?;
            client.shutdown(PATIENCE).await;
            let engine = awa::storage::status(&pool).await?.active_engine;
            pool.close().await;
            if engine == "queue_storage" { Ok(()) } else { Err(format!("awa's storage is {engine}").into()) }
        })
    }

    fn open(&self, url: &str, _threads: usize) -> Result<Box<dyn System>> {
        let runtime = runtime()?;
        let pool = runtime.block_on(pool(url))?;
        let storage = Arc::new(QueueStorage::new(QueueStorageConfig::default())?);
        Ok(Box::new(Open { runtime, pool, storage, batches: self.batches, many: self.many }))
    }
}

async fn pool(url: &str) -> Result<PgPool> {
    let options = PgPoolOptions::new().min_connections(CONNECTIONS).max_connections(CONNECTIONS);
    Ok(options.test_before_acquire(false).connect(url).await?)
}

/// Jobs without a deadline are claimed and completed the shortest way.
fn client(
    pool: &PgPool,
    workers: usize,
    claim: usize,
    handle: impl Fn(u64) + Send + Sync + 'static,
) -> Result<Client> {
    let config = QueueConfig {
        max_workers: u32::try_from(workers)?,
        poll_interval: Duration::from_millis(50),
        deadline_duration: Duration::ZERO,
        claim_batch_size: claim,
        ..QueueConfig::default()
    };
    let builder = Client::builder(pool.clone()).queue(QUEUE, config);
    let builder = builder.register(move |message: Message, _| {
        handle(message.number);
        async { Ok(JobResult::Completed) }
    });
    Ok(builder.build()?)
}

struct Open {
    runtime: Runtime,
    pool: PgPool,
    storage: Arc<QueueStorage>,
    batches: bool,
    many: bool,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.runtime.block_on(self.pool.close());
    }
}

impl System for Open {
    fn push(&self, work: &Arc<Work>, threads: usize) -> Result<()> {
        self.runtime.block_on(tasks(threads, || {
            let (work, pool, storage, many) =
                (Arc::clone(work), self.pool.clone(), Arc::clone(&self.storage), self.many);
            async move {
                while let Some(numbers) = work.next_push() {
                    if many {
                        let jobs: Vec<_> = numbers.clone().map(params).collect::<Result<_>>()?;
                        storage.enqueue_params_copy(&pool, &jobs).await?;
                    } else {
                        for number in numbers.clone() {
                            awa::insert_with(&pool, &Message::new(number), options()).await?;
                        }
                    }
                    let mut tally = work.tally();
                    numbers.for_each(|n| tally.pushed(n));
                }
                Ok(())
            }
        }))
    }

    fn drain(&self, work: &Arc<Work>, threads: usize, up: Sender<()>) -> Result<Instant> {
        let workers = if self.many { CONCURRENCY } else { threads };
        let claim = if self.batches { QueueConfig::default().claim_batch_size } else { 1 };
        let handler = Arc::clone(work);
        self.runtime.block_on(async {
            let client = client(&self.pool, workers, claim, move |number| handler.handle(number))?;
            client.start().await?;
            work.begin();
            let _ = up.send(());
            let settled = match work.handled().await {
                Ok(()) => none_left(async || self.jobs().await).await,
                starved => starved,
            };
            let ended = Instant::now();
            client.shutdown(PATIENCE).await;
            settled.map(|()| ended)
        })
    }

    fn unsettled(&mut self) -> Result<u64> {
        self.runtime.block_on(self.jobs())
    }
}

impl Open {
    async fn jobs(&self) -> Result<u64> {
        let counts = self.storage.queue_counts(&self.pool, QUEUE).await?;
        Ok(u64::try_from(counts.available + counts.running)?)
    }
}

fn options() -> InsertOpts {
    InsertOpts { queue: QUEUE.into(), ..InsertOpts::default() }
}

fn params(number: u64) -> Result<InsertParams> {
    Ok(awa::model::insert::params_with(&Message::new(number), options())?)
}
