//! Sessions: one lease, kept alive, with a local deadline that ends before the server's.
//!
//! Promise: [`Session::is_live`] turns false no later than the server may end the lease, whatever the network
//! does and however long this process was paused, and never turns true again. What is owed to the server
//! (a ticket whose owner gave up half-way) is kept and retried until it is paid or the lease is gone.
//!
//! # The local deadline
//! It is the instant *before* the last confirmed request left, plus TTL × (1 − [`DRIFT`]) − a margin, on the
//! monotonic clock; see Gray and Cheriton, "Leases" (1989). Nothing compares wall clocks.

mod debt;
mod hold;
mod keeper;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub(crate) use debt::Debt;
pub(crate) use hold::Hold;

use crate::{
    backend::{Backend, LeaseId},
    error::{Error, ErrorKind, Result},
};

/// The assumed bound on how much faster the server's clock may run than ours.
pub const DRIFT: f64 = 0.01;

/// How a session shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOptions {
    /// The TTL to ask for. The server may raise or lower it: see [`Session::ttl`].
    pub ttl: Duration,
    /// Who this is, for people who look at a lock: `process@host` unless said otherwise.
    pub owner: String,
}

impl Default for SessionOptions {
    fn default() -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|name| name.trim().to_owned())
            .or_else(|_| std::env::var("HOSTNAME"))
            .unwrap_or_else(|_| "localhost".to_owned());
        Self { ttl: Duration::from_secs(10), owner: format!("{}@{host}", std::process::id()) }
    }
}

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SessionState {
    /// The last renewal was confirmed.
    Live,
    /// A renewal is overdue; the deadline has not passed yet. Nothing is lost so far.
    Suspect,
    /// The lease is gone or can no longer be trusted. Final.
    Lost,
    /// The session was closed by its owner. Final.
    Closed,
}

/// A lease that is kept alive for as long as a handle to it exists.
///
/// Cloning gives another handle. When the last one is dropped, guards included, the session is closed in the
/// background.
#[derive(Clone)]
pub struct Session {
    handle: Arc<Handle>,
}

impl Session {
    /// Opens a session on a backend.
    ///
    /// # Errors
    /// `InvalidInput` for a TTL of zero; otherwise what the backend's `grant` says.
    ///
    /// # Cancel safety
    /// Dropped half-way it may leave a lease at the server, with nothing on it, until its TTL is over.
    pub async fn open(backend: Arc<dyn Backend>, options: &SessionOptions) -> Result<Self> {
        if options.ttl.is_zero() {
            return Err(Error::invalid("grant", "the session's ttl is zero").on(backend.profile().backend));
        }
        let sent = Instant::now();
        let lease = backend.grant(options.ttl).await?;
        if lease.ttl != options.ttl {
            tracing::info!(asked = ?options.ttl, granted = ?lease.ttl, "the server set another ttl");
        }
        let core = Arc::new(SessionCore::new(backend, lease.id, options, lease.ttl, sent));
        tokio::spawn(keeper::keep(core.clone()));
        tokio::spawn(debt::serve(core.clone()));
        Ok(Self { handle: Arc::new(Handle { core }) })
    }

    /// Whether what stands on this session may still be trusted, by the local clock alone. No I/O.
    pub fn is_live(&self) -> bool {
        self.handle.core.is_live()
    }

    /// `Ok` if [`is_live`](Self::is_live).
    ///
    /// # Errors
    /// `SessionLost` otherwise.
    pub fn check(&self) -> Result<()> {
        self.handle.core.check("check")
    }

    /// Returns when the session is lost or closed.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn lost(&self) {
        self.handle.core.over().await;
    }

    /// The instant up to which the session may be trusted without hearing from the server again.
    pub fn deadline(&self) -> Instant {
        self.handle.core.deadline()
    }

    /// The TTL in force at the server.
    pub fn ttl(&self) -> Duration {
        Duration::from_nanos(self.handle.core.ttl.load(Ordering::Acquire))
    }

    /// The TTL that was asked for; differs from [`ttl`](Self::ttl) where the server has limits.
    pub fn asked_ttl(&self) -> Duration {
        self.handle.core.asked
    }

    /// The server's name for the lease.
    pub fn lease(&self) -> &LeaseId {
        &self.handle.core.lease
    }

    /// Where it stands now.
    pub fn state(&self) -> SessionState {
        // The clock is asked first: a paused process must not read an old state.
        self.handle.core.is_live();
        *self.handle.core.state.borrow()
    }

    /// Follows the state: the current one first, then every change. Intermediate states may be skipped.
    pub fn states(&self) -> SessionStates {
        let mut states = self.handle.core.state.subscribe();
        states.mark_changed();
        SessionStates { states, last: None }
    }

    /// Ends the session and everything that stands on it, now. Guards turn invalid before anything is sent.
    ///
    /// # Errors
    /// What the backend's `revoke` says; the session is closed here in any case, the attempt goes on in
    /// the background, and the server ends the lease by itself after its TTL.
    ///
    /// # Cancel safety
    /// The session is closed by the first poll; the background finishes what was begun.
    pub async fn close(&self) -> Result<()> {
        let core = &self.handle.core;
        core.end(SessionState::Closed);
        if core.orphaned.load(Ordering::Acquire) {
            return Ok(());
        }
        core.backend.revoke(&core.lease).await
    }

    /// Stops renewing and leaves everything to the server, which ends the lease after its TTL, as a crash would.
    /// Here the session counts as closed at once; closing it afterwards sends nothing.
    pub fn orphan(&self) {
        self.handle.core.orphaned.store(true, Ordering::Release);
        self.handle.core.end(SessionState::Closed);
    }

    /// Who this session says it is.
    pub fn owner(&self) -> &str {
        &self.handle.core.owner
    }

    pub(crate) fn core(&self) -> &Arc<SessionCore> {
        &self.handle.core
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("lease", &self.handle.core.lease)
            .field("state", &*self.handle.core.state.borrow())
            .finish_non_exhaustive()
    }
}

/// The states of a session as they change; ends after `Lost` or `Closed`.
#[derive(Debug)]
pub struct SessionStates {
    states: watch::Receiver<SessionState>,
    last: Option<SessionState>,
}

impl SessionStates {
    /// The next state that differs from the one before, or `None` after a final one.
    ///
    /// # Cancel safety
    /// Safe: a state is taken only when this returns it.
    pub async fn next(&mut self) -> Option<SessionState> {
        loop {
            if matches!(self.last, Some(SessionState::Lost | SessionState::Closed)) {
                return None;
            }
            self.states.changed().await.ok()?;
            let state = *self.states.borrow_and_update();
            if self.last != Some(state) {
                self.last = Some(state);
                return Some(state);
            }
        }
    }
}

/// Closes the session when the last user's handle goes; the background tasks hold the core only.
struct Handle {
    core: Arc<SessionCore>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.end(SessionState::Closed);
    }
}

/// What handles, guards and the background tasks share.
pub(crate) struct SessionCore {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) lease: LeaseId,
    pub(crate) owner: String,
    asked: Duration,
    /// Nanoseconds.
    ttl: AtomicU64,
    origin: Instant,
    /// Nanoseconds after `origin`. Only moved while it has not passed.
    deadline: AtomicU64,
    /// Set once, never taken back: a session that was seen dead stays dead.
    over: AtomicBool,
    orphaned: AtomicBool,
    state: watch::Sender<SessionState>,
    /// How often it became `Suspect`: tells also of a suspicion that was taken back before anybody looked.
    suspicions: AtomicU64,
    stop: Notify,
    pub(crate) debts: debt::Debts,
    holds: hold::Holds,
}

impl fmt::Debug for SessionCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionCore({})", self.lease)
    }
}

impl SessionCore {
    fn new(backend: Arc<dyn Backend>, lease: LeaseId, options: &SessionOptions, ttl: Duration, sent: Instant) -> Self {
        let core = Self {
            backend,
            lease,
            owner: options.owner.clone(),
            asked: options.ttl,
            ttl: AtomicU64::new(0),
            origin: sent,
            deadline: AtomicU64::new(u64::MAX),
            over: AtomicBool::new(false),
            orphaned: AtomicBool::new(false),
            state: watch::Sender::new(SessionState::Live),
            suspicions: AtomicU64::new(0),
            stop: Notify::new(),
            debts: debt::Debts::default(),
            holds: hold::Holds::default(),
        };
        core.ttl.store(nanos(ttl), Ordering::Release);
        core.deadline.store(nanos(trusted(ttl)), Ordering::Release);
        core
    }

    pub(crate) fn is_live(&self) -> bool {
        if self.over.load(Ordering::Acquire) {
            return false;
        }
        if nanos(self.origin.elapsed()) < self.deadline.load(Ordering::Acquire) {
            return true;
        }
        self.end(SessionState::Lost);
        false
    }

    pub(crate) fn check(&self, operation: &'static str) -> Result<()> {
        if self.is_live() { Ok(()) } else { Err(self.lost_error(operation)) }
    }

    pub(crate) fn lost_error(&self, operation: &'static str) -> Error {
        let message = match *self.state.borrow() {
            SessionState::Closed => "the session was closed",
            _ => "the session's lease has ended or could not be confirmed in time",
        };
        Error::new(ErrorKind::SessionLost, operation, message).key(&self.lease).on(self.backend.profile().backend)
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.origin + Duration::from_nanos(self.deadline.load(Ordering::Acquire))
    }

    /// Records a confirmed renewal that was sent at `sent`. `false` if the deadline had passed by then: the
    /// session is lost although the server may still know it, because somebody may have seen it dead.
    fn confirm(&self, sent: Instant, ttl: Duration) -> bool {
        if !self.is_live() {
            return false;
        }
        self.ttl.store(nanos(ttl), Ordering::Release);
        // Stored as it is: the server may have shortened the TTL. Only the keeper confirms, one renewal at a time.
        self.deadline.store(nanos(sent + trusted(ttl) - self.origin), Ordering::Release);
        self.set_state(SessionState::Live);
        true
    }

    /// Moves between the two states that are not final.
    fn set_state(&self, state: SessionState) {
        self.state.send_if_modified(|now| {
            let change = *now != state && matches!(now, SessionState::Live | SessionState::Suspect);
            if change {
                *now = state;
                if state == SessionState::Suspect {
                    self.suspicions.fetch_add(1, Ordering::AcqRel);
                }
            }
            change
        });
    }

    /// How often the session has become suspect so far.
    pub(crate) fn suspicions(&self) -> u64 {
        self.suspicions.load(Ordering::Acquire)
    }

    /// Returns when the session has become suspect more often than `seen`, or is over.
    pub(crate) async fn suspected(&self, seen: u64) {
        let mut states = self.state.subscribe();
        // Counted before the state is told, so no suspicion falls between a look and a wait.
        while self.suspicions() == seen && self.is_live() {
            tokio::select! {
                _ = states.changed() => {}
                () = tokio::time::sleep_until(self.deadline()) => {}
            }
        }
    }

    /// Returns when the session is not suspect, with the count of suspicions so far, or when it is over.
    pub(crate) async fn unsuspected(&self) -> u64 {
        let mut states = self.state.subscribe();
        loop {
            let seen = self.suspicions();
            if *states.borrow_and_update() != SessionState::Suspect || !self.is_live() {
                return seen;
            }
            tokio::select! {
                _ = states.changed() => {}
                () = tokio::time::sleep_until(self.deadline()) => {}
            }
        }
    }

    /// Ends the session for good; the first call decides how.
    fn end(&self, state: SessionState) {
        if !self.over.swap(true, Ordering::AcqRel) {
            self.set_state(state);
            tracing::debug!(lease = %self.lease, ?state, "session over");
            self.stop.notify_one();
        }
    }

    /// Returns when the session is over. Costs nothing before its first poll.
    ///
    /// It asks the clock itself: the keeper may have gone with the runtime that it ran on.
    pub(crate) async fn over(&self) {
        let mut states = self.state.subscribe();
        while self.is_live() {
            tokio::select! {
                // It fails only when the sender is gone, and `self` holds that.
                _ = states.wait_for(|s| matches!(s, SessionState::Lost | SessionState::Closed)) => return,
                () = tokio::time::sleep_until(self.deadline()) => {}
            }
        }
    }
}

/// How much of a TTL may be trusted, counted from before the request left.
fn trusted(ttl: Duration) -> Duration {
    // The margin covers what lies between reading the clock and acting on it.
    let margin = (ttl / 50).min(Duration::from_millis(250));
    ttl.mul_f64(1.0 - DRIFT).saturating_sub(margin)
}

/// 584 years fit; a longer time is as good as for ever.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
