//! A participant that keeps book, and processes that serve it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use quorate::{
    Config, Coordinator, ErrorKind, Result,
    commit::{Branch, Finish, Participant, TransactionsOptions, TxId, Vote},
    discovery::{Instance, Registration},
    grpc::ParticipantServer,
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::transport::server::{Router, TcpIncoming};

pub(crate) const SOON: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Prepared,
    Committed,
    Aborted,
}

/// Durable as long as somebody holds it, as a database is; processes come and go around it.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pages: Mutex<HashMap<TxId, State>>,
    wrong: Mutex<Vec<String>>,
    calls: Mutex<Vec<(&'static str, Branch)>>,
    refuses: bool,
}

impl Book {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn refusing() -> Arc<Self> {
        Arc::new(Self { refuses: true, ..Self::default() })
    }

    pub(crate) fn state(&self, id: TxId) -> Option<State> {
        self.pages.lock().expect("no poison").get(&id).copied()
    }

    pub(crate) fn breaches(&self) -> Vec<String> {
        self.wrong.lock().expect("no poison").clone()
    }

    /// What was asked, in order.
    pub(crate) fn calls(&self) -> Vec<(&'static str, Branch)> {
        self.calls.lock().expect("no poison").clone()
    }

    pub(crate) fn count(&self, verb: &str, id: TxId) -> usize {
        self.calls().iter().filter(|(asked, branch)| *asked == verb && branch.id == id).count()
    }

    fn note(&self, verb: &'static str, branch: &Branch) {
        self.calls.lock().expect("no poison").push((verb, branch.clone()));
    }

    fn breach(&self, branch: &Branch, what: &str) -> Finish {
        self.wrong.lock().expect("no poison").push(format!("{branch}: {what}"));
        Finish::Diverged(what.to_owned())
    }
}

#[async_trait]
impl Participant for Book {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        self.note("prepare", branch);
        if self.refuses {
            return Ok(Vote::No("as the script says".to_owned()));
        }
        let mut pages = self.pages.lock().expect("no poison");
        Ok(match *pages.entry(branch.id).or_insert(State::Prepared) {
            State::Prepared => Vote::Yes,
            State::Committed | State::Aborted => Vote::No("it is over".to_owned()),
        })
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        self.note("commit", branch);
        let mut pages = self.pages.lock().expect("no poison");
        Ok(match pages.get(&branch.id) {
            Some(State::Prepared | State::Committed) => {
                pages.insert(branch.id, State::Committed);
                Finish::Done
            }
            None => self.breach(branch, "a commit without a vote"),
            Some(State::Aborted) => self.breach(branch, "a commit after the abort"),
        })
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.note("abort", branch);
        let mut pages = self.pages.lock().expect("no poison");
        Ok(match pages.get(&branch.id) {
            None | Some(State::Prepared | State::Aborted) => {
                pages.insert(branch.id, State::Aborted);
                Finish::Done
            }
            Some(State::Committed) => self.breach(branch, "an abort after the commit"),
        })
    }

    async fn in_doubt(&self, _: &str) -> Result<Vec<TxId>> {
        let pages = self.pages.lock().expect("no poison");
        Ok(pages.iter().filter(|(_, state)| **state == State::Prepared).map(|(id, _)| *id).collect())
    }
}

pub(crate) type Served = JoinHandle<Result<(), tonic::transport::Error>>;

/// What others see of a process: a server on a port, with a runtime of its own that can end at any moment.
pub(crate) struct Process {
    runtime: Option<Runtime>,
    pub(crate) addr: SocketAddr,
    coord: Option<Coordinator>,
    pub(crate) registration: Option<Registration>,
    graceful: Option<(oneshot::Sender<()>, Served)>,
}

impl Process {
    pub(crate) async fn serve(participant: Arc<dyn Participant>) -> Self {
        Self::serve_at("127.0.0.1:0".parse().expect("an address"), participant).await
    }

    pub(crate) async fn serve_at(addr: SocketAddr, participant: Arc<dyn Participant>) -> Self {
        let router = tonic::transport::Server::builder().add_service(ParticipantServer::new(participant));
        Self::run(addr, router).await
    }

    pub(crate) async fn run(addr: SocketAddr, router: Router) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let bound = runtime.spawn(async move {
            // The port of a process that has just died may linger for a moment.
            loop {
                match TcpListener::bind(addr).await {
                    Ok(listener) => return listener,
                    Err(_) => sleep(Duration::from_millis(10)).await,
                }
            }
        });
        let listener = timeout(SOON, bound).await.expect("in time").expect("no panic");
        let addr = listener.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel::<()>();
        let asked = async move { drop(stopped.await) };
        let served = runtime.spawn(router.serve_with_incoming_shutdown(TcpIncoming::from(listener), asked));
        Self { runtime: Some(runtime), addr, coord: None, registration: None, graceful: Some((stop, served)) }
    }

    /// As an instance of `ledger-service`.
    pub(crate) async fn registered(mut self, space: &Space, id: &str) -> Self {
        let (config, at, id) = (space.0.clone(), self.addr, id.to_owned());
        let work = async move {
            let coord = quorate::connect_with(&config).await.expect("connected");
            let registration = listed(&coord, at, &id, "eu-1").await;
            (coord, registration)
        };
        let runtime = self.runtime.as_ref().expect("it runs");
        let (coord, registration) = runtime.spawn(work).await.expect("no panic");
        (self.coord, self.registration) = (Some(coord), Some(registration));
        self
    }

    /// As SIGKILL does: connections break, nothing is taken back.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // It is dead when this returns; to wait is allowed only on a thread of its own.
            let end = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5)));
            end.join().expect("no panic");
        }
    }

    /// It takes nothing new from now on, and finishes what it has.
    pub(crate) fn stop(&mut self) -> Served {
        let (stop, served) = self.graceful.take().expect("it serves");
        stop.send(()).expect("it listens");
        served
    }

    /// As a good process does when it is told to end.
    pub(crate) async fn finish(&mut self) {
        timeout(SOON, self.stop()).await.expect("in time").expect("no panic").expect("it ends well");
    }

    /// Takes its registration back.
    pub(crate) async fn deregister(&mut self) {
        self.registration.take().expect("registered").close().await.expect("deregistered");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Registers a process from outside, so that its record outlives it.
pub(crate) async fn listed(registrar: &Coordinator, at: SocketAddr, id: &str, zone: &str) -> Registration {
    let instance = Instance::new("ledger-service", at.to_string()).id(id).zone(zone);
    let registration = registrar.register(instance).expect("a good instance");
    registration.ready().await.expect("registered");
    registration
}

/// A namespace of a coordinator; every process connects for itself.
#[derive(Clone)]
pub(crate) struct Space(Config);

impl Space {
    pub(crate) fn memory() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("grpc-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        Self::at(&format!("memory://{name}/app"))
    }

    pub(crate) fn at(url: &str) -> Self {
        Self(Config::parse(url).expect("a URL").with_session_ttl(Duration::from_secs(1)))
    }

    pub(crate) async fn coord(&self) -> Coordinator {
        quorate::connect_with(&self.0).await.expect("connected")
    }
}

pub(crate) fn quick() -> TransactionsOptions {
    TransactionsOptions::default().within(Duration::from_secs(5))
}

pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(SOON, waiting).await.is_ok(), "in vain waited for: {what}");
}

/// Asserts that the transaction ended at this end everywhere, that nobody is in doubt, and that no breach was noted.
pub(crate) async fn ended(id: TxId, end: State, books: &[&Arc<Book>]) {
    for book in books {
        eventually(&format!("{end:?}"), async || book.state(id) == Some(end)).await;
        assert_eq!(book.breaches(), Vec::<String>::new());
    }
}

#[track_caller]
pub(crate) fn fails<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, words: &[&str]) {
    let error = result.expect_err("it fails");
    assert_eq!(error.kind(), kind, "{error:?}");
    for word in words {
        assert!(error.to_string().contains(word), "{word:?} is not in: {error}");
    }
}
