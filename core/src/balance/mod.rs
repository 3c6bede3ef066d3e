//! Balancing: which instance takes the next request.
//!
//! Promise: a pick gives an instance of the last [`set`](Balancer::set) that is
//! [`Passing`](crate::discovery::Health::Passing) and not ejected, or nothing; no pick that begins after `set` has
//! returned gives an instance that is not in the set. There is no panic mode: where no instance may be picked, the
//! answer is `None`, and what then is the caller's to say. What is known of an instance (requests in flight, latency,
//! failures, ejection) stays with its service and id over calls of `set`, and is forgotten when it leaves the set.
//!
//! # Cost
//! A pick reads one snapshot (an `ArcSwap`) and takes no lock; whatever changes the snapshot — `set`, an ejection, a
//! return — makes a new one, in O(n log n), one after another. The one exception is the weighted round robin's first
//! cycle: see [`Strategy::Weighted`]. `cargo xtask bench --backend memory` measures the picks.
//!
//! ```
//! # use std::sync::Arc;
//! use quorate_core::{balance::{Balancer, Strategy}, discovery::Instance};
//!
//! # async fn send(_: &str) -> Result<(), std::io::Error> { Ok(()) }
//! # async fn show() {
//! let balancer = Balancer::new(Strategy::peak_ewma());
//! balancer.set(["10.0.0.1:80", "10.0.0.2:80"].map(|address| Arc::new(Instance::new("shop", address))));
//! if let Some(pick) = balancer.pick() {
//!     match send(&pick.endpoint()).await {
//!         Ok(_) => pick.success(),
//!         Err(_) => pick.failure(),
//!     }
//! }
//! # }
//! ```
//!
//! [`Balancer::call`] does the same, with limits, and tries other instances when one fails.

mod call;
mod choose;
mod eject;
mod hashed;
mod load;
mod member;
mod pick;
mod roster;
mod weighted;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::time::Instant;

pub use call::{Attempt, CallError, CallPolicy, Cause, Ended, Verdict};
pub use choose::Strategy;
pub use eject::Ejection;
pub use load::PeakEwma;
pub use pick::Pick;

use crate::discovery::{Instance, Service};
use call::Budget;
use member::State;
use roster::{Roster, View};

/// Spreads requests over the instances of a service. Cheap to clone; all clones are one balancer.
#[derive(Clone)]
pub struct Balancer {
    inner: Arc<Inner>,
}

/// How a balancer shall be.
#[derive(Debug, Clone)]
pub struct Builder {
    strategy: Strategy,
    zone: Option<Zone>,
    ejection: Option<Ejection>,
    retry_percent: Option<u32>,
}

/// What a balancer knows of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The instance, as it was set last.
    pub instance: Arc<Instance>,
    /// Picks of it that have neither been reported nor dropped.
    pub in_flight: u64,
    /// The estimate of its latency; `None` unless the strategy is [`Strategy::PeakEwma`].
    pub latency: Option<Duration>,
    /// For how much longer it is ejected; zero if it is not.
    pub ejected_for: Duration,
}

struct Inner {
    view: ArcSwap<View>,
    /// Held by whoever makes a new view, from reading what it depends on until the view is stored. A pick does not
    /// wait for it.
    roster: Mutex<Roster>,
    settings: Arc<Settings>,
    /// The task that hands over a service's instances. It knows the balancer by a weak reference only.
    following: Mutex<Option<Following>>,
    budget: Option<Budget>,
}

/// Ends the task with the value.
struct Following(tokio::task::AbortHandle);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug)]
struct Settings {
    strategy: Strategy,
    zone: Option<Zone>,
    ejection: Option<Ejection>,
    /// What times in atomics are counted from.
    epoch: Instant,
}

#[derive(Debug, Clone)]
struct Zone {
    name: String,
    at_least: usize,
}

impl Settings {
    /// Nanoseconds from the epoch on.
    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.epoch))
    }
}

/// 584 years fit.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Builder {
    /// Picks only instances of this zone, as long as at least so many of them may be picked; otherwise, all that may
    /// be. An `at_least` of zero counts as one.
    #[must_use]
    pub fn prefer_zone(mut self, zone: impl Into<String>, at_least: usize) -> Self {
        self.zone = Some(Zone { name: zone.into(), at_least: at_least.max(1) });
        self
    }

    /// Ejects instances whose requests fail. Without it, none is.
    #[must_use]
    pub fn eject(mut self, ejection: Ejection) -> Self {
        self.ejection = Some(ejection);
        self
    }

    /// Lets a hundred calls be sent again so many times altogether, so that clients do not multiply the load on a service
    /// that fails because of it. Ten repeats are free to begin with; a hundred can be saved up. Without it, each
    /// [`call`](Balancer::call) repeats as its policy says. 20 is usual.
    #[must_use]
    pub fn retry_budget(mut self, percent: u32) -> Self {
        self.retry_percent = Some(percent);
        self
    }

    /// The balancer, without an instance yet.
    pub fn build(self) -> Balancer {
        let Self { strategy, zone, ejection, retry_percent } = self;
        let settings = Arc::new(Settings { strategy, zone, ejection, epoch: Instant::now() });
        let roster = Mutex::default();
        let following = Mutex::default();
        let budget = retry_percent.map(Budget::new);
        Balancer { inner: Arc::new(Inner { view: ArcSwap::default(), roster, settings, following, budget }) }
    }
}

impl Balancer {
    /// A balancer without zones and ejection, and without an instance yet.
    pub fn new(strategy: Strategy) -> Self {
        Self::builder(strategy).build()
    }

    /// To say more than the strategy.
    pub fn builder(strategy: Strategy) -> Builder {
        Builder { strategy, zone: None, ejection: None, retry_percent: None }
    }

    /// Says which instances there are now, in any order. Of several with the same service and id the last counts.
    ///
    /// A pick that begins after this has returned gives one of them; picks that are out stay valid. It takes
    /// O(n log n) time on the caller's thread: with 1,000 instances, half a millisecond, and some 25 with consistent
    /// hashing if names or weights have changed.
    pub fn set(&self, instances: impl IntoIterator<Item = Arc<Instance>>) {
        let mut roster = self.inner.roster();
        roster.set(instances, &self.inner);
        self.inner.show(&mut roster, Instant::now());
    }

    /// Picks among the instances of a service from now on: those that it knows when this returns, and then whatever
    /// changes, until the last clone of the balancer is dropped or another service is followed. Must be called within a
    /// runtime.
    ///
    /// While the coordinator cannot be reached, picks go on among the last good set.
    pub fn follow(&self, service: &Service) {
        self.set(service.now().iter().cloned());
        let (mut service, inner) = (service.clone(), Arc::downgrade(&self.inner));
        let task = tokio::spawn(async move {
            loop {
                let now = service.changed().await;
                let Some(inner) = inner.upgrade() else { return };
                Self { inner }.set(now.iter().cloned());
            }
        });
        let following = Following(task.abort_handle());
        *self.inner.following.lock().unwrap_or_else(PoisonError::into_inner) = Some(following);
    }

    /// Picks an instance; `None` if none may be picked now.
    pub fn pick(&self) -> Option<Pick> {
        self.inner.pick(None, &[])
    }

    /// Picks the instance that the key belongs to, where the strategy goes by keys: the same one for the same key for
    /// as long as the instances are the same. The other strategies pick as if there were no key.
    pub fn pick_for(&self, key: &[u8]) -> Option<Pick> {
        self.inner.pick(Some(key), &[])
    }

    /// What is known of each instance, in the order of services and ids: those that are not passing and those that
    /// are ejected, too.
    pub fn status(&self) -> Vec<Status> {
        let now = self.inner.settings.nanos(Instant::now());
        self.inner.roster().all().map(|member| member.status(now)).collect()
    }
}

impl Inner {
    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody of those who have been tried.
    fn pick(&self, key: Option<&[u8]>, tried: &[Arc<State>]) -> Option<Pick> {
        let started = Instant::now();
        let now = self.settings.nanos(started);
        let mut view = self.view.load();
        if view.returns_at <= now {
            // Whoever has the roster now makes a new view too, so there is nothing to wait for.
            if let Ok(mut roster) = self.roster.try_lock() {
                self.show(&mut roster, started);
            }
            view = self.view.load();
        }
        let place = if tried.is_empty() {
            view.chooser.choose(&view.members, key, now)?
        } else {
            let open = |place: usize| !tried.iter().any(|state| Arc::ptr_eq(state, &view.members[place].state));
            view.chooser.choose_open(&view.members, &open, key, now)?
        };
        Some(Pick::new(Arc::clone(&view.members[place]), started))
    }

    fn show(&self, roster: &mut Roster, now: Instant) {
        self.view.store(Arc::new(roster.view(&self.settings, self.settings.nanos(now))));
    }
}

impl fmt::Debug for Balancer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pickable = self.inner.view.load().members.len();
        f.debug_struct("Balancer").field("settings", &self.inner.settings).field("pickable", &pickable).finish()
    }
}
