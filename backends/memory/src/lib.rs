//! In-process backend for quorate: the same contract with no server, and faults on request.
//!
//! Promise: what the docs of [`Backend`] say holds here exactly as it does on a server, on tokio's clock, so that
//! code written over quorate is tested without a server and, under `#[tokio::test(start_paused = true)]`, without
//! waiting. A lease ends at its deadline to the millisecond of tokio's timer: whoever waits is woken then, although
//! nothing else happens in the store.
//!
//! # Instances and clients
//! [`Memory::new`] makes a store of its own. `memory://name/namespace`, given to [`Memory::connect`], is a client of
//! the store called `name` in this process, which comes into being with its first client and ends with its last.
//! [`Memory::client`] is another client of the same store: as far from the first one as a second process would be.
//! The only options are those that every backend has; login, token and TLS mean nothing here and are ignored.
//!
//! ```
//! use std::time::Duration;
//! use quorate_core::Backend;
//! use quorate_memory::Memory;
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> quorate_core::Result<()> {
//! let alice = Memory::new();
//! let bob = alice.client();
//! let lease = alice.grant(Duration::from_secs(10)).await?;
//! assert_eq!(bob.renew(&lease.id).await?, Duration::from_secs(10));
//! tokio::time::advance(Duration::from_secs(10)).await;
//! assert!(bob.renew(&lease.id).await.is_err(), "nobody renewed it for ten seconds");
//! # Ok(())
//! # }
//! ```
//!
//! # Faults
//! What goes wrong between a client and a server can be made to happen, to one client at a time, through
//! [`Memory::faults`]; see [`Faults`].
//!
//! # Layout
//! A key is in the directory `<namespace>/<dir>`, a ticket in the line of that name. A ticket's name is its token in
//! decimal, a lease's name a number that is never used twice in a store.
//!
//! # Measured
//! Joining a free line and leaving it again costs about half a microsecond of one core, the making of both requests
//! included (`cargo run --release -p quorate-memory --example pair`). It takes no task, no timer and no thread.

mod faults;
mod line;
mod store;
mod txn;
mod watch;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Config, Dir, Enqueue, Error, ErrorKind, Fencing, KeyRange, Lease, LeaseId, Line, Place, Profile,
    Result, ServerClock, Snapshot, Ticket, Txn, Watch,
    discovery::{JsonRecords, Registry},
};
use tokio::time::sleep_until;

pub use quorate_core::layer::Verb;

pub use crate::faults::Faults;
use crate::{
    faults::{Link, Reply},
    store::{State, Store},
};

const MAX_VALUE: usize = 1 << 20;
const MAX_TXN: usize = 64;

const PROFILE: Profile = Profile {
    backend: "memory",
    fencing: Fencing::Process,
    consensus: false,
    linearizable_reads: true,
    early_end: None,
    interop: None,
    min_ttl: Duration::from_millis(1),
    max_ttl: Duration::from_secs(24 * 60 * 60),
    expiry_lag: Duration::ZERO,
    max_value: MAX_VALUE,
    max_txn: MAX_TXN,
    txn_leases: MAX_TXN,
    clock: Some(Duration::from_micros(1)),
};

/// The named stores of this process. A store is kept alive by its clients only.
static NAMED: Mutex<BTreeMap<String, Weak<Store>>> = Mutex::new(BTreeMap::new());

/// A client of a store in this process.
///
/// Dropping it is what the crash of a process is to a server: its watches end, its leases run out.
pub struct Memory {
    store: Arc<Store>,
    // Encoded, without a slash at either end; empty for the whole store.
    namespace: Arc<str>,
    link: Arc<Link>,
}

impl Memory {
    /// The first client of a new store, which has no name.
    #[expect(clippy::new_without_default, reason = "each one is a store of its own, which a default should not be")]
    pub fn new() -> Self {
        Self::of(Arc::new(Store::new()), "".into())
    }

    /// A client of the named store; see the crate's docs.
    ///
    /// # Errors
    /// `InvalidInput` if the configuration has an unknown option, or several hosts.
    pub async fn connect(config: &Config) -> Result<Self> {
        config.validate(&[])?;
        let [name] = &config.endpoints[..] else {
            return Err(Error::invalid("connect", "a store in memory has one name, not several hosts").on("memory"));
        };
        let mut named = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
        named.retain(|_, store| store.strong_count() > 0);
        let store = named.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
            let store = Arc::new(Store::new());
            named.insert(name.clone(), Arc::downgrade(&store));
            store
        });
        Ok(Self::of(store, config.namespace.as_str().into()))
    }

    /// Another client of the same store and namespace, with a connection, leases and faults of its own.
    #[must_use]
    pub fn client(&self) -> Self {
        Self::of(self.store.clone(), self.namespace.clone())
    }

    /// What can be made to go wrong for this client. The handle stays valid when the client is moved.
    pub fn faults(&self) -> Faults {
        Faults::new(&self.store, &self.link)
    }

    fn of(store: Arc<Store>, namespace: Arc<str>) -> Self {
        let link = Arc::new(Link::new(store.client_id()));
        Self { store, namespace, link }
    }

    fn path<'a>(&self, dir: &'a Dir) -> Cow<'a, str> {
        if self.namespace.is_empty() {
            Cow::Borrowed(dir.as_str())
        } else {
            Cow::Owned(format!("{}/{dir}", self.namespace))
        }
    }

    /// One call: faults first, then `work` in one step on the store as of now.
    async fn call<T>(
        &self,
        verb: Verb,
        subject: &(dyn fmt::Display + Sync),
        work: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        // Without this a loop over calls that never wait would starve every other task of its thread.
        tokio::task::coop::consume_budget().await;
        let reply = self.link.enter(verb).await.map_err(|e| e.key(subject).on("memory"))?;
        let answer = work(&mut self.store.lock()).map_err(|e| e.key(subject).on("memory"));
        match reply {
            Reply::Delivered => answer,
            Reply::Lost => Err(faults::unanswered(verb, "the reply was lost on request").key(subject).on("memory")),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.store.lock().end_watches_of(self.link.client);
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("namespace", &self.namespace).field("client", &self.link.client).finish()
    }
}

#[async_trait]
impl Backend for Memory {
    fn profile(&self) -> &Profile {
        &PROFILE
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        let ttl = ttl.clamp(PROFILE.min_ttl, PROFILE.max_ttl);
        self.call(Verb::Grant, &"a lease", |state| Ok(state.grant(ttl, self.link.client))).await
    }

    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        self.call(Verb::Renew, lease, |state| state.renew(lease).ok_or_else(|| lost("renew"))).await
    }

    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        self.call(Verb::Revoke, lease, |state| {
            state.revoke(lease);
            Ok(())
        })
        .await
    }

    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        let path = self.path(range.dir());
        self.call(Verb::Read, range, |state| Ok(state.read(&path, range))).await
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        txn::validate(txn)?;
        self.call(Verb::Commit, txn, |state| state.commit(&|dir| self.path(dir), txn)).await
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        let path = self.path(range.dir());
        self.call(Verb::Watch, range, |state| watch::open(&self.store, state, &self.link, &path, range)).await
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        if entry.value.len() > MAX_VALUE {
            return Err(too_large("enqueue", entry.value.len()).key(&entry.line));
        }
        let path = self.path(&entry.line);
        self.call(Verb::Enqueue, &entry.line, |state| state.enqueue(&path, entry).ok_or_else(|| lost("enqueue"))).await
    }

    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        let path = self.path(&ticket.line);
        self.call(Verb::Look, ticket, |state| Ok(state.look(&path, ticket, depth))).await
    }

    async fn line(&self, line: &Dir) -> Result<Line> {
        let path = self.path(line);
        self.call(Verb::Line, line, |state| Ok(state.line(&path, line))).await
    }

    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        let path = self.path(&ticket.line);
        let mut wait = self.call(Verb::Gone, ticket, |state| Ok(state.wait(&path, ticket))).await?;
        while let Some((left, deadline)) = wait {
            // Nobody else need be there to end the lease: whoever waits for it does. A renewal only moves the
            // deadline away, so one timer each TTL is enough.
            tokio::select! {
                () = left => {}
                () = sleep_until(deadline) => {}
            }
            self.link.up().await;
            wait = self.store.lock().wait(&path, ticket);
        }
        Ok(())
    }

    async fn clock(&self) -> Result<ServerClock> {
        self.call(Verb::Clock, &"server", |state| Ok(state.clock())).await
    }

    fn registry(&self) -> Registry {
        Registry::Keys(&JsonRecords)
    }
}

fn lost(operation: &'static str) -> Error {
    Error::new(ErrorKind::SessionLost, operation, "the lease has ended")
}

fn too_large(operation: &'static str, bytes: usize) -> Error {
    Error::invalid(operation, format!("the value has {bytes} bytes, at most {MAX_VALUE} are allowed")).on("memory")
}
