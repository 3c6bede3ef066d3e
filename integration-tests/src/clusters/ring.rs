//! The clusters, and what can be done to their servers.
//!
//! Promise: a blow says itself when it is over, with every server up again and ready.

use std::{any::Any, fmt, sync::Arc, time::Duration};

use quorate::Config;
use tokio::time::{Instant, sleep};

use super::{
    containers,
    node::{Cut, Node},
    processes,
    work::TTL,
};
use crate::server::Launcher;

/// How its servers make one coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Three servers of etcd, Consul or ZooKeeper.
    Consensus,
    /// A primary and a replica of Redis, with Sentinels.
    Sentinel,
    /// A Redis Cluster: three primaries, each with a replica.
    Slots,
}

/// A cluster of real servers. Dropping it ends them.
pub struct Ring {
    shape: Shape,
    config: Config,
    /// Those with data.
    nodes: Vec<Arc<dyn Node>>,
    /// In containers, which can be cut off.
    contained: bool,
    _all: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("shape", &self.shape).field("nodes", &self.nodes).finish_non_exhaustive()
    }
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
    /// The leader hears nothing of the other servers, while clients reach it as before: a minority of one.
    LeaderCutOff,
    /// Two of three, the leader among them, hear nothing of any other server: no majority is left, and clients reach all.
    MajorityCutOff,
    /// The leader hears nothing of anybody, and nobody of it.
    LeaderIsolated,
    /// One after another is stopped in order, and started again.
    RollingRestart,
}

impl Blow {
    fn cut(self) -> Option<Cut> {
        match self {
            Self::LeaderCutOff | Self::MajorityCutOff => Some(Cut::Servers),
            Self::LeaderIsolated => Some(Cut::Everybody),
            _ => None,
        }
    }

    /// How long it lasts. Who is cut off stays so for longer than a lease.
    pub fn away(self) -> Duration {
        if self.cut().is_some() { TTL * 3 / 2 } else { Duration::from_secs(3) }
    }
}

/// How long a replica may need to follow its primary again.
const IN_SYNC: Duration = Duration::from_secs(40);

impl Ring {
    /// Starts `etcd`, `consul`, `zookeeper`, `redis+sentinel`, `redis+cluster`, or `careful`: the former Redis, set to take no
    /// writes without a replica. As processes or in containers, as the environment says.
    ///
    /// # Errors
    /// How to get the servers, if they are missing, or what went wrong.
    pub async fn start(name: &'static str) -> Result<Self, String> {
        match Launcher::chosen() {
            Launcher::Process => processes::start(name).await,
            Launcher::Docker => containers::start(name).await,
        }
    }

    pub(super) fn new(shape: Shape, config: Config, nodes: Vec<Arc<dyn Node>>, all: impl Any + Send + Sync) -> Self {
        let config = config.with_namespace("app").expect("a good namespace");
        Self { shape, config, nodes, contained: false, _all: Box::new(all) }
    }

    pub(super) fn in_containers(self) -> Self {
        Self { contained: true, ..self }
    }

    /// Options to reach it, all endpoints named.
    pub fn config(&self) -> Config {
        self.config.clone()
    }

    /// What can be done to it. A primary and its replica have no majority to lose; Redis tells clients the addresses that its
    /// servers use, so that these are cut off from both or from none; and processes of one machine are never cut off.
    pub fn blows(&self) -> Vec<Blow> {
        let consensus = self.shape == Shape::Consensus;
        let mut blows = vec![Blow::FollowerKilled, Blow::LeaderKilled, Blow::LeaderPaused];
        if consensus {
            blows.push(Blow::MajorityKilled);
        }
        if self.contained {
            if consensus {
                blows.extend([Blow::LeaderCutOff, Blow::MajorityCutOff]);
            }
            blows.push(Blow::LeaderIsolated);
        }
        blows.push(Blow::RollingRestart);
        // To look at one of them: QUORATE_BLOWS=LeaderCutOff,LeaderIsolated
        if let Ok(only) = std::env::var("QUORATE_BLOWS") {
            blows.retain(|blow| only.split(',').any(|name| name == format!("{blow:?}")));
            assert!(!blows.is_empty(), "QUORATE_BLOWS={only} names nothing that can be done to {:?}", self.shape);
        }
        blows
    }

    async fn leader(&self) -> Arc<dyn Node> {
        let deadline = Instant::now() + IN_SYNC;
        loop {
            for node in &self.nodes {
                // Of several primaries, the one with keys.
                if node.leads().await
                    && (self.shape != Shape::Slots || !["", "0"].contains(&node.ask(&["DBSIZE"]).await.trim()))
                {
                    return Arc::clone(node);
                }
            }
            assert!(Instant::now() < deadline, "nobody leads: {self:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Strikes, and repairs what it broke. Returns when all servers are ready.
    ///
    /// # Panics
    /// If a server does not do as it is told.
    pub async fn strike(&self, blow: Blow) {
        if blow == Blow::RollingRestart {
            return self.rolling_restart().await;
        }
        let leader = self.leader().await;
        let others = || self.nodes.iter().filter(|node| node.name() != leader.name()).cloned();
        let struck: Vec<_> = match blow {
            // In a Redis Cluster a replica, which come last.
            Blow::FollowerKilled => others().next_back().into_iter().collect(),
            Blow::MajorityKilled | Blow::MajorityCutOff => others().chain([leader.clone()]).skip(1).collect(),
            _ => vec![leader.clone()],
        };
        for node in &struck {
            let done = match (blow, blow.cut()) {
                (_, Some(cut)) => node.cut_off(cut).await,
                (Blow::LeaderPaused, _) => node.pause().await,
                _ => node.kill().await,
            };
            done.unwrap_or_else(|e| panic!("{blow:?}: {e}"));
        }
        sleep(blow.away()).await;
        for node in &struck {
            let done = match (blow, blow.cut()) {
                (_, Some(_)) => node.rejoin().await,
                (Blow::LeaderPaused, _) => node.resume().await,
                _ => node.start().await,
            };
            done.unwrap_or_else(|e| panic!("after {blow:?}: {e}"));
        }
        for node in &struck {
            node.ready().await.unwrap_or_else(|e| panic!("after {blow:?}: {e}"));
        }
        self.in_sync().await;
    }

    async fn rolling_restart(&self) {
        for node in &self.nodes {
            node.stop().await.expect("stopped");
            sleep(Duration::from_millis(300)).await;
            node.start().await.expect("started");
            node.ready().await.expect("ready");
            sleep(Duration::from_secs(1)).await;
            self.in_sync().await;
        }
    }

    /// Waits until every replica of Redis follows its primary again, one that was a primary among them: nobody restarts the
    /// next server before that.
    async fn in_sync(&self) {
        let primaries = match self.shape {
            Shape::Consensus => return,
            Shape::Sentinel => 1,
            Shape::Slots => 3,
        };
        let deadline = Instant::now() + IN_SYNC;
        loop {
            let mut seen = Vec::new();
            for node in &self.nodes {
                seen.push(node.ask(&["INFO", "replication"]).await);
            }
            let lead = seen.iter().filter(|info| info.contains("role:master")).count();
            let follow = seen.iter().filter(|info| info.contains("master_link_status:up")).count();
            if lead == primaries && lead + follow == self.nodes.len() {
                return;
            }
            assert!(Instant::now() < deadline, "not in sync: {seen:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// How Redis differs from its defaults in every cluster, and what a careful one asks for besides.
pub(super) fn careful_lines(name: &str) -> &'static [(&'static str, &'static str)] {
    // Otherwise a replica that comes back waits five seconds for others to come back with it.
    let all = &[("repl-diskless-sync-delay", "0"), ("min-replicas-to-write", "1"), ("min-replicas-max-lag", "1")];
    if name == "careful" { all } else { &all[..1] }
}
