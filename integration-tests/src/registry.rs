//! Services through the bad days of the coordinator.
//!
//! Promise: every case has a server of its own, and breaks it for real.

use std::{sync::Arc, time::Duration};

use quorate::{
    Coordinator,
    discovery::{Instance, Registration, Service},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    cases,
    site::{Site, connect},
};

cases!("registry":
    a_restart_of_the_server_empties_no_consumer,
    a_wiped_server_is_filled_again_and_empties_no_consumer,
    an_outage_leaves_the_last_good_set_and_says_how_old_it_is,
);

/// How long everything may need to be whole again after the server answers.
const RECOVERY: Duration = Duration::from_secs(30);
const INSTANCES: usize = 5;

async fn registered(coord: &Coordinator) -> Vec<Registration> {
    let all: Vec<_> = (1..=INSTANCES)
        .map(|i| coord.register(Instance::new("orders", format!("10.0.0.{i}:80"))).expect("a good instance"))
        .collect();
    for registration in &all {
        timeout(RECOVERY, registration.ready()).await.expect("in time").expect("registered");
    }
    all
}

async fn followed(coord: &Coordinator) -> Service {
    let opening = async {
        loop {
            match coord.discover("orders").await {
                Ok(service) => return service,
                Err(_) => sleep(Duration::from_millis(100)).await,
            }
        }
    };
    let service = timeout(RECOVERY, opening).await.expect("the service can be followed");
    timeout(RECOVERY, service.until(|now| now.len() == INSTANCES)).await.expect("every instance is found");
    service
}

/// Ends when somebody who comes new finds everything, and everybody knows it; tells how long it took.
async fn whole(coord: &Coordinator, registrations: &[Registration], service: &Service) -> Duration {
    let started = Instant::now();
    drop(followed(coord).await);
    for registration in registrations {
        timeout(RECOVERY, registration.ready()).await.expect("in time").expect("registered");
    }
    timeout(RECOVERY, service.until(|now| now.stale_since().is_none())).await.expect("the consumer hears of it again");
    started.elapsed()
}

/// Looks at the set all the time, and ends only when it is empty.
fn emptied(service: &Service) -> tokio::task::JoinHandle<()> {
    let service = service.clone();
    tokio::spawn(async move {
        while !service.now().is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    })
}

async fn survives(site: &Site, wiped: bool) {
    let config = site.config().with_session_ttl(Duration::from_secs(4));
    let (a, b) = (connect(&config).await, connect(&config).await);
    let registrations = registered(&a).await;
    let service = followed(&b).await;
    let looking = emptied(&service);
    let restarted = match wiped {
        true => site.server().restart_wiped().await,
        false => site.server().restart().await,
    };
    restarted.expect("the server restarts");
    let took = whole(&b, &registrations, &service).await;
    println!("      {}: all instances found {took:?} after the server was back (wiped: {wiped})", site.backend);
    // Longer than any lease from before: whoever was not registered again would be gone now.
    sleep(config.session_ttl * 2).await;
    assert_eq!(followed(&b).await.now().len(), INSTANCES);
    assert_eq!(service.now().len(), INSTANCES);
    assert!(!looking.is_finished(), "the consumer's set was emptied");
    looking.abort();
}

async fn a_restart_of_the_server_empties_no_consumer(site: Arc<Site>) {
    survives(&site, false).await;
}

async fn a_wiped_server_is_filled_again_and_empties_no_consumer(site: Arc<Site>) {
    survives(&site, true).await;
}

async fn an_outage_leaves_the_last_good_set_and_says_how_old_it_is(site: Arc<Site>) {
    let config = site.config().with_timeouts(Duration::from_secs(2), Duration::from_secs(1));
    let (a, b) = (connect(&config).await, connect(&config).await);
    let registrations = registered(&a).await;
    let service = followed(&b).await;
    let looking = emptied(&service);
    site.server().kill().await.expect("the server is killed");
    let stale = timeout(RECOVERY, service.until(|now| now.stale_since().is_some())).await;
    assert_eq!(stale.expect("the consumer notices").len(), INSTANCES);
    // Longer than every lease: nobody may conclude anything from that.
    sleep(site.ttl() * 3).await;
    let now = service.now();
    assert!(now.stale_for().is_some_and(|age| age >= site.ttl() * 3), "{:?}", now.stale_for());
    assert_eq!((now.len(), now.passing().count()), (INSTANCES, INSTANCES));
    // What is wanted meanwhile is what will be found.
    registrations[0].update(|instance| instance.weight = 7).expect("kept for later");
    site.server().restart().await.expect("the server restarts");
    let took = whole(&b, &registrations, &service).await;
    println!("      {}: all instances found {took:?} after the outage", site.backend);
    let updated = |now: &quorate::discovery::Instances| now.get("10.0.0.1:80").is_some_and(|one| one.weight == 7);
    timeout(RECOVERY, service.until(updated)).await.expect("the update of the outage is found");
    assert!(!looking.is_finished(), "the consumer's set was emptied");
    looking.abort();
}
