//! What was last seen of keys: it saves a round trip where it is still true and costs one where it is not.
//!
//! Promise: nothing is ever answered from here. Everything taken from here is checked by the server in the same
//! transaction that relies on it.

use std::{collections::HashMap, sync::Mutex};

use quorate_core::Revision;
use zookeeper_client::Stat;

use crate::{lease::lock, revision};

/// How many keys are remembered at most.
const CAPACITY: usize = 4096;

/// What was last seen of a key that existed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// The session that it stands on, or 0.
    pub(crate) owner: i64,
    pub(crate) modified: Revision,
    pub(crate) version: i32,
    /// The version of the key's generation at that moment or at some earlier one.
    ///
    /// If the generation still has this version, the node is still the same one: so the same data version means
    /// the same write. A value that is too old only makes that comparison fail in vain.
    pub(crate) generation: Option<i32>,
}

impl Known {
    pub(crate) fn of(stat: &Stat, generation: Option<i32>) -> Self {
        Self { owner: stat.ephemeral_owner, modified: revision(stat.mzxid), version: stat.version, generation }
    }
}

/// The keys seen last, by path.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    keys: Mutex<HashMap<String, Known>>,
}

impl Seen {
    pub(crate) fn get(&self, path: &str) -> Option<Known> {
        lock(&self.keys).get(path).copied()
    }

    /// Two calls may note in another order than the server answered them: the newer one stays.
    pub(crate) fn note(&self, path: &str, known: Known) {
        let mut keys = lock(&self.keys);
        if let Some(before) = keys.get_mut(path) {
            if before.modified <= known.modified {
                *before = known;
            }
            return;
        }
        if keys.len() >= CAPACITY {
            keys.clear();
        }
        keys.insert(path.to_owned(), known);
    }

    pub(crate) fn forget(&self, path: &str) {
        lock(&self.keys).remove(path);
    }
}
