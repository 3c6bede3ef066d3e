//! The guard of a leader.
//!
//! Promise: as a lock's guard; and once [`Leadership::is_leader`] has answered `false`, it never answers `true` again.

use std::{fmt, future::Future};

use tokio::time::Instant;

use super::announce::Announcer;
use crate::{
    error::{Error, ErrorKind, Result},
    line::{Fence, Held, run_while},
    lock::FencingToken,
    session::Session,
};

/// Leadership, for one term. Dropping it resigns in the background.
#[must_use = "the leadership is given up as soon as the guard is dropped"]
pub struct Leadership {
    held: Held,
    announcer: Announcer,
    /// For a cautious candidate: the session's suspicions up to now. One more and the leadership is over.
    suspicions: Option<u64>,
}

impl Leadership {
    pub(super) fn new(held: Held, announcer: Announcer, suspicions: Option<u64>) -> Self {
        Self { held, announcer, suspicions }
    }

    /// The term: grows with every leader, and is the fencing token. Send it with each write so that storage can refuse
    /// a former leader.
    pub fn term(&self) -> FencingToken {
        self.held.token().into()
    }

    /// Whether this is still the leader, by the local clock and what has been heard. No I/O.
    pub fn is_leader(&self) -> bool {
        self.held.stands() && !self.suspected()
    }

    /// `Ok` if [`is_leader`](Self::is_leader); made for `leadership.check()?` before each step of the work.
    ///
    /// # Errors
    /// `SessionLost` otherwise.
    pub fn check(&self) -> Result<()> {
        self.check_in("check")
    }

    fn check_in(&self, operation: &'static str) -> Result<()> {
        self.held.check(operation)?;
        if self.suspected() { Err(self.stepped_down(operation)) } else { Ok(()) }
    }

    fn suspected(&self) -> bool {
        self.suspicions.is_some_and(|seen| self.held.session().core().suspicions() != seen)
    }

    /// The instant up to which the leadership may be trusted without hearing from the server again. Renewals move it.
    pub fn deadline(&self) -> Instant {
        self.held.session().deadline()
    }

    /// The session that it stands on.
    pub fn session(&self) -> &Session {
        self.held.session()
    }

    /// Returns when the leadership is lost: the session has ended, somebody removed the ticket, or, for a
    /// [cautious](super::Candidate::cautious) candidate, a renewal is overdue.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn lost(&self) {
        let Some(seen) = self.suspicions else { return self.held.lost().await };
        tokio::select! {
            () = self.held.lost() => {}
            () = self.held.session().core().suspected(seen) => {}
        }
    }

    /// Runs `work` for as long as this is the leader; when it is lost, `work` is dropped at its current await.
    ///
    /// A loss that falls into the last poll of `work` is not seen: look at the guard afterwards if that matters. Work
    /// that blocks its thread cannot be stopped.
    ///
    /// # Errors
    /// `SessionLost` if the leadership was lost while `work` was waiting, or before it began.
    ///
    /// # Cancel safety
    /// Dropping it drops `work`; the leadership stays.
    pub async fn protect<F: Future>(&self, work: F) -> Result<F::Output> {
        run_while(|| self.check_in("protect"), self.lost(), work).await
    }

    /// What a transaction needs to be refused once this leadership has ended, whatever this process believes. It may be
    /// stored or sent elsewhere; [`Election::resign_by`](super::Election::resign_by) takes it.
    pub fn fence(&self) -> Fence {
        self.held.fence()
    }

    /// Changes what observers see, in one round trip: the value, not the term. The store refuses it to a former leader.
    /// The first announcement, of the candidate's value, is made by itself when the leadership begins.
    ///
    /// # Errors
    /// `InvalidInput` for a value over [`MAX_VALUE`](super::MAX_VALUE); `SessionLost` if the leadership has ended; otherwise
    /// it could not be confirmed yet, and is tried again for as long as the leadership lasts, unless a later announcement
    /// replaces it.
    ///
    /// # Cancel safety
    /// Dropped half-way, the announcement goes on in the background.
    pub async fn announce(&self, value: impl AsRef<str>) -> Result<()> {
        super::check_value("announce", value.as_ref())?;
        self.check_in("announce")?;
        match self.announcer.announce(value.as_ref()).await {
            Some(Err(error)) if error.kind() != ErrorKind::SessionLost => {
                Err(error.next("it is tried again for as long as the leadership lasts"))
            }
            Some(outcome) => outcome,
            None => Err(self.check_in("announce").err().unwrap_or_else(|| self.held.removed("announce"))),
        }
    }

    /// Gives the leadership up, and takes the announcement along: one round trip. After a lost reply it is sent again,
    /// and `Ok` then says that this is not the leader now; whether it had been removed before is not known.
    ///
    /// # Errors
    /// `SessionLost` if the leadership had been lost before: what was done under it may not have been done by the only
    /// leader. Otherwise it could not be confirmed; it is retried in the background, and the end of the session ends
    /// the leadership in any case.
    ///
    /// # Cancel safety
    /// Dropped half-way, it goes on in the background.
    pub async fn resign(self) -> Result<()> {
        self.end().await
    }

    pub(super) async fn end(&self) -> Result<()> {
        if let Err(error) = self.check_in("resign") {
            // A cautious leader that stepped down still has its place.
            self.held.give_up();
            return Err(error);
        }
        self.held.release("resign").await
    }

    /// Resigns in the background, whoever else has a handle.
    pub(super) fn give_up(&self) {
        self.held.give_up();
    }

    fn stepped_down(&self, operation: &'static str) -> Error {
        let message = "a renewal was overdue, and this candidate is cautious: it stepped down";
        let backend = self.held.session().core().backend.profile().backend;
        let line = &self.held.hold().ticket.line;
        Error::new(ErrorKind::SessionLost, operation, message).key(line).on(backend).next("campaign again")
    }
}

impl fmt::Debug for Leadership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leadership")
            .field("ticket", &self.held.hold().ticket)
            .field("term", &self.held.token())
            .finish_non_exhaustive()
    }
}
