use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::port::Port;
use super::probe::{Door, Probe, RedisProbe};
use super::server::{Home, Launch};
use super::{Credentials, Error, Kind, Server};
use crate::install::{REDIS, find};
use crate::tls::TlsFiles;

/// The environment variable that names another server program, such as `valkey-server`.
const PROGRAM: &str = "QUORATE_REDIS_SERVER";
const FORMED_WITHIN: Duration = Duration::from_secs(60);
const PRIMARIES: usize = 3;
const SLOTS: usize = 16_384;

/// What Redis writes to disk before it answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Persistence {
    /// Nothing: a restart forgets everything.
    #[default]
    None,
    /// Append-only file, flushed every second: a power failure loses up to a second. A mere SIGKILL loses
    /// nothing that was answered.
    EverySecond,
    /// Append-only file, flushed before each answer.
    Always,
}

/// How a Redis server is set up. Everything not named here is Redis' own default; key-space
/// notifications above all are off.
#[derive(Debug, Clone, Default)]
pub struct RedisOptions {
    /// What is written to disk.
    pub persistence: Persistence,
    /// Asks for a password. The user `default` means `requirepass`; another name makes an ACL user with
    /// all rights, and turns `default` off.
    pub login: Option<Credentials>,
    /// Serves TLS on the client port and asks every client for its certificate.
    pub tls: Option<TlsFiles>,
    /// The server program. `None` means `QUORATE_REDIS_SERVER` if that is set, else `redis-server`.
    pub program: Option<PathBuf>,
    /// More lines of `redis.conf`, such as `maxmemory 10mb`.
    pub extra_lines: Vec<String>,
}

/// Starts Redis.
#[derive(Debug, Clone, Copy)]
pub struct Redis;

impl Redis {
    /// One server. Ready when it answers PING.
    ///
    /// # Errors
    ///
    /// [`Error::MissingProgram`] without `redis-server`; [`Error::NotReady`] with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn start(options: RedisOptions) -> Result<Server, Error> {
        node(&options, "redis", Role::Alone)?.started().await
    }

    /// A primary, a replica and three Sentinels with a quorum of 2, which name the primary `mymaster` and
    /// fail over when it has been silent for 1 s. Ready when the replica is in sync and every Sentinel
    /// knows all the others: earlier than that a killed primary is never replaced.
    ///
    /// # Errors
    ///
    /// As [`Redis::start`]; [`Error::Unsupported`] with a login or TLS.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn sentinel(options: RedisOptions) -> Result<RedisSentinel, Error> {
        plain_only(&options, "sentinel")?;
        let primary = node(&options, "redis1", Role::Alone)?.started().await?;
        let replica = node(&options, "redis2", Role::ReplicaOf(primary.port()))?.started().await?;
        let mut sentinels = Vec::new();
        for i in 1..=3 {
            let sentinel = sentinel(&options, &format!("sentinel{i}"), primary.port())?;
            sentinels.push(Arc::new(sentinel.started().await?));
        }
        until(&primary, "its replica is in sync", async || {
            ask(&primary, &["INFO", "replication"]).await.is_some_and(|info| info.contains("state=online"))
        })
        .await?;
        for sentinel in &sentinels {
            until(sentinel, "it knows all the others", async || {
                ask(sentinel, &["SENTINEL", "MASTER", RedisSentinel::MASTER])
                    .await
                    .is_some_and(|it| it.contains("num-slaves 1 num-other-sentinels 2"))
            })
            .await?;
        }
        Ok(RedisSentinel { data: [Arc::new(primary), Arc::new(replica)], sentinels })
    }

    /// A Redis Cluster of three primaries, with a replica of each if asked, and a node timeout of 2 s.
    /// Ready when every node sees every slot served and every replica is in sync.
    ///
    /// # Errors
    ///
    /// As [`Redis::start`]; [`Error::Unsupported`] with a login or TLS.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn cluster(options: RedisOptions, replicas: bool) -> Result<RedisCluster, Error> {
        plain_only(&options, "cluster")?;
        let count = if replicas { 2 * PRIMARIES } else { PRIMARIES };
        let nodes = (1..=count)
            .map(|i| {
                let bus = Port::reserve()?;
                node(&options, &format!("redis{i}"), Role::InCluster(bus)).map(Arc::new)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let cluster = RedisCluster { nodes };
        cluster.form().await?;
        Ok(cluster)
    }
}

/// A primary, a replica, and three Sentinels that watch them. Dropping it kills all of them.
#[derive(Debug)]
pub struct RedisSentinel {
    data: [Arc<Server>; 2],
    sentinels: Vec<Arc<Server>>,
}

impl RedisSentinel {
    /// The name under which the Sentinels know the primary.
    pub const MASTER: &'static str = "mymaster";

    /// The two servers that hold data; the first one began as the primary.
    pub fn data(&self) -> &[Arc<Server>] {
        &self.data
    }

    /// The Sentinels.
    pub fn sentinels(&self) -> &[Arc<Server>] {
        &self.sentinels
    }

    /// `redis-sentinel://S1,S2,S3/mymaster`.
    pub fn url(&self) -> String {
        let master = Self::MASTER;
        format!("redis-sentinel://{}/{master}", addresses(&self.sentinels))
    }

    /// The server that the Sentinels name as primary now.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] when no running Sentinel answers within 60 s.
    ///
    /// # Cancel safety
    ///
    /// Reads only.
    pub async fn primary(&self) -> Result<Arc<Server>, Error> {
        let deadline = Instant::now() + FORMED_WITHIN;
        let question = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", Self::MASTER];
        loop {
            for sentinel in self.sentinels.iter().filter(|one| one.pid().is_some()) {
                let answer = ask(sentinel, &question).await.unwrap_or_default();
                let addr = answer.replace(' ', ":").parse::<SocketAddr>();
                let named = self.data.iter().find(|node| Ok(node.addr()) == addr);
                if let Some(named) = named {
                    return Ok(Arc::clone(named));
                }
            }
            if Instant::now() > deadline {
                return Err(self.sentinels[0].not_ready("no Sentinel names a primary".to_owned()));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A Redis Cluster. Dropping it kills all of its nodes.
#[derive(Debug)]
pub struct RedisCluster {
    /// The primaries first, then the replica of each in the same order.
    nodes: Vec<Arc<Server>>,
}

impl RedisCluster {
    /// The nodes: the three that began as primaries first, then their replicas in the same order.
    pub fn nodes(&self) -> &[Arc<Server>] {
        &self.nodes
    }

    /// `redis-cluster://N1,N2,N3…`.
    pub fn url(&self) -> String {
        format!("redis-cluster://{}", addresses(&self.nodes))
    }

    async fn form(&self) -> Result<(), Error> {
        for node in &self.nodes {
            node.launch_empty().await?;
        }
        for (i, node) in self.nodes.iter().enumerate() {
            until(node, "it answers PING", async || ask(node, &["PING"]).await.is_some_and(|it| it == "PONG")).await?;
            // Distinct from the start: with equal epochs the nodes first argue about who owns what.
            let epoch = (i + 1).to_string();
            must(node, &["CLUSTER", "SET-CONFIG-EPOCH", &epoch]).await?;
            if i < PRIMARIES {
                let first = (i * SLOTS / PRIMARIES).to_string();
                let last = ((i + 1) * SLOTS / PRIMARIES - 1).to_string();
                must(node, &["CLUSTER", "ADDSLOTSRANGE", &first, &last]).await?;
            }
        }
        for node in &self.nodes[1..] {
            let (port, bus) = (node.port().to_string(), bus_port(node)?);
            let meet = ["CLUSTER", "MEET", "127.0.0.1", &port, &bus];
            must(&self.nodes[0], &meet).await?;
        }
        for node in &self.nodes {
            until(node, "it has met all the others", async || {
                ask(node, &["CLUSTER", "NODES"])
                    .await
                    .is_some_and(|list| list.lines().count() == self.nodes.len() && !list.contains("handshake"))
            })
            .await?;
        }
        self.replicate().await?;
        for node in &self.nodes {
            node.wait_ready().await?;
        }
        Ok(())
    }

    async fn replicate(&self) -> Result<(), Error> {
        let (primaries, replicas) = self.nodes.split_at(PRIMARIES);
        for (primary, replica) in primaries.iter().zip(replicas) {
            let id = must(primary, &["CLUSTER", "MYID"]).await?;
            must(replica, &["CLUSTER", "REPLICATE", &id]).await?;
        }
        // A primary that is killed before its replica has finished the first sync never fails over.
        for (primary, _) in primaries.iter().zip(replicas) {
            until(primary, "its replica is in sync", async || {
                ask(primary, &["INFO", "replication"]).await.is_some_and(|info| info.contains("state=online"))
            })
            .await?;
        }
        for replica in replicas {
            until(replica, "it is in sync", async || {
                ask(replica, &["INFO", "replication"]).await.is_some_and(|info| info.contains("master_link_status:up"))
            })
            .await?;
        }
        Ok(())
    }
}

enum Role {
    Alone,
    ReplicaOf(u16),
    /// With the port of the cluster bus; by default that is 10,000 above, where it may be taken.
    InCluster(Port),
}

fn node(options: &RedisOptions, name: &str, role: Role) -> Result<Server, Error> {
    let program = program(options)?;
    let home = Home::new(name)?;
    let data = home.data();
    let port = Port::reserve()?;
    let number = port.number();
    let (mut lines, door) = door_lines(options.tls.as_ref(), number, &data);
    lines.extend(plain_lines(options, &data));
    let mut ports = vec![port];
    let in_cluster = matches!(role, Role::InCluster(_));
    match role {
        Role::Alone => {}
        Role::ReplicaOf(primary) => lines.push(format!("replicaof 127.0.0.1 {primary}")),
        Role::InCluster(bus) => {
            lines.push("cluster-enabled yes\ncluster-node-timeout 2000".to_owned());
            lines.push(format!("cluster-port {}", bus.number()));
            ports.push(bus);
        }
    }
    lines.extend(options.extra_lines.iter().cloned());
    let launch = Launch {
        kind: Kind::Redis,
        name: name.to_owned(),
        program,
        args: vec![data.join("redis.conf").into()],
        seeds: vec![("redis.conf", lines.join("\n") + "\n")],
        client: number,
        probe: Probe::Redis(RedisProbe { door, login: options.login.clone(), in_cluster }),
        credentials: options.login.clone(),
        token: None,
        tls: options.tls.clone(),
        wipes_alone: !in_cluster,
    };
    Ok(Server::new(launch, home, ports))
}

/// Where clients come in, and where the readiness probe does: beside TLS, through a socket file.
fn door_lines(tls: Option<&TlsFiles>, port: u16, data: &Path) -> (Vec<String>, Door) {
    let Some(tls) = tls else {
        return (vec![format!("port {port}")], Door::Tcp(port));
    };
    let socket = data.join("redis.sock");
    let lines = vec![
        "port 0".to_owned(),
        format!("tls-port {port}"),
        format!("tls-cert-file {}", tls.server_cert().display()),
        format!("tls-key-file {}", tls.server_key().display()),
        format!("tls-ca-cert-file {}", tls.ca().display()),
        format!("tls-auth-clients {}", if tls.asks_clients() { "yes" } else { "no" }),
        format!("unixsocket {}", socket.display()),
    ];
    (lines, Door::Unix(socket))
}

fn plain_lines(options: &RedisOptions, data: &Path) -> Vec<String> {
    let mut lines = vec![
        "bind 127.0.0.1".to_owned(),
        format!("dir {}", data.display()),
        "daemonize no".to_owned(),
        "save \"\"".to_owned(),
    ];
    lines.push(match options.persistence {
        Persistence::None => "appendonly no".to_owned(),
        Persistence::EverySecond => "appendonly yes\nappendfsync everysec".to_owned(),
        Persistence::Always => "appendonly yes\nappendfsync always".to_owned(),
    });
    if let Some(login) = &options.login {
        let (user, password) = (&login.user, login.password.expose());
        if user == "default" {
            lines.push(format!("requirepass {password}"));
        } else {
            lines.push(format!("user {user} on >{password} ~* &* +@all"));
            lines.push("user default off".to_owned());
        }
    }
    lines
}

fn sentinel(options: &RedisOptions, name: &str, primary: u16) -> Result<Server, Error> {
    let program = program(options)?;
    let home = Home::new(name)?;
    let data = home.data();
    let port = Port::reserve()?;
    let master = RedisSentinel::MASTER;
    let config = format!(
        "port {}\nbind 127.0.0.1\ndir {}\nsentinel monitor {master} 127.0.0.1 {primary} 2\n\
         sentinel down-after-milliseconds {master} 1000\nsentinel failover-timeout {master} 3000\n\
         sentinel parallel-syncs {master} 1\n",
        port.number(),
        data.display(),
    );
    let launch = Launch {
        kind: Kind::Sentinel,
        name: name.to_owned(),
        program,
        args: vec![data.join("sentinel.conf").into(), "--sentinel".into()],
        seeds: vec![("sentinel.conf", config)],
        client: port.number(),
        probe: Probe::Redis(RedisProbe { door: Door::Tcp(port.number()), login: None, in_cluster: false }),
        credentials: None,
        token: None,
        tls: None,
        // It would monitor the first primary again, which may have been replaced.
        wipes_alone: false,
    };
    Ok(Server::new(launch, home, vec![port]))
}

fn program(options: &RedisOptions) -> Result<PathBuf, Error> {
    let chosen = options.program.clone();
    match chosen.or_else(|| std::env::var_os(PROGRAM).map(PathBuf::from)) {
        None => find(&REDIS),
        Some(path) if path.components().count() > 1 && path.is_file() => Ok(path),
        Some(path) => crate::install::in_path(&path).ok_or_else(|| {
            Error::missing(
                path,
                "it was named by RedisOptions::program or QUORATE_REDIS_SERVER; name an installed server program",
            )
        }),
    }
}

fn plain_only(options: &RedisOptions, what: &str) -> Result<(), Error> {
    if options.login.is_none() && options.tls.is_none() {
        return Ok(());
    }
    Err(Error::Unsupported {
        server: format!("redis {what}"),
        reason: "it is started without login and TLS only; use Redis::start for these".to_owned(),
    })
}

fn bus_port(node: &Server) -> Result<String, Error> {
    let bus = node.reserved_ports().next_back();
    bus.map(|port| port.to_string()).ok_or_else(|| node.not_ready("it has no cluster bus".to_owned()))
}

fn addresses(nodes: &[Arc<Server>]) -> String {
    let addrs: Vec<String> = nodes.iter().map(|node| node.addr().to_string()).collect();
    addrs.join(",")
}

/// The answer of one server, or `None` when there was none or it was an error.
async fn ask(server: &Server, command: &[&str]) -> Option<String> {
    must(server, command).await.ok()
}

async fn must(server: &Server, command: &[&str]) -> Result<String, Error> {
    let Probe::Redis(probe) = server.probe() else {
        return Err(server.not_ready("it does not speak the Redis protocol".to_owned()));
    };
    let doing = || format!("ask {} {}", server.name(), command.join(" "));
    tokio::time::timeout(Duration::from_secs(5), probe.ask(command))
        .await
        .map_err(|e| Error::io(doing(), e.into()))?
        .map_err(|e| Error::io(doing(), e))
}

async fn until(server: &Server, what: &str, seen: impl AsyncFn() -> bool) -> Result<(), Error> {
    let deadline = Instant::now() + FORMED_WITHIN;
    while !seen().await {
        if Instant::now() > deadline {
            let within = FORMED_WITHIN.as_secs();
            return Err(server.not_ready(format!("waited {within} s in vain until {what}")));
        }
        if server.pid().is_none() {
            return Err(server.not_ready(format!("it ended while it was awaited that {what}")));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
