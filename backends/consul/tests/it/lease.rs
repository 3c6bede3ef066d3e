//! Leases: what ends them, when, and what they leave behind.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    pin::pin,
    process::{Child, Command, Stdio},
    task::Poll,
    time::Duration,
};

use quorate_consul::Consul;
use quorate_core::{Backend, Config, ErrorKind, KeyRange, LeaseId};
use quorate_testkit::{
    proxy::FaultProxy,
    servers::{self, ConsulOptions},
};
use tokio::time::{Instant, sleep};

use crate::common::{
    assert_nothing_left, client, commit, config, entry, grant, join, keep, key, leftovers, line, put, raw, raw_json,
    server, until_gone, value,
};

/// The owner of a lease in a process of its own, killed without a word when dropped.
struct Owner(Child);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Owner {
    /// Starts it; it holds a key and a ticket when this returns.
    fn start(config: &Config, ttl: Duration) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture", "lease::owner_process"])
            .env("OWNER_ADDR", &config.endpoints[0])
            .env("OWNER_SESSION", config.extra.get("session").map_or("auto", String::as_str))
            .env("OWNER_TTL_MS", ttl.as_millis().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.contains("OWNER READY")), "the owner started");
        Self(child)
    }
}

#[test]
#[ignore = "not a test: the process that other tests kill"]
fn owner_process() {
    // `--ignored` runs by hand have no owner to be.
    let Ok(addr) = std::env::var("OWNER_ADDR") else { return };
    let ttl = Duration::from_millis(std::env::var("OWNER_TTL_MS").unwrap().parse().unwrap());
    let session = std::env::var("OWNER_SESSION").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = config(addr.parse().unwrap()).with_option("session", session).with_session_ttl(ttl);
        let client = Consul::connect(&config).await.unwrap();
        let lease = grant(&client, ttl).await;
        commit(&client, [put("owned", "1", Some(&lease))]).await;
        join(&client, &line("owned"), &lease).await;
        println!("OWNER READY");
        loop {
            sleep(ttl / 4).await;
            client.renew(&lease).await.unwrap();
        }
    });
}

/// Kills an owner and returns how long its key and its ticket stood after that.
async fn time_to_go(config: &Config, ttl: Duration) -> Duration {
    let observer = std::sync::Arc::new(Consul::connect(config).await.unwrap());
    let owner = Owner::start(config, ttl);
    // Somewhere in between renewals.
    sleep(ttl.mul_f64(1.3)).await;
    let ticket = observer.line(&line("owned")).await.unwrap().tickets.remove(0);
    let gone = until_gone(&observer, &ticket);
    sleep(Duration::from_millis(100)).await;
    assert!(!gone.is_finished());
    let killed = Instant::now();
    drop(owner);
    let gone = gone.await.unwrap();
    assert_eq!(value(&observer, "owned").await, None, "key and ticket go together");
    gone - killed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_owner_held_is_gone_within_its_ttl() {
    let server = server().await;
    for ttl in [1, 2, 4].map(Duration::from_secs) {
        let stood = time_to_go(&config(server.addr()), ttl).await;
        println!("agent check, ttl {ttl:?}: gone {stood:?} after kill -9");
        // The last renewal was up to a quarter of the TTL earlier.
        assert!(stood >= ttl.mul_f64(0.6), "{stood:?} is too early for a TTL of {ttl:?}");
        assert!(stood <= ttl + Duration::from_secs(1), "{stood:?} is too late for a TTL of {ttl:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_session_stands_for_up_to_twice_its_ttl() {
    let ttl = Duration::from_secs(2);
    let options = ConsulOptions { session_ttl_min: ttl, ..ConsulOptions::default() };
    let server = servers::Consul::start(options).await.unwrap();
    let config = config(server.addr()).with_option("session", "ttl").with_session_ttl(ttl);
    let stood = time_to_go(&config, ttl).await;
    println!("plain session, ttl {ttl:?}: gone {stood:?} after kill -9");
    let lag = client_profile_lag(&config).await;
    assert!(stood >= ttl && stood <= ttl + lag, "{stood:?}");
}

async fn client_profile_lag(config: &Config) -> Duration {
    Consul::connect(config).await.unwrap().profile().expiry_lag
}

#[tokio::test]
async fn revoking_leaves_neither_session_nor_service() {
    let server = server().await;
    let client = client(server.addr()).await;
    assert_eq!(leftovers(server.addr()).await, (0, 0), "connecting alone leaves nothing");
    let mut leases = Vec::new();
    for _ in 0..5 {
        leases.push(grant(&client, Duration::from_secs(5)).await);
    }
    assert_eq!(leftovers(server.addr()).await, (5, 5));
    for lease in &leases {
        client.revoke(lease).await.unwrap();
    }
    assert_eq!(leftovers(server.addr()).await, (0, 0));
    for lease in &leases {
        client.revoke(lease).await.unwrap();
        assert_eq!(client.renew(lease).await.unwrap_err().kind(), ErrorKind::SessionLost);
    }
}

#[tokio::test]
async fn a_dropped_grant_leaves_nothing_whenever_it_is_dropped() {
    let server = server().await;
    let client = client(server.addr()).await;
    let mut finished = false;
    for polls in 1.. {
        let mut grant = pin!(client.grant(Duration::from_secs(60)));
        let mut left = polls;
        let outcome = std::future::poll_fn(|cx| {
            left -= 1;
            match grant.as_mut().poll(cx) {
                Poll::Ready(lease) => Poll::Ready(Some(lease)),
                Poll::Pending if left == 0 => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            }
        });
        if let Some(lease) = outcome.await {
            client.revoke(&lease.unwrap().id).await.unwrap();
            finished = true;
            break;
        }
    }
    assert!(finished);
    // The TTL is a minute: what is gone before that was taken back, not expired.
    assert_nothing_left(server.addr()).await;
}

#[tokio::test]
async fn a_session_that_an_operator_destroys_is_lost_and_its_service_goes() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(30)).await;
    commit(&client, [put("a", "1", Some(&lease))]).await;
    raw(server.addr(), "PUT", &format!("/v1/session/destroy/{lease}"), "", "").await;
    assert_eq!(client.renew(&lease).await.unwrap_err().kind(), ErrorKind::SessionLost);
    assert_eq!(value(&client, "a").await, None);
    assert_nothing_left(server.addr()).await;
}

#[tokio::test]
async fn a_lease_whose_service_an_operator_removes_is_lost() {
    let server = server().await;
    let client = client(server.addr()).await;
    let lease = grant(&client, Duration::from_secs(30)).await;
    let services = raw_json(server.addr(), "/v1/agent/services").await;
    let service = services.as_object().unwrap().keys().next().unwrap().clone();
    raw(server.addr(), "PUT", &format!("/v1/agent/service/deregister/{service}"), "", "").await;
    assert_eq!(client.renew(&lease).await.unwrap_err().kind(), ErrorKind::SessionLost);
    assert_nothing_left(server.addr()).await;
}

#[tokio::test]
async fn another_client_can_renew_and_end_a_lease() {
    let server = server().await;
    let first = client(server.addr()).await;
    let lease = grant(&first, Duration::from_secs(2)).await;
    commit(&first, [put("a", "1", Some(&lease))]).await;
    drop(first);
    let second = client(server.addr()).await;
    for _ in 0..6 {
        assert_eq!(second.renew(&lease).await.unwrap(), Duration::from_secs(2));
        sleep(Duration::from_millis(700)).await;
    }
    assert!(value(&second, "a").await.is_some(), "renewed for twice its TTL");
    let third = client(server.addr()).await;
    third.revoke(&lease).await.unwrap();
    assert_eq!(value(&third, "a").await, None);
    assert_eq!(second.renew(&lease).await.unwrap_err().kind(), ErrorKind::SessionLost);
    assert_nothing_left(server.addr()).await;
}

#[tokio::test]
async fn a_renewal_without_an_answer_is_ambiguous_and_the_next_one_works() {
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let client = client(proxy.addr()).await;
    let lease = grant(&client, Duration::from_secs(30)).await;
    for request in ["/v1/session/renew", "/v1/agent/check/pass"] {
        proxy.cut_after_forward_of(request, 1);
        assert_eq!(client.renew(&lease).await.unwrap_err().kind(), ErrorKind::Ambiguous, "{request}");
        client.renew(&lease).await.unwrap();
    }
    assert_eq!(proxy.counters().answers_lost, 2);
    client.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn a_renewal_after_the_ttl_never_says_yes() {
    let server = server().await;
    let client = client(server.addr()).await;
    for late in [990, 1000, 1010, 1050] {
        let sent = Instant::now();
        let lease = grant(&client, Duration::from_secs(1)).await;
        commit(&client, [put("a", "1", Some(&lease))]).await;
        tokio::time::sleep_until(sent + Duration::from_millis(late)).await;
        match client.renew(&lease).await {
            // In time after all: then it must hold for another TTL.
            Ok(_) => {
                let end = Instant::now() + Duration::from_millis(800);
                while Instant::now() < end {
                    let found = client.read(&KeyRange::One(key("a"))).await.unwrap().entries;
                    assert!(!found.is_empty(), "renewed {late} ms after the grant and gone nevertheless");
                    sleep(Duration::from_millis(20)).await;
                }
                client.revoke(&lease).await.unwrap();
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::SessionLost),
        }
    }
    assert_nothing_left(server.addr()).await;
}

#[tokio::test]
async fn nothing_is_written_on_a_lease_that_never_was() {
    let server = server().await;
    let client = client(server.addr()).await;
    for id in ["", "nonsense", "../../x", "3764062a-9882-1bfd-aa62-187177c18cb0"] {
        let lease = LeaseId::new(id);
        let lost = Some(ErrorKind::SessionLost);
        assert_eq!(client.renew(&lease).await.err().map(|e| e.kind()), lost, "{id}");
        assert_eq!(client.enqueue(&entry(&line("a"), &lease)).await.err().map(|e| e.kind()), lost, "{id}");
        let write = quorate_core::Txn { checks: Vec::new(), writes: vec![put("a", "1", Some(&lease))] };
        assert_eq!(client.commit(&write).await.err().map(|e| e.kind()), lost, "{id}");
        client.revoke(&lease).await.unwrap();
    }
    assert!(client.line(&line("a")).await.unwrap().tickets.is_empty());
}

/// The service of a lease must not touch the health of the other services of the node.
#[tokio::test]
async fn a_dead_owner_takes_no_other_service_out_of_discovery() {
    let server = server().await;
    let addr: SocketAddr = server.addr();
    let (status, body) = raw(addr, "PUT", "/v1/agent/service/register", "", r#"{"Name":"web","Port":80}"#).await;
    assert_eq!(status, 200, "{body}");
    let client = client(addr).await;
    let lease = grant(&client, Duration::from_secs(1)).await;
    let ended = keep(&client, &lease, Duration::from_secs(3));
    ended.await.unwrap();
    let healthy = raw_json(addr, "/v1/health/service/web?passing").await;
    assert_eq!(healthy.as_array().unwrap().len(), 1);
}
