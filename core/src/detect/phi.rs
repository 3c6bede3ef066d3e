//! The φ-accrual detector (Hayashibara, Défago, Yared, Katayama, "The φ accrual failure detector", 2004).
//!
//! Promise: φ(t) = −log₁₀ P(the next beat comes later than t), for intervals that are distributed as those in the
//! window, shifted by the acceptable pause. Values, seeding and defaults are those of Akka.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use super::Detector;

/// The longest interval that is told apart from longer ones, so that sums of squares fit their integers.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The largest window, for the same reason.
const MAX_WINDOW: usize = 100_000;
/// Deviations beyond this many σ are told as this many: φ stays finite and never falls.
const MAX_DEVIATIONS: f64 = 1e6;

/// How a [`PhiAccrual`] shall be.
#[derive(Debug, Clone, PartialEq)]
pub struct PhiOptions {
    /// φ from which on a peer counts as unavailable. 8: about one mistake in 10⁸ intervals under the model.
    pub threshold: f64,
    /// How many intervals are remembered: 1 to 100,000. 1000.
    pub window: usize,
    /// The least standard deviation to assume: a network that was quiet will not stay so. 100 ms.
    pub min_std_deviation: Duration,
    /// What a peer may be silent beyond its interval, for garbage collection and the like. 3 s.
    pub acceptable_pause: Duration,
    /// The interval to expect until intervals have been seen. 1 s.
    pub first_interval: Duration,
    /// Intervals longer than this are pauses and not learned, so that one pause does not make the next one look normal.
    /// `None`: the acceptable pause, or two first intervals if that is longer.
    pub longest_learned: Option<Duration>,
}

impl Default for PhiOptions {
    fn default() -> Self {
        Self {
            threshold: 8.0,
            window: 1000,
            min_std_deviation: Duration::from_millis(100),
            acceptable_pause: Duration::from_secs(3),
            first_interval: Duration::from_secs(1),
            longest_learned: None,
        }
    }
}

/// Suspects a peer the more, the less likely its silence is by the intervals seen so far.
#[derive(Debug, Clone)]
pub struct PhiAccrual {
    options: PhiOptions,
    intervals: Intervals,
    since: Option<Instant>,
    /// Whether `since` is a beat, so that the time up to the next one is an interval.
    since_beat: bool,
}

impl PhiAccrual {
    /// A detector that has heard nothing yet.
    pub fn new(options: PhiOptions) -> Self {
        let intervals = Intervals::new(options.window);
        Self { options, intervals, since: None, since_beat: false }
    }

    /// The mean of the intervals in the window; zero before the first beat.
    pub fn mean(&self) -> Duration {
        Duration::from_secs_f64(self.intervals.mean())
    }

    /// The standard deviation of the intervals in the window, without the floor.
    pub fn std_deviation(&self) -> Duration {
        Duration::from_secs_f64(self.intervals.variance().sqrt())
    }

    fn longest_learned(&self) -> Duration {
        let first = self.options.first_interval.saturating_mul(2);
        self.options.longest_learned.unwrap_or_else(|| self.options.acceptable_pause.max(first))
    }

    /// Two intervals about the estimate, a quarter of it off: the model is wide until it has seen something.
    fn seed(&mut self) {
        let first = self.options.first_interval.min(DAY);
        self.intervals.push(first - first / 4);
        self.intervals.push(first + first / 4);
    }
}

impl Detector for PhiAccrual {
    fn heartbeats(&mut self, count: u64, at: Instant) {
        match self.since {
            None => self.seed(),
            Some(since) => {
                let elapsed = at.saturating_duration_since(since);
                // What is longer than a u32 of beats apart is no interval to learn from anyway.
                let interval = elapsed / u32::try_from(count.max(1)).unwrap_or(u32::MAX);
                // As in Akka, the beat that ends a suspicion is not learned either.
                if self.since_beat && interval <= self.longest_learned() && self.is_available(at) {
                    self.intervals.push(interval);
                }
            }
        }
        self.since = self.since.max(Some(at));
        self.since_beat = true;
    }

    fn suspicion(&self, at: Instant) -> f64 {
        let Some(since) = self.since else { return 0.0 };
        let silence = at.saturating_duration_since(since).as_secs_f64();
        let mean = self.intervals.mean() + self.options.acceptable_pause.as_secs_f64();
        let deviation = self.intervals.variance().sqrt().max(self.options.min_std_deviation.as_secs_f64());
        phi(silence, mean, deviation)
    }

    fn threshold(&self) -> f64 {
        self.options.threshold
    }

    fn is_available(&self, at: Instant) -> bool {
        self.suspicion(at) < self.options.threshold
    }

    fn silent_since(&self) -> Option<Instant> {
        self.since
    }

    fn excuse(&mut self, at: Instant) {
        if self.since.is_some_and(|since| since <= at) {
            self.since = Some(at);
            self.since_beat = false;
        }
    }
}

/// −log₁₀ of the chance that a normally distributed interval is longer than `silence`.
///
/// The normal distribution is stood in for by the logistic curve of Bowling et al. (2009), as in Akka. With
/// P = 1/(1+eˣ) the logarithm is taken by hand, so that nothing overflows and no two large numbers are subtracted.
pub(super) fn phi(silence: f64, mean: f64, deviation: f64) -> f64 {
    // A deviation of zero makes every lateness infinitely unlikely: bounded here like any other.
    let deviations = (silence - mean) / deviation.max(f64::MIN_POSITIVE);
    let y = if deviations.is_nan() { 0.0 } else { deviations.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS) };
    let x = y * (1.5976 + 0.070_566 * y * y);
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) / std::f64::consts::LN_10
}

/// The last intervals, with their sums. Integers, so that what has left the window has left the sums as well.
#[derive(Debug, Clone)]
struct Intervals {
    /// Nanoseconds, at most a day each; at most `window`.
    kept: VecDeque<u64>,
    window: usize,
    sum: u128,
    squares: u128,
}

impl Intervals {
    fn new(window: usize) -> Self {
        Self { kept: VecDeque::new(), window: window.clamp(1, MAX_WINDOW), sum: 0, squares: 0 }
    }

    fn push(&mut self, interval: Duration) {
        if self.kept.len() == self.window
            && let Some(oldest) = self.kept.pop_front()
        {
            self.sum -= u128::from(oldest);
            self.squares -= u128::from(oldest).pow(2);
        }
        let nanos = u64::try_from(interval.min(DAY).as_nanos()).expect("a day fits");
        self.kept.push_back(nanos);
        self.sum += u128::from(nanos);
        self.squares += u128::from(nanos).pow(2);
    }

    /// Seconds.
    fn mean(&self) -> f64 {
        self.sum as f64 / self.kept.len().max(1) as f64 / 1e9
    }

    /// Seconds squared; zero for fewer than two.
    fn variance(&self) -> f64 {
        let count = self.kept.len().max(1) as u128;
        // n·Σx² ≥ (Σx)², exactly; MAX_WINDOW and DAY keep both below 2^128.
        let scaled = count * self.squares - self.sum.pow(2);
        scaled as f64 / (count * count) as f64 / 1e18
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    fn no_pause() -> PhiOptions {
        PhiOptions { acceptable_pause: Duration::ZERO, ..PhiOptions::default() }
    }

    fn near(value: f64, expected: f64, by: f64) {
        assert!((value - expected).abs() <= by, "{value} is not {expected} ± {by}");
    }

    /// S-G16.
    #[test]
    fn phi_is_what_akkas_table_says_and_never_falls() {
        for (elapsed, expected) in [(500, 0.1), (1000, 0.3), (1200, 1.6), (1400, 4.7), (1600, 10.8), (1700, 15.3)] {
            near(phi(f64::from(elapsed) / 1000.0, 1.0, 0.1), expected, 0.1);
        }
        let all: Vec<f64> = (0..20_000).map(|ms| phi(f64::from(ms) / 1000.0, 1.0, 0.1)).collect();
        assert!(all.windows(2).all(|pair| pair[0] <= pair[1]));
    }

    /// S-G17.
    #[tokio::test]
    async fn before_the_first_beat_nothing_is_suspected_and_after_it_the_estimate_counts() {
        let start = Instant::now();
        let mut detector = PhiAccrual::new(no_pause());
        near(detector.suspicion(start + 1000 * SECOND), 0.0, 0.0);
        assert!(detector.is_available(start + 1000 * SECOND));
        detector.heartbeat(start);
        near(detector.suspicion(start + SECOND), 0.3, 0.2);
        near(detector.suspicion(start + 2 * SECOND), 4.5, 0.3);
        assert!(detector.suspicion(start + 3 * SECOND) > 15.0);
    }

    fn regular(options: PhiOptions, start: Instant) -> (PhiAccrual, Instant) {
        let mut detector = PhiAccrual::new(options);
        for beat in 0..100 {
            detector.heartbeat(start + beat * SECOND);
        }
        (detector, start + 99 * SECOND)
    }

    /// S-G18.
    #[tokio::test]
    async fn an_acceptable_pause_is_accepted_and_a_longer_one_is_not() {
        let (mut detector, last) = regular(PhiOptions::default(), Instant::now());
        assert!((0..=4000).all(|ms| detector.is_available(last + ms * MS)), "through a gap of 4 s");
        detector.heartbeat(last + 4 * SECOND);
        assert!(!detector.is_available(last + 9 * SECOND), "after a gap of 5 s");
        detector.heartbeat(last + 9 * SECOND);
        assert!(detector.is_available(last + 9 * SECOND), "heard again");
    }

    /// S-G19.
    #[tokio::test]
    async fn old_intervals_leave_the_window() {
        let mut at = Instant::now();
        let mut detector = PhiAccrual::new(PhiOptions { window: 3, ..no_pause() });
        let mut beats = |detector: &mut PhiAccrual, count: u32, interval: Duration| {
            for _ in 0..count {
                at += interval;
                detector.heartbeat(at);
            }
            detector.suspicion(at + interval)
        };
        let fast = beats(&mut detector, 4, 100 * MS);
        assert_eq!((detector.mean(), detector.std_deviation()), (100 * MS, Duration::ZERO));
        let slow = beats(&mut detector, 3, 500 * MS);
        assert_eq!((detector.mean(), detector.std_deviation()), (500 * MS, Duration::ZERO));
        near(fast, slow, 0.001);
        let mut one = Intervals::new(3);
        one.push(SECOND);
        near(one.variance(), 0.0, 0.0);
        for ms in [100, 200, 300, 400] {
            one.push(ms * MS);
        }
        near(one.mean(), 0.3, 1e-9);
        near(one.variance(), 0.02 / 3.0, 1e-9);
    }

    /// S-G20.
    #[test]
    fn extremes_stay_finite_and_the_curve_is_close_to_the_normal_one() {
        near(phi(10.0, 0.0, 1.0), 38.0, 1.0);
        near(phi(-25.0, 0.0, 1.0), 0.0, 0.0);
        let extremes = [f64::MIN, -1e9, 0.0, 1e-300, 25.0, 1e9, f64::MAX];
        for silence in extremes {
            for deviation in [0.0, 1e-300, 1.0, f64::MAX] {
                assert!(phi(silence, 0.0, deviation).is_finite(), "φ({silence}) with σ {deviation}");
            }
            assert!(phi(silence, 0.0, 1e-300) >= phi(f64::MIN, 0.0, 1e-300));
        }
        // The distribution function, to the accuracy that its authors state (1.4e-4).
        for (y, reference) in [(0.0, 0.5), (0.1, 0.539_828), (0.6, 0.725_747), (1.0, 0.841_345), (2.0, 0.977_250)] {
            near(1.0 - 10f64.powf(-phi(y, 0.0, 1.0)), reference, 2e-4);
            near(1.0 - 10f64.powf(-phi(-y, 0.0, 1.0)), 1.0 - reference, 2e-4);
        }
    }

    #[tokio::test]
    async fn a_window_of_the_longest_intervals_does_not_overflow() {
        let mut most = Intervals::new(usize::MAX);
        for i in 0..MAX_WINDOW + 1 {
            most.push(if i % 2 == 0 { Duration::MAX } else { Duration::ZERO });
        }
        near(most.mean(), 43_200.0, 1.0);
        near(most.variance().sqrt(), 43_200.0, 1.0);
    }

    #[tokio::test]
    async fn a_long_pause_is_not_learned() {
        // σ is kept high here, so that only the stated bound can tell a pause from an interval.
        let options = PhiOptions { min_std_deviation: 2 * SECOND, ..PhiOptions::default() };
        let (mut detector, last) = regular(options, Instant::now());
        let before = (detector.mean(), detector.std_deviation());
        let paused = last + Duration::from_millis(3500);
        assert!(detector.is_available(paused));
        detector.heartbeat(paused);
        assert_eq!((detector.mean(), detector.std_deviation()), before);
        detector.heartbeat(paused + 2 * SECOND);
        assert!(detector.mean() > before.0, "what is no pause is learned");
    }

    #[tokio::test]
    async fn skipped_beats_do_not_stretch_the_mean() {
        let (mut detector, last) = regular(PhiOptions::default(), Instant::now());
        let before = detector.mean();
        detector.heartbeats(3, last + 3 * SECOND);
        assert!(detector.mean().abs_diff(before) < 5 * MS, "{:?} after {before:?}", detector.mean());
        // The control: told as one beat, the same instants do stretch it.
        let (mut misjudged, _) = regular(PhiOptions::default(), last - 99 * SECOND);
        misjudged.heartbeat(last + 3 * SECOND);
        assert!(misjudged.mean() > before + 5 * MS);
    }

    #[tokio::test]
    async fn excused_silence_neither_counts_nor_is_learned() {
        let (mut detector, last) = regular(PhiOptions::default(), Instant::now());
        let before = detector.mean();
        detector.excuse(last + 3600 * SECOND);
        assert!(detector.is_available(last + 3604 * SECOND) && !detector.is_available(last + 3605 * SECOND));
        detector.heartbeat(last + 3600 * SECOND + MS);
        assert_eq!(detector.mean(), before);
        detector.excuse(last);
        assert_eq!(detector.silent_since(), Some(last + 3600 * SECOND + MS), "an excuse never adds silence");
    }
}
