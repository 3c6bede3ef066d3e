//! Leases: how long they last, what ends with them, and what is said about ended ones.

use std::{collections::HashSet, sync::Arc, time::Duration};

use quorate_core::{ErrorKind, KeyRange};
use tokio::time::{Instant, sleep};

use crate::{
    Clients,
    support::{
        Expiry, SOON, actor, all, cases, client, get, keep, key, kv, line, put, put_on, read, refused, short, value,
        write,
    },
};

cases!("lease":
    the_profile_has_limits_that_make_sense,
    the_granted_ttl_is_the_one_asked_for,
    a_ttl_out_of_bounds_is_moved_to_the_bound,
    every_lease_has_a_name_of_its_own,
    a_key_outlasts_its_lease_by_no_more_than_promised,
    renewal_starts_the_ttl_again,
    renewal_reports_the_ttl_in_force,
    an_expired_lease_is_lost,
    a_revoked_lease_is_lost,
    revoking_twice_is_no_error,
    revoking_ends_everything_on_the_lease_and_nothing_else,
    losing_one_of_several_leases_leaves_the_others_alive,
);

async fn the_profile_has_limits_that_make_sense(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let profile = backend.profile();
    assert!(!profile.backend.is_empty(), "messages and metrics need a name");
    assert!(!profile.min_ttl.is_zero() && profile.min_ttl <= profile.max_ttl, "{profile:?}");
    assert!(clients.ttl() >= profile.min_ttl && clients.ttl() <= profile.max_ttl, "the caller's TTL: {profile:?}");
    assert!(profile.max_txn >= 2, "a fenced write is one check and one write: {profile:?}");
    assert!(profile.max_value >= 1024, "{profile:?}");
    assert!(!profile.early_end.is_some_and(str::is_empty) && !profile.interop.is_some_and(str::is_empty));
}

async fn the_granted_ttl_is_the_one_asked_for(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let asked = clients.ttl();
    let lease = backend.grant(asked).await.expect("a lease is granted");
    assert_eq!(lease.ttl, asked, "the caller declares this TTL as one that is granted as asked");
    // S-G02: the option must not be dropped in silence and replaced by a default.
    for times in [2, 3] {
        let asked = (asked * times).min(backend.profile().max_ttl);
        let lease = backend.grant(asked).await.expect("a lease is granted");
        assert!(lease.ttl >= asked, "asked for {asked:?}, granted {:?}", lease.ttl);
        assert!(lease.ttl <= asked + asked / 2 + Duration::from_secs(2), "asked for {asked:?}, got {:?}", lease.ttl);
    }
}

async fn a_ttl_out_of_bounds_is_moved_to_the_bound(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let (min, max) = (backend.profile().min_ttl, backend.profile().max_ttl);
    let lease = backend.grant(min / 2).await.expect("a TTL below the minimum is raised");
    assert!(lease.ttl >= min && lease.ttl <= max, "{:?}", lease.ttl);
    let lease = backend.grant(max.saturating_mul(2)).await.expect("a TTL above the maximum is lowered");
    assert_eq!(lease.ttl, max);
    backend.revoke(&lease.id).await.expect("revoking works");
}

async fn every_lease_has_a_name_of_its_own(clients: Arc<dyn Clients>) {
    let (a, b) = (client(&clients).await, client(&clients).await);
    let mut names = HashSet::new();
    for _ in 0..5 {
        for backend in [&a, &b] {
            let lease = backend.grant(clients.ttl()).await.expect("a lease is granted");
            assert!(names.insert(lease.id.clone()), "{} was granted twice", lease.id);
        }
    }
}

async fn a_key_outlasts_its_lease_by_no_more_than_promised(clients: Arc<dyn Clients>) {
    let (owner, other) = (client(&clients).await, client(&clients).await);
    let (lease, expiry) = short(&clients, &owner).await;
    write(&owner, [put_on(&lease, &key("a"), "1"), put(&key("b"), "2")]).await;
    let started = Instant::now();
    let patience = expiry.patience();
    while get(&owner, &key("a")).await.is_some() {
        assert!(started.elapsed() < patience, "the key outlives its lease for ever");
        sleep(clients.ttl() / 20).await;
    }
    expiry.assert_now("the key");
    assert_eq!(value(&other, &key("b")).await.as_deref(), Some(&b"2"[..]), "a key on no lease stays");
    crate::support::eventually("the key is gone for every client", || async { get(&other, &key("a")).await.is_none() })
        .await;
}

async fn renewal_starts_the_ttl_again(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let (lease, _) = short(&clients, &backend).await;
    write(&backend, [put_on(&lease, &key("a"), "1")]).await;
    let longer_than_it_could_last = clients.ttl() + backend.profile().expiry_lag + Duration::from_secs(1);
    let started = Instant::now();
    let mut expiry;
    loop {
        sleep(clients.ttl() / 3).await;
        let sent = Instant::now();
        let ttl = backend.renew(&lease).await.expect("the lease stands while it is renewed");
        expiry = Expiry::after(&backend, sent, ttl);
        assert!(get(&backend, &key("a")).await.is_some(), "the key stands while its lease is renewed");
        if started.elapsed() > longer_than_it_could_last {
            break;
        }
    }
    let patience = expiry.patience();
    let stopped = Instant::now();
    while get(&backend, &key("a")).await.is_some() {
        assert!(stopped.elapsed() < patience, "the key outlives its lease for ever");
        sleep(clients.ttl() / 20).await;
    }
    expiry.assert_now("the key");
}

async fn renewal_reports_the_ttl_in_force(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    for times in [1, 3] {
        let asked = (clients.ttl() * times).min(backend.profile().max_ttl);
        let lease = backend.grant(asked).await.expect("a lease is granted");
        assert_eq!(backend.renew(&lease.id).await.expect("renewing works"), lease.ttl);
    }
}

async fn an_expired_lease_is_lost(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let (lease, expiry) = short(&clients, &a.backend).await;
    write(&a.backend, [put_on(&lease, &key("a"), "1")]).await;
    sleep(expiry.patience() - SOON).await;
    refused(a.backend.renew(&lease).await, ErrorKind::SessionLost, "renewing an expired lease");
    let late = crate::support::txn([], [put_on(&lease, &key("b"), "1")]);
    refused(a.backend.commit(&late).await, ErrorKind::SessionLost, "a put on an expired lease");
    let entry = quorate_core::Enqueue { lease: lease.clone(), ..a.entry(&line("x")) };
    refused(a.backend.enqueue(&entry).await, ErrorKind::SessionLost, "joining on an expired lease");
    assert_eq!(read(&a.backend, &all()).await.entries, [], "what failed wrote nothing");
    assert_eq!(a.tickets(&line("x")).await, []);
    a.backend.revoke(&lease).await.expect("revoking an ended lease is fine");
}

async fn a_revoked_lease_is_lost(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    a.backend.revoke(&a.lease.id).await.expect("revoking works");
    refused(a.backend.renew(&a.lease.id).await, ErrorKind::SessionLost, "renewing a revoked lease");
    let late = crate::support::txn([], [put_on(&a.lease.id, &key("a"), "1")]);
    refused(a.backend.commit(&late).await, ErrorKind::SessionLost, "a put on a revoked lease");
    refused(a.backend.enqueue(&a.entry(&line("x"))).await, ErrorKind::SessionLost, "joining on a revoked lease");
    assert_eq!(read(&a.backend, &all()).await.entries, []);
    assert_eq!(a.tickets(&line("x")).await, []);
}

async fn revoking_twice_is_no_error(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let lease = backend.grant(clients.ttl()).await.expect("a lease is granted").id;
    for _ in 0..2 {
        backend.revoke(&lease).await.expect("revoking an ended lease is fine");
    }
}

async fn revoking_ends_everything_on_the_lease_and_nothing_else(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let other = keep(&a.backend).await;
    for i in 0..5 {
        let names = [format!("mine-{i}"), format!("other-{i}"), format!("free-{i}")].map(|n| key(&n));
        write(&a.backend, [put_on(&a.lease.id, &names[0], "1")]).await;
        write(&a.backend, [put_on(&other.id, &names[1], "1")]).await;
        write(&a.backend, [put(&names[2], "1")]).await;
    }
    let mine = [a.join(&line("x")).await, a.join(&line("y")).await];
    let theirs = quorate_core::Enqueue { lease: other.id.clone(), ..a.entry(&line("x")) };
    let theirs = a.enqueue(&theirs).await;

    a.backend.revoke(&a.lease.id).await.expect("revoking works");
    let left = read(&a.backend, &all()).await.entries;
    assert_eq!(left.len(), 10, "{left:?}");
    let range = KeyRange::prefix(&kv(), "mine-").expect("a valid prefix");
    assert_eq!(read(&a.backend, &range).await.entries, [], "keys end with their lease");
    for place in &mine {
        let looked = a.backend.look(&place.ticket, 1).await.expect("looking works");
        assert_eq!(looked, None, "tickets end with their lease");
    }
    assert_eq!(a.tickets(&line("x")).await, [theirs.ticket.clone()]);
    assert_eq!(a.look(&theirs.ticket, 1).await.ahead, [], "who stood behind is now first");
}

async fn losing_one_of_several_leases_leaves_the_others_alive(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let leases = [keep(&backend).await, keep(&backend).await, keep(&backend).await];
    for (i, lease) in leases.iter().enumerate() {
        write(&backend, [put_on(&lease.id, &key(&i.to_string()), "1")]).await;
    }
    backend.revoke(&leases[1].id).await.expect("revoking works");
    refused(backend.renew(&leases[1].id).await, ErrorKind::SessionLost, "renewing the lost one");
    for i in [0, 2] {
        backend.renew(&leases[i].id).await.expect("the others are renewed as before");
        assert!(get(&backend, &key(&i.to_string())).await.is_some());
    }
    assert!(get(&backend, &key("1")).await.is_none());
}
