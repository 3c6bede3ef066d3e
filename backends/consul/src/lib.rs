//! Consul backend of quorate.
//!
//! Promise: the contract of [`Backend`] on Consul 1.7 and later (tested on 1.8.7), over a small typed client of its own
//! (hyper, rustls with aws-lc): linearizable reads, fencing tokens from the Raft index, leases of one second and more,
//! one round trip to join a line, to leave it and to write, and one wake-up for one release.
//!
//! # URL
//! `consul://agent[:8500][,agent…]/namespace?option=value`, with TLS `consuls://agent[:8501]`.
//!
//! | option | meaning | default |
//! |---|---|---|
//! | `token` | ACL token, sent as `X-Consul-Token` | anonymous |
//! | `user:password@` | basic authentication, for a proxy in front of the agent | none |
//! | `session` | what leases are: `agent`, `ttl`, or `auto`, which takes `agent` where the agent allows it | `auto` |
//! | `connections` | requests under way at once, from 1 to 4096 | 64 |
//! | `tls_server_name` | the name in the servers' certificates, such as `server.dc1.consul` | the endpoint's host |
//!
//! Name agents, not a load balancer: a lease of kind `agent` lives on one agent, and every renewal goes there.
//!
//! An agent takes 200 connections from one address (`limits.http_max_conns_per_client`), those of other processes on
//! the same machine included, and resets further ones. This client uses at most `connections` for requests, keeps as
//! many idle, and 64 for waiting; each watch takes one.
//!
//! # Rights
//! With ACLs: `key_prefix "<namespace>/" { policy = "write" }`, `session_prefix "" { policy = "write" }`, and for
//! leases of kind `agent` also `service_prefix "quorate-session" { policy = "write" }`. Without the last, `auto` falls
//! back to `ttl`. Consul before 1.11 shows an empty range to a token without rights to it; such a read fails here with
//! `Denied`.
//!
//! # Leases
//! | | `agent` | `ttl` |
//! |---|---|---|
//! | made of | a service `quorate-session` with a TTL check, and a session that stands on it | a session |
//! | smallest TTL | 1 s | the servers' `session_ttl_min`, 10 s by default |
//! | a dead owner's keys go after | TTL | up to 2 × TTL |
//! | its machine dies, agent included | up to 2 × TTL, at least 2 × `session_ttl_min` | up to 2 × TTL |
//! | ended early by | see [`Profile::early_end`] | see there |
//!
//! [`Profile::expiry_lag`] is about a client that dies, not about an agent that dies with it. For `ttl` it is that of
//! the TTL in the configuration; a longer TTL has a longer lag.
//!
//! Both kinds have lock-delay 0 and behaviour `delete`. In both the session has its own TTL at the servers, and
//! `serfHealth` is not among its checks. That costs time when a machine dies, and buys that a network partition does
//! not end a lease while its holder may still trust it. One exception cannot be avoided: if the endpoint is a Consul
//! *server* and that server dies or is cut off, autopilot removes it from the cluster some seconds later, and Consul
//! ends the sessions of a removed node. A client agent beside the application, as Consul recommends, does not have this
//! limit.
//!
//! What others see of a lease: one instance of the service `quorate-session`, without a port. That of a dead owner is
//! critical, has no part in the health of other services, and is removed by the agent after one to two minutes.
//!
//! # Layout
//! Keys are stored as `<namespace>/<directory>/<name>`, in the waist's encoding; a character that Consul may refuse in
//! a URL is stored as `%u` and four hex digits. A key on a lease is locked by its session. Flags are random: Consul
//! does not count a write that changes nothing, and the flags make every put a change.
//!
//! A ticket is the key `<line>/<session>-<client>.<slot>-<nonce>`, with `-r` or `-w` for readers and writers, locked by
//! its session; its `CreateIndex` is its token and its place. Every other key below the line counts as a ticket too.
//! Slots bound what deleted tickets leave behind: Consul remembers deleted keys for a quarter of an hour, and every
//! listing of a prefix walks over them.
//!
//! # Services
//! Instances are services of the agent, in Consul's own catalog: DNS, the UI and every other client see them, and
//! instances that others registered are found here, with whatever checks they have; see `discovery` in the docs of
//! `quorate-core`. Ours have the id `quorate:<namespace>:<service>:<id>`, with everything but small letters, digits, `-`,
//! `_` and `.` as `%` and hex digits; tags, address, port and weight where Consul has them; metadata as far as Consul
//! takes it; the whole record in the metadata `quorate-0`, `quorate-1` and so on; and one TTL check that is passed with
//! every renewal of the lease. A dead owner's instance is critical after the TTL, which is when quorate stops finding
//! it, and is removed by the agent a minute later (`DeregisterCriticalServiceAfter`). Each agent keeps records of its own: of
//! two registrations with one id at two agents the newer one is found, but the earlier is not told that it was displaced,
//! since a look for the other would cost the servers a read of the whole service. Names of services are shared by
//! all namespaces of a Consul: what quorate registered in another namespace is left out. Rights: `service_prefix` write
//! for what is registered, read for services and nodes for what is followed.
//!
//! # Why not the layout of `consul lock`
//! `consul lock` and Go's `api.Lock` let all contenders fight for one key: every release wakes all of them, some never
//! get it, and after a crash the lock-delay comes on top of 2 × TTL. Measured with 32 contenders: 56 requests per grant
//! for a bare acquire in a loop, 9 grants a second for `api.Lock`, which took 34 s to take over after a crash with a
//! TTL of 10 s. One cannot stand in that fight and in a fair line at once, so quorate chose the line. What remains:
//! pointed at the same prefix, quorate waits for a `consul lock` that came first; `consul lock` does not see quorate.
//!
//! # Measured
//! Consul 1.8.7, one server on loopback, two cores busy with other work, so roughly: a free lock's acquire and release
//! took 0.98 times as long as a raw acquire and release over the same HTTP stack (middle half 0.77 to 1.47; `cargo
//! xtask bench`), and 0.4 to 0.5 ms longer than its own two requests written by hand (`examples/pair.rs`). After `kill
//! -9`, with renewals at a quarter of the TTL, what the owner held was gone after 0.9 s, 1.8 s and 3.7 s for TTLs of 1
//! s, 2 s and 4 s; with a plain session of 2 s after 3.8 s. After the leader of three servers was killed, the first
//! write went through after 3.0 to 3.6 s.

mod api;
mod catalog;
mod config;
mod connect;
mod error;
mod http;
mod lease;
mod line;
mod path;
mod slot;
mod txn;
mod wait;
mod watch;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Check, Commit, Config, Dir, Enqueue, ErrorKind, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile,
    Result, Revision, ServerClock, Snapshot, Ticket, Txn, Watch, Write, discovery::Registry,
};
use tokio::sync::watch as signal;

use crate::{
    api::How,
    catalog::Services,
    config::SessionKind,
    connect::Sessions,
    error::NAME,
    lease::{CHECK_TTL_MIN, Leases, TTL_MAX},
    line::Lines,
    path::Space,
    txn::{Commits, MAX_TXN, MAX_VALUE},
    wait::Waits,
    watch::{Reader, Target},
};

/// A client of Consul.
#[derive(Debug)]
pub struct Consul {
    profile: Profile,
    reader: Reader,
    leases: Arc<Leases>,
    catalog: Arc<Services>,
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
        let port = if config.tls.is_some() { 8501 } else { 8500 };
        quorate_tls::connect(config, NAME, port, Box::pin(Self::open(config))).await
    }

    async fn open(config: &Config) -> Result<Self> {
        let (api, sessions) = connect::open(config).await?;
        let space = Arc::new(Space::new(&config.namespace));
        let lines = Arc::new(Lines::new(api.clone(), space.clone()));
        let (alive, life) = signal::channel(());
        let leases = Arc::new(Leases::new(api.clone(), sessions.kind, sessions.ttl_min));
        let reader = Reader { api: api.clone(), space: space.clone() };
        let catalog = Services::new(&config.namespace, reader.clone(), leases.clone(), life.clone());
        Ok(Self {
            profile: profile(sessions, config.session_ttl),
            reader,
            leases,
            catalog: Arc::new(catalog),
            commits: Commits::new(api.clone(), space.clone()),
            waits: Waits::new(api, space, lines.clone(), life),
            lines,
            alive,
        })
    }
}

impl Consul {
    /// Leaving without a condition, together with the check that the ticket stands, where its token is remembered:
    /// only so can it be taken out without leaving a trace (see `slot`).
    fn guarded(&self, txn: &Txn) -> Option<Txn> {
        let (true, [Write::Leave(ticket)]) = (txn.checks.is_empty(), &*txn.writes) else { return None };
        let token = Revision(self.lines.token(ticket)?);
        let checks = vec![Check::Standing { ticket: ticket.clone(), token }];
        Some(Txn { checks, writes: txn.writes.clone() })
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
        clock: Some(Duration::from_secs(1)),
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
        let renewed = self.leases.renew(lease).await;
        if renewed.as_ref().is_err_and(|e| e.kind() == ErrorKind::SessionLost) {
            self.lines.lease_lost(lease);
        }
        renewed
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
        let commit = match self.guarded(txn) {
            Some(guarded) => match self.commits.commit(&guarded).await? {
                // Gone already, or written by somebody else.
                refused if !refused.applied => self.commits.commit(txn).await?,
                applied => applied,
            },
            None => self.commits.commit(txn).await?,
        };
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
        self.reader.watch(Target::Range(range.clone()), self.alive.subscribe()).await
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

    async fn clock(&self) -> Result<ServerClock> {
        self.reader.clock().await
    }

    fn registry(&self) -> Registry {
        Registry::Native(self.catalog.clone())
    }
}
