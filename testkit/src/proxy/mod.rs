//! A TCP proxy that breaks the connection between a client and a server in named ways.
//!
//! ```no_run
//! # async fn run(server: std::net::SocketAddr) -> std::io::Result<()> {
//! use quorate_testkit::proxy::{Direction, FaultProxy};
//!
//! let proxy = FaultProxy::start(server).await?;
//! // … connect the client to proxy.addr() …
//! proxy.hold(Direction::ToServer); // a one-way partition
//! proxy.heal().await; // what was held arrives late
//! # Ok(())
//! # }
//! ```
//!
//! Promises:
//! - Bytes are never reordered, doubled or changed; at most about 1 MB per direction is buffered, after that
//!   the sender is slowed as TCP would slow it.
//! - A fault is in force when the call that asks for it returns.
//! - The counters tell whether a fault has bitten: a test in which it did not has shown nothing.
//!
//! The proxy runs in the runtime that started it, and stops, with all its connections, when dropped.

mod connection;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::servers::{Error, Port, loopback};

/// One of the two ways through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// What the client sends.
    ToServer,
    /// What the server sends.
    ToClient,
}

/// What has passed so far, over all connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections open now.
    pub open: u64,
    /// Bytes read from clients.
    pub bytes_to_server: u64,
    /// Bytes read from the server.
    pub bytes_to_client: u64,
    /// Pieces in which bytes came from clients: about one per `write` of the client.
    pub chunks_to_server: u64,
    /// Pieces in which bytes came from the server.
    pub chunks_to_client: u64,
    /// How often a client began to speak, or spoke again after the server had spoken, on one connection.
    /// For a client that waits for each answer this is its number of round trips; pipelined requests
    /// count once.
    pub turns: u64,
    /// Answers thrown away by [`FaultProxy::cut_after_forward`].
    pub answers_lost: u64,
    /// Bytes thrown away by [`FaultProxy::blackhole`].
    pub bytes_swallowed: u64,
}

/// A proxy on a free loopback port. Dropping it closes everything.
pub struct FaultProxy {
    shared: Arc<Shared>,
    addr: SocketAddr,
    task: AbortHandle,
    _port: Port,
}

/// What the connections look at while they run.
#[derive(Debug, Clone)]
struct Faults {
    upstream: SocketAddr,
    to_server: Way,
    to_client: Way,
    /// No listener while this is set, so that the kernel refuses new connections.
    cut: bool,
    /// A connection that began under an older number closes itself. It only rises.
    era: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Way {
    delay: Duration,
    hole: Hole,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Hole {
    #[default]
    None,
    Hold,
    Swallow,
}

impl Faults {
    fn way(&self, direction: Direction) -> Way {
        match direction {
            Direction::ToServer => self.to_server,
            Direction::ToClient => self.to_client,
        }
    }

    fn way_mut(&mut self, direction: Direction) -> &mut Way {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

/// The next requests whose answers get lost.
#[derive(Debug, Default)]
struct Doom {
    requests: u32,
    containing: Vec<u8>,
}

struct Shared {
    faults: watch::Sender<Faults>,
    /// The number of open connections of each era that still has some, and whether we listen.
    presence: watch::Sender<Presence>,
    doom: Mutex<Doom>,
    accepted: AtomicU64,
    bytes: [AtomicU64; 2],
    chunks: [AtomicU64; 2],
    turns: AtomicU64,
    answers_lost: AtomicU64,
    bytes_swallowed: AtomicU64,
}

#[derive(Debug, Default)]
struct Presence {
    listening: bool,
    /// The eras of the open connections.
    open: Vec<u64>,
}

impl Shared {
    fn doom(&self) -> MutexGuard<'_, Doom> {
        self.doom.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the answer to this piece of a request is to be lost; counts it off if so.
    fn dooms(&self, piece: &[u8]) -> bool {
        let mut doom = self.doom();
        let needle = &doom.containing;
        let hit = doom.requests > 0 && (needle.is_empty() || piece.windows(needle.len()).any(|part| part == needle));
        if hit {
            doom.requests -= 1;
        }
        hit
    }
}

impl FaultProxy {
    /// Listens on a free port of 127.0.0.1 and passes everything on to `upstream`.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves nothing behind.
    pub async fn start(upstream: SocketAddr) -> io::Result<Self> {
        let port = Port::reserve().map_err(|error| match error {
            Error::Io { source, .. } => source,
            other => io::Error::other(other),
        })?;
        let addr = port.addr();
        let listener = TcpListener::bind(addr).await?;
        let faults = Faults { upstream, to_server: Way::default(), to_client: Way::default(), cut: false, era: 0 };
        let shared = Arc::new(Shared {
            faults: watch::Sender::new(faults),
            presence: watch::Sender::new(Presence { listening: true, open: Vec::new() }),
            doom: Mutex::default(),
            accepted: AtomicU64::new(0),
            bytes: Default::default(),
            chunks: Default::default(),
            turns: AtomicU64::new(0),
            answers_lost: AtomicU64::new(0),
            bytes_swallowed: AtomicU64::new(0),
        });
        let task = tokio::spawn(serve(Arc::clone(&shared), port.number(), listener));
        Ok(Self { shared, addr, task: task.abort_handle(), _port: port })
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where new connections lead. Open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        self.shared.faults.send_modify(|faults| faults.upstream = upstream);
    }

    /// Delivers every byte of one direction that much later, without lowering the throughput until the
    /// buffer of about 1 MB is full. Zero ends it.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.shared.faults.send_modify(|faults| faults.way_mut(direction).delay = delay);
    }

    /// Keeps back what is sent in one direction, as a one-way partition does: connections stay open, and
    /// after [`FaultProxy::heal`] everything arrives, late. New connections are accepted and held too.
    pub fn hold(&self, direction: Direction) {
        self.set_hole(direction, Hole::Hold);
    }

    /// Throws away what is sent in one direction. Connections stay open until [`FaultProxy::heal`], which
    /// resets those that lost bytes: no client could make sense of the rest.
    pub fn blackhole(&self, direction: Direction) {
        self.set_hole(direction, Hole::Swallow);
    }

    /// Resets all connections and refuses new ones until [`FaultProxy::heal`], as a dead server on a
    /// living machine does.
    ///
    /// # Cancel safety
    ///
    /// The cut takes place; only its completion is not awaited.
    pub async fn cut(&self) {
        self.shared.faults.send_modify(|faults| {
            faults.cut = true;
            faults.era += 1;
        });
        let mut presence = self.shared.presence.subscribe();
        let done = presence.wait_for(|now| !now.listening && now.open.is_empty());
        done.await.ok();
    }

    /// Resets all connections that are open now. New ones are accepted.
    ///
    /// # Cancel safety
    ///
    /// The connections are reset; only their end is not awaited.
    pub async fn drop_connections(&self) {
        let mut era = 0;
        self.shared.faults.send_modify(|faults| {
            faults.era += 1;
            era = faults.era;
        });
        let mut presence = self.shared.presence.subscribe();
        let done = presence.wait_for(|now| now.open.iter().all(|began| *began >= era));
        done.await.ok();
    }

    /// Lets the next `requests` pieces that clients send reach the server, throws the answer away and
    /// resets the client's connection when the answer comes: the write has happened and its writer cannot
    /// know. The server's side stays open half a second longer, so that it does not abandon the request.
    ///
    /// Every piece counts, a keep-alive too: where a client sends such, use
    /// [`FaultProxy::cut_after_forward_of`]. An answer to an earlier request on the same connection that is
    /// still on its way is lost instead. Zero ends it.
    pub fn cut_after_forward(&self, requests: u32) {
        self.cut_after_forward_of("", requests);
    }

    /// Like [`FaultProxy::cut_after_forward`], but only pieces that contain these bytes count, such as a
    /// key or the name of a command. TLS hides them.
    pub fn cut_after_forward_of(&self, containing: impl Into<Vec<u8>>, requests: u32) {
        *self.shared.doom() = Doom { requests, containing: containing.into() };
    }

    /// Ends every fault, delays too. After it returns, clients can connect.
    ///
    /// # Cancel safety
    ///
    /// The faults end; only the listener's return is not awaited.
    pub async fn heal(&self) {
        *self.shared.doom() = Doom::default();
        self.shared.faults.send_modify(|faults| {
            faults.to_server = Way::default();
            faults.to_client = Way::default();
            faults.cut = false;
        });
        let mut presence = self.shared.presence.subscribe();
        presence.wait_for(|now| now.listening).await.ok();
    }

    /// What has passed so far.
    pub fn counters(&self) -> Counters {
        let shared = &self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            accepted: get(&shared.accepted),
            open: u64::try_from(shared.presence.borrow().open.len()).unwrap_or(u64::MAX),
            bytes_to_server: get(&shared.bytes[0]),
            bytes_to_client: get(&shared.bytes[1]),
            chunks_to_server: get(&shared.chunks[0]),
            chunks_to_client: get(&shared.chunks[1]),
            turns: get(&shared.turns),
            answers_lost: get(&shared.answers_lost),
            bytes_swallowed: get(&shared.bytes_swallowed),
        }
    }

    /// [`Counters::turns`]: take it before and after an operation to count its round trips.
    pub fn turns(&self) -> u64 {
        self.shared.turns.load(Ordering::Relaxed)
    }

    fn set_hole(&self, direction: Direction, hole: Hole) {
        self.shared.faults.send_modify(|faults| faults.way_mut(direction).hole = hole);
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for FaultProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultProxy")
            .field("addr", &self.addr)
            .field("faults", &*self.shared.faults.borrow())
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

/// Accepts while not cut. Owns all connections, so that aborting this task ends them.
async fn serve(shared: Arc<Shared>, port: u16, listener: TcpListener) {
    let mut listener = Some(listener);
    let mut faults = shared.faults.subscribe();
    let mut connections = JoinSet::new();
    loop {
        let cut = faults.borrow_and_update().cut;
        if cut && listener.take().is_some() {
            shared.presence.send_modify(|now| now.listening = false);
        }
        if !cut && listener.is_none() {
            match TcpListener::bind(loopback(port)).await {
                Ok(again) => listener = Some(again),
                // The port is reserved, but an address may linger for a moment.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            shared.presence.send_modify(|now| now.listening = listener.is_some());
            continue;
        }
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = faults.changed() => if changed.is_err() { return },
            Some(_) = connections.join_next() => {}
            accepted = accept => match accepted {
                Ok((client, _)) => {
                    shared.accepted.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(connection::run(connection::Open::enter(&shared), client));
                }
                // Out of file descriptors, as a rule: some connection must end first.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            },
        }
    }
}
