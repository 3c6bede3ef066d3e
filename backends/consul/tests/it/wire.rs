//! What is on the wire: layout, round trips, and other clients on the same keys.

use std::time::Duration;

use quorate_consul::Consul;
use quorate_core::{
    Backend, Check, Commit, Config, Dir, ErrorKind, KeyRange, LeaseId, Revision, TicketKind, Txn, WatchEvent, Write,
};
use quorate_testkit::proxy::FaultProxy;
use serde_json::Value;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpListener,
    time::{Instant, sleep},
};

use crate::common::{
    client, commit, config, entry, grant, join, key, line, next, next_reset, put, raw, raw_json, release, release_of,
    server, value,
};

#[tokio::test]
async fn keys_are_stored_under_their_encoded_names_exactly() {
    let server = server().await;
    let client = client(server.addr()).await;
    for (name, stored) in [
        ("plain", "app/kv/plain"),
        ("a b/c", "app/kv/a b/c"),
        ("50%", "app/kv/50%25"),
        ("..", "app/kv/%2E."),
        ("a//b", "app/kv/a/%-/b"),
        ("é", "app/kv/é"),
        ("a\u{a0}b", "app/kv/a%u00A0b"),
        ("🦀", "app/kv/%F0%9F%A6%80"),
    ] {
        commit(&client, [put(name, name, None)]).await;
        let keys = raw_json(server.addr(), "/v1/kv/app/kv/?keys").await;
        let keys: Vec<&str> = keys.as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
        assert_eq!(keys, [stored]);
        assert_eq!(value(&client, name).await.unwrap().0, name);
        commit(&client, [Write::Delete(key(name))]).await;
    }
}

/// Characters that this backend stores as they are, and Consul has to take in a URL.
#[tokio::test]
async fn consul_takes_every_character_that_is_not_escaped() {
    let server = server().await;
    let client = client(server.addr()).await;
    let all: Vec<char> = ('\0'..='\u{ffff}').collect();
    for chunk in all.chunks(300) {
        let name: String = chunk.iter().collect();
        let one = key(&name);
        let range = KeyRange::One(one.clone());
        let absent = client.read(&range).await.unwrap_or_else(|e| panic!("{:?}…: {e}", &chunk[..1]));
        assert!(absent.entries.is_empty());
    }
    // A sample of them all the way to the store and back.
    for name in ["\u{200b}", "日本 語", "\u{2028}", "한국", "Ω≈ç√", "\u{fffd}", "\t", "\u{ad}"] {
        commit(&client, [put(name, name, None)]).await;
        assert_eq!(value(&client, name).await.unwrap().0, name);
    }
    let range = KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap();
    assert_eq!(client.read(&range).await.unwrap().entries.len(), 8);
}

/// Counts the turns that a call takes.
async fn turns<T>(proxy: &FaultProxy, call: impl Future<Output = quorate_core::Result<T>>) -> (T, u64) {
    let before = proxy.turns();
    let value = call.await.unwrap();
    (value, proxy.turns() - before)
}

#[tokio::test]
async fn the_hot_paths_take_one_round_trip() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let client = client(proxy.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    let txn = |checks: Vec<Check>, writes: Vec<Write>| Txn { checks, writes };
    let applied = |(answer, turns): (Commit, u64)| {
        assert!(answer.applied);
        (answer.revision, turns)
    };
    let mut counts = Vec::new();
    let mut count = |what: &'static str, turns: u64| counts.push((what, turns));

    let (place, n) = turns(&proxy, client.enqueue(&entry(&line("a"), &lease))).await;
    count("join a line", n);
    let place = place.unwrap();
    count("look", turns(&proxy, client.look(&place.ticket, 1)).await.1);
    let fence = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    let fenced = txn(vec![fence], vec![put("fenced", "1", None)]);
    count("fenced put", applied(turns(&proxy, client.commit(&fenced)).await).1);
    let (_, n) = applied(turns(&proxy, client.commit(&release_of(&place))).await);
    count("release", n);

    let create = txn(vec![Check::Absent(key("k"))], vec![put("k", "1", None)]);
    let (created, n) = applied(turns(&proxy, client.commit(&create)).await);
    count("create", n);
    let overwrite = txn(vec![], vec![put("k", "2", None)]);
    count("put over", applied(turns(&proxy, client.commit(&overwrite)).await).1);
    let (again, n) = applied(turns(&proxy, client.commit(&overwrite)).await);
    count("the same put", n);
    assert!(again > created, "a write of the same value is a write");
    let swap = txn(vec![Check::Unchanged { key: key("k"), modified: again }], vec![put("k", "3", None)]);
    let (swapped, n) = applied(turns(&proxy, client.commit(&swap)).await);
    count("compare and swap", n);
    let (lost, n) = turns(&proxy, client.commit(&swap)).await;
    assert!(!lost.applied);
    count("compare and swap, lost", n);
    count("put new", applied(turns(&proxy, client.commit(&txn(vec![], vec![put("new", "1", None)]))).await).1);
    let leased = txn(vec![], vec![put("leased", "1", Some(&lease))]);
    count("put on a lease", applied(turns(&proxy, client.commit(&leased)).await).1);
    count("put on a lease again", applied(turns(&proxy, client.commit(&leased)).await).1);
    let (deleted, n) = applied(turns(&proxy, client.commit(&txn(vec![], vec![Write::Delete(key("k"))]))).await);
    count("delete", n);
    assert!(deleted > swapped, "a deletion has a revision of its own");
    count("read", turns(&proxy, client.read(&KeyRange::One(key("new")))).await.1);
    assert_eq!(counts.iter().filter(|(_, n)| *n != 1).collect::<Vec<_>>(), Vec::<&(&str, u64)>::new());
    // Two requests side by side, one wait.
    let (_, renewal) = turns(&proxy, client.renew(&lease)).await;
    assert_eq!(renewal, 2);
    client.revoke(&lease).await.unwrap();
}

async fn foreign_session(addr: std::net::SocketAddr, delay: &str) -> String {
    let body = format!(r#"{{"TTL":"30s","LockDelay":"{delay}","Behavior":"release"}}"#);
    let (_, body) = raw(addr, "PUT", "/v1/session/create", "", &body).await;
    serde_json::from_str::<Value>(&body).unwrap()["ID"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_put_takes_a_key_from_whatever_session_it_stands_on() {
    let server = server().await;
    let client = client(server.addr()).await;
    let session = foreign_session(server.addr(), "0s").await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    let lock = async || {
        let (_, taken) = raw(server.addr(), "PUT", &format!("/v1/kv/app/kv/k?acquire={session}"), "", "theirs").await;
        assert_eq!(taken.trim(), "true");
    };
    let lease_of = async || client.read(&KeyRange::One(key("k"))).await.unwrap().entries.pop().unwrap().lease;
    lock().await;
    assert_eq!(lease_of().await, Some(LeaseId::new(session.as_str())));
    commit(&client, [put("k", "ours", None)]).await;
    assert_eq!(lease_of().await, None);
    lock().await;
    commit(&client, [put("k", "ours", Some(&lease))]).await;
    assert_eq!(lease_of().await, Some(lease.clone()));
    // With a condition on the version, in the same way.
    for target in [None, Some(&lease)] {
        commit(&client, [put("k", "x", None)]).await;
        lock().await;
        let (_, modified) = value(&client, "k").await.unwrap();
        let checks = vec![Check::Unchanged { key: key("k"), modified }];
        let swap = Txn { checks, writes: vec![put("k", "ours", target)] };
        assert!(client.commit(&swap).await.unwrap().applied);
        assert_eq!(lease_of().await.as_ref(), target);
        assert_eq!(client.commit(&swap).await.unwrap().culprit, Some(0));
    }
    // Sixteen keys at once, each on another footing.
    let mut writes = Vec::new();
    for i in 0..16 {
        let name = format!("m{i}");
        match i % 4 {
            0 => {}
            1 => drop(commit(&client, [put(&name, "0", None)]).await),
            2 => drop(commit(&client, [put(&name, "0", Some(&lease))]).await),
            _ => {
                let path = format!("/v1/kv/app/kv/{name}?acquire={session}");
                raw(server.addr(), "PUT", &path, "", "theirs").await;
            }
        }
        writes.push(put(&name, "1", (i % 8 < 4).then_some(&lease)));
    }
    let fresh = Consul::connect(&config(server.addr())).await.unwrap();
    let done = commit(&fresh, writes).await;
    let range = KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "m").unwrap();
    for entry in fresh.read(&range).await.unwrap().entries {
        let i: usize = entry.key.encoded()[1..].parse().unwrap();
        assert_eq!((&*entry.value, entry.modified), (&b"1"[..], done.revision), "{i}");
        assert_eq!(entry.lease, (i % 8 < 4).then(|| lease.clone()), "{i}");
    }
    client.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn created_stays_when_a_put_does_not_move_the_key() {
    let server = server().await;
    let client = client(server.addr()).await;
    let other = crate::common::client(server.addr()).await;
    let first = commit(&client, [put("k", "1", None)]).await.revision;
    // A client that has not seen the key guesses wrong first.
    commit(&other, [put("k", "2", None)]).await;
    commit(&client, [put("k", "3", None)]).await;
    let entry = client.read(&KeyRange::One(key("k"))).await.unwrap().entries.pop().unwrap();
    assert_eq!(entry.created, first);
    // And one that believes in a key that is gone.
    commit(&other, [Write::Delete(key("k"))]).await;
    let anew = commit(&client, [put("k", "4", None)]).await.revision;
    let entry = client.read(&KeyRange::One(key("k"))).await.unwrap().entries.pop().unwrap();
    assert_eq!(entry.created, anew);
}

#[tokio::test]
async fn every_key_below_a_line_contends() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    let first = join(&client, &line("a"), &lease).await;
    let session = foreign_session(server.addr(), "0s").await;
    // As `consul lock app/lock/a` does.
    let path = format!("/v1/kv/app/lock/a/.lock?acquire={session}&flags=3304740253564472344");
    let (_, taken) = raw(server.addr(), "PUT", &path, "", "").await;
    assert_eq!(taken.trim(), "true");
    let last = join(&client, &line("a"), &lease).await;
    assert_eq!((&*last.ahead[0].name, last.ahead[0].kind), (".lock", TicketKind::Lock));
    let whole = client.line(&line("a")).await.unwrap();
    assert_eq!(whole.tickets.len(), 3);
    assert_eq!(whole.front.unwrap().token, first.token);
    release(&client, &first).await;
    assert_eq!(client.look(&last.ticket, 8).await.unwrap().unwrap().ahead.len(), 1);
    let wait = crate::common::until_gone(&client, &last.ahead[0]);
    raw(server.addr(), "DELETE", "/v1/kv/app/lock/a/.lock", "", "").await;
    wait.await.unwrap();
    assert!(client.look(&last.ticket, 8).await.unwrap().unwrap().ahead.is_empty());
    client.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn a_look_without_memory_says_the_same() {
    let server = server().await;
    let (client, stranger) = (client(server.addr()).await, crate::common::client(server.addr()).await);
    let lease = grant(&client, Duration::from_secs(60)).await;
    let mut places = Vec::new();
    for _ in 0..10 {
        places.push(join(&client, &line("a"), &lease).await);
    }
    for round in 0..10 {
        for place in &places {
            for depth in [0, 1, 3, 100] {
                let ours = client.look(&place.ticket, depth).await.unwrap();
                assert_eq!(ours, stranger.look(&place.ticket, depth).await.unwrap(), "round {round}, depth {depth}");
            }
        }
        let left = places.remove((round * 7) % places.len());
        release(if round % 2 == 0 { &client } else { &stranger }, &left).await;
        assert_eq!(client.look(&left.ticket, 1).await.unwrap(), None);
        assert_eq!(stranger.look(&left.ticket, 1).await.unwrap(), None);
    }
}

#[tokio::test]
async fn the_largest_value_fits_under_the_longest_name() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    let longest = "\u{1}".repeat(quorate_core::MAX_NAME);
    let large = "x".repeat(client.profile().max_value);
    for target in [None, Some(&lease), None] {
        commit(&client, [put(&longest, &large, target)]).await;
        assert_eq!(value(&client, &longest).await.unwrap().0, large);
    }
    let two = Txn { checks: Vec::new(), writes: vec![put("a", &large, None), put("b", &large, None)] };
    let e = client.commit(&two).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    client.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn a_watch_tells_of_writes_that_change_nothing_and_of_foreign_ones() {
    let server = server().await;
    let client = client(server.addr()).await;
    let mut watch = client.watch(&KeyRange::One(key("k"))).await.unwrap();
    assert!(next_reset(&mut watch).await.0.is_empty());
    let mut last = Revision(0);
    for _ in 0..3 {
        let done = commit(&client, [put("k", "same", None)]).await;
        match next(&mut watch).await {
            WatchEvent::Put(entry) => assert_eq!(entry.modified, done.revision),
            other => panic!("{other:?}"),
        }
        assert!(done.revision > last);
        last = done.revision;
    }
    raw(server.addr(), "PUT", "/v1/kv/app/kv/k", "", "theirs").await;
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if &*entry.value == b"theirs"));
    raw(server.addr(), "DELETE", "/v1/kv/app/kv/k", "", "").await;
    match next(&mut watch).await {
        WatchEvent::Delete { key: gone, revision } => assert!(gone == key("k") && revision > last),
        other => panic!("{other:?}"),
    }
    // A missing key is watched like any other: nothing is sent while nothing happens.
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let far = crate::common::client(proxy.addr()).await;
    let mut missing = far.watch(&KeyRange::One(key("missing"))).await.unwrap();
    next_reset(&mut missing).await;
    sleep(Duration::from_millis(300)).await;
    let before = proxy.turns();
    sleep(Duration::from_secs(2)).await;
    assert_eq!(proxy.turns(), before);
    commit(&client, [put("missing", "here", None)]).await;
    assert!(matches!(next(&mut missing).await, WatchEvent::Put(entry) if &*entry.value == b"here"));
}

#[tokio::test]
async fn a_login_for_a_proxy_in_front_is_sent_as_basic_authentication() {
    let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = Config::new("consul", [front.local_addr().unwrap().to_string()])
        .with_login("app", "hunter2")
        .with_timeouts(Duration::from_secs(1), Duration::from_secs(1));
    let heard = tokio::spawn(async move {
        let (mut stream, _) = front.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let n = stream.read(&mut head).await.unwrap();
        String::from_utf8_lossy(&head[..n]).to_ascii_lowercase()
    });
    let e = Consul::connect(&config).await.unwrap_err();
    assert!(!format!("{e:?}").contains("hunter2"));
    // "app:hunter2" in base64, lower-cased.
    assert!(heard.await.unwrap().contains("authorization: basic yxbwomh1bnrlcji="));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_joins_never_tie() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    let began = Instant::now();
    let joins: Vec<_> = (0..200)
        .map(|_| {
            let (client, lease) = (client.clone(), lease.clone());
            tokio::spawn(async move { join(&client, &line("a"), &lease).await })
        })
        .collect();
    let mut places = Vec::new();
    for join in joins {
        places.push(join.await.unwrap());
    }
    println!("200 joins at once took {:?}", began.elapsed());
    places.sort_by_key(|place| place.token);
    for pair in places.windows(2) {
        assert!(pair[0].token < pair[1].token);
        assert_eq!(pair[1].ahead[0], pair[0].ticket);
    }
    client.revoke(&lease).await.unwrap();
}

/// Consul walks over every deleted key below a prefix that it lists.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_line_does_not_get_slower_by_the_tickets_that_left_it() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(600)).await;
    let busy = line("busy");
    // Best of some: the machine is never quiet.
    let listing = async || {
        let mut best = Duration::MAX;
        for _ in 0..30 {
            let began = Instant::now();
            client.line(&busy).await.unwrap();
            best = best.min(began.elapsed());
        }
        best
    };
    let before = listing().await;
    let work: Vec<_> = (0..24)
        .map(|task| {
            let (client, lease, busy) = (client.clone(), lease.clone(), busy.clone());
            tokio::spawn(async move {
                for i in 0..500 {
                    let place = join(&client, &busy, &lease).await;
                    // With and without a condition.
                    if (task + i) % 2 == 0 {
                        assert!(release(&client, &place).await.applied);
                    } else {
                        commit(&client, [Write::Leave(place.ticket)]).await;
                    }
                }
            })
        })
        .collect();
    for task in work {
        task.await.unwrap();
    }
    assert!(client.line(&busy).await.unwrap().tickets.is_empty());
    let after = listing().await;
    println!("listing a line: {before:?} when new, {after:?} after 12,000 tickets came and went");
    // 12,000 tombstones cost some 500 µs.
    assert!(after < before * 2 + Duration::from_micros(100), "{before:?} {after:?}");
    client.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn two_clients_on_one_lease_never_take_out_each_others_tickets() {
    let server = server().await;
    let (a, b) = (client(server.addr()).await, crate::common::client(server.addr()).await);
    let lease = grant(&a, Duration::from_secs(60)).await;
    let mut places = Vec::new();
    for _ in 0..3 {
        places.push(join(&a, &line("a"), &lease).await);
        places.push(join(&b, &line("a"), &lease).await);
    }
    assert!(release(&a, &places.remove(0)).await.applied);
    // Another client than the one that made it.
    assert!(release(&a, &places.remove(0)).await.applied);
    commit(&b, [Write::Leave(places.remove(0).ticket)]).await;
    let left: Vec<_> = places.iter().map(|place| place.ticket.clone()).collect();
    assert_eq!(a.line(&line("a")).await.unwrap().tickets, left);
    // One attempt, made through both.
    let entry = entry(&line("a"), &lease);
    let first = a.enqueue(&entry).await.unwrap().unwrap();
    assert_eq!(b.enqueue(&entry).await.unwrap().unwrap(), first);
    assert_eq!(b.enqueue(&entry).await.unwrap().unwrap(), first);
    assert_eq!(a.enqueue(&entry).await.unwrap().unwrap(), first);
    assert_eq!(a.line(&line("a")).await.unwrap().tickets.len(), 4);
    // A copy of an old request must not take out the slot's next ticket.
    let old = Txn { checks: Vec::new(), writes: vec![Write::Leave(first.ticket.clone())] };
    assert!(release(&a, &first).await.applied);
    let next = join(&a, &line("a"), &lease).await;
    a.commit(&old).await.unwrap();
    b.commit(&old).await.unwrap();
    assert!(!a.commit(&release_of(&first)).await.unwrap().applied);
    assert!(a.look(&next.ticket, 1).await.unwrap().is_some());
    a.revoke(&lease).await.unwrap();
}
