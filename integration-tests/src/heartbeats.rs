//! Heartbeats of real processes that are killed and stopped, on a real server.
//!
//! Promise: as for [`process`](crate::process).

use std::{sync::Arc, time::Duration};

use quorate::heartbeat::{Cause, Detection, Incarnation, Monitor, MonitorOptions, PeerEvent};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    actor::Actor,
    cases,
    site::{Site, connect_long},
};

cases!("heartbeat":
    a_killed_process_is_told_dead_in_time,
    a_stopped_observer_wakes_and_convicts_only_the_dead,
    a_stopped_process_that_was_recovered_wakes_as_a_new_run,
);

/// How often the processes beat.
pub const EVERY: Duration = Duration::from_millis(200);

/// Dead some four seconds after the last beat.
pub fn options() -> MonitorOptions {
    MonitorOptions {
        detection: Detection::Deadline { acceptable_pause: Duration::from_secs(2) },
        grace: Duration::from_secs(2),
        tick: Duration::from_millis(50),
        probe_every: Duration::from_millis(500),
        stall: Duration::from_millis(1500),
        ..MonitorOptions::default()
    }
}

/// What a death takes by the options: interval, pause, grace; two ticks and a read are on top.
pub(crate) const NOMINAL: Duration = Duration::from_millis(4200);
const PATIENCE: Duration = Duration::from_secs(30);

async fn dead(monitor: &mut Monitor, peer: &str) -> (Incarnation, Cause) {
    let told = async {
        loop {
            match monitor.next().await.expect("the monitor runs") {
                PeerEvent::Dead { peer: p, incarnation, cause } if p == peer => return (incarnation, cause),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, told).await.expect("told in time")
}

async fn a_killed_process_is_told_dead_in_time(site: Arc<Site>) {
    let config = site.config();
    let mut monitor = connect_long(&config).await.heartbeat("g").monitor(options()).expect("good options");
    let mut peer = Actor::start(&config);
    let incarnation = peer.ask_number("beat g a", "beating").await;
    sleep(Duration::from_secs(2)).await;
    peer.kill().await;
    let killed = Instant::now();
    let (died, cause) = dead(&mut monitor, "a").await;
    let after = killed.elapsed();
    println!("      {}: told dead {after:?} after the kill, nominal {NOMINAL:?}", site.backend);
    assert_eq!((died.get(), cause), (incarnation, Cause::Silence));
    assert!(after >= NOMINAL - 2 * EVERY, "convicted after {after:?}");
    assert!(after <= NOMINAL + Duration::from_secs(4), "told {after:?} after the kill");
}

/// P17: the observer is stopped for three times what a conviction takes. One peer dies meanwhile, one lives.
async fn a_stopped_observer_wakes_and_convicts_only_the_dead(site: Arc<Site>) {
    let config = site.config();
    let group = connect_long(&config).await.heartbeat("g");
    let lives = group.beat("lives", EVERY).expect("a good name");
    let dies = group.beat("dies", EVERY).expect("a good name");
    for publisher in [&lives, &dies] {
        timeout(PATIENCE, publisher.beating()).await.expect("in time").expect("it beats");
    }
    let mut observer = Actor::start(&config);
    observer.send("observe g 25").await;
    sleep(Duration::from_secs(2)).await;
    observer.pause().await;
    dies.orphan();
    sleep(3 * NOMINAL).await;
    observer.resume().await;
    assert_eq!(observer.answer().await, "dead dies");
    lives.leave().await.expect("left");
}

/// The peer is stopped, not dead: it is convicted all the same, and learns of it when it wakes.
async fn a_stopped_process_that_was_recovered_wakes_as_a_new_run(site: Arc<Site>) {
    let config = site.config();
    let mut monitor = connect_long(&config).await.heartbeat("g").monitor(options()).expect("good options");
    let (tell, mut recovered) = tokio::sync::mpsc::channel(8);
    let _recovery = monitor.on_death(move |death| {
        let tell = tell.clone();
        async move {
            let _ = tell.send(death.incarnation).await;
            Ok(())
        }
    });
    let mut peer = Actor::start(&config);
    let before = peer.ask_number("beat g a", "beating").await;
    sleep(Duration::from_secs(1)).await;
    peer.pause().await;
    dead(&mut monitor, "a").await;
    let done = timeout(PATIENCE, recovered.recv()).await.expect("recovered in time").expect("it runs");
    assert_eq!(done.get(), before);
    peer.resume().await;
    let returned = async {
        loop {
            let event = monitor.next().await.expect("the monitor runs");
            if let PeerEvent::Returned { incarnation, before, .. } = event {
                return (incarnation, before);
            }
        }
    };
    let (now, died) = timeout(PATIENCE, returned).await.expect("told in time");
    assert!(now > died && died.get() == before, "{now} after {died}, which was {before}");
    assert!(recovered.try_recv().is_err(), "one death, one recovery");
}
