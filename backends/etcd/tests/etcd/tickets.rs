//! The keys of tickets: used again, but never for two tickets at once, and never when in doubt.

use std::sync::Arc;

use etcd_client::{Client, PutOptions};
use quorate_core::{Backend as _, Enqueue, ErrorKind, LeaseId, Ticket, TicketKind};
use quorate_testkit::{proxy::FaultProxy, servers::Server};
use tokio::time::{Duration, sleep};

use super::support::{connect, entry, join, lease, leave, line, release, server, spawn_gone, until, watchers, within};

/// The stored key of a ticket in the line `job`.
fn stored(ticket: &Ticket) -> String {
    format!("app/{}/{}", ticket.line, ticket.name.rsplit_once('@').unwrap().0)
}

async fn raw(server: &Server) -> Client {
    Client::connect([server.addr().to_string()], None).await.unwrap()
}

fn number(lease: &LeaseId) -> i64 {
    i64::from_str_radix(lease.as_str(), 16).unwrap()
}

#[tokio::test]
async fn one_after_another_tickets_share_a_key_and_no_name() {
    let server = server().await;
    let etcd = connect(server.addr()).await;
    let lease = lease(&etcd).await;
    let mut names = std::collections::HashSet::new();
    let mut keys = std::collections::HashSet::new();
    for round in 0..30 {
        let place = join(&etcd, "job", &lease).await;
        assert!(names.insert(place.ticket.name.clone()), "a name was used twice");
        keys.insert(stored(&place.ticket));
        if round % 2 == 0 {
            assert!(etcd.commit(&release(&place)).await.unwrap().applied);
        } else {
            leave(&etcd, &place.ticket).await;
        }
        let late = etcd.commit(&release(&place)).await.unwrap();
        assert!(!late.applied, "a release happens once");
    }
    assert_eq!(keys.len(), 1, "etcd's index grows with every key until it is compacted");
    let read = Enqueue { kind: TicketKind::Read, ..entry("job", &lease) };
    let read = etcd.enqueue(&read).await.unwrap().unwrap();
    assert!(!keys.contains(&stored(&read.ticket)), "the kind is part of the key");
}

#[tokio::test]
async fn leaving_an_old_ticket_does_not_touch_the_new_one_under_its_key() {
    let server = server().await;
    let etcd = connect(server.addr()).await;
    let lease = lease(&etcd).await;
    let old = join(&etcd, "job", &lease).await;
    leave(&etcd, &old.ticket).await;
    let new = join(&etcd, "job", &lease).await;
    assert_eq!(stored(&old.ticket), stored(&new.ticket));
    leave(&etcd, &old.ticket).await;
    assert!(!etcd.commit(&release(&old)).await.unwrap().applied);
    assert_eq!(etcd.look(&old.ticket, 1).await.unwrap(), None);
    within("the old one is gone", etcd.gone(&old.ticket)).await.unwrap();
    assert_eq!(etcd.line(&line("job")).await.unwrap().tickets, [new.ticket.clone()]);
    assert!(etcd.commit(&release(&new)).await.unwrap().applied);
}

#[tokio::test]
async fn leaving_an_old_ticket_again_does_not_touch_one_in_doubt_under_its_key() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    let lease = lease(&etcd).await;
    let old = join(&etcd, "job", &lease).await;
    leave(&etcd, &old.ticket).await;
    let entry = entry("job", &lease);
    proxy.cut_after_forward_of("app/lock/job", 1);
    assert_eq!(etcd.enqueue(&entry).await.expect_err("the answer was lost").kind(), ErrorKind::Ambiguous);
    leave(&etcd, &old.ticket).await;
    let new = etcd.enqueue(&entry).await.unwrap().unwrap();
    assert_eq!(stored(&old.ticket), stored(&new.ticket));
    leave(&etcd, &old.ticket).await;
    assert!(!etcd.commit(&release(&old)).await.unwrap().applied);
    assert_eq!(etcd.look(&old.ticket, 1).await.unwrap(), None);
    assert_eq!(etcd.enqueue(&entry).await.unwrap().unwrap(), new, "its place is what it was");
    assert_eq!(etcd.line(&line("job")).await.unwrap().tickets, [new.ticket.clone()]);
}

#[tokio::test]
async fn a_ticket_removed_by_somebody_else_does_not_give_its_key_away() {
    let server = server().await;
    let (etcd, operator) = (connect(server.addr()).await, connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let first = join(&etcd, "job", &lease).await;
    assert!(operator.commit(&release(&first)).await.unwrap().applied);
    assert!(!etcd.commit(&release(&first)).await.unwrap().applied);
    let second = join(&etcd, "job", &lease).await;
    assert_ne!(stored(&first.ticket), stored(&second.ticket));
    assert_eq!(second.ahead, []);
}

#[tokio::test]
async fn a_key_thought_unused_that_is_taken_is_given_up() {
    let server = server().await;
    let etcd = connect(server.addr()).await;
    let lease = lease(&etcd).await;
    let first = join(&etcd, "job", &lease).await;
    leave(&etcd, &first.ticket).await;
    // Nobody should, but another process could.
    raw(&server).await.put(stored(&first.ticket), "theirs", None).await.unwrap();
    let second = join(&etcd, "job", &lease).await;
    assert_ne!(stored(&first.ticket), stored(&second.ticket));
    let [theirs] = second.ahead.as_slice() else { panic!("{second:?}") };
    assert_eq!(stored(theirs), stored(&first.ticket));
    let free = Enqueue { when_free: true, ..entry("job", &lease) };
    assert_eq!(etcd.enqueue(&free).await.unwrap(), None);
}

#[tokio::test]
async fn a_create_that_lands_after_its_ticket_was_given_up_is_deleted_by_leaving_again() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let etcd = connect(proxy.addr()).await;
    let lease = lease(&etcd).await;
    let entry = entry("job", &lease);
    proxy.cut_after_forward_of("app/lock/job", 1);
    assert_eq!(etcd.enqueue(&entry).await.expect_err("the answer was lost").kind(), ErrorKind::Ambiguous);
    let place = etcd.enqueue(&entry).await.unwrap().unwrap();
    leave(&etcd, &place.ticket).await;
    // What a request that was held up on its way would do.
    let options = PutOptions::new().with_lease(number(&lease));
    raw(&server).await.put(stored(&place.ticket), "late", Some(options)).await.unwrap();
    let next = join(&etcd, "job", &lease).await;
    assert_ne!(stored(&next.ticket), stored(&place.ticket), "a key in doubt is not used again");
    assert_eq!(next.ahead.len(), 1);
    leave(&etcd, &place.ticket).await;
    assert_eq!(etcd.look(&next.ticket, 1).await.unwrap().unwrap().ahead, []);
}

#[tokio::test]
async fn a_foreign_key_that_is_made_again_is_another_ticket() {
    let server = server().await;
    let etcd = Arc::new(connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let mut theirs = raw(&server).await;
    // A session of Go's client uses one key for all its locks of a name.
    let key = "app/lock/job/694d7d9f51a2";
    theirs.put(key, "", None).await.unwrap();
    let ours = join(&etcd, "job", &lease).await;
    let gone = spawn_gone(&etcd, &ours.ahead[0]);
    until("it waits", || async { watchers(server.addr()).await == 1 }).await;
    theirs.delete(key, None).await.unwrap();
    theirs.put(key, "", None).await.unwrap();
    within("the wait ends", gone).await.unwrap().unwrap();
    assert_eq!(etcd.look(&ours.ticket, 1).await.unwrap().unwrap().ahead, [], "the new one stands behind");
    within("the old one is gone for good", etcd.gone(&ours.ahead[0])).await.unwrap();
    let tickets = etcd.line(&line("job")).await.unwrap().tickets;
    assert_eq!((&tickets[0], tickets.len()), (&ours.ticket, 2));
    assert_ne!(tickets[1], ours.ahead[0]);
    let waiting = spawn_gone(&etcd, &tickets[1]);
    sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished(), "and stands");
    waiting.abort();
}
