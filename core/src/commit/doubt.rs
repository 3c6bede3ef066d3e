//! What an operator sees and decides by hand.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Decision, Transactions, TxId,
    log::{OPERATOR, Standing, Verdict, Wish},
    record::{DecisionRecord, Parked, VERSION, decode, encode},
};
use crate::{
    backend::{Entry, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::KeyRange,
};

/// A transaction that is not over, or that ended otherwise than decided.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Doubt {
    /// Its id; a name that is none if the record is not one of this library.
    pub id: String,
    /// Where it stands.
    pub state: DoubtState,
    /// Who takes part.
    pub participants: Vec<String>,
    /// Whether the process that drives it is there.
    pub driver_lives: bool,
    /// When it was begun, by the wall clock of its driver: for people, never for decisions.
    pub since: Option<SystemTime>,
}

/// Where a transaction in doubt stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DoubtState {
    /// Not decided: participants may be preparing, or wait for the decision.
    Undecided,
    /// Decided; not everybody has confirmed.
    Decided(Decision),
    /// A heuristic outcome: these participants ended otherwise than decided, or an operator decided. It is listed until
    /// [`Transactions::acknowledge`].
    Diverged {
        /// What was decided.
        decision: Decision,
        /// What each participant said.
        what: BTreeMap<String, String>,
    },
    /// Its record was written by a later version, or by somebody else. Nobody here touches it.
    Unreadable(String),
}

impl Transactions {
    /// Every transaction of the group that is not over, and every heuristic outcome that nobody has acknowledged.
    ///
    /// # Errors
    /// What the backend says.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn in_doubt(&self) -> Result<Vec<Doubt>> {
        let log = self.log();
        // The decisions last: one that is decided meanwhile is shown as decided.
        let (found, drivers) = (log.all(&log.txs).await?, log.all(&log.drivers).await?);
        let (parked, decisions) = (log.all(&log.parked).await?, log.all(&log.decisions).await?);
        let alive: HashSet<String> = drivers.iter().filter_map(|entry| entry.key.name()).collect();
        let decided: BTreeMap<String, Result<DecisionRecord, String>> = decisions
            .iter()
            .filter_map(|entry| Some((entry.key.name()?, decode(&entry.value).map_err(|unreadable| unreadable.0))))
            .collect();
        let mut doubts = Vec::new();
        for entry in found {
            let name = entry.key.name().unwrap_or_else(|| entry.key.encoded().to_owned());
            doubts.push(match log.open(entry) {
                Ok(tx) => Doubt {
                    state: match decided.get(&name) {
                        None => DoubtState::Undecided,
                        Some(Ok(record)) => DoubtState::Decided(record.decision),
                        Some(Err(why)) => DoubtState::Unreadable(format!("its decision: {why}")),
                    },
                    id: name,
                    participants: tx.record.branches.into_iter().map(|branch| branch.name).collect(),
                    driver_lives: alive.contains(&tx.record.driver),
                    since: UNIX_EPOCH.checked_add(Duration::from_millis(tx.record.since_ms)),
                },
                Err(error) => unreadable(name, error.to_string()),
            });
        }
        doubts.extend(diverged(&parked));
        Ok(doubts)
    }

    /// Decides by hand a transaction that nobody has decided, and returns the decision that stands then, which is another
    /// one if somebody was faster. A recoverer carries it out; the driver, if it lives, does too.
    ///
    /// It is recorded, and listed until [`acknowledge`](Self::acknowledge), as the word of `/operator`.
    ///
    /// To abort is always safe. To commit is not: a participant that has not prepared cannot follow, and is then listed as
    /// [`Diverged`](DoubtState::Diverged).
    ///
    /// # Errors
    /// `InvalidInput` if there is no such transaction (it is over); `Corrupt` if its record cannot be read; `Ambiguous` if
    /// the reply was lost: it may be called again.
    ///
    /// # Cancel safety
    /// Dropped half-way, the decision may or may not have been made.
    pub async fn resolve(&self, id: TxId, decision: Decision) -> Result<Decision> {
        let log = self.log();
        let over = || Error::invalid("resolve", "there is no such transaction; it is over").key(id).on(log.name());
        let tx = log.open(log.entry(&log.tx_key(id)).await?.ok_or_else(over)?)?;
        if let Standing::Decided(stands) = log.standing(id).await? {
            return Ok(stands);
        }
        tracing::warn!(%id, %decision, "decided by hand");
        let record = Parked { v: VERSION, decision, what: "decided by hand".to_owned() };
        let also = Write::Put { key: log.parked_key(id, OPERATOR)?, value: encode(&record), lease: None };
        let wish = Wish { why: "decided by hand", fence: None, also: Some(also) };
        match log.decide(&tx, decision, &wish, &mut Vec::new()).await? {
            Verdict::Made => Ok(decision),
            Verdict::Stands(stands) => Ok(stands),
            Verdict::Gone => Err(over()),
            Verdict::Ready => {
                let message = "everybody is in favour: it can only be committed";
                Err(Error::invalid("resolve", message).key(id).on(log.name()).next("leave it to a recoverer"))
            }
        }
    }

    /// Takes a heuristic outcome from the list, for an operator who has seen it; `false` if it is not there.
    ///
    /// # Errors
    /// What the backend says.
    ///
    /// # Cancel safety
    /// Dropped half-way, some of its participants may still be listed.
    pub async fn acknowledge(&self, id: TxId) -> Result<bool> {
        let log = self.log();
        let range = KeyRange::prefix(&log.parked, &format!("{id}/"))?;
        let entries = log.backend.read(&range).await?.entries;
        for entry in &entries {
            let writes = vec![Write::Delete(entry.key.clone())];
            log.backend.commit(&Txn { checks: Vec::new(), writes }).await?;
        }
        Ok(!entries.is_empty())
    }
}

fn unreadable(id: String, why: String) -> Doubt {
    let state = DoubtState::Unreadable(why);
    Doubt { id, state, participants: Vec::new(), driver_lives: false, since: None }
}

/// The heuristic outcomes, each transaction once.
fn diverged(parked: &[Entry]) -> Vec<Doubt> {
    let mut found: BTreeMap<String, (Decision, BTreeMap<String, String>)> = BTreeMap::new();
    let mut doubts = Vec::new();
    for entry in parked {
        let name = entry.key.name().unwrap_or_else(|| entry.key.encoded().to_owned());
        match (name.split_once('/'), decode::<Parked>(&entry.value)) {
            (Some((id, participant)), Ok(record)) => {
                let outcome = found.entry(id.to_owned()).or_insert_with(|| (record.decision, BTreeMap::new()));
                outcome.1.insert(participant.to_owned(), record.what);
            }
            (_, Err(why)) => doubts.push(unreadable(name, why.0)),
            (None, Ok(_)) => doubts.push(unreadable(name, ErrorKind::Corrupt.to_string())),
        }
    }
    doubts.extend(found.into_iter().map(|(id, (decision, what))| Doubt {
        id,
        participants: what.keys().cloned().collect(),
        state: DoubtState::Diverged { decision, what },
        driver_lives: false,
        since: None,
    }));
    doubts
}
