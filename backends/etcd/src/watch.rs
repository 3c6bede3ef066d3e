//! Watching a range of keys.
//!
//! Promise: that of [`Watch`]. After any gap the range is read again; the watch re-establishes itself for ever.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use etcd_client::{Event, EventType, KeyValue};
use quorate_core::{
    Entry, Error, Key, KeyRange, Result, Revision, Snapshot, Watch, WatchEvent, WatchSender,
    watch::{WATCH_CAPACITY, channel},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    Inner,
    error::{Call, Fault},
    path::{lease_id, revision},
    stream::{Ending, Signal, Watching},
};

const CALL: Call = Call::read("watch");
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Pauses between attempts to establish a watch: none before the first, then growing, with jitter.
struct Backoff(Duration);

impl Backoff {
    const NEW: Self = Self(Duration::ZERO);

    async fn pause(&mut self) {
        if !self.0.is_zero() {
            sleep(self.0.mul_f64(rand::random_range(0.5..1.5))).await;
        }
        self.0 = (self.0 * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    }
}

/// Why a watch must be established again.
enum Gap {
    /// The reader has dropped the watch.
    Closed,
    /// Events are missing, but contact to the server is there.
    Missed,
    /// Contact was lost.
    Lost(Fault),
}

pub(crate) async fn watch(inner: &Arc<Inner>, range: &KeyRange) -> Result<Watch> {
    let (watching, snapshot) = establish(inner, range).await?;
    let (sender, watch) = channel(WATCH_CAPACITY);
    let seen = snapshot.revision;
    // A reset always fits.
    let _ = sender.send(WatchEvent::Reset(snapshot));
    inner.tasks.spawn(follow(inner.clone(), range.clone(), sender, watching, seen));
    Ok(watch)
}

/// First the watch, then the read: what happens in between is in both, and nothing is in neither.
async fn establish(inner: &Inner, range: &KeyRange) -> Result<(Watching, Snapshot)> {
    let stored = inner.layout.range(range);
    let watching = inner.streams.open(CALL, &stored, false).await.map_err(|fault| fault.error(CALL.verb).key(range))?;
    let limit = inner.pool.options.request_timeout;
    let snapshot = timeout(limit, inner.read_range(CALL, range)).await.unwrap_or_else(|_| {
        Err(Fault::new(CALL.doubt(), format!("no answer within {limit:?}")).error(CALL.verb).key(range))
    })?;
    Ok((watching, snapshot))
}

/// Feeds the reader until it goes away.
async fn follow(inner: Arc<Inner>, range: KeyRange, sender: WatchSender, watching: Watching, seen: Revision) {
    let (mut watching, mut seen) = (watching, seen);
    let mut backoff = Backoff::NEW;
    loop {
        let since = Instant::now();
        let gap = feed(&range, &inner, &sender, &mut watching, seen).await;
        if since.elapsed() > LONGEST_PAUSE {
            backoff = Backoff::NEW;
        }
        // Told once per gap: after an interruption the next event is a reset.
        let mut told = false;
        match gap {
            Gap::Closed => return,
            Gap::Missed => {}
            Gap::Lost(fault) => interrupted(&sender, fault.error(CALL.verb).key(&range), &mut told),
        }
        let snapshot;
        (watching, snapshot) = loop {
            let again = async {
                backoff.pause().await;
                establish(&inner, &range).await
            };
            tokio::select! {
                () = sender.closed() => return,
                established = again => match established {
                    Ok(established) => break established,
                    Err(error) => interrupted(&sender, error, &mut told),
                }
            }
        };
        // A server that lost its data counts from the beginning; the reset tells the reader so.
        seen = snapshot.revision;
        // A reset always fits.
        let _ = sender.send(WatchEvent::Reset(snapshot));
    }
}

fn interrupted(sender: &WatchSender, error: Error, told: &mut bool) {
    tracing::debug!(%error, "watch interrupted");
    if !std::mem::replace(told, true) {
        // Never lags: only changes do.
        let _ = sender.send(WatchEvent::Interrupted(error));
    }
}

async fn feed(
    range: &KeyRange,
    inner: &Inner,
    sender: &WatchSender,
    watching: &mut Watching,
    mut seen: Revision,
) -> Gap {
    // The snapshot holds all of its revision; a later revision may come in several messages.
    let snapshot = seen;
    loop {
        let signal = tokio::select! {
            () = sender.closed() => return Gap::Closed,
            signal = watching.next() => signal,
        };
        let events = match signal {
            Some(Signal::Events(events)) => events,
            Some(Signal::Begun) => continue,
            None | Some(Signal::Ended(Ending::Behind)) => return Gap::Missed,
            Some(Signal::Ended(Ending::Fault(fault))) => return Gap::Lost(fault),
        };
        for event in &events {
            let Some(kv) = event.kv() else { continue };
            let revision = revision(kv.mod_revision());
            if revision <= snapshot || revision < seen {
                continue;
            }
            seen = revision;
            let change = match change(inner, range, event, kv) {
                Ok(change) => change,
                Err(error) => {
                    tracing::warn!(%error, "change skipped");
                    continue;
                }
            };
            if sender.send(change).is_err() {
                return Gap::Missed;
            }
        }
    }
}

fn change(inner: &Inner, range: &KeyRange, event: &Event, kv: &KeyValue) -> Result<WatchEvent> {
    Ok(match event.event_type() {
        EventType::Put => WatchEvent::Put(entry(inner, CALL, range, kv.clone())?),
        EventType::Delete => {
            let name = inner.layout.name(CALL.verb, range.dir(), kv.key())?;
            WatchEvent::Delete { key: Key::from_encoded(range.dir(), name), revision: revision(kv.mod_revision()) }
        }
    })
}

/// An entry from etcd's form.
pub(crate) fn entry(inner: &Inner, call: Call, range: &KeyRange, kv: KeyValue) -> Result<Entry> {
    let name = inner.layout.name(call.verb, range.dir(), kv.key())?;
    let key = Key::from_encoded(range.dir(), name);
    let (created, modified) = (revision(kv.create_revision()), revision(kv.mod_revision()));
    let lease = (kv.lease() != 0).then(|| lease_id(kv.lease()));
    let (_, value) = kv.into_key_value();
    Ok(Entry { key, value: Bytes::from(value), created, modified, lease })
}
