//! Transactions written as ordinary code: read, compute, write, and run again if somebody was faster.
//!
//! Promise: what the body reads was true at one moment, in every attempt, also in those that are thrown away; its
//! writes are applied all together and only if everything it read is still as it was. Nothing is locked, and nothing
//! is written before the end of the body.
//!
//! Optimistic concurrency control with validation of the read set (Kung and Robinson, 1981), as in the STM of etcd's
//! concurrency package. A first read costs one round trip; a later one costs one more only if its key is missing or
//! was written after the first read; the commit costs one, and a body without writes has none.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::Bytes;
use tokio::sync::Notify;

use super::Kv;
use crate::{
    backend::{Check, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::{Key, KeyRange},
    lock::Fence,
};

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// What was read can no longer be committed: the attempt is thrown away.
    doomed: Notify,
}

#[derive(Default)]
struct State {
    /// What each key held, with the revision that wrote it.
    reads: BTreeMap<Key, Option<(Bytes, Revision)>>,
    /// All of `reads` was true at one moment at which the store was at this revision or a later one.
    as_of: Revision,
    /// `None` deletes.
    writes: BTreeMap<Key, Option<Bytes>>,
    fences: Vec<Fence>,
}

impl State {
    fn read_checks(&self) -> impl Iterator<Item = Check> {
        self.reads.iter().map(|(key, seen)| check(key, seen.as_ref()))
    }

    fn writes(&self) -> Vec<Write> {
        let write = |(key, value): (&Key, &Option<Bytes>)| match value {
            Some(value) => Write::Put { key: key.clone(), value: value.clone(), lease: None },
            None => Write::Delete(key.clone()),
        };
        self.writes.iter().map(write).collect()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One attempt at a transaction, seen from its body. Made by [`Kv::transact`].
pub struct Transaction {
    kv: Kv,
    shared: Arc<Shared>,
}

// Keys and values may say more than a log should.
impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state();
        write!(f, "Transaction({} read, {} written)", state.reads.len(), state.writes.len())
    }
}

impl Transaction {
    /// The value of a key as it was at the moment of this attempt, or as this attempt wrote it.
    ///
    /// # Errors
    /// As for [`Kv::get`]. Where the value would contradict what was read before, this does not return: the body is
    /// dropped here and begins again.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn get(&mut self, key: &str) -> Result<Option<Bytes>> {
        let key = self.kv.key(key)?;
        {
            let state = self.shared.state();
            if let Some(value) = state.writes.get(&key) {
                return Ok(value.clone());
            }
            if let Some(seen) = state.reads.get(&key) {
                return Ok(seen.as_ref().map(|(value, _)| value.clone()));
            }
        }
        let mut snapshot = self.kv.backend.read(&KeyRange::One(key.clone())).await?;
        let seen = snapshot.entries.pop().map(|entry| (entry.value, entry.modified));
        let doubt = {
            let state = self.shared.state();
            // Not written since the moment that the other reads belong to: it had this value then.
            let old = seen.as_ref().is_some_and(|(_, modified)| *modified <= state.as_of);
            (!state.reads.is_empty() && !old).then(|| {
                let mut checks: Vec<Check> = state.read_checks().collect();
                checks.push(check(&key, seen.as_ref()));
                checks
            })
        };
        let moved = doubt.is_some();
        if let Some(checks) = doubt {
            self.validate(checks).await?;
        }
        let mut state = self.shared.state();
        if moved || state.reads.is_empty() {
            state.as_of = snapshot.revision;
        }
        let value = seen.as_ref().map(|(value, _)| value.clone());
        state.reads.insert(key, seen);
        Ok(value)
    }

    /// Returns if all of this is true now; otherwise the attempt ends here.
    async fn validate(&self, checks: Vec<Check>) -> Result<()> {
        let commit = self.kv.commit(Txn { checks, writes: Vec::new() }).await.map_err(|error| match error.kind() {
            // Nothing was to be written, so nothing is unsure.
            ErrorKind::Ambiguous => error.with_kind(ErrorKind::Unavailable),
            _ => error,
        })?;
        if !commit.applied {
            self.shared.doomed.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    /// Creates or replaces a key at the end of the body. The last write of a key counts.
    ///
    /// # Errors
    /// `InvalidInput` for a bad key.
    pub fn put(&mut self, key: &str, value: impl Into<Bytes>) -> Result<()> {
        let key = self.kv.key(key)?;
        self.shared.state().writes.insert(key, Some(value.into()));
        Ok(())
    }

    /// Deletes a key at the end of the body, if it is there then.
    ///
    /// # Errors
    /// `InvalidInput` for a bad key.
    pub fn delete(&mut self, key: &str) -> Result<()> {
        let key = self.kv.key(key)?;
        self.shared.state().writes.insert(key, None);
        Ok(())
    }

    /// Commits only if this hold still stands then; if not, the transaction fails with `SessionLost`.
    pub fn only_while(&mut self, fence: &Fence) {
        self.shared.state().fences.push(fence.clone());
    }
}

impl Kv {
    /// Runs `body` until what it read and wrote can be applied as one step; returns what it returned.
    ///
    /// ```
    /// # async fn show(kv: quorate_core::Kv) -> quorate_core::Result<()> {
    /// let number = |value: Option<bytes::Bytes>| value.map_or(0, |v| v[0]);
    /// let moved = kv
    ///     .transact(|mut tx| async move {
    ///         let (from, to) = (number(tx.get("from").await?), number(tx.get("to").await?));
    ///         tx.put("from", vec![from - 1])?;
    ///         tx.put("to", vec![to + 1])?;
    ///         Ok(to + 1)
    ///     })
    ///     .await?;
    /// # let _ = moved; Ok(()) }
    /// ```
    ///
    /// The body may run several times, and may be dropped at any of its reads: it must not do anything that may not
    /// be repeated or left half done. Between attempts there is a pause that grows up to a quarter of a second; there
    /// is no end to the attempts while others keep winning: bound it with a timeout where that matters.
    ///
    /// # Errors
    /// What the body returns: nothing is written then. `InvalidInput` if it read and wrote more keys than
    /// [`Profile::max_txn`](crate::Profile::max_txn); `SessionLost` if a hold of
    /// [`only_while`](Transaction::only_while) has ended; `Ambiguous` if the reply to the commit was lost: it is not
    /// tried again.
    ///
    /// # Cancel safety
    /// Dropped before the commit, nothing is written; dropped during it, all of it may be or nothing.
    pub async fn transact<T, F, Fut>(&self, mut body: F) -> Result<T>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(2))
            .with_max_delay(Duration::from_millis(250))
            .with_jitter()
            .without_max_times()
            .build();
        loop {
            let shared = Arc::new(Shared::default());
            let finished = tokio::select! {
                biased;
                finished = body(Transaction { kv: self.clone(), shared: shared.clone() }) => Some(finished?),
                () = shared.doomed.notified() => None,
            };
            if let Some(value) = finished
                && self.conclude(&shared).await?
            {
                return Ok(value);
            }
            tokio::time::sleep(pauses.next().unwrap_or(Duration::from_millis(250))).await;
        }
    }

    /// Commits what an attempt wrote; `false` if something it read has changed.
    async fn conclude(&self, attempt: &Shared) -> Result<bool> {
        let (txn, fences) = {
            let state = attempt.state();
            let checks = state.fences.iter().map(Fence::check).chain(state.read_checks()).collect();
            (Txn { checks, writes: state.writes() }, state.fences.clone())
        };
        // What was only read was true at one moment, which is all that a transaction can say.
        if txn.writes.is_empty() && fences.is_empty() {
            return Ok(true);
        }
        let about = txn.to_string();
        let commit = self.commit(txn).await?;
        // The fences are the first of the checks.
        let Some(ended) = commit.culprit.filter(|_| !commit.applied).and_then(|culprit| fences.get(culprit)) else {
            return Ok(commit.applied);
        };
        let message = format!("refused: the hold with token {} has ended", ended.token());
        Err(Error::new(ErrorKind::SessionLost, "commit", message).key(&about).on(self.backend.profile().backend))
    }
}

fn check(key: &Key, seen: Option<&(Bytes, Revision)>) -> Check {
    match seen {
        Some((_, modified)) => Check::Unchanged { key: key.clone(), modified: *modified },
        None => Check::Absent(key.clone()),
    }
}
