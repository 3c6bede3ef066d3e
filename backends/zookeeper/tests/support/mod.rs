//! What the tests of this crate share.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quorate_core::{
    Backend, Check, Commit, Config, Dir, Enqueue, Entry, Key, KeyRange, LeaseId, Nonce, Place, Result, Ticket,
    TicketKind, Txn, Write,
};
use quorate_testkit::servers::{Server, ZooKeeper as Launcher, ZooKeeperOptions};
use quorate_zookeeper::ZooKeeper;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinHandle,
};

/// Long enough for a busy machine, short enough to wait for.
pub(crate) const TTL: Duration = Duration::from_secs(2);

pub(crate) fn options() -> ZooKeeperOptions {
    ZooKeeperOptions { tick: Duration::from_millis(250), ..ZooKeeperOptions::default() }
}

pub(crate) async fn server() -> Server {
    Launcher::start(options()).await.unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn config(addrs: &[SocketAddr]) -> Config {
    let endpoints = addrs.iter().map(ToString::to_string);
    Config::new("zookeeper", endpoints).with_namespace("tests").unwrap().with_session_ttl(TTL)
}

pub(crate) async fn connect(config: &Config) -> Arc<ZooKeeper> {
    Arc::new(ZooKeeper::connect(config).await.unwrap())
}

pub(crate) async fn client(server: &Server) -> Arc<ZooKeeper> {
    connect(&config(&[server.addr()])).await
}

pub(crate) fn kv() -> Dir {
    Dir::new(["kv"]).unwrap()
}

pub(crate) fn key(name: &str) -> Key {
    Key::new(&kv(), name).unwrap()
}

pub(crate) fn all() -> KeyRange {
    KeyRange::prefix(&kv(), "").unwrap()
}

pub(crate) fn line(name: &str) -> Dir {
    Dir::new(["lock", name]).unwrap()
}

pub(crate) fn put(key: &Key, value: &str) -> Write {
    Write::Put { key: key.clone(), value: value.to_owned().into(), lease: None }
}

pub(crate) fn put_on(lease: &LeaseId, key: &Key, value: &str) -> Write {
    Write::Put { key: key.clone(), value: value.to_owned().into(), lease: Some(lease.clone()) }
}

pub(crate) async fn commit(
    backend: &ZooKeeper,
    checks: impl Into<Vec<Check>>,
    writes: impl Into<Vec<Write>>,
) -> Result<Commit> {
    backend.commit(&Txn { checks: checks.into(), writes: writes.into() }).await
}

pub(crate) async fn get(backend: &ZooKeeper, key: &Key) -> Option<Entry> {
    eventually_read(backend, &KeyRange::One(key.clone())).await.into_iter().next()
}

/// Reads, also while the server is just coming back.
pub(crate) async fn eventually_read(backend: &ZooKeeper, range: &KeyRange) -> Vec<Entry> {
    let mut last = None;
    for _ in 0..20 {
        match backend.read(range).await {
            Ok(snapshot) => return snapshot.entries,
            Err(error) => last = Some(error),
        }
    }
    panic!("the range cannot be read: {last:?}")
}

pub(crate) fn entry(line: &Dir, lease: &LeaseId) -> Enqueue {
    Enqueue {
        line: line.clone(),
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: "owner".into(),
        depth: 1,
        when_free: false,
    }
}

pub(crate) async fn join(backend: &ZooKeeper, line: &Dir, lease: &LeaseId) -> Place {
    backend.enqueue(&entry(line, lease)).await.unwrap().unwrap()
}

pub(crate) fn standing(place: &Place) -> Check {
    Check::Standing { ticket: place.ticket.clone(), token: place.token }
}

pub(crate) async fn leave(backend: &ZooKeeper, ticket: &Ticket) {
    assert!(commit(backend, [], [Write::Leave(ticket.clone())]).await.unwrap().applied);
}

/// A lease that is renewed for as long as this lives, whatever single renewals say.
pub(crate) struct Kept {
    pub(crate) id: LeaseId,
    task: JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) async fn keep(backend: &Arc<ZooKeeper>, ttl: Duration) -> Kept {
    let lease = backend.grant(ttl).await.unwrap();
    let (id, backend) = (lease.id.clone(), backend.clone());
    let task = tokio::spawn(async move {
        loop {
            tokio::time::sleep(lease.ttl / 5).await;
            let _ = backend.renew(&lease.id).await;
        }
    });
    Kept { id, task }
}

/// A four-letter word of the server.
pub(crate) async fn ask(server: SocketAddr, word: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(server).await.unwrap();
    stream.write_all(word.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Repeats a question until the answer is yes.
pub(crate) async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let asked = tokio::time::timeout(limit, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    asked.await.unwrap_or_else(|_| panic!("{what}: not within {limit:?}"));
}
