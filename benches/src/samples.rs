//! Times in histograms, and how long is measured.

use std::time::Duration;

use hdrhistogram::Histogram;

/// How long each measure takes, both sides together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    pub(crate) latency: Duration,
    pub(crate) throughput: Duration,
    pub(crate) contended: Duration,
    pub(crate) hand_off: Duration,
    pub(crate) commits: Duration,
    pub(crate) discovery: Duration,
    pub(crate) memory: Duration,
    pub(crate) balance: Duration,
}

impl Budget {
    /// With four servers, under four minutes.
    pub(crate) fn full() -> Self {
        let seconds = Duration::from_secs;
        Self {
            latency: seconds(12),
            throughput: seconds(12),
            contended: seconds(12),
            hand_off: seconds(14),
            commits: seconds(8),
            discovery: seconds(6),
            memory: seconds(12),
            balance: seconds(12),
        }
    }

    pub(crate) fn quick() -> Self {
        let full = Self::full();
        Self {
            latency: full.latency / 5,
            throughput: full.throughput / 5,
            contended: full.contended / 5,
            hand_off: full.hand_off / 5,
            commits: full.commits / 5,
            discovery: full.discovery / 5,
            memory: full.memory / 5,
            balance: full.balance / 5,
        }
    }
}

/// Times of one kind of event.
#[derive(Debug, Clone)]
pub(crate) struct Samples(Histogram<u64>);

impl Samples {
    pub(crate) fn new() -> Self {
        Self(Histogram::new(3).expect("three digits are within the histogram's range"))
    }

    pub(crate) fn add(&mut self, time: Duration) {
        // A histogram that resizes itself takes any value; 584 years fit.
        self.0.record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)).expect("it resizes itself");
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("it resizes itself");
    }

    pub(crate) fn p50(&self) -> Duration {
        Duration::from_nanos(self.0.value_at_quantile(0.50))
    }

    pub(crate) fn p99(&self) -> Duration {
        Duration::from_nanos(self.0.value_at_quantile(0.99))
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }
}

/// What one pair of blocks after another said, to show how far a figure can be trusted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spread(Vec<f64>);

impl Spread {
    pub(crate) fn add(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// The figure below which this part of all lies; 0.5 is the median. Zero if there is none.
    pub(crate) fn at(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1) as f64;
        sorted.get((last * part).round() as usize).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_a_spread_is_its_median() {
        let mut spread = Spread::default();
        assert_eq!(spread.at(0.5), 0.0);
        for figure in [3.0, 1.0, 9.0, 2.0, 4.0] {
            spread.add(figure);
        }
        assert_eq!([spread.at(0.0), spread.at(0.5), spread.at(1.0)], [1.0, 3.0, 9.0]);
    }

    #[test]
    fn times_are_kept_to_three_digits() {
        let mut samples = Samples::new();
        for micros in 1..=1000 {
            samples.add(Duration::from_micros(micros));
        }
        let close = |time: Duration, micros: f64| (time.as_secs_f64() * 1e6 / micros - 1.0).abs() < 0.002;
        assert!(close(samples.p50(), 500.0) && close(samples.p99(), 990.0), "{:?} {:?}", samples.p50(), samples.p99());
    }
}
