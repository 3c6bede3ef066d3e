//! Timeout: bounds every call but the waits.
//!
//! Promise: a write that did not answer in time is `Ambiguous`, never "failed"; a read is `Unavailable`.

use std::{future::Future, time::Duration};

use super::{Op, Verb, Wrap};
use crate::error::{Error, ErrorKind, Result};

/// Ends a call that has not answered within the limit.
#[derive(Debug, Clone, Copy)]
pub struct Timeout {
    limit: Duration,
}

impl Timeout {
    /// The limit for one attempt.
    pub fn new(limit: Duration) -> Self {
        Self { limit }
    }
}

impl Wrap for Timeout {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        if op.verb == Verb::Gone {
            return call().await;
        }
        match tokio::time::timeout(self.limit, call()).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let kind = if op.verb.writes() { ErrorKind::Ambiguous } else { ErrorKind::Unavailable };
                let message = format!("no reply within {:?}", self.limit);
                Err(Error::new(kind, op.verb.as_str(), message).key(op.subject).on(op.backend))
            }
        }
    }
}
