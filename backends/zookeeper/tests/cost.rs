//! What calls cost in round trips, counted on the wire.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend, Check, KeyRange, Write};
use quorate_testkit::proxy::FaultProxy;
use quorate_zookeeper::ZooKeeper;
use support::*;

/// The fewest round trips that a call took in several attempts: a ping of the client library may fall into one.
async fn turns<T>(proxy: &FaultProxy, mut prepare: impl AsyncFnMut() -> T, call: impl AsyncFn(T)) -> u64 {
    let mut fewest = u64::MAX;
    for _ in 0..7 {
        let prepared = prepare().await;
        let before = proxy.turns();
        call(prepared).await;
        fewest = fewest.min(proxy.turns() - before);
    }
    fewest
}

/// For closures that end in a value nobody needs.
fn forget<T>(_: T) {}

struct Stage {
    proxy: FaultProxy,
    backend: Arc<ZooKeeper>,
    lease: Kept,
    server: quorate_testkit::servers::Server,
}

async fn stage() -> Stage {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let backend = connect(&config(&[proxy.addr()])).await;
    let lease = keep(&backend, TTL).await;
    join(&backend, &line("a"), &lease.id).await;
    Stage { proxy, backend, lease, server }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn standing_in_line_looking_and_leaving_are_one_round_trip_each() {
    let Stage { proxy, backend, lease, .. } = &stage().await;
    // The client library leaves Nagle's algorithm on, so that the list may leave only when the create is answered.
    let joined = turns(proxy, async || (), async |()| forget(join(backend, &line("a"), &lease.id).await)).await;
    assert!(joined <= 2, "create and list: {joined}");
    let empty = async || {
        for ticket in backend.line(&line("b")).await.unwrap().tickets {
            leave(backend, &ticket).await;
        }
    };
    let claimed = turns(proxy, empty, async |()| {
        assert_eq!(join(backend, &line("b"), &lease.id).await.ahead, []);
    });
    assert_eq!(claimed.await, 1, "a line that was empty when last seen");
    let asked = turns(
        proxy,
        async || (),
        async |()| {
            let entry = quorate_core::Enqueue { when_free: true, ..entry(&line("a"), &lease.id) };
            assert_eq!(backend.enqueue(&entry).await.unwrap(), None);
        },
    );
    assert!(asked.await <= 2, "sync and list, and nothing written");
    let place = async || join(backend, &line("a"), &lease.id).await;
    let looked = turns(proxy, place, async |place| {
        assert!(backend.look(&place.ticket, 1).await.unwrap().is_some());
    });
    assert_eq!(looked.await, 1);
    let left = turns(proxy, place, async |place| {
        let release = commit(backend, [standing(&place)], [Write::Leave(place.ticket.clone())]).await.unwrap();
        assert!(release.applied);
    });
    assert_eq!(left.await, 1, "a release");
    let renewed = turns(proxy, async || (), async |()| forget(backend.renew(&lease.id).await.unwrap())).await;
    assert_eq!(renewed, 1, "a renewal");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_writes_are_one_round_trip_each() {
    let Stage { proxy, backend, lease, .. } = &stage().await;
    // Of one name, so that the generation that it belongs to exists from the second time on.
    let fresh = async || forget(commit(backend, [], [Write::Delete(key("new"))]).await.unwrap());
    let created = turns(proxy, fresh, async |()| {
        assert!(commit(backend, [Check::Absent(key("new"))], [put(&key("new"), "1")]).await.unwrap().applied);
    });
    assert_eq!(created.await, 1, "a create");
    let put_again = async || forget(commit(backend, [], [put(&key("new"), "1")]).await.unwrap());
    let replaced = turns(proxy, put_again, async |()| {
        assert!(commit(backend, [], [put(&key("new"), "2")]).await.unwrap().applied);
    });
    assert_eq!(replaced.await, 1, "a put");
    let on_lease = turns(proxy, fresh, async |()| {
        assert!(commit(backend, [], [put_on(&lease.id, &key("new"), "1")]).await.unwrap().applied);
    });
    assert_eq!(on_lease.await, 1, "a put on a lease");
    let deleted = turns(proxy, put_again, async |()| {
        assert!(commit(backend, [], [Write::Delete(key("new"))]).await.unwrap().applied);
    });
    assert_eq!(deleted.await, 1, "a delete");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fenced_and_conditional_writes_are_one_round_trip_each() {
    let Stage { proxy, backend, lease, server } = &stage().await;
    let place = join(backend, &line("fence"), &lease.id).await;
    let fenced = turns(
        proxy,
        async || (),
        async |()| {
            assert!(commit(backend, [standing(&place)], [put(&key("fenced"), "1")]).await.unwrap().applied);
        },
    );
    assert_eq!(fenced.await, 1, "a fenced put");
    let other = client(server).await;
    let read = async || {
        // Written by somebody else and read by us: what a compare-and-swap follows.
        commit(&other, [], [put(&key("shared"), "theirs")]).await.unwrap();
        backend.read(&KeyRange::One(key("shared"))).await.unwrap().entries[0].modified
    };
    let swapped = turns(proxy, read, async |modified| {
        let check = Check::Unchanged { key: key("shared"), modified };
        assert!(commit(backend, [check], [put(&key("shared"), "ours")]).await.unwrap().applied);
    });
    assert_eq!(swapped.await, 1, "a compare-and-swap after a read");
    let deleted = turns(proxy, read, async |modified| {
        let check = Check::Unchanged { key: key("shared"), modified };
        assert!(commit(backend, [check], [Write::Delete(key("shared"))]).await.unwrap().applied);
    });
    assert_eq!(deleted.await, 1, "a compare-and-delete after a read");
    let both = turns(
        proxy,
        async || (),
        async |()| {
            let writes = [put(&key("x"), "1"), put(&key("y"), "1")];
            assert!(commit(backend, [], writes).await.unwrap().applied);
        },
    );
    // Two waits, and one more on the wire where the first of several requests travels alone (see above).
    let both = both.await;
    assert!(both <= 3, "a look and a multi: {both}");
    let one = turns(proxy, async || (), async |()| forget(get(backend, &key("shared")).await)).await;
    assert!(one <= 2, "sync and read: {one}");
    let many = turns(proxy, async || (), async |()| forget(backend.read(&all()).await.unwrap())).await;
    assert!(many <= 3, "sync and names, then values: {many}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_sends_nothing() {
    let Stage { proxy, backend, lease, .. } = &stage().await;
    let place = join(backend, &line("a"), &lease.id).await;
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let (backend, ticket) = (backend.clone(), place.ticket.clone());
            tokio::spawn(async move { backend.gone(&ticket).await })
        })
        .collect();
    let _watch = backend.watch(&all()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, begun) = (proxy.turns(), tokio::time::Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    // Two sessions: renewals every TTL / 5, and pings, every 3/20 of a session where nothing else was sent.
    let most = 2 * (begun.elapsed().as_millis() as u64 / (TTL.as_millis() as u64 * 3 / 20)) + 8;
    assert!(proxy.turns() - before <= most, "{} of {most}", proxy.turns() - before);
    leave(backend, &place.ticket).await;
    for wait in waiting {
        wait.await.unwrap().unwrap();
    }
}
