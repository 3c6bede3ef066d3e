//! A server that comes back, with its data and without.

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend as _, ErrorKind, Watch, WatchEvent};
use tokio::time::sleep;

use super::support::{
    all, connect, entry, follow, interrupted, join, lease, leave, put, release, reset, server, spawn_gone, until,
    value, within,
};

#[tokio::test]
async fn leases_tickets_and_watches_survive_a_restart_with_the_data() {
    let server = server().await;
    let etcd = Arc::new(connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let (first, second) = (join(&etcd, "job", &lease).await, join(&etcd, "job", &lease).await);
    etcd.commit(&put("a", "1")).await.unwrap();
    etcd.renew(&lease).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 1);
    let gone = spawn_gone(&etcd, &first.ticket);
    sleep(Duration::from_millis(200)).await;

    server.kill().await.unwrap();
    interrupted(gone).await;
    let down = etcd.commit(&put("b", "1")).await.expect_err("the server is down");
    assert!(matches!(down.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{down}");
    server.restart().await.unwrap();

    until("calls recover by themselves", || async { etcd.renew(&lease).await.is_ok() }).await;
    assert_eq!(etcd.look(&second.ticket, 1).await.unwrap().unwrap().ahead, [first.ticket.clone()]);
    // The watch may have re-read before or after this.
    etcd.commit(&put("a", "2")).await.unwrap();
    follow(&mut watch, &[("a", "2")]).await;
    let gone = spawn_gone(&etcd, &first.ticket);
    sleep(Duration::from_millis(100)).await;
    assert!(etcd.commit(&release(&first)).await.unwrap().applied, "the token of before still fits");
    within("the hand-off works", gone).await.unwrap().unwrap();
    let third = join(&etcd, "job", &lease).await;
    assert!(third.token > second.token, "tokens rise over a restart");
}

/// The first snapshot after an interruption.
async fn next_reset(watch: &mut Watch) -> usize {
    loop {
        match within("a reset", watch.next()).await {
            Some(WatchEvent::Reset(snapshot)) => return snapshot.entries.len(),
            Some(_) => {}
            None => panic!("a watch does not end by itself"),
        }
    }
}

#[tokio::test]
async fn after_the_loss_of_all_data_the_session_is_lost_and_the_watch_starts_again() {
    let server = server().await;
    let etcd = Arc::new(connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let (first, second) = (join(&etcd, "job", &lease).await, join(&etcd, "job", &lease).await);
    etcd.commit(&put("a", "1")).await.unwrap();
    etcd.renew(&lease).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 1);
    let gone = spawn_gone(&etcd, &first.ticket);
    sleep(Duration::from_millis(200)).await;

    server.restart_wiped().await.unwrap();
    interrupted(gone).await;
    until("the server is back", || async { etcd.read(&all()).await.is_ok() }).await;
    assert_eq!(etcd.renew(&lease).await.expect_err("nobody knows it").kind(), ErrorKind::SessionLost);
    let late = etcd.enqueue(&entry("job", &lease)).await.expect_err("nobody knows the lease");
    assert_eq!(late.kind(), ErrorKind::SessionLost);
    assert_eq!(etcd.look(&second.ticket, 1).await.unwrap(), None);
    within("a ticket that is not there is gone", etcd.gone(&first.ticket)).await.unwrap();
    assert_eq!(next_reset(&mut watch).await, 0, "what was there is gone");
    // Revisions begin again; the watch must not take them for old news.
    etcd.commit(&put("b", "1")).await.unwrap();
    loop {
        match within("the change", watch.next()).await {
            Some(WatchEvent::Put(entry)) if entry.value == "1" => break,
            Some(WatchEvent::Reset(snapshot)) if snapshot.entries.len() == 1 => break,
            Some(_) => {}
            None => panic!("a watch does not end by itself"),
        }
    }
    assert_eq!(value(&etcd, "a").await, None);
    let lease = super::support::lease(&etcd).await;
    let place = join(&etcd, "job", &lease).await;
    assert_eq!(place.ahead, []);
    leave(&etcd, &place.ticket).await;
}
