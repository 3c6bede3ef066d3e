//! What the tests share: clients of a server, a raw view of what the server holds, and the verbs of a lock.
//!
//! Each test is on its own: it starts the servers that it breaks.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_consul::Consul;
use quorate_core::{
    Backend, Check, Commit, Config, Dir, Enqueue, Key, KeyRange, LeaseId, Nonce, Place, Revision, Ticket, TicketKind,
    Txn, Watch, WatchEvent, Write,
};
use quorate_testkit::servers::{self, ConsulOptions, Server};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// Longer than anything here takes on a machine that builds at the same time.
pub(crate) const LONG: Duration = Duration::from_secs(45);

pub(crate) async fn server() -> Server {
    servers::Consul::start(ConsulOptions::default()).await.unwrap()
}

pub(crate) fn config(addr: SocketAddr) -> Config {
    Config::new("consul", [addr.to_string()]).with_namespace("app").unwrap()
}

pub(crate) async fn client(addr: SocketAddr) -> Arc<Consul> {
    Arc::new(Consul::connect(&config(addr)).await.unwrap())
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

pub(crate) fn put(name: &str, value: &str, lease: Option<&LeaseId>) -> Write {
    Write::Put { key: key(name), value: Bytes::copy_from_slice(value.as_bytes()), lease: lease.cloned() }
}

pub(crate) fn entry(line: &Dir, lease: &LeaseId) -> Enqueue {
    Enqueue {
        line: line.clone(),
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: Bytes::from_static(b"owner"),
        depth: 1,
        when_free: false,
    }
}

pub(crate) async fn join(client: &Consul, line: &Dir, lease: &LeaseId) -> Place {
    client.enqueue(&entry(line, lease)).await.unwrap().unwrap()
}

pub(crate) async fn grant(client: &Consul, ttl: Duration) -> LeaseId {
    client.grant(ttl).await.unwrap().id
}

pub(crate) async fn commit(client: &Consul, writes: impl IntoIterator<Item = Write>) -> Commit {
    let commit = client.commit(&Txn { checks: Vec::new(), writes: writes.into_iter().collect() }).await.unwrap();
    assert!(commit.applied);
    commit
}

pub(crate) async fn release(client: &Consul, place: &Place) -> Commit {
    client.commit(&release_of(place)).await.unwrap()
}

pub(crate) fn release_of(place: &Place) -> Txn {
    Txn {
        checks: vec![Check::Standing { ticket: place.ticket.clone(), token: place.token }],
        writes: vec![Write::Leave(place.ticket.clone())],
    }
}

pub(crate) async fn value(client: &Consul, name: &str) -> Option<(Bytes, Revision)> {
    let found = client.read(&KeyRange::One(key(name))).await.unwrap().entries.pop();
    found.map(|entry| (entry.value, entry.modified))
}

/// Waits as a recipe does: looks after every wake-up.
pub(crate) fn until_gone(client: &Arc<Consul>, ticket: &Ticket) -> JoinHandle<Instant> {
    let (client, ticket) = (client.clone(), ticket.clone());
    tokio::spawn(async move {
        loop {
            client.gone(&ticket).await.ok();
            match client.look(&ticket, 1).await {
                Ok(None) => return Instant::now(),
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    })
}

/// Keeps a lease alive until it is lost or the task is dropped.
pub(crate) fn keep(client: &Arc<Consul>, lease: &LeaseId, every: Duration) -> JoinHandle<()> {
    let (client, lease) = (client.clone(), lease.clone());
    tokio::spawn(async move {
        loop {
            sleep(every).await;
            // An answer that does not come must not stop the next attempt.
            let renewed = timeout(Duration::from_secs(2), client.renew(&lease)).await;
            if let Ok(Err(e)) = renewed
                && e.kind() == quorate_core::ErrorKind::SessionLost
            {
                return;
            }
        }
    })
}

pub(crate) async fn next(watch: &mut Watch) -> WatchEvent {
    timeout(LONG, watch.next()).await.expect("an event comes").expect("the watch goes on")
}

/// The next `Reset`, and whether an `Interrupted` came before it.
pub(crate) async fn next_reset(watch: &mut Watch) -> (Vec<String>, bool) {
    let mut interrupted = false;
    loop {
        match next(watch).await {
            WatchEvent::Reset(now) => {
                return (now.entries.iter().map(|e| e.key.encoded().to_owned()).collect(), interrupted);
            }
            WatchEvent::Interrupted(_) => interrupted = true,
            WatchEvent::Put(_) | WatchEvent::Delete { .. } => {}
        }
    }
}

/// Sends a request past the library; returns status and body.
pub(crate) async fn raw(addr: SocketAddr, method: &str, path: &str, token: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: consul\r\nConnection: close\r\nX-Consul-Token: {token}\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    let body =
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { unchunk(body) } else { body.to_owned() };
    (status, body)
}

fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
        if size == 0 {
            break;
        }
        text.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    text
}

pub(crate) async fn raw_json(addr: SocketAddr, path: &str) -> Value {
    let (status, body) = raw(addr, "GET", path, "", "").await;
    if status == 404 {
        Value::Null
    } else {
        serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"))
    }
}

/// What leases there are at the server: sessions, and services that carry their checks.
pub(crate) async fn leftovers(addr: SocketAddr) -> (usize, usize) {
    let sessions = raw_json(addr, "/v1/session/list").await.as_array().map_or(0, Vec::len);
    let services = raw_json(addr, "/v1/agent/services").await;
    let services =
        services.as_object().map_or(0, |all| all.keys().filter(|id| id.starts_with("quorate-session")).count());
    (sessions, services)
}

/// Asserts that no session and no service stays.
pub(crate) async fn assert_nothing_left(addr: SocketAddr) {
    let end = Instant::now() + LONG;
    loop {
        let left = leftovers(addr).await;
        if left == (0, 0) {
            return;
        }
        assert!(Instant::now() < end, "left behind: {} sessions, {} services", left.0, left.1);
        sleep(Duration::from_millis(50)).await;
    }
}
