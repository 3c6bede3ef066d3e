//! Transactions through kills of the server that holds the log and the keys.
//!
//! Promise: every case has a server of its own, and kills it for real.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate::{
    Coordinator,
    commit::{TransactionsOptions, TxId},
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{NAMES, eager};
use crate::{
    bank::{Bank, Part, TOTAL, Told, watched::Note},
    cases,
    site::{Site, connect, connect_long},
};

cases!("commit_outage":
    transfers_go_through_kills_of_the_server_and_none_is_lost_in_silence,
);

const TELLERS: usize = 4;
/// How long the server is down each time: the last time for longer than a decision is waited for.
const DOWN: [Duration; 3] = [Duration::from_millis(200), Duration::ZERO, Duration::from_secs(5)];
/// How long a server runs between two kills.
const RUNS: Duration = Duration::from_millis(1500);
/// How long everything may need to be whole again after the server answers.
const RECOVERY: Duration = Duration::from_secs(30);

fn open(coord: &Coordinator) -> Bank {
    let options = TransactionsOptions::default().within(Duration::from_secs(3));
    let parts = NAMES.map(|name| Part::new(name, coord));
    Bank::open(coord, "restarts", &parts, None, options, &Note::nobody()).expect("good names")
}

async fn transfers_go_through_kills_of_the_server_and_none_is_lost_in_silence(site: Arc<Site>) {
    let config = site.config();
    let judge = connect_long(&config).await;
    let bank = open(&judge);
    bank.fill().await.expect("filled");
    let _recoverer = bank.all.recover_with(eager());
    let told: Arc<Mutex<HashMap<TxId, Told>>> = Arc::default();
    let (mut coords, mut tellers) = (Vec::new(), JoinSet::new());
    for _ in 0..TELLERS {
        let coord = connect(&config).await;
        let (bank, told) = (open(&coord), told.clone());
        coords.push(coord);
        tellers.spawn(async move {
            let tell = |id, outcome| _ = told.lock().expect("no poison").insert(id, outcome);
            bank.work(Duration::from_millis(20), tell).await;
        });
    }
    let mut counted = Vec::new();
    for down in DOWN {
        sleep(RUNS).await;
        counted.push(told.lock().expect("no poison").len());
        site.server().kill().await.expect("the server dies");
        sleep(down).await;
        site.server().restart().await.expect("the server starts with its data");
        // Until somebody is served again.
        let before = told.lock().expect("no poison").len();
        let served = async {
            while told.lock().expect("no poison").len() < before + 2 * TELLERS {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(RECOVERY, served).await.expect("transfers go on after a restart");
    }
    sleep(RUNS).await;
    // Stopped in the middle: what they were at is for their drivers in the background.
    tellers.abort_all();
    while let Some(ended) = tellers.join_next().await {
        assert!(ended.is_err_and(|why| why.is_cancelled()), "a teller panicked");
    }
    bank.settled(&judge, RECOVERY).await;
    let told = told.lock().expect("no poison").clone();
    let (wrong, effective) = bank.audit(&told).await.expect("all can be read");
    assert_eq!(wrong, Vec::<String>::new());
    assert_eq!(bank.total().await.expect("a total"), TOTAL);
    let count = |wanted| told.values().filter(|told| **told == wanted).count();
    let (committed, unknown) = (count(Told::Committed), count(Told::Unknown));
    println!(
        "      {}: {} kills, {} transfers, {committed} committed, {unknown} not known, {effective} took effect",
        site.backend,
        DOWN.len(),
        told.len()
    );
    assert!(committed >= 20 && counted[0] > 0, "too little happened to show anything: {counted:?}, {committed}");
    drop(coords);
}
