//! An observer's doubt about itself (Lifeguard: Dadgar, Phillips, Currey, "Local health awareness", 2018).
//!
//! Promise: the score stays within 0 and [`Health::WORST`]; a time scaled by it is never shorter than it was.

use std::time::Duration;

/// How an observer has been doing lately: 0 is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health(u32);

impl Health {
    /// The worst score.
    pub const WORST: u32 = 7;

    /// The score, from 0 to [`Self::WORST`].
    pub fn score(self) -> u32 {
        self.0
    }

    /// Something went wrong here: a pause, a call without an answer.
    pub fn worsen(&mut self) {
        self.0 = (self.0 + 1).min(Self::WORST);
    }

    /// Something went as it should.
    pub fn improve(&mut self) {
        self.0 = self.0.saturating_sub(1);
    }

    /// The time, times score + 1.
    pub fn scale(self, time: Duration) -> Duration {
        time.saturating_mul(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S-G25.
    #[test]
    fn the_score_is_clamped_and_scales_times() {
        let second = Duration::from_secs(1);
        let mut health = Health::default();
        health.improve();
        assert_eq!((health.score(), health.scale(second)), (0, second));
        for _ in 0..20 {
            health.worsen();
        }
        assert_eq!((health.score(), health.scale(second)), (7, 8 * second));
        health.improve();
        assert_eq!((health.score(), health.scale(second)), (6, 7 * second));
        assert_eq!(health.scale(Duration::MAX), Duration::MAX);
    }
}
