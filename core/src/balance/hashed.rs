//! Consistent hashing, with and without bounded loads.

use std::sync::Arc;

use super::{
    choose::{Chooser, Open},
    member::Member,
};
use crate::hash::{Node, Partitioner as _, Ring, bound};

/// A quarter of what a ring may have otherwise, so that `set` does not hold up its caller's thread for long. It keeps all
/// points of 1,000 instances of weight 1.
const MAX_POINTS: u64 = 1 << 18;

/// The ring of all that pass, with those that may not be picked now: making one is slow, and so an ejection needs
/// none. The same as the last, if it has the same names and weights.
///
/// The name of a node is service, zero, id.
pub(super) fn ring(passing: &[Arc<Member>], last: &mut Option<Arc<Ring>>) -> Arc<Ring> {
    let name = |m: &Arc<Member>| Node::new(format!("{}\0{}", m.instance.service, m.instance.id), m.weight());
    let nodes: Vec<_> = passing.iter().map(name).collect();
    match last {
        // Services and ids sort as the names do, because zero is the least of all characters.
        Some(ring) if ring.nodes() == nodes => Arc::clone(ring),
        _ => Arc::clone(last.insert(Arc::new(Ring::limited(nodes, Ring::POINTS, MAX_POINTS)))),
    }
}

#[derive(Debug)]
pub(super) struct Hashed {
    ring: Arc<Ring>,
    /// For each node of the ring, its place among the members, unless it may not be picked.
    places: Vec<Option<usize>>,
    percent: Option<u32>,
}

impl Hashed {
    pub(super) fn new(ring: Arc<Ring>, pickable: &[usize], percent: Option<u32>) -> Self {
        let mut places = vec![None; ring.nodes().len()];
        pickable.iter().enumerate().for_each(|(place, node)| places[*node] = Some(place));
        Self { ring, places, percent }
    }
}

impl Chooser for Hashed {
    fn choose(&self, members: &[Arc<Member>], key: Option<&[u8]>, now: u64) -> Option<usize> {
        self.choose_open(members, &|_| true, key, now)
    }

    fn choose_open(&self, members: &[Arc<Member>], open: Open<'_>, key: Option<&[u8]>, _: u64) -> Option<usize> {
        let random;
        let key = match key {
            Some(key) => key,
            None => {
                random = rand::random::<[u8; 8]>();
                &random
            }
        };
        let mut walk = self.ring.walk(key).filter_map(|node| self.places[node]).filter(|place| open(*place));
        let home = walk.next()?;
        let Some(percent) = self.percent else { return Some(home) };
        // One request is within any bound, so that an idle home needs no sum over all.
        if members[home].state.in_flight() == 0 {
            return Some(home);
        }
        let total: u64 = members.iter().map(|member| member.state.in_flight()).sum();
        let weights: u64 = members.iter().map(|member| u64::from(member.weight())).sum();
        let room = |place: &usize| {
            let member = &members[*place];
            member.state.in_flight() < bound(percent, total + 1, member.weight(), weights)
        };
        // All may be full by now, if others have picked meanwhile.
        Some(if room(&home) { home } else { walk.find(room).unwrap_or(home) })
    }
}
