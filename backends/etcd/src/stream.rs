//! The shared watch stream: one bidirectional stream carries the watches and waits of a backend.
//!
//! Promise: a watch that [`Streams::open`] returned sees every event from then on, in order, or is told that it
//! does not: its channel ends. Dropping a watch cancels it at the server. A watch whose reader is behind by
//! [`BACKLOG`] messages is ended instead of buffered.
//!
//! Watches begin "now": a watch that begins in the past, even by one revision, is served from a loop that runs every
//! 100 ms. Whoever needs to know what was before reads after the watch has begun.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use etcd_client::{
    Event, WatchFilterType, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream, WatchStream,
};
use quorate_core::{ErrorKind, watch::WATCH_CAPACITY};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    connect::{Link, Pool},
    error::{Blame, Call, Fault},
    path::Stored,
};

/// How many messages of the server a watch may leave unread.
const BACKLOG: usize = WATCH_CAPACITY;

/// What happens to a watch.
#[derive(Debug)]
pub(crate) enum Signal {
    /// The watch has begun: every event from now on will be seen.
    Begun,
    /// Events of one revision, or of several in order.
    Events(Vec<Event>),
    /// The watch has ended.
    Ended(Ending),
}

/// Why a watch has ended.
#[derive(Debug, Clone)]
pub(crate) enum Ending {
    /// The server ended it because it fell behind a compaction: contact is there, events are missing.
    Behind,
    /// The server refused it, or contact is lost.
    Fault(Fault),
}

/// The tasks of a backend. They end with it.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    // `None` after the end.
    running: Mutex<Option<JoinSet<()>>>,
}

impl Tasks {
    pub(crate) fn new() -> Self {
        Self { running: Mutex::new(Some(JoinSet::new())) }
    }

    fn running(&self) -> MutexGuard<'_, Option<JoinSet<()>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(running) = self.running().as_mut() {
            while running.try_join_next().is_some() {}
            running.spawn(task);
        }
    }

    /// Ends them all, for good.
    pub(crate) fn end(&self) {
        *self.running() = None;
    }
}

/// Makes watches.
#[derive(Debug)]
pub(crate) struct Streams {
    pool: Arc<Pool>,
    tasks: Arc<Tasks>,
    next_id: AtomicI64,
    current: Mutex<Current>,
}

#[derive(Debug, Default)]
struct Current {
    stream: Option<Arc<Shared>>,
    /// The server refused a watch: the next stream needs a new token.
    renew_token: bool,
}

impl Streams {
    pub(crate) fn new(pool: Arc<Pool>, tasks: Arc<Tasks>) -> Self {
        // 0 would let the server choose.
        Self { pool, tasks, next_id: AtomicI64::new(1), current: Mutex::default() }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a watch and returns when it has begun at the server.
    pub(crate) async fn open(&self, call: Call, range: &Stored, deletes_only: bool) -> Result<Watching, Fault> {
        let limit = self.pool.options.request_timeout;
        let mut token_renewed = false;
        loop {
            let mut watching = self.join(range, deletes_only);
            match timeout(limit, watching.begun()).await {
                Ok(Ok(())) => return Ok(watching),
                // The token of a stream is as old as the stream, and the server looks at it for each new watch.
                Ok(Err(fault)) if self.worth_a_new_token(&fault) && !token_renewed => {
                    token_renewed = true;
                    self.retire(&watching.stream);
                }
                Ok(Err(fault)) => return Err(fault),
                Err(_) => return Err(Fault::new(call.doubt(), format!("the watch did not begin within {limit:?}"))),
            }
        }
    }

    fn worth_a_new_token(&self, fault: &Fault) -> bool {
        fault.kind == ErrorKind::Denied && self.pool.options.has_login()
    }

    /// Adds a watch to the current stream, or to a new one.
    fn join(&self, range: &Stored, deletes_only: bool) -> Watching {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, signals) = mpsc::channel(BACKLOG);
        let mut create = Some((Create { id, range: range.clone(), deletes_only }, sender));
        let mut current = self.current();
        let stream = match current.stream.take() {
            Some(stream) if stream.add(&mut create) => stream,
            _ => {
                let stream = Arc::new(Shared::default());
                stream.add(&mut create);
                let renew_token = std::mem::take(&mut current.renew_token);
                self.tasks.spawn(run(stream.clone(), self.pool.clone(), renew_token));
                stream
            }
        };
        current.stream = Some(stream.clone());
        Watching { stream, pool: self.pool.clone(), id, signals, since: Instant::now(), begun: false }
    }

    /// Takes no more watches on this stream; those it has go on.
    fn retire(&self, stream: &Arc<Shared>) {
        let mut current = self.current();
        // Of many watches refused together only the first one retires the stream.
        if current.stream.as_ref().is_some_and(|now| Arc::ptr_eq(now, stream)) {
            current.stream = None;
            current.renew_token = true;
            stream.retire();
        }
    }
}

/// A watch. Dropping it cancels it at the server.
#[derive(Debug)]
pub(crate) struct Watching {
    stream: Arc<Shared>,
    pool: Arc<Pool>,
    id: i64,
    signals: mpsc::Receiver<Signal>,
    since: Instant,
    begun: bool,
}

impl Watching {
    /// What happens next; `None` if this reader was too slow and events are missing.
    ///
    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Signal> {
        self.signals.recv().await
    }

    async fn begun(&mut self) -> Result<(), Fault> {
        let first = self.next().await;
        // Answered, whatever the answer.
        self.begun = true;
        match first {
            Some(Signal::Begun) => Ok(()),
            Some(Signal::Ended(Ending::Fault(fault))) => Err(fault),
            _ => Err(Fault::new(ErrorKind::Unavailable, "the watch ended before it began")),
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.stream.remove(self.id);
        if !self.begun {
            self.stream.suspect(&self.pool, self.since);
        }
    }
}

#[derive(Debug)]
struct Create {
    id: i64,
    range: Stored,
    deletes_only: bool,
}

impl Create {
    fn options(&self) -> WatchOptions {
        let mut options = WatchOptions::new().with_watch_id(self.id);
        if self.range.prefix {
            // In fragments: a watch that catches up is sent many revisions at once.
            options = options.with_prefix().with_fragment();
        }
        if self.deletes_only {
            options = options.with_filters([WatchFilterType::NoPut]);
        }
        options
    }
}

#[derive(Debug)]
enum Command {
    Create(Create),
    Cancel(i64),
}

/// One stream.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There are commands, or the stream is to end.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// At most one create and one cancel per watch; watches are bounded by their readers.
    commands: VecDeque<Command>,
    watches: HashMap<i64, mpsc::Sender<Signal>>,
    /// Watches that the server has not answered yet, in the order in which they were sent; it answers in that order.
    unanswered: VecDeque<i64>,
    link: Option<Arc<Link>>,
    /// No watch may join.
    closed: bool,
    /// The stream is to end although it has watches.
    given_up: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the watch, unless the stream takes no more watches; then it returns `false`.
    fn add(&self, create: &mut Option<(Create, mpsc::Sender<Signal>)>) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        if let Some((create, sender)) = create.take() {
            state.watches.insert(create.id, sender);
            state.commands.push_back(Command::Create(create));
        }
        drop(state);
        self.changed.notify_one();
        true
    }

    fn remove(&self, id: i64) {
        let mut state = self.state();
        // Once the stream has ended, or has ended this watch, there is nothing to cancel.
        if state.watches.remove(&id).is_some() {
            state.commands.push_back(Command::Cancel(id));
            drop(state);
            self.changed.notify_one();
        }
    }

    fn retire(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    /// A watch has waited since then for its beginning, in vain: ends the stream if it seems to be dead, and leaves its
    /// connection if that does.
    fn suspect(&self, pool: &Pool, since: Instant) {
        let mut state = self.state();
        let Some(link) = state.link.clone() else { return };
        let silent = pool.is_silent(&link, since);
        if silent || since.elapsed() >= pool.options.request_timeout {
            state.closed = true;
            state.given_up = true;
            drop(state);
            self.changed.notify_one();
        }
        if silent {
            pool.blame(&link, Blame::Connection);
        }
    }

    /// The next command; `Err` if the stream is to end.
    fn command(&self) -> Result<Option<Command>, ()> {
        let mut state = self.state();
        if state.given_up || (state.closed && state.watches.is_empty()) {
            return Err(());
        }
        let command = state.commands.pop_front();
        if let Some(Command::Create(create)) = &command {
            let id = create.id;
            state.unanswered.push_back(id);
        }
        Ok(command)
    }

    fn end(&self, fault: &Fault) {
        let mut state = self.state();
        state.closed = true;
        state.commands.clear();
        for (_, watch) in state.watches.drain() {
            // A full channel ends too, which says the same.
            let _ = watch.try_send(Signal::Ended(Ending::Fault(fault.clone())));
        }
    }

    /// Hands a message of the server to its watch.
    fn route(&self, message: &WatchResponse) -> Result<(), Fault> {
        let mut state = self.state();
        let mut id = message.watch_id();
        if message.created() {
            let expected = state.unanswered.pop_front();
            match expected {
                // A refused watch may be named -1.
                Some(expected) if message.canceled() => id = expected,
                Some(expected) if expected == id => {}
                _ => {
                    let text = "the server chooses watch ids by itself: etcd 3.4 or later is needed, and not behind its gRPC proxy";
                    return Err(Fault::new(ErrorKind::Unsupported, text));
                }
            }
        }
        let signal = if message.canceled() {
            Signal::Ended(ending(message))
        } else if message.created() {
            Signal::Begun
        } else if message.events().is_empty() {
            return Ok(());
        } else {
            Signal::Events(message.events().to_vec())
        };
        if message.canceled() {
            if let Some(watch) = state.watches.remove(&id) {
                let _ = watch.try_send(signal);
            }
        } else if let Some(watch) = state.watches.get(&id)
            && watch.try_send(signal).is_err()
        {
            state.watches.remove(&id);
            state.commands.push_back(Command::Cancel(id));
            drop(state);
            self.changed.notify_one();
        }
        Ok(())
    }
}

fn ending(message: &WatchResponse) -> Ending {
    let reason = message.cancel_reason();
    if message.compact_revision() != 0 {
        Ending::Behind
    } else if ["permission denied", "invalid auth token", "user name", "revision of auth store is old"]
        .iter()
        .any(|known| reason.contains(known))
    {
        Ending::Fault(Fault::new(ErrorKind::Denied, format!("the server says: {reason}")).with_right(reason))
    } else {
        Ending::Fault(Fault::new(ErrorKind::Unavailable, format!("the server ended the watch: {reason}")))
    }
}

/// Ends the watches of a stream with its task, however that ends: nobody must wait on a stream that is not there.
struct Life {
    stream: Arc<Shared>,
    fault: Fault,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.stream.end(&self.fault);
    }
}

/// The life of one stream.
async fn run(stream: Arc<Shared>, pool: Arc<Pool>, renew_token: bool) {
    let fault = Fault::new(ErrorKind::Unavailable, "the backend was shut down");
    let mut life = Life { stream: stream.clone(), fault };
    life.fault = match connect(&stream, &pool, renew_token).await {
        Err(fault) => fault,
        Ok((link, transport)) => {
            let (requests, responses) = transport.split();
            // Both at once: a server that waits for us to read must not keep us waiting to write.
            tokio::select! {
                fault = write(&stream, requests) => fault,
                fault = read(&stream, &pool, &link, responses) => fault,
                fault = pool.deserted(&link) => fault,
            }
        }
    };
    tracing::debug!(fault = %life.fault, "etcd watch stream ended");
}

async fn connect(stream: &Shared, pool: &Pool, renew_token: bool) -> Result<(Arc<Link>, WatchStream), Fault> {
    const CALL: Call = Call::read("watch");
    let link = pool.link().await?;
    stream.state().link = Some(link.clone());
    let limit = pool.options.request_timeout;
    let opening = async {
        if renew_token {
            link.clients().renew_token().await?;
        }
        let first = loop {
            match stream.command() {
                Ok(Some(Command::Create(create))) => break create,
                // The cancel of a watch that was never sent.
                Ok(Some(Command::Cancel(_))) => {}
                Ok(None) => stream.changed.notified().await,
                Err(()) => return Ok(None),
            }
        };
        // etcd begins to answer with its first message, so the first watch opens the stream.
        let options = first.options();
        link.clients().watch.clone().watch(first.range.start, Some(options)).await.map(Some)
    };
    match timeout(limit, opening).await {
        Ok(Ok(Some(transport))) => Ok((link, transport)),
        Ok(Ok(None)) => Err(Fault::new(ErrorKind::Unavailable, "nobody waits any more")),
        Ok(Err(error)) => Err(pool.fault(&link, CALL, &error)),
        Err(_) => {
            pool.blame(&link, Blame::Connection);
            Err(Fault::new(ErrorKind::Unavailable, format!("the watch stream did not begin within {limit:?}")))
        }
    }
}

async fn write(stream: &Shared, mut requests: WatchRequestSender) -> Fault {
    loop {
        let sent = match stream.command() {
            Err(()) => return Fault::new(ErrorKind::Unavailable, "the watch stream was closed"),
            Ok(None) => {
                stream.changed.notified().await;
                continue;
            }
            Ok(Some(Command::Create(create))) => {
                let options = create.options();
                requests.watch(create.range.start, Some(options)).await
            }
            Ok(Some(Command::Cancel(id))) => requests.cancel(id).await,
        };
        if let Err(error) = sent {
            return Fault::new(ErrorKind::Unavailable, error.to_string());
        }
    }
}

async fn read(stream: &Shared, pool: &Pool, link: &Arc<Link>, mut responses: WatchResponseStream) -> Fault {
    loop {
        match responses.message().await {
            Ok(Some(message)) => {
                pool.praise(link);
                if let Err(fault) = stream.route(&message) {
                    return fault;
                }
            }
            Ok(None) => {
                pool.blame(link, Blame::Endpoint);
                return Fault::new(ErrorKind::Unavailable, "the server ended the watch stream");
            }
            Err(error) => return pool.fault(link, Call::read("watch"), &error),
        }
    }
}
