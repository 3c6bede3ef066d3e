//! Where a backend's cases run: a server with a URL, and clients of it.
//!
//! Promise: every case gets a namespace that no other case has.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate::{Backend, Config, Coordinator, Nonce, Result};
use quorate_conformance::Clients;
use tokio::sync::OnceCell;

use crate::{
    clusters::ring::Ring,
    server::{Launcher, Server},
};

/// The backends, by the names of their schemes.
pub const BACKENDS: [&str; 5] = ["memory", "etcd", "redis", "consul", "zookeeper"];

/// A server under test.
pub struct Site {
    /// The backend's name.
    pub backend: &'static str,
    /// What is below its namespace is ours.
    base: Config,
    /// The server, if this run started it and so may break it.
    server: Option<Server>,
    /// The cluster, if it is one that this run started. What breaks clusters is in [`clusters`](crate::clusters).
    ring: Option<Ring>,
}

/// Of what kind the servers are that are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// One of each.
    Single,
    /// Three of each, and a Redis Cluster of six.
    Cluster,
    /// Redis with Sentinels; nothing else has them.
    Sentinel,
}

impl Topology {
    /// By the environment: `QUORATE_TOPOLOGY` is `single`, as by default, `cluster` or `sentinel`.
    ///
    /// # Panics
    /// If it is none of them.
    pub fn chosen() -> Self {
        match std::env::var("QUORATE_TOPOLOGY").as_deref() {
            Err(_) | Ok("single") => Self::Single,
            Ok("cluster") => Self::Cluster,
            Ok("sentinel") => Self::Sentinel,
            Ok(other) => panic!("QUORATE_TOPOLOGY is {other}; single, cluster and sentinel are known"),
        }
    }
}

// The URL may hold a password.
impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, server, ring, .. } = self;
        f.debug_struct("Site")
            .field("backend", backend)
            .field("server", server)
            .field("ring", ring)
            .finish_non_exhaustive()
    }
}

impl Site {
    /// Starts a server of its own for the backend; memory needs none.
    ///
    /// # Errors
    /// How to get the server, if it is missing, or the end of its log.
    pub async fn start(backend: &'static str) -> Result<Self, String> {
        if backend == "memory" {
            return Self::at(backend, &format!("memory://{}", unique()), None);
        }
        let server = Launcher::chosen().start(backend).await?;
        Self::at(backend, &server.url(), Some(server))
    }

    /// Starts a server of its own with TLS on both sides, for a user with the least rights; see [`secured`](crate::secured).
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub async fn start_secured(backend: &'static str) -> Result<Self, String> {
        let (server, url) = crate::secured::start(backend).await?;
        Self::at(backend, &url, Some(Server::Process(Box::new(server))))
    }

    /// Starts a cluster of the backend; memory has none.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub async fn start_cluster(backend: &'static str, topology: Topology) -> Result<Self, String> {
        let name = match (backend, topology) {
            ("redis", Topology::Sentinel) => "redis+sentinel",
            ("redis", _) => "redis+cluster",
            _ => backend,
        };
        let ring = Ring::start(name).await?;
        Ok(Self { backend, base: ring.config(), server: None, ring: Some(ring) })
    }

    /// A server that somebody else runs.
    ///
    /// # Errors
    /// If the URL is malformed or names no backend.
    pub fn external(url: &str) -> Result<Self, String> {
        let config = Config::parse(url).map_err(|e| e.to_string())?;
        let family = config.scheme.split('+').next().unwrap_or_default();
        let family = family.strip_suffix('s').filter(|f| BACKENDS.contains(f)).unwrap_or(family);
        let backend = BACKENDS.into_iter().find(|b| *b == family).ok_or("the URL names no backend")?;
        Self::at(backend, url, None)
    }

    fn at(backend: &'static str, url: &str, server: Option<Server>) -> Result<Self, String> {
        let base = Config::parse(url).map_err(|e| e.to_string())?;
        Ok(Self { backend, base, server, ring: None })
    }

    /// The server, to be broken.
    ///
    /// # Panics
    /// If this run did not start it.
    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("the case is only run on servers that were started for it")
    }

    /// Whether the server was started by this run.
    pub fn is_ours(&self) -> bool {
        self.server.is_some()
    }

    /// Options with a fresh namespace and the short TTL.
    pub fn config(&self) -> Config {
        let below = format!("{}/q{}", self.base.namespace, unique());
        self.base.clone().with_namespace(&below).expect("a valid namespace").with_session_ttl(self.ttl())
    }

    /// The same place as a URL, for another process: with its passwords, which are of tests only.
    pub fn url_of(config: &Config) -> String {
        let login = match (&config.user, &config.password) {
            (Some(user), Some(password)) => format!("{user}:{}@", password.expose()),
            _ => String::new(),
        };
        let mut options = vec![("ttl", format!("{}ms", config.session_ttl.as_millis()))];
        options.extend(config.token.iter().map(|token| ("token", token.expose().to_string())));
        if let Some(tls) = &config.tls {
            let files = [("ca", &tls.ca), ("cert", &tls.cert), ("key", &tls.key)];
            options.extend(
                files.into_iter().filter_map(|(name, file)| Some((name, file.as_ref()?.display().to_string()))),
            );
        }
        options.extend(config.extra.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let options: Vec<_> = options.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let hosts = config.endpoints.join(",");
        format!("{}://{login}{hosts}/{}?{}", config.scheme, config.namespace, options.join("&"))
    }

    /// A short TTL that the server grants as asked.
    pub fn ttl(&self) -> Duration {
        match self.backend {
            "memory" => Duration::from_millis(500),
            "redis" => Duration::from_secs(1),
            _ => Duration::from_secs(2),
        }
    }
}

/// A coordinator with these options.
///
/// # Panics
/// If it cannot connect.
pub async fn connect(config: &Config) -> Coordinator {
    quorate::connect_with(config).await.expect("the server is there")
}

/// A coordinator in the same place whose session outlasts any pause of a busy machine.
///
/// # Panics
/// If it cannot connect.
pub async fn connect_long(config: &Config) -> Coordinator {
    connect(&config.clone().with_session_ttl(Duration::from_secs(30))).await
}

/// Clients of one namespace of a site.
pub struct SiteClients {
    config: Config,
    ttl: Duration,
    /// A memory instance ends with its last client; a server does not.
    first: OnceCell<Arc<dyn Backend>>,
}

impl SiteClients {
    /// Clients of a fresh namespace.
    pub fn new(site: &Site) -> Arc<Self> {
        let mut config = site.config();
        if site.backend == "memory" {
            // An instance of its own: cases run at the same time.
            config.endpoints = vec![unique()];
        }
        Arc::new(Self { config, ttl: site.ttl(), first: OnceCell::new() })
    }

    /// Clients of a fresh namespace that all talk to the same server of a cluster.
    pub fn of_one_server(site: &Site) -> Arc<Self> {
        let mut config = site.config();
        config.endpoints.truncate(1);
        Arc::new(Self { config, ttl: site.ttl(), first: OnceCell::new() })
    }
}

impl fmt::Debug for SiteClients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteClients({} {})", self.config.scheme, self.config.namespace)
    }
}

#[async_trait]
impl Clients for SiteClients {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        self.first.get_or_try_init(|| quorate::backend(&self.config)).await?;
        quorate::backend(&self.config).await
    }

    fn ttl(&self) -> Duration {
        self.ttl
    }
}

fn unique() -> String {
    format!("{:016x}", Nonce::random().0 >> 64)
}
