//! Views: what a watched directory holds, kept at hand through outages.
//!
//! Promise: a view is never emptied by an error. While the coordinator cannot be reached the last good set stays, marked
//! with the instant since when it may be stale; for a while after a gap nothing is taken out, because a server that lost
//! its data, or let the leases end that nobody could renew, is filled again by those who are still there.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::FutureExt as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    backend::{Entry, Revision},
    error::Result,
    watch::{Watch, WatchEvent},
};

/// How many events are taken in before readers see the result, so that a storm of changes costs one copy each time.
const BATCH: usize = 1024;

/// Where a view comes from, and what it makes of the entries.
#[async_trait]
pub(crate) trait Source: fmt::Debug + Send + Sync + 'static {
    type Item: Send + Sync + 'static;
    async fn watch(&self) -> Result<Watch>;
    /// The name of an entry and what it says, or why it says nothing.
    fn read(&self, entry: &Entry) -> Result<Self::Item, String>;
}

/// A view at one moment.
#[derive(Debug)]
pub(crate) struct Sight<T> {
    /// By name.
    pub(crate) items: BTreeMap<String, Arc<T>>,
    /// The records that could not be read.
    pub(crate) unreadable: BTreeMap<String, Arc<str>>,
    /// Since when the coordinator has not been heard of.
    pub(crate) stale_since: Option<Instant>,
    /// The highest revision seen.
    pub(crate) revision: Revision,
}

// Derived, it would ask for a `T` that can be cloned.
impl<T> Clone for Sight<T> {
    fn clone(&self) -> Self {
        let Self { items, unreadable, stale_since, revision } = self;
        let (items, unreadable) = (items.clone(), unreadable.clone());
        Self { items, unreadable, stale_since: *stale_since, revision: *revision }
    }
}

/// Starts a view. The first set is in it when this returns.
///
/// # Errors
/// What the first watch fails with.
pub(crate) async fn open<S: Source>(source: S, linger: Duration) -> Result<watch::Receiver<Arc<Sight<S::Item>>>> {
    let mut watch = source.watch().await?;
    let empty = Sight { items: BTreeMap::new(), unreadable: BTreeMap::new(), stale_since: None, revision: Revision(0) };
    let mut keeper = Keeper { source, linger, now: empty, missing: BTreeMap::new(), gap: false, grace: None };
    // Backends have the first set ready when `watch` returns; one that does not is waited for.
    while let Some(event) = watch.next().await {
        let first = matches!(event, WatchEvent::Reset(_));
        keeper.take(event);
        if first {
            break;
        }
    }
    let (tell, told) = watch::channel(Arc::new(keeper.now.clone()));
    tokio::spawn(keeper.run(watch, tell));
    Ok(told)
}

struct Keeper<S: Source> {
    source: S,
    linger: Duration,
    now: Sight<S::Item>,
    /// Items that the coordinator does not show any more since a gap, and when they are given up.
    missing: BTreeMap<String, Instant>,
    /// Something may have been missed since the last set.
    gap: bool,
    /// Until when nothing is taken out, after a gap.
    grace: Option<Instant>,
}

impl<S: Source> Keeper<S> {
    async fn run(mut self, mut watch: Watch, tell: watch::Sender<Arc<Sight<S::Item>>>) {
        loop {
            let over = self.missing.values().min().copied();
            let event = tokio::select! {
                () = tell.closed() => return,
                event = watch.next() => event,
                // While nothing is heard, nothing is taken out.
                () = sleep_until(over.unwrap_or_else(Instant::now)), if over.is_some() && !self.gap => {
                    self.give_up();
                    tell.send_replace(Arc::new(self.now.clone()));
                    continue;
                }
            };
            let ended = event.is_none();
            if let Some(event) = event {
                self.take(event);
                // Whatever else has come is taken in before anybody looks.
                for _ in 0..BATCH {
                    let Some(Some(event)) = watch.next().now_or_never() else { break };
                    self.take(event);
                }
            }
            if ended {
                self.interrupted();
            }
            tell.send_replace(Arc::new(self.now.clone()));
            if ended {
                tracing::warn!(source = ?self.source, error = ?watch.end(), "a watch ended; opening another");
                let Some(next) = self.reopen(&tell).await else { return };
                watch = next;
            }
        }
    }

    /// Tries for ever, unless nobody looks any more.
    async fn reopen(&self, tell: &watch::Sender<Arc<Sight<S::Item>>>) -> Option<Watch> {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(10))
            .with_jitter()
            .without_max_times()
            .build();
        loop {
            tokio::select! {
                () = tell.closed() => return None,
                () = sleep(pauses.next().unwrap_or(Duration::from_secs(10))) => {}
            }
            match self.source.watch().await {
                Ok(watch) => return Some(watch),
                Err(error) => tracing::debug!(source = ?self.source, %error, "the view stays as it was"),
            }
        }
    }

    fn take(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Reset(snapshot) => {
                let mut old = std::mem::take(&mut self.now.items);
                self.now.unreadable.clear();
                self.missing.retain(|name, _| old.contains_key(name));
                for entry in &snapshot.entries {
                    self.put(entry);
                }
                if self.gap && !self.linger.is_zero() {
                    // Another gap, another chance.
                    self.missing.clear();
                    self.grace = Some(Instant::now() + self.linger);
                }
                if let Some(until) = self.in_grace() {
                    old.retain(|name, _| !self.now.items.contains_key(name));
                    for (name, item) in old {
                        self.missing.entry(name.clone()).or_insert(until);
                        self.now.items.insert(name, item);
                    }
                } else {
                    self.missing.clear();
                }
                (self.gap, self.now.stale_since) = (false, None);
                // A restored server starts over: the last set decides, not the highest number.
                self.now.revision = snapshot.revision;
            }
            WatchEvent::Put(entry) => {
                self.put(&entry);
                self.now.revision = self.now.revision.max(entry.modified);
            }
            WatchEvent::Delete { key, revision } => {
                let name = key.name().unwrap_or_else(|| key.encoded().to_owned());
                self.now.unreadable.remove(&name);
                match self.in_grace() {
                    Some(until) if self.now.items.contains_key(&name) => {
                        self.missing.entry(name).or_insert(until);
                    }
                    _ => {
                        self.now.items.remove(&name);
                        self.missing.remove(&name);
                    }
                }
                self.now.revision = self.now.revision.max(revision);
            }
            WatchEvent::Interrupted(error) => {
                tracing::debug!(source = ?self.source, %error, "the view may be stale");
                self.interrupted();
            }
        }
    }

    fn in_grace(&self) -> Option<Instant> {
        self.grace.filter(|until| Instant::now() < *until)
    }

    fn interrupted(&mut self) {
        self.gap = true;
        self.now.stale_since.get_or_insert_with(Instant::now);
    }

    fn put(&mut self, entry: &Entry) {
        let read = entry.key.name().ok_or_else(|| "the name is not encoded as ours are".to_owned());
        let name = read.clone().unwrap_or_else(|_| entry.key.encoded().to_owned());
        self.missing.remove(&name);
        match read.and_then(|_| self.source.read(entry)) {
            Ok(item) => {
                self.now.unreadable.remove(&name);
                self.now.items.insert(name, Arc::new(item));
            }
            Err(why) => {
                tracing::warn!(key = %entry.key, why, "a record that cannot be read is left out");
                self.now.items.remove(&name);
                self.now.unreadable.insert(name, why.into());
            }
        }
    }

    fn give_up(&mut self) {
        let now = Instant::now();
        let items = &mut self.now.items;
        self.missing.retain(|name, until| {
            if *until <= now {
                items.remove(name);
            }
            *until > now
        });
    }
}
