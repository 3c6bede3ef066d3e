//! Cancellation: every public future is dropped after its n-th poll, for every n until it ends by itself.
//!
//! Promise: whatever the moment, no ticket stays in the store and the next acquire succeeds.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use futures_util::future::BoxFuture;
use quorate_core::{
    Backend, Coordinator, Session, SessionOptions,
    layer::{Chaos, Fault, Rule, Stack, Verb},
};

use super::{coord, coord_over, counting::Counted, until_tickets};
use crate::{
    Clients,
    support::{SOON, cases, client, within},
};

cases!("cancel":
    a_dropped_acquire_leaves_nothing,
    a_dropped_wait_leaves_nothing,
    a_dropped_try_leaves_nothing,
    a_dropped_refused_try_leaves_nothing,
    a_dropped_acquire_within_leaves_nothing,
    a_dropped_release_releases,
    a_dropped_first_acquire_leaves_no_second_session,
    other_dropped_calls_leave_a_coordinator_that_works,
);

/// More polls than any of these futures needs.
pub(super) const MOST: usize = 200;

/// Polls `work` up to `polls` times and drops it; the output if it ended by then.
pub(super) async fn poll_times<F: Future>(work: F, polls: usize) -> Option<F::Output> {
    let mut work = pin!(work);
    let mut left = polls;
    poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match work.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            // Polled again when it is woken, or after a while: a future that waits for somebody else to act is
            // dropped there, too.
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// The same for a future that may wait for ever.
pub(super) async fn poll_waiting<F: Future>(work: F, polls: usize) {
    let _ = tokio::time::timeout(Duration::from_millis(20), poll_times(work, polls)).await;
}

/// Drops what `make` makes after 1, 2, 3 … polls until it ends by itself or waits longer than `patience`. Each
/// time the output, if any, is judged and dropped; then so many tickets must be left that others hold.
async fn each_poll<T>(
    (coord, others): (&Coordinator, usize),
    patience: Duration,
    mut make: impl FnMut() -> BoxFuture<'static, T>,
    judge: fn(T),
) {
    for polls in 1..=MOST {
        let ended = tokio::time::timeout(patience, poll_times(make(), polls)).await;
        let done = !matches!(ended, Ok(None));
        if let Ok(Some(output)) = ended {
            judge(output);
        }
        until_tickets(coord, "job", others).await;
        if others == 0 {
            is_clean(coord).await;
        }
        if done {
            return;
        }
    }
    panic!("it did not end within {MOST} polls");
}

const SESSION: Duration = Duration::from_secs(30);

/// A client whose requests and replies take their time, so that a call can be dropped before, while and after
/// the server works on it, also where the server is this process.
pub(super) async fn slow(clients: &Arc<dyn Clients>) -> Arc<dyn Backend> {
    let always = |fault| Rule { fault, probability: 1.0, verbs: Vec::new() };
    let pause = Duration::from_millis(3);
    let rules = vec![always(Fault::Delay(pause)), always(Fault::DelayReply(pause))];
    super::standard(Stack::new(client(clients).await).with(Chaos::new(5, rules)).build())
}

pub(super) async fn slow_coord(clients: &Arc<dyn Clients>) -> Coordinator {
    coord_over(slow(clients).await, SESSION)
}

async fn is_clean(coord: &Coordinator) {
    until_tickets(coord, "job", 0).await;
    let guard = within(SOON, "the next acquire", coord.lock("job").acquire()).await.expect("granted");
    guard.release().await.expect("released");
}

fn boxed<T>(work: impl Future<Output = T> + Send + 'static) -> Pin<Box<dyn Future<Output = T> + Send>> {
    Box::pin(work)
}

async fn a_dropped_acquire_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let lock = a.lock("job");
    each_poll(
        (&b, 0),
        SOON,
        || {
            let lock = lock.clone();
            boxed(async move { lock.acquire().await.expect("granted") })
        },
        drop,
    )
    .await;
}

async fn a_dropped_wait_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let held = b.lock("job").acquire().await.expect("granted");
    let lock = a.lock("job");
    each_poll(
        (&b, 1),
        Duration::from_millis(300),
        || {
            let lock = lock.clone();
            boxed(async move { lock.acquire().await })
        },
        |guard| panic!("the lock is held by somebody else: {guard:?}"),
    )
    .await;
    held.release().await.expect("released");
    is_clean(&b).await;
}

async fn a_dropped_try_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let lock = a.lock("job");
    each_poll(
        (&b, 0),
        SOON,
        || {
            let lock = lock.clone();
            boxed(async move { lock.try_acquire().await.expect("trying works") })
        },
        drop,
    )
    .await;
}

async fn a_dropped_refused_try_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let held = b.lock("job").acquire().await.expect("granted");
    let lock = a.lock("job");
    each_poll(
        (&b, 1),
        SOON,
        || {
            let lock = lock.clone();
            boxed(async move { lock.try_acquire().await.expect("trying works") })
        },
        |guard| assert!(guard.is_none(), "the lock is held by somebody else"),
    )
    .await;
    held.release().await.expect("released");
}

async fn a_dropped_acquire_within_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let held = b.lock("job").acquire().await.expect("granted");
    let lock = a.lock("job");
    each_poll(
        (&b, 1),
        SOON,
        || {
            let lock = lock.clone();
            boxed(async move { lock.acquire_within(Duration::from_millis(200)).await.expect("no error") })
        },
        |guard| assert!(guard.is_none(), "the lock is held by somebody else"),
    )
    .await;
    held.release().await.expect("released");
    is_clean(&b).await;
}

async fn a_dropped_release_releases(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    for polls in 0..MOST {
        let guard = a.lock("job").acquire().await.expect("granted");
        let ended = poll_times(guard.release(), polls).await;
        is_clean(&b).await;
        if let Some(released) = ended {
            released.expect("released");
            return;
        }
    }
    panic!("a release did not end within {MOST} polls");
}

async fn a_dropped_first_acquire_leaves_no_second_session(clients: Arc<dyn Clients>) {
    let b = coord(&clients).await;
    for polls in 1..6 {
        let counted = Counted::default();
        let a = coord_over(Stack::new(slow(&clients).await).with(counted.clone()).build(), SESSION);
        drop(poll_times(a.lock("job").acquire(), polls).await);
        a.session().await.expect("a session");
        assert_eq!(counted.calls(Verb::Grant), 1, "the attempt of the dropped call is the one that is used");
        is_clean(&b).await;
        a.close().await.expect("closed");
    }
}

async fn other_dropped_calls_leave_a_coordinator_that_works(clients: Arc<dyn Clients>) {
    let a = coord(&clients).await;
    let session = a.session().await.expect("a session");
    for polls in 1..8 {
        let (lock, kv) = (a.lock("job"), a.kv());
        let second = SessionOptions { ttl: clients.ttl(), owner: "x".into() };
        drop(poll_times(Session::open(a.backend().clone(), &second), polls).await);
        drop(poll_times(lock.status(), polls).await);
        drop(poll_times(lock.break_holder(), polls).await);
        drop(poll_times(kv.get("k"), polls).await);
        drop(poll_times(kv.put("k", "x"), polls).await);
        drop(poll_times(kv.put_ephemeral(&session, "e", "x"), polls).await);
        drop(poll_times(kv.create("c", "x"), polls).await);
        drop(poll_times(kv.list(""), polls).await);
        drop(poll_times(kv.delete("k"), polls).await);
        drop(poll_times(kv.delete_prefix(""), polls).await);
        drop(poll_times(kv.txn().if_absent("t").put("t", "x").commit(), polls).await);
        if let Some(Ok(mut watch)) = poll_times(kv.watch_prefix(""), polls).await {
            poll_waiting(watch.next(), polls).await;
        }
        let guard = lock.acquire().await.expect("granted");
        poll_waiting(guard.lost(), polls).await;
        poll_waiting(guard.protect(std::future::pending::<()>()), polls).await;
        assert!(guard.is_held());
        guard.release().await.expect("released");
        is_clean(&a).await;
    }
}
