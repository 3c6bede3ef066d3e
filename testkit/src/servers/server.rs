use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::etcd::enable_auth;
use super::port::{Port, is_free};
use super::probe::Probe;
use super::process::{Process, Program, tail};
use super::{Credentials, Error, Secret};
use crate::tls::TlsFiles;

/// Long, because a build may take both cores while a JVM starts.
pub(crate) const READY_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(10);
pub(crate) const ASK_EVERY: Duration = Duration::from_millis(20);

/// Which coordinator a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// etcd.
    Etcd,
    /// Redis or Valkey.
    Redis,
    /// A Redis Sentinel, which names the primary to clients.
    Sentinel,
    /// Consul.
    Consul,
    /// ZooKeeper.
    ZooKeeper,
    /// PostgreSQL: no coordinator, but a participant of transactions.
    Postgres,
}

impl Kind {
    pub(crate) fn scheme(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Redis => "redis",
            Self::Sentinel => "redis-sentinel",
            Self::Consul => "consul",
            Self::ZooKeeper => "zookeeper",
            Self::Postgres => "postgresql",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Etcd => "etcd",
            Self::Redis => "Redis",
            Self::Sentinel => "Redis Sentinel",
            Self::Consul => "Consul",
            Self::ZooKeeper => "ZooKeeper",
            Self::Postgres => "PostgreSQL",
        })
    }
}

/// Everything that one start of a server needs; the same for every restart. No `Debug`: the seeds hold
/// passwords.
pub(crate) struct Launch {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Written into the data directory when it is empty: some servers rewrite their own configuration.
    pub(crate) seeds: Vec<(&'static str, String)>,
    pub(crate) client: u16,
    pub(crate) probe: Probe,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) token: Option<Secret>,
    pub(crate) tls: Option<TlsFiles>,
    /// Whether it is of use alone with empty data: a member of most clusters is not.
    pub(crate) wipes_alone: bool,
}

/// The directory of one server: its data, its log. Deleted when dropped.
#[derive(Debug)]
pub(crate) struct Home(TempDir);

impl Home {
    pub(crate) fn new(name: &str) -> Result<Self, Error> {
        tempfile::Builder::new()
            .prefix(&format!("quorate-testkit-{name}-"))
            .tempdir()
            .map(Self)
            .map_err(|e| Error::io("make a temporary directory", e))
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.0.path().join("log")
    }
}

/// One running, stopped or killed server. Dropping it kills it and deletes its data.
pub struct Server {
    launch: Launch,
    /// Above `home`, so that it is dropped first: the server must have ended when its data is deleted.
    process: Mutex<Option<Process>>,
    home: Home,
    ports: Vec<Port>,
    /// Held through a start or stop, so that two of them do not meet.
    lifecycle: tokio::sync::Mutex<()>,
}

impl Server {
    pub(crate) fn new(launch: Launch, home: Home, ports: Vec<Port>) -> Self {
        Self { launch, process: Mutex::new(None), home, ports, lifecycle: tokio::sync::Mutex::new(()) }
    }

    /// First start of a server that is complete alone.
    pub(crate) async fn started(self) -> Result<Self, Error> {
        self.launch_empty().await?;
        self.wait_ready().await?;
        self.set_up().await?;
        Ok(self)
    }

    /// Which coordinator this is.
    pub fn kind(&self) -> Kind {
        self.launch.kind
    }

    /// The server's name in its cluster and in error messages.
    pub fn name(&self) -> &str {
        &self.launch.name
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        super::port::loopback(self.launch.client)
    }

    /// The port clients connect to.
    pub fn port(&self) -> u16 {
        self.launch.client
    }

    /// `etcd://127.0.0.1:PORT` and the like, without credentials. A Sentinel says `redis-sentinel://`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.launch.kind.scheme(), self.addr())
    }

    /// The user that the server was started with, if it asks for one.
    pub fn credentials(&self) -> Option<&Credentials> {
        self.launch.credentials.as_ref()
    }

    /// The token with all rights, if the server asks for tokens (Consul).
    pub fn token(&self) -> Option<&Secret> {
        self.launch.token.as_ref()
    }

    /// The certificates, if the client port speaks TLS.
    pub fn tls(&self) -> Option<&TlsFiles> {
        self.launch.tls.as_ref()
    }

    /// The directory the server keeps its data in.
    pub fn data_dir(&self) -> PathBuf {
        self.home.data()
    }

    /// The process id, `None` while the server is down.
    pub fn pid(&self) -> Option<u32> {
        let mut process = self.process();
        let process = process.as_mut()?;
        matches!(process.ended(), Ok(None)).then(|| process.id())
    }

    /// The last 4 kB of what the server wrote, with its password and token blotted out.
    pub fn log_tail(&self) -> String {
        let password = self.launch.credentials.as_ref().map(|login| &login.password);
        password
            .into_iter()
            .chain(&self.launch.token)
            .filter(|secret| !secret.expose().is_empty())
            .fold(tail(&self.home.log(), 4 << 10), |log, secret| log.replace(secret.expose(), "***"))
    }

    /// Whether the server, asked itself, leads its cluster. A server that is alone leads.
    ///
    /// # Errors
    ///
    /// When it does not answer within 2 s.
    ///
    /// # Cancel safety
    ///
    /// Reads only.
    pub async fn is_leader(&self) -> Result<bool, Error> {
        let asked = self.launch.probe.leads().await;
        asked.map_err(|e| Error::io(format!("ask {} whether it leads", self.name()), e))
    }

    /// Stops the server orderly (SIGTERM; PostgreSQL, which then waits for its clients, SIGINT), and after 10 s with
    /// SIGKILL. Does nothing when it is down.
    ///
    /// # Errors
    ///
    /// When the process cannot be signalled.
    ///
    /// # Cancel safety
    ///
    /// The signal may have been sent; call it again to wait for the end.
    pub async fn stop(&self) -> Result<(), Error> {
        let _one = self.lifecycle.lock().await;
        let orderly = if self.launch.kind == Kind::Postgres { Signal::INT } else { Signal::TERM };
        self.end(orderly).await
    }

    /// Kills the server at once (SIGKILL): nothing is flushed, no session is closed. Does nothing when it
    /// is down.
    ///
    /// # Errors
    ///
    /// When the process cannot be signalled.
    ///
    /// # Cancel safety
    ///
    /// The signal may have been sent; call it again to wait for the end.
    pub async fn kill(&self) -> Result<(), Error> {
        let _one = self.lifecycle.lock().await;
        self.end(Signal::KILL).await
    }

    /// Freezes the server (SIGSTOP). Its connections stay open and nothing is answered.
    ///
    /// # Errors
    ///
    /// [`Error::NotRunning`] when it is down.
    pub fn pause(&self) -> Result<(), Error> {
        self.signal(Signal::STOP)
    }

    /// Thaws the server (SIGCONT). Does nothing to one that is not paused.
    ///
    /// # Errors
    ///
    /// [`Error::NotRunning`] when it is down.
    pub fn resume(&self) -> Result<(), Error> {
        self.signal(Signal::CONT)
    }

    /// Starts the server again on the same port with the same data, stopping it first if it runs, and
    /// waits until it is ready.
    ///
    /// A member of a cluster that lost its majority becomes ready only when enough others run: use
    /// [`Server::launch`] on each and [`Server::wait_ready`] after.
    ///
    /// # Errors
    ///
    /// When it does not become ready within 60 s, with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// The server may be down or starting; call it again.
    pub async fn restart(&self) -> Result<(), Error> {
        self.stop().await?;
        self.launch().await?;
        self.wait_ready().await
    }

    /// Like [`Server::restart`], but with empty data.
    ///
    /// # Errors
    ///
    /// As `restart`; [`Error::Unsupported`] for a member of a cluster that does not take an empty member
    /// back (etcd, Consul, Redis Cluster): see [`Cluster::restart_wiped`](super::Cluster::restart_wiped).
    ///
    /// # Cancel safety
    ///
    /// The server may be down or starting, its data gone; call it again.
    pub async fn restart_wiped(&self) -> Result<(), Error> {
        if !self.launch.wipes_alone {
            return Err(Error::Unsupported {
                server: self.name().to_owned(),
                reason: "this member cannot rejoin its cluster with empty data; wipe the whole cluster with Cluster::restart_wiped".to_owned(),
            });
        }
        self.stop().await?;
        self.launch_empty().await?;
        self.wait_ready().await?;
        self.set_up().await
    }

    /// Starts the process of a server that is down, and does not wait until it is ready.
    ///
    /// # Errors
    ///
    /// [`Error::PortInUse`], or when the process cannot be started.
    ///
    /// # Cancel safety
    ///
    /// Either nothing was started or the server runs.
    pub async fn launch(&self) -> Result<(), Error> {
        let _one = self.lifecycle.lock().await;
        if self.pid().is_some() {
            return Ok(());
        }
        if let Some(port) = self.ports.iter().find(|port| !is_free(port.number())) {
            return Err(Error::PortInUse { server: self.name().to_owned(), port: port.number() });
        }
        let started = Process::start(&Program {
            path: &self.launch.program,
            args: &self.launch.args,
            home: self.home.0.path(),
            log: &self.home.log(),
        });
        let process = started.map_err(|e| Error::io(format!("start {}", self.name()), e))?;
        *self.process() = Some(process);
        Ok(())
    }

    /// Waits until the server answers in its own protocol.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] when it ends, or is not ready within 60 s.
    ///
    /// # Cancel safety
    ///
    /// Reads only.
    pub async fn wait_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let ended = match self.process().as_mut() {
                Some(process) => process.ended(),
                None => Ok(Some("it was not started".to_owned())),
            };
            let ended = ended.map_err(|e| Error::io(format!("watch {}", self.name()), e))?;
            if let Some(how) = ended {
                return Err(self.not_ready(format!("it ended ({how}) before it was ready")));
            }
            let seen = match self.launch.probe.ready().await {
                Ok(()) => return Ok(()),
                Err(seen) => seen,
            };
            if Instant::now() > deadline {
                return Err(self.not_ready(format!(
                    "not ready after {} s; awaited that {}, last seen: {seen}",
                    READY_WITHIN.as_secs(),
                    self.launch.probe,
                )));
            }
            sleep(ASK_EVERY).await;
        }
    }

    pub(crate) fn probe(&self) -> &Probe {
        &self.launch.probe
    }

    pub(crate) fn reserved_ports(&self) -> impl DoubleEndedIterator<Item = u16> {
        self.ports.iter().map(Port::number)
    }

    pub(crate) fn not_ready(&self, reason: String) -> Error {
        Error::NotReady { server: self.name().to_owned(), reason, log_tail: self.log_tail() }
    }

    pub(crate) async fn launch_empty(&self) -> Result<(), Error> {
        let data = self.home.data();
        let one = self.lifecycle.lock().await;
        self.seed(&data).map_err(|e| Error::writing(&data, e))?;
        drop(one);
        self.launch().await
    }

    /// What must be done once on an empty server that answers.
    pub(crate) async fn set_up(&self) -> Result<(), Error> {
        match (&self.launch.credentials, self.launch.kind) {
            (Some(root), Kind::Etcd) => {
                enable_auth(self.addr(), self.launch.tls.as_ref(), root).await?;
                self.wait_ready().await
            }
            _ => Ok(()),
        }
    }

    fn seed(&self, data: &Path) -> std::io::Result<()> {
        use std::io::Write;
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

        if data.exists() {
            fs::remove_dir_all(data)?;
        }
        // etcd refuses a data directory that others can read.
        fs::DirBuilder::new().mode(0o700).create(data)?;
        for (name, text) in &self.launch.seeds {
            fs::OpenOptions::new()
                .create_new(true)
                .write(true)
                .mode(0o600)
                .open(data.join(name))?
                .write_all(text.as_bytes())?;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<(), Error> {
        if self.pid().is_none() {
            return Err(Error::NotRunning { server: self.name().to_owned() });
        }
        let process = self.process();
        let sent = process.as_ref().map_or(Ok(()), |process| process.signal(signal));
        sent.map_err(|e| Error::io(format!("signal {}", self.name()), e))
    }

    async fn end(&self, signal: Signal) -> Result<(), Error> {
        let mut kill_at = Instant::now() + STOP_WITHIN;
        if self.pid().is_some() {
            // A paused process does not see SIGTERM; SIGKILL needs no thaw.
            self.signal(signal)?;
            if signal != Signal::KILL {
                self.signal(Signal::CONT).or_else(not_running_is_fine)?;
            }
        }
        while self.pid().is_some() {
            if Instant::now() > kill_at {
                self.signal(Signal::KILL).or_else(not_running_is_fine)?;
                kill_at += STOP_WITHIN;
            }
            sleep(Duration::from_millis(2)).await;
        }
        // Only a reaped process is dropped here: closing the pipe of a living supervisor would delete the data.
        *self.process() = None;
        Ok(())
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("url", &self.url())
            .field("name", &self.name())
            .field("pid", &self.pid())
            .finish_non_exhaustive()
    }
}

fn not_running_is_fine(error: Error) -> Result<(), Error> {
    match error {
        Error::NotRunning { .. } => Ok(()),
        other => Err(other),
    }
}
