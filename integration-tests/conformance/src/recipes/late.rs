//! Requests that arrive late: after their sender gave them up, repeated them, and was done.
//!
//! Promise: such a request leaves no ticket that outlasts the aftershocks of its clean-up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use quorate_core::{
    Backend, Commit, Dir, Enqueue, Entry, Error, ErrorKind, KeyRange, Lease, LeaseId, Line, Place, Profile, Result,
    ServerClock, Snapshot, Ticket, Txn, Watch,
    discovery::{Catalog, Instance, Registry},
};
use tokio::time::{Instant, sleep};

use super::{coord, coord_over, standard, tickets};
use crate::{
    Clients,
    support::{cases, client, eventually},
};

cases!("late":
    a_join_that_lands_after_its_repetition_was_released_does_not_block_the_lock,
    a_join_that_lands_after_its_try_was_refused_does_not_block_the_lock,
    many_calls_given_up_at_once_do_not_choke_the_client,
);

/// How late.
const LATE: Duration = Duration::from_millis(600);

/// The next joins or commits are answered with doubt at once, and arrive at the server when nobody expects them any
/// more.
#[derive(Debug)]
pub(super) struct Slow {
    inner: Arc<dyn Backend>,
    joins: AtomicUsize,
    commits: Arc<AtomicUsize>,
    landed: Arc<AtomicUsize>,
}

impl Slow {
    async fn over(clients: &Arc<dyn Clients>, joins: usize) -> Arc<Self> {
        let (inner, joins) = (client(clients).await, AtomicUsize::new(joins));
        Arc::new(Self { inner, joins, commits: Arc::default(), landed: Arc::default() })
    }

    /// Publishing in a catalog counts as a commit.
    pub(super) async fn commits(clients: &Arc<dyn Clients>, commits: usize) -> Arc<Self> {
        let (inner, commits) = (client(clients).await, Arc::new(AtomicUsize::new(commits)));
        Arc::new(Self { inner, joins: AtomicUsize::default(), commits, landed: Arc::default() })
    }

    pub(super) fn landed(&self) -> usize {
        self.landed.load(Ordering::Acquire)
    }
}

fn one_of(next: &AtomicUsize) -> bool {
    next.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok()
}

#[async_trait]
impl Backend for Slow {
    fn profile(&self) -> &Profile {
        self.inner.profile()
    }
    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        self.inner.grant(ttl).await
    }
    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        self.inner.renew(lease).await
    }
    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        self.inner.revoke(lease).await
    }
    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        self.inner.read(range).await
    }
    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        if !one_of(&self.commits) {
            return self.inner.commit(txn).await;
        }
        let (inner, txn, landed) = (self.inner.clone(), txn.clone(), self.landed.clone());
        tokio::spawn(async move {
            sleep(LATE).await;
            let _ = inner.commit(&txn).await;
            landed.fetch_add(1, Ordering::AcqRel);
        });
        Err(Error::new(ErrorKind::Ambiguous, "commit", "given up on purpose"))
    }
    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        self.inner.watch(range).await
    }
    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        if !one_of(&self.joins) {
            return self.inner.enqueue(entry).await;
        }
        let (inner, entry, landed) = (self.inner.clone(), entry.clone(), self.landed.clone());
        tokio::spawn(async move {
            sleep(LATE).await;
            let _ = inner.enqueue(&entry).await;
            landed.fetch_add(1, Ordering::AcqRel);
        });
        Err(Error::new(ErrorKind::Ambiguous, "enqueue", "given up on purpose"))
    }
    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        self.inner.look(ticket, depth).await
    }
    async fn line(&self, line: &Dir) -> Result<Line> {
        self.inner.line(line).await
    }
    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        self.inner.gone(ticket).await
    }
    async fn clock(&self) -> Result<ServerClock> {
        self.inner.clock().await
    }
    fn registry(&self) -> Registry {
        match self.inner.registry() {
            Registry::Native(inner) => {
                let (commits, landed) = (self.commits.clone(), self.landed.clone());
                Registry::Native(Arc::new(SlowCatalog { inner, commits, landed }))
            }
            keys @ Registry::Keys(_) => keys,
        }
    }
}

#[derive(Debug)]
struct SlowCatalog {
    inner: Arc<dyn Catalog>,
    commits: Arc<AtomicUsize>,
    landed: Arc<AtomicUsize>,
}

#[async_trait]
impl Catalog for SlowCatalog {
    async fn publish(&self, lease: &LeaseId, instance: &Instance) -> Result<()> {
        if !one_of(&self.commits) {
            return self.inner.publish(lease, instance).await;
        }
        let (inner, lease, instance, landed) =
            (self.inner.clone(), lease.clone(), instance.clone(), self.landed.clone());
        tokio::spawn(async move {
            sleep(LATE).await;
            let _ = inner.publish(&lease, &instance).await;
            landed.fetch_add(1, Ordering::AcqRel);
        });
        Err(Error::new(ErrorKind::Ambiguous, "register", "given up on purpose"))
    }
    async fn withdraw(&self, lease: &LeaseId, instance: &Instance) -> Result<()> {
        self.inner.withdraw(lease, instance).await
    }
    async fn find(&self, lease: &LeaseId, service: &str, id: &str) -> Result<Option<Entry>> {
        self.inner.find(lease, service, id).await
    }
    async fn watch(&self, service: &str) -> Result<Watch> {
        self.inner.watch(service).await
    }
}

async fn a_join_that_lands_after_its_repetition_was_released_does_not_block_the_lock(clients: Arc<dyn Clients>) {
    let slow = Slow::over(&clients, 1).await;
    let (a, b) = (coord_over(standard(slow.clone()), Duration::from_secs(60)), coord(&clients).await);
    a.lock("job").acquire().await.expect("the repetition is granted").release().await.expect("released");
    assert_eq!(slow.landed(), 0, "void: the first attempt was not late");
    eventually("the first attempt lands", async || slow.landed() == 1).await;
    eventually("its ticket is taken out again", async || tickets(&b, "job").await == 0).await;
}

async fn a_join_that_lands_after_its_try_was_refused_does_not_block_the_lock(clients: Arc<dyn Clients>) {
    let slow = Slow::over(&clients, 1).await;
    let (a, b) = (coord_over(standard(slow.clone()), Duration::from_secs(60)), coord(&clients).await);
    let held = b.lock("job").acquire().await.expect("granted");
    assert!(a.lock("job").try_acquire().await.expect("trying works").is_none());
    assert_eq!(slow.landed(), 0, "void: the first attempt was not late");
    eventually("the first attempt lands", async || slow.landed() == 1).await;
    held.release().await.expect("released");
    eventually("its ticket is taken out again", async || tickets(&b, "job").await == 0).await;
}

/// More calls than the limit layer lets through are dropped while the server stalls; afterwards all is well.
async fn many_calls_given_up_at_once_do_not_choke_the_client(clients: Arc<dyn Clients>) {
    const CALLS: usize = 200;
    let always = |fault| quorate_core::layer::Rule { fault, probability: 1.0, verbs: Vec::new() };
    let stall = quorate_core::layer::Fault::Delay(Duration::from_millis(60));
    let stack = quorate_core::layer::Stack::new(client(&clients).await)
        .with(quorate_core::layer::Chaos::new(11, vec![always(stall)]))
        .with(quorate_core::layer::Limit::new(4))
        .build();
    let a = coord_over(stack, Duration::from_secs(60));
    a.session().await.expect("a session");
    let lock = a.lock("job");
    let calls = (0..CALLS).map(|_| lock.acquire_within(Duration::from_millis(10)));
    drop(futures_util::future::join_all(calls).await);
    let started = Instant::now();
    a.kv().put("k", "v").await.expect("the client works");
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let b = coord(&clients).await;
    let cleaned = Instant::now();
    while tickets(&b, "job").await > 0 {
        assert!(cleaned.elapsed() < Duration::from_secs(45), "the given-up calls left tickets");
        sleep(Duration::from_millis(100)).await;
    }
}
