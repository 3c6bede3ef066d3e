//! Heartbeats over a network that is never the same for long.
//!
//! Promise: as for [`process`](crate::process). Every peer, and every monitor, has a proxy of its own before the real server.

use std::{sync::Arc, time::Duration};

use quorate::{
    detect::PhiOptions,
    heartbeat::{Detection, Monitor, MonitorOptions, PeerEvent, Publisher},
};
use quorate_testkit::proxy::{Direction, FaultProxy};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    cases,
    heartbeats::{EVERY, NOMINAL, options},
    outage::proxied,
    site::{Site, connect_long},
};

cases!("heartbeat":
    jitter_convicts_nobody_and_hides_no_death,
);

const PEERS: usize = 8;
const STORM: Duration = Duration::from_secs(20);
/// How often each way gets another delay.
const GUST: Duration = Duration::from_millis(25);
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a way is held up for as long as a lost packet and its repetitions, or a collection of garbage, takes.
const STALLS: f64 = 0.01;

/// Both ways of one proxy, until the case is over.
async fn storm(proxy: FaultProxy, mut rng: StdRng) {
    loop {
        let stalled = rng.random_bool(STALLS);
        let delay = if stalled {
            Duration::from_millis(rng.random_range(300..1000))
        } else {
            // The product of uniform numbers has the long tail that measured delays have.
            let tail: f64 = (0..3).map(|_| rng.random_range(0.2..3.0)).product();
            Duration::from_secs_f64(0.004 * tail)
        };
        let way = if rng.random() { Direction::ToServer } else { Direction::ToClient };
        proxy.delay(way, delay);
        // What is on its way goes by the delay that is in force: a stall has to last.
        sleep(if stalled { delay } else { GUST }).await;
    }
}

#[derive(Debug, Default)]
struct Told {
    suspected: usize,
    dead: Vec<String>,
}

async fn listen(monitor: &mut Monitor, until: Instant) -> Told {
    let mut told = Told::default();
    while let Ok(Some(event)) = timeout_at(until, monitor.next()).await {
        match event {
            PeerEvent::Suspect { .. } => told.suspected += 1,
            PeerEvent::Dead { peer, .. } => told.dead.push(peer),
            _ => {}
        }
    }
    told
}

/// The two detectors as they are meant to be used here, and one that is far too hasty for this network: without its mistakes
/// the storm would prove nothing.
fn detectors() -> [(&'static str, MonitorOptions); 3] {
    let phi = PhiOptions { acceptable_pause: Duration::from_secs(2), ..PhiOptions::default() };
    let hasty = Detection::Deadline { acceptable_pause: Duration::from_millis(60) };
    [
        ("deadline", options()),
        ("phi", MonitorOptions { detection: Detection::PhiAccrual(phi), ..options() }),
        ("hasty", MonitorOptions { detection: hasty, ..options() }),
    ]
}

async fn jitter_convicts_nobody_and_hides_no_death(site: Arc<Site>) {
    let config = site.config();
    let (mut proxies, mut peers, mut monitors) = (Vec::new(), Vec::<Publisher>::new(), Vec::new());
    for i in 0..PEERS {
        let (proxy, through) = proxied(&site, &config).await;
        let group = connect_long(&through).await.heartbeat("g");
        peers.push(group.beat(&format!("p{i}"), EVERY).expect("a good name"));
        proxies.push(proxy);
    }
    for (name, options) in detectors() {
        let (proxy, through) = proxied(&site, &config).await;
        let monitor = connect_long(&through).await.heartbeat("g").monitor(options).expect("good options");
        monitors.push((name, monitor));
        proxies.push(proxy);
    }
    for peer in &peers {
        timeout(PATIENCE, peer.beating()).await.expect("in time").expect("it beats");
    }
    let seed = rand::random::<u64>();
    println!("      {}: seed {seed}", site.backend);
    let mut weather = JoinSet::new();
    for (i, proxy) in proxies.into_iter().enumerate() {
        weather.spawn(storm(proxy, StdRng::seed_from_u64(seed.wrapping_add(i as u64))));
    }
    let began = Instant::now();
    let listening = monitors.iter_mut().map(|(_, monitor)| listen(monitor, began + STORM));
    let told = futures_util::future::join_all(listening).await;
    let hours = began.elapsed().as_secs_f64() / 3600.0 * PEERS as f64;
    for ((name, _), told) in monitors.iter().zip(&told) {
        println!(
            "      {}: {name}: {} false suspicions in {} intervals, {:.0} per node-hour at {EVERY:?}; {} convictions",
            site.backend,
            told.suspected,
            (hours * 3600.0 / EVERY.as_secs_f64()).round(),
            told.suspected as f64 / hours,
            told.dead.len(),
        );
        assert!(told.dead.is_empty(), "{name} convicted the living: {:?}", told.dead);
    }
    assert!(told[2].suspected > 0, "void: the storm was not felt");
    assert!(told[0].suspected <= 2 && told[1].suspected <= 2, "too many false suspicions: {told:?}");
    // The storm goes on.
    peers.swap_remove(0).orphan();
    let died = Instant::now();
    for (name, monitor) in &mut monitors[..2] {
        let told = listen_for(monitor, "p0").await;
        println!("      {}: {name}: a death in the storm was told after {:?}", site.backend, told - died);
        assert!(told - died <= NOMINAL + Duration::from_secs(5), "{name}: {:?}", told - died);
    }
}

async fn listen_for(monitor: &mut Monitor, peer: &str) -> Instant {
    let told = async {
        loop {
            match monitor.next().await.expect("the monitor runs") {
                PeerEvent::Dead { peer: p, .. } if p == peer => return Instant::now(),
                PeerEvent::Dead { peer, .. } => panic!("{peer} lives"),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, told).await.expect("told in time")
}
