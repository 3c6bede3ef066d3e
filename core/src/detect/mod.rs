//! Failure detectors: from the instants at which a peer was heard to how much its silence is worth.
//!
//! Promise: pure arithmetic. Nothing here does I/O, reads a clock or compares clocks of two machines: the caller says
//! which instant it is, on its own monotonic clock. Suspicion is always finite and never falls while the peer is
//! silent; a peer that was never heard is not suspected.
//!
//! | detector | after | suspicion |
//! |---|---|---|
//! | [`Deadline`] | a fixed time | silence as a share of what is allowed; 1 is the threshold |
//! | [`PhiAccrual`] | Hayashibara et al. 2004, as in Akka | φ = −log₁₀ of the chance that the next beat is only late |
//!
//! # What φ is worth
//! With threshold 8 about one interval in 10⁸ is a mistake *if intervals are normally distributed*. The logistic curve
//! that stands in for the normal one (Akka's, kept so that thresholds mean the same) runs ahead of it in the far tail: at
//! threshold 8 the normal distribution itself says about 10⁻⁷. Real intervals have heavier tails than both. That is what
//! the floor under σ and the acceptable pause are for; the tests print the measured rates beside the nominal ones.

mod deadline;
mod health;
mod phi;
#[cfg(test)]
mod rates;

use std::fmt;

use tokio::time::Instant;

pub use deadline::Deadline;
pub use health::Health;
pub use phi::{PhiAccrual, PhiOptions};

/// Judges the silence of one peer.
///
/// Instants must not run backwards; one that does counts as the latest that was seen.
pub trait Detector: fmt::Debug + Send + Sync {
    /// Notes that the peer was heard at `at`, and that it beat `count` times since it was heard last.
    ///
    /// A watch may skip beats in between, so the interval that is learned is the time since the last one divided by
    /// `count`. Zero counts as one.
    fn heartbeats(&mut self, count: u64, at: Instant);

    /// Notes one beat at `at`.
    fn heartbeat(&mut self, at: Instant) {
        self.heartbeats(1, at);
    }

    /// How much the silence up to `at` is worth: finite, at least 0, 0 before the first beat. The unit is the
    /// detector's own; see [`threshold`](Self::threshold).
    fn suspicion(&self, at: Instant) -> f64;

    /// The suspicion from which on the peer counts as unavailable.
    fn threshold(&self) -> f64;

    /// Whether the peer counts as available at `at`. True before the first beat.
    fn is_available(&self, at: Instant) -> bool;

    /// The instant from which on silence counts, if the peer was ever heard.
    fn silent_since(&self) -> Option<Instant>;

    /// Silence counts only from `at` on, if that is later than what counts now: the listener was paused, or cut off,
    /// and what it did not hear says nothing. The interval that this cuts short is not learned.
    fn excuse(&mut self, at: Instant);
}
