//! Where things live in the tree.
//!
//! Promise: two keys never share a node, no key is taken for a ticket and no ticket for a key, and nothing of quorate's
//! own lies where a key, a line or a directory could lie.
//!
//! The tree is drawn in the crate's own documentation. Both encodings of names are injective because the core encodes
//! every `%` of a name.

use std::borrow::Cow;

use quorate_core::{Dir, Key, LeaseId, Ticket};

use crate::ticket;

/// How many generations there are. Part of the layout: all clients must agree.
pub(crate) const SHARDS: u64 = 64;

/// The tree below one namespace.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Empty, or `/` and the namespace.
    root: String,
}

impl Layout {
    pub(crate) fn new(namespace: &str) -> Self {
        Self { root: if namespace.is_empty() { String::new() } else { format!("/{namespace}") } }
    }

    /// The namespace's own node.
    pub(crate) fn top(&self) -> &str {
        if self.root.is_empty() { "/" } else { &self.root }
    }

    pub(crate) fn dir(&self, dir: &Dir) -> String {
        format!("{}/{dir}", self.root)
    }

    pub(crate) fn key(&self, key: &Key) -> String {
        format!("{}/{}/{}", self.root, key.dir(), stored(key.encoded()))
    }

    pub(crate) fn ticket(&self, ticket: &Ticket) -> String {
        format!("{}/{}/{}", self.root, ticket.line, ticket.name)
    }

    pub(crate) fn generation(&self, shard: u64) -> String {
        format!("{}/.gen/{shard:02x}", self.root)
    }

    pub(crate) fn lease(&self, id: &LeaseId) -> String {
        format!("{}/.lease/{id}", self.root)
    }

    /// A node that is there only within one transaction, for the time it carries.
    pub(crate) fn clock(&self) -> String {
        format!("{}/.clock", self.root)
    }

    /// The node above.
    pub(crate) fn parent(path: &str) -> &str {
        path.rsplit_once('/').map_or("", |(parent, _)| parent)
    }

    /// The namespace's own node and those above it, topmost first.
    pub(crate) fn namespace_nodes(&self) -> Vec<&str> {
        prefixes(&self.root, 0)
    }

    /// This node and those between it and the namespace, topmost first.
    pub(crate) fn nodes_down_to<'a>(&self, path: &'a str) -> Vec<&'a str> {
        prefixes(path, self.root.len())
    }

    /// Which generation a key belongs to.
    pub(crate) fn shard(key: &Key) -> u64 {
        // FNV-1a: the same on every machine and in every version, which std's hashers do not promise.
        let bytes = key.dir().as_str().bytes().chain([b'/']).chain(key.encoded().bytes());
        let hash = bytes
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        hash % SHARDS
    }
}

/// Every node on the way down `path` that is longer than `above` bytes, the last one included.
fn prefixes(path: &str, above: usize) -> Vec<&str> {
    let inner = path.match_indices('/').map(|(i, _)| i).filter(|i| *i > above);
    inner.chain([path.len()]).filter(|end| *end > above).map(|end| &path[..end]).collect()
}

/// The node name of a key.
fn stored(encoded: &str) -> Cow<'_, str> {
    let flat = if encoded.contains('/') { Cow::Owned(encoded.replace('/', "%2F")) } else { Cow::Borrowed(encoded) };
    if ticket::read(&flat).is_none() {
        return flat;
    }
    // Tickets end in a digit.
    let (head, digit) = flat.split_at(flat.len() - 1);
    Cow::Owned(format!("{head}%3{digit}"))
}

/// The encoded name behind a node name; `None` if the node is a ticket.
pub(crate) fn encoded(stored: &str) -> Option<Cow<'_, str>> {
    if ticket::read(stored).is_some() {
        return None;
    }
    if !stored.contains('%') {
        return Some(Cow::Borrowed(stored));
    }
    let mut flat = stored.to_owned();
    if let Some(at) = stored.len().checked_sub(3).filter(|at| stored.get(*at..at + 2) == Some("%3")) {
        let plain = format!("{}{}", &stored[..at], &stored[at + 2..]);
        if ticket::read(&plain).is_some() {
            flat = plain;
        }
    }
    Some(Cow::Owned(flat.replace("%2F", "/")))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn names_are_flat_injective_and_never_read_as_tickets() {
        let dir = Dir::new(["kv"]).unwrap();
        let layout = Layout::new("app");
        let mut seen = HashMap::new();
        for name in [
            "a",
            "a/b",
            "a%2Fb",
            "a//b",
            "/",
            "%",
            "_c_x-lock-0000000001",
            "_c_x-lock-000000000%1",
            "_c_x-lock-000000000%31",
            "a/b-lock-0000000001",
            "é-lock-0000000001",
            "-lock-0000000001",
            "zookeeper",
            "..",
            ".gen",
        ] {
            let key = Key::new(&dir, name).unwrap();
            let path = layout.key(&key);
            let node = path.strip_prefix("/app/kv/").unwrap();
            assert!(!node.contains('/') && !node.starts_with('.'), "{path}");
            assert!(ticket::read(node).is_none(), "{path}");
            assert_eq!(encoded(node).unwrap(), key.encoded(), "{name}");
            assert_eq!(seen.insert(path, name), None);
        }
        assert_eq!(encoded("_c_x-lock-0000000001"), None);
    }

    #[test]
    fn foreign_names_keep_their_place() {
        for node in ["%", "%3", "%31", "é%", "x%31", "%2f", "%41", "a%2Fb"] {
            let dir = Dir::new(["kv"]).unwrap();
            let key = Key::from_encoded(&dir, encoded(node).unwrap());
            assert_eq!(stored(key.encoded()), node);
        }
    }

    #[test]
    fn nodes_on_the_way_are_named_topmost_first() {
        let layout = Layout::new("team/app");
        assert_eq!(layout.namespace_nodes(), ["/team", "/team/app"]);
        assert_eq!(layout.nodes_down_to("/team/app/lock/a"), ["/team/app/lock", "/team/app/lock/a"]);
        let bare = Layout::new("");
        assert!(bare.namespace_nodes().is_empty());
        assert_eq!(bare.top(), "/");
        assert_eq!(bare.nodes_down_to("/lock/a"), ["/lock", "/lock/a"]);
    }

    #[test]
    fn the_generation_of_a_key_never_changes() {
        let key = Key::new(&Dir::new(["kv"]).unwrap(), "orders/42").unwrap();
        assert_eq!(Layout::new("x").generation(Layout::shard(&key)), "/x/.gen/3b");
    }
}
