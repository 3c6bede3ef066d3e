//! ZooKeeper backend for quorate.
//!
//! Promise: [`ZooKeeper`] keeps the contract of [`Backend`] on a ZooKeeper ensemble from 3.6 on, and its lines are
//! Apache Curator's: a Java or Python service and a quorate client can contend for the same lock.
//!
//! # URL
//! `zookeeper://[user:password@]host[:port][,host[:port]…][/namespace][?option=value&…]`, port 2181 unless said otherwise;
//! `zookeepers://` for TLS, with `ca`, `cert` and `key` as PEM files. There are no options beyond those of
//! [`Config`]. The namespace is created if it is missing.
//!
//! User and password are used with the `digest` scheme. Nodes are then created for this user alone (`auth` with all
//! permissions), the namespace's parents included if they are missing: make shared parents beforehand. Without a user,
//! nodes are open to everybody. A wrong password is not refused by ZooKeeper itself; it shows as `Denied` at the
//! first node that belongs to the right one, which `connect` looks for.
//!
//! # On the wire
//! | node | what |
//! |---|---|
//! | `<namespace>` | persistent |
//! | `<namespace>/<dir>` | container: the server removes it when it has been empty for a while |
//! | `<namespace>/<dir>/<name>` | a key; persistent, or ephemeral if it stands on a lease |
//! | `<namespace>/<line>` | container; holds `quorate` if a quorate client made it |
//! | `<namespace>/<line>/_c_<uuid>-lock-<sequence>` | a ticket, ephemeral; also `-__READ__` and `-__WRIT__` |
//! | `<namespace>/.lease/<session>` | a lease that lives; writing to it asks its owner to close it |
//! | `<namespace>/.gen/<2 hex>` | a generation, raised with every creation of a key that hashes to it |
//! | `<namespace>/.clock` | there only within one transaction, which carries the leader's time home |
//!
//! A key is one child of its directory, whatever slashes its name has: `/` is stored as `%2F`. (Nested nodes would be
//! the obvious mapping, but ephemeral nodes cannot have children, so `a` on a lease would forbid `a/b`.) A name that
//! would read as a ticket has its last digit percent-encoded.
//!
//! Tickets are those of Curator's `InterProcessMutex` and `InterProcessReadWriteLock`. kazoo's are read as well; kazoo
//! must be told of ours with `extra_lock_patterns=("-lock-",)`. The nonce of an attempt is the UUID.
//!
//! A revision is a zxid: of the creation, the last write, or the transaction. ZooKeeper itself compares data versions,
//! which begin at zero again when a node is deleted and created, so a comparison also covers the key's generation:
//! same generation and version, same write. Clients other than quorate do not raise generations; a key that one of them
//! deletes and creates again within a round trip may be taken for unchanged.
//!
//! # Sessions
//! A lease is a ZooKeeper session with a connection of its own (`maxClientCnxns`, 60 per address by default, limits how
//! many a host can have); everything without a lease shares one more. A lease lives through the loss of its
//! connection and the restart of servers as long as the session does. `renew` is confirmed by the leader, because a
//! server that is cut off from it goes on answering reads; a session that is not renewed is closed here although the
//! client library would keep it alive. One transaction can put keys on one lease only: an ephemeral node can be made
//! by its own session alone.
//!
//! # Limits
//! A value may have 1 MiB − 16 KiB, and a transaction with all its values and paths 1 MiB − 4 KiB: ZooKeeper closes the
//! connection of who sends 1 MiB, so more is refused here. A directory is read at one moment while its names have less
//! than 256 KiB; a larger one in pieces.
//!
//! # Round trips
//! | call | waits |
//! |---|---|
//! | joining a line that was empty when last seen, also "only if free" | 1 |
//! | joining any other: create and list together | 1 |
//! | `look`, `renew`, `gone` until it waits | 1 |
//! | release; single put, create, delete; fenced put; compare-and-swap of a key read or written here before | 1 |
//! | any other transaction, compare-and-swap of an unknown key | 2 |
//! | first key or ticket in a new directory, first key of a generation | 1 or 2 more |
//! | `read` of a key / of a directory: `sync` and read together | 1 / 2 |
//! | `line` | 2 |
//!
//! Where several requests are sent together the first may travel alone: the client library (zookeeper-client 0.11) leaves
//! Nagle's algorithm on, so the rest may wait until the first is acknowledged, at the latest by its answer.
//!
//! Measured on one server on a busy two-core machine, medians of three runs, beside the bare client library in the same
//! run (`examples/cost.rs`): joining an empty line and leaving it 1.13 times a raw create and delete; release 1.05, put
//! 1.01, compare-and-swap after a read 1.08, fenced put 1.04 times the raw write; a read 1.9 times a raw get, which does
//! not ask the leader first. Hand-over from release to grant 1.3–1.7 ms in a line of 2, 1.8–2.4 ms in a line of 1,000.

mod config;
mod connect;
mod discovery;
mod error;
mod join;
mod layout;
mod lease;
mod line;
mod multi;
mod plan;
mod read;
mod seen;
mod ticket;
mod tickets;
mod txn;
mod watch;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile, Result, Revision,
    ServerClock, Snapshot, Ticket, Txn, Watch, discovery::Registry,
};
use zookeeper_client as zk;

use crate::{
    config::Settings,
    connect::{Base, Conn},
    error::{Call, NAME},
};

/// A ZooKeeper ensemble, or a single server.
///
/// Dropping it closes every session, and so ends every lease, that was opened through it.
pub struct ZooKeeper {
    inner: Arc<Inner>,
    /// Keeps the shared session; aborted with the backend.
    keeper: tokio::task::JoinHandle<()>,
}

/// What calls and tasks share.
#[derive(Debug)]
struct Inner {
    settings: Arc<Settings>,
    profile: Profile,
    base: Base,
    leases: lease::Leases,
    tickets: tickets::Tickets,
    seen: seen::Seen,
}

impl fmt::Debug for ZooKeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZooKeeper").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

impl Drop for ZooKeeper {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl ZooKeeper {
    /// Connects, makes sure that the namespace exists and may be read, and asks for the limits of sessions.
    ///
    /// # Errors
    /// `InvalidInput` for options that cannot work; `Unavailable` if no server answered in time; `Denied` if the
    /// namespace belongs to somebody else.
    ///
    /// # Cancel safety
    /// Dropped half-way it may leave sessions, with nothing on them, until they expire at the server.
    pub async fn connect(config: &Config) -> Result<Self> {
        quorate_tls::connect(config, NAME, 2181, Box::pin(Self::open(config))).await
    }

    async fn open(config: &Config) -> Result<Self> {
        let settings = Arc::new(Settings::new(config)?);
        let first = connect::open(&settings, config.session_ttl, "connect").await?;
        make_namespace(&settings, &first).await?;
        let (min_ttl, max_ttl) = connect::limits(&settings).await?;
        let session = first.client.session_timeout();
        let (base, keeping) = Base::new(settings.clone(), first, session);
        let inner = Arc::new(Inner {
            settings,
            profile: profile(min_ttl, max_ttl),
            base,
            leases: lease::Leases::default(),
            tickets: tickets::Tickets::default(),
            seen: seen::Seen::default(),
        });
        Ok(Self { inner, keeper: tokio::spawn(keeping) })
    }
}

fn profile(min_ttl: Duration, max_ttl: Duration) -> Profile {
    Profile {
        backend: NAME,
        fencing: Fencing::Consensus,
        consensus: true,
        // `sync` and a read, not a quorum read: a leader that was replaced and does not know it may still answer.
        linearizable_reads: false,
        early_end: Some(
            "a server that is lost within half a tick after it has answered a renewal, before it has told the leader \
             that the client lives: unless another server is reached in time, the session may end up to a fifth of \
             its TTL and half a tick early",
        ),
        interop: Some("Apache Curator's mutex and read-write lock; kazoo's with extra_lock_patterns=(\"-lock-\",)"),
        min_ttl,
        max_ttl,
        // Sessions are ended in batches, one per tick, and the shortest session is two ticks; followers tell the leader
        // of their clients every half tick.
        expiry_lag: min_ttl + Duration::from_millis(500),
        max_value: 1024 * 1024 - 16 * 1024,
        max_txn: 64,
        txn_leases: 1,
        clock: Some(Duration::from_millis(1)),
    }
}

/// Creates the namespace and proves that it may be read.
async fn make_namespace(settings: &Settings, conn: &Conn) -> Result<()> {
    let top = settings.layout.top();
    let call = Call::read("connect", &top);
    let options = zk::CreateMode::Persistent.with_acls(settings.acls());
    let nodes = settings.layout.namespace_nodes();
    let created: Vec<_> = nodes.iter().map(|node| conn.client.create(node, b"", &options)).collect();
    let listed = conn.client.list_children(top);
    let answers = async { Ok::<_, zk::Error>((futures_util::future::join_all(created).await, listed.await)) };
    let (created, listed) = conn.call(answers).await.map_err(|error| conn.failed(&call, error))?;
    match listed {
        Ok(_) => Ok(()),
        // Why it could not be created tells more than that it is not there.
        Err(zk::Error::NoNode) => {
            let refused = created.into_iter().filter_map(Result::err).find(|e| *e != zk::Error::NodeExists);
            Err(conn.failed(&call, refused.unwrap_or(zk::Error::NoNode)))
        }
        Err(error) => {
            let denied = matches!(error, zk::Error::NoAuth) && settings.has_login();
            let error = conn.failed(&call, error);
            Err(if denied { error.next("check user and password: they are not those of the owner") } else { error })
        }
    }
}

/// The revision behind a zxid. Zxids are positive: their upper half counts leaders.
fn revision(zxid: i64) -> Revision {
    Revision(u64::try_from(zxid).unwrap_or(0))
}

#[async_trait]
impl Backend for ZooKeeper {
    fn profile(&self) -> &Profile {
        &self.inner.profile
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        lease::grant(&self.inner, ttl).await
    }

    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        lease::renew(&self.inner, lease).await
    }

    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        lease::revoke(&self.inner, lease).await
    }

    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        let call = Call::read("read", range);
        let conn = self.inner.base.conn(&call).await?;
        read::read(&conn, &self.inner.settings.layout, &self.inner.seen, range)
            .await
            .map_err(|error| conn.failed(&call, error))
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        txn::commit(&self.inner, txn).await
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        watch::watch(&self.inner, range).await
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        join::enqueue(&self.inner, entry).await
    }

    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        line::look(&self.inner, ticket, depth).await
    }

    async fn line(&self, line: &Dir) -> Result<Line> {
        line::line(&self.inner, line).await
    }

    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        line::gone(&self.inner, ticket).await
    }

    async fn clock(&self) -> Result<ServerClock> {
        read::clock(&self.inner).await
    }

    fn registry(&self) -> Registry {
        Registry::Keys(&discovery::Curator)
    }
}
