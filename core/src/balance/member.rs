//! An instance and what is known of it.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{Ejection, Inner, Settings, Status, Strategy, load::Estimate};
use crate::discovery::Instance;

/// An instance as it was set last, with the state that outlives it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) instance: Arc<Instance>,
    pub(super) state: Arc<State>,
    /// Beside the instance's own, for those who look at every member at each pick.
    weight: u32,
}

impl Member {
    pub(super) fn new(instance: Arc<Instance>, state: Arc<State>) -> Self {
        let weight = instance.weight.max(1);
        Self { instance, state, weight }
    }

    /// A weight of zero, which no registration accepts, counts as one.
    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    pub(super) fn status(&self, now: u64) -> Status {
        let State { settings, estimate, .. } = &*self.state;
        let latency = match &settings.strategy {
            Strategy::PeakEwma(ewma) => Some(Duration::from_nanos(estimate.at(now, ewma.decay) as u64)),
            _ => None,
        };
        Status {
            instance: Arc::clone(&self.instance),
            in_flight: self.state.in_flight(),
            latency,
            ejected_for: Duration::from_nanos(self.state.back_at().saturating_sub(now)),
        }
    }
}

/// What is known of a service and id. Each figure is read and written on its own (`Relaxed`): none of them guards
/// other memory, and a pick that sees one a moment late is as good as a pick a moment earlier.
#[derive(Debug)]
pub(super) struct State {
    in_flight: AtomicU64,
    pub(super) estimate: Estimate,
    /// In a row.
    failures: AtomicU32,
    /// When the last ejection ends, or has ended; zero if there was none. Written under the roster's lock.
    back_at: AtomicU64,
    /// How many ejections make the next one longer. Read and written under the roster's lock.
    ejections: AtomicU32,
    settings: Arc<Settings>,
    home: Weak<Inner>,
}

impl State {
    pub(super) fn new(home: &Arc<Inner>) -> Self {
        let settings = Arc::clone(&home.settings);
        let initial = match &settings.strategy {
            Strategy::PeakEwma(ewma) => ewma.initial,
            _ => Duration::ZERO,
        };
        let estimate = Estimate::new(initial, settings.nanos(Instant::now()));
        Self {
            in_flight: AtomicU64::new(0),
            estimate,
            failures: AtomicU32::new(0),
            back_at: AtomicU64::new(0),
            ejections: AtomicU32::new(0),
            settings,
            home: Arc::downgrade(home),
        }
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn back_at(&self) -> u64 {
        self.back_at.load(Ordering::Relaxed)
    }

    pub(super) fn is_ejected(&self, now: u64) -> bool {
        self.back_at() > now
    }

    pub(super) fn succeeded(&self, started: Instant, now: Instant) {
        self.learn(started, now, false);
        // Read first: nearly always there is nothing to write, and a write would take the line from other cores.
        if self.failures.load(Ordering::Relaxed) > 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn failed(self: &Arc<Self>, started: Instant, now: Instant) {
        self.learn(started, now, true);
        let Some(ejection) = &self.settings.ejection else { return };
        // What was sent before or during an ejection says nothing about the time after it.
        if self.settings.nanos(started) < self.back_at() {
            return;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        // Not at each failure beyond the threshold: when as many as allowed are ejected already, the others would
        // queue for the roster.
        if failures.is_multiple_of(ejection.after.max(1))
            && let Some(home) = self.home.upgrade()
        {
            home.eject(self, ejection, self.settings.nanos(now));
        }
    }

    fn learn(&self, started: Instant, now: Instant, failed: bool) {
        if let Strategy::PeakEwma(ewma) = &self.settings.strategy {
            let latency = now.saturating_duration_since(started);
            let latency = if failed { latency.max(ewma.failure) } else { latency };
            self.estimate.observe(latency, self.settings.nanos(now), ewma.decay);
        }
    }

    /// Sends it away until its time is up. With the roster's lock held.
    pub(super) fn eject(&self, ejection: &Ejection, now: u64) -> Duration {
        let quiet = now.saturating_sub(self.back_at()) >= super::nanos(ejection.cap);
        let before = if quiet { 0 } else { self.ejections.load(Ordering::Relaxed) };
        let length = ejection.length(before);
        self.ejections.store(before.saturating_add(1), Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        self.back_at.store(now.saturating_add(super::nanos(length)), Ordering::Relaxed);
        length
    }

    /// Ends its ejection. With the roster's lock held.
    pub(super) fn readmit(&self, now: u64) {
        self.back_at.store(now, Ordering::Relaxed);
    }
}
