//! Sessions: renewal, states, the end, and what is owed.

use std::{sync::Arc, time::Duration};

use quorate_core::{
    ErrorKind, Session, SessionOptions, SessionState,
    layer::{Chaos, Fault, Rule, Stack, Verb},
};
use tokio::time::{Instant, sleep, timeout};

use super::{coord, coord_over, counting::Counted, short_coord, tickets};
use crate::{
    Clients,
    support::{QUIET, SOON, cases, client, refused, within},
};

cases!("session":
    all_locks_of_a_coordinator_share_one_session,
    renewals_come_at_a_third_of_the_ttl,
    closing_ends_everything_on_the_session_at_once,
    a_closed_coordinator_refuses_at_once,
    dropping_the_last_handle_closes,
    an_orphaned_lease_lives_to_its_ttl,
    states_are_told_once_each,
    an_overdue_renewal_is_told_and_taken_back,
    a_lost_session_stays_lost_and_later_calls_get_a_new_one,
    a_revoked_lease_is_noticed_by_its_session,
    a_ttl_of_zero_is_refused_and_a_short_one_is_raised,
    two_sessions_of_one_coordinator_live_apart,
    a_burst_of_first_calls_opens_one_session,
);

async fn all_locks_of_a_coordinator_share_one_session(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let (a, b) = (coord.lock("a").acquire().await, coord.lock("b").acquire().await);
    let (a, b) = (a.expect("granted"), b.expect("granted"));
    assert_eq!(a.session().lease(), b.session().lease());
    assert_eq!(coord.session().await.expect("a session").lease(), a.session().lease());
}

async fn renewals_come_at_a_third_of_the_ttl(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).build();
    let coord = coord_over(backend, clients.ttl());
    let session = coord.session().await.expect("a session");
    // Nobody reads the states: they must neither stop the renewals nor make them faster.
    let _unread = session.states();
    let ttls = 4;
    sleep(session.ttl() * ttls).await;
    assert!(session.is_live());
    let renewals = counted.calls(Verb::Renew);
    let least = usize::try_from(ttls * 2).expect("small");
    assert!(renewals >= least && renewals <= least * 3, "{renewals} renewals in {ttls} ttls");
}

async fn closing_ends_everything_on_the_session_at_once(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let session = a.session().await.expect("a session");
    a.kv().put_ephemeral(&session, "here", "x").await.expect("put");
    session.close().await.expect("closed");
    assert!(!guard.is_held() && session.state() == SessionState::Closed);
    drop(within(SOON, "the lock of a closed session", b.lock("job").acquire()).await.expect("granted"));
    assert!(b.kv().get("here").await.expect("get").is_none(), "ephemeral keys end with the session");
    refused(a.kv().put_ephemeral(&session, "here", "x").await, ErrorKind::SessionLost, "put on a closed session");
}

async fn a_closed_coordinator_refuses_at_once(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    coord.lock("job").acquire().await.expect("granted").release().await.expect("released");
    coord.close().await.expect("closed");
    let answers = async {
        refused(coord.session().await, ErrorKind::Unavailable, "session after close");
        refused(coord.lock("job").acquire().await, ErrorKind::Unavailable, "acquire after close");
        coord.close().await.expect("closing twice is no error");
    };
    within(Duration::from_secs(3), "calls on a closed coordinator", answers).await;
}

async fn dropping_the_last_handle_closes(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    drop(a);
    assert!(guard.is_held(), "a guard keeps its session");
    drop(guard);
    drop(within(SOON, "the lock of a dropped session", b.lock("job").acquire()).await.expect("granted"));
}

async fn an_orphaned_lease_lives_to_its_ttl(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let session = a.session().await.expect("a session");
    a.kv().put_ephemeral(&session, "here", "x").await.expect("put");
    let over = tokio::spawn({
        let session = session.clone();
        async move { session.lost().await }
    });
    let renewed = session.deadline() - session.ttl();
    session.orphan();
    within(Duration::from_secs(1), "the owner learns at once", over).await.expect("no panic");
    while Instant::now() < renewed + session.ttl() - Duration::from_millis(50) {
        // Looked at before the clock is asked: the TTL is a lower bound.
        let there = b.kv().get("here").await.expect("get").is_some();
        assert!(there || Instant::now() >= renewed + session.ttl(), "the lease ended before its TTL");
        sleep(session.ttl() / 20).await;
    }
}

async fn states_are_told_once_each(clients: Arc<dyn Clients>) {
    let coord = short_coord(&clients).await;
    let session = coord.session().await.expect("a session");
    let mut states = session.states();
    assert_eq!(states.next().await, Some(SessionState::Live));
    assert!(timeout(session.ttl(), states.next()).await.is_err(), "renewals that succeed change nothing");
    session.close().await.expect("closed");
    assert_eq!(within(SOON, "the end", states.next()).await, Some(SessionState::Closed));
    assert_eq!(states.next().await, None);
}

async fn an_overdue_renewal_is_told_and_taken_back(clients: Arc<dyn Clients>) {
    // One renewal in two fails: some are overdue, none of many in a row.
    let flaky = Rule { fault: Fault::Refuse, probability: 0.5, verbs: vec![Verb::Renew] };
    let backend = Stack::new(client(&clients).await).with(Chaos::new(3, vec![flaky])).build();
    let options = SessionOptions { ttl: clients.ttl().max(Duration::from_secs(2)), owner: "x".into() };
    let session = Session::open(backend, &options).await.expect("a session");
    let mut states = session.states();
    let mut seen = Vec::new();
    let watching = async {
        while let Some(state) = states.next().await {
            seen.push(state);
        }
    };
    let _ = timeout(session.ttl() * 5, watching).await;
    assert!(seen.contains(&SessionState::Suspect), "{seen:?}");
    assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "a state is told once: {seen:?}");
    assert!(seen.iter().filter(|s| **s == SessionState::Live).count() >= 2, "{seen:?}");
}

async fn a_lost_session_stays_lost_and_later_calls_get_a_new_one(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let old = a.session().await.expect("a session");
    let guard = a.lock("job").acquire().await.expect("granted");
    b.backend().revoke(old.lease()).await.expect("revoked");
    within(old.ttl() + SOON, "the loss", old.lost()).await;
    assert_eq!(old.state(), SessionState::Lost);
    let new = a.session().await.expect("a new session");
    assert_ne!(new.lease(), old.lease());
    assert!(!guard.is_held() && !old.is_live(), "what was lost stays lost");
    a.lock("job").acquire().await.expect("granted").release().await.expect("released");
}

async fn a_revoked_lease_is_noticed_by_its_session(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let session = a.session().await.expect("a session");
    b.backend().revoke(session.lease()).await.expect("revoked");
    // The next renewal tells, a third of the TTL later at the latest; a lost write tells at once.
    within(session.ttl() + Duration::from_secs(1), "the loss", session.lost()).await;
}

async fn a_ttl_of_zero_is_refused_and_a_short_one_is_raised(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let options = |ttl| SessionOptions { ttl, owner: "x".into() };
    refused(coord.open_session(&options(Duration::ZERO)).await, ErrorKind::InvalidInput, "a ttl of zero");
    let short = coord.profile().min_ttl / 2;
    let session = coord.open_session(&options(short)).await.expect("raised, not refused");
    assert!(session.ttl() >= coord.profile().min_ttl, "{:?}", session.ttl());
    assert_eq!(session.asked_ttl(), short, "what was asked for can be told from what was granted");
}

async fn two_sessions_of_one_coordinator_live_apart(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let options = SessionOptions { ttl: Duration::from_secs(30), owner: "second".into() };
    let second = coord.open_session(&options).await.expect("a session");
    let on_first = coord.lock("a").acquire().await.expect("granted");
    let on_second = coord.lock("b").on(&second).acquire().await.expect("granted");
    second.close().await.expect("closed");
    assert!(on_first.is_held() && !on_second.is_held());
    refused(coord.lock("b").on(&second).acquire().await, ErrorKind::SessionLost, "acquire on a closed session");
}

async fn a_burst_of_first_calls_opens_one_session(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let locks: Vec<_> = (0..20).map(|i| coord.lock(&format!("job-{i}"))).collect();
    let guards = futures_util::future::join_all(locks.iter().map(quorate_core::Lock::acquire)).await;
    let leases: std::collections::HashSet<_> =
        guards.iter().map(|g| g.as_ref().expect("granted").session().lease().clone()).collect();
    assert_eq!(leases.len(), 1);
    drop(guards);
    sleep(QUIET).await;
    assert_eq!(tickets(&coord, "job-0").await, 0);
}
