//! The same clusters in containers, set up as the processes are.

use std::{sync::Arc, time::Duration};

use quorate::Config;
use quorate_testcontainers::Kind;
use tokio::time::{Instant, sleep};

use super::{
    contained::{Contained, Net, Networks, Program},
    node::Node,
    ring::{Ring, Shape, careful_lines},
};

const MASTER: &str = "mymaster";
/// Of a Redis Cluster to be formed, or of Sentinels to find each other.
const FORMED_WITHIN: Duration = Duration::from_secs(60);

pub(super) async fn start(name: &'static str) -> Result<Ring, String> {
    let networks = Networks::create().await?;
    match name {
        "etcd" => consensus(name, Kind::Etcd, &networks, etcd).await,
        "consul" => consensus(name, Kind::Consul, &networks, consul).await,
        "zookeeper" => consensus(name, Kind::ZooKeeper, &networks, zookeeper).await,
        "redis+cluster" => slots(name, &networks).await,
        _ => sentinel(name, &networks).await,
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn etcd(networks: &Networks, number: usize) -> Program {
    let peers: Vec<_> = (1..=3).map(|i| format!("etcd{i}=http://{}:2380", networks.address(Net::Servers, i))).collect();
    let command = words(&format!(
        "etcd --name=etcd{number} --data-dir=/var/lib/etcd/quorate --listen-client-urls=http://0.0.0.0:2379 \
         --advertise-client-urls=http://{client}:2379 --listen-peer-urls=http://0.0.0.0:2380 \
         --initial-advertise-peer-urls=http://{peer}:2380 --initial-cluster={peers} --heartbeat-interval=50 \
         --election-timeout=250 --logger=zap --log-level=warn",
        client = networks.address(Net::Clients, number),
        peer = networks.address(Net::Servers, number),
        peers = peers.join(","),
    ));
    Program { name: format!("etcd{number}"), command, ..Program::default() }
}

fn consul(networks: &Networks, number: usize) -> Program {
    let mut command = words(&format!(
        "consul agent -server -client=0.0.0.0 -data-dir=/consul/data -log-level=warn -bootstrap-expect=3 \
         -node=consul{number} -bind={} -retry-interval=500ms",
        networks.address(Net::Servers, number)
    ));
    command.extend((1..=3).map(|i| format!("-retry-join={}", networks.address(Net::Servers, i))));
    let settings = "performance { raft_multiplier = 1 } limits { http_max_conns_per_client = 4000 } \
                    disable_update_check = true leave_on_terminate = false";
    command.push(format!("-hcl={settings}"));
    Program { name: format!("consul{number}"), command, ..Program::default() }
}

fn zookeeper(networks: &Networks, number: usize) -> Program {
    let mut settings = "tickTime=500\ninitLimit=20\nsyncLimit=10\ndataDir=/data\nclientPort=2181\nmaxClientCnxns=0\n\
                        admin.enableServer=false\n4lw.commands.whitelist=srvr\nquorumListenOnAllIPs=true\n"
        .to_owned();
    for i in 1..=3 {
        settings += &format!("server.{i}={}:2888:3888\n", networks.address(Net::Servers, i));
    }
    let environment =
        vec![format!("ZOO_MY_ID={number}"), "JVMFLAGS=-Xmx96m -Dzookeeper.extendedTypesEnabled=true".to_owned()];
    let file = Some(("/conf/zoo.cfg", settings));
    Program { name: format!("zookeeper{number}"), environment, file, ..Program::default() }
}

async fn consensus(
    scheme: &str,
    kind: Kind,
    networks: &Arc<Networks>,
    program: impl Fn(&Networks, usize) -> Program,
) -> Result<Ring, String> {
    let mut nodes: Vec<Arc<dyn Node>> = Vec::new();
    for number in 1..=3 {
        nodes.push(networks.start(kind, number, program(networks, number), true).await?);
    }
    for node in &nodes {
        node.ready().await?;
    }
    let port = match kind {
        Kind::Etcd => 2379,
        Kind::Consul => 8500,
        _ => 2181,
    };
    let config = Config::new(scheme, (1..=3).map(|i| format!("{}:{port}", networks.address(Net::Clients, i))));
    Ok(Ring::new(Shape::Consensus, config, nodes, Arc::clone(networks)).in_containers())
}

/// Append-only file, flushed before each answer, as the processes. What it is told while it runs, such as whom to follow, is
/// in a file, so that it knows it after a restart.
fn redis(ring: &str, name: String, more: &str) -> Program {
    let mut settings =
        format!("bind 0.0.0.0\nprotected-mode no\ndir /data\nappendonly yes\nappendfsync always\n{more}\n");
    for (option, value) in careful_lines(ring) {
        settings += &format!("{option} {value}\n");
    }
    with_file(name, "redis-server /data/redis.conf", "redis.conf", &settings)
}

/// A program that rewrites its settings by itself.
fn with_file(name: String, program: &str, file: &str, settings: &str) -> Program {
    let settings = settings.replace('\n', "\\n");
    let script = format!("[ -s /data/{file} ] || printf '{settings}' >/data/{file}; exec {program}");
    Program { name, command: vec!["sh".to_owned(), "-c".to_owned(), script], ..Program::default() }
}

async fn sentinel(ring: &'static str, networks: &Arc<Networks>) -> Result<Ring, String> {
    let primary = networks.address(Net::Clients, 1);
    let mut data: Vec<Arc<dyn Node>> = Vec::new();
    for (number, more) in [(1, String::new()), (2, format!("replicaof {primary} 6379"))] {
        let program = redis(ring, format!("redis{number}"), &more);
        let node = networks.start(Kind::Redis, number, program, false).await?;
        node.ready().await?;
        data.push(node);
    }
    let settings = format!(
        "port 26379\nbind 0.0.0.0\nprotected-mode no\ndir /data\nsentinel monitor {MASTER} {primary} 6379 2\n\
         sentinel down-after-milliseconds {MASTER} 1000\nsentinel failover-timeout {MASTER} 3000\n"
    );
    let mut sentinels = Vec::new();
    for number in 3..=5 {
        let program = "redis-server /data/sentinel.conf --sentinel";
        let program = with_file(format!("sentinel{number}"), program, "sentinel.conf", &settings);
        sentinels.push(networks.start(Kind::Redis, number, program, false).await?);
    }
    for sentinel in &sentinels {
        until(sentinel, &["SENTINEL", "MASTER", MASTER], "num-slaves\n1\nnum-other-sentinels\n2").await?;
    }
    let addresses = (3..=5).map(|i| format!("{}:26379", networks.address(Net::Clients, i)));
    let config = Config::new("redis+sentinel", addresses).with_option("master", MASTER);
    Ok(Ring::new(Shape::Sentinel, config, data, (Arc::clone(networks), sentinels)).in_containers())
}

async fn slots(ring: &'static str, networks: &Arc<Networks>) -> Result<Ring, String> {
    let mut contained = Vec::new();
    for number in 1..=6 {
        let program = redis(ring, format!("redis{number}"), "cluster-enabled yes\ncluster-node-timeout 2000");
        contained.push(networks.start(Kind::Redis, number, program, false).await?);
    }
    for node in &contained {
        node.ready().await?;
    }
    let addresses: Vec<_> = (1..=6).map(|i| format!("{}:6379", networks.address(Net::Clients, i))).collect();
    let command = format!("redis-cli --cluster create {} --cluster-replicas 1 --cluster-yes", addresses.join(" "));
    contained[0].run(&words(&command)).await?;
    for node in &contained {
        until(node, &["CLUSTER", "INFO"], "cluster_state:ok").await?;
    }
    let nodes = contained.into_iter().map(|node| node as Arc<dyn Node>).collect();
    Ok(Ring::new(Shape::Slots, Config::new(ring, addresses), nodes, Arc::clone(networks)).in_containers())
}

async fn until(node: &Contained, question: &[&str], wanted: &str) -> Result<(), String> {
    let deadline = Instant::now() + FORMED_WITHIN;
    loop {
        let seen = node.ask(question).await.replace('\r', "");
        if seen.contains(wanted) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{} has no {wanted:?} after {FORMED_WITHIN:?}: {seen}", node.name()));
        }
        sleep(Duration::from_millis(50)).await;
    }
}
