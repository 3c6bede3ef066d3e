//! How to reach a coordinator: one set of options, from a URL or a builder, for every backend.
//!
//! Promise: passwords, tokens and keys never appear in `Debug` or in an error of this module.
//!
//! # URL
//! `scheme://[user[:password]@]host[:port][,host[:port]…][/namespace][?option=value&…]`
//!
//! | scheme | backend |
//! |---|---|
//! | `memory` | memory; the host is the instance's name |
//! | `etcd`, `etcds` | etcd, without and with TLS |
//! | `redis`, `rediss` | one Redis or Valkey server; `redis+sentinel`, `redis+cluster` and `rediss+…` for the others |
//! | `consul`, `consuls` | Consul |
//! | `zookeeper`, `zookeepers` | ZooKeeper |
//!
//! | option | meaning | default |
//! |---|---|---|
//! | `ttl` | TTL of the sessions, such as `10s` or `1500ms` | `10s` |
//! | `connect_timeout` | limit for one connection | `3s` |
//! | `request_timeout` | limit for one attempt at one request | `5s` |
//! | `token` | ACL token (Consul) | none |
//! | `ca`, `cert`, `key` | PEM files: the CA to trust, the client's certificate and key | system roots, none |
//!
//! Further options belong to a backend and are listed in its crate; an unknown one is an error.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    error::{Error, Result},
    key::Dir,
};

/// A text that is never shown: `Debug` prints `***`.
///
/// Clones share it, so that it can be replaced while connections made with it are in use: whoever rotates a password or a
/// token keeps a clone of what went into the [`Config`].
///
/// ```
/// use quorate_core::{Config, Secret};
/// let password = Secret::new("old");
/// let config = Config::new("etcd", ["10.0.0.1:2379"]).with_login("app", password.clone());
/// // … after the server has been told of the new one:
/// password.replace("new");
/// assert_eq!(&*config.password.unwrap().expose(), "new");
/// ```
#[derive(Clone)]
pub struct Secret(Arc<Mutex<Arc<str>>>);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Arc::new(Mutex::new(Arc::from(text.into()))))
    }

    /// The secret itself, as it is now. Never print it.
    pub fn expose(&self) -> Arc<str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the secret for all clones: Consul is sent it with the next request, etcd and Redis with the next login,
    /// ZooKeeper with the next session.
    pub fn replace(&self, text: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::from(text.into());
    }
}

impl<T: Into<String>> From<T> for Secret {
    fn from(text: T) -> Self {
        Self::new(text)
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// TLS material. Files are read when the connection is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tls {
    /// PEM file with the CA certificates to trust; the system's roots where `None`.
    pub ca: Option<PathBuf>,
    /// PEM file with the client's certificate chain, for servers that ask for one.
    pub cert: Option<PathBuf>,
    /// PEM file with the client's private key.
    pub key: Option<PathBuf>,
}

/// Where and how to connect.
///
/// ```
/// use quorate_core::Config;
/// let config = Config::parse("etcd://app:secret@10.0.0.1:2379,10.0.0.2:2379/my-app?ttl=5s")?;
/// assert_eq!(config.endpoints.len(), 2);
/// assert!(!format!("{config:?}").contains("secret"));
/// # Ok::<(), quorate_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Config {
    /// The URL's scheme, which names the backend.
    pub scheme: String,
    /// `host` or `host:port`; IPv6 hosts in brackets.
    pub endpoints: Vec<String>,
    /// The part of the store that this application owns, as an encoded path; empty for the whole store.
    pub namespace: String,
    /// User name, where the server has users.
    pub user: Option<String>,
    /// Password of the user.
    pub password: Option<Secret>,
    /// Access token, where the server has tokens.
    pub token: Option<Secret>,
    /// TLS, if the scheme or the builder asks for it.
    pub tls: Option<Tls>,
    /// Limit for making one connection.
    pub connect_timeout: Duration,
    /// Limit for one attempt at one request. A call that may be repeated makes up to six, with pauses.
    pub request_timeout: Duration,
    /// TTL asked for by sessions.
    pub session_ttl: Duration,
    /// Options that only one backend knows.
    pub extra: BTreeMap<String, String>,
}

impl fmt::Debug for Config {
    /// Shows no secret: of options that only a backend knows, the names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("scheme", &self.scheme)
            .field("endpoints", &self.endpoints)
            .field("namespace", &self.namespace)
            .field("user", &self.user)
            .field("password", &self.password)
            .field("token", &self.token)
            .field("tls", &self.tls)
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("session_ttl", &self.session_ttl)
            .field("extra", &self.extra.keys())
            .finish()
    }
}

impl Config {
    /// Options for a scheme and endpoints; everything else at its default.
    pub fn new(scheme: impl Into<String>, endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            scheme: scheme.into(),
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            namespace: String::new(),
            user: None,
            password: None,
            token: None,
            tls: None,
            connect_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(5),
            session_ttl: Duration::from_secs(10),
            extra: BTreeMap::new(),
        }
    }

    /// Reads a URL; see the module for its form.
    ///
    /// # Errors
    /// `InvalidInput` naming the part that is wrong, without repeating the URL.
    pub fn parse(url: &str) -> Result<Self> {
        let (scheme, rest) =
            url.split_once("://").ok_or_else(|| bad("the URL has no scheme; it looks like etcd://host:2379/app"))?;
        if scheme.is_empty() || !scheme.chars().all(|c| c.is_ascii_alphanumeric() || c == '+') {
            return Err(bad("the URL's scheme is malformed"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if path.contains('@') || query.contains('@') {
            // Most likely a password with a `/` or `?` in it, which must not end up as a name.
            return Err(bad("an @ after the host; write %40, and in a password %2F for / and %3F for ?"));
        }
        let (login, hosts) = authority.rsplit_once('@').map_or((None, authority), |(l, h)| (Some(l), h));
        let endpoints = hosts.split(',').map(endpoint).collect::<Result<Vec<_>>>()?;
        let mut config = Self::new(scheme, endpoints);
        if let Some(login) = login {
            let (user, password) = login.split_once(':').map_or((login, None), |(u, p)| (u, Some(p)));
            config.user = Some(decode(user)?).filter(|u| !u.is_empty());
            config.password = password.map(decode).transpose()?.map(Secret::new);
        }
        if scheme.split('+').next().is_some_and(|s| matches!(s, "etcds" | "rediss" | "consuls" | "zookeepers")) {
            config.tls = Some(Tls::default());
        }
        config.namespace = namespace(&decode(path)?)?;
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            config.set(&name, value.into_owned())?;
        }
        Ok(config)
    }

    fn set(&mut self, name: &str, value: String) -> Result<()> {
        match name {
            "ttl" => self.session_ttl = duration(name, &value)?,
            "connect_timeout" => self.connect_timeout = duration(name, &value)?,
            "request_timeout" => self.request_timeout = duration(name, &value)?,
            "token" => self.token = Some(Secret::new(value)),
            "ca" | "cert" | "key" => {
                let tls = self.tls.as_mut().ok_or_else(|| {
                    bad(format!("the option {name} needs TLS: use the scheme with an s, such as etcds://"))
                })?;
                let file = Some(PathBuf::from(value));
                match name {
                    "ca" => tls.ca = file,
                    "cert" => tls.cert = file,
                    _ => tls.key = file,
                }
            }
            _ => {
                self.extra.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }

    /// Sets the part of the store that this application owns: a path such as `my-app` or `team/my-app`.
    ///
    /// # Errors
    /// `InvalidInput` if a segment is empty or too long.
    pub fn with_namespace(mut self, path: &str) -> Result<Self> {
        self.namespace = namespace(path)?;
        Ok(self)
    }

    /// Sets user and password.
    #[must_use]
    pub fn with_login(mut self, user: impl Into<String>, password: impl Into<Secret>) -> Self {
        self.user = Some(user.into());
        self.password = Some(password.into());
        self
    }

    /// Sets the access token.
    #[must_use]
    pub fn with_token(mut self, token: impl Into<Secret>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Turns TLS on with this material.
    #[must_use]
    pub fn with_tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets the TTL that sessions ask for.
    #[must_use]
    pub fn with_session_ttl(mut self, ttl: Duration) -> Self {
        self.session_ttl = ttl;
        self
    }

    /// Sets the limits for one connection and one request.
    #[must_use]
    pub fn with_timeouts(mut self, connect: Duration, request: Duration) -> Self {
        self.connect_timeout = connect;
        self.request_timeout = request;
        self
    }

    /// Sets an option that only this backend knows.
    #[must_use]
    pub fn with_option(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.extra.insert(name.into(), value.into());
        self
    }

    /// Checks what is the same for every backend, and that every extra option is one of `known`.
    ///
    /// # Errors
    /// `InvalidInput` naming the option.
    pub fn validate(&self, known: &[&str]) -> Result<()> {
        if self.endpoints.is_empty() {
            return Err(bad("no endpoint is given"));
        }
        for (name, limit) in [
            ("ttl", self.session_ttl),
            ("connect_timeout", self.connect_timeout),
            ("request_timeout", self.request_timeout),
        ] {
            check_duration(name, limit)?;
        }
        if let Some(name) = self.extra.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(bad(format!("unknown option {name:?}; this backend knows {known:?}")));
        }
        if self.tls.as_ref().is_some_and(|t| t.cert.is_some() != t.key.is_some()) {
            return Err(bad("cert and key belong together: give both or neither"));
        }
        Ok(())
    }
}

fn bad(message: impl Into<String>) -> Error {
    Error::invalid("connect", message)
}

fn decode(text: &str) -> Result<String> {
    percent_encoding::percent_decode_str(text)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| bad("the URL is not UTF-8 after decoding"))
}

fn namespace(path: &str) -> Result<String> {
    let path = path.trim_matches('/');
    if path.is_empty() { Ok(String::new()) } else { Ok(Dir::from_path(path)?.as_str().to_owned()) }
}

fn endpoint(text: &str) -> Result<String> {
    let port = match text.strip_prefix('[') {
        Some(v6) => {
            let (host, rest) = v6.split_once(']').ok_or_else(|| bad("an IPv6 host has no closing bracket"))?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| bad("an IPv6 host is malformed"))?;
            rest.strip_prefix(':').or((!rest.is_empty()).then_some("?"))
        }
        None => text.split_once(':').map(|(_, port)| port),
    };
    if text.is_empty() || text.starts_with(':') {
        return Err(bad("a host is empty"));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control() || matches!(c, '/' | '\\' | '#')) {
        return Err(bad("a host has a character that hosts cannot have"));
    }
    if let Some(port) = port {
        port.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| bad("a port is not a number from 1 to 65535"))?;
    }
    Ok(text.to_owned())
}

fn duration(name: &str, text: &str) -> Result<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number = number.parse::<u64>().map_err(|_| bad(format!("{name} is not a time such as 10s or 1500ms")))?;
    let time = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        _ => return Err(bad(format!("{name} needs a unit: ms, s or m"))),
    };
    check_duration(name, time)?;
    Ok(time)
}

/// A day: far beyond any useful limit, and far below what would overflow a clock.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

fn check_duration(name: &str, time: Duration) -> Result<()> {
    if time.is_zero() || time > LONGEST {
        return Err(bad(format!("{name} must be more than zero and at most one day")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_url_arrives() {
        let c = Config::parse(
            "rediss+sentinel://u:p%40ss@[::1]:26379,h2:26380/team/my%20app?ttl=1500ms&ca=/c.pem&master=m",
        )
        .unwrap();
        assert_eq!(c.endpoints, ["[::1]:26379", "h2:26380"]);
        assert_eq!(c.namespace, "team/my app");
        assert_eq!(&*c.password.as_ref().unwrap().expose(), "p@ss");
        assert_eq!(c.session_ttl, Duration::from_millis(1500));
        assert_eq!(c.tls.unwrap().ca.unwrap(), PathBuf::from("/c.pem"));
        assert_eq!(c.extra["master"], "m");
    }

    #[test]
    fn bad_urls_are_refused_and_secrets_stay_out_of_the_message() {
        for url in [
            "",
            "etcd",
            "etcd:/h",
            "://h",
            "etcd://",
            "etcd://h:0",
            "etcd://h:99999",
            "etcd://a,,b",
            "etcd://[::1",
            "etcd://u:hunter2@h:x/ns",
            "etcd://h?ttl=0s",
            "etcd://h?ttl=10",
            "etcd://h?ttl=99999999999999999999s",
            "etcd://u:hunter2@h?ca=/x",
            "etcd://h/a//b",
            "etcd://h/%ff",
            "redis://u:12/hunter2@h/app",
            "etcd://u:1?hunter2@h",
        ] {
            let e = Config::parse(url).expect_err(url);
            assert_eq!(e.kind(), crate::ErrorKind::InvalidInput);
            assert!(!format!("{e} {e:?}").contains("hunter2"));
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let c = Config::parse("consul://u:hunter2@h?token=hunter3&acl_token=hunter4").unwrap();
        let shown = format!("{c:?}");
        assert!(!shown.contains("hunter"), "{shown}");
    }

    #[test]
    fn an_option_nobody_knows_is_an_error() {
        let c = Config::parse("etcd://h?tll=10s").unwrap();
        assert!(c.validate(&["auth"]).unwrap_err().to_string().contains("tll"));
    }
}
