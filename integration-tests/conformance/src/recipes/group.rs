//! Groups: joining, changing, leaving, and who is told what.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use quorate_core::{
    Coordinator, ErrorKind,
    group::{Group, GroupEvent, GroupEvents, Membership},
    layer::Stack,
};
use tokio::time::{Instant, timeout};

use super::{coord, coord_over, discovery::Mortal, short_coord};
use crate::{
    Clients,
    support::{QUIET, SOON, cases, client, eventually, refused, within},
};

cases!("group":
    members_come_change_and_go,
    each_event_is_told_once_and_only_news_are_told,
    groups_of_similar_names_do_not_mix,
    a_dead_member_leaves_after_its_ttl,
    a_member_on_a_new_session_is_told_as_gone_and_come,
    a_member_whose_session_was_lost_joins_again,
    a_restarted_member_replaces_its_former_self,
    an_unused_group_is_empty_and_bad_names_are_refused,
);

async fn joined(group: &Group, id: &str, payload: &'static str) -> Membership {
    let membership = group.join(id, payload).expect("it may join");
    within(SOON, "joining", membership.ready()).await.expect("nobody objects");
    membership
}

async fn next(events: &mut GroupEvents, what: &str) -> (&'static str, String) {
    match within(SOON, what, events.next()).await {
        GroupEvent::Joined(member) => ("joined", member.id.clone()),
        GroupEvent::Changed(member) => ("changed", member.id.clone()),
        GroupEvent::Left(member) => ("left", member.id.clone()),
    }
}

async fn ids(group: &Group) -> Vec<String> {
    group.members().await.expect("members").into_iter().map(|member| member.id).collect()
}

async fn members_come_change_and_go(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let (ours, theirs) = (a.group("workers"), b.group("workers"));
    let one = joined(&ours, "a/1 é", "\u{0}payload").await;
    let two = joined(&theirs, "b", "").await;
    eventually("both", async || ids(&ours).await == ["a/1 é", "b"]).await;
    let found = theirs.member("a/1 é").await.expect("answered").expect("a member");
    assert_eq!((found.payload, one.id()), (Bytes::from("\u{0}payload"), "a/1 é"));
    assert!(theirs.member("nobody").await.expect("answered").is_none());
    one.update("other").expect("a good payload");
    within(SOON, "the update", one.ready()).await.expect("updated");
    eventually("the update", async || {
        theirs.member("a/1 é").await.expect("answered").is_some_and(|m| m.payload == "other")
    })
    .await;
    one.leave().await.expect("left");
    one.leave().await.expect("leaving twice changes nothing");
    refused(one.update("late"), ErrorKind::SessionLost, "an update after leaving");
    eventually("one", async || ids(&theirs).await == ["b"]).await;
    drop(two);
    eventually("nobody", async || ids(&theirs).await.is_empty()).await;
}

async fn each_event_is_told_once_and_only_news_are_told(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let group = a.group("workers");
    let early = joined(&group, "early", "").await;
    let members = b.group("workers").follow().await.expect("followed");
    within(SOON, "the first set", members.until(|now| now.len() == 1)).await;
    let mut events = members.events();
    let one = joined(&group, "1", "x").await;
    assert_eq!(next(&mut events, "a join").await, ("joined", "1".to_owned()));
    one.update("y").expect("updated");
    assert_eq!(next(&mut events, "a change").await, ("changed", "1".to_owned()));
    let again = members.events();
    one.leave().await.expect("left");
    assert_eq!(next(&mut events, "an end").await, ("left", "1".to_owned()));
    early.update("z").expect("updated");
    assert_eq!(next(&mut events, "a change").await, ("changed", "early".to_owned()));
    assert!(timeout(QUIET, events.next()).await.is_err(), "nothing else has happened");
    // Another reader of the same members has its own place.
    let mut again = again;
    assert_eq!(next(&mut again, "an end").await, ("left", "1".to_owned()));
}

async fn groups_of_similar_names_do_not_mix(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let mut kept = Vec::new();
    let names = ["w", "w/x", "ww", "W"];
    for name in names {
        kept.push(joined(&coord.group(name), name, "").await);
    }
    for name in names {
        eventually("its member", async || ids(&coord.group(name)).await == [name]).await;
    }
}

async fn a_dead_member_leaves_after_its_ttl(clients: Arc<dyn Clients>) {
    let b = coord(&clients).await;
    let dead = Arc::new(AtomicBool::new(false));
    let a = coord_over(Stack::new(client(&clients).await).with(Mortal(dead.clone())).build(), clients.ttl());
    let _membership = joined(&a.group("workers"), "1", "").await;
    let members = b.group("workers").follow().await.expect("followed");
    within(SOON, "the member", members.until(|now| now.len() == 1)).await;
    let mut events = members.events();
    let session = a.session().await.expect("a session");
    let deadline = session.deadline();
    dead.store(true, Ordering::Release);
    let limit = session.ttl() + b.profile().expiry_lag + SOON;
    let event = within(limit, "its end", events.next()).await;
    assert!(matches!(event, GroupEvent::Left(member) if member.id == "1"));
    assert!(Instant::now() >= deadline, "gone before the session could end");
    assert!(b.group("workers").members().await.expect("answered").is_empty());
}

async fn a_member_on_a_new_session_is_told_as_gone_and_come(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let _membership = joined(&a.group("workers"), "1", "").await;
    let members = b.group("workers").follow().await.expect("followed");
    within(SOON, "the member", members.until(|now| now.len() == 1)).await;
    let session = a.session().await.expect("a session");
    // Nobody renews it any more, as after a crash; the process itself lives and joins again on a new session.
    session.orphan();
    let mut events = members.events();
    let limit = session.ttl() + b.profile().expiry_lag + SOON;
    // It replaces its former self at once, or after that has ended: balanced either way.
    let first = within(limit, "the end or the new beginning", events.next()).await;
    let GroupEvent::Left(gone) = first else { panic!("{first:?}") };
    let GroupEvent::Joined(back) = within(limit, "the return", events.next()).await else { panic!("no return") };
    assert!(back.session != gone.session && back.id == gone.id);
}

async fn a_member_whose_session_was_lost_joins_again(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let membership = joined(&a.group("workers"), "1", "x").await;
    let members = b.group("workers").follow().await.expect("followed");
    within(SOON, "the member", members.until(|now| now.len() == 1)).await;
    let session = a.session().await.expect("a session");
    a.backend().revoke(session.lease()).await.expect("revoked behind its back");
    let limit = session.ttl() + SOON;
    within(limit, "its end", members.until(|now| now.is_empty())).await;
    membership.update("while lost").expect("kept for later");
    within(limit, "its return", members.until(|now| now.get("1").is_some_and(|m| m.payload == "while lost"))).await;
}

async fn a_restarted_member_replaces_its_former_self(clients: Arc<dyn Clients>) {
    let (a, b, c) = (short_coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let former = joined(&a.group("workers"), "1", "former").await;
    let members = c.group("workers").follow().await.expect("followed");
    within(SOON, "the member", members.until(|now| now.len() == 1)).await;
    let _new = joined(&b.group("workers"), "1", "new").await;
    within(SOON, "the new one", members.until(|now| now.get("1").is_some_and(|m| m.payload == "new"))).await;
    // The end of the former one is not the end of the new one.
    drop(former);
    a.close().await.expect("closed");
    tokio::time::sleep(QUIET).await;
    assert_eq!(members.now().get("1").expect("still there").payload, "new");
}

async fn an_unused_group_is_empty_and_bad_names_are_refused(clients: Arc<dyn Clients>) {
    let coord: Coordinator = coord(&clients).await;
    assert!(coord.group("unused").members().await.expect("answered").is_empty());
    assert!(coord.group("unused").follow().await.expect("followed").now().is_empty());
    refused(coord.group("").members().await, ErrorKind::InvalidInput, "a group without a name");
    refused(coord.group("g").join("", "").map(drop), ErrorKind::InvalidInput, "a member without a name");
    let big = vec![0; coord.profile().max_value + 1];
    refused(coord.group("g").join("1", big).map(drop), ErrorKind::InvalidInput, "too large a payload");
}
