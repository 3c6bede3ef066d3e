//! P16: how often φ is wrong, for arrivals that are and are not as its model assumes. Run with `--nocapture` to see.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng, rngs::StdRng};
use tokio::time::Instant;

use super::{Detector as _, PhiAccrual, PhiOptions};

const ARRIVALS: u32 = 200_000;
const THRESHOLDS: [f64; 5] = [1.0, 2.0, 3.0, 4.0, 8.0];

/// Seconds between two beats, with a mean of 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrivals {
    /// σ = 200 ms, above the floor, so that the model is exactly right.
    Normal,
    Exponential,
    /// 19 in 20 after 0.9 s, the rest after 2.9 s: a peer that collects garbage.
    Bimodal,
}

impl Arrivals {
    fn next(self, random: &mut StdRng) -> f64 {
        // Never zero, so that its logarithm is finite.
        let uniform = |random: &mut StdRng| 1.0 - random.random::<f64>();
        let normal = |random: &mut StdRng| {
            (-2.0 * uniform(random).ln()).sqrt() * (std::f64::consts::TAU * uniform(random)).cos()
        };
        match self {
            Self::Normal => (1.0 + 0.2 * normal(random)).max(0.0),
            Self::Exponential => -uniform(random).ln(),
            Self::Bimodal if random.random::<f64>() < 0.05 => (2.9 + 0.05 * normal(random)).max(0.0),
            Self::Bimodal => (0.9 + 0.05 * normal(random)).max(0.0),
        }
    }
}

/// The share of intervals in which a live peer was suspected, for each threshold.
fn mistakes(arrivals: Arrivals, acceptable_pause: Duration) -> [f64; THRESHOLDS.len()] {
    let mut random = StdRng::seed_from_u64(42);
    // Everything is learned: what is asked is what the model says of what it has seen.
    let learned = Some(Duration::from_secs(3600));
    let options =
        PhiOptions { acceptable_pause, threshold: f64::MAX, longest_learned: learned, ..PhiOptions::default() };
    let mut detector = PhiAccrual::new(options);
    let mut at = Instant::now();
    detector.heartbeat(at);
    let mut wrong = [0u32; THRESHOLDS.len()];
    let warm_up = 2000;
    for beat in 0..ARRIVALS + warm_up {
        at += Duration::from_secs_f64(arrivals.next(&mut random));
        // φ only rises with silence: the moment before the beat is the worst of the interval.
        let worst = detector.suspicion(at);
        detector.heartbeat(at);
        if beat >= warm_up {
            for (count, threshold) in wrong.iter_mut().zip(THRESHOLDS) {
                *count += u32::from(worst >= threshold);
            }
        }
    }
    wrong.map(|count| f64::from(count) / f64::from(ARRIVALS))
}

#[tokio::test]
async fn the_rate_of_mistakes_is_the_nominal_one_for_normal_arrivals_and_told_for_others() {
    println!("share of intervals in which a live peer is suspected, {ARRIVALS} arrivals, mean interval 1 s");
    println!("{:24} {}", "threshold", THRESHOLDS.map(|t| format!("{t:>9}")).join(" "));
    println!("{:24} {}", "nominal", THRESHOLDS.map(|t| format!("{:>9.1e}", 10f64.powf(-t))).join(" "));
    for arrivals in [Arrivals::Normal, Arrivals::Exponential, Arrivals::Bimodal] {
        for pause in [0, 3] {
            let rates = mistakes(arrivals, Duration::from_secs(pause));
            let name = format!("{arrivals:?}, pause {pause} s");
            println!("{name:24} {}", rates.map(|rate| format!("{rate:>9.1e}")).join(" "));
            if arrivals == Arrivals::Normal && pause == 0 {
                for (rate, threshold) in rates.iter().zip(THRESHOLDS).take(3) {
                    let nominal = 10f64.powf(-threshold);
                    assert!((nominal / 1.5..nominal * 1.5).contains(rate), "{rate} at threshold {threshold}");
                }
                assert!(rates[4] <= 5.0 / f64::from(ARRIVALS), "threshold 8 is out of reach of so few arrivals");
            }
            if arrivals != Arrivals::Normal && pause == 0 {
                assert!(rates[2] > 10.0 * 1e-3, "tails heavier than the model's must show: {rates:?}");
            }
            if pause == 3 {
                assert!(rates[4] < 5e-3, "the acceptable pause is what carries heavy tails: {rates:?}");
            }
        }
    }
}
