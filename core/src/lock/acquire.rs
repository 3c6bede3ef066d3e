//! Standing in line.
//!
//! Promise: however an attempt ends (granted, refused, failed, dropped at any await), either a guard owns the
//! ticket or the session owes its removal. Nobody is granted a lock by a ticket that is gone.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::sleep;

use super::{Lock, LockGuard, passing, ticket_value};
use crate::{
    backend::{Enqueue, Nonce, Place, TicketKind},
    error::{ErrorKind, Result},
    key::Dir,
    session::{Debt, Session, SessionCore},
};

/// How often a request to join is made when its outcome stays unsure, and the first pause in between.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// Waits until the lock is held. `stood` turns true once there is a place in the line.
pub(super) async fn acquire(lock: &Lock, stood: &AtomicBool) -> Result<LockGuard> {
    let line = lock.line()?;
    let session = lock.session().await?;
    loop {
        let Some(claim) = join(line, &session, false).await? else {
            let message = "the backend refused a place in the line without being asked to";
            return Err(crate::Error::new(ErrorKind::Backend, "acquire", message).key(line));
        };
        stood.store(true, Ordering::Release);
        if let Some(claim) = wait_turn(session.core(), claim).await? {
            return claim.granted(session);
        }
        // Somebody removed our ticket while the session lives: we lost our place, not our wish.
        tracing::warn!(%line, "our ticket was removed by somebody else; joining the line again");
    }
}

pub(super) async fn try_acquire(lock: &Lock) -> Result<Option<LockGuard>> {
    let line = lock.line()?;
    let session = lock.session().await?;
    let Some(claim) = join(line, &session, true).await? else { return Ok(None) };
    if claim.place().ahead.is_empty() {
        return claim.granted(session).map(Some);
    }
    claim.give_up().await?;
    Ok(None)
}

/// Joins the line; `None` only with `when_free`.
async fn join(line: &Dir, session: &Session, when_free: bool) -> Result<Option<Claim>> {
    let core = session.core();
    if core.debts.too_many() {
        let message = "too much clean-up is owed to the server already; the line was not joined";
        let backend = core.backend.profile().backend;
        return Err(crate::Error::new(ErrorKind::Unavailable, "acquire", message).key(line).on(backend));
    }
    let entry = Arc::new(Enqueue {
        line: line.clone(),
        kind: TicketKind::Lock,
        lease: core.lease.clone(),
        nonce: Nonce::random(),
        value: ticket_value(&core.owner),
        depth: 1,
        when_free,
    });
    let mut unsure = Unsure { core, entry: None };
    let mut pause = FIRST_PAUSE;
    for attempt in 1.. {
        let outcome = tokio::select! {
            biased;
            outcome = Joining::new(core.clone(), entry.clone()) => outcome,
            () = core.over() => return Err(core.lost_error("acquire")),
        };
        match outcome {
            Ok(Some(place)) => {
                let unsure = unsure.entry.take();
                return Ok(Some(Claim { core: core.clone(), place: Some(place), unsure }));
            }
            // An unsure attempt before this one may still land.
            Ok(None) => return Ok(None),
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

/// Waits until nobody is ahead; `None` if the ticket itself is gone.
async fn wait_turn(core: &SessionCore, mut claim: Claim) -> Result<Option<Claim>> {
    let mut idle = Idle::default();
    loop {
        let place = claim.place();
        let Some(nearest) = place.ahead.first() else { return Ok(Some(claim)) };
        let waited = tokio::select! {
            biased;
            () = core.over() => return Err(core.lost_error("acquire")),
            waited = core.backend.gone(nearest) => waited,
        };
        let looked = tokio::select! {
            biased;
            () = core.over() => return Err(core.lost_error("acquire")),
            looked = core.backend.look(&place.ticket, 1) => looked,
        };
        match (waited, looked) {
            (_, Ok(None)) => {
                claim.forget();
                return Ok(None);
            }
            (waited, Ok(Some(now))) => {
                let moved = now.ahead.first() != place.ahead.first();
                claim.place = Some(now);
                if moved {
                    idle = Idle::default();
                } else {
                    idle.pause(core, waited.err()).await;
                }
            }
            (_, Err(error)) if passing(error.kind()) => idle.pause(core, Some(error)).await,
            (_, Err(error)) => return Err(error),
        }
    }
}

/// Pauses after looks that brought nothing, so that an early or failing wait never becomes a tight loop.
#[derive(Default)]
struct Idle(u32);

impl Idle {
    async fn pause(&mut self, core: &SessionCore, error: Option<crate::Error>) {
        if let Some(error) = error {
            tracing::debug!(%error, "waiting in line goes on");
        }
        // A single early return is normal (the deadline of a lease that was renewed) and costs no pause.
        if self.0 > 0 {
            let pause = Duration::from_millis(5 << self.0.min(8)).mul_f64(rand::random_range(0.5..1.5));
            tokio::select! {
                () = core.over() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.0 += 1;
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
struct Claim {
    core: Arc<SessionCore>,
    /// `None` once the ticket belongs to a guard or is known to be gone.
    place: Option<Place>,
    /// The request, if an attempt at it was unsure and could land late.
    unsure: Option<Arc<Enqueue>>,
}

impl Claim {
    fn place(&self) -> &Place {
        self.place.as_ref().expect("taken only by methods that consume the claim")
    }

    fn granted(mut self, session: Session) -> Result<LockGuard> {
        // The answer that made us first may have been long on its way.
        self.core.check("acquire")?;
        let place = self.place.take().expect("taken only by methods that consume the claim");
        Ok(LockGuard::new(session, place, self.unsure.take()))
    }

    async fn give_up(mut self) -> Result<()> {
        let ticket = self.place().ticket.clone();
        // While this runs the claim still owes the ticket; leaving twice is harmless.
        let txn = crate::Txn { checks: Vec::new(), writes: vec![crate::Write::Leave(ticket)] };
        self.core.backend.commit(&txn).await?;
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        self.place = None;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.core.debts.owe(Debt::Leave(place.ticket));
        }
        if let Some(entry) = self.unsure.take() {
            self.core.debts.owe(Debt::Later(entry));
        }
    }
}
