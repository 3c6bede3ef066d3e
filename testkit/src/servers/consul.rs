use std::time::Duration;

use serde_json::json;

use super::port::Port;
use super::probe::Probe;
use super::server::{Home, Launch};
use super::{Cluster, Error, Kind, Secret, Server};
use crate::install::{CONSUL, find};
use crate::tls::TlsFiles;

/// How a Consul server is set up. It keeps its data on disk: it is not `-dev`.
#[derive(Debug, Clone)]
pub struct ConsulOptions {
    /// `session_ttl_min`: the shortest session that the server accepts.
    pub session_ttl_min: Duration,
    /// `http_max_conns_per_client`: how many connections it takes from one address.
    pub connections: u32,
    /// Serves DNS on this loopback port, over UDP and TCP.
    pub dns: Option<u16>,
    /// Turns access control on, denies by default, and gives this token all rights. Consul wants a UUID.
    pub token: Option<Secret>,
    /// Serves HTTPS on the client port and asks every client for its certificate.
    pub tls: Option<TlsFiles>,
}

impl Default for ConsulOptions {
    /// Consul's own defaults of 10 s for the shortest session and 200 connections, no DNS, no access control, no TLS.
    fn default() -> Self {
        Self { session_ttl_min: Duration::from_secs(10), connections: 200, dns: None, token: None, tls: None }
    }
}

/// Starts Consul.
#[derive(Debug, Clone, Copy)]
pub struct Consul;

struct Agent {
    name: String,
    home: Home,
    http: Port,
    https: Option<Port>,
    server: Port,
    serf: Port,
}

impl Consul {
    /// One server. Ready when there is a leader, a key can be written, and serfHealth is passing.
    ///
    /// # Errors
    ///
    /// [`Error::MissingProgram`] without `consul`; [`Error::NotReady`] with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn start(options: ConsulOptions) -> Result<Server, Error> {
        let agent = Agent::reserve("consul", &options)?;
        agent.server(&options, None)?.started().await
    }

    /// Three servers. Ready when a key can be written through each.
    ///
    /// # Errors
    ///
    /// As [`Consul::start`].
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn cluster(options: ConsulOptions) -> Result<Cluster, Error> {
        let agents = (1..=3).map(|i| Agent::reserve(&format!("consul{i}"), &options)).collect::<Result<Vec<_>, _>>()?;
        let join: Vec<String> = agents.iter().map(|agent| agent.serf.addr().to_string()).collect();
        let servers =
            agents.into_iter().map(|agent| agent.server(&options, Some(&join))).collect::<Result<Vec<_>, _>>()?;
        Cluster::started(servers).await
    }
}

impl Agent {
    fn reserve(name: &str, options: &ConsulOptions) -> Result<Self, Error> {
        Ok(Self {
            name: name.to_owned(),
            home: Home::new(name)?,
            http: Port::reserve()?,
            https: options.tls.as_ref().map(|_| Port::reserve()).transpose()?,
            server: Port::reserve()?,
            serf: Port::reserve()?,
        })
    }

    fn server(self, options: &ConsulOptions, join: Option<&[String]>) -> Result<Server, Error> {
        let program = find(&CONSUL)?;
        let data = self.home.data();
        let https = self.https.as_ref().map_or(-1, |p| i32::from(p.number()));
        let mut config = json!({
            "node_name": self.name,
            "server": true,
            "data_dir": data.join("state"),
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "ports": {
                // Plain text also beside HTTPS, so that readiness can always be asked.
                "http": self.http.number(), "https": https, "server": self.server.number(),
                "serf_lan": self.serf.number(), "serf_wan": -1, "dns": options.dns.map_or(-1, i32::from), "grpc": -1,
            },
            "performance": { "raft_multiplier": 1 },
            "limits": { "http_max_conns_per_client": options.connections },
            "session_ttl_min": format!("{}ms", options.session_ttl_min.as_millis()),
            "disable_update_check": true,
            "log_level": "warn",
        });
        match join {
            None => config["bootstrap"] = json!(true),
            Some(join) => {
                config["bootstrap_expect"] = json!(join.len());
                config["retry_join"] = json!(join);
                config["retry_interval"] = json!("500ms");
                // An orderly stop must not leave the cluster: the member comes back with its data.
                config["leave_on_terminate"] = json!(false);
            }
        }
        if let Some(token) = &options.token {
            let token = token.expose();
            config["acl"] = json!({
                "enabled": true,
                "default_policy": "deny",
                "tokens": { "master": token, "agent": token },
            });
        }
        if let Some(tls) = &options.tls {
            config["ca_file"] = json!(tls.ca());
            config["cert_file"] = json!(tls.server_cert());
            config["key_file"] = json!(tls.server_key());
            config["verify_incoming_https"] = json!(tls.asks_clients());
        }
        let client = self.https.as_ref().unwrap_or(&self.http).number();
        let launch = Launch {
            kind: Kind::Consul,
            name: self.name.clone(),
            program,
            args: vec!["agent".into(), "-config-file".into(), data.join("consul.json").into()],
            seeds: vec![("consul.json", config.to_string())],
            client,
            probe: Probe::Consul { http: self.http.number(), token: options.token.clone(), node: self.name },
            credentials: None,
            token: options.token.clone(),
            tls: options.tls.clone(),
            wipes_alone: join.is_none(),
        };
        let mut ports = vec![self.http, self.server, self.serf];
        ports.extend(self.https);
        Ok(Server::new(launch, self.home, ports))
    }
}
