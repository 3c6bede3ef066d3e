//! Where a backend's cases run: a server with a URL, and clients of it.
//!
//! Promise: every case gets a namespace that no other case has.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate::{Backend, Config, Coordinator, Nonce, Result};
use quorate_conformance::Clients;
use tokio::sync::OnceCell;

use crate::server::{Launcher, Server};

/// The backends, by the names of their schemes.
pub const BACKENDS: [&str; 5] = ["memory", "etcd", "redis", "consul", "zookeeper"];

/// A server under test.
pub struct Site {
    /// The backend's name.
    pub backend: &'static str,
    url: String,
    /// The server, if this run started it and so may break it.
    server: Option<Server>,
}

// The URL may hold a password.
impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Site").field("backend", &self.backend).field("server", &self.server).finish_non_exhaustive()
    }
}

impl Site {
    /// Starts a server of its own for the backend; memory needs none.
    ///
    /// # Errors
    /// How to get the server, if it is missing, or the end of its log.
    pub async fn start(backend: &'static str) -> Result<Self, String> {
        if backend == "memory" {
            return Ok(Self { backend, url: format!("memory://{}", unique()), server: None });
        }
        let server = Launcher::chosen().start(backend).await?;
        Ok(Self { backend, url: server.url(), server: Some(server) })
    }

    /// Starts a server of its own with TLS on both sides, for a user with the least rights; see [`secured`](crate::secured).
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub async fn start_secured(backend: &'static str) -> Result<Self, String> {
        let (server, url) = crate::secured::start(backend).await?;
        Ok(Self { backend, url, server: Some(Server::Process(Box::new(server))) })
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
        Ok(Self { backend, url: url.to_owned(), server: None })
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
        let config = Config::parse(&self.url).expect("made by the launcher, or checked by external()");
        let below = format!("{}/q{}", config.namespace, unique());
        config.with_namespace(&below).expect("a valid namespace").with_session_ttl(self.ttl())
    }

    /// The same place as a URL, for another process.
    pub fn url_of(config: &Config) -> String {
        let hosts = config.endpoints.join(",");
        format!("{}://{hosts}/{}?ttl={}ms", config.scheme, config.namespace, config.session_ttl.as_millis())
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
