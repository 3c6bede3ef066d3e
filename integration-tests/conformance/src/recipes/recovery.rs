//! Recovery: the action for a dead peer, once across the group.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate_core::{
    Coordinator, ErrorKind,
    heartbeat::{Death, Incarnation, PublisherState},
};
use tokio::time::sleep;

use super::{
    coord,
    heartbeat::{Gate, LATE, Watched},
    short_coord,
};
use crate::{
    Clients,
    support::{SOON, cases, eventually, within},
};

cases!("heartbeat":
    of_three_monitors_one_recovers_each_death_once,
    a_recovery_whose_recoverer_dies_half_way_is_completed_by_another,
    an_action_that_fails_is_run_again,
    a_peer_convicted_while_alive_finds_out_and_beats_as_a_new_run,
    a_peer_that_left_is_not_recovered,
);

const EVERY: Duration = Duration::from_millis(100);

/// What actions have completed, by whoever ran them.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Vec<(String, Incarnation)>>>);

impl Log {
    fn note(&self, death: &Death) {
        self.0.lock().expect("no poison").push((death.peer.clone(), death.incarnation));
    }

    fn read(&self) -> Vec<(String, Incarnation)> {
        self.0.lock().expect("no poison").clone()
    }
}

/// Whether the completion of this death stands in the store.
async fn is_recorded(coord: &Coordinator, peer: &str, incarnation: Incarnation) -> bool {
    let dir = quorate_core::Dir::new(["recovered", "g"]).expect("valid");
    let key = quorate_core::Key::new(&dir, peer).expect("valid");
    let entries = coord.backend().read(&quorate_core::KeyRange::One(key)).await.expect("read").entries;
    let done = |entry: &quorate_core::Entry| {
        let ledger: serde_json::Value = serde_json::from_slice(&entry.value).expect("JSON");
        ledger["done"].as_u64() == Some(incarnation.get()) && ledger.get("pending").is_none()
    };
    entries.first().is_some_and(done)
}

/// Waits as long as a recovery may take that has to outwait a session.
async fn recorded(coord: &Coordinator, peer: &str, incarnation: Incarnation, limit: Duration) {
    within(limit, "the record of the completion", async {
        while !is_recorded(coord, peer, incarnation).await {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

async fn of_three_monitors_one_recovers_each_death_once(clients: Arc<dyn Clients>) {
    let log = Log::default();
    let mut monitors = Vec::new();
    for _ in 0..3 {
        let coord = coord(&clients).await;
        let watched = Watched::new(&coord.heartbeat("g"));
        let (log, kv) = (log.clone(), coord.kv());
        let recovery = watched.monitor.on_death(move |death| {
            let (log, kv) = (log.clone(), kv.clone());
            async move {
                // Long enough for the others to come, and fenced as an application would.
                kv.put_fenced(&death.fence, "owner", "nobody").await?;
                sleep(Duration::from_millis(200)).await;
                log.note(&death);
                Ok(())
            }
        });
        monitors.push((watched, recovery));
    }
    let (a, looking) = (coord(&clients).await.heartbeat("g"), coord(&clients).await);
    let mut died = Vec::new();
    for _ in 0..2 {
        let publisher = a.beat("a", EVERY).expect("a good name");
        let incarnation = within(SOON, "the first beat", publisher.beating()).await.expect("beats");
        sleep(EVERY * 3).await;
        publisher.orphan();
        for (watched, _) in &mut monitors {
            assert_eq!(watched.dead("a").await.0, incarnation);
        }
        died.push(("a".to_owned(), incarnation));
        recorded(&looking, "a", incarnation, LATE).await;
        // The others have their turn at the lock, and at nothing else.
        sleep(Duration::from_secs(1)).await;
        assert_eq!(log.read(), died, "each death once");
    }
}

async fn a_recovery_whose_recoverer_dies_half_way_is_completed_by_another(clients: Arc<dyn Clients>) {
    let (doomed, next, a) = (short_coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let log = Log::default();
    let mut first = Watched::new(&doomed.heartbeat("g"));
    let (began, mut begun) = tokio::sync::mpsc::channel(1);
    let hanging = first.monitor.on_death(move |death| {
        let began = began.clone();
        async move {
            let _ = began.send(death.incarnation).await;
            std::future::pending().await
        }
    });
    let publisher = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let incarnation = within(SOON, "the first beat", publisher.beating()).await.expect("beats");
    publisher.orphan();
    first.dead("a").await;
    assert_eq!(within(LATE, "the first recovery begins", begun.recv()).await, Some(incarnation));
    assert!(!is_recorded(&next, "a", incarnation).await);
    // The recoverer dies; what it began is known only from the store.
    let session = doomed.session().await.expect("a session");
    session.orphan();
    let second = Watched::new(&next.heartbeat("g"));
    let notes = log.clone();
    let _recovery = second.monitor.on_death(move |death| {
        notes.note(&death);
        async { Ok(()) }
    });
    let limit = session.ttl() + next.profile().expiry_lag + LATE;
    recorded(&next, "a", incarnation, limit).await;
    assert_eq!(log.read(), [("a".to_owned(), incarnation)]);
    drop(hanging);
}

async fn an_action_that_fails_is_run_again(clients: Arc<dyn Clients>) {
    let (watcher, a) = (coord(&clients).await, coord(&clients).await);
    let watched = Watched::new(&watcher.heartbeat("g"));
    let log = Log::default();
    let notes = log.clone();
    let _recovery = watched.monitor.on_death(move |death| {
        notes.note(&death);
        let fails = notes.read().len() < 3;
        async move {
            let error = || quorate_core::Error::new(ErrorKind::Unavailable, "recover", "not now");
            if fails { Err(error()) } else { Ok(()) }
        }
    });
    let publisher = a.heartbeat("g").beat("a", EVERY).expect("a good name");
    let incarnation = within(SOON, "the first beat", publisher.beating()).await.expect("beats");
    publisher.orphan();
    recorded(&watcher, "a", incarnation, LATE).await;
    assert_eq!(log.read(), vec![("a".to_owned(), incarnation); 3]);
}

/// The peer lives and cannot reach the coordinator; everybody else can.
async fn a_peer_convicted_while_alive_finds_out_and_beats_as_a_new_run(clients: Arc<dyn Clients>) {
    let gate = Gate::default();
    let (cut_off, watcher) = (gate.coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let log = Log::default();
    let notes = log.clone();
    let _recovery = watched.monitor.on_death(move |death| {
        notes.note(&death);
        async { Ok(()) }
    });
    let publisher = cut_off.heartbeat("g").beat("a", EVERY).expect("a good name");
    let before = watched.alive("a").await;
    gate.shut(true);
    watched.dead("a").await;
    recorded(&watcher, "a", before, LATE).await;
    assert_eq!(publisher.status().state, PublisherState::Failing);
    gate.shut(false);
    let (now, died) = watched.returned("a").await;
    assert!(now > before && died == before, "no beat of the recovered run is accepted");
    eventually("it knows", async || publisher.status().incarnation == Some(now)).await;
    assert_eq!(publisher.status().convictions, 1);
    assert_eq!(log.read(), [("a".to_owned(), before)]);
    publisher.leave().await.expect("left");
}

async fn a_peer_that_left_is_not_recovered(clients: Arc<dyn Clients>) {
    let (watcher, a) = (coord(&clients).await, coord(&clients).await);
    let mut watched = Watched::new(&watcher.heartbeat("g"));
    let log = Log::default();
    let notes = log.clone();
    let _recovery = watched.monitor.on_death(move |death| {
        notes.note(&death);
        async { Ok(()) }
    });
    let group = a.heartbeat("g");
    let (leaves, dies) = (group.beat("l", EVERY).expect("a name"), group.beat("d", EVERY).expect("a name"));
    let incarnation = within(SOON, "the first beat", dies.beating()).await.expect("beats");
    within(SOON, "the first beat", leaves.beating()).await.expect("beats");
    leaves.leave().await.expect("left");
    dies.orphan();
    watched.dead("d").await;
    recorded(&watcher, "d", incarnation, LATE).await;
    sleep(Duration::from_millis(500)).await;
    assert_eq!(log.read(), [("d".to_owned(), incarnation)], "the one that left is nobody's concern");
}
