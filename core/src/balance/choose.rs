//! The strategies, and those that need nothing but a number.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    hashed::{self, Hashed},
    load::{LeastRequests, PeakEwma},
    member::Member,
    weighted,
};

/// How an instance is picked out of those that may be.
///
/// | strategy | costs | goes by weight |
/// |---|---|---|
/// | `RoundRobin`, `Random`, `Sticky` | O(1) | no |
/// | `Weighted` | O(1); O(n) in the first cycle | yes |
/// | `LeastRequests` | O(n) | yes |
/// | `PeakEwma` | O(1) | no |
/// | `ConsistentHash` | O(1), expected | yes |
/// | `BoundedHash` | O(1), expected; O(n) where the key's own instance is busy | yes |
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Strategy {
    /// One after another in the order of service and id, beginning anywhere, so that many clients do not begin with
    /// the same. Goes on where it was when the set changes.
    RoundRobin,
    /// Any, each with the same probability.
    Random,
    /// Smooth weighted round robin, as nginx does it: in each cycle of as many picks as the weights add up to (after
    /// division by their common divisor) every instance is picked as often as its weight says, spread out as evenly
    /// as possible. Weights that make a cycle of more than 2²⁰ picks are halved until they do not, so that shares are
    /// exact to about one in a thousand with 1,000 instances. A change of the set or its weights begins a new cycle.
    ///
    /// The first cycle is computed as it is picked, in pieces of 64, by one task under a lock, on which others that
    /// need the same piece wait for some 64 × n nanoseconds; from then on it is looked up without a lock.
    Weighted,
    /// The one with the fewest requests in flight for its weight; any of those if there are several.
    LeastRequests,
    /// Of two that are picked at random, the one that is likely to answer sooner: see [`PeakEwma`].
    PeakEwma(PeakEwma),
    /// The one that the key belongs to on a [`Ring`](crate::hash::Ring) of all passing instances; those that may not
    /// be picked now are passed over, so that only their keys move, and move back. The ring has at most 2¹⁸ points. Without a key, as with a random one.
    ConsistentHash,
    /// The same, but for instances that have too many requests in flight: their keys go to the next, as with
    /// [`BoundedLoad`](crate::hash::BoundedLoad).
    BoundedHash {
        /// How many requests an instance may have, in percent of its fair share of all in flight, rounded up. 125 is
        /// usual; less than 100 counts as 100.
        percent: u32,
    },
    /// Always the same, chosen at random, until it may no longer be picked; then it settles on another, for good.
    Sticky,
}

impl Strategy {
    /// [`PeakEwma`] as it is by default.
    pub fn peak_ewma() -> Self {
        Self::PeakEwma(PeakEwma::default())
    }

    /// What picks out of `members`, of which there is at least one. They are those of the `passing` at the places
    /// `pickable`.
    pub(super) fn chooser(
        &self,
        passing: &[Arc<Member>],
        pickable: &[usize],
        members: &[Arc<Member>],
        kept: &mut Kept,
    ) -> Box<dyn Chooser> {
        match self {
            Self::RoundRobin => Box::new(RoundRobin(Arc::clone(kept.turn.get_or_insert_with(random_turn)))),
            Self::Random => Box::new(Random),
            Self::Weighted => Box::new(weighted::chooser(members, &mut kept.sequence)),
            Self::LeastRequests => Box::new(LeastRequests),
            Self::PeakEwma(ewma) => Box::new(ewma.clone()),
            Self::ConsistentHash => Box::new(Hashed::new(hashed::ring(passing, &mut kept.ring), pickable, None)),
            Self::BoundedHash { percent } => {
                Box::new(Hashed::new(hashed::ring(passing, &mut kept.ring), pickable, Some((*percent).max(100))))
            }
            Self::Sticky => Box::new(Sticky::settle(members, &mut kept.settled)),
        }
    }
}

/// Picks out of the members of one view.
pub(super) trait Chooser: fmt::Debug + Send + Sync {
    /// The place of a member, or `None` if there is none.
    fn choose(&self, members: &[Arc<Member>], key: Option<&[u8]>, now: u64) -> Option<usize>;

    /// The same, out of those that are open; of a chooser that goes by what it is given and nothing else.
    fn choose_open(&self, members: &[Arc<Member>], open: Open<'_>, key: Option<&[u8]>, now: u64) -> Option<usize> {
        let places: Vec<_> = (0..members.len()).filter(|place| open(*place)).collect();
        let members: Vec<_> = places.iter().map(|place| Arc::clone(&members[*place])).collect();
        self.choose(&members, key, now).map(|place| places[place])
    }
}

/// Says of a place whether it may be chosen.
pub(super) type Open<'a> = &'a dyn Fn(usize) -> bool;

/// Any that is open.
pub(super) fn any(count: usize, open: Open<'_>) -> Option<usize> {
    let places: Vec<_> = (0..count).filter(|place| open(*place)).collect();
    (!places.is_empty()).then(|| places[rand::random_range(0..places.len())])
}

/// What the strategies keep from one view to the next.
#[derive(Debug, Default)]
pub(super) struct Kept {
    turn: Option<Arc<AtomicUsize>>,
    sequence: Option<weighted::Last>,
    ring: Option<Arc<crate::hash::Ring>>,
    /// Service and id.
    settled: Option<(String, String)>,
}

/// Where there are no members.
#[derive(Debug)]
pub(super) struct Nobody;

impl Chooser for Nobody {
    fn choose(&self, _: &[Arc<Member>], _: Option<&[u8]>, _: u64) -> Option<usize> {
        None
    }
}

#[derive(Debug)]
struct RoundRobin(Arc<AtomicUsize>);

/// Far from where it would wrap around, where the order breaks once.
fn random_turn() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(rand::random::<u16>().into()))
}

impl Chooser for RoundRobin {
    fn choose(&self, members: &[Arc<Member>], _: Option<&[u8]>, _: u64) -> Option<usize> {
        self.0.fetch_add(1, Ordering::Relaxed).checked_rem(members.len())
    }

    fn choose_open(&self, members: &[Arc<Member>], open: Open<'_>, key: Option<&[u8]>, now: u64) -> Option<usize> {
        let mut turns = members.iter().filter_map(|_| self.choose(members, key, now));
        // Others take turns meanwhile.
        turns.find(|place| open(*place)).or_else(|| any(members.len(), open))
    }
}

#[derive(Debug)]
struct Random;

impl Chooser for Random {
    fn choose(&self, members: &[Arc<Member>], _: Option<&[u8]>, _: u64) -> Option<usize> {
        (!members.is_empty()).then(|| rand::random_range(0..members.len()))
    }
}

#[derive(Debug)]
struct Sticky(usize);

impl Sticky {
    fn settle(members: &[Arc<Member>], settled: &mut Option<(String, String)>) -> Self {
        let is = |member: &Arc<Member>, (service, id): &(String, String)| {
            member.instance.service == *service && member.instance.id == *id
        };
        let stays = settled.as_ref().and_then(|name| members.iter().position(|member| is(member, name)));
        let place = stays.unwrap_or_else(|| rand::random_range(0..members.len()));
        let instance = &members[place].instance;
        *settled = Some((instance.service.clone(), instance.id.clone()));
        Self(place)
    }
}

impl Chooser for Sticky {
    fn choose(&self, _: &[Arc<Member>], _: Option<&[u8]>, _: u64) -> Option<usize> {
        Some(self.0)
    }

    fn choose_open(&self, members: &[Arc<Member>], open: Open<'_>, _: Option<&[u8]>, _: u64) -> Option<usize> {
        if open(self.0) { Some(self.0) } else { any(members.len(), open) }
    }
}
