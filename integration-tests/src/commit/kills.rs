//! Drivers, recoverers and serving participants that are killed and stopped in the middle of a transaction.
//!
//! Promise: the process really dies at the step, by SIGKILL of its own, and what it left is finished by others.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use quorate::{
    Config, Coordinator,
    commit::{Decision, KeyWork, Step, Transactions, TransactionsOptions, TxStatus},
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};

use super::{GRACE, eager, group, until_clean};
use crate::{
    actor::Actor,
    cases,
    site::{Site, connect_long},
};

cases!("commit":
    whatever_step_a_driver_is_killed_at_both_keys_end_on_one_side,
    a_driver_stopped_beyond_its_session_changes_nothing_and_does_not_guess,
    a_killed_recoverer_is_followed_by_another,
    a_killed_participant_is_replaced_by_its_stand_by_or_its_restart,
    a_stopped_participant_that_wakes_takes_nothing_back,
);

/// Each step of a transaction of two that vote yes: its name, for the how-manieth time, and whether it is decided there.
const STEPS: [(&str, usize, bool); 11] = [
    ("begin", 1, false),
    ("begun", 1, false),
    ("prepare", 1, false),
    ("voted", 1, false),
    ("voted", 2, false),
    ("decide", 1, false),
    ("decided", 1, true),
    ("deliver", 1, true),
    ("acknowledged", 1, true),
    ("forget", 1, true),
    ("forgotten", 1, true),
];

/// A transaction of an actor, over two keys of its own.
struct Scenario {
    name: String,
    keys: [String; 2],
    driver: Actor,
    id: quorate::commit::TxId,
}

impl Scenario {
    async fn begin(config: &Config, coord: &Coordinator, group: &str, fate: &str) -> Self {
        let name = format!("{group}, driver: {fate}");
        let keys = ["left", "right"].map(|side| format!("{}/{side}", name.replace([' ', ',', ':'], "-")));
        for key in &keys {
            coord.kv().put(key, "old").await.expect("put");
        }
        let mut driver = Actor::start(config);
        let answer = driver.ask(&format!("begin {group} {} {} {fate}", keys[0], keys[1])).await;
        let id = answer.strip_prefix("begun ").and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("{answer}"));
        Self { name, keys, driver, id }
    }

    /// Waits until the log has forgotten it, and tells how long that took.
    async fn over(&self, all: &Transactions, limit: Duration) -> Duration {
        let since = Instant::now();
        while all.status(self.id).await.expect("a status") != TxStatus::Unknown {
            assert!(since.elapsed() < limit, "{}: not over after {limit:?}", self.name);
            sleep(Duration::from_millis(20)).await;
        }
        since.elapsed()
    }

    async fn assert_ended(&self, coord: &Coordinator, committed: bool) {
        let wanted = if committed { "new" } else { "old" };
        for key in &self.keys {
            let now = coord.kv().get(key).await.expect("get").expect("exists").value;
            assert_eq!(now, wanted, "{}: {key}", self.name);
        }
    }
}

/// What recovery takes at most: the driver's session ends, it is missing for the grace, and the work is done.
fn limit(site: &Site, coord: &Coordinator) -> Duration {
    site.ttl() + coord.profile().expiry_lag + GRACE + Duration::from_secs(3)
}

/// The longest and the shortest.
fn span(times: &[Duration]) -> String {
    let (least, most) = (times.iter().min().expect("some"), times.iter().max().expect("some"));
    format!("{least:.1?} to {most:.1?}")
}

async fn whatever_step_a_driver_is_killed_at_both_keys_end_on_one_side(site: Arc<Site>) {
    let config = site.config();
    let coord = connect_long(&config).await;
    let (all, _) = group(&coord, "kills", TransactionsOptions::default()).expect("a good name");
    let _recoverer = all.recover_with(eager());
    let limit = limit(&site, &coord);
    let deaths = STEPS.map(|(step, nth, committed)| {
        let (config, coord, all) = (&config, &coord, &all);
        async move {
            let mut scenario = Scenario::begin(config, coord, "kills", &format!("{step} {nth} kill")).await;
            scenario.driver.send("commit").await;
            scenario.driver.killed().await;
            let took = scenario.over(all, limit).await;
            scenario.assert_ended(coord, committed).await;
            // There is something to recover in between only.
            (!matches!(step, "begin" | "forgotten")).then_some(took)
        }
    });
    let recovered: Vec<_> = join_all(deaths).await.into_iter().flatten().collect();
    until_clean(&coord, "kills", &[&coord], Duration::from_secs(5)).await;
    let ttl = site.ttl();
    println!("      {}: over {} after the kill, ttl {ttl:?}, limit {limit:?}", site.backend, span(&recovered));
    assert_eq!(recovered.len(), STEPS.len() - 2);
    // A living driver is left alone: nobody was recovered while its session had to stand, renewals and a busy machine apart.
    let early = recovered.iter().min().expect("some");
    assert!(*early + Duration::from_millis(200) >= ttl / 2, "recovered {early:?} after the kill");
}

async fn a_driver_stopped_beyond_its_session_changes_nothing_and_does_not_guess(site: Arc<Site>) {
    let config = site.config();
    let coord = connect_long(&config).await;
    let (all, _) = group(&coord, "stops", TransactionsOptions::default()).expect("a good name");
    let _recoverer = all.recover_with(eager());
    let limit = limit(&site, &coord);
    // The prepare of the first comes when all is over; so does the decision of the second.
    let stops = ["prepare", "decide", "decided", "deliver", "forget"].map(|step| {
        let (config, coord, all, ttl) = (&config, &coord, &all, site.ttl());
        async move {
            let committed = !matches!(step, "prepare" | "decide");
            let mut scenario = Scenario::begin(config, coord, "stops", &format!("{step} 1 stop")).await;
            scenario.driver.send("commit").await;
            scenario.driver.stopped().await;
            let took = scenario.over(all, limit).await;
            sleep(ttl.saturating_sub(took)).await;
            scenario.driver.resume().await;
            // It was decided without it, carried out and forgotten: it does not guess which way it went.
            let wanted = if committed { Decision::Commit.to_string() } else { "error ambiguous".to_owned() };
            let answer = scenario.driver.answer().await;
            assert!(answer.starts_with(&wanted), "{}: {answer}", scenario.name);
            scenario.assert_ended(coord, committed).await;
            scenario.driver.exit().await;
            took
        }
    });
    let took = join_all(stops).await;
    until_clean(&coord, "stops", &[&coord], Duration::from_secs(10)).await;
    println!("      {}: over {} after the stop, ttl {:?}", site.backend, span(&took), site.ttl());
}

async fn a_killed_recoverer_is_followed_by_another(site: Arc<Site>) {
    let config = site.config();
    let coord = connect_long(&config).await;
    // The driver's death, the recoverer's, and whether a decision to commit stands.
    let fates = [
        ("voted 2", "taken 1", false),
        ("decide 1", "decide 1", false),
        ("decide 1", "decided 1", false),
        ("decide 1", "acknowledged 1", false),
        ("decided 1", "taken 1", true),
        ("decided 1", "deliver 1", true),
        ("acknowledged 1", "forget 1", true),
    ];
    let limit = limit(&site, &coord);
    let deaths = fates.into_iter().enumerate().map(|(number, (first, second, committed))| {
        let (config, coord) = (&config, &coord);
        async move {
            let name = format!("heirs{number}");
            let mut scenario = Scenario::begin(config, coord, &name, &format!("{first} kill")).await;
            scenario.driver.send("commit").await;
            scenario.driver.killed().await;
            let mut heir = Actor::start(config);
            assert_eq!(heir.ask(&format!("recover {name} {second} kill")).await, "recovering");
            heir.killed().await;
            let (all, _) = group(coord, &name, TransactionsOptions::default()).expect("a good name");
            let _recoverer = all.recover_with(eager());
            // The lock of the dead recoverer ends with its session; the looks every now and then find it free.
            let took = scenario.over(&all, limit + Duration::from_secs(1)).await;
            scenario.assert_ended(coord, committed).await;
            until_clean(coord, &name, &[coord], Duration::from_secs(5)).await;
            took
        }
    });
    let took = join_all(deaths).await;
    println!("      {}: over {} after the second kill, ttl {:?}", site.backend, span(&took), site.ttl());
}

/// A transaction of the test itself, one of whose participants another process serves.
async fn served(coord: &Coordinator, name: &str, within: Duration) -> (Decision, [String; 2]) {
    let keys = ["left", "right"].map(|side| format!("{name}/{side}"));
    for key in &keys {
        coord.kv().put(key, "old").await.expect("put");
    }
    let all = coord.transactions_with(name, TransactionsOptions::default().within(within)).expect("a good name");
    all.enlist_keys("left", coord).expect("enlisted");
    let tx = all.begin().branch("left", KeyWork::new().put(&keys[0], "new"));
    let outcome = tx.remote("right", KeyWork::new().put(&keys[1], "new")).commit().await.expect("an outcome");
    (outcome.decision, keys)
}

async fn a_killed_participant_is_replaced_by_its_stand_by_or_its_restart(site: Arc<Site>) {
    let config = site.config();
    let coord = connect_long(&config).await;
    let limit = 2 * limit(&site, &coord) + Duration::from_secs(5);
    // Where it dies, whether somebody stands by or it is started again, and whether that comes in time for the vote.
    let fates = [
        ("vote", true, limit, Decision::Commit),
        ("vote", false, limit, Decision::Commit),
        ("vote", false, Duration::from_secs(1), Decision::Abort),
        ("voted", true, limit, Decision::Commit),
        ("voted", false, limit, Decision::Commit),
    ];
    let deaths = fates.into_iter().enumerate().map(|(number, (step, stands_by, within, decision))| {
        let (config, coord) = (&config, &coord);
        async move {
            let name = format!("served{number}");
            let mut first = Actor::start(config);
            first.ask(&format!("serve {name} right {step} 1 kill")).await;
            assert_eq!(first.ask("serves").await, "serving");
            let mut second = Actor::start(config);
            let serve = format!("serve {name} right never 1 kill");
            if stands_by {
                second.ask(&serve).await;
            }
            let replacing = async {
                first.killed().await;
                let killed = Instant::now();
                if within < limit {
                    sleep(2 * within).await;
                }
                if !stands_by {
                    second.ask(&serve).await;
                }
                assert_eq!(second.ask("serves").await, "serving");
                killed
            };
            let (outcome, killed) = tokio::join!(timeout(2 * limit, served(coord, &name, within)), replacing);
            let (decided, keys) = outcome.expect("it ends in time");
            assert_eq!(decided, decision, "{name}: {step}");
            until_clean(coord, &name, &[coord], Duration::from_secs(10)).await;
            let took = killed.elapsed();
            let wanted = if decision == Decision::Commit { "new" } else { "old" };
            for key in &keys {
                let now = coord.kv().get(key).await.expect("get").expect("exists").value;
                assert_eq!(now, wanted, "{name}: {key}, killed at {step}");
            }
            second.exit().await;
            took
        }
    });
    let took = join_all(deaths).await;
    println!("      {}: over {} after the kill, ttl {:?}", site.backend, span(&took), site.ttl());
}

/// It is stopped before it prepares. Its stand-by prepares and commits, others write the key again, and while the decision
/// still stands in the log the late prepare arrives.
async fn a_stopped_participant_that_wakes_takes_nothing_back(site: Arc<Site>) {
    let config = site.config();
    let coord = connect_long(&config).await;
    let (arrived, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (hook_arrived, hook_go) = (arrived.clone(), go.clone());
    let within = 2 * limit(&site, &coord) + Duration::from_secs(5);
    let options = TransactionsOptions::default().within(within).on_step(move |_, step| {
        let (arrived, go) = (hook_arrived.clone(), hook_go.clone());
        Box::pin(async move {
            if step == Step::Forget {
                arrived.notify_one();
                go.notified().await;
            }
        })
    });
    let mut first = Actor::start(&config);
    first.ask("serve wakes right ask 1 stop").await;
    assert_eq!(first.ask("serves").await, "serving");
    let mut second = Actor::start(&config);
    second.ask("serve wakes right never 1 kill").await;
    let slow = coord.transactions_with("wakes", options).expect("a good name");
    let outcome = slow.begin().remote("right", KeyWork::new().put("k", "first")).commit();
    let outcome = timeout(2 * within, outcome).await.expect("it ends in time").expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    arrived.notified().await;

    let (all, [_, right]) = group(&coord, "wakes", TransactionsOptions::default()).expect("a good name");
    let next = all.begin().branch("right", KeyWork::new().put("k", "second")).commit().await.expect("an outcome");
    assert!(next.is_committed(), "{next:?}");
    first.resume().await;
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let now = right.get("k").await.expect("get").expect("exists").value;
        assert_eq!(now, "second", "a transaction was committed twice");
        sleep(Duration::from_millis(20)).await;
    }
    go.notify_one();
    until_clean(&coord, "wakes", &[&coord], Duration::from_secs(15)).await;
    assert_eq!(right.get("k").await.expect("get").expect("exists").value, "second");
    // And it serves again when it is its turn.
    second.exit().await;
    assert_eq!(first.ask("serves").await, "serving");
    first.exit().await;
}
