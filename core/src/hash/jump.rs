//! Jump consistent hash.

use super::{Node, Partitioner, ends, hash, portions};

/// The algorithm draws 31 random bits for each jump; with more buckets than that it would not be even.
const MAX_BUCKETS: u64 = 1 << 31;

/// The bucket, from 0, of a hashed key among this many; `None` if there are none.
///
/// J. Lamping, E. Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm" (2014). The shares are even; one bucket
/// more moves only the keys that go into it. It takes O(ln buckets) steps and no memory. Its results are those of
/// Google's implementation.
pub fn jump(key: u64, buckets: u32) -> Option<u32> {
    let (mut state, mut bucket, mut next) = (key, 0, 0);
    while next < u64::from(buckets) {
        bucket = next;
        state = state.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        // IEEE division and multiplication are exact to the last bit on every platform; the paper counts on it too.
        let leap = (1_u64 << 31) as f64 / ((state >> 33) + 1) as f64;
        next = ((bucket + 1) as f64 * leap) as u64;
    }
    (buckets > 0).then(|| u32::try_from(bucket).expect("it is less than `buckets`"))
}

/// [`jump`] over a list of nodes: the place of a node in the list counts, not its name.
///
/// For shards that are numbered and are added and removed at the end of the list, where it moves the least possible;
/// a change elsewhere in the list moves keys of all nodes behind. A weight counts as that many buckets next to each
/// other. A lookup takes O(ln total weight) steps.
#[derive(Debug, Clone)]
pub struct Jump {
    nodes: Vec<Node>,
    ends: Vec<u64>,
}

impl Jump {
    /// Over these nodes, in this order. Of a name given twice the first place and the last weight count. Weights that
    /// make up more than 2³¹ are halved together until they do not.
    pub fn new(nodes: impl IntoIterator<Item = impl Into<Node>>) -> Self {
        let mut places = std::collections::HashMap::new();
        let mut kept: Vec<Node> = Vec::new();
        for node in nodes.into_iter().map(Into::into) {
            match places.get(&node.name) {
                Some(place) => kept[*place] = node,
                None => {
                    places.insert(node.name.clone(), kept.len());
                    kept.push(node);
                }
            }
        }
        kept.retain(|node| node.weight > 0);
        let ends = ends(portions(&kept, 1, MAX_BUCKETS));
        Self { nodes: kept, ends }
    }
}

impl Partitioner for Jump {
    fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn lookup(&self, key: &[u8]) -> Option<&str> {
        let buckets = u32::try_from(*self.ends.last()?).unwrap_or(u32::MAX);
        let bucket = u64::from(jump(hash(key), buckets)?);
        Some(&self.nodes[self.ends.partition_point(|end| *end <= bucket)].name)
    }
}
