//! What an application holds in its hands: a group of transactions, and one that it puts together.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::{sync::oneshot, time::timeout};

use super::{
    Decision, Participant, TxId,
    desk::Desk,
    drive::{Caller, Drive},
    log::{Log, OPERATOR, Standing},
    record::{BranchRecord, MOST},
    steps::{Hook, Step},
};
use crate::{
    coordinator::Coordinator,
    error::{Error, ErrorKind, Result},
};

/// How the transactions of a group are carried out.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TransactionsOptions {
    /// How long votes are waited for, and how long each participant may take to confirm before it is asked again. A day at
    /// the most.
    pub within: Duration,
    pub(super) hook: Hook,
}

impl Default for TransactionsOptions {
    fn default() -> Self {
        Self { within: Duration::from_secs(10), hook: Hook::default() }
    }
}

impl TransactionsOptions {
    /// Sets [`within`](Self::within).
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.within = limit;
        self
    }

    /// Calls `hook` at each step of each transaction of this handle and waits for it: for tests that stop or kill a
    /// process in the middle.
    #[must_use]
    pub fn on_step(mut self, hook: impl Fn(TxId, Step) -> BoxFuture<'static, ()> + Send + Sync + 'static) -> Self {
        self.hook = Hook(Some(Arc::new(hook)));
        self
    }
}

/// A group of transactions by its name. Cheap to clone; all clones share the participants of this process.
///
/// Groups have nothing to do with each other: a recoverer of one leaves the others alone.
#[derive(Debug, Clone)]
pub struct Transactions {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) coord: Coordinator,
    pub(super) log: Log,
    pub(super) options: TransactionsOptions,
    enlisted: Mutex<BTreeMap<String, Arc<dyn Participant>>>,
    desk: Mutex<Option<Arc<Desk>>>,
}

/// Whether a transaction was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TxStatus {
    /// No decision stands in the log yet.
    Undecided,
    /// It is being carried out, or was a moment ago.
    Decided(Decision),
    /// Not in the log: it was never begun, or is over. Nothing of it can change any more.
    Unknown,
}

/// How many phases a transaction has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Protocol {
    /// Votes, then the decision. If the driver dies in between, the transaction is aborted.
    #[default]
    TwoPhase,
    /// Votes, then a record that all are in favour, then the decision: one round trip more. If the driver dies after that
    /// record, whoever recovers commits.
    ///
    /// # Limits
    /// Classic three-phase commit lets participants that hear nothing decide by their timeouts, and so needs no store to
    /// finish. It splits transactions when the network is partitioned, and also when the driver dies between two of its
    /// pre-commits (`models/` finds both): quorate never does that. Here every decision is the record in the store, in
    /// either protocol; a participant that cannot reach the store, itself or through whoever serves it, waits. What is
    /// gained is the time between the last vote and the decision, which is one write.
    ThreePhase,
}

/// A participant that did not vote for a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// Which one.
    pub participant: String,
    /// What it said, or what went wrong with it.
    pub why: String,
}

/// How a transaction ended.
#[must_use = "it may have been aborted"]
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The transaction.
    pub id: TxId,
    /// How it was decided. Final.
    pub decision: Decision,
    /// If it was aborted: who was against it. Empty if somebody else aborted it: a recoverer that took this process for
    /// dead, or an operator.
    pub refusals: Vec<Refusal>,
    /// The participants that have not confirmed yet. They are told until they have.
    pub unfinished: Vec<String>,
}

impl Outcome {
    /// Whether it was committed.
    pub fn is_committed(&self) -> bool {
        self.decision == Decision::Commit
    }
}

impl Coordinator {
    /// A group of transactions by name, with the default options.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name.
    pub fn transactions(&self, group: &str) -> Result<Transactions> {
        self.transactions_with(group, TransactionsOptions::default())
    }

    /// As [`transactions`](Self::transactions), with options.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or a limit of zero.
    pub fn transactions_with(&self, group: &str, options: TransactionsOptions) -> Result<Transactions> {
        if options.within.is_zero() {
            return Err(Error::invalid("transactions", "the time limit for votes is zero").key(group));
        }
        let log = Log::new(self.backend().clone(), group)?;
        let options = TransactionsOptions { within: options.within.min(MOST), ..options };
        let (enlisted, desk) = (Mutex::default(), Mutex::default());
        Ok(Transactions { inner: Arc::new(Inner { coord: self.clone(), log, options, enlisted, desk }) })
    }
}

impl Transactions {
    /// The group's name.
    pub fn group(&self) -> &str {
        &self.inner.log.group
    }

    /// Makes a participant known to this process, which can then drive and recover its branches. A participant that
    /// several processes can reach, a database for example, is enlisted in each of them under the same name.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or one that is enlisted already.
    pub fn enlist(&self, name: &str, participant: Arc<dyn Participant>) -> Result<()> {
        self.check_name(name)?;
        match self.enlisted_now().entry(name.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => {
                Err(Error::invalid("enlist", "a participant of this name is enlisted already").key(name))
            }
            std::collections::btree_map::Entry::Vacant(free) => {
                free.insert(participant);
                Ok(())
            }
        }
    }

    /// Begins to put a transaction together. Nothing is sent before [`Transaction::commit`].
    pub fn begin(&self) -> Transaction {
        let within = self.inner.options.within;
        let (id, protocol) = (TxId::random(), Protocol::default());
        Transaction { all: self.clone(), id, within, protocol, branches: Vec::new(), unknown: None }
    }

    /// How a transaction stands.
    ///
    /// # Errors
    /// What the backend says; `Corrupt` if the decision was written by a later version.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn status(&self, id: TxId) -> Result<TxStatus> {
        Ok(match self.inner.log.standing(id).await? {
            Standing::Undecided => TxStatus::Undecided,
            Standing::Decided(decision) => TxStatus::Decided(decision),
            Standing::Unknown => TxStatus::Unknown,
        })
    }

    pub(super) fn log(&self) -> &Log {
        &self.inner.log
    }

    pub(super) fn enlisted(&self, name: &str) -> Option<Arc<dyn Participant>> {
        self.enlisted_now().get(name).cloned()
    }

    pub(super) fn all_enlisted(&self) -> Vec<(String, Arc<dyn Participant>)> {
        self.enlisted_now().iter().map(|(name, participant)| (name.clone(), participant.clone())).collect()
    }

    fn enlisted_now(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<dyn Participant>>> {
        self.inner.enlisted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name must be good for every key that it will be part of.
    pub(super) fn check_name(&self, name: &str) -> Result<()> {
        let (log, id) = (self.log(), TxId::random());
        if name == OPERATOR {
            return Err(Error::invalid("transaction", "this name stands for decisions by hand")
                .key(name)
                .on(log.name()));
        }
        let told = |error: Error| error.on(log.name());
        log.work_key(name, id).map_err(told)?;
        log.mail_key("driver", id, name).map_err(told)?;
        Ok(())
    }

    fn desk(&self) -> Arc<Desk> {
        let mut desk = self.inner.desk.lock().unwrap_or_else(PoisonError::into_inner);
        desk.get_or_insert_with(|| Arc::new(Desk::open(&self.inner.coord, self.log()))).clone()
    }
}

/// A transaction that is being put together.
#[must_use = "nothing happens before commit"]
pub struct Transaction {
    all: Transactions,
    id: TxId,
    within: Duration,
    protocol: Protocol,
    branches: Vec<BranchRecord>,
    /// The first branch whose participant is not known here; told by `commit`.
    unknown: Option<String>,
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.branches.iter().map(|b| &b.name).collect();
        f.debug_struct("Transaction").field("id", &self.id).field("participants", &names).finish_non_exhaustive()
    }
}

impl Transaction {
    /// Its id, to be asked about with [`Transactions::status`].
    pub fn id(&self) -> TxId {
        self.id
    }

    /// Adds a branch for a participant that is [enlisted](Transactions::enlist) in this process.
    pub fn branch(mut self, participant: &str, body: impl Into<Bytes>) -> Self {
        if self.all.enlisted(participant).is_none() && self.unknown.is_none() {
            self.unknown = Some(participant.to_owned());
        }
        self.branches.push(BranchRecord { name: participant.to_owned(), remote: false, body: body.into() });
        self
    }

    /// Adds a branch for a participant that another process [serves](Transactions::serve). No connection to it is needed:
    /// it is reached through the store.
    pub fn remote(mut self, participant: &str, body: impl Into<Bytes>) -> Self {
        self.branches.push(BranchRecord { name: participant.to_owned(), remote: true, body: body.into() });
        self
    }

    /// Sets the limit for votes of this transaction.
    pub fn within(mut self, limit: Duration) -> Self {
        self.within = limit.min(MOST);
        self
    }

    /// Sets the protocol.
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.protocol = protocol;
        self
    }

    /// Carries the transaction out: asks everybody, decides, and tells everybody.
    ///
    /// An abort is an outcome, not an error. It returns when everyone who has to has confirmed, or, after the decision
    /// stands and the limit for votes has passed once more, with those who have not in [`Outcome::unfinished`].
    ///
    /// # Errors
    /// `InvalidInput` if there is no participant, one comes twice or is not enlisted, or a body is too large;
    /// `Unavailable` if it could not be begun: nobody was asked to prepare. `Ambiguous` if the decision was not confirmed
    /// in time: it is tried further, and [`Transactions::status`] tells; or if others took this process for dead and have
    /// finished and forgotten the transaction. `Corrupt` if somebody else wrote to its records.
    ///
    /// # Cancel safety
    /// Dropped before the decision, the transaction is aborted in the background; dropped later, it goes on there.
    pub async fn commit(self) -> Result<Outcome> {
        self.check()?;
        let Self { all, id, within, protocol, branches, .. } = self;
        let desk = all.desk();
        let ready = timeout(within, desk.ready()).await;
        ready.unwrap_or_else(|_| {
            let message = format!("the driver could not make itself known within {within:?}");
            Err(Error::new(ErrorKind::Unavailable, "begin", message).key(id).on(all.log().name()))
        })?;
        let local = branches.iter().filter(|b| !b.remote);
        let handles = local.filter_map(|b| Some((b.name.clone(), all.enlisted(&b.name)?))).collect();
        let (log, hook) = (all.log().clone(), all.inner.options.hook.clone());
        let drive = Drive { log, desk, hook, id, within, protocol, branches, handles };
        let (sender, outcome) = oneshot::channel();
        tokio::spawn(drive.run(Caller::new(sender)));
        outcome.await.unwrap_or_else(|_| {
            let message = "its task was stopped; a recoverer finishes it";
            Err(Error::new(ErrorKind::Ambiguous, "commit", message).key(id).on(all.log().name()))
        })
    }

    fn check(&self) -> Result<()> {
        let refuse = |message: &str| Error::invalid("begin", message).key(self.id).on(self.all.log().name());
        if let Some(unknown) = &self.unknown {
            let message = format!("{unknown:?} is not enlisted in this process");
            return Err(refuse(&message).next("enlist it, or add it as remote"));
        }
        if self.branches.is_empty() {
            return Err(refuse("a transaction needs a participant"));
        }
        if self.within.is_zero() {
            return Err(refuse("the time limit for votes is zero"));
        }
        let mut names = std::collections::BTreeSet::new();
        for branch in &self.branches {
            self.all.check_name(&branch.name)?;
            if !names.insert(&branch.name) {
                return Err(refuse(&format!("{:?} takes part twice", branch.name)));
            }
        }
        Ok(())
    }
}
