//! How far the coordinator's wall clock is from ours, for people to look at.
//!
//! Promise: nothing here decides anything: leases are counted on the monotonic clock of this process, and no two wall
//! clocks are ever compared for that. An offset carries its error bound, and the bound holds whichever way of a request
//! is the slow one, as long as no clock was set in between.
//!
//! # How it is found
//! A request leaves when our wall clock shows w and is answered r later on our monotonic clock; the answer says that the
//! server's clock showed something from e to l meanwhile. So the server is ahead by at least e − (w + r) and at most l − w.
//! Of the last eight such intervals the intersection is taken (Marzullo's rule as in RFC 5905, section 11.2.1, with one
//! source and no falsetickers), each widened by what two clocks may have drifted apart since: 500 ppm each, the most
//! that NTP lets a clock run off (RFC 5905, MAXFREQ). Intersecting does more than the shortest round trip alone: a clock that is
//! told in whole seconds is known within milliseconds once a sample was taken on either side of a tick. If the
//! newest interval does not meet the older ones, a clock was set, and the older ones are forgotten.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

use crate::{
    backend::{Backend, ServerClock},
    error::Result,
};

/// How many samples are remembered.
const SAMPLES: usize = 8;
/// How much two clocks may drift apart: 500 ppm each.
const DRIFT: f64 = 0.001;

/// A round trip, minimum-filtered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundTrip {
    /// The shortest of the last eight.
    pub shortest: Duration,
    /// The last one.
    pub last: Duration,
}

/// How far another wall clock is ahead of ours. For people; nothing is decided by it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClockOffset {
    /// Seconds; positive if the other clock is ahead.
    pub ahead_seconds: f64,
    /// The true offset lies within this of it, if no clock was set in between.
    pub error: Duration,
    /// Of a coordinator: the round trip to it. Of a peer: that between the peers, through the coordinator, without the time
    /// that the echo was held.
    pub round_trip: RoundTrip,
}

/// The wall clock of the server that answers our requests, against ours. Cheap to clone; all clones share the samples.
///
/// ```no_run
/// # async fn show(coord: quorate_core::Coordinator) -> quorate_core::Result<()> {
/// let offset = coord.clock().sample().await?;
/// println!("the server is {:+.6} s ahead, within {:?}", offset.ahead_seconds, offset.error);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct CoordinatorClock {
    backend: Arc<dyn Backend>,
    samples: Arc<Mutex<Samples>>,
}

impl CoordinatorClock {
    pub(crate) fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend, samples: Arc::default() }
    }

    /// Asks the server for its clock, in one round trip, and says what is known with it. In a cluster it is the clock of
    /// the server that answers (ZooKeeper: of the leader), and a change of server shows as a clock that was set.
    ///
    /// # Errors
    /// `Unsupported` if the [profile](crate::Profile::clock) says that the server does not tell its clock; otherwise as
    /// for a read.
    ///
    /// # Cancel safety
    /// A dropped call counts for nothing.
    pub async fn sample(&self) -> Result<ClockOffset> {
        let (wall, sent) = (wall_us(), Instant::now());
        let clock = self.backend.clock().await?;
        let now = Instant::now();
        let sample = Sample::new(wall, sent, now - sent, clock);
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push(sample);
        Ok(samples.offset(now).expect("one was pushed just now"))
    }

    /// What the last samples say, without asking the server. `None` before the first one.
    pub fn offset(&self) -> Option<ClockOffset> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).offset(Instant::now())
    }
}

/// Bounds of an offset, in seconds.
type Interval = (f64, f64);

#[derive(Debug, Clone, Copy)]
struct Sample {
    sent: Instant,
    round_trip: Duration,
    bounds: Interval,
}

impl Sample {
    fn new(wall_us: u64, sent: Instant, round_trip: Duration, clock: ServerClock) -> Self {
        // As whole microseconds: seconds since 1970 leave a float no room for them.
        let ahead = |shown: Duration| shown.as_micros() as i128 - i128::from(wall_us);
        let seconds = |us: i128| us as f64 / 1e6;
        // Our wall clock shows whole microseconds, too: it may have been one further.
        let low = ahead(clock.earliest) - round_trip.as_micros() as i128 - 1;
        Self { sent, round_trip, bounds: (seconds(low), seconds(ahead(clock.latest))) }
    }

    /// What it says of the offset at another moment.
    fn at(&self, now: Instant) -> Interval {
        let apart = now.saturating_duration_since(self.sent).as_secs_f64() * DRIFT;
        (self.bounds.0 - apart, self.bounds.1 + apart)
    }
}

/// The last samples, oldest first; at most [`SAMPLES`]. All intervals meet.
#[derive(Debug, Default)]
struct Samples(VecDeque<Sample>);

impl Samples {
    fn push(&mut self, sample: Sample) {
        if self.0.len() == SAMPLES {
            self.0.pop_front();
        }
        let at = sample.sent + sample.round_trip;
        self.0.push_back(sample);
        let (low, high) = self.meeting(at);
        if low > high {
            self.0.drain(..self.0.len() - 1);
        }
    }

    fn meeting(&self, at: Instant) -> Interval {
        let everything = (f64::NEG_INFINITY, f64::INFINITY);
        self.0.iter().map(|sample| sample.at(at)).fold(everything, |(a, b), (c, d)| (a.max(c), b.min(d)))
    }

    fn offset(&self, now: Instant) -> Option<ClockOffset> {
        let last = self.0.back()?.round_trip;
        let shortest = self.0.iter().map(|sample| sample.round_trip).min()?;
        let (low, high) = self.meeting(now);
        let error = Duration::from_secs_f64((high - low).max(0.0) / 2.0);
        Some(ClockOffset { ahead_seconds: f64::midpoint(low, high), error, round_trip: RoundTrip { shortest, last } })
    }
}

/// This machine's wall clock, in microseconds since 1970.
pub(crate) fn wall_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    /// What our wall clock shows at the start of a simulation.
    const START_US: u64 = 1_700_000_000_000_000;

    /// A server whose clock is `ahead` of ours and told in steps of `step`, asked at `at`; the ways take `there`, `back`.
    fn ask(start: Instant, at: Duration, ways: (Duration, Duration), ahead: f64, step: Duration) -> Sample {
        let wall = Duration::from_micros(START_US) + at;
        let shown = Duration::from_secs_f64(0.0).max(wall + ways.0);
        let shown =
            if ahead < 0.0 { shown - Duration::from_secs_f64(-ahead) } else { shown + Duration::from_secs_f64(ahead) };
        let earliest = Duration::from_nanos((shown.as_nanos() / step.as_nanos() * step.as_nanos()) as u64);
        let clock = ServerClock { earliest, latest: earliest + step };
        Sample::new(START_US + at.as_micros() as u64, start + at, ways.0 + ways.1, clock)
    }

    #[tokio::test]
    async fn the_truth_is_within_the_bound_whichever_way_is_slow() {
        let start = Instant::now();
        for ahead in [-3600.25, -0.01, 0.0, 7.5] {
            for ways in [(MS, 80 * MS), (80 * MS, MS), (MS, MS)] {
                let mut samples = Samples::default();
                samples.push(ask(start, 10 * MS, ways, ahead, Duration::from_micros(1)));
                let offset = samples.offset(start + 100 * MS).expect("a sample");
                let off = (offset.ahead_seconds - ahead).abs();
                assert!(off <= offset.error.as_secs_f64(), "{ahead} {ways:?}: {offset:?}");
                assert!(offset.error <= (ways.0 + ways.1) / 2 + MS / 5, "{ahead} {ways:?}: {offset:?}");
            }
        }
    }

    /// Eight samples 125 ms apart, more or less, of a clock told in seconds: far better than half a second.
    #[tokio::test]
    async fn a_clock_that_is_told_in_seconds_is_known_far_better_after_some_samples() {
        let start = Instant::now();
        let mut samples = Samples::default();
        for i in 0..8 {
            samples.push(ask(start, 131 * i * MS, (MS, 2 * MS), 2.345, Duration::from_secs(1)));
        }
        let offset = samples.offset(start + Duration::from_secs(1)).expect("samples");
        assert!((offset.ahead_seconds - 2.345).abs() <= offset.error.as_secs_f64(), "{offset:?}");
        assert!(offset.error < 75 * MS, "{offset:?}");
        assert_eq!(offset.round_trip, RoundTrip { shortest: 3 * MS, last: 3 * MS });
    }

    #[tokio::test]
    async fn a_clock_that_was_set_is_believed_at_the_next_sample() {
        let start = Instant::now();
        let step = Duration::from_micros(1);
        let mut samples = Samples::default();
        for i in 0..5 {
            samples.push(ask(start, 100 * i * MS, (MS, MS), 0.0, step));
        }
        samples.push(ask(start, 600 * MS, (MS, MS), -5.0, step));
        let offset = samples.offset(start + 700 * MS).expect("samples");
        assert!((offset.ahead_seconds + 5.0).abs() <= offset.error.as_secs_f64(), "{offset:?}");
        assert_eq!(samples.0.len(), 1, "what was before says nothing any more");
    }

    /// Two clocks that run apart by half of what is allowed for: the bound always holds, and grows with age.
    #[tokio::test]
    async fn what_is_old_is_believed_less() {
        let start = Instant::now();
        let mut samples = Samples::default();
        for i in 0..20_u32 {
            let at = i * Duration::from_secs(30);
            let ahead = at.as_secs_f64() * DRIFT / 2.0;
            samples.push(ask(start, at, (MS, MS), ahead, Duration::from_micros(1)));
            let offset = samples.offset(start + at).expect("samples");
            assert!((offset.ahead_seconds - ahead).abs() <= offset.error.as_secs_f64(), "{i}: {offset:?}");
            assert!(offset.error <= 2 * MS, "{i}: the newest alone says this much: {offset:?}");
        }
        let end = start + 570 * Duration::from_millis(1000);
        let (now, later) = (samples.offset(end), samples.offset(end + Duration::from_secs(60)));
        let (now, later) = (now.expect("samples").error, later.expect("samples").error);
        assert!(later >= now + 55 * MS, "{now:?} {later:?}");
    }
}
