//! The link: the connections in use, and the task that replaces them when they break.
//!
//! Promise: a call waits for a link no longer than the connect timeout; a broken link is replaced by itself,
//! for ever, with jittered backoff; data and messages always come from the same server, because both
//! connections are replaced together.

use std::{fmt, sync::Arc, time::Duration};

use quorate_core::{Error, ErrorKind, Result};
use redis::{RedisResult, Value, aio::MultiplexedConnection};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};

use crate::{
    connect::Connector,
    departed::Departed,
    error::{Effect, Failure, NAME, Verdict, classify},
    script::Call,
    sentinel::{disagrees, primary},
};

/// How often a sentinel is asked whether the primary is still the primary.
const DOUBT_EVERY: Duration = Duration::from_secs(1);
/// One call that was refused gives up the link for all: those behind it are answered within this, if at all.
const LAST_ANSWERS: Duration = Duration::from_millis(250);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Two connections to one server: requests and answers on one, messages and what establishes waits on the
/// other, so that a large answer never delays a message, nor counts against the server's limit on what may
/// be pending for a subscriber.
pub(crate) struct Link {
    /// Counts up with every link; a watch knows by it which one its messages came from.
    pub(crate) number: u64,
    pub(crate) address: String,
    pub(crate) data: MultiplexedConnection,
    pub(crate) signal: MultiplexedConnection,
    pub(crate) broken: Arc<Broken>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({} to {})", self.number, self.address)
    }
}

impl Link {
    /// Returns when the link is of no more use, and what was on its way has had its time.
    async fn left(&self) {
        self.broken.wait().await;
        sleep(LAST_ANSWERS).await;
    }
}

/// Says once that a link is of no more use.
#[derive(Debug)]
pub(crate) struct Broken(watch::Sender<bool>);

impl Default for Broken {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Broken {
    pub(crate) fn set(&self) {
        self.0.send_replace(true);
    }

    pub(crate) fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    async fn wait(&self) {
        // The sender is borrowed, so that it is there.
        let _ = self.0.subscribe().wait_for(|broken| *broken).await;
    }
}

/// Whether there is a link.
#[derive(Debug, Clone)]
pub(crate) enum State {
    Up(Arc<Link>),
    /// Attempts that have failed since the backend was made, and what the last one said.
    Down {
        failures: u64,
        last: Failure,
    },
    /// The backend was dropped.
    Closed,
}

/// Hands out the link that is up.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) connector: Connector,
    pub(crate) departed: Departed,
    state: watch::Sender<State>,
    // Somebody wants a link: the keeper need not sleep out its pause.
    wanted: Notify,
}

impl Server {
    /// Makes the first connection.
    pub(crate) async fn connect(connector: Connector) -> Result<Arc<Self>> {
        let link = connector.attempt(1).await.map_err(|f| f.error("connect"))?;
        connector.hub.up(link.number);
        let (state, _) = watch::channel(State::Up(Arc::new(link)));
        Ok(Arc::new(Self { connector, departed: Departed::default(), state, wanted: Notify::new() }))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Ends everything that waits for a link.
    pub(crate) fn close(&self) {
        self.state.send_replace(State::Closed);
        self.connector.hub.close();
    }

    /// The link that is up, or the next one.
    ///
    /// # Errors
    /// `Unavailable` (or what the attempt failed with) after one more attempt to connect has failed.
    pub(crate) async fn link(&self, operation: &'static str) -> Result<Arc<Link>> {
        if let Some(link) = self.ready() {
            return Ok(link);
        }
        let limit = self.connector.options.connect_timeout.min(self.connector.options.request_timeout);
        timeout(limit, self.next_link(operation)).await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Unavailable, operation, format!("no connection within {limit:?}")).on(NAME))
        })
    }

    fn ready(&self) -> Option<Arc<Link>> {
        match &*self.state.borrow() {
            State::Up(link) if !link.broken.is_set() => Some(link.clone()),
            _ => None,
        }
    }

    async fn next_link(&self, operation: &'static str) -> Result<Arc<Link>> {
        let mut state = self.state.subscribe();
        let mut seen = None;
        loop {
            self.wanted.notify_one();
            match &*state.borrow_and_update() {
                State::Up(link) if !link.broken.is_set() => return Ok(link.clone()),
                State::Up(_) => {}
                State::Down { failures, last } => {
                    if *failures > *seen.get_or_insert(*failures) {
                        return Err(last.error(operation));
                    }
                }
                State::Closed => return Err(closed(operation)),
            }
            if state.changed().await.is_err() {
                return Err(closed(operation));
            }
        }
    }

    /// Calls a script on the link's connection for data.
    pub(crate) async fn call(&self, operation: &'static str, effect: Effect, call: &Call) -> Result<Value> {
        let link = self.link(operation).await?;
        let mut conn = link.data.clone();
        self.on(&link, &mut conn, operation, effect, call).await
    }

    /// Calls a reading script on this link's connection for data and on no other.
    pub(crate) async fn on_data(&self, link: &Link, operation: &'static str, call: &Call) -> Result<Value> {
        let mut conn = link.data.clone();
        self.on(link, &mut conn, operation, Effect::Reads, call).await
    }

    /// Calls a script on the connection that messages arrive on, so that whatever was published before the
    /// answer has been seen before the answer.
    pub(crate) async fn signal(&self, link: &Link, operation: &'static str, call: &Call) -> Result<Value> {
        let mut conn = link.signal.clone();
        self.on(link, &mut conn, operation, Effect::Reads, call).await
    }

    async fn on(
        &self,
        link: &Link,
        conn: &mut MultiplexedConnection,
        operation: &'static str,
        effect: Effect,
        call: &Call,
    ) -> Result<Value> {
        let mut patience =
            Patience { link, since: Instant::now(), limit: self.connector.options.request_timeout.mul_f64(0.75) };
        let answer: RedisResult<Value> = tokio::select! {
            biased;
            answer = call.send(conn) => answer,
            () = link.left() => {
                patience.limit = Duration::MAX;
                return Err(effect.unanswered("the connection was given up").error(operation));
            }
        };
        patience.limit = Duration::MAX;
        answer.map_err(|e| {
            let (failure, verdict) = classify(&e, effect);
            if verdict == Verdict::Leave {
                link.broken.set();
            }
            failure.error(operation)
        })
    }

    /// Replaces the link whenever it breaks. Runs until the backend is dropped.
    pub(crate) async fn keep(self: Arc<Self>) {
        let mut failures = 0;
        // The one before is of no use any more when the next one begins.
        let mut repeat = None::<AbortOnDrop>;
        loop {
            let current = match &*self.state.borrow() {
                State::Up(link) => link.clone(),
                State::Down { .. } | State::Closed => return,
            };
            current.broken.wait().await;
            tracing::warn!(backend = NAME, server = %current.address, "connection lost; connecting again");
            let mut number = current.number;
            // The old connections go before the new ones are made.
            drop(current);
            drop(repeat.take());
            let lost = Failure::new(ErrorKind::Unavailable, "the connection was lost");
            if !self.change(State::Down { failures, last: lost }) {
                return;
            }
            self.connector.hub.down();
            let mut pause = FIRST_PAUSE;
            loop {
                number += 1;
                match self.connector.attempt(number).await {
                    Ok(link) => {
                        tracing::info!(backend = NAME, server = %link.address, "connected");
                        self.connector.hub.up(link.number);
                        if !self.change(State::Up(Arc::new(link))) {
                            return;
                        }
                        // The server behind it may be another one, or one that has lost its last writes. Not awaited: a
                        // break of this link must be noticed meanwhile.
                        let this = self.clone();
                        repeat = Some(AbortOnDrop(tokio::spawn(async move { this.departed.again(&this).await })));
                        break;
                    }
                    Err(last) => {
                        failures += 1;
                        tracing::debug!(backend = NAME, error = %last.text, "not connected");
                        if !self.change(State::Down { failures, last }) {
                            return;
                        }
                    }
                }
                self.rest(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// Leaves a primary that was replaced and does not know it yet: what it confirms is lost when it learns of it, and it
    /// may take the sentinels ten seconds to tell it. One sentinel is asked at a time, all of them before the link is
    /// given up. Runs until the backend is dropped.
    pub(crate) async fn doubt(self: Arc<Self>, master: String) {
        let options = &self.connector.options;
        for turn in 0.. {
            sleep(DOUBT_EVERY.mul_f64(rand::random_range(0.75..1.25))).await;
            let Some(link) = self.ready() else { continue };
            let limit = options.connect_timeout;
            let disagrees = disagrees(options, turn, &master, &link.address);
            if !timeout(limit, disagrees).await.unwrap_or(false) {
                continue;
            }
            let named = timeout(limit, primary(options, &master)).await;
            if let Ok(Ok(named)) = named
                && named.to_string() != link.address
            {
                tracing::warn!(backend = NAME, server = %link.address, %named, "the primary was replaced");
                link.broken.set();
            }
        }
    }

    async fn rest(&self, pause: Duration) {
        // Never shorter than the first pause: many callers who want a link must not make attempts spin.
        sleep(FIRST_PAUSE).await;
        let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
        tokio::select! {
            () = sleep(jittered) => {}
            () = self.wanted.notified() => {}
        }
    }

    /// Changes the state unless the backend was dropped meanwhile.
    fn change(&self, to: State) -> bool {
        self.state.send_if_modified(|state| {
            if matches!(state, State::Closed) {
                return false;
            }
            *state = to;
            true
        })
    }
}

fn closed(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, operation, "the backend was shut down").on(NAME)
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Gives a link up when a caller has run out of patience with it: the call was dropped after a long time
/// without an answer, and a server that is alive answers in order.
struct Patience<'a> {
    link: &'a Link,
    since: Instant,
    limit: Duration,
}

impl Drop for Patience<'_> {
    fn drop(&mut self) {
        if self.since.elapsed() >= self.limit {
            self.link.broken.set();
        }
    }
}
