//! Dead, silent and cut servers, as one client sees them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quorate_core::{Backend as _, ErrorKind, Watch, WatchEvent};
use quorate_etcd::Etcd;
use quorate_testkit::{
    proxy::{Direction, FaultProxy},
    servers::Server,
};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep, timeout},
};

use super::support::{
    all, config, connect, entry, follow, interrupted, join, key, lease, leave, line, put, release, reset, server,
    spawn_gone, until, value, watchers, within,
};

/// A port that nobody listens on.
async fn dead() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn without_a_server_connect_fails_and_names_the_endpoints() {
    let (a, b) = (dead().await, dead().await);
    let error = Etcd::connect(&config([a, b])).await.expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(text.contains(&a.to_string()) && text.contains(&b.to_string()), "{text}");
    assert!(text.contains("refused"), "the cause is told: {text}");
}

#[tokio::test]
async fn connecting_to_a_silent_server_ends_in_time() {
    let server = server().await;
    server.pause().unwrap();
    let limit = Duration::from_secs(1);
    let config = config([server.addr()]).with_timeouts(limit, limit);
    let started = Instant::now();
    let error = Etcd::connect(&config).await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(started.elapsed() < limit * 3, "{:?}", started.elapsed());
    server.resume().unwrap();
}

#[tokio::test]
async fn one_living_endpoint_among_dead_and_silent_ones_is_found_and_kept() {
    let server = server().await;
    let silent = FaultProxy::start(server.addr()).await.unwrap();
    silent.hold(Direction::ToClient);
    // Whichever of them is tried first.
    for _ in 0..6 {
        let config = config([dead().await, silent.addr(), server.addr()]);
        let etcd = Etcd::connect(&config).await.unwrap();
        for _ in 0..20 {
            etcd.commit(&put("a", "1")).await.expect("once it is found there is no more doubt");
        }
    }
}

#[tokio::test]
async fn a_refused_connection_was_surely_not_a_write_and_the_next_call_after_it_works() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    etcd.commit(&put("a", "1")).await.unwrap();
    proxy.cut().await;
    sleep(Duration::from_millis(100)).await;
    for _ in 0..3 {
        let error = etcd.commit(&put("a", "2")).await.expect_err("it is cut");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
    let error = etcd.grant(Duration::from_secs(5)).await.expect_err("it is cut");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    proxy.heal().await;
    assert_eq!(value(&etcd, "a").await.as_deref(), Some(&b"1"[..]));
}

#[tokio::test]
async fn a_lost_answer_of_a_write_is_ambiguous_and_of_a_read_is_not() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    proxy.cut_after_forward_of("app/kv/lost", 1);
    let error = etcd.commit(&put("lost", "1")).await.expect_err("the answer was lost");
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    assert!(error.to_string().contains("kv/lost"), "{error}");
    assert_eq!(value(&etcd, "lost").await.as_deref(), Some(&b"1"[..]), "it had been carried out");

    proxy.cut_after_forward_of("app/kv/lost", 1);
    let read = etcd.read(&quorate_core::KeyRange::One(key("lost"))).await;
    assert_eq!(read.expect_err("the answer was lost").kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_join_whose_answer_was_lost_is_found_again_by_repeating_it() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    let lease = lease(&etcd).await;
    let first = join(&etcd, "job", &lease).await;
    let entry = entry("job", &lease);
    proxy.cut_after_forward_of("app/lock/job", 1);
    let error = etcd.enqueue(&entry).await.expect_err("the answer was lost");
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    let third = join(&etcd, "job", &lease).await;
    let place = etcd.enqueue(&entry).await.unwrap().unwrap();
    assert_eq!(place.ahead, [first.ticket.clone()]);
    assert!(place.token > first.token && place.token < third.token);
    assert_eq!(etcd.line(&line("job")).await.unwrap().tickets, [first.ticket, place.ticket, third.ticket]);
}

#[tokio::test]
async fn a_release_whose_answer_was_lost_is_ambiguous_and_has_happened() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    let lease = lease(&etcd).await;
    let place = join(&etcd, "job", &lease).await;
    proxy.cut_after_forward_of("app/lock/job", 1);
    assert_eq!(etcd.commit(&release(&place)).await.expect_err("lost").kind(), ErrorKind::Ambiguous);
    let again = etcd.commit(&release(&place)).await.unwrap();
    assert!(!again.applied, "the ticket was gone by then");
    assert_eq!(again.culprit, Some(0));
}

#[tokio::test]
async fn a_watch_and_a_wait_survive_cut_connections() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (etcd, other) = (Arc::new(connect(proxy.addr()).await), connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let (first, second) = (join(&etcd, "job", &lease).await, join(&etcd, "job", &lease).await);
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 0);
    let gone = spawn_gone(&etcd, &first.ticket);
    until("both wait at the server", || async { watchers(server.addr()).await == 2 }).await;
    proxy.cut().await;
    interrupted(gone).await;
    assert_eq!(etcd.gone(&first.ticket).await.expect_err("still cut").kind(), ErrorKind::Unavailable);
    let told = within("the reader is told", watch.next()).await;
    assert!(matches!(told, Some(WatchEvent::Interrupted(_))), "{told:?}");
    other.commit(&put("a", "1")).await.unwrap();
    proxy.heal().await;
    follow(&mut watch, &[("a", "1")]).await;
    other.commit(&put("a", "2")).await.unwrap();
    follow(&mut watch, &[("a", "2")]).await;
    assert_eq!(etcd.look(&second.ticket, 1).await.unwrap().unwrap().ahead, [first.ticket.clone()]);
    let gone = spawn_gone(&etcd, &first.ticket);
    sleep(Duration::from_millis(100)).await;
    leave(&other, &first.ticket).await;
    within("the repeated wait ends", gone).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_removal_while_the_connection_was_cut_is_seen_by_the_next_wait() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (etcd, other) = (Arc::new(connect(proxy.addr()).await), connect(server.addr()).await);
    let lease = lease(&other).await;
    let first = join(&other, "job", &lease).await;
    let gone = spawn_gone(&etcd, &first.ticket);
    until("it waits at the server", || async { watchers(server.addr()).await == 1 }).await;
    proxy.cut().await;
    leave(&other, &first.ticket).await;
    proxy.heal().await;
    interrupted(gone).await;
    within("and the next one at once", etcd.gone(&first.ticket)).await.unwrap();
}

#[tokio::test]
async fn a_silent_connection_is_left_behind_by_the_call_after_the_one_given_up() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let config = config([proxy.addr(), server.addr()]);
    // The first choice is random.
    let etcd = loop {
        let before = proxy.counters().accepted;
        let etcd = Etcd::connect(&config).await.unwrap();
        if proxy.counters().accepted > before {
            break etcd;
        }
    };
    let lease = lease(&etcd).await;
    etcd.renew(&lease).await.unwrap();
    proxy.hold(Direction::ToClient);
    let given_up = timeout(Duration::from_millis(400), etcd.renew(&lease)).await;
    assert!(given_up.is_err(), "nobody answers there");
    within("the next renewal goes another way", etcd.renew(&lease)).await.unwrap();
    timeout(Duration::from_secs(2), etcd.commit(&put("a", "1"))).await.expect("so does the next call").unwrap();
}

#[tokio::test]
async fn dropped_watches_and_waits_leave_the_server() {
    let server = server().await;
    let etcd = Arc::new(connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let place = join(&etcd, "job", &lease).await;
    let mut watches = Vec::new();
    for _ in 0..5 {
        watches.push(etcd.watch(&all()).await.unwrap());
    }
    let waits: Vec<_> = (0..5).map(|_| spawn_gone(&etcd, &place.ticket)).collect();
    until("all are at the server", || async { watchers(server.addr()).await == 10 }).await;
    drop(watches.split_off(2));
    waits.iter().for_each(tokio::task::JoinHandle::abort);
    until("only what is left is left", || async { watchers(server.addr()).await == 2 }).await;
    // A watch of the same stream goes on.
    etcd.commit(&put("a", "1")).await.unwrap();
    follow(&mut watches[0], &[("a", "1")]).await;
}

#[tokio::test]
async fn dropping_the_backend_closes_its_connections_and_ends_its_watches() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    let lease = lease(&etcd).await;
    etcd.renew(&lease).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 0);
    assert_eq!(proxy.counters().open, 1, "everything shares one connection");
    drop(etcd);
    assert!(within("the watch ends", watch.next()).await.is_none());
    assert!(watch.end().is_none(), "shut down, not failed");
    until("the connection is closed", || async { proxy.counters().open == 0 }).await;
}

/// Of two ways to a server the one in use falls silent, as in a partition: nothing arrives any more, and no connection is
/// closed. A long limit, so that it is not what ends a call.
struct Silence {
    server: Server,
    _ways: [FaultProxy; 2],
    etcd: Etcd,
    watch: Watch,
}

impl Silence {
    async fn begins() -> Self {
        let server = server().await;
        let ways = [FaultProxy::start(server.addr()).await.unwrap(), FaultProxy::start(server.addr()).await.unwrap()];
        let limit = Duration::from_secs(20);
        let config = config(ways.iter().map(FaultProxy::addr)).with_timeouts(limit, limit);
        let etcd = Etcd::connect(&config).await.unwrap();
        let mut watch = etcd.watch(&all()).await.unwrap();
        assert_eq!(reset(&mut watch).await, 0);
        let used = ways.iter().find(|way| way.counters().open > 0).expect("one of them is in use");
        used.hold(Direction::ToServer);
        used.hold(Direction::ToClient);
        Self { server, _ways: ways, etcd, watch }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_endpoint_is_left_by_a_call_under_way_and_by_watches_long_before_their_limits() {
    let Silence { server: _server, _ways, etcd, mut watch } = Silence::begins().await;
    let began = Instant::now();
    let error = within("the call is told", etcd.commit(&put("a", "1"))).await.expect_err("it is silent");
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    assert!(error.to_string().contains("answered nothing"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    etcd.commit(&put("a", "2")).await.expect("the next call goes the other way");
    assert!(follow(&mut watch, &[("a", "2")]).await, "the watch is told of the gap");
    println!("the watch was back {:?} after the silence began", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
}

/// A watch alone, beside which nothing is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_endpoint_is_left_by_a_watch_alone() {
    let Silence { server, _ways, etcd: _etcd, mut watch } = Silence::begins().await;
    let began = Instant::now();
    connect(server.addr()).await.commit(&put("a", "1")).await.unwrap();
    assert!(follow(&mut watch, &[("a", "1")]).await, "the watch is told of the gap");
    println!("the watch was back {:?} after the silence began", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
}
