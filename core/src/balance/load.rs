//! Strategies that go by what the instances are doing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt as _, rngs::SmallRng};

use super::{choose::Chooser, member::Member, nanos};

#[derive(Debug)]
pub(super) struct LeastRequests;

impl Chooser for LeastRequests {
    fn choose(&self, members: &[Arc<Member>], _: Option<&[u8]>, _: u64) -> Option<usize> {
        let mut random: SmallRng = rand::make_rng();
        let load = |member: &Member| (member.state.in_flight() + 1, u64::from(member.weight()));
        let mut best = (0, load(members.first()?));
        let mut equals = 1_u32;
        for (place, member) in members.iter().enumerate().skip(1) {
            let load = load(member);
            // Fractions are compared by multiplication; four thousand million requests in flight would saturate it.
            let (ours, theirs) = (load.0.saturating_mul(best.1.1), best.1.0.saturating_mul(load.1));
            if ours < theirs {
                (best, equals) = ((place, load), 1);
            } else if ours == theirs {
                equals += 1;
                // The nth of equals wins with probability 1/n, so that each has the same in the end.
                if random.random_range(0..equals) == 0 {
                    best = (place, load);
                }
            }
        }
        Some(best.0)
    }
}

/// Of two instances that are picked at random, the one with the lower cost: the estimate of its latency × (requests in
/// flight + 1), as in Finagle, linkerd and tower.
///
/// The estimate is a moving average that forgets with time and jumps up at once: a latency above it replaces it, one
/// below it pulls it down, the more the longer ago the last one was (of several within a thousandth of `decay`, the
/// first). It also falls while nothing is reported, so that an
/// instance that was slow is tried again. Two random choices keep the longest queue near ln ln n
/// (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeakEwma {
    /// In this time an estimate falls to 1/e. 10 seconds by default; at least a millisecond, the unit of its clock.
    pub decay: Duration,
    /// The estimate of an instance before its first report. 30 milliseconds by default; a greater one lets newcomers in
    /// more gently.
    pub initial: Duration,
    /// A failure counts as a latency of at least this, so that an instance that fails at once does not look fast and
    /// draw all requests to itself. A second by default.
    pub failure: Duration,
}

impl Default for PeakEwma {
    fn default() -> Self {
        Self { decay: Duration::from_secs(10), initial: Duration::from_millis(30), failure: Duration::from_secs(1) }
    }
}

impl Chooser for PeakEwma {
    fn choose(&self, members: &[Arc<Member>], _: Option<&[u8]>, now: u64) -> Option<usize> {
        if members.len() < 2 {
            return (!members.is_empty()).then_some(0);
        }
        // Two that differ: the second is drawn from all but the first.
        let first = rand::random_range(0..members.len());
        let second = rand::random_range(0..members.len() - 1);
        let second = if second < first { second } else { second + 1 };
        let cost = |place: usize| {
            let state = &members[place].state;
            // Not less than a nanosecond, so that requests in flight still count when the estimate has faded.
            state.estimate.fade(now, self.decay).max(1.0) * (state.in_flight() + 1) as f32
        };
        Some(if cost(second) < cost(first) { second } else { first })
    }
}

/// The estimate of a latency: in the upper half nanoseconds as a float, in the lower half when that was, in milliseconds,
/// modulo 2³². In one word, so that both change together without a lock.
///
/// After 49 days without a report the time starts over; by then there is nothing left to forget.
#[derive(Debug)]
pub(super) struct Estimate(AtomicU64);

/// The time of an estimate moves on only when so little or less is left of it. In smaller steps the clock's unit and the
/// float's rounding would swallow the change, and the estimate would stand still.
const NOTICEABLE: f32 = 0.999;

fn pack(value: f32, tick: u32) -> u64 {
    u64::from(value.to_bits()) << 32 | u64::from(tick)
}

fn unpack(word: u64) -> (f32, u32) {
    (f32::from_bits((word >> 32) as u32), word as u32)
}

/// Milliseconds, as much of them as fits.
fn tick(now: u64) -> u32 {
    (now / 1_000_000) as u32
}

/// What is left of one after this many milliseconds.
fn left(millis: u32, decay: Duration) -> f32 {
    if millis == 0 { 1.0 } else { (-(millis as f32) / (decay.as_secs_f32() * 1e3).max(1.0)).exp() }
}

impl Estimate {
    pub(super) fn new(initial: Duration, now: u64) -> Self {
        Self(AtomicU64::new(pack(nanos(initial) as f32, tick(now))))
    }

    /// Nanoseconds, as of now.
    pub(super) fn at(&self, now: u64, decay: Duration) -> f32 {
        let (value, then) = unpack(self.0.load(Ordering::Relaxed));
        value * left(since(now, then), decay)
    }

    /// The same, and forgets what has faded, as tower does when it reads a load: a later report then counts beside what
    /// is left of the old ones, so that an instance that has recovered is soon trusted again.
    fn fade(&self, now: u64, decay: Duration) -> f32 {
        let word = self.0.load(Ordering::Relaxed);
        let (value, then) = unpack(word);
        let left = left(since(now, then), decay);
        if left <= NOTICEABLE {
            // If somebody has written meanwhile, that is newer.
            let faded = pack(value * left, tick(now));
            let _ = self.0.compare_exchange(word, faded, Ordering::Relaxed, Ordering::Relaxed);
        }
        value * left
    }

    /// Takes a latency in.
    pub(super) fn observe(&self, latency: Duration, now: u64, decay: Duration) {
        let latency = nanos(latency) as f32;
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let (value, then) = unpack(word);
            let (value, left) = (value, left(since(now, then), decay));
            if latency > value {
                Some(pack(latency, tick(now)))
            } else if left > NOTICEABLE {
                None
            } else {
                Some(pack(value * left + latency * (1.0 - left), tick(now)))
            }
        });
    }
}

/// Two tasks may report in another order than they read the clock: what seems to lie ahead is now.
fn since(now: u64, then: u32) -> u32 {
    let millis = tick(now).wrapping_sub(then);
    if millis > u32::MAX - 60_000 { 0 } else { millis }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECAY: Duration = Duration::from_secs(1);
    const SECOND: u64 = 1_000_000_000;

    fn millis(estimate: &Estimate, now: u64) -> f32 {
        (estimate.at(now, DECAY) / 1e6 * 10.0).round() / 10.0
    }

    #[test]
    fn an_estimate_decays_as_the_table_says() {
        // As tower's `default_decay` and `compound_decay`: 10 ms, and nothing reported.
        let estimate = Estimate::new(Duration::from_millis(10), 0);
        let table = [(0.0, 10.0), (0.1, 9.0), (1.0, 3.7), (2.0, 1.4), (10.0, 0.0)];
        for (seconds, expected) in table {
            assert_eq!(millis(&estimate, (seconds * SECOND as f64) as u64), expected, "after {seconds} s");
        }
    }

    #[test]
    fn it_jumps_up_and_sinks_slowly() {
        let estimate = Estimate::new(Duration::from_millis(10), 0);
        let observe = |latency, now| estimate.observe(Duration::from_millis(latency), now, DECAY);
        observe(100, SECOND);
        assert_eq!(millis(&estimate, SECOND), 100.0);
        observe(10, SECOND);
        assert_eq!(millis(&estimate, SECOND), 100.0, "no time has passed");
        observe(10, 2 * SECOND);
        assert_eq!(millis(&estimate, 2 * SECOND), 43.1, "100/e + 10 (1 - 1/e)");
    }

    #[test]
    fn reports_closer_than_the_clock_ticks_still_pull_it_down() {
        let estimate = Estimate::new(Duration::from_millis(100), 0);
        for report in 0..100_000 {
            estimate.observe(Duration::from_millis(1), report * SECOND / 10_000, DECAY);
        }
        assert_eq!(millis(&estimate, 10 * SECOND), 1.0);
    }

    #[test]
    fn reading_often_does_not_stop_the_time() {
        for decay in [DECAY, DECAY * 3_600, DECAY * 360_000] {
            let estimate = Estimate::new(Duration::from_millis(10), 0);
            let end = super::nanos(decay);
            for step in 1..=100_000 {
                estimate.fade(end / 100_000 * step, decay);
            }
            let faded = estimate.at(end, decay) / 1e6;
            assert!((faded - 3.68).abs() < 0.02, "{decay:?}: {faded}");
        }
    }

    #[test]
    fn a_report_out_of_order_is_not_49_days_late() {
        let estimate = Estimate::new(Duration::from_millis(10), 2 * SECOND);
        assert_eq!(millis(&estimate, SECOND), 10.0);
    }
}
