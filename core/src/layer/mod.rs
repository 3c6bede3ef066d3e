//! Layers: behaviour that wraps any backend and is a backend itself.
//!
//! Promise: a layer changes when and how often a call is made, never what it means; it may be put around any
//! backend, in any order, more than once. The order that [`Stack::standard`] gives is trace ▸ metrics ▸ retry ▸
//! timeout ▸ limit: a retry sees each attempt's own time limit, and metrics see what the caller saw.
//!
//! A layer is one method, [`Wrap::call`]; the verbs are spelled out once, in [`Layered`].

mod chaos;
mod limit;
mod observe;
mod retry;
mod timeout;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;

pub use chaos::{Chaos, Fault, Rule};
pub use limit::Limit;
pub use observe::{Metrics, Trace};
pub use retry::Retry;
pub use timeout::Timeout;

use crate::{
    backend::{
        Backend, Commit, Enqueue, Entry, Lease, LeaseId, Line, Place, Profile, ServerClock, Snapshot, Ticket, Txn,
        Write,
    },
    discovery::{Catalog, Instance, Registry},
    error::Result,
    key::{Dir, KeyRange},
    watch::Watch,
};

/// A verb of the waist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each is the method of the same name")]
pub enum Verb {
    Grant,
    Renew,
    Revoke,
    Read,
    Commit,
    Watch,
    Enqueue,
    Look,
    Line,
    Gone,
    Clock,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Self; 11] = [
        Self::Grant,
        Self::Renew,
        Self::Revoke,
        Self::Read,
        Self::Commit,
        Self::Watch,
        Self::Enqueue,
        Self::Look,
        Self::Line,
        Self::Gone,
        Self::Clock,
    ];

    /// The method's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Renew => "renew",
            Self::Revoke => "revoke",
            Self::Read => "read",
            Self::Commit => "commit",
            Self::Watch => "watch",
            Self::Enqueue => "enqueue",
            Self::Look => "look",
            Self::Line => "line",
            Self::Gone => "gone",
            Self::Clock => "clock",
        }
    }

    /// Whether the verb may change the store.
    pub fn writes(self) -> bool {
        matches!(self, Self::Grant | Self::Renew | Self::Revoke | Self::Commit | Self::Enqueue)
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One call, as a layer sees it.
#[derive(Clone, Copy)]
pub struct Op<'a> {
    /// What is called.
    pub verb: Verb,
    /// What it is about: a key, a range, a line or a lease.
    pub subject: &'a (dyn fmt::Display + Sync),
    /// The backend's name.
    pub backend: &'static str,
    /// Whether the call may be made again although an earlier attempt may have been applied.
    pub repeatable: bool,
}

impl fmt::Debug for Op<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} on {}", self.verb.as_str(), self.subject, self.backend)
    }
}

/// What a layer does around a call.
pub trait Wrap: fmt::Debug + Send + Sync + 'static {
    /// Makes the call: never, once, or more often if `op` is repeatable or surely was not applied.
    ///
    /// # Cancel safety
    /// Dropping the future drops the call within.
    fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> impl Future<Output = Result<T>> + Send + 'a
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a;
}

/// A backend with a layer around it.
#[derive(Debug)]
pub struct Layered<W> {
    inner: Arc<dyn Backend>,
    name: &'static str,
    wrap: Arc<W>,
}

impl<W: Wrap> Layered<W> {
    /// Puts `wrap` around `inner`.
    pub fn new(inner: Arc<dyn Backend>, wrap: W) -> Self {
        let name = inner.profile().backend;
        Self { inner, name, wrap: Arc::new(wrap) }
    }

    fn op<'a>(&self, verb: Verb, subject: &'a (dyn fmt::Display + Sync)) -> Op<'a> {
        Op { verb, subject, backend: self.name, repeatable: true }
    }
}

#[async_trait]
impl<W: Wrap> Backend for Layered<W> {
    fn profile(&self) -> &Profile {
        self.inner.profile()
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        // Granting twice leaves a lease that nobody renews: it ends by itself.
        self.wrap.call(self.op(Verb::Grant, &"lease"), || self.inner.grant(ttl)).await
    }

    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        self.wrap.call(self.op(Verb::Renew, lease), || self.inner.renew(lease)).await
    }

    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        self.wrap.call(self.op(Verb::Revoke, lease), || self.inner.revoke(lease)).await
    }

    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        self.wrap.call(self.op(Verb::Read, range), || self.inner.read(range)).await
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        let op = Op { repeatable: repeatable(txn), ..self.op(Verb::Commit, txn) };
        self.wrap.call(op, || self.inner.commit(txn)).await
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        self.wrap.call(self.op(Verb::Watch, range), || self.inner.watch(range)).await
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        // The same place comes back, but a first attempt that is still on its way could land after the ticket of
        // the second was taken out again. Whoever repeats it must know that it was unsure: the lock does.
        let op = Op { repeatable: false, ..self.op(Verb::Enqueue, &entry.line) };
        self.wrap.call(op, || self.inner.enqueue(entry)).await
    }

    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        self.wrap.call(self.op(Verb::Look, ticket), || self.inner.look(ticket, depth)).await
    }

    async fn line(&self, line: &Dir) -> Result<Line> {
        self.wrap.call(self.op(Verb::Line, line), || self.inner.line(line)).await
    }

    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        self.wrap.call(self.op(Verb::Gone, ticket), || self.inner.gone(ticket)).await
    }

    async fn clock(&self) -> Result<ServerClock> {
        self.wrap.call(self.op(Verb::Clock, &"server"), || self.inner.clock()).await
    }

    fn registry(&self) -> Registry {
        match self.inner.registry() {
            Registry::Native(inner) => {
                Registry::Native(Arc::new(LayeredCatalog { inner, name: self.name, wrap: self.wrap.clone() }))
            }
            keys @ Registry::Keys(_) => keys,
        }
    }
}

/// A catalog with a layer around it: to the layer, its calls are the verbs that they stand for.
#[derive(Debug)]
struct LayeredCatalog<W> {
    inner: Arc<dyn Catalog>,
    name: &'static str,
    wrap: Arc<W>,
}

impl<W: Wrap> LayeredCatalog<W> {
    fn op<'a>(&self, verb: Verb, subject: &'a (dyn fmt::Display + Sync)) -> Op<'a> {
        Op { verb, subject, backend: self.name, repeatable: true }
    }
}

#[async_trait]
impl<W: Wrap> Catalog for LayeredCatalog<W> {
    async fn publish(&self, lease: &LeaseId, instance: &Instance) -> Result<()> {
        // As for a put: a first attempt that lands late could undo what came after. Whoever repeats it must know.
        let op = Op { repeatable: false, ..self.op(Verb::Commit, instance) };
        self.wrap.call(op, || self.inner.publish(lease, instance)).await
    }

    async fn withdraw(&self, lease: &LeaseId, instance: &Instance) -> Result<()> {
        self.wrap.call(self.op(Verb::Commit, instance), || self.inner.withdraw(lease, instance)).await
    }

    async fn find(&self, lease: &LeaseId, service: &str, id: &str) -> Result<Option<Entry>> {
        self.wrap.call(self.op(Verb::Read, &service), || self.inner.find(lease, service, id)).await
    }

    async fn watch(&self, service: &str) -> Result<Watch> {
        self.wrap.call(self.op(Verb::Watch, &service), || self.inner.watch(service)).await
    }
}

/// A transaction may be made twice if doing it twice is the same as once: one that writes nothing is, and as ticket
/// names are never used again, so is leaving; a put or a delete could undo what somebody else wrote in between.
fn repeatable(txn: &Txn) -> bool {
    let leaves_only = txn.writes.iter().all(|write| matches!(write, Write::Leave(_)));
    txn.writes.is_empty() || (txn.checks.is_empty() && leaves_only)
}

/// Puts layers around a backend, innermost first.
///
/// ```no_run
/// # use std::{sync::Arc, time::Duration};
/// # use quorate_core::{Backend, layer::{Retry, Stack, Timeout, Trace}};
/// # fn wrap(backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
/// Stack::new(backend).with(Timeout::new(Duration::from_secs(2))).with(Retry::default()).with(Trace).build()
/// # }
/// ```
#[derive(Debug)]
pub struct Stack(Arc<dyn Backend>);

impl Stack {
    /// Starts from a bare backend.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self(backend)
    }

    /// The layers every application wants: limit, timeout, retry, metrics, trace.
    #[must_use]
    pub fn standard(self, request_timeout: Duration) -> Self {
        let metrics = Metrics::new(self.0.profile().backend);
        self.with(Limit::default()).with(Timeout::new(request_timeout)).with(Retry::default()).with(metrics).with(Trace)
    }

    /// Adds a layer around what is there.
    #[must_use]
    pub fn with(self, wrap: impl Wrap) -> Self {
        Self(Arc::new(Layered::new(self.0, wrap)))
    }

    /// The finished backend.
    pub fn build(self) -> Arc<dyn Backend> {
        self.0
    }
}
