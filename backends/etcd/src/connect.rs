//! One endpoint in use at a time, and what to do when it fails.
//!
//! Promise: a call goes to the endpoint that served last; after a failure the next call goes to another one, and after a
//! hang over another connection, so that a dead or silent server costs one call and not every call. Nothing is repeated
//! here: a call is sent at most once.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use etcd_client::{
    Client, DeleteResponse, GetOptions, GetResponse, KvClient, LeaseClient, LeaseGrantResponse, LeaseRevokeResponse,
    PutResponse, ResponseHeader, TxnResponse, WatchClient,
};
use quorate_core::{
    Error, ErrorKind, Result,
    endpoints::{Endpoints, Forsaken, SIGN_LIMIT, Sign, Signs, forsaken},
};
use tokio::{
    sync::{OnceCell, watch},
    time::{Instant, sleep, timeout},
};
use tonic::Code;

use crate::{
    BACKEND,
    config::Options,
    error::{Blame, Call, Fault, judge},
};

/// A call that its caller gives up after this time casts doubt on the connection, if nothing else was answered over it
/// meanwhile. Below the shortest limit in use, a third of the smallest TTL, so that the next renewal does not
/// wait on the same dead connection.
const SUSPICIOUS: Duration = Duration::from_millis(250);

/// A connection with a stream over which nothing was heard for this long is asked whether it is alive.
const QUIET: Duration = Duration::from_secs(3);

/// The endpoints of one backend, each with its connection.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) options: Options,
    endpoints: Endpoints,
    links: Mutex<Vec<Arc<Link>>>,
    /// The term of the last answer: by a later one it is known that another server leads. 0 before the first.
    term: AtomicU64,
    /// The beginning of [`Link::heard`]'s time.
    started: Instant,
}

/// One endpoint's connection, until something is wrong with it: then another link takes its place, so that of many
/// calls that fail together only the first one counts.
pub(crate) struct Link {
    index: usize,
    clients: OnceCell<Clients>,
    /// When the last answer came, in milliseconds from 1; 0 for never.
    heard: AtomicU64,
    /// Calls have left this connection: it may be dead.
    left: watch::Sender<bool>,
    signs: Signs,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("index", &self.index).finish_non_exhaustive()
    }
}

/// etcd-client's clients over one connection. Each is a cheap clone.
#[derive(Clone)]
pub(crate) struct Clients {
    pub(crate) kv: KvClient,
    pub(crate) lease: LeaseClient,
    pub(crate) watch: WatchClient,
    /// Keeps the connection, and renews its token.
    session: Client,
}

/// What etcd says at the head of every answer.
pub(crate) trait Answer {
    fn head(&self) -> Option<&ResponseHeader>;

    /// Counts the elections.
    fn term(&self) -> Option<u64> {
        self.head().map(ResponseHeader::raft_term).filter(|term| *term > 0)
    }
}

impl Answer for TxnResponse {
    fn head(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for GetResponse {
    fn head(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for PutResponse {
    fn head(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for DeleteResponse {
    fn head(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for LeaseGrantResponse {
    fn head(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for LeaseRevokeResponse {
    fn head(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

/// The answer to a user who may not see it.
impl Answer for Option<GetResponse> {
    fn head(&self) -> Option<&ResponseHeader> {
        self.as_ref().and_then(GetResponse::header)
    }
}

impl Link {
    fn new(index: usize, clients: Option<Clients>) -> Arc<Self> {
        let (heard, left) = (AtomicU64::new(0), watch::Sender::new(false));
        Arc::new(Self { index, clients: OnceCell::new_with(clients), heard, left, signs: Signs::default() })
    }

    pub(crate) fn clients(&self) -> &Clients {
        self.clients.get().expect("Pool::link hands out only links that are made")
    }
}

impl Clients {
    /// Asks the server whom it follows. It answers from memory, and under any user.
    async fn sign(&self, link: &Link, pool: &Pool) -> Sign {
        let since = Instant::now();
        match timeout(SIGN_LIMIT, async { self.session.maintenance_client().status().await }).await {
            Ok(Ok(status)) if status.leader() == 0 => Sign::Leaderless,
            Ok(Ok(status)) => Sign::Serves(Some(status.raft_term())),
            // Also said by the interceptor of every request that requires a leader, as ours do.
            Ok(Err(etcd_client::Error::GRpcStatus(status))) if status.message().contains("no leader") => {
                Sign::Leaderless
            }
            // What else is wrong with it, the request is told by itself.
            Ok(Err(_)) => Sign::Serves(None),
            Err(_) if pool.has_heard(link, since) => Sign::Serves(None),
            Err(_) => Sign::Silent,
        }
    }

    pub(crate) async fn renew_token(&self) -> Result<(), etcd_client::Error> {
        self.session.refresh_token().await
    }
}

impl Pool {
    pub(crate) fn new(options: Options) -> Self {
        let count = options.uris.len();
        let links = (0..count).map(|index| Link::new(index, None)).collect();
        Self {
            options,
            endpoints: Endpoints::new(count),
            links: Mutex::new(links),
            term: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    fn links(&self) -> MutexGuard<'_, Vec<Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The URI that calls go to now.
    pub(crate) fn endpoint(&self) -> &str {
        &self.options.uris[self.endpoints.pick()]
    }

    fn current(&self) -> Arc<Link> {
        self.links()[self.endpoints.pick()].clone()
    }

    /// The link to use now. Sends nothing, unless there are credentials to exchange for a token.
    pub(crate) async fn link(&self) -> Result<Arc<Link>, Fault> {
        let link = self.current();
        if link.clients.initialized() {
            return Ok(link);
        }
        let limit = self.options.request_timeout;
        let asked = self.asked(&link);
        let opened = timeout(limit, link.clients.get_or_try_init(|| self.open(link.index))).await;
        asked.answered();
        match opened {
            Ok(Ok(_)) => Ok(link),
            Ok(Err((fault, blame))) => {
                self.blame(&link, blame);
                Err(fault)
            }
            Err(_) => {
                self.blame(&link, Blame::Connection);
                Err(Fault::new(ErrorKind::Unavailable, format!("no answer to the login within {limit:?}")))
            }
        }
    }

    async fn open(&self, index: usize) -> Result<Clients, (Fault, Blame)> {
        let options = self.options.connection().await.map_err(|fault| (fault, Blame::Nobody))?;
        let uri = self.options.uris[index].as_str();
        // Whatever fails here, the request itself was not sent.
        let session = Client::connect([uri], Some(options)).await.map_err(|e| judge(Call::read("connect"), &e))?;
        // The server bounds requests; an answer may hold as much as a directory does.
        let (kv, watch) = (session.kv_client(), session.watch_client());
        Ok(Clients {
            kv: kv.max_decoding_message_size(usize::MAX),
            lease: session.lease_client(),
            watch: watch.max_decoding_message_size(usize::MAX),
            session,
        })
    }

    /// Draws the consequence of a failed call.
    pub(crate) fn blame(&self, link: &Arc<Link>, blame: Blame) {
        if blame == Blame::Nobody {
            return;
        }
        {
            let mut links = self.links();
            let place = &mut links[link.index];
            if !Arc::ptr_eq(place, link) {
                return;
            }
            // tonic reconnects by itself, so a client whose connection was refused is kept, with its token; one whose
            // connection may look alive and not be is left behind, and so is one whose certificate may be renewed by now.
            let keep =
                (blame == Blame::Endpoint && !self.options.uses_tls()).then(|| link.clients.get().cloned()).flatten();
            *place = Link::new(link.index, keep);
            link.left.send_replace(true);
        }
        let next = self.endpoints.failed(link.index);
        let uris = &self.options.uris;
        tracing::debug!(endpoint = uris[link.index], next = uris[next], ?blame, "etcd endpoint failed");
    }

    fn millis(&self, since: Instant) -> u64 {
        u64::try_from(since.duration_since(self.started).as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// Whether a call that has waited since then has reason to doubt the connection. A server that answers others over
    /// the same connection is slow, not silent.
    pub(crate) fn is_silent(&self, link: &Link, since: Instant) -> bool {
        since.elapsed() >= SUSPICIOUS && !self.has_heard(link, since)
    }

    fn has_heard(&self, link: &Link, since: Instant) -> bool {
        link.heard.load(Ordering::Relaxed) > self.millis(since)
    }

    /// Whether the server answers over this connection. An error ends streams too, if it is one.
    async fn proves(&self, link: &Link) -> bool {
        let status = async { link.clients().session.maintenance_client().status().await };
        timeout(SIGN_LIMIT, status).await.is_ok()
    }

    fn quiet_for(&self, link: &Link) -> Duration {
        let now = self.millis(Instant::now());
        Duration::from_millis(now.saturating_sub(link.heard.load(Ordering::Relaxed)))
    }

    /// Returns when the connection is dead. It is asked when calls leave it, and when nothing was heard for long: a stream over
    /// which nothing comes would find out by a ping only, and etcd allows one in five seconds.
    pub(crate) async fn deserted(&self, link: &Arc<Link>) -> Fault {
        let mut left = link.left.subscribe();
        let mut was_left = false;
        loop {
            tokio::select! {
                // The link is borrowed, so that its sender is there.
                _ = left.wait_for(|left| *left), if !was_left => was_left = true,
                () = sleep(QUIET.saturating_sub(self.quiet_for(link))) => if self.quiet_for(link) < QUIET {
                    continue;
                }
            }
            // Twice: who was stopped itself finds that the first question was answered late.
            let silent = !self.proves(link).await && !self.proves(link).await;
            if silent {
                self.blame(link, Blame::Connection);
                return Fault::new(ErrorKind::Unavailable, format!("no sign of life within {:?}", 2 * SIGN_LIMIT));
            }
            self.praise(link);
        }
    }

    /// Notes that the link has given an answer.
    pub(crate) fn praise(&self, link: &Link) {
        let before = link.heard.swap(self.millis(Instant::now()), Ordering::Relaxed);
        if before == 0 {
            self.endpoints.succeeded(link.index);
        }
    }

    /// Judges an error that came over this link.
    pub(crate) fn fault(&self, link: &Arc<Link>, call: Call, error: &etcd_client::Error) -> Fault {
        let (fault, blame) = judge(call, error);
        if blame == Blame::Nobody {
            self.praise(link);
        }
        self.blame(link, blame);
        fault
    }

    /// Notes that something is being asked over this link.
    pub(crate) fn asked<'a>(&'a self, link: &'a Arc<Link>) -> Asked<'a> {
        Asked { pool: self, link, since: Instant::now(), answered: false }
    }

    /// Sends one request.
    pub(crate) async fn call<T, F, Fut>(&self, call: Call, request: F) -> Result<T>
    where
        T: Answer,
        F: FnOnce(&Clients) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.request(call, request).await.map_err(|fault| fault.error(call.verb))
    }

    async fn request<T, F, Fut>(&self, call: Call, request: F) -> Result<T, Fault>
    where
        T: Answer,
        F: FnOnce(&Clients) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        let link = self.link().await?;
        let asked = self.asked(&link);
        let alone = self.endpoints.count() == 1;
        let before = Some(self.term.load(Ordering::Relaxed)).filter(|term| *term > 0);
        let answer = tokio::select! {
            biased;
            answer = request(link.clients()) => answer,
            why = forsaken(alone, before, || link.signs.get(link.clients().sign(&link, self))) => {
                asked.answered();
                let (blame, message) = forsaken_because(why);
                self.blame(&link, blame);
                return Err(Fault::new(call.doubt(), message));
            }
        };
        asked.answered();
        match answer {
            Ok(answer) => {
                self.praise(&link);
                if let Some(term) = answer.term() {
                    self.term.store(term, Ordering::Relaxed);
                }
                Ok(answer)
            }
            Err(error) => Err(self.fault(&link, call, &error)),
        }
    }

    /// Proves that an endpoint serves, and the credentials with it.
    ///
    /// # Errors
    /// `Denied` for wrong credentials; `Unavailable`, naming all endpoints, if none has answered in time. If servers
    /// are there but do not serve yet, as during an election, they are asked again within the time.
    pub(crate) async fn prove(&self, probe: &[u8]) -> Result<()> {
        const PAUSE: Duration = Duration::from_millis(100);
        let end = Instant::now() + self.options.connect_timeout;
        loop {
            let fault = match self.prove_once(probe, end).await {
                Ok(()) => return Ok(()),
                Err(fault) if fault.kind != ErrorKind::Unavailable => return Err(fault.error("connect")),
                Err(fault) => fault,
            };
            if fault.said && Instant::now() + PAUSE < end {
                sleep(PAUSE).await;
                continue;
            }
            let message = format!("no endpoint serves ({})", self.options.uris.join(", "));
            let mut error = Error::new(ErrorKind::Unavailable, "connect", message).on(BACKEND).because(fault);
            if self.options.uses_tls() {
                // A server that refuses a certificate closes the connection, and its reason may not arrive.
                error = error.next("check the endpoints, and that the server accepts the client's certificate");
            }
            return Err(error);
        }
    }

    /// Asks every endpoint once, until one serves. Of several refusals one that a server gave is returned.
    async fn prove_once(&self, probe: &[u8], end: Instant) -> Result<(), Fault> {
        let count = self.endpoints.count();
        let mut why = None::<Fault>;
        for tried in 0..count {
            let link = self.current();
            // A silent endpoint may use up its share only.
            let share = end.saturating_duration_since(Instant::now()) / u32::try_from(count - tried).unwrap_or(1);
            let asked = self.request(Call::read("connect"), |c| ask(c.kv.clone(), probe.to_vec()));
            let (fault, blame) = match timeout(share, asked).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(fault)) if fault.kind != ErrorKind::Unavailable => return Err(fault),
                // Whatever it said, there are others to ask.
                Ok(Err(fault)) => (fault, Blame::Endpoint),
                Err(_) => {
                    let silent = format!("{} did not answer within {share:?}", self.options.uris[link.index]);
                    (Fault::new(ErrorKind::Unavailable, silent), Blame::Connection)
                }
            };
            self.blame(&link, blame);
            if !why.as_ref().is_some_and(|why| why.said) {
                why = Some(fault);
            }
        }
        Err(why.unwrap_or_else(|| Fault::new(ErrorKind::Unavailable, "no time was left to ask")))
    }
}

fn forsaken_because(why: Forsaken) -> (Blame, &'static str) {
    match why {
        Forsaken::LeaderChanged => {
            (Blame::Nobody, "the leader changed while the request was on its way, and it was not answered")
        }
        Forsaken::Leaderless => (Blame::Endpoint, "the server knows no leader, and the request was not answered"),
        Forsaken::Silent => (Blame::Connection, "the server has answered nothing since the request was sent"),
    }
}

async fn ask(mut kv: KvClient, probe: Vec<u8>) -> Result<Option<GetResponse>, etcd_client::Error> {
    match kv.get(probe, Some(GetOptions::new().with_count_only())).await {
        // The server knows the user; what the user may touch shows when it is touched.
        Err(etcd_client::Error::GRpcStatus(status)) if status.code() == Code::PermissionDenied => Ok(None),
        other => other.map(Some),
    }
}

/// A request under way. Dropped without an answer after a while, it was given up: the connection may be dead.
pub(crate) struct Asked<'a> {
    pool: &'a Pool,
    link: &'a Arc<Link>,
    since: Instant,
    answered: bool,
}

impl Asked<'_> {
    pub(crate) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if !self.answered && self.pool.is_silent(self.link, self.since) {
            self.pool.blame(self.link, Blame::Connection);
        }
    }
}
