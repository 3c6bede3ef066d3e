//! From quorate's options to etcd-client's.
//!
//! Promise: what is wrong with the options is said before anything is sent; secrets appear in no error.

use std::{path::Path, time::Duration};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use quorate_core::{Config, Error, ErrorKind, Result, Secret, Tls};

use crate::{BACKEND, error::Fault};

pub(crate) const DEFAULT_PORT: u16 = 2379;

/// How often an open connection with calls under way is asked whether it still lives. etcd drops a client that asks
/// more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
/// How long it may take to answer that.
const PING_LIMIT: Duration = Duration::from_secs(4);

/// The checked options of one backend.
#[derive(Debug)]
pub(crate) struct Options {
    /// One URI per endpoint.
    pub(crate) uris: Vec<String>,
    login: Option<(String, Secret)>,
    tls: Option<Tls>,
    pub(crate) connect_timeout: Duration,
    pub(crate) request_timeout: Duration,
}

impl Options {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        config.validate(&[])?;
        if !matches!(config.scheme.as_str(), "etcd" | "etcds") {
            let message = format!("the scheme {:?} is not etcd's: use etcd:// or etcds://", config.scheme);
            return Err(Error::invalid("connect", message).on(BACKEND));
        }
        if config.token.is_some() {
            return Err(Error::invalid("connect", "etcd has users and passwords, not access tokens").on(BACKEND));
        }
        let login = match (&config.user, &config.password) {
            (Some(user), Some(password)) => Some((user.clone(), password.clone())),
            (None, None) => None,
            // A user without a password logs in by the common name of the client certificate, without being named.
            _ => {
                let message = "user and password belong together; for a login by certificate give neither";
                return Err(Error::invalid("connect", message).on(BACKEND));
            }
        };
        // A builder may name the scheme alone; it must not end in plain text.
        let tls = config.tls.clone().or_else(|| (config.scheme == "etcds").then(Tls::default));
        let scheme = if tls.is_some() { "https" } else { "http" };
        Ok(Self {
            uris: config.endpoints.iter().map(|endpoint| uri(scheme, endpoint)).collect(),
            login,
            tls,
            connect_timeout: config.connect_timeout,
            request_timeout: config.request_timeout,
        })
    }

    pub(crate) fn has_login(&self) -> bool {
        self.login.is_some()
    }

    pub(crate) fn tls(&self) -> Option<Tls> {
        self.tls.clone()
    }

    pub(crate) fn uses_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The options of one connection. Reads the TLS files, so that a renewed certificate is used from the next
    /// connection on.
    pub(crate) async fn connection(&self) -> Result<ConnectOptions, Fault> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.connect_timeout)
            .with_keep_alive(PING_EVERY, PING_LIMIT)
            // Without a call under way etcd takes pings for an attack.
            .with_keep_alive_while_idle(false)
            // A member cut off from the others ends its watches instead of staying silent.
            .with_require_leader(true);
        if let Some((user, password)) = &self.login {
            options = options.with_user(user, &*password.expose()).with_auto_token_refresh(true);
        }
        if let Some(tls) = self.tls.clone() {
            let read = tokio::task::spawn_blocking(move || tls_options(&tls)).await;
            let tls = read.map_err(|e| Fault::new(ErrorKind::Backend, e.to_string()))??;
            options = options.with_tls(tls.timeout(self.connect_timeout));
        }
        Ok(options)
    }
}

fn uri(scheme: &str, endpoint: &str) -> String {
    let host_end = endpoint.rfind(']').map_or(0, |i| i + 1);
    if endpoint[host_end..].contains(':') {
        format!("{scheme}://{endpoint}")
    } else {
        format!("{scheme}://{endpoint}:{DEFAULT_PORT}")
    }
}

fn tls_options(tls: &Tls) -> Result<TlsOptions, Fault> {
    let mut options = TlsOptions::new();
    options = match &tls.ca {
        Some(ca) => options.ca_certificate(Certificate::from_pem(read("ca", ca)?)),
        None => options.with_native_roots(),
    };
    if let (Some(cert), Some(key)) = (&tls.cert, &tls.key) {
        options = options.identity(Identity::from_pem(read("cert", cert)?, read("key", key)?));
    }
    Ok(options)
}

fn read(option: &str, file: &Path) -> Result<Vec<u8>, Fault> {
    std::fs::read(file).map_err(|e| {
        let message = format!("the file of the option {option}, {}, cannot be read: {e}", file.display());
        Fault::new(ErrorKind::InvalidInput, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_get_a_scheme_and_the_default_port() {
        for (endpoint, expected) in [
            ("h", "http://h:2379"),
            ("h:1", "http://h:1"),
            ("[::1]", "http://[::1]:2379"),
            ("[::1]:22379", "http://[::1]:22379"),
        ] {
            assert_eq!(uri("http", endpoint), expected);
        }
    }

    #[test]
    fn options_that_etcd_does_not_have_are_refused() {
        for url in ["redis://h", "etcd://h?token=t", "etcd://user@h", "etcd://h?color=red"] {
            let error = Config::parse(url).and_then(|config| Options::new(&config)).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
        }
    }

    #[test]
    fn the_scheme_with_an_s_never_ends_in_plain_text() {
        for config in [Config::new("etcds", ["h"]), Config::parse("etcds://h").unwrap()] {
            let options = Options::new(&config).unwrap();
            assert!(options.uses_tls());
            assert_eq!(options.uris, ["https://h:2379"]);
        }
    }

    #[test]
    fn the_password_is_not_shown() {
        let options = Options::new(&Config::parse("etcd://u:hunter2@h").unwrap()).unwrap();
        assert!(!format!("{options:?}").contains("hunter2"));
    }
}
