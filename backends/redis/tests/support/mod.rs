//! What the tests share: a raw connection to look at the server with, and the verbs with their usual arguments.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{
    Backend, Check, Config, Dir, Enqueue, ErrorKind, Key, KeyRange, LeaseId, Nonce, Place, Snapshot, Ticket,
    TicketKind, Txn, Watch, WatchEvent, Write,
};
use quorate_redis::Redis;
use quorate_testkit::servers::{Redis as Servers, RedisOptions, Server};
use redis::aio::MultiplexedConnection;
use tokio::time::timeout;

/// Only a broken backend, or a machine that stands still, takes longer.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) async fn server() -> Server {
    started(RedisOptions::default()).await
}

pub(crate) async fn started(options: RedisOptions) -> Server {
    Servers::start(options).await.expect("a Redis server starts")
}

pub(crate) fn config(addr: SocketAddr, rest: &str) -> Config {
    Config::parse(&format!("redis://{addr}{rest}")).unwrap()
}

pub(crate) async fn connect(addr: SocketAddr) -> Arc<dyn Backend> {
    open(&config(addr, "/test")).await
}

pub(crate) async fn open(config: &Config) -> Arc<dyn Backend> {
    Arc::new(Redis::connect(config).await.expect("a client connects"))
}

/// A look at the server past this crate.
#[derive(Clone)]
pub(crate) struct Raw(MultiplexedConnection);

impl Raw {
    pub(crate) async fn of(server: &Server) -> Self {
        let client = redis::Client::open(format!("redis://{}", server.addr())).unwrap();
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(SOON));
        Self(client.get_multiplexed_async_connection_with_config(&config).await.expect("a raw connection"))
    }

    pub(crate) async fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let mut cmd = redis::cmd(words[0]);
        for word in &words[1..] {
            cmd.arg(*word);
        }
        cmd.query_async(&mut self.0.clone()).await.expect("the server answers")
    }

    /// How often this command was called so far, by clients and within scripts.
    pub(crate) async fn calls(&self, command: &str) -> u64 {
        let stats: String = self.ask(&["INFO", "commandstats"]).await;
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
    }
}

pub(crate) fn dir(path: &str) -> Dir {
    Dir::from_path(path).unwrap()
}

pub(crate) fn key(name: &str) -> Key {
    Key::new(&dir("kv"), name).unwrap()
}

pub(crate) fn all() -> KeyRange {
    KeyRange::prefix(&dir("kv"), "").unwrap()
}

pub(crate) async fn lease(backend: &Arc<dyn Backend>) -> LeaseId {
    backend.grant(Duration::from_secs(60)).await.expect("a lease").id
}

pub(crate) fn entry(line: &Dir, lease: &LeaseId) -> Enqueue {
    Enqueue {
        line: line.clone(),
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: Bytes::new(),
        depth: 1,
        when_free: false,
    }
}

pub(crate) async fn join(backend: &Arc<dyn Backend>, line: &Dir, lease: &LeaseId) -> Place {
    backend.enqueue(&entry(line, lease)).await.expect("joined").expect("a place")
}

pub(crate) fn put(key: &Key, value: &str, lease: Option<&LeaseId>) -> Write {
    Write::Put { key: key.clone(), value: Bytes::copy_from_slice(value.as_bytes()), lease: lease.cloned() }
}

pub(crate) fn txn(checks: Vec<Check>, writes: Vec<Write>) -> Txn {
    Txn { checks, writes }
}

pub(crate) fn release(place: &Place) -> Txn {
    let check = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    txn(vec![check], vec![Write::Leave(place.ticket.clone())])
}

pub(crate) fn names(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.entries.iter().map(|e| e.key.encoded()).collect()
}

pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match timeout(SOON, work).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {SOON:?}"),
    }
}

/// The next event of a watch.
pub(crate) async fn event(watch: &mut Watch) -> WatchEvent {
    soon("an event of the watch", watch.next()).await.expect("the watch goes on")
}

/// The next `Reset`, past whatever comes before it.
pub(crate) async fn reset(watch: &mut Watch) -> Snapshot {
    loop {
        if let WatchEvent::Reset(snapshot) = event(watch).await {
            return snapshot;
        }
    }
}

/// Repeats an idempotent call until it is answered, as the retry layer does.
pub(crate) async fn persist<T, F: Future<Output = quorate_core::Result<T>>>(mut call: impl FnMut() -> F) -> T {
    let started = tokio::time::Instant::now();
    loop {
        match call().await {
            Ok(value) => return value,
            Err(e) => {
                assert!(matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{e:?}");
                assert!(started.elapsed() < SOON, "{e:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Waits as a recipe does: until the ticket is out of its line.
pub(crate) async fn until_gone(backend: Arc<dyn Backend>, ticket: Ticket) {
    loop {
        persist(|| backend.gone(&ticket)).await;
        if persist(|| backend.look(&ticket, 1)).await.is_none() {
            return;
        }
    }
}
