//! Scripts of deliveries: every message to a participant may be delayed, repeated, overtaken by others, or lose its answer,
//! and the driver may die at any step. Run on memory, on a paused clock, by proptest, which shortens what fails.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use proptest::{collection::vec, option, prelude::*, test_runner::Config};
use quorate_core::{
    Coordinator, Error, ErrorKind, KeyRange, Result, SessionOptions,
    commit::{Branch, Finish, KeyWork, Participant, Protocol, RecoverOptions, TransactionsOptions, TxId, Vote},
    key::Dir,
};
use quorate_memory::Memory;
use tokio::time::sleep;

use super::book::{Book, NAMES, State, assert_one_side, in_doubt, residue};

/// What happens to one message.
#[derive(Debug, Clone, Default)]
struct Delivery {
    /// It arrives so much later.
    late_ms: u64,
    /// And once more so much after it was sent.
    copies_ms: Vec<u64>,
    answer_lost: bool,
}

fn deliveries() -> impl Strategy<Value = Vec<Delivery>> {
    let one = (0..400_u64, vec(0..8_000_u64, 0..3), prop::bool::weighted(0.15));
    vec(one.prop_map(|(late_ms, copies_ms, answer_lost)| Delivery { late_ms, copies_ms, answer_lost }), 0..30)
}

#[derive(Debug, Clone, Copy)]
enum Call {
    Prepare,
    Commit,
    Abort,
}

/// A participant at the end of a bad line.
#[derive(Debug)]
struct BadLine {
    inner: Arc<dyn Participant>,
    script: Arc<Mutex<VecDeque<Delivery>>>,
    /// Copies that have not arrived yet.
    travelling: Arc<AtomicUsize>,
}

/// What came of a call, in one type.
#[derive(Debug)]
enum Answer {
    Vote(Vote),
    Finish(Finish),
}

async fn call(inner: &Arc<dyn Participant>, call: Call, branch: &Branch) -> Result<Answer> {
    Ok(match call {
        Call::Prepare => Answer::Vote(inner.prepare(branch).await?),
        Call::Commit => Answer::Finish(inner.commit(branch).await?),
        Call::Abort => Answer::Finish(inner.abort(branch).await?),
    })
}

impl BadLine {
    async fn send(&self, what: Call, branch: &Branch) -> Result<Answer> {
        let delivery = self.script.lock().expect("no poison").pop_front().unwrap_or_default();
        for after in &delivery.copies_ms {
            let (inner, branch, after) = (self.inner.clone(), branch.clone(), Duration::from_millis(*after));
            let travelling = self.travelling.clone();
            travelling.fetch_add(1, Ordering::AcqRel);
            tokio::spawn(async move {
                sleep(after).await;
                let _ = call(&inner, what, &branch).await;
                travelling.fetch_sub(1, Ordering::AcqRel);
            });
        }
        sleep(Duration::from_millis(delivery.late_ms)).await;
        let answer = call(&self.inner, what, branch).await?;
        if delivery.answer_lost {
            return Err(Error::new(ErrorKind::Ambiguous, "send", "the answer is lost").key(branch));
        }
        Ok(answer)
    }
}

#[async_trait]
impl Participant for BadLine {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        match self.send(Call::Prepare, branch).await? {
            Answer::Vote(vote) => Ok(vote),
            Answer::Finish(_) => unreachable!("a prepare is answered by a vote"),
        }
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        match self.send(Call::Commit, branch).await? {
            Answer::Finish(finish) => Ok(finish),
            Answer::Vote(_) => unreachable!("a commit is not answered by a vote"),
        }
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        match self.send(Call::Abort, branch).await? {
            Answer::Finish(finish) => Ok(finish),
            Answer::Vote(_) => unreachable!("an abort is not answered by a vote"),
        }
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        self.inner.in_doubt(group).await
    }
}

/// Three books, or two and the keys of a store, behind bad lines.
struct World {
    memory: Memory,
    books: Vec<Arc<Book>>,
    script: Arc<Mutex<VecDeque<Delivery>>>,
    travelling: Arc<AtomicUsize>,
}

impl World {
    fn new(votes: &[bool], script: Vec<Delivery>) -> Self {
        Self {
            memory: Memory::new(),
            books: votes.iter().map(|yes| Book::voting(*yes)).collect(),
            script: Arc::new(Mutex::new(script.into())),
            travelling: Arc::default(),
        }
    }

    fn coord(&self, ttl: Duration) -> Coordinator {
        let options = SessionOptions { ttl, owner: "script".to_owned() };
        Coordinator::new(Arc::new(self.memory.client()), options)
    }

    fn enlist(&self, all: &quorate_core::commit::Transactions) {
        for (name, book) in NAMES.iter().zip(&self.books) {
            let (script, travelling) = (self.script.clone(), self.travelling.clone());
            let line = BadLine { inner: book.clone(), script, travelling };
            all.enlist(name, Arc::new(line)).expect("enlisted");
        }
    }

    /// One transaction whose driver dies when it has passed so many steps, and a recoverer that finishes it.
    async fn one(&self, protocol: Protocol, dies_after: Option<usize>) {
        let options = TransactionsOptions::default().within(Duration::from_secs(2));
        let driver = self.coord(Duration::from_secs(3));
        let (steps, dead) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(false)));
        let told = dead.clone();
        let mortal = options.clone().on_step(move |_, _| {
            let now = steps.fetch_add(1, Ordering::AcqRel);
            let dies = dies_after.is_some_and(|after| now >= after);
            told.fetch_or(dies, Ordering::AcqRel);
            Box::pin(async move {
                if dies {
                    std::future::pending::<()>().await;
                }
            })
        });
        let all = driver.transactions_with("script", mortal).expect("a good name");
        self.enlist(&all);
        let keys = all.enlist_keys("keys", &driver).expect("enlisted");
        let tx = all.begin().branch("a", "").branch("b", "").branch("c", "");
        let tx = tx.branch("keys", KeyWork::new().put("x", "1").put("y", "1")).protocol(protocol);
        let id = tx.id();
        let outcome = tokio::time::timeout(Duration::from_secs(20), tx.commit()).await;
        if dead.load(Ordering::Acquire) {
            driver.session().await.expect("it has one").orphan();
            driver.close().await.expect("nothing is sent");
        }

        let other = self.coord(Duration::from_secs(3));
        let second = other.transactions_with("script", options).expect("a good name");
        self.enlist(&second);
        second.enlist_keys("keys", &other).expect("enlisted");
        let short = Duration::from_millis(200);
        let _recoverer =
            second.recover_with(RecoverOptions::default().every(short).grace(short).remember(Duration::ZERO));
        let finished = async {
            loop {
                let travelling = self.travelling.load(Ordering::Acquire) > 0;
                let held = self.held(&other).await > 0;
                let open = !residue(other.backend(), "script", &[]).await.is_empty();
                if !(travelling || held || open || in_doubt(&self.books)) {
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(300), finished).await.expect("everything comes to its end");
        assert_one_side(&self.books, "script");
        let committed = self.books.iter().filter(|book| book.state(id) == Some(State::Committed)).count();
        assert!(committed == 0 || committed == 3, "{committed} of 3 have committed");
        for key in ["x", "y"] {
            let there = keys.get(key).await.expect("reading works").is_some();
            assert_eq!(there, committed == 3, "the keys follow the books");
        }
        if let Ok(Ok(outcome)) = outcome {
            assert_eq!(outcome.is_committed(), committed == 3, "the caller was told the truth");
        }
    }

    async fn held(&self, coord: &Coordinator) -> usize {
        let held = KeyRange::prefix(&Dir::new(["txintent"]).expect("valid"), "").expect("valid");
        coord.backend().read(&held).await.expect("reading works").entries.len()
    }
}

proptest! {
    #![proptest_config(Config { cases: 200, ..Config::default() })]

    #[test]
    fn whatever_the_order_of_messages_all_end_on_one_side(
        script in deliveries(),
        votes in vec(prop::bool::weighted(0.9), 3),
        dies_after in option::weighted(0.5, 0..24_usize),
        three in any::<bool>(),
    ) {
        let protocol = if three { Protocol::ThreePhase } else { Protocol::TwoPhase };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime starts").block_on(World::new(&votes, script).one(protocol, dies_after));
    }
}
