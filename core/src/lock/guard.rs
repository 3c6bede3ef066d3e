//! The guard: proof of a hold, for as long as it says so.
//!
//! Promise: when [`LockGuard::is_held`] answers `true`, the lease of this hold has not ended, so nobody else has been
//! granted the lock by the end of it. Once `false`, it stays `false`. Only somebody who removes the ticket by hand
//! ([`Lock::break_holder`](super::Lock::break_holder), or another client's delete) lets the next one in earlier; the guard then
//! learns of it as fast as the server can tell, and at its deadline at the latest.

use std::{fmt, future::Future};

use tokio::time::Instant;

use super::FencingToken;
use crate::{
    error::Result,
    line::{Fence, Held, run_while},
    session::Session,
};

/// A held lock. Dropping it releases the lock in the background.
#[must_use = "the lock is released as soon as the guard is dropped"]
pub struct LockGuard {
    held: Held,
}

impl LockGuard {
    pub(super) fn new(held: Held) -> Self {
        Self { held }
    }

    /// Grows with every holder. Send it with each write so that storage can refuse a stale one.
    pub fn token(&self) -> FencingToken {
        self.held.token().into()
    }

    /// Whether the lock is still held, by the local clock and what has been heard. No I/O.
    pub fn is_held(&self) -> bool {
        self.held.stands()
    }

    /// `Ok` if [`is_held`](Self::is_held); made for `guard.check()?` before each step of the work.
    ///
    /// # Errors
    /// `SessionLost` otherwise.
    pub fn check(&self) -> Result<()> {
        self.held.check("check")
    }

    /// The instant up to which the lock may be trusted without hearing from the server again. Renewals move it.
    pub fn deadline(&self) -> Instant {
        self.held.session().deadline()
    }

    /// The session that the lock stands on.
    pub fn session(&self) -> &Session {
        self.held.session()
    }

    /// Returns when the lock is lost: the session has ended, or somebody removed the ticket.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn lost(&self) {
        self.held.lost().await;
    }

    /// Runs `work` for as long as the lock is held; when it is lost, `work` is dropped at its current await.
    ///
    /// A loss that falls into the last poll of `work` is not seen: look at the guard afterwards if that matters.
    ///
    /// # Errors
    /// `SessionLost` if the lock was lost while `work` was waiting.
    ///
    /// # Cancel safety
    /// Dropping it drops `work`; the lock stays held.
    pub async fn protect<F: Future>(&self, work: F) -> Result<F::Output> {
        run_while(|| self.check(), self.lost(), work).await
    }

    /// What a transaction needs to be refused once this hold has ended, whatever this process believes.
    pub fn fence(&self) -> Fence {
        self.held.fence()
    }

    /// Gives the lock back: one round trip. After a lost reply it is sent again, and `Ok` then says that the lock is
    /// not held now; whether it had been taken away before is not known.
    ///
    /// # Errors
    /// `SessionLost` if the lock had been lost before: what was done under it may not have been exclusive.
    /// Otherwise the release could not be confirmed; it is retried in the background, and the end of the session
    /// frees the lock in any case.
    ///
    /// # Cancel safety
    /// Dropped half-way, the release goes on in the background.
    pub async fn release(self) -> Result<()> {
        self.held.release("release").await
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("ticket", &self.held.hold().ticket)
            .field("token", &self.held.token())
            .finish_non_exhaustive()
    }
}
