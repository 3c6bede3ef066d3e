//! Locks: taking, trying, giving back, looking, breaking.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    ErrorKind, MAX_NAME,
    layer::{Stack, Verb},
    lock::LockGuard,
};
use tokio::time::{Instant, sleep};

use super::{coord, coord_over, counting::Counted, tickets, until_tickets};
use crate::{
    Clients,
    support::{QUIET, SOON, cases, client, refused, spawn, within},
};

cases!("lock":
    a_lock_excludes_is_not_reentrant_and_can_be_taken_again,
    locks_of_other_names_are_independent,
    time_limits_are_kept_and_zero_is_one_attempt,
    bad_names_are_refused_before_anything_is_sent,
    hostile_lock_names_never_collide,
    of_concurrent_tries_exactly_one_wins_and_no_ticket_stays,
    a_refused_try_reserves_no_place,
    a_waiter_whose_time_is_up_leaves_the_line_clean,
    an_attempt_with_a_wait_gets_the_lock_when_it_is_freed,
    dropping_the_guard_releases,
    one_coordinator_holds_many_locks,
    release_while_somebody_waits_for_the_loss_is_no_loss,
    status_names_holder_token_and_waiters,
    an_unused_lock_has_no_holder_and_no_waiters,
    lock_records_are_not_listed_as_keys,
    nothing_stays_behind_when_a_lock_is_no_longer_used,
    protected_work_runs_to_its_end_while_the_lock_is_held,
    a_hundred_tasks_never_meet_inside_and_tokens_rise,
    a_hold_is_given_back_by_its_fence_from_elsewhere,
    several_locks_are_taken_together_or_not_at_all,
);

async fn a_lock_excludes_is_not_reentrant_and_can_be_taken_again(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("a free lock is granted");
    assert!(guard.is_held() && guard.check().is_ok());
    assert!(guard.deadline() > Instant::now());
    // L-G12, L-G25: also through the holder's own session.
    for other in [&a, &b] {
        assert!(other.lock("job").try_acquire().await.expect("trying works").is_none());
    }
    let first = guard.token();
    guard.release().await.expect("a held lock is released");
    let again = b.lock("job").try_acquire().await.expect("trying works").expect("a released lock is free");
    assert!(again.token() > first);
    again.release().await.expect("a held lock is released");
}

async fn locks_of_other_names_are_independent(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let _one = a.lock("one").acquire().await.expect("granted");
    let two = within(SOON, "another name", b.lock("two").acquire()).await.expect("granted");
    two.release().await.expect("released");
}

async fn time_limits_are_kept_and_zero_is_one_attempt(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let lock = b.lock("job");
    // The first use of a session or a name may take longer, so it is not what is timed.
    lock.acquire().await.expect("granted").release().await.expect("released");
    let _held = a.lock("job").acquire().await.expect("granted");
    for limit in [Duration::ZERO, Duration::from_millis(250)] {
        let started = Instant::now();
        assert!(lock.acquire_within(limit).await.expect("running out of time is no error").is_none());
        let took = started.elapsed();
        assert!(took >= limit && took < limit + Duration::from_secs(1), "{limit:?} took {took:?}");
    }
}

async fn bad_names_are_refused_before_anything_is_sent(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).build();
    let coord = coord_over(backend, SOON);
    for name in [String::new(), "x".repeat(MAX_NAME + 1), "é".repeat(MAX_NAME)] {
        let lock = coord.lock(&name);
        refused(coord.lock_all(["a", &name]).acquire().await, ErrorKind::InvalidInput, "one of several");
        refused(lock.try_acquire().await, ErrorKind::InvalidInput, "try_acquire");
        refused(lock.acquire().await, ErrorKind::InvalidInput, "acquire");
        refused(lock.acquire_within(Duration::from_secs(1)).await, ErrorKind::InvalidInput, "acquire_within");
        refused(lock.status().await, ErrorKind::InvalidInput, "status");
        refused(lock.break_holder().await, ErrorKind::InvalidInput, "break_holder");
    }
    refused(coord.lock_all([]).acquire().await, ErrorKind::InvalidInput, "no name at all");
    assert_eq!(Verb::ALL.map(|verb| counted.calls(verb)), [0; Verb::ALL.len()], "nothing was sent");
}

async fn hostile_lock_names_never_collide(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let long = "x".repeat(MAX_NAME);
    let names = [
        "a",
        "A",
        "a/",
        "/a",
        "a/b",
        "a//b",
        "a b",
        ".",
        "..",
        "a/..",
        "%2F",
        "a%2Fb",
        "\0",
        "\u{7f}",
        "\n",
        "é",
        "🦀",
        "\u{ffff}",
        "*",
        "?x=y#z",
        "zookeeper",
        "lock",
        "kv",
        &long,
    ];
    let mut guards = Vec::new();
    for name in names {
        let guard = coord.lock(name).try_acquire().await.unwrap_or_else(|e| panic!("{name:?}: {e}"));
        guards.push(guard.unwrap_or_else(|| panic!("{name:?} collides with one of the names before it")));
    }
    for name in names {
        assert!(coord.lock(name).try_acquire().await.expect("trying works").is_none(), "{name:?} is held");
    }
    for guard in guards {
        guard.release().await.expect("released");
    }
}

async fn of_concurrent_tries_exactly_one_wins_and_no_ticket_stays(clients: Arc<dyn Clients>) {
    let mut tries = Vec::new();
    for _ in 0..5 {
        let coord = coord(&clients).await;
        coord.session().await.expect("a session opens");
        tries.push(spawn(async move { coord.lock("job").try_acquire().await.expect("trying works") }));
    }
    let mut winners = Vec::new();
    for mut attempt in tries {
        winners.extend(attempt.soon("a try").await);
    }
    assert_eq!(winners.len(), 1, "exactly one try wins");
    let look = coord(&clients).await;
    assert_eq!(tickets(&look, "job").await, 1, "the losers left no ticket");
}

async fn a_refused_try_reserves_no_place(clients: Arc<dyn Clients>) {
    let (a, b, c) = (coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let held = a.lock("job").acquire().await.expect("granted");
    for _ in 0..3 {
        assert!(b.lock("job").try_acquire().await.expect("trying works").is_none());
    }
    held.release().await.expect("released");
    let taken = c.lock("job").try_acquire().await.expect("trying works");
    assert!(taken.is_some(), "refused tries must not delay the next");
}

async fn a_waiter_whose_time_is_up_leaves_the_line_clean(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let held = a.lock("job").acquire().await.expect("granted");
    assert!(b.lock("job").acquire_within(QUIET).await.expect("no error").is_none());
    until_tickets(&a, "job", 1).await;
    assert!(held.is_held());
    held.release().await.expect("released");
    assert!(b.lock("job").try_acquire().await.expect("trying works").is_some());
}

async fn an_attempt_with_a_wait_gets_the_lock_when_it_is_freed(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let held = a.lock("job").acquire().await.expect("granted");
    let mut waiting = spawn(async move { b.lock("job").acquire_within(SOON).await.expect("no error") });
    until_tickets(&a, "job", 2).await;
    held.release().await.expect("released");
    assert!(waiting.soon("the waiter").await.is_some());
}

async fn dropping_the_guard_releases(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    drop(a.lock("job").acquire().await.expect("granted"));
    drop(within(SOON, "the lock of a dropped guard", b.lock("job").acquire()).await.expect("granted"));
}

async fn one_coordinator_holds_many_locks(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let mut guards: Vec<LockGuard> = Vec::new();
    for i in 0..20 {
        guards.push(a.lock(&format!("job-{i}")).acquire().await.expect("granted"));
    }
    assert!(guards.iter().all(LockGuard::is_held), "a later lock must not cost an earlier one");
    assert!(b.lock("job-0").try_acquire().await.expect("trying works").is_none());
    for guard in guards {
        guard.release().await.expect("released");
    }
}

async fn release_while_somebody_waits_for_the_loss_is_no_loss(clients: Arc<dyn Clients>) {
    let a = coord(&clients).await;
    let guard = a.lock("job").acquire().await.expect("granted");
    {
        let lost = std::pin::pin!(guard.lost());
        assert!(tokio::time::timeout(QUIET, lost).await.is_err(), "nothing is lost while the lock is held");
    }
    within(SOON, "a release under watch", guard.release()).await.expect("released");
    sleep(QUIET).await;
    assert!(a.session().await.expect("a session").is_live());
}

async fn status_names_holder_token_and_waiters(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let waiting = spawn(async move { b.lock("job").acquire().await.expect("granted") });
    until_tickets(&a, "job", 2).await;
    let status = coord(&clients).await.lock("job").status().await.expect("a look");
    let holder = status.holder.expect("it is held");
    assert_eq!((holder.token, holder.owner.as_deref(), status.waiting), (guard.token(), Some("conformance"), 1));
    let age = holder.since.expect("our own ticket says since when").elapsed().unwrap_or_default();
    assert!(age < Duration::from_secs(60), "{age:?}");
    drop(waiting);
    until_tickets(&a, "job", 1).await;
}

async fn an_unused_lock_has_no_holder_and_no_waiters(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let status = coord.lock("never-used").status().await.expect("a look");
    assert_eq!((status.holder, status.waiting), (None, 0));
    assert!(coord.lock("never-used").break_holder().await.expect("nothing to break").is_none());
}

async fn lock_records_are_not_listed_as_keys(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    coord.kv().put("jobs/a", "1").await.expect("put");
    let _guard = coord.lock("jobs/a").acquire().await.expect("granted");
    let _other = coord.lock("jobs").acquire().await.expect("granted");
    let keys: Vec<_> = coord.kv().list("").await.expect("list").entries.into_iter().map(|e| e.key).collect();
    assert_eq!(keys, ["jobs/a"]);
}

async fn nothing_stays_behind_when_a_lock_is_no_longer_used(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    for _ in 0..10 {
        let guard = coord.lock("job").acquire().await.expect("granted");
        guard.release().await.expect("released");
    }
    assert_eq!(tickets(&coord, "job").await, 0);
    // L-G24: the next use makes whatever the server keeps per name anew.
    coord.lock("job").try_acquire().await.expect("trying works").expect("free").release().await.expect("released");
}

async fn protected_work_runs_to_its_end_while_the_lock_is_held(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let guard = coord.lock("job").acquire().await.expect("granted");
    let work = async {
        sleep(QUIET).await;
        42
    };
    assert_eq!(guard.protect(work).await.expect("not lost"), 42);
    guard.release().await.expect("released");
}

async fn a_hundred_tasks_never_meet_inside_and_tokens_rise(clients: Arc<dyn Clients>) {
    let inside = Arc::new(AtomicUsize::new(0));
    let tokens = Arc::new(std::sync::Mutex::new(Vec::new()));
    let coords = [coord(&clients).await, coord(&clients).await, coord(&clients).await, coord(&clients).await];
    let counter = coords[0].kv();
    counter.put("counter", "0").await.expect("put");
    let mut tasks = Vec::new();
    for i in 0..100 {
        let (coord, inside, tokens) = (coords[i % coords.len()].clone(), inside.clone(), tokens.clone());
        tasks.push(spawn(async move {
            let guard = coord.lock("job").acquire().await.expect("granted");
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two inside");
            tokens.lock().expect("no poison").push(guard.token());
            // Read, add one, write: loses counts unless the lock excludes.
            let now = coord.kv().get("counter").await.expect("get").expect("exists");
            let next: usize = std::str::from_utf8(&now.value).expect("digits").parse().expect("a number");
            // In one process nothing else would let the others in.
            tokio::task::yield_now().await;
            coord.kv().put("counter", (next + 1).to_string()).await.expect("put");
            assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1, "two inside");
            guard.release().await.expect("released");
        }));
    }
    for task in &mut tasks {
        within(Duration::from_secs(30), "100 tasks", &mut task.0).await.expect("no task fails");
    }
    assert_eq!(counter.get("counter").await.expect("get").expect("exists").value, "100");
    let tokens = tokens.lock().expect("no poison");
    assert!(tokens.windows(2).all(|pair| pair[0] < pair[1]), "tokens rise in the order of grants: {tokens:?}");
}

async fn a_hold_is_given_back_by_its_fence_from_elsewhere(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let fence = guard.fence();
    assert!(!b.lock("other").release_hold(&fence).await.expect("answered"), "a fence of another lock");
    assert!(b.lock("job").release_hold(&fence).await.expect("answered"));
    assert!(!b.lock("job").release_hold(&fence).await.expect("answered"), "it has ended already");
    let newer = b.lock("job").try_acquire().await.expect("trying works").expect("free");
    assert!(!a.lock("job").release_hold(&fence).await.expect("answered"), "an old fence frees nobody's newer lock");
    assert!(guard.release().await.is_err());
    newer.release().await.expect("released");
}

async fn several_locks_are_taken_together_or_not_at_all(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let blocker = b.lock("m").acquire().await.expect("granted");
    let all = a.lock_all(["z", "m", "a", "m"]);
    assert!(all.try_acquire().await.expect("trying works").is_none());
    assert!(all.acquire_within(QUIET).await.expect("no error").is_none());
    for free in ["a", "z"] {
        until_tickets(&b, free, 0).await;
    }
    blocker.release().await.expect("released");
    let guard = all.acquire().await.expect("granted");
    assert!(guard.is_held() && guard.tokens().len() == 3 && guard.fences().len() == 3);
    assert_eq!(guard.protect(async { 42 }).await.expect("not lost"), 42);
    // One of them is taken away: the others are released all the same, and the loss is told.
    let working = async { guard.protect(std::future::pending::<()>()).await };
    let breaking = async { b.lock("m").break_holder().await.expect("breaking works").expect("held") };
    let (stopped, _) = within(SOON, "the loss of one of them", futures_util::future::join(working, breaking)).await;
    refused(stopped, ErrorKind::SessionLost, "work under a broken lock");
    within(SOON, "the loss", guard.lost()).await;
    assert!(guard.release().await.is_err_and(|e| e.kind() == ErrorKind::SessionLost));
    for free in ["a", "m", "z"] {
        until_tickets(&b, free, 0).await;
    }
    refused(a.lock_all(["a", ""]).acquire().await, ErrorKind::InvalidInput, "a bad name among good ones");
    until_tickets(&b, "a", 0).await;
}
