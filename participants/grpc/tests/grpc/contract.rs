//! The contract of a participant passes through as it is.

use std::sync::Arc;

use async_trait::async_trait;
use quorate::{
    Error, ErrorKind, Result,
    commit::{Branch, Finish, Participant, TxId, Vote},
    grpc::GrpcParticipant,
};

use crate::support::{Book, Process, fails};

fn to(process: &Process) -> GrpcParticipant {
    GrpcParticipant::connect(&format!("http://{}", process.addr)).expect("a URI")
}

fn branch(body: impl Into<bytes::Bytes>) -> Branch {
    Branch::new("zahlungen/é", TxId::random(), "ledger\n", body)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_participant_is_asked_exactly_what_the_caller_asks() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    let remote = to(&process);
    for body in [vec![], b"-30".to_vec(), (0..=255).collect()] {
        let branch = branch(body);
        assert_eq!(remote.prepare(&branch).await.expect("an answer"), Vote::Yes);
        assert_eq!(remote.in_doubt(&branch.group).await.expect("an answer"), [branch.id]);
        assert_eq!(remote.commit(&branch).await.expect("an answer"), Finish::Done);
        assert_eq!(remote.in_doubt(&branch.group).await.expect("an answer"), []);
        let asked: Vec<_> = book.calls().into_iter().filter(|(_, asked)| asked.id == branch.id).collect();
        assert_eq!(asked, [("prepare", branch.clone()), ("commit", branch)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_come_again_or_late_get_the_answers_of_the_contract() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    let remote = to(&process);
    let done = branch("x");
    for _ in 0..2 {
        assert_eq!(remote.prepare(&done).await.expect("an answer"), Vote::Yes);
    }
    for _ in 0..2 {
        assert_eq!(remote.commit(&done).await.expect("an answer"), Finish::Done);
    }
    assert_eq!(remote.prepare(&done).await.expect("an answer"), Vote::No("it is over".to_owned()));
    let never = branch("x");
    for _ in 0..2 {
        assert_eq!(remote.abort(&never).await.expect("an answer"), Finish::Done);
    }
    assert_eq!(remote.prepare(&never).await.expect("an answer"), Vote::No("it is over".to_owned()), "it came late");
    assert_eq!(book.breaches(), Vec::<String>::new());
    let diverged = remote.abort(&done).await.expect("an answer");
    assert_eq!(diverged, Finish::Diverged("an abort after the commit".to_owned()));
}

/// Answers by the body.
#[derive(Debug)]
struct Script;

#[async_trait]
impl Participant for Script {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        match &*branch.body {
            b"read only" => Ok(Vote::ReadOnly),
            b"no" => Ok(Vote::No("sold out".to_owned())),
            b"long" => Ok(Vote::No("ü".repeat(1 << 20))),
            b"panic" => panic!("hunter2"),
            number => Err(Error::new(KINDS[usize::from(number[0])], "prepare", "on purpose").key(branch)),
        }
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        self.prepare(branch).await.map(|_| Finish::Done)
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.commit(branch).await
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        match group {
            "many" => Ok((0..25_000).map(id).collect()),
            "panic" => panic!("hunter2"),
            _ => Err(Error::new(ErrorKind::Unavailable, "in_doubt", "on purpose")),
        }
    }
}

const KINDS: [ErrorKind; 8] = [
    ErrorKind::InvalidInput,
    ErrorKind::Unsupported,
    ErrorKind::Denied,
    ErrorKind::Unavailable,
    ErrorKind::Ambiguous,
    ErrorKind::SessionLost,
    ErrorKind::Corrupt,
    ErrorKind::Backend,
];

fn id(number: u32) -> TxId {
    // Scattered, so that pages are not the order in which they were made.
    format!("{:032x}", u128::from(number.wrapping_mul(2_654_435_761))).parse().expect("an id")
}

#[tokio::test(flavor = "multi_thread")]
async fn votes_arrive_as_they_were_given_and_long_reasons_are_cut() {
    let process = Process::serve(Arc::new(Script)).await;
    let remote = to(&process);
    assert_eq!(remote.prepare(&branch("read only")).await.expect("an answer"), Vote::ReadOnly);
    assert_eq!(remote.prepare(&branch("no")).await.expect("an answer"), Vote::No("sold out".to_owned()));
    let Vote::No(why) = remote.prepare(&branch("long")).await.expect("an answer") else { panic!("no") };
    assert_eq!(why, "ü".repeat(500));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_arrives_with_its_kind_and_its_text() {
    let process = Process::serve(Arc::new(Script)).await;
    let remote = to(&process);
    for (number, kind) in (0_u8..).zip(KINDS) {
        let branch = branch(vec![number]);
        let texts = ["on grpc", "on purpose", &branch.id.to_string()];
        fails(remote.prepare(&branch).await, kind, &texts);
        fails(remote.commit(&branch).await, kind, &texts);
        fails(remote.abort(&branch).await, kind, &texts);
    }
    fails(remote.in_doubt("g").await, ErrorKind::Unavailable, &["on purpose"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_an_error_of_that_call_and_its_text_stays_there() {
    let process = Process::serve(Arc::new(Script)).await;
    let remote = to(&process);
    let branch = branch("panic");
    for error in [
        remote.prepare(&branch).await.map(drop).expect_err("it panics"),
        remote.commit(&branch).await.map(drop).expect_err("it panics"),
        remote.abort(&branch).await.map(drop).expect_err("it panics"),
        remote.in_doubt("panic").await.map(drop).expect_err("it panics"),
    ] {
        assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error:?}");
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("panicked") && !shown.contains("hunter2"), "{shown}");
    }
    assert_eq!(remote.prepare(&self::branch("read only")).await.expect("it goes on"), Vote::ReadOnly);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_stands_in_doubt_is_listed_however_much_it_is() {
    let process = Process::serve(Arc::new(Script)).await;
    let mut all: Vec<_> = (0..25_000).map(id).collect();
    all.sort_unstable();
    assert_eq!(to(&process).in_doubt("many").await.expect("an answer"), all);
}
