//! A bank whose accounts lie on several coordinators.
//!
//! Promise: each transfer leaves a receipt in each of its branches, so that afterwards every account can be reckoned up and
//! every transfer found on both sides or on none.

pub mod keeper;
pub mod ledger;
pub mod run;
pub mod watched;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use quorate::{
    Coordinator, ErrorKind, Result,
    commit::{KeyWork, Keys, Transactions, TransactionsOptions, TxId, consistent_read},
    kv::KeyValue,
};
use tokio::time::sleep;

use ledger::Ledger;
use watched::{Note, Watched};

/// How many accounts there are, dealt out to the participants in turn.
pub const ACCOUNTS: usize = 20;
const EACH: i64 = 1000;
/// What all accounts hold together, always.
pub const TOTAL: i64 = EACH * ACCOUNTS as i64;

/// What was told of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It was committed.
    Committed,
    /// It was aborted, or could not be begun.
    Aborted,
    /// Nobody knows yet.
    Unknown,
}

/// A place of accounts.
#[derive(Debug, Clone)]
pub struct Part {
    /// The participant's name.
    pub name: String,
    /// Where its keys are.
    pub coord: Coordinator,
}

impl Part {
    /// A participant by name and place.
    pub fn new(name: &str, coord: &Coordinator) -> Self {
        Self { name: name.to_owned(), coord: coord.clone() }
    }
}

/// The bank, as one process sees it.
#[derive(Debug)]
pub struct Bank {
    /// Its transactions.
    pub all: Transactions,
    parts: Vec<(Part, Keys)>,
    ledger: Option<Ledger>,
}

impl Bank {
    /// Enlists all participants, each watched by `note`.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name.
    pub fn open(
        log: &Coordinator,
        group: &str,
        parts: &[Part],
        ledger: Option<&Ledger>,
        options: TransactionsOptions,
        note: &Note,
    ) -> Result<Self> {
        let (all, source) = (log.transactions_with(group, options)?, log.transactions(group)?);
        let mut opened = Vec::new();
        for part in parts {
            let keys = source.enlist_keys(&part.name, &part.coord)?;
            all.enlist(&part.name, Arc::new(Watched { inner: Arc::new(keys.clone()), note: note.clone() }))?;
            opened.push((part.clone(), keys));
        }
        if let Some(ledger) = ledger {
            let inner = Arc::new(ledger.participant.clone());
            all.enlist(ledger::NAME, Arc::new(Watched { inner, note: note.clone() }))?;
        }
        Ok(Self { all, parts: opened, ledger: ledger.cloned() })
    }

    fn account(&self, number: usize) -> (&str, &Keys, String) {
        let (part, keys) = &self.parts[number % self.parts.len()];
        (&part.name, keys, format!("account/{number}"))
    }

    /// Puts the same into every account.
    ///
    /// # Errors
    /// What the backends say.
    pub async fn fill(&self) -> Result<()> {
        for number in 0..ACCOUNTS {
            let (part, _) = &self.parts[number % self.parts.len()];
            part.coord.kv().put(&format!("account/{number}"), EACH.to_string()).await?;
        }
        match &self.ledger {
            Some(ledger) => ledger.fill().await,
            None => Ok(()),
        }
    }

    /// One transfer between two accounts; `None` if they cannot be read now.
    ///
    /// # Panics
    /// If it ends with an error that a running bank must not have.
    pub async fn transfer(&self) -> Option<(TxId, Told)> {
        let from = rand::random_range(0..ACCOUNTS);
        let to = (from + rand::random_range(1..ACCOUNTS)) % ACCOUNTS;
        let amount = rand::random_range(1..10_i64);
        let mut work: BTreeMap<&str, (KeyWork, String)> = BTreeMap::new();
        for (number, change) in [(from, -amount), (to, amount)] {
            let (name, keys, key) = self.account(number);
            let found = keys.get(&key).await.inspect_err(assert_transient).ok()?.expect("every account is there");
            let (branch, mut receipt) = work.remove(name).unwrap_or_default();
            receipt.push_str(&format!("{number}:{change} "));
            let next = (number_of(&found) + change).to_string();
            work.insert(name, (branch.if_unchanged(&key, found.modified).put(&key, next), receipt));
        }
        let mut tx = self.all.begin();
        let id = tx.id();
        if self.ledger.is_some() {
            let receipts: String = work.values().map(|(_, receipt)| receipt.as_str()).collect();
            tx = tx.branch(ledger::NAME, receipts);
        }
        for (name, (branch, receipt)) in work {
            let key = format!("receipt/{name}/{id}");
            tx = tx.branch(name, branch.if_absent(&key).put(&key, receipt));
        }
        let told = match tx.commit().await {
            Ok(outcome) if outcome.is_committed() => Told::Committed,
            Ok(_) => Told::Aborted,
            Err(error) => {
                assert_transient(&error);
                if error.kind() == ErrorKind::Unavailable { Told::Aborted } else { Told::Unknown }
            }
        };
        Some((id, told))
    }

    /// What all accounts held together at one moment.
    ///
    /// # Errors
    /// As for [`consistent_read`].
    pub async fn total(&self) -> Result<i64> {
        let accounts: Vec<_> = (0..ACCOUNTS).map(|number| self.account(number)).collect();
        let keys: Vec<_> = accounts.iter().map(|(_, keys, key)| (*keys, key.as_str())).collect();
        let total = consistent_read(&keys).await?.iter().flatten().map(number_of).sum();
        // The book changes with the accounts, a moment before or after: its total is the same at every moment.
        if let Some(ledger) = &self.ledger {
            let book: i64 = ledger.balances().await?.values().sum();
            assert_eq!(book, TOTAL, "in the book");
        }
        Ok(total)
    }

    /// Reckons everything up by plain reads, when all is quiet: what is wrong, and how many transfers took effect.
    ///
    /// # Errors
    /// What the backends say.
    pub async fn audit(&self, told: &HashMap<TxId, Told>) -> Result<(Vec<String>, usize)> {
        let mut wrong = Vec::new();
        let mut balances = [EACH; ACCOUNTS];
        let mut receipts: HashMap<TxId, Vec<i64>> = HashMap::new();
        for (part, _) in &self.parts {
            let dir = format!("receipt/{}/", part.name);
            for entry in part.coord.kv().list(&dir).await?.entries {
                let id: TxId = entry.key.trim_start_matches(&dir).parse()?;
                let receipt = std::str::from_utf8(&entry.value).expect("text");
                for (number, change) in changes(receipt) {
                    balances[number] += change;
                    receipts.entry(id).or_default().push(change);
                }
            }
        }
        for (number, reckoned) in balances.iter().enumerate() {
            let (part, _) = &self.parts[number % self.parts.len()];
            let now = part.coord.kv().get(&format!("account/{number}")).await?.map(|found| number_of(&found));
            if now != Some(*reckoned) {
                wrong.push(format!("account {number} holds {now:?}, its receipts say {reckoned}"));
            }
        }
        if let Some(ledger) = &self.ledger {
            let book = ledger.balances().await?;
            if book.values().ne(&balances) {
                wrong.push(format!("the book says {book:?}, the receipts {balances:?}"));
            }
            let doubts = ledger.in_doubt().await?;
            if doubts != 0 {
                wrong.push(format!("{doubts} branches stand prepared in the book"));
            }
        }
        for (id, changes) in &receipts {
            if changes.len() != 2 || changes.iter().sum::<i64>() != 0 {
                wrong.push(format!("{id} took effect on one side: {changes:?}"));
            }
        }
        for (id, told) in told {
            match (told, receipts.contains_key(id)) {
                (Told::Committed, false) => wrong.push(format!("{id} was committed and is lost")),
                (Told::Aborted, true) => wrong.push(format!("{id} was aborted and took effect")),
                (Told::Committed, true) | (Told::Aborted, false) | (Told::Unknown, _) => {}
            }
        }
        Ok((wrong, receipts.len()))
    }

    /// Waits until the log is empty and no key is held.
    ///
    /// # Panics
    /// If they are not within `limit`.
    pub async fn settled(&self, log: &Coordinator, limit: Duration) {
        let keys: Vec<_> = self.parts.iter().map(|(part, _)| &part.coord).collect();
        crate::commit::until_clean(log, self.all.group(), &keys, limit).await;
    }

    /// Transfers with a pause in between, for as long as the future lives, and tells each.
    pub async fn work(&self, pause: Duration, mut tell: impl FnMut(TxId, Told)) {
        loop {
            if let Some((id, told)) = self.transfer().await {
                tell(id, told);
            }
            sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
        }
    }
}

fn number_of(found: &KeyValue) -> i64 {
    std::str::from_utf8(&found.value).expect("text").parse().expect("a number")
}

/// Account and change, as written down in a receipt.
fn changes(receipt: &str) -> Vec<(usize, i64)> {
    let change = |word: &str| {
        let (number, change) = word.split_once(':')?;
        Some((number.parse().ok()?, change.parse().ok()?))
    };
    receipt.split_whitespace().map(|word| change(word).expect("as written by a transfer")).collect()
}

/// A bank whose servers come and go sees errors of these kinds only.
#[track_caller]
fn assert_transient(error: &quorate::Error) {
    assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{error:?}");
}
