//! Three servers, of which one dies.

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend as _, ErrorKind};
use quorate_etcd::Etcd;
use quorate_testkit::servers::{self, Cluster, EtcdOptions, Server};
use tokio::time::{Instant, sleep};

use super::support::{all, config, follow, join, lease, leave, put, reset, spawn_gone, value, within};

async fn cluster() -> Cluster {
    // Not the quickest elections: on a busy machine they would never end.
    let options = EtcdOptions {
        heartbeat: Duration::from_millis(100),
        election: Duration::from_secs(1),
        ..EtcdOptions::default()
    };
    servers::Etcd::cluster(options).await.unwrap()
}

/// Writes until it works again; then it must go on working. Returns how long it took.
async fn recovered(etcd: &Etcd) -> Duration {
    let started = Instant::now();
    let mut failures = 0;
    while let Err(error) =
        within("an answer", tokio::time::timeout(Duration::from_secs(5), etcd.commit(&put("a", "1"))))
            .await
            .unwrap_or_else(|_| Err(quorate_core::Error::new(ErrorKind::Ambiguous, "commit", "no answer")))
    {
        assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{error}");
        failures += 1;
        assert!(started.elapsed() < Duration::from_secs(40), "still {error} after {failures} attempts");
        sleep(Duration::from_millis(50)).await;
    }
    let took = started.elapsed();
    for _ in 0..50 {
        etcd.commit(&put("a", "2")).await.expect("the dead endpoint is not asked again soon");
    }
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_dead_from_the_start_costs_nothing() {
    let cluster = cluster().await;
    let dead = cluster.nodes()[1].clone();
    dead.kill().await.unwrap();
    for _ in 0..4 {
        let etcd = Etcd::connect(&config(cluster.addrs())).await.unwrap();
        recovered(&etcd).await;
        let lease = lease(&etcd).await;
        etcd.renew(&lease).await.unwrap();
    }
}

async fn survives_the_end_of(node: &Server, cluster: &Cluster) {
    let etcd = Arc::new(Etcd::connect(&config(cluster.addrs())).await.unwrap());
    let lease = lease(&etcd).await;
    let (first, second) = (join(&etcd, "job", &lease).await, join(&etcd, "job", &lease).await);
    let mut watch = etcd.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    let gone = spawn_gone(&etcd, &first.ticket);
    sleep(Duration::from_millis(200)).await;
    node.kill().await.unwrap();
    let took = recovered(&etcd).await;
    println!("{} killed, writes again after {took:?}", node.name());
    etcd.renew(&lease).await.expect("the lease stands");
    etcd.commit(&put("a", "3")).await.unwrap();
    follow(&mut watch, &[("a", "3")]).await;
    assert_eq!(etcd.look(&second.ticket, 1).await.unwrap().unwrap().ahead, [first.ticket.clone()]);
    // Either it still waits, on a server that lives, or it has returned, to be repeated.
    let gone = if gone.is_finished() { spawn_gone(&etcd, &first.ticket) } else { gone };
    sleep(Duration::from_millis(200)).await;
    leave(&etcd, &first.ticket).await;
    within("the hand-off works", gone).await.unwrap().unwrap();
    leave(&etcd, &second.ticket).await;
    assert_eq!(value(&etcd, "a").await.as_deref(), Some(&b"3"[..]));
    node.restart().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_any_one_server_is_survived_and_of_the_leader_too() {
    let cluster = cluster().await;
    for node in cluster.nodes() {
        survives_the_end_of(node, &cluster).await;
    }
    let leader = cluster.leader().await.unwrap();
    survives_the_end_of(&leader, &cluster).await;
}

/// A follower passes writes on to the leader and waits. If that dies with them, etcd says so after 5 s and two election timeouts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_was_under_way_to_a_leader_that_dies_is_told_soon() {
    let options = EtcdOptions {
        heartbeat: Duration::from_millis(100),
        election: Duration::from_millis(600),
        ..EtcdOptions::default()
    };
    let cluster = servers::Etcd::cluster(options).await.unwrap();
    let leader = cluster.leader().await.unwrap();
    let follower = cluster.nodes().iter().find(|node| node.addr() != leader.addr()).unwrap();
    let etcd = Arc::new(Etcd::connect(&config([follower.addr()])).await.unwrap());
    let writers: Vec<_> = (0..8)
        .map(|i| {
            let etcd = etcd.clone();
            tokio::spawn(async move {
                let (end, mut longest) = (Instant::now() + Duration::from_secs(6), Duration::ZERO);
                while Instant::now() < end {
                    let began = Instant::now();
                    let outcome = etcd.commit(&put(&format!("w{i}"), "1")).await;
                    longest = longest.max(began.elapsed());
                    if let Err(error) = outcome {
                        assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{error}");
                        sleep(Duration::from_millis(20)).await;
                    }
                }
                longest
            })
        })
        .collect();
    sleep(Duration::from_millis(500)).await;
    leader.kill().await.unwrap();
    for writer in writers {
        let longest = within("the writer ends", writer).await.unwrap();
        println!("the longest write took {longest:?}");
        assert!(longest < Duration::from_secs(4), "{longest:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_cut_off_from_the_others_does_not_keep_a_watch_silent() {
    let cluster = cluster().await;
    let [a, b, c] = cluster.nodes() else { panic!("three nodes") };
    // The client knows the first one only; when both others stop, that one has no leader any more.
    let etcd = Arc::new(Etcd::connect(&config([a.addr()])).await.unwrap());
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 0);
    b.pause().unwrap();
    c.pause().unwrap();
    let event = within("the watch is told", watch.next()).await;
    assert!(matches!(event, Some(quorate_core::WatchEvent::Interrupted(_))), "{event:?}");
    let error = etcd.read(&all()).await.expect_err("no leader");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let error = etcd.commit(&put("a", "1")).await.expect_err("no leader");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "refused before it was proposed: {error}");
    b.resume().unwrap();
    c.resume().unwrap();
    recovered(&etcd).await;
    follow(&mut watch, &[("a", "2")]).await;
}
