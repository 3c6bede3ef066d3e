//! What stands in the store: beats, and the ledger of recoveries.
//!
//! Promise: what another version wrote is read as far as its known fields go; what is no such JSON is left out and logged
//! without its content.

use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Incarnation;
use crate::backend::{Entry, Revision};

/// One beat, as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Beat {
    /// Names the run, so that a writer recognises its own first record after a lost reply.
    pub(super) run: String,
    /// Absent in the first record of a run: the revision that wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) incarnation: Option<u64>,
    /// Counts the beats that were due in this run, also those that could not be written.
    pub(super) seq: u64,
    /// Milliseconds between beats, at least 1.
    pub(super) every_ms: u64,
    /// The sender's wall clock in microseconds since 1970, when the beat left.
    #[serde(default)]
    pub(super) sent_us: u64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) payload: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) echo: Option<Echo>,
    /// A recovery has begun for this incarnation; it never beats again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) convicted: bool,
}

/// The answer to somebody else's beat, by the monotonic clock of who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Echo {
    /// Whose beat.
    pub(super) peer: String,
    pub(super) incarnation: u64,
    pub(super) seq: u64,
    /// Microseconds from hearing it to sending this.
    pub(super) held_us: u64,
}

/// A beat with where it was found.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    pub(super) peer: String,
    pub(super) incarnation: Incarnation,
    pub(super) created: Revision,
    pub(super) modified: Revision,
    pub(super) beat: Beat,
}

impl Heard {
    pub(super) fn of(entry: &Entry) -> Option<Self> {
        let (peer, beat) = (entry.key.name()?, decode::<Beat>(entry)?);
        let incarnation = beat.incarnation.map_or_else(|| entry.modified.into(), Incarnation);
        Some(Self { peer, incarnation, created: entry.created, modified: entry.modified, beat })
    }

    pub(super) fn every(&self) -> Duration {
        Duration::from_millis(self.beat.every_ms.max(1))
    }
}

/// What recoveries of one peer are done or under way. Written only under the lock of the peer's recovery.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ledger {
    /// Every incarnation up to this one has been recovered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) done: Option<Incarnation>,
    /// A recovery of this incarnation was begun and not completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pending: Option<Incarnation>,
}

impl Ledger {
    pub(super) fn covers(&self, incarnation: Incarnation) -> bool {
        self.done.is_some_and(|done| done >= incarnation)
    }
}

pub(super) fn decode<T: DeserializeOwned>(entry: &Entry) -> Option<T> {
    serde_json::from_slice(&entry.value)
        .inspect_err(|_| tracing::warn!(key = %entry.key, "left out: not a record of heartbeats"))
        .ok()
}

pub(super) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("numbers and strings are always JSON")
}
