//! Tickets: one per nonce, gone for good once gone, and a fence for writes while they stand.

use std::{sync::Arc, time::Duration};

use quorate_core::{Check, Enqueue, ErrorKind, Nonce, Revision, Write};
use tokio::time::sleep;

use crate::{
    Clients,
    support::{
        SOON, actor, cases, client, commit, eventually, get, keep, key, line, poll_and_drop, put, refused, short,
        standing, txn, value,
    },
};

cases!("ticket":
    repeating_with_the_same_nonce_gives_the_same_place,
    a_join_dropped_half_way_can_be_repeated,
    one_lease_may_hold_several_tickets,
    a_ticket_that_left_is_gone,
    a_ticket_on_a_revoked_lease_is_gone,
    a_ticket_on_an_expired_lease_is_gone_for_its_owner,
    joining_on_an_ended_lease_is_refused,
    leaving_takes_only_that_ticket,
    a_standing_ticket_lets_a_write_through,
    a_fenced_write_is_refused_after_leaving,
    a_fenced_write_is_refused_after_the_lease_ended,
    a_fenced_write_is_refused_with_another_token,
    release_happens_once,
);

async fn repeating_with_the_same_nonce_gives_the_same_place(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let first = a.join(&line("x")).await;
    let entry = a.entry(&line("x"));
    let place = a.enqueue(&entry).await;
    let behind = a.join(&line("x")).await;
    for _ in 0..3 {
        assert_eq!(a.enqueue(&entry).await, place, "the place of the first call");
    }
    let order = [first.ticket.clone(), place.ticket.clone(), behind.ticket];
    assert_eq!(a.tickets(&line("x")).await, order, "no second ticket");
    // The place is the same, who stands ahead is as of now.
    a.leave(&first.ticket).await;
    let moved = a.enqueue(&entry).await;
    assert_eq!((moved.ticket, moved.token, moved.ahead), (place.ticket, place.token, vec![]));
    // Nonce and lease name an attempt only together, and only within one line.
    let other = keep(&a.backend).await;
    let elsewhere = a.enqueue(&Enqueue { line: line("y"), ..entry.clone() }).await;
    assert_eq!(elsewhere.ahead, []);
    let another = a.enqueue(&Enqueue { lease: other.id.clone(), ..entry }).await;
    assert_eq!(a.tickets(&line("x")).await.len(), 3);
    assert!(another.token > elsewhere.token);
}

async fn a_join_dropped_half_way_can_be_repeated(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    for polls in 0..6 {
        let line = line(&polls.to_string());
        let entry = a.entry(&line);
        poll_and_drop(polls, a.backend.enqueue(&entry)).await;
        let place = a.enqueue(&entry).await;
        assert_eq!(place.ahead, [], "one's own attempt does not stand in the way, after {polls} polls");
        sleep(Duration::from_millis(50)).await;
        eventually("there is one ticket", || async { a.tickets(&line).await == [place.ticket.clone()] }).await;
        assert_eq!(a.look(&place.ticket, 1).await, place);
    }
}

async fn one_lease_may_hold_several_tickets(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let (first, second) = (a.join(&line("x")).await, a.join(&line("x")).await);
    assert_ne!(first.ticket, second.ticket);
    assert_eq!(second.ahead, [first.ticket.clone()], "a ticket excludes also its owner's next one");
    a.leave(&first.ticket).await;
    assert_eq!(a.look(&second.ticket, 1).await.ahead, [], "the second was not taken along");
}

async fn a_ticket_that_left_is_gone(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let place = a.join(&line("x")).await;
    a.leave(&place.ticket).await;
    assert_eq!(a.backend.look(&place.ticket, 1).await.expect("looking works"), None);
    a.join(&line("x")).await;
    assert_eq!(a.backend.look(&place.ticket, 1).await.expect("looking works"), None, "a later ticket is another");
}

async fn a_ticket_on_a_revoked_lease_is_gone(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let lease = keep(&a.backend).await;
    let place = a.enqueue(&Enqueue { lease: lease.id.clone(), ..a.entry(&line("x")) }).await;
    let behind = a.join(&line("x")).await;
    a.backend.revoke(&lease.id).await.expect("revoking works");
    assert_eq!(a.backend.look(&place.ticket, 1).await.expect("looking works"), None);
    assert_eq!(a.look(&behind.ticket, 1).await.ahead, []);
}

async fn a_ticket_on_an_expired_lease_is_gone_for_its_owner(clients: Arc<dyn Clients>) {
    let (a, dying) = (actor(&clients).await, client(&clients).await);
    let (lease, expiry) = short(&clients, &dying).await;
    let entry = Enqueue { lease, ..a.entry(&line("x")) };
    let place = dying.enqueue(&entry).await.expect("joining works").expect("a place");
    let behind = a.join(&line("x")).await;
    sleep(expiry.patience() - SOON).await;
    assert_eq!(dying.look(&place.ticket, 1).await.expect("looking works"), None, "a dead waiter is never first");
    assert_eq!(a.look(&behind.ticket, 1).await.ahead, []);
    assert_eq!(a.tickets(&line("x")).await, [behind.ticket]);
}

async fn joining_on_an_ended_lease_is_refused(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let ended = keep(&a.backend).await;
    a.backend.revoke(&ended.id).await.expect("revoking works");
    for when_free in [false, true] {
        let entry = Enqueue { when_free, lease: ended.id.clone(), ..a.entry(&line("x")) };
        refused(a.backend.enqueue(&entry).await, ErrorKind::SessionLost, "joining on an ended lease");
    }
    assert_eq!(a.tickets(&line("x")).await, []);
}

async fn leaving_takes_only_that_ticket(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let mut places = Vec::new();
    for name in ["x", "x", "x", "y"] {
        places.push(a.join(&line(name)).await);
    }
    a.leave(&places[0].ticket).await;
    // A second release of the same hold must not free the next holder's.
    a.leave(&places[0].ticket).await;
    assert_eq!(a.tickets(&line("x")).await, [places[1].ticket.clone(), places[2].ticket.clone()]);
    assert_eq!(a.tickets(&line("y")).await, [places[3].ticket.clone()]);
}

async fn a_standing_ticket_lets_a_write_through(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let (first, second) = (a.join(&line("x")).await, a.join(&line("x")).await);
    // Standing says nothing about being first; that was learnt before and cannot be unlearnt.
    for (place, content) in [(&first, "1"), (&second, "2")] {
        assert!(commit(&a.backend, [standing(place)], [put(&key("a"), content)]).await.applied);
        assert_eq!(value(&a.backend, &key("a")).await.as_deref(), Some(content.as_bytes()));
    }
    let twice = commit(&a.backend, [standing(&first), standing(&first)], [put(&key("a"), "3")]).await;
    assert!(twice.applied, "a check may be repeated");
}

async fn a_fenced_write_is_refused_after_leaving(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let place = a.join(&line("x")).await;
    a.leave(&place.ticket).await;
    a.join(&line("x")).await;
    let late = commit(&a.backend, [standing(&place)], [put(&key("a"), "late")]).await;
    assert_eq!(late.culprit, Some(0));
    assert_eq!(get(&a.backend, &key("a")).await, None);
}

async fn a_fenced_write_is_refused_after_the_lease_ended(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let (lease, expiry) = short(&clients, &a.backend).await;
    let expired = a.enqueue(&Enqueue { lease, ..a.entry(&line("x")) }).await;
    let kept = keep(&a.backend).await;
    let revoked = a.enqueue(&Enqueue { lease: kept.id.clone(), ..a.entry(&line("x")) }).await;
    a.backend.revoke(&kept.id).await.expect("revoking works");
    sleep(expiry.patience() - SOON).await;
    for place in [expired, revoked] {
        let late = commit(&a.backend, [standing(&place)], [put(&key("a"), "late")]).await;
        assert_eq!(late.culprit, Some(0), "{place:?}");
    }
    assert_eq!(get(&a.backend, &key("a")).await, None);
}

async fn a_fenced_write_is_refused_with_another_token(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let place = a.join(&line("x")).await;
    for token in [place.token.0 - 1, place.token.0 + 1, 0] {
        let check = Check::Standing { ticket: place.ticket.clone(), token: Revision(token) };
        let answer = commit(&a.backend, [check], [put(&key("a"), "wrong")]).await;
        assert_eq!(answer.culprit, Some(0), "token {token}, the ticket's is {}", place.token);
    }
    assert_eq!(get(&a.backend, &key("a")).await, None);
}

async fn release_happens_once(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let place = a.join(&line("x")).await;
    let release = || txn([standing(&place)], [Write::Leave(place.ticket.clone())]);
    let answer = a.backend.commit(&release()).await.expect("a release is answered");
    assert!(answer.applied);
    let next = a.enqueue(&Enqueue { nonce: Nonce::random(), ..a.entry(&line("x")) }).await;
    let again = a.backend.commit(&release()).await.expect("a release is answered");
    assert_eq!((again.applied, again.culprit), (false, Some(0)), "the caller learns that it held nothing");
    assert_eq!(a.tickets(&line("x")).await, [next.ticket]);
}
