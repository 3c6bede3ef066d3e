//! The options of a Redis URL, checked before anything is sent.

use std::fs;

use quorate_core::{Config, Error, Result, Secret, config::Tls};
use redis::{
    ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo,
    TlsCertificates, io::tcp::TcpSettings,
};

use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::error::NAME;

pub(crate) const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// How the server to talk to is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Topology {
    /// The first endpoint that is a primary.
    Standalone,
    /// The primary that the sentinels name.
    Sentinel { master: String },
    /// The node that owns the namespace's slot.
    Cluster,
}

/// A host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Everything that a connection needs, in the client crate's terms.
pub(crate) struct Options {
    pub(crate) topology: Topology,
    pub(crate) endpoints: Vec<Address>,
    pub(crate) db: i64,
    user: Option<String>,
    password: Option<Secret>,
    /// Read for each connection, so that renewed certificates come into use.
    tls: Option<Tls>,
    pub(crate) connect_timeout: std::time::Duration,
    pub(crate) request_timeout: std::time::Duration,
}

// Only what is no secret: the login and the key stay out.
impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("topology", &self.topology)
            .field("endpoints", &self.endpoints)
            .field("db", &self.db)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

impl Options {
    /// Reads and checks the configuration, and the TLS files that it names.
    pub(crate) fn new(config: &Config) -> Result<Self> {
        let (topology, known): (_, &[&str]) = match config.scheme.as_str() {
            "redis" | "rediss" => (Topology::Standalone, &["db"]),
            "redis+sentinel" | "rediss+sentinel" => {
                let master = config.extra.get("master").map_or("mymaster", String::as_str).to_owned();
                (Topology::Sentinel { master }, &["db", "master"])
            }
            "redis+cluster" | "rediss+cluster" => (Topology::Cluster, &[]),
            other => return Err(bad(format!("{other:?} is not a scheme of this backend"))),
        };
        config.validate(known)?;
        if config.token.is_some() {
            return Err(bad("Redis has no access tokens; give user and password"));
        }
        let default_port = if matches!(topology, Topology::Sentinel { .. }) { SENTINEL_PORT } else { PORT };
        let endpoints = config.endpoints.iter().map(|e| address(e, default_port)).collect::<Result<Vec<_>>>()?;
        let db = config
            .extra
            .get("db")
            .map_or(Ok(0), |db| db.parse::<u32>().map(i64::from).map_err(|_| bad("db is not a number such as 3")))?;
        if config.user.is_some() && config.password.is_none() {
            return Err(bad("a user is given without a password"));
        }
        // What is wrong with the files is told before anything is sent.
        config.tls.as_ref().map(certificates).transpose()?;
        Ok(Self {
            topology,
            endpoints,
            db,
            user: config.user.clone(),
            password: config.password.clone(),
            tls: config.tls.clone(),
            connect_timeout: config.connect_timeout,
            request_timeout: config.request_timeout,
        })
    }

    /// How to reach a data node.
    pub(crate) fn node(&self, address: &Address) -> redis::RedisResult<ConnectionInfo> {
        self.info(address, self.login().set_db(self.db))
    }

    /// How to reach a sentinel, with the login or without one.
    pub(crate) fn sentinel(&self, address: &Address, with_login: bool) -> redis::RedisResult<ConnectionInfo> {
        let login =
            if with_login { self.login() } else { RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3) };
        self.info(address, login)
    }

    pub(crate) fn has_login(&self) -> bool {
        self.password.is_some()
    }

    fn login(&self) -> RedisConnectionInfo {
        let mut login = RedisConnectionInfo::default()
            .set_protocol(ProtocolVersion::RESP3)
            .set_lib_name("quorate", env!("CARGO_PKG_VERSION"));
        if let Some(user) = &self.user {
            login = login.set_username(user);
        }
        if let Some(password) = &self.password {
            login = login.set_password(&*password.expose());
        }
        login
    }

    fn info(&self, address: &Address, login: RedisConnectionInfo) -> redis::RedisResult<ConnectionInfo> {
        let (host, port) = (address.host.clone(), address.port);
        let addr = match &self.tls {
            None => ConnectionAddr::Tcp(host, port),
            Some(_) => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        };
        let info = addr
            .into_connection_info()?
            .set_redis_settings(login)
            // Requests are small and wait for their answers: Nagle's algorithm would only delay them.
            .set_tcp_settings(TcpSettings::default().set_nodelay(true));
        match &self.tls {
            None => Ok(info),
            Some(tls) => {
                let files = certificates(tls).map_err(std::io::Error::other)?;
                Ok(redis::Client::build_with_tls(info, files)?.get_connection_info().clone())
            }
        }
    }
}

fn certificates(tls: &Tls) -> Result<TlsCertificates> {
    // The client crate asks for the process's TLS provider and panics if there is none and more than one is
    // compiled in. An application that has chosen one keeps it.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    let file = |path: &std::path::PathBuf| {
        fs::read(path).map_err(|e| bad(format!("the file {} cannot be read: {e}", path.display())))
    };
    let client_tls = match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => Some(ClientTlsConfig { client_cert: file(cert)?, client_key: file(key)? }),
        _ => None,
    };
    let root_cert = tls.ca.as_ref().map(file).transpose()?;
    if root_cert.as_ref().is_some_and(|pem| CertificateDer::pem_slice_iter(pem).flatten().next().is_none()) {
        return Err(bad("the CA file holds no certificate"));
    }
    let tls = TlsCertificates { client_tls, root_cert };
    // Malformed files are the caller's mistake, to be told before the first connection.
    let probe = ConnectionAddr::TcpTls { host: "h".into(), port: PORT, insecure: false, tls_params: None };
    redis::Client::build_with_tls(probe, tls.clone()).map_err(|e| bad(format!("the TLS files are not usable: {e}")))?;
    Ok(tls)
}

fn address(endpoint: &str, default_port: u16) -> Result<Address> {
    let malformed = || bad(format!("the endpoint {endpoint:?} is not host or host:port"));
    let (host, port) = match endpoint.strip_prefix('[') {
        Some(v6) => {
            let (host, rest) = v6.split_once(']').ok_or_else(malformed)?;
            (host, rest.strip_prefix(':'))
        }
        None => match endpoint.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (endpoint, None),
        },
    };
    let port = port.map_or(Ok(default_port), |p| p.parse().map_err(|_| malformed()))?;
    if host.is_empty() {
        return Err(malformed());
    }
    Ok(Address { host: host.to_owned(), port })
}

fn bad(message: impl Into<String>) -> Error {
    Error::invalid("connect", message).on(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> Result<Options> {
        Options::new(&Config::parse(url).unwrap())
    }

    #[test]
    fn schemes_choose_topology_and_default_port() {
        let o = options("redis://h/app?db=3").unwrap();
        assert_eq!((o.topology, o.endpoints[0].port, o.db), (Topology::Standalone, 6379, 3));
        let o = options("redis+sentinel://h,[::1]:9/app?master=m").unwrap();
        assert_eq!(o.topology, Topology::Sentinel { master: "m".into() });
        assert_eq!(o.endpoints[0].port, 26379);
        assert_eq!(o.endpoints[1].to_string(), "[::1]:9");
        assert_eq!(options("redis+cluster://h").unwrap().topology, Topology::Cluster);
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_is_sent() {
        for url in [
            "redis://h?master=m",
            "redis+cluster://h?db=1",
            "redis://h?db=x",
            "redis://h?token=t",
            "redis://u@h",
            "redis+x://h",
            "rediss://h?ca=/does/not/exist",
        ] {
            assert_eq!(options(url).unwrap_err().kind(), quorate_core::ErrorKind::InvalidInput, "{url}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", options("redis://u:hunter2@h").unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
