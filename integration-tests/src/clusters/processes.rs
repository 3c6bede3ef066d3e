//! Clusters as processes of this machine.

use quorate::Config;
use quorate_testkit::servers::{self, Cluster, Persistence, RedisSentinel};

use super::{
    node,
    ring::{Ring, Shape, careful_lines},
};

pub(super) async fn start(name: &'static str) -> Result<Ring, String> {
    started(name).await.map_err(|e| e.to_string())
}

async fn started(name: &'static str) -> Result<Ring, servers::Error> {
    match name {
        "etcd" => servers::Etcd::cluster(servers::EtcdOptions::default()).await.map(|c| consensus(name, c)),
        "consul" => {
            let options = servers::ConsulOptions { connections: 2000, ..Default::default() };
            servers::Consul::cluster(options).await.map(|c| consensus(name, c))
        }
        "zookeeper" => {
            servers::ZooKeeper::cluster(servers::ZooKeeperOptions::default()).await.map(|c| consensus(name, c))
        }
        "redis+cluster" => {
            let cluster = servers::Redis::cluster(redis(name), true).await?;
            let config = Config::new(name, cluster.nodes().iter().map(|s| s.addr().to_string()));
            Ok(Ring::new(Shape::Slots, config, node::all(cluster.nodes()), cluster))
        }
        _ => {
            let set = servers::Redis::sentinel(redis(name)).await?;
            let config = Config::new("redis+sentinel", set.sentinels().iter().map(|s| s.addr().to_string()))
                .with_option("master", RedisSentinel::MASTER);
            Ok(Ring::new(Shape::Sentinel, config, node::all(set.data()), set))
        }
    }
}

fn redis(name: &str) -> servers::RedisOptions {
    let extra_lines = careful_lines(name).iter().map(|(option, value)| format!("{option} {value}")).collect();
    servers::RedisOptions { persistence: Persistence::Always, extra_lines, ..Default::default() }
}

fn consensus(scheme: &str, cluster: Cluster) -> Ring {
    let config = Config::new(scheme, cluster.addrs().iter().map(ToString::to_string));
    Ring::new(Shape::Consensus, config, node::all(cluster.nodes()), cluster)
}
