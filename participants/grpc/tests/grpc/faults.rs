//! Connections that break at the worst moment.

use std::{sync::Arc, time::Duration};

use quorate::{
    ErrorKind,
    commit::{Branch, Decision, Participant, Step, TransactionsOptions, TxId, Vote},
    grpc::{GrpcOptions, GrpcParticipant},
};
use quorate_testkit::proxy::{Direction, FaultProxy};
use tokio::time::{Instant, timeout};
use tonic::transport::Endpoint;

use crate::support::{Book, Process, SOON, Space, State, ended, eventually, fails, listed, quick};

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
            eventually("told again", async || ledger.count("abort", outcome.id) == 2).await;
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

/// Two instances of one resource behind proxies that break, and drivers that go on.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_mixed_while_connections_break_all_the_time() {
    const DRIVERS: usize = 4;
    const FOR: Duration = Duration::from_secs(4);
    let space = Space::memory();
    let (local, ledger) = (Book::new(), Book::new());
    let registrar = space.coord().await;
    let (mut processes, mut proxies, mut registrations) = (Vec::new(), Vec::new(), Vec::new());
    for id in ["ledger-1", "ledger-2"] {
        let process = Process::serve(ledger.clone()).await;
        let proxy = FaultProxy::start(process.addr).await.expect("a port");
        registrations.push(listed(&registrar, proxy.addr(), id, "eu-1").await);
        processes.push(process);
        proxies.push(proxy);
    }
    let breaking = async {
        for round in 0_u32.. {
            let proxy = &proxies[usize::from(round % 2 == 0)];
            match round % 3 {
                0 => proxy.cut_after_forward_of("the-body", 2),
                1 => proxy.hold(if round % 2 == 0 { Direction::ToServer } else { Direction::ToClient }),
                _ => proxy.delay(Direction::ToClient, Duration::from_millis(40)),
            }
            // Every other hold outlasts the limit of a call.
            tokio::time::sleep(Duration::from_millis(if round % 12 == 1 { 600 } else { 60 })).await;
            proxy.heal().await;
        }
    };
    let mut drivers = tokio::task::JoinSet::new();
    let mut coords = Vec::new();
    for _ in 0..DRIVERS {
        let coord = space.coord().await;
        let options = TransactionsOptions::default().within(Duration::from_millis(800));
        let all = coord.transactions_with("payments", options).expect("a good name");
        all.enlist("local", local.clone()).expect("enlisted");
        let options = GrpcOptions::default().timeout(Duration::from_millis(400));
        let service = GrpcParticipant::discover_with(&coord, "ledger-service", options).await.expect("followed");
        all.enlist("ledger", Arc::new(service)).expect("enlisted");
        coords.push(coord);
        drivers.spawn(async move {
            let mut outcomes = Vec::new();
            let started = Instant::now();
            while started.elapsed() < FOR {
                let outcome = all.begin().branch("local", "1").branch("ledger", "the-body").commit().await;
                let outcome = outcome.expect("the coordinator is well");
                outcomes.push((outcome.id, if outcome.is_committed() { State::Committed } else { State::Aborted }));
            }
            outcomes
        });
    }
    let driven = async { drivers.join_all().await.into_iter().flatten().collect::<Vec<_>>() };
    let outcomes = tokio::select! {
        outcomes = timeout(Duration::from_secs(60), driven) => outcomes.expect("in time"),
        () = breaking => unreachable!("it breaks for ever"),
    };
    for proxy in &proxies {
        proxy.heal().await;
    }
    for (id, end) in &outcomes {
        let sides = || [local.state(*id), ledger.state(*id)];
        eventually("nobody is in doubt", async || !sides().contains(&Some(State::Prepared))).await;
        match end {
            State::Committed => assert_eq!(sides(), [Some(State::Committed); 2], "{id}"),
            _ => assert!(!sides().contains(&Some(State::Committed)), "{id}: {:?}", sides()),
        }
    }
    assert_eq!((local.breaches(), ledger.breaches()), (vec![], vec![]));
    let lost: u64 = proxies.iter().map(|proxy| proxy.counters().answers_lost).sum();
    let committed = outcomes.iter().filter(|(_, end)| *end == State::Committed).count();
    println!("{committed} of {} committed, {lost} answers lost", outcomes.len());
    assert!(lost >= 5, "the faults have bitten");
    assert!(committed * 10 >= outcomes.len() * 3, "too little succeeded to show anything: {committed}");
}
