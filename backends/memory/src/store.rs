//! The store that the clients share: directories with keys and tickets, and the leases that these stand on.
//!
//! Promise: every operation is one step under one lock that is never held across an await, and begins with ending
//! the leases whose deadline has passed, so that nobody ever sees anything of a lease after its end.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use quorate_core::{Dir, Entry, Key, KeyRange, Lease, LeaseId, Revision, ServerClock, Snapshot};
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::Instant,
};

use crate::{line::Standing, watch::Watcher};

/// Emptied directories are kept for their next use until this many more than there are directories have been emptied.
const IDLE_DIRECTORIES: usize = 1024;

#[derive(Debug)]
pub(crate) struct Store {
    state: Mutex<State>,
    clients: AtomicU64,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::new()), clients: AtomicU64::new(0) }
    }

    pub(crate) fn client_id(&self) -> u64 {
        self.clients.fetch_add(1, Ordering::Relaxed)
    }

    /// The store as of now.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock panics half-way through a change; if it did, the rest is still worth more than
        // an abort of every test that shares the store.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the lock, so that time never runs back from one step to the next.
        state.now = Instant::now();
        state.reap();
        state
    }
}

#[derive(Debug)]
pub(crate) struct State {
    /// When the current step takes place.
    pub(crate) now: Instant,
    /// Of the last write; every write takes the next one.
    pub(crate) revision: u64,
    pub(crate) directories: HashMap<Arc<str>, Directory>,
    pub(crate) leases: BTreeMap<u64, Granted>,
    // One for each lease.
    deadlines: BTreeSet<(Instant, u64)>,
    // Told when a lease is granted that ends before all others.
    sooner: Arc<Notify>,
    last_lease: u64,
    pub(crate) last_watch: u64,
    /// By how much the store's wall clock is ahead of the machine's.
    pub(crate) clock_ahead: Duration,
    /// How often a directory was emptied since the last time empty ones were dropped.
    emptied: usize,
}

impl State {
    fn new() -> Self {
        Self {
            now: Instant::now(),
            revision: 0,
            clock_ahead: Duration::ZERO,
            directories: HashMap::new(),
            leases: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            sooner: Arc::default(),
            last_lease: 0,
            last_watch: 0,
            emptied: 0,
        }
    }

    /// The wall clock of the store, which is the machine's unless it was set.
    pub(crate) fn clock(&self) -> ServerClock {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + self.clock_ahead;
        let earliest = Duration::from_micros(u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
        ServerClock { earliest, latest: earliest + Duration::from_micros(1) }
    }
}

/// The directory at this path, made if it is not there.
pub(crate) fn directory<'a>(directories: &'a mut HashMap<Arc<str>, Directory>, path: &str) -> &'a mut Directory {
    // Looked up twice, as `entry` would need an owned path every time.
    if !directories.contains_key(path) {
        let path: Arc<str> = path.into();
        let empty =
            Directory { path: path.clone(), keys: BTreeMap::new(), tickets: BTreeMap::new(), watchers: Vec::new() };
        directories.insert(path, empty);
    }
    directories.get_mut(path).expect("inserted above if it was missing")
}

/// What one path holds: the keys of a directory, or the tickets of a line.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) path: Arc<str>,
    // By encoded name.
    pub(crate) keys: BTreeMap<Arc<str>, Item>,
    // By token, which is the order of arrival.
    pub(crate) tickets: BTreeMap<u64, Standing>,
    pub(crate) watchers: Vec<Watcher>,
}

impl Directory {
    fn is_idle(&self) -> bool {
        self.keys.is_empty() && self.tickets.is_empty() && self.watchers.is_empty()
    }

    /// What the range holds, as of `revision`.
    pub(crate) fn snapshot(keys: &BTreeMap<Arc<str>, Item>, range: &KeyRange, revision: u64) -> Snapshot {
        let entries = match range {
            KeyRange::One(key) => {
                keys.get_key_value(key.encoded()).into_iter().map(|(n, i)| i.entry(key.dir(), n)).collect()
            }
            KeyRange::Prefix { dir, prefix } => keys
                .range::<str, _>((Bound::Included(&**prefix), Bound::Unbounded))
                .take_while(|(name, _)| name.starts_with(&**prefix))
                .map(|(name, item)| item.entry(dir, name))
                .collect(),
        };
        Snapshot { entries, revision: Revision(revision) }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) value: Bytes,
    pub(crate) created: u64,
    pub(crate) modified: u64,
    pub(crate) lease: Option<(u64, LeaseId)>,
}

impl Item {
    pub(crate) fn entry(&self, dir: &Dir, name: &Arc<str>) -> Entry {
        Entry {
            key: Key::from_encoded(dir, name.clone()),
            value: self.value.clone(),
            created: Revision(self.created),
            modified: Revision(self.modified),
            lease: self.lease.as_ref().map(|(_, id)| id.clone()),
        }
    }
}

/// A lease, and all that stands on it.
#[derive(Debug)]
pub(crate) struct Granted {
    ttl: Duration,
    pub(crate) deadline: Instant,
    owner: u64,
    // By nonce and token: a repeated attempt to join is found by its nonce. The value is the line's path.
    pub(crate) tickets: BTreeMap<(u128, u64), Arc<str>>,
    // Path and name.
    pub(crate) keys: BTreeSet<(Arc<str>, Arc<str>)>,
}

/// A change of one key, for those who watch it.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) path: Arc<str>,
    pub(crate) name: Arc<str>,
    /// `None` for a deletion.
    pub(crate) item: Option<Item>,
}

impl State {
    pub(crate) fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    /// Notes that a directory may have become empty. Dropping each one at once would cost a lock that is taken
    /// again and again two allocations each time.
    pub(crate) fn tidy(&mut self) {
        self.emptied += 1;
        if self.emptied > self.directories.len() + IDLE_DIRECTORIES {
            self.directories.retain(|_, directory| !directory.is_idle());
            self.emptied = 0;
        }
    }

    pub(crate) fn read(&self, path: &str, range: &KeyRange) -> Snapshot {
        match self.directories.get(path) {
            Some(directory) => Directory::snapshot(&directory.keys, range, self.revision),
            None => Snapshot { entries: Vec::new(), revision: Revision(self.revision) },
        }
    }

    pub(crate) fn grant(&mut self, ttl: Duration, owner: u64) -> Lease {
        self.last_lease += 1;
        let (id, deadline) = (self.last_lease, self.now + ttl);
        let granted = Granted { ttl, deadline, owner, tickets: BTreeMap::new(), keys: BTreeSet::new() };
        self.leases.insert(id, granted);
        self.deadlines.insert((deadline, id));
        if self.deadlines.first() == Some(&(deadline, id)) {
            self.sooner.notify_waiters();
        }
        Lease { id: LeaseId::new(id.to_string()), ttl }
    }

    /// The TTL now in force, or `None` if the lease has ended.
    pub(crate) fn renew(&mut self, lease: &LeaseId) -> Option<Duration> {
        let id = number(lease.as_str())?;
        let granted = self.leases.get_mut(&id)?;
        self.deadlines.remove(&(granted.deadline, id));
        granted.deadline = self.now + granted.ttl;
        self.deadlines.insert((granted.deadline, id));
        Some(granted.ttl)
    }

    /// Ends the lease; says whether it stood.
    pub(crate) fn revoke(&mut self, lease: &LeaseId) -> bool {
        number(lease.as_str()).is_some_and(|id| self.end(id))
    }

    /// Ends every lease granted to this client, and says how many.
    pub(crate) fn revoke_all_of(&mut self, owner: u64) -> usize {
        let owned: Vec<_> = self.leases.iter().filter(|(_, l)| l.owner == owner).map(|(id, _)| *id).collect();
        owned.into_iter().filter(|id| self.end(*id)).count()
    }

    /// When the next lease ends, unless it is renewed, and what tells of one that ends before that.
    pub(crate) fn next_deadline(&self) -> (Option<Instant>, OwnedNotified) {
        (self.deadlines.first().map(|(deadline, _)| *deadline), self.sooner.clone().notified_owned())
    }

    fn reap(&mut self) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= self.now
        {
            self.end(id);
        }
    }

    fn end(&mut self, id: u64) -> bool {
        let Some(lease) = self.leases.remove(&id) else { return false };
        self.deadlines.remove(&(lease.deadline, id));
        if lease.tickets.is_empty() && lease.keys.is_empty() {
            return true;
        }
        self.next_revision();
        for ((_, token), path) in lease.tickets {
            let standing = self.directories.get_mut(&path).and_then(|line| line.tickets.remove(&token));
            if let Some(standing) = standing {
                standing.left();
            }
            self.tidy();
        }
        let mut changes = Vec::new();
        for (path, name) in lease.keys {
            let Some(directory) = self.directories.get_mut(&path) else { continue };
            if directory.keys.remove(&name).is_some() && !directory.watchers.is_empty() {
                changes.push(Change { path, name, item: None });
            }
            self.tidy();
        }
        self.publish(&changes);
        true
    }
}

/// Leases and tickets are named by numbers; a name in any other form is of another store or backend.
pub(crate) fn number(name: &str) -> Option<u64> {
    // Only the canonical form: `+7` and `07` name nothing.
    let canonical = name == "0" || name.starts_with(|c: char| matches!(c, '1'..='9'));
    if canonical { name.parse().ok() } else { None }
}
