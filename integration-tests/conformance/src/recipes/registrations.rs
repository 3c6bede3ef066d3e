//! Registrations in trouble: rivals that die, sessions that end, requests that are lost or late.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use quorate_core::{
    Error, ErrorKind, Result,
    discovery::{Instance, Instances, PresenceState},
    layer::{Op, Stack, Verb, Wrap},
};
use tokio::time::{Instant, sleep};

use super::{
    coord, coord_over,
    discovery::{Mortal, follow, registered, until},
    late::Slow,
    short_coord, standard,
};
use crate::{
    Clients,
    support::{QUIET, SOON, cases, client, eventually, within},
};

cases!("discovery":
    when_the_newer_of_two_with_one_id_dies_the_older_takes_over,
    a_displaced_registration_leaves_the_record_alone_after_the_loss_of_its_session,
    an_update_never_revives_a_closed_registration,
    a_put_that_lands_after_the_withdrawal_is_taken_away_again,
    a_withdrawal_that_fails_is_repeated_until_the_record_is_gone,
);

fn is_at(instances: &Instances, address: &str) -> bool {
    instances.get("1").is_some_and(|one| one.address == address)
}

async fn when_the_newer_of_two_with_one_id_dies_the_older_takes_over(clients: Arc<dyn Clients>) {
    let (a, c) = (short_coord(&clients).await, coord(&clients).await);
    let dead = Arc::new(AtomicBool::new(false));
    let b = coord_over(Stack::new(client(&clients).await).with(Mortal(dead.clone())).build(), clients.ttl());
    let older = registered(&a, Instance::new("orders", "old:1").id("1")).await;
    let _newer = registered(&b, Instance::new("orders", "new:1").id("1")).await;
    let orders = follow(&c, "orders").await;
    until(&orders, "the newer", |now| is_at(now, "new")).await;
    eventually("the older is told", async || matches!(older.state(), PresenceState::Displaced)).await;
    let deadline = b.session().await.expect("a session").deadline();
    dead.store(true, Ordering::Release);
    // The older one lives, and renews its lease meanwhile: that must not keep the dead one's record up.
    let limit = clients.ttl() + c.profile().expiry_lag + SOON;
    within(limit, "the end of the newer", orders.until(|now| !is_at(now, "new"))).await;
    assert!(Instant::now() >= deadline, "it was replaced while its session could live");
    within(limit, "the older again", orders.until(|now| is_at(now, "old"))).await;
    eventually("the older knows", async || matches!(older.state(), PresenceState::Present)).await;
}

async fn a_displaced_registration_leaves_the_record_alone_after_the_loss_of_its_session(clients: Arc<dyn Clients>) {
    let (a, b, c) = (short_coord(&clients).await, short_coord(&clients).await, coord(&clients).await);
    let older = registered(&a, Instance::new("orders", "old:1").id("1")).await;
    let newer = registered(&b, Instance::new("orders", "new:1").id("1")).await;
    let orders = follow(&c, "orders").await;
    until(&orders, "the newer", |now| is_at(now, "new")).await;
    eventually("the older is told", async || matches!(older.state(), PresenceState::Displaced)).await;
    let lost = a.session().await.expect("a session");
    a.backend().revoke(lost.lease()).await.expect("revoked behind its back");
    within(SOON, "the loss", lost.lost()).await;
    // Long enough for a new session, and for a look at the record on it.
    let end = Instant::now() + clients.ttl() + QUIET;
    while Instant::now() < end {
        assert!(is_at(&orders.now(), "new"), "the one that was displaced took the record back");
        sleep(Duration::from_millis(10)).await;
    }
    assert!(matches!(newer.state(), PresenceState::Present), "{:?}", newer.state());
    newer.close().await.expect("closed");
    until(&orders, "the older, on its new session", |now| is_at(now, "old")).await;
}

async fn an_update_never_revives_a_closed_registration(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let registration = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    // Closed while the change is being made: the first poll deregisters.
    let late = registration.update(|instance| {
        assert!(registration.close().now_or_never().is_none());
        instance.weight = 7;
    });
    assert_eq!(late.expect_err("it was closed before it was changed").kind(), ErrorKind::SessionLost);
    within(SOON, "the end", registration.close()).await.expect("closed");
    let again = registration.update(|instance| instance.weight = 8).expect_err("it is closed");
    assert_eq!(again.kind(), ErrorKind::SessionLost);
    sleep(QUIET).await;
    assert!(follow(&b, "orders").await.now().is_empty());
}

async fn a_put_that_lands_after_the_withdrawal_is_taken_away_again(clients: Arc<dyn Clients>) {
    let slow = Slow::commits(&clients, 1).await;
    let (a, b) = (coord_over(standard(slow.clone()), Duration::from_secs(60)), coord(&clients).await);
    let registration = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    within(SOON, "the end", registration.close()).await.expect("closed");
    assert_eq!(slow.landed(), 0, "void: the first attempt was not late");
    eventually("the first attempt lands", async || slow.landed() == 1).await;
    let orders = follow(&b, "orders").await;
    until(&orders, "its record is taken away again", Instances::is_empty).await;
}

/// Fails as many of the next commits before they reach the server.
#[derive(Debug, Clone, Default)]
struct Failing {
    left: Arc<AtomicUsize>,
}

impl Wrap for Failing {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        let less = |left: usize| left.checked_sub(1);
        let failing =
            op.verb == Verb::Commit && self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok();
        if failing {
            return Err(Error::new(ErrorKind::Unavailable, op.verb.as_str(), "refused on purpose"));
        }
        call().await
    }
}

async fn a_withdrawal_that_fails_is_repeated_until_the_record_is_gone(clients: Arc<dyn Clients>) {
    let failing = Failing::default();
    let backend = Stack::new(client(&clients).await).with(failing.clone()).build();
    // A session that ends long after the case.
    let (a, b) = (coord_over(backend, Duration::from_secs(60)), coord(&clients).await);
    let registration = registered(&a, Instance::new("orders", "h:1").id("1")).await;
    let orders = follow(&b, "orders").await;
    until(&orders, "the instance", |now| now.len() == 1).await;
    failing.left.store(4, Ordering::Release);
    within(SOON, "the end", registration.close()).await.expect("closed");
    assert_eq!(failing.left.load(Ordering::Acquire), 0, "void: nothing failed");
    until(&orders, "its end", Instances::is_empty).await;
}
