//! Which node a key belongs to.
//!
//! Promise: the answer depends on the key and on the set of nodes alone — not on the order in which the nodes were
//! named (but for [`Jump`], whose nodes are numbered), the process, the platform or the version of this crate: the
//! test vectors in `core/tests/hash.rs` are part of the contract. No node, no answer: `None`.
//!
//! | scheme | a lookup costs | memory | a node more or less moves | choose it |
//! |---|---|---|---|---|
//! | [`Modulo`] | O(log n) | O(n) | nearly every key | for a set that never changes |
//! | [`Ring`] | O(1), expected | 160 points per unit of weight | the least | by default; it alone gives successors |
//! | [`Jump`] | O(ln total weight) | O(n) | the least, at the end of the list only | for numbered shards |
//! | [`Rendezvous`] | O(n) | O(n) | the least | for up to some dozens of nodes, or weights that must hold exactly |
//! | [`Maglev`] | O(1) | the table, 256 KiB | the least and about 1–3 % more | for many lookups and the most even shares |
//! | [`BoundedLoad`] | O(1), expected, and a walk | as the ring | the least and what overflows | where no node may be overloaded |
//!
//! "The least" is the newcomer's share when it comes, and the leaver's when it goes; no key moves between two nodes
//! that stay.
//!
//! # The hash
//! Keys and names are hashed with XXH3 (64 bits, seed zero), which is specified and frozen. It is not keyed: whoever
//! may choose keys may choose them to fall on one node.

mod bounded;
mod jump;
mod maglev;
mod modulo;
mod rendezvous;
mod ring;

use std::{collections::BTreeMap, fmt};

use xxhash_rust::xxh3::xxh3_64;

pub use bounded::BoundedLoad;
pub(crate) use bounded::bound;
pub use jump::{Jump, jump};
pub use maglev::Maglev;
pub use modulo::Modulo;
pub use rendezvous::Rendezvous;
pub use ring::Ring;

/// A node that keys are mapped onto.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Its name. One name is one node: of two with the same name the later counts.
    pub name: String,
    /// Its share of the keys, relative to the others. A node of weight zero gets none.
    pub weight: u32,
}

impl Node {
    /// A node with this share of the keys.
    pub fn new(name: impl Into<String>, weight: u32) -> Self {
        Self { name: name.into(), weight }
    }
}

/// With weight 1.
impl From<&str> for Node {
    fn from(name: &str) -> Self {
        Self::new(name, 1)
    }
}

/// With weight 1.
impl From<String> for Node {
    fn from(name: String) -> Self {
        Self::new(name, 1)
    }
}

/// A way to map keys onto nodes.
pub trait Partitioner: fmt::Debug + Send + Sync {
    /// The nodes that have a share.
    fn nodes(&self) -> &[Node];

    /// The name of the node that the key belongs to; `None` if there is no node.
    fn lookup(&self, key: &[u8]) -> Option<&str>;
}

/// XXH3 of the key.
pub(crate) fn hash(key: &[u8]) -> u64 {
    xxh3_64(key)
}

/// One number out of two.
///
/// Not XXH3 with the second as its seed: for names of up to three bytes, seed and text are merely xor-ed before they
/// are mixed, so that `n10` with seed 0 and `n11` with seed 1 would be the same.
pub(crate) fn mix(first: u64, second: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&second.to_le_bytes());
    xxh3_64(&bytes)
}

/// In the order of their names, each once, without those that have no share.
fn sorted(nodes: impl IntoIterator<Item = impl Into<Node>>) -> Vec<Node> {
    let by_name: BTreeMap<_, _> = nodes.into_iter().map(Into::into).map(|node| (node.name, node.weight)).collect();
    by_name.into_iter().filter(|(_, weight)| *weight > 0).map(|(name, weight)| Node { name, weight }).collect()
}

/// How many of something each node gets: `unit` for each unit of weight, all of them halved until there are no more
/// than `limit` together, but at least one each.
///
/// Halved, not scaled to fit, so that a node more or less changes the others' numbers seldom.
fn portions(nodes: &[Node], unit: u32, limit: u64) -> Vec<u64> {
    let asked = |node: &Node| u64::from(node.weight) * u64::from(unit);
    let total: u128 = nodes.iter().map(|node| u128::from(asked(node))).sum();
    let halvings = (0..64).find(|halvings| total >> halvings <= u128::from(limit)).unwrap_or(63);
    nodes.iter().map(|node| (asked(node) >> halvings).max(1)).collect()
}

/// Running totals: the portion of node `i` ends before the `i`th of them.
fn ends(portions: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let add = |total: &mut u64, portion| {
        *total += portion;
        Some(*total)
    };
    portions.into_iter().scan(0, add).collect()
}
