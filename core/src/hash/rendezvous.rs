//! Rendezvous hashing: the highest score wins.

use super::{Node, Partitioner, hash, mix, sorted};

/// Every node has a score for every key; the highest wins.
///
/// D. Thaler, C. Ravishankar, "A Name-Based Mapping Scheme for Rendezvous" (1996); with weights, −w / ln h, after
/// C. Schindelhauer, G. Schomaker, "Weighted Distributed Hash Tables" (2005). Shares follow the weights exactly, in
/// expectation; a change of one node moves the least possible. A lookup looks at every node: O(n).
#[derive(Debug, Clone)]
pub struct Rendezvous {
    nodes: Vec<Node>,
    hashes: Vec<u64>,
    /// Then the order of the scores is that of the hashes, and no logarithm is needed.
    even: bool,
}

impl Rendezvous {
    /// Over these nodes.
    pub fn new(nodes: impl IntoIterator<Item = impl Into<Node>>) -> Self {
        let nodes = sorted(nodes);
        let hashes = nodes.iter().map(|node| hash(node.name.as_bytes())).collect();
        let even = nodes.windows(2).all(|pair| pair[0].weight == pair[1].weight);
        Self { nodes, hashes, even }
    }
}

/// Of the 53 bits that a float can hold. `libm`'s logarithm, because the platform's own may differ in the last bit.
fn score(bits: u64, weight: u32) -> f64 {
    let fraction = (bits as f64 + 0.5) / (1_u64 << 53) as f64;
    -f64::from(weight) / libm::log(fraction)
}

impl Partitioner for Rendezvous {
    fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn lookup(&self, key: &[u8]) -> Option<&str> {
        let key = hash(key);
        let scored = self.nodes.iter().zip(&self.hashes).map(|(node, name)| (node, mix(*name, key) >> 11));
        // Of equal scores the first name wins, hence the reversal: `max_by` returns the last.
        let best = if self.even {
            scored.rev().max_by_key(|(_, bits)| *bits).map(|(node, _)| node)
        } else {
            let scored = scored.map(|(node, bits)| (node, score(bits, node.weight)));
            scored.rev().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(node, _)| node)
        };
        best.map(|node| node.name.as_str())
    }
}
