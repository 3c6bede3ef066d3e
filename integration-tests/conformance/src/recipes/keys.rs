//! Keys and values, as applications use them.

use std::{sync::Arc, time::Duration};

use quorate_core::{ErrorKind, KvEvent, MAX_NAME, Revision, Swap, TxnOutcome};
use serde::{Deserialize, Serialize};

use super::{coord, short_coord};
use crate::{
    Clients,
    support::{SOON, cases, refused, spawn, within},
};

cases!("keys":
    what_is_put_is_got_listed_and_deleted,
    create_and_swap_tell_how_a_race_was_lost,
    a_deleted_prefix_takes_its_keys_and_no_others,
    a_transaction_names_the_condition_that_did_not_hold,
    an_ephemeral_key_ends_with_its_session,
    increments_by_swap_lose_nothing,
    json_values_come_back_and_garbage_is_told,
    a_watch_tells_names_as_they_were_written,
    bad_keys_and_values_are_refused_in_the_same_words,
);

async fn what_is_put_is_got_listed_and_deleted(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    assert!(kv.get("a").await.expect("get").is_none());
    for key in ["a", "a/", "a/b", "a/b/c", "ab"] {
        let revision = kv.put(key, key).await.expect("put");
        let entry = kv.get(key).await.expect("get").expect("exists");
        assert_eq!((entry.key.as_str(), &entry.value[..], entry.modified), (key, key.as_bytes(), revision));
        assert!(revision > Revision(0) && !entry.ephemeral);
    }
    let names = |listing: quorate_core::kv::Listing| -> Vec<String> {
        let mut names: Vec<_> = listing.entries.into_iter().map(|e| e.key).collect();
        names.sort();
        names
    };
    assert_eq!(names(kv.list("").await.expect("list")), ["a", "a/", "a/b", "a/b/c", "ab"]);
    assert_eq!(names(kv.list("a/").await.expect("list")), ["a/", "a/b", "a/b/c"]);
    assert!(kv.delete("a/b").await.expect("delete"));
    assert!(!kv.delete("a/b").await.expect("delete"), "it is gone already");
    assert_eq!(names(kv.list("a/").await.expect("list")), ["a/", "a/b/c"]);
}

async fn create_and_swap_tell_how_a_race_was_lost(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    assert_eq!(kv.compare_and_swap("k", Revision(1), "x").await.expect("answered"), Swap::Missing);
    assert_eq!(kv.compare_and_delete("k", Revision(1)).await.expect("answered"), Swap::Missing);
    let first = kv.create("k", "1").await.expect("answered").expect("created");
    assert!(kv.create("k", "other").await.expect("answered").is_none());
    let Swap::Applied(second) = kv.compare_and_swap("k", first, "2").await.expect("answered") else {
        panic!("the revision of the create is good for a swap");
    };
    assert!(second > first);
    match kv.compare_and_swap("k", first, "3").await.expect("answered") {
        Swap::Conflict(now) => assert_eq!((now.value, now.modified), ("2".into(), second)),
        other => panic!("{other:?}"),
    }
    assert!(matches!(kv.compare_and_delete("k", first).await.expect("answered"), Swap::Conflict(_)));
    assert!(matches!(kv.compare_and_delete("k", second).await.expect("answered"), Swap::Applied(_)));
    assert_eq!(kv.compare_and_delete("k", second).await.expect("answered"), Swap::Missing);
}

async fn a_deleted_prefix_takes_its_keys_and_no_others(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    for i in 0..70 {
        kv.put(&format!("tree/{i}"), "x").await.expect("put");
    }
    for key in ["tree", "tre/e", "treehouse"] {
        kv.put(key, "x").await.expect("put");
    }
    assert_eq!(kv.delete_prefix("tree/").await.expect("delete"), 70);
    assert_eq!(kv.list("").await.expect("list").entries.len(), 3);
    assert_eq!(kv.delete_prefix("tree/").await.expect("delete"), 0);
}

async fn a_transaction_names_the_condition_that_did_not_hold(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    let a = kv.put("a", "1").await.expect("put");
    let outcome = kv.txn().if_unchanged("a", a).if_absent("b").put("b", "2").delete("a").commit().await;
    assert!(matches!(outcome.expect("answered"), TxnOutcome::Applied(revision) if revision > a));
    assert!(kv.get("a").await.expect("get").is_none());
    let outcome = kv.txn().if_absent("a").if_absent("b").put("a", "3").put("b", "3").commit().await;
    assert_eq!(outcome.expect("answered"), TxnOutcome::Refused { condition: 1 });
    assert!(kv.get("a").await.expect("get").is_none(), "nothing of a refused transaction is applied");
    assert_eq!(kv.get("b").await.expect("get").expect("exists").value, "2");
}

async fn an_ephemeral_key_ends_with_its_session(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let session = a.session().await.expect("a session");
    a.kv().put_ephemeral(&session, "mine", "x").await.expect("put");
    assert!(b.kv().get("mine").await.expect("get").expect("exists").ephemeral);
    let mut watch = b.kv().watch("mine").await.expect("watch");
    assert!(matches!(watch.next().await.expect("open"), KvEvent::Reset(entries) if entries.len() == 1));
    session.orphan();
    let limit = session.ttl() + b.profile().expiry_lag + SOON;
    match within(limit, "the end of the key", watch.next()).await.expect("open") {
        KvEvent::Delete { key, .. } => assert_eq!(key, "mine"),
        other => panic!("{other:?}"),
    }
    assert!(b.kv().get("mine").await.expect("get").is_none());
}

async fn increments_by_swap_lose_nothing(clients: Arc<dyn Clients>) {
    const TASKS: u32 = 8;
    const EACH: u32 = 10;
    let mut tasks = Vec::new();
    for _ in 0..TASKS {
        let kv = coord(&clients).await.kv().json::<u32>();
        tasks.push(spawn(async move {
            let mut last = 0;
            for _ in 0..EACH {
                loop {
                    let swapped = match kv.get("counter").await.expect("get") {
                        None => kv.create("counter", &1).await.expect("answered").map(|_| 1),
                        Some((now, at)) => {
                            assert!(now >= last, "the counter went back");
                            // In one process nothing else would let the others in.
                            tokio::task::yield_now().await;
                            let swap = kv.compare_and_swap("counter", at, &(now + 1)).await.expect("answered");
                            matches!(swap, Swap::Applied(_)).then_some(now + 1)
                        }
                    };
                    if let Some(now) = swapped {
                        last = now;
                        break;
                    }
                }
            }
        }));
    }
    for task in &mut tasks {
        within(Duration::from_secs(45), "all increments", &mut task.0).await.expect("no task fails");
    }
    let (total, _) = coord(&clients).await.kv().json::<u32>().get("counter").await.expect("get").expect("exists");
    assert_eq!(total, TASKS * EACH);
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    name: String,
    limits: Vec<u32>,
}

async fn json_values_come_back_and_garbage_is_told(clients: Arc<dyn Clients>) {
    let raw = coord(&clients).await.kv();
    let kv = raw.json::<Settings>();
    let settings = Settings { name: "é".into(), limits: vec![1, 2] };
    let revision = kv.put("settings", &settings).await.expect("put");
    assert_eq!(kv.get("settings").await.expect("get").expect("exists"), (settings, revision));
    raw.put("settings", "{\"name\": hunter2").await.expect("put");
    let error = kv.get("settings").await.expect_err("that is no JSON");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let shown = format!("{error} {error:?}");
    assert!(shown.contains("settings") && !shown.contains("hunter2"), "names the key, not the value: {shown}");
}

async fn a_watch_tells_names_as_they_were_written(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    let name = "a b/..//%2F🦀";
    let mut watch = kv.watch_prefix("a b/").await.expect("watch");
    assert!(matches!(within(SOON, "reset", watch.next()).await.expect("open"), KvEvent::Reset(e) if e.is_empty()));
    let revision = kv.put(name, "x").await.expect("put");
    kv.put("elsewhere", "x").await.expect("put");
    match within(SOON, "the put", watch.next()).await.expect("open") {
        KvEvent::Put(entry) => assert_eq!((entry.key.as_str(), entry.modified), (name, revision)),
        other => panic!("{other:?}"),
    }
    kv.delete(name).await.expect("delete");
    match within(SOON, "the delete", watch.next()).await.expect("open") {
        KvEvent::Delete { key, .. } => assert_eq!(key, name),
        other => panic!("{other:?}"),
    }
}

async fn bad_keys_and_values_are_refused_in_the_same_words(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let kv = coord.kv();
    for key in [String::new(), "x".repeat(MAX_NAME + 1), "x".repeat(10 * 1024)] {
        refused(kv.get(&key).await, ErrorKind::InvalidInput, "get");
        refused(kv.put(&key, "x").await, ErrorKind::InvalidInput, "put");
        refused(kv.txn().put(&key, "x").commit().await, ErrorKind::InvalidInput, "commit");
        refused(kv.watch(&key).await, ErrorKind::InvalidInput, "watch");
    }
    let profile = coord.profile();
    let error = kv.put("big", vec![0; profile.max_value + 1]).await.expect_err("too large");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains(&profile.max_value.to_string()), "it says the limit: {error}");
    kv.put("big", vec![0; profile.max_value]).await.expect("the limit itself fits");
    let mut many = kv.txn();
    for i in 0..=profile.max_txn {
        many = many.put(&format!("k{i}"), "x");
    }
    refused(many.commit().await, ErrorKind::InvalidInput, "too many");
    refused(kv.txn().put("a", "1").delete("a").commit().await, ErrorKind::InvalidInput, "a key written twice");
    kv.delete("big").await.expect("delete");
}
