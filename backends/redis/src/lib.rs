//! Redis and Valkey backend for quorate
use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile, Result, Snapshot,
    Ticket, Txn, Watch,
};
use tokio::task::JoinHandle;

mod change;
mod config;
mod connect;
mod error;
mod hub;
mod lease;
mod line;
mod link;
mod script;
mod sweep;
mod txn;
mod watch;

use crate::{
    config::{Options, Topology},
    connect::Connector,
    hub::Hub,
    link::Server,
    script::Keys,
};

/// A Redis or Valkey server, its sentinels' primary, or the node of a cluster that owns the namespace.
///
/// Dropping it ends its tasks, its connections and its watches.
pub struct Redis {
    server: Arc<Server>,
    profile: Profile,
    tasks: [JoinHandle<()>; 2],
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("options", &self.server.connector.options).finish_non_exhaustive()
    }
}

impl Redis {
    /// Connects, and proves that the server accepts writes, runs scripts and delivers messages.
    ///
    /// # Errors
    /// `InvalidInput` for options that cannot work, `Denied` for credentials or permissions that do not
    /// suffice, `Unavailable` if no endpoint led to a primary within the connect timeout.
    ///
    /// # Cancel safety
    /// Dropping it closes what was opened.
    pub async fn connect(config: &Config) -> Result<Self> {
        let options = Options::new(config)?;
        let keys = Keys::new(&config.namespace, options.db);
        let profile = profile(&options);
        let connector = Connector::new(options, keys, Arc::new(Hub::new()));
        let server = Server::connect(connector).await?;
        let tasks = [tokio::spawn(server.clone().keep()), tokio::spawn(sweep::sweep(server.clone()))];
        Ok(Self { server, profile, tasks })
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.server.close();
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn profile(options: &Options) -> Profile {
    let alone = options.topology == Topology::Standalone && options.endpoints.len() == 1;
    Profile {
        backend: error::NAME,
        fencing: Fencing::ServerClock,
        consensus: false,
        linearizable_reads: alone,
        early_end: Some(
            "a forward step of the server's clock, a restart or failover that loses the last writes, or a new \
             primary whose clock is ahead",
        ),
        interop: None,
        min_ttl: lease::MIN_TTL,
        max_ttl: lease::MAX_TTL,
        expiry_lag: Duration::from_millis(500),
        max_value: txn::MAX_VALUE,
        max_txn: txn::MAX_TXN,
        txn_leases: txn::MAX_TXN,
    }
}

#[async_trait]
impl Backend for Redis {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        lease::grant(&self.server, ttl).await
    }

    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        lease::renew(&self.server, lease).await
    }

    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        lease::revoke(&self.server, lease).await
    }

    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        watch::read(&self.server, range).await
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        txn::commit(&self.server, txn).await
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        watch::start(&self.server, range).await
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        line::enqueue(&self.server, entry).await
    }

    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        line::look(&self.server, ticket, depth).await
    }

    async fn line(&self, line: &Dir) -> Result<Line> {
        line::line(&self.server, line).await
    }

    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        line::gone(&self.server, ticket).await
    }
}
