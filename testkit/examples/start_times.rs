//! Starts every server and cluster one after another and prints how long each took until it was ready.

use std::future::Future;

use quorate_testkit::install::missing;
use quorate_testkit::servers::{
    Consul, ConsulOptions, Error, Etcd, EtcdOptions, Redis, RedisOptions, ZooKeeper, ZooKeeperOptions,
};
use tokio::time::Instant;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    for item in missing() {
        println!("missing: {}; {}", item.what, item.how());
    }
    let (redis, zookeeper) = (RedisOptions::default, ZooKeeperOptions::default);
    timed("etcd", Etcd::start(EtcdOptions::default())).await?;
    timed("Redis", Redis::start(redis())).await?;
    timed("Consul", Consul::start(ConsulOptions::default())).await?;
    timed("ZooKeeper", ZooKeeper::start(zookeeper())).await?;
    timed("etcd, 3 nodes", Etcd::cluster(EtcdOptions::default())).await?;
    timed("Redis Sentinel", Redis::sentinel(redis())).await?;
    timed("Redis Cluster 3", Redis::cluster(redis(), false)).await?;
    timed("Redis Cluster 3+3", Redis::cluster(redis(), true)).await?;
    timed("Consul, 3 nodes", Consul::cluster(ConsulOptions::default())).await?;
    timed("ZooKeeper, 3 nodes", ZooKeeper::cluster(zookeeper())).await
}

async fn timed<T>(name: &str, start: impl Future<Output = Result<T, Error>>) -> Result<(), Error> {
    let begin = Instant::now();
    let server = start.await?;
    println!("{name:18} {:6} ms", begin.elapsed().as_millis());
    drop(server);
    Ok(())
}
