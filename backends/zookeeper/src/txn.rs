//! Transactions: checks and writes in one `multi`.
//!
//! Promise: all or nothing, decided by the server in one step; what this client believes of a key is checked in the
//! same step. What is usual costs one round trip (release, single put, create, delete, fenced put, and compare-and-swap
//! of a key read or written here before); the rest two, a look and the `multi`, and two more whenever others were
//! faster. After [`ATTEMPTS`] the call gives up with `Unavailable`, and nothing was applied.
//!
//! # How a revision is checked
//! ZooKeeper's own check compares a node's data version, which begins at zero again when the node is deleted and
//! created. So every creation of a key also raises the version of the key's generation (see
//! [`layout`](crate::layout)), and whatever relies on a version relies on the generation as well: same generation, same
//! node; same node and version, same write. Clients other than quorate do not raise generations: a key that one
//! of them deletes and creates again within the same moment may be taken for unchanged.

use std::{collections::HashSet, sync::Arc, time::Duration};

use quorate_core::{Check, Commit, ErrorKind, Key, LeaseId, Result, Revision, Ticket, Txn, Write};
use zookeeper_client as zk;

use crate::{
    Inner,
    connect::{Conn, on_own_task},
    error::Call,
    join::make_nodes,
    layout::Layout,
    multi::{Multi, Refused},
    plan, revision,
    seen::Known,
};

/// How often a transaction is tried again because others were faster or a node was missing.
pub(crate) const ATTEMPTS: u32 = 16;

/// A transaction under way, with the connection it is made on.
pub(crate) struct Work<'a> {
    pub(crate) inner: &'a Inner,
    pub(crate) txn: &'a Txn,
    pub(crate) call: Call<'a>,
    pub(crate) conn: Arc<Conn>,
    /// The session that keys put by this transaction shall stand on where they stand on any.
    pub(crate) session: i64,
}

/// How an attempt ended that was answered.
pub(crate) enum Outcome {
    Done(Commit),
    /// What it relied on was no longer so.
    Overtaken,
}

pub(crate) fn applied(revision: Revision) -> Commit {
    Commit { applied: true, revision, culprit: None }
}

pub(crate) fn not_applied(culprit: usize) -> Commit {
    Commit { applied: false, revision: Revision(0), culprit: Some(culprit) }
}

pub(crate) fn key_mode(leased: bool) -> zk::CreateMode {
    if leased { zk::CreateMode::Ephemeral } else { zk::CreateMode::Persistent }
}

/// What is put on a lease goes over the lease's connection, which alone can do it; all else over the shared one.
pub(crate) async fn commit(inner: &Arc<Inner>, txn: &Txn) -> Result<Commit> {
    let call = Call::write("commit", txn);
    let Some(lease) = validate(inner, txn, &call)? else {
        let conn = inner.base.conn(&call).await?;
        return Work { inner, txn, call, session: 0, conn }.run().await;
    };
    let open = inner.leases.get(lease, &call)?;
    let (inner, txn) = (inner.clone(), txn.clone());
    on_own_task(async move {
        let call = Call::write("commit", &txn).leased(true);
        let conn = open.conn.clone();
        conn.ready(&call).await?;
        Work { inner: &inner, txn: &txn, call, session: conn.session(), conn }.run().await
    })
    .await
}

/// Refuses what can never work; returns the lease that keys are put on.
fn validate<'a>(inner: &Inner, txn: &'a Txn, call: &Call<'_>) -> Result<Option<&'a LeaseId>> {
    let invalid = |message: String| Err(call.error(ErrorKind::InvalidInput, message));
    let profile = &inner.profile;
    if txn.checks.len() + txn.writes.len() > profile.max_txn {
        return invalid(format!("more than {} checks and writes", profile.max_txn));
    }
    let mut keys: HashSet<&Key> = HashSet::new();
    let mut tickets: HashSet<&Ticket> = HashSet::new();
    let mut lease: Option<&LeaseId> = None;
    for write in &txn.writes {
        let fresh = match write {
            Write::Put { key, value, lease: on } => {
                if value.len() > profile.max_value {
                    return invalid(format!(
                        "a value has {} bytes, at most {} are allowed",
                        value.len(),
                        profile.max_value
                    ));
                }
                if let (Some(one), Some(other)) = (lease, on)
                    && one != other
                {
                    let message = "keys on two leases: an ephemeral node can only be made by its own session";
                    return Err(call.error(ErrorKind::Unsupported, message));
                }
                lease = lease.or(on.as_ref());
                keys.insert(key)
            }
            Write::Delete(key) => keys.insert(key),
            Write::Leave(ticket) => tickets.insert(ticket),
        };
        if !fresh {
            return invalid("a key or ticket is written twice".to_owned());
        }
    }
    Ok(lease)
}

impl Work<'_> {
    async fn run(&self) -> Result<Commit> {
        match (self.txn.checks.as_slice(), self.txn.writes.as_slice()) {
            ([], []) => Ok(applied(Revision(0))),
            ([], [Write::Leave(ticket)]) => self.leave(ticket, None).await,
            ([Check::Standing { ticket: stands, token }], [Write::Leave(ticket)]) if stands == ticket => {
                self.leave(ticket, Some(*token)).await
            }
            ([], [Write::Delete(key)]) => self.delete(key).await,
            (checks, [Write::Put { key, value, lease }]) if checks.len() <= 1 => {
                self.put(checks.first(), key, value, lease.is_some()).await
            }
            ([Check::Unchanged { key: same, modified }], [Write::Delete(key)]) if same == key => {
                match self.swap(key, *modified, None, false).await? {
                    Outcome::Done(commit) => Ok(commit),
                    Outcome::Overtaken => plan::run(self).await,
                }
            }
            _ => plan::run(self).await,
        }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.inner.settings.layout
    }

    pub(crate) fn multi(&self) -> Multi<'_> {
        Multi::new(&self.conn, self.inner.settings.acls())
    }

    pub(crate) fn failed(&self, error: zk::Error) -> quorate_core::Error {
        self.conn.failed(&self.call, error)
    }

    /// Who a key put here shall belong to.
    pub(crate) fn owner(&self, leased: bool) -> i64 {
        if leased { self.session } else { 0 }
    }

    pub(crate) fn overtaken(&self) -> quorate_core::Error {
        let message = format!("overtaken by other writers {ATTEMPTS} times");
        self.call.error(ErrorKind::Unavailable, message)
    }

    /// A jittered pause that grows with the attempts, none before the second.
    pub(crate) async fn pause(&self, attempt: u32) {
        if attempt > 1 {
            let most = Duration::from_millis(1 << attempt.min(6));
            tokio::time::sleep(most.mul_f64(rand::random_range(0.0..1.0))).await;
        }
    }

    /// Whether the ticket can have this token; `None` if that is not known here.
    fn token_fits(&self, ticket: &Ticket, token: Revision) -> Option<bool> {
        self.inner.tickets.get(ticket).map(|owned| owned.token == token)
    }

    async fn leave(&self, ticket: &Ticket, token: Option<Revision>) -> Result<Commit> {
        if let Some(token) = token {
            match self.token_fits(ticket, token) {
                Some(true) => {}
                Some(false) => return Ok(not_applied(0)),
                None => return plan::run(self).await,
            }
        }
        let path = self.layout().ticket(ticket);
        let stood = match self.conn.call(self.conn.client.delete(&path, None)).await {
            Ok(()) => true,
            Err(zk::Error::NoNode) => false,
            Err(error) => return Err(self.failed(error)),
        };
        self.inner.tickets.forget(ticket);
        Ok(if stood || token.is_none() { applied(Revision(0)) } else { not_applied(0) })
    }

    async fn delete(&self, key: &Key) -> Result<Commit> {
        let path = self.layout().key(key);
        match self.conn.call(self.conn.client.delete(&path, None)).await {
            Ok(()) | Err(zk::Error::NoNode) => {
                self.inner.seen.forget(&path);
                Ok(applied(Revision(0)))
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    async fn put(&self, check: Option<&Check>, key: &Key, value: &[u8], leased: bool) -> Result<Commit> {
        let path = self.layout().key(key);
        let ticket = match check {
            None => None,
            Some(Check::Standing { ticket, token }) => match self.token_fits(ticket, *token) {
                Some(true) => Some(self.layout().ticket(ticket)),
                Some(false) => return Ok(not_applied(0)),
                None => return plan::run(self).await,
            },
            Some(Check::Absent(same)) if same == key => {
                return self.create(key, &path, value, leased, None, true).await;
            }
            Some(Check::Unchanged { key: same, modified }) if same == key => {
                return match self.swap(key, *modified, Some(value), leased).await? {
                    Outcome::Done(commit) => Ok(commit),
                    Outcome::Overtaken => plan::run(self).await,
                };
            }
            Some(_) => return plan::run(self).await,
        };
        match self.inner.seen.get(&path) {
            Some(known) if known.owner != self.owner(leased) => plan::run(self).await,
            Some(known) => self.set(key, &path, value, leased, ticket.as_deref(), known).await,
            None => self.create(key, &path, value, leased, ticket.as_deref(), false).await,
        }
    }

    /// Replaces the value of a key that was there when last seen.
    async fn set(
        &self,
        key: &Key,
        path: &str,
        value: &[u8],
        leased: bool,
        ticket: Option<&str>,
        known: Known,
    ) -> Result<Commit> {
        let stat = if let Some(ticket) = ticket {
            let mut multi = self.multi();
            multi.check(ticket, -1);
            multi.set(path, value, -1);
            match multi.commit(&self.call).await? {
                Ok(done) => done.last_set(),
                Err(Refused { index: 0, error: zk::Error::NoNode }) => return Ok(not_applied(0)),
                Err(Refused { error: zk::Error::NoNode, .. }) => None,
                Err(refused) => return Err(self.failed(refused.error)),
            }
        } else {
            self.fits(path.len() + value.len())?;
            match self.conn.call(self.conn.client.set_data(path, value, None)).await {
                Ok(stat) => Some(stat),
                Err(zk::Error::NoNode) => None,
                Err(error) => return Err(self.failed(error)),
            }
        };
        let Some(stat) = stat else {
            self.inner.seen.forget(path);
            return self.create(key, path, value, leased, ticket, false).await;
        };
        self.inner.seen.note(path, Known::of(&stat, known.generation));
        let set = applied(revision(stat.mzxid));
        if stat.ephemeral_owner == self.owner(leased) {
            return Ok(set);
        }
        // Somebody moved the key to another lease since it was last seen. The value is ours already; put it once
        // more, where it belongs. If that is refused because the ticket has gone, the first put still stands.
        let moved = plan::run(self).await?;
        Ok(if moved.applied { moved } else { set })
    }

    /// Creates a key that was not there when last seen, or must not be.
    async fn create(
        &self,
        key: &Key,
        path: &str,
        value: &[u8],
        leased: bool,
        ticket: Option<&str>,
        must_be_absent: bool,
    ) -> Result<Commit> {
        let generation = self.layout().generation(Layout::shard(key));
        for _ in 0..ATTEMPTS {
            let mut multi = self.multi();
            if let Some(ticket) = ticket {
                multi.check(ticket, -1);
            }
            let create = multi.create(path, value, key_mode(leased));
            multi.set(&generation, b"", -1);
            let refused = match multi.commit(&self.call).await? {
                Ok(done) => {
                    let Some(stat) = done.last_set() else { return Ok(applied(Revision(0))) };
                    let created = revision(stat.mzxid);
                    let owner = self.owner(leased);
                    let known = Known { owner, modified: created, version: 0, generation: Some(stat.version) };
                    self.inner.seen.note(path, known);
                    return Ok(applied(created));
                }
                Err(refused) => refused,
            };
            match refused.error {
                zk::Error::NoNode if refused.index == create => {
                    make_nodes(self.inner, &self.conn.client, Layout::parent(path));
                }
                zk::Error::NoNode if refused.index > create => self.make_generation(&generation),
                zk::Error::NoNode => return Ok(not_applied(0)),
                zk::Error::NodeExists if must_be_absent => return Ok(not_applied(0)),
                zk::Error::NodeExists => return plan::run(self).await,
                error => return Err(self.failed(error)),
            }
        }
        Err(self.overtaken())
    }

    /// Changes a key if what was last seen of it is what the caller expects.
    async fn swap(&self, key: &Key, expected: Revision, value: Option<&[u8]>, leased: bool) -> Result<Outcome> {
        let path = self.layout().key(key);
        let (known, generation) = match self.inner.seen.get(&path) {
            Some(known @ Known { generation: Some(generation), .. })
                if known.modified == expected && (value.is_none() || known.owner == self.owner(leased)) =>
            {
                (known, generation)
            }
            _ => return Ok(Outcome::Overtaken),
        };
        let mut multi = self.multi();
        multi.check(&self.layout().generation(Layout::shard(key)), generation);
        match value {
            Some(value) => multi.set(&path, value, known.version),
            None => multi.delete(&path, known.version),
        };
        match multi.commit(&self.call).await? {
            Ok(done) => {
                let stat = done.last_set();
                match &stat {
                    Some(stat) => self.inner.seen.note(&path, Known::of(stat, Some(generation))),
                    None => self.inner.seen.forget(&path),
                }
                Ok(Outcome::Done(applied(stat.map_or(Revision(0), |stat| revision(stat.mzxid)))))
            }
            Err(Refused { error: zk::Error::NoNode | zk::Error::BadVersion, .. }) => {
                self.inner.seen.forget(&path);
                Ok(Outcome::Overtaken)
            }
            Err(refused) => Err(self.failed(refused.error)),
        }
    }

    /// Sends for the creation of a generation, ahead of the next attempt.
    pub(crate) fn make_generation(&self, generation: &str) {
        let options = zk::CreateMode::Persistent.with_acls(self.inner.settings.acls());
        for node in self.layout().namespace_nodes() {
            drop(self.conn.client.create(node, b"", &options));
        }
        drop(self.conn.client.create(Layout::parent(generation), b"", &options));
        drop(self.conn.client.create(generation, b"", &options));
    }

    /// Refuses a request that the server would answer by closing the connection.
    pub(crate) fn fits(&self, bytes: usize) -> Result<()> {
        if bytes <= crate::multi::MAX_REQUEST {
            return Ok(());
        }
        let message = format!("the transaction has {bytes} bytes, at most {} are allowed", crate::multi::MAX_REQUEST);
        Err(self.call.error(ErrorKind::InvalidInput, message))
    }
}
