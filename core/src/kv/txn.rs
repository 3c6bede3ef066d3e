//! Transactions over keys, built step by step.
//!
//! Promise: all writes happen at one revision if all conditions hold, else none does and the answer names the
//! first condition that did not hold.

use bytes::Bytes;

use super::Kv;
use crate::{
    backend::{Check, Revision, Txn, Write},
    error::{Error, Result},
    lock::Fence,
    session::Session,
};

/// A transaction under construction.
///
/// ```
/// # async fn show(kv: quorate_core::kv::Kv, fence: quorate_core::lock::Fence) -> quorate_core::Result<()> {
/// use quorate_core::kv::TxnOutcome;
/// match kv.txn().if_standing(&fence).if_absent("done/42").put("done/42", "by us").delete("todo/42").commit().await? {
///     TxnOutcome::Applied(revision) => println!("done at {revision}"),
///     TxnOutcome::Refused { condition } => println!("condition {condition} did not hold"),
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "nothing happens before commit"]
pub struct KvTxn {
    kv: Kv,
    txn: Txn,
    /// The first step that could not work; told by `commit`.
    wrong: Option<Error>,
}

/// What became of a transaction.
#[must_use = "the writes may not have been applied"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Applied, at this revision.
    Applied(Revision),
    /// Nothing was applied.
    Refused {
        /// The first condition that did not hold, counted from 0 in the order they were added.
        condition: usize,
    },
}

impl KvTxn {
    pub(super) fn new(kv: Kv) -> Self {
        Self { kv, txn: Txn::default(), wrong: None }
    }

    fn with(mut self, key: &str, step: impl FnOnce(crate::Key, &mut Txn)) -> Self {
        match self.kv.key(key) {
            Ok(key) => step(key, &mut self.txn),
            Err(error) => self.wrong = self.wrong.or(Some(error)),
        }
        self
    }

    /// Only if the key does not exist.
    pub fn if_absent(self, key: &str) -> Self {
        self.with(key, |key, txn| txn.checks.push(Check::Absent(key)))
    }

    /// Only if the key was last written at `modified`.
    pub fn if_unchanged(self, key: &str, modified: Revision) -> Self {
        self.with(key, |key, txn| txn.checks.push(Check::Unchanged { key, modified }))
    }

    /// Only if the hold still stands at the server.
    pub fn if_standing(mut self, fence: &Fence) -> Self {
        self.txn.checks.push(fence.check());
        self
    }

    /// Creates or replaces a key.
    pub fn put(self, key: &str, value: impl Into<Bytes>) -> Self {
        self.with(key, |key, txn| txn.writes.push(Write::Put { key, value: value.into(), lease: None }))
    }

    /// Creates or replaces a key that ends with the session.
    pub fn put_ephemeral(mut self, session: &Session, key: &str, value: impl Into<Bytes>) -> Self {
        if let Err(error) = session.core().check("commit") {
            self.wrong = self.wrong.or(Some(error));
        }
        let lease = Some(session.lease().clone());
        self.with(key, |key, txn| txn.writes.push(Write::Put { key, value: value.into(), lease }))
    }

    /// Deletes a key, if it is there.
    pub fn delete(self, key: &str) -> Self {
        self.with(key, |key, txn| txn.writes.push(Write::Delete(key)))
    }

    /// Sends it.
    ///
    /// # Errors
    /// `InvalidInput` for a bad key, a key written twice, a value or a transaction over the limit; `SessionLost` if
    /// a session it names has ended; `Ambiguous` if the reply was lost.
    ///
    /// # Cancel safety
    /// Dropped half-way, it may or may not be applied, but never in part.
    pub async fn commit(self) -> Result<TxnOutcome> {
        if let Some(error) = self.wrong {
            return Err(error);
        }
        let commit = self.kv.commit(self.txn).await?;
        Ok(if commit.applied {
            TxnOutcome::Applied(commit.revision)
        } else {
            TxnOutcome::Refused { condition: commit.culprit.unwrap_or(0) }
        })
    }
}
