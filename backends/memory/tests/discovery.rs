//! What a service shows through outages, on a paused clock.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use quorate_core::{
    Coordinator, SessionOptions,
    discovery::{DiscoverOptions, Instance, Instances, Service},
    layer::Stack,
};
use quorate_memory::{Faults, Memory};
use tokio::time::{sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_secs(15);

fn coord(memory: Memory) -> (Coordinator, Faults) {
    let faults = memory.faults();
    let backend = Stack::new(Arc::new(memory)).standard(10 * SECOND).build();
    (Coordinator::new(backend, SessionOptions { ttl: 2 * SECOND, owner: "test".to_owned() }), faults)
}

/// Two instances, of one process each, and a consumer.
async fn scene() -> ([(Coordinator, Faults); 2], Service, Faults) {
    let memory = Memory::new();
    let owners = [coord(memory.client()), coord(memory.client())];
    for (i, (owner, _)) in owners.iter().enumerate() {
        let registration = owner.register(Instance::new("orders", "h:1").id(i.to_string())).unwrap();
        registration.ready().await.unwrap();
        // Both stay for as long as their coordinators do.
        std::mem::forget(registration);
    }
    let (consumer, faults) = coord(memory);
    let mut options = DiscoverOptions::default();
    options.linger = LINGER;
    let service = consumer.discover_with("orders", &options).await.unwrap();
    service.until(|now| now.len() == 2).await;
    std::mem::forget(consumer);
    (owners, service, faults)
}

fn ids(now: &Instances) -> Vec<&str> {
    now.iter().map(|instance| instance.id.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn nothing_is_given_up_while_nothing_is_heard_also_in_a_second_outage() {
    let (owners, service, faults) = scene().await;
    faults.cut();
    sleep(SECOND).await;
    // One dies during the first outage.
    owners[1].1.cut();
    sleep(5 * SECOND).await;
    faults.heal();
    service.until(|now| now.stale_since().is_none()).await;
    assert_eq!(ids(&service.now()), ["0", "1"], "it may come back for a while after a gap");
    sleep(LINGER / 2).await;
    faults.cut();
    // Far past the time at which it would have been given up.
    sleep(3 * LINGER).await;
    assert!(service.now().stale_since().is_some());
    assert_eq!(ids(&service.now()), ["0", "1"], "an outage takes nobody out");
    faults.heal();
    service.until(|now| now.stale_since().is_none()).await;
    assert_eq!(ids(&service.now()), ["0", "1"], "another gap, another chance");
    timeout(LINGER + SECOND, service.until(|now| now.len() == 1)).await.expect("then it is given up");
    assert_eq!(ids(&service.now()), ["0"]);
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_back_within_the_grace_was_never_away() {
    let (owners, service, faults) = scene().await;
    faults.cut();
    owners[1].1.cut();
    sleep(5 * SECOND).await;
    faults.heal();
    service.until(|now| now.stale_since().is_none()).await;
    owners[1].1.heal();
    for _ in 0..40 {
        sleep(SECOND).await;
        assert_eq!(ids(&service.now()), ["0", "1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_gap_a_death_is_seen_at_once() {
    let (owners, service, _) = scene().await;
    owners[1].1.cut();
    timeout(3 * SECOND, service.until(|now| now.len() == 1)).await.expect("at the end of its lease");
}
