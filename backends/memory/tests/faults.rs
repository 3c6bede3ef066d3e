//! Each fault does what its docs say, to its own client only.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{
    Backend, Check, Dir, Enqueue, ErrorKind, Key, KeyRange, Lease, LeaseId, Nonce, Place, Ticket, TicketKind, Txn,
    WatchEvent, Write,
};
use quorate_memory::{Memory, Verb};
use tokio::time::{Instant, sleep, timeout};

const TTL: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(60);

fn line() -> Dir {
    Dir::new(["lock", "x"]).unwrap()
}

fn key(name: &str) -> Key {
    Key::new(&Dir::new(["kv"]).unwrap(), name).unwrap()
}

fn all() -> KeyRange {
    KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap()
}

fn put(name: &str, lease: Option<&LeaseId>) -> Txn {
    let write = Write::Put { key: key(name), value: Bytes::from_static(b"1"), lease: lease.cloned() };
    Txn { checks: vec![], writes: vec![write] }
}

fn entry(lease: &Lease) -> Enqueue {
    Enqueue {
        line: line(),
        kind: TicketKind::Lock,
        lease: lease.id.clone(),
        nonce: Nonce::random(),
        value: Bytes::new(),
        depth: 1,
        when_free: false,
    }
}

async fn join(backend: &Memory) -> (Lease, Place) {
    let lease = backend.grant(TTL).await.unwrap();
    let place = backend.enqueue(&entry(&lease)).await.unwrap().unwrap();
    (lease, place)
}

async fn keys(backend: &Memory) -> usize {
    backend.read(&all()).await.unwrap().entries.len()
}

/// One call of every verb, and the kind of the error it fails with.
async fn every_verb(backend: &Memory, lease: &Lease, ticket: &Ticket) -> Vec<(Verb, Option<ErrorKind>)> {
    let (id, range, dir) = (&lease.id, all(), line());
    vec![
        (Verb::Grant, backend.grant(TTL).await.err().map(|e| e.kind())),
        (Verb::Renew, backend.renew(id).await.err().map(|e| e.kind())),
        (Verb::Read, backend.read(&range).await.err().map(|e| e.kind())),
        (Verb::Commit, backend.commit(&put("verbs", None)).await.err().map(|e| e.kind())),
        (Verb::Watch, backend.watch(&range).await.err().map(|e| e.kind())),
        (Verb::Enqueue, backend.enqueue(&entry(lease)).await.err().map(|e| e.kind())),
        (Verb::Look, backend.look(ticket, 1).await.err().map(|e| e.kind())),
        (Verb::Line, backend.line(&dir).await.err().map(|e| e.kind())),
        (Verb::Revoke, backend.revoke(id).await.err().map(|e| e.kind())),
    ]
}

#[tokio::test(start_paused = true)]
async fn an_expired_lease_takes_its_keys_and_tickets_along_at_once() {
    let (a, b) = (Memory::new(), Memory::new());
    assert!(!a.faults().expire(&LeaseId::new("1")), "nothing was granted yet");
    drop(b);
    let b = a.client();
    let (lease, place) = join(&a).await;
    let (_, behind) = join(&b).await;
    a.commit(&put("a", Some(&lease.id))).await.unwrap();
    let started = Instant::now();
    let waiting = tokio::spawn({
        let (c, ticket) = (b.client(), place.ticket.clone());
        async move { c.gone(&ticket).await }
    });
    tokio::task::yield_now().await;
    assert!(b.faults().expire(&lease.id), "whoever granted it");
    waiting.await.unwrap().unwrap();
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(keys(&b).await, 0);
    assert_eq!(b.look(&behind.ticket, 1).await.unwrap().unwrap().ahead, []);
    assert_eq!(a.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::SessionLost);
    assert!(!b.faults().expire(&lease.id), "it has ended before");
}

#[tokio::test(start_paused = true)]
async fn expiring_all_leases_spares_those_of_other_clients() {
    let a = Memory::new();
    let b = a.client();
    let leases = [a.grant(TTL).await.unwrap(), a.grant(TTL).await.unwrap()];
    let other = b.grant(TTL).await.unwrap();
    assert_eq!(a.faults().expire_all(), 2);
    for lease in &leases {
        assert_eq!(a.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::SessionLost);
    }
    b.renew(&other.id).await.unwrap();
    assert_eq!(a.faults().expire_all(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_cut_off_fails_with_unavailable_and_nothing_is_applied() {
    let a = Memory::new();
    let b = a.client();
    let (lease, place) = join(&a).await;
    a.faults().cut();
    for (verb, kind) in every_verb(&a, &lease, &place.ticket).await {
        assert_eq!(kind, Some(ErrorKind::Unavailable), "{verb}");
    }
    assert_eq!(keys(&b).await, 0);
    assert_eq!(b.line(&line()).await.unwrap().tickets.len(), 1);
    a.faults().heal();
    for (verb, kind) in every_verb(&a, &lease, &place.ticket).await {
        assert_eq!(kind, None, "{verb}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_leases_of_a_client_that_is_cut_off_run_out() {
    let a = Memory::new();
    let b = a.client();
    let (lease, place) = join(&a).await;
    let started = Instant::now();
    a.faults().cut();
    b.gone(&place.ticket).await.unwrap();
    assert!(started.elapsed() >= TTL && started.elapsed() < TTL + Duration::from_millis(5), "{:?}", started.elapsed());
    a.faults().heal();
    assert_eq!(a.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::SessionLost);
}

#[tokio::test(start_paused = true)]
async fn a_watch_is_interrupted_by_a_cut_and_reset_when_it_heals() {
    let a = Memory::new();
    let b = a.client();
    let mut watch = a.watch(&all()).await.unwrap();
    let mut other = b.watch(&all()).await.unwrap();
    for watch in [&mut watch, &mut other] {
        assert!(matches!(watch.next().await, Some(WatchEvent::Reset(s)) if s.entries.is_empty()));
    }
    a.faults().cut();
    assert!(matches!(watch.next().await, Some(WatchEvent::Interrupted(e)) if e.kind() == ErrorKind::Unavailable));
    a.faults().cut();
    b.commit(&put("a", None)).await.unwrap();
    assert!(timeout(LONG, watch.next()).await.is_err(), "nothing is told while it is cut off");
    assert!(matches!(other.next().await, Some(WatchEvent::Put(_))), "others are told as ever");
    a.faults().heal();
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(s)) if s.entries.len() == 1));
    b.commit(&put("b", None)).await.unwrap();
    assert!(matches!(watch.next().await, Some(WatchEvent::Put(e)) if e.key == key("b")));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_is_cut_off_learns_of_the_departure_when_it_heals() {
    let a = Memory::new();
    let b = a.client();
    let (_, place) = join(&b).await;
    let faults = a.faults();
    for cut_before in [false, true] {
        let a = a.client();
        let faults = a.faults();
        let (_, place) = join(&b).await;
        if cut_before {
            faults.cut();
        }
        let mut waiting = Box::pin(a.gone(&place.ticket));
        assert!(timeout(Duration::from_secs(1), &mut waiting).await.is_err());
        faults.cut();
        let leave = Txn { checks: vec![], writes: vec![Write::Leave(place.ticket.clone())] };
        b.commit(&leave).await.unwrap();
        assert!(timeout(LONG, &mut waiting).await.is_err(), "the news cannot arrive");
        faults.heal();
        timeout(Duration::from_secs(1), waiting).await.unwrap().unwrap();
    }
    faults.cut();
    assert!(timeout(TTL / 2, a.gone(&place.ticket)).await.is_err(), "`gone` waits, it does not fail");
}

#[tokio::test(start_paused = true)]
async fn a_write_under_way_when_the_client_is_cut_off_is_ambiguous() {
    let a = Arc::new(Memory::new());
    let b = a.client();
    let (lease, place) = join(&a).await;
    let faults = a.faults();
    for healed in [false, true] {
        faults.delay(Verb::ALL, 9, Duration::from_secs(1));
        let calls = tokio::spawn({
            let (a, lease, ticket) = (a.clone(), lease.clone(), place.ticket.clone());
            async move { every_verb(&a, &lease, &ticket).await }
        });
        // Each call is cut off while it is under way.
        for _ in 0..9 {
            sleep(Duration::from_millis(500)).await;
            faults.cut();
            if healed {
                sleep(Duration::from_millis(100)).await;
                faults.heal();
                sleep(Duration::from_millis(400)).await;
            } else {
                sleep(Duration::from_millis(500)).await;
                faults.heal();
            }
        }
        for (verb, kind) in calls.await.unwrap() {
            let write = verb.writes();
            let expected = if write { ErrorKind::Ambiguous } else { ErrorKind::Unavailable };
            assert_eq!(kind, Some(expected), "{verb}, healed before the answer: {healed}");
        }
        assert_eq!(faults.pending(), 0, "every delay was met");
        assert_eq!(keys(&b).await, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_delayed_call_takes_effect_after_the_delay() {
    let a = Memory::new();
    let b = a.client();
    a.faults().delay([Verb::Commit], 2, Duration::from_secs(3));
    let started = Instant::now();
    let (txn, other) = (put("a", None), put("b", None));
    let mut writing = a.commit(&txn);
    assert!(timeout(Duration::from_secs(2), &mut writing).await.is_err());
    assert_eq!(keys(&b).await, 0, "it is still under way");
    keys(&a).await;
    assert_eq!(started.elapsed(), Duration::from_secs(2), "other verbs and other clients are not delayed");
    assert!(writing.await.unwrap().applied);
    assert_eq!(started.elapsed(), Duration::from_secs(3));
    assert_eq!(a.faults().pending(), 1);
    a.commit(&other).await.unwrap();
    assert_eq!(started.elapsed(), Duration::from_secs(6));
    a.commit(&put("c", None)).await.unwrap();
    assert_eq!(started.elapsed(), Duration::from_secs(6), "two calls were to be delayed");
}

#[tokio::test(start_paused = true)]
async fn a_failed_call_is_not_applied() {
    let a = Memory::new();
    let (lease, place) = join(&a).await;
    let kinds = [ErrorKind::Unavailable, ErrorKind::Ambiguous, ErrorKind::Denied, ErrorKind::Backend];
    for kind in kinds {
        a.faults().fail(Verb::ALL, 9, kind);
        for (verb, failed) in every_verb(&a, &lease, &place.ticket).await {
            assert_eq!(failed, Some(kind), "{verb}");
        }
        assert_eq!(a.faults().pending(), 0);
        assert_eq!(keys(&a).await, 0);
        assert_eq!(a.line(&line()).await.unwrap().tickets, std::slice::from_ref(&place.ticket));
    }
    a.faults().fail([Verb::Gone], 1, ErrorKind::Unavailable);
    assert_eq!(a.gone(&place.ticket).await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_reply_is_lost_has_been_applied() {
    let a = Memory::new();
    let b = a.client();
    let (lease, place) = join(&a).await;
    a.faults().lose_reply(Verb::ALL, 9);
    for (verb, kind) in every_verb(&a, &lease, &place.ticket).await {
        let write = verb.writes();
        assert_eq!(kind, Some(if write { ErrorKind::Ambiguous } else { ErrorKind::Unavailable }), "{verb}");
    }
    assert_eq!(keys(&b).await, 1);
    assert_eq!(a.renew(&lease.id).await.unwrap_err().kind(), ErrorKind::SessionLost, "the revocation happened");
    assert_eq!(b.line(&line()).await.unwrap().tickets, []);
}

#[tokio::test(start_paused = true)]
async fn a_join_whose_reply_is_lost_is_found_again_by_its_nonce() {
    let a = Memory::new();
    let lease = a.grant(TTL).await.unwrap();
    let entry = Enqueue { when_free: true, ..entry(&lease) };
    a.faults().lose_reply([Verb::Enqueue], 1);
    assert_eq!(a.enqueue(&entry).await.unwrap_err().kind(), ErrorKind::Ambiguous);
    let place = a.enqueue(&entry).await.unwrap().expect("one's own ticket does not make the line taken");
    assert_eq!(place.ahead, []);
    assert_eq!(a.line(&line()).await.unwrap().tickets, [place.ticket]);
}

#[tokio::test(start_paused = true)]
async fn a_paused_client_hangs_and_its_lease_runs_out_meanwhile() {
    let a = Memory::new();
    let b = a.client();
    let (lease, place) = join(&a).await;
    let mut watch = a.watch(&all()).await.unwrap();
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(_))));
    let faults = a.faults();
    faults.pause();
    let mut renewing = a.renew(&lease.id);
    assert!(timeout(TTL, &mut renewing).await.is_err());
    b.gone(&place.ticket).await.unwrap();
    b.commit(&put("a", None)).await.unwrap();
    assert!(timeout(LONG, watch.next()).await.is_err(), "a stopped process hears nothing");
    // It acts on what it believed before: the fence refuses it.
    let standing = Check::Standing { ticket: place.ticket, token: place.token };
    let late = Txn { checks: vec![standing], ..put("late", None) };
    let mut writing = a.commit(&late);
    assert!(timeout(LONG, &mut writing).await.is_err());
    faults.resume();
    assert_eq!(renewing.await.unwrap_err().kind(), ErrorKind::SessionLost);
    assert_eq!(writing.await.unwrap().culprit, Some(0));
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(s)) if s.entries.len() == 1));
}

#[tokio::test(start_paused = true)]
async fn a_cut_during_a_pause_is_learnt_of_afterwards() {
    let a = Memory::new();
    let mut watch = a.watch(&all()).await.unwrap();
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(_))));
    let (faults, txn) = (a.faults(), put("a", None));
    faults.pause();
    let mut writing = a.commit(&txn);
    assert!(timeout(LONG, &mut writing).await.is_err());
    faults.cut();
    assert!(timeout(LONG, watch.next()).await.is_err());
    faults.resume();
    assert_eq!(writing.await.unwrap_err().kind(), ErrorKind::Ambiguous);
    assert!(matches!(watch.next().await, Some(WatchEvent::Interrupted(_))));
    faults.heal();
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(_))));
}

#[tokio::test(start_paused = true)]
async fn faults_are_met_in_order_and_by_their_verbs_only() {
    let a = Memory::new();
    let faults = a.faults();
    faults.fail([Verb::Read], 1, ErrorKind::Denied);
    faults.fail([Verb::Read, Verb::Commit], 2, ErrorKind::Unavailable);
    assert_eq!(faults.pending(), 3);
    a.grant(TTL).await.unwrap();
    assert_eq!(a.commit(&put("a", None)).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(a.read(&all()).await.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(a.read(&all()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(keys(&a).await, 0);
    assert_eq!(faults.pending(), 0);
}

#[tokio::test(start_paused = true)]
async fn clearing_takes_everything_back() {
    let a = Memory::new();
    let mut watch = a.watch(&all()).await.unwrap();
    watch.next().await.unwrap();
    let faults = a.faults();
    faults.fail(Verb::ALL, 100, ErrorKind::Denied);
    faults.cut();
    faults.pause();
    faults.clear();
    assert_eq!(faults.pending(), 0);
    assert_eq!(keys(&a).await, 0);
    assert!(matches!(watch.next().await, Some(WatchEvent::Reset(_))), "all that counts is what there is now");
}

#[tokio::test(start_paused = true)]
async fn errors_name_operation_key_backend_and_next_step() {
    let a = Memory::new();
    a.faults().lose_reply([Verb::Commit], 1);
    let e = a.commit(&put("orders/42", None)).await.unwrap_err();
    assert_eq!(
        e.to_string(),
        "commit kv/orders/42 on memory: the reply was lost on request; the write may have happened; read before retrying"
    );
}
