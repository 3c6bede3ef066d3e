//! Lines: tickets in order of the index at which Consul created them.
//!
//! Promise: one round trip to join, one to look. Two tickets cannot tie: each is created by a transaction of its
//! own, and a transaction has an index of its own. (Keys that a foreign client created in one transaction are ordered
//! by name.)
//!
//! Consul cannot sort and its cheap listing has names only. But nobody can ever get in ahead of a ticket, so the answer
//! to joining names everybody who will ever stand there; what remains is to ask who of them still does. The
//! client therefore remembers the order of the lines that it stands in. The memory only saves bytes: a ticket that is
//! not in it is looked up in full.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
};

use quorate_core::{Dir, Enqueue, Error, ErrorKind, Front, LeaseId, Line, Place, Result, Revision, Ticket, TicketKind};

use crate::{
    api::{Api, How, Op, OpError, Pair, TxnAnswer},
    error::{Effect, error, session_lost},
    lease::{is_invalid_session, is_session_id},
    path::{Space, is_plain},
    slot::{Parts, Slots},
    txn::MAX_VALUE,
};

const OP: &str = "enqueue";
/// How many lines are remembered at most.
const REMEMBERED: usize = 4096;

/// The lines of one client.
#[derive(Debug)]
pub(crate) struct Lines {
    api: Arc<Api>,
    space: Arc<Space>,
    slots: Slots,
    /// By stored directory.
    memory: Mutex<HashMap<String, Memory>>,
}

/// What is known of one line.
#[derive(Debug, Default)]
struct Memory {
    // Holds every standing ticket ahead of every one in `mine`.
    order: BTreeSet<(u64, Arc<str>)>,
    index: HashMap<Arc<str>, u64>,
    /// The tickets whose predecessors are all in `order`.
    mine: HashSet<Arc<str>>,
}

impl Memory {
    fn add(&mut self, index: u64, name: &Arc<str>) {
        if self.index.insert(name.clone(), index).is_none() {
            self.order.insert((index, name.clone()));
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some((name, index)) = self.index.remove_entry(name) {
            self.order.remove(&(index, name));
        }
        self.mine.remove(name);
    }
}

/// A ticket's place as far as it is remembered.
struct Remembered {
    token: u64,
    /// Everybody who may stand ahead, nearest first.
    ahead: Vec<Arc<str>>,
}

impl Lines {
    pub(crate) fn new(api: Arc<Api>, space: Arc<Space>) -> Self {
        Self { api, space, slots: Slots::new(), memory: Mutex::default() }
    }

    fn memory(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        if !is_session_id(entry.lease.as_str()) {
            return Err(session_lost(OP, &entry.lease));
        }
        if entry.value.len() > MAX_VALUE {
            let message = format!("the value has {} bytes, at most {MAX_VALUE} are stored", entry.value.len());
            return Err(error(ErrorKind::InvalidInput, OP, message).key(&entry.line));
        }
        let dir = self.space.dir(&entry.line);
        let named = self.slots.name(&dir, entry);
        let path = format!("{dir}{}", named.name);
        let ops = [
            // A repeated attempt must not write the ticket again: its index is its token.
            Op::check_absent(&path),
            Op::lock(&path, &entry.value, 0, entry.lease.as_str()),
            Op::get_tree(&dir),
        ];
        let created = match self.join(entry, &dir, &ops).await {
            Ok(created) => created,
            Err(e) => {
                let unmade = !matches!(e.kind(), ErrorKind::Ambiguous | ErrorKind::Backend);
                // An earlier request under this name may have made it.
                if unmade && named.fresh {
                    self.slots.free(&dir, &named.name);
                }
                return Err(e);
            }
        };
        let is_new = created.is_some();
        let members = match created {
            Some(members) => members,
            None => members_of(&dir, self.api.list(OP, &dir, How::Consistent).await?.items),
        };
        let mut ticket = Ticket { line: entry.line.clone(), name: named.name.clone(), kind: entry.kind };
        if let Some(first) = first_attempt(entry, &members, &named.name) {
            // Another client made this attempt before, under a name of its own.
            if members.iter().any(|(_, name)| *name == named.name) {
                self.withdraw(&path).await?;
            }
            self.slots.free(&dir, &named.name);
            ticket.name = first;
        }
        if let Some(place) = self.place(&dir, ticket, entry.depth, &members) {
            return Ok(Some(place));
        }
        if is_new {
            self.withdraw(&path).await?;
            let message = "the token may write the ticket, but not read the line";
            return Err(error(ErrorKind::Denied, OP, message).key(&entry.line));
        }
        let message = "the ticket was removed by somebody while it was looked up";
        Err(error(ErrorKind::Unavailable, OP, message).key(&entry.line))
    }

    /// Creates the ticket; the whole line, or `None` if the ticket was there before.
    async fn join(&self, entry: &Enqueue, dir: &str, ops: &[Op<'_>]) -> Result<Option<Vec<(u64, Arc<str>)>>> {
        match self.api.txn(OP, Effect::Write, ops).await.map_err(|e| e.key(&entry.line))? {
            TxnAnswer::Done(mut pairs) => {
                // The first one is what `lock` returned, and comes again in the tree.
                pairs.drain(..1.min(pairs.len()));
                Ok(Some(members_of(dir, pairs)))
            }
            TxnAnswer::Refused(errors) => match errors.into_iter().next() {
                Some(exists) if exists.op_index == 0 => Ok(None),
                refusal => Err(refused(entry, refusal)),
            },
        }
    }

    /// Takes back a ticket that this call has just made.
    async fn withdraw(&self, path: &str) -> Result<()> {
        let unsure = || error(ErrorKind::Ambiguous, OP, "a ticket that is of no use could not be taken back");
        match self.api.txn(OP, Effect::Write, &[Op::delete(path)]).await {
            Ok(TxnAnswer::Done(_)) => Ok(()),
            Ok(TxnAnswer::Refused(_)) => Err(unsure()),
            Err(e) => Err(unsure().because(e)),
        }
    }

    pub(crate) async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        const OP: &str = "look";
        let dir = self.space.dir(&ticket.line);
        let Some(remembered) = self.remembered(&dir, &ticket.name) else {
            let found = self.api.list(OP, &dir, How::Consistent).await?;
            return Ok(self.place(&dir, ticket.clone(), depth, &members_of(&dir, found.items)));
        };
        if remembered.ahead.is_empty() {
            // Nobody can be ahead any more, however long the line behind is: only the ticket itself matters.
            let path = format!("{dir}{}", ticket.name);
            if self.api.get(OP, &path, How::Consistent).await?.items.is_empty() {
                self.left(ticket);
                return Ok(None);
            }
            return Ok(Some(Place { ticket: ticket.clone(), token: Revision(remembered.token), ahead: Vec::new() }));
        }
        let found = self.api.keys(OP, &dir, How::Consistent).await?;
        let standing: HashSet<&str> = found.items.iter().filter_map(|key| key.strip_prefix(&*dir)).collect();
        if !standing.contains(&*ticket.name) {
            self.left(ticket);
            return Ok(None);
        }
        // All of these existed before the request was sent, so whoever is missing is gone for good.
        let (ahead, gone): (Vec<_>, Vec<_>) = remembered.ahead.into_iter().partition(|name| standing.contains(&**name));
        if let Some(memory) = self.memory().get_mut(&dir) {
            for name in &gone {
                memory.remove(name);
            }
        }
        let ahead = ahead.into_iter().take(depth.max(1)).map(|name| named(&ticket.line, name)).collect();
        Ok(Some(Place { ticket: ticket.clone(), token: Revision(remembered.token), ahead }))
    }

    pub(crate) async fn line(&self, line: &Dir) -> Result<Line> {
        let dir = self.space.dir(line);
        let found = self.api.list("line", &dir, How::Consistent).await?;
        let front = found.items.iter().min_by_key(|pair| (pair.create_index, &pair.key));
        let front = front.map(|pair| Front { token: Revision(pair.create_index), value: pair.value.clone() });
        let tickets = members_of(&dir, found.items).into_iter().map(|(_, name)| named(line, name)).collect();
        Ok(Line { tickets, front })
    }

    /// The token of a ticket, if it is remembered.
    pub(crate) fn token(&self, ticket: &Ticket) -> Option<u64> {
        self.memory().get(&self.space.dir(&ticket.line))?.index.get(&ticket.name).copied()
    }

    /// A ticket is known to be gone.
    pub(crate) fn left(&self, ticket: &Ticket) {
        let dir = self.space.dir(&ticket.line);
        self.slots.free(&dir, &ticket.name);
        let mut memory = self.memory();
        if let Some(line) = memory.get_mut(&dir) {
            line.remove(&ticket.name);
            if line.mine.is_empty() {
                memory.remove(&dir);
            }
        }
    }

    /// The servers do not know a lease any more, or are about to forget it. Its tickets may stand for a moment yet, so
    /// that others still see them ahead; what is forgotten is only that they are ours.
    pub(crate) fn lease_lost(&self, lease: &LeaseId) {
        self.slots.lease_ended(lease);
        self.memory().retain(|_, line| {
            line.mine.retain(|name| !is_of(lease, name));
            !line.mine.is_empty()
        });
    }

    /// Every ticket of a lease is known to be gone.
    pub(crate) fn lease_ended(&self, lease: &LeaseId) {
        self.slots.lease_ended(lease);
        self.memory().retain(|_, line| {
            let gone: Vec<_> = line.index.keys().filter(|name| is_of(lease, name)).cloned().collect();
            for name in gone {
                line.remove(&name);
            }
            !line.mine.is_empty()
        });
    }

    /// The place of a ticket in a complete listing, which is remembered; `None` if it is not there.
    fn place(&self, dir: &str, ticket: Ticket, depth: usize, members: &[(u64, Arc<str>)]) -> Option<Place> {
        let at = members.iter().position(|(_, name)| *name == ticket.name);
        let Some(at) = at else {
            self.left(&ticket);
            return None;
        };
        let ahead = members[..at].iter().rev().take(depth.max(1));
        let ahead = ahead.map(|(_, name)| named(&ticket.line, name.clone())).collect();
        let place = Place { token: Revision(members[at].0), ticket, ahead };
        // A name that no URL can carry cannot be asked for alone: such a ticket is always looked up in full.
        if !place.ticket.name.chars().all(is_plain) {
            return Some(place);
        }
        let mut memory = self.memory();
        if memory.len() >= REMEMBERED && !memory.contains_key(dir) {
            memory.clear();
        }
        let line = memory.entry(dir.to_owned()).or_default();
        for (index, name) in &members[..=at] {
            line.add(*index, name);
        }
        line.mine.insert(place.ticket.name.clone());
        Some(place)
    }

    fn remembered(&self, dir: &str, name: &str) -> Option<Remembered> {
        let memory = self.memory();
        let line = memory.get(dir)?;
        let name = line.mine.get(name)?.clone();
        let token = *line.index.get(&name)?;
        let ahead = line.order.range(..(token, name)).rev().map(|(_, name)| name.clone()).collect();
        Some(Remembered { token, ahead })
    }
}

/// The error for a transaction that did not create the ticket.
fn refused(entry: &Enqueue, refusal: Option<OpError>) -> Error {
    let what = refusal.map_or_else(|| "Consul refused without a reason".to_owned(), |e| e.what);
    if is_invalid_session(&what) {
        return session_lost(OP, &entry.lease);
    }
    let kind = if what.contains("Permission denied") { ErrorKind::Denied } else { ErrorKind::Unavailable };
    error(kind, OP, what).key(&entry.line)
}

/// The tickets of a line in their order.
fn members_of(dir: &str, pairs: Vec<Pair>) -> Vec<(u64, Arc<str>)> {
    let mut members: Vec<(u64, Arc<str>)> = pairs
        .into_iter()
        .filter_map(|pair| Some((pair.create_index, pair.key.strip_prefix(dir)?.into())))
        // The directory itself, as Consul's web page creates it, is nobody's ticket.
        .filter(|(_, name): &(u64, Arc<str>)| !name.is_empty())
        .collect();
    members.sort_unstable();
    members
}

fn is_of(lease: &LeaseId, name: &str) -> bool {
    name.strip_prefix(lease.as_str()).is_some_and(|rest| rest.starts_with('-'))
}

/// The ticket that another client made for the same lease and nonce, if there is one.
fn first_attempt(entry: &Enqueue, members: &[(u64, Arc<str>)], name: &Arc<str>) -> Option<Arc<str>> {
    let of_lease = |other: &&(u64, Arc<str>)| other.1 != *name && other.1.starts_with(entry.lease.as_str());
    let same = |other: &&(u64, Arc<str>)| Parts::of(&other.1).is_some_and(|parts| parts.is_of(entry));
    members.iter().filter(of_lease).find(same).map(|(_, other)| other.clone())
}

fn named(line: &Dir, name: Arc<str>) -> Ticket {
    let kind = if name.ends_with("-r") {
        TicketKind::Read
    } else if name.ends_with("-w") {
        TicketKind::Write
    } else {
        TicketKind::Lock
    };
    Ticket { line: line.clone(), name, kind }
}
