//! Waiting: one wake-up for one removal, however many wait and whoever removes.

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend, Ticket, TicketKind};
use quorate_testkit::proxy::FaultProxy;
use tokio::time::{Instant, sleep, timeout};

use crate::common::{LONG, client, commit, grant, join, line, raw, release, server, until_gone};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_wakes_only_who_waits_for_it() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (near, far) = (client(server.addr()).await, client(proxy.addr()).await);
    let lease = grant(&near, Duration::from_secs(60)).await;
    let lock = line("queue");
    let mut places = Vec::new();
    for _ in 0..20 {
        places.push(join(&near, &lock, &lease).await);
    }
    let mut waits: Vec<_> = places.iter().map(|place| until_gone(&far, &place.ticket)).collect();
    sleep(Duration::from_secs(1)).await;
    for _ in 0..19 {
        let before = proxy.counters();
        release(&near, &places.remove(0)).await;
        timeout(LONG, waits.remove(0)).await.unwrap().unwrap();
        sleep(Duration::from_millis(50)).await;
        assert!(waits.iter().all(|wait| !wait.is_finished()));
        let after = proxy.counters();
        // One answer to the query, one look and its answer. A herd would be 19 of each.
        assert!(after.chunks_to_client - before.chunks_to_client <= 4, "{before:?} {after:?}");
        assert!(after.turns - before.turns <= 2, "{before:?} {after:?}");
    }
    near.revoke(&lease).await.unwrap();
    timeout(LONG, waits.remove(0)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_waiters_share_few_connections_and_all_wake() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let (near, far) = (client(server.addr()).await, client(proxy.addr()).await);
    let lease = grant(&near, Duration::from_secs(60)).await;
    // More than the agent would take connections: 230 in one line, and 90 in lines of their own.
    let mut places = Vec::new();
    for _ in 0..230 {
        places.push(join(&near, &line("one"), &lease).await);
    }
    for i in 0..90 {
        places.push(join(&near, &line(&format!("own-{i}")), &lease).await);
    }
    let waits: Vec<_> = places.iter().map(|place| until_gone(&far, &place.ticket)).collect();
    sleep(Duration::from_secs(4)).await;
    assert!(waits.iter().all(|wait| !wait.is_finished()), "nothing has left");
    let open = proxy.counters().open;
    assert!(open < 192, "{open} connections");
    let began = Instant::now();
    for place in &places {
        release(&near, place).await;
    }
    for wait in waits {
        timeout(LONG, wait).await.expect("every waiter wakes").unwrap();
    }
    println!("320 tickets left and were seen in {:?}, {open} connections were open", began.elapsed());
    near.revoke(&lease).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_that_are_given_up_do_not_use_up_the_agents_connections() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(60)).await;
    let mut places = Vec::new();
    for i in 0..300 {
        places.push(join(&client, &line(&format!("l{i}")), &lease).await);
    }
    // Consul counts a blocked query that was dropped until its time is over.
    for place in &places {
        timeout(Duration::from_millis(20), client.gone(&place.ticket)).await.unwrap_err();
    }
    let newcomer = crate::common::client(server.addr()).await;
    let wait = until_gone(&newcomer, &places[299].ticket);
    sleep(Duration::from_millis(300)).await;
    release(&client, &places[299]).await;
    timeout(LONG, wait).await.unwrap().unwrap();
    client.revoke(&lease).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_with_whatever_removes_the_ticket() {
    let server = server().await;
    let client = client(server.addr()).await;
    let other = crate::common::client(server.addr()).await;
    for removal in ["leave", "revoke", "operator"] {
        let lease = grant(&other, Duration::from_secs(60)).await;
        let place = join(&other, &line("a"), &lease).await;
        let wait = until_gone(&client, &place.ticket);
        sleep(Duration::from_millis(200)).await;
        assert!(!wait.is_finished());
        match removal {
            "leave" => drop(release(&other, &place).await),
            "revoke" => other.revoke(&lease).await.unwrap(),
            _ => drop(raw(server.addr(), "DELETE", &format!("/v1/kv/app/lock/a/{}", place.ticket.name), "", "").await),
        }
        timeout(Duration::from_secs(5), wait).await.unwrap_or_else(|_| panic!("{removal} wakes")).unwrap();
        other.revoke(&lease).await.unwrap();
    }
}

#[tokio::test]
async fn a_ticket_that_no_url_can_name_is_waited_for_by_looking() {
    let server = server().await;
    let client = client(server.addr()).await;
    // A name that another client stored by a transaction, with a character that Consul refuses in URLs.
    let set = r#"[{"KV":{"Verb":"set","Key":"app/lock/a/x y","Value":""}}]"#.replace(' ', "\u{a0}");
    let (status, body) = raw(server.addr(), "PUT", "/v1/txn", "", &set).await;
    assert_eq!(status, 200, "{body}");
    let found = client.line(&line("a")).await.unwrap().tickets.remove(0);
    assert_eq!(found, Ticket { line: line("a"), name: "x\u{a0}y".into(), kind: TicketKind::Lock });
    let wait = until_gone(&client, &found);
    sleep(Duration::from_millis(500)).await;
    assert!(!wait.is_finished());
    commit(&*crate::common::client(server.addr()).await, [quorate_core::Write::Leave(found)]).await;
    timeout(LONG, wait).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_client_ends_its_connections() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let near = client(server.addr()).await;
    let lease = grant(&near, Duration::from_secs(60)).await;
    let place = join(&near, &line("a"), &lease).await;
    let far = client(proxy.addr()).await;
    let waiting = Arc::clone(&far);
    let ticket = place.ticket.clone();
    let wait = tokio::spawn(async move { waiting.gone(&ticket).await });
    let watch = far.watch(&crate::common::all()).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(established(proxy.addr().port()) >= 2);
    wait.abort();
    wait.await.unwrap_err();
    drop(far);
    let end = Instant::now() + Duration::from_secs(5);
    while established(proxy.addr().port()) > 0 {
        assert!(Instant::now() < end, "{} connections", established(proxy.addr().port()));
        sleep(Duration::from_millis(20)).await;
    }
    drop(watch);
    near.revoke(&lease).await.unwrap();
}

/// How many connections to a port of 127.0.0.1 their clients have open. Consul closes its side of a blocked query only
/// when the query's time is over, so the server's view would not do.
fn established(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let to = format!(":{port:04X}");
    let open = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(2).is_some_and(|remote| remote.ends_with(&to)) && fields.get(3) == Some(&"01")
    };
    table.lines().filter(open).count()
}
