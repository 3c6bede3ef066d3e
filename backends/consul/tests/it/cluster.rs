//! Three servers, of which some die.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use quorate_consul::Consul;
use quorate_core::{Backend, Config, ErrorKind, Txn};
use quorate_testkit::servers::{self, Cluster, ConsulOptions};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use crate::common::{
    LONG, commit, config, entry, grant, join, keep, line, next_reset, put, raw_json, release, until_gone, value,
};

async fn cluster() -> (Cluster, Config) {
    let cluster = servers::Consul::cluster(ConsulOptions::default()).await.unwrap();
    let addrs = cluster.addrs().into_iter().map(|a| a.to_string());
    let config = Config::new("consul", addrs).with_namespace("app").unwrap();
    (cluster, config)
}

/// Repeats a call until it works, as the layers do; returns how long that took.
async fn until_it_works<T>(what: &str, mut call: impl AsyncFnMut() -> quorate_core::Result<T>) -> (T, Duration) {
    let began = Instant::now();
    loop {
        match timeout(Duration::from_secs(5), call()).await {
            Ok(Ok(value)) => return (value, began.elapsed()),
            other => assert!(began.elapsed() < LONG, "{what}: {:?}", other.map(|r| r.err())),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlives_the_leader_and_tokens_keep_rising() {
    let (cluster, all) = cluster().await;
    let leader = cluster.leader().await.unwrap();
    let follower = cluster.nodes().iter().find(|n| n.addr() != leader.addr()).unwrap();
    // The lease lives on a server that stays.
    let owner = Arc::new(Consul::connect(&config(follower.addr())).await.unwrap());
    let lease = grant(&owner, Duration::from_secs(30)).await;
    let keeper = keep(&owner, &lease, Duration::from_secs(1));
    commit(&owner, [put("a", "1", Some(&lease))]).await;
    let first = join(&owner, &line("a"), &lease).await;
    let second = join(&owner, &line("a"), &lease).await;

    let client = Arc::new(Consul::connect(&all).await.unwrap());
    let wait = until_gone(&client, &first.ticket);
    let mut watch = client.watch(&crate::common::all()).await.unwrap();
    next_reset(&mut watch).await;
    leader.kill().await.unwrap();
    let write = Txn { checks: Vec::new(), writes: vec![put("b", "1", None)] };
    let (_, took) = until_it_works("a write after the leader's death", async || client.commit(&write).await).await;
    println!("the first write {took:?} after the leader was killed");
    let (_, took) = until_it_works("a renewal", async || owner.renew(&lease).await).await;
    println!("the first renewal {took:?} later");
    assert!(value(&client, "a").await.is_some(), "the lease stands");
    let third = until_it_works("joining", async || client.enqueue(&entry(&line("a"), &lease)).await).await.0.unwrap();
    assert!(third.token > second.token && third.ahead == [second.ticket.clone()]);
    assert!(release(&owner, &first).await.applied);
    timeout(LONG, wait).await.unwrap().unwrap();

    leader.restart().await.unwrap();
    let back = Consul::connect(&config(leader.addr())).await.unwrap();
    until_it_works("a read through the server that came back", async || {
        back.look(&second.ticket, 1).await?.map_or_else(
            || Err(gone()),
            |place| {
                assert!(place.ahead.is_empty());
                Ok(())
            },
        )
    })
    .await;
    keeper.abort();
    owner.revoke(&lease).await.unwrap();
}

fn gone() -> quorate_core::Error {
    quorate_core::Error::new(ErrorKind::Backend, "look", "the ticket is gone")
}

/// An agent that is no server, as it runs beside applications.
struct ClientAgent {
    process: Child,
    addr: SocketAddr,
    _data: TempDir,
}

impl Drop for ClientAgent {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().ok();
    }
}

impl ClientAgent {
    async fn start(server: SocketAddr) -> Self {
        let member = raw_json(server, "/v1/agent/self").await["Member"]["Port"].as_u64().unwrap();
        let ports: Vec<u16> = {
            // Held until all are known, so that they differ.
            let held: Vec<_> = (0..2).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
            held.iter().map(|p| p.local_addr().unwrap().port()).collect()
        };
        let data = TempDir::new().unwrap();
        let settings = serde_json::json!({
            "node_name": "beside", "data_dir": data.path(), "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1",
            "ports": { "http": ports[0], "serf_lan": ports[1], "dns": -1, "grpc": -1 },
            "retry_join": [format!("127.0.0.1:{member}")], "disable_update_check": true, "log_level": "warn",
        });
        let file = data.path().join("agent.json");
        std::fs::write(&file, settings.to_string()).unwrap();
        let process = Command::new("sh")
            // The pipe closes when we end, however that happens, and the agent ends with it.
            .args(["-c", r#"consul agent -config-file "$0" & read -r _; kill -9 $!; wait"#])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let addr = SocketAddr::from(([127, 0, 0, 1], ports[0]));
        let agent = Self { process, addr, _data: data };
        until_it_works("the agent", async || Consul::connect(&config(addr)).await).await;
        agent
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_on_a_dead_agent_ends_in_time_and_not_before() {
    let server = crate::common::server().await;
    let agent = ClientAgent::start(server.addr()).await;
    let owner = Consul::connect(&config(agent.addr)).await.unwrap();
    let ttl = Duration::from_secs(12);
    let (sent, lease) = loop {
        let sent = Instant::now();
        // Until the new node is in the catalog.
        match owner.grant(ttl).await {
            Ok(lease) => break (sent, lease.id),
            Err(e) => assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}"),
        }
    };
    commit(&owner, [put("a", "1", Some(&lease))]).await;
    drop(agent);
    let observer = Consul::connect(&config(server.addr())).await.unwrap();
    while value(&observer, "a").await.is_some() {
        assert!(sent.elapsed() < 3 * ttl);
        sleep(Duration::from_millis(50)).await;
    }
    let ended = sent.elapsed();
    let health = raw_json(server.addr(), "/v1/health/node/beside").await;
    println!("a lease of {ttl:?} on a killed agent ended after {ended:?}");
    // With serfHealth among its checks it would have ended with that, while its holder could still trust it.
    assert_eq!(health[0]["Status"], "critical", "the servers had noticed: {health}");
    assert!(ended >= ttl, "{ended:?}");
    assert!(ended <= 2 * ttl + Duration::from_secs(2), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_applied_and_with_one_it_goes_on() {
    let (cluster, all) = cluster().await;
    let client = Consul::connect(&all).await.unwrap();
    commit(&client, [put("a", "1", None)]).await;
    let (stays, rest) = cluster.nodes().split_first().unwrap();
    for node in rest {
        node.kill().await.unwrap();
    }
    let alone = Config::new("consul", [stays.addr().to_string()]).with_namespace("app").unwrap();
    sleep(Duration::from_secs(4)).await;
    let e = Consul::connect(&alone).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    let write = Txn { checks: Vec::new(), writes: vec![put("a", "2", None)] };
    for _ in 0..5 {
        // A server without a leader holds a request for some seconds before it refuses.
        if let Ok(answer) = timeout(Duration::from_secs(10), client.commit(&write)).await {
            let kind = answer.unwrap_err().kind();
            assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::Ambiguous), "{kind}");
        }
    }
    for node in rest {
        node.launch().await.unwrap();
    }
    until_it_works("a write with the majority back", async || client.commit(&write).await).await;
    assert_eq!(value(&client, "a").await.unwrap().0, "2");
}
