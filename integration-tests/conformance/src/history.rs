//! Histories of one key, and whether they are linearizable.
//!
//! Promise: [`check`] accepts a history exactly if all its answered calls, and some of those whose outcome is not known,
//! can be put in one order that explains every answer, in which a call that was answered before another began comes
//! first, and the calls of one client keep their order. Search after Wing and Gong, "Testing and verifying concurrent
//! objects" (1993), with Lowe's memory of configurations already seen (2017).

use std::{
    collections::HashSet,
    sync::atomic::{AtomicU64, Ordering},
};

/// What was asked for. Every written value is written once in a history, so a value stands for its revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Get,
    Put(u64),
    Create(u64),
    Swap { from: u64, to: u64 },
    Delete { from: u64 },
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Found(Option<u64>),
    Applied,
    Refused,
    /// Nobody knows: it may take effect at any time after it began, or never.
    Unknown,
}

/// One call of a history.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    /// Who made it; one call at a time.
    pub(crate) client: usize,
    pub(crate) call: Call,
    pub(crate) answer: Answer,
    /// Ticks of one [`Order`].
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

/// Says what came first, also where a paused clock does not.
#[derive(Debug, Default)]
pub(crate) struct Order(AtomicU64);

impl Order {
    pub(crate) fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

/// How strong reads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    Linearizable,
    /// They may be old, but never older than what this client has seen or written.
    Sequential,
}

type Done = Vec<u64>;

struct Search<'a> {
    events: &'a [Event],
    reads: Reads,
    seen: HashSet<(Done, Option<u64>)>,
    /// How many answered calls there are, and how many of them the best order so far explains.
    answered: usize,
    best: usize,
}

/// A search that has seen so many configurations is given up: it would outlast the test.
const MOST_SEEN: usize = 1 << 21;

/// `Err` tells how far an explanation got.
pub(crate) fn check(events: &[Event], reads: Reads) -> Result<(), String> {
    let answered = events.iter().filter(|event| event.answer != Answer::Unknown).count();
    let mut search = Search { events, reads, seen: HashSet::new(), answered, best: 0 };
    if search.explain(&mut vec![0; events.len().div_ceil(64)], None, answered) {
        return Ok(());
    }
    let mut listed: Vec<_> = events.iter().collect();
    listed.sort_by_key(|event| event.began);
    let line = |e: &&Event| format!("  {}–{} client {} {:?} -> {:?}", e.began, e.ended, e.client, e.call, e.answer);
    let lines: Vec<_> = listed.iter().map(line).collect();
    let found = if search.seen.len() < MOST_SEEN { "no order explains" } else { "given up; no order found explains" };
    Err(format!("{found} more than {} of {answered} answers:\n{}", search.best, lines.join("\n")))
}

impl Search<'_> {
    /// Whether the calls that are not done can follow, from this state.
    fn explain(&mut self, done: &mut Done, state: Option<u64>, left: usize) -> bool {
        if left == 0 {
            return true;
        }
        if self.seen.len() >= MOST_SEEN || !self.seen.insert((done.clone(), state)) {
            return false;
        }
        self.best = self.best.max(self.answered - left);
        for (i, event) in self.events.iter().enumerate() {
            if is_done(done, i) || !self.may_be_next(done, i) {
                continue;
            }
            let Some(next) = apply(event, state) else { continue };
            // An unknown call that changes nothing need not be placed.
            if event.answer == Answer::Unknown && next == state {
                continue;
            }
            done[i / 64] |= 1 << (i % 64);
            if self.explain(done, next, left - usize::from(event.answer != Answer::Unknown)) {
                return true;
            }
            done[i / 64] &= !(1 << (i % 64));
        }
        false
    }

    fn may_be_next(&self, done: &Done, i: usize) -> bool {
        let event = &self.events[i];
        // A read that may be old can come before what others were answered earlier, never before its own client's.
        let free = event.call == Call::Get && self.reads == Reads::Sequential;
        self.events.iter().enumerate().all(|(j, other)| {
            let comes_first = other.ended < event.began && (other.client == event.client || !free);
            j == i || is_done(done, j) || other.answer == Answer::Unknown || !comes_first
        })
    }
}

fn is_done(done: &Done, i: usize) -> bool {
    done[i / 64] >> (i % 64) & 1 == 1
}

/// The state after the call, if the state before it explains the answer.
fn apply(event: &Event, state: Option<u64>) -> Option<Option<u64>> {
    let (holds, after) = match event.call {
        Call::Get => (true, state),
        Call::Put(value) => (true, Some(value)),
        Call::Create(value) => (state.is_none(), Some(value)),
        Call::Swap { from, to } => (state == Some(from), Some(to)),
        Call::Delete { from } => (state == Some(from), None),
    };
    match event.answer {
        Answer::Found(value) => (value == state).then_some(state),
        Answer::Applied => holds.then_some(after),
        Answer::Refused => (!holds).then_some(state),
        Answer::Unknown => Some(if holds { after } else { state }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(client, call, answer, began, ended)`.
    fn history(calls: &[(usize, Call, Answer, u64, u64)]) -> Vec<Event> {
        let event = |&(client, call, answer, began, ended)| Event { client, call, answer, began, ended };
        calls.iter().map(event).collect()
    }

    use Answer::*;
    use Call::*;

    fn holds(calls: &[(usize, Call, Answer, u64, u64)]) -> bool {
        check(&history(calls), Reads::Linearizable).is_ok()
    }

    #[test]
    fn overlapping_calls_may_take_effect_in_either_order() {
        assert!(holds(&[(0, Put(1), Applied, 0, 10), (1, Get, Found(None), 5, 6), (2, Get, Found(Some(1)), 5, 6)]));
        assert!(holds(&[(0, Put(1), Applied, 0, 10), (1, Put(2), Applied, 0, 10), (2, Get, Found(Some(1)), 11, 12)]));
    }

    #[test]
    fn a_stale_read_is_caught() {
        let stale = [(0, Put(1), Applied, 0, 1), (1, Get, Found(None), 2, 3)];
        assert!(!holds(&stale));
        assert!(check(&history(&stale), Reads::Sequential).is_ok(), "another client's write may be seen late");
        let own = [(0, Put(1), Applied, 0, 1), (0, Get, Found(None), 2, 3)];
        assert!(check(&history(&own), Reads::Sequential).is_err(), "one's own may not");
    }

    #[test]
    fn a_read_that_goes_back_is_caught() {
        let back = [(0, Put(1), Applied, 0, 10), (1, Get, Found(Some(1)), 1, 2), (1, Get, Found(None), 3, 4)];
        assert!(!holds(&back));
        assert!(check(&history(&back), Reads::Sequential).is_err());
    }

    #[test]
    fn a_read_of_the_future_is_caught() {
        let early = [(1, Get, Found(Some(1)), 0, 1), (0, Put(1), Applied, 2, 3)];
        assert!(!holds(&early));
        assert!(check(&history(&early), Reads::Sequential).is_err());
    }

    #[test]
    fn two_winners_of_one_swap_are_caught() {
        let both = [
            (0, Put(1), Applied, 0, 1),
            (1, Swap { from: 1, to: 2 }, Applied, 2, 9),
            (2, Swap { from: 1, to: 3 }, Applied, 2, 9),
        ];
        assert!(!holds(&both));
        let one = [both[0], both[1], (2, Swap { from: 1, to: 3 }, Refused, 2, 9)];
        assert!(holds(&one));
    }

    #[test]
    fn a_refusal_without_a_reason_is_caught() {
        assert!(!holds(&[(0, Put(1), Applied, 0, 1), (1, Swap { from: 1, to: 2 }, Refused, 2, 3)]));
        assert!(!holds(&[(0, Create(1), Refused, 0, 1)]));
        assert!(!holds(&[
            (0, Put(1), Applied, 0, 1),
            (1, Delete { from: 1 }, Applied, 2, 3),
            (0, Get, Found(Some(1)), 4, 5)
        ]));
    }

    #[test]
    fn an_unknown_write_may_land_late_or_never_but_only_once() {
        let unknown = (0, Put(1), Unknown, 0, 1);
        assert!(holds(&[unknown, (1, Get, Found(None), 2, 3), (1, Get, Found(Some(1)), 4, 5)]));
        assert!(holds(&[unknown, (1, Get, Found(None), 2, 3)]));
        let twice =
            [unknown, (1, Get, Found(Some(1)), 2, 3), (1, Put(2), Applied, 4, 5), (1, Get, Found(Some(1)), 6, 7)];
        assert!(!holds(&twice), "a write that was repeated behind the caller's back");
    }
}
