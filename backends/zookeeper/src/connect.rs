//! Connections: one session each, and the one that calls without a lease share.
//!
//! Promise: nothing waits for a connection longer than the request timeout, and what is refused for want of one was
//! surely not sent. The shared session is replaced for as long as the backend lives, with jittered backoff.

use std::{future::Future, sync::Arc, time::Duration};

use quorate_core::{ErrorKind, Result};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use zookeeper_client as zk;

use crate::{
    config::Settings,
    error::{Call, NAME},
};

/// The first and the longest pause between attempts to open the shared session.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// One session with its connection.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) client: zk::Client,
    /// Turns true when this session is being closed: calls under way then let go of the client, because the library
    /// closes a session when nobody holds its client any more.
    over: watch::Sender<bool>,
    /// The library's task is gone although the session was not ended: nothing will ever be answered.
    broken: Notify,
    limit: Duration,
}

impl Conn {
    fn new(client: zk::Client, limit: Duration) -> Self {
        Self { client, over: watch::Sender::new(false), broken: Notify::new(), limit }
    }

    /// The session's id as a number, as node statistics show it.
    pub(crate) fn session(&self) -> i64 {
        self.client.session_id().0
    }

    /// Turns true when the session is being closed.
    pub(crate) fn over(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }

    pub(crate) fn close(&self) {
        self.over.send_replace(true);
    }

    pub(crate) fn is_over(&self) -> bool {
        *self.over.borrow() || self.client.state().is_terminated()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.client.state() == zk::SessionState::SyncConnected
    }

    /// Returns when requests can be sent, `Err` when that takes too long or the session is over.
    ///
    /// The library would queue them, and send them whenever the server is back, however late: so we wait first.
    pub(crate) async fn ready(&self, call: &Call<'_>) -> Result<()> {
        if self.is_connected() && !*self.over.borrow() {
            return Ok(());
        }
        let mut states = self.client.state_watcher();
        let mut over = self.over.subscribe();
        let connected = async {
            while !self.is_connected() && !self.is_over() {
                tokio::select! {
                    _ = states.changed() => {}
                    _ = over.wait_for(|over| *over) => {}
                }
            }
        };
        let waited = timeout(patience(self.limit), connected).await;
        if self.is_over() {
            return Err(call.failed(zk::Error::SessionExpired));
        }
        waited.map_err(|_| no_contact(call, patience(self.limit)))
    }

    /// Awaits the answers to requests that have been sent.
    pub(crate) async fn call<T, E: From<zk::Error>>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        self.answers().of(work).await
    }

    /// What awaits answers without holding the connection.
    pub(crate) fn answers(&self) -> Answers {
        Answers { over: self.over.subscribe(), limit: self.limit }
    }

    /// Turns the library's error into ours, and notes a client that can no longer answer.
    pub(crate) fn failed(&self, call: &Call<'_>, cause: zk::Error) -> quorate_core::Error {
        if matches!(cause, zk::Error::UnexpectedError(_)) {
            self.broken.notify_one();
        }
        call.failed(cause)
    }

    /// Returns when the session is over, or its client broken.
    pub(crate) async fn ended(&self) {
        let mut states = self.client.state_watcher();
        while !self.client.state().is_terminated() {
            tokio::select! {
                _ = states.changed() => {}
                () = self.broken.notified() => return,
            }
        }
    }
}

/// A wait for answers, no longer than the session and the request timeout.
///
/// Not for ever: the library fails what is under way when a connection breaks, but what it queued at that very moment
/// waits for the next one.
pub(crate) struct Answers {
    over: watch::Receiver<bool>,
    limit: Duration,
}

impl Answers {
    pub(crate) async fn of<T, E: From<zk::Error>>(mut self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            _ = self.over.wait_for(|over| *over) => Err(zk::Error::ConnectionLoss.into()),
            () = sleep(self.limit) => Err(zk::Error::Timeout.into()),
        }
    }
}

/// Does work on a lease's connection, on a task of its own.
///
/// The library closes a session when nobody holds its client. Most of the library's futures hold it; a caller that keeps
/// such a future and does not poll it would keep a lease alive that was revoked or not renewed. The task is
/// polled in any case, and lets go when the session is to be closed. Dropping this drops the work.
pub(crate) async fn on_own_task<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    struct Task<T>(tokio::task::JoinHandle<T>);
    impl<T> Drop for Task<T> {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let mut task = Task(tokio::spawn(work));
    match (&mut task.0).await {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and the caller with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// A little less than a request may take, so that a call that was never sent is reported as such before a timeout
/// around it calls it ambiguous.
fn patience(limit: Duration) -> Duration {
    limit * 4 / 5
}

fn no_contact(call: &Call<'_>, waited: Duration) -> quorate_core::Error {
    call.error(ErrorKind::Unavailable, format!("no connection to any server within {waited:?}"))
}

/// Opens a session. The server may answer with another timeout: see [`zk::Client::session_timeout`].
///
/// A session whose opening was not answered holds nothing and ends by itself: so this fails with `Unavailable`
/// and may be repeated.
pub(crate) async fn open(settings: &Settings, session: Duration, verb: &'static str) -> Result<Conn> {
    let call = Call::read(verb, &settings.servers);
    // Only at first: later, files that cannot be read are most likely being replaced.
    let connector = settings.connector(session).map_err(|error| match verb {
        "connect" => error,
        _ => error.with_kind(ErrorKind::Unavailable),
    })?;
    let opening = async {
        if settings.secure() {
            connector.secure_connect(&settings.servers).await
        } else {
            connector.connect(&settings.servers).await
        }
    };
    let client = match timeout(settings.connect_timeout, opening).await {
        Ok(Ok(client)) => client,
        Ok(Err(zk::Error::AuthFailed)) => return Err(call.failed(zk::Error::AuthFailed)),
        Ok(Err(error @ zk::Error::BadArguments(_))) => return Err(call.failed(error)),
        Ok(Err(error)) => {
            return Err(call.error(ErrorKind::Unavailable, "no server answered").because(error));
        }
        Err(_) => {
            let message = format!("no server answered within {:?}", settings.connect_timeout);
            return Err(call.error(ErrorKind::Unavailable, message));
        }
    };
    Ok(Conn::new(client, settings.request_timeout))
}

/// The shortest session that we ask for: below, the client library's own timers are too coarse to keep it.
const SHORTEST: Duration = Duration::from_millis(200);
/// The longest session that we ask for.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The shortest and the longest session that the servers grant, found by asking for both.
pub(crate) async fn limits(settings: &Settings) -> Result<(Duration, Duration)> {
    let shortest = async {
        let mut ask = SHORTEST;
        loop {
            match open(settings, ask, "connect").await {
                Ok(conn) => return Ok(conn.client.session_timeout()),
                // So short a session can end before a busy server has answered.
                Err(error) if error.kind() == ErrorKind::Unavailable && ask < settings.connect_timeout => ask *= 2,
                Err(error) => return Err(error),
            }
        }
    };
    let longest = async { Ok(open(settings, LONGEST, "connect").await?.client.session_timeout()) };
    futures_util::try_join!(shortest, longest)
}

/// The shared session as calls find it.
#[derive(Debug, Clone)]
enum Shared {
    Up(Arc<Conn>),
    Down { kind: ErrorKind, why: String },
}

/// The session that serves every call without a lease.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    shared: watch::Receiver<Shared>,
    limit: Duration,
}

impl Base {
    /// Starts with a session that is open; the second part keeps it replaced and must be polled.
    pub(crate) fn new(settings: Arc<Settings>, first: Conn, session: Duration) -> (Self, impl Future<Output = ()>) {
        let limit = settings.request_timeout;
        let (sender, shared) = watch::channel(Shared::Up(Arc::new(first)));
        (Self { shared, limit }, replace(settings, session, sender))
    }

    /// The shared session, connected.
    pub(crate) async fn conn(&self, call: &Call<'_>) -> Result<Arc<Conn>> {
        if let Shared::Up(conn) = &*self.shared.borrow()
            && conn.is_connected()
        {
            return Ok(conn.clone());
        }
        let mut shared = self.shared.clone();
        let connected = async {
            loop {
                let now = shared.borrow_and_update().clone();
                match now {
                    Shared::Up(conn) => {
                        let changed = tokio::select! {
                            ready = conn.ready(call) => match ready {
                                Ok(()) => return Ok(conn),
                                Err(_) => shared.changed().await,
                            },
                            changed = shared.changed() => changed,
                        };
                        changed.map_err(|_| shut_down(call))?;
                    }
                    Shared::Down { kind: ErrorKind::Unavailable, .. } => {
                        shared.changed().await.map_err(|_| shut_down(call))?;
                    }
                    Shared::Down { kind, why } => return Err(call.error(kind, why)),
                }
            }
        };
        match timeout(patience(self.limit), connected).await {
            Ok(outcome) => outcome,
            Err(_) => Err(no_contact(call, patience(self.limit))),
        }
    }

    /// Returns when the backend was shut down.
    pub(crate) async fn shut_down(&self) {
        let mut shared = self.shared.clone();
        while shared.changed().await.is_ok() {}
    }
}

fn shut_down(call: &Call<'_>) -> quorate_core::Error {
    call.error(ErrorKind::Unavailable, "this backend was shut down")
}

/// Opens a new shared session whenever the last one has ended, for ever.
async fn replace(settings: Arc<Settings>, session: Duration, shared: watch::Sender<Shared>) {
    loop {
        let current = match &*shared.borrow() {
            Shared::Up(conn) => Some(conn.clone()),
            Shared::Down { .. } => None,
        };
        if let Some(conn) = current {
            conn.ended().await;
            conn.close();
            tracing::warn!(backend = NAME, session = %conn.client.session_id(), "the shared session has ended, opening another");
        }
        let mut pause = BACKOFF.0;
        loop {
            match open(&settings, session, "reconnect").await {
                Ok(conn) => {
                    shared.send_replace(Shared::Up(Arc::new(conn)));
                    break;
                }
                Err(error) => {
                    tracing::warn!(backend = NAME, %error, "no shared session yet");
                    shared.send_replace(Shared::Down { kind: error.kind(), why: error.to_string() });
                }
            }
            sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }
}
