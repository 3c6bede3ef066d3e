//! One connection through the proxy: two directions, each a bounded queue of timed pieces.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::{Direction, Faults, Hole, Shared};

const PIECE: usize = 16 << 10;
/// Times `PIECE` this is what one direction may buffer.
const PIECES: usize = 64;
/// How long the server's side outlives a client's that was cut: a server may abandon what it has begun
/// for a client that has gone.
const LINGER: Duration = Duration::from_millis(500);

/// A connection's entry in the list of open ones; dropping it strikes it off.
pub(super) struct Open {
    shared: Arc<Shared>,
    era: u64,
}

impl Open {
    pub(super) fn enter(shared: &Arc<Shared>) -> Self {
        let era = shared.faults.borrow().era;
        shared.presence.send_modify(|now| now.open.push(era));
        Self { shared: Arc::clone(shared), era }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.presence.send_modify(|now| {
            if let Some(at) = now.open.iter().position(|era| *era == self.era) {
                now.open.swap_remove(at);
            }
        });
    }
}

/// Why a connection ended.
enum End {
    /// Both sides have closed, orderly.
    Closed,
    /// One side broke, or a fault asked for it: the other must see a reset.
    Reset,
    /// The answer of a doomed request has come and was thrown away.
    AnswerLost,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Reset
    }
}

/// What the two directions of one connection share.
struct Link<'a> {
    shared: &'a Shared,
    faults: watch::Receiver<Faults>,
    /// Set before the doomed request is forwarded, so that its answer cannot slip through.
    doomed: AtomicBool,
    /// Bytes were thrown away: the connection must not go on after healing.
    torn: AtomicBool,
    server_spoke_last: AtomicBool,
}

pub(super) async fn run(open: Open, mut client: TcpStream) {
    let mut faults = open.shared.faults.subscribe();
    let upstream = faults.borrow().upstream;
    let outdated = |now: &Faults| now.cut || now.era != open.era;
    let connected = tokio::select! {
        connected = TcpStream::connect(upstream) => connected,
        _ = faults.wait_for(outdated) => Err(io::ErrorKind::ConnectionReset.into()),
    };
    let Ok(mut server) = connected else {
        client.set_zero_linger().ok();
        return;
    };
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let link = Link {
        shared: &open.shared,
        faults: open.shared.faults.subscribe(),
        doomed: AtomicBool::new(false),
        torn: AtomicBool::new(false),
        server_spoke_last: AtomicBool::new(true),
    };
    let end = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let both = async {
            tokio::try_join!(
                link.pass(Direction::ToServer, from_client, to_server),
                link.pass(Direction::ToClient, from_server, to_client),
            )
        };
        tokio::select! {
            // A fault that is already asked for comes before any more bytes.
            biased;
            _ = faults.wait_for(|now| outdated(now) || link.must_tear(now)) => End::Reset,
            done = both => done.err().unwrap_or(End::Closed),
        }
    };
    if !matches!(end, End::Closed) {
        client.set_zero_linger().ok();
    }
    drop(client);
    match end {
        End::Closed => {}
        End::Reset => server.set_zero_linger().unwrap_or_default(),
        End::AnswerLost => {
            open.shared.answers_lost.fetch_add(1, Ordering::Relaxed);
            let drained = async {
                let mut rest = vec![0; PIECE];
                while matches!(server.read(&mut rest).await, Ok(1..)) {}
            };
            tokio::select! {
                _ = timeout(LINGER, drained) => {}
                _ = faults.wait_for(outdated) => {}
            }
        }
    }
}

impl Link<'_> {
    fn must_tear(&self, now: &Faults) -> bool {
        let swallowing = |direction| now.way(direction).hole == Hole::Swallow;
        self.torn.load(Ordering::Relaxed) && !swallowing(Direction::ToServer) && !swallowing(Direction::ToClient)
    }

    async fn pass(&self, direction: Direction, from: ReadHalf<'_>, to: WriteHalf<'_>) -> Result<(), End> {
        let (pieces, queue) = mpsc::channel(PIECES);
        tokio::try_join!(self.take(direction, from, pieces), self.deliver(direction, to, queue))?;
        Ok(())
    }

    async fn take(
        &self,
        direction: Direction,
        mut from: ReadHalf<'_>,
        pieces: mpsc::Sender<(Instant, Vec<u8>)>,
    ) -> Result<(), End> {
        let mut buffer = vec![0; PIECE];
        loop {
            let count = from.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            self.count(direction, count);
            if direction == Direction::ToClient && self.doomed.load(Ordering::Acquire) {
                return Err(End::AnswerLost);
            }
            let piece = (Instant::now(), buffer[..count].to_vec());
            if pieces.send(piece).await.is_err() {
                return Err(End::Reset);
            }
        }
    }

    async fn deliver(
        &self,
        direction: Direction,
        mut to: WriteHalf<'_>,
        mut queue: mpsc::Receiver<(Instant, Vec<u8>)>,
    ) -> Result<(), End> {
        let mut faults = self.faults.clone();
        while let Some((came, piece)) = queue.recv().await {
            self.wait_for_turn(direction, came, &mut faults).await;
            if faults.borrow().way(direction).hole == Hole::Swallow {
                let count = u64::try_from(piece.len()).unwrap_or(u64::MAX);
                self.shared.bytes_swallowed.fetch_add(count, Ordering::Relaxed);
                self.torn.store(true, Ordering::Relaxed);
                continue;
            }
            // Bytes after a hole would be understood as something else.
            if self.torn.load(Ordering::Relaxed) {
                return Err(End::Reset);
            }
            if direction == Direction::ToServer && self.shared.dooms(&piece) {
                self.doomed.store(true, Ordering::Release);
            }
            to.write_all(&piece).await?;
        }
        // The end of a stream is held back like its bytes.
        self.wait_for_turn(direction, Instant::now(), &mut faults).await;
        Ok(to.shutdown().await?)
    }

    /// Until the delay of that direction has passed and nothing is held.
    async fn wait_for_turn(&self, direction: Direction, came: Instant, faults: &mut watch::Receiver<Faults>) {
        loop {
            let way = faults.borrow_and_update().way(direction);
            let due = came + way.delay;
            if way.hole != Hole::Hold && Instant::now() >= due {
                return;
            }
            tokio::select! {
                () = sleep_until(due), if way.hole != Hole::Hold => {}
                changed = faults.changed() => if changed.is_err() { return },
            }
        }
    }

    fn count(&self, direction: Direction, bytes: usize) {
        let shared = self.shared;
        let way = match direction {
            Direction::ToServer => 0,
            Direction::ToClient => 1,
        };
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        shared.bytes[way].fetch_add(bytes, Ordering::Relaxed);
        shared.chunks[way].fetch_add(1, Ordering::Relaxed);
        let by_server = direction == Direction::ToClient;
        let before = self.server_spoke_last.swap(by_server, Ordering::Relaxed);
        if !by_server && before {
            shared.turns.fetch_add(1, Ordering::Relaxed);
        }
    }
}
