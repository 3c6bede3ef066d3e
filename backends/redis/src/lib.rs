//! Redis and Valkey backend for quorate.
//!
//! Promise: fair locks with rising tokens, leases, keys and watches on a server that nobody had to configure for
//! it. Every call is one script, so it happens as a whole or not at all and costs one round trip. A wait is
//! ended by one message to the one client that waits; should the message get lost, by the clock.
//!
//! # URL
//! `redis://[user:password@]host[:6379][,host…][/namespace]` talks to the first endpoint that is a primary.
//! `redis+sentinel://host[:26379],…` asks these sentinels for the primary, at first and after every failure.
//! `redis+cluster://host[:6379],…` finds the node that owns the namespace's slot; any node will do to ask.
//! With `rediss` instead of `redis`, every connection is TLS, to sentinels too. The user and password are the
//! servers'; a sentinel gets them only if it asks.
//!
//! | option | meaning | default |
//! |---|---|---|
//! | `db` | database number; not in a cluster | `0` |
//! | `master` | the name under which the sentinels know the primary | `mymaster` |
//!
//! # What is needed
//! Redis 6.0 or later (rights for channels need 6.2), or Valkey; tested on 6.0.16 (no cluster), 7.0.15 and Valkey
//! 8.0.1. No setting of the server is changed and no key-space events are used. Where users have limited rights,
//! for the namespace `my-app`:
//!
//! ```text
//! ACL SETUSER app on >password ~{quorate/my-app}:* &{quorate/my-app}:* +@connection +evalsha +script|load
//!   +subscribe +unsubscribe +publish +time +hget +hmget +hset +hdel +zadd +zrem +zscore
//!   +zrangebyscore +zrangebylex +zrevrangebylex
//! ```
//!
//! Connecting tries each of these once, without effect, and fails with `Denied` if one is missing: a script that
//! were stopped half-way could not be undone. In a cluster `+cluster|slots` helps to find nodes that the URL does
//! not name.
//!
//! # What is promised, and what is not
//! Redis replicates asynchronously. A failover may lose the last writes, and with them leases and locks; a primary
//! that is cut off serves its clients until it learns of it. So the profile says: no consensus, and reads that are
//! linearizable only on a single server. Against both, set `min-replicas-to-write` on the servers: a cut-off
//! primary then refuses every call, reads included, and the client looks for another one. Setting `appendonly`
//! decides what a restart keeps. Eviction policies `allkeys-*` may throw locks away; connecting warns of them.
//!
//! Without that, two clients may hold one lock at the same time: the one that talks to the cut-off primary until the
//! servers are joined again, and the one that the new primary granted it to. Where a lock must not be lost in a
//! failover, use a backend with consensus, or fence.
//!
//! Two things are done about it. What this client has taken away in the last minute, releases above all, is taken away again on
//! every new connection: a lock is not stuck because its release was lost. And with sentinels, one of them is asked every
//! second whether the primary is still the primary, so that one that was replaced while it slept is left before the
//! sentinels tell it, which takes them up to ten seconds.
//!
//! What holds even then: **tokens rise**. A revision is the larger of the last one + 1 and the server's clock in
//! microseconds, and each client that connects raises it past all that it has seen; so storage that refuses a
//! stale token refuses the former holder. And **a loss is told**: a client whose lease was lost with the data
//! learns it with the next call, as `SessionLost`.
//!
//! Time is the server's clock. A lease ends when that clock passes its deadline, no matter when the server would
//! expire anything: every script first ends the leases that are over, so nobody ever sees a dead lease's
//! records. Whoever waits for a ticket asks again when its lease would end, whoever watches when the first lease of
//! the namespace would. If that clock is set forward, leases end early, as any expiry on Redis
//! does; if it is set back, they last longer.
//!
//! A lease ends in one step with all that stands on it. A hundred thousand keys on one lease were seen to take 3 s on a
//! busy machine, in which the server serves nobody else; some thousands are no trouble.
//!
//! A server out of memory refuses what adds data (`Backend`), never renewals, releases, deletions and reads.
//!
//! There is no option for `WAIT`: it says how many replicas have a write, but takes nothing back if they are too
//! few, blocks the connection for everybody, and a failover may still choose another replica.
//!
//! # Why not Redlock's or Redisson's layout
//! Both keep one record per lock, so those who wait poll or all wake up at each release, in no order; there is no
//! fencing token, and nothing that a write can be made to depend on. A line needs a record per waiter. So other
//! clients' locks are not contended for, and theirs and ours do not exclude each other.
//!
//! # On the wire
//! A namespace is three Redis keys with one hash tag, so it lives in one slot of a cluster. Every script names all
//! three and touches nothing else. Prefix: `{quorate/<namespace>}:`, `{quorate}:` for the empty namespace, with
//! `@<db>` before the colon for databases other than 0. `⏎` is a line feed, which no name contains.
//!
//! | key | type | field or member | holds |
//! |---|---|---|---|
//! | `h` | hash | `rev` | the last revision |
//! | | | `L:<lease>` | TTL in ms |
//! | | | `K:<dir>⏎<name>` | `<created> <modified> <lease>`, the numbers in 16 digits |
//! | | | `V:<dir>⏎<name>` | the value |
//! | | | `T:<line>⏎<ticket>` | the token, in 16 digits |
//! | | | `P:<line>⏎<ticket>` | what the owner wrote, if anything |
//! | | | `W:<line>⏎<ticket>` | the clients that are to be told when the ticket goes |
//! | | | `D:<dir>` | the last change of a directory that is watched |
//! | `z` | sorted set, all scores 0 | `i:<dir>⏎<name>` | keys in order |
//! | | | `o:<line>⏎<token>⏎<ticket>` | lines in order |
//! | | | `a:<lease>⏎k<dir>⏎<name>`, `a:<lease>⏎t<line>⏎<ticket>` | what stands on a lease |
//! | `t` | sorted set by µs of the server's clock | `l:<lease>` | when it ends |
//! | | | `w:<line>⏎<ticket>⏎<client>`, `s:<dir>` | when a wait or a watch is forgotten: a minute after it was last renewed |
//!
//! A ticket is `<lease>-<nonce>`, followed by `-r` or `-w` for a reader or writer; leases and clients are 16
//! hexadecimal digits. Channels: `c:<client>` carries `t<line>⏎<ticket>` when a ticket went, `d:<dir>` the changes
//! of a watched directory. Each client has two connections, one of them for messages; both are always replaced
//! together. Nothing has an expiry of its own, which would let the server evict it: what a namespace's last users
//! left behind stays, however dead, until somebody uses the namespace again or deletes its three keys.
//!
//! # What it costs
//! Measured by `examples/cost.rs` on one loopback server, on a machine that was busy with other work; compare ratios, not
//! figures. Joining a line and leaving it again: 1.16 and 1.34 times the bare client's `SET NX PX` and script in two
//! runs (medians of 93 µs to 80 µs and 114 µs to 85 µs). A hand-over to another client that waits: 0.3 ms at the median. The end of a dead client's
//! lease is seen 6 to 7 ms late at the median by those who wait for a ticket of it or watch a key on it.
//!
//! By the server's own statistics (`tests/cost.rs`): ten hot calls are ten requests; a release with 200 waiting is one
//! request and one message; a client with a hundred waits and a hundred watches asks about once in 5 s after all of
//! them together.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile, Result,
    ServerClock, Snapshot, Ticket, Txn, Watch,
    discovery::{JsonRecords, Registry},
};
use tokio::task::JoinHandle;

mod change;
mod config;
mod connect;
mod departed;
mod error;
mod hub;
mod lease;
mod line;
mod link;
mod script;
mod sentinel;
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
    tasks: Vec<JoinHandle<()>>,
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
        quorate_tls::connect(config, error::NAME, config::PORT, Box::pin(Self::open(config))).await
    }

    async fn open(config: &Config) -> Result<Self> {
        let options = Options::new(config)?;
        let keys = Keys::new(&config.namespace, options.db);
        let profile = profile(&options);
        let connector = Connector::new(options, keys, Arc::new(Hub::new()));
        let server = Server::connect(connector).await?;
        let mut tasks = vec![tokio::spawn(server.clone().keep()), tokio::spawn(sweep::sweep(server.clone()))];
        if let Topology::Sentinel { master } = &server.connector.options.topology {
            tasks.push(tokio::spawn(server.clone().doubt(master.clone())));
        }
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
        clock: Some(Duration::from_micros(1)),
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

    async fn clock(&self) -> Result<ServerClock> {
        lease::clock(&self.server).await
    }

    fn registry(&self) -> Registry {
        Registry::Keys(&JsonRecords)
    }
}
