//! Debts: what was begun at the server and must be undone although nobody waits for it any more.
//!
//! Promise: a dropped or failed attempt to stand in a line leaves no ticket behind. The attempt itself is
//! finished first: a delete that overtook the create would delete nothing. A debt is retried until the server has
//! confirmed it or the session is over; the end of the lease pays the rest.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{sync::Notify, time::sleep};

use super::{SessionCore, hold};
use crate::{
    backend::{Enqueue, Place, Ticket, Txn, Write},
    error::{ErrorKind, Result},
};

/// How many debts are paid at once; the rest wait in the queue.
const AT_ONCE: usize = 64;
/// When a ticket whose creation was unsure is deleted once more: a create that was delayed on its way could
/// land after the first delete.
const AFTERSHOCKS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(10)];

pub(crate) enum Debt {
    /// A request to join that nobody waits for any more, still under way.
    Joining { request: BoxFuture<'static, Result<Option<Place>>>, entry: Arc<Enqueue> },
    /// A request to join whose outcome is not known.
    Unsure(Arc<Enqueue>),
    /// A ticket that is no longer wanted.
    Leave(Ticket),
}

impl fmt::Debug for Debt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joining { entry, .. } => write!(f, "Joining({})", entry.line),
            Self::Unsure(entry) => write!(f, "Unsure({})", entry.line),
            Self::Leave(ticket) => write!(f, "Leave({ticket})"),
        }
    }
}

/// Debts that wait to be paid.
///
/// Bounded by the number of acquisitions under way: each leaves at most one.
#[derive(Debug, Default)]
pub(crate) struct Debts {
    queue: Mutex<Vec<Debt>>,
    added: Notify,
}

impl Debts {
    /// Never blocks, so that `Drop` can call it, also outside of a runtime.
    pub(crate) fn owe(&self, debt: Debt) {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(debt);
        self.added.notify_one();
    }

    fn take(&self) -> Vec<Debt> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// Pays the session's debts and watches its long-held tickets, until the session is over.
pub(super) async fn serve(core: Arc<SessionCore>) {
    let mut over = std::pin::pin!(core.over());
    let mut work: FuturesUnordered<BoxFuture<'static, ()>> = FuturesUnordered::new();
    let mut sentries: FuturesUnordered<BoxFuture<'static, ()>> = FuturesUnordered::new();
    let mut rounds = tokio::time::interval(hold::WATCH_AFTER);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut waiting = Vec::new();
    loop {
        let mut look_round = false;
        while work.len() < AT_ONCE
            && let Some(debt) = waiting.pop()
        {
            let core = core.clone();
            work.push(Box::pin(async move { pay(&core, debt).await }));
        }
        tokio::select! {
            () = &mut over => break,
            () = core.debts.added.notified() => waiting.append(&mut core.debts.take()),
            Some(()) = work.next() => {}
            Some(()) = sentries.next() => {}
            () = core.holds.urgent.notified() => look_round = true,
            _ = rounds.tick() => look_round = true,
        }
        if look_round {
            for hold in core.holds.due() {
                sentries.push(Box::pin(hold::guard(core.clone(), hold)));
            }
        }
    }
    // A create that is under way may still reach the server before the revocation of the lease does; it is
    // refused after it. Either way the lease takes it along.
}

async fn pay(core: &SessionCore, debt: Debt) {
    match debt {
        Debt::Leave(ticket) => leave(core, &ticket).await,
        Debt::Unsure(entry) => find_and_leave(core, &entry).await,
        Debt::Joining { request, entry } => match request.await {
            Ok(Some(place)) => leave(core, &place.ticket).await,
            Ok(None) => {}
            Err(error) => match error.kind() {
                ErrorKind::Ambiguous | ErrorKind::Backend | ErrorKind::Corrupt => find_and_leave(core, &entry).await,
                // Surely not applied.
                _ => {}
            },
        },
    }
}

/// Asks for the same place again, which tells the ticket's name, and then leaves it.
async fn find_and_leave(core: &SessionCore, entry: &Enqueue) {
    let mut wait = Backoff::default();
    let ticket = loop {
        match core.backend.enqueue(entry).await {
            Ok(Some(place)) => break place.ticket,
            Ok(None) => return,
            Err(error) => match error.kind() {
                ErrorKind::SessionLost | ErrorKind::InvalidInput | ErrorKind::Unsupported => return,
                _ => wait.after(core, &error).await,
            },
        }
    };
    leave(core, &ticket).await;
    for pause in AFTERSHOCKS {
        sleep(pause).await;
        leave(core, &ticket).await;
    }
}

async fn leave(core: &SessionCore, ticket: &Ticket) {
    let txn = Txn { checks: Vec::new(), writes: vec![Write::Leave(ticket.clone())] };
    let mut wait = Backoff::default();
    loop {
        match core.backend.commit(&txn).await {
            Ok(_) => return,
            Err(error) => match error.kind() {
                ErrorKind::SessionLost | ErrorKind::InvalidInput | ErrorKind::Unsupported => return,
                _ => wait.after(core, &error).await,
            },
        }
    }
}

/// Pauses between attempts to pay.
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(20))
    }
}

impl Backoff {
    async fn after(&mut self, core: &SessionCore, error: &crate::error::Error) {
        tracing::debug!(lease = %core.lease, %error, "clean-up owed");
        sleep(self.0.mul_f64(rand::random_range(0.5..1.5))).await;
        self.0 = (self.0 * 2).min(Duration::from_secs(2));
    }
}
