//! Round trips and clock offsets, for people to look at.
//!
//! Promise: nothing here decides anything. Round trips are measured on the monotonic clock around real calls; offsets of
//! wall clocks carry their error bound. Both are filtered as NTP does (RFC 5905, clock filter): of the last
//! eight exchanges, the one with the shortest round trip tells the most.
//!
//! # How an offset is found
//! A beat of ours leaves at t₁ on our monotonic clock. A peer hears it, holds it for h on its own monotonic clock, and
//! echoes it in a beat that says what its wall clock showed as it left. We hear that at t₄. The round trip without
//! the holding is δ = (t₄ − t₁) − h; the peer's wall clock is ahead of ours by what it said, plus δ/2, minus ours at t₄; the
//! error is at most δ/2 either way, however unequal the two ways are, if no wall clock was set in between. The way leads
//! through the coordinator, so δ is two writes and two notifications long.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Incarnation,
    record::{Echo, Heard},
};
use crate::clock::{ClockOffset, RoundTrip};

/// How many exchanges a filter remembers.
pub(super) const SAMPLES: usize = 8;
/// How many of our own beats can still be echoed.
const SENT: usize = 128;

/// The last samples of a round trip, each with what came of it.
#[derive(Debug, Clone)]
pub(super) struct MinFilter<T> {
    /// At most [`SAMPLES`].
    samples: VecDeque<(Duration, T)>,
}

impl<T> Default for MinFilter<T> {
    fn default() -> Self {
        Self { samples: VecDeque::with_capacity(SAMPLES) }
    }
}

impl<T: Copy> MinFilter<T> {
    pub(super) fn push(&mut self, round_trip: Duration, value: T) {
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((round_trip, value));
    }

    pub(super) fn best(&self) -> Option<(RoundTrip, T)> {
        let (shortest, value) = *self.samples.iter().min_by_key(|(round_trip, _)| *round_trip)?;
        let last = self.samples.back()?.0;
        Some((RoundTrip { shortest, last }, value))
    }
}

/// What the publisher and the monitor of one group tell each other.
#[derive(Debug, Default)]
pub(super) struct Exchange(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last beats of this process's own peers, oldest first; at most [`SENT`].
    sent: VecDeque<Sent>,
    /// The last beat of each peer that can be echoed; as many as the monitor knows.
    heard: HashMap<String, Echoable>,
    /// Seconds by which each peer's wall clock is ahead.
    offsets: HashMap<String, MinFilter<f64>>,
    /// Own publishers whose last beat was not confirmed.
    failing: usize,
}

#[derive(Debug)]
struct Sent {
    peer: String,
    incarnation: u64,
    seq: u64,
    at: Instant,
}

#[derive(Debug)]
struct Echoable {
    incarnation: Incarnation,
    seq: u64,
    at: Instant,
    /// When it was last echoed, so that all get their turn.
    echoed: Option<Instant>,
}

impl Exchange {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a beat of ours leaves now.
    pub(super) fn sending(&self, peer: &str, incarnation: u64, seq: u64, at: Instant) {
        let mut state = self.state();
        if state.sent.len() == SENT {
            state.sent.pop_front();
        }
        state.sent.push_back(Sent { peer: peer.to_owned(), incarnation, seq, at });
    }

    /// The echo for the next beat of `own`: one peer per beat, those first that have waited longest.
    pub(super) fn echo(&self, own: &str, now: Instant) -> Option<Echo> {
        let mut state = self.state();
        let others = state.heard.iter_mut().filter(|(peer, _)| *peer != own);
        // An echo of what was echoed before adds nothing.
        let news = others.filter(|(_, heard)| heard.echoed.is_none_or(|echoed| echoed < heard.at));
        let (peer, heard) = news.min_by_key(|(_, heard)| heard.echoed)?;
        heard.echoed = Some(now);
        let held = now.saturating_duration_since(heard.at);
        let held_us = u64::try_from(held.as_micros()).unwrap_or(u64::MAX);
        Some(Echo { peer: peer.clone(), incarnation: heard.incarnation.get(), seq: heard.seq, held_us })
    }

    /// Notes a beat of somebody, and what its echo tells if it answers one of ours.
    pub(super) fn heard(&self, heard: &Heard, at: Instant, wall_us: u64) {
        let mut state = self.state();
        let echoed = state.heard.get(&heard.peer).and_then(|before| before.echoed);
        let (incarnation, seq) = (heard.incarnation, heard.beat.seq);
        state.heard.insert(heard.peer.clone(), Echoable { incarnation, seq, at, echoed });
        let Some(echo) = &heard.beat.echo else { return };
        let ours =
            |sent: &&Sent| sent.peer == echo.peer && sent.incarnation == echo.incarnation && sent.seq == echo.seq;
        let Some(sent) = state.sent.iter().find(ours) else { return };
        let held = Duration::from_micros(echo.held_us);
        // A peer that claims to have held it for longer than it was away is not believed.
        let Some(round_trip) = at.saturating_duration_since(sent.at).checked_sub(held) else { return };
        let ahead = (heard.beat.sent_us as f64 - wall_us as f64) / 1e6 + round_trip.as_secs_f64() / 2.0;
        state.offsets.entry(heard.peer.clone()).or_default().push(round_trip, ahead);
    }

    pub(super) fn offset(&self, peer: &str) -> Option<ClockOffset> {
        let (round_trip, ahead_seconds) = self.state().offsets.get(peer)?.best()?;
        Some(ClockOffset { ahead_seconds, error: round_trip.shortest / 2, round_trip })
    }

    /// Forgets everybody else.
    pub(super) fn keep(&self, standing: &[Heard]) {
        let standing: HashSet<_> = standing.iter().map(|heard| heard.peer.as_str()).collect();
        let mut state = self.state();
        state.heard.retain(|peer, _| standing.contains(peer.as_str()));
        state.offsets.retain(|peer, _| standing.contains(peer.as_str()));
    }

    pub(super) fn forget(&self, peer: &str) {
        let mut state = self.state();
        state.heard.remove(peer);
        state.offsets.remove(peer);
    }

    /// Notes that one more, or one less, own publisher cannot write.
    pub(super) fn failing(&self, more: bool) {
        let mut state = self.state();
        state.failing = if more { state.failing + 1 } else { state.failing.saturating_sub(1) };
    }

    pub(super) fn is_failing(&self) -> bool {
        self.state().failing > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::Revision, heartbeat::record::Beat};

    const MS: Duration = Duration::from_millis(1);

    fn heard(peer: &str, seq: u64, sent_us: u64, echo: Option<Echo>) -> Heard {
        let beat = Beat {
            run: String::new(),
            incarnation: Some(1),
            seq,
            every_ms: 100,
            sent_us,
            payload: String::new(),
            echo,
            convicted: false,
        };
        let (created, modified) = (Revision(1), Revision(1 + seq));
        Heard { peer: peer.to_owned(), incarnation: Incarnation(1), created, modified, beat }
    }

    #[test]
    fn the_shortest_of_the_last_eight_counts() {
        let mut filter = MinFilter::default();
        assert!(filter.best().is_none());
        for (i, ms) in [5, 1, 9, 9, 9, 9, 9, 9].into_iter().enumerate() {
            filter.push(ms * MS, i);
        }
        assert_eq!(filter.best(), Some((RoundTrip { shortest: MS, last: 9 * MS }, 1)));
        filter.push(7 * MS, 8);
        filter.push(8 * MS, 9);
        assert_eq!(filter.best(), Some((RoundTrip { shortest: 7 * MS, last: 8 * MS }, 8)), "the 1 ms is nine ago");
    }

    /// A simulated exchange with unequal ways: the truth lies within the bound, and a short exchange improves it.
    #[tokio::test]
    async fn an_offset_is_within_its_error_bound_whichever_way_is_slow() {
        // The peer's wall clock is 5 s ahead; our wall clock shows the same as our monotonic one.
        const AHEAD_US: u64 = 5_000_000;
        let start = Instant::now();
        let us = |ms: u64| ms * 1000;
        let exchange = Exchange::default();
        let mut bounds = Vec::new();
        for (seq, (there, held, back)) in [(1, 50, 40), (40, 50, 1), (2, 700, 3)].into_iter().enumerate() {
            let (seq, begin) = (seq as u64, seq as u64 * 10_000);
            exchange.sending("a", 1, seq, start + begin as u32 * MS);
            let sent = begin + there + held;
            let echo = Echo { peer: "a".to_owned(), incarnation: 1, seq, held_us: us(held) };
            let arrived = sent + back;
            let answer = heard("b", seq, us(sent) + AHEAD_US, Some(echo));
            exchange.heard(&answer, start + arrived as u32 * MS, us(arrived));
            let offset = exchange.offset("b").expect("an echo came back");
            assert!((offset.ahead_seconds - 5.0).abs() <= offset.error.as_secs_f64() + 1e-9, "{offset:?}");
            bounds.push(offset.error);
        }
        assert_eq!(bounds, [20_500 * MS / 1000, 20_500 * MS / 1000, 2_500 * MS / 1000]);
    }

    #[tokio::test]
    async fn echoes_take_turns_and_unknown_or_impossible_ones_count_for_nothing() {
        let now = Instant::now();
        let exchange = Exchange::default();
        for peer in ["me", "x", "y"] {
            exchange.heard(&heard(peer, 1, 0, None), now, 0);
        }
        let one = exchange.echo("me", now + MS).expect("somebody was heard").peer;
        let other = exchange.echo("me", now + 2 * MS).expect("somebody else was heard").peer;
        assert!(one != other && one != "me" && other != "me");
        assert!(exchange.echo("me", now + 3 * MS).is_none(), "everything heard was echoed");
        let echo = |seq, held_us| Some(Echo { peer: "me".to_owned(), incarnation: 1, seq, held_us });
        exchange.sending("me", 1, 7, now);
        exchange.heard(&heard("x", 2, 0, echo(8, 0)), now + MS, 0);
        exchange.heard(&heard("x", 3, 0, echo(7, 2000)), now + MS, 0);
        assert!(exchange.offset("x").is_none());
        exchange.heard(&heard("x", 4, 0, echo(7, 400)), now + MS, 0);
        assert!(exchange.offset("x").is_some());
        exchange.keep(&[heard("x", 5, 0, None)]);
        assert!(exchange.offset("x").is_some() && exchange.state().heard.len() == 1);
        exchange.forget("x");
        assert!(exchange.offset("x").is_none());
    }
}
