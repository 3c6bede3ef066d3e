//! Sentinel and Cluster.

mod support;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quorate_core::{Check, Config, ErrorKind, KeyRange, Write};
use quorate_redis::Redis;
use quorate_testkit::servers::{Redis as Servers, RedisOptions, Server};
use support::*;
use tokio::time::sleep;

fn list(servers: &[Arc<Server>]) -> String {
    let addrs: Vec<String> = servers.iter().map(|s| s.addr().to_string()).collect();
    addrs.join(",")
}

/// Waits until everything that was written so far is on the replica, too: replication is asynchronous.
async fn replicated(primary: &Server) {
    let raw = Raw::of(primary).await;
    raw.ask::<String>(&["SET", "{quorate/t}:marker", "x"]).await;
    assert_eq!(raw.ask::<i64>(&["WAIT", "1", "20000"]).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failover_locks_survive_or_are_reported_lost_and_tokens_rise() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    let url = format!("redis+sentinel://{}/t?master=mymaster", list(group.sentinels()));
    let b = open(&Config::parse(&url).unwrap()).await;
    assert!(!b.profile().linearizable_reads && !b.profile().consensus);
    let lease = lease(&b).await;
    let line = dir("lock/a");
    let place = join(&b, &line, &lease).await;
    let b2 = open(&Config::parse(&url).unwrap()).await;
    let waiter = tokio::spawn(until_gone(b2.clone(), place.ticket.clone()));
    let mut watch = b2.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    let old = group.primary().await.unwrap();
    replicated(&old).await;
    old.kill().await.unwrap();
    persist(|| b.renew(&lease)).await;
    soon("another server is the primary", async {
        // The sentinels do not all learn it at the same moment.
        while group.primary().await.unwrap().addr() == old.addr() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let stands = persist(|| b.look(&place.ticket, 1)).await.expect("the ticket was replicated");
    assert_eq!(stands.token, place.token);
    reset(&mut watch).await;
    assert!(!waiter.is_finished());
    let next = join(&b, &line, &lease).await;
    assert!(next.token > place.token);
    assert!(b.commit(&release(&place)).await.unwrap().applied);
    soon("the waiter goes on", waiter).await.unwrap();
    // The former primary comes back, empty, before the sentinels have made it a replica; it is not mistaken for
    // the primary as long as one sentinel that knows better can be reached.
    old.launch().await.unwrap();
    for _ in 0..20 {
        let third = open(&Config::parse(&url).unwrap()).await;
        assert_eq!(third.line(&line).await.unwrap().tickets, std::slice::from_ref(&next.ticket));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_a_failover_loses_are_reported_lost_and_tokens_still_rise() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    let url = format!("redis+sentinel://{}/t", list(group.sentinels()));
    let b = open(&Config::parse(&url).unwrap()).await;
    let kept = lease(&b).await;
    replicated(&group.data()[0]).await;
    let primary = Raw::of(&group.data()[0]).await;
    // What is written from here on never reaches the replica: it may not follow the primary any more.
    primary.ask::<String>(&["ACL", "SETUSER", "default", "-psync", "-replconf"]).await;
    primary.ask::<i64>(&["CLIENT", "KILL", "TYPE", "replica"]).await;
    let lost = lease(&b).await;
    let line = dir("lock/a");
    let place = join(&b, &line, &lost).await;
    group.data()[0].kill().await.unwrap();
    persist(|| b.renew(&kept)).await;
    assert_eq!(b.renew(&lost).await.unwrap_err().kind(), ErrorKind::SessionLost);
    assert_eq!(b.look(&place.ticket, 1).await.unwrap(), None);
    let next = join(&b, &line, &kept).await;
    assert!(next.ahead.is_empty() && next.token > place.token, "{next:?} after {place:?}");
}

/// A release that the new primary has not heard of would keep the lock taken for as long as the session lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_released_or_taken_away_before_a_failover_does_not_come_back_with_it() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    let url = format!("redis+sentinel://{}/t", list(group.sentinels()));
    let (b, other) = (open(&Config::parse(&url).unwrap()).await, open(&Config::parse(&url).unwrap()).await);
    let lease = lease(&b).await;
    let (first, second) = (dir("lock/a"), dir("lock/b"));
    let (released, left) = (join(&b, &first, &lease).await, join(&b, &second, &lease).await);
    let written = b.commit(&txn(vec![], vec![put(&key("k"), "v", Some(&lease))])).await.unwrap();
    replicated(&group.data()[0]).await;
    let primary = Raw::of(&group.data()[0]).await;
    primary.ask::<String>(&["ACL", "SETUSER", "default", "-psync", "-replconf"]).await;
    primary.ask::<i64>(&["CLIENT", "KILL", "TYPE", "replica"]).await;
    assert!(b.commit(&release(&released)).await.unwrap().applied);
    b.commit(&txn(vec![], vec![Write::Leave(left.ticket.clone())])).await.unwrap();
    let unchanged = Check::Unchanged { key: key("k"), modified: written.revision };
    assert!(b.commit(&txn(vec![unchanged], vec![Write::Delete(key("k"))])).await.unwrap().applied);
    group.data()[0].kill().await.unwrap();
    persist(|| b.renew(&lease)).await;
    soon("they are taken away again", async {
        loop {
            let lines = (persist(|| other.line(&first)).await, persist(|| other.line(&second)).await);
            let range = all();
            let keys = persist(|| other.read(&range)).await;
            if lines.0.tickets.is_empty() && lines.1.tickets.is_empty() && keys.entries.is_empty() {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    b.renew(&lease).await.expect("the session is the same");
}

/// The primary is stopped, replaced, and wakes up in the belief that it is still the primary: what it confirms will be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_was_replaced_while_it_slept_is_left_soon_after_it_wakes() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    let url = format!("redis+sentinel://{}/t", list(group.sentinels()));
    let b = open(&Config::parse(&url).unwrap()).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "before", None)])).await.unwrap();
    let old = group.primary().await.unwrap();
    replicated(&old).await;
    old.pause().unwrap();
    soon("another server is the primary", async {
        while group.primary().await.unwrap().addr() == old.addr() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let other = open(&Config::parse(&url).unwrap()).await;
    old.resume().unwrap();
    let woken = tokio::time::Instant::now();
    // Through whichever server `b` uses now.
    for turn in 0.. {
        let value = turn.to_string();
        let write = txn(vec![], vec![put(&key("k"), &value, None)]);
        persist(|| b.commit(&write)).await;
        let range = KeyRange::One(key("k"));
        let found = persist(|| other.read(&range)).await.entries.pop().expect("it was replicated");
        if found.value == value.as_bytes() {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    let took = woken.elapsed();
    println!("the former primary was left {took:?} after it woke");
    assert!(took < Duration::from_secs(4), "left only after {took:?}");
}

/// The primary falls silent, as in a partition. A long limit, so that it is not what ends the call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_under_way_to_a_primary_that_is_replaced_is_told_once_that_is_known() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    let url = format!("redis+sentinel://{}/t", list(group.sentinels()));
    let limit = Duration::from_secs(60);
    let config = Config::parse(&url).unwrap().with_timeouts(Duration::from_secs(3), limit);
    let b = open(&config).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "before", None)])).await.unwrap();
    let old = group.primary().await.unwrap();
    replicated(&old).await;
    old.pause().unwrap();
    let began = tokio::time::Instant::now();
    let error = b.commit(&txn(vec![], vec![put(&key("k"), "lost", None)])).await.expect_err("it is asleep");
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    let after = txn(vec![], vec![put(&key("k"), "after", None)]);
    persist(|| b.commit(&after)).await;
    println!("written again {:?} after the silence began", began.elapsed());
    assert!(began.elapsed() < limit / 3, "{:?}", began.elapsed());
    old.resume().unwrap();
}

/// Until the failover is over the sentinels name a primary that is silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_connects_during_a_failover_ends_at_the_new_primary() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    let url = format!("redis+sentinel://{}/t", list(group.sentinels()));
    let old = group.primary().await.unwrap();
    replicated(&old).await;
    old.pause().unwrap();
    let began = tokio::time::Instant::now();
    let limit = Duration::from_secs(40);
    let b = open(&Config::parse(&url).unwrap().with_timeouts(limit, limit)).await;
    println!("connected {:?} after the primary fell silent", began.elapsed());
    assert!(began.elapsed() < limit / 2, "{:?}", began.elapsed());
    b.commit(&txn(vec![], vec![put(&key("k"), "1", None)])).await.unwrap();
    old.resume().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_sentinels_are_passed_over_and_an_unknown_name_is_told() {
    let group = Servers::sentinel(RedisOptions::default()).await.unwrap();
    group.sentinels()[0].kill().await.unwrap();
    let url = |name: &str| format!("redis+sentinel://{}/t?master={name}", list(group.sentinels()));
    for _ in 0..4 {
        lease(&open(&Config::parse(&url("mymaster")).unwrap()).await).await;
    }
    let e = Redis::connect(&Config::parse(&url("other")).unwrap()).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable);
    assert!(e.to_string().contains("other"), "{e}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_cluster_any_seed_leads_to_the_owner_and_messages_arrive() {
    let cluster = Servers::cluster(RedisOptions::default(), false).await.unwrap();
    // Namespaces of all three nodes; every seed alone must do.
    for (i, node) in cluster.nodes().iter().enumerate() {
        for ns in ["a", "b", "c", "d", "e", "f"] {
            let url = format!("redis+cluster://{}/{ns}{i}", node.addr());
            let (b, other) = (open(&Config::parse(&url).unwrap()).await, open(&Config::parse(&url).unwrap()).await);
            let mut watch = other.watch(&all()).await.unwrap();
            reset(&mut watch).await;
            let lease = lease(&b).await;
            let place = join(&b, &dir("lock/a"), &lease).await;
            let waiter = tokio::spawn(until_gone(other.clone(), place.ticket.clone()));
            b.commit(&txn(vec![], vec![put(&key("k"), "v", Some(&lease))])).await.unwrap();
            event(&mut watch).await;
            b.commit(&release(&place)).await.unwrap();
            soon("the waiter goes on", waiter).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_cluster_node_dies_its_replica_takes_over() {
    let cluster = Servers::cluster(RedisOptions::default(), true).await.unwrap();
    let url = format!("redis+cluster://{}/t", cluster.nodes()[0].addr());
    let b = open(&Config::parse(&url).unwrap()).await;
    let lease = lease(&b).await;
    let place = join(&b, &dir("lock/a"), &lease).await;
    let mut watch = b.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    let owner = owner(&cluster.nodes()[..3]).await;
    replicated(&owner).await;
    owner.kill().await.unwrap();
    persist(|| b.renew(&lease)).await;
    assert_eq!(persist(|| b.look(&place.ticket, 1)).await.expect("it was replicated").token, place.token);
    reset(&mut watch).await;
    assert!(join(&b, &dir("lock/a"), &lease).await.token > place.token);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_cluster_scheme_a_cluster_node_says_which_one_to_use() {
    let cluster = Servers::cluster(RedisOptions::default(), false).await.unwrap();
    let mut told = 0;
    for node in cluster.nodes() {
        if let Err(e) = Redis::connect(&config(node.addr(), "/t")).await {
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.to_string().contains("redis+cluster"), "{e}");
            told += 1;
        }
    }
    assert_eq!(told, 2, "one of three owns the slot");
}

/// The node that holds the namespace.
async fn owner(primaries: &[Arc<Server>]) -> Arc<Server> {
    for node in primaries {
        let raw = Raw::of(node).await;
        if raw.ask::<Vec<String>>(&["CLUSTER", "GETKEYSINSLOT", &slot(&raw).await, "1"]).await.len() == 1 {
            return node.clone();
        }
    }
    panic!("nobody owns the namespace");
}

async fn slot(raw: &Raw) -> String {
    raw.ask::<i64>(&["CLUSTER", "KEYSLOT", "{quorate/t}:h"]).await.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_moved_takes_its_namespace_along() {
    let cluster = Servers::cluster(RedisOptions::default(), false).await.unwrap();
    let b = open(&Config::parse(&format!("redis+cluster://{}/t", cluster.nodes()[0].addr())).unwrap()).await;
    let lease = lease(&b).await;
    let place = join(&b, &dir("lock/a"), &lease).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "v", None)])).await.unwrap();
    let from = owner(cluster.nodes()).await;
    let to = cluster.nodes().iter().find(|n| n.addr() != from.addr()).unwrap();
    let (source, target) = (Raw::of(&from).await, Raw::of(to).await);
    let slot = slot(&source).await;
    let (from_id, to_id): (String, String) =
        (source.ask(&["CLUSTER", "MYID"]).await, target.ask(&["CLUSTER", "MYID"]).await);
    target.ask::<String>(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]).await;
    source.ask::<String>(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]).await;
    // Half-way, nothing may be applied by halves: each call works as a whole or is refused as a whole.
    let addr: SocketAddr = to.addr();
    let port = addr.port().to_string();
    source.ask::<String>(&["MIGRATE", "127.0.0.1", &port, "{quorate/t}:z", "0", "5000"]).await;
    let e = b.commit(&release(&place)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    for key in ["{quorate/t}:h", "{quorate/t}:t"] {
        source.ask::<String>(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await;
    }
    for node in [&target, &source] {
        node.ask::<String>(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]).await;
    }
    persist(|| b.renew(&lease)).await;
    assert_eq!(names(&b.read(&all()).await.unwrap()), ["k"]);
    assert_eq!(b.look(&place.ticket, 1).await.unwrap().expect("it stands").token, place.token);
    assert!(b.commit(&release(&place)).await.unwrap().applied);
}
