//! Locks: fair, fenced, with a guard that knows when it is no longer valid.
//!
//! Promise: at most one guard of a name is valid at a time, given clocks whose rates differ by no more than
//! [`DRIFT`](crate::session::DRIFT) and nobody who removes tickets by hand; grants follow arrival; every grant carries
//! a greater token than the one before. No lease lock can do more: code that runs after the last look at the guard is fenced only
//! if the resource, or a transaction, checks the token.
//!
//! A lock is a line; the first ticket of the line holds it, and each waiter waits for the ticket before its
//! own. An uncontended acquire is one round trip, a release is one, a hand-off is one notification and one look.
//!
//! # On the wire
//! The line is the directory `lock/<name>` of the namespace, with `/` in the name as `%2F`; the tickets in it are in
//! the layout of the backend's other clients where it has one. A ticket's value is JSON:
//! `{"owner":"4711@host","since_ms":1700000000000}`, where `since_ms` is the owner's wall clock when it joined.

mod guard;
mod multi;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use guard::LockGuard;
pub use multi::{MultiGuard, MultiLock};

pub use crate::line::Fence;

use crate::{
    backend::{Front, Revision},
    coordinator::Coordinator,
    error::{ErrorKind, Result},
    key::Dir,
    line::{Wish, join, wait_turn, wall_clock_ms},
    session::Session,
};

/// Grows with every holder of a lock. Send it with each write so that storage can refuse a stale one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FencingToken(u64);

impl FencingToken {
    /// The number, to send to storage.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl From<Revision> for FencingToken {
    fn from(revision: Revision) -> Self {
        Self(revision.0)
    }
}

impl std::fmt::Display for FencingToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A lock by its name. Cheap to make and to clone; nothing is sent before an acquire.
///
/// It is not re-entrant: a task that holds it and acquires it again waits for itself.
///
/// ```
/// # use std::sync::Arc;
/// # use quorate_core::Coordinator;
/// # async fn show(coord: Coordinator) -> quorate_core::Result<()> {
/// let guard = coord.lock("jobs/nightly").acquire().await?;
/// println!("token {}", guard.token());
/// guard.release().await
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Lock {
    coord: Coordinator,
    /// A bad name is told at the first use, so that making a lock needs no `?`.
    line: Result<Dir>,
    session: Option<Session>,
}

/// Who holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The holder's token.
    pub token: FencingToken,
    /// Who it says it is; `None` for clients of other libraries.
    pub owner: Option<String>,
    /// When it joined the line, by its own wall clock: for people, never for decisions. For an uncontended
    /// acquire that is when it got the lock.
    pub since: Option<SystemTime>,
}

impl Holder {
    fn of(front: &Front) -> Self {
        // Another library's ticket says nothing in this form, which is no error.
        let value: Option<TicketValue<'_>> = serde_json::from_slice(&front.value).ok();
        Self {
            token: front.token.into(),
            owner: value.as_ref().map(|v| v.owner.to_string()),
            since: value.and_then(|v| UNIX_EPOCH.checked_add(Duration::from_millis(v.since_ms))),
        }
    }
}

/// A look at a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockStatus {
    /// Who holds it, if anybody does.
    pub holder: Option<Holder>,
    /// How many wait behind the holder.
    pub waiting: usize,
}

#[derive(Serialize, Deserialize)]
struct TicketValue<'a> {
    #[serde(borrow)]
    owner: std::borrow::Cow<'a, str>,
    since_ms: u64,
}

impl Lock {
    pub(crate) fn new(coord: Coordinator, line: Result<Dir>) -> Self {
        Self { coord, line, session: None }
    }

    /// The same lock, taken on this session instead of the coordinator's own.
    #[must_use]
    pub fn on(mut self, session: &Session) -> Self {
        self.session = Some(session.clone());
        self
    }

    /// Waits in line until the lock is held.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name; `SessionLost` if the session ended while waiting; `Unavailable`,
    /// `Ambiguous` or `Denied` if the line could not be joined. In no case is a ticket left behind for longer
    /// than it takes to reach the server, or the lease to end.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the place in the line is given up in the background.
    pub async fn acquire(&self) -> Result<LockGuard> {
        self.stand_and_wait(&AtomicBool::new(false)).await
    }

    /// Waits in line for at most `limit`; `None` if it was not granted by then. Zero is one attempt without
    /// waiting.
    ///
    /// # Errors
    /// As for [`acquire`](Self::acquire), and `Unavailable` if not even a place in the line was obtained by then: that
    /// is an outage, not a lock in use.
    ///
    /// # Cancel safety
    /// As for [`acquire`](Self::acquire).
    pub async fn acquire_within(&self, limit: Duration) -> Result<Option<LockGuard>> {
        if limit.is_zero() {
            return self.try_acquire().await;
        }
        let stood = AtomicBool::new(false);
        // Dropping the attempt is safe at any point, so the limit needs no help from it.
        match tokio::time::timeout(limit, self.stand_and_wait(&stood)).await {
            Ok(guard) => guard.map(Some),
            Err(_) if stood.load(Ordering::Acquire) => Ok(None),
            Err(_) => {
                let message = format!("no place in the line was obtained within {limit:?}");
                let backend = self.coord.profile().backend;
                Err(crate::Error::new(ErrorKind::Unavailable, "acquire", message).key(self.line()?).on(backend))
            }
        }
    }

    /// Takes the lock if nobody holds it or waits for it; `None` otherwise, and no ticket stays behind.
    ///
    /// # Errors
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    /// As for [`acquire`](Self::acquire).
    pub async fn try_acquire(&self) -> Result<Option<LockGuard>> {
        let session = self.checked_session().await?;
        let Some(claim) = join(&self.wish(&session)?, &session, true).await? else { return Ok(None) };
        if claim.place().ahead.is_empty() {
            return claim.granted(session).map(|held| Some(LockGuard::new(held)));
        }
        claim.give_up().await?;
        Ok(None)
    }

    /// Who holds the lock, since when, and how many wait.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or what the backend says.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn status(&self) -> Result<LockStatus> {
        let line = self.coord.backend().line(self.line()?).await?;
        let holder = line.front.as_ref().map(Holder::of);
        Ok(LockStatus { holder, waiting: line.tickets.len().saturating_sub(1) })
    }

    /// Takes the lock away from its holder, for an operator: the next in line gets it at once.
    ///
    /// The old holder is not stopped. Its guard learns of the loss within about a second, or at its deadline if it is
    /// cut off; until then it says `held` although the next one has the lock. Its fenced writes are refused from now
    /// on, and its release harms nobody. Returns who was put out, or `None` if nobody
    /// held the lock or the holder left by itself in the meantime.
    ///
    /// # Errors
    /// As for [`status`](Self::status).
    ///
    /// # Cancel safety
    /// Dropped half-way, the holder may or may not have been put out.
    pub async fn break_holder(&self) -> Result<Option<Holder>> {
        let backend = self.coord.backend();
        let line = backend.line(self.line()?).await?;
        let (Some(ticket), Some(front)) = (line.tickets.first(), &line.front) else { return Ok(None) };
        let holder = Holder::of(front);
        let commit = backend.commit(&Fence::new(ticket.clone(), front.token).leave()).await?;
        tracing::warn!(%ticket, owner = holder.owner, applied = commit.applied, "lock broken by an operator");
        Ok(commit.applied.then_some(holder))
    }

    /// Gives the lock back by the fence of a hold, from any process; `false` if that hold has ended already, or
    /// is one of another lock. For a holder that handed its fence to somebody else before it went away.
    ///
    /// # Errors
    /// As for [`status`](Self::status), and `Ambiguous` if the reply was lost.
    ///
    /// # Cancel safety
    /// Dropped half-way, the lock may or may not have been given back.
    pub async fn release_hold(&self, fence: &Fence) -> Result<bool> {
        if fence.line() != self.line()? {
            return Ok(false);
        }
        Ok(self.coord.backend().commit(&fence.leave()).await?.applied)
    }

    /// The place of this lock in the store, below the namespace, for clients of other libraries.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name.
    pub fn path(&self) -> Result<&str> {
        self.line().map(Dir::as_str)
    }

    fn line(&self) -> Result<&Dir> {
        self.line.as_ref().map_err(Clone::clone)
    }

    /// Waits until the lock is held. `stood` turns true once there is a place in the line.
    async fn stand_and_wait(&self, stood: &AtomicBool) -> Result<LockGuard> {
        let session = self.checked_session().await?;
        loop {
            let wish = self.wish(&session)?;
            if let Some(claim) = join(&wish, &session, false).await? {
                stood.store(true, Ordering::Release);
                if let Some(claim) = wait_turn(claim).await? {
                    return claim.granted(session).map(LockGuard::new);
                }
            }
            // Somebody removed our ticket while the session lives: we lost our place, not our wish.
            tracing::warn!(line = %wish.line, "our ticket was removed by somebody else; joining the line again");
        }
    }

    fn wish(&self, session: &Session) -> Result<Wish<'_>> {
        Ok(Wish { line: self.line()?, value: ticket_value(session.owner()), operation: "acquire", what: "lock" })
    }

    /// The session, if the name is good: a bad one is refused before anything is sent.
    async fn checked_session(&self) -> Result<Session> {
        self.line()?;
        match &self.session {
            Some(session) => session.check().map(|()| session.clone()),
            None => self.coord.session().await,
        }
    }
}

/// What others may read of a ticket of this session that joins now.
fn ticket_value(owner: &str) -> Bytes {
    let value = TicketValue { owner: owner.into(), since_ms: wall_clock_ms() };
    serde_json::to_vec(&value).expect("a string and a number are always JSON").into()
}
