//! Partitions: every one has an owner, never two, and they follow the members.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate_core::{Coordinator, ErrorKind, FencingToken, partition::Share};
use tokio::time::sleep;

use super::{coord, coord_over, standard};
use crate::{
    Clients,
    support::{QUIET, Running, SOON, cases, client, eventually, refused, spawn, within},
};

cases!("partition":
    partitions_are_spread_evenly_and_never_owned_twice,
    the_next_owner_starts_when_the_old_one_has_finished,
    partitions_of_a_dead_member_are_taken_over,
    a_partition_given_back_unasked_is_offered_again,
    more_members_than_partitions_leave_some_idle,
    offers_that_nobody_takes_go_to_a_newcomer,
    numbers_that_cannot_be_are_refused,
);

/// Who owns what now, and the tokens that each partition has had.
#[derive(Debug, Default)]
struct Ledger(Mutex<(HashMap<u32, String>, HashMap<u32, FencingToken>)>, Mutex<Vec<String>>);

impl Ledger {
    fn begin(&self, index: u32, owner: &str, token: FencingToken) {
        let mut book = self.0.lock().expect("no poison");
        let other = book.0.insert(index, owner.to_owned());
        // Kept for the case: a panic would only end the task of this partition.
        let mut wrong = self.1.lock().expect("no poison");
        if let Some(other) = other {
            wrong.push(format!("partition {index} has two owners: {other} and {owner}"));
        }
        let last = book.1.insert(index, token);
        if last.is_some_and(|last| last >= token) {
            wrong.push(format!("the tokens of partition {index} do not rise"));
        }
    }

    /// Asserts that nothing was owned twice and every token rose. Before the workers go: those that are dropped do not
    /// write down what they give back.
    fn assert_sound(&self) {
        assert_eq!(*self.1.lock().expect("no poison"), Vec::<String>::new());
    }

    fn end(&self, index: u32) {
        self.0.lock().expect("no poison").0.remove(&index);
    }

    fn share(&self, owner: &str) -> usize {
        self.0.lock().expect("no poison").0.values().filter(|other| *other == owner).count()
    }

    fn owned(&self) -> usize {
        self.0.lock().expect("no poison").0.len()
    }
}

/// A member that works on whatever it owns, and needs some time to finish when a partition is revoked.
struct Worker {
    _work: Running<()>,
}

async fn worker(coord: &Coordinator, count: u32, name: &'static str, ledger: &Arc<Ledger>, finish: Duration) -> Worker {
    let mut share: Share = coord.partitions("jobs", count).join(name).await.expect("it may join");
    let ledger = ledger.clone();
    let work = spawn(async move {
        let mut running = Vec::new();
        loop {
            let partition = share.next().await;
            let ledger = ledger.clone();
            running.push(spawn(async move {
                ledger.begin(partition.index(), name, partition.token());
                tokio::select! {
                    () = partition.revoked() => sleep(finish).await,
                    () = partition.lost() => {}
                }
                ledger.end(partition.index());
                let _ = partition.release().await;
            }));
        }
    });
    Worker { _work: work }
}

async fn partitions_are_spread_evenly_and_never_owned_twice(clients: Arc<dyn Clients>) {
    const COUNT: u32 = 12;
    // What an owner needs to finish; in it, somebody who did not wait would be seen.
    const STEP: Duration = Duration::from_millis(30);
    let ledger = Arc::new(Ledger::default());
    let (a, b, c) = (coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let _one = worker(&a, COUNT, "a", &ledger, STEP).await;
    eventually("all owned by one", async || ledger.share("a") == 12).await;
    let _two = worker(&b, COUNT, "b", &ledger, STEP).await;
    eventually("half each", async || (ledger.share("a"), ledger.share("b")) == (6, 6)).await;
    let three = worker(&c, COUNT, "c", &ledger, STEP).await;
    let shares = || ["a", "b", "c"].map(|name| ledger.share(name));
    eventually("a third each", async || shares() == [4, 4, 4]).await;
    // A process that ends in good order: its work and its session with it.
    for index in 0..COUNT {
        if ledger.0.lock().expect("no poison").0.get(&index).is_some_and(|owner| owner == "c") {
            ledger.end(index);
        }
    }
    drop(three);
    c.close().await.expect("closed");
    eventually("half each again", async || shares() == [6, 6, 0]).await;
    sleep(QUIET).await;
    assert_eq!(ledger.owned(), 12);
    ledger.assert_sound();
}

async fn the_next_owner_starts_when_the_old_one_has_finished(clients: Arc<dyn Clients>) {
    let ledger = Arc::new(Ledger::default());
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let _slow = worker(&a, 4, "slow", &ledger, Duration::from_millis(600)).await;
    eventually("all owned by one", async || ledger.share("slow") == 4).await;
    let _new = worker(&b, 4, "new", &ledger, Duration::ZERO).await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(ledger.share("new"), 0, "the old owner has not finished yet");
    eventually("half each", async || (ledger.share("slow"), ledger.share("new")) == (2, 2)).await;
    ledger.assert_sound();
}

async fn partitions_of_a_dead_member_are_taken_over(clients: Arc<dyn Clients>) {
    let ledger = Arc::new(Ledger::default());
    let mortal = coord_over(standard(client(&clients).await), clients.ttl());
    let b = coord(&clients).await;
    let dead = worker(&mortal, 4, "dead", &ledger, Duration::ZERO).await;
    let _lives = worker(&b, 4, "lives", &ledger, Duration::ZERO).await;
    eventually("half each", async || (ledger.share("dead"), ledger.share("lives")) == (2, 2)).await;
    let session = mortal.session().await.expect("a session");
    // As a crash would: nothing is given back, nobody renews any more.
    session.orphan();
    for index in 0..4 {
        if ledger.0.lock().expect("no poison").0.get(&index).is_some_and(|owner| owner == "dead") {
            ledger.end(index);
        }
    }
    drop(dead);
    let limit = session.ttl() + b.profile().expiry_lag + SOON;
    let taken_over = async {
        while ledger.share("lives") < 4 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    within(limit, "the take-over", taken_over).await;
    ledger.assert_sound();
}

async fn a_partition_given_back_unasked_is_offered_again(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let mut share = coord.partitions("jobs", 1).join("a").await.expect("it may join");
    let first = within(SOON, "the partition", share.next()).await;
    assert!(first.check().is_ok());
    let token = first.token();
    assert_eq!(first.run(async { 42 }).await.expect("owned"), Some(42));
    first.release().await.expect("released");
    let again = within(SOON, "the partition again", share.next()).await;
    assert!(again.index() == 0 && again.token() > token);
    eventually("the share is told", async || share.owned() == [0]).await;
    drop(share);
    within(SOON, "the revocation", again.revoked()).await;
    assert_eq!(again.run(std::future::pending::<()>()).await.expect("still owned"), None, "revoked work is dropped");
}

async fn offers_that_nobody_takes_go_to_a_newcomer(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let idle = a.partitions("jobs", 4).join("idle").await.expect("it may join");
    eventually("all offered to the only member", async || idle.owned().len() == 4).await;
    let mut busy = b.partitions("jobs", 4).join("busy").await.expect("it may join");
    let first = within(SOON, "a partition", busy.next()).await;
    let second = within(SOON, "another partition", busy.next()).await;
    assert_ne!(first.index(), second.index());
    eventually("half each", async || (idle.owned().len(), busy.owned().len()) == (2, 2)).await;
}

async fn more_members_than_partitions_leave_some_idle(clients: Arc<dyn Clients>) {
    let ledger = Arc::new(Ledger::default());
    let coord = coord(&clients).await;
    let mut workers = Vec::new();
    for name in ["a", "b", "c"] {
        workers.push(worker(&coord, 2, name, &ledger, Duration::ZERO).await);
    }
    eventually("both owned", async || {
        let mut shares = ["a", "b", "c"].map(|name| ledger.share(name));
        shares.sort_unstable();
        shares == [0, 1, 1]
    })
    .await;
    ledger.assert_sound();
}

async fn numbers_that_cannot_be_are_refused(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    for count in [0, quorate_core::partition::MAX_PARTITIONS + 1] {
        refused(coord.partitions("jobs", count).join("a").await, ErrorKind::InvalidInput, "a number of partitions");
    }
    refused(coord.partitions("jobs", 1).join("").await, ErrorKind::InvalidInput, "a member without a name");
    refused(coord.partitions("", 1).join("").await, ErrorKind::InvalidInput, "nothing has a name");
}
