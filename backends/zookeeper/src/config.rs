//! Options, checked and put into the client library's terms.
//!
//! Promise: what cannot work is refused before anything is sent, and no secret is shown.

use std::{path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use quorate_core::{Config, Error, ErrorKind, Result, Secret, Tls};
use zookeeper_client::{Acls, Connector, TlsOptions};

use crate::{error::NAME, layout::Layout};

/// What connections are made from.
#[derive(Clone)]
pub(crate) struct Settings {
    /// In the library's form: `host:port,host:port`.
    pub(crate) servers: String,
    pub(crate) layout: Layout,
    pub(crate) connect_timeout: Duration,
    pub(crate) request_timeout: Duration,
    /// After this long without a word the library takes a connection for lost; also its limit for making one.
    pub(crate) silence: Duration,
    tls: Option<Tls>,
    /// `user:password`, the form that the digest scheme wants. Never shown.
    digest: Option<(String, Secret)>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("servers", &self.servers)
            .field("namespace", &self.layout.top())
            .field("tls", &self.tls)
            .field("login", &self.digest.is_some())
            .finish_non_exhaustive()
    }
}

impl Settings {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        config.validate(&[])?;
        match config.scheme.as_str() {
            "zookeeper" | "zookeepers" => {}
            other => return Err(bad(format!("the scheme {other:?} is not ZooKeeper's; use zookeeper or zookeepers"))),
        }
        if config.scheme == "zookeepers" && config.tls.is_none() {
            return Err(bad("the scheme zookeepers needs TLS options"));
        }
        if config.token.is_some() {
            return Err(bad("ZooKeeper has no tokens; give user and password"));
        }
        if config.namespace == "zookeeper" || config.namespace.starts_with("zookeeper/") {
            return Err(bad("/zookeeper belongs to the server itself; choose another namespace"));
        }
        let digest = match (&config.user, &config.password) {
            (None, None) => None,
            (Some(user), Some(_)) if user.contains(':') => return Err(bad("a user name cannot contain a colon")),
            (Some(user), Some(password)) => Some((user.clone(), password.clone())),
            _ => return Err(bad("user and password belong together: give both or neither")),
        };
        for endpoint in &config.endpoints {
            check_host(endpoint, config.tls.is_some())?;
        }
        // As many servers as may be dead while the others still serve must fit into the limit, and one more.
        let tries = u32::try_from(config.endpoints.len() / 2 + 1).unwrap_or(u32::MAX);
        Ok(Self {
            servers: config.endpoints.join(","),
            layout: Layout::new(&config.namespace),
            connect_timeout: config.connect_timeout,
            request_timeout: config.request_timeout,
            silence: config.connect_timeout / tries,
            tls: config.tls.clone(),
            digest,
        })
    }

    /// Who may do what with the nodes that we create: everybody, or with credentials only their owner.
    pub(crate) fn acls(&self) -> Acls<'static> {
        if self.digest.is_some() { Acls::creator_all() } else { Acls::anyone_all() }
    }

    pub(crate) fn has_login(&self) -> bool {
        self.digest.is_some()
    }

    /// What a new session is opened with. Certificates are read anew, so that renewed ones come into use.
    pub(crate) fn connector(&self, timeout: Duration) -> Result<Connector> {
        let mut connector =
            zookeeper_client::Client::connector().with_session_timeout(timeout).with_connection_timeout(self.silence);
        if let Some(digest) = &self.digest {
            let (user, password) = digest;
            connector = connector.with_auth("digest", format!("{user}:{}", password.expose()).as_bytes());
        }
        if let Some(tls) = &self.tls {
            connector = connector.with_tls(tls_options(tls)?);
        }
        Ok(connector)
    }

    pub(crate) fn secure(&self) -> bool {
        self.tls.is_some()
    }
}

fn check_host(endpoint: &str, tls: bool) -> Result<()> {
    let host = match endpoint.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, _)) => v6,
        None => endpoint.split_once(':').map_or(endpoint, |(host, _)| host),
    };
    // The library panics on a name that no certificate could carry.
    if tls && rustls_pki_types::ServerName::try_from(host).is_err() {
        return Err(bad(format!("{host:?} is neither a host name nor an address, so TLS cannot check it")));
    }
    Ok(())
}

fn tls_options(tls: &Tls) -> Result<TlsOptions> {
    // Every client library of this workspace runs on aws-lc; without a process-wide choice rustls panics as soon as
    // some other dependency of the application brings a second provider along. A choice already made stays.
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
    let ca = match &tls.ca {
        Some(file) => text(file)?,
        None => system_roots()?,
    };
    let options = TlsOptions::new().with_pem_ca(&ca).map_err(|e| bad("the CA file is not usable").because(e))?;
    match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => options
            .with_pem_identity(&text(cert)?, &text(key)?)
            .map_err(|e| bad("the client's certificate or key is not usable").because(e)),
        _ => Ok(options),
    }
}

fn text(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(|e| bad("a TLS file cannot be read").key(file.display()).because(e))
}

fn system_roots() -> Result<String> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return Err(bad("this system has no CA certificates; name a file with ca="));
    }
    let pem =
        |der: &[u8]| format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der));
    Ok(found.certs.iter().map(|cert| pem(cert)).collect())
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, "connect", message).on(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Result<Settings> {
        Settings::new(&Config::parse(url).unwrap())
    }

    #[test]
    fn what_cannot_work_is_refused_without_showing_the_password() {
        for url in [
            "etcd://h",
            "zookeeper://h?token=hunter2",
            "zookeeper://user@h",
            "zookeeper://:hunter2@h",
            "zookeeper://a%3Ab:hunter2@h",
            "zookeeper://h/zookeeper/config",
            "zookeeper://h?nodelay=1",
            "zookeepers://bad_host$name",
        ] {
            let error = settings(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
            assert!(!error.to_string().contains("hunter2"));
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let shown = format!("{:?}", settings("zookeeper://u:hunter2@h").unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn a_dead_minority_fits_into_the_connect_timeout() {
        let silence = |url| settings(url).unwrap().silence;
        assert_eq!(silence("zookeeper://a?connect_timeout=3s"), Duration::from_secs(3));
        assert_eq!(silence("zookeeper://a,b,c?connect_timeout=3s"), Duration::from_millis(1500));
        assert_eq!(silence("zookeeper://a,b,c,d,e?connect_timeout=3s"), Duration::from_secs(1));
    }

    #[test]
    fn tls_files_that_are_missing_or_empty_are_named() {
        let error = settings("zookeepers://h?ca=/nonexistent/ca.pem").unwrap();
        let error = error.connector(Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
    }
}
