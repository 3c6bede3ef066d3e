//! Several locks as one.
//!
//! Promise: all are held or none is. They are always taken in the same order, whoever asks and however the names
//! were given, so two multi-locks cannot wait for each other. A name given twice counts once.

use std::{future::Future, time::Duration};

use futures_util::future::select_all;

use super::{Fence, FencingToken, Lock, LockGuard};
use crate::{error::Result, line::run_while, session::Session};

/// Several locks that are taken and given back together. Made by
/// [`Coordinator::lock_all`](crate::Coordinator::lock_all).
#[derive(Debug, Clone)]
pub struct MultiLock {
    // In the order of their names, each once.
    locks: Vec<Lock>,
}

impl MultiLock {
    pub(crate) fn new(locks: Vec<Lock>) -> Self {
        Self { locks }
    }

    /// The same locks, taken on this session instead of the coordinator's own.
    #[must_use]
    pub fn on(self, session: &Session) -> Self {
        Self { locks: self.locks.into_iter().map(|lock| lock.on(session)).collect() }
    }

    /// Before anything is taken: all names are good, and there is at least one.
    fn check_names(&self) -> Result<()> {
        if self.locks.is_empty() {
            return Err(crate::Error::invalid("acquire", "no name is given; nothing would be locked"));
        }
        self.locks.iter().try_for_each(|lock| lock.path().map(drop))
    }

    /// Waits until all are held.
    ///
    /// # Errors
    /// As for [`Lock::acquire`]; those taken already are given back before the error is returned.
    ///
    /// # Cancel safety
    /// As for [`Lock::acquire`]; those taken already are given back in the background.
    pub async fn acquire(&self) -> Result<MultiGuard> {
        self.check_names()?;
        let mut taken = MultiGuard { guards: Vec::with_capacity(self.locks.len()) };
        for lock in &self.locks {
            match lock.acquire().await {
                Ok(guard) => taken.guards.push(guard),
                Err(error) => return Err(taken.give_back(error).await),
            }
        }
        Ok(taken)
    }

    /// Waits for at most `limit` in all; `None` if not all were granted by then, for whatever reason.
    ///
    /// # Errors
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    /// As for [`acquire`](Self::acquire).
    pub async fn acquire_within(&self, limit: Duration) -> Result<Option<MultiGuard>> {
        if limit.is_zero() {
            return self.try_acquire().await;
        }
        match tokio::time::timeout(limit, self.acquire()).await {
            Ok(guard) => guard.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Takes all if all are free; `None` otherwise, and none stays taken.
    ///
    /// # Errors
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    /// As for [`acquire`](Self::acquire).
    pub async fn try_acquire(&self) -> Result<Option<MultiGuard>> {
        self.check_names()?;
        let mut taken = MultiGuard { guards: Vec::with_capacity(self.locks.len()) };
        for lock in &self.locks {
            match lock.try_acquire().await {
                Ok(Some(guard)) => taken.guards.push(guard),
                Ok(None) => {
                    taken.release().await?;
                    return Ok(None);
                }
                Err(error) => return Err(taken.give_back(error).await),
            }
        }
        Ok(Some(taken))
    }
}

/// Several held locks. Dropping it releases all in the background.
#[derive(Debug)]
#[must_use = "the locks are released as soon as the guard is dropped"]
pub struct MultiGuard {
    guards: Vec<LockGuard>,
}

impl MultiGuard {
    /// Whether all are still held. No I/O.
    pub fn is_held(&self) -> bool {
        self.guards.iter().all(LockGuard::is_held)
    }

    /// `Ok` if all are still held.
    ///
    /// # Errors
    /// `SessionLost` otherwise, naming the first that is not.
    pub fn check(&self) -> Result<()> {
        self.guards.iter().try_for_each(LockGuard::check)
    }

    /// The tokens, in the order of the locks' names.
    pub fn tokens(&self) -> Vec<FencingToken> {
        self.guards.iter().map(LockGuard::token).collect()
    }

    /// What a transaction needs to be refused once any of these holds has ended, in the order of the locks' names.
    pub fn fences(&self) -> Vec<Fence> {
        self.guards.iter().map(LockGuard::fence).collect()
    }

    /// Returns when the first of them is lost.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn lost(&self) {
        // Never empty: a multi-lock without a name is refused.
        select_all(self.guards.iter().map(|guard| Box::pin(guard.lost()))).await;
    }

    /// Runs `work` for as long as all are held; when one is lost, `work` is dropped at its current await.
    ///
    /// # Errors
    /// `SessionLost` if one of them was lost while `work` was waiting.
    ///
    /// # Cancel safety
    /// Dropping it drops `work`; the locks stay held.
    pub async fn protect<F: Future>(&self, work: F) -> Result<F::Output> {
        run_while(|| self.check(), self.lost(), work).await
    }

    /// The guards, in the order of the locks' names.
    pub fn guards(&self) -> &[LockGuard] {
        &self.guards
    }

    /// Gives all back, also if one of them fails.
    ///
    /// # Errors
    /// The first error, as for [`LockGuard::release`].
    ///
    /// # Cancel safety
    /// The rest are released in the background.
    pub async fn release(self) -> Result<()> {
        let mut outcome = Ok(());
        // Last taken, first given back.
        for guard in self.guards.into_iter().rev() {
            outcome = outcome.and(guard.release().await);
        }
        outcome
    }

    async fn give_back(self, error: crate::Error) -> crate::Error {
        if let Err(second) = self.release().await {
            tracing::warn!(%second, "a lock taken before the failed one was not given back cleanly");
        }
        error
    }
}
