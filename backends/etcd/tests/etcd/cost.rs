//! What the hot paths cost at the server, counted by the server.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{Backend as _, Check, Enqueue, Ticket, Txn, Write};
use quorate_testkit::proxy::FaultProxy;
use tokio::time::sleep;

use super::support::{
    connect, entry, join, key, lease, leave, put, received, received_since, release, server, spawn_gone, until,
    watchers, within,
};

fn one(method: &str) -> Vec<(String, u64)> {
    vec![(method.to_owned(), 1)]
}

#[tokio::test]
async fn hot_paths_are_one_request_each() {
    let server = server().await;
    let addr = server.addr();
    let etcd = connect(addr).await;
    let lease = lease(&etcd).await;
    etcd.renew(&lease).await.unwrap();

    let before = received(addr).await;
    let place = join(&etcd, "job", &lease).await;
    assert_eq!(received_since(addr, &before).await, one("Txn"), "an acquire");
    let before = received(addr).await;
    assert!(etcd.commit(&release(&place)).await.unwrap().applied);
    assert_eq!(received_since(addr, &before).await, one("Txn"), "a release");
    let before = received(addr).await;
    let free = Enqueue { when_free: true, ..entry("job", &lease) };
    let place = etcd.enqueue(&free).await.unwrap().unwrap();
    assert_eq!(received_since(addr, &before).await, one("Txn"), "a try");
    let before = received(addr).await;
    let refused = Enqueue { when_free: true, ..entry("job", &lease) };
    assert_eq!(etcd.enqueue(&refused).await.unwrap(), None);
    assert_eq!(received_since(addr, &before).await, one("Txn"), "a refused try");

    let value = || Bytes::from_static(b"v");
    let write = || Write::Put { key: key("a"), value: value(), lease: None };
    let absent = Check::Absent(key("a"));
    let standing = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    let before = received(addr).await;
    let created = etcd.commit(&Txn { checks: vec![absent], writes: vec![write()] }).await.unwrap();
    let unchanged = Check::Unchanged { key: key("a"), modified: created.revision };
    assert!(etcd.commit(&Txn { checks: vec![unchanged], writes: vec![write()] }).await.unwrap().applied);
    assert!(etcd.commit(&Txn { checks: vec![standing], writes: vec![write()] }).await.unwrap().applied);
    assert_eq!(received_since(addr, &before).await, [("Txn".to_owned(), 3)], "create, CAS, fenced put");
    let before = received(addr).await;
    etcd.commit(&put("a", "1")).await.unwrap();
    assert_eq!(received_since(addr, &before).await, one("Put"));
    let before = received(addr).await;
    etcd.commit(&Txn { checks: Vec::new(), writes: vec![Write::Delete(key("a"))] }).await.unwrap();
    assert_eq!(received_since(addr, &before).await, one("DeleteRange"));
    let before = received(addr).await;
    etcd.renew(&lease).await.unwrap();
    assert_eq!(received_since(addr, &before).await, one("LeaseKeepAlive"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_wakes_the_next_waiter_only_at_the_cost_of_one_look() {
    const WAITERS: usize = 30;
    let server = server().await;
    let addr = server.addr();
    let etcd = Arc::new(connect(addr).await);
    let lease = lease(&etcd).await;
    let mut places = Vec::new();
    for _ in 0..=WAITERS {
        places.push(join(&etcd, "job", &lease).await);
    }
    let waits: Vec<_> = places[1..].iter().map(|place| spawn_gone(&etcd, &place.ahead[0])).collect();
    until("all wait at the server", || async { watchers(addr).await == WAITERS as u64 }).await;
    sleep(Duration::from_millis(200)).await;

    let before = received(addr).await;
    assert!(etcd.commit(&release(&places[0])).await.unwrap().applied);
    until("one wait has ended", || async { waits[0].is_finished() }).await;
    assert_eq!(etcd.look(&places[1].ticket, 1).await.unwrap().unwrap().ahead, []);
    sleep(Duration::from_millis(300)).await;
    assert!(waits[1..].iter().all(|wait| !wait.is_finished()), "nobody else was woken");
    let expected = [("Range", 1), ("Txn", 1), ("Watch", 1)].map(|(m, n)| (m.to_owned(), n));
    assert_eq!(received_since(addr, &before).await, expected, "a release, a look, and the end of one watch");

    // The rest is served in order.
    for (i, wait) in waits.into_iter().enumerate() {
        within("the wait ends", wait).await.unwrap().unwrap();
        leave(&etcd, &places[i + 1].ticket).await;
    }
}

#[tokio::test]
async fn a_look_and_a_join_weigh_the_same_in_a_line_of_any_length() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (etcd, filler) = (connect(proxy.addr()).await, connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let bytes = async |ticket: Option<&Ticket>| {
        let before = proxy.counters().bytes_to_client;
        match ticket {
            Some(ticket) => assert_eq!(etcd.look(ticket, 1).await.unwrap().unwrap().ahead.len(), 1),
            None => assert_eq!(join(&etcd, "job", &lease).await.ahead.len(), 1),
        }
        // Flow control has its own frames.
        sleep(Duration::from_millis(50)).await;
        proxy.counters().bytes_to_client - before
    };
    join(&filler, "job", &lease).await;
    let early = join(&etcd, "job", &lease).await;
    let (short_look, short_join) = (bytes(Some(&early.ticket)).await, bytes(None).await);
    for _ in 0..300 {
        join(&filler, "job", &lease).await;
    }
    let late = join(&etcd, "job", &lease).await;
    let (long_look, long_join) = (bytes(Some(&late.ticket)).await, bytes(None).await);
    assert!(long_look < short_look + 300, "{short_look} bytes before, {long_look} after");
    assert!(long_join < short_join + 300, "{short_join} bytes before, {long_join} after");
}
