//! Servers that restart, lose their data or are cut off, under a watch, a wait and a lease that go on.

use std::{sync::Arc, time::Duration};

use quorate_consul::Consul;
use quorate_core::{Backend, ErrorKind, KeyRange, Txn, Watch, WatchEvent};
use quorate_testkit::{
    proxy::{Direction, FaultProxy},
    servers::Server,
};
use tokio::time::{Instant, sleep, timeout};

use crate::common::{
    LONG, all, assert_nothing_left, client, commit, config, entry, grant, join, keep, key, line, next, next_reset, put,
    release, release_of, server, until_gone, value,
};

/// Commits until it works: what the retry layer does.
async fn put_until(client: &quorate_consul::Consul, name: &str) {
    let end = Instant::now() + LONG;
    loop {
        let txn = Txn { checks: Vec::new(), writes: vec![put(name, "v", None)] };
        match timeout(Duration::from_secs(2), client.commit(&txn)).await {
            Ok(Ok(commit)) => {
                assert!(commit.applied);
                return;
            }
            other => assert!(Instant::now() < end, "{other:?}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_wait_and_lease_live_through_a_restart_with_the_same_data() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    commit(&client, [put("before", "1", Some(&lease))]).await;
    let place = join(&client, &line("a"), &lease).await;
    let second = join(&client, &line("a"), &lease).await;
    let mut watch = client.watch(&all()).await.unwrap();
    assert_eq!(next_reset(&mut watch).await, (vec!["before".to_owned()], false));
    for how in ["restart", "kill"] {
        let wait = until_gone(&client, &place.ticket);
        sleep(Duration::from_millis(200)).await;
        if how == "kill" {
            server.kill().await.unwrap();
        }
        server.restart().await.unwrap();
        // The reset is what tells of the gap. Whether an interruption comes before it depends on whether the query was out.
        let (keys, _) = next_reset(&mut watch).await;
        assert!(keys.contains(&"before".to_owned()), "{keys:?}");
        client.renew(&lease).await.expect("the lease stands");
        put_until(&client, how).await;
        loop {
            match next(&mut watch).await {
                WatchEvent::Put(entry) if entry.key == key(how) => break,
                WatchEvent::Put(_) | WatchEvent::Reset(_) => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(!wait.is_finished(), "the ticket stands");
        wait.abort();
    }
    let wait = until_gone(&client, &place.ticket);
    assert!(release(&client, &place).await.applied);
    timeout(LONG, wait).await.unwrap().unwrap();
    let third = join(&client, &line("a"), &lease).await;
    assert!(third.token > second.token && third.ahead == [second.ticket]);
    client.revoke(&lease).await.unwrap();
    assert_nothing_left(server.addr()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lost_its_data_is_noticed_by_watch_wait_and_lease() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    for i in 0..50 {
        commit(&client, [put(&format!("k{i}"), "1", None)]).await;
    }
    let place = join(&client, &line("a"), &lease).await;
    let wait = until_gone(&client, &place.ticket);
    let mut watch = client.watch(&all()).await.unwrap();
    assert_eq!(next_reset(&mut watch).await.0.len(), 50);
    sleep(Duration::from_millis(200)).await;
    server.restart_wiped().await.unwrap();
    let (keys, interrupted) = next_reset(&mut watch).await;
    assert!(interrupted && keys.is_empty(), "{keys:?}");
    timeout(LONG, wait).await.expect("the wait ends").unwrap();
    assert_eq!(client.renew(&lease).await.unwrap_err().kind(), ErrorKind::SessionLost);
    put_until(&client, "new").await;
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.key == key("new")));
    let lease = grant(&client, Duration::from_secs(5)).await;
    assert!(join(&client, &line("a"), &lease).await.ahead.is_empty());
    client.revoke(&lease).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_cost_neither_watch_nor_wait_nor_lease() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let near = client(server.addr()).await;
    let far = client(proxy.addr()).await;
    let lease = grant(&far, Duration::from_secs(20)).await;
    let keeper = keep(&far, &lease, Duration::from_secs(1));
    commit(&far, [put("leased", "1", Some(&lease))]).await;
    let place = join(&near, &line("a"), &lease).await;
    let wait = until_gone(&far, &place.ticket);
    let mut watch = far.watch(&all()).await.unwrap();
    next_reset(&mut watch).await;
    for round in 0..3 {
        // Until the watch has its query out: a connection that is idle may break without a gap.
        sleep(Duration::from_millis(300)).await;
        proxy.drop_connections().await;
        let (keys, interrupted) = next_reset(&mut watch).await;
        assert!(interrupted && !keys.is_empty());
        proxy.cut().await;
        sleep(Duration::from_millis(500)).await;
        let name = format!("round-{round}");
        put_until(&near, &name).await;
        let refused = far.commit(&Txn { checks: Vec::new(), writes: vec![put("x", "1", None)] }).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "refused connections apply nothing: {refused}");
        proxy.heal().await;
        let (keys, _) = next_reset(&mut watch).await;
        assert!(keys.contains(&name), "the reset has what happened in the gap: {keys:?}");
        assert!(!wait.is_finished());
    }
    release(&near, &place).await;
    timeout(LONG, wait).await.unwrap().unwrap();
    assert!(value(&far, "leased").await.is_some(), "the lease was kept");
    keeper.abort();
    far.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_ambiguous_and_can_be_read_or_repeated() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let client = client(proxy.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    proxy.cut_after_forward_of("/v1/txn", 1);
    let lost = client.commit(&Txn { checks: Vec::new(), writes: vec![put("a", "1", None)] }).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Ambiguous, "{lost}");
    assert_eq!(value(&client, "a").await.unwrap().0, "1", "it had happened");

    let request = entry(&line("a"), &lease);
    proxy.cut_after_forward_of("/v1/txn", 1);
    assert_eq!(client.enqueue(&request).await.unwrap_err().kind(), ErrorKind::Ambiguous);
    let place = client.enqueue(&request).await.unwrap().unwrap();
    let again = client.enqueue(&request).await.unwrap().unwrap();
    assert_eq!(place, again);
    assert_eq!(client.line(&line("a")).await.unwrap().tickets, std::slice::from_ref(&place.ticket));

    proxy.cut_after_forward_of("/v1/txn", 1);
    let release = release_of(&place);
    assert_eq!(client.commit(&release).await.unwrap_err().kind(), ErrorKind::Ambiguous);
    assert!(!client.commit(&release).await.unwrap().applied, "the first one had taken the ticket out");

    proxy.cut_after_forward_of("/v1/session/create", 1);
    assert_eq!(client.grant(Duration::from_secs(60)).await.unwrap_err().kind(), ErrorKind::Ambiguous);
    proxy.cut_after_forward_of("/v1/session/destroy", 1);
    assert_eq!(client.revoke(&lease).await.unwrap_err().kind(), ErrorKind::Ambiguous);
    client.revoke(&lease).await.unwrap();
    proxy.cut_after_forward_of("/v1/kv/", 1);
    let lost = client.read(&KeyRange::One(key("a"))).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Unavailable, "a read changes nothing: {lost}");
    assert_eq!(proxy.counters().answers_lost, 6);
    // The session of the grant whose answer was lost ends with the service that the failed grant takes back.
    assert_nothing_left(server.addr()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_falls_silent_is_left_by_calls_watch_and_wait() {
    let server = server().await;
    let proxies = [FaultProxy::start(server.addr()).await.unwrap(), FaultProxy::start(server.addr()).await.unwrap()];
    let mut config = config(proxies[0].addr()).with_timeouts(Duration::from_secs(2), Duration::from_secs(2));
    config.endpoints.push(proxies[1].addr().to_string());
    let far = Arc::new(quorate_consul::Consul::connect(&config).await.unwrap());
    let near = client(server.addr()).await;
    let lease = grant(&near, Duration::from_secs(60)).await;
    let place = join(&near, &line("a"), &lease).await;
    let wait = until_gone(&far, &place.ticket);
    let mut watch = far.watch(&all()).await.unwrap();
    next_reset(&mut watch).await;
    sleep(Duration::from_millis(300)).await;
    let silent = proxies.iter().find(|p| p.counters().open >= 2).expect("one of them is in use");
    silent.hold(Direction::ToClient);
    // What the timeout layer does: it drops the call.
    let txn = Txn { checks: Vec::new(), writes: vec![put("a", "1", None)] };
    timeout(Duration::from_millis(1200), far.commit(&txn)).await.expect_err("the agent is silent");
    let began = Instant::now();
    put_until(&far, "b").await;
    assert!(began.elapsed() < Duration::from_secs(1), "the next call goes to the other agent");
    release(&near, &place).await;
    let woken = timeout(Duration::from_secs(8), wait).await.expect("the wait follows").unwrap();
    println!("the wait at a silent agent was over {:?} after the first failure", woken - began);
    told(&mut watch, "b", Duration::from_secs(8)).await;
    near.revoke(&lease).await.unwrap();
}

/// Of two ways to a server the one in use falls silent, as in a partition: nothing arrives any more, and no connection is
/// closed. A long limit, so that it is not what ends a call.
struct Silence {
    server: Server,
    ways: [FaultProxy; 2],
    used: usize,
    consul: Arc<Consul>,
    watch: Watch,
}

const LIMIT: Duration = Duration::from_secs(20);

impl Silence {
    async fn begins() -> Self {
        let server = server().await;
        let ways = [FaultProxy::start(server.addr()).await.unwrap(), FaultProxy::start(server.addr()).await.unwrap()];
        let mut config = config(ways[0].addr()).with_timeouts(LIMIT, LIMIT);
        config.endpoints.push(ways[1].addr().to_string());
        let consul = Arc::new(Consul::connect(&config).await.unwrap());
        let mut watch = consul.watch(&all()).await.unwrap();
        next_reset(&mut watch).await;
        let used = ways.iter().position(|way| way.counters().open > 0).expect("one of them is in use");
        ways[used].hold(Direction::ToServer);
        ways[used].hold(Direction::ToClient);
        Self { server, ways, used, consul, watch }
    }
}

/// Waits until a watch tells of a key.
async fn told(watch: &mut Watch, name: &str, limit: Duration) {
    let seen = async {
        loop {
            match next(watch).await {
                WatchEvent::Put(entry) if entry.key == key(name) => return,
                WatchEvent::Reset(now) if now.entries.iter().any(|e| e.key == key(name)) => return,
                _ => {}
            }
        }
    };
    timeout(limit, seen).await.expect("the watch follows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_falls_silent_is_left_by_a_call_under_way_long_before_its_limit() {
    let mut silence = Silence::begins().await;
    let began = Instant::now();
    let txn = Txn { checks: Vec::new(), writes: vec![put("a", "1", None)] };
    let call = timeout(LIMIT / 2, silence.consul.commit(&txn)).await;
    let error = call.expect("told in time").expect_err("it is silent");
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    assert!(error.to_string().contains("answered nothing"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    put_until(&silence.consul, "b").await;
    told(&mut silence.watch, "b", LIMIT / 2).await;
    println!("the watch was back {:?} after the silence began", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
}

/// A watch alone, beside which nothing is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_falls_silent_is_left_by_a_watch_alone() {
    let mut silence = Silence::begins().await;
    let began = Instant::now();
    commit(&*client(silence.server.addr()).await, vec![put("a", "1", None)]).await;
    told(&mut silence.watch, "a", LONG).await;
    println!("the watch was back {:?} after the silence began", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

/// Calls are kept below what the agent takes from one address; what is asked beside them must be as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_slow_calls_ask_for_one_sign_of_life() {
    let silence = Silence::begins().await;
    let calls: Vec<_> = (0..32)
        .map(|i| {
            let consul = silence.consul.clone();
            let txn = Txn { checks: Vec::new(), writes: vec![put(&format!("k{i}"), "1", None)] };
            tokio::spawn(async move { consul.commit(&txn).await })
        })
        .collect();
    sleep(Duration::from_millis(1500)).await;
    let open = silence.ways[silence.used].counters().open;
    // One more for the watch, and a few for the sign and what connecting has left.
    assert!((32..=32 + 5).contains(&open), "{open} connections for 32 calls");
    for call in calls {
        let error = timeout(LIMIT / 2, call).await.expect("told in time").unwrap().expect_err("it is silent");
        assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    }
}
