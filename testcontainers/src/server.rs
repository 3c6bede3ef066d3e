use std::{
    collections::HashMap,
    env, fmt,
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    process,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use quorate::{Config, Coordinator, ErrorKind};
use testcontainers::{
    ContainerAsync, GenericImage, ImageExt,
    bollard::{models::PortBinding, query_parameters as query},
    core::{IntoContainerPort, client::docker_client_instance},
    runners::AsyncRunner,
};
use tokio::time::{Instant, sleep, timeout};

use crate::{Error, Kind, port};

/// Long, because images may be large and machines busy; pulling is not counted.
const READY_WITHIN: Duration = Duration::from_secs(60);
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How long a server has for an orderly end, in seconds.
const STOP_WITHIN: i32 = 10;
/// A port that was free may have been taken when the container wants it.
const PORTS_TRIED: usize = 5;
const LABEL: &str = "org.quorate.testcontainers";

type Container = ContainerAsync<GenericImage>;

/// A coordinator in a container. Dropping it removes both it and its data.
pub struct Server {
    kind: Kind,
    port: u16,
    /// `None` while it is replaced by an empty one. Held through a start or stop, so that two of them do not meet.
    container: tokio::sync::Mutex<Option<Container>>,
    id: Mutex<String>,
}

impl Server {
    /// Starts a server and waits until it grants sessions.
    ///
    /// # Errors
    ///
    /// [`Error`] says what the daemon answered, or what the server wrote last.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left behind, if the runtime lives on for a moment.
    pub async fn start(kind: Kind) -> Result<Self, Error> {
        let (port, container) = start_somewhere(kind).await?;
        let id = Mutex::new(container.id().to_owned());
        let server = Self { kind, port, container: tokio::sync::Mutex::new(Some(container)), id };
        server.wait_ready().await?;
        Ok(server)
    }

    /// Which coordinator this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where clients connect: on 127.0.0.1.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// `etcd://127.0.0.1:PORT` and the like; [`quorate::connect`] takes it, with a namespace and options appended.
    pub fn url(&self) -> String {
        format!("{}://{}", self.kind.scheme(), self.addr())
    }

    /// The options for [`quorate::connect_with`], to be changed: a short session TTL makes tests of failures short.
    pub fn config(&self) -> Config {
        Config::new(self.kind.scheme(), [self.addr().to_string()])
    }

    /// A coordinator on this server, with default options.
    ///
    /// # Errors
    ///
    /// As [`quorate::connect`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is left behind.
    pub async fn connect(&self) -> quorate::Result<Coordinator> {
        quorate::connect_with(&self.config()).await
    }

    /// The container's id, for `docker logs` and the like. Another after [`Server::restart_wiped`].
    pub fn id(&self) -> String {
        self.id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last 4 kB of what the server wrote.
    ///
    /// # Cancel safety
    ///
    /// Reads only.
    pub async fn log_tail(&self) -> String {
        match self.container.lock().await.as_ref() {
            Some(container) => log_tail(container).await,
            None => String::new(),
        }
    }

    /// Stops the server orderly, and after 10 s by force. Its data stays.
    ///
    /// # Errors
    ///
    /// What the daemon answered.
    ///
    /// # Cancel safety
    ///
    /// The server may have stopped; call it again.
    pub async fn stop(&self) -> Result<(), Error> {
        let container = self.container.lock().await;
        stop(self.there(container.as_ref())?).await
    }

    /// Kills the server at once (SIGKILL): nothing is flushed, no session is closed. Its data stays. Does nothing when it
    /// is down.
    ///
    /// # Errors
    ///
    /// What the daemon answered.
    ///
    /// # Cancel safety
    ///
    /// The signal may have been sent; call it again to wait for the end.
    pub async fn kill(&self) -> Result<(), Error> {
        let container = self.container.lock().await;
        kill(self.there(container.as_ref())?).await
    }

    /// Freezes the server. Its connections stay open and nothing is answered.
    ///
    /// # Errors
    ///
    /// What the daemon answered, as when the server is down.
    ///
    /// # Cancel safety
    ///
    /// It may have been frozen.
    pub async fn pause(&self) -> Result<(), Error> {
        let container = self.container.lock().await;
        let paused = self.there(container.as_ref())?.pause().await;
        paused.map_err(|e| Error::caused(format!("pause {}", self.kind), e))
    }

    /// Thaws the server.
    ///
    /// # Errors
    ///
    /// What the daemon answered, as when the server is not paused.
    ///
    /// # Cancel safety
    ///
    /// It may have been thawed.
    pub async fn resume(&self) -> Result<(), Error> {
        let container = self.container.lock().await;
        let resumed = self.there(container.as_ref())?.unpause().await;
        resumed.map_err(|e| Error::caused(format!("resume {}", self.kind), e))
    }

    /// Starts the server again at the same address with the same data, stopping it first if it runs, and waits until it
    /// grants sessions.
    ///
    /// # Errors
    ///
    /// When it does not within 60 s, with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// The server may be down or starting; call it again.
    pub async fn restart(&self) -> Result<(), Error> {
        let container = self.container.lock().await;
        let there = self.there(container.as_ref())?;
        stop(there).await?;
        there.start().await.map_err(|e| Error::caused(format!("start {} again", self.kind), e))?;
        drop(container);
        self.wait_ready().await
    }

    /// Like [`Server::restart`], but with empty data: a new container takes its place.
    ///
    /// # Errors
    ///
    /// As [`Server::restart`].
    ///
    /// # Cancel safety
    ///
    /// The server may be gone or starting; call it again.
    pub async fn restart_wiped(&self) -> Result<(), Error> {
        let mut container = self.container.lock().await;
        if let Some(old) = container.take() {
            old.rm().await.map_err(|e| Error::caused(format!("remove {}", self.kind), e))?;
        }
        let new = create(self.kind, self.port).await?;
        new.id().clone_into(&mut self.id.lock().unwrap_or_else(PoisonError::into_inner));
        *container = Some(new);
        drop(container);
        self.wait_ready().await
    }

    fn there<'a>(&self, container: Option<&'a Container>) -> Result<&'a Container, Error> {
        let gone = || Error::new(format!("find {}", self.kind), "it was removed, and no other took its place");
        container.ok_or_else(gone)
    }

    /// Waits until a session can be had: some servers answer long before that.
    async fn wait_ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let seen = match timeout(Duration::from_secs(5), grant(&self.config())).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(e)) if e.kind() == ErrorKind::Unsupported => {
                    return Err(Error::caused(format!("connect to {}", self.kind), e));
                }
                Ok(Err(e)) => e.to_string(),
                Err(_) => "no answer within 5 s".to_owned(),
            };
            let container = self.container.lock().await;
            let runs = self.there(container.as_ref())?.is_running().await;
            drop(container);
            let ended = matches!(runs, Ok(false));
            if ended || Instant::now() > deadline {
                let how = if ended { "it ended" } else { "not ready after 60 s" };
                let log = self.log_tail().await;
                let reason = format!("{how}; last seen: {seen}; the end of its log:\n{log}");
                return Err(Error::new(format!("start {} from {}", self.kind, self.kind.image()), reason));
            }
            sleep(ASK_EVERY).await;
        }
    }
}

async fn grant(config: &Config) -> quorate::Result<()> {
    let backend = quorate::backend(config).await?;
    let lease = backend.grant(config.session_ttl).await?;
    backend.revoke(&lease.id).await
}

async fn start_somewhere(kind: Kind) -> Result<(u16, Container), Error> {
    let doing = || format!("start {kind} from {}", kind.image());
    let mut tried = 0;
    loop {
        let port = port::free().await.ok_or_else(|| Error::new(doing(), "no port of 127.0.0.1 is free"))?;
        tried += 1;
        match create(kind, port).await {
            Err(e) if tried < PORTS_TRIED && e.is_port_taken() => {}
            outcome => return outcome.map(|container| (port, container)),
        }
    }
}

/// In a task of its own: a start that is dropped half-way would leave a container that nobody knows.
async fn create(kind: Kind, port: u16) -> Result<Container, Error> {
    let name = format!("quorate-{}-{:016x}", kind.scheme(), rand::random::<u64>());
    let request = kind
        .request(port)
        .with_container_name(&name)
        .with_label(LABEL, env::var("QUORATE_RUN").unwrap_or_else(|_| process::id().to_string()))
        .with_host_config_modifier(move |host| {
            let binding = PortBinding { host_ip: Some("127.0.0.1".to_owned()), host_port: Some(port.to_string()) };
            host.port_bindings = Some(HashMap::from([(kind.port().tcp().to_string(), Some(vec![binding]))]));
            host.publish_all_ports = Some(false);
        });
    let work = async move {
        let started = request.start().await;
        if started.is_err()
            && let Ok(docker) = docker_client_instance().await
        {
            let options = query::RemoveContainerOptionsBuilder::new().force(true).v(true).build();
            docker.remove_container(&name, Some(options)).await.ok();
        }
        started
    };
    let doing = || format!("start {kind} from {}", kind.image());
    match tokio::spawn(work).await {
        Ok(Ok(container)) => Ok(container),
        Ok(Err(e)) => Err(Error::caused(doing(), e)),
        Err(e) => Err(Error::caused(doing(), e)),
    }
}

async fn stop(container: &Container) -> Result<(), Error> {
    // A paused one does not see the signal. One that is not paused says so, which is fine.
    container.unpause().await.ok();
    let stopped = container.stop_with_timeout(Some(STOP_WITHIN)).await;
    stopped.map_err(|e| Error::caused(format!("stop {}", container.id()), e))
}

async fn kill(container: &Container) -> Result<(), Error> {
    let doing = || format!("kill {}", container.id());
    let runs = async || container.is_running().await.map_err(|e| Error::caused(doing(), e));
    if !runs().await? {
        return Ok(());
    }
    let docker = docker_client_instance().await.map_err(|e| Error::caused(doing(), e))?;
    let options = query::KillContainerOptionsBuilder::new().signal("SIGKILL").build();
    let sent = docker.kill_container(container.id(), Some(options)).await;
    // Started before its end is known to the daemon, it would stay down.
    while runs().await? {
        sleep(Duration::from_millis(5)).await;
    }
    sent.map_err(|e| Error::caused(doing(), e))
}

async fn log_tail(container: &Container) -> String {
    let mut log = container.stdout_to_vec().await.unwrap_or_default();
    log.extend(container.stderr_to_vec().await.unwrap_or_default());
    let from = log.len().saturating_sub(4 << 10);
    String::from_utf8_lossy(&log[from..]).trim_end().to_owned()
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(container) = self.container.get_mut().take() {
            // On a thread of its own: a handle may be dropped in any runtime, and outside of all.
            in_thread(async move { container.rm().await });
        }
    }
}

/// Runs it to its end. Blocks.
fn in_thread<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) {
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.ok().map(|runtime| runtime.block_on(work));
    });
    thread.join().ok();
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("url", &self.url()).field("id", &self.id()).finish_non_exhaustive()
    }
}
