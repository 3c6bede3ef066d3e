//! Heartbeats: who is alive, judged by silence alone, on any backend.
//!
//! Promise: a peer that stops is told `Suspect`, then `Dead`, by every [`Monitor`], once each; a peer that is heard again is told
//! `Returned`; one that leaves is told `Left` and never `Dead`. Arrivals are timed by the monitor's own monotonic clock
//! only: no time in a record is ever compared with a clock here, and no wall clock decides anything.
//!
//! Nobody is convicted for silence that the monitor could not have heard: time in which its own process was paused, in
//! which the coordinator did not answer it, or in which its group's own beats were refused does not count. A machine
//! or a coordinator that stalls makes detection later, never wrong. Each conviction is confirmed by a read.
//!
//! # Incarnations
//! Each run of a peer has an [`Incarnation`]: the revision of its first write, so that a later run's is always greater,
//! also when the record was deleted in between. Every beat is a compare-and-swap on the beat before it: a late write of an
//! older run is refused by the store, and the older run learns that it was superseded.
//!
//! # Recovery
//! [`Monitor::on_death`] runs an action for each dead peer, once across the group; see [`Recovery`].
//!
//! # On the wire
//! A peer's record is the key `<peer>` of the directory `heartbeat/<group>`, on no lease, as JSON:
//! `{"run":"…","incarnation":17,"seq":42,"every_ms":1000,"sent_us":…,"payload":"…","echo":{…},"convicted":true}`.
//! `incarnation` is absent in the first record of a run: the revision that wrote it is the incarnation. `sent_us` is the
//! sender's wall clock and `echo` its answer to a beat of somebody else, both for [`PeerStatus::offset`] only. `convicted`
//! is set by a recovery. What recoveries are pending or done stands in `recovered/<group>`.
//!
//! # Cost
//! One transaction per beat; one watch per monitor, and one read of one key per [`MonitorOptions::probe_every`].
//!
//! # Garbage
//! A clean leave deletes the record. Monitors delete records of peers that have been dead for
//! [`MonitorOptions::forget_after`], together with their recoveries' records, unless a recovery is pending.

mod clock;
mod monitor;
mod peers;
mod publisher;
mod record;
mod recovery;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

pub use crate::clock::{ClockOffset, RoundTrip};
pub use monitor::{Detection, Monitor, MonitorOptions, PeerEvents};
pub use peers::{Cause, PeerEvent, PeerState, PeerStatus};
pub use publisher::{Publisher, PublisherState, PublisherStatus};
pub use recovery::{Death, Recovery};

use crate::{
    backend::{Backend, Check, Entry, Revision, Txn, Write},
    coordinator::Coordinator,
    error::{Error, ErrorKind, Result},
    key::{Dir, Key, KeyRange},
};

/// One run of a peer. A later run of the same peer has a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(u64);

impl Incarnation {
    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl From<Revision> for Incarnation {
    fn from(revision: Revision) -> Self {
        Self(revision.0)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A group of peers that watch over each other. Cheap to clone; nothing is sent before it is used.
///
/// A publisher and a monitor made from the same value, or from clones of it, help each other: failed beats excuse silence,
/// and clock offsets of peers can be estimated.
///
/// ```no_run
/// # use std::time::Duration;
/// # use quorate_core::{Coordinator, heartbeat::{MonitorOptions, PeerEvent}};
/// # async fn show(coord: Coordinator) -> quorate_core::Result<()> {
/// let group = coord.heartbeat("workers");
/// let publisher = group.beat("worker-7", Duration::from_secs(1))?;
/// let mut monitor = group.monitor(MonitorOptions::default())?;
/// while let Some(event) = monitor.next().await {
///     println!("{event:?}, suspicions {:?}", monitor.peers().iter().map(|p| p.suspicion).collect::<Vec<_>>());
/// }
/// publisher.leave().await
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct HeartbeatGroup {
    shared: Arc<Shared>,
}

/// What publishers, monitors and recoveries of one group value share.
#[derive(Debug)]
struct Shared {
    coord: Coordinator,
    /// A bad name is told at the first use, so that making a group needs no `?`.
    places: Result<Places>,
    exchange: clock::Exchange,
}

#[derive(Debug, Clone)]
struct Places {
    group: String,
    beats: Dir,
    ledger: Dir,
}

impl HeartbeatGroup {
    pub(crate) fn new(coord: Coordinator, group: &str) -> Self {
        let places = Dir::new(["heartbeat", group]).and_then(|beats| {
            let ledger = Dir::new(["recovered", group])?;
            Ok(Places { group: group.to_owned(), beats, ledger })
        });
        Self { shared: Arc::new(Shared { coord, places, exchange: clock::Exchange::default() }) }
    }

    /// Begins to beat for `peer`, once per `every`, until the publisher is dropped, leaves, or is superseded by a later
    /// run of the same peer. The first beat goes out at once, in the background. It stands on no session: closing the
    /// coordinator does not end it.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name of the group or the peer, or if `every` is zero. What goes wrong later shows in
    /// [`Publisher::status`] and is tried again with the next beat.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn beat(&self, peer: &str, every: Duration) -> Result<Publisher> {
        self.beat_with(peer, every, "")
    }

    /// As [`beat`](Self::beat), with a text that every beat carries, for example an address.
    ///
    /// # Errors
    /// As for [`beat`](Self::beat), and `InvalidInput` if the text is longer than [`MAX_PAYLOAD`] bytes.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn beat_with(&self, peer: &str, every: Duration, payload: &str) -> Result<Publisher> {
        if every.is_zero() {
            return Err(Error::invalid("heartbeat", "the interval between beats is zero").key(peer));
        }
        if payload.len() > MAX_PAYLOAD {
            let message = format!("the payload has {} bytes, at most {MAX_PAYLOAD} fit", payload.len());
            return Err(Error::invalid("heartbeat", message).key(peer));
        }
        Publisher::start(self.shared.clone(), peer, every, payload)
    }

    /// Begins to watch over the group.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name of the group or options that cannot work.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn monitor(&self, options: MonitorOptions) -> Result<Monitor> {
        Monitor::start(self.shared.clone(), options)
    }
}

/// The longest payload of a beat, in bytes.
pub const MAX_PAYLOAD: usize = 4096;

impl Shared {
    fn places(&self) -> Result<&Places> {
        self.places.as_ref().map_err(Clone::clone)
    }

    fn backend(&self) -> &Arc<dyn Backend> {
        self.coord.backend()
    }

    fn name(&self) -> &'static str {
        self.coord.profile().backend
    }

    async fn entry(&self, key: &Key) -> Result<Option<Entry>> {
        Ok(self.backend().read(&KeyRange::One(key.clone())).await?.entries.pop())
    }
}

/// That a key is as it was read.
fn as_read(key: &Key, entry: Option<&Entry>) -> Check {
    match entry {
        Some(entry) => Check::Unchanged { key: key.clone(), modified: entry.modified },
        None => Check::Absent(key.clone()),
    }
}

/// A transaction that puts values on no lease.
fn put_txn(checks: Vec<Check>, puts: impl IntoIterator<Item = (Key, Vec<u8>)>) -> Txn {
    let put = |(key, value): (Key, Vec<u8>)| Write::Put { key, value: value.into(), lease: None };
    Txn { checks, writes: puts.into_iter().map(put).collect() }
}

/// An error of the recipe itself.
fn stopped(operation: &'static str, message: &str) -> Error {
    Error::new(ErrorKind::Unavailable, operation, message)
}
