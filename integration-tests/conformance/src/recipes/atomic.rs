//! Atomic commit: what one driver promises while it lives.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use quorate_core::{
    Dir, ErrorKind, Key, KeyRange, Result,
    commit::{
        Branch, Decision, DoubtState, Finish, Participant, Protocol, Step, TransactionsOptions, TxId, TxStatus, Vote,
    },
    layer::{Chaos, Fault, Rule, Stack, Verb},
};
use tokio::time::{Instant, sleep};

use super::{
    book::{Book, NAMES, State, assert_one_side, residue, until_clean, with_books},
    cancel::{MOST, poll_times},
    coord, coord_over,
    counting::Counted,
    standard,
};
use crate::{
    Clients,
    support::{cases, client, eventually, refused, write},
};

cases!("commit":
    everybody_ends_as_the_votes_say,
    a_panic_a_hang_and_an_error_are_no_votes,
    who_only_looked_is_told_no_outcome,
    a_commit_is_told_until_it_is_confirmed,
    phases_cost_one_round_trip_each_whatever_the_number_of_participants,
    three_phases_cost_one_round_trip_more_and_what_is_ready_is_not_aborted,
    a_dropped_commit_ends_on_one_side,
    a_transaction_that_cannot_be_begun_asks_nobody,
    bad_transactions_are_refused_before_anything_is_sent,
    records_of_others_are_listed_and_left_alone,
    a_heuristic_outcome_is_kept_until_somebody_has_seen_it,
    a_decision_by_hand_is_followed_by_all,
    many_transactions_leave_nothing,
    a_group_that_is_dropped_is_gone,
);

/// With limits that only something broken reaches.
pub(super) fn quick() -> TransactionsOptions {
    TransactionsOptions::default().within(Duration::from_secs(5))
}

async fn everybody_ends_as_the_votes_say(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    for pattern in 0..8_u32 {
        let votes: Vec<bool> = (0..3).map(|bit| pattern >> bit & 1 == 1).collect();
        let name = format!("votes-{pattern}");
        let all = coord.transactions(&name).expect("a good name");
        let books: Vec<_> = votes.iter().map(|yes| Book::voting(*yes)).collect();
        with_books(&all, &books);
        let tx = all.begin().branch("a", "1").branch("b", "2").branch("c", "3");
        let id = tx.id();
        let outcome = tx.commit().await.expect("an outcome");
        assert_eq!(outcome.id, id);
        assert_eq!(outcome.unfinished, Vec::<String>::new());
        assert_eq!(outcome.is_committed(), votes.iter().all(|yes| *yes), "{votes:?}");
        let against: Vec<_> = outcome.refusals.iter().map(|r| (r.participant.as_str(), r.why.as_str())).collect();
        let expected: Vec<_> =
            NAMES.iter().zip(&votes).filter(|(_, yes)| !**yes).map(|(name, _)| (*name, "as the script says")).collect();
        assert_eq!(against, expected, "who was against it, and why");
        for (book, yes) in books.iter().zip(&votes) {
            let end = if outcome.is_committed() { State::Committed } else { State::Aborted };
            assert_eq!(book.state(id), yes.then_some(end), "{votes:?}");
        }
        assert_one_side(&books, &name);
        until_clean(&coord, &name, &[]).await;
        assert_eq!(all.status(id).await.expect("a status"), TxStatus::Unknown);
    }
}

/// Does something else than to answer.
#[derive(Debug)]
enum Rude {
    Panics,
    Hangs,
    Fails,
}

#[async_trait]
impl Participant for Rude {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        match self {
            Self::Panics => panic!("on purpose"),
            Self::Hangs => std::future::pending().await,
            Self::Fails => Err(quorate_core::Error::invalid("prepare", "on purpose").key(branch)),
        }
    }

    async fn commit(&self, _: &Branch) -> Result<Finish> {
        Ok(Finish::Diverged("it never voted".to_owned()))
    }

    async fn abort(&self, _: &Branch) -> Result<Finish> {
        Ok(Finish::Done)
    }

    async fn in_doubt(&self, _: &str) -> Result<Vec<TxId>> {
        Ok(Vec::new())
    }
}

async fn a_panic_a_hang_and_an_error_are_no_votes(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    for (rude, told) in [(Rude::Panics, "panicked"), (Rude::Hangs, "no answer within"), (Rude::Fails, "on purpose")] {
        let all = coord.transactions_with(told, quick()).expect("a good name");
        let book = Book::new();
        all.enlist("a", book.clone()).expect("enlisted");
        all.enlist("b", Arc::new(rude)).expect("enlisted");
        let tx = all.begin().branch("a", "").branch("b", "").within(Duration::from_millis(700));
        let (id, started) = (tx.id(), Instant::now());
        let outcome = tx.commit().await.expect("an outcome");
        assert_eq!(outcome.decision, Decision::Abort);
        let refusal = &outcome.refusals[0];
        assert!(refusal.participant == "b" && refusal.why.contains(told), "{refusal:?}");
        assert!(started.elapsed() < Duration::from_secs(5), "{told}: {:?}", started.elapsed());
        assert_eq!(book.state(id), Some(State::Aborted));
        until_clean(&coord, told, &[]).await;
    }
}

async fn who_only_looked_is_told_no_outcome(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let all = coord.transactions("readers").expect("a good name");
    let books = [Book::new(), Book::looking(), Book::looking()];
    with_books(&all, &books);
    let both = all.begin().branch("a", "").branch("b", "").commit().await.expect("an outcome");
    assert!(both.is_committed());
    assert_eq!((books[0].state(both.id), books[1].told(both.id)), (Some(State::Committed), 0));
    let readers = all.begin().branch("b", "").branch("c", "").commit().await.expect("an outcome");
    assert!(readers.is_committed(), "nothing to do is no reason to abort");
    assert_eq!((books[1].told(readers.id), books[2].told(readers.id)), (0, 0));
    assert_one_side(&books, "readers");
    until_clean(&coord, "readers", &[]).await;
}

/// Confirms only at the third time.
#[derive(Debug, Default)]
struct HardOfHearing {
    book: Book,
    calls: Mutex<HashMap<TxId, usize>>,
}

#[async_trait]
impl Participant for HardOfHearing {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        self.book.prepare(branch).await
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        let calls = {
            let mut calls = self.calls.lock().expect("no poison");
            let calls = calls.entry(branch.id).or_default();
            *calls += 1;
            *calls
        };
        match calls {
            1 => Err(quorate_core::Error::new(ErrorKind::Unavailable, "commit", "not now").key(branch)),
            2 => panic!("nor now"),
            _ => self.book.commit(branch).await,
        }
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.book.abort(branch).await
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        self.book.in_doubt(group).await
    }
}

async fn a_commit_is_told_until_it_is_confirmed(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let all = coord.transactions("told").expect("a good name");
    let (book, deaf) = (Book::new(), Arc::new(HardOfHearing::default()));
    all.enlist("a", book.clone()).expect("enlisted");
    all.enlist("b", deaf.clone()).expect("enlisted");
    let outcome = all.begin().branch("a", "").branch("b", "").commit().await.expect("an outcome");
    assert!(outcome.is_committed() && outcome.unfinished.is_empty(), "{outcome:?}");
    assert_eq!(deaf.book.state(outcome.id), Some(State::Committed));
    assert_eq!(deaf.calls.lock().expect("no poison")[&outcome.id], 3);
    assert_eq!(book.told(outcome.id), 1, "who has confirmed is left alone");
    until_clean(&coord, "told", &[]).await;
}

async fn phases_cost_one_round_trip_each_whatever_the_number_of_participants(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).standard(Duration::from_secs(10)).build();
    let coord = coord_over(backend, Duration::from_secs(30));
    let all = coord.transactions("cost").expect("a good name");
    for i in 0..16 {
        all.enlist(&format!("p{i}"), Book::new()).expect("enlisted");
    }
    // The session and the driver's key are made once.
    assert!(all.begin().branch("p0", "").commit().await.expect("an outcome").is_committed());
    for count in [1, 2, 16] {
        until_clean(&coord, "cost", &[]).await;
        counted.reset();
        let tx = (0..count).fold(all.begin(), |tx, i| tx.branch(&format!("p{i}"), "x"));
        assert!(tx.commit().await.expect("an outcome").is_committed());
        eventually("begin, decide, forget", async || counted.calls(Verb::Commit) == 3).await;
        assert_eq!(counted.work(), HashMap::from([(Verb::Commit, 3)]), "{count} participants");
    }
}

async fn three_phases_cost_one_round_trip_more_and_what_is_ready_is_not_aborted(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).standard(Duration::from_secs(10)).build();
    let coord = coord_over(backend, Duration::from_secs(30));
    let gate = Arc::new(tokio::sync::Semaphore::new(1));
    let waits = gate.clone();
    let options = quick().on_step(move |_, step| {
        let gate = waits.clone();
        Box::pin(async move {
            if matches!(step, Step::Decide(_)) {
                gate.acquire().await.expect("open").forget();
            }
        })
    });
    let all = coord.transactions_with("three", options).expect("a good name");
    let books = [Book::new(), Book::new(), Book::refusing("never")];
    with_books(&all, &books);
    let begin = || all.begin().branch("a", "").branch("b", "").protocol(Protocol::ThreePhase);
    assert!(begin().commit().await.expect("an outcome").is_committed());
    until_clean(&coord, "three", &[]).await;

    counted.reset();
    gate.add_permits(1);
    assert!(begin().commit().await.expect("an outcome").is_committed());
    eventually("begin, ready, decide, forget", async || counted.calls(Verb::Commit) == 4).await;
    assert_eq!(counted.work(), HashMap::from([(Verb::Commit, 4)]));
    gate.add_permits(1);
    assert!(!begin().branch("c", "").commit().await.expect("an outcome").is_committed());
    until_clean(&coord, "three", &[]).await;

    let tx = begin();
    let id = tx.id();
    let mut driver = crate::support::spawn(tx.commit());
    let ready = key("txready", "three", &id.to_string());
    eventually("ready", async || crate::support::get(coord.backend(), &ready).await.is_some()).await;
    refused(all.resolve(id, Decision::Abort).await, ErrorKind::InvalidInput, "to abort what all are in favour of");
    gate.add_permits(1);
    assert!(driver.soon("the driver").await.expect("an outcome").is_committed());
    assert_one_side(&books, "three");
    until_clean(&coord, "three", &[]).await;
}

async fn a_dropped_commit_ends_on_one_side(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let all = coord.transactions_with("dropped", quick()).expect("a good name");
    let books = [Book::new(), Book::new(), Book::new()];
    with_books(&all, &books);
    let mut committed = 0;
    for polls in 1..=MOST {
        let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
        if let Some(outcome) = poll_times(tx.commit(), polls).await {
            assert!(outcome.expect("an outcome").is_committed());
            committed += 1;
            if committed == 3 {
                break;
            }
        }
    }
    assert_eq!(committed, 3, "it never ended by itself");
    until_clean(&coord, "dropped", &[]).await;
    eventually("nothing in doubt", async || !super::book::in_doubt(&books)).await;
    assert_one_side(&books, "dropped");
}

async fn a_transaction_that_cannot_be_begun_asks_nobody(clients: Arc<dyn Clients>) {
    let refuse = Rule { fault: Fault::Refuse, probability: 1.0, verbs: vec![Verb::Commit] };
    let backend = Stack::new(client(&clients).await).with(Chaos::new(1, vec![refuse])).build();
    let all = coord_over(backend, Duration::from_secs(30)).transactions("unbegun").expect("a good name");
    let book = Book::new();
    all.enlist("a", book.clone()).expect("enlisted");
    let tx = all.begin().branch("a", "").within(Duration::from_millis(500));
    let id = tx.id();
    refused(tx.commit().await, ErrorKind::Unavailable, "a transaction whose log cannot be written");
    sleep(Duration::from_millis(300)).await;
    assert_eq!((book.asked(id), book.told(id), book.state(id)), (0, 0, None), "no local change, no message");
}

async fn bad_transactions_are_refused_before_anything_is_sent(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).build();
    let coord = coord_over(backend, Duration::from_secs(30));
    let all = coord.transactions("bad").expect("a good name");
    all.enlist("a", Book::new()).expect("enlisted");
    refused(all.begin().commit().await, ErrorKind::InvalidInput, "no participant");
    refused(all.begin().branch("a", "").branch("a", "").commit().await, ErrorKind::InvalidInput, "a name twice");
    refused(all.begin().branch("a", "").remote("a", "").commit().await, ErrorKind::InvalidInput, "a name twice");
    refused(all.begin().branch("b", "").commit().await, ErrorKind::InvalidInput, "an unknown participant");
    refused(all.begin().remote("", "").commit().await, ErrorKind::InvalidInput, "an empty name");
    let long = "x".repeat(quorate_core::MAX_NAME);
    refused(all.begin().remote(&long, "").commit().await, ErrorKind::InvalidInput, "a name too long for its keys");
    let within = all.begin().branch("a", "").within(Duration::ZERO).commit().await;
    refused(within, ErrorKind::InvalidInput, "no time to vote");
    refused(coord.transactions(""), ErrorKind::InvalidInput, "an empty group");
    refused(all.enlist("a", Book::new()), ErrorKind::InvalidInput, "a name that is enlisted");
    refused(all.enlist("", Book::new()), ErrorKind::InvalidInput, "an empty name");
    refused(all.enlist("/operator", Book::new()), ErrorKind::InvalidInput, "the operator's name");
    assert_eq!(counted.work(), HashMap::new(), "nothing was sent");
    // This one needs the driver's key, and no more.
    let large = vec![0_u8; coord.profile().max_value];
    refused(all.begin().branch("a", large.clone()).commit().await, ErrorKind::InvalidInput, "a body over the limit");
    refused(all.begin().remote("r", large).commit().await, ErrorKind::InvalidInput, "a body over the limit");
    assert_eq!(residue(coord.backend(), "bad", &["r"]).await, Vec::<String>::new());
    let after = all.begin().branch("a", "").commit().await.expect("an outcome");
    assert!(after.is_committed(), "and the group works");
}

fn key(kind: &str, group: &str, name: &str) -> Key {
    Key::new(&Dir::new([kind, group]).expect("valid"), name).expect("valid")
}

async fn records_of_others_are_listed_and_left_alone(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let all = coord.transactions("foreign").expect("a good name");
    let book = Book::new();
    all.enlist("a", book.clone()).expect("enlisted");
    let (later, garbage) = (TxId::random().to_string(), TxId::random().to_string());
    let puts = [
        (key("tx", "foreign", &later), r#"{"v":99,"something":"else"}"#),
        (key("tx", "foreign", &garbage), "hunter2"),
        (key("tx", "foreign", "no id"), "{}"),
    ];
    write(coord.backend(), puts.iter().map(|(key, value)| crate::support::put(key, value))).await;
    let options = quorate_core::commit::RecoverOptions::default();
    let short = Duration::from_millis(50);
    let _recoverer = all.recover_with(options.every(short).grace(short).remember(Duration::ZERO));
    assert!(all.begin().branch("a", "").commit().await.expect("an outcome").is_committed(), "the others go on");
    sleep(Duration::from_millis(500)).await;
    let doubts = all.in_doubt().await.expect("a list");
    assert_eq!(doubts.len(), 3, "{doubts:?}");
    for doubt in &doubts {
        let DoubtState::Unreadable(why) = &doubt.state else { panic!("{doubt:?}") };
        assert!(!why.contains("hunter2"), "{why}");
        assert_eq!(doubt.id == later, why.contains("later version"), "{why}");
    }
    for (key, value) in &puts {
        let stands = crate::support::value(coord.backend(), key).await.expect("it stands");
        assert_eq!(stands, value.as_bytes(), "left as it was");
    }
    refused(all.resolve(later.parse().expect("an id"), Decision::Abort).await, ErrorKind::Corrupt, "a later version");
}

async fn a_heuristic_outcome_is_kept_until_somebody_has_seen_it(clients: Arc<dyn Clients>) {
    /// Votes yes without having prepared anything.
    #[derive(Debug)]
    struct Liar;

    #[async_trait]
    impl Participant for Liar {
        async fn prepare(&self, _: &Branch) -> Result<Vote> {
            Ok(Vote::Yes)
        }
        async fn commit(&self, _: &Branch) -> Result<Finish> {
            Ok(Finish::Diverged("rolled back by hand".to_owned()))
        }
        async fn abort(&self, _: &Branch) -> Result<Finish> {
            Ok(Finish::Done)
        }
        async fn in_doubt(&self, _: &str) -> Result<Vec<TxId>> {
            Ok(Vec::new())
        }
    }

    let coord = coord(&clients).await;
    let all = coord.transactions("diverged").expect("a good name");
    all.enlist("a", Book::new()).expect("enlisted");
    all.enlist("b", Arc::new(Liar)).expect("enlisted");
    let outcome = all.begin().branch("a", "").branch("b", "").commit().await.expect("an outcome");
    assert!(outcome.is_committed(), "the decision stands, whatever became of one branch");
    let listed = async || all.in_doubt().await.expect("a list");
    eventually(
        "it is recorded",
        async || matches!(&listed().await[..], [d] if d.state != DoubtState::Decided(Decision::Commit)),
    )
    .await;
    let doubts = listed().await;
    assert_eq!(doubts[0].id, outcome.id.to_string());
    let what = [("b".to_owned(), "rolled back by hand".to_owned())].into();
    assert_eq!(doubts[0].state, DoubtState::Diverged { decision: Decision::Commit, what });
    assert!(all.acknowledge(outcome.id).await.expect("acknowledged"));
    assert!(!all.acknowledge(outcome.id).await.expect("once"));
    assert_eq!(listed().await, Vec::new());
    until_clean(&coord, "diverged", &[]).await;
}

async fn a_decision_by_hand_is_followed_by_all(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    // The driver waits before its decision until it is let go.
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let waits = gate.clone();
    let options = quick().on_step(move |_, step| {
        let gate = waits.clone();
        Box::pin(async move {
            if matches!(step, Step::Decide(_)) {
                gate.acquire().await.expect("open").forget();
            }
        })
    });
    let all = coord.transactions_with("by-hand", options).expect("a good name");
    let books = [Book::new(), Book::new(), Book::new()];
    with_books(&all, &books);
    let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
    let id = tx.id();
    let mut commit = crate::support::spawn(tx.commit());
    eventually("all prepared", async || books.iter().all(|b| b.state(id) == Some(State::Prepared))).await;
    let doubts = all.in_doubt().await.expect("a list");
    assert_eq!((doubts.len(), &doubts[0].state, doubts[0].driver_lives), (1, &DoubtState::Undecided, true));
    assert_eq!(doubts[0].participants, NAMES);
    assert_eq!(all.status(id).await.expect("a status"), TxStatus::Undecided);
    assert_eq!(all.resolve(id, Decision::Abort).await.expect("decided"), Decision::Abort);
    assert_eq!(all.resolve(id, Decision::Commit).await.expect("answered"), Decision::Abort, "decided is decided");
    gate.add_permits(1);
    let outcome = commit.soon("the driver").await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort, "the driver follows");
    assert_one_side(&books, "by hand");
    // Who decided stays on the list until somebody has seen it.
    eventually("only the operator's word is left", async || residue(coord.backend(), "by-hand", &[]).await.len() == 1)
        .await;
    let doubts = all.in_doubt().await.expect("a list");
    let what = [("/operator".to_owned(), "decided by hand".to_owned())].into();
    assert_eq!(doubts[0].state, DoubtState::Diverged { decision: Decision::Abort, what });
    assert!(all.acknowledge(id).await.expect("acknowledged"));
    until_clean(&coord, "by-hand", &[]).await;
    refused(all.resolve(id, Decision::Abort).await, ErrorKind::InvalidInput, "a transaction that is over");
}

async fn many_transactions_leave_nothing(clients: Arc<dyn Clients>) {
    let coord = coord_over(standard(client(&clients).await), Duration::from_secs(30));
    // Memory, the only one without a server, is fast enough for the whole number.
    let count = if coord.profile().fencing == quorate_core::Fencing::Process { 10_000 } else { 300 };
    let all = coord.transactions("many").expect("a good name");
    let books = [Book::new(), Book::new(), Book::refusing("never")];
    with_books(&all, &books);
    let mut running = tokio::task::JoinSet::new();
    let mut committed = 0;
    for i in 0..count {
        let tx = all.begin().branch("a", "x").branch("b", "y");
        let tx = if i % 10 == 0 { tx.branch("c", "z") } else { tx };
        running.spawn(tx.commit());
        if running.len() >= 64 {
            committed += usize::from(next(&mut running).await);
        }
    }
    while !running.is_empty() {
        committed += usize::from(next(&mut running).await);
    }
    assert_eq!(committed, count - count / 10);
    assert_eq!(super::book::ended(&books[0], Decision::Commit), committed);
    until_clean(&coord, "many", &[]).await;
    assert_one_side(&books, "many");
}

async fn next(running: &mut tokio::task::JoinSet<Result<quorate_core::commit::Outcome>>) -> bool {
    running.join_next().await.expect("one runs").expect("no panic").expect("an outcome").is_committed()
}

/// What participants keep must not keep the group: its driver's key has to go.
async fn a_group_that_is_dropped_is_gone(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let drivers = KeyRange::prefix(&Dir::new(["txdriver", "gone"]).expect("valid"), "").expect("valid");
    let count = async || coord.backend().read(&drivers).await.expect("reading works").entries.len();
    let all = coord.transactions("gone").expect("a good name");
    let keys = all.enlist_keys("keys", &coord).expect("enlisted");
    let work = quorate_core::commit::KeyWork::new().put("a", "1");
    assert!(all.begin().branch("keys", work).commit().await.expect("an outcome").is_committed());
    assert_eq!(count().await, 1);
    drop(all);
    eventually("the driver's key is gone", async || count().await == 0).await;
    assert!(keys.get("a").await.expect("reading works").is_some(), "the keys can be read on");
}
