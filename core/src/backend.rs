//! The waist: the one trait that a coordinator must implement, and that every recipe is written over.
//!
//! Promise: what each method means is said here once and holds on every backend; where a server cannot give
//! it, the call fails with `Unsupported` and the [`Profile`] says so. The conformance suite asserts both.
//!
//! # How the recipes stand on it
//! | recipe | uses |
//! |---|---|
//! | lock | `enqueue`, `look`, `gone`; release is a `commit` with [`Write::Leave`] |
//! | read–write lock | the same line with [`TicketKind::Read`] and [`TicketKind::Write`]; a reader waits for the nearest writer ahead |
//! | semaphore | a line; a ticket with fewer than *n* ahead is in |
//! | election | a line whose front leads; its record is a `commit` with [`Check::Standing`], `watch` shows it |
//! | fenced write | `commit` with [`Check::Standing`] |
//! | the coordinator's clock | `clock` |
//! | membership, discovery | `commit` of keys on a lease, `watch` of their directory |
//! | heartbeats, recovery | `commit` of keys on no lease, each beat with [`Check::Unchanged`]; `watch` of their directory; a lock per death |
//! | atomic commit | `commit` with [`Check::Absent`] for the one decision record; `watch` for participants in other processes; a lock per recovery |

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    discovery::Registry,
    error::Result,
    key::{Dir, Key, KeyRange},
    watch::Watch,
};

/// A coordinator, seen through eleven verbs, and two methods by which it says what it is.
///
/// Every future may be dropped at any point; a dropped call may still be carried out by the server. No
/// method has a default body, so a wrapper that forgets one does not compile.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// What this backend guarantees and where its limits are.
    fn profile(&self) -> &Profile;

    /// Grants a lease. The server may end it `ttl` after the last confirmed renewal and never earlier (see
    /// [`Profile::early_end`] for the one declared exception). The granted TTL may be longer than asked for.
    async fn grant(&self, ttl: Duration) -> Result<Lease>;

    /// Confirms the lease and starts its TTL again; returns the TTL now in force.
    ///
    /// # Errors
    /// `SessionLost` if the server no longer knows the lease.
    async fn renew(&self, lease: &LeaseId) -> Result<Duration>;

    /// Ends the lease and everything that stands on it. `Ok` also if it had ended before.
    async fn revoke(&self, lease: &LeaseId) -> Result<()>;

    /// The keys in the range, in order of their encoded names, at least as new as every write that was
    /// answered before this call began. Tickets in a line are not keys.
    async fn read(&self, range: &KeyRange) -> Result<Snapshot>;

    /// Applies all writes if all checks hold, or nothing. Not applied is a value; not known is `Ambiguous`.
    ///
    /// # Errors
    /// `SessionLost` if a write names a lease that has ended; nothing was applied then.
    async fn commit(&self, txn: &Txn) -> Result<Commit>;

    /// Watches the range: first a `Reset` with everything there is, then changes. See [`Watch`].
    async fn watch(&self, range: &KeyRange) -> Result<Watch>;

    /// Joins a line, at its end, in one round trip; the answer says who stands ahead.
    ///
    /// Repeating a call with the same lease and nonce gives the same place. `Ok(None)` is only possible with
    /// [`Enqueue::when_free`]: somebody was in the line, and nothing was written. A backend that cannot ask
    /// that of its server joins and answers with the place; the caller then leaves.
    ///
    /// # Errors
    /// `SessionLost` if the lease has ended.
    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>>;

    /// Looks again from a ticket's place: who stands ahead now? `None` if the ticket itself is gone.
    ///
    /// `ahead` holds at least the `depth` nearest, nearest first.
    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>>;

    /// The whole line, in order.
    async fn line(&self, line: &Dir) -> Result<Line>;

    /// Returns when that ticket is gone, or earlier when it may be (a reconnect, a gap). Callers always
    /// look again. Nothing is sent while it stands, apart from what establishes the wait.
    ///
    /// # Cancel safety
    /// Dropping it takes the wait back.
    async fn gone(&self, ticket: &Ticket) -> Result<()>;

    /// What the server's own wall clock shows while it answers. For people to look at: nothing may be decided by it.
    ///
    /// # Errors
    /// `Unsupported` exactly if [`Profile::clock`] is `None`.
    async fn clock(&self) -> Result<ServerClock>;

    /// How the records of services are kept.
    fn registry(&self) -> Registry;
}

/// A number that only rises within a namespace: with every write, also across restart, expiry and
/// deletion of keys.
///
/// Sources: etcd's revision, ZooKeeper's zxid, Consul's index, on Redis a counter that never falls behind
/// the server's clock in microseconds, in memory a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The server's name for a lease. Its form is the backend's.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(Arc<str>);

impl LeaseId {
    /// A lease id in the backend's own form.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }

    /// The backend's form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeaseId({})", self.0)
    }
}

/// What a server's wall clock showed at some moment while it answered: from `earliest` to `latest`, which are as far
/// apart as the server's clock is coarse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerClock {
    /// Since 1970, in UTC.
    pub earliest: Duration,
    /// Since 1970, in UTC.
    pub latest: Duration,
}

/// A granted lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// The TTL that the server granted; differs from the one asked for where the server has limits.
    pub ttl: Duration,
}

/// One key with its value.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub key: Key,
    /// What it holds.
    pub value: Bytes,
    /// The revision that created it. A write that changes the key's lease may count as a new creation.
    pub created: Revision,
    /// The revision that wrote it last.
    pub modified: Revision,
    /// The lease it stands on, if any.
    pub lease: Option<LeaseId>,
}

// Values may be secrets of the application: only their length is shown, here and below.
impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value, created, modified, lease } = self;
        write!(f, "Entry({key}, {} bytes, created {created}, modified {modified}, lease {lease:?})", value.len())
    }
}

/// What a range held at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The keys, in order of their encoded names.
    pub entries: Vec<Entry>,
    /// The store's revision at that moment, or the highest one the reply shows.
    pub revision: Revision,
}

/// A condition of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// The key does not exist.
    Absent(Key),
    /// The key exists and was last written at this revision.
    Unchanged {
        /// The key.
        key: Key,
        /// Its [`Entry::modified`].
        modified: Revision,
    },
    /// The ticket still stands in its line. This is what fences a write: the holder of a ticket that was
    /// once first is the holder for as long as the ticket stands.
    Standing {
        /// The ticket.
        ticket: Ticket,
        /// The revision at which it was created.
        token: Revision,
    },
}

/// A write of a [`Txn`].
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces the key. From then on the key belongs to this lease, or to none.
    Put {
        /// The key.
        key: Key,
        /// Its new value.
        value: Bytes,
        /// The lease it shall stand on.
        lease: Option<LeaseId>,
    },
    /// Deletes the key, if it is there.
    Delete(Key),
    /// Takes the ticket out of its line, if it is there.
    Leave(Ticket),
}

impl fmt::Debug for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { key, value, lease } => {
                write!(f, "Put({key}, {} bytes", value.len())?;
                lease.as_ref().map_or(Ok(()), |l| write!(f, ", {l}"))?;
                f.write_str(")")
            }
            Self::Delete(key) => write!(f, "Delete({key})"),
            Self::Leave(ticket) => write!(f, "Leave({ticket})"),
        }
    }
}

/// Checks and writes that happen together or not at all. No key or ticket may be written twice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// All must hold.
    pub checks: Vec<Check>,
    /// Applied in one step.
    pub writes: Vec<Write>,
}

/// The answer to a [`Txn`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    /// Whether the writes were applied.
    pub applied: bool,
    /// If applied and something was written: the [`Entry::modified`] of every key put.
    pub revision: Revision,
    /// If not applied: the place in [`Txn::checks`] of the first check that did not hold.
    pub culprit: Option<usize>,
}

/// What a ticket asks for. Foreign clients' tickets are read by the layout of their library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TicketKind {
    /// A place in a line where every ticket excludes every other.
    Lock,
    /// A reader's place in a read–write line.
    Read,
    /// A writer's place in a read–write line.
    Write,
}

/// A ticket in a line: its identity at the server. Names are never used twice.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// The line it stands in.
    pub line: Dir,
    /// Its name within the line, in the backend's layout.
    pub name: Arc<str>,
    /// What it asks for.
    pub kind: TicketKind,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.line, self.name)
    }
}

/// A random name for one attempt to join a line, so that a repeated or unanswered attempt is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub u128);

impl Nonce {
    /// A fresh one.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A request to join a line.
#[derive(Clone, PartialEq, Eq)]
pub struct Enqueue {
    /// The line; it comes into being with its first ticket.
    pub line: Dir,
    /// What is asked for.
    pub kind: TicketKind,
    /// The lease that the ticket stands on.
    pub lease: LeaseId,
    /// Names this attempt.
    pub nonce: Nonce,
    /// What others may read of the ticket's owner.
    pub value: Bytes,
    /// How many of the nearest tickets ahead the answer must name at least.
    pub depth: usize,
    /// Join only if nobody is in the line, where the server can ask that in one step.
    pub when_free: bool,
}

impl fmt::Debug for Enqueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, kind, lease, nonce, value, .. } = self;
        write!(f, "Enqueue({line}, {kind:?}, lease {lease}, nonce {nonce}, {} bytes)", value.len())
    }
}

/// A place in a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The ticket.
    pub ticket: Ticket,
    /// The revision that created the ticket: the fencing token.
    pub token: Revision,
    /// Who stands ahead, nearest first. Empty exactly if the ticket is the first of the line.
    pub ahead: Vec<Ticket>,
}

/// A whole line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Line {
    /// The tickets, in order.
    pub tickets: Vec<Ticket>,
    /// More about the first ticket.
    pub front: Option<Front>,
}

/// The first ticket of a line, with what its owner wrote.
#[derive(Clone, PartialEq, Eq)]
pub struct Front {
    /// The revision that created it.
    pub token: Revision,
    /// The owner's [`Enqueue::value`]; empty for most foreign clients.
    pub value: Bytes,
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Front(token {}, {} bytes)", self.token, self.value.len())
    }
}

/// Where the fencing tokens of a backend come from, and so how long they keep rising.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fencing {
    /// Replicated by consensus: they rise for as long as the cluster's data lives.
    Consensus,
    /// They rise past a loss of data or a failover as long as the servers' clocks do not run back by more
    /// than the data lost; what a lost write protected is lost with it.
    ServerClock,
    /// They rise while the process lives.
    Process,
}

/// What a backend guarantees, and its limits. Each field is asserted by the conformance suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// The backend's name in messages, metrics and the README.
    pub backend: &'static str,
    /// Where tokens come from.
    pub fencing: Fencing,
    /// Whether acknowledged writes survive the loss of a minority of servers.
    pub consensus: bool,
    /// Whether `read` is linearizable; if not, it still shows every write answered to this client.
    pub linearizable_reads: bool,
    /// What may end a lease before its TTL, or `None`.
    pub early_end: Option<&'static str>,
    /// The other clients that contend for the same locks, or `None`.
    pub interop: Option<&'static str>,
    /// The smallest TTL that `grant` gives; smaller ones are raised to it.
    pub min_ttl: Duration,
    /// The largest TTL that `grant` gives; larger ones are lowered to it.
    pub max_ttl: Duration,
    /// How long after its TTL a dead client's lease may stand at the most.
    pub expiry_lag: Duration,
    /// The largest value, in bytes.
    pub max_value: usize,
    /// The largest number of checks and writes in one transaction.
    pub max_txn: usize,
    /// On how many different leases the keys that one transaction puts may stand.
    pub txn_leases: usize,
    /// In which steps the server tells its wall clock, or `None` if it does not.
    pub clock: Option<Duration>,
}

impl fmt::Display for Txn {
    /// What the transaction is about: the first key it writes, or else checks, and how many more there are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.writes.len() + self.checks.len();
        match (self.writes.first(), self.checks.first()) {
            (Some(Write::Put { key, .. } | Write::Delete(key)), _) => key.fmt(f)?,
            (Some(Write::Leave(ticket)), _) => ticket.fmt(f)?,
            (None, Some(Check::Absent(key) | Check::Unchanged { key, .. })) => key.fmt(f)?,
            (None, Some(Check::Standing { ticket, .. })) => ticket.fmt(f)?,
            (None, None) => f.write_str("nothing")?,
        }
        if count > 1 { write!(f, " and {} more", count - 1) } else { Ok(()) }
    }
}
