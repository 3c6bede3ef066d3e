//! Faults on request: what may go wrong between one client and the store.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use quorate_core::{Error, ErrorKind, LeaseId, Result, layer::Verb};
use tokio::{sync::Notify, time::sleep};

use crate::store::Store;

/// The error of a call that was sent and got no answer.
pub(crate) fn unanswered(verb: Verb, message: &str) -> Error {
    let kind = if verb.writes() { ErrorKind::Ambiguous } else { ErrorKind::Unavailable };
    Error::new(kind, verb.as_str(), message)
}

/// Makes things go wrong for one client of a store in memory; other clients of the store notice only what they
/// would notice of a real one.
///
/// Faults that concern the next calls are met in the order in which they were asked for: a call meets the first
/// one that is meant for its verb, and no other. [`Faults::pending`] tells how many have not been met yet, so that
/// a test can assert that its fault has bitten.
///
/// ```
/// use std::time::Duration;
/// use quorate_core::{Backend, ErrorKind, KeyRange, Dir};
/// use quorate_memory::{Memory, Verb};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> quorate_core::Result<()> {
/// let backend = Memory::new();
/// let faults = backend.faults();
/// let lease = backend.grant(Duration::from_secs(10)).await?;
///
/// // The next renewal happens, but its answer is lost.
/// faults.lose_reply([Verb::Renew], 1);
/// assert_eq!(backend.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::Ambiguous);
/// assert_eq!(faults.pending(), 0);
///
/// // The session ends without its client having done anything wrong.
/// faults.expire(&lease.id);
/// assert_eq!(backend.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::SessionLost);
///
/// // The network is gone, and comes back.
/// let everything = KeyRange::prefix(&Dir::new(["kv"])?, "")?;
/// faults.cut();
/// assert_eq!(backend.read(&everything).await.unwrap_err().kind(), ErrorKind::Unavailable);
/// faults.heal();
/// assert!(backend.read(&everything).await.is_ok());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Faults {
    // The store lives with its clients, not with those who torment them.
    store: Weak<Store>,
    link: Arc<Link>,
}

impl Faults {
    pub(crate) fn new(store: &Arc<Store>, link: &Arc<Link>) -> Self {
        Self { store: Arc::downgrade(store), link: link.clone() }
    }

    /// Ends a lease now, of whatever client, as if its TTL had passed. Says whether it stood.
    pub fn expire(&self, lease: &LeaseId) -> bool {
        self.store.upgrade().is_some_and(|store| store.lock().revoke(lease))
    }

    /// Ends every lease that was granted to this client, as if their TTL had passed, and says how many there were.
    ///
    /// For code whose session is out of the test's reach.
    pub fn expire_all(&self) -> usize {
        self.store.upgrade().map_or(0, |store| store.lock().revoke_all_of(self.link.client))
    }

    /// Cuts the client off until [`heal`](Self::heal).
    ///
    /// Calls fail with `Unavailable`. Those under way, held up by [`delay`](Self::delay) or [`pause`](Self::pause),
    /// end as calls whose answer is lost: writes with `Ambiguous`, without having been applied, others with
    /// `Unavailable`. Watches are `Interrupted`. `gone` waits, as it would for a reconnect. The client's leases are
    /// not renewed and run out.
    pub fn cut(&self) {
        self.change(|link| {
            link.cuts += u64::from(!link.cut);
            link.cut = true;
        });
    }

    /// Ends a [`cut`](Self::cut). Watches continue with a `Reset`.
    pub fn heal(&self) {
        self.change(|link| link.cut = false);
    }

    /// Stops the client until [`resume`](Self::resume), as SIGSTOP would: its calls do not return, its watches tell
    /// nothing, and its leases run out if that takes too long. The timers of the application go on, though.
    pub fn pause(&self) {
        self.change(|link| link.paused = true);
    }

    /// Ends a [`pause`](Self::pause). Calls go on, watches continue with a `Reset`.
    pub fn resume(&self) {
        self.change(|link| link.paused = false);
    }

    /// Each of the next `calls` calls of these verbs reaches the store only after `time`.
    pub fn delay(&self, verbs: impl IntoIterator<Item = Verb>, calls: usize, time: Duration) {
        self.plan(verbs, calls, Action::Delay(time));
    }

    /// Each of the next `calls` calls of these verbs fails with an error of this kind and is not applied.
    ///
    /// With `Ambiguous` this is the request that was lost on its way; [`lose_reply`](Self::lose_reply) is the other
    /// half of what `Ambiguous` may mean.
    pub fn fail(&self, verbs: impl IntoIterator<Item = Verb>, calls: usize, kind: ErrorKind) {
        self.plan(verbs, calls, Action::Fail(kind));
    }

    /// Each of the next `calls` calls of these verbs is applied, but its answer is lost: writes fail with `Ambiguous`,
    /// others with `Unavailable`.
    pub fn lose_reply(&self, verbs: impl IntoIterator<Item = Verb>, calls: usize) {
        self.plan(verbs, calls, Action::LoseReply);
    }

    /// Sets the store's wall clock this far ahead of the machine's; zero sets it right. It is seen by
    /// [`Backend::clock`](quorate_core::Backend::clock) and by nothing else: leases go by tokio's clock.
    pub fn set_clock(&self, ahead: Duration) {
        if let Some(store) = self.store.upgrade() {
            store.lock().clock_ahead = ahead;
        }
    }

    /// How many calls have yet to meet a fault that was asked for.
    pub fn pending(&self) -> usize {
        self.link.state().plans.iter().map(|plan| plan.left).sum()
    }

    /// Takes everything back: heals, resumes, and forgets the faults that no call has met.
    pub fn clear(&self) {
        self.change(|link| {
            link.plans.clear();
            link.cut = false;
            link.paused = false;
        });
    }

    fn plan(&self, verbs: impl IntoIterator<Item = Verb>, calls: usize, action: Action) {
        let verbs: Vec<_> = verbs.into_iter().collect();
        if calls > 0 && !verbs.is_empty() {
            self.change(|link| link.plans.push_back(Plan { verbs, left: calls, action }));
        }
    }

    fn change(&self, change: impl FnOnce(&mut LinkState)) {
        let store = self.store.upgrade();
        // First the store, then the link, here and wherever both are held.
        let mut store = store.as_ref().map(|store| store.lock());
        let (before, after) = {
            let mut link = self.link.state();
            let before = link.hearing();
            change(&mut link);
            self.link.arm(&link);
            (before, link.hearing())
        };
        if let Some(store) = &mut store
            && before != after
        {
            match after {
                Hearing::All => store.unsilence(self.link.client),
                Hearing::Nothing => store.silence(self.link.client, false),
                Hearing::CutOff => store.silence(self.link.client, true),
            }
        }
        self.link.changed.notify_waiters();
    }
}

/// Whether the answer of a call arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    Delivered,
    Lost,
}

/// One client's connection to the store.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) client: u64,
    // Whether anything below is out of the ordinary: all that a call looks at on a good day.
    armed: AtomicBool,
    state: Mutex<LinkState>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct LinkState {
    cut: bool,
    paused: bool,
    // How often it was cut: tells a call under way that it was cut meanwhile, healed or not.
    cuts: u64,
    plans: VecDeque<Plan>,
}

#[derive(Debug)]
struct Plan {
    verbs: Vec<Verb>,
    // More than zero.
    left: usize,
    action: Action,
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Delay(Duration),
    Fail(ErrorKind),
    LoseReply,
}

/// What the client's watches hear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hearing {
    All,
    // A paused client does not even learn that it was cut off.
    Nothing,
    CutOff,
}

impl LinkState {
    fn hearing(&self) -> Hearing {
        match (self.paused, self.cut) {
            (true, _) => Hearing::Nothing,
            (false, true) => Hearing::CutOff,
            (false, false) => Hearing::All,
        }
    }

    fn next(&mut self, verb: Verb) -> Option<Action> {
        let at = self.plans.iter().position(|plan| plan.verbs.contains(&verb))?;
        let plan = &mut self.plans[at];
        let action = plan.action;
        plan.left -= 1;
        if plan.left == 0 {
            self.plans.remove(at);
        }
        Some(action)
    }
}

impl Link {
    pub(crate) fn new(client: u64) -> Self {
        Self { client, armed: AtomicBool::new(false), state: Mutex::default(), changed: Notify::new() }
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.state().cut
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.state().paused
    }

    fn arm(&self, state: &LinkState) {
        self.armed.store(state.cut || state.paused || !state.plans.is_empty(), Ordering::Release);
    }

    /// Lets a call through to the store, or not.
    pub(crate) async fn enter(&self, verb: Verb) -> Result<Reply> {
        if self.armed.load(Ordering::Acquire) {
            // Boxed, so that a call on a good day is small.
            return Box::pin(self.enter_armed(verb)).await;
        }
        Ok(Reply::Delivered)
    }

    async fn enter_armed(&self, verb: Verb) -> Result<Reply> {
        let (cuts, action) = {
            let mut state = self.state();
            if state.cut && !state.paused && verb != Verb::Gone {
                return Err(cut_off(verb.as_str()));
            }
            let action = state.next(verb);
            self.arm(&state);
            (state.cuts, action)
        };
        if verb == Verb::Gone {
            self.up().await;
        }
        let mut reply = Reply::Delivered;
        match action {
            Some(Action::Fail(kind)) => return Err(Error::new(kind, verb.as_str(), "failed on request")),
            Some(Action::LoseReply) => reply = Reply::Lost,
            Some(Action::Delay(time)) => sleep(time).await,
            None => {}
        }
        self.until(|state| !state.paused).await;
        let state = self.state();
        if verb != Verb::Gone && (state.cut || state.cuts != cuts) {
            return Err(unanswered(verb, "this client was cut off before the answer came"));
        }
        Ok(reply)
    }

    /// Returns when the client is neither cut off nor paused.
    pub(crate) async fn up(&self) {
        if self.armed.load(Ordering::Acquire) {
            self.until(|state| !state.cut && !state.paused).await;
        }
    }

    async fn until(&self, holds: impl Fn(&LinkState) -> bool) {
        loop {
            // Registered before the look, so that a change between look and wait is not lost.
            let changed = self.changed.notified();
            if holds(&self.state()) {
                return;
            }
            changed.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, LinkState> {
        // Nothing panics under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a call that never left.
pub(crate) fn cut_off(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, operation, "this client is cut off on request")
}
