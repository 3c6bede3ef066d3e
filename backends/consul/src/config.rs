//! Options: what of a [`Config`] concerns Consul, checked before anything is sent.
//!
//! Promise: everything that can be wrong without asking a server is an `InvalidInput` here, never a panic
//! later; a token or password never appears in a message.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::{
    header::HeaderValue,
    http::uri::{Authority, Scheme},
};
use quorate_core::{Config, Error, Result, Secret};

use crate::error::NAME;

/// The options that only this backend knows.
const KNOWN: &[&str] = &["session", "tls_server_name", "connections"];

/// Requests under way at once. A Consul agent takes 200 connections from one address, blocked queries
/// included, so that two clients of one machine still fit.
const CONNECTIONS: usize = 64;

/// What a lease is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SessionKind {
    /// A session that ends with a TTL check on the agent.
    Agent,
    /// A session with a TTL of its own.
    Ttl,
}

/// The checked options.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) scheme: Scheme,
    pub(crate) agents: Vec<Authority>,
    token: Option<Secret>,
    user: Option<String>,
    password: Option<Secret>,
    /// `None`: find out what the agent allows.
    pub(crate) session: Option<SessionKind>,
    pub(crate) tls_server_name: Option<String>,
    pub(crate) connections: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) request_timeout: Duration,
}

impl Settings {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        config.validate(KNOWN).map_err(|e| e.on(NAME))?;
        if !matches!(config.scheme.as_str(), "consul" | "consuls") {
            return Err(bad(format!("the scheme is {:?}; this backend knows consul and consuls", config.scheme)));
        }
        let secure = config.tls.is_some();
        if config.scheme == "consuls" && !secure {
            return Err(bad("the scheme is consuls, but TLS is not set up"));
        }
        let default_port = if secure { 8501 } else { 8500 };
        let agents = config.endpoints.iter().map(|e| authority(e, default_port)).collect::<Result<_>>()?;
        let session = match config.extra.get("session").map(String::as_str) {
            None | Some("auto") => None,
            Some("agent") => Some(SessionKind::Agent),
            Some("ttl") => Some(SessionKind::Ttl),
            Some(other) => return Err(bad(format!("session={other:?} is not one of auto, agent, ttl"))),
        };
        let connections = match config.extra.get("connections") {
            None => CONNECTIONS,
            Some(text) => text
                .parse()
                .ok()
                .filter(|n| (1..=4096).contains(n))
                .ok_or_else(|| bad("connections is not a number from 1 to 4096"))?,
        };
        let settings = Self {
            scheme: if secure { Scheme::HTTPS } else { Scheme::HTTP },
            agents,
            token: config.token.clone(),
            user: config.user.clone(),
            password: config.password.clone(),
            session,
            tls_server_name: config.extra.get("tls_server_name").cloned(),
            connections,
            connect_timeout: config.connect_timeout,
            request_timeout: config.request_timeout,
        };
        // What can never be sent is told now.
        settings.token().and(settings.login())?;
        Ok(settings)
    }

    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The token as it is now.
    pub(crate) fn token(&self) -> Result<Option<HeaderValue>> {
        let Some(token) = &self.token else { return Ok(None) };
        let mut value = HeaderValue::from_str(&token.expose())
            .map_err(|_| bad("the token has characters that no Consul token has (control characters)"))?;
        if value.is_empty() {
            return Err(bad("the token is empty; leave it out to be anonymous"));
        }
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// User and password, as they are now, for a proxy in front of Consul, as in `CONSUL_HTTP_AUTH`.
    pub(crate) fn login(&self) -> Result<Option<HeaderValue>> {
        if self.user.is_none() && self.password.is_none() {
            return Ok(None);
        }
        let user = self.user.as_deref().unwrap_or_default();
        if user.contains(':') {
            return Err(bad("a user name with a colon cannot be sent"));
        }
        let password = self.password.as_ref().map(Secret::expose).unwrap_or_default();
        let text = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        let mut value = HeaderValue::try_from(text).expect("base64 is plain ASCII");
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

pub(crate) fn bad(message: impl Into<String>) -> Error {
    Error::invalid("connect", message).on(NAME)
}

fn authority(endpoint: &str, default_port: u16) -> Result<Authority> {
    let has_port = match endpoint.rsplit_once(']') {
        Some((_, rest)) => !rest.is_empty(),
        None => endpoint.contains(':'),
    };
    let text = if has_port { endpoint.to_owned() } else { format!("{endpoint}:{default_port}") };
    let authority: Authority = text.parse().map_err(|_| bad("an endpoint is not host, host:port or [ipv6]:port"))?;
    // `user@host` parses as an authority, but is not an endpoint.
    let whole = !authority.host().is_empty() && authority.port_u16().is_some() && !text.contains('@');
    if whole { Ok(authority) } else { Err(bad("an endpoint is not host, host:port or [ipv6]:port")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Result<Settings> {
        Settings::new(&Config::parse(url).unwrap())
    }

    #[test]
    fn ports_have_defaults_and_ipv6_hosts_work() {
        let agents = |url| settings(url).unwrap().agents.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(agents("consul://a,b:1,[::1],[::1]:2"), ["a:8500", "b:1", "[::1]:8500", "[::1]:2"]);
        assert_eq!(agents("consuls://a"), ["a:8501"]);
    }

    #[test]
    fn what_can_never_work_is_refused_without_showing_secrets() {
        let mut newline = Config::parse("consul://h").unwrap();
        newline.token = Some(Secret::new("hunter2\r\nX-Evil: 1"));
        let mut at = Config::parse("consul://h").unwrap();
        at.endpoints = vec!["user@h:1".into()];
        let from = |url| Config::parse(url).unwrap();
        for config in [newline, at, from("etcd://h"), from("consul://h?session=x"), from("consul://h?connections=0")] {
            let e = Settings::new(&config).unwrap_err();
            assert_eq!(e.kind(), quorate_core::ErrorKind::InvalidInput);
            assert!(!format!("{e:?}").contains("hunter2"), "{e:?}");
        }
        let shown = format!("{:?}", settings("consul://u:hunter2@h?token=hunter3").unwrap());
        assert!(!shown.contains("hunter") && !shown.contains("dTpodW50ZXIy"), "{shown}");
    }
}
