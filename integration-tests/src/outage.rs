//! Servers that stop, restart and forget, and networks that break between client and server.
//!
//! Promise: every case has a server of its own, and breaks it for real.

use std::{sync::Arc, time::Duration};

use quorate::{Config, Coordinator, ErrorKind, KvEvent, LockGuard, kv::KvWatch};
use quorate_conformance::Outcome;
use quorate_testkit::proxy::{Direction, FaultProxy};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    cases,
    site::{Site, connect, connect_long},
};

cases!("outage":
    a_restarted_server_is_used_again_without_help,
    a_wiped_server_takes_the_locks_along_and_the_holder_learns_of_it,
    a_stopped_server_makes_guards_invalid_in_time_and_calls_end,
    connecting_to_nobody_ends_in_time_and_names_the_endpoint,
    a_dead_endpoint_among_several_is_avoided,
    a_waiter_survives_cut_connections,
    a_holder_that_hears_nothing_is_invalid_before_the_next_is_granted,
    a_write_whose_reply_is_lost_is_ambiguous,
    an_acquire_whose_reply_is_lost_leaves_no_second_ticket,
);

/// How long a client may need to find its server again after the server answers.
const RECOVERY: Duration = Duration::from_secs(20);

/// Repeats a write until it succeeds: how soon the client works again, without help.
async fn recovered(coord: &Coordinator, key: &str) -> Duration {
    let started = Instant::now();
    loop {
        match timeout(RECOVERY, coord.kv().put(key, "again")).await.expect("a call ends in time") {
            Ok(_) => return started.elapsed(),
            Err(error) => assert!(started.elapsed() < RECOVERY, "still failing: {error}"),
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Reads the watch until it shows the key, by a reset or a put.
async fn watched(watch: &mut KvWatch, key: &str) {
    let seen = async {
        loop {
            let shown = match watch.next().await.expect("the watch goes on") {
                KvEvent::Reset(entries) => entries.iter().any(|e| e.key == key),
                KvEvent::Put(entry) => entry.key == key,
                KvEvent::Delete { .. } | KvEvent::Interrupted(_) => false,
            };
            if shown {
                return;
            }
        }
    };
    timeout(RECOVERY, seen).await.unwrap_or_else(|_| panic!("the watch never showed {key}"));
}

/// Either the guard is still good and nobody else gets the lock, or it is not and somebody does. Where the profile
/// declares that a lease may end early, the two may overlap until the next renewal; the token rises all the same.
async fn settled(guard: &LockGuard, other: &Coordinator) -> Outcome {
    let limit = guard.session().ttl() + other.profile().expiry_lag + RECOVERY;
    let taken = timeout(limit, async {
        loop {
            match other.lock("job").try_acquire().await {
                Ok(Some(taken)) => return taken,
                _ if guard.is_held() => sleep(Duration::from_millis(100)).await,
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    });
    match taken.await {
        Ok(taken) => {
            let overlap = guard.is_held();
            assert!(taken.token() > guard.token());
            timeout(guard.session().ttl(), guard.lost())
                .await
                .expect("the old holder learns of it by its next renewal");
            taken.release().await.expect("released");
            match other.profile().early_end {
                Some(why) if overlap => Outcome::Refused(format!("two guards overlapped; declared: {why}")),
                _ => {
                    assert!(!overlap, "two guards are valid");
                    Outcome::Passed
                }
            }
        }
        Err(_) => {
            assert!(guard.is_held(), "the lock is held by nobody and given to nobody");
            Outcome::Passed
        }
    }
}

async fn a_restarted_server_is_used_again_without_help(site: Arc<Site>) -> Outcome {
    let config = site.config().with_session_ttl(Duration::from_secs(10));
    let (a, b) = (connect(&config).await, connect(&config).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let mut watch = b.kv().watch_prefix("").await.expect("watch");
    a.kv().put("before", "x").await.expect("put");
    watched(&mut watch, "before").await;
    site.server().restart().await.expect("the server restarts");
    let took = recovered(&b, "after").await;
    println!("      {}: writes work {took:?} after the restart", site.backend);
    watched(&mut watch, "after").await;
    recovered(&a, "a").await;
    settled(&guard, &b).await
}

async fn a_wiped_server_takes_the_locks_along_and_the_holder_learns_of_it(site: Arc<Site>) {
    let config = site.config().with_session_ttl(Duration::from_secs(6));
    let (a, b) = (connect(&config).await, connect(&config).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let mut watch = b.kv().watch_prefix("").await.expect("watch");
    a.kv().put("before", "x").await.expect("put");
    site.server().restart_wiped().await.expect("the server restarts");
    timeout(guard.session().ttl() + RECOVERY, guard.lost()).await.expect("the holder learns of the loss");
    assert!(!guard.is_held());
    recovered(&b, "after").await;
    assert!(b.kv().get("before").await.expect("get").is_none(), "the server was wiped");
    watched(&mut watch, "after").await;
    // New calls get a new session by themselves.
    let again = timeout(RECOVERY, async {
        loop {
            if let Ok(again) = a.lock("job").acquire().await {
                return again;
            }
            sleep(Duration::from_millis(100)).await;
        }
    });
    assert!(again.await.expect("the lock can be taken again").is_held());
}

async fn a_stopped_server_makes_guards_invalid_in_time_and_calls_end(site: Arc<Site>) {
    let config = site.config().with_timeouts(Duration::from_secs(2), Duration::from_secs(1));
    let coord = connect(&config).await;
    let guard = coord.lock("job").acquire().await.expect("granted");
    site.server().pause().await.expect("the server stops");
    let stopped = Instant::now();
    let deadline = guard.deadline();
    timeout(site.ttl() * 2, guard.lost()).await.expect("lost in time");
    assert!(stopped.elapsed() <= deadline - stopped + Duration::from_millis(200), "lost after its deadline");
    let call = timeout(Duration::from_secs(30), coord.kv().put("k", "v")).await.expect("the call ends");
    let kind = call.expect_err("nobody answers").kind();
    assert!(matches!(kind, ErrorKind::Ambiguous | ErrorKind::Unavailable), "{kind}");
    let call = timeout(Duration::from_secs(30), coord.kv().get("k")).await.expect("the call ends");
    assert_eq!(call.expect_err("nobody answers").kind(), ErrorKind::Unavailable);
    site.server().resume().await.expect("the server goes on");
    recovered(&coord, "after").await;
}

async fn connecting_to_nobody_ends_in_time_and_names_the_endpoint(site: Arc<Site>) {
    let mut config = site.config().with_timeouts(Duration::from_secs(2), Duration::from_secs(2));
    config.endpoints = vec![dead_endpoint()];
    let started = Instant::now();
    let error = quorate::connect_with(&config).await.expect_err("nobody is there");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&config.endpoints[0]), "{error}");
}

/// A port that was free a moment ago.
fn dead_endpoint() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").to_string()
}

async fn a_dead_endpoint_among_several_is_avoided(site: Arc<Site>) {
    let live = site.config();
    // First and last: wherever a client begins.
    for position in 0..2 {
        let mut config = site.config();
        config.endpoints = live.endpoints.clone();
        config.endpoints.insert(position, dead_endpoint());
        let coord = timeout(Duration::from_secs(10), connect(&config)).await.expect("connects in time");
        for i in 0..20 {
            let started = Instant::now();
            coord.kv().put("k", i.to_string()).await.expect("the live endpoint answers");
            assert!(started.elapsed() < Duration::from_secs(3), "call {i} took {:?}", started.elapsed());
        }
        coord.lock("job").acquire().await.expect("granted").release().await.expect("released");
    }
}

/// A proxy before the server, and the options to go through it.
pub(crate) async fn proxied(site: &Site, config: &Config) -> (FaultProxy, Config) {
    let upstream = config.endpoints[0].parse().expect("the launcher gives addresses");
    let proxy = FaultProxy::start(upstream).await.expect("a free port");
    let mut through = config.clone();
    through.endpoints = vec![proxy.addr().to_string()];
    assert!(site.is_ours());
    (proxy, through)
}

async fn a_waiter_survives_cut_connections(site: Arc<Site>) {
    let config = site.config().with_session_ttl(Duration::from_secs(10));
    let holder = connect_long(&config).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    let (proxy, through) = proxied(&site, &config).await;
    let waiter = connect(&through).await;
    let session = waiter.session().await.expect("a session");
    let lock = waiter.lock("job");
    let waiting = tokio::spawn(async move { lock.acquire().await });
    while holder.lock("job").status().await.expect("a look").waiting < 1 {
        sleep(Duration::from_millis(20)).await;
    }
    for _ in 0..3 {
        sleep(Duration::from_millis(300)).await;
        proxy.drop_connections().await;
    }
    sleep(Duration::from_secs(1)).await;
    assert!(session.is_live(), "a short cut is no loss");
    guard.release().await.expect("released");
    let granted = timeout(RECOVERY, waiting).await.expect("granted in time").expect("no panic").expect("granted");
    granted.release().await.expect("released");
}

async fn a_holder_that_hears_nothing_is_invalid_before_the_next_is_granted(site: Arc<Site>) {
    let config = site.config();
    let next = connect_long(&config).await;
    next.session().await.expect("a session");
    let (proxy, through) = proxied(&site, &config).await;
    let holder = connect(&through).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    // Requests still arrive, and renew; replies do not. Later nothing arrives.
    proxy.blackhole(Direction::ToClient);
    sleep(site.ttl() / 2).await;
    proxy.blackhole(Direction::ToServer);
    let limit = site.ttl() * 3 + next.profile().expiry_lag + RECOVERY;
    let granted = timeout(limit, next.lock("job").acquire()).await.expect("granted in time").expect("granted");
    assert!(!guard.is_held(), "two guards are valid");
    assert!(granted.token() > guard.token());
}

async fn a_write_whose_reply_is_lost_is_ambiguous(site: Arc<Site>) {
    let config = site.config().with_timeouts(Duration::from_secs(2), Duration::from_secs(1));
    let direct = connect_long(&config).await;
    let (proxy, through) = proxied(&site, &config).await;
    let coord = connect(&through).await;
    coord.kv().put("k", "before").await.expect("put");
    proxy.blackhole(Direction::ToClient);
    let error = coord.kv().put("k", "after").await.expect_err("no reply arrives");
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error}");
    assert!(error.to_string().contains("may have happened"), "{error}");
    let now = direct.kv().get("k").await.expect("get").expect("exists").value;
    assert_eq!(now, "after", "the request did arrive: the fault bites");
    proxy.heal().await;
    recovered(&coord, "k").await;
}

async fn an_acquire_whose_reply_is_lost_leaves_no_second_ticket(site: Arc<Site>) {
    let config = site.config().with_session_ttl(Duration::from_secs(20));
    let config = config.with_timeouts(Duration::from_secs(2), Duration::from_secs(1));
    let direct = connect_long(&config).await;
    let (proxy, through) = proxied(&site, &config).await;
    let coord = connect(&through).await;
    coord.lock("job").acquire().await.expect("granted").release().await.expect("released");
    proxy.blackhole(Direction::ToClient);
    let lock = coord.lock("job");
    let acquiring = tokio::spawn(async move { lock.acquire().await });
    while direct.lock("job").status().await.expect("a look").holder.is_none() {
        sleep(Duration::from_millis(20)).await;
    }
    sleep(Duration::from_millis(1500)).await;
    proxy.heal().await;
    let outcome = timeout(RECOVERY, acquiring).await.expect("the call ends").expect("no panic");
    if let Ok(guard) = outcome {
        let status = direct.lock("job").status().await.expect("a look");
        assert_eq!((status.holder.expect("held").token, status.waiting), (guard.token(), 0));
        guard.release().await.expect("released");
    }
    let free = timeout(RECOVERY, direct.lock("job").acquire()).await.expect("free in time").expect("granted");
    free.release().await.expect("released");
}
