//! A server that this run started, and what breaks it, whichever way it was started.
//!
//! Promise: a case that breaks its server is the same case on a process and on a container.

use quorate_testcontainers::{self as containers, Kind};
use quorate_testkit::servers;

/// How servers are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// As processes of this machine.
    Process,
    /// In containers.
    Docker,
}

impl Launcher {
    /// By the environment: `QUORATE_SERVERS` is `process`, as by default, or `docker`.
    ///
    /// # Panics
    /// If it is neither.
    pub fn chosen() -> Self {
        match std::env::var("QUORATE_SERVERS").as_deref() {
            Err(_) | Ok("process") => Self::Process,
            Ok("docker") => Self::Docker,
            Ok(other) => panic!("QUORATE_SERVERS is {other}; process and docker are known"),
        }
    }

    /// Starts the server of a backend.
    ///
    /// # Errors
    /// How to get the server, if it is missing, or the end of its log.
    pub async fn start(self, backend: &str) -> Result<Server, String> {
        match self {
            Self::Process => process(backend).await.map(Box::new).map(Server::Process),
            Self::Docker => container(backend).await.map(Box::new).map(Server::Container),
        }
    }
}

/// A server to be broken.
#[derive(Debug)]
pub enum Server {
    /// A process.
    Process(Box<servers::Server>),
    /// A container.
    Container(Box<containers::Server>),
}

/// Why a server could not be broken or mended.
type Outcome = Result<(), String>;

impl Server {
    /// `etcd://127.0.0.1:PORT` and the like.
    pub fn url(&self) -> String {
        match self {
            Self::Process(server) => server.url(),
            Self::Container(server) => server.url(),
        }
    }

    /// The end of what it wrote, if it is a process: a container's is the daemon's.
    pub fn log_tail(&self) -> String {
        match self {
            Self::Process(server) => server.log_tail(),
            Self::Container(_) => String::new(),
        }
    }

    /// Kills it at once; its data stays.
    ///
    /// # Errors
    /// What the system or the daemon answered.
    pub async fn kill(&self) -> Outcome {
        match self {
            Self::Process(server) => said(server.kill().await),
            Self::Container(server) => said(server.kill().await),
        }
    }

    /// Starts it again with its data, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart(&self) -> Outcome {
        match self {
            Self::Process(server) => said(server.restart().await),
            Self::Container(server) => said(server.restart().await),
        }
    }

    /// Starts it again without its data, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart_wiped(&self) -> Outcome {
        match self {
            Self::Process(server) => said(server.restart_wiped().await),
            Self::Container(server) => said(server.restart_wiped().await),
        }
    }

    /// Freezes it: its connections stay open, and nothing is answered.
    ///
    /// # Errors
    /// When it is down.
    pub async fn pause(&self) -> Outcome {
        match self {
            Self::Process(server) => said(server.pause()),
            Self::Container(server) => said(server.pause().await),
        }
    }

    /// Thaws it.
    ///
    /// # Errors
    /// When it is down.
    pub async fn resume(&self) -> Outcome {
        match self {
            Self::Process(server) => said(server.resume()),
            Self::Container(server) => said(server.resume().await),
        }
    }
}

fn said<E: std::fmt::Display>(outcome: Result<(), E>) -> Outcome {
    outcome.map_err(|e| e.to_string())
}

async fn process(backend: &str) -> Result<servers::Server, String> {
    let server = match backend {
        "etcd" => servers::Etcd::start(servers::EtcdOptions::default()).await,
        "redis" => {
            // With its data on disk, as whoever needs locks to survive a restart would run it.
            let persistence = servers::Persistence::Always;
            servers::Redis::start(servers::RedisOptions { persistence, ..Default::default() }).await
        }
        "consul" => {
            // For all processes of all cases, which have one address.
            servers::Consul::start(servers::ConsulOptions { connections: 2000, ..Default::default() }).await
        }
        "zookeeper" => servers::ZooKeeper::start(servers::ZooKeeperOptions::default()).await,
        other => return Err(format!("{other} is not a backend with a server")),
    };
    server.map_err(|e| e.to_string())
}

async fn container(backend: &str) -> Result<containers::Server, String> {
    let kind = match backend {
        "etcd" => Kind::Etcd,
        // What speaks Redis's protocol without being Redis.
        "redis" if std::env::var_os("QUORATE_VALKEY").is_some() => Kind::Valkey,
        "redis" => Kind::Redis,
        "consul" => Kind::Consul,
        "zookeeper" => Kind::ZooKeeper,
        other => return Err(format!("{other} is not a backend with a server")),
    };
    containers::Server::start(kind).await.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_and_compose_run_the_same_published_images() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docker/.env");
        let compose = std::fs::read_to_string(path).expect("it is in the repository");
        for kind in [Kind::Etcd, Kind::Redis, Kind::Valkey, Kind::Consul, Kind::ZooKeeper] {
            let variable = format!("QUORATE_{}_IMAGE=", kind.to_string().to_uppercase());
            let listed = compose.lines().find_map(|line| line.strip_prefix(&variable));
            assert_eq!(listed, Some(kind.published_image()), "{kind}");
        }
    }
}
