//! Debts: what was begun at the server and must be undone although nobody waits for it any more.
//!
//! Promise: a dropped or failed attempt to stand in a line leaves no ticket behind. The attempt itself is
//! finished first: a delete that overtook the create would delete nothing. A debt is retried until the server has
//! confirmed it or the session is over; the end of the lease pays the rest.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{sync::Notify, time::sleep};

use super::{SessionCore, hold};
use crate::{
    backend::{Check, Enqueue, Place, Revision, Ticket, Txn, Write},
    error::{ErrorKind, Result},
    key::KeyRange,
    line::Traces,
};

/// How many removals are paid at once; the rest wait in the queue, in order.
const AT_ONCE: usize = 64;
/// When a place whose creation was unsure is looked for and left once more: a request that was delayed on its
/// way could land after the first removal.
const AFTERSHOCKS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(10)];
/// How much may be owed before nothing more is begun.
const MOST_OWED: usize = 4096;

pub(crate) enum Debt {
    /// A request to join that nobody waits for any more, still under way.
    Joining { request: BoxFuture<'static, Result<Option<Place>>>, entry: Arc<Enqueue> },
    /// A request to join whose outcome is not known.
    Unsure(Arc<Enqueue>),
    /// A request that was repeated and is settled, but whose first attempt could still land.
    Later(Arc<Enqueue>),
    /// Takes out a ticket that is no longer wanted. May be made again and again. If it is refused, somebody else
    /// took the ticket, and what goes with it is to be erased.
    Leave(Txn, Option<(Traces, Revision)>),
    /// Keys of a hold whose ticket is gone.
    Erase(Traces, Revision),
}

impl fmt::Debug for Debt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joining { entry, .. } => write!(f, "Joining({})", entry.line),
            Self::Unsure(entry) => write!(f, "Unsure({})", entry.line),
            Self::Later(entry) => write!(f, "Later({})", entry.line),
            Self::Leave(txn, _) => write!(f, "Leave({txn})"),
            Self::Erase(traces, _) => write!(f, "Erase({})", traces.record),
        }
    }
}

/// Debts that wait to be paid.
///
/// Each attempt to join leaves at most two, and none is begun while more than [`MOST_OWED`] are open.
#[derive(Debug)]
pub(crate) struct Debts {
    /// `None` once the session is over: the end of the lease pays, and a request that nobody polls any more must
    /// not be kept, as it may hold the lease's connection open.
    queue: Mutex<Option<Vec<Debt>>>,
    added: Notify,
    /// Owed and not yet paid, under way or queued.
    open: AtomicUsize,
}

impl Default for Debts {
    fn default() -> Self {
        Self { queue: Mutex::new(Some(Vec::new())), added: Notify::new(), open: AtomicUsize::new(0) }
    }
}

impl Debts {
    /// Never blocks, so that `Drop` can call it, also outside of a runtime.
    pub(crate) fn owe(&self, debt: Debt) {
        let mut queue = self.queue();
        match queue.as_mut() {
            Some(debts) => {
                self.open.fetch_add(1, Ordering::Relaxed);
                debts.push(debt);
            }
            None => {
                // Dropped after the lock: a dropped request may run code of the backend.
                drop(queue);
                drop(debt);
                return;
            }
        }
        drop(queue);
        self.added.notify_one();
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Option<Vec<Debt>>> {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes no more, and lets go of what is queued.
    fn close(&self) {
        let left = self.queue().take();
        drop(left);
    }

    /// Whether so much is owed that nothing more should be begun.
    pub(crate) fn too_many(&self) -> bool {
        self.open.load(Ordering::Relaxed) > MOST_OWED
    }

    fn take(&self) -> Vec<Debt> {
        self.queue().as_mut().map(std::mem::take).unwrap_or_default()
    }
}

/// What the task that pays has in hand.
#[derive(Default)]
struct Work {
    /// Removals that wait for their turn.
    queue: VecDeque<Debt>,
    /// Removals under way, at most [`AT_ONCE`].
    removals: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Requests that are out already, and pauses before an aftershock. They are all polled: an unpolled
    /// request could hold what the others wait for, such as a permit of the limit layer.
    waits: FuturesUnordered<BoxFuture<'static, Option<Debt>>>,
    sentries: FuturesUnordered<BoxFuture<'static, ()>>,
}

impl Work {
    fn accept(&mut self, core: &SessionCore, debt: Debt) {
        match debt {
            Debt::Joining { request, entry } => {
                self.waits.push(Box::pin(async move {
                    match request.await {
                        Ok(Some(place)) => Some(Debt::Leave(leaving(place.ticket), None)),
                        Err(error) if error.kind() == ErrorKind::Ambiguous => Some(Debt::Unsure(entry)),
                        // Surely nothing is there.
                        Ok(None) | Err(_) => None,
                    }
                }));
            }
            Debt::Later(entry) => {
                for pause in AFTERSHOCKS {
                    let entry = entry.clone();
                    core.debts.open.fetch_add(1, Ordering::Relaxed);
                    self.waits.push(Box::pin(async move {
                        sleep(pause).await;
                        Some(Debt::Unsure(entry))
                    }));
                }
                core.debts.open.fetch_sub(1, Ordering::Relaxed);
            }
            debt @ (Debt::Unsure(_) | Debt::Leave(..) | Debt::Erase(..)) => self.queue.push_back(debt),
        }
    }

    fn begin(&mut self, core: &Arc<SessionCore>) {
        while self.removals.len() < AT_ONCE
            && let Some(debt) = self.queue.pop_front()
        {
            let core = core.clone();
            self.removals.push(Box::pin(async move {
                match debt {
                    Debt::Leave(txn, traces) => {
                        let left = leave(&core, &txn).await;
                        if let Some((traces, token)) = traces.filter(|_| !left) {
                            erase(&core, &traces, token).await;
                        }
                    }
                    Debt::Erase(traces, token) => erase(&core, &traces, token).await,
                    Debt::Unsure(entry) => find_and_leave(&core, &entry).await,
                    Debt::Joining { .. } | Debt::Later(_) => {}
                }
            }));
        }
    }
}

/// Pays the session's debts and watches its long-held tickets, until the session is over.
pub(super) async fn serve(core: Arc<SessionCore>) {
    let mut over = std::pin::pin!(core.over());
    let mut work = Work::default();
    let mut rounds = tokio::time::interval(hold::WATCH_AFTER);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let mut look_round = false;
        work.begin(&core);
        tokio::select! {
            () = &mut over => break,
            () = core.debts.added.notified() => {
                for debt in core.debts.take() {
                    work.accept(&core, debt);
                }
            }
            Some(()) = work.removals.next() => {
                core.debts.open.fetch_sub(1, Ordering::Relaxed);
            }
            Some(then) = work.waits.next() => match then {
                Some(debt) => work.accept(&core, debt),
                None => {
                    core.debts.open.fetch_sub(1, Ordering::Relaxed);
                }
            },
            Some(()) = work.sentries.next() => {}
            () = core.holds.urgent.notified() => look_round = true,
            _ = rounds.tick() => look_round = true,
        }
        if look_round {
            for hold in core.holds.due() {
                work.sentries.push(Box::pin(hold::guard(core.clone(), hold)));
            }
        }
    }
    core.debts.close();
    // A create that is under way may still reach the server before the revocation of the lease does; it is
    // refused after it. Either way the lease takes it along.
}

/// Asks for the same place again, which tells the ticket's name or makes a new one, and leaves it.
async fn find_and_leave(core: &SessionCore, entry: &Enqueue) {
    let mut wait = Backoff::default();
    let mut again = false;
    // Never refused for being busy: the answer must name the ticket.
    let entry = Enqueue { when_free: false, ..entry.clone() };
    let ticket = loop {
        match core.backend.enqueue(&entry).await {
            Ok(Some(place)) => break place.ticket,
            Ok(None) => return,
            Err(error) => match error.kind() {
                ErrorKind::SessionLost | ErrorKind::InvalidInput | ErrorKind::Unsupported => return,
                kind => {
                    again |= kind == ErrorKind::Ambiguous;
                    wait.after(core, &error).await;
                }
            },
        }
    };
    leave(core, &leaving(ticket)).await;
    if again {
        core.debts.owe(Debt::Later(Arc::new(entry)));
    }
}

fn leaving(ticket: Ticket) -> Txn {
    Txn { checks: Vec::new(), writes: vec![Write::Leave(ticket)] }
}

/// Whether it was applied; `false` also if it never can be.
async fn leave(core: &SessionCore, txn: &Txn) -> bool {
    until_answered(core, || core.backend.commit(txn)).await.is_some_and(|commit| commit.applied)
}

/// Deletes what a hold left in the store, and nothing of a later one.
async fn erase(core: &SessionCore, traces: &Traces, token: Revision) {
    if let Some(own) = &traces.own {
        leave(core, &Txn { checks: Vec::new(), writes: vec![Write::Delete(own.clone())] }).await;
    }
    let range = KeyRange::One(traces.record.clone());
    let Some(now) = until_answered(core, || core.backend.read(&range)).await else { return };
    if let Some(record) = now.entries.first().filter(|record| term(&record.value) == Some(token.0)) {
        // Refused, it was written again: by a later holder, as the ticket that fences our own writes is gone.
        let check = Check::Unchanged { key: traces.record.clone(), modified: record.modified };
        leave(core, &Txn { checks: vec![check], writes: vec![Write::Delete(traces.record.clone())] }).await;
    }
}

fn term(record: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Of {
        term: u64,
    }
    serde_json::from_slice::<Of>(record).ok().map(|of| of.term)
}

/// Makes a call until the server has answered it; `None` if it never will.
async fn until_answered<T, F>(core: &SessionCore, call: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = Result<T>>,
{
    let mut wait = Backoff::default();
    loop {
        match call().await {
            Ok(answer) => return Some(answer),
            Err(error) => match error.kind() {
                ErrorKind::SessionLost | ErrorKind::InvalidInput | ErrorKind::Unsupported => return None,
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
