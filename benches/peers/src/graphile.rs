//! graphile_worker, the one in Rust.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use graphile_worker::{
    IntoTaskHandlerResult, JobSpec, LocalQueueConfig, RefetchDelayConfig, TaskHandler, Worker, WorkerContext,
    WorkerOptions,
};
use pushpop_measure::Result;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::runtime::Runtime;

use crate::message::Message;
use crate::system::{Peer, System};
use crate::tasks::{CONCURRENCY, none_left, runtime, tasks};
use crate::work::Work;

/// Connections of its pool, as by default. More are no faster: a job that is added notifies, and those who
/// notify commit one after the other.
const CONNECTIONS: u32 = 20;

/// How many jobs its local queue holds, and how often it looks, as in its own benchmark.
const LOCAL: usize = 5_000;
const TICK: Duration = Duration::from_millis(5);

/// Its worker, with sqlx.
pub(crate) struct Graphile {
    /// Jobs are fetched into a local queue, and completed in batches.
    pub(crate) batches: bool,
    /// Jobs are added one a call, or as many as the work says.
    pub(crate) many: bool,
}

impl Peer for Graphile {
    fn name(&self) -> &'static str {
        "graphile_worker"
    }

    fn schema(&self) -> &'static str {
        "graphile_worker"
    }

    fn install(&self, url: &str) -> Result<()> {
        runtime()?.block_on(async {
            let pool = pool(url).await?;
            WorkerOptions::default().pg_pool(pool.clone()).define_job::<Message>().init().await?;
            pool.close().await;
            Ok(())
        })
    }

    fn open(&self, url: &str, _threads: usize) -> Result<Box<dyn System>> {
        let runtime = runtime()?;
        let pool = runtime.block_on(pool(url))?;
        Ok(Box::new(Open { runtime, pool, batches: self.batches, many: self.many }))
    }
}

async fn pool(url: &str) -> Result<PgPool> {
    let options = PgPoolOptions::new().min_connections(CONNECTIONS).max_connections(CONNECTIONS);
    Ok(options.test_before_acquire(false).connect(url).await?)
}

#[derive(Clone, Debug)]
struct Handled(Arc<Work>);

impl TaskHandler for Message {
    const IDENTIFIER: &'static str = "peers";

    async fn run(self, context: WorkerContext) -> impl IntoTaskHandlerResult {
        let Some(Handled(work)) = context.get_ext() else { return Err("nobody is told") };
        work.handle(self.number);
        Ok(())
    }
}

struct Open {
    runtime: Runtime,
    pool: PgPool,
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
        self.runtime.block_on(async {
            let worker = self.options().init().await?;
            tasks(threads, || {
                let (work, utils, many) = (Arc::clone(work), worker.create_utils(), self.many);
                async move {
                    let spec = JobSpec::default();
                    while let Some(numbers) = work.next_push() {
                        if many {
                            let jobs: Vec<_> = numbers.clone().map(|n| (Message::new(n), &spec)).collect();
                            utils.add_jobs(&jobs).await?;
                        } else {
                            for number in numbers.clone() {
                                utils.add_job(Message::new(number), spec.clone()).await?;
                            }
                        }
                        let mut tally = work.tally();
                        numbers.for_each(|n| tally.pushed(n));
                    }
                    Ok(())
                }
            })
            .await
        })
    }

    fn drain(&self, work: &Arc<Work>, threads: usize, up: Sender<()>) -> Result<Instant> {
        self.runtime.block_on(async {
            let worker = Arc::new(self.worker(work, threads).await?);
            work.begin();
            let running = tokio::spawn({
                let worker = Arc::clone(&worker);
                async move { worker.run().await }
            });
            let _ = up.send(());
            let settled = match work.handled().await {
                Ok(()) => none_left(async || self.jobs().await).await,
                starved => starved,
            };
            let ended = Instant::now();
            worker.request_shutdown();
            running.await??;
            settled.map(|()| ended)
        })
    }

    fn unsettled(&mut self) -> Result<u64> {
        self.runtime.block_on(self.jobs())
    }
}

impl Open {
    fn options(&self) -> WorkerOptions {
        WorkerOptions::default().pg_pool(self.pool.clone()).define_job::<Message>()
    }

    async fn worker(&self, work: &Arc<Work>, threads: usize) -> Result<Worker> {
        let options =
            self.options().add_extension(Handled(Arc::clone(work))).use_notification_delivery(false);
        let options = if self.batches {
            // The delay is what keeps the local queue from waiting for ever: without it, the wake-up of its
            // fetching can be lost.
            let delay = RefetchDelayConfig::default().with_duration(TICK).with_threshold(LOCAL);
            options
                .concurrency(if self.many { CONCURRENCY } else { threads })
                .poll_interval(TICK)
                .complete_job_batch_delay(TICK)
                .local_queue(LocalQueueConfig::default().with_size(LOCAL).with_refetch_delay(delay))
        } else {
            // Each slot takes one job a tick: so the ticks allow 6,000 jobs a second.
            let tick = Duration::from_millis((threads as u64 / 6).clamp(1, 20));
            options.concurrency(threads).poll_interval(tick)
        };
        Ok(options.init().await?)
    }

    async fn jobs(&self) -> Result<u64> {
        let sql = "select count(*) from graphile_worker._private_jobs";
        Ok(u64::try_from(sqlx::query_scalar::<_, i64>(sql).fetch_one(&self.pool).await?)?)
    }
}
