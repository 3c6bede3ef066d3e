//! The driver: takes one transaction from begin to forgotten.
//!
//! Promise: no participant is asked before the transaction is in the log, none is told an outcome before the decision is,
//! and nothing is forgotten before everyone who has to has confirmed. Whatever the driver is doing when it dies, a
//! recoverer goes on from the log.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Branch, Decision, Finish, Outcome, Participant, Protocol, Refusal, TxId,
    ballot::Ballot,
    deliver::finish,
    desk::{Desk, LONGEST, LetterBox, backoff},
    log::{Divergence, Log, Open, Verdict, Wish},
    record::{BranchRecord, Record, Says, VERSION},
    steps::{Hook, Step},
};
use crate::{
    error::{Error, ErrorKind, Result},
    line::wall_clock_ms,
};

/// How often the work records are looked at while the mail is silent.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What is to be driven.
pub(super) struct Drive {
    pub(super) log: Log,
    pub(super) desk: Arc<Desk>,
    pub(super) hook: Hook,
    pub(super) id: TxId,
    pub(super) within: Duration,
    pub(super) protocol: Protocol,
    pub(super) branches: Vec<BranchRecord>,
    /// The participants of this process among them.
    pub(super) handles: BTreeMap<String, Arc<dyn Participant>>,
}

/// Who waits for the outcome, until it is told.
pub(super) struct Caller(Option<oneshot::Sender<Result<Outcome>>>);

impl Caller {
    pub(super) fn new(sender: oneshot::Sender<Result<Outcome>>) -> Self {
        Self(Some(sender))
    }

    fn tell(&mut self, outcome: Result<Outcome>) {
        if let Some(sender) = self.0.take() {
            // Whoever does not wait any more does not want to know.
            let _ = sender.send(outcome);
        }
    }

    /// Returns when the caller has given up.
    pub(super) async fn gone(&mut self) {
        match &mut self.0 {
            Some(sender) => sender.closed().await,
            None => std::future::pending().await,
        }
    }
}

/// Where the transaction stands after the decision.
struct Settled {
    decision: Decision,
    /// Every remote participant was told in the step of the decision.
    told: bool,
}

/// What is to be written about the votes.
enum Write {
    Ready,
    Decision {
        wanted: Decision,
        why: String,
        /// The remote participants that no step has told yet.
        untold: Vec<(String, Bytes)>,
    },
}

impl Drive {
    pub(super) async fn run(self, mut caller: Caller) {
        if let Err(error) = self.drive(&mut caller).await {
            tracing::warn!(id = %self.id, %error, "the driver gives the transaction up; a recoverer goes on");
            caller.tell(Err(error));
        }
    }

    async fn drive(&self, caller: &mut Caller) -> Result<()> {
        self.hook.at(self.id, || Step::Begin).await;
        let mut letters = match self.branches.iter().any(|b| b.remote) {
            true => Some(self.desk.open_box(&self.log, self.id).await?),
            false => None,
        };
        let (tx, complete) = self.begin().await?;
        self.hook.at(self.id, || Step::Begun).await;
        let mut ballot = Ballot::new(self);
        match complete {
            Ok(()) => ballot.collect(self, letters.as_mut(), caller).await,
            Err(error) => ballot.give_up(&error.to_string()),
        }
        if ballot.nothing_to_do() {
            caller.tell(Ok(self.outcome(Decision::Commit, &ballot, Vec::new())));
            return self.forget(&tx, Decision::Commit, &[]).await;
        }
        let Some(settled) = self.settle(&tx, &ballot, caller).await? else {
            // Others have told everybody before they forgot it.
            caller.tell(self.over(&tx, &ballot).await);
            return Ok(());
        };
        let diverged = self.deliver(&tx, &ballot, &settled, letters.as_mut(), caller).await;
        self.forget(&tx, settled.decision, &diverged).await
    }

    /// Writes the transaction down. The second result is about work that did not fit into the first step.
    async fn begin(&self) -> Result<(Open, Result<()>)> {
        let record = Record {
            v: VERSION,
            driver: self.desk.driver.clone(),
            within_ms: u64::try_from(self.within.as_millis()).unwrap_or(u64::MAX),
            since_ms: wall_clock_ms(),
            phases: if self.protocol == Protocol::ThreePhase { 3 } else { 2 },
            branches: self.branches.iter().map(without_remote_body).collect(),
        };
        let mut work: Vec<_> =
            self.branches.iter().filter(|b| b.remote).map(|b| (b.name.clone(), b.body.clone())).collect();
        let tx = match self.log.begin(self.id, record, &mut work).await {
            Ok(tx) => tx,
            Err(error) if error.kind() == ErrorKind::Ambiguous => {
                // What is not taken back now is overdue before long.
                if let Err(error) = self.log.take_back(self.id).await {
                    tracing::debug!(id = %self.id, %error, "left to a recoverer");
                }
                let error = error.with_kind(ErrorKind::Unavailable);
                return Err(error.next("nothing of it takes effect; begin another transaction"));
            }
            Err(error) => return Err(error),
        };
        let complete = self.log.give_rest(&tx, work).await;
        Ok((tx, complete))
    }

    /// Brings the decision about. Never gives up while it may have been written: somebody may be acting on it. `None` if
    /// others have finished and forgotten the transaction.
    async fn settle(&self, tx: &Open, ballot: &Ballot, caller: &mut Caller) -> Result<Option<Settled>> {
        let wanted = ballot.decision();
        if wanted == Decision::Commit && self.protocol == Protocol::ThreePhase {
            self.hook.at(self.id, || Step::Ready).await;
            match self.until_written(tx, caller, &mut Write::Ready).await? {
                Verdict::Made | Verdict::Ready => self.hook.at(self.id, || Step::Readied).await,
                Verdict::Stands(decision) => return Ok(Some(self.decided(decision, false).await)),
                Verdict::Gone => return Ok(None),
            }
        }
        self.hook.at(self.id, || Step::Decide(wanted)).await;
        let mut write = Write::Decision { wanted, why: ballot.why(), untold: ballot.remote_to_tell(self) };
        let verdict = self.until_written(tx, caller, &mut write).await?;
        let all_told = matches!(&write, Write::Decision { untold, .. } if untold.is_empty());
        match verdict {
            Verdict::Made => Ok(Some(self.decided(wanted, all_told).await)),
            Verdict::Stands(decision) => Ok(Some(self.decided(decision, false).await)),
            Verdict::Gone => Ok(None),
            Verdict::Ready => {
                let message = "it is marked as ready, although this driver did not find everybody in favour";
                Err(self.log.error(ErrorKind::Corrupt, "decide", &tx.key, message))
            }
        }
    }

    /// Writes until the outcome is known. The caller is told when that takes too long.
    async fn until_written(&self, tx: &Open, caller: &mut Caller, write: &mut Write) -> Result<Verdict> {
        let mut pauses = backoff();
        let answer_by = Instant::now() + self.within;
        loop {
            match self.write(tx, write).await {
                Ok(verdict) => return Ok(verdict),
                Err(error) if error.kind() == ErrorKind::Corrupt => return Err(error),
                Err(error) => {
                    tracing::warn!(id = %self.id, %error, "not decided yet, trying again");
                    if Instant::now() >= answer_by {
                        caller.tell(Err(self.undecided(error)));
                    }
                }
            }
            sleep(pauses.next().unwrap_or(LONGEST)).await;
        }
    }

    async fn write(&self, tx: &Open, write: &mut Write) -> Result<Verdict> {
        match write {
            Write::Ready => self.log.make_ready(tx).await,
            Write::Decision { wanted, why, untold } => {
                let wish = Wish { why, ..Wish::default() };
                self.log.decide(tx, *wanted, &wish, untold).await
            }
        }
    }

    async fn decided(&self, decision: Decision, told: bool) -> Settled {
        metrics::counter!("quorate_transactions_total", "outcome" => decision.to_string()).increment(1);
        self.hook.at(self.id, || Step::Decided(decision)).await;
        Settled { decision, told }
    }

    /// What the caller can be told of a transaction that others have finished and forgotten. A recoverer would have aborted
    /// it, but an operator can have committed it, and so can an attempt of ours whose reply was lost.
    async fn over(&self, tx: &Open, ballot: &Ballot) -> Result<Outcome> {
        if let Some(decision) = self.log.by_hand(self.id).await? {
            return Ok(self.outcome(decision, ballot, Vec::new()));
        }
        let message = "others took this process for dead, and have finished and forgotten the transaction";
        let error = self.log.error(ErrorKind::Ambiguous, "decide", &tx.key, message);
        Err(error.next("it is over on every participant: read there which way it went"))
    }

    fn undecided(&self, error: Error) -> Error {
        let message = "the decision could not be confirmed in time; it is tried further in the background";
        let step = format!("ask status({}) before doing it again", self.id);
        Error::new(ErrorKind::Ambiguous, "decide", message)
            .key(self.log.tx_key(self.id))
            .on(self.log.name())
            .because(error)
            .next(step)
    }

    /// Tells everybody who has to know, and returns when all who have to confirm have; the caller is told earlier.
    async fn deliver(
        &self,
        tx: &Open,
        ballot: &Ballot,
        settled: &Settled,
        letters: Option<&mut LetterBox>,
        caller: &mut Caller,
    ) -> Vec<Divergence> {
        let decision = settled.decision;
        let mut telling = JoinSet::new();
        let mut waiting = Vec::new();
        for branch in ballot.to_finish(self) {
            waiting.push(branch.name.clone());
            let Some(participant) = self.handles.get(&branch.name) else { continue };
            let (participant, told) = (participant.clone(), self.branch(branch));
            let (name, within, hook) = (branch.name.clone(), self.within, self.hook.clone());
            telling.spawn(async move { (name, finish(participant, told, decision, within, hook).await) });
        }
        let remote = self.remote_confirmed(tx, waiting.clone(), settled, letters);
        tokio::pin!(remote);
        let mut remote_open = true;
        let mut diverged = ballot.against(decision);
        let tell_by = Instant::now() + self.within;
        while !telling.is_empty() || remote_open {
            tokio::select! {
                Some(told) = telling.join_next(), if !telling.is_empty() => {
                    // `finish` itself never panics: the participant runs in a task of its own.
                    let Ok((name, finish)) = told else { continue };
                    waiting.retain(|other| *other != name);
                    if let Finish::Diverged(what) = finish {
                        tracing::error!(id = %self.id, participant = name, %decision, what, "a heuristic outcome");
                        diverged.push(Divergence { participant: name, what });
                    }
                }
                () = &mut remote, if remote_open => {
                    remote_open = false;
                    waiting.retain(|name| self.handles.contains_key(name));
                }
                () = sleep_until(tell_by), if caller.0.is_some() => {
                    caller.tell(Ok(self.outcome(decision, ballot, waiting.clone())));
                }
            }
        }
        caller.tell(Ok(self.outcome(decision, ballot, Vec::new())));
        diverged
    }

    /// Returns when every remote participant that has to has confirmed.
    async fn remote_confirmed(
        &self,
        tx: &Open,
        mut open: Vec<String>,
        settled: &Settled,
        letters: Option<&mut LetterBox>,
    ) {
        let mut pauses = backoff();
        let mut told = settled.told;
        while !told {
            match self.log.tell_waiting(tx, settled.decision, None).await {
                Ok(_) => told = true,
                Err(error) => {
                    tracing::debug!(id = %self.id, %error, "not told yet");
                    sleep(pauses.next().unwrap_or(LONGEST)).await;
                }
            }
        }
        // An abort needs no confirmation: whoever asks about an unknown transaction is told the same.
        let (Some(letters), Decision::Commit) = (letters, settled.decision) else { return };
        open.retain(|name| !self.handles.contains_key(name));
        while !open.is_empty() {
            {
                let arrived = letters.letters.borrow_and_update();
                open.retain(|name| arrived.get(name).is_none_or(|mail| mail.says != Says::Done));
            }
            if open.is_empty() {
                break;
            }
            if timeout(LOOK_EVERY, letters.letters.changed()).await.is_ok_and(|changed| changed.is_ok()) {
                continue;
            }
            // The mail may have been lost with the mailbox; the work record is what counts.
            let mut still = Vec::new();
            for name in open {
                let Ok(key) = self.log.work_key(&name, self.id) else { continue };
                if !matches!(self.log.entry(&key).await, Ok(None)) {
                    still.push(name);
                }
            }
            open = still;
        }
    }

    async fn forget(&self, tx: &Open, decision: Decision, diverged: &[Divergence]) -> Result<()> {
        self.hook.at(self.id, || Step::Forget).await;
        let mut pauses = backoff();
        // A forgetting that is lost is done again; one that finds nothing was done before.
        while let Err(error) = self.log.forget(tx, decision, diverged, None).await {
            tracing::debug!(id = %self.id, %error, "not forgotten yet");
            sleep(pauses.next().unwrap_or(LONGEST)).await;
        }
        self.hook.at(self.id, || Step::Forgotten).await;
        Ok(())
    }

    pub(super) fn branch(&self, branch: &BranchRecord) -> Branch {
        Branch {
            group: self.log.group.clone(),
            id: self.id,
            participant: branch.name.as_str().into(),
            body: branch.body.clone(),
            served: false,
        }
    }

    fn outcome(&self, decision: Decision, ballot: &Ballot, unfinished: Vec<String>) -> Outcome {
        let refusals = match decision {
            Decision::Commit => Vec::new(),
            Decision::Abort => ballot.refusals().map(|(participant, why)| Refusal { participant, why }).collect(),
        };
        Outcome { id: self.id, decision, refusals, unfinished }
    }
}

fn without_remote_body(branch: &BranchRecord) -> BranchRecord {
    let body = if branch.remote { Bytes::new() } else { branch.body.clone() };
    BranchRecord { body, ..branch.clone() }
}
