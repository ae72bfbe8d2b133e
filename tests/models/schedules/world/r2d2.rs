//! In place of the crate of this name: a pool that hands out connections, and waits when all are out.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use super::clock::Instant;
use super::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub(crate) trait ManageConnection {
    type Connection;

    fn connect(&self) -> Self::Connection;
}

pub(crate) struct NopErrorHandler;

pub(crate) struct Builder<M> {
    size: u32,
    patience: Duration,
    of: PhantomData<M>,
}

impl<M: ManageConnection> Builder<M> {
    pub(crate) fn max_size(mut self, size: u32) -> Self {
        self.size = size;
        self
    }

    pub(crate) fn min_idle(self, _: Option<u32>) -> Self {
        self
    }

    pub(crate) fn test_on_check_out(self, _: bool) -> Self {
        self
    }

    pub(crate) fn connection_timeout(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    pub(crate) fn error_handler(self, _: Box<NopErrorHandler>) -> Self {
        self
    }

    pub(crate) fn build(self, manager: M) -> Result<Pool<M>, Infallible> {
        let state = Mutex::new(State { free: Vec::new(), left: self.size });
        let inner = Inner { manager, patience: self.patience, state, returned: Condvar::new() };
        Ok(Pool(Arc::new(inner)))
    }
}

pub(crate) struct Pool<M: ManageConnection>(Arc<Inner<M>>);

struct Inner<M: ManageConnection> {
    manager: M,
    patience: Duration,
    state: Mutex<State<M::Connection>>,
    returned: Condvar,
}

struct State<C> {
    free: Vec<C>,
    /// How many more may be made.
    left: u32,
}

impl<M: ManageConnection> Inner<M> {
    fn state(&self) -> MutexGuard<'_, State<M::Connection>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct TimedOut;

impl<M: ManageConnection> Pool<M> {
    pub(crate) fn builder() -> Builder<M> {
        Builder { size: 0, patience: Duration::ZERO, of: PhantomData }
    }

    pub(crate) fn get(&self) -> Result<PooledConnection<M>, TimedOut> {
        let until = Instant::now() + self.0.patience;
        let mut state = self.0.state();
        let connection = loop {
            if let Some(free) = state.free.pop() {
                break free;
            }
            if state.left > 0 {
                state.left -= 1;
                break self.0.manager.connect();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimedOut);
            }
            state = self.0.returned.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        Ok(PooledConnection { pool: Arc::clone(&self.0), connection: Some(connection) })
    }
}

pub(crate) struct PooledConnection<M: ManageConnection> {
    pool: Arc<Inner<M>>,
    /// Until it is dropped.
    connection: Option<M::Connection>,
}

impl<M: ManageConnection> Deref for PooledConnection<M> {
    type Target = M::Connection;

    fn deref(&self) -> &M::Connection {
        self.connection.as_ref().unwrap_or_else(|| unreachable!())
    }
}

impl<M: ManageConnection> DerefMut for PooledConnection<M> {
    fn deref_mut(&mut self) -> &mut M::Connection {
        self.connection.as_mut().unwrap_or_else(|| unreachable!())
    }
}

impl<M: ManageConnection> Drop for PooledConnection<M> {
    fn drop(&mut self) {
        self.pool.state().free.extend(self.connection.take());
        self.pool.returned.notify_one();
    }
}
