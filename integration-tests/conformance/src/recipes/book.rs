//! A participant that keeps book of everything that is asked of it.
//!
//! Promise: it keeps its half of the contract, survives every simulated crash, and remembers each breach of the other
//! half: a commit without a vote for it, an abort after a commit.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use quorate_core::{
    Backend, Coordinator, KeyRange, Result,
    commit::{Branch, Decision, Finish, Participant, Transactions, TxId, Vote},
    key::Dir,
};
use tokio::time::sleep;

use crate::support::eventually;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Prepared,
    Committed,
    Aborted,
}

#[derive(Debug, Default)]
pub(super) struct Book {
    pages: Mutex<HashMap<TxId, State>>,
    wrong: Mutex<Vec<String>>,
    /// How often each transaction was asked to prepare.
    asked: Mutex<HashMap<TxId, usize>>,
    told: Mutex<HashMap<TxId, usize>>,
    /// Votes no, for this reason.
    refuses: Option<String>,
    only_looks: bool,
    /// What each call takes.
    takes: Duration,
}

impl Book {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(super) fn refusing(why: &str) -> Arc<Self> {
        Arc::new(Self { refuses: Some(why.to_owned()), ..Self::default() })
    }

    pub(super) fn looking() -> Arc<Self> {
        Arc::new(Self { only_looks: true, ..Self::default() })
    }

    /// Each call takes so long.
    pub(super) fn slow(takes: Duration) -> Arc<Self> {
        Arc::new(Self { takes, ..Self::default() })
    }

    /// Yes or no.
    pub(super) fn voting(yes: bool) -> Arc<Self> {
        if yes { Self::new() } else { Self::refusing("as the script says") }
    }

    pub(super) fn state(&self, id: TxId) -> Option<State> {
        self.pages.lock().expect("no poison").get(&id).copied()
    }

    pub(super) fn asked(&self, id: TxId) -> usize {
        self.asked.lock().expect("no poison").get(&id).copied().unwrap_or_default()
    }

    pub(super) fn told(&self, id: TxId) -> usize {
        self.told.lock().expect("no poison").get(&id).copied().unwrap_or_default()
    }

    pub(super) fn breaches(&self) -> Vec<String> {
        self.wrong.lock().expect("no poison").clone()
    }

    fn breach(&self, branch: &Branch, what: &str) -> Finish {
        self.wrong.lock().expect("no poison").push(format!("{branch}: {what}"));
        Finish::Diverged(what.to_owned())
    }
}

#[async_trait]
impl Participant for Book {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        *self.asked.lock().expect("no poison").entry(branch.id).or_default() += 1;
        sleep(self.takes).await;
        if self.only_looks {
            return Ok(Vote::ReadOnly);
        }
        if let Some(why) = &self.refuses {
            return Ok(Vote::No(why.clone()));
        }
        let mut pages = self.pages.lock().expect("no poison");
        Ok(match pages.get(&branch.id) {
            None => {
                pages.insert(branch.id, State::Prepared);
                Vote::Yes
            }
            Some(State::Prepared) => Vote::Yes,
            Some(State::Committed | State::Aborted) => Vote::No("it is over".to_owned()),
        })
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        *self.told.lock().expect("no poison").entry(branch.id).or_default() += 1;
        sleep(self.takes).await;
        let mut pages = self.pages.lock().expect("no poison");
        Ok(match pages.get(&branch.id) {
            Some(State::Prepared | State::Committed) => {
                pages.insert(branch.id, State::Committed);
                Finish::Done
            }
            None => self.breach(branch, "a commit without a vote"),
            Some(State::Aborted) => self.breach(branch, "a commit after the abort"),
        })
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        *self.told.lock().expect("no poison").entry(branch.id).or_default() += 1;
        sleep(self.takes).await;
        let mut pages = self.pages.lock().expect("no poison");
        Ok(match pages.get(&branch.id) {
            // Also if it was never prepared: what comes late is refused then.
            None | Some(State::Prepared | State::Aborted) => {
                pages.insert(branch.id, State::Aborted);
                Finish::Done
            }
            Some(State::Committed) => self.breach(branch, "an abort after the commit"),
        })
    }

    async fn in_doubt(&self, _group: &str) -> Result<Vec<TxId>> {
        let pages = self.pages.lock().expect("no poison");
        Ok(pages.iter().filter(|(_, state)| **state == State::Prepared).map(|(id, _)| *id).collect())
    }
}

/// Names of participants.
pub(super) const NAMES: [&str; 3] = ["a", "b", "c"];

/// A group in which these books are enlisted as a, b, c.
pub(super) fn with_books(all: &Transactions, books: &[Arc<Book>]) {
    for (name, book) in NAMES.iter().zip(books) {
        all.enlist(name, book.clone()).expect("enlisted once");
    }
}

/// Asserts that every transaction ended the same way in every book that took part, and that no breach was noted.
#[track_caller]
pub(super) fn assert_one_side(books: &[Arc<Book>], what: &str) {
    let mut ids = HashSet::new();
    for book in books {
        assert_eq!(book.breaches(), Vec::<String>::new(), "{what}");
        ids.extend(book.pages.lock().expect("no poison").keys().copied());
    }
    for id in ids {
        let states: Vec<_> = books.iter().map(|book| book.state(id)).collect();
        assert!(!states.contains(&Some(State::Prepared)), "{what}: {id} is in doubt: {states:?}");
        let mixed = states.contains(&Some(State::Committed)) && states.contains(&Some(State::Aborted));
        assert!(!mixed, "{what}: {id} has a mixed outcome: {states:?}");
    }
}

/// Whether anything stands in any of the books as neither committed nor aborted.
pub(super) fn in_doubt(books: &[Arc<Book>]) -> bool {
    books.iter().any(|book| book.pages.lock().expect("no poison").values().any(|s| *s == State::Prepared))
}

/// How many transactions this book has seen to this end.
pub(super) fn ended(book: &Book, decision: Decision) -> usize {
    let wanted = if decision == Decision::Commit { State::Committed } else { State::Aborted };
    book.pages.lock().expect("no poison").values().filter(|state| **state == wanted).count()
}

/// What stands in the log of a group, remote participants of these names included; the keys of drivers apart.
pub(super) async fn residue(backend: &Arc<dyn Backend>, group: &str, remote: &[&str]) -> Vec<String> {
    let mut dirs = vec![vec!["tx", group], vec!["txdecision", group], vec!["txready", group], vec!["txparked", group]];
    dirs.extend(remote.iter().map(|name| vec!["txwork", group, name]));
    let mut found = Vec::new();
    for dir in dirs {
        let dir = Dir::new(dir).expect("valid names");
        let range = KeyRange::prefix(&dir, "").expect("a valid prefix");
        let snapshot = backend.read(&range).await.expect("reading works");
        found.extend(snapshot.entries.into_iter().map(|entry| entry.key.to_string()));
    }
    found
}

/// Waits until nothing stands in the log.
pub(super) async fn until_clean(coord: &Coordinator, group: &str, remote: &[&str]) {
    eventually(&format!("a clean log of {group}"), async || residue(coord.backend(), group, remote).await.is_empty())
        .await;
}
