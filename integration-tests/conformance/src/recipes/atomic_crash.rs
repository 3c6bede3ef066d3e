//! Atomic commit when drivers and participants die, stand still, or come late.
//!
//! A crash is simulated as what others see of one: at the step its driver does nothing more, and its session is not
//! renewed any more. (Cases with real processes that are killed stand with the runs on real servers.)

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use quorate_core::{
    Backend, Coordinator, ErrorKind, Fencing,
    commit::{
        Decision, DoubtState, Protocol, RecoverOptions, Recoverer, Step, Transactions, TransactionsOptions, TxId,
    },
    layer::{Chaos, Stack},
};
use tokio::{sync::Notify, task::JoinSet, time::sleep};

use super::{
    atomic::quick,
    book::{Book, NAMES, State, assert_one_side, in_doubt, residue, until_clean, with_books},
    coord, coord_over, standard,
};
use crate::{
    Clients,
    support::{cases, client, eventually, refused, spawn},
};

cases!("commit_crash":
    whatever_step_the_driver_dies_at_all_end_on_one_side,
    a_driver_that_slept_through_its_recovery_follows_it,
    a_driver_that_slept_through_a_commit_by_hand_follows_it,
    a_prepare_that_comes_after_the_recovery_leaves_nothing,
    recoverers_at_the_same_time_do_the_work_once,
    without_a_recoverer_the_prepared_stay_in_doubt,
    what_no_driver_remembers_is_taken_back,
    nothing_is_mixed_or_lost_in_chaos,
);

fn eager() -> RecoverOptions {
    let short = Duration::from_millis(100);
    RecoverOptions::default().every(short).grace(short).remember(Duration::ZERO)
}

/// A driver that dies at one step.
struct Mortal {
    coord: Coordinator,
    all: Transactions,
    /// Somebody came to the step.
    died: Arc<Notify>,
}

impl Mortal {
    /// On a session of the short TTL; the connection may be shared.
    fn new(backend: Arc<dyn Backend>, ttl: Duration, group: &str, step: Step) -> Self {
        let coord = coord_over(backend, ttl);
        let (dead, died) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let (hook_dead, hook_died) = (dead, died.clone());
        let options = quick().on_step(move |_, now| {
            let (dead, died, step) = (hook_dead.clone(), hook_died.clone(), step.clone());
            Box::pin(async move {
                if now == step && !dead.swap(true, Ordering::AcqRel) {
                    died.notify_one();
                }
                if dead.load(Ordering::Acquire) {
                    // A dead process goes nowhere.
                    std::future::pending::<()>().await;
                }
            })
        });
        let all = coord.transactions_with(group, options).expect("a good name");
        Self { coord, all, died }
    }

    /// What others see of a death: nothing is renewed, nothing is taken back.
    async fn dies(&self) {
        self.died.notified().await;
        self.coord.session().await.expect("the driver has one").orphan();
        self.coord.close().await.expect("nothing is sent");
    }
}

/// Every step of a transaction with these votes, in an order in which they may come.
fn steps(votes: &[bool], protocol: Protocol) -> Vec<Step> {
    let decision = if votes.iter().all(|yes| *yes) { Decision::Commit } else { Decision::Abort };
    let named = |step: fn(String) -> Step| NAMES.map(|name| step(name.to_owned()));
    // Whoever voted no is told nothing.
    let told = |step: fn(String) -> Step| {
        NAMES.iter().zip(votes).filter(|(_, yes)| **yes).map(|(name, _)| step((*name).to_owned())).collect::<Vec<_>>()
    };
    [
        vec![Step::Begin, Step::Begun],
        named(Step::Prepare).into(),
        named(Step::Voted).into(),
        match (protocol, decision) {
            (Protocol::ThreePhase, Decision::Commit) => vec![Step::Ready, Step::Readied],
            _ => Vec::new(),
        },
        vec![Step::Decide(decision), Step::Decided(decision)],
        told(Step::Deliver),
        told(Step::Acknowledged),
        vec![Step::Forget, Step::Forgotten],
    ]
    .concat()
}

/// All steps × all votes of three participants, each in a group of its own; on servers, whose leases take their time to
/// end, the votes that matter most: all yes, and one no.
async fn whatever_step_the_driver_dies_at_all_end_on_one_side(clients: Arc<dyn Clients>) {
    let (drivers, recoverers) = (standard(client(&clients).await), standard(client(&clients).await));
    let mut running = JoinSet::new();
    let mut scenarios = 0;
    let in_process = drivers.profile().fencing == Fencing::Process;
    let two = (0..8_u32).map(|pattern| (pattern, Protocol::TwoPhase));
    let three = [0b111, 0b101].map(|pattern| (pattern, Protocol::ThreePhase));
    for (pattern, protocol) in two.chain(three) {
        let matters = match protocol {
            Protocol::ThreePhase => pattern == 0b111,
            _ => matches!(pattern, 0b111 | 0b101),
        };
        if !in_process && !matters {
            continue;
        }
        let votes: Vec<bool> = (0..3).map(|bit| pattern >> bit & 1 == 1).collect();
        for step in steps(&votes, protocol) {
            let (drivers, recoverers, ttl) = (drivers.clone(), recoverers.clone(), clients.ttl());
            let votes = votes.clone();
            let number = scenarios;
            running.spawn(async move { one_death(number, drivers, recoverers, ttl, &votes, (protocol, step)).await });
            scenarios += 1;
            // Servers count connections, and each recoverer needs one for its watch.
            if running.len() >= 16 {
                running.join_next().await.expect("one runs").expect("its promises are kept");
            }
        }
    }
    while let Some(ended) = running.join_next().await {
        ended.expect("its promises are kept");
    }
    let (patterns, yes, ready) = if in_process { (10, 17, 2) } else { (3, 8, 2) };
    assert_eq!(scenarios, patterns * 12 + 2 * yes + ready, "12 steps each, and two for every yes");
}

async fn one_death(
    number: usize,
    drivers: Arc<dyn Backend>,
    recoverers: Arc<dyn Backend>,
    ttl: Duration,
    votes: &[bool],
    (protocol, step): (Protocol, Step),
) {
    let what = format!("{protocol:?}, votes {votes:?}, death at {step}");
    let group = format!("death-{number}");
    let books: Vec<_> = votes.iter().map(|yes| Book::voting(*yes)).collect();
    let mortal = Mortal::new(drivers, ttl, &group, step.clone());
    with_books(&mortal.all, &books);
    let tx = mortal.all.begin().branch("a", "1").branch("b", "2").branch("c", "3").protocol(protocol);
    let id = tx.id();
    let driver = spawn(tx.commit());
    crate::support::within(Duration::from_secs(20), &what, mortal.dies()).await;

    let coord = coord_over(recoverers, Duration::from_secs(30));
    let all = coord.transactions_with(&group, quick()).expect("a good name");
    with_books(&all, &books);
    let _recoverer = all.recover_with(eager());
    let patience = 3 * ttl + Duration::from_secs(25);
    crate::support::within(patience, &what, async {
        while in_doubt(&books) || !residue(coord.backend(), &group, &[]).await.is_empty() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_one_side(&books, &what);
    let decided = match step {
        Step::Begin | Step::Begun | Step::Prepare(_) | Step::Voted(_) | Step::Ready => false,
        // With three phases, what all are in favour of is committed by whoever is left.
        Step::Decide(_) => protocol == Protocol::ThreePhase,
        _ => true,
    };
    let committed = decided && votes.iter().all(|yes| *yes);
    for (book, yes) in books.iter().zip(votes) {
        match (committed, book.state(id)) {
            (true, state) => assert_eq!(state, Some(State::Committed), "{what}: the decision was made"),
            (false, Some(State::Committed)) => panic!("{what}: committed without a decision"),
            (false, Some(State::Prepared)) => panic!("{what}: in doubt"),
            // Told so by a recoverer that knows no votes, or never asked.
            (false, Some(State::Aborted) | None) => {}
        }
        assert!(*yes || book.state(id) != Some(State::Committed), "{what}");
    }
    drop(driver);
}

/// A driver that stops at a step until it is let go.
fn stopping(at: fn(&Step) -> bool) -> (TransactionsOptions, Arc<Notify>, Arc<Notify>) {
    let (reached, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (hook_reached, hook_go) = (reached.clone(), go.clone());
    let options = quick().on_step(move |_, step| -> BoxFuture<'static, ()> {
        let (reached, go) = (hook_reached.clone(), hook_go.clone());
        Box::pin(async move {
            if at(&step) {
                reached.notify_one();
                go.notified().await;
            }
        })
    });
    (options, reached, go)
}

async fn recovered(clients: &Arc<dyn Clients>, group: &str, books: &[Arc<Book>]) -> (Coordinator, Recoverer) {
    let coord = coord(clients).await;
    let all = coord.transactions_with(group, quick()).expect("a good name");
    with_books(&all, books);
    let recoverer = all.recover_with(eager());
    (coord, recoverer)
}

/// The driver has all votes and sleeps before it decides; others abort and forget; then it wakes up.
async fn a_driver_that_slept_through_its_recovery_follows_it(clients: Arc<dyn Clients>) {
    let books = [Book::new(), Book::new(), Book::new()];
    let (options, reached, go) = stopping(|step| matches!(step, Step::Decide(Decision::Commit)));
    let sleeper = coord(&clients).await;
    let all = sleeper.transactions_with("sleeper", options).expect("a good name");
    with_books(&all, &books);
    let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
    let id = tx.id();
    let mut driver = spawn(tx.commit());
    reached.notified().await;
    assert!(books.iter().all(|book| book.state(id) == Some(State::Prepared)));
    // Asleep, it neither renews its session nor opens another.
    sleeper.close().await.expect("closed");
    let (other, _recoverer) = recovered(&clients, "sleeper", &books).await;
    until_clean(&other, "sleeper", &[]).await;
    assert!(books.iter().all(|book| book.state(id) == Some(State::Aborted)));
    go.notify_one();
    // Its late decision is refused; and as all is forgotten, it does not guess which way it went.
    refused(driver.soon("the driver").await, ErrorKind::Ambiguous, "a transaction that others have finished");
    assert_one_side(&books, "sleeper");
    until_clean(&other, "sleeper", &[]).await;
}

/// An operator commits, others carry it out and forget; nothing but the operator's word tells the driver.
async fn a_driver_that_slept_through_a_commit_by_hand_follows_it(clients: Arc<dyn Clients>) {
    let books = [Book::new(), Book::new(), Book::new()];
    let (options, reached, go) = stopping(|step| matches!(step, Step::Decide(Decision::Commit)));
    let sleeper = coord(&clients).await;
    let all = sleeper.transactions_with("by-hand", options).expect("a good name");
    with_books(&all, &books);
    let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
    let id = tx.id();
    let mut driver = spawn(tx.commit());
    reached.notified().await;
    let operator = coord(&clients).await.transactions("by-hand").expect("a good name");
    assert_eq!(operator.resolve(id, Decision::Commit).await.expect("decided"), Decision::Commit);
    sleeper.close().await.expect("closed");
    let (other, _recoverer) = recovered(&clients, "by-hand", &books).await;
    let left = async || residue(other.backend(), "by-hand", &[]).await.len();
    eventually("only the operator's word is left", async || left().await == 1).await;
    go.notify_one();
    let outcome = driver.soon("the driver").await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Commit, "it was told by the operator's word");
    assert!(operator.acknowledge(id).await.expect("acknowledged"));
    assert_one_side(&books, "by hand");
    until_clean(&other, "by-hand", &[]).await;
}

/// The driver sleeps before it asks one of them; that prepare comes when all is over.
async fn a_prepare_that_comes_after_the_recovery_leaves_nothing(clients: Arc<dyn Clients>) {
    let books = [Book::new(), Book::new(), Book::new()];
    let (options, reached, go) = stopping(|step| *step == Step::Prepare("b".to_owned()));
    let sleeper = coord(&clients).await;
    let all = sleeper.transactions_with("late", options.within(Duration::from_secs(60))).expect("a good name");
    with_books(&all, &books);
    let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
    let id = tx.id();
    let mut driver = spawn(tx.commit());
    reached.notified().await;
    // Asleep, it neither renews its session nor opens another.
    sleeper.close().await.expect("closed");
    let (other, _recoverer) = recovered(&clients, "late", &books).await;
    until_clean(&other, "late", &[]).await;
    assert_eq!(books[1].asked(id), 0, "it was not asked yet");
    go.notify_one();
    refused(driver.soon("the driver").await, ErrorKind::Ambiguous, "a transaction that others have finished");
    assert_eq!(books[1].asked(id), 1, "and was asked late");
    eventually("nothing in doubt", async || !in_doubt(&books)).await;
    assert_one_side(&books, "late");
}

async fn recoverers_at_the_same_time_do_the_work_once(clients: Arc<dyn Clients>) {
    // Slow enough that the recoverers would meet.
    let slow = || Book::slow(Duration::from_millis(150));
    let books = [slow(), slow(), slow()];
    let step = Step::Decided(Decision::Commit);
    let mortal = Mortal::new(standard(client(&clients).await), clients.ttl(), "many-hands", step);
    with_books(&mortal.all, &books);
    let tx = mortal.all.begin().branch("a", "").branch("b", "").branch("c", "");
    let id = tx.id();
    let _driver = spawn(tx.commit());
    mortal.dies().await;
    let mut hands = Vec::new();
    for _ in 0..4 {
        hands.push(recovered(&clients, "many-hands", &books).await);
    }
    let patience = 3 * clients.ttl() + Duration::from_secs(25);
    crate::support::within(patience, "recovery", async {
        while !residue(hands[0].0.backend(), "many-hands", &[]).await.is_empty() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    for book in &books {
        assert_eq!((book.state(id), book.told(id)), (Some(State::Committed), 1), "told once, by one of four");
    }
    assert_one_side(&books, "many hands");
}

/// Nobody decides alone, however long nothing is heard. It shows in the list, and an operator can end it.
async fn without_a_recoverer_the_prepared_stay_in_doubt(clients: Arc<dyn Clients>) {
    let books = [Book::new(), Book::new(), Book::new()];
    let step = Step::Decide(Decision::Commit);
    let mortal = Mortal::new(standard(client(&clients).await), clients.ttl(), "blocked", step);
    with_books(&mortal.all, &books);
    let tx = mortal.all.begin().branch("a", "").branch("b", "").branch("c", "");
    let id = tx.id();
    let _driver = spawn(tx.commit());
    mortal.dies().await;
    let coord = coord(&clients).await;
    let all = coord.transactions_with("blocked", quick()).expect("a good name");
    with_books(&all, &books);
    let limit = clients.ttl() + coord.profile().expiry_lag + Duration::from_secs(10);
    let listed = async || all.in_doubt().await.expect("a list");
    crate::support::within(limit, "its driver is seen to be gone", async {
        while listed().await.iter().any(|doubt| doubt.driver_lives) {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    sleep(clients.ttl()).await;
    assert!(books.iter().all(|book| book.state(id) == Some(State::Prepared) && book.told(id) == 0), "somebody decided");
    let doubts = listed().await;
    assert_eq!((doubts.len(), &doubts[0].state), (1, &DoubtState::Undecided));
    assert_eq!(all.resolve(id, Decision::Abort).await.expect("decided"), Decision::Abort);
    let _recoverer = all.recover_with(eager());
    eventually("the operator's word is carried out", async || !in_doubt(&books)).await;
    assert_one_side(&books, "blocked");
    assert!(all.acknowledge(id).await.expect("acknowledged"));
    until_clean(&coord, "blocked", &[]).await;
}

/// What a late prepare left behind, although the log knows nothing of it.
async fn what_no_driver_remembers_is_taken_back(clients: Arc<dyn Clients>) {
    use quorate_core::commit::{Branch, Participant as _};
    let book = Book::new();
    let id = TxId::random();
    let vote = book.prepare(&Branch::new("orphans", id, "a", "x")).await.expect("a vote");
    assert_eq!(vote, quorate_core::commit::Vote::Yes);
    let books = [book.clone()];
    let (other, _recoverer) = recovered(&clients, "orphans", &books).await;
    eventually("taken back", async || book.state(id) == Some(State::Aborted)).await;
    // And nothing that is under way is.
    let slow = Book::slow(Duration::from_millis(700));
    let all = other.transactions_with("orphans", quick()).expect("a good name");
    all.enlist("a", book.clone()).expect("enlisted");
    all.enlist("b", slow.clone()).expect("enlisted");
    let outcome = all.begin().branch("a", "").branch("b", "").commit().await.expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    assert_one_side(&[book, slow], "orphans");
}

/// Calls that fail, answers that are lost, and delays, for drivers and recoverers alike.
async fn nothing_is_mixed_or_lost_in_chaos(clients: Arc<dyn Clients>) {
    const DRIVERS: u64 = 4;
    const EACH: usize = 12;
    let seed: u64 = rand::random();
    let books = [Book::new(), Book::new(), Book::new()];
    let outcomes: Arc<Mutex<Vec<(TxId, Decision)>>> = Arc::default();
    let (unknown, settled) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut hands = Vec::new();
    let mut drivers = JoinSet::new();
    for driver in 0..DRIVERS {
        let chaos = Chaos::uniform(seed ^ driver, 0.08, Duration::from_millis(30));
        let backend = Stack::new(client(&clients).await).with(chaos).standard(Duration::from_secs(5)).build();
        let coord = coord_over(backend, Duration::from_secs(30));
        let all = coord.transactions_with("chaos", quick()).expect("a good name");
        with_books(&all, &books);
        hands.push(all.recover_with(eager()));
        let (outcomes, unknown, settled) = (outcomes.clone(), unknown.clone(), settled.clone());
        drivers.spawn(async move {
            for _ in 0..EACH {
                let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
                let id = tx.id();
                match tx.commit().await {
                    Ok(outcome) => {
                        settled.fetch_add(1, Ordering::AcqRel);
                        outcomes.lock().expect("no poison").push((id, outcome.decision));
                    }
                    Err(error) => {
                        assert!(
                            matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous),
                            "{error:?}, seed {seed}"
                        );
                        unknown.fetch_add(1, Ordering::AcqRel);
                    }
                }
            }
        });
    }
    while let Some(ended) = drivers.join_next().await {
        ended.expect("no panic");
    }
    let judge = coord(&clients).await;
    let what = format!("seed {seed}");
    crate::support::within(Duration::from_secs(45), &what, async {
        while in_doubt(&books) || !residue(judge.backend(), "chaos", &[]).await.is_empty() {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    assert_one_side(&books, &what);
    for (id, decision) in outcomes.lock().expect("no poison").iter() {
        let committed = books.iter().filter(|book| book.state(*id) == Some(State::Committed)).count();
        let expected = if *decision == Decision::Commit { 3 } else { 0 };
        assert_eq!(committed, expected, "{id} was told to be {decision}, {what}");
    }
    let (settled, unknown) = (settled.load(Ordering::Acquire), unknown.load(Ordering::Acquire));
    assert!(settled * 10 >= (settled + unknown) * 3, "too little succeeded to show anything: {settled} of {what}");
}
