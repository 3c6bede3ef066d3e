//! Consistent hashing with bounded loads.

use super::{Node, Partitioner, Ring};

/// A [`Ring`] on which no node gets more than its bound: a key whose node is full goes to the next that is not.
///
/// V. Mirrokni, M. Thorup, M. Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016). The bound is `percent` of
/// a node's fair share of all that is assigned, rounded up, and holds at every assignment. The tighter it is, the
/// longer the walk and the more keys a change moves: with 125 % a lookup sees a few nodes. Costs are the ring's, and
/// those of the walk.
///
/// It counts, so it is for one owner: a coordinator that spreads partitions, or a queue that spreads jobs. A balancer
/// has [`Strategy::BoundedHash`](crate::balance::Strategy::BoundedHash), which goes by the requests in flight.
#[derive(Debug, Clone)]
pub struct BoundedLoad {
    ring: Ring,
    percent: u32,
    loads: Vec<u64>,
    total: u64,
}

impl BoundedLoad {
    /// The usual bound: a quarter above the fair share.
    pub const PERCENT: u32 = 125;

    /// Over this ring, with nothing assigned; no node shall have more than `percent` of its fair share. Less than 100
    /// cannot be kept and counts as 100.
    pub fn new(ring: Ring, percent: u32) -> Self {
        let loads = vec![0; ring.nodes().len()];
        Self { ring, percent: percent.max(100), loads, total: 0 }
    }

    /// Assigns the key, or job, and counts it; `None` if there is no node.
    pub fn assign(&mut self, key: &[u8]) -> Option<&str> {
        let place = self.place(key)?;
        self.loads[place] += 1;
        self.total += 1;
        Some(&self.ring.nodes()[place].name)
    }

    /// Takes one back from the node; `false` if it has none, or is not known.
    pub fn release(&mut self, node: &str) -> bool {
        let Some(load) = self.place_of(node).map(|place| &mut self.loads[place]).filter(|load| **load > 0) else {
            return false;
        };
        *load -= 1;
        self.total -= 1;
        true
    }

    /// How much is assigned to the node; `None` if it is not known.
    pub fn load(&self, node: &str) -> Option<u64> {
        self.place_of(node).map(|place| self.loads[place])
    }

    fn place_of(&self, node: &str) -> Option<usize> {
        self.ring.nodes().binary_search_by(|known| known.name.as_str().cmp(node)).ok()
    }

    fn place(&self, key: &[u8]) -> Option<usize> {
        let weights: u64 = self.ring.nodes().iter().map(|node| u64::from(node.weight)).sum();
        let room = |place: &usize| {
            self.loads[*place] < bound(self.percent, self.total + 1, self.ring.nodes()[*place].weight, weights)
        };
        // There is always room: the bounds add up to more than what is assigned.
        self.ring.walk(key).find(room)
    }
}

/// How much a node may have when there is `total` in all: `percent` of its fair share, rounded up.
pub(crate) fn bound(percent: u32, total: u64, weight: u32, weights: u64) -> u64 {
    let share = u128::from(percent) * u128::from(total) * u128::from(weight);
    u64::try_from(share.div_ceil(100 * u128::from(weights.max(1)))).unwrap_or(u64::MAX)
}

/// Where a key would be assigned now.
impl Partitioner for BoundedLoad {
    fn nodes(&self) -> &[Node] {
        self.ring.nodes()
    }

    fn lookup(&self, key: &[u8]) -> Option<&str> {
        self.place(key).map(|place| self.ring.nodes()[place].name.as_str())
    }
}
