//! The general transaction: look, plan, `multi`, and again if the plan was overtaken.
//!
//! Promise: the plan relies on nothing that the `multi` does not check. Which key exists, and on which lease, is
//! covered by the generations; what a check expects, by the key's own version.

use std::collections::{BTreeMap, HashMap};

use futures_util::future::join_all;
use quorate_core::{Check, Commit, Key, Result, Revision, Ticket, Write};
use zookeeper_client as zk;

use crate::{
    join::make_nodes,
    layout::Layout,
    multi::{Multi, Refused},
    revision,
    seen::Known,
    txn::{ATTEMPTS, Outcome, Work, applied, key_mode, not_applied},
};

pub(crate) async fn run(work: &Work<'_>) -> Result<Commit> {
    for attempt in 0..ATTEMPTS {
        work.pause(attempt).await;
        let view = look(work).await?;
        if let Outcome::Done(commit) = attempt_with(work, &view).await? {
            return Ok(commit);
        }
    }
    Err(work.overtaken())
}

/// What the look has shown.
struct View<'a> {
    keys: HashMap<&'a Key, (String, Option<zk::Stat>)>,
    tickets: HashMap<&'a Ticket, (String, Option<zk::Stat>)>,
    /// The version of every generation that a key of this transaction belongs to; `None` if it has not been made.
    generations: BTreeMap<u64, Option<i32>>,
}

impl<'a> View<'a> {
    fn key(&self, key: &Key) -> (&str, Option<&zk::Stat>) {
        let (path, stat) = &self.keys[key];
        (path, stat.as_ref())
    }

    fn ticket(&self, ticket: &Ticket) -> (&str, Option<&zk::Stat>) {
        let (path, stat) = &self.tickets[ticket];
        (path, stat.as_ref())
    }

    /// The first check that does not hold.
    fn culprit(&self, checks: &[Check]) -> Option<usize> {
        checks.iter().position(|check| match check {
            Check::Absent(key) => self.key(key).1.is_some(),
            Check::Unchanged { key, modified } => self.key(key).1.is_none_or(|stat| revision(stat.mzxid) != *modified),
            Check::Standing { ticket, token } => {
                self.ticket(ticket).1.is_none_or(|stat| revision(stat.czxid) != *token)
            }
        })
    }
}

async fn look<'a>(work: &'a Work<'_>) -> Result<View<'a>> {
    let layout = work.layout();
    let mut keys: HashMap<&Key, (String, Option<zk::Stat>)> = HashMap::new();
    let mut tickets: HashMap<&Ticket, (String, Option<zk::Stat>)> = HashMap::new();
    for check in &work.txn.checks {
        match check {
            Check::Absent(key) | Check::Unchanged { key, .. } => {
                keys.insert(key, (layout.key(key), None));
            }
            Check::Standing { ticket, .. } => {
                tickets.insert(ticket, (layout.ticket(ticket), None));
            }
        }
    }
    for write in &work.txn.writes {
        match write {
            Write::Put { key, .. } | Write::Delete(key) => {
                keys.insert(key, (layout.key(key), None));
            }
            Write::Leave(ticket) => {
                tickets.insert(ticket, (layout.ticket(ticket), None));
            }
        }
    }
    let mut generations: BTreeMap<u64, Option<i32>> = keys.keys().map(|key| (Layout::shard(key), None)).collect();
    let shards: Vec<String> = generations.keys().map(|shard| layout.generation(*shard)).collect();
    let client = &work.conn.client;
    // In this order: a generation must be as old as what is seen of its keys, or older.
    let synced = client.sync("/");
    let of_generations: Vec<_> = shards.iter().map(|path| client.check_stat(path)).collect();
    let of_keys: Vec<_> = keys.values().map(|(path, _)| client.check_stat(path)).collect();
    let of_tickets: Vec<_> = tickets.values().map(|(path, _)| client.check_stat(path)).collect();
    let answers = async {
        synced.await?;
        Ok::<_, zk::Error>((join_all(of_generations).await, join_all(of_keys).await, join_all(of_tickets).await))
    };
    // Nothing has been written yet: a lost answer leaves nothing open.
    let call = crate::error::Call { writes: false, ..work.call };
    let failed = |error| work.conn.failed(&call, error);
    let (of_generations, of_keys, of_tickets) = work.conn.call(answers).await.map_err(failed)?;
    for (version, stat) in generations.values_mut().zip(of_generations) {
        *version = stat.map_err(failed)?.map(|stat| stat.version);
    }
    let of_keys = of_keys.into_iter().collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let of_tickets = of_tickets.into_iter().collect::<Result<Vec<_>, _>>().map_err(failed)?;
    for (slot, stat) in keys.values_mut().zip(of_keys) {
        slot.1 = stat;
    }
    for (slot, stat) in tickets.values_mut().zip(of_tickets) {
        slot.1 = stat;
    }
    Ok(View { keys, tickets, generations })
}

/// What a refusal of an operation of the `multi` means.
#[derive(Clone, Copy)]
enum Blame {
    /// This check no longer holds.
    Check(usize),
    /// The plan was overtaken.
    Plan,
}

async fn attempt_with(work: &Work<'_>, view: &View<'_>) -> Result<Outcome> {
    if let Some(culprit) = view.culprit(&work.txn.checks) {
        return Ok(Outcome::Done(not_applied(culprit)));
    }
    let missing: Vec<u64> = view.generations.iter().filter(|(_, v)| v.is_none()).map(|(shard, _)| *shard).collect();
    if !missing.is_empty() {
        for shard in missing {
            work.make_generation(&work.layout().generation(shard));
        }
        return Ok(Outcome::Overtaken);
    }
    let mut multi = work.multi();
    let mut blames = Vec::new();
    let bumps = generations(work, view, &mut multi, &mut blames);
    checks(work, view, &mut multi, &mut blames);
    let puts = writes(work, view, &mut multi, &mut blames);
    if multi.len() == 0 {
        // Only tickets that had left already.
        return Ok(Outcome::Done(applied(Revision(0))));
    }
    match multi.commit(&work.call).await? {
        Ok(done) => {
            let at = done.last_set().map_or(Revision(0), |stat| revision(stat.mzxid));
            for (key, index, owner) in puts {
                let shard = Layout::shard(key);
                let generation = bumps.get(&shard).map_or(view.generations[&shard], |index| done.version(*index));
                let version = done.version(index).unwrap_or(0);
                work.inner.seen.note(view.key(key).0, Known { owner, modified: at, version, generation });
            }
            for write in &work.txn.writes {
                match write {
                    Write::Delete(key) => work.inner.seen.forget(view.key(key).0),
                    Write::Leave(ticket) => work.inner.tickets.forget(ticket),
                    Write::Put { .. } => {}
                }
            }
            Ok(Outcome::Done(applied(at)))
        }
        Err(Refused { index, error: zk::Error::NoNode | zk::Error::BadVersion | zk::Error::NodeExists }) => {
            match blames.get(index) {
                Some(Blame::Check(culprit)) => Ok(Outcome::Done(not_applied(*culprit))),
                _ => {
                    make_missing(work, view);
                    Ok(Outcome::Overtaken)
                }
            }
        }
        Err(refused) => Err(work.failed(refused.error)),
    }
}

/// Checks the generations, and raises those of keys that are about to be created. Returns where they are raised.
fn generations(
    work: &Work<'_>,
    view: &View<'_>,
    multi: &mut Multi<'_>,
    blames: &mut Vec<Blame>,
) -> BTreeMap<u64, usize> {
    let mut bumps = BTreeMap::new();
    for write in &work.txn.writes {
        if let Write::Put { key, lease, .. } = write
            && view.key(key).1.is_none_or(|stat| stat.ephemeral_owner != work.owner(lease.is_some()))
        {
            bumps.insert(Layout::shard(key), 0);
        }
    }
    for (shard, version) in &view.generations {
        let path = work.layout().generation(*shard);
        let version = version.unwrap_or(-1);
        match bumps.get_mut(shard) {
            Some(index) => *index = multi.set(&path, b"", version),
            None => {
                multi.check(&path, version);
            }
        }
        blames.push(Blame::Plan);
    }
    bumps
}

fn checks(work: &Work<'_>, view: &View<'_>, multi: &mut Multi<'_>, blames: &mut Vec<Blame>) {
    for (index, check) in work.txn.checks.iter().enumerate() {
        match check {
            // Covered by the generation: whoever creates the key raises it.
            Check::Absent(_) => continue,
            Check::Unchanged { key, .. } => {
                let (path, stat) = view.key(key);
                multi.check(path, stat.map_or(-1, |stat| stat.version));
            }
            // Names of tickets are never used again, so the token was compared once and for all.
            Check::Standing { ticket, .. } => {
                multi.check(view.ticket(ticket).0, -1);
            }
        }
        blames.push(Blame::Check(index));
    }
}

/// Adds the writes; returns, for every put, its key, the operation that writes it, and whom the key belongs to then.
fn writes<'a>(
    work: &Work<'a>,
    view: &View<'_>,
    multi: &mut Multi<'_>,
    blames: &mut Vec<Blame>,
) -> Vec<(&'a Key, usize, i64)> {
    let mut puts = Vec::new();
    for write in &work.txn.writes {
        match write {
            Write::Put { key, value, lease } => {
                let (path, stat) = view.key(key);
                let owner = work.owner(lease.is_some());
                let index = match stat {
                    Some(stat) if stat.ephemeral_owner == owner => multi.set(path, value, -1),
                    Some(_) => {
                        multi.delete(path, -1);
                        blames.push(Blame::Plan);
                        multi.create(path, value, key_mode(lease.is_some()))
                    }
                    None => multi.create(path, value, key_mode(lease.is_some())),
                };
                puts.push((key, index, owner));
            }
            Write::Delete(key) => {
                // One that is not there needs no write: the generation sees to it that it stays away.
                let (path, Some(_)) = view.key(key) else { continue };
                multi.delete(path, -1);
            }
            Write::Leave(ticket) => {
                let (path, Some(_)) = view.ticket(ticket) else { continue };
                multi.delete(path, -1);
            }
        }
        blames.push(Blame::Plan);
    }
    puts
}

/// Sends for the directories of keys that may have to be created.
fn make_missing(work: &Work<'_>, view: &View<'_>) {
    for write in &work.txn.writes {
        if let Write::Put { key, .. } = write
            && view.key(key).1.is_none()
        {
            make_nodes(work.inner, &work.conn.client, Layout::parent(view.key(key).0));
        }
    }
}
