//! Hash modulo the total weight.

use super::{Node, Partitioner, ends, hash, sorted};

/// The hash of the key modulo the total weight.
///
/// Shares are as exact as a hash can make them. A node more or less moves nearly every key, so it is for sets that
/// never change. A lookup is a binary search over the nodes: O(log n).
#[derive(Debug, Clone)]
pub struct Modulo {
    nodes: Vec<Node>,
    ends: Vec<u64>,
}

impl Modulo {
    /// Over these nodes, in the order of their names.
    pub fn new(nodes: impl IntoIterator<Item = impl Into<Node>>) -> Self {
        let nodes = sorted(nodes);
        let ends = ends(nodes.iter().map(|node| u64::from(node.weight)));
        Self { nodes, ends }
    }
}

impl Partitioner for Modulo {
    fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn lookup(&self, key: &[u8]) -> Option<&str> {
        let slot = hash(key) % self.ends.last()?;
        Some(&self.nodes[self.ends.partition_point(|end| *end <= slot)].name)
    }
}
