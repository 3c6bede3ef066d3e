//! Keys as ZooKeeper nodes: what its own terms would get wrong.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use quorate_core::{Backend, Check, ErrorKind, KeyRange, Write};
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_created_again_is_not_unchanged_although_its_version_is() {
    let server = server().await;
    let (a, b) = (client(&server).await, client(&server).await);
    let raw = zookeeper_client::Client::connect(&server.addr().to_string()).await.unwrap();
    for round in 0..20 {
        let key = key(&format!("k{round}"));
        let path = format!("/tests/kv/k{round}");
        commit(&a, [], [put(&key, "first")]).await.unwrap();
        // Known to `a` from a read in even rounds, from its own write in odd ones.
        let reader = if round % 2 == 0 { &a } else { &b };
        let expected = get(reader, &key).await.unwrap().modified;
        let before = raw.check_stat(&path).await.unwrap().unwrap();
        commit(&b, [], [Write::Delete(key.clone())]).await.unwrap();
        commit(&b, [], [put(&key, "second")]).await.unwrap();
        let after = raw.check_stat(&path).await.unwrap().unwrap();
        assert_eq!(before.version, after.version, "the server's own check would let it pass");

        let check = Check::Unchanged { key: key.clone(), modified: expected };
        let swapped = commit(&a, [check.clone()], [put(&key, "third")]).await.unwrap();
        assert_eq!((swapped.applied, swapped.culprit), (false, Some(0)));
        let deleted = commit(&a, [check], [Write::Delete(key.clone())]).await.unwrap();
        assert!(!deleted.applied);
        assert_eq!(get(&a, &key).await.unwrap().value, "second");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_on_a_lease_does_not_forbid_keys_below_it() {
    let server = server().await;
    let backend = client(&server).await;
    let lease = keep(&backend, TTL).await;
    commit(&backend, [], [put_on(&lease.id, &key("a"), "1"), put(&key("a/b"), "2"), put(&key("a/b/c"), "3")])
        .await
        .unwrap();
    let names: Vec<_> = backend.read(&all()).await.unwrap().entries.into_iter().map(|e| e.key).collect();
    assert_eq!(names, [key("a"), key("a/b"), key("a/b/c")]);
    let below = KeyRange::prefix(&kv(), "a/").unwrap();
    assert_eq!(backend.read(&below).await.unwrap().entries.len(), 2);
}

/// A client that believes a key to be where it saw it last must not leave its value on somebody else's lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_ends_up_on_its_own_lease_whoever_moved_the_key() {
    let server = server().await;
    let (a, b) = (client(&server).await, client(&server).await);
    let theirs = keep(&b, TTL).await;
    let ours = keep(&a, TTL).await;
    commit(&a, [], [put(&key("plain"), "1"), put_on(&ours.id, &key("leased"), "1")]).await.unwrap();
    commit(&b, [], [put_on(&theirs.id, &key("plain"), "2"), put_on(&theirs.id, &key("leased"), "2")]).await.unwrap();
    let fence = join(&a, &line("a"), &ours.id).await;

    let plain = commit(&a, [standing(&fence)], [put(&key("plain"), "3")]).await.unwrap();
    let leased = commit(&a, [], [put_on(&ours.id, &key("leased"), "3")]).await.unwrap();
    for (name, lease, commit) in [("plain", None, plain), ("leased", Some(ours.id.clone()), leased)] {
        let entry = get(&b, &key(name)).await.unwrap();
        assert_eq!((entry.lease, entry.modified), (lease, commit.revision), "{name}");
        assert!(commit.applied);
    }
    b.revoke(&theirs.id).await.unwrap();
    assert_eq!(a.read(&all()).await.unwrap().entries.len(), 2, "nothing of ours went with their lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_would_hang_up_on_is_refused_and_the_connection_stays() {
    let server = server().await;
    let backend = client(&server).await;
    let lease = keep(&backend, TTL).await;
    let most = backend.profile().max_value;
    let half = "x".repeat(most / 2 + 8192);
    let too_much = commit(&backend, [], [put(&key("a"), &half), put(&key("b"), &half)]).await.unwrap_err();
    assert_eq!(too_much.kind(), ErrorKind::InvalidInput, "{too_much}");
    let mut value = entry(&line("a"), &lease.id);
    value.value = "x".repeat(most + 1).into();
    assert_eq!(backend.enqueue(&value).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    let whole = "x".repeat(most);
    let name = key(&"%".repeat(quorate_core::MAX_NAME));
    assert!(commit(&backend, [Check::Absent(name.clone())], [put(&name, &whole)]).await.unwrap().applied);
    assert!(commit(&backend, [], [put(&name, &whole)]).await.unwrap().applied);
    assert_eq!(get(&backend, &name).await.unwrap().value.len(), most);
    value.value = whole.into();
    assert!(backend.enqueue(&value).await.unwrap().is_some());
    backend.renew(&lease.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_of_another_client_can_be_revoked_and_not_used() {
    let server = server().await;
    let (a, b) = (client(&server).await, client(&server).await);
    let lease = keep(&a, TTL).await;
    let place = join(&a, &line("a"), &lease.id).await;
    let foreign = commit(&b, [], [put_on(&lease.id, &key("a"), "1")]).await.unwrap_err();
    assert_eq!(foreign.kind(), ErrorKind::SessionLost);
    assert_eq!(b.read(&all()).await.unwrap().entries, []);
    b.revoke(&lease.id).await.unwrap();
    assert_eq!(b.line(&line("a")).await.unwrap().tickets, [], "gone when the answer came");
    assert_eq!(a.look(&place.ticket, 1).await.unwrap(), None);
    assert_eq!(a.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::SessionLost);
    b.revoke(&lease.id).await.unwrap();
}

/// The library closes a session when nobody holds its client; a future that nobody polls holds it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_kept_and_not_polled_does_not_keep_its_lease() {
    let server = server().await;
    let (a, b) = (client(&server).await, client(&server).await);
    let there = keep(&b, TTL).await;
    // The line is there, so that joining it takes one request.
    join(&b, &line("a"), &there.id).await;
    let (revoked, expired) = (a.grant(TTL).await.unwrap(), a.grant(TTL).await.unwrap());
    let expires = tokio::time::Instant::now() + TTL;
    let mut kept = Vec::new();
    for lease in [&revoked, &expired] {
        let (backend, entry) = (a.clone(), entry(&line("a"), &lease.id));
        let mut call = Box::pin(async move { backend.enqueue(&entry).await });
        // Polled until its requests have been sent, and no further.
        assert!(futures_util::poll!(&mut call).is_pending());
        kept.push(call);
    }
    let tickets = async || b.line(&line("a")).await.unwrap().tickets.len();
    until("both joined", TTL, async || tickets().await == 3).await;
    a.revoke(&revoked.id).await.unwrap();
    assert_eq!(tickets().await, 2, "gone when the answer came");
    assert!(tokio::time::Instant::now() < expires, "the machine is too slow for this test");
    until("not renewed", 3 * TTL, async || tickets().await == 1).await;
    assert!(tokio::time::Instant::now() >= expires);
    for call in kept {
        assert_eq!(call.await.unwrap_err().kind(), ErrorKind::SessionLost);
    }
}
