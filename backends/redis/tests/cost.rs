//! What calls cost at the server, by its own statistics.

mod support;

use std::time::Duration;

use quorate_core::{Check, KeyRange, Write};
use support::*;
use tokio::{task::JoinSet, time::sleep};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_hot_path_is_one_request() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let lease = lease(&b).await;
    let k = key("k");
    // Each once before: the first call of a script brings it along.
    let place = join(&b, &dir("lock/a"), &lease).await;
    b.commit(&release(&place)).await.unwrap();
    b.commit(&txn(vec![], vec![])).await.unwrap();
    b.read(&KeyRange::One(k.clone())).await.unwrap();
    b.renew(&lease).await.unwrap();
    b.look(&place.ticket, 1).await.unwrap();

    let before = (raw.calls("evalsha").await, raw.calls("eval").await, raw.calls("script|load").await);
    let place = join(&b, &dir("lock/a"), &lease).await;
    let standing = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    assert!(b.commit(&txn(vec![standing], vec![put(&k, "fenced", None)])).await.unwrap().applied);
    b.look(&place.ticket, 1).await.unwrap().unwrap();
    assert!(b.commit(&release(&place)).await.unwrap().applied);
    let at = b.commit(&txn(vec![], vec![put(&k, "put", None)])).await.unwrap().revision;
    let swap = Check::Unchanged { key: k.clone(), modified: at };
    assert!(b.commit(&txn(vec![swap], vec![put(&k, "swapped", None)])).await.unwrap().applied);
    b.commit(&txn(vec![], vec![Write::Delete(k.clone())])).await.unwrap();
    assert!(b.commit(&txn(vec![Check::Absent(k.clone())], vec![put(&k, "made", None)])).await.unwrap().applied);
    b.read(&all()).await.unwrap();
    b.renew(&lease).await.unwrap();
    let after = (raw.calls("evalsha").await, raw.calls("eval").await, raw.calls("script|load").await);
    assert_eq!(after, (before.0 + 10, before.1, before.2), "ten calls, ten requests");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_release_wakes_one_of_two_hundred_waiters_with_one_message() {
    const CLIENTS: usize = 10;
    const EACH: usize = 20;
    let server = server().await;
    let raw = Raw::of(&server).await;
    let line = dir("lock/deep");
    let holder = connect(server.addr()).await;
    let first = join(&holder, &line, &lease(&holder).await).await;
    let mut waiting = JoinSet::new();
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let client = connect(server.addr()).await;
        clients.push((client.clone(), lease(&client).await));
    }
    let mut order = vec![first.clone()];
    for i in 0..CLIENTS * EACH {
        let (client, lease) = &clients[i % CLIENTS];
        let place = join(client, &line, lease).await;
        assert_eq!(place.ahead, [order[i].ticket.clone()]);
        let (client, ahead) = (client.clone(), order[i].ticket.clone());
        waiting.spawn(async move {
            client.gone(&ahead).await.unwrap();
            i
        });
        order.push(place);
    }
    // Every wait has reached the server when its registration is there.
    soon("200 registrations", async {
        let waited = async || {
            let fields: Vec<String> = raw.ask(&["HKEYS", "{quorate/test}:h"]).await;
            fields.iter().filter(|field| field.starts_with("W:")).count()
        };
        while waited().await < CLIENTS * EACH {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    for (released, place) in order.iter().enumerate().take(5) {
        let before = (raw.calls("publish").await, raw.calls("evalsha").await);
        assert!(holder.commit(&release(place)).await.unwrap().applied);
        let woken = soon("the next waiter wakes", waiting.join_next()).await.unwrap().unwrap();
        assert_eq!(woken, released, "the one behind, and no other");
        assert_eq!(raw.calls("publish").await, before.0 + 1, "one message");
        // Clients look after their waits every few seconds; ten clients can do so at most a few times meanwhile.
        assert!(raw.calls("evalsha").await <= before.1 + 1 + 2 * CLIENTS as u64);
    }
    sleep(Duration::from_millis(200)).await;
    assert!(waiting.try_join_next().is_none(), "nobody else wakes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_costs_one_request_per_client_now_and_then() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let lease = lease(&b).await;
    let mut waiting = JoinSet::new();
    let mut watches = Vec::new();
    for i in 0..100 {
        let place = join(&b, &dir(&format!("lock/{i}")), &lease).await;
        let b2 = b.clone();
        waiting.spawn(async move { b2.gone(&place.ticket).await });
        watches.push(b.watch(&all()).await.unwrap());
    }
    sleep(Duration::from_secs(1)).await;
    let before = raw.calls("evalsha").await;
    sleep(Duration::from_secs(11)).await;
    let asked = raw.calls("evalsha").await - before;
    assert!((1..=12).contains(&asked), "{asked} requests in 11 s for a hundred waits and a hundred watches");
    assert!(waiting.try_join_next().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_traffic_leaves_nothing_behind() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let mut tasks = JoinSet::new();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(connect(server.addr()).await);
    }
    for t in 0..32 {
        let b = clients[t % clients.len()].clone();
        tasks.spawn(async move {
            let lease = lease(&b).await;
            for i in 0..40 {
                let place = join(&b, &dir(&format!("lock/{}", (t + i) % 5)), &lease).await;
                let mut ahead = place.ahead.clone();
                while let Some(next) = ahead.first() {
                    b.gone(next).await.unwrap();
                    ahead = b.look(&place.ticket, 1).await.unwrap().unwrap().ahead;
                }
                assert!(b.commit(&release(&place)).await.unwrap().applied);
            }
            b.revoke(&lease).await.unwrap();
        });
    }
    soon("all tasks end", async {
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
    })
    .await;
    let channels: Vec<String> = raw.ask(&["PUBSUB", "CHANNELS"]).await;
    assert_eq!(channels.len(), clients.len(), "one channel per client: {channels:?}");
    assert_eq!(raw.ask::<Vec<String>>(&["HKEYS", "{quorate/test}:h"]).await, ["rev"]);
    assert_eq!(raw.ask::<Vec<String>>(&["ZRANGE", "{quorate/test}:z", "0", "-1"]).await, Vec::<String>::new());
    assert_eq!(raw.ask::<Vec<String>>(&["ZRANGE", "{quorate/test}:t", "0", "-1"]).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unwatched_directory_publishes_nothing_and_a_dropped_watch_unsubscribes() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let before = raw.calls("publish").await;
    b.commit(&txn(vec![], vec![put(&key("a"), "1", None)])).await.unwrap();
    assert_eq!(raw.calls("publish").await, before);
    let watches = [b.watch(&all()).await.unwrap(), b.watch(&KeyRange::One(key("a"))).await.unwrap()];
    b.commit(&txn(vec![], vec![put(&key("a"), "2", None)])).await.unwrap();
    assert_eq!(raw.calls("publish").await, before + 1, "one message for both");
    drop(watches);
    soon("the subscription ends", async {
        while raw.ask::<Vec<String>>(&["PUBSUB", "CHANNELS", "*:d:*"]).await != Vec::<String>::new() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    drop(b);
    soon("the connections close", async {
        while raw.ask::<String>(&["CLIENT", "LIST"]).await.lines().count() > 1 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
