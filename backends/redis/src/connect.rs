//! Finding the server to talk to, and opening the two connections to it.
//!
//! Promise: an attempt ends within the connect timeout, whatever the servers do; a dead endpoint delays it
//! by [`STAGGER`] and no more; what comes back is a primary that accepts writes in this namespace, on which
//! a message sent through one connection has arrived on the other.
//!
//! Why not the client crate's own cluster and sentinel clients: a namespace lives in one slot, so one node
//! is all that is needed; the cluster client repeats a request after a lost connection by itself, and a
//! write that was perhaps applied must not be repeated in silence.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use quorate_core::{ErrorKind, Revision, endpoints::Endpoints};
use redis::{AsyncConnectionConfig, Client, ConnectionInfo, PushInfo, PushKind, RedisError, Value};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use crate::{
    config::{Address, Options, Topology},
    error::{Failure, NAME, classify_connect},
    hub::Hub,
    link::{Broken, Link},
    script::{Call, HELLO, Keys},
    sentinel::primary,
};

/// How long one endpoint is waited for before the next one is tried beside it.
const STAGGER: Duration = Duration::from_millis(200);
/// How often one attempt follows a node's word that another one owns the slot.
const MAX_HOPS: usize = 5;
/// How many cluster nodes are remembered beside the given ones.
const MAX_KNOWN: usize = 64;
/// Requests that may queue before a caller has to wait for room.
const PIPELINE: usize = 256;

/// Finds and opens links.
#[derive(Debug)]
pub(crate) struct Connector {
    pub(crate) options: Options,
    pub(crate) keys: Keys,
    pub(crate) hub: Arc<Hub>,
    health: Endpoints,
    // Other nodes of the cluster, as learnt from the last one that answered: the given ones may all be gone
    // by the time they are needed.
    known: std::sync::Mutex<VecDeque<Address>>,
    // The highest revision that any answer has shown. A server that has lost data is raised past it.
    seen: AtomicU64,
}

/// How long a primary has to answer before the sentinels are asked whether it still is one.
const ASK_AGAIN: Duration = Duration::from_millis(500);

impl Connector {
    pub(crate) fn new(options: Options, keys: Keys, hub: Arc<Hub>) -> Self {
        let health = Endpoints::new(options.endpoints.len());
        Self { options, keys, hub, health, known: std::sync::Mutex::default(), seen: AtomicU64::new(0) }
    }

    /// Takes note of a revision that the server has shown.
    pub(crate) fn saw(&self, revision: Revision) {
        self.seen.fetch_max(revision.0, Ordering::Relaxed);
    }

    /// The endpoints as a reader would write them.
    fn names(&self) -> String {
        let names: Vec<String> = self.options.endpoints.iter().map(ToString::to_string).collect();
        names.join(", ")
    }

    /// Makes one attempt on all endpoints, each started a little after the one before.
    pub(crate) async fn attempt(&self, number: u64) -> Result<Link, Failure> {
        let limit = self.options.connect_timeout;
        let attempt = async {
            match &self.options.topology {
                Topology::Sentinel { master } => self.through_sentinels(master, number).await,
                Topology::Standalone | Topology::Cluster => self.race(number).await,
            }
        };
        match timeout(limit, attempt).await {
            Ok(result) => result,
            Err(_) => {
                Err(Failure::new(ErrorKind::Unavailable, format!("{} did not answer within {limit:?}", self.names())))
            }
        }
    }

    async fn race(&self, number: u64) -> Result<Link, Failure> {
        let first = self.health.pick();
        let count = self.options.endpoints.len();
        let given = (0..count).map(|i| (first + i) % count).map(|i| (Some(i), self.options.endpoints[i].clone()));
        let known: Vec<Address> = self.known().iter().cloned().collect();
        let more = known.into_iter().filter(|a| !self.options.endpoints.contains(a)).map(|a| (None, a));
        let mut attempts: FuturesUnordered<_> = given
            .chain(more)
            .enumerate()
            .map(|(turn, (index, address))| async move {
                sleep(STAGGER * u32::try_from(turn).unwrap_or(u32::MAX)).await;
                (index, self.through(&address, number).await.map_err(|f| (address, f)))
            })
            .collect();
        let mut worst: Option<Failure> = None;
        while let Some((index, result)) = attempts.next().await {
            match result {
                Ok(link) => {
                    index.inspect(|i| self.health.succeeded(*i));
                    return Ok(link);
                }
                Err((address, failure)) => {
                    index.inspect(|i| {
                        self.health.failed(*i);
                    });
                    let failure = Failure { text: format!("{address}: {}", failure.text), ..failure };
                    worst = Some(match worst {
                        None => failure,
                        Some(before) => before.or_more_telling(failure),
                    });
                }
            }
        }
        Err(worst.unwrap_or_else(|| Failure::new(ErrorKind::Unavailable, "no endpoint")))
    }

    /// During a failover the sentinels name a primary that may be silent: they are asked again while it is.
    async fn through_sentinels(&self, master: &str, number: u64) -> Result<Link, Failure> {
        let mut named = primary(&self.options, master).await?;
        loop {
            tokio::select! {
                opened = self.open(&named, number) => return opened.map_err(|refused| {
                    let failure = refused.into_failure();
                    Failure { text: format!("the primary {named}: {}", failure.text), ..failure }
                }),
                other = self.another(master, &named) => named = other,
            }
        }
    }

    /// Returns when the sentinels name another primary than this one.
    async fn another(&self, master: &str, than: &Address) -> Address {
        loop {
            sleep(ASK_AGAIN).await;
            if let Ok(named) = primary(&self.options, master).await
                && named != *than
            {
                return named;
            }
        }
    }

    /// Opens a link through one endpoint: to it, or to where it points.
    async fn through(&self, address: &Address, number: u64) -> Result<Link, Failure> {
        match self.options.topology {
            Topology::Cluster => self.follow(address, number).await,
            _ => self.open(address, number).await.map_err(Refused::into_failure),
        }
    }

    async fn follow(&self, address: &Address, number: u64) -> Result<Link, Failure> {
        let mut address = address.clone();
        for _ in 0..MAX_HOPS {
            match self.open(&address, number).await {
                Ok(link) => {
                    self.learn(&link, &address).await;
                    return Ok(link);
                }
                Err(Refused::Moved(to)) => {
                    // An empty host means: the host you are talking to.
                    let host = if to.host.is_empty() { address.host.clone() } else { to.host };
                    address = Address { host, port: to.port };
                }
                Err(Refused::Failed(failure)) => {
                    return Err(Failure { text: format!("{address}: {}", failure.text), ..failure });
                }
            }
        }
        Err(Failure::new(ErrorKind::Unavailable, "the cluster's nodes point at each other"))
    }

    /// Remembers the cluster's other nodes; best effort.
    async fn learn(&self, link: &Link, here: &Address) {
        let mut conn = link.data.clone();
        let Ok(Value::Array(ranges)) = conn.send_packed_command(redis::cmd("CLUSTER").arg("SLOTS")).await else {
            return;
        };
        let mut found = VecDeque::new();
        for node in ranges.iter().filter_map(|r| if let Value::Array(r) = r { r.get(2..) } else { None }).flatten() {
            let Value::Array(node) = node else { continue };
            let (Some(Value::BulkString(host)), Some(Value::Int(port))) = (node.first(), node.get(1)) else { continue };
            let (Ok(host), Ok(port)) = (std::str::from_utf8(host), u16::try_from(*port)) else { continue };
            let host = if host.is_empty() { here.host.clone() } else { host.to_owned() };
            let address = Address { host, port };
            if found.len() < MAX_KNOWN && !found.contains(&address) {
                found.push_back(address);
            }
        }
        *self.known() = found;
    }

    fn settings(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.options.connect_timeout))
            .set_response_timeout(Some(self.options.request_timeout))
            .set_pipeline_buffer_size(PIPELINE)
    }

    /// Opens both connections and proves that scripts run and messages arrive.
    async fn open(&self, address: &Address, number: u64) -> Result<Link, Refused> {
        let failed = |e: RedisError| Refused::Failed(classify_connect(&e));
        let info: ConnectionInfo = self.options.node(address).map_err(failed)?;
        let client = Client::open(info).map_err(failed)?;
        let broken = Arc::new(Broken::default());
        let on_data = {
            let broken = broken.clone();
            move |push: PushInfo| {
                if push.kind == PushKind::Disconnection {
                    broken.set();
                }
                Ok::<(), ()>(())
            }
        };
        let on_signal = {
            let (broken, hub, keys) = (broken.clone(), self.hub.clone(), self.keys.clone());
            move |push: PushInfo| {
                match push.kind {
                    PushKind::Disconnection => broken.set(),
                    PushKind::Message => hub.message(&keys, &push.data),
                    _ => {}
                }
                Ok::<(), ()>(())
            }
        };
        let data = self.settings().set_push_sender(on_data);
        let signal = self.settings().set_push_sender(on_signal);
        let (data, signal) = futures_util::future::try_join(
            client.get_multiplexed_async_connection_with_config(&data),
            client.get_multiplexed_async_connection_with_config(&signal),
        )
        .await
        .map_err(failed)?;
        let mut link = Link { number, address: address.to_string(), data, signal, broken };
        self.hello(&mut link).await?;
        warn_of_eviction(&link).await;
        Ok(link)
    }

    async fn hello(&self, link: &mut Link) -> Result<(), Refused> {
        let refused = |e: RedisError| match e.redirect_node() {
            Some((to, _)) if e.code() == Some("MOVED") => Refused::moved(to),
            _ => Refused::Failed(classify_connect(&e)),
        };
        let nonce = format!("{:016x}", rand::random::<u64>());
        let (tell, told) = oneshot::channel();
        let _expected = self.hub.expect_hello(nonce.clone(), tell);
        link.signal.subscribe(self.keys.client_channel(self.hub.client())).await.map_err(refused)?;
        let seen = self.seen.load(Ordering::Relaxed).to_string();
        let call = Call::new(&HELLO, &self.keys).arg(self.hub.client()).arg(&nonce).arg(seen);
        call.send(&mut link.data).await.map_err(refused)?;
        // Bounded by the attempt: it fails if the two connections lead to servers that do not share messages.
        told.await
            .map_err(|_| Refused::Failed(Failure::new(ErrorKind::Unavailable, "messages of the server do not arrive")))
    }

    fn known(&self) -> std::sync::MutexGuard<'_, VecDeque<Address>> {
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Says so if the server may throw our records away when its memory is full. Best effort: a user may lack
/// the permission to ask.
async fn warn_of_eviction(link: &Link) {
    let mut conn = link.data.clone();
    let Ok(answer) = conn.send_packed_command(redis::cmd("INFO").arg("memory")).await else { return };
    let Ok(info) = redis::from_redis_value::<String>(answer) else { return };
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let policy = field("maxmemory_policy").unwrap_or_default();
    if policy.starts_with("allkeys") && field("maxmemory") != Some("0") {
        tracing::warn!(
            backend = NAME,
            server = %link.address,
            policy,
            "this server may evict locks and keys when its memory is full; use noeviction or a volatile-* policy"
        );
    }
}

/// Why a node did not become the link.
enum Refused {
    Moved(Address),
    Failed(Failure),
}

impl Refused {
    fn moved(to: &str) -> Self {
        match to.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
            Some((host, Ok(port))) => Self::Moved(Address { host: host.to_owned(), port }),
            _ => Self::Failed(Failure::new(ErrorKind::Backend, "the cluster names a malformed address")),
        }
    }

    fn into_failure(self) -> Failure {
        match self {
            Self::Failed(failure) => failure,
            Self::Moved(_) => {
                Failure::new(ErrorKind::Unsupported, "the server is a node of a cluster; use the scheme redis+cluster")
            }
        }
    }
}
