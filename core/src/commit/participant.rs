//! What takes part in a transaction.
//!
//! Promise: see [`Participant`]; the manager and the recoverers keep their half of it.

use std::{fmt, str::FromStr, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Names a transaction. Random, and never used twice: an attempt that is made again is another transaction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TxId(u128);

impl TxId {
    /// A fresh one.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// 32 lower-case hexadecimal digits.
impl fmt::Display for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TxId({self})")
    }
}

impl FromStr for TxId {
    type Err = Error;

    /// Reads what `Display` wrote, and nothing else: one transaction has one name.
    fn from_str(text: &str) -> Result<Self> {
        let digits = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let id = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        id.map(Self).ok_or_else(|| Error::invalid("transaction", "not the id of a transaction").key(text))
    }
}

impl Serialize for TxId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TxId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One participant's part of a transaction.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Branch {
    /// The group of transactions; ids of two groups have nothing to do with each other.
    pub group: Arc<str>,
    /// The transaction.
    pub id: TxId,
    /// The participant's name within it.
    pub participant: Arc<str>,
    /// What it is to do; for `prepare`, `commit` and `abort` the same.
    pub body: Bytes,
    /// Whether a process that [serves](super::Transactions::serve) the participant asks. Another that served it before may
    /// have asked as well, and its `prepare` may arrive when all is over, a commit included.
    pub served: bool,
}

impl Branch {
    /// A branch, for tests of a participant.
    pub fn new(group: &str, id: TxId, participant: &str, body: impl Into<Bytes>) -> Self {
        Self { group: group.into(), id, participant: participant.into(), body: body.into(), served: false }
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.group, self.id, self.participant)
    }
}

// The body may be a secret of the application: only its length is shown.
impl fmt::Debug for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Branch({self}, {} bytes)", self.body.len())
    }
}

/// A participant's answer to `prepare`.
#[must_use]
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vote {
    /// It is durable and can be committed as well as aborted, whatever crashes from now on.
    Yes,
    /// There was nothing to do but look: the participant is out, and is told no outcome.
    ReadOnly,
    /// It cannot be done, and nothing of it was left behind: the participant is out.
    No(String),
}

/// A participant's answer to `commit` and `abort`.
#[must_use]
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The branch is as decided, now or since an earlier call.
    Done,
    /// The branch ended otherwise than decided, and trying again will not change it: a heuristic outcome. It is recorded
    /// and kept until an operator has seen it.
    Diverged(String),
}

/// A resource that can take part in transactions: a database, another service, keys of a coordinator.
///
/// # What is asked of it
/// - **`prepare`** makes the branch durable, so that both outcomes can be reached whatever crashes, and votes. Until the
///   outcome is told, the participant decides nothing by itself and keeps what it locked. An error, a panic or an answer
///   that comes too late counts as no; an abort follows.
/// - **`commit`** and **`abort`** bring the branch to that end. An error means: not yet; the call is made again, by this
///   process or another, until it is answered.
/// - **Each call may come again**, at any time, also at the same time from two processes, and gets the same answer.
/// - **Each call may come late.** `abort` may come for a branch that was never prepared, and is [`Finish::Done`]; a
///   `prepare` that comes after the `abort` or the `commit` of its branch votes [`Vote::No`] and leaves nothing behind.
///   Requests do travel that slowly: a process stopped for a minute sends its prepare after others have aborted for it.
/// - A call may be dropped at any await.
///
/// # What it may rely on
/// - `commit` comes only after every participant has voted, none of them no, and after the decision is durable in the
///   coordinator's store. `commit` and `abort` never both come for one branch, unless an operator decided by hand, or
///   the store lost acknowledged writes.
/// - An answer of [`Vote::No`] or [`Vote::ReadOnly`] may still be followed by an `abort`, if it got lost.
#[async_trait]
pub trait Participant: fmt::Debug + Send + Sync + 'static {
    /// Makes the branch durable and votes.
    ///
    /// # Errors
    /// If the outcome of the attempt is not known, or it failed for a reason that is no vote.
    async fn prepare(&self, branch: &Branch) -> Result<Vote>;

    /// Makes what was prepared take effect.
    ///
    /// # Errors
    /// If it may not have happened yet; it is asked again.
    async fn commit(&self, branch: &Branch) -> Result<Finish>;

    /// Takes back what was prepared, if anything was.
    ///
    /// # Errors
    /// As for [`commit`](Self::commit).
    async fn abort(&self, branch: &Branch) -> Result<Finish>;

    /// The transactions of the group that stand prepared here. Recoverers compare them with the store, and abort what is
    /// forgotten there: the left-over of a prepare that came late. Empty where the resource cannot tell; it must then
    /// refuse late prepares for ever.
    ///
    /// # Errors
    /// If the resource cannot be asked now.
    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_name() {
        let id = TxId::random();
        assert_eq!(id.to_string().parse::<TxId>().unwrap(), id);
        for wrong in ["", "0", &id.to_string().to_uppercase().replace(char::is_numeric, "A"), &format!("+{id}")[..32]] {
            assert!(wrong.parse::<TxId>().is_err(), "{wrong}");
        }
    }
}
