//! Services: registered, found, updated, and gone when they should be.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    Coordinator, Error, ErrorKind, KeyRange, Result,
    balance::{Balancer, Strategy},
    discovery::{DiscoverOptions, Health, Instance, Instances, PresenceState, Registry, Service, service_dir},
    layer::{Op, Stack, Wrap},
};
use tokio::time::{Instant, sleep};

use super::{coord, coord_over, short_coord};
use crate::{
    Clients, Outcome,
    support::{QUIET, SOON, cases, client, eventually, put, refused, spawn, within},
};

cases!("discovery":
    an_instance_is_found_as_it_was_registered,
    services_of_similar_names_do_not_mix,
    a_consumer_sees_changes_as_they_come,
    the_last_of_many_updates_is_what_is_found,
    a_closed_registration_is_not_found_and_closing_twice_changes_nothing,
    a_dropped_registration_is_withdrawn,
    a_registration_closed_at_once_leaves_nothing,
    a_dead_process_is_found_until_its_ttl_and_not_longer,
    a_lost_session_is_followed_by_a_new_registration,
    a_record_deleted_behind_our_back_is_made_again,
    of_two_with_one_id_the_newer_is_found_and_the_other_is_told,
    registering_again_replaces_and_dropping_the_former_leaves_the_new_one,
    instances_that_could_not_work_are_refused,
    a_record_that_cannot_be_read_is_left_out_and_told,
    many_instances_are_found_completely,
    bystanders_of_a_closing_coordinator_stay,
    a_balancer_follows_a_service,
);

/// At once what the server shows: the cases do not wait for what may come back.
pub(super) async fn follow(coord: &Coordinator, service: &str) -> Service {
    let mut options = DiscoverOptions::default();
    options.linger = Duration::ZERO;
    coord.discover_with(service, &options).await.expect("a service can be followed")
}

pub(super) async fn until(service: &Service, what: &str, condition: impl FnMut(&Instances) -> bool) -> Instances {
    within(SOON, what, service.until(condition)).await
}

fn ids(instances: &Instances) -> Vec<String> {
    instances.iter().map(|instance| instance.id.clone()).collect()
}

pub(super) async fn registered(coord: &Coordinator, instance: Instance) -> quorate_core::discovery::Registration {
    let registration = coord.register(instance).expect("it may be registered");
    within(SOON, "the registration", registration.ready()).await.expect("nobody objects");
    registration
}

/// Sends nothing any more once it is dead.
#[derive(Debug)]
pub(super) struct Mortal(pub(super) Arc<AtomicBool>);

impl Wrap for Mortal {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        if self.0.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Unavailable, op.verb.as_str(), "dead on purpose"));
        }
        call().await
    }
}

async fn an_instance_is_found_as_it_was_registered(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let full = Instance::new("orders", "10.0.0.7:8080")
        .id("orders-7")
        .tag("v2")
        .tag("é, with blanks")
        .meta("build", "abc")
        .meta("long", "x".repeat(2000))
        .meta("odd name / ü", "line\nbreak \"quoted\"")
        .weight(7)
        .zone("eu-1");
    let hostile = Instance::new("orders", "[::1]:1").id("a/b ..%2F🦀\u{1}");
    let mut failing = Instance::new("orders", "db.internal").id("no-port");
    failing.health = Health::Failing;
    let mut kept = Vec::new();
    for instance in [&full, &hostile, &failing] {
        kept.push(registered(&a, instance.clone()).await);
    }
    let orders = follow(&b, "orders").await;
    let now = until(&orders, "all three", |now| now.len() == 3).await;
    for instance in [&full, &hostile, &failing] {
        assert_eq!(now.get(&instance.id).map(|found| &**found), Some(instance));
    }
    assert_eq!(now.passing().count(), 2);
    assert_eq!(now.tagged("v2").count(), 1);
    assert_eq!(now.in_zone("eu-1").count(), 1);
    assert!(now.stale_since().is_none() && now.unreadable().len() == 0);
    // A consumer that comes later has everything at its first look.
    assert_eq!(follow(&a, "orders").await.now().len(), 3);
}

async fn services_of_similar_names_do_not_mix(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let mut kept = Vec::new();
    let names = ["foo", "foo_other", "foo/bar", "Foo", "foo."];
    for name in names {
        kept.push(registered(&coord, Instance::new(name, "h:1").id(name)).await);
    }
    for name in names {
        let now = follow(&coord, name).await;
        let now = until(&now, "its instance", |now| !now.is_empty()).await;
        assert_eq!(ids(&now), [name]);
    }
    assert!(follow(&coord, "fo").await.now().is_empty());
}

async fn a_consumer_sees_changes_as_they_come(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let mut orders = follow(&b, "orders").await;
    assert!(within(SOON, "the first set", orders.changed()).await.is_empty());
    let one = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    assert_eq!(ids(&within(SOON, "the first instance", orders.changed()).await), ["1"]);
    let two = registered(&a, Instance::new("orders", "h:2").id("2")).await;
    let now = until(&orders, "the second instance", |now| now.len() == 2).await;
    let before = now.revision();
    one.update(|instance| instance.weight = 9).expect("a good weight");
    one.ready().await.expect("updated");
    let now = until(&orders, "the update", |now| now.get("1").is_some_and(|one| one.weight == 9)).await;
    assert!(now.len() == 2 && now.revision() > before, "an update replaces and does not add");
    two.drain().expect("draining is an update");
    until(&orders, "the draining", |now| now.get("2").is_some_and(|two| two.health == Health::Draining)).await;
    two.close().await.expect("closed");
    assert_eq!(ids(&until(&orders, "the end of the second", |now| now.len() == 1).await), ["1"]);
}

async fn the_last_of_many_updates_is_what_is_found(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let registration = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    let orders = follow(&b, "orders").await;
    for round in 1..=50 {
        registration.update(|instance| instance.weight = round).expect("a good weight");
        if round % 10 == 0 {
            tokio::task::yield_now().await;
        }
    }
    within(SOON, "the update", registration.ready()).await.expect("updated");
    until(&orders, "the last update", |now| now.get("1").is_some_and(|one| one.weight == 50)).await;
    sleep(QUIET).await;
    assert_eq!(orders.now().get("1").expect("still there").weight, 50, "no older update comes back");
    refused(registration.update(|instance| instance.id = "2".into()), ErrorKind::InvalidInput, "another id");
    refused(registration.update(|instance| instance.weight = 0), ErrorKind::InvalidInput, "a weight of zero");
    assert_eq!(registration.instance().weight, 50, "a refused update changes nothing");
}

async fn a_closed_registration_is_not_found_and_closing_twice_changes_nothing(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let registration = registered(&coord, Instance::new("orders", "h:1")).await;
    let orders = follow(&coord, "orders").await;
    until(&orders, "the instance", |now| now.len() == 1).await;
    let mut states = registration.states();
    for _ in 0..2 {
        within(SOON, "closing", registration.close()).await.expect("closed");
    }
    until(&orders, "its end", Instances::is_empty).await;
    refused(registration.update(|_| {}), ErrorKind::SessionLost, "an update of what was closed");
    refused(registration.ready().await, ErrorKind::SessionLost, "waiting for what was closed");
    let mut last = None;
    while let Some(state) = within(SOON, "the final state", states.next()).await {
        last = Some(state);
    }
    assert!(matches!(last, Some(PresenceState::Closed)));
    // The id is free again.
    let _again = registered(&coord, Instance::new("orders", "h:1")).await;
    until(&orders, "the new registration", |now| now.len() == 1).await;
}

async fn a_dropped_registration_is_withdrawn(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let registration = registered(&coord, Instance::new("orders", "h:1")).await;
    let orders = follow(&coord, "orders").await;
    until(&orders, "the instance", |now| now.len() == 1).await;
    drop(registration);
    until(&orders, "its end", Instances::is_empty).await;
}

async fn a_registration_closed_at_once_leaves_nothing(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    for round in 0..5 {
        let registration = coord.register(Instance::new("orders", "h:1")).expect("good");
        // Dropped or closed, at several points of its beginning.
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        if round % 2 == 0 {
            within(SOON, "closing", registration.close()).await.expect("closed");
        }
    }
    let orders = follow(&coord, "orders").await;
    until(&orders, "an empty service", Instances::is_empty).await;
    sleep(QUIET).await;
    assert!(orders.now().is_empty(), "a late write of a closed registration stayed");
}

async fn a_dead_process_is_found_until_its_ttl_and_not_longer(clients: Arc<dyn Clients>) {
    let b = coord(&clients).await;
    let dead = Arc::new(AtomicBool::new(false));
    let mortal = Stack::new(client(&clients).await).with(Mortal(dead.clone())).build();
    let a = coord_over(mortal, clients.ttl());
    let _registration = registered(&a, Instance::new("orders", "h:1")).await;
    let session = a.session().await.expect("a session");
    let orders = follow(&b, "orders").await;
    until(&orders, "the instance", |now| now.len() == 1).await;
    let deadline = session.deadline();
    dead.store(true, Ordering::Release);
    let limit = session.ttl() + b.profile().expiry_lag + SOON;
    within(limit, "its end", orders.until(Instances::is_empty)).await;
    assert!(Instant::now() >= deadline, "gone before the session could end");
}

async fn a_lost_session_is_followed_by_a_new_registration(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let registration = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    let orders = follow(&b, "orders").await;
    until(&orders, "the instance", |now| now.len() == 1).await;
    let session = a.session().await.expect("a session");
    a.backend().revoke(session.lease()).await.expect("revoked behind its back");
    let limit = session.ttl() + SOON;
    within(limit, "its end", orders.until(Instances::is_empty)).await;
    within(limit, "its return", orders.until(|now| now.len() == 1)).await;
    within(limit, "the registration's knowledge of it", registration.ready()).await.expect("registered");
    let now = a.session().await.expect("a new session");
    assert_ne!(now.lease(), session.lease());
    assert_eq!(ids(&orders.now()), ["1"], "once, under the same id");
}

async fn a_record_deleted_behind_our_back_is_made_again(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let instance = Instance::new("orders", "h:1").id("1");
    let _registration = registered(&a, instance.clone()).await;
    let orders = follow(&b, "orders").await;
    until(&orders, "the instance", |now| now.len() == 1).await;
    let session = a.session().await.expect("a session");
    match b.backend().registry() {
        Registry::Keys(_) => {
            let dir = service_dir("orders").expect("a good name");
            let key = quorate_core::Key::new(&dir, "1").expect("a good name");
            let delete = quorate_core::Write::Delete(key);
            crate::support::write(b.backend(), [delete]).await;
        }
        Registry::Native(_) => {
            // Only the client that has the lease may take its record away.
            let Registry::Native(own) = a.backend().registry() else { unreachable!("one backend, one answer") };
            own.withdraw(session.lease(), &instance).await.expect("withdrawn");
        }
    }
    let limit = session.ttl() + SOON;
    within(limit, "its end", orders.until(Instances::is_empty)).await;
    within(limit, "its return", orders.until(|now| now.len() == 1)).await;
    assert_eq!(a.session().await.expect("a session").lease(), session.lease(), "the session was not at fault");
}

async fn of_two_with_one_id_the_newer_is_found_and_the_other_is_told(clients: Arc<dyn Clients>) {
    let (a, b, c) = (short_coord(&clients).await, short_coord(&clients).await, coord(&clients).await);
    let older = registered(&a, Instance::new("orders", "old:1").id("1")).await;
    let newer = registered(&b, Instance::new("orders", "new:1").id("1")).await;
    let orders = follow(&c, "orders").await;
    until(&orders, "the newer", |now| now.get("1").is_some_and(|one| one.address == "new")).await;
    eventually("the older is told", async || matches!(older.state(), PresenceState::Displaced)).await;
    sleep(QUIET).await;
    assert_eq!(orders.now().get("1").expect("there").address, "new", "they do not fight");
    assert_eq!(orders.now().len(), 1);
    newer.close().await.expect("closed");
    until(&orders, "the older again", |now| now.get("1").is_some_and(|one| one.address == "old")).await;
    eventually("the older is told", async || matches!(older.state(), PresenceState::Present)).await;
}

async fn registering_again_replaces_and_dropping_the_former_leaves_the_new_one(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let orders = follow(&b, "orders").await;
    let mut former = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    for round in 2..=3 {
        let next = registered(&a, Instance::new("orders", "h:1").id("1").weight(round)).await;
        until(&orders, "the new one", |now| now.get("1").is_some_and(|one| one.weight == round)).await;
        eventually("the former is told", async || matches!(former.state(), PresenceState::Displaced)).await;
        // As `self.registration = …` does it: the new one is there before the old one goes.
        former = next;
    }
    // The other way round: dropped first, and the new one is there before the withdrawal is over.
    for round in 4..=9 {
        drop(former);
        former = registered(&a, Instance::new("orders", "h:1").id("1").weight(round)).await;
        sleep(Duration::from_millis(20)).await;
        assert!(matches!(former.state(), PresenceState::Present));
    }
    until(&orders, "the last one", |now| now.get("1").is_some_and(|one| one.weight == 9)).await;
    let fresh = follow(&a, "orders").await;
    assert_eq!(fresh.now().len(), 1, "taken away by the withdrawal of the one before");
    // Longer than the records are looked after: nobody writes the old one again, nobody takes the new one away.
    sleep(a.session_ttl()).await;
    assert_eq!(orders.now().get("1").expect("still there").weight, 9);
    assert!(matches!(former.state(), PresenceState::Present));
}

async fn instances_that_could_not_work_are_refused(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let good = Instance::new("orders", "h:1");
    for bad in [
        Instance::new("", "h:1"),
        Instance::new("orders", ""),
        good.clone().id(""),
        good.clone().id("x".repeat(quorate_core::MAX_NAME + 1)),
        good.clone().weight(0),
        good.clone().weight(u32::MAX),
        good.clone().meta("big", "x".repeat(coord.profile().max_value)),
    ] {
        refused(coord.register(bad).map(|_| ()), ErrorKind::InvalidInput, "a bad instance");
    }
    refused(coord.discover("").await.map(|_| ()), ErrorKind::InvalidInput, "a service without a name");
}

async fn a_record_that_cannot_be_read_is_left_out_and_told(clients: Arc<dyn Clients>) -> Outcome {
    let coord = coord(&clients).await;
    if let Registry::Native(_) = coord.backend().registry() {
        return Outcome::Refused("records are in the server's own catalog, which stores no others".to_owned());
    }
    let _good = registered(&coord, Instance::new("orders", "h:1").id("good")).await;
    let dir = service_dir("orders").expect("a good name");
    let bad = quorate_core::Key::new(&dir, "bad").expect("a good name");
    crate::support::write(coord.backend(), [put(&bad, b"\xff{hunter2")]).await;
    let orders = follow(&coord, "orders").await;
    let now = until(&orders, "both records", |now| now.unreadable().len() == 1).await;
    assert_eq!(ids(&now), ["good"]);
    let (name, why) = now.unreadable().next().expect("one");
    assert!(name == "bad" && !why.contains("hunter2"), "{why}");
    let snapshot = crate::support::read(coord.backend(), &KeyRange::prefix(&dir, "good").expect("good")).await;
    crate::support::write(coord.backend(), [put(&bad, &snapshot.entries[0].value)]).await;
    let now = until(&orders, "the mended record", |now| now.unreadable().len() == 0).await;
    assert_eq!(ids(&now), ["bad", "good"]);
    Outcome::Passed
}

async fn many_instances_are_found_completely(clients: Arc<dyn Clients>) {
    const EACH: usize = 25;
    let (a, b, c) = (coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let orders = follow(&c, "orders").await;
    let mut registering: Vec<_> = [a, b]
        .into_iter()
        .enumerate()
        .map(|(client, coord)| {
            spawn(async move {
                let mut kept = Vec::new();
                for i in 0..EACH {
                    kept.push(coord.register(Instance::new("orders", format!("h{client}:{}", i + 1))).expect("good"));
                }
                for registration in &kept {
                    within(Duration::from_secs(30), "a registration", registration.ready()).await.expect("registered");
                }
                kept
            })
        })
        .collect();
    let mut kept = Vec::new();
    for task in &mut registering {
        kept.extend(within(Duration::from_secs(40), "all registrations", &mut task.0).await.expect("no task fails"));
    }
    until(&orders, "all instances", |now| now.len() == 2 * EACH).await;
    assert_eq!(follow(&c, "orders").await.now().len(), 2 * EACH);
    for registration in kept.drain(..EACH) {
        drop(registration);
    }
    until(&orders, "half of them gone", |now| now.len() == EACH).await;
}

async fn bystanders_of_a_closing_coordinator_stay(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let gone = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    let _stays = registered(&b, Instance::new("orders", "h:2").id("2")).await;
    let orders = follow(&b, "orders").await;
    until(&orders, "both", |now| now.len() == 2).await;
    a.close().await.expect("closed");
    assert_eq!(ids(&until(&orders, "one", |now| now.len() == 1).await), ["2"]);
    eventually("the registration is told", async || matches!(gone.state(), PresenceState::Closed)).await;
}

async fn a_balancer_follows_a_service(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let orders = follow(&b, "orders").await;
    let balancer = Balancer::new(Strategy::RoundRobin);
    balancer.follow(&orders);
    assert!(balancer.pick().is_none(), "no instance is a value");
    let picked = |count: usize| {
        let mut ids: Vec<String> = (0..count).filter_map(|_| balancer.pick().map(|pick| pick.id.clone())).collect();
        ids.sort();
        ids.dedup();
        ids
    };
    let one = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    let two = registered(&a, Instance::new("orders", "h:2").id("2")).await;
    eventually("both are picked", async || picked(4) == ["1", "2"]).await;
    one.drain().expect("draining is an update");
    eventually("what drains is left out", async || picked(4) == ["2"]).await;
    two.close().await.expect("closed");
    eventually("nobody is left", async || picked(4).is_empty()).await;
}
