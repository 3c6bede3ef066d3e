//! Watches where messages do not tell everything, or come faster than they are read.

mod support;

use std::{collections::BTreeMap, time::Duration};

use quorate_core::{KeyRange, Revision, Snapshot, WatchEvent, Write};
use support::*;
use tokio::{task::JoinSet, time::Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_changes_at_once_than_a_message_holds_come_as_a_reset() {
    let server = server().await;
    let b = connect(server.addr()).await;
    let lease1 = lease(&b).await;
    for batch in 0..10 {
        let writes = (0..60).map(|i| put(&key(&format!("{batch}-{i}")), "x", Some(&lease1))).collect();
        b.commit(&txn(vec![], writes)).await.unwrap();
    }
    b.commit(&txn(vec![], vec![put(&key("stays"), "x", None)])).await.unwrap();
    let mut watch = b.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await.entries.len(), 601);
    b.revoke(&lease1).await.unwrap();
    assert_eq!(names(&reset(&mut watch).await), ["stays"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_too_long_for_a_message_arrives_all_the_same() {
    let server = server().await;
    let b = connect(server.addr()).await;
    let mut one = b.watch(&KeyRange::One(key("big"))).await.unwrap();
    let mut other = b.watch(&KeyRange::One(key("other"))).await.unwrap();
    reset(&mut one).await;
    reset(&mut other).await;
    let big = "x".repeat(b.profile().max_value);
    b.commit(&txn(vec![], vec![put(&key("big"), &big, None), put(&key("other"), "small", None)])).await.unwrap();
    assert_eq!(reset(&mut one).await.entries[0].value, big);
    assert!(matches!(event(&mut other).await, WatchEvent::Put(e) if e.value == "small"), "not concerned");
}

/// What a reader of a watch knows.
#[derive(Default)]
struct View {
    keys: BTreeMap<String, (Revision, bytes::Bytes)>,
}

impl View {
    fn take(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Reset(now) => {
                for entry in &now.entries {
                    let known = self.keys.get(entry.key.encoded()).map(|known| known.0);
                    assert!(known <= Some(entry.modified), "{} goes back", entry.key);
                }
                self.keys = of(&now);
            }
            WatchEvent::Put(entry) => {
                let known = self.keys.get(entry.key.encoded()).map(|known| known.0);
                assert!(known < Some(entry.modified), "{} goes back", entry.key);
                self.keys.insert(entry.key.encoded().to_owned(), (entry.modified, entry.value));
            }
            WatchEvent::Delete { key, .. } => {
                self.keys.remove(key.encoded());
            }
            WatchEvent::Interrupted(e) => panic!("{e}"),
        }
    }
}

fn of(snapshot: &Snapshot) -> BTreeMap<String, (Revision, bytes::Bytes)> {
    snapshot.entries.iter().map(|e| (e.key.encoded().to_owned(), (e.modified, e.value.clone()))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_flood_of_writes_every_watch_ends_with_the_last_version_and_never_goes_back() {
    let server = server().await;
    let reader = connect(server.addr()).await;
    let mut writers = JoinSet::new();
    for w in 0..4 {
        let b = connect(server.addr()).await;
        writers.spawn(async move {
            for i in 0..600 {
                let key = key(&format!("{}", (w + i) % 10));
                let write = if i % 7 == 0 { Write::Delete(key) } else { put(&key, &format!("{w}-{i}"), None) };
                b.commit(&txn(vec![], vec![write])).await.unwrap();
            }
        });
    }
    // They begin at different moments, in the midst of it.
    let mut readers = JoinSet::new();
    for n in 0..6 {
        let reader = reader.clone();
        readers.spawn(async move {
            tokio::time::sleep(Duration::from_millis(20 * n)).await;
            let mut watch = reader.watch(&all()).await.unwrap();
            let mut view = View::default();
            let started = Instant::now();
            while started.elapsed() < SOON {
                let quiet = Duration::from_secs(7);
                match tokio::time::timeout(quiet, watch.next()).await {
                    Ok(event) => view.take(event.expect("the watch goes on")),
                    Err(_) => break,
                }
            }
            view
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    let last = of(&reader.read(&all()).await.unwrap());
    while let Some(view) = readers.join_next().await {
        assert_eq!(view.unwrap().keys, last);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_short_lease_is_seen_in_time_by_a_watch_that_began_long_before() {
    let server = server().await;
    let (b, dead) = (connect(server.addr()).await, connect(server.addr()).await);
    let mut watch = b.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    for i in 0..20 {
        let ttl = Duration::from_millis(100 + i * 7);
        let granted = dead.grant(ttl).await.unwrap();
        let end = Instant::now() + granted.ttl;
        dead.commit(&txn(vec![], vec![put(&key("k"), "x", Some(&granted.id))])).await.unwrap();
        soon("the key goes", async { while !matches!(event(&mut watch).await, WatchEvent::Delete { .. }) {} }).await;
        let late = Instant::now().saturating_duration_since(end);
        assert!(late < b.profile().expiry_lag + Duration::from_secs(1), "{late:?}");
    }
}
