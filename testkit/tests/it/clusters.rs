//! Clusters: they form, survive one server, and get a new leader.

use std::net::SocketAddr;
use std::time::Duration;

use quorate_testkit::servers::{
    Cluster, Consul, ConsulOptions, Error, Etcd, EtcdOptions, Redis, RedisOptions, ZooKeeper, ZooKeeperOptions,
};
use tokio::time::{sleep, timeout};

use crate::common::{Outcome, http, say};

const PATIENCE: Duration = Duration::from_secs(30);

/// Kills the leader, waits for another, brings the first back, then stops and starts all.
async fn survives_its_leader(cluster: &Cluster) -> Outcome {
    assert_eq!(cluster.nodes().len(), 3);
    let first = cluster.leader().await?;
    first.kill().await?;
    let second = cluster.leader().await?;
    assert_ne!(first.name(), second.name());
    first.restart().await?;
    cluster.restart().await?;
    cluster.leader().await?;
    Ok(())
}

#[tokio::test]
async fn etcd_cluster_elects_another_leader_and_keeps_data() -> Outcome {
    let cluster = Etcd::cluster(EtcdOptions::default()).await?;
    let ask = async |addr: SocketAddr, path: &str, body: &str| say(addr, &http("POST", path, "", body), "").await;
    let put = r#"{"key":"a2V5","value":"dmFsdWU="}"#;
    ask(cluster.addrs()[0], "/v3/kv/put", put).await?;
    survives_its_leader(&cluster).await?;
    for addr in cluster.addrs() {
        let answer = ask(addr, "/v3/kv/range", r#"{"key":"a2V5"}"#).await?;
        assert!(answer.contains("dmFsdWU="), "{answer}");
    }
    let refused = cluster.nodes()[0].restart_wiped().await;
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
    cluster.restart_wiped().await?;
    let range = r#"{"key":"a2V5"}"#;
    let answer = ask(cluster.addrs()[1], "/v3/kv/range", range).await?;
    assert!(answer.contains("revision") && !answer.contains("dmFsdWU="));
    Ok(())
}

#[tokio::test]
async fn consul_cluster_elects_another_leader() -> Outcome {
    let cluster = Consul::cluster(ConsulOptions::default()).await?;
    survives_its_leader(&cluster).await
}

#[tokio::test]
async fn zookeeper_cluster_elects_another_leader_and_takes_an_empty_member_back() -> Outcome {
    let cluster = ZooKeeper::cluster(ZooKeeperOptions::default()).await?;
    survives_its_leader(&cluster).await?;
    cluster.nodes()[2].restart_wiped().await?;
    Ok(())
}

#[tokio::test]
async fn sentinels_replace_a_killed_primary() -> Outcome {
    let group = Redis::sentinel(RedisOptions::default()).await?;
    let first = group.primary().await?;
    assert_eq!(first.port(), group.data()[0].port());
    first.kill().await?;
    let replaced = async {
        loop {
            let primary = group.primary().await?;
            if primary.port() != first.port() && primary.is_leader().await? {
                return Ok::<_, Error>(());
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, replaced).await??;
    first.restart().await?;
    let demoted = async {
        while first.is_leader().await? {
            sleep(Duration::from_millis(50)).await;
        }
        Ok::<_, Error>(())
    };
    timeout(PATIENCE, demoted).await??;
    Ok(())
}

#[tokio::test]
async fn redis_cluster_promotes_the_replica_of_a_killed_primary() -> Outcome {
    let cluster = Redis::cluster(RedisOptions::default(), true).await?;
    assert_eq!(cluster.nodes().len(), 6);
    let (primary, replica) = (&cluster.nodes()[0], &cluster.nodes()[3]);
    assert!(!replica.is_leader().await?);
    primary.kill().await?;
    let promoted = async {
        while !replica.is_leader().await? {
            sleep(Duration::from_millis(50)).await;
        }
        Ok::<_, Error>(())
    };
    timeout(PATIENCE, promoted).await??;
    primary.restart().await?;
    Ok(())
}

#[tokio::test]
async fn redis_cluster_without_replicas_serves_again_after_a_restart() -> Outcome {
    let cluster = Redis::cluster(RedisOptions::default(), false).await?;
    let node = &cluster.nodes()[1];
    node.kill().await?;
    node.restart().await?;
    let answer = say(cluster.nodes()[0].addr(), b"CLUSTER INFO\r\n", "cluster_size").await?;
    assert!(answer.contains("cluster_state:ok"), "{answer}");
    Ok(())
}
