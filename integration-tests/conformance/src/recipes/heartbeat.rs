//! Heartbeats: silence, return, leave, outages and recoveries, in real time on any backend.
//!
//! A machine that stands still may make a live peer suspect, never dead; so the cases assert the order of events, who
//! died and who did not, and never that nobody was suspected.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    Coordinator, Dir, Error, ErrorKind, Key, KeyRange, Result, Txn, Write,
    detect::PhiOptions,
    heartbeat::{Cause, Detection, HeartbeatGroup, Incarnation, Monitor, MonitorOptions, PeerEvent, PublisherState},
    layer::{Op, Stack, Verb, Wrap},
};
use tokio::time::sleep;

use super::{chaos::troubled, coord, coord_over, counting::Counted, events::Lawful};
use crate::{
    Clients,
    support::{QUIET, SOON, cases, client, eventually, refused, within},
};

cases!("heartbeat":
    a_silent_peer_is_suspected_then_dead_each_told_once,
    a_monitor_that_comes_later_tells_the_death_too,
    a_returning_peer_is_told_with_a_greater_incarnation,
    a_restart_within_the_grace_is_a_death_and_a_return,
    a_clean_leave_is_never_a_death,
    dropping_the_publisher_leaves,
    the_newest_run_wins_and_late_beats_of_older_ones_are_ignored,
    an_outage_of_the_coordinator_convicts_nobody,
    live_peers_are_never_convicted_under_chaos,
    a_beat_is_one_call_and_shows_its_round_trip,
    clock_offsets_are_shown_with_a_bound_that_holds,
    the_dead_are_forgotten_with_everything_written_for_them,
    bad_names_and_options_are_refused,
);

const EVERY: Duration = Duration::from_millis(100);

/// Suspect after about a second of silence, dead after a second and a half more.
pub(super) fn options() -> MonitorOptions {
    let phi = PhiOptions {
        min_std_deviation: Duration::from_millis(50),
        acceptable_pause: Duration::from_millis(800),
        ..PhiOptions::default()
    };
    MonitorOptions {
        detection: Detection::PhiAccrual(phi),
        grace: Duration::from_millis(1500),
        tick: Duration::from_millis(20),
        probe_every: Duration::from_millis(500),
        stall: Duration::from_secs(1),
        max_pause: Duration::from_millis(500),
        ..MonitorOptions::default()
    }
}

/// How long a death may take to be told on a machine that does other things as well.
pub(super) const LATE: Duration = Duration::from_secs(20);

/// A monitor whose every event is checked against the automaton of states.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) monitor: Monitor,
    lawful: Lawful,
}

impl Watched {
    pub(super) fn new(group: &HeartbeatGroup) -> Self {
        Self::with(group, options())
    }

    fn with(group: &HeartbeatGroup, options: MonitorOptions) -> Self {
        Self { monitor: group.monitor(options).expect("good options"), lawful: Lawful::default() }
    }

    /// Reads events until one of them is what is waited for.
    pub(super) async fn until<T>(&mut self, what: &str, found: impl Fn(&PeerEvent) -> Option<T>) -> T {
        within(LATE, what, async {
            loop {
                let event = self.monitor.next().await.expect("the monitor runs");
                self.lawful.check(&event);
                if let Some(found) = found(&event) {
                    return found;
                }
            }
        })
        .await
    }

    pub(super) async fn alive(&mut self, peer: &str) -> Incarnation {
        self.until(&format!("{peer} is told alive"), |event| match event {
            PeerEvent::Alive { peer: p, incarnation } if p == peer => Some(*incarnation),
            _ => None,
        })
        .await
    }

    pub(super) async fn dead(&mut self, peer: &str) -> (Incarnation, Cause) {
        self.until(&format!("{peer} is told dead"), |event| match event {
            PeerEvent::Dead { peer: p, incarnation, cause } if p == peer => Some((*incarnation, *cause)),
            _ => None,
        })
        .await
    }

    pub(super) async fn returned(&mut self, peer: &str) -> (Incarnation, Incarnation) {
        self.until(&format!("{peer} is told returned"), |event| match event {
            PeerEvent::Returned { peer: p, incarnation, before } if p == peer => Some((*incarnation, *before)),
            _ => None,
        })
        .await
    }

    async fn left(&mut self, peer: &str) -> Incarnation {
        self.until(&format!("{peer} is told to have left"), |event| match event {
            PeerEvent::Left { peer: p, incarnation } if p == peer => Some(*incarnation),
            _ => None,
        })
        .await
    }

    /// Reads events for so long; nobody may die.
    async fn nobody_dies(&mut self, time: Duration) {
        let _ = tokio::time::timeout(time, async {
            while let Some(event) = self.monitor.next().await {
                self.lawful.check(&event);
                assert!(!matches!(event, PeerEvent::Dead { .. }), "convicted: {event:?}");
            }
        })
        .await;
    }

    /// Reads events for so long; nothing may be told of this peer.
    async fn nothing_of(&mut self, peer: &str, time: Duration) {
        let _ = tokio::time::timeout(time, async {
            while let Some(event) = self.monitor.next().await {
                self.lawful.check(&event);
                assert_ne!(super::events::subject(&event), Some(peer), "told again: {event:?}");
            }
        })
        .await;
    }
}

/// A layer that refuses every call while it is shut: a coordinator that answers nobody behind it.
#[derive(Debug, Clone, Default)]
pub(super) struct Gate(Arc<AtomicBool>);

impl Gate {
    pub(super) fn shut(&self, shut: bool) {
        self.0.store(shut, Ordering::Release);
    }

    pub(super) async fn coord(&self, clients: &Arc<dyn Clients>) -> Coordinator {
        let backend = Stack::new(client(clients).await).standard(Duration::from_secs(10)).with(self.clone()).build();
        coord_over(backend, Duration::from_secs(30))
    }
}

impl Wrap for Gate {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        if self.0.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Unavailable, op.verb.as_str(), "shut on request").on(op.backend));
        }
        call().await
    }
}

async fn a_silent_peer_is_suspected_then_dead_each_told_once(clients: Arc<dyn Clients>) {
    let (a, b, watcher) = (coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let doomed = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let steady = b.heartbeat("g").beat("b", EVERY).expect("a good name");
    let incarnation = within(SOON, "the first beat", doomed.beating()).await.expect("beats");
    assert_eq!(watched.alive("a").await, incarnation);
    sleep(EVERY * 5).await;
    doomed.orphan();
    let suspected = watched.until("a is suspected", |event| match event {
        PeerEvent::Suspect { peer, suspicion, .. } if peer == "a" => Some(*suspicion),
        _ => None,
    });
    assert!(suspected.await >= 8.0, "the threshold");
    assert_eq!(watched.dead("a").await, (incarnation, Cause::Silence));
    watched.nothing_of("a", Duration::from_secs(1)).await;
    let peers = watched.monitor.peers();
    let dead = peers.iter().find(|p| p.peer == "a").expect("it is still known");
    assert_eq!(dead.died, Some(incarnation));
    assert!(dead.heard.is_some_and(|age| age >= options().grace), "{dead:?}");
    assert!(peers.iter().any(|p| p.peer == "b" && p.died.is_none()), "the other one lives: {peers:?}");
    steady.leave().await.expect("left");
}

async fn a_monitor_that_comes_later_tells_the_death_too(clients: Arc<dyn Clients>) {
    let (a, watcher) = (coord(&clients).await, coord(&clients).await);
    let publisher = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let incarnation = within(SOON, "the first beat", publisher.beating()).await.expect("beats");
    publisher.orphan();
    sleep(EVERY).await;
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    eventually("the record is found", async || !watched.monitor.peers().is_empty()).await;
    let peers = watched.monitor.peers();
    assert!(peers[0].heard.is_none() && peers[0].unknown_since.is_some(), "found, not heard: {peers:?}");
    assert_eq!(watched.dead("a").await, (incarnation, Cause::Silence));
}

async fn a_returning_peer_is_told_with_a_greater_incarnation(clients: Arc<dyn Clients>) {
    let (a, watcher) = (coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let group = a.heartbeat("g");
    let mut last = None;
    for _ in 0..2 {
        let publisher = group.beat("a", EVERY).expect("a good name");
        let incarnation = within(SOON, "the first beat", publisher.beating()).await.expect("beats");
        if let Some(before) = last {
            assert!(incarnation > before, "{incarnation} after {before}");
            assert_eq!(watched.returned("a").await, (incarnation, before));
        }
        publisher.orphan();
        assert_eq!(watched.dead("a").await.0, incarnation);
        last = Some(incarnation);
    }
}

async fn a_restart_within_the_grace_is_a_death_and_a_return(clients: Arc<dyn Clients>) {
    let (a, watcher) = (coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let crashed = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let before = watched.alive("a").await;
    crashed.orphan();
    let restarted = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    assert_eq!(watched.dead("a").await, (before, Cause::Replaced));
    let (now, died) = watched.returned("a").await;
    assert!(now > before && died == before);
    restarted.leave().await.expect("left");
}

async fn a_clean_leave_is_never_a_death(clients: Arc<dyn Clients>) {
    let (a, watcher) = (coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let group = a.heartbeat("g");
    let looking = group.beat("looking", EVERY).expect("a good name");
    watched.alive("looking").await;
    let mut last = None;
    // At once after each other, so that a watch may skip the deletion in between.
    for turn in 0..3 {
        let publisher = group.beat("a", EVERY).expect("a good name");
        let incarnation = within(SOON, "the first beat", publisher.beating()).await.expect("beats");
        assert!(Some(incarnation) > last, "greater, although the record was deleted in between");
        last = Some(incarnation);
        let told = |event: &PeerEvent| match event {
            PeerEvent::Dead { .. } | PeerEvent::Returned { .. } => panic!("a leave told as {event:?}"),
            PeerEvent::Alive { incarnation, .. } => (Some(*incarnation) == last).then_some(()),
            _ => None,
        };
        if turn == 2 {
            watched.until("the last run", told).await;
        }
        within(SOON, "leaving", publisher.leave()).await.expect("left");
    }
    assert_eq!(Some(watched.left("a").await), last, "those before were told before, if at all");
    watched.nobody_dies(Duration::from_secs(3)).await;
    assert_eq!(watched.monitor.peers().len(), 1, "only the one that helped to begin");
    looking.leave().await.expect("left");
}

async fn dropping_the_publisher_leaves(clients: Arc<dyn Clients>) {
    let (a, watcher) = (coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let publisher = a.heartbeat("g").beat_with("a", EVERY, "host:80").expect("a good name");
    let incarnation = watched.alive("a").await;
    assert_eq!(watched.monitor.peers()[0].payload, "host:80");
    drop(publisher);
    assert_eq!(watched.left("a").await, incarnation);
}

fn record(group: &str, peer: &str) -> Key {
    Key::new(&Dir::new(["heartbeat", group]).expect("valid"), peer).expect("valid")
}

async fn the_newest_run_wins_and_late_beats_of_older_ones_are_ignored(clients: Arc<dyn Clients>) {
    let (a, b, watcher) = (coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let mut older = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let before = within(SOON, "the first beat", older.beating()).await.expect("beats");
    assert_eq!(watched.alive("a").await, before);
    let key = record("g", "a");
    let stale = a.backend().read(&KeyRange::One(key.clone())).await.expect("read").entries.remove(0).value;
    let newer = b.heartbeat("g").beat("a", EVERY).expect("a good name");
    let now = within(SOON, "the first beat", newer.beating()).await.expect("beats");
    assert!(now > before);
    within(SOON, "the older run stops", async { while older.changed().await.state != PublisherState::Superseded {} })
        .await;
    assert_eq!(watched.returned("a").await, (now, before));
    // Somebody who does not compare writes the old beat again, as the current run's predecessor would have.
    let mut late: serde_json::Value = serde_json::from_slice(&stale).expect("JSON");
    late["incarnation"] = before.get().into();
    late["seq"] = 1_000_000.into();
    for _ in 0..3 {
        let write = Write::Put { key: key.clone(), value: late.to_string().into(), lease: None };
        a.backend().commit(&Txn { checks: Vec::new(), writes: vec![write] }).await.expect("written");
        sleep(EVERY * 2).await;
    }
    watched.nobody_dies(Duration::from_secs(3)).await;
    let peer = watched.monitor.peers().remove(0);
    assert_eq!(peer.incarnation, now);
    assert!(peer.heard.is_some_and(|age| age < SOON));
    let status = newer.status();
    assert_eq!((status.incarnation, status.convictions), (Some(now), 0), "the current run goes on: {status:?}");
    newer.leave().await.expect("left");
}

/// Nobody reaches the coordinator for several times what a conviction takes.
async fn an_outage_of_the_coordinator_convicts_nobody(clients: Arc<dyn Clients>) {
    let gate = Gate::default();
    let (a, b, watcher) = (gate.coord(&clients).await, gate.coord(&clients).await, gate.coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let one = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let two = b.heartbeat("g").beat("b", EVERY).expect("a good name");
    for publisher in [&one, &two] {
        within(SOON, "the first beat", publisher.beating()).await.expect("beats");
    }
    eventually("both are known", async || watched.monitor.peers().len() == 2).await;
    gate.shut(true);
    watched.nobody_dies(Duration::from_secs(6)).await;
    assert!(!watched.monitor.hears() && watched.monitor.last_error().is_some(), "it knows that it is deaf");
    assert_eq!(one.status().state, PublisherState::Failing);
    gate.shut(false);
    watched.nobody_dies(Duration::from_secs(4)).await;
    eventually("it hears again", async || watched.monitor.hears()).await;
    // The control: with the coordinator back, silence is judged again.
    let incarnation = one.status().incarnation.expect("it has beaten");
    one.orphan();
    assert_eq!(watched.dead("a").await, (incarnation, Cause::Silence));
    two.leave().await.expect("left");
}

async fn live_peers_are_never_convicted_under_chaos(clients: Arc<dyn Clients>) {
    let watcher = troubled(&clients, 0).await;
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let mut publishers = Vec::new();
    for seed in 1..=4 {
        let group = troubled(&clients, seed).await.heartbeat("g");
        publishers.push(group.beat(&format!("p{seed}"), EVERY).expect("a good name"));
    }
    for publisher in &publishers {
        within(SOON, "the first beat", publisher.beating()).await.expect("beats");
    }
    watched.nobody_dies(Duration::from_secs(6)).await;
    for publisher in &publishers {
        let status = publisher.status();
        assert!(status.convictions == 0 && status.beats > 10, "{status:?}");
    }
    let first = publishers.remove(0);
    first.orphan();
    watched.dead("p1").await;
}

async fn a_beat_is_one_call_and_shows_its_round_trip(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).standard(Duration::from_secs(10)).build();
    let group = coord_over(backend, Duration::from_secs(30)).heartbeat("g");
    let publisher = group.beat("a", EVERY).expect("a good name");
    eventually("some beats", async || publisher.status().beats >= 10).await;
    let (beats, commits, reads) = (publisher.status().beats, counted.calls(Verb::Commit), counted.calls(Verb::Read));
    let most = usize::try_from(beats).expect("few") + 2;
    assert!(commits <= most, "{commits} transactions for {beats} beats");
    assert!(reads <= 2, "{reads} reads: one to begin with, one more if an answer was lost");
    let status = publisher.status();
    let round_trip = status.round_trip.expect("measured");
    assert!(round_trip.shortest <= round_trip.last && round_trip.last < SOON, "{status:?}");
    assert!(status.confirmed.is_some() && status.error.is_none());
    publisher.leave().await.expect("left");
}

async fn clock_offsets_are_shown_with_a_bound_that_holds(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await.heartbeat("g"), coord(&clients).await.heartbeat("g"));
    let (one, two) = (Watched::new(&a), Watched::new(&b));
    let publishers = [a.beat("a", EVERY).expect("a good name"), b.beat("b", EVERY).expect("a good name")];
    for (watched, other) in [(&one, "b"), (&two, "a")] {
        let offset = async || watched.monitor.peers().into_iter().find(|p| p.peer == other).and_then(|p| p.offset);
        eventually("an offset", async || offset().await.is_some()).await;
        let offset = offset().await.expect("there is one");
        // Both run on one machine, so the truth is zero. On a paused clock the round trip is none, real time is not.
        let bound = offset.error.as_secs_f64() + 0.1;
        assert!(offset.ahead_seconds.abs() <= bound, "{offset:?}");
        assert_eq!(offset.error, offset.round_trip.shortest / 2);
    }
    let own = one.monitor.peers().into_iter().find(|p| p.peer == "a").expect("it sees itself");
    assert!(own.offset.is_none(), "nobody answers himself: {own:?}");
    for publisher in publishers {
        publisher.leave().await.expect("left");
    }
}

async fn the_dead_are_forgotten_with_everything_written_for_them(clients: Arc<dyn Clients>) {
    let (a, watcher) = (coord(&clients).await, coord(&clients).await);
    let forget_after = Duration::from_secs(1);
    let mut watched = Watched::with(&watcher.heartbeat("g"), MonitorOptions { forget_after, ..options() });
    let recovered = Arc::new(AtomicUsize::new(0));
    let counter = recovered.clone();
    let recovery = watched.monitor.on_death(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }
    });
    let publisher = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    watched.alive("a").await;
    publisher.orphan();
    watched.dead("a").await;
    let stands = async |dir: &str| {
        let dir = Dir::new([dir, "g"]).expect("valid");
        let range = KeyRange::prefix(&dir, "").expect("valid");
        !watcher.backend().read(&range).await.expect("read").entries.is_empty()
    };
    eventually("the recovery", async || recovered.load(Ordering::SeqCst) == 1).await;
    eventually("the records to go", async || !stands("heartbeat").await && !stands("recovered").await).await;
    eventually("the table to follow", async || watched.monitor.peers().is_empty()).await;
    watched.nothing_of("a", QUIET).await;
    assert_eq!(recovered.load(Ordering::SeqCst), 1);
    drop(recovery);
}

async fn bad_names_and_options_are_refused(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let good = coord.heartbeat("g");
    let too_long = "x".repeat(quorate_core::MAX_NAME + 1);
    for bad in ["", &too_long] {
        refused(coord.heartbeat(bad).beat("a", EVERY), ErrorKind::InvalidInput, "a bad group");
        refused(coord.heartbeat(bad).monitor(options()), ErrorKind::InvalidInput, "a bad group");
        refused(good.beat(bad, EVERY), ErrorKind::InvalidInput, "a bad peer");
    }
    refused(good.beat("a", Duration::ZERO), ErrorKind::InvalidInput, "no interval");
    refused(good.beat_with("a", EVERY, &"x".repeat(5000)), ErrorKind::InvalidInput, "a long payload");
    let hasty = MonitorOptions { grace: Duration::from_millis(100), ..options() };
    refused(good.monitor(hasty), ErrorKind::InvalidInput, "a grace shorter than an outage that goes unnoticed");
    // Hostile names are names like any other.
    let mut watched = Watched::new(&good);
    let publisher = good.beat("a/../%2F🦀 b", EVERY).expect("a good name");
    watched.alive("a/../%2F🦀 b").await;
    publisher.leave().await.expect("left");
    watched.left("a/../%2F🦀 b").await;
}
