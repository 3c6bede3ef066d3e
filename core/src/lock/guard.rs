//! The guard: proof of a hold, for as long as it says so.
//!
//! Promise: when [`LockGuard::is_held`] answers `true`, the lease of this hold has not ended, so nobody else has been
//! granted the lock by the end of it. Once `false`, it stays `false`. Only somebody who removes the ticket by hand
//! ([`Lock::break_holder`](super::Lock::break_holder), or another client's delete) lets the next one in earlier; the guard then
//! learns of it as fast as the server can tell, and at its deadline at the latest.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::FencingToken;
use crate::{
    backend::{Check, Enqueue, Place, Revision, Ticket, TicketKind, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::Dir,
    session::{Debt, Hold, Session, SessionCore},
};

/// A held lock. Dropping it releases the lock in the background.
#[must_use = "the lock is released as soon as the guard is dropped"]
pub struct LockGuard {
    session: Session,
    hold: Arc<Hold>,
}

impl LockGuard {
    pub(super) fn new(session: Session, place: Place, unsure: Option<Arc<Enqueue>>) -> Self {
        let hold = session.core().hold(place, unsure);
        Self { session, hold }
    }

    /// Grows with every holder. Send it with each write so that storage can refuse a stale one.
    pub fn token(&self) -> FencingToken {
        self.hold.token.into()
    }

    /// Whether the lock is still held, by the local clock and what has been heard. No I/O.
    pub fn is_held(&self) -> bool {
        self.hold.stands() && self.session.is_live()
    }

    /// `Ok` if [`is_held`](Self::is_held); made for `guard.check()?` before each step of the work.
    ///
    /// # Errors
    /// `SessionLost` otherwise.
    pub fn check(&self) -> Result<()> {
        self.session.core().check("check")?;
        if self.hold.stands() { Ok(()) } else { Err(self.removed("check")) }
    }

    /// The instant up to which the lock may be trusted without hearing from the server again. Renewals move it.
    pub fn deadline(&self) -> Instant {
        self.session.deadline()
    }

    /// The session that the lock stands on.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Returns when the lock is lost: the session has ended, or somebody removed the ticket.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn lost(&self) {
        let core = self.session.core();
        core.watch_now(&self.hold);
        tokio::select! {
            () = core.over() => {}
            () = self.hold.ended() => {}
        }
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
        Fence::new(self.hold.ticket.clone(), self.hold.token)
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
        let core = self.session.core().clone();
        core.check("release")?;
        if !self.hold.release() {
            return Err(self.removed("release"));
        }
        core.unhold(&self.hold);
        if let Some(entry) = self.hold.unsure.clone() {
            core.debts.owe(Debt::Later(entry));
        }
        let ticket = self.hold.ticket.clone();
        let owed = Owed { core: &core, ticket: Some(ticket.clone()) };
        let outcome = match core.backend.commit(&self.fence().leave()).await {
            Err(error) if matches!(error.kind(), ErrorKind::Ambiguous | ErrorKind::Unavailable) => {
                // Unconditional leaving may be repeated, so the layers carry this one through.
                let txn = Txn { checks: Vec::new(), writes: vec![Write::Leave(ticket)] };
                core.backend.commit(&txn).await.map(|_| true)
            }
            outcome => outcome.map(|commit| commit.applied),
        };
        match outcome {
            Ok(stood) => {
                owed.paid();
                if stood { Ok(()) } else { Err(self.removed("release")) }
            }
            Err(error) => Err(error.next("it is retried in the background; the end of the session frees it")),
        }
    }

    fn removed(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::SessionLost, operation, "the lock was taken away: its ticket is gone")
            .key(&self.hold.ticket.line)
            .on(self.session.core().backend.profile().backend)
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        let core = self.session.core();
        if self.hold.release() {
            core.debts.owe(Debt::Leave(self.hold.ticket.clone()));
            if let Some(entry) = self.hold.unsure.clone() {
                core.debts.owe(Debt::Later(entry));
            }
            core.unhold(&self.hold);
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("ticket", &self.hold.ticket)
            .field("token", &self.hold.token)
            .finish_non_exhaustive()
    }
}

/// Runs `work` until it ends, or until `check` fails or `lost` returns; `lost` may come before `check` knows why.
pub(super) async fn run_while<F: Future>(
    check: impl Fn() -> Result<()>,
    lost: impl Future<Output = ()>,
    work: F,
) -> Result<F::Output> {
    let mut lost = pin!(lost);
    let mut work = pin!(work);
    poll_fn(|cx| {
        // The clock first: after a pause of the process the signal may lag behind.
        check()?;
        if lost.as_mut().poll(cx).is_ready() {
            let unexplained = || Error::new(ErrorKind::SessionLost, "protect", "the lock was lost");
            return Poll::Ready(Err(check().err().unwrap_or_else(unexplained)));
        }
        work.as_mut().poll(cx).map(Ok)
    })
    .await
}

/// A removal under way; dropped before it is confirmed, it becomes a debt.
struct Owed<'a> {
    core: &'a SessionCore,
    ticket: Option<Ticket>,
}

impl Owed<'_> {
    fn paid(mut self) {
        self.ticket = None;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.core.debts.owe(Debt::Leave(ticket));
        }
    }
}

/// A hold, as a condition of a transaction. It can be sent to another process that writes on the holder's
/// behalf; it is not a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    ticket: Ticket,
    token: Revision,
}

impl Fence {
    pub(super) fn new(ticket: Ticket, token: Revision) -> Self {
        Self { ticket, token }
    }

    pub(super) fn line(&self) -> &Dir {
        &self.ticket.line
    }

    /// Takes the ticket out of its line, if it still stands.
    pub(super) fn leave(&self) -> Txn {
        Txn { checks: vec![self.check()], writes: vec![Write::Leave(self.ticket.clone())] }
    }

    /// The token of the hold.
    pub fn token(&self) -> FencingToken {
        self.token.into()
    }

    pub(crate) fn check(&self) -> Check {
        Check::Standing { ticket: self.ticket.clone(), token: self.token }
    }
}

/// The wire form; `kind` is there so that fences of other recipes can be told apart.
#[derive(Serialize, Deserialize)]
struct FenceText {
    kind: FenceKind,
    line: String,
    ticket: String,
    token: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FenceKind {
    Lock,
    Read,
    Write,
}

impl Serialize for Fence {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (line, ticket) = (self.ticket.line.as_str().to_owned(), self.ticket.name.to_string());
        let kind = match self.ticket.kind {
            TicketKind::Lock => FenceKind::Lock,
            TicketKind::Read => FenceKind::Read,
            TicketKind::Write => FenceKind::Write,
        };
        FenceText { kind, line, ticket, token: self.token.0 }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Fence {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = FenceText::deserialize(deserializer)?;
        let line = Dir::from_encoded(&text.line).map_err(serde::de::Error::custom)?;
        let kind = match text.kind {
            FenceKind::Lock => TicketKind::Lock,
            FenceKind::Read => TicketKind::Read,
            FenceKind::Write => TicketKind::Write,
        };
        let ticket = Ticket { line, name: text.ticket.into(), kind };
        Ok(Self { ticket, token: Revision(text.token) })
    }
}
