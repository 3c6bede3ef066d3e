//! The consistent hash ring.

use super::{Node, Partitioner, hash, mix, portions, sorted};

/// Beyond it all nodes' points are halved until they fit: 20 MiB.
const MAX_POINTS: u64 = 1 << 20;

/// Nodes have points on a ring; a key belongs to the node of the next point.
///
/// D. Karger et al., "Consistent Hashing and Random Trees" (STOC 1997), with virtual nodes as in memcached's ketama.
/// With [`POINTS`](Self::POINTS) points a node's share is within about 25 % of what its weight says (three standard
/// deviations of 8 %); four times the points halve that. A change of one node moves the least possible, and the nodes
/// behind the first are where its keys go when it leaves: [`lookup_n`](Self::lookup_n) gives them, for replicas. A
/// lookup takes a step or two, whatever the size; making a ring, or changing it, sorts all points.
///
/// ```
/// use quorate_core::hash::{Node, Partitioner as _, Ring};
///
/// let ring = Ring::new(["a", "b", "c"]);
/// let home = ring.lookup(b"order-42").expect("there are nodes");
/// assert_eq!(ring.lookup_n(b"order-42", 2)[0], home);
/// assert_eq!(Ring::new([Node::new("a", 1), Node::new("b", 2)]).nodes().len(), 2);
/// ```
#[derive(Debug, Clone)]
pub struct Ring {
    nodes: Vec<Node>,
    /// The place on the ring and in `nodes`, in the order of the ring. If two nodes' points meet, the first name's is
    /// ahead on every ring that has both.
    points: Vec<(u64, u32)>,
    /// For each part of the ring, of as many as there are points or a few more, how many points lie before it. Points
    /// are spread evenly, so that a search that begins there takes a step or two.
    parts: Vec<u32>,
    per_weight: u32,
    max_points: u64,
}

impl Ring {
    /// How many points a unit of weight has, unless said otherwise.
    pub const POINTS: u32 = 160;

    /// Over these nodes, with [`POINTS`](Self::POINTS) points for each unit of weight.
    pub fn new(nodes: impl IntoIterator<Item = impl Into<Node>>) -> Self {
        Self::with_points(nodes, Self::POINTS)
    }

    /// With this many points, at least one, for each unit of weight: more make the shares more even. Beyond 2²⁰ points
    /// in all, every node's are halved until they fit.
    pub fn with_points(nodes: impl IntoIterator<Item = impl Into<Node>>, per_weight: u32) -> Self {
        Self::limited(nodes, per_weight, MAX_POINTS)
    }

    /// With another limit than 2²⁰: fewer points take less time to sort.
    pub(crate) fn limited(nodes: impl IntoIterator<Item = impl Into<Node>>, per_weight: u32, max_points: u64) -> Self {
        let (nodes, per_weight) = (sorted(nodes), per_weight.max(1));
        let mut ring = Self { nodes, points: Vec::new(), parts: Vec::new(), per_weight, max_points };
        ring.place();
        ring
    }

    /// Adds a node; returns the one of the same name that it replaces, if there was one.
    pub fn insert(&mut self, node: impl Into<Node>) -> Option<Node> {
        let node = node.into();
        let replaced = self.nodes.iter().find(|old| old.name == node.name).cloned();
        self.nodes = sorted(self.nodes.drain(..).chain([node]));
        self.place();
        replaced
    }

    /// Takes a node away; `None` if there was none of this name.
    pub fn remove(&mut self, name: &str) -> Option<Node> {
        let place = self.nodes.iter().position(|node| node.name == name)?;
        let removed = self.nodes.remove(place);
        self.place();
        Some(removed)
    }

    fn place(&mut self) {
        let portions = portions(&self.nodes, self.per_weight, self.max_points);
        let points = (0..).zip(&self.nodes).zip(portions).flat_map(|((place, node), points)| {
            let name = hash(node.name.as_bytes());
            (0..points).map(move |point| (mix(name, point), place))
        });
        self.points = points.collect();
        self.points.sort_unstable();
        let parts = self.points.len().next_power_of_two().max(2);
        let mut before = vec![0; parts + 1];
        for (point, _) in &self.points {
            before[part(*point, parts) + 1] += 1;
        }
        self.parts = before
            .iter()
            .scan(0, |total, count| {
                *total += count;
                Some(*total)
            })
            .take(parts)
            .collect();
    }

    /// The place of the first point that is not before the hash; behind the last if there is none.
    fn search(&self, hash: u64) -> usize {
        let start = self.parts[part(hash, self.parts.len())] as usize;
        start + self.points[start..].iter().take_while(|(point, _)| *point < hash).count()
    }

    /// The first `n` different nodes from the key on, or all if there are fewer: the first is that of
    /// [`lookup`](Partitioner::lookup), and each is where the key goes if those before it leave.
    pub fn lookup_n(&self, key: &[u8], n: usize) -> Vec<&str> {
        self.lookup_n_without(key, n, |_| false)
    }

    /// The same, as if the nodes that `ignore` names were not there.
    pub fn lookup_n_without(&self, key: &[u8], n: usize, ignore: impl Fn(&str) -> bool) -> Vec<&str> {
        let name = |place: usize| self.nodes[place].name.as_str();
        let mut seen = vec![false; self.nodes.len()];
        let fresh = self.walk(key).filter(|place| !std::mem::replace(&mut seen[*place], true));
        fresh.map(name).filter(|name| !ignore(name)).take(n).collect()
    }

    /// The places in `nodes` of all points from the key on, once round. A node comes as often as it has points.
    pub(crate) fn walk(&self, key: &[u8]) -> impl Iterator<Item = usize> {
        let hash = hash(key);
        let (before, after) = self.points.split_at(self.search(hash));
        after.iter().chain(before).map(|(_, place)| *place as usize)
    }
}

/// Which part of the ring a hash lies in, of a power of two of at least two parts.
fn part(hash: u64, parts: usize) -> usize {
    (hash >> (64 - parts.trailing_zeros())) as usize
}

impl Partitioner for Ring {
    fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn lookup(&self, key: &[u8]) -> Option<&str> {
        self.walk(key).next().map(|place| self.nodes[place].name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_finds_what_a_binary_search_finds() {
        for (nodes, points) in [(0, 1), (1, 1), (2, 1), (3, 5), (10, 160)] {
            let ring = Ring::with_points((0..nodes).map(|i| i.to_string()), points);
            let near = ring.points.iter().flat_map(|(point, _)| [point.wrapping_sub(1), *point, point.wrapping_add(1)]);
            for hash in near.chain([0, 1, u64::MAX / 2, u64::MAX / 2 + 1, u64::MAX - 1, u64::MAX]) {
                assert_eq!(ring.search(hash), ring.points.partition_point(|(point, _)| *point < hash), "{hash:x}");
            }
        }
    }
}
