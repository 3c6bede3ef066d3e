//! Three servers each of etcd, Consul and ZooKeeper, a primary with replica and Sentinels, and a Redis Cluster: under work, while
//! their servers are killed, stopped and restarted.

use quorate_integration_tests::clusters::under_all_blows;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_answers_nothing_wrong_whatever_happens_to_its_servers() {
    under_all_blows("etcd").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consul_answers_nothing_wrong_whatever_happens_to_its_servers() {
    under_all_blows("consul").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zookeeper_answers_nothing_wrong_whatever_happens_to_its_servers() {
    under_all_blows("zookeeper").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_with_sentinels_answers_nothing_that_it_does_not_declare() {
    under_all_blows("redis+sentinel").await;
}

/// What `min-replicas-to-write` costs and buys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_that_writes_nothing_without_a_replica_loses_less() {
    under_all_blows("careful").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_cluster_answers_nothing_that_it_does_not_declare() {
    under_all_blows("redis+cluster").await;
}
