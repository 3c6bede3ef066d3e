//! Consul backend for quorate
mod api;
mod config;
mod connect;
mod error;
mod http;
mod lease;
mod line;
mod path;
mod tls;
mod txn;
mod wait;
mod watch;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile, Result, Snapshot,
    Ticket, Txn, Watch, Write,
};
use tokio::sync::watch as signal;

use crate::{
    api::How,
    config::SessionKind,
    connect::Sessions,
    error::NAME,
    lease::{CHECK_TTL_MIN, Leases, TTL_MAX},
    line::Lines,
    path::Space,
    txn::{Commits, MAX_TXN, MAX_VALUE},
    wait::Waits,
    watch::Reader,
};

/// A client of Consul.
#[derive(Debug)]
pub struct Consul {
    profile: Profile,
    reader: Reader,
    leases: Leases,
    commits: Commits,
    lines: Arc<Lines>,
    waits: Waits,
    // Every task of this client ends when this is dropped.
    alive: signal::Sender<()>,
}

impl Consul {
    /// Connects to one of the agents and finds out what it allows.
    ///
    /// # Errors
    /// `InvalidInput` for options that can never work, `Unavailable` if no agent with a leader answers within
    /// `connect_timeout`, `Denied` if Consul does not know the token, or refuses what `session=agent` asks for.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn connect(config: &Config) -> Result<Self> {
        let (api, sessions) = connect::open(config).await?;
        let space = Arc::new(Space::new(&config.namespace));
        let lines = Arc::new(Lines::new(api.clone(), space.clone()));
        let (alive, life) = signal::channel(());
        Ok(Self {
            profile: profile(sessions, config.session_ttl),
            reader: Reader { api: api.clone(), space: space.clone() },
            leases: Leases::new(api.clone(), sessions.kind, sessions.ttl_min),
            commits: Commits::new(api.clone(), space.clone()),
            waits: Waits::new(api, space, lines.clone(), life),
            lines,
            alive,
        })
    }
}

fn profile(sessions: Sessions, ttl: Duration) -> Profile {
    let (early_end, min_ttl, expiry_lag) = match sessions.kind {
        SessionKind::Agent => (
            "the lease's agent leaving or losing its data, restarting within a second of the TTL's end, or, if it is a \
             Consul server, dying or being cut off",
            CHECK_TTL_MIN,
            Duration::from_secs(1),
        ),
        // Consul ends a session at twice its TTL.
        SessionKind::Ttl => (
            "the lease's agent leaving or, if it is a Consul server, dying or being cut off",
            sessions.ttl_min,
            ttl.max(sessions.ttl_min) + Duration::from_secs(1),
        ),
    };
    Profile {
        backend: NAME,
        fencing: Fencing::Consensus,
        consensus: true,
        linearizable_reads: true,
        early_end: Some(early_end),
        interop: None,
        min_ttl,
        max_ttl: TTL_MAX,
        expiry_lag,
        max_value: MAX_VALUE,
        max_txn: MAX_TXN,
        txn_leases: MAX_TXN,
    }
}

#[async_trait]
impl Backend for Consul {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        self.leases.grant(ttl).await
    }

    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        self.leases.renew(lease).await
    }

    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        self.leases.revoke(lease).await?;
        self.lines.lease_ended(lease);
        Ok(())
    }

    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        let snapshot = self.reader.read("read", range, How::Consistent).await?;
        self.commits.saw(snapshot.revision.0);
        Ok(snapshot)
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        let commit = self.commits.commit(txn).await?;
        if commit.applied {
            for write in &txn.writes {
                if let Write::Leave(ticket) = write {
                    self.lines.left(ticket);
                    self.waits.left(ticket);
                }
            }
        }
        Ok(commit)
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        self.reader.watch(range, self.alive.subscribe()).await
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        self.lines.enqueue(entry).await
    }

    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        self.lines.look(ticket, depth).await
    }

    async fn line(&self, line: &Dir) -> Result<Line> {
        self.lines.line(line).await
    }

    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        self.waits.gone(ticket).await
    }
}
