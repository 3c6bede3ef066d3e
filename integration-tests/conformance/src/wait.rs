//! Waiting for a ticket to be gone: no wake-up is lost, however the ticket goes, and none comes for nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::Enqueue;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    Clients,
    support::{Actor, QUIET, SOON, actor, actors, cases, client, keep, line, short, spawn, until_gone, within},
};

cases!("wait":
    waiting_for_a_ticket_that_is_gone_ends_at_once,
    a_waiter_wakes_when_the_ticket_leaves,
    a_waiter_wakes_when_the_lease_is_revoked,
    a_waiter_wakes_when_the_lease_expires_and_not_before,
    a_waiter_sleeps_while_the_ticket_stands_renewed,
    no_wake_up_is_lost_between_look_and_wait,
    all_waiters_of_one_ticket_wake,
    leaving_wakes_nobody_who_waits_for_another,
    a_dropped_wait_harms_nobody,
    twenty_waiters_are_served_in_order,
);

/// Long enough for a wait to be established at the server; what comes before that is another case.
const SETTLE: Duration = Duration::from_millis(100);

async fn waiting_for_a_ticket_that_is_gone_ends_at_once(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let place = a.join(&line("x")).await;
    a.leave(&place.ticket).await;
    within(SOON, "the end of the wait", until_gone(a.backend.clone(), place.ticket.clone())).await;
    // Somebody else in the line, in the place of the one that left.
    b.join(&line("x")).await;
    within(SOON, "the end of the wait", until_gone(b.backend.clone(), place.ticket)).await;
}

async fn a_waiter_wakes_when_the_ticket_leaves(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    for _ in 0..5 {
        let place = a.join(&line("x")).await;
        // From another client and from the leaver's own.
        let mut waits = [&b, &a].map(|w| spawn(until_gone(w.backend.clone(), place.ticket.clone())));
        sleep(SETTLE).await;
        assert!(waits.iter().all(|w| !w.0.is_finished()), "the ticket stands");
        a.leave(&place.ticket).await;
        for wait in &mut waits {
            wait.soon("the wake-up").await;
        }
    }
}

async fn a_waiter_wakes_when_the_lease_is_revoked(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let lease = keep(&a.backend).await;
    let place = a.enqueue(&Enqueue { lease: lease.id.clone(), ..a.entry(&line("x")) }).await;
    let mut wait = spawn(until_gone(b.backend.clone(), place.ticket));
    sleep(SETTLE).await;
    a.backend.revoke(&lease.id).await.expect("revoking works");
    wait.soon("the wake-up").await;
}

async fn a_waiter_wakes_when_the_lease_expires_and_not_before(clients: Arc<dyn Clients>) {
    let (a, dying) = (actor(&clients).await, client(&clients).await);
    let (lease, expiry) = short(&clients, &dying).await;
    let entry = Enqueue { lease, ..a.entry(&line("x")) };
    let place = dying.enqueue(&entry).await.expect("joining works").expect("a place");
    // Nothing else happens in the store: the wake-up must come by itself.
    let wait = until_gone(a.backend.clone(), place.ticket);
    within(expiry.patience(), "the wake-up", wait).await;
    expiry.assert_now("the ticket");
}

async fn a_waiter_sleeps_while_the_ticket_stands_renewed(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let sent = Instant::now();
    let lease = a.backend.grant(clients.ttl()).await.expect("a lease is granted");
    let place = a.enqueue(&Enqueue { lease: lease.id.clone(), ..a.entry(&line("x")) }).await;
    let wait = spawn(until_gone(b.backend.clone(), place.ticket));
    while sent.elapsed() < clients.ttl() * 2 + a.backend.profile().expiry_lag {
        sleep(clients.ttl() / 3).await;
        a.backend.renew(&lease.id).await.expect("the lease stands while it is renewed");
        assert!(!wait.0.is_finished(), "the waiter believes a renewed ticket to be gone");
    }
}

async fn no_wake_up_is_lost_between_look_and_wait(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    for round in 0..60 {
        let place = a.join(&line("x")).await;
        let mut wait = spawn(until_gone(b.backend.clone(), place.ticket.clone()));
        // Sweeps the moment of leaving over the whole of establishing the wait.
        if round % 3 > 0 {
            sleep(Duration::from_micros(100 * round % 3_000)).await;
        }
        a.leave(&place.ticket).await;
        wait.soon("the wake-up").await;
    }
}

async fn all_waiters_of_one_ticket_wake(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let place = a.join(&line("x")).await;
    let mut waits: Vec<_> = (0..10)
        .map(|i| spawn(until_gone(if i % 2 == 0 { &a } else { &b }.backend.clone(), place.ticket.clone())))
        .collect();
    sleep(SETTLE).await;
    a.leave(&place.ticket).await;
    for wait in &mut waits {
        wait.soon("the wake-up").await;
    }
}

async fn leaving_wakes_nobody_who_waits_for_another(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let (first, second) = (a.join(&line("x")).await, a.join(&line("x")).await);
    let third = b.join(&line("x")).await;
    assert_eq!(third.ahead.first(), Some(&second.ticket));
    let mut wait = spawn(until_gone(b.backend.clone(), second.ticket.clone()));
    sleep(SETTLE).await;
    a.leave(&first.ticket).await;
    for i in 0..10 {
        let other = a.join(&line(&format!("other-{i}"))).await;
        a.leave(&other.ticket).await;
    }
    sleep(QUIET).await;
    assert!(!wait.0.is_finished(), "the second still stands");
    a.leave(&second.ticket).await;
    wait.soon("the wake-up").await;
}

async fn a_dropped_wait_harms_nobody(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let place = a.join(&line("x")).await;
    for millis in [0, 1, 5, 50] {
        let ended = timeout(Duration::from_millis(millis), b.backend.gone(&place.ticket)).await;
        // `gone` may return early, but not every time.
        assert!(ended.is_err() || millis < 50, "{ended:?}");
    }
    let mut wait = spawn(until_gone(b.backend.clone(), place.ticket.clone()));
    let dropped = spawn(until_gone(b.backend.clone(), place.ticket.clone()));
    sleep(SETTLE).await;
    drop(dropped);
    a.leave(&place.ticket).await;
    wait.soon("the wake-up, although another wait was dropped").await;
}

async fn twenty_waiters_are_served_in_order(clients: Arc<dyn Clients>) {
    let crowd: [Actor; 4] = actors(&clients).await;
    let inside = Arc::new(AtomicUsize::new(0));
    let served = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    let mut tokens = Vec::new();
    for i in 0..20 {
        let (backend, entry) = (crowd[i % 4].backend.clone(), crowd[i % 4].entry(&line("x")));
        let (inside, served) = (inside.clone(), served.clone());
        let place = crowd[i % 4].enqueue(&entry).await;
        tokens.push(place.token);
        tasks.push(spawn(async move {
            let mut ahead = place.ahead;
            while let Some(nearest) = ahead.first() {
                backend.gone(nearest).await.expect("waiting works");
                ahead = backend.look(&place.ticket, 1).await.expect("looking works").expect("the ticket stands").ahead;
            }
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two are first at once");
            served.lock().expect("nobody panics inside").push(place.token);
            tokio::task::yield_now().await;
            inside.fetch_sub(1, Ordering::SeqCst);
            crate::support::write(&backend, [quorate_core::Write::Leave(place.ticket)]).await;
        }));
    }
    for task in &mut tasks {
        task.soon("the next grant").await;
    }
    assert_eq!(*served.lock().expect("nobody panics inside"), tokens, "grants follow arrival");
}
