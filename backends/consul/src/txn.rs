//! Commits: checks and writes of the waist as one transaction of Consul's key–value store.
//!
//! Promise: all or nothing, and every put leaves the key on exactly the lease it names.
//!
//! Consul's verbs are close to the waist's writes, but not the same: `set` leaves a key on the session it stands on,
//! and `lock` refuses a key that stands on another one. So a put is first sent in the form that fits what is likely
//! (one round trip), with a condition that makes a wrong guess fail as a whole. If it fails, the keys are read and the
//! transaction is sent again, pinned to what was read.
//!
//! Consul does not count a write that changes nothing; the revision would stand still. Every put carries random
//! flags, so that each one is a change.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::try_join_all;
use quorate_core::{Check, Commit, Dir, ErrorKind, LeaseId, Result, Revision, Ticket, Txn, Write};

use crate::{
    api::{Api, How, Op, OpError, Pair, TxnAnswer},
    error::{Effect, error, session_lost},
    lease::{is_invalid_session, is_session_id},
    path::Space,
    slot::Parts,
};

const OP: &str = "commit";
/// The largest value: Consul takes 512 KiB of JSON per transaction, in which values are base64.
pub(crate) const MAX_VALUE: usize = 360 << 10;
/// A check is one operation, a write at most two; Consul takes 64.
pub(crate) const MAX_TXN: usize = 32;
/// How often a transaction is fitted to keys that others keep changing.
const ROUNDS: u32 = 16;

/// Commits transactions.
#[derive(Debug)]
pub(crate) struct Commits {
    api: Arc<Api>,
    space: Arc<Space>,
    plain: PlainKeys,
    /// The highest index that an answer has shown.
    seen: AtomicU64,
}

/// A put, with the state that its key is taken to be in.
struct Put<'a> {
    path: String,
    value: &'a Bytes,
    lease: Option<&'a LeaseId>,
    base: Base,
    flags: u64,
}

/// What is believed of a key, and so which verb fits.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Base {
    /// A check of the same transaction says that it does not exist.
    CheckedAbsent,
    /// A guess: it does not exist.
    Absent,
    /// A guess: it exists and stands on no session.
    Plain,
    /// It was read: written last at this index, on this session.
    Found(u64, Option<String>),
}

/// What an operation of the transaction is for, to read its failure by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Check(usize),
    Put(usize),
    Other,
}

struct Plan<'a> {
    ops: Vec<Op<'a>>,
    roles: Vec<Role>,
}

impl<'a> Plan<'a> {
    fn push(&mut self, role: Role, op: Op<'a>) {
        self.ops.push(op);
        self.roles.push(role);
    }
}

impl Commits {
    pub(crate) fn new(api: Arc<Api>, space: Arc<Space>) -> Self {
        Self { api, space, plain: PlainKeys::new(), seen: AtomicU64::new(0) }
    }

    pub(crate) fn saw(&self, index: u64) {
        self.seen.fetch_max(index, Ordering::Relaxed);
    }

    pub(crate) async fn commit(&self, txn: &Txn) -> Result<Commit> {
        self.validate(txn)?;
        if let Some(lease) = put_leases(txn).find(|lease| !is_session_id(lease.as_str())) {
            return Err(session_lost(OP, lease));
        }
        let effect = if txn.writes.is_empty() { Effect::Read } else { Effect::Write };
        let mut puts = self.puts(txn);
        for round in 0..ROUNDS {
            let plan = self.plan(txn, &puts);
            match self.api.txn(OP, effect, &plan.ops).await.map_err(|e| e.key(txn))? {
                TxnAnswer::Done(pairs) => return Ok(self.applied(txn, &puts, &pairs)),
                TxnAnswer::Refused(errors) => match verdict(txn, &plan, &puts, &errors)? {
                    Verdict::Not(commit) => return Ok(commit),
                    Verdict::Misfit(misfits) => self.refit(&mut puts, &misfits, round).await?,
                },
            }
        }
        let message = "other clients kept changing the keys";
        Err(error(ErrorKind::Unavailable, OP, message).key(txn))
    }

    fn applied(&self, txn: &Txn, puts: &[Put<'_>], pairs: &[Pair]) -> Commit {
        let newest = pairs.iter().map(|pair| pair.modify_index).max().unwrap_or_default();
        self.saw(newest);
        for put in puts {
            if put.lease.is_none() { self.plain.add(&put.path) } else { self.plain.remove(&put.path) }
        }
        for write in &txn.writes {
            if let Write::Delete(key) = write {
                self.plain.remove(&self.space.key(key));
            }
        }
        // The puts of one transaction share their index, and a deletion comes with a write that shows it. Leaving a
        // line does not: there it is the highest index known, which is at least the ticket's.
        let shown = txn.writes.iter().any(|write| !matches!(write, Write::Leave(_)));
        let revision = if shown { newest } else { self.seen.load(Ordering::Relaxed) };
        Commit { applied: true, revision: Revision(revision), culprit: None }
    }

    fn validate(&self, txn: &Txn) -> Result<()> {
        let refuse = |message: String| Err(error(ErrorKind::InvalidInput, OP, message).key(txn));
        if txn.checks.len() + txn.writes.len() > MAX_TXN {
            return refuse(format!("more than {MAX_TXN} checks and writes"));
        }
        let mut keys = HashSet::new();
        let mut tickets = HashSet::new();
        for write in &txn.writes {
            let new = match write {
                Write::Put { key, .. } | Write::Delete(key) => keys.insert(key),
                Write::Leave(ticket) => tickets.insert(ticket),
            };
            if !new {
                return refuse("a key or a ticket is written twice".to_owned());
            }
            if let Write::Put { value, .. } = write
                && value.len() > MAX_VALUE
            {
                return refuse(format!("a value has {} bytes, at most {MAX_VALUE} are stored", value.len()));
            }
        }
        Ok(())
    }

    fn puts<'a>(&self, txn: &'a Txn) -> Vec<Put<'a>> {
        let put = |write: &'a Write| {
            let Write::Put { key, value, lease } = write else { return None };
            let path = self.space.key(key);
            let checked = txn.checks.iter().find_map(|check| match check {
                Check::Absent(k) if k == key => Some(Base::CheckedAbsent),
                Check::Unchanged { key: k, .. } if k == key => Some(Base::Plain),
                _ => None,
            });
            let base = checked.unwrap_or_else(|| if self.plain.has(&path) { Base::Plain } else { Base::Absent });
            Some(Put { path, value, lease: lease.as_ref(), base, flags: rand::random() })
        };
        txn.writes.iter().filter_map(put).collect()
    }

    fn plan<'a>(&self, txn: &Txn, puts: &'a [Put<'a>]) -> Plan<'a> {
        let mut plan = Plan { ops: Vec::with_capacity(txn.checks.len() + 2 * txn.writes.len()), roles: Vec::new() };
        // Checks come first: they must see the state before any write.
        for (i, check) in txn.checks.iter().enumerate() {
            let op = match check {
                Check::Absent(key) => Op::check_absent(self.space.key(key)),
                Check::Unchanged { key, modified } => Op::check_index(self.space.key(key), modified.0),
                // A ticket is never written again, so its index is still the one it was created at.
                Check::Standing { ticket, token } => Op::check_index(self.ticket(ticket), token.0),
            };
            plan.push(Role::Check(i), op);
        }
        for (i, put) in puts.iter().enumerate() {
            put.plan(i, &mut plan);
        }
        let mut shows_index = !puts.is_empty();
        for write in &txn.writes {
            match write {
                Write::Put { .. } => {}
                Write::Delete(key) => {
                    let path = self.space.key(key);
                    if !std::mem::replace(&mut shows_index, true) {
                        // A deletion answers without its index. This write shows it and is gone in the same step.
                        plan.push(Role::Other, Op::set(path.clone(), b"", 0));
                    }
                    plan.push(Role::Other, Op::delete(path));
                }
                Write::Leave(ticket) => plan.push(Role::Other, self.leave(txn, ticket)),
            }
        }
        plan
    }

    fn leave<'a>(&self, txn: &Txn, ticket: &Ticket) -> Op<'a> {
        let checked = |check: &Check| matches!(check, Check::Standing { ticket: standing, .. } if standing == ticket);
        match Parts::of(&ticket.name) {
            Some(parts) if txn.checks.iter().any(checked) => {
                Op::delete_tree(ticket_path(&self.space, &ticket.line, parts.slot))
            }
            _ => Op::delete(self.ticket(ticket)),
        }
    }

    fn ticket(&self, ticket: &Ticket) -> String {
        ticket_path(&self.space, &ticket.line, &ticket.name)
    }

    /// Finds what the keys of the puts are, after the transaction did not fit them.
    async fn refit(&self, puts: &mut [Put<'_>], misfits: &[(usize, Misfit)], round: u32) -> Result<()> {
        // A missed guess between "absent" and "there" needs no read: the other one is the next guess.
        if round == 0 && misfits.iter().all(|(_, misfit)| *misfit != Misfit::OnSession) {
            for (i, misfit) in misfits {
                puts[*i].base = if *misfit == Misfit::Absent { Base::Absent } else { Base::Plain };
            }
            return Ok(());
        }
        if round > 1 {
            let limit = Duration::from_millis(1 << round.min(6));
            tokio::time::sleep(limit.mul_f64(rand::random_range(0.0..1.0))).await;
        }
        let found = try_join_all(puts.iter().map(|put| self.api.get(OP, &put.path, How::Consistent))).await?;
        for (put, found) in puts.iter_mut().zip(found) {
            if put.base != Base::CheckedAbsent {
                put.base = match found.items.into_iter().next() {
                    Some(pair) => Base::Found(pair.modify_index, pair.session),
                    None => Base::Absent,
                };
            }
        }
        Ok(())
    }
}

impl Put<'_> {
    fn plan<'a>(&'a self, i: usize, plan: &mut Plan<'a>) {
        let path = self.path.as_str();
        let mut push = |op| plan.push(Role::Put(i), op);
        let on_other =
            |session: &Option<String>| session.is_some() && session.as_deref() != self.lease.map(LeaseId::as_str);
        // A new session for the key means a new creation: nothing else takes it off the old one.
        if let Base::Found(index, session) = &self.base
            && on_other(session)
        {
            push(Op::delete_cas(path, *index));
            push(match self.lease {
                Some(lease) => Op::lock(path, self.value, self.flags, lease.as_str()),
                None => Op::set(path, self.value, self.flags),
            });
            return;
        }
        match (self.lease, &self.base) {
            (Some(lease), _) => push(Op::lock(path, self.value, self.flags, lease.as_str())),
            (None, Base::CheckedAbsent) => push(Op::set(path, self.value, self.flags)),
            (None, Base::Absent) => push(Op::cas(path, self.value, self.flags, 0)),
            (None, Base::Plain) => {
                push(Op::check_no_session(path));
                push(Op::set(path, self.value, self.flags));
            }
            (None, Base::Found(index, _)) => push(Op::cas(path, self.value, self.flags, *index)),
        }
    }
}

/// What a transaction that was not applied says.
enum Verdict {
    /// A check does not hold.
    Not(Commit),
    /// The checks hold, but these puts were sent in a form that does not fit their keys.
    Misfit(Vec<(usize, Misfit)>),
}

/// Why a put did not fit its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Misfit {
    /// The key does not exist.
    Absent,
    /// It exists, or was written since it was read.
    Changed,
    /// It stands on another session.
    OnSession,
}

fn verdict(txn: &Txn, plan: &Plan<'_>, puts: &[Put<'_>], errors: &[OpError]) -> Result<Verdict> {
    let fail = |kind, what: &str| Err(error(kind, OP, what).key(txn));
    let role = |e: &OpError| plan.roles.get(e.op_index).copied().unwrap_or(Role::Other);
    if let Some(denied) = errors.iter().find(|e| e.what.contains("Permission denied")) {
        return fail(ErrorKind::Denied, &denied.what);
    }
    let culprit = errors.iter().filter_map(|e| if let Role::Check(i) = role(e) { Some(i) } else { None }).min();
    if culprit.is_some() {
        return Ok(Verdict::Not(Commit { applied: false, revision: Revision(0), culprit }));
    }
    let mut misfits = Vec::new();
    for e in errors {
        let Role::Put(i) = role(e) else { return fail(ErrorKind::Backend, &e.what) };
        if let Some(lease) = puts[i].lease
            && is_invalid_session(&e.what)
        {
            return Err(session_lost(OP, lease));
        }
        misfits.push((
            i,
            match e.what.as_str() {
                what if what.contains("doesn't exist") => Misfit::Absent,
                what if what.contains("index is stale") => Misfit::Changed,
                what if what.contains("session check") || what.contains("already held") => Misfit::OnSession,
                // Such as the lock-delay of a foreign session that has just ended.
                what => return fail(ErrorKind::Unavailable, what),
            },
        ));
    }
    if misfits.is_empty() {
        return fail(ErrorKind::Backend, "Consul refused the transaction without a reason");
    }
    Ok(Verdict::Misfit(misfits))
}

fn put_leases(txn: &Txn) -> impl Iterator<Item = &LeaseId> {
    txn.writes.iter().filter_map(|w| if let Write::Put { lease, .. } = w { lease.as_ref() } else { None })
}

/// Where a ticket is stored.
pub(crate) fn ticket_path(space: &Space, line: &Dir, name: &str) -> String {
    let mut path = space.dir(line);
    path.push_str(name);
    path
}

/// Keys that were last seen to exist without a session, so that the first guess about them is right.
///
/// Lossy, of fixed size, and allowed to be wrong: a wrong guess costs a round trip, nothing else.
#[derive(Debug)]
struct PlainKeys {
    hasher: RandomState,
    slots: Vec<AtomicU64>,
}

impl PlainKeys {
    fn new() -> Self {
        Self { hasher: RandomState::new(), slots: (0..4096).map(|_| AtomicU64::new(0)).collect() }
    }

    fn slot(&self, path: &str) -> (&AtomicU64, u64) {
        // 0 marks an empty slot.
        let hash = self.hasher.hash_one(path) | 1;
        let place = usize::try_from(hash >> 48).unwrap_or_default() % self.slots.len();
        (&self.slots[place], hash)
    }

    fn has(&self, path: &str) -> bool {
        let (slot, hash) = self.slot(path);
        slot.load(Ordering::Relaxed) == hash
    }

    fn add(&self, path: &str) {
        let (slot, hash) = self.slot(path);
        slot.store(hash, Ordering::Relaxed);
    }

    fn remove(&self, path: &str) {
        let (slot, hash) = self.slot(path);
        slot.compare_exchange(hash, 0, Ordering::Relaxed, Ordering::Relaxed).ok();
    }
}
