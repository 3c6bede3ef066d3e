//! Watches: fed in the step that makes the change, so that no version is missed and none comes late.
//!
//! Promise: a watch has one task, which lives as long as the reader, the client and the store all do; it ends
//! leases at their deadline when nobody else is there to do it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use quorate_core::{
    Key, KeyRange, Result, Revision, Watch, WatchEvent, WatchSender,
    watch::{WATCH_CAPACITY, channel},
};
use tokio::{task::AbortHandle, time::sleep_until};

use crate::{
    faults::{Link, cut_off},
    store::{Change, Directory, Item, State, Store, directory},
};

#[derive(Debug)]
pub(crate) struct Watcher {
    id: u64,
    client: u64,
    range: KeyRange,
    sender: Arc<WatchSender>,
    // Its client is cut off or paused: changes do not arrive, and a `Reset` follows when it is back.
    silent: bool,
    // Ends with this value, and lets go of its share of the sender.
    task: AbortHandle,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watcher {
    fn reset(&self, keys: &BTreeMap<Arc<str>, Item>, revision: u64) {
        // A `Reset` always finds room.
        let _ = self.sender.send(WatchEvent::Reset(Directory::snapshot(keys, &self.range, revision)));
    }

    fn tell<'a>(&self, changes: impl Iterator<Item = &'a Change>, keys: &BTreeMap<Arc<str>, Item>, revision: u64) {
        for change in changes.filter(|change| self.range.matches(&change.name)) {
            let dir = self.range.dir();
            let event = match &change.item {
                Some(item) => WatchEvent::Put(item.entry(dir, &change.name)),
                None => WatchEvent::Delete {
                    key: Key::from_encoded(dir, change.name.clone()),
                    revision: Revision(revision),
                },
            };
            if self.sender.send(event).is_err() {
                // It has the rest of the changes too.
                return self.reset(keys, revision);
            }
        }
    }
}

/// Opens a watch, in one step with reading what there is.
pub(crate) fn open(store: &Arc<Store>, state: &mut State, link: &Link, path: &str, range: &KeyRange) -> Result<Watch> {
    // Asked under the store's lock, which `Faults` holds too: a cut comes before this watch or interrupts it.
    let silent = link.is_paused();
    if link.is_cut() {
        return Err(cut_off("watch"));
    }
    state.last_watch += 1;
    let (id, revision) = (state.last_watch, state.revision);
    let (sender, watch) = channel(WATCH_CAPACITY);
    let sender = Arc::new(sender);
    let task = tokio::spawn(attend(Arc::downgrade(store), sender.clone(), path.into(), id)).abort_handle();
    let directory = directory(&mut state.directories, path);
    let watcher = Watcher { id, client: link.client, range: range.clone(), sender, silent, task };
    watcher.reset(&directory.keys, revision);
    directory.watchers.push(watcher);
    Ok(watch)
}

/// Ends leases in time until the reader goes, and then the watch.
async fn attend(store: Weak<Store>, sender: Arc<WatchSender>, path: Arc<str>, id: u64) {
    let reader = sender.closed();
    tokio::pin!(reader);
    loop {
        // The store ends with its clients, watched or not.
        let Some(shared) = store.upgrade() else { return };
        let (deadline, sooner) = shared.lock().next_deadline();
        drop(shared);
        tokio::select! {
            () = &mut reader => break,
            () = sooner => {}
            () = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
    if let Some(store) = store.upgrade() {
        store.lock().end_watch(&path, id);
    }
}

impl State {
    /// Tells the changes of one step to those who watch.
    pub(crate) fn publish(&mut self, changes: &[Change]) {
        let mut told: Vec<&str> = Vec::new();
        for Change { path, .. } in changes {
            if told.contains(&&**path) {
                continue;
            }
            told.push(path);
            let Some(Directory { keys, watchers, .. }) = self.directories.get(path) else { continue };
            for watcher in watchers.iter().filter(|w| !w.silent) {
                watcher.tell(changes.iter().filter(|c| c.path == *path), keys, self.revision);
            }
        }
    }

    /// Stops telling a client's watches anything, with the reason if the client is to know.
    pub(crate) fn silence(&mut self, client: u64, interrupted: bool) {
        for watcher in self.watchers_of(client) {
            watcher.silent = true;
            if interrupted {
                let why = cut_off("watch").key(&watcher.range).on("memory");
                // An interruption always finds room.
                let _ = watcher.sender.send(WatchEvent::Interrupted(why));
            }
        }
    }

    /// Tells a client's watches everything anew.
    pub(crate) fn unsilence(&mut self, client: u64) {
        let revision = self.revision;
        for Directory { keys, watchers, .. } in self.directories.values_mut() {
            for watcher in watchers.iter_mut().filter(|w| w.client == client && w.silent) {
                watcher.silent = false;
                watcher.reset(keys, revision);
            }
        }
    }

    pub(crate) fn end_watches_of(&mut self, client: u64) {
        for directory in self.directories.values_mut() {
            directory.watchers.retain(|watcher| watcher.client != client);
        }
        self.tidy();
    }

    fn end_watch(&mut self, path: &str, id: u64) {
        if let Some(directory) = self.directories.get_mut(path) {
            directory.watchers.retain(|watcher| watcher.id != id);
        }
        self.tidy();
    }

    fn watchers_of(&mut self, client: u64) -> impl Iterator<Item = &mut Watcher> {
        self.directories.values_mut().flat_map(|d| &mut d.watchers).filter(move |w| w.client == client)
    }
}
