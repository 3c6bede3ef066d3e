use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::port::Port;
use super::probe::Probe;
use super::server::{Home, Launch};
use super::{Cluster, Credentials, Error, Kind, Server};
use crate::install::{ETCD, ETCDCTL, find};
use crate::tls::TlsFiles;

/// How an etcd server is set up.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// `--heartbeat-interval`, whole milliseconds.
    pub heartbeat: Duration,
    /// `--election-timeout`, whole milliseconds. etcd grants no lease shorter than 1.5 times this.
    pub election: Duration,
    /// Turns authentication on, with this password for the user `root`; the name must be `root`.
    pub root: Option<Credentials>,
    /// Serves TLS on the client port and asks every client for its certificate.
    pub tls: Option<TlsFiles>,
    /// More command-line flags, such as `--auto-compaction-retention=1`.
    pub extra_args: Vec<String>,
}

impl Default for EtcdOptions {
    /// Heartbeat 50 ms and election 250 ms, so that leases of 1 s are granted as asked.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            election: Duration::from_millis(250),
            root: None,
            tls: None,
            extra_args: Vec::new(),
        }
    }
}

/// Starts etcd.
#[derive(Debug, Clone, Copy)]
pub struct Etcd;

struct Member {
    name: String,
    home: Home,
    client: Port,
    peer: Port,
    metrics: Port,
}

impl Etcd {
    /// One server. Ready when `/health` says true.
    ///
    /// # Errors
    ///
    /// [`Error::MissingProgram`] without `etcd` (and `etcdctl`, with authentication);
    /// [`Error::NotReady`] with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn start(options: EtcdOptions) -> Result<Server, Error> {
        let members = [Member::reserve("etcd")?];
        let cluster = initial_cluster(&members);
        let [member] = members;
        member.server(&options, &cluster, true)?.started().await
    }

    /// Three servers. Ready when each says that there is a leader.
    ///
    /// # Errors
    ///
    /// As [`Etcd::start`].
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn cluster(options: EtcdOptions) -> Result<Cluster, Error> {
        let members = (1..=3).map(|i| Member::reserve(&format!("etcd{i}"))).collect::<Result<Vec<_>, _>>()?;
        let cluster = initial_cluster(&members);
        let servers = members
            .into_iter()
            .map(|member| member.server(&options, &cluster, false))
            .collect::<Result<Vec<_>, _>>()?;
        Cluster::started(servers).await
    }
}

fn initial_cluster(members: &[Member]) -> String {
    let peers: Vec<String> =
        members.iter().map(|member| format!("{}=http://{}", member.name, member.peer.addr())).collect();
    peers.join(",")
}

impl Member {
    fn reserve(name: &str) -> Result<Self, Error> {
        Ok(Self {
            name: name.to_owned(),
            home: Home::new(name)?,
            client: Port::reserve()?,
            peer: Port::reserve()?,
            metrics: Port::reserve()?,
        })
    }

    fn server(self, options: &EtcdOptions, cluster: &str, alone: bool) -> Result<Server, Error> {
        let program = find(&ETCD)?;
        if let Some(root) = &options.root {
            find(&ETCDCTL)?;
            if root.user != "root" {
                return Err(Error::Unsupported {
                    server: self.name,
                    reason: "etcd turns authentication on only for the user root; name it so".to_owned(),
                });
            }
        }
        let launch = Launch {
            kind: Kind::Etcd,
            program,
            args: self.args(options, cluster),
            name: self.name,
            seeds: Vec::new(),
            client: self.client.number(),
            probe: Probe::Etcd { metrics: self.metrics.number() },
            credentials: options.root.clone(),
            token: None,
            tls: options.tls.clone(),
            wipes_alone: alone,
        };
        let ports = vec![self.client, self.peer, self.metrics];
        Ok(Server::new(launch, self.home, ports))
    }

    fn args(&self, options: &EtcdOptions, cluster: &str) -> Vec<OsString> {
        let scheme = options.tls.as_ref().map_or("http", |_| "https");
        let client = format!("{scheme}://{}", self.client.addr());
        let peer = format!("http://{}", self.peer.addr());
        // Plain text whatever the client port speaks, so that readiness can always be asked.
        let metrics = format!("http://{}", self.metrics.addr());
        let millis = |time: Duration| time.as_millis().to_string();
        let mut args: Vec<OsString> = vec!["--data-dir".into(), self.home.data().into()];
        for (flag, value) in [
            ("--name", self.name.clone()),
            ("--listen-client-urls", client.clone()),
            ("--advertise-client-urls", client),
            ("--listen-peer-urls", peer.clone()),
            ("--initial-advertise-peer-urls", peer),
            ("--initial-cluster", cluster.to_owned()),
            ("--listen-metrics-urls", metrics),
            ("--heartbeat-interval", millis(options.heartbeat)),
            ("--election-timeout", millis(options.election)),
            ("--log-level", "warn".to_owned()),
            ("--logger", "zap".to_owned()),
            ("--log-outputs", "stderr".to_owned()),
        ] {
            args.extend([flag.into(), value.into()]);
        }
        if let Some(tls) = &options.tls {
            for (flag, path) in [("--cert-file", tls.server_cert()), ("--key-file", tls.server_key())] {
                args.extend([flag.into(), path.into()]);
            }
            // Whoever names an authority asks for certificates, whatever else is said.
            if tls.asks_clients() {
                args.extend(["--client-cert-auth".into(), "--trusted-ca-file".into(), tls.ca().into()]);
            }
        }
        args.extend(options.extra_args.iter().map(OsString::from));
        args
    }
}

/// Makes the user root and turns authentication on, on a server that has neither yet.
pub(crate) async fn enable_auth(addr: SocketAddr, tls: Option<&TlsFiles>, root: &Credentials) -> Result<(), Error> {
    // The password goes through standard input: other users of the machine can read command lines.
    let password = format!("{}\n", root.password.expose());
    let add = ["user", "add", "root", "--interactive=false"];
    etcdctl(addr, tls, &add, &password).await?;
    etcdctl(addr, tls, &["user", "grant-role", "root", "root"], "").await.or_else(|error| match error {
        // etcd 3.5 makes the role by itself, 3.4 wants it first.
        Error::Command { ref output, .. } if output.contains("role name not found") => Ok(()),
        other => Err(other),
    })?;
    etcdctl(addr, tls, &["auth", "enable"], "").await
}

async fn etcdctl(addr: SocketAddr, tls: Option<&TlsFiles>, words: &[&str], input: &str) -> Result<(), Error> {
    let mut command = Command::new(find(&ETCDCTL)?);
    let scheme = tls.map_or("http", |_| "https");
    command
        .env("ETCDCTL_API", "3")
        .arg(format!("--endpoints={scheme}://{addr}"))
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(tls) = tls {
        command.arg("--cacert").arg(tls.ca()).arg("--cert").arg(tls.client_cert()).arg("--key").arg(tls.client_key());
    }
    let run = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let name = format!("etcdctl {}", words.join(" "));
    let output = run.await.map_err(|e| Error::io(format!("run {name}"), e))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Command { command: name, output: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}
