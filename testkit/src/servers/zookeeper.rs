use std::ffi::OsString;
use std::fmt::Write;
use std::time::Duration;

use super::port::Port;
use super::probe::Probe;
use super::server::{Home, Launch};
use super::{Cluster, Error, Kind, Server};
use crate::install::{JAVA, find, zookeeper_class_path};
use crate::tls::TlsFiles;

/// How a ZooKeeper server is set up. Container and TTL nodes are on; digest authentication needs no
/// setting.
#[derive(Debug, Clone)]
pub struct ZooKeeperOptions {
    /// `tickTime`. A session lasts at least 2 and at most 20 ticks, whatever the client asks for.
    pub tick: Duration,
    /// Serves TLS on the client port and asks every client for its certificate.
    pub tls: Option<TlsFiles>,
    /// More lines of `zoo.cfg`, such as `snapCount=100`.
    pub extra_lines: Vec<String>,
}

impl Default for ZooKeeperOptions {
    /// A tick of 500 ms, so that sessions of 1 s are granted as asked.
    fn default() -> Self {
        Self { tick: Duration::from_millis(500), tls: None, extra_lines: Vec::new() }
    }
}

/// Starts ZooKeeper.
#[derive(Debug, Clone, Copy)]
pub struct ZooKeeper;

struct Peer {
    name: String,
    id: usize,
    home: Home,
    plain: Port,
    secure: Option<Port>,
    quorum: Port,
    election: Port,
}

impl ZooKeeper {
    /// One server. Ready when `srvr` names its mode.
    ///
    /// # Errors
    ///
    /// [`Error::MissingProgram`] without `java` or the jars; [`Error::NotReady`] with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn start(options: ZooKeeperOptions) -> Result<Server, Error> {
        let peer = Peer::reserve("zookeeper", 1, &options)?;
        peer.server(&options, "")?.started().await
    }

    /// Three servers. Ready when each leads or follows.
    ///
    /// # Errors
    ///
    /// As [`ZooKeeper::start`].
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn cluster(options: ZooKeeperOptions) -> Result<Cluster, Error> {
        let peers =
            (1..=3).map(|id| Peer::reserve(&format!("zookeeper{id}"), id, &options)).collect::<Result<Vec<_>, _>>()?;
        let mut ensemble = "initLimit=20\nsyncLimit=10\n".to_owned();
        for peer in &peers {
            let (quorum, election) = (peer.quorum.addr(), peer.election.number());
            writeln!(ensemble, "server.{}={quorum}:{election}", peer.id).expect("writing to a String cannot fail");
        }
        let servers = peers.into_iter().map(|peer| peer.server(&options, &ensemble)).collect::<Result<Vec<_>, _>>()?;
        Cluster::started(servers).await
    }
}

impl Peer {
    fn reserve(name: &str, id: usize, options: &ZooKeeperOptions) -> Result<Self, Error> {
        Ok(Self {
            name: name.to_owned(),
            id,
            home: Home::new(name)?,
            plain: Port::reserve()?,
            secure: options.tls.as_ref().map(|_| Port::reserve()).transpose()?,
            quorum: Port::reserve()?,
            election: Port::reserve()?,
        })
    }

    fn server(self, options: &ZooKeeperOptions, ensemble: &str) -> Result<Server, Error> {
        let program = find(&JAVA)?;
        let class_path = zookeeper_class_path()?;
        let data = self.home.data();
        let factory = if options.tls.is_some() { "NettyServerCnxnFactory" } else { "NIOServerCnxnFactory" };
        let mut args: Vec<OsString> = JVM.iter().map(OsString::from).collect();
        args.push(format!("-Dzookeeper.serverCnxnFactory=org.apache.zookeeper.server.{factory}").into());
        args.extend(["-cp".into(), class_path]);
        args.push("org.apache.zookeeper.server.quorum.QuorumPeerMain".into());
        args.push(data.join("zoo.cfg").into());
        let client = self.secure.as_ref().unwrap_or(&self.plain).number();
        let launch = Launch {
            kind: Kind::ZooKeeper,
            name: self.name.clone(),
            program,
            args,
            seeds: vec![("zoo.cfg", self.config(options, ensemble)), ("myid", self.id.to_string())],
            client,
            probe: Probe::ZooKeeper { client: self.plain.number() },
            credentials: None,
            token: None,
            tls: options.tls.clone(),
            // An empty member copies everything from the leader.
            wipes_alone: true,
        };
        let mut ports = vec![self.plain, self.quorum, self.election];
        ports.extend(self.secure);
        Ok(Server::new(launch, self.home, ports))
    }

    fn config(&self, options: &ZooKeeperOptions, ensemble: &str) -> String {
        let mut text = format!(
            "tickTime={}\ndataDir={}\nclientPort={}\nclientPortAddress=127.0.0.1\nmaxClientCnxns=0\n{ensemble}",
            options.tick.as_millis(),
            self.home.data().display(),
            self.plain.number(),
        );
        if let (Some(tls), Some(secure)) = (&options.tls, &self.secure) {
            let lines = [
                format!("secureClientPort={}", secure.number()),
                "secureClientPortAddress=127.0.0.1".to_owned(),
                format!("ssl.keyStore.location={}", tls.server_key_store().display()),
                "ssl.keyStore.type=PEM".to_owned(),
                format!("ssl.trustStore.location={}", tls.ca().display()),
                "ssl.trustStore.type=PEM".to_owned(),
                format!("ssl.clientAuth={}", if tls.asks_clients() { "need" } else { "none" }),
            ];
            text.push_str(&lines.join("\n"));
            text.push('\n');
        }
        for line in &options.extra_lines {
            text.push_str(line);
            text.push('\n');
        }
        text
    }
}

/// A small JVM that starts fast beside a build: one compiler tier, serial collector, 96 MB.
const JVM: [&str; 11] = [
    "-Xmx96m",
    "-Xshare:auto",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
    "-Dzookeeper.admin.enableServer=false",
    "-Dzookeeper.jmx.log4j.disable=true",
    "-Dzookeeper.4lw.commands.whitelist=*",
    "-Dzookeeper.extendedTypesEnabled=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
];
