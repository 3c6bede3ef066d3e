//! What stands in the store for branches of [`Keys`](super::Keys).

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Decision, TxId, record::base64_bytes};

/// The body of a branch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Work {
    pub(super) v: u32,
    /// By key; in one order, so that no two branches can hold what the other waits for.
    pub(super) steps: BTreeMap<String, Step>,
}

/// What is to be done with one key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Step {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) require: Option<Requirement>,
    /// Absent: the key is only held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) write: Option<Change>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Requirement {
    Absent,
    /// Last written at this revision.
    At(u64),
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    Put(#[serde(with = "base64_bytes")] Bytes),
    Delete,
}

// The value may be a secret of the application.
impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put(value) => write!(f, "Put({} bytes)", value.len()),
            Self::Delete => f.write_str("Delete"),
        }
    }
}

/// Who holds a key: `txintent/<key>`. It stands and falls with the branch record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intent {
    pub(super) v: u32,
    pub(super) group: String,
    pub(super) id: TxId,
    pub(super) participant: String,
}

/// A branch: `txbranch/<group>/<id>/<participant>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BranchWork {
    pub(super) v: u32,
    pub(super) state: BranchState,
    /// The prepare may have been sent more than once; another one may still arrive when the branch is over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) again: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) steps: BTreeMap<String, Step>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum BranchState {
    Prepared,
    /// Only a mark, so that what comes late is refused.
    Over(Decision),
}
