//! What the cases share: clients with a lease that is kept alive, and the verbs with their expected outcome.
//!
//! Promise: nothing here weakens an assertion; an error that a case did not ask for fails it.

use std::{fmt::Debug, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quorate_core::{
    Backend, Check, Commit, Dir, Enqueue, Entry, ErrorKind, Key, KeyRange, LeaseId, Nonce, Place, Result, Revision,
    Snapshot, Ticket, TicketKind, Txn, Write,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{Case, Clients, Outcome};

/// How long something may take that needs no lease to end. Only a broken backend, or a machine that stands
/// still, takes longer.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// How long a case watches that nothing happens.
pub(crate) const QUIET: Duration = Duration::from_millis(400);

/// How long after TTL and `expiry_lag` the end of a lease may be seen.
const TOLERANCE: Duration = Duration::from_secs(1);

/// The cases of one group, named by their functions.
// A macro because only a macro can take the name of a function.
macro_rules! cases {
    ($group:literal: $($case:ident),+ $(,)?) => {
        pub(crate) fn cases() -> Vec<$crate::Case> {
            vec![$($crate::support::case(stringify!($case), $group, |clients| {
                Box::pin(async move { $crate::Outcome::from($case(clients).await) })
            })),+]
        }
    };
}
pub(crate) use cases;

pub(crate) fn case(
    name: &'static str,
    group: &'static str,
    run: fn(Arc<dyn Clients>) -> BoxFuture<'static, Outcome>,
) -> Case {
    Case { name, group, run }
}

/// A task that ends with the value.
#[derive(Debug)]
pub(crate) struct Running<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Running<T> {
    /// The task's result, which must be there soon.
    pub(crate) async fn soon(&mut self, what: &str) -> T {
        match within(SOON, what, &mut self.0).await {
            Ok(value) => value,
            Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
            Err(e) => panic!("{what}: {e}"),
        }
    }
}

pub(crate) fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Running<T> {
    Running(tokio::spawn(work))
}

/// A lease that is renewed for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) id: LeaseId,
    _keeper: Running<()>,
}

pub(crate) async fn keep(backend: &Arc<dyn Backend>) -> Kept {
    let profile = backend.profile();
    let ttl = Duration::from_secs(30).clamp(profile.min_ttl, profile.max_ttl);
    let lease = backend.grant(ttl).await.expect("a lease is granted");
    let (id, backend) = (lease.id.clone(), backend.clone());
    let keeper = spawn(async move {
        loop {
            sleep(lease.ttl / 3).await;
            // A case may end its own lease; every other failure shows where the lease is used.
            if backend.renew(&lease.id).await.is_err_and(|e| e.kind() == ErrorKind::SessionLost) {
                return;
            }
        }
    });
    Kept { id, _keeper: keeper }
}

/// A client with a lease of its own that is kept alive.
#[derive(Debug)]
pub(crate) struct Actor {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) lease: Kept,
}

pub(crate) async fn client(clients: &Arc<dyn Clients>) -> Arc<dyn Backend> {
    clients.client().await.expect("a client connects")
}

pub(crate) async fn actor(clients: &Arc<dyn Clients>) -> Actor {
    let backend = client(clients).await;
    let lease = keep(&backend).await;
    Actor { backend, lease }
}

pub(crate) async fn actors<const N: usize>(clients: &Arc<dyn Clients>) -> [Actor; N] {
    let mut all = Vec::with_capacity(N);
    for _ in 0..N {
        all.push(actor(clients).await);
    }
    all.try_into().expect("N were made")
}

impl Actor {
    /// Joins the line at its end.
    pub(crate) async fn join(&self, line: &Dir) -> Place {
        self.enqueue(&self.entry(line)).await
    }

    /// What `join` sends; for cases that change something about it.
    pub(crate) fn entry(&self, line: &Dir) -> Enqueue {
        Enqueue {
            line: line.clone(),
            kind: TicketKind::Lock,
            lease: self.lease.id.clone(),
            nonce: Nonce::random(),
            value: Bytes::new(),
            depth: 1,
            when_free: false,
        }
    }

    pub(crate) async fn enqueue(&self, entry: &Enqueue) -> Place {
        let place = self.backend.enqueue(entry).await.expect("joining a line works");
        let place = place.expect("only `when_free` may answer with nothing");
        assert_eq!(place.ticket.line, entry.line);
        assert_eq!(place.ticket.kind, entry.kind);
        place
    }

    pub(crate) async fn look(&self, ticket: &Ticket, depth: usize) -> Place {
        let place = self.backend.look(ticket, depth).await.expect("looking works");
        let place = place.expect("the ticket stands");
        assert_eq!(&place.ticket, ticket);
        place
    }

    pub(crate) async fn leave(&self, ticket: &Ticket) {
        let left = commit(&self.backend, [], [Write::Leave(ticket.clone())]).await;
        assert!(left.applied, "leaving has no condition");
    }

    pub(crate) async fn tickets(&self, line: &Dir) -> Vec<Ticket> {
        self.backend.line(line).await.expect("a line can be listed").tickets
    }
}

pub(crate) fn dir(name: &str) -> Dir {
    Dir::new([name]).expect("a valid name")
}

pub(crate) fn kv() -> Dir {
    dir("kv")
}

pub(crate) fn key(name: &str) -> Key {
    Key::new(&kv(), name).expect("a valid name")
}

pub(crate) fn line(name: &str) -> Dir {
    Dir::new(["lock", name]).expect("a valid name")
}

/// Everything in the directory `kv`.
pub(crate) fn all() -> KeyRange {
    KeyRange::prefix(&kv(), "").expect("a valid prefix")
}

pub(crate) fn put(key: &Key, value: impl AsRef<[u8]>) -> Write {
    Write::Put { key: key.clone(), value: Bytes::copy_from_slice(value.as_ref()), lease: None }
}

pub(crate) fn put_on(lease: &LeaseId, key: &Key, value: impl AsRef<[u8]>) -> Write {
    Write::Put { key: key.clone(), value: Bytes::copy_from_slice(value.as_ref()), lease: Some(lease.clone()) }
}

pub(crate) fn unchanged(key: &Key, modified: Revision) -> Check {
    Check::Unchanged { key: key.clone(), modified }
}

pub(crate) fn standing(place: &Place) -> Check {
    Check::Standing { ticket: place.ticket.clone(), token: place.token }
}

pub(crate) fn txn(checks: impl IntoIterator<Item = Check>, writes: impl IntoIterator<Item = Write>) -> Txn {
    Txn { checks: checks.into_iter().collect(), writes: writes.into_iter().collect() }
}

/// A commit that must be answered; whether it was applied is up to the caller.
pub(crate) async fn commit(
    backend: &Arc<dyn Backend>,
    checks: impl IntoIterator<Item = Check>,
    writes: impl IntoIterator<Item = Write>,
) -> Commit {
    let answer = backend.commit(&txn(checks, writes)).await.expect("a commit is answered");
    assert_eq!(answer.applied, answer.culprit.is_none(), "a culprit is named exactly if nothing was applied");
    answer
}

/// A commit without conditions; returns its revision.
pub(crate) async fn write(backend: &Arc<dyn Backend>, writes: impl IntoIterator<Item = Write>) -> Revision {
    let answer = commit(backend, [], writes).await;
    assert!(answer.applied, "a commit without checks is applied");
    answer.revision
}

pub(crate) async fn read(backend: &Arc<dyn Backend>, range: &KeyRange) -> Snapshot {
    let snapshot = backend.read(range).await.expect("reading works");
    assert_ordered(range, &snapshot);
    snapshot
}

pub(crate) fn assert_ordered(range: &KeyRange, snapshot: &Snapshot) {
    for pair in snapshot.entries.windows(2) {
        assert!(pair[0].key.encoded() < pair[1].key.encoded(), "entries are in order of their encoded names");
    }
    for entry in &snapshot.entries {
        assert!(entry.key.dir() == range.dir() && range.matches(entry.key.encoded()), "{} is not asked for", entry.key);
        assert!(entry.created.0 > 0 && entry.created <= entry.modified, "{entry:?}");
        assert!(entry.modified <= snapshot.revision, "the snapshot's revision covers every entry: {snapshot:?}");
    }
}

pub(crate) async fn get(backend: &Arc<dyn Backend>, key: &Key) -> Option<Entry> {
    let mut snapshot = read(backend, &KeyRange::One(key.clone())).await;
    assert!(snapshot.entries.len() <= 1, "one key, one entry");
    snapshot.entries.pop()
}

pub(crate) async fn value(backend: &Arc<dyn Backend>, key: &Key) -> Option<Bytes> {
    get(backend, key).await.map(|entry| entry.value)
}

/// Asserts that the call was refused with this kind.
#[track_caller]
pub(crate) fn refused<T: Debug>(answer: Result<T>, kind: ErrorKind, what: &str) {
    match answer {
        Ok(value) => panic!("{what} must fail with {kind}, but gave {value:?}"),
        Err(e) => assert_eq!(e.kind(), kind, "{what} failed with {e:?}"),
    }
}

pub(crate) async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
    match timeout(limit, work).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {limit:?}"),
    }
}

/// Polls `work` at most so many times, waiting for its wake-ups in between, and drops it.
pub(crate) async fn poll_and_drop<T>(polls: usize, mut work: BoxFuture<'_, T>) {
    let mut left = polls;
    poll_fn(|cx| {
        if left == 0 || work.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        left -= 1;
        if left == 0 { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Reads until the condition holds: for what another client wrote, where reads are not linearizable.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < SOON, "{what} did not come true within {SOON:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits as a recipe does: until the ticket is out of its line, looking again after each wake-up.
pub(crate) async fn until_gone(backend: Arc<dyn Backend>, ticket: Ticket) {
    let mut early = 0;
    loop {
        backend.gone(&ticket).await.expect("waiting for a ticket works");
        if backend.look(&ticket, 1).await.expect("looking works").is_none() {
            return;
        }
        early += 1;
        assert!(early <= 10, "`gone` returns again and again while the ticket stands");
    }
}

/// When a lease that is no longer renewed may end, and must have ended.
#[derive(Debug)]
pub(crate) struct Expiry {
    not_before: Instant,
    by: Instant,
}

impl Expiry {
    /// For a lease that was granted or renewed last by a call sent at `sent` and answered just now.
    pub(crate) fn after(backend: &Arc<dyn Backend>, sent: Instant, ttl: Duration) -> Self {
        Self { not_before: sent + ttl, by: Instant::now() + ttl + backend.profile().expiry_lag + TOLERANCE }
    }

    /// Longest wait for the end of the lease, with some more so that lateness is seen as such.
    pub(crate) fn patience(&self) -> Duration {
        self.by.saturating_duration_since(Instant::now()) + SOON
    }

    /// Asserts that what stood on the lease could be seen to be gone just now.
    #[track_caller]
    pub(crate) fn assert_now(&self, what: &str) {
        let now = Instant::now();
        let early = self.not_before.saturating_duration_since(now);
        assert!(early.is_zero(), "{what} ended {early:?} before the lease's TTL was over");
        let late = now.saturating_duration_since(self.by);
        assert!(late.is_zero(), "{what} ended {late:?} after TTL, expiry_lag and {TOLERANCE:?}");
    }
}

/// A lease with the short TTL that nobody renews, and when it will end.
pub(crate) async fn short(clients: &Arc<dyn Clients>, backend: &Arc<dyn Backend>) -> (LeaseId, Expiry) {
    let sent = Instant::now();
    let lease = backend.grant(clients.ttl()).await.expect("a lease is granted");
    let expiry = Expiry::after(backend, sent, lease.ttl);
    (lease.id, expiry)
}

/// For cases that need transactions of `needed` checks and writes: `Some` if the profile declares less, after
/// asserting that such a transaction is in fact refused.
pub(crate) async fn txn_too_large(backend: &Arc<dyn Backend>, needed: usize) -> Option<Outcome> {
    let most = backend.profile().max_txn;
    if needed <= most {
        return None;
    }
    let writes = (0..needed).map(|i| put(&key(&format!("too-many-{i}")), "x"));
    let e = backend.commit(&txn([], writes)).await.expect_err("more than max_txn must be refused");
    assert!(matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported), "{e:?}");
    Some(Outcome::Refused(format!("max_txn is {most}, the case needs {needed}")))
}
