//! The clusters, and what can be done to their servers.
//!
//! Promise: a blow says itself when it is over, with every server up again and ready.

use std::{net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use quorate::Config;
use quorate_testkit::servers::{self, Cluster, Persistence, RedisCluster, RedisSentinel, Server};
use tokio::{process::Command, time::sleep};

/// A cluster of real servers.
#[derive(Debug)]
pub enum Ring {
    /// Three servers of etcd, Consul or ZooKeeper.
    Consensus(&'static str, Cluster),
    /// A primary, a replica and three Sentinels.
    Sentinel(RedisSentinel),
    /// Three primaries, each with a replica.
    Slots(RedisCluster),
}

/// What is done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// One that does not lead is killed, and started again.
    FollowerKilled,
    /// The leader, or the primary that has the data, is killed, and started again.
    LeaderKilled,
    /// The leader is stopped (SIGSTOP), and wakes up again.
    LeaderPaused,
    /// Two of three are killed, and started again: nothing can be written meanwhile.
    MajorityKilled,
    /// One after another is stopped in order, and started again.
    RollingRestart,
}

/// How long a killed or stopped server is away.
pub const AWAY: Duration = Duration::from_secs(3);

impl Ring {
    /// Starts `etcd`, `consul`, `zookeeper`, `redis+sentinel`, `redis+cluster`, or `careful`: the former Redis, set to take no
    /// writes without a replica.
    ///
    /// # Errors
    /// How to get the servers, if they are missing, or what went wrong.
    pub async fn start(name: &'static str) -> Result<Self, String> {
        // Otherwise a replica that comes back waits five seconds for others to come back with it.
        let mut extra_lines = vec!["repl-diskless-sync-delay 0".to_owned()];
        if name == "careful" {
            extra_lines.extend(["min-replicas-to-write 1".to_owned(), "min-replicas-max-lag 1".to_owned()]);
        }
        let redis = servers::RedisOptions { persistence: Persistence::Always, extra_lines, ..Default::default() };
        let started = match name {
            "etcd" => servers::Etcd::cluster(servers::EtcdOptions::default()).await.map(|c| Self::Consensus(name, c)),
            "consul" => {
                let options = servers::ConsulOptions { connections: 2000, ..Default::default() };
                servers::Consul::cluster(options).await.map(|c| Self::Consensus(name, c))
            }
            "zookeeper" => {
                let options = servers::ZooKeeperOptions::default();
                servers::ZooKeeper::cluster(options).await.map(|c| Self::Consensus(name, c))
            }
            "redis+sentinel" | "careful" => servers::Redis::sentinel(redis).await.map(Self::Sentinel),
            "redis+cluster" => servers::Redis::cluster(redis, true).await.map(Self::Slots),
            other => return Err(format!("{other} is no cluster")),
        };
        started.map_err(|e| e.to_string())
    }

    /// The name it was started by.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Consensus(name, _) => name,
            Self::Sentinel(_) => "redis+sentinel",
            Self::Slots(_) => "redis+cluster",
        }
    }

    /// Options to reach it, all endpoints named.
    pub fn config(&self) -> Config {
        let addrs: Vec<SocketAddr> = match self {
            Self::Consensus(_, cluster) => cluster.addrs(),
            Self::Sentinel(ring) => ring.sentinels().iter().map(|s| s.addr()).collect(),
            Self::Slots(ring) => ring.nodes().iter().map(|s| s.addr()).collect(),
        };
        let config = Config::new(self.name(), addrs.iter().map(SocketAddr::to_string));
        let config = config.with_namespace("app").expect("a good namespace");
        match self {
            Self::Sentinel(_) => config.with_option("master", RedisSentinel::MASTER),
            _ => config,
        }
    }

    /// What can be done to it: a primary and its replica have no majority to lose.
    pub fn blows(&self) -> Vec<Blow> {
        let all =
            [Blow::FollowerKilled, Blow::LeaderKilled, Blow::LeaderPaused, Blow::MajorityKilled, Blow::RollingRestart];
        let majority = matches!(self, Self::Consensus(..));
        all.into_iter().filter(|blow| majority || *blow != Blow::MajorityKilled).collect()
    }

    fn data(&self) -> &[Arc<Server>] {
        match self {
            Self::Consensus(_, cluster) => cluster.nodes(),
            Self::Sentinel(ring) => ring.data(),
            Self::Slots(ring) => ring.nodes(),
        }
    }

    async fn leader(&self) -> Arc<Server> {
        match self {
            Self::Consensus(_, cluster) => cluster.leader().await.expect("somebody leads"),
            Self::Sentinel(ring) => ring.primary().await.expect("there is a primary"),
            Self::Slots(ring) => loop {
                for node in ring.nodes() {
                    if has_the_data(node).await {
                        return node.clone();
                    }
                }
                sleep(Duration::from_millis(50)).await;
            },
        }
    }

    /// Strikes, and repairs what it broke. Returns when all servers are ready.
    pub async fn strike(&self, blow: Blow) {
        let leader = self.leader().await;
        let others = || self.data().iter().filter(|node| node.addr() != leader.addr()).cloned();
        let struck: Vec<_> = match blow {
            // In a Redis Cluster a replica, which come last.
            Blow::FollowerKilled => others().next_back().into_iter().collect(),
            Blow::LeaderKilled | Blow::LeaderPaused => vec![leader.clone()],
            Blow::MajorityKilled => others().chain([leader.clone()]).skip(1).collect(),
            Blow::RollingRestart => {
                for node in self.data() {
                    node.stop().await.expect("stopped");
                    sleep(Duration::from_millis(300)).await;
                    node.launch().await.expect("started");
                    node.wait_ready().await.expect("ready");
                    sleep(Duration::from_secs(1)).await;
                    self.in_sync().await;
                }
                return;
            }
        };
        for node in &struck {
            match blow {
                Blow::LeaderPaused => node.pause().expect("it runs"),
                _ => node.kill().await.expect("it runs"),
            }
        }
        sleep(AWAY).await;
        for node in &struck {
            match blow {
                Blow::LeaderPaused => node.resume().expect("it runs"),
                _ => node.launch().await.expect("started"),
            }
        }
        for node in &struck {
            node.wait_ready().await.expect("ready");
        }
        self.in_sync().await;
    }

    /// Waits until every replica of Redis follows its primary again: nobody restarts the next server before that.
    async fn in_sync(&self) {
        if matches!(self, Self::Consensus(..)) {
            return;
        }
        let limit = tokio::time::Instant::now() + Duration::from_secs(40);
        for node in self.data() {
            loop {
                let info = ask(node, &["INFO", "replication"]).await;
                if info.contains("role:master") || info.contains("master_link_status:up") {
                    break;
                }
                assert!(tokio::time::Instant::now() < limit, "{} is not in sync: {info}", node.name());
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Whether the node is a primary with keys.
async fn has_the_data(node: &Server) -> bool {
    if node.pid().is_none() {
        return false;
    }
    ask(node, &["ROLE"]).await.starts_with("master") && ask(node, &["DBSIZE"]).await.trim() != "0"
}

/// What a Redis answers; empty if it does not.
async fn ask(node: &Server, words: &[&str]) -> String {
    let mut command = Command::new("redis-cli");
    command.args(["-p", &node.port().to_string()]).args(words).stdin(Stdio::null());
    let output = tokio::time::timeout(Duration::from_secs(1), command.output()).await;
    output.ok().and_then(Result::ok).map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
}
