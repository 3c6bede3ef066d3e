//! Watches: first everything, then changes; never back, and never without the last version.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use quorate_core::{Backend, Entry, Key, KeyRange, Revision, Watch, WatchEvent, Write, watch::WATCH_CAPACITY};
use tokio::time::{sleep, timeout};

use crate::{
    Clients,
    support::{
        QUIET, SOON, actor, all, assert_ordered, cases, client, commit, dir, keep, key, kv, line, put, put_on, read,
        short, spawn, unchanged, within, write,
    },
};

cases!("watch":
    a_watch_begins_with_everything_there_is,
    each_change_is_told_once,
    a_watch_of_one_key_tells_of_no_other,
    a_watch_of_a_prefix_tells_exactly_of_it,
    a_watch_sees_what_other_clients_write,
    the_end_of_a_lease_is_told_as_a_delete,
    an_expiry_is_told_in_time_and_not_before,
    a_watch_never_goes_back_and_ends_at_the_last_version,
    no_write_is_lost_while_a_watch_starts,
    a_reader_that_lags_ends_up_with_the_truth,
    two_watches_do_not_disturb_each_other,
    a_dropped_watch_harms_nobody,
    a_key_moved_between_leases_is_not_told_as_gone,
);

/// What a reader knows, with the promises checked at every event.
struct View {
    watch: Watch,
    range: KeyRange,
    entries: BTreeMap<Key, Entry>,
    // The newest that was told of a key: its version, or the deletion of it.
    told: HashMap<Key, Revision>,
    resets: usize,
    puts: usize,
    deletes: usize,
    interruptions: usize,
}

impl View {
    async fn open(backend: &Arc<dyn Backend>, range: KeyRange) -> Self {
        let watch = backend.watch(&range).await.expect("a watch starts");
        let mut view = Self {
            watch,
            range,
            entries: BTreeMap::new(),
            told: HashMap::new(),
            resets: 0,
            puts: 0,
            deletes: 0,
            interruptions: 0,
        };
        within(SOON, "the first event", view.step()).await;
        assert_eq!(view.resets, 1, "a watch begins with a `Reset`");
        view
    }

    async fn step(&mut self) {
        let event = self.watch.next().await.unwrap_or_else(|| panic!("the watch ended: {:?}", self.watch.end()));
        match event {
            WatchEvent::Reset(snapshot) => {
                assert_ordered(&self.range, &snapshot);
                self.resets += 1;
                self.entries.clear();
                for entry in snapshot.entries {
                    self.tell(&entry.key, entry.modified, true);
                    self.entries.insert(entry.key.clone(), entry);
                }
            }
            WatchEvent::Put(entry) => {
                assert!(self.resets > 0, "a change came ahead of the first `Reset`");
                self.puts += 1;
                self.tell(&entry.key, entry.modified, false);
                self.entries.insert(entry.key.clone(), entry);
            }
            WatchEvent::Delete { key, revision } => {
                assert!(self.resets > 0, "a change came ahead of the first `Reset`");
                self.deletes += 1;
                self.tell(&key, revision, true);
                self.entries.remove(&key);
            }
            WatchEvent::Interrupted(_) => self.interruptions += 1,
        }
    }

    fn tell(&mut self, key: &Key, revision: Revision, again: bool) {
        assert!(key.dir() == self.range.dir() && self.range.matches(key.encoded()), "{key} is not watched");
        if let Some(told) = self.told.insert(key.clone(), revision) {
            assert!(revision >= told, "{key} went back from {told} to {revision}");
            assert!(again || revision > told, "{key} at {revision} was told twice");
        }
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        within(SOON, what, async {
            while !holds(self) {
                self.step().await;
            }
        })
        .await;
    }

    fn value(&self, key: &Key) -> Option<&[u8]> {
        self.entries.get(key).map(|e| &e.value[..])
    }

    fn changes(&self) -> (usize, usize, usize) {
        (self.resets, self.puts, self.deletes)
    }

    async fn assert_quiet(&mut self) {
        let before = self.changes();
        let event = timeout(QUIET, self.step()).await;
        assert!(event.is_err() || self.interruptions > 0, "an event without a change: {before:?} {:?}", self.changes());
    }

    /// Reads on until what is known equals what the store holds now.
    async fn catch_up(&mut self, backend: &Arc<dyn Backend>) {
        let truth: BTreeMap<_, _> =
            read(backend, &self.range).await.entries.into_iter().map(|e| (e.key.clone(), e)).collect();
        let held = within(SOON * 2, "catching up", async {
            while self.entries != truth {
                self.step().await;
            }
        });
        held.await;
    }
}

fn one(name: &str) -> KeyRange {
    KeyRange::One(key(name))
}

async fn a_watch_begins_with_everything_there_is(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    View::open(&backend, all()).await.assert_quiet().await;
    for name in ["b", "a", "c/d"] {
        write(&backend, [put(&key(name), name)]).await;
    }
    let view = View::open(&backend, all()).await;
    let names: Vec<_> = view.entries.keys().filter_map(Key::name).collect();
    assert_eq!(names, ["a", "b", "c/d"]);
    let view = View::open(&backend, one("b")).await;
    assert_eq!(view.value(&key("b")), Some(&b"b"[..]));
    assert_eq!(view.entries.len(), 1);
    assert_eq!(View::open(&backend, one("none")).await.entries.len(), 0);
}

async fn each_change_is_told_once(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    for range in [one("a"), all()] {
        let mut view = View::open(&a.backend, range).await;
        for i in 0..5 {
            let revision = write(&a.backend, [put_on(&a.lease.id, &key("a"), i.to_string())]).await;
            view.until("the change", |v| v.value(&key("a")) == Some(i.to_string().as_bytes())).await;
            let entry = &view.entries[&key("a")];
            assert_eq!((entry.modified, entry.lease.as_ref()), (revision, Some(&a.lease.id)));
            if i == 2 {
                write(&a.backend, [Write::Delete(key("a"))]).await;
                view.until("the deletion", |v| v.entries.is_empty()).await;
            }
        }
        write(&a.backend, [Write::Delete(key("a"))]).await;
        view.until("the deletion", |v| v.entries.is_empty()).await;
        // Refused and empty changes are none.
        let stale = commit(&a.backend, [unchanged(&key("a"), Revision(1))], [put(&key("a"), "no")]).await;
        assert!(!stale.applied);
        write(&a.backend, [Write::Delete(key("a"))]).await;
        view.assert_quiet().await;
        if view.interruptions == 0 {
            assert_eq!(view.changes(), (1, 5, 2), "one reset, five puts and two deletes");
        }
    }
}

async fn a_watch_of_one_key_tells_of_no_other(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let mut view = View::open(&a.backend, one("a")).await;
    for other in ["aa", "a/b", "A", "b", "a/"] {
        write(&a.backend, [put(&key(other), "1")]).await;
        write(&a.backend, [Write::Delete(key(other))]).await;
    }
    write(&a.backend, [put(&Key::new(&dir("kv2"), "a").expect("a valid name"), "1")]).await;
    let place = a.join(&line("a")).await;
    a.leave(&place.ticket).await;
    view.assert_quiet().await;
    write(&a.backend, [put(&key("a"), "1")]).await;
    view.until("the watched key", |v| v.value(&key("a")).is_some()).await;
}

async fn a_watch_of_a_prefix_tells_exactly_of_it(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let mut view = View::open(&backend, KeyRange::prefix(&kv(), "foo/").expect("a valid prefix")).await;
    let mut folder = View::open(&backend, all()).await;
    for name in ["foo", "foo_other", "foo_other/a", "foo/a", "fo", "foo/b/c", "foo0"] {
        write(&backend, [put(&key(name), "1")]).await;
        write(&backend, [put(&Key::new(&dir("kv_other"), name).expect("a valid name"), "1")]).await;
    }
    write(&backend, [put(&key("foo/z"), "1")]).await;
    view.until("the last one", |v| v.value(&key("foo/z")).is_some()).await;
    let names: Vec<_> = view.entries.keys().filter_map(Key::name).collect();
    assert_eq!(names, ["foo/a", "foo/b/c", "foo/z"]);
    folder.until("all eight", |v| v.entries.len() == 8).await;
    write(&backend, [Write::Delete(key("foo/a"))]).await;
    write(&backend, [Write::Delete(key("foo"))]).await;
    view.catch_up(&backend).await;
    folder.catch_up(&backend).await;
}

async fn a_watch_sees_what_other_clients_write(clients: Arc<dyn Clients>) {
    let (a, b) = (client(&clients).await, client(&clients).await);
    let mut view = View::open(&a, all()).await;
    for i in 0..10 {
        write(&b, [put(&key(&i.to_string()), "1")]).await;
    }
    view.until("ten keys", |v| v.entries.len() == 10).await;
    for i in 0..10 {
        write(&b, [Write::Delete(key(&i.to_string()))]).await;
    }
    view.until("no key", |v| v.entries.is_empty()).await;
}

async fn the_end_of_a_lease_is_told_as_a_delete(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let lease = keep(&a.backend).await;
    for name in ["a", "b", "c"] {
        write(&a.backend, [put_on(&lease.id, &key(name), "1")]).await;
    }
    write(&a.backend, [put(&key("d"), "1")]).await;
    let (mut view, mut single) = (View::open(&a.backend, all()).await, View::open(&a.backend, one("b")).await);
    a.backend.revoke(&lease.id).await.expect("revoking works");
    view.until("three deletes", |v| v.entries.len() == 1).await;
    single.until("the delete", |v| v.entries.is_empty()).await;
    view.assert_quiet().await;
    if view.interruptions == 0 {
        assert_eq!(view.changes(), (1, 0, 3), "exactly one delete for each key");
    }
}

async fn an_expiry_is_told_in_time_and_not_before(clients: Arc<dyn Clients>) {
    let (dying, other) = (client(&clients).await, client(&clients).await);
    let (lease, expiry) = short(&clients, &dying).await;
    write(&dying, [put_on(&lease, &key("a"), "1")]).await;
    let mut view = View::open(&other, all()).await;
    assert_eq!(view.entries.len(), 1);
    within(expiry.patience(), "the delete", async {
        while !view.entries.is_empty() {
            view.step().await;
        }
    })
    .await;
    expiry.assert_now("the key");
    view.assert_quiet().await;
}

async fn a_watch_never_goes_back_and_ends_at_the_last_version(clients: Arc<dyn Clients>) {
    let (a, b) = (client(&clients).await, client(&clients).await);
    let mut views = [View::open(&a, all()).await, View::open(&a, one("k0")).await, View::open(&b, all()).await];
    let mut writers: Vec<_> = [a.clone(), b.clone()]
        .into_iter()
        .enumerate()
        .map(|(w, backend)| {
            spawn(async move {
                for i in 0..150 {
                    let name = key(&format!("k{}", i % 3));
                    if (i + w) % 7 == 6 {
                        write(&backend, [Write::Delete(name)]).await;
                    } else {
                        write(&backend, [put(&name, format!("{w}-{i}"))]).await;
                    }
                }
            })
        })
        .collect();
    for writer in &mut writers {
        within(SOON * 2, "all writes", &mut writer.0).await.expect("no write failed");
    }
    for view in &mut views {
        view.catch_up(&a).await;
        view.assert_quiet().await;
    }
}

async fn no_write_is_lost_while_a_watch_starts(clients: Arc<dyn Clients>) {
    let (a, b) = (client(&clients).await, client(&clients).await);
    for round in 0..20 {
        let range = KeyRange::prefix(&kv(), &format!("{round}/")).expect("a valid prefix");
        let writer = spawn({
            let b = b.clone();
            async move {
                for i in 0..20 {
                    write(&b, [put(&key(&format!("{round}/{i}")), "1")]).await;
                }
            }
        });
        sleep(Duration::from_micros(300 * round)).await;
        let mut view = View::open(&a, range).await;
        view.until("every key, from the reset or as a change", |v| v.entries.len() == 20).await;
        drop(writer);
    }
}

async fn a_reader_that_lags_ends_up_with_the_truth(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    for i in 0..50 {
        write(&backend, [put(&key(&format!("old-{i}")), "1")]).await;
    }
    let mut view = View::open(&backend, all()).await;
    assert_eq!(view.entries.len(), 50);
    // More distinct keys than a watch holds unread, so that leaving any out would show.
    let batch = backend.profile().max_txn.min(25);
    let names: Vec<_> = (0..WATCH_CAPACITY + 300).map(|i| key(&format!("new-{i}"))).collect();
    for batch in names.chunks(batch) {
        write(&backend, batch.iter().map(|name| put(name, "1"))).await;
    }
    for i in 0..50 {
        write(&backend, [Write::Delete(key(&format!("old-{i}")))]).await;
    }
    sleep(QUIET).await;
    view.catch_up(&backend).await;
    assert_eq!(view.entries.len(), names.len());
    write(&backend, [put(&key("after"), "1")]).await;
    view.until("the watch goes on", |v| v.value(&key("after")).is_some()).await;
}

async fn two_watches_do_not_disturb_each_other(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let mut first = View::open(&backend, all()).await;
    let mut second = View::open(&backend, all()).await;
    let third = View::open(&backend, one("a")).await;
    write(&backend, [put(&key("a"), "1")]).await;
    for view in [&mut first, &mut second] {
        view.until("the change", |v| v.entries.len() == 1).await;
    }
    drop(second);
    drop(third);
    write(&backend, [put(&key("b"), "1")]).await;
    first.until("the change after the others ended", |v| v.entries.len() == 2).await;
    assert!(first.interruptions > 0 || first.resets == 1, "{:?}", first.changes());
}

async fn a_dropped_watch_harms_nobody(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let range = all();
    for i in 0..30 {
        let watching = backend.watch(&range);
        // Dropped before, while and after it is established.
        drop(timeout(Duration::from_micros(200 * i), watching).await);
    }
    let mut view = View::open(&backend, all()).await;
    write(&backend, [put(&key("a"), "1")]).await;
    view.until("the change", |v| v.entries.len() == 1).await;
}

async fn a_key_moved_between_leases_is_not_told_as_gone(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let second = keep(&a.backend).await;
    write(&a.backend, [put_on(&a.lease.id, &key("a"), "1")]).await;
    let mut view = View::open(&a.backend, all()).await;
    write(&a.backend, [put_on(&second.id, &key("a"), "2")]).await;
    view.until("the new value", |v| v.value(&key("a")) == Some(b"2")).await;
    write(&a.backend, [put(&key("a"), "3")]).await;
    view.until("the new value", |v| v.value(&key("a")) == Some(b"3")).await;
    assert_eq!(view.deletes, 0, "a reader must not take a move for the end of the key");
    assert_eq!(view.entries[&key("a")].lease, None);
    assert_eq!(view.entries[&key("a")].value, Bytes::from_static(b"3"));
}
