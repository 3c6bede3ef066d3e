//! The fixed-timeout detector.
//!
//! Promise: available up to interval + acceptable pause after the last beat, unavailable past it, available again with
//! the next beat.

use std::time::Duration;

use tokio::time::Instant;

use super::Detector;

/// Suspects a peer that is silent for longer than an interval plus an acceptable pause.
#[derive(Debug, Clone)]
pub struct Deadline {
    allowed: Duration,
    since: Option<Instant>,
}

impl Deadline {
    /// For a peer that beats once per `interval` and may be late by `acceptable_pause`.
    pub fn new(interval: Duration, acceptable_pause: Duration) -> Self {
        Self { allowed: interval.saturating_add(acceptable_pause), since: None }
    }

    fn silence(&self, at: Instant) -> Option<Duration> {
        self.since.map(|since| at.saturating_duration_since(since))
    }
}

impl Detector for Deadline {
    fn heartbeats(&mut self, _count: u64, at: Instant) {
        self.excuse(at);
        self.since.get_or_insert(at);
    }

    fn suspicion(&self, at: Instant) -> f64 {
        // A nanosecond at least, so that a limit of zero divides as well.
        let allowed = self.allowed.max(Duration::from_nanos(1));
        self.silence(at).map_or(0.0, |silence| silence.as_secs_f64() / allowed.as_secs_f64())
    }

    fn threshold(&self) -> f64 {
        1.0
    }

    fn is_available(&self, at: Instant) -> bool {
        self.silence(at).is_none_or(|silence| silence <= self.allowed)
    }

    fn silent_since(&self) -> Option<Instant> {
        self.since
    }

    fn excuse(&mut self, at: Instant) {
        if let Some(since) = &mut self.since {
            *since = at.max(*since);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// S-G21.
    #[tokio::test]
    async fn available_up_to_interval_and_pause_and_again_after_one_beat() {
        let start = Instant::now();
        let mut detector = Deadline::new(SECOND, 4 * SECOND);
        assert!(detector.is_available(start + 1000 * SECOND), "not monitored before the first beat");
        assert!(detector.silent_since().is_none() && detector.suspicion(start + SECOND).abs() < 1e-9);
        for beat in 0..3 {
            detector.heartbeat(start + beat * SECOND);
        }
        let last = start + 2 * SECOND;
        assert!(detector.is_available(last + 5 * SECOND));
        assert!(!detector.is_available(last + 5 * SECOND + Duration::from_millis(1)));
        assert!((detector.suspicion(last + 10 * SECOND) - 2.0).abs() < 1e-9, "twice what is allowed");
        detector.heartbeat(last + 10 * SECOND);
        assert!(detector.is_available(last + 15 * SECOND));
    }

    #[tokio::test]
    async fn excused_silence_does_not_count_and_time_never_runs_back() {
        let start = Instant::now();
        let mut detector = Deadline::new(SECOND, SECOND);
        detector.excuse(start);
        assert!(detector.silent_since().is_none(), "excusing is not hearing");
        detector.heartbeat(start + 10 * SECOND);
        detector.excuse(start + 20 * SECOND);
        detector.heartbeat(start);
        assert!(detector.is_available(start + 22 * SECOND) && !detector.is_available(start + 23 * SECOND));
        assert!(Deadline::new(Duration::ZERO, Duration::ZERO).suspicion(start).is_finite());
    }
}
