//! The same clusters in containers, with networks that can be taken from them.
//!
//! Promise: every server has an address of its own, the same for clients and for the other servers, before and after any
//! blow. What a server is cut off from sends nothing to it and hears nothing from it, and no connection is closed.
//!
//! Two networks: servers of etcd, Consul and ZooKeeper talk to each other over one, clients come over the other. Redis tells
//! clients the addresses that its servers use among themselves, so that its servers have the second only. Neither leads
//! anywhere else (`--internal`): no server can reach another by a detour. Clients come from this machine, to which Docker
//! gives an address in every network that it makes: on Linux.

use std::{
    env, process,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use quorate_testcontainers::Kind;
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

use super::node::{Cut, Node, Outcome, answer};

/// Long, because machines may be busy.
const READY_WITHIN: Duration = Duration::from_secs(60);
const LABEL: &str = "org.quorate.testcontainers";
/// Another network of the machine may have the addresses that we chose.
const SUBNETS_TRIED: usize = 10;

/// The networks of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Net {
    /// Over which clients come.
    Clients,
    /// Over which servers talk to each other.
    Servers,
}

/// What a server runs.
#[derive(Debug, Clone, Default)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) command: Vec<String>,
    pub(super) environment: Vec<String>,
    /// Path inside, and text.
    pub(super) file: Option<(&'static str, String)>,
}

/// The networks of one cluster. Dropping them removes them, with all containers on them.
#[derive(Debug)]
pub(super) struct Networks {
    name: String,
    /// The first three numbers of every address: of clients, and of servers among themselves.
    subnets: [String; 2],
    containers: std::sync::Mutex<Vec<String>>,
}

impl Networks {
    pub(super) async fn create() -> Result<Arc<Self>, String> {
        let name = format!("quorate-{:016x}", rand::random::<u64>());
        let mut made = Self { name, subnets: Default::default(), containers: std::sync::Mutex::default() };
        for of in [Net::Clients, Net::Servers] {
            let mut tried = 0;
            made.subnets[of as usize] = loop {
                let subnet = format!("10.{}.{}", 200 + rand::random::<u8>() % 50, rand::random::<u8>());
                let range = format!("{subnet}.0/24");
                let name = made.network(of);
                match docker(&["network", "create", "--internal", "--label", &label(), "--subnet", &range, &name]).await
                {
                    Ok(_) => break subnet,
                    Err(e) if tried == SUBNETS_TRIED => return Err(e),
                    Err(_) => tried += 1,
                }
            };
        }
        Ok(Arc::new(made))
    }

    /// The address of a server, by number: as clients see it, or the others.
    pub(super) fn address(&self, of: Net, number: usize) -> String {
        // The first one is this machine's.
        format!("{}.{}", self.subnets[of as usize], number + 10)
    }

    /// The network over which clients come, or that of the servers.
    fn network(&self, of: Net) -> String {
        let suffix = match of {
            Net::Clients => "clients",
            Net::Servers => "servers",
        };
        format!("{}-{suffix}", self.name)
    }

    /// Creates a server and starts it, on the network of the clients, and on that of servers if it knows another.
    pub(super) async fn start(
        self: &Arc<Self>,
        kind: Kind,
        number: usize,
        program: Program,
        knows_others: bool,
    ) -> Result<Arc<Contained>, String> {
        let container = format!("{}-{}", self.name, program.name);
        let network = self.network(Net::Clients);
        let address = self.address(Net::Clients, number);
        let mut args = ["create", "--name", &container, "--label", &label(), "--network", &network, "--ip", &address]
            .map(str::to_owned)
            .to_vec();
        for variable in program.environment {
            args.extend(["--env".to_owned(), variable]);
        }
        args.push(kind.image());
        args.extend(program.command);
        self.containers.lock().expect("no poison").push(container.clone());
        docker(&args.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        if let Some((path, text)) = program.file {
            let source = env::temp_dir().join(format!("{container}.cfg"));
            tokio::fs::write(&source, text).await.map_err(|e| format!("write {}: {e}", source.display()))?;
            let copied = docker(&["cp", &source.display().to_string(), &format!("{container}:{path}")]).await;
            tokio::fs::remove_file(&source).await.ok();
            copied?;
        }
        let networks = Arc::clone(self);
        let on = [true, false].map(AtomicBool::new);
        let node = Contained { kind, name: program.name, container, number, networks, knows_others, on };
        if knows_others {
            node.connect(Net::Servers).await?;
        }
        Node::start(&node).await?;
        Ok(Arc::new(node))
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        let containers = std::mem::take(&mut *self.containers.lock().expect("no poison"));
        let names = containers.iter().map(String::as_str);
        let networks = [Net::Clients, Net::Servers].map(|of| self.network(of));
        for args in [
            ["rm", "--force", "--volumes"].into_iter().chain(names).collect::<Vec<_>>(),
            ["network", "rm"].into_iter().chain(networks.iter().map(String::as_str)).collect(),
        ] {
            let mut command = process::Command::new("docker");
            command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().ok();
        }
    }
}

/// A server in a container.
#[derive(Debug)]
pub(super) struct Contained {
    kind: Kind,
    name: String,
    container: String,
    number: usize,
    networks: Arc<Networks>,
    /// It has a place on the network of servers.
    knows_others: bool,
    /// Whether it is on the network of clients, and on that of servers.
    on: [AtomicBool; 2],
}

impl Contained {
    fn is_on(&self, net: Net) -> bool {
        self.on[net as usize].load(Ordering::Acquire)
    }

    async fn connect(&self, to: Net) -> Outcome {
        let (network, address) = (self.networks.network(to), self.networks.address(to, self.number));
        docker(&["network", "connect", "--ip", &address, &network, &self.container]).await?;
        self.on[to as usize].store(true, Ordering::Release);
        Ok(())
    }

    async fn disconnect(&self, from: Net) -> Outcome {
        docker(&["network", "disconnect", &self.networks.network(from), &self.container]).await?;
        self.on[from as usize].store(false, Ordering::Release);
        Ok(())
    }

    /// What a command inside prints; empty if it does not within a second.
    pub(super) async fn inside(&self, words: &[&str]) -> String {
        let mut command = Command::new("docker");
        command.args(["exec", &self.container]).args(words);
        answer(command).await
    }

    /// Runs a command inside to its end.
    pub(super) async fn run(&self, words: &[String]) -> Outcome {
        let words = words.iter().map(String::as_str);
        docker(&["exec", &self.container].into_iter().chain(words).collect::<Vec<_>>()).await.map(drop)
    }

    async fn mode(&self) -> String {
        self.inside(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/2181 && echo srvr >&3 && cat <&3"]).await
    }

    async fn answers(&self) -> bool {
        match self.kind {
            Kind::Etcd => self.inside(&["etcdctl", "endpoint", "status"]).await.contains("127.0.0.1"),
            Kind::Consul => self.inside(&["consul", "kv", "put", "quorate-ready", "x"]).await.contains("Success"),
            Kind::ZooKeeper => self.mode().await.contains("Mode: "),
            _ => self.ask(&["PING"]).await.starts_with("PONG"),
        }
    }
}

#[async_trait]
impl Node for Contained {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn leads(&self) -> bool {
        match self.kind {
            Kind::Etcd => {
                let status = self.inside(&["etcdctl", "endpoint", "status", "--write-out=fields"]).await;
                let field = |name: &str| {
                    let of = |line: &str| Some(line.strip_prefix(name)?.trim_start_matches([' ', ':']).to_owned());
                    status.lines().find_map(of)
                };
                field("\"MemberID\"").is_some_and(|member| Some(member) == field("\"Leader\""))
            }
            Kind::Consul => self.inside(&["consul", "info"]).await.contains("leader = true"),
            Kind::ZooKeeper => self.mode().await.contains("Mode: leader"),
            _ => self.ask(&["INFO", "replication"]).await.contains("role:master"),
        }
    }

    async fn kill(&self) -> Outcome {
        docker(&["kill", &self.container]).await?;
        // Started before its end is known to the daemon, it would stay down.
        docker(&["wait", &self.container]).await.map(drop)
    }

    async fn stop(&self) -> Outcome {
        docker(&["stop", &self.container]).await.map(drop)
    }

    async fn start(&self) -> Outcome {
        docker(&["start", &self.container]).await.map(drop)
    }

    async fn ready(&self) -> Outcome {
        let deadline = Instant::now() + READY_WITHIN;
        while !self.answers().await {
            if Instant::now() > deadline {
                let log = docker(&["logs", "--tail", "30", &self.container]).await.unwrap_or_default();
                return Err(format!("{} is not ready after {READY_WITHIN:?}: {log}", self.name));
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    async fn pause(&self) -> Outcome {
        docker(&["pause", &self.container]).await.map(drop)
    }

    async fn resume(&self) -> Outcome {
        docker(&["unpause", &self.container]).await.map(drop)
    }

    async fn cut_off(&self, from: Cut) -> Outcome {
        let nets: &[Net] = if from == Cut::Everybody { &[Net::Clients, Net::Servers] } else { &[Net::Servers] };
        for net in nets {
            if self.is_on(*net) {
                self.disconnect(*net).await?;
            }
        }
        Ok(())
    }

    async fn rejoin(&self) -> Outcome {
        for net in [Net::Clients, Net::Servers] {
            if !self.is_on(net) && (net == Net::Clients || self.knows_others) {
                self.connect(net).await?;
            }
        }
        Ok(())
    }

    async fn ask(&self, words: &[&str]) -> String {
        let port = if self.name.starts_with("sentinel") { "26379" } else { "6379" };
        self.inside(&[&["redis-cli", "-p", port], words].concat()).await
    }
}

fn label() -> String {
    format!("{LABEL}={}", env::var("QUORATE_RUN").unwrap_or_else(|_| process::id().to_string()))
}

/// One command to the daemon.
async fn docker(args: &[&str]) -> Result<String, String> {
    let doing = || format!("docker {}", args.join(" "));
    let mut command = Command::new("docker");
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(READY_WITHIN, command.output()).await.map_err(|_| format!("{}: no answer", doing()))?;
    let output = output.map_err(|e| format!("{}: {e}", doing()))?;
    // A server's log comes over both.
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned();
    if output.status.success() { Ok(text) } else { Err(format!("{}: {text}", doing())) }
}
