//! What the tests share.

use std::{collections::BTreeMap, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{
    Backend, Check, Commit, Config, Dir, Enqueue, ErrorKind, Key, KeyRange, LeaseId, Nonce, Place, Ticket, TicketKind,
    Txn, Watch, WatchEvent, Write,
};
use quorate_etcd::Etcd;
use quorate_testkit::servers::{self, EtcdOptions, Server};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

/// How long something may take that needs no lease to end.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) async fn server() -> Server {
    servers::Etcd::start(EtcdOptions::default()).await.unwrap()
}

pub(crate) fn config(addrs: impl IntoIterator<Item = SocketAddr>) -> Config {
    Config::new("etcd", addrs.into_iter().map(|a| a.to_string())).with_namespace("app").unwrap()
}

pub(crate) async fn connect(addr: SocketAddr) -> Etcd {
    Etcd::connect(&config([addr])).await.unwrap()
}

pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(SOON, work).await.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
}

/// Repeats until it holds.
pub(crate) async fn until<Fut: Future<Output = bool>>(what: &str, holds: impl Fn() -> Fut) {
    let end = Instant::now() + SOON;
    while !holds().await {
        assert!(Instant::now() < end, "{what}: not within {SOON:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn key(name: &str) -> Key {
    Key::new(&Dir::new(["kv"]).unwrap(), name).unwrap()
}

pub(crate) fn all() -> KeyRange {
    KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap()
}

pub(crate) fn line(name: &str) -> Dir {
    Dir::new(["lock", name]).unwrap()
}

pub(crate) fn put(name: &str, value: &'static str) -> Txn {
    let write = Write::Put { key: key(name), value: Bytes::from_static(value.as_bytes()), lease: None };
    Txn { checks: Vec::new(), writes: vec![write] }
}

pub(crate) async fn lease(etcd: &Etcd) -> LeaseId {
    etcd.grant(Duration::from_secs(60)).await.unwrap().id
}

pub(crate) fn entry(name: &str, lease: &LeaseId) -> Enqueue {
    Enqueue {
        line: line(name),
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: Bytes::new(),
        depth: 1,
        when_free: false,
    }
}

pub(crate) async fn join(etcd: &Etcd, name: &str, lease: &LeaseId) -> Place {
    etcd.enqueue(&entry(name, lease)).await.unwrap().unwrap()
}

pub(crate) fn release(place: &Place) -> Txn {
    let check = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    Txn { checks: vec![check], writes: vec![Write::Leave(place.ticket.clone())] }
}

pub(crate) async fn leave(etcd: &Etcd, ticket: &Ticket) -> Commit {
    etcd.commit(&Txn { checks: Vec::new(), writes: vec![Write::Leave(ticket.clone())] }).await.unwrap()
}

pub(crate) async fn value(etcd: &Etcd, name: &str) -> Option<Bytes> {
    let snapshot = etcd.read(&KeyRange::One(key(name))).await.unwrap();
    snapshot.entries.into_iter().next().map(|e| e.value)
}

/// Follows a watch until its view shows these values, in order of names; tells whether it was interrupted.
pub(crate) async fn follow(watch: &mut Watch, expected: &[(&str, &'static str)]) -> bool {
    let mut view = BTreeMap::new();
    let mut interrupted = false;
    let expected: BTreeMap<_, _> = expected.iter().map(|(k, v)| (key(k), Bytes::from_static(v.as_bytes()))).collect();
    loop {
        match within("a watch event", watch.next()).await.expect("a watch does not end by itself") {
            WatchEvent::Reset(snapshot) => view = snapshot.entries.into_iter().map(|e| (e.key, e.value)).collect(),
            WatchEvent::Put(entry) => drop(view.insert(entry.key, entry.value)),
            WatchEvent::Delete { key, .. } => drop(view.remove(&key)),
            WatchEvent::Interrupted(_) => {
                interrupted = true;
                continue;
            }
        }
        if view == expected {
            return interrupted;
        }
    }
}

pub(crate) async fn reset(watch: &mut Watch) -> usize {
    match within("the first event", watch.next()).await {
        Some(WatchEvent::Reset(snapshot)) => snapshot.entries.len(),
        other => panic!("a watch begins with a reset, not {other:?}"),
    }
}

/// The server's metrics page.
async fn metrics(addr: SocketAddr) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page
}

/// How many messages the server has received, by method.
pub(crate) async fn received(addr: SocketAddr) -> BTreeMap<String, u64> {
    let page = metrics(addr).await;
    let lines = page.lines().filter_map(|l| l.strip_prefix("grpc_server_msg_received_total{grpc_method=\""));
    lines
        .filter_map(|l| {
            let (method, rest) = l.split_once('"')?;
            // The health service has a method of the same name as the watch.
            rest.contains("\"etcdserverpb.").then_some(())?;
            let count = rest.rsplit_once(' ')?.1.parse().ok()?;
            Some((method.to_owned(), count))
        })
        .collect()
}

/// What the server has received since.
pub(crate) async fn received_since(addr: SocketAddr, before: &BTreeMap<String, u64>) -> Vec<(String, u64)> {
    let now = received(addr).await;
    let since = now.into_iter().map(|(method, n)| {
        let before = before.get(&method).copied().unwrap_or(0);
        (method, n - before)
    });
    since.filter(|(_, n)| *n > 0).collect()
}

/// How many watches the server has.
pub(crate) async fn watchers(addr: SocketAddr) -> u64 {
    let page = metrics(addr).await;
    let line = page.lines().find_map(|l| l.strip_prefix("etcd_debugging_mvcc_watcher_total "));
    line.expect("etcd counts its watches").trim().parse().unwrap()
}

/// A task that ends with the test.
pub(crate) fn spawn_gone(etcd: &Arc<Etcd>, ticket: &Ticket) -> tokio::task::JoinHandle<quorate_core::Result<()>> {
    let (etcd, ticket) = (etcd.clone(), ticket.clone());
    tokio::spawn(async move { etcd.gone(&ticket).await })
}

/// A wait that has lost its connection ends, to be repeated; with an error if it had not quite begun.
pub(crate) async fn interrupted(wait: tokio::task::JoinHandle<quorate_core::Result<()>>) {
    if let Err(error) = within("a wait that lost its connection ends", wait).await.unwrap() {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
}
