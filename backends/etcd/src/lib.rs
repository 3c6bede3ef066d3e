//! etcd backend for quorate.

mod config;
mod connect;
mod error;
mod lease;
mod line;
mod path;
mod reuse;
mod stream;
mod txn;
mod watch;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile, Result, Snapshot,
    Ticket, Txn, Watch,
};

use crate::error::Call;

/// The name in messages and metrics.
const BACKEND: &str = "etcd";

/// An etcd cluster. Dropping it ends its tasks, watches and connections.
#[derive(Debug)]
pub struct Etcd {
    profile: Profile,
    inner: Arc<Inner>,
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
        let pool = Arc::new(connect::Pool::new(config::Options::new(config)?));
        let layout = path::Layout::new(&config.namespace);
        pool.prove(&layout.probe()).await?;
        let tasks = Arc::new(stream::Tasks::new());
        let streams = stream::Streams::new(pool.clone(), tasks.clone());
        let (keep_alives, keys) = (lease::KeepAlives::default(), reuse::Keys::default());
        let inner = Arc::new(Inner { pool, layout, streams, tasks, keep_alives, keys });
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
        min_ttl: Duration::from_secs(1),
        max_ttl: lease::MAX_TTL,
        expiry_lag: Duration::from_secs(2),
        max_value: txn::MAX_VALUE,
        max_txn: txn::MAX_TXN,
        txn_leases: txn::MAX_TXN,
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
}
