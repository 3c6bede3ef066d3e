//! Keys of any coordinator as a participant: so that one transaction can span etcd and Redis.
//!
//! Promise: see [`Keys`].

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::{
    Branch, Decision, Finish, Participant, Transactions, TxId, Vote,
    desk::{LONGEST, backoff},
    keys_record::{BranchState, BranchWork, Intent, Requirement, Step, Work},
    log::{Log, Standing},
    record::{VERSION, decode, encode},
};
use crate::{
    backend::{Backend, Check, Entry, Revision, Txn, Write},
    coordinator::Coordinator,
    error::{Error, ErrorKind, Result},
    key::{Dir, Key, KeyRange},
    kv::KeyValue,
};

/// How long a branch waits for a key that another transaction holds, before it votes no.
const BUSY: Duration = Duration::from_millis(500);
/// How long a mark that refuses late prepares is kept, as one process has seen it.
const KEEP_MARKS: Duration = Duration::from_secs(600);

/// What a branch does to keys. Made into the body of [`Transaction::branch`](super::Transaction::branch).
///
/// ```
/// # use quorate_core::{commit::{KeyWork, Transactions}, Revision};
/// # fn show(payments: &Transactions, seen: Revision) {
/// let debit = KeyWork::new().if_unchanged("account/7", seen).put("account/7", "70");
/// let tx = payments.begin().branch("accounts", debit);
/// # let _ = tx; }
/// ```
#[derive(Debug, Clone, Default)]
pub struct KeyWork {
    work: Work,
}

impl KeyWork {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn step(mut self, key: &str, change: impl FnOnce(&mut Step)) -> Self {
        change(self.work.steps.entry(key.to_owned()).or_default());
        self
    }

    /// Only if the key does not exist.
    #[must_use]
    pub fn if_absent(self, key: &str) -> Self {
        self.step(key, |step| step.require = Some(Requirement::Absent))
    }

    /// Only if the key was last written at `modified`, as [`Keys::get`] told it.
    #[must_use]
    pub fn if_unchanged(self, key: &str, modified: Revision) -> Self {
        self.step(key, |step| step.require = Some(Requirement::At(modified.0)))
    }

    /// Creates or replaces a key.
    #[must_use]
    pub fn put(self, key: &str, value: impl Into<Bytes>) -> Self {
        let value = value.into();
        self.step(key, |step| step.write = Some(super::keys_record::Change::Put(value)))
    }

    /// Deletes a key, if it is there.
    #[must_use]
    pub fn delete(self, key: &str) -> Self {
        self.step(key, |step| step.write = Some(super::keys_record::Change::Delete))
    }
}

impl From<KeyWork> for Bytes {
    fn from(work: KeyWork) -> Self {
        encode(&Work { v: VERSION, ..work.work })
    }
}

/// Keys of a coordinator as a participant. The coordinator may be another one than that of the transactions.
///
/// # What is promised
/// - From its vote until the outcome, every key of a branch is held: no other transaction of the group prepares on it.
///   Whoever finds a key held waits for half a second and votes no then, so nobody waits in a circle.
/// - **Isolation.** A plain [`Kv::get`](crate::Kv::get) sees the old value until the branch is committed on that store, and
///   different stores commit at different moments. [`Keys::get`] looks at the decision: from the moment it stands, every
///   such read of every key of the transaction, on every store, gives the new value. [`consistent_read`] gives values of
///   many keys that all stood at one moment.
/// - A plain write to a held key is not hindered, and is overwritten by the commit: change keys that take part in
///   transactions by transactions.
/// - What a process left held is let go by whoever meets it, once its transaction is decided or over.
///
/// # Limits
/// A branch needs three entries for each key in one step of the backend, and two more
/// ([`Profile::max_txn`](crate::Profile::max_txn)); the keys of all branches on one store should belong to one group of
/// transactions. A commit that an operator decided by hand for a branch that never prepared cannot be told from one that
/// was confirmed before: it is answered as done.
///
/// # On the wire
/// On the coordinator of the keys, on no lease: `txbranch/<group>/<id>/<participant>` holds what the branch does, and
/// `txintent/<key>` who holds a key. A branch record with state `over` is a mark that refuses a prepare that may still be
/// on its way; whoever recovers or serves deletes it after ten minutes. Every branch of keys that are
/// [served](Transactions::serve) leaves one, because several processes may have sent its prepare.
#[derive(Clone)]
pub struct Keys {
    name: Arc<str>,
    backend: Arc<dyn Backend>,
    /// Not the transactions themselves, which hold this participant.
    log: Log,
    kv: Dir,
    intents: Dir,
    /// Marks of refusal, and since when they have been seen here.
    marks: Arc<Mutex<HashMap<Key, Instant>>>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({} on {})", self.name, self.backend.profile().backend)
    }
}

/// What an abort does about a branch that is not there.
#[derive(Debug, Clone, Copy)]
enum Unprepared {
    /// Its prepare may still come, and is to be refused.
    Refuse,
    /// Somebody else has ended it.
    Leave,
}

impl Transactions {
    /// Enlists the keys of a coordinator as a participant of this name, and returns them to read with.
    ///
    /// # Errors
    /// As for [`enlist`](Self::enlist).
    pub fn enlist_keys(&self, name: &str, of: &Coordinator) -> Result<Keys> {
        let constant = |name| Dir::new([name]).expect("a constant that is a valid segment");
        let keys = Keys {
            name: name.into(),
            backend: of.backend().clone(),
            log: self.log().clone(),
            kv: constant("kv"),
            intents: constant("txintent"),
            marks: Arc::default(),
        };
        self.enlist(name, Arc::new(keys.clone()))?;
        Ok(keys)
    }
}

impl Keys {
    /// The value of a key, as decided transactions left it: from the moment a transaction is decided its values are read,
    /// whether or not they were written yet. Two round trips, and more where a transaction holds the key.
    ///
    /// # Errors
    /// `InvalidInput` for a bad key; otherwise what the backends say.
    ///
    /// # Cancel safety
    /// It finishes branches that are decided, and may be dropped.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        Ok(self.decided(key).await?.and_then(crate::kv::describe))
    }

    async fn decided(&self, key: &str) -> Result<Option<Entry>> {
        let (intent_key, key) = (Key::new(&self.intents, key)?, Key::new(&self.kv, key)?);
        loop {
            // The intent first: one that is gone by then has been written to the key by then.
            let Some(found) = self.entry(&intent_key).await? else {
                return self.entry(&key).await;
            };
            if !self.settle(&self.intent(&found)?, &found).await? {
                return self.entry(&key).await;
            }
        }
    }

    /// Brings the holder of a key to its end, if there is one for it; `false` if the holder is not decided.
    async fn settle(&self, intent: &Intent, found: &Entry) -> Result<bool> {
        if *intent.group != *self.log.group {
            return Ok(false);
        }
        let branch = Branch::new(&intent.group, intent.id, &intent.participant, "");
        let decision = match self.log.standing(intent.id).await? {
            Standing::Undecided => return Ok(false),
            Standing::Decided(decision) => decision,
            // Over: if it still stands, it came late. It may just as well have ended between the two reads.
            Standing::Unknown if self.entry(&found.key).await?.is_none_or(|now| now.modified != found.modified) => {
                return Ok(true);
            }
            Standing::Unknown => Decision::Abort,
        };
        // A branch that ended otherwise is for its driver to tell.
        let _ = self.end(&branch, decision, Unprepared::Leave).await?;
        Ok(true)
    }

    async fn entry(&self, key: &Key) -> Result<Option<Entry>> {
        Ok(self.backend.read(&KeyRange::One(key.clone())).await?.entries.pop())
    }

    fn intent(&self, entry: &Entry) -> Result<Intent> {
        decode(&entry.value).map_err(|why| self.corrupt(&entry.key, &why.0))
    }

    fn corrupt(&self, key: &Key, why: &str) -> Error {
        Error::new(ErrorKind::Corrupt, "read", why).key(key).on(self.backend.profile().backend)
    }

    fn branch_key(&self, branch: &Branch) -> Result<Key> {
        let dir = Dir::new(["txbranch", &branch.group])?;
        Key::new(&dir, &format!("{}/{}", branch.id, branch.participant))
    }

    async fn found(&self, key: &Key) -> Result<Option<(Revision, BranchWork)>> {
        let Some(entry) = self.entry(key).await? else { return Ok(None) };
        let work = decode(&entry.value).map_err(|why| self.corrupt(key, &why.0))?;
        Ok(Some((entry.modified, work)))
    }

    /// The step that prepares. The checks come in this order: the branch, all intents, all requirements.
    fn preparing(&self, branch: &Branch, key: &Key, work: &Work, again: bool) -> Result<Txn> {
        let mut txn = Txn { checks: vec![Check::Absent(key.clone())], writes: Vec::new() };
        let record = BranchWork { v: VERSION, state: BranchState::Prepared, again, steps: work.steps.clone() };
        txn.writes.push(put(key.clone(), encode(&record)));
        let (group, participant) = (branch.group.to_string(), branch.participant.to_string());
        let intent = encode(&Intent { v: VERSION, group, id: branch.id, participant });
        for name in work.steps.keys() {
            let held = Key::new(&self.intents, name)?;
            txn.checks.push(Check::Absent(held.clone()));
            txn.writes.push(put(held, intent.clone()));
        }
        for (name, step) in &work.steps {
            let key = Key::new(&self.kv, name)?;
            match step.require {
                None => {}
                Some(Requirement::Absent) => txn.checks.push(Check::Absent(key)),
                Some(Requirement::At(at)) => txn.checks.push(Check::Unchanged { key, modified: Revision(at) }),
            }
        }
        let most = self.backend.profile().max_txn;
        if txn.checks.len() + txn.writes.len() > most {
            let message = format!("{} keys do not fit into one step of at most {most} entries", work.steps.len());
            return Err(Error::invalid("prepare", message).key(branch).on(self.backend.profile().backend));
        }
        Ok(txn)
    }

    /// Who stands in the way: `true` if it may have been removed.
    async fn in_the_way(&self, held: &Key) -> Result<bool> {
        let Some(found) = self.entry(held).await? else { return Ok(true) };
        self.settle(&self.intent(&found)?, &found).await
    }

    async fn end(&self, branch: &Branch, decision: Decision, unprepared: Unprepared) -> Result<Finish> {
        let key = self.branch_key(branch)?;
        let mut pauses = backoff();
        loop {
            let txn = match (self.found(&key).await?, decision) {
                (Some((_, BranchWork { state: BranchState::Over(ended), .. })), decision) => {
                    return Ok(if ended == decision { Finish::Done } else { otherwise(ended) });
                }
                (Some((modified, work)), decision) => self.ending(&key, modified, &work, decision)?,
                // Confirmed before, and forgotten here.
                (None, Decision::Commit) => return Ok(Finish::Done),
                (None, Decision::Abort) => match unprepared {
                    Unprepared::Refuse => self.mark(&key),
                    Unprepared::Leave => return Ok(Finish::Done),
                },
            };
            if self.backend.commit(&txn).await?.applied {
                return Ok(Finish::Done);
            }
            // Somebody else is at it.
            sleep(pauses.next().unwrap_or(LONGEST)).await;
        }
    }

    fn ending(&self, key: &Key, modified: Revision, work: &BranchWork, decision: Decision) -> Result<Txn> {
        use super::keys_record::Change;
        let mut writes = Vec::new();
        for (name, step) in &work.steps {
            writes.push(Write::Delete(Key::new(&self.intents, name)?));
            match (&step.write, decision) {
                (Some(Change::Put(value)), Decision::Commit) => {
                    writes.push(put(Key::new(&self.kv, name)?, value.clone()));
                }
                (Some(Change::Delete), Decision::Commit) => writes.push(Write::Delete(Key::new(&self.kv, name)?)),
                (None, _) | (_, Decision::Abort) => {}
            }
        }
        // A prepare that may have been sent twice may arrive once more. Let in while a decision to commit stands in the log,
        // it would be committed once more by whoever meets it, over newer values.
        writes.push(if work.again { put(key.clone(), over(decision)) } else { Write::Delete(key.clone()) });
        Ok(Txn { checks: vec![Check::Unchanged { key: key.clone(), modified }], writes })
    }

    /// Refuses a prepare that has not come yet.
    fn mark(&self, key: &Key) -> Txn {
        Txn { checks: vec![Check::Absent(key.clone())], writes: vec![put(key.clone(), over(Decision::Abort))] }
    }

    /// Deletes marks that were seen long enough, and whose transactions are forgotten: what comes later is aborted.
    async fn sweep(&self, marks: Vec<(Key, Revision, TxId)>) {
        let now = Instant::now();
        let old: Vec<_> = {
            let mut seen = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            seen.retain(|key, _| marks.iter().any(|(mark, ..)| mark == key));
            let mut is_old = |key: &Key| *seen.entry(key.clone()).or_insert(now) + KEEP_MARKS <= now;
            marks.into_iter().filter(|(key, ..)| is_old(key)).collect()
        };
        for (key, modified, id) in old {
            if !matches!(self.log.standing(id).await, Ok(Standing::Unknown)) {
                continue;
            }
            let txn = Txn {
                checks: vec![Check::Unchanged { key: key.clone(), modified }],
                writes: vec![Write::Delete(key.clone())],
            };
            if let Err(error) = self.backend.commit(&txn).await {
                tracing::debug!(%key, %error, "a mark stays for now");
            }
        }
    }
}

#[async_trait]
impl Participant for Keys {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        let work: Work = match decode(&branch.body) {
            Ok(work) => work,
            Err(why) => return Ok(Vote::No(format!("the body is no work for keys: {}", why.0))),
        };
        if work.steps.is_empty() {
            return Ok(Vote::ReadOnly);
        }
        let key = self.branch_key(branch)?;
        let (mut pauses, patience) = (backoff(), Instant::now() + BUSY);
        // Another process that serves the keys may have sent the same, and stand still since then.
        let (mut again, mut repeated) = (branch.served, false);
        loop {
            let txn = self.preparing(branch, &key, &work, again)?;
            let commit = match self.backend.commit(&txn).await {
                Ok(commit) => commit,
                // Sent again, it is recognised by its branch record.
                Err(error) if error.kind() == ErrorKind::Ambiguous && !repeated => {
                    (again, repeated) = (true, true);
                    continue;
                }
                Err(error) => return Err(error),
            };
            if commit.applied {
                return Ok(Vote::Yes);
            }
            match self.found(&key).await? {
                Some((_, BranchWork { state: BranchState::Prepared, .. })) => return Ok(Vote::Yes),
                Some(_) => return Ok(Vote::No("it is over".to_owned())),
                None => {}
            }
            let culprit = commit.culprit.and_then(|place| txn.checks.get(place));
            match culprit {
                Some(Check::Absent(held)) if held.dir() == &self.intents => {
                    if !self.in_the_way(held).await? && Instant::now() >= patience {
                        return Ok(Vote::No(format!("{} is held by another transaction", named(held))));
                    }
                }
                Some(Check::Absent(key) | Check::Unchanged { key, .. }) if key.dir() == &self.kv => {
                    return Ok(Vote::No(format!("{} is not as required", named(key))));
                }
                // The branch record came and went: it is over.
                _ => return Ok(Vote::No("it is over".to_owned())),
            }
            sleep(pauses.next().unwrap_or(LONGEST).min(BUSY / 4)).await;
        }
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        self.end(branch, Decision::Commit, Unprepared::Leave).await
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.end(branch, Decision::Abort, Unprepared::Refuse).await
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        let range = KeyRange::prefix(&Dir::new(["txbranch", group])?, "")?;
        let (mut prepared, mut marks) = (Vec::new(), Vec::new());
        for entry in self.backend.read(&range).await?.entries {
            let Some(name) = entry.key.name() else { continue };
            let Some((id, participant)) = name.split_once('/') else { continue };
            let (Ok(id), true) = (id.parse(), *participant == *self.name) else { continue };
            let Some(work) = super::record::decode_or_skip::<BranchWork>(&entry) else { continue };
            match work.state {
                BranchState::Prepared => prepared.push(id),
                BranchState::Over(_) => marks.push((entry.key.clone(), entry.modified, id)),
            }
        }
        self.sweep(marks).await;
        Ok(prepared)
    }
}

fn put(key: Key, value: Bytes) -> Write {
    Write::Put { key, value, lease: None }
}

fn over(decision: Decision) -> Bytes {
    let steps = std::collections::BTreeMap::new();
    encode(&BranchWork { v: VERSION, state: BranchState::Over(decision), again: false, steps })
}

fn otherwise(ended: Decision) -> Finish {
    Finish::Diverged(format!("it ended with {ended} before"))
}

/// A key as the user wrote it.
fn named(key: &Key) -> String {
    key.name().unwrap_or_else(|| key.encoded().to_owned())
}

/// The values of many keys, on several coordinators, as they all stood at one moment.
///
/// It reads all of them until two rounds agree: then nothing was changed between the two. Where keys are written all the
/// time there may be no such moment.
///
/// # Errors
/// `Unavailable` if no two of many rounds agreed; `InvalidInput` for a bad key; otherwise what the backends say.
///
/// # Cancel safety
/// As for [`Keys::get`].
pub async fn consistent_read(keys: &[(&Keys, &str)]) -> Result<Vec<Option<KeyValue>>> {
    const ROUNDS: usize = 100;
    let round = || futures_util::future::try_join_all(keys.iter().map(|(keys, key)| keys.decided(key)));
    let at = |entry: &Option<Entry>| entry.as_ref().map(|entry| entry.modified);
    let mut before = round().await?;
    for _ in 1..ROUNDS {
        let now = round().await?;
        // A key that was decided to change between the two was written by the second.
        if before.iter().map(at).eq(now.iter().map(at)) {
            return Ok(now.into_iter().map(|entry| entry.and_then(crate::kv::describe)).collect());
        }
        before = now;
        sleep(Duration::from_millis(rand::random_range(1..20))).await;
    }
    let message = format!("no two of {ROUNDS} rounds agreed: the keys are written all the time");
    Err(Error::new(ErrorKind::Unavailable, "consistent read", message))
}
