//! A ticket that is first in its line, for as long as its owner wants it.
//!
//! Promise: what stands on a [`Held`] is over for good once [`Held::check`] has failed; dropped, the ticket is taken out of
//! its line in the background.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use super::Fence;
use crate::{
    backend::{Enqueue, Place, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    session::{Debt, Hold, Session, SessionCore},
};

/// A ticket that is first in its line. Dropped, it is taken out in the background.
pub(crate) struct Held {
    session: Session,
    hold: Arc<Hold>,
    /// Made in the same step that takes the ticket out, if it still stands.
    also: Vec<Write>,
    /// What is held, in error messages.
    what: &'static str,
}

impl Held {
    pub(super) fn new(session: Session, place: Place, unsure: Option<Arc<Enqueue>>, what: &'static str) -> Self {
        let hold = session.core().hold(place, unsure);
        Self { session, hold, also: Vec::new(), what }
    }

    pub(crate) fn token(&self) -> Revision {
        self.hold.token
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    pub(crate) fn hold(&self) -> &Arc<Hold> {
        &self.hold
    }

    /// Has this made together with leaving.
    pub(crate) fn leave_with(&mut self, write: Write) {
        self.also.push(write);
    }

    /// Whether it still stands, by the local clock and what has been heard. No I/O.
    pub(crate) fn stands(&self) -> bool {
        self.hold.stands() && self.session.is_live()
    }

    pub(crate) fn check(&self, operation: &'static str) -> Result<()> {
        self.session.core().check(operation)?;
        if self.hold.stands() { Ok(()) } else { Err(self.removed(operation)) }
    }

    /// Returns when the session has ended, or somebody removed the ticket.
    pub(crate) async fn lost(&self) {
        let core = self.session.core();
        core.watch_now(&self.hold);
        tokio::select! {
            () = core.over() => {}
            () = self.hold.ended() => {}
        }
    }

    pub(crate) fn fence(&self) -> Fence {
        Fence::new(self.hold.ticket.clone(), self.hold.token)
    }

    /// What may be sent again after a reply was lost, with what it then means to be refused: that it happened.
    fn again(&self) -> Txn {
        if self.also.is_empty() {
            // Unconditional leaving may be repeated, so the layers carry this one through.
            Txn { checks: Vec::new(), writes: vec![Write::Leave(self.hold.ticket.clone())] }
        } else {
            // What goes with it could hit a later owner's, so it stays under the condition.
            self.fence().leave_and(self.also.clone())
        }
    }

    /// Takes the ticket out of its line: one round trip.
    pub(crate) async fn release(self, operation: &'static str) -> Result<()> {
        let core = self.session.core().clone();
        core.check(operation)?;
        if !self.hold.release() {
            return Err(self.removed(operation));
        }
        core.unhold(&self.hold);
        if let Some(entry) = self.hold.unsure.clone() {
            core.debts.owe(Debt::Later(entry));
        }
        let again = self.again();
        let owed = Owed { core: &core, txn: Some(again.clone()) };
        let outcome = match core.backend.commit(&self.fence().leave_and(self.also.clone())).await {
            Err(error) if matches!(error.kind(), ErrorKind::Ambiguous | ErrorKind::Unavailable) => {
                core.backend.commit(&again).await.map(|_| true)
            }
            outcome => outcome.map(|commit| commit.applied),
        };
        match outcome {
            Ok(stood) => {
                owed.paid();
                if stood { Ok(()) } else { Err(self.removed(operation)) }
            }
            Err(error) => Err(error.next("it is retried in the background; the end of the session frees it")),
        }
    }

    pub(crate) fn removed(&self, operation: &'static str) -> Error {
        let message = format!("the {} was taken away: its ticket is gone", self.what);
        let backend = self.session.core().backend.profile().backend;
        Error::new(ErrorKind::SessionLost, operation, message).key(&self.hold.ticket.line).on(backend)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let core = self.session.core();
        if self.hold.release() {
            core.debts.owe(Debt::Leave(self.again()));
            if let Some(entry) = self.hold.unsure.clone() {
                core.debts.owe(Debt::Later(entry));
            }
            core.unhold(&self.hold);
        }
    }
}

/// Runs `work` until it ends, or until `check` fails or `lost` returns; `lost` may come before `check` knows why.
pub(crate) async fn run_while<F: Future>(
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
            let unexplained = || Error::new(ErrorKind::SessionLost, "protect", "it was lost");
            return Poll::Ready(Err(check().err().unwrap_or_else(unexplained)));
        }
        work.as_mut().poll(cx).map(Ok)
    })
    .await
}

/// A removal under way; dropped before it is confirmed, it becomes a debt.
struct Owed<'a> {
    core: &'a SessionCore,
    txn: Option<Txn>,
}

impl Owed<'_> {
    fn paid(mut self) {
        self.txn = None;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if let Some(txn) = self.txn.take() {
            self.core.debts.owe(Debt::Leave(txn));
        }
    }
}
