//! Watches: blocking queries, told apart into changes.
//!
//! Promise: as `quorate_core::watch` says. A blocking query answers with the whole range, so what a reader is told is
//! the difference to what it was told before; changes that come faster than the answers are told as one.

use std::{
    collections::HashMap,
    hash::{Hash as _, Hasher as _},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use hyper::StatusCode;
use quorate_core::{
    Entry, ErrorKind, Key, KeyRange, LeaseId, Result, Revision, ServerClock, Snapshot, Watch, WatchEvent, WatchSender,
    watch::{Lagged, WATCH_CAPACITY, channel},
};
use tokio::sync::watch as signal;

use crate::{
    api::{Api, Found, How, Pair},
    error::{Effect, error, refused},
    path::{Space, restore},
    wait::{Pause, next_index},
};

/// How long the servers hold a query. Each answer carries the whole range, so not too short.
const WAIT: Duration = Duration::from_secs(30);

/// What is watched.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Range(KeyRange),
    /// The instances of a service.
    Service(Arc<crate::catalog::Name>),
}

/// Reads ranges.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    pub(crate) api: Arc<Api>,
    pub(crate) space: Arc<Space>,
}

impl Reader {
    pub(crate) async fn read(&self, operation: &'static str, range: &KeyRange, how: How) -> Result<Snapshot> {
        let path = self.space.range(range);
        let Found { items, index } = match range {
            KeyRange::One(_) => self.api.get(operation, &path, how).await,
            KeyRange::Prefix { .. } => self.api.list(operation, &path, how).await,
        }
        .map_err(|e| e.key(range))?;
        let dir = self.space.dir(range.dir());
        let mut entries: Vec<Entry> = items.into_iter().filter_map(|pair| entry(range, &dir, pair)).collect();
        // Consul sorts by stored key, which differs from the order of encoded names where it had to escape.
        entries.sort_unstable_by(|a, b| a.key.encoded().cmp(b.key.encoded()));
        Ok(Snapshot { entries, revision: Revision(index) })
    }

    /// The agent's clock, from the date of an answer that costs the servers nothing.
    pub(crate) async fn clock(&self) -> Result<ServerClock> {
        const OP: &str = "clock";
        let answer = self.api.fetch("/v1/status/leader", None).await.map_err(|f| f.into_error(OP, Effect::Read))?;
        if answer.status != StatusCode::OK {
            return Err(refused(OP, Effect::Read, answer.status, &answer.body));
        }
        let since = answer.date.and_then(|date| date.duration_since(UNIX_EPOCH).ok());
        let earliest = since.ok_or_else(|| error(ErrorKind::Unsupported, OP, "the agent's answer bears no date"))?;
        Ok(ServerClock { earliest, latest: earliest + Duration::from_secs(1) })
    }

    async fn look(&self, target: &Target, how: How) -> Result<Snapshot> {
        match target {
            Target::Range(range) => self.read("watch", range, how).await,
            Target::Service(name) => name.read(&self.api, how).await,
        }
    }

    /// Starts a watch; the first `Reset` is in it when this returns.
    pub(crate) async fn watch(&self, target: Target, mut alive: signal::Receiver<()>) -> Result<Watch> {
        let first = self.look(&target, How::Consistent).await?;
        let (sender, watch) = channel(WATCH_CAPACITY);
        let mut follower =
            Follower { reader: self.clone(), target, sender, known: HashMap::new(), index: 0, doubt: false };
        follower.reset(first);
        tokio::spawn(async move {
            tokio::select! {
                () = follower.follow() => {}
                _ = alive.changed() => {}
            }
        });
        Ok(watch)
    }
}

fn entry(range: &KeyRange, dir: &str, pair: Pair) -> Option<Entry> {
    let key = match range {
        KeyRange::One(key) => key.clone(),
        KeyRange::Prefix { dir: d, .. } => {
            restore(d, pair.key.strip_prefix(dir)?).filter(|key| !key.encoded().is_empty())?
        }
    };
    Some(Entry {
        key,
        value: pair.value,
        created: Revision(pair.create_index),
        modified: Revision(pair.modify_index),
        lease: pair.session.map(LeaseId::new),
    })
}

/// What an entry is recognised by. A service's health may change back while its index stays: a check that is removed leaves
/// no index behind. So its value counts too; a key's does not need to be looked at.
type Mark = (Revision, u64);

/// The server's side of one watch.
struct Follower {
    reader: Reader,
    target: Target,
    sender: WatchSender,
    /// What the reader of the watch has been told.
    known: HashMap<Key, Mark>,
    /// What to wait on; 0 for a read at once, confirmed by a majority.
    index: u64,
    /// An answer was older than one before it.
    doubt: bool,
}

impl Follower {
    async fn follow(&mut self) {
        let mut pause = Pause::default();
        let mut interrupted = false;
        loop {
            let read = tokio::select! {
                read = self.reader.look(&self.target, How::since(self.index, WAIT)) => read,
                () = self.sender.closed() => return,
            };
            match read {
                Ok(now) if interrupted => {
                    self.reset(now);
                    interrupted = false;
                    pause = Pause::default();
                }
                Ok(now) => self.changed(now),
                Err(error) => {
                    interrupted = true;
                    // What is read next must not be waited for: the servers may have lost their data.
                    self.index = 0;
                    tracing::debug!(%error, "a watch is interrupted and will be made again");
                    // An interruption always fits.
                    self.sender.send(WatchEvent::Interrupted(error)).ok();
                    tokio::select! {
                        () = pause.sleep() => {}
                        () = self.sender.closed() => return,
                    }
                }
            }
        }
    }

    fn mark(&self, entry: &Entry) -> Mark {
        let mut hasher = std::hash::DefaultHasher::new();
        if let Target::Service(_) = self.target {
            entry.value.hash(&mut hasher);
        }
        (entry.modified, hasher.finish())
    }

    fn reset(&mut self, now: Snapshot) {
        self.known = now.entries.iter().map(|e| (e.key.clone(), self.mark(e))).collect();
        self.index = now.revision.0.max(1);
        self.doubt = false;
        // A reset is never refused.
        self.sender.send(WatchEvent::Reset(now)).ok();
    }

    fn changed(&mut self, now: Snapshot) {
        if self.doubt {
            self.doubt = false;
            // Read from a majority. The same keys: old deletions were forgotten. Others: the data is another.
            let same = |e: &Entry| self.known.get(&e.key) == Some(&self.mark(e));
            if now.entries.len() == self.known.len() && now.entries.iter().all(same) {
                self.index = now.revision.0.max(1);
            } else {
                self.reset(now);
            }
            return;
        }
        let last = self.index;
        self.index = next_index(last, now.revision.0);
        if self.index == 0 {
            // A leader that has just been deposed may answer so: nothing of it is told.
            self.doubt = true;
        } else if self.tell(&now, last) == Err(Lagged) {
            self.reset(now);
        }
    }

    fn tell(&mut self, now: &Snapshot, last: u64) -> Result<(), Lagged> {
        let mut changed: Vec<&Entry> = Vec::new();
        let mut same = 0;
        for entry in &now.entries {
            if self.known.get(&entry.key) == Some(&self.mark(entry)) { same += 1 } else { changed.push(entry) }
        }
        let replaced = changed.iter().filter(|e| self.known.contains_key(&e.key)).count();
        if same + replaced < self.known.len() {
            let standing: std::collections::HashSet<&Key> = now.entries.iter().map(|e| &e.key).collect();
            let gone: Vec<Key> = self.known.keys().filter(|key| !standing.contains(key)).cloned().collect();
            for key in gone {
                self.known.remove(&key);
                // Later than everything the last answer showed; how much later is not told.
                self.sender.send(WatchEvent::Delete { key, revision: Revision(last + 1) })?;
            }
        }
        changed.sort_unstable_by_key(|e| e.modified);
        for entry in changed {
            self.known.insert(entry.key.clone(), self.mark(entry));
            self.sender.send(WatchEvent::Put(entry.clone()))?;
        }
        Ok(())
    }
}
