//! Servers that restart, connections that break, endpoints that are dead.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend, Check, ErrorKind, KeyRange, Revision, Watch, WatchEvent};
use quorate_testkit::{
    proxy::{Direction, FaultProxy},
    servers::ZooKeeper as Launcher,
};
use quorate_zookeeper::ZooKeeper;
use support::*;
use tokio::time::{Instant, sleep, timeout};

/// More than any reconnect takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// A session that outlives the restart of a JVM on a busy machine. The test servers grant up to 20 ticks: see `slow`.
const LONG: Duration = Duration::from_secs(20);

/// A server with sessions of up to 40 s.
fn slow() -> quorate_testkit::servers::ZooKeeperOptions {
    quorate_testkit::servers::ZooKeeperOptions { tick: Duration::from_secs(2), ..options() }
}

async fn next(watch: &mut Watch) -> WatchEvent {
    timeout(PATIENCE, watch.next()).await.expect("an event in time").expect("the watch goes on")
}

/// The next snapshot, after any interruption.
async fn next_reset(watch: &mut Watch) -> quorate_core::Snapshot {
    loop {
        match next(watch).await {
            WatchEvent::Reset(snapshot) => return snapshot,
            WatchEvent::Interrupted(error) => assert_eq!(error.kind(), ErrorKind::Unavailable),
            other => panic!("a reset was expected, not {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_ticket_wait_and_watch_live_through_a_restart() {
    let server = Launcher::start(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let backend = client(&server).await;
    let lease = keep(&backend, LONG).await;
    let (first, second) = (join(&backend, &line("a"), &lease.id).await, join(&backend, &line("a"), &lease.id).await);
    commit(&backend, [], [put_on(&lease.id, &key("mine"), "1")]).await.unwrap();
    let mut watch = backend.watch(&all()).await.unwrap();
    assert_eq!(next_reset(&mut watch).await.entries.len(), 1);
    let waiting = tokio::spawn({
        let (backend, ticket) = (backend.clone(), first.ticket.clone());
        async move {
            loop {
                // It may return early; then we look again, as every caller does.
                let _ = backend.gone(&ticket).await;
                if let Ok(None) = backend.look(&ticket, 1).await {
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
    });
    sleep(Duration::from_millis(100)).await;

    server.restart().await.unwrap();

    until("renewed again", PATIENCE, async || backend.renew(&lease.id).await.is_ok()).await;
    let place = backend.look(&second.ticket, 1).await.unwrap().expect("the ticket still stands");
    assert_eq!((place.token, place.ahead), (second.token, vec![first.ticket.clone()]));
    assert_eq!(get(&backend, &key("mine")).await.and_then(|e| e.lease), Some(lease.id.clone()));
    assert!(!waiting.is_finished(), "the first ticket still stands");
    assert_eq!(next_reset(&mut watch).await.entries.len(), 1, "told anew after the gap");
    let revision = commit(&backend, [], [put(&key("after"), "1")]).await.unwrap().revision;
    assert!(revision > second.token);
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(e) if e.key == key("after") && e.modified == revision));
    leave(&backend, &first.ticket).await;
    timeout(PATIENCE, waiting).await.expect("woken").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_wiped_restart_leases_are_lost_and_everything_else_begins_anew() {
    let server = Launcher::start(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let backend = client(&server).await;
    // The library gives a session up that no server takes back after 1.4 times its length.
    let lease = backend.grant(Duration::from_secs(6)).await.unwrap().id;
    let place = join(&backend, &line("a"), &lease).await;
    commit(&backend, [], [put(&key("a"), "1")]).await.unwrap();
    let mut watch = backend.watch(&all()).await.unwrap();
    next_reset(&mut watch).await;

    server.restart_wiped().await.unwrap();

    until(
        "the lease is lost",
        PATIENCE,
        async || matches!(backend.renew(&lease).await, Err(e) if e.kind() == ErrorKind::SessionLost),
    )
    .await;
    assert_eq!(next_reset(&mut watch).await.entries, []);
    assert_eq!(backend.look(&place.ticket, 1).await.unwrap(), None);
    assert_eq!(get(&backend, &key("a")).await, None);
    let lease = keep(&backend, LONG).await;
    assert_eq!(join(&backend, &line("a"), &lease.id).await.ahead, []);
    assert!(commit(&backend, [Check::Absent(key("b"))], [put(&key("b"), "2")]).await.unwrap().applied);
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(e) if e.key == key("b")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_cut_costs_no_lease_and_no_wake_up() {
    let server = Launcher::start(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (cut, sound) = (connect(&config(&[proxy.addr()])).await, client(&server).await);
    let (mine, other) = (keep(&cut, LONG).await, keep(&sound, LONG).await);
    let ahead = join(&sound, &line("a"), &other.id).await;
    let place = join(&cut, &line("a"), &mine.id).await;
    let mut watch = cut.watch(&KeyRange::One(key("a"))).await.unwrap();
    next_reset(&mut watch).await;
    let waiting = tokio::spawn({
        let (cut, ticket) = (cut.clone(), ahead.ticket.clone());
        async move { cut.gone(&ticket).await }
    });
    sleep(Duration::from_millis(100)).await;
    proxy.cut().await;
    // While nobody can tell us: what we wait for happens.
    leave(&sound, &ahead.ticket).await;
    commit(&sound, [], [put(&key("a"), "missed")]).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    proxy.heal().await;

    timeout(PATIENCE, waiting).await.expect("the wait ends after the reconnect").unwrap().unwrap();
    let now = timeout(PATIENCE, async {
        loop {
            if let Ok(place) = cut.look(&place.ticket, 1).await {
                return place;
            }
        }
    });
    assert_eq!(now.await.expect("answered").expect("the ticket stands").ahead, []);
    let snapshot = next_reset(&mut watch).await;
    assert_eq!(snapshot.entries.first().map(|e| e.value.clone()), Some("missed".into()));
    for round in 0..3 {
        proxy.drop_connections().await;
        until("renewed again", PATIENCE, async || cut.renew(&mine.id).await.is_ok()).await;
        assert!(next_reset(&mut watch).await.entries.len() == 1, "round {round}");
        let value = round.to_string();
        commit(&sound, [], [put(&key("a"), &value)]).await.unwrap();
        assert!(matches!(next(&mut watch).await, WatchEvent::Put(e) if e.value == value.as_bytes()), "{round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_while_cut_off_is_never_applied_later() {
    let server = Launcher::start(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let limit = Duration::from_secs(1);
    let cut = connect(&config(&[proxy.addr()]).with_timeouts(Duration::from_secs(2), limit)).await;
    let sound = client(&server).await;
    let lease = cut.grant(LONG).await.unwrap().id;
    proxy.cut().await;
    sleep(Duration::from_millis(100)).await;
    for attempt in 0..3 {
        let begun = Instant::now();
        let on_lease = [put_on(&lease, &key("late"), "1")];
        let without = [put(&key("later"), "1")];
        let refused = commit(&cut, [], if attempt == 0 { on_lease } else { without }).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
        assert!(begun.elapsed() < limit + Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    assert_eq!(cut.enqueue(&entry(&line("a"), &lease)).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(cut.read(&all()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    proxy.heal().await;
    until("back", PATIENCE, async || cut.read(&all()).await.is_ok()).await;
    until("renewed", PATIENCE, async || cut.renew(&lease).await.is_ok()).await;
    assert_eq!(sound.read(&all()).await.unwrap().entries, []);
    assert_eq!(sound.line(&line("a")).await.unwrap().tickets, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_reply_is_ambiguous_and_a_repeated_join_finds_its_ticket() {
    let server = Launcher::start(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (cut, sound) = (connect(&config(&[proxy.addr()])).await, client(&server).await);
    let lease = keep(&cut, LONG).await;
    // The directories are there, so that the next request is the one.
    join(&cut, &line("a"), &lease.id).await;
    commit(&cut, [], [put(&key("surely-applied"), "0")]).await.unwrap();

    proxy.cut_after_forward_of("surely-applied", 1);
    let lost = commit(&cut, [], [put(&key("surely-applied"), "1")]).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Ambiguous, "{lost:?}");
    let now = get(&sound, &key("surely-applied")).await.unwrap();
    assert_eq!(now.value, "1", "it was applied: so no other answer was right");

    for round in 0..5 {
        let entry = entry(&line("a"), &lease.id);
        let hex = entry.nonce.to_string();
        proxy.cut_after_forward_of(hex[..8].to_owned(), 1);
        let lost = cut.enqueue(&entry).await.unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::Ambiguous, "{lost:?}");
        let before = sound.line(&line("a")).await.unwrap().tickets;
        let place = timeout(PATIENCE, async {
            loop {
                match cut.enqueue(&entry).await {
                    Ok(place) => return place.unwrap(),
                    Err(error) => assert_ne!(error.kind(), ErrorKind::SessionLost, "{error:?}"),
                }
            }
        });
        let place = place.await.expect("repeated");
        assert_eq!(before.last(), Some(&place.ticket), "round {round}: the ticket of the first attempt");
        assert_eq!(sound.line(&line("a")).await.unwrap().tickets.len(), before.len(), "and no second one");
        assert_eq!(place.ahead, before[before.len() - 2..before.len() - 1]);
        assert_eq!(cut.enqueue(&entry).await.unwrap().unwrap(), place, "nor by repeating it once more");
        leave(&cut, &before[before.len() - 2]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_cut_off_loses_its_lease_in_time_and_not_before() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (cut, sound) = (connect(&config(&[proxy.addr()])).await, client(&server).await);
    let lease = cut.grant(TTL).await.unwrap();
    let place = join(&cut, &line("a"), &lease.id).await;
    let before = Instant::now();
    cut.renew(&lease.id).await.unwrap();
    proxy.hold(Direction::ToServer);
    let held = Instant::now();
    loop {
        sound.gone(&place.ticket).await.unwrap();
        if sound.look(&place.ticket, 1).await.unwrap().is_none() {
            break;
        }
    }
    assert!(before.elapsed() >= lease.ttl, "ended early, after {:?}", before.elapsed());
    let lag = held.elapsed().saturating_sub(lease.ttl);
    let promised = sound.profile().expiry_lag;
    assert!(lag <= promised + Duration::from_millis(500), "{lag:?} late, {promised:?} promised");
    proxy.heal().await;
    until(
        "the loss is told",
        PATIENCE,
        async || matches!(cut.renew(&lease.id).await, Err(e) if e.kind() == ErrorKind::SessionLost),
    )
    .await;
    let late = commit(&cut, [], [put_on(&lease.id, &key("a"), "1")]).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::SessionLost);
    cut.revoke(&lease.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_endpoint_among_several_is_no_trouble() {
    let server = server().await;
    let dead = FaultProxy::start(server.addr()).await.unwrap();
    let silent = FaultProxy::start(server.addr()).await.unwrap();
    dead.cut().await;
    silent.blackhole(Direction::ToServer);
    for other in [dead.addr(), silent.addr()] {
        let config = config(&[other, server.addr()]);
        for _ in 0..4 {
            let begun = Instant::now();
            let backend = ZooKeeper::connect(&config).await.unwrap();
            let lease = backend.grant(TTL).await.unwrap();
            backend.revoke(&lease.id).await.unwrap();
            assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
        }
    }
}

#[tokio::test]
async fn with_nobody_there_connect_fails_in_time_and_names_the_endpoints() {
    let server = server().await;
    let gone = FaultProxy::start(server.addr()).await.unwrap();
    gone.cut().await;
    let config = config(&[gone.addr()]).with_timeouts(Duration::from_millis(700), Duration::from_secs(1));
    let begun = Instant::now();
    let error = ZooKeeper::connect(&config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&gone.addr().to_string()), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ensemble_that_loses_its_leader_keeps_leases_keys_and_watches() {
    let cluster = Launcher::cluster(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let backend = connect(&config(&cluster.addrs())).await;
    let other = connect(&config(&cluster.addrs())).await;
    let lease = keep(&backend, LONG).await;
    let place = join(&backend, &line("a"), &lease.id).await;
    let mut watch = backend.watch(&all()).await.unwrap();
    next_reset(&mut watch).await;
    let mut last = Revision(0);
    for round in 0..2 {
        let leader = cluster.leader().await.unwrap();
        leader.kill().await.unwrap();
        let name = format!("after-{round}");
        let mut tries = 0;
        let revision = loop {
            // A lost reply may have been a write: so the key is created, and found if it is there.
            match commit(&other, [Check::Absent(key(&name))], [put(&key(&name), "1")]).await {
                Ok(done) if done.applied => break done.revision,
                Ok(_) => break get(&other, &key(&name)).await.unwrap().modified,
                Err(error) => {
                    let kinds = [ErrorKind::Unavailable, ErrorKind::Ambiguous];
                    assert!(kinds.contains(&error.kind()) && tries < 30, "{error:?}");
                    tries += 1;
                    sleep(Duration::from_millis(200)).await;
                }
            }
        };
        assert!(revision > last, "revisions rise over the change of leader");
        last = revision;
        until("renewed", PATIENCE, async || backend.renew(&lease.id).await.is_ok()).await;
        let now = backend.look(&place.ticket, 1).await.unwrap().expect("the ticket stands");
        assert_eq!(now.token, place.token);
        timeout(PATIENCE, async {
            loop {
                let seen = match watch.next().await.expect("the watch goes on") {
                    WatchEvent::Put(entry) => entry.key == key(&name),
                    WatchEvent::Reset(snapshot) => snapshot.entries.iter().any(|e| e.key == key(&name)),
                    _ => false,
                };
                if seen {
                    return;
                }
            }
        })
        .await
        .expect("the watch tells of it");
        leader.restart().await.unwrap();
    }
    let fenced = commit(&backend, [standing(&place)], [put(&key("fenced"), "1")]).await.unwrap();
    assert!(fenced.applied);
}

/// A server that has lost the others goes on answering reads until it notices. A renewal that it confirmed by itself
/// would tell the holder of a lock that all is well while the leader ends the session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_the_others_confirms_no_renewal() {
    let cluster = Launcher::cluster(slow()).await.unwrap_or_else(|e| panic!("{e}"));
    let leader = cluster.leader().await.unwrap();
    let nodes = cluster.nodes();
    let follower = nodes.iter().find(|node| node.addr() != leader.addr()).unwrap();
    let backend = connect(&config(&[follower.addr()])).await;
    let lease = backend.grant(LONG).await.unwrap().id;
    backend.renew(&lease).await.unwrap();
    let raw = zookeeper_client::Client::connect(&follower.addr().to_string()).await.unwrap();

    for node in nodes.iter().filter(|node| node.addr() != follower.addr()) {
        node.pause().unwrap();
    }
    let renewed = timeout(Duration::from_secs(3), backend.renew(&lease));
    let read = timeout(Duration::from_secs(3), raw.check_stat("/")).await;
    let renewed = renewed.await;
    for node in nodes.iter().filter(|node| node.addr() != follower.addr()) {
        node.resume().unwrap();
    }
    assert!(read.expect("answered").expect("by the follower alone").is_some(), "the fault must bite");
    assert!(!matches!(renewed, Ok(Ok(_))), "{renewed:?}");
    until("renewed again", PATIENCE, async || backend.renew(&lease).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_backend_leaves_no_session_and_a_dropped_wait_no_watch() {
    let server = server().await;
    let raw = ask(server.addr(), "cons").await.lines().filter(|l| l.contains("sid=")).count();
    let backend = client(&server).await;
    let lease = keep(&backend, TTL).await;
    let place = join(&backend, &line("a"), &lease.id).await;
    commit(&backend, [], [put(&key("a"), "1")]).await.unwrap();
    let watches = async || {
        let summary = ask(server.addr(), "wchs").await;
        summary.lines().last().and_then(|l| l.strip_prefix("Total watches:")?.trim().parse::<usize>().ok()).unwrap()
    };
    // The one that each lease has on its own node.
    let before = watches().await;
    assert_eq!(before, 1);
    let held = [backend.watch(&all()).await.unwrap(), backend.watch(&KeyRange::One(key("a"))).await.unwrap()];
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let (backend, ticket) = (backend.clone(), place.ticket.clone());
            tokio::spawn(async move { backend.gone(&ticket).await })
        })
        .collect();
    until("watched", PATIENCE, async || watches().await > before + 2).await;
    drop(held);
    for wait in waiting {
        wait.abort();
    }
    until("no watch is left", PATIENCE, async || watches().await == before).await;
    backend.gone(&quorate_core::Ticket { name: "_c_x-lock-0000000099".into(), ..place.ticket.clone() }).await.unwrap();
    assert_eq!(watches().await, before, "asking for what is not there leaves none either");

    drop(lease);
    until("only we hold it", PATIENCE, async || Arc::strong_count(&backend) == 1).await;
    drop(backend);
    until("no session is left", PATIENCE, async || {
        ask(server.addr(), "cons").await.lines().filter(|l| l.contains("sid=")).count() == raw
    })
    .await;
}
