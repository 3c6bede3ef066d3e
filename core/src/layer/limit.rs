//! Limit: bounds how many calls are under way at once.
//!
//! Promise: calls beyond the limit wait their turn in order. Leases are never held up by it: renewing late
//! would lose what the queue was waiting for. Waits and watches do not count, as they are idle.

use std::{future::Future, sync::Arc};

use tokio::sync::Semaphore;

use super::{Op, Verb, Wrap};
use crate::error::{Error, ErrorKind, Result};

/// Lets at most so many calls be under way.
#[derive(Debug, Clone)]
pub struct Limit {
    permits: Arc<Semaphore>,
}

impl Default for Limit {
    /// 1,024 calls: far above what one connection answers at once, far below what exhausts memory.
    fn default() -> Self {
        Self::new(1024)
    }
}

impl Limit {
    /// At most `calls` at once; zero counts as one.
    pub fn new(calls: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(calls.clamp(1, Semaphore::MAX_PERMITS))) }
    }
}

impl Wrap for Limit {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        if matches!(op.verb, Verb::Grant | Verb::Renew | Verb::Revoke | Verb::Gone | Verb::Watch) {
            return call().await;
        }
        let _permit = self.permits.acquire().await.map_err(|_| {
            Error::new(ErrorKind::Unavailable, op.verb.as_str(), "the client was closed").key(op.subject).on(op.backend)
        })?;
        call().await
    }
}
