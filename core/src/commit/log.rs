//! The log: what is written to the store for a transaction, and in which steps.
//!
//! Promise: a decision is made once. It is created only where there is none and only while the transaction is not
//! forgotten, in one step at the server; so nobody can decide differently, and a decision that was delayed on its way
//! until everything is over is refused.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Decision, TxId,
    record::{DecisionRecord, Parked, ReadyRecord, Record, VERSION, Work, WorkState, decode, encode},
};
use crate::{
    backend::{Backend, Check, Entry, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::{Dir, Key, KeyRange},
};

/// Where the records of a group are.
#[derive(Debug, Clone)]
pub(super) struct Log {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) group: Arc<str>,
    pub(super) txs: Dir,
    pub(super) decisions: Dir,
    pub(super) ready: Dir,
    pub(super) drivers: Dir,
    pub(super) parked: Dir,
}

/// Who decides by hand, in the place of a participant's name. No participant has it: it is no name.
pub(super) const OPERATOR: &str = "/operator";

/// A transaction that stands in the log.
#[derive(Debug, Clone)]
pub(super) struct Open {
    pub(super) id: TxId,
    pub(super) key: Key,
    pub(super) revision: Revision,
    pub(super) record: Record,
}

/// What is known of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Undecided,
    Decided(Decision),
    /// Not in the log: it was never begun, or is over. If something of it is still prepared, that came late.
    Unknown,
}

/// A decision that somebody wants to make.
#[derive(Debug, Default)]
pub(super) struct Wish<'a> {
    pub(super) why: &'a str,
    /// What must stand as well.
    pub(super) fence: Option<Check>,
    /// What is written in the same step.
    pub(super) also: Option<Write>,
}

/// What came of an attempt to decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The decision is the one that was wanted, and this attempt made it.
    Made,
    /// This decision was there already: an earlier attempt's, or somebody else's.
    Stands(Decision),
    /// Everybody was found in favour: it can only be committed.
    Ready,
    /// The transaction was decided, finished and forgotten by others.
    Gone,
}

/// An outcome that an operator has to see.
#[derive(Debug, Clone)]
pub(super) struct Divergence {
    pub(super) participant: String,
    pub(super) what: String,
}

impl Log {
    pub(super) fn new(backend: Arc<dyn Backend>, group: &str) -> Result<Self> {
        let name = backend.profile().backend;
        let dir = |kind: &str| Dir::new([kind, group]).map_err(|e| e.on(name));
        Ok(Self {
            group: group.into(),
            txs: dir("tx")?,
            decisions: dir("txdecision")?,
            ready: dir("txready")?,
            drivers: dir("txdriver")?,
            parked: dir("txparked")?,
            backend,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        self.backend.profile().backend
    }

    pub(super) fn tx_key(&self, id: TxId) -> Key {
        Key::new(&self.txs, &id.to_string()).expect("32 digits are a name")
    }

    pub(super) fn decision_key(&self, id: TxId) -> Key {
        Key::new(&self.decisions, &id.to_string()).expect("32 digits are a name")
    }

    fn ready_key(&self, id: TxId) -> Key {
        Key::new(&self.ready, &id.to_string()).expect("32 digits are a name")
    }

    pub(super) fn work_dir(&self, participant: &str) -> Result<Dir> {
        Dir::new(["txwork", &self.group, participant]).map_err(|e| e.on(self.name()))
    }

    pub(super) fn work_key(&self, participant: &str, id: TxId) -> Result<Key> {
        Key::new(&self.work_dir(participant)?, &id.to_string())
    }

    pub(super) fn mailbox(&self, driver: &str) -> Result<Dir> {
        Dir::new(["txvote", &self.group, driver]).map_err(|e| e.on(self.name()))
    }

    pub(super) fn mail_key(&self, driver: &str, id: TxId, participant: &str) -> Result<Key> {
        Key::new(&self.mailbox(driver)?, &format!("{id}/{participant}"))
    }

    pub(super) fn parked_key(&self, id: TxId, participant: &str) -> Result<Key> {
        Key::new(&self.parked, &format!("{id}/{participant}"))
    }

    /// The first step of begin: the record, with as much of the work as fits. Never repeated: a first attempt that landed
    /// late would bring back a transaction that is over.
    pub(super) async fn begin(&self, id: TxId, record: Record, work: &mut Vec<(String, Bytes)>) -> Result<Open> {
        let key = self.tx_key(id);
        let value = encode(&record);
        self.fits(&key, &value)?;
        let mut room = Room::new(self, 1, value.len());
        let mut writes = vec![put(key.clone(), value)];
        self.fill(&mut room, &mut writes, id, &record.driver, WorkState::Prepare, work)?;
        let commit = self.backend.commit(&Txn { checks: vec![Check::Absent(key.clone())], writes }).await?;
        if !commit.applied {
            return Err(self.error(ErrorKind::Backend, "begin", &key, "a random id exists already"));
        }
        Ok(Open { id, key, revision: commit.revision, record })
    }

    /// Takes back a begin whose reply was lost, if it is seen; one that lands later is overdue before long. Nobody has been
    /// asked to prepare; what remote participants find meanwhile is taken away from them.
    pub(super) async fn take_back(&self, id: TxId) -> Result<()> {
        let Some(entry) = self.entry(&self.tx_key(id)).await? else { return Ok(()) };
        let tx = self.open(entry)?;
        let decided = self
            .decide(
                &tx,
                Decision::Abort,
                &Wish { why: "its begin was not answered", ..Wish::default() },
                &mut Vec::new(),
            )
            .await?;
        if decided == Verdict::Made {
            self.tell_waiting(&tx, Decision::Abort, None).await?;
            self.forget(&tx, Decision::Abort, &[], None).await?;
        }
        Ok(())
    }

    /// Gives out the work that did not fit into begin, in as many steps as it takes, while nothing is decided: work that
    /// came after the decision would stay for ever.
    pub(super) async fn give_rest(&self, tx: &Open, mut work: Vec<(String, Bytes)>) -> Result<()> {
        while !work.is_empty() {
            let mut room = Room::new(self, 2, 0);
            let mut writes = Vec::new();
            self.fill(&mut room, &mut writes, tx.id, &tx.record.driver, WorkState::Prepare, &mut work)?;
            let checks = vec![tx.stands(), Check::Absent(self.decision_key(tx.id))];
            if !self.backend.commit(&Txn { checks, writes }).await?.applied {
                return Err(self.error(ErrorKind::SessionLost, "begin", &tx.key, "others have decided it"));
            }
        }
        Ok(())
    }

    /// Notes that everybody is in favour; from then on it can only be committed, by whoever is left. May be repeated.
    pub(super) async fn make_ready(&self, tx: &Open) -> Result<Verdict> {
        let key = self.ready_key(tx.id);
        let checks = vec![tx.stands(), Check::Absent(self.decision_key(tx.id)), Check::Absent(key.clone())];
        let writes = vec![put(key, encode(&ReadyRecord { v: VERSION }))];
        if self.backend.commit(&Txn { checks, writes }).await?.applied {
            return Ok(Verdict::Made);
        }
        self.judged(tx).await
    }

    /// Why a step that needs an undecided transaction was refused.
    async fn judged(&self, tx: &Open) -> Result<Verdict> {
        match self.standing(tx.id).await? {
            Standing::Decided(decision) => Ok(Verdict::Stands(decision)),
            Standing::Unknown => Ok(Verdict::Gone),
            Standing::Undecided if self.is_ready(tx).await? => Ok(Verdict::Ready),
            Standing::Undecided => {
                Err(self.error(ErrorKind::SessionLost, "decide", &tx.key, "somebody else has taken it over"))
            }
        }
    }

    /// Whether everybody was found in favour.
    pub(super) async fn is_ready(&self, tx: &Open) -> Result<bool> {
        Ok(tx.record.phases == 3 && self.entry(&self.ready_key(tx.id)).await?.is_some())
    }

    /// Tries to make the decision, and tells as much of `work` as fits in the same step; the rest stays in `work`.
    ///
    /// # Errors
    /// `SessionLost` if the fence does not stand any more. `Ambiguous`: call it again with the same decision.
    pub(super) async fn decide(
        &self,
        tx: &Open,
        decision: Decision,
        wish: &Wish<'_>,
        work: &mut Vec<(String, Bytes)>,
    ) -> Result<Verdict> {
        let key = self.decision_key(tx.id);
        let record = DecisionRecord { v: VERSION, decision, why: wish.why.to_owned() };
        let mut checks = vec![tx.stands(), Check::Absent(key.clone())];
        // What all are in favour of is not aborted any more, whoever wants to.
        if tx.record.phases == 3 && decision == Decision::Abort {
            checks.push(Check::Absent(self.ready_key(tx.id)));
        }
        checks.extend(wish.fence.clone());
        let value = encode(&record);
        let mut room = Room::new(self, checks.len() + usize::from(wish.also.is_some()), value.len());
        let mut writes = vec![put(key.clone(), value)];
        writes.extend(wish.also.clone());
        let mut rest = work.clone();
        self.fill(&mut room, &mut writes, tx.id, &tx.record.driver, decision.into(), &mut rest)?;
        let commit = self.backend.commit(&Txn { checks, writes }).await?;
        if commit.applied {
            *work = rest;
            return Ok(Verdict::Made);
        }
        self.judged(tx).await
    }

    /// Tells the decision to those whose work record still waits for one. A record that is gone was confirmed: it must not
    /// come back.
    pub(super) async fn tell_waiting(
        &self,
        tx: &Open,
        decision: Decision,
        fence: Option<Check>,
    ) -> Result<Vec<String>> {
        let mut open = Vec::new();
        for branch in tx.record.branches.iter().filter(|b| b.remote) {
            let Some(entry) = self.entry(&self.work_key(&branch.name, tx.id)?).await? else { continue };
            open.push(branch.name.clone());
            let work: Work =
                decode(&entry.value).map_err(|why| self.error(ErrorKind::Corrupt, "tell", &entry.key, &why.0))?;
            if work.state != WorkState::Prepare {
                continue;
            }
            let unchanged = Check::Unchanged { key: entry.key.clone(), modified: entry.modified };
            let checks = [tx.stands(), unchanged].into_iter().chain(fence.clone()).collect();
            let told = encode(&Work { state: decision.into(), ..work });
            // Not applied: it was changed meanwhile, which the next look will see.
            self.backend.commit(&Txn { checks, writes: vec![put(entry.key, told)] }).await?;
        }
        Ok(open)
    }

    /// Takes everything away, with what remains of it for an operator in its place. `Ok` also if others did it before.
    pub(super) async fn forget(
        &self,
        tx: &Open,
        decision: Decision,
        parked: &[Divergence],
        fence: Option<Check>,
    ) -> Result<()> {
        let mut writes = Vec::new();
        for branch in tx.record.branches.iter().filter(|b| b.remote) {
            writes.push(Write::Delete(self.mail_key(&tx.record.driver, tx.id, &branch.name)?));
        }
        for Divergence { participant, what } in parked {
            let record = Parked { v: VERSION, decision, what: what.clone() };
            writes.push(put(self.parked_key(tx.id, participant)?, encode(&record)));
        }
        let checks: Vec<_> = [tx.stands()].into_iter().chain(fence).collect();
        let room = self.backend.profile().max_txn.saturating_sub(checks.len() + 3).max(1);
        // What is taken away first may be taken away again: the record goes last.
        while writes.len() > room {
            let writes = writes.drain(..room).collect();
            if !self.backend.commit(&Txn { checks: checks.clone(), writes }).await?.applied {
                return Ok(());
            }
        }
        if tx.record.phases == 3 {
            writes.push(Write::Delete(self.ready_key(tx.id)));
        }
        writes.push(Write::Delete(self.decision_key(tx.id)));
        writes.push(Write::Delete(tx.key.clone()));
        self.backend.commit(&Txn { checks, writes }).await.map(drop)
    }

    /// The decision that an operator made by hand, as long as nobody has acknowledged it.
    pub(super) async fn by_hand(&self, id: TxId) -> Result<Option<Decision>> {
        let Some(entry) = self.entry(&self.parked_key(id, OPERATOR)?).await? else { return Ok(None) };
        let parked: Parked =
            decode(&entry.value).map_err(|why| self.error(ErrorKind::Corrupt, "look", &entry.key, &why.0))?;
        Ok(Some(parked.decision))
    }

    /// The decision is read first. Read the other way round, a transaction that is decided and forgotten between the two
    /// reads would be taken for undecided.
    pub(super) async fn standing(&self, id: TxId) -> Result<Standing> {
        if let Some(entry) = self.entry(&self.decision_key(id)).await? {
            let record: DecisionRecord =
                decode(&entry.value).map_err(|why| self.error(ErrorKind::Corrupt, "look", &entry.key, &why.0))?;
            return Ok(Standing::Decided(record.decision));
        }
        Ok(if self.entry(&self.tx_key(id)).await?.is_some() { Standing::Undecided } else { Standing::Unknown })
    }

    pub(super) async fn entry(&self, key: &Key) -> Result<Option<Entry>> {
        Ok(self.backend.read(&KeyRange::One(key.clone())).await?.entries.pop())
    }

    pub(super) async fn all(&self, dir: &Dir) -> Result<Vec<Entry>> {
        Ok(self.backend.read(&KeyRange::prefix(dir, "")?).await?.entries)
    }

    /// A transaction as it stands in the log, if it is one of this version.
    pub(super) fn open(&self, entry: Entry) -> Result<Open> {
        let wrong = |why: &str| self.error(ErrorKind::Corrupt, "recover", &entry.key, why);
        let id: TxId =
            entry.key.name().unwrap_or_default().parse().map_err(|_| wrong("not the id of a transaction"))?;
        let record = decode(&entry.value).map_err(|why| wrong(&why.0))?;
        Ok(Open { id, key: entry.key, revision: entry.modified, record })
    }

    pub(super) fn error(&self, kind: ErrorKind, operation: &'static str, key: &Key, message: &str) -> Error {
        Error::new(kind, operation, message).key(key).on(self.name())
    }

    /// Moves work into the writes of one step while there is room.
    fn fill(
        &self,
        room: &mut Room,
        writes: &mut Vec<Write>,
        id: TxId,
        driver: &str,
        state: WorkState,
        work: &mut Vec<(String, Bytes)>,
    ) -> Result<()> {
        let mut taken = 0;
        for (participant, body) in work.iter() {
            let value = encode(&Work { v: VERSION, driver: driver.to_owned(), state, body: body.clone() });
            let key = self.work_key(participant, id)?;
            self.fits(&key, &value)?;
            // An empty step always has room for one.
            if !room.take(value.len()) && !writes.is_empty() {
                break;
            }
            writes.push(put(key, value));
            taken += 1;
        }
        work.drain(..taken);
        Ok(())
    }

    fn fits(&self, key: &Key, value: &Bytes) -> Result<()> {
        let most = self.backend.profile().max_value;
        if value.len() <= most {
            return Ok(());
        }
        let message = format!("the record has {} bytes, at most {most} fit", value.len());
        Err(Error::invalid("begin", message).key(key).on(self.name()).next("give the branches smaller bodies"))
    }
}

impl Open {
    /// It is not forgotten. As ids are never used again and the record is never changed, that is all it says.
    pub(super) fn stands(&self) -> Check {
        Check::Unchanged { key: self.key.clone(), modified: self.revision }
    }
}

/// How much more one step can hold.
struct Room {
    entries: usize,
    bytes: usize,
}

impl Room {
    fn new(log: &Log, checks: usize, bytes: usize) -> Self {
        let profile = log.backend.profile();
        // One entry is written already where there are bytes.
        let used = checks + usize::from(bytes > 0);
        Self { entries: profile.max_txn.saturating_sub(used), bytes: profile.max_value.saturating_sub(bytes) }
    }

    fn take(&mut self, bytes: usize) -> bool {
        let fits = self.entries > 0 && self.bytes >= bytes;
        if fits {
            self.entries -= 1;
            self.bytes -= bytes;
        }
        fits
    }
}

fn put(key: Key, value: Bytes) -> Write {
    Write::Put { key, value, lease: None }
}
