//! What things cost, in calls of the waist; the calls' own round trips are counted per backend.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate_core::{
    Coordinator, Result,
    layer::{Op, Stack, Verb, Wrap},
};
use tokio::time::sleep;

use super::{coord, coord_over, until_tickets};
use crate::{
    Clients,
    support::{QUIET, Running, SOON, cases, client, spawn, within},
};

cases!("cost":
    an_uncontended_acquire_is_one_call_and_a_release_is_one,
    a_try_is_one_call_when_it_wins,
    one_release_wakes_one_of_two_hundred_waiters,
);

/// Counts the calls that were made, and those that have returned.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counted {
    counts: Arc<Mutex<HashMap<Verb, (usize, usize)>>>,
}

impl Counted {
    pub(crate) fn calls(&self, verb: Verb) -> usize {
        self.counts.lock().expect("no poison").get(&verb).map_or(0, |c| c.0)
    }

    pub(crate) fn returned(&self, verb: Verb) -> usize {
        self.counts.lock().expect("no poison").get(&verb).map_or(0, |c| c.1)
    }

    pub(crate) fn reset(&self) {
        self.counts.lock().expect("no poison").clear();
    }

    /// Every call but those of the session's own life.
    pub(crate) fn work(&self) -> HashMap<Verb, usize> {
        let counts = self.counts.lock().expect("no poison");
        let of_sessions = [Verb::Grant, Verb::Renew, Verb::Revoke];
        counts.iter().filter(|(verb, _)| !of_sessions.contains(verb)).map(|(verb, c)| (*verb, c.0)).collect()
    }
}

impl Wrap for Counted {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        self.counts.lock().expect("no poison").entry(op.verb).or_default().0 += 1;
        let outcome = call().await;
        self.counts.lock().expect("no poison").entry(op.verb).or_default().1 += 1;
        outcome
    }
}

async fn counted(clients: &Arc<dyn Clients>) -> (Coordinator, Counted) {
    let counted = Counted::default();
    let backend = Stack::new(client(clients).await).with(counted.clone()).standard(Duration::from_secs(10)).build();
    let coord = coord_over(backend, Duration::from_secs(30));
    // The session and the first use of the name may cost more.
    coord.lock("job").acquire().await.expect("granted").release().await.expect("released");
    counted.reset();
    (coord, counted)
}

async fn an_uncontended_acquire_is_one_call_and_a_release_is_one(clients: Arc<dyn Clients>) {
    let (coord, counted) = counted(&clients).await;
    let guard = coord.lock("job").acquire().await.expect("granted");
    assert_eq!(counted.work(), HashMap::from([(Verb::Enqueue, 1)]));
    guard.release().await.expect("released");
    assert_eq!(counted.work(), HashMap::from([(Verb::Enqueue, 1), (Verb::Commit, 1)]));
}

async fn a_try_is_one_call_when_it_wins(clients: Arc<dyn Clients>) {
    let (coord, counted) = counted(&clients).await;
    let guard = coord.lock("job").try_acquire().await.expect("trying works").expect("free");
    assert_eq!(counted.work(), HashMap::from([(Verb::Enqueue, 1)]));
    drop(guard);
}

async fn one_release_wakes_one_of_two_hundred_waiters(clients: Arc<dyn Clients>) {
    const WAITERS: usize = 200;
    let holder = coord(&clients).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    let (coord, counted) = counted_waiters(&clients).await;
    let (tx, mut granted) = tokio::sync::mpsc::channel(WAITERS);
    let mut waiters: Vec<Running<()>> = Vec::new();
    for _ in 0..WAITERS {
        let (lock, tx) = (coord.lock("job"), tx.clone());
        waiters.push(spawn(async move {
            let guard = lock.acquire().await.expect("granted");
            tx.send(guard).await.expect("the case listens");
        }));
    }
    until_tickets(&holder, "job", WAITERS + 1).await;
    // Every waiter has settled: it waits and makes no call.
    crate::support::eventually("all wait", async || {
        let before = counted.calls(Verb::Gone);
        sleep(QUIET).await;
        before >= WAITERS && counted.calls(Verb::Gone) == before
    })
    .await;
    counted.reset();
    guard.release().await.expect("released");
    let next = within(SOON, "the first waiter", granted.recv()).await.expect("a waiter is left");
    sleep(QUIET).await;
    assert!(granted.try_recv().is_err(), "one release, one grant");
    assert_eq!(counted.returned(Verb::Gone), 1, "one release wakes one waiter");
    assert_eq!(counted.calls(Verb::Look), 1, "a hand-off is one notification and one look");
    drop(waiters);
    drop(next);
}

/// A counted client that has not touched the lock, whose holder is somebody else.
pub(super) async fn counted_waiters(clients: &Arc<dyn Clients>) -> (Coordinator, Counted) {
    let counted = Counted::default();
    let backend = Stack::new(client(clients).await).with(counted.clone()).standard(Duration::from_secs(20)).build();
    let coord = coord_over(backend, Duration::from_secs(60));
    coord.session().await.expect("a session");
    (coord, counted)
}
