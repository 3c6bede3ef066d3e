//! Participants in other processes, reached through the store.

use std::{sync::Arc, time::Duration};

use quorate_core::{
    Coordinator,
    commit::{Decision, RecoverOptions, Serving, Step, Transactions},
    layer::{Stack, Verb},
};
use tokio::{sync::Notify, time::sleep};

use super::{
    atomic::quick,
    book::{Book, State, assert_one_side, residue, until_clean},
    coord, coord_over,
    counting::Counted,
    short_coord, standard,
};
use crate::{
    Clients,
    support::{cases, client, eventually, spawn, within},
};

cases!("commit_remote":
    participants_of_other_processes_vote_and_follow,
    whom_nobody_serves_is_not_waited_for,
    the_phases_of_remote_participants_cost_the_driver_one_round_trip_each,
    a_server_that_dies_prepared_is_replaced_by_its_stand_by,
    a_vote_that_comes_after_the_abort_does_not_count,
    more_participants_than_fit_into_one_step,
);

/// A process that serves one participant.
struct Host {
    _coord: Coordinator,
    _all: Transactions,
    serving: Serving,
}

async fn host(clients: &Arc<dyn Clients>, group: &str, name: &str, book: &Arc<Book>) -> Host {
    let coord = coord(clients).await;
    let all = coord.transactions_with(group, quick()).expect("a good name");
    let serving = all.serve(name, book.clone()).expect("a good name");
    serving.ready().await.expect("it serves");
    Host { _coord: coord, _all: all, serving }
}

async fn participants_of_other_processes_vote_and_follow(clients: Arc<dyn Clients>) {
    let group = "remote";
    let (yes, no, looks) = (Book::new(), Book::refusing("sold out"), Book::looking());
    let _hosts = [
        host(&clients, group, "yes", &yes).await,
        host(&clients, group, "no", &no).await,
        host(&clients, group, "looks", &looks).await,
    ];
    let coord = coord(&clients).await;
    let all = coord.transactions_with(group, quick()).expect("a good name");
    let local = Book::new();
    all.enlist("local", local.clone()).expect("enlisted");

    let tx = all.begin().branch("local", "1").remote("yes", "2").remote("looks", "3");
    let outcome = tx.commit().await.expect("an outcome");
    assert!(outcome.is_committed() && outcome.unfinished.is_empty(), "{outcome:?}");
    assert_eq!(yes.state(outcome.id), Some(State::Committed));
    assert_eq!(local.state(outcome.id), Some(State::Committed));
    assert_eq!((looks.asked(outcome.id), looks.told(outcome.id)), (1, 0));

    let tx = all.begin().branch("local", "1").remote("yes", "2").remote("no", "3");
    let outcome = tx.commit().await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    let refusal = &outcome.refusals[0];
    assert_eq!((refusal.participant.as_str(), refusal.why.as_str()), ("no", "sold out"));
    eventually("the abort arrives", async || yes.state(outcome.id) == Some(State::Aborted)).await;
    assert_one_side(&[yes, local], group);
    until_clean(&coord, group, &["yes", "no", "looks"]).await;
}

async fn whom_nobody_serves_is_not_waited_for(clients: Arc<dyn Clients>) {
    let group = "unserved";
    let coord = coord(&clients).await;
    let all = coord.transactions_with(group, quick()).expect("a good name");
    let local = Book::new();
    all.enlist("local", local.clone()).expect("enlisted");
    let tx = all.begin().branch("local", "").remote("ghost", "").within(Duration::from_millis(500));
    let outcome = within(Duration::from_secs(5), "the outcome", tx.commit()).await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    assert_eq!(outcome.refusals.len(), 1, "{outcome:?}");
    assert!(outcome.refusals[0].why.contains("does anybody serve it"), "{outcome:?}");
    assert_eq!(local.state(outcome.id), Some(State::Aborted));
    // The log has forgotten; what the participant would have to know waits for it.
    eventually("only the message is left", async || residue(coord.backend(), group, &["ghost"]).await.len() == 1).await;
    let late = Book::new();
    let _host = host(&clients, group, "ghost", &late).await;
    eventually("it is told when it comes", async || late.state(outcome.id) == Some(State::Aborted)).await;
    assert_eq!(late.asked(outcome.id), 0, "nobody asks for a vote that does not count");
    until_clean(&coord, group, &["ghost"]).await;
}

async fn the_phases_of_remote_participants_cost_the_driver_one_round_trip_each(clients: Arc<dyn Clients>) {
    let group = "remote-cost";
    let names = ["p", "q", "r", "s"];
    let mut hosts = Vec::new();
    for name in names {
        hosts.push(host(&clients, group, name, &Book::new()).await);
    }
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).standard(Duration::from_secs(10)).build();
    let coord = coord_over(backend, Duration::from_secs(30));
    let all = coord.transactions_with(group, quick()).expect("a good name");
    // The driver's key and the watch of its mailbox are made once.
    assert!(all.begin().remote("p", "").commit().await.expect("an outcome").is_committed());
    for count in [1, 4] {
        until_clean(&coord, group, &names).await;
        counted.reset();
        let tx = names[..count].iter().fold(all.begin(), |tx, name| tx.remote(name, "x"));
        let outcome = tx.commit().await.expect("an outcome");
        assert!(outcome.is_committed(), "{outcome:?}");
        eventually("begin, decide, forget", async || counted.calls(Verb::Commit) == 3).await;
        assert_eq!(counted.calls(Verb::Read), 0, "votes and confirmations arrive by themselves");
    }
}

/// It prepares, dies before its vote is written, and another takes its place.
async fn a_server_that_dies_prepared_is_replaced_by_its_stand_by(clients: Arc<dyn Clients>) {
    let group = "stand-by";
    let book = Book::new();
    let reached = Arc::new(Notify::new());
    let first = short_coord(&clients).await;
    let gate = reached.clone();
    let options = quick().on_step(move |_, step| {
        let reached = gate.clone();
        Box::pin(async move {
            if matches!(step, Step::Prepare(_)) {
                reached.notify_one();
                std::future::pending::<()>().await;
            }
        })
    });
    let dying = first.transactions_with(group, options).expect("a good name");
    let serving = dying.serve("p", book.clone()).expect("a good name");
    serving.ready().await.expect("it serves");
    let second = coord(&clients).await;
    let stand_by = second.transactions_with(group, quick()).expect("a good name");
    let next = stand_by.serve("p", book.clone()).expect("a good name");
    sleep(Duration::from_millis(200)).await;

    let driver = coord(&clients).await;
    let limit = 4 * clients.ttl() + Duration::from_secs(30);
    let all = driver.transactions_with(group, quick().within(limit)).expect("a good name");
    let mut commit = spawn(all.begin().remote("p", "x").commit());
    reached.notified().await;
    assert!(tokio::time::timeout(Duration::from_millis(100), next.ready()).await.is_err(), "one serves at a time");
    first.session().await.expect("it has one").orphan();
    first.close().await.expect("nothing is sent");
    let outcome = within(limit, "the outcome", &mut commit.0).await.expect("no panic").expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    assert_eq!(book.state(outcome.id), Some(State::Committed));
    next.ready().await.expect("it serves");
    assert_one_side(&[book], group);
    until_clean(&driver, group, &["p"]).await;
    drop(serving);
}

async fn a_vote_that_comes_after_the_abort_does_not_count(clients: Arc<dyn Clients>) {
    let group = "late-vote";
    let slow = Book::slow(Duration::from_millis(900));
    let host = host(&clients, group, "slow", &slow).await;
    let coord = coord(&clients).await;
    let all = coord.transactions_with(group, quick()).expect("a good name");
    let outcome = all.begin().remote("slow", "").within(Duration::from_millis(300)).commit().await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    eventually("the abort arrives", async || slow.state(outcome.id) == Some(State::Aborted)).await;
    until_clean(&coord, group, &["slow"]).await;
    assert_one_side(&[slow.clone()], group);
    // And the one after that is not disturbed by it.
    let outcome = all.begin().remote("slow", "").commit().await.expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    assert!(format!("{:?}", host.serving).contains("active: true"));
}

async fn more_participants_than_fit_into_one_step(clients: Arc<dyn Clients>) {
    let group = "crowd";
    let coord = coord(&clients).await;
    let backend = standard(client(&clients).await);
    let count = backend.profile().max_txn + 5;
    // One process serves them all; the locks of the names are all it needs to have.
    let (serving, all) = (coord_over(backend, Duration::from_secs(30)), coord.transactions_with(group, quick()));
    let (hosted, all) = (serving.transactions_with(group, quick()).expect("a good name"), all.expect("a good name"));
    let names: Vec<_> = (0..count).map(|i| format!("p{i}")).collect();
    let book = Book::new();
    // Watches are counted by some servers: only the first few are served, the others are never asked in vain.
    let few: Vec<_> = names.iter().take(5).collect();
    let mut servings = Vec::new();
    for name in &few {
        servings.push(hosted.serve(name, book.clone()).expect("a good name"));
    }
    for serving in &servings {
        serving.ready().await.expect("it serves");
    }
    let recoverer = all.recover_with(RecoverOptions::default().every(Duration::from_millis(200)));
    let tx = names.iter().fold(all.begin(), |tx, name| tx.remote(name, "x"));
    let outcome = tx.within(Duration::from_millis(800)).commit().await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort, "not all are served");
    assert_eq!(outcome.refusals.len(), count - few.len());
    assert!(book.asked(outcome.id) >= few.len(), "those that are served were asked");
    eventually("told", async || book.state(outcome.id) == Some(State::Aborted)).await;
    // Every message that nobody takes says how it ended, however many steps it took to write them.
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    eventually("forgotten", async || residue(coord.backend(), group, &names).await.len() == count - few.len()).await;
    drop(recoverer);
}
