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
    key::Key,
    session::{Debt, Hold, Session, SessionCore},
};

/// Keys that a hold leaves in the store beside its ticket. They go with it.
#[derive(Debug, Clone)]
pub(crate) struct Traces {
    /// Tells who holds: JSON with the hold's token as `term`. Later holders write it, too.
    pub(crate) record: Key,
    /// Nobody else writes this one.
    pub(crate) own: Option<Key>,
}

impl Traces {
    fn deletes(&self) -> impl Iterator<Item = Write> {
        [Some(self.record.clone()), self.own.clone()].into_iter().flatten().map(Write::Delete)
    }
}

/// A ticket that is first in its line. Dropped, it is taken out in the background.
pub(crate) struct Held {
    session: Session,
    hold: Arc<Hold>,
    traces: Option<Traces>,
    /// What is held, in error messages.
    what: &'static str,
}

impl Held {
    pub(super) fn new(session: Session, place: Place, unsure: Option<Arc<Enqueue>>, what: &'static str) -> Self {
        let hold = session.core().hold(place, unsure);
        Self { session, hold, traces: None, what }
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

    /// Has these keys deleted together with leaving.
    pub(crate) fn leaves(&mut self, traces: Traces) {
        self.traces = Some(traces);
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

    fn leave(&self) -> Txn {
        self.fence().leave_and(self.traces.iter().flat_map(Traces::deletes))
    }

    /// What is sent again after a reply was lost. That it is refused then, is no news.
    fn again(&self) -> Txn {
        match self.traces {
            // Unconditional leaving may be repeated, so the layers carry this one through.
            None => Txn { checks: Vec::new(), writes: vec![Write::Leave(self.hold.ticket.clone())] },
            // The record could be a later holder's by now, so it stays under the condition.
            Some(_) => self.leave(),
        }
    }

    /// What is left of it when the ticket was taken by somebody else.
    fn owe_traces(&self) {
        if let Some(traces) = self.traces.clone() {
            self.session.core().debts.owe(Debt::Erase(traces, self.hold.token));
        }
    }

    /// Takes the ticket out of its line: one round trip.
    pub(crate) async fn release(&self, operation: &'static str) -> Result<()> {
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
        let owed = Owed { core: &core, debt: Some(self.departure()) };
        let outcome = match core.backend.commit(&self.leave()).await {
            Err(error) if matches!(error.kind(), ErrorKind::Ambiguous | ErrorKind::Unavailable) => {
                let repeated = core.backend.commit(&again).await;
                if repeated.as_ref().is_ok_and(|commit| !commit.applied) {
                    // Applied the first time, or the ticket had been taken: only the latter leaves something.
                    self.owe_traces();
                }
                repeated.map(|_| true)
            }
            outcome => outcome.map(|commit| commit.applied),
        };
        match outcome {
            Ok(stood) => {
                owed.paid();
                if stood {
                    return Ok(());
                }
                self.owe_traces();
                Err(self.removed(operation))
            }
            Err(error) => Err(error.next("it is retried in the background; the end of the session frees it")),
        }
    }

    /// Takes the ticket out of its line in the background, if that has not begun yet.
    pub(crate) fn give_up(&self) {
        let core = self.session.core();
        if self.hold.release() {
            core.debts.owe(self.departure());
            if let Some(entry) = self.hold.unsure.clone() {
                core.debts.owe(Debt::Later(entry));
            }
            core.unhold(&self.hold);
        } else if self.hold.was_taken() {
            self.owe_traces();
        }
    }

    fn departure(&self) -> Debt {
        Debt::Leave(self.again(), self.traces.clone().map(|traces| (traces, self.hold.token)))
    }

    pub(crate) fn removed(&self, operation: &'static str) -> Error {
        let message = format!("the {} was taken away: its ticket is gone", self.what);
        let backend = self.session.core().backend.profile().backend;
        Error::new(ErrorKind::SessionLost, operation, message).key(&self.hold.ticket.line).on(backend)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_up();
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
    debt: Option<Debt>,
}

impl Owed<'_> {
    fn paid(mut self) {
        self.debt = None;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if let Some(debt) = self.debt.take() {
            self.core.debts.owe(debt);
        }
    }
}
