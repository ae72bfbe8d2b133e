//! A runtime for the peers that are asynchronous.

use std::future::Future;

use pushpop_measure::Result;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

use crate::work::{LOOKS, MOMENT};

/// How many messages a framework's worker has in hand at a time, where calls carry many.
pub(crate) const CONCURRENCY: usize = 128;

pub(crate) fn runtime() -> Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Returns when no job is left. A handler ends before its job is completed.
pub(crate) async fn none_left(jobs: impl AsyncFn() -> Result<u64>) -> Result<()> {
    for _ in 0..LOOKS {
        if jobs().await? == 0 {
            return Ok(());
        }
        tokio::time::sleep(MOMENT).await;
    }
    Err("handled jobs are not completed".into())
}

/// Runs so many tasks, and returns when all have ended, or one has failed.
pub(crate) async fn tasks<F>(count: usize, task: impl Fn() -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let mut running: JoinSet<_> = (0..count).map(|_| task()).collect();
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}
