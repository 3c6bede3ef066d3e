//! Connections that break at the worst moment.

use std::{sync::Arc, time::Duration};

use quorate::{
    ErrorKind,
    commit::{Branch, Decision, Participant, Step, TxId, Vote},
    grpc::{GrpcOptions, GrpcParticipant},
};
use quorate_testkit::proxy::{Direction, FaultProxy};
use tokio::time::{Instant, timeout};
use tonic::transport::Endpoint;

use crate::support::{Book, Process, SOON, Space, State, ended, fails, listed, quick};

/// Which call's answer gets lost.
#[derive(Debug, Clone, Copy)]
enum Lost {
    Prepare,
    Commit,
    Abort,
}

/// The request is forwarded, the connection breaks before the answer.
async fn answer_lost(lost: Lost) {
    let space = Space::memory();
    let (local, ledger) = (if matches!(lost, Lost::Abort) { Book::refusing() } else { Book::new() }, Book::new());
    let process = Process::serve(ledger.clone()).await;
    let proxy = Arc::new(FaultProxy::start(process.addr).await.expect("a port"));
    let coord = space.coord().await;
    // Two instances, so that there would be another to ask.
    let _first = listed(&coord, proxy.addr(), "ledger-1", "eu-1").await;
    let _second = listed(&coord, proxy.addr(), "ledger-2", "eu-1").await;
    let hook_proxy = proxy.clone();
    let options = quick().on_step(move |_, step| {
        let proxy = hook_proxy.clone();
        let bites = match (lost, step) {
            (Lost::Prepare, Step::Prepare(name)) => name == "ledger",
            (Lost::Commit, Step::Decided(Decision::Commit)) | (Lost::Abort, Step::Decided(Decision::Abort)) => true,
            _ => false,
        };
        Box::pin(async move {
            if bites && proxy.counters().answers_lost == 0 {
                proxy.cut_after_forward_of("the-body", 1);
            }
        })
    });
    let all = coord.transactions_with("payments", options).expect("a good name");
    all.enlist("local", local.clone()).expect("enlisted");
    let service = GrpcParticipant::discover(&coord, "ledger-service").await.expect("followed");
    all.enlist("ledger", Arc::new(service)).expect("enlisted");
    let tx = all.begin().branch("local", "1").branch("ledger", "the-body");
    let outcome = timeout(SOON, tx.commit()).await.expect("in time").expect("an outcome");
    assert_eq!(proxy.counters().answers_lost, 1, "the fault has bitten");
    match lost {
        Lost::Prepare => {
            assert_eq!(outcome.decision, Decision::Abort);
            assert!(outcome.refusals[0].why.contains("it may stand prepared; an abort follows"), "{outcome:?}");
            ended(outcome.id, State::Aborted, &[&local, &ledger]).await;
            assert_eq!(ledger.count("prepare", outcome.id), 1, "what may have been seen is not sent to another");
        }
        Lost::Commit => {
            assert!(outcome.is_committed(), "{outcome:?}");
            ended(outcome.id, State::Committed, &[&local, &ledger]).await;
            assert_eq!(ledger.count("commit", outcome.id), 2, "it is told again");
        }
        Lost::Abort => {
            assert_eq!(outcome.decision, Decision::Abort);
            ended(outcome.id, State::Aborted, &[&ledger]).await;
            crate::support::eventually("told again", async || ledger.count("abort", outcome.id) == 2).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vote_that_is_lost_is_none_and_the_branch_is_aborted() {
    answer_lost(Lost::Prepare).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_told_again() {
    answer_lost(Lost::Commit).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_whose_answer_is_lost_is_told_again() {
    answer_lost(Lost::Abort).await;
}

fn through(proxy: &FaultProxy, limit: Duration) -> GrpcParticipant {
    let endpoint = Endpoint::from_shared(format!("http://{}", proxy.addr())).expect("a URI");
    GrpcParticipant::connect_to(endpoint, GrpcOptions::default().timeout(limit)).expect("good options")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_ambiguous_and_the_next_call_has_a_connection_of_its_own() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    let proxy = FaultProxy::start(process.addr).await.expect("a port");
    let remote = through(&proxy, Duration::from_secs(5));
    let branch = Branch::new("g", TxId::random(), "ledger", "the-body");
    assert_eq!(remote.prepare(&branch).await.expect("an answer"), Vote::Yes);
    proxy.cut_after_forward_of("the-body", 1);
    fails(remote.commit(&branch).await, ErrorKind::Ambiguous, &["commit g/", "told again"]);
    assert!(remote.commit(&branch).await.is_ok(), "a new connection is made");
    assert_eq!((proxy.counters().answers_lost, book.state(branch.id)), (1, Some(State::Committed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_does_not_answer_is_not_used_again() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    let proxy = FaultProxy::start(process.addr).await.expect("a port");
    let remote = through(&proxy, Duration::from_millis(2_200));
    let branch = Branch::new("g", TxId::random(), "ledger", "x");
    assert_eq!(remote.prepare(&branch).await.expect("an answer"), Vote::Yes);
    assert_eq!(proxy.counters().accepted, 1);
    proxy.hold(Direction::ToServer);
    let started = Instant::now();
    fails(remote.commit(&branch).await, ErrorKind::Ambiguous, &["no answer", "2.2s"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(book.state(branch.id), Some(State::Prepared));
    proxy.heal().await;
    assert!(remote.commit(&branch).await.is_ok());
    assert_eq!(proxy.counters().accepted, 2, "the old connection is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_travelled_slowly_is_refused_after_its_abort() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    let proxy = FaultProxy::start(process.addr).await.expect("a port");
    let (slow, direct) = (
        through(&proxy, Duration::from_secs(30)),
        GrpcParticipant::connect(&format!("http://{}", process.addr)).expect("a URI"),
    );
    let warm = Branch::new("g", TxId::random(), "ledger", "x");
    assert_eq!(slow.prepare(&warm).await.expect("an answer"), Vote::Yes);
    proxy.hold(Direction::ToServer);
    let branch = Branch::new("g", TxId::random(), "ledger", "x");
    let asked = branch.clone();
    let late = tokio::spawn(async move { slow.prepare(&asked).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(direct.abort(&branch).await.is_ok());
    assert_eq!(book.count("prepare", branch.id), 0);
    proxy.heal().await;
    let vote = timeout(SOON, late).await.expect("in time").expect("no panic").expect("an answer");
    assert_eq!(vote, Vote::No("it is over".to_owned()));
    assert_eq!((book.state(branch.id), book.breaches()), (Some(State::Aborted), vec![]));
}
