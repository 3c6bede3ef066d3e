//! Servers that restart, forget, hang, and connections that break: under a running watch, a waiting `gone`, a
//! live lease.

mod support;

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend, Check, ErrorKind, KeyRange, Watch, WatchEvent, Write};
use quorate_testkit::{
    proxy::{Direction, FaultProxy},
    servers::{Persistence, RedisOptions},
};
use support::*;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// A lease, a ticket on it, somebody waiting behind it, a key on the lease, and a watch of the key.
struct Scene {
    b: Arc<dyn Backend>,
    lease: quorate_core::LeaseId,
    place: quorate_core::Place,
    waiter: JoinHandle<()>,
    watch: Watch,
}

async fn scene(b: &Arc<dyn Backend>) -> Scene {
    let lease = lease(b).await;
    let place = join(b, &dir("lock/a"), &lease).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "1", Some(&lease))])).await.expect("put");
    let waiter = tokio::spawn(until_gone(b.clone(), place.ticket.clone()));
    let mut watch = b.watch(&all()).await.expect("a watch");
    assert_eq!(names(&reset(&mut watch).await), ["k"]);
    Scene { b: b.clone(), lease, place, waiter, watch }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_restart_loses_leases_says_so_and_tokens_still_rise() {
    let server = server().await;
    let mut s = scene(&connect(server.addr()).await).await;
    let before = s.place.token;
    server.restart_wiped().await.unwrap();
    soon("the wait ends", s.waiter).await.unwrap();
    let snapshot = reset(&mut s.watch).await;
    assert!(snapshot.entries.is_empty(), "{snapshot:?}");
    assert!(snapshot.revision > before, "the revision does not go back with the data");
    let lost = loop {
        match s.b.renew(&s.lease).await {
            Err(e) if e.kind() == ErrorKind::Unavailable => sleep(Duration::from_millis(20)).await,
            other => break other,
        }
    };
    assert_eq!(lost.unwrap_err().kind(), ErrorKind::SessionLost);
    let fresh = lease(&s.b).await;
    let place = join(&s.b, &dir("lock/a"), &fresh).await;
    assert!(place.token > before && place.ahead.is_empty());
    let e = s.b.enqueue(&entry(&dir("lock/a"), &s.lease)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SessionLost);
    let stale = txn(vec![], vec![put(&key("k"), "2", Some(&s.lease))]);
    assert_eq!(s.b.commit(&stale).await.unwrap_err().kind(), ErrorKind::SessionLost);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_past_what_a_client_has_seen_even_if_the_clock_fell_back() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let lease1 = lease(&b).await;
    // As if the server's clock had been ahead by half an hour when it lost its data.
    let ahead: u64 = raw.ask::<(u64, u64)>(&["TIME"]).await.0 * 1_000_000 + 1_800_000_000;
    raw.ask::<i64>(&["HSET", "{quorate/test}:h", "rev", &ahead.to_string()]).await;
    let place = join(&b, &dir("lock/a"), &lease1).await;
    assert!(place.token.0 > ahead);
    server.restart_wiped().await.unwrap();
    let lease2 = persist(|| b.grant(Duration::from_secs(60))).await.id;
    assert!(join(&b, &dir("lock/a"), &lease2).await.token > place.token);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_with_its_data_keeps_leases_locks_and_keys() {
    let server = started(RedisOptions { persistence: Persistence::Always, ..RedisOptions::default() }).await;
    let mut s = scene(&connect(server.addr()).await).await;
    server.kill().await.unwrap();
    server.restart().await.unwrap();
    assert_eq!(names(&reset(&mut s.watch).await), ["k"]);
    persist(|| s.b.renew(&s.lease)).await;
    let place = persist(|| s.b.look(&s.place.ticket, 1)).await.expect("the ticket stands");
    assert_eq!(place.token, s.place.token);
    sleep(Duration::from_millis(300)).await;
    assert!(!s.waiter.is_finished(), "the ticket stands, so nobody behind it may go on");
    assert!(s.b.commit(&release(&s.place)).await.unwrap().applied);
    soon("the waiter goes on", s.waiter).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forgotten_scripts_are_brought_along_again() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let lease = lease(&b).await;
    for _ in 0..3 {
        raw.ask::<String>(&["SCRIPT", "FLUSH"]).await;
        let place = join(&b, &dir("lock/a"), &lease).await;
        raw.ask::<String>(&["SCRIPT", "FLUSH"]).await;
        assert!(b.commit(&release(&place)).await.unwrap().applied);
        raw.ask::<String>(&["SCRIPT", "FLUSH"]).await;
        b.gone(&place.ticket).await.unwrap();
        b.renew(&lease).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_deleted_behind_our_back_is_noticed_without_any_message() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let mut s = scene(&connect(server.addr()).await).await;
    raw.ask::<String>(&["FLUSHALL"]).await;
    soon("the wait ends", s.waiter).await.unwrap();
    let snapshot = reset(&mut s.watch).await;
    assert!(snapshot.entries.is_empty());
    assert!(snapshot.revision > s.place.token);
    s.b.commit(&txn(vec![], vec![put(&key("new"), "1", None)])).await.unwrap();
    match event(&mut s.watch).await {
        WatchEvent::Put(entry) => assert_eq!(entry.key, key("new")),
        // Another check may have come in between.
        other => assert!(matches!(&other, WatchEvent::Reset(s) if names(s) == ["new"]), "{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_deleted_by_hand_stop_nobody() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let dead = b.grant(Duration::from_millis(300)).await.unwrap().id;
    join(&b, &dir("lock/a"), &dead).await;
    let place = join(&b, &dir("lock/b"), &dead).await;
    let writes = vec![put(&key("k"), "1", Some(&dead)), put(&key("k2"), "1", Some(&dead))];
    b.commit(&txn(vec![], writes)).await.unwrap();
    let field = format!("T:lock/b\n{}", place.ticket.name);
    assert_eq!(raw.ask::<i64>(&["HDEL", "{quorate/test}:h", "K:kv\nk", &field]).await, 2);
    soon("the lease ends", async {
        while b.renew(&dead).await.is_ok() {
            sleep(Duration::from_secs(1)).await;
        }
    })
    .await;
    assert!(b.read(&all()).await.unwrap().entries.is_empty());
    assert!(b.line(&dir("lock/a")).await.unwrap().tickets.is_empty());
    lease(&b).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_are_made_again_and_nothing_is_missed() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let other = connect(server.addr()).await;
    let mut s = scene(&connect(proxy.addr()).await).await;
    proxy.cut().await;
    assert!(matches!(event(&mut s.watch).await, WatchEvent::Interrupted(_)));
    // Both happen while nobody can be told.
    other.commit(&txn(vec![], vec![put(&key("k2"), "2", None)])).await.unwrap();
    assert!(other.commit(&release(&s.place)).await.unwrap().applied);
    proxy.heal().await;
    assert_eq!(names(&reset(&mut s.watch).await), ["k", "k2"]);
    soon("the waiter goes on", s.waiter).await.unwrap();
    // And the new connections tell what happens from now on.
    other.commit(&txn(vec![], vec![Write::Delete(key("k2"))])).await.unwrap();
    assert!(matches!(event(&mut s.watch).await, WatchEvent::Delete { key: k, .. } if k == key("k2")));
    let place = join(&s.b, &dir("lock/b"), &s.lease).await;
    let waiter = tokio::spawn(until_gone(s.b.clone(), place.ticket.clone()));
    sleep(Duration::from_millis(100)).await;
    other.commit(&release(&place)).await.unwrap();
    let told = Instant::now();
    soon("the waiter is told", waiter).await.unwrap();
    assert!(told.elapsed() < Duration::from_secs(3), "told by a message, not by the clock");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_ambiguous_and_joining_again_finds_the_same_place() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let b = connect(proxy.addr()).await;
    let other = connect(server.addr()).await;
    let lease = lease(&b).await;
    let e = entry(&dir("lock/a"), &lease);
    // The script must be known, or the answer that is lost is the one that it is not.
    join(&other, &dir("lock/other"), &lease).await;
    proxy.cut_after_forward_of(e.nonce.to_string(), 1);
    let lost = b.enqueue(&e).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Ambiguous, "{lost}");
    soon("the answer is lost", async {
        while proxy.counters().answers_lost == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let line = other.line(&dir("lock/a")).await.unwrap();
    assert_eq!(line.tickets.len(), 1, "it had been applied");
    let again = persist(|| b.enqueue(&e)).await.expect("a place");
    assert_eq!((again.ticket, again.token), (line.tickets[0].clone(), line.front.unwrap().token));

    other.commit(&txn(vec![], vec![put(&key("warm"), "x", None)])).await.unwrap();
    proxy.cut_after_forward_of("needle", 1);
    let lost = b.commit(&txn(vec![Check::Absent(key("needle"))], vec![put(&key("needle"), "x", None)])).await;
    assert_eq!(lost.unwrap_err().kind(), ErrorKind::Ambiguous);
    assert_eq!(names(&other.read(&KeyRange::One(key("needle"))).await.unwrap()), ["needle"]);
    proxy.cut_after_forward_of("needle", 1);
    let read = b.read(&KeyRange::One(key("needle"))).await;
    assert!(read.is_err_and(|e| e.kind() == ErrorKind::Unavailable), "a read may be repeated");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_no_server_is_there_calls_end_in_time_and_say_that_nothing_was_applied() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let config = config(proxy.addr(), "/test").with_timeouts(Duration::from_millis(800), Duration::from_secs(2));
    let b = open(&config).await;
    let lease = lease(&b).await;
    proxy.cut().await;
    // The first call may have met the connection as it broke.
    let _ = b.renew(&lease).await;
    for _ in 0..5 {
        let started = Instant::now();
        let e = b.enqueue(&entry(&dir("lock/a"), &lease)).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(e.to_string().contains(&proxy.addr().to_string()), "names the endpoint: {e}");
    }
    proxy.heal().await;
    persist(|| b.renew(&lease)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_swallows_everything_is_given_up() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let config = config(proxy.addr(), "/test").with_timeouts(Duration::from_secs(1), Duration::from_secs(1));
    let b = open(&config).await;
    let mut s = scene(&b).await;
    proxy.hold(Direction::ToClient);
    // Nobody calls: the look by the clock finds out.
    assert!(matches!(event(&mut s.watch).await, WatchEvent::Interrupted(_)));
    let e = b.renew(&s.lease).await.unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{e}");
    proxy.heal().await;
    persist(|| b.renew(&s.lease)).await;
    assert_eq!(names(&reset(&mut s.watch).await), ["k"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_who_gives_up_on_a_silent_connection_makes_the_next_call_use_a_new_one() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let config = config(proxy.addr(), "/test").with_timeouts(Duration::from_secs(2), Duration::from_secs(4));
    let b = open(&config).await;
    let lease = lease(&b).await;
    proxy.blackhole(Direction::ToClient);
    let limit = Duration::from_millis(3200);
    assert!(timeout(limit, b.renew(&lease)).await.is_err(), "the caller's own limit is below the backend's");
    proxy.heal().await;
    persist(|| b.renew(&lease)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_delays_and_breaks_nothing() {
    let server = server().await;
    let mut s = scene(&connect(server.addr()).await).await;
    server.pause().unwrap();
    sleep(Duration::from_secs(1)).await;
    let write = {
        let b = s.b.clone();
        tokio::spawn(async move { b.commit(&txn(vec![], vec![put(&key("late"), "x", None)])).await })
    };
    sleep(Duration::from_millis(500)).await;
    server.resume().unwrap();
    assert!(soon("the write is answered", write).await.unwrap().unwrap().applied);
    soon("the watch hears of it", async {
        loop {
            match event(&mut s.watch).await {
                WatchEvent::Put(e) if e.key == key("late") => break,
                WatchEvent::Reset(now) if names(&now).contains(&"late") => break,
                _ => {}
            }
        }
    })
    .await;
    assert!(!s.waiter.is_finished());
    s.waiter.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_backend_ends_watches_and_waits() {
    let server = server().await;
    let b = quorate_redis::Redis::connect(&config(server.addr(), "/test")).await.unwrap();
    let mut watch = b.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    drop(b);
    assert!(soon("the watch ends", watch.next()).await.is_none());
    assert!(watch.end().is_none());
}
