//! Joining a line.
//!
//! Promise: an attempt whose caller went away is finished by the session, and then undone.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::time::sleep;

use super::Held;
use crate::{
    backend::{Enqueue, Nonce, Place, TicketKind, Txn, Write},
    error::{ErrorKind, Result},
    key::Dir,
    session::{Debt, Session, SessionCore},
};

/// How often a request to join is made when its outcome stays unsure, and the first pause in between.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// What is wished for by who joins a line.
#[derive(Debug, Clone)]
pub(crate) struct Wish<'a> {
    pub(crate) line: &'a Dir,
    /// What others may read of it.
    pub(crate) value: Bytes,
    /// The verb in error messages.
    pub(crate) operation: &'static str,
    /// What is held once nobody is ahead, in error messages.
    pub(crate) what: &'static str,
}

/// Joins the line; `None` only with `when_free`.
pub(crate) async fn join(wish: &Wish<'_>, session: &Session, when_free: bool) -> Result<Option<Claim>> {
    let (core, line, operation) = (session.core(), wish.line, wish.operation);
    if core.debts.too_many() {
        let message = "too much clean-up is owed to the server already; the line was not joined";
        let backend = core.backend.profile().backend;
        return Err(crate::Error::new(ErrorKind::Unavailable, operation, message).key(line).on(backend));
    }
    let entry = Arc::new(Enqueue {
        line: line.clone(),
        kind: TicketKind::Lock,
        lease: core.lease.clone(),
        nonce: Nonce::random(),
        value: wish.value.clone(),
        depth: 1,
        when_free,
    });
    let mut unsure = Unsure { core, entry: None };
    let mut pause = FIRST_PAUSE;
    for attempt in 1.. {
        let outcome = tokio::select! {
            biased;
            outcome = Joining::new(core.clone(), entry.clone()) => outcome,
            () = core.over() => return Err(core.lost_error(operation)),
        };
        match outcome {
            Ok(Some(place)) => {
                let (core, unsure) = (core.clone(), unsure.entry.take());
                let claim = Claim { core, place: Some(place), unsure, also: Vec::new(), operation, what: wish.what };
                return Ok(Some(claim));
            }
            // An unsure attempt before this one may still land.
            Ok(None) if when_free => return Ok(None),
            Ok(None) => {
                let message = "the backend refused a place in the line without being asked to";
                let backend = core.backend.profile().backend;
                return Err(crate::Error::new(ErrorKind::Backend, operation, message).key(line).on(backend));
            }
            Err(error) if error.kind() == ErrorKind::Ambiguous && attempt < ATTEMPTS => {
                unsure.entry = Some(entry.clone());
                tracing::debug!(%error, "joining again");
                sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
                pause *= 2;
            }
            Err(error) => {
                if error.kind() == ErrorKind::Ambiguous {
                    unsure.entry = Some(entry);
                }
                let doubt = unsure.entry.is_some() && error.kind() != ErrorKind::SessionLost;
                return Err(if doubt { error.with_kind(ErrorKind::Ambiguous) } else { error });
            }
        }
    }
    unreachable!("the last attempt returns")
}

/// An attempt to join that may have been applied. Dropped with an entry, the session finds out and cleans up.
struct Unsure<'a> {
    core: &'a SessionCore,
    entry: Option<Arc<Enqueue>>,
}

impl Drop for Unsure<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.core.debts.owe(Debt::Unsure(entry.clone()));
            self.core.debts.owe(Debt::Later(entry));
        }
    }
}

/// A request to join. Dropped while under way, it is handed to the session, which finishes it and then leaves.
struct Joining {
    core: Arc<SessionCore>,
    entry: Arc<Enqueue>,
    request: Option<BoxFuture<'static, Result<Option<Place>>>>,
    started: bool,
}

impl Joining {
    fn new(core: Arc<SessionCore>, entry: Arc<Enqueue>) -> Self {
        let request = {
            let (backend, entry) = (core.backend.clone(), entry.clone());
            Box::pin(async move { backend.enqueue(&entry).await })
        };
        Self { core, entry, request: Some(request), started: false }
    }
}

impl Future for Joining {
    type Output = Result<Option<Place>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.started = true;
        let request = self.request.as_mut().expect("a future is not polled after it is ready");
        let outcome = std::task::ready!(request.as_mut().poll(cx));
        self.request = None;
        Poll::Ready(outcome)
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        if let Some(request) = self.request.take()
            && self.started
        {
            self.core.debts.owe(Debt::Joining { request, entry: self.entry.clone() });
        }
    }
}

/// A ticket that waits. Dropped, it is taken out of the line in the background.
pub(crate) struct Claim {
    pub(super) core: Arc<SessionCore>,
    /// `None` once the ticket belongs to a [`Held`].
    place: Option<Place>,
    /// The request, if an attempt at it was unsure and could land late.
    unsure: Option<Arc<Enqueue>>,
    /// Made in the same step that takes the ticket out. Nobody else may be hurt by it, however late or often it is made.
    also: Vec<Write>,
    pub(super) operation: &'static str,
    what: &'static str,
}

impl Claim {
    pub(crate) fn place(&self) -> &Place {
        self.place.as_ref().expect("taken only by methods that consume the claim")
    }

    pub(super) fn moved(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// Has this made together with leaving, if the claim is given up.
    pub(crate) fn leave_with(&mut self, write: Write) {
        self.also.push(write);
    }

    pub(crate) fn granted(mut self, session: Session) -> Result<Held> {
        // The answer that made us first may have been long on its way.
        self.core.check(self.operation)?;
        let place = self.place.take().expect("taken only by methods that consume the claim");
        Ok(Held::new(session, place, self.unsure.take(), self.what))
    }

    pub(crate) async fn give_up(mut self) -> Result<()> {
        // While this runs the claim still owes the ticket; leaving twice is harmless.
        let txn = self.leave();
        self.core.backend.commit(&txn).await?;
        self.place = None;
        Ok(())
    }

    fn leave(&self) -> Txn {
        let leave = Write::Leave(self.place().ticket.clone());
        Txn { checks: Vec::new(), writes: [leave].into_iter().chain(self.also.clone()).collect() }
    }

    /// The ticket was seen gone.
    pub(super) fn forget(mut self) {
        // What else there is of it must go, too.
        if self.also.is_empty() {
            self.place = None;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.place.is_some() {
            self.core.debts.owe(Debt::Leave(self.leave(), None));
        }
        if let Some(entry) = self.unsure.take() {
            self.core.debts.owe(Debt::Later(entry));
        }
    }
}
