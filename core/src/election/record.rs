//! What an election writes: where, and in which form.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Candidacy, Candidate, Leader};
use crate::{
    backend::{Front, Revision, Ticket},
    error::{Error, ErrorKind, Result},
    key::{Dir, Key, KeyRange},
    line::wall_clock_ms,
};

/// Where an election lives.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// The candidates' tickets.
    pub(super) line: Dir,
    /// Who leads, written by the leader only.
    pub(super) record: Key,
    /// One key per waiting candidate, named like its ticket.
    waiting: Dir,
}

impl Places {
    pub(super) fn of(name: &str) -> Result<Self> {
        Ok(Self {
            line: Dir::new(["election", name])?,
            record: Key::new(&Dir::new(["election-leader"])?, name)?,
            waiting: Dir::new(["election-candidate", name])?,
        })
    }

    pub(super) fn entry(&self, ticket: &Ticket) -> Result<Key> {
        Key::new(&self.waiting, &ticket.name)
    }

    pub(super) fn entries(&self) -> Result<KeyRange> {
        KeyRange::prefix(&self.waiting, "")
    }
}

/// The value of a ticket, and of a waiting candidate's key.
#[derive(Serialize, Deserialize)]
pub(super) struct Entry<'a> {
    #[serde(borrow)]
    owner: Cow<'a, str>,
    since_ms: u64,
    #[serde(borrow)]
    value: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) priority: Option<i32>,
}

impl<'a> Entry<'a> {
    pub(super) fn new(owner: &'a str, candidate: &'a Candidate) -> Self {
        let (owner, value) = (owner.into(), candidate.value.as_str().into());
        Self { owner, since_ms: wall_clock_ms(), value, priority: candidate.priority }
    }

    pub(super) fn encode(&self) -> Bytes {
        encode(self)
    }

    pub(super) fn decode(value: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }
}

/// The leader's record. `term` comes first so that people see it first; the order means nothing.
#[derive(Serialize, Deserialize)]
struct Record<'a> {
    term: u64,
    #[serde(borrow)]
    owner: Cow<'a, str>,
    #[serde(borrow)]
    value: Cow<'a, str>,
}

pub(super) fn record(term: Revision, owner: &str, value: &str) -> Bytes {
    encode(&Record { term: term.0, owner: owner.into(), value: value.into() })
}

/// Reads the leader's record.
pub(super) fn leader(key: &Key, value: &[u8]) -> Result<Leader> {
    let record: Record<'_> = serde_json::from_slice(value).map_err(|error| {
        // The position, not the text: a value may be a secret.
        let at = format!("this is no record of a leader, at line {} column {}", error.line(), error.column());
        Error::new(ErrorKind::Corrupt, "observe", at).key(key)
    })?;
    let term = Revision(record.term).into();
    Ok(Leader { term, value: record.value.into_owned(), owner: Some(record.owner.into_owned()) })
}

/// The leader as its ticket tells it. Candidates of other libraries put nothing but their proposal into it.
pub(super) fn front(front: &Front) -> Leader {
    let term = front.token.into();
    match Entry::decode(&front.value) {
        Some(entry) => Leader { term, value: entry.value.into_owned(), owner: Some(entry.owner.into_owned()) },
        None => Leader { term, value: String::from_utf8_lossy(&front.value).into_owned(), owner: None },
    }
}

pub(super) fn candidacy(value: Option<&[u8]>) -> Candidacy {
    match value.and_then(Entry::decode) {
        Some(entry) => Candidacy {
            owner: Some(entry.owner.into_owned()),
            value: Some(entry.value.into_owned()),
            priority: entry.priority,
            waiting_since: std::time::UNIX_EPOCH.checked_add(Duration::from_millis(entry.since_ms)),
            term: None,
        },
        None => Candidacy { owner: None, value: None, priority: None, waiting_since: None, term: None },
    }
}

fn encode(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("strings and numbers are always JSON").into()
}
