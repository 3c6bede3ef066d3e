//! Transactions: every check and every lease is looked at before the first write, so that there is nothing to undo.

use std::{borrow::Cow, sync::Arc};

use quorate_core::{Check, Commit, Dir, Error, LeaseId, Result, Revision, Txn, Write};

use crate::{
    MAX_TXN, MAX_VALUE, lost,
    store::{Change, Item, State, directory, number},
    too_large,
};

/// Refuses what no store would take.
pub(crate) fn validate(txn: &Txn) -> Result<()> {
    let size = txn.checks.len() + txn.writes.len();
    let refuse = |message| Err(Error::invalid("commit", message).key(txn).on("memory"));
    if size > MAX_TXN {
        return refuse(format!("{size} checks and writes, at most {MAX_TXN} are allowed"));
    }
    for (i, write) in txn.writes.iter().enumerate() {
        if let Write::Put { key, value, .. } = write
            && value.len() > MAX_VALUE
        {
            return Err(too_large("commit", value.len()).key(key));
        }
        if txn.writes[..i].iter().any(|earlier| same_target(earlier, write)) {
            return refuse(format!("{write:?} writes for the second time what the transaction has written"));
        }
    }
    Ok(())
}

fn same_target(a: &Write, b: &Write) -> bool {
    match (a, b) {
        (Write::Put { key: a, .. } | Write::Delete(a), Write::Put { key: b, .. } | Write::Delete(b)) => a == b,
        (Write::Leave(a), Write::Leave(b)) => a.line == b.line && a.name == b.name,
        _ => false,
    }
}

impl State {
    pub(crate) fn commit<'a>(&mut self, path: &dyn Fn(&'a Dir) -> Cow<'a, str>, txn: &'a Txn) -> Result<Commit> {
        for write in &txn.writes {
            if let Write::Put { lease: Some(lease), .. } = write
                && !number(lease.as_str()).is_some_and(|id| self.leases.contains_key(&id))
            {
                return Err(lost("commit"));
            }
        }
        if let Some(culprit) = txn.checks.iter().position(|check| !self.holds(path, check)) {
            return Ok(Commit { applied: false, revision: Revision(self.revision), culprit: Some(culprit) });
        }
        if !txn.writes.is_empty() {
            let revision = self.next_revision();
            let mut changes = Vec::new();
            for write in &txn.writes {
                match write {
                    Write::Put { key, value, lease } => {
                        let lease = lease.as_ref().and_then(|id| Some((number(id.as_str())?, id.clone())));
                        let item = Item { value: value.clone(), created: revision, modified: revision, lease };
                        changes.extend(self.put(&path(key.dir()), key.encoded(), item));
                    }
                    Write::Delete(key) => changes.extend(self.delete(&path(key.dir()), key.encoded())),
                    Write::Leave(ticket) => self.leave(&path(&ticket.line), ticket),
                }
            }
            // Told only now: a reader that is sent everything anew must not see half a transaction.
            self.publish(&changes);
        }
        Ok(Commit { applied: true, revision: Revision(self.revision), culprit: None })
    }

    fn holds<'a>(&self, path: &dyn Fn(&'a Dir) -> Cow<'a, str>, check: &'a Check) -> bool {
        let item = |key: &'a quorate_core::Key| self.directories.get(&*path(key.dir()))?.keys.get(key.encoded());
        match check {
            Check::Absent(key) => item(key).is_none(),
            Check::Unchanged { key, modified } => item(key).is_some_and(|item| item.modified == modified.0),
            Check::Standing { ticket, token } => self.standing(&path(&ticket.line), ticket) == Some(token.0),
        }
    }

    fn put(&mut self, path: &str, name: &str, mut item: Item) -> Option<Change> {
        let directory = directory(&mut self.directories, path);
        let (path, watched) = (directory.path.clone(), !directory.watchers.is_empty());
        let (name, old_lease) = match directory.keys.get_key_value(name) {
            Some((name, old)) => {
                item.created = old.created;
                (name.clone(), old.lease.as_ref().map(|(id, _)| *id))
            }
            None => (Arc::from(name), None),
        };
        let change = watched.then(|| Change { path: path.clone(), name: name.clone(), item: Some(item.clone()) });
        let lease = item.lease.as_ref().map(|(id, _)| *id);
        directory.keys.insert(name.clone(), item);
        if lease != old_lease {
            let place = (path, name);
            if let Some(old) = old_lease.and_then(|id| self.leases.get_mut(&id)) {
                old.keys.remove(&place);
            }
            if let Some(new) = lease.and_then(|id| self.leases.get_mut(&id)) {
                new.keys.insert(place);
            }
        }
        change
    }

    fn delete(&mut self, path: &str, name: &str) -> Option<Change> {
        let directory = self.directories.get_mut(path)?;
        let (name, item) = directory.keys.remove_entry(name)?;
        let (path, watched, emptied) =
            (directory.path.clone(), !directory.watchers.is_empty(), directory.keys.is_empty());
        let place = (path, name);
        if let Some(lease) = item.lease.and_then(|(id, _): (u64, LeaseId)| self.leases.get_mut(&id)) {
            lease.keys.remove(&place);
        }
        if emptied {
            self.tidy();
        }
        let (path, name) = place;
        watched.then_some(Change { path, name, item: None })
    }
}
