//! etcd backend for quorate: keys, leases, transactions, lines and watches on etcd 3.4 and later.
//!
//! Promise: everything is replicated by consensus and every read is linearizable; fencing tokens are etcd's create
//! revisions, and rise for as long as the cluster's data lives. A request is sent at most once; what became of it is
//! said as the kinds of [`quorate_core::Error`] define it.
//!
//! # Connecting
//! `etcd://[user:password@]host[:2379][,host…][/namespace][?option=value…]`, or `etcds://` with TLS. The options are those
//! that all backends have (`ttl`, `connect_timeout`, `request_timeout`, and `ca`, `cert`, `key` with TLS); etcd adds none.
//! With a client certificate and without a user, etcd takes the certificate's common name for the user.
//!
//! - [`Etcd::connect`] reads one key of the namespace: it proves a leader, and the password.
//! - One endpoint is in use at a time. When it fails, the next call goes to another one; after a call that was given up
//!   without an answer, the next one goes over another connection. Nothing is sent twice by this crate.
//! - A token that expires is renewed, also for watches: etcd looks at the token of a watch stream when a watch is
//!   added, so a refused watch opens a new stream with a new token, and the watches of the old stream go on.
//! - A role needs `readwrite` on the prefix `<namespace>/`, and nothing else.
//!
//! # On the wire
//! | what | key below the namespace | value |
//! |---|---|---|
//! | a key | `<dir>/<encoded name>` | as given |
//! | a ticket | `<line>/<lease, lower-case hex>-<32 hex digits>`, with `-r` or `-w` in a read–write line | as given |
//!
//! Every key under `<line>/` counts as a ticket, in order of create revisions: so do Go's `concurrency.Mutex` and
//! `etcdctl lock <namespace>/lock/<name>`, which therefore exclude and are excluded. A ticket's name is
//! `<key>@<create revision>`.
//!
//! A client uses the key of a ticket that has left again for its next ticket in the same line, where nothing about it is
//! in doubt. etcd keeps deleted keys in its index until the next compaction, and whoever reads the line passes over
//! them: with a new key for each ticket an acquire and release took 1.0 ms in a new line and 4 ms after 20,000 of
//! them; with reuse it stays at 1.0 ms.
//!
//! # Cost
//! Counted by the server: one request for each of acquire, try, release, put, delete, create, compare-and-swap, fenced
//! put and renewal. A wait costs one message that begins it, one read that closes the gap before it, and one
//! message that ends it; a release wakes one waiter, which looks once. Bytes do not grow with the line.
//!
//! Waits begin "now" and read once. Watching from a revision on, as other clients do, is served from a loop that runs
//! every 100 ms whenever that revision is past: from the revision read, always (98 ms to hear of a deletion); from the
//! one after it, whenever anything was written in between (p99 94 ms beside one busy writer). From now: 0.4 ms, and
//! p99 2.3 ms beside that writer.
//!
//! The server's clock is the date of an HTTP answer (`GET /version` on the same port), which etcd's gRPC does not have; it
//! takes a second connection, made when the clock is first asked for.
//!
//! # Limits
//! - etcd counts TTLs in whole seconds, rounded up here, and raises them to 1.5 election timeouts: 2 s by default.
//! - A lease ends up to about half a second after its TTL. A change of leader starts all TTLs again.
//! - 128 checks and writes in a transaction and 1 MiB in a value fit a server with default settings; one that was
//!   configured for less refuses with `InvalidInput`.
//! - A repeated [`enqueue`](quorate_core::Backend::enqueue) is recognised by the client that made the first attempt.
//! - etcd's gRPC proxy renumbers watches and is refused with `Unsupported`; a gateway (layer 4) is fine.

mod clock;
mod config;
mod connect;
mod error;
mod lease;
mod line;
mod naming;
mod path;
mod reuse;
mod stream;
mod txn;
mod watch;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile, Result,
    ServerClock, Snapshot, Ticket, Txn, Watch, discovery::Registry,
};

use crate::error::Call;

/// The name in messages and metrics.
const BACKEND: &str = "etcd";

/// An etcd cluster. Dropping it ends its tasks, watches and connections.
pub struct Etcd {
    profile: Profile,
    inner: Arc<Inner>,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd").field("endpoints", &self.inner.pool.options.uris).finish_non_exhaustive()
    }
}

/// What calls and tasks share.
#[derive(Debug)]
pub(crate) struct Inner {
    pool: Arc<connect::Pool>,
    layout: path::Layout,
    streams: stream::Streams,
    tasks: Arc<stream::Tasks>,
    keep_alives: lease::KeepAlives,
    keys: reuse::Keys,
    clock: clock::Clock,
}

impl Etcd {
    /// Connects to a cluster.
    ///
    /// # Errors
    /// `InvalidInput` for options that can never work; `Denied` if the server refuses the credentials;
    /// `Unavailable`, naming the endpoints, if none of them serves within the limit for connecting.
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    pub async fn connect(config: &Config) -> Result<Self> {
        quorate_tls::connect(config, BACKEND, config::DEFAULT_PORT, Box::pin(Self::open(config))).await
    }

    async fn open(config: &Config) -> Result<Self> {
        let pool = Arc::new(connect::Pool::new(config::Options::new(config)?));
        let layout = path::Layout::new(&config.namespace);
        pool.prove(&layout.probe()).await?;
        let tasks = Arc::new(stream::Tasks::new());
        let streams = stream::Streams::new(pool.clone(), tasks.clone());
        let (keep_alives, keys) = (lease::KeepAlives::default(), reuse::Keys::default());
        let inner = Arc::new(Inner { pool, layout, streams, tasks, keep_alives, keys, clock: clock::Clock::default() });
        Ok(Self { profile: profile(), inner })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.inner.tasks.end();
    }
}

fn profile() -> Profile {
    Profile {
        backend: BACKEND,
        fencing: Fencing::Consensus,
        consensus: true,
        linearizable_reads: true,
        early_end: None,
        interop: Some("etcdctl lock, Go concurrency.Mutex"),
        // A server with default settings raises it to 2 s.
        min_ttl: Duration::from_secs(1),
        max_ttl: lease::MAX_TTL,
        // Measured up to 0.45 s on an idle machine; the rest is for a busy one.
        expiry_lag: Duration::from_secs(2),
        max_value: txn::MAX_VALUE,
        max_txn: txn::MAX_TXN,
        txn_leases: txn::MAX_TXN,
        clock: Some(Duration::from_secs(1)),
    }
}

#[async_trait]
impl Backend for Etcd {
    fn profile(&self) -> &Profile {
        &self.profile
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
        self.inner.read_range(Call::read("read"), range).await
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        txn::commit(&self.inner, txn).await
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        watch::watch(&self.inner, range).await
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        line::enqueue(&self.inner, entry).await
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
        self.inner.clock.ask(&self.inner.pool).await
    }

    fn registry(&self) -> Registry {
        Registry::Keys(&naming::GrpcNaming)
    }
}
