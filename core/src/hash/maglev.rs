//! Maglev: a table filled by the nodes in turns.

use super::{Node, Partitioner, hash, mix, sorted};

/// A table whose entries the nodes take in turns, each in an order of its own.
///
/// D. Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016). Of nodes of the same
/// weight none has more than one entry more than another. A change of one node moves the least possible and a little
/// more, about 1–3 % of the keys with the usual size. A lookup is one look into the table. Making the table takes time
/// in proportion to size × ln size, and up to size × nodes if the weights differ greatly.
#[derive(Debug, Clone)]
pub struct Maglev {
    nodes: Vec<Node>,
    /// The place of a node in `nodes`; empty if there is none.
    table: Vec<u32>,
}

impl Maglev {
    /// The smaller of the paper's two sizes; a prime.
    pub const SIZE: u32 = 65_537;

    /// Over these nodes, with a table of [`SIZE`](Self::SIZE) entries.
    pub fn new(nodes: impl IntoIterator<Item = impl Into<Node>>) -> Self {
        Self::with_size(nodes, Self::SIZE)
    }

    /// With a table of at least this many entries: the next prime is taken. Shares are exact to one entry, so 100
    /// entries for each node keep them within 1 %. Another size is another mapping.
    pub fn with_size(nodes: impl IntoIterator<Item = impl Into<Node>>, at_least: u32) -> Self {
        let nodes = sorted(nodes);
        let table = fill(&nodes, prime_from(u64::from(at_least)));
        Self { nodes, table }
    }
}

/// A node's walk through the table: it visits every entry once, because the size is prime and the step is not zero.
struct Turn {
    at: u64,
    step: u64,
    weight: u64,
    /// A node is due in a round when round × weight has come up to this, which then grows by the greatest weight.
    due: u64,
}

fn fill(nodes: &[Node], size: u64) -> Vec<u32> {
    const FREE: u32 = u32::MAX;
    let Some(greatest) = nodes.iter().map(|node| u64::from(node.weight)).max() else { return Vec::new() };
    let turn = |node: &Node| {
        let name = hash(node.name.as_bytes());
        let (at, step) = (mix(name, 0) % size, mix(name, 1) % (size - 1) + 1);
        Turn { at, step, weight: u64::from(node.weight), due: 0 }
    };
    let mut turns: Vec<_> = nodes.iter().map(turn).collect();
    let mut table = vec![FREE; usize::try_from(size).expect("a table that fits into memory")];
    let mut left = size;
    for round in 0.. {
        for (node, turn) in (0..).zip(&mut turns) {
            if round * turn.weight < turn.due {
                continue;
            }
            turn.due += greatest;
            while table[turn.at as usize] != FREE {
                turn.at = (turn.at + turn.step) % size;
            }
            table[turn.at as usize] = node;
            left -= 1;
            if left == 0 {
                return table;
            }
        }
    }
    table
}

fn prime_from(at_least: u64) -> u64 {
    let is_prime = |n: &u64| (2..).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
    (at_least.max(3)..).find(is_prime).expect("there is no greatest prime")
}

impl Partitioner for Maglev {
    fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn lookup(&self, key: &[u8]) -> Option<&str> {
        let entry = hash(key).checked_rem(self.table.len() as u64)?;
        Some(&self.nodes[self.table[entry as usize] as usize].name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(maglev: &Maglev) -> Vec<usize> {
        let of = |node| maglev.table.iter().filter(|entry| **entry == node).count();
        (0..).take(maglev.nodes.len()).map(of).collect()
    }

    #[test]
    fn entries_follow_the_weights_to_one() {
        let maglev = Maglev::with_size(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], 1_000);
        assert_eq!(maglev.table.len(), 1_009, "the next prime is taken");
        assert!(entries(&maglev).iter().all(|count| [100, 101].contains(count)), "{:?}", entries(&maglev));
        let maglev = Maglev::with_size([Node::new("a", 1), Node::new("b", 3), Node::new("c", 7)], 1_100);
        let entries = entries(&maglev);
        for (entries, fair) in entries.iter().zip([100.3, 300.8, 701.9]) {
            assert!((*entries as f64 - fair).abs() <= 1.5, "{entries} of {fair}");
        }
    }

    #[test]
    fn more_nodes_than_entries_do_no_harm() {
        let maglev = Maglev::with_size((0..50).map(|i| i.to_string()), 7);
        assert_eq!(maglev.table.len(), 7);
        assert!(maglev.lookup(b"key").is_some());
    }
}
