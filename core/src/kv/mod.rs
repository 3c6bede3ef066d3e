//! Keys and values: small shared state with compare-and-swap, transactions and watches.
//!
//! Promise: each call is atomic at the server; a call whose reply was lost is `Ambiguous` and never repeated
//! behind the caller's back; losing a race is a value. Values are stored as given, so that other tools can read
//! them.
//!
//! # On the wire
//! A key `orders/42` lives at `<namespace>/kv/orders/42` (ZooKeeper: one flat node `kv/orders%2F42`), its name encoded
//! as [`key`](crate::key) says. Names that another client stored in another form are left out of lists and
//! watches.

mod json;
mod stm;
mod txn;
mod watch;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

pub use json::JsonKv;
pub use stm::Transaction;
pub use txn::{KvTxn, TxnOutcome};
pub use watch::{KvEvent, KvWatch};

use crate::{
    backend::{Backend, Check, Commit, Entry, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::{Dir, Key, KeyRange},
    lock::Fence,
    session::Session,
};

/// A key with its value.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// The revision that created the key.
    pub created: Revision,
    /// The revision that wrote it last: what compare-and-swap compares.
    pub modified: Revision,
    /// Whether it ends with a session.
    pub ephemeral: bool,
}

// Values may be secrets of the application: only their length is shown.
impl std::fmt::Debug for KeyValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyValue({:?}, {} bytes, modified {})", self.key, self.value.len(), self.modified)
    }
}

/// Every key under a prefix, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// In the order of the stored names.
    pub entries: Vec<KeyValue>,
    /// The store's revision at that moment, or the highest one the reply shows.
    pub revision: Revision,
}

/// What became of a conditional write.
#[must_use = "the write may not have been applied"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// Applied, at this revision.
    Applied(Revision),
    /// Not applied: the key was written by somebody else. This is how it looked shortly afterwards.
    Conflict(KeyValue),
    /// Not applied: the key does not exist.
    Missing,
}

/// The keys and values of one coordinator. Cheap to clone.
///
/// No method retries a write that may have been applied. All futures may be dropped; a dropped write may
/// still be applied.
#[derive(Debug, Clone)]
pub struct Kv {
    backend: Arc<dyn Backend>,
    dir: Dir,
}

impl Kv {
    pub(crate) fn new(backend: Arc<dyn Backend>) -> Self {
        let dir = Dir::new(["kv"]).expect("a constant that is a valid segment");
        Self { backend, dir }
    }

    /// The value of a key, if it exists.
    ///
    /// # Errors
    /// `InvalidInput` for a bad key; otherwise what the backend says.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        let mut snapshot = self.backend.read(&KeyRange::One(self.key(key)?)).await?;
        Ok(snapshot.entries.pop().and_then(describe))
    }

    /// Creates or replaces a key; returns the revision of the write.
    ///
    /// # Errors
    /// `InvalidInput` for a bad key or a value over the limit; `Ambiguous` if the reply was lost.
    ///
    /// # Cancel safety
    /// Dropped half-way, the write may or may not happen.
    pub async fn put(&self, key: &str, value: impl Into<Bytes>) -> Result<Revision> {
        let write = Write::Put { key: self.key(key)?, value: value.into(), lease: None };
        Ok(self.commit(Txn { checks: Vec::new(), writes: vec![write] }).await?.revision)
    }

    /// Creates or replaces a key that ends with the session.
    ///
    /// # Errors
    /// As for [`put`](Self::put), and `SessionLost` if the session has ended.
    ///
    /// # Cancel safety
    /// As for [`put`](Self::put).
    pub async fn put_ephemeral(&self, session: &Session, key: &str, value: impl Into<Bytes>) -> Result<Revision> {
        session.core().check("put")?;
        let write = Write::Put { key: self.key(key)?, value: value.into(), lease: Some(session.lease().clone()) };
        Ok(self.commit(Txn { checks: Vec::new(), writes: vec![write] }).await?.revision)
    }

    /// Creates a key; `None` if it exists already.
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// As for [`put`](Self::put).
    pub async fn create(&self, key: &str, value: impl Into<Bytes>) -> Result<Option<Revision>> {
        let key = self.key(key)?;
        let write = Write::Put { key: key.clone(), value: value.into(), lease: None };
        let commit = self.commit(Txn { checks: vec![Check::Absent(key)], writes: vec![write] }).await?;
        Ok(commit.applied.then_some(commit.revision))
    }

    /// Replaces a key if it was last written at `expected` (its [`KeyValue::modified`]).
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// As for [`put`](Self::put).
    pub async fn compare_and_swap(&self, key: &str, expected: Revision, value: impl Into<Bytes>) -> Result<Swap> {
        let key = self.key(key)?;
        let write = Write::Put { key: key.clone(), value: value.into(), lease: None };
        self.swap(key, expected, write).await
    }

    /// Deletes a key if it was last written at `expected`.
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// As for [`put`](Self::put).
    pub async fn compare_and_delete(&self, key: &str, expected: Revision) -> Result<Swap> {
        let key = self.key(key)?;
        self.swap(key.clone(), expected, Write::Delete(key)).await
    }

    async fn swap(&self, key: Key, expected: Revision, write: Write) -> Result<Swap> {
        let checks = vec![Check::Unchanged { key: key.clone(), modified: expected }];
        let commit = self.commit(Txn { checks, writes: vec![write] }).await?;
        if commit.applied {
            return Ok(Swap::Applied(commit.revision));
        }
        let now = self.backend.read(&KeyRange::One(key)).await?.entries.pop();
        Ok(now.and_then(describe).map_or(Swap::Missing, Swap::Conflict))
    }

    /// Deletes a key; `false` if it did not exist. Two round trips: a look and a conditional delete.
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// As for [`put`](Self::put).
    pub async fn delete(&self, key: &str) -> Result<bool> {
        let key = self.key(key)?;
        loop {
            let Some(entry) = self.backend.read(&KeyRange::One(key.clone())).await?.entries.pop() else {
                return Ok(false);
            };
            let checks = vec![Check::Unchanged { key: key.clone(), modified: entry.modified }];
            let commit = self.commit(Txn { checks, writes: vec![Write::Delete(key.clone())] }).await?;
            if commit.applied {
                return Ok(true);
            }
            // Written in between: that value is to go as well. Paused, so that two writers cannot spin.
            tokio::time::sleep(Duration::from_millis(rand::random_range(1..10))).await;
        }
    }

    /// Every key that starts with `prefix`; all keys where it is empty.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn list(&self, prefix: &str) -> Result<Listing> {
        let snapshot = self.backend.read(&KeyRange::prefix(&self.dir, prefix)?).await?;
        let entries = snapshot.entries.into_iter().filter_map(describe).collect();
        Ok(Listing { entries, revision: snapshot.revision })
    }

    /// Deletes every key that starts with `prefix` and existed when the call began; returns how many. Not
    /// atomic: keys go in batches, and those written anew in the meantime stay.
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// Dropped half-way, some keys are deleted and some are not.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<usize> {
        let entries = self.backend.read(&KeyRange::prefix(&self.dir, prefix)?).await?.entries;
        let batch = (self.backend.profile().max_txn / 2).max(1);
        let mut deleted = 0;
        for entries in entries.chunks(batch) {
            let txn = Txn {
                checks: entries.iter().map(|e| Check::Unchanged { key: e.key.clone(), modified: e.modified }).collect(),
                writes: entries.iter().map(|e| Write::Delete(e.key.clone())).collect(),
            };
            if self.commit(txn).await?.applied {
                deleted += entries.len();
                continue;
            }
            // Somebody touched one of them: go one by one and leave what changed.
            for entry in entries {
                let checks = vec![Check::Unchanged { key: entry.key.clone(), modified: entry.modified }];
                let txn = Txn { checks, writes: vec![Write::Delete(entry.key.clone())] };
                deleted += usize::from(self.commit(txn).await?.applied);
            }
        }
        Ok(deleted)
    }

    /// Creates or replaces a key if the hold still stands at the server. This is the write that a paused or
    /// cut-off holder cannot do wrong.
    ///
    /// # Errors
    /// As for [`put`](Self::put), and `SessionLost` if the hold has ended: nothing was written, and whoever wrote
    /// is not the holder any more.
    ///
    /// # Cancel safety
    /// As for [`put`](Self::put).
    pub async fn put_fenced(&self, fence: &Fence, key: &str, value: impl Into<Bytes>) -> Result<Revision> {
        let key = self.key(key)?;
        let write = Write::Put { key: key.clone(), value: value.into(), lease: None };
        let commit = self.commit(Txn { checks: vec![fence.check()], writes: vec![write] }).await?;
        if commit.applied {
            return Ok(commit.revision);
        }
        let message = format!("refused: the hold with token {} has ended", fence.token());
        Err(Error::new(ErrorKind::SessionLost, "commit", message).key(&key).on(self.backend.profile().backend))
    }

    /// Begins a transaction.
    pub fn txn(&self) -> KvTxn {
        KvTxn::new(self.clone())
    }

    /// Watches one key.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn watch(&self, key: &str) -> Result<KvWatch> {
        Ok(KvWatch::new(self.backend.watch(&KeyRange::One(self.key(key)?)).await?))
    }

    /// Watches every key that starts with `prefix`.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn watch_prefix(&self, prefix: &str) -> Result<KvWatch> {
        Ok(KvWatch::new(self.backend.watch(&KeyRange::prefix(&self.dir, prefix)?).await?))
    }

    /// The same keys, with values of type `T` as JSON.
    pub fn json<T>(&self) -> JsonKv<T> {
        JsonKv::new(self.clone())
    }

    fn key(&self, name: &str) -> Result<Key> {
        Key::new(&self.dir, name).map_err(|e| e.on(self.backend.profile().backend))
    }

    /// Refuses what no backend could do, with the same words on each, and commits the rest.
    async fn commit(&self, txn: Txn) -> Result<Commit> {
        let profile = self.backend.profile();
        let refuse = |message: String| Err(Error::invalid("commit", message).key(&txn).on(profile.backend));
        if txn.checks.len() + txn.writes.len() > profile.max_txn {
            return refuse(format!("more than {} checks and writes in one transaction", profile.max_txn));
        }
        let mut written = std::collections::HashSet::with_capacity(txn.writes.len());
        for write in &txn.writes {
            let (Write::Put { key, .. } | Write::Delete(key)) = write else { continue };
            if !written.insert(key) {
                return refuse(format!("{key} is written twice in one transaction"));
            }
            if let Write::Put { value, .. } = write
                && value.len() > profile.max_value
            {
                return refuse(format!("a value has {} bytes, at most {} fit", value.len(), profile.max_value));
            }
        }
        let commit = self.backend.commit(&txn).await?;
        if !commit.applied && txn.checks.is_empty() {
            let message = "the server did not apply a transaction without conditions";
            return Err(Error::new(ErrorKind::Backend, "commit", message).key(&txn).on(profile.backend));
        }
        Ok(commit)
    }
}

pub(crate) fn describe(entry: Entry) -> Option<KeyValue> {
    let Some(key) = entry.key.name() else {
        tracing::debug!(key = entry.key.encoded(), "left out: another client stored a name that is not ours");
        return None;
    };
    let Entry { value, created, modified, lease, .. } = entry;
    Some(KeyValue { key, value, created, modified, ephemeral: lease.is_some() })
}
