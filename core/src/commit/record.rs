//! What stands in the store.
//!
//! Promise: every record says its version. One of a later version, or of somebody else, is never guessed at: it is told
//! as [`Unreadable`] and left as it is.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::backend::Entry;

/// The version that is written, and the last that is understood.
pub(super) const VERSION: u32 = 1;

/// The longest limit for votes.
pub(super) const MOST: Duration = Duration::from_secs(86_400);

/// How a transaction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Every branch takes effect.
    Commit,
    /// None does.
    Abort,
}

impl std::fmt::Display for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Commit => "commit",
            Self::Abort => "abort",
        })
    }
}

/// A transaction that was begun: `tx/<group>/<id>`. Never changed, so that "unchanged" means "not forgotten".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) v: u32,
    /// The process that drives it, by the name of its mailbox.
    pub(super) driver: String,
    /// How long votes are waited for.
    pub(super) within_ms: u64,
    /// The wall clock of who began it, for people only.
    pub(super) since_ms: u64,
    /// Two or three.
    #[serde(default = "two", skip_serializing_if = "is_two")]
    pub(super) phases: u8,
    pub(super) branches: Vec<BranchRecord>,
}

impl Record {
    /// Bounded, whatever stands in the record.
    pub(super) fn within(&self) -> Duration {
        Duration::from_millis(self.within_ms).min(MOST)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BranchRecord {
    pub(super) name: String,
    /// Reached through the store; its body is in its work record.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) remote: bool,
    #[serde(default, with = "base64_bytes", skip_serializing_if = "Bytes::is_empty")]
    pub(super) body: Bytes,
}

fn two() -> u8 {
    2
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_two(phases: &u8) -> bool {
    *phases == 2
}

/// Everybody is in favour: `txready/<group>/<id>`, only with three phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReadyRecord {
    pub(super) v: u32,
}

/// The decision: `txdecision/<group>/<id>`. Created once, or never.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DecisionRecord {
    pub(super) v: u32,
    pub(super) decision: Decision,
    /// Why it was aborted, or by whose hand it was decided.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) why: String,
}

/// What a remote participant is to do: `txwork/<group>/<participant>/<id>`. The participant deletes it when it is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Work {
    pub(super) v: u32,
    /// Whose mailbox is told.
    pub(super) driver: String,
    pub(super) state: WorkState,
    #[serde(default, with = "base64_bytes", skip_serializing_if = "Bytes::is_empty")]
    pub(super) body: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum WorkState {
    Prepare,
    Commit,
    Abort,
}

impl From<Decision> for WorkState {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Commit => Self::Commit,
            Decision::Abort => Self::Abort,
        }
    }
}

/// What a remote participant tells the driver: `txvote/<group>/<driver>`, key `<id>/<participant>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mail {
    pub(super) v: u32,
    pub(super) says: Says,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) why: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Says {
    Yes,
    ReadOnly,
    /// Nothing was left behind.
    No,
    /// An attempt with an unknown end: not a yes, and an abort has to follow.
    Failed,
    /// It has committed.
    Done,
}

/// A heuristic outcome: `txparked/<group>`, key `<id>/<participant>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parked {
    pub(super) v: u32,
    pub(super) decision: Decision,
    pub(super) what: String,
}

/// Why a record is left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unreadable(pub(super) String);

#[derive(Deserialize)]
struct Version {
    v: u32,
}

pub(super) fn decode<T: DeserializeOwned>(value: &[u8]) -> Result<T, Unreadable> {
    // The text of the error could repeat the value, which may be anything.
    let unreadable = |e: serde_json::Error| {
        Unreadable(format!("not a record of this library, at line {} column {}", e.line(), e.column()))
    };
    let version: Version = serde_json::from_slice(value).map_err(unreadable)?;
    if version.v > VERSION {
        return Err(Unreadable(format!("written by a later version ({}; {VERSION} is understood here)", version.v)));
    }
    serde_json::from_slice(value).map_err(unreadable)
}

/// As [`decode`], for records that are only looked at: what cannot be read is logged and left out.
pub(super) fn decode_or_skip<T: DeserializeOwned>(entry: &Entry) -> Option<T> {
    decode(&entry.value).inspect_err(|why| tracing::warn!(key = %entry.key, why = why.0, "left alone")).ok()
}

pub(super) fn encode<T: Serialize>(record: &T) -> Bytes {
    serde_json::to_vec(record).expect("strings and numbers are always JSON").into()
}

pub(super) mod base64_bytes {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    use bytes::Bytes;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        // Said without the text, which may be a secret.
        BASE64_STANDARD.decode(text).map(Into::into).map_err(|_| serde::de::Error::custom("not base64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_version_and_garbage_are_not_guessed_at() {
        let ours = DecisionRecord { v: VERSION, decision: Decision::Commit, why: String::new() };
        assert_eq!(decode(&encode(&ours)), Ok(ours.clone()));
        let later = encode(&DecisionRecord { v: VERSION + 1, ..ours });
        assert!(decode::<DecisionRecord>(&later).unwrap_err().0.contains("later version"));
        for garbage in ["", "hunter2", "{\"hunter2\":", "{\"v\":1,\"decision\":\"hunter2\"}"] {
            let Unreadable(why) = decode::<DecisionRecord>(garbage.as_bytes()).unwrap_err();
            assert!(!why.contains("hunter2"), "{why}");
        }
    }
}
