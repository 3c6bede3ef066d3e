//! Transactions across processes, whose participants are found by discovery.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate::{
    Coordinator, ErrorKind,
    balance::{Balancer, Strategy},
    commit::{Branch, Decision, Participant, RecoverOptions, Step, Transactions, TransactionsOptions, TxId, Vote},
    discovery::Instance,
    grpc::{GrpcOptions, GrpcParticipant},
};
use quorate_testkit::servers::{Redis, RedisOptions};
use tokio::{
    sync::{Mutex, Notify},
    time::{Instant, sleep, timeout},
};

use crate::{
    calls::Foreign,
    support::{Book, Process, SOON, Space, State, ended, eventually, fails, listed, quick},
};

async fn found(coord: &Coordinator) -> Arc<GrpcParticipant> {
    Arc::new(GrpcParticipant::discover(coord, "ledger-service").await.expect("followed"))
}

/// A group with a book of this process, and the service that is found by its name.
async fn group(coord: &Coordinator, local: &Arc<Book>, options: TransactionsOptions) -> Transactions {
    let all = coord.transactions_with("payments", options).expect("a good name");
    all.enlist("local", local.clone()).expect("enlisted");
    all.enlist("ledger", found(coord).await).expect("enlisted");
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn one_local_and_two_remote_participants_end_as_the_votes_say() {
    for stock_agrees in [true, false] {
        let space = Space::memory();
        let (local, ledger) = (Book::new(), Book::new());
        let stock = if stock_agrees { Book::new() } else { Book::refusing() };
        let _ledger = Process::serve(ledger.clone()).await.registered(&space, "ledger-1").await;
        let stocks = Process::serve(stock.clone()).await;
        let coord = space.coord().await;
        let all = group(&coord, &local, quick()).await;
        let fixed = GrpcParticipant::connect(&format!("http://{}", stocks.addr)).expect("a URI");
        all.enlist("stock", Arc::new(fixed)).expect("enlisted");

        let tx = all.begin().branch("local", "1").branch("ledger", "-30").branch("stock", "+1");
        let outcome = timeout(SOON, tx.commit()).await.expect("in time").expect("an outcome");
        assert_eq!(outcome.is_committed(), stock_agrees, "{outcome:?}");
        assert_eq!(outcome.unfinished, Vec::<String>::new());
        if stock_agrees {
            ended(outcome.id, State::Committed, &[&local, &ledger, &stock]).await;
        } else {
            let against: Vec<_> = outcome.refusals.iter().map(|r| (&*r.participant, &*r.why)).collect();
            assert_eq!(against, [("stock", "as the script says")]);
            ended(outcome.id, State::Aborted, &[&local, &ledger]).await;
            assert_eq!(stock.state(outcome.id), None);
        }
        let asked = ledger.calls();
        assert_eq!((&*asked[0].1.participant, &*asked[0].1.body), ("ledger", &b"-30"[..]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_between_vote_and_decision_is_told_when_it_is_back() {
    let space = Space::memory();
    let (local, ledger) = (Book::new(), Book::new());
    let process = Process::serve(ledger.clone()).await.registered(&space, "ledger-1").await;
    let addr = process.addr;
    let process = Arc::new(Mutex::new(process));
    let (killed, hook) = (process.clone(), Arc::new(AtomicBool::new(false)));
    let options = quick().on_step(move |_, step| {
        let (process, done) = (killed.clone(), hook.clone());
        Box::pin(async move {
            if matches!(step, Step::Decided(_)) && !done.swap(true, Ordering::AcqRel) {
                process.lock().await.kill();
            }
        })
    });
    let coord = space.coord().await;
    let all = group(&coord, &local, options).await;
    let tx = all.begin().branch("local", "1").branch("ledger", "-30");
    let id = tx.id();
    let commit = tokio::spawn(tx.commit());
    eventually("it was told in vain", async || local.state(id) == Some(State::Committed)).await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(ledger.state(id), Some(State::Prepared), "nobody decides alone");
    let _back = Process::serve_at(addr, ledger.clone()).await.registered(&space, "ledger-1").await;
    let outcome = timeout(SOON, commit).await.expect("in time").expect("no panic").expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    ended(id, State::Committed, &[&local, &ledger]).await;
    assert_eq!(ledger.count("commit", id), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_instance_it_is_aborted_in_time_and_for_a_clear_reason() {
    let space = Space::memory();
    let local = Book::new();
    let coord = space.coord().await;
    let all = group(&coord, &local, quick().within(Duration::from_secs(1))).await;
    let started = Instant::now();
    let outcome = all.begin().branch("local", "1").branch("ledger", "x").commit().await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    let [refusal] = &outcome.refusals[..] else { panic!("{outcome:?}") };
    assert_eq!(refusal.participant, "ledger");
    assert!(refusal.why.contains("no instance of \"ledger-service\" is registered"), "{refusal:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    ended(outcome.id, State::Aborted, &[&local]).await;

    // The same if they are registered, and dead.
    let ledger = Book::new();
    let registrar = space.coord().await;
    let mut registrations = Vec::new();
    for id in ["ledger-1", "ledger-2"] {
        let mut process = Process::serve(ledger.clone()).await;
        registrations.push(listed(&registrar, process.addr, id, "eu-1").await);
        process.kill();
    }
    let seen = coord.discover("ledger-service").await.expect("followed");
    seen.until(|now| now.len() == 2).await;
    let started = Instant::now();
    let outcome = all.begin().branch("local", "1").branch("ledger", "x").commit().await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    let why = &outcome.refusals[0].why;
    assert!(why.contains("none of 2 instances could be asked") && why.contains("onnection refused"), "{why}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    ended(outcome.id, State::Aborted, &[&local]).await;
    assert_eq!(ledger.calls(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_drains_is_not_asked_to_prepare_and_is_told_outcomes() {
    let space = Space::memory();
    let ledger = Book::new();
    let draining = Process::serve(ledger.clone()).await.registered(&space, "ledger-1").await;
    let coord = space.coord().await;
    let service = found(&coord).await;
    let branch = Branch::new("g", TxId::random(), "ledger", "x");
    assert_eq!(service.prepare(&branch).await.expect("an answer"), Vote::Yes);

    let registration = draining.registration.as_ref().expect("registered");
    registration.drain().expect("it drains");
    let seen = coord.discover("ledger-service").await.expect("followed");
    seen.until(|now| now.len() == 1 && now.passing().count() == 0).await;
    let other = Branch::new("g", TxId::random(), "ledger", "x");
    eventually("no prepare goes there", async || service.prepare(&other).await.is_err()).await;
    let asked = ledger.count("prepare", other.id);
    let refused = service.prepare(&other).await;
    fails(refused, ErrorKind::Unavailable, &["takes requests", "1 draining"]);
    assert_eq!(ledger.count("prepare", other.id), asked);
    assert!(service.commit(&branch).await.is_ok(), "it confirms");
    assert_eq!(ledger.state(branch.id), Some(State::Committed));

    // With another beside it, that one is asked for everything.
    let fresh = Book::new();
    let _next = Process::serve(fresh.clone()).await.registered(&space, "ledger-2").await;
    seen.until(|now| now.len() == 2).await;
    eventually("the other is asked", async || service.prepare(&other).await.is_ok()).await;
    assert_eq!(fresh.state(other.id), Some(State::Prepared));
    assert!(service.abort(&other).await.is_ok());
    assert_eq!(fresh.state(other.id), Some(State::Aborted));
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_come_and_go_and_every_call_finds_one() {
    let space = Space::memory();
    let ledger = Book::new();
    let coord = space.coord().await;
    let service = found(&coord).await;
    let seen = coord.discover("ledger-service").await.expect("followed");
    let mut process = Process::serve(ledger.clone()).await.registered(&space, "ledger-0").await;
    seen.until(|now| now.len() == 1).await;
    for round in 1..=4 {
        let next = Process::serve(ledger.clone()).await;
        let next = next.registered(&space, &format!("ledger-{round}")).await;
        seen.until(|now| now.len() == 2).await;
        // Dead without a word: for its TTL it is still listed.
        let mut old = std::mem::replace(&mut process, next);
        if round % 2 == 0 {
            old.kill();
        } else {
            old.deregister().await;
        }
        for _ in 0..5 {
            let branch = Branch::new("g", TxId::random(), "ledger", "x");
            // It may be killed while a connection to it stands: that answer is lost, as it may be.
            let mut vote = service.prepare(&branch).await;
            if vote.as_ref().is_err_and(|error| error.kind() == ErrorKind::Ambiguous) {
                vote = service.prepare(&branch).await;
            }
            assert_eq!(vote.expect("an answer"), Vote::Yes, "round {round}");
            assert!(service.commit(&branch).await.is_ok());
            assert_eq!(ledger.state(branch.id), Some(State::Committed));
        }
        drop(old);
        seen.until(|now| now.len() == 1).await;
    }
    assert_eq!(ledger.breaches(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_balancer_decides_whom_to_ask() {
    let space = Space::memory();
    let (near, far) = (Book::new(), Book::new());
    let (a, b) = (Process::serve(near.clone()).await, Process::serve(far.clone()).await);
    let registrar = space.coord().await;
    let mut registrations = Vec::new();
    for (process, id, zone) in [(&a, "a", "eu-1"), (&b, "b", "eu-2")] {
        registrations.push(listed(&registrar, process.addr, id, zone).await);
    }
    let coord = space.coord().await;
    let balancer = Balancer::builder(Strategy::peak_ewma()).prefer_zone("eu-1", 1).build();
    let options = GrpcOptions::default().balancer(balancer);
    let service = GrpcParticipant::discover_with(&coord, "ledger-service", options).await.expect("followed");
    for _ in 0..20 {
        let branch = Branch::new("g", TxId::random(), "ledger", "x");
        assert_eq!(service.prepare(&branch).await.expect("an answer"), Vote::Yes);
    }
    assert_eq!((near.calls().len(), far.calls().len()), (20, 0));
    drop(a);
    let branch = Branch::new("g", TxId::random(), "ledger", "x");
    eventually("the other zone is better than none", async || service.commit(&branch).await.is_ok()).await;
    assert!(far.count("commit", branch.id) >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_without_a_usable_address_is_passed_over() {
    let space = Space::memory();
    let ledger = Book::new();
    let coord = space.coord().await;
    let service = found(&coord).await;
    let registrar = space.coord().await;
    let bad = registrar.register(Instance::new("ledger-service", "no host").id("a")).expect("any text");
    bad.ready().await.expect("registered");
    let branch = Branch::new("g", TxId::random(), "ledger", "x");
    let seen = coord.discover("ledger-service").await.expect("followed");
    seen.until(|now| now.len() == 1).await;
    eventually("seen", async || {
        let error = service.prepare(&branch).await.expect_err("nobody else is there");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        error.to_string().contains("a at no host: no usable address")
    })
    .await;
    let _good = Process::serve(ledger.clone()).await.registered(&space, "b").await;
    seen.until(|now| now.len() == 2).await;
    eventually("seen", async || service.in_doubt("g").await.is_ok()).await;
    for _ in 0..20 {
        assert_eq!(service.prepare(&branch).await.expect("an answer"), Vote::Yes);
    }
}

/// Drain, finish, deregister: under load, and with nothing but one other instance at any time.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_fails_no_transaction() {
    let space = Space::memory();
    let (local, ledger) = (Book::new(), Book::new());
    let coord = space.coord().await;
    let mut process = Process::serve(ledger.clone()).await.registered(&space, "ledger-0").await;
    let all = group(&coord, &local, quick()).await;
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut load = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (all, stop, done) = (all.clone(), stop.clone(), done.clone());
        load.spawn(async move {
            let mut ids = Vec::new();
            while !stop.load(Ordering::Acquire) {
                let outcome = all.begin().branch("local", "1").branch("ledger", "x").commit().await;
                let outcome = outcome.expect("an outcome");
                assert!(outcome.is_committed() && outcome.unfinished.is_empty(), "{outcome:?}");
                ids.push(outcome.id);
                done.fetch_add(1, Ordering::AcqRel);
            }
            ids
        });
    }
    let seen = coord.discover("ledger-service").await.expect("followed");
    for round in 1..=5 {
        eventually("load", async || {
            let ended = load.try_join_next().map(|ended| ended.expect("no transaction fails"));
            ended.is_some() || done.load(Ordering::Acquire) >= 30 * round
        })
        .await;
        let next = Process::serve(ledger.clone()).await;
        let next = next.registered(&space, &format!("ledger-{round}")).await;
        let mut old = std::mem::replace(&mut process, next);
        let registration = old.registration.as_ref().expect("registered");
        registration.drain().expect("it drains");
        registration.ready().await.expect("everybody can see it");
        seen.until(|now| now.passing().count() == 1).await;
        old.finish().await;
        old.deregister().await;
    }
    stop.store(true, Ordering::Release);
    let mut ids = Vec::new();
    while let Some(ended) = load.join_next().await {
        ids.extend(ended.expect("no transaction fails"));
    }
    assert!(ids.len() >= 150, "a task has failed: {}", ids.len());
    for id in ids {
        ended(id, State::Committed, &[&local, &ledger]).await;
    }
}

/// As while a new version is rolled out: one of two instances does not know the caller's.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_does_not_know_the_call_is_passed_over() {
    let space = Space::memory();
    let ledger = Book::new();
    let addr = "127.0.0.1:0".parse().expect("an address");
    let other = Process::run(addr, tonic::transport::Server::builder().add_service(Foreign::default())).await;
    let ours = Process::serve(ledger.clone()).await;
    let registrar = space.coord().await;
    let _a = listed(&registrar, other.addr, "a", "eu-1").await;
    let coord = space.coord().await;
    let service = found(&coord).await;
    fails(service.in_doubt("g").await, ErrorKind::Unsupported, &["a at 127.0.0.1"]);
    let _b = listed(&registrar, ours.addr, "b", "eu-1").await;
    coord.discover("ledger-service").await.expect("followed").until(|now| now.len() == 2).await;
    eventually("the other is asked", async || service.in_doubt("g").await.is_ok()).await;
    for _ in 0..20 {
        assert_eq!(service.in_doubt("g").await.expect("an answer"), []);
    }
}

/// The driver dies at each of these steps; a recoverer in another process, which has never heard of an address, ends it.
async fn recovered(space: &Space) {
    let (local, ledger) = (Book::new(), Book::new());
    let _process = Process::serve(ledger.clone()).await.registered(space, "ledger-1").await;
    for (step, end) in [
        (Step::Voted("ledger".to_owned()), State::Aborted),
        (Step::Decided(Decision::Commit), State::Committed),
        (Step::Deliver("ledger".to_owned()), State::Committed),
    ] {
        let (dead, died) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let (hook_died, at) = (died.clone(), step.clone());
        let options = quick().on_step(move |_, now| {
            let (dead, died, at) = (dead.clone(), hook_died.clone(), at.clone());
            Box::pin(async move {
                if now == at && !dead.swap(true, Ordering::AcqRel) {
                    died.notify_one();
                }
                if dead.load(Ordering::Acquire) {
                    std::future::pending::<()>().await;
                }
            })
        });
        let driver = space.coord().await;
        let all = group(&driver, &local, options).await;
        let tx = all.begin().branch("local", "1").branch("ledger", "-30");
        let id = tx.id();
        let commit = tokio::spawn(tx.commit());
        timeout(SOON, died.notified()).await.expect("it comes to the step");
        driver.session().await.expect("it has one").orphan();
        driver.close().await.expect("nothing is sent");
        eventually("it voted", async || ledger.state(id) == Some(State::Prepared)).await;

        let coord = space.coord().await;
        let rescue = group(&coord, &local, quick()).await;
        let short = Duration::from_millis(100);
        let eager = RecoverOptions::default().every(short).grace(short).remember(Duration::ZERO);
        let _recoverer = rescue.recover_with(eager);
        ended(id, end, &[&local, &ledger]).await;
        commit.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recoverer_finds_the_service_by_its_name_and_finishes_what_a_dead_driver_left() {
    recovered(&Space::memory()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recoverer_finds_the_service_on_a_real_coordinator_too() {
    let server = Redis::start(RedisOptions::default()).await.expect("redis-server runs");
    recovered(&Space::at(&server.url())).await;
}
