//! Stores, their names, their clients, and what is left when these are gone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{
    Backend, Config, Dir, Enqueue, ErrorKind, Key, KeyRange, Nonce, TicketKind, Txn, WatchEvent, Write,
};
use quorate_memory::Memory;
use tokio::time::{Instant, timeout};

async fn connect(url: &str) -> Memory {
    Memory::connect(&Config::parse(url).unwrap()).await.unwrap()
}

fn put(dir: &str, name: &str) -> Txn {
    let key = Key::new(&Dir::from_path(dir).unwrap(), name).unwrap();
    Txn { checks: vec![], writes: vec![Write::Put { key, value: Bytes::from_static(b"1"), lease: None }] }
}

async fn names(backend: &Memory, dir: &str) -> Vec<String> {
    let range = KeyRange::prefix(&Dir::from_path(dir).unwrap(), "").unwrap();
    backend.read(&range).await.unwrap().entries.iter().filter_map(|e| e.key.name()).collect()
}

#[tokio::test]
async fn one_name_is_one_store_for_as_long_as_it_has_a_client() {
    let a = connect("memory://instances-one/app").await;
    let b = connect("memory://instances-one/app").await;
    let other = connect("memory://instances-two/app").await;
    a.commit(&put("kv", "a")).await.unwrap();
    assert_eq!(names(&b, "kv").await, ["a"]);
    assert_eq!(names(&other, "kv").await, [""; 0]);
    let c = b.client();
    drop((a, b));
    let d = connect("memory://instances-one/app").await;
    assert_eq!(names(&d, "kv").await, ["a"]);
    let faults = c.faults();
    drop((c, d));
    assert_eq!(faults.expire_all(), 0, "a handle on faults keeps no store alive");
    let e = connect("memory://instances-one/app").await;
    assert_eq!(names(&e, "kv").await, [""; 0], "the store went with its last client");
}

#[tokio::test]
async fn namespaces_of_one_store_lie_in_each_other_as_their_paths_do() {
    let (whole, team) = (connect("memory://instances-ns").await, connect("memory://instances-ns/team").await);
    let (app, other) = (connect("memory://instances-ns/team/app").await, connect("memory://instances-ns/team2").await);
    app.commit(&put("kv", "a")).await.unwrap();
    for (backend, dir) in [(&whole, "team/app/kv"), (&team, "app/kv"), (&app, "kv")] {
        assert_eq!(names(backend, dir).await, ["a"], "{backend:?}");
    }
    assert_eq!(names(&other, "kv").await, [""; 0]);
}

#[tokio::test]
async fn a_private_store_is_nobody_elses() {
    let (a, b) = (Memory::new(), Memory::new());
    a.commit(&put("kv", "a")).await.unwrap();
    assert_eq!(names(&b, "kv").await, [""; 0]);
    assert_eq!(names(&a.client(), "kv").await, ["a"]);
}

#[tokio::test]
async fn a_configuration_that_makes_no_sense_is_refused() {
    for url in ["memory://a,b", "memory://a?unknown=1"] {
        let e = Memory::connect(&Config::parse(url).unwrap()).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{url}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_client_is_a_crashed_one() {
    let a = Memory::new();
    let b = a.client();
    let mut watch = a.watch(&KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap()).await.unwrap();
    let lease = a.grant(Duration::from_secs(10)).await.unwrap();
    let entry = Enqueue {
        line: Dir::new(["lock", "x"]).unwrap(),
        kind: TicketKind::Lock,
        lease: lease.id,
        nonce: Nonce::random(),
        value: Bytes::new(),
        depth: 1,
        when_free: false,
    };
    let place = a.enqueue(&entry).await.unwrap().unwrap();
    let started = Instant::now();
    drop(a);
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(_))));
    assert!(timeout(Duration::from_secs(1), watch.next()).await.unwrap().is_none(), "its watches have ended");
    b.gone(&place.ticket).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(10), "its ticket stands until the lease runs out");
}

#[tokio::test(start_paused = true)]
async fn a_watch_keeps_no_store_alive_and_its_task_ends() {
    let a = Memory::new();
    let range = KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap();
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let mut watches = Vec::new();
    for _ in 0..10 {
        watches.push(a.watch(&range).await.unwrap());
    }
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(alive(), before + 10);
    watches.truncate(4);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(alive(), before + 4, "a watch ends with its reader");
    drop(a);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(alive(), before, "and with its client");
}

/// A store is shared by all runtimes of the process; the one that opened it may end first.
#[test]
fn a_store_outlives_the_runtime_it_was_made_in() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let backend = Arc::new(Memory::new());
    let first = runtime();
    let lease = first.block_on(backend.grant(Duration::from_millis(300))).unwrap();
    let range = KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap();
    let key = Key::new(range.dir(), "a").unwrap();
    let write = Write::Put { key, value: Bytes::new(), lease: Some(lease.id) };
    first.block_on(backend.commit(&Txn { checks: vec![], writes: vec![write] })).unwrap();
    drop(first);
    runtime().block_on(async {
        let mut watch = backend.watch(&range).await.unwrap();
        assert!(matches!(watch.next().await, Some(WatchEvent::Reset(s)) if s.entries.len() == 1));
        let event = timeout(Duration::from_secs(5), watch.next()).await.unwrap();
        assert!(matches!(event, Some(WatchEvent::Delete { .. })), "{event:?}");
    });
}
