//! One HTTP exchange with one of the agents.
//!
//! Promise: a failure says whether the request may have been carried out; an answer is bounded in size; an
//! agent that fails or does not answer is left by the next call. Nothing is repeated here, apart from a
//! request that found its pooled connection closed before a byte of it was written.

use std::{
    error::Error as StdError,
    fmt,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, StatusCode, Uri,
    header::{AUTHORIZATION, DATE, HeaderName},
};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use quorate_core::{
    Config, Result,
    endpoints::{Endpoints, Forsaken, SIGN_LIMIT, Sign, Signs, forsaken},
};
use rustls_pki_types::ServerName;
use tokio::{
    sync::{Mutex, Semaphore, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    NAME,
    config::{Settings, bad},
    error::{Failure, is_agent_trouble},
};

/// The largest answer that is read: some 100,000 keys with small values.
const ANSWER_LIMIT: usize = 64 << 20;
/// An idle connection is closed before the usual firewall forgets it.
const IDLE: Duration = Duration::from_secs(90);
/// How long a blocked query stays at an agent that all other calls have left.
const ABANDONED_AFTER: Duration = Duration::from_secs(1);
/// How often an agent at which queries are blocked is asked whether it is alive, if there are others to go to.
const QUIET: Duration = Duration::from_secs(3);
const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");
const INDEX: HeaderName = HeaderName::from_static("x-consul-index");
const FILTERED: HeaderName = HeaderName::from_static("x-consul-results-filtered-by-acls");

/// A request.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// Path and query, encoded.
    pub(crate) path: String,
    pub(crate) body: Bytes,
    /// The agent that has to answer, where it matters.
    pub(crate) agent: Option<usize>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// The index header, also of a 404: it is what a blocking query for a missing key waits on.
    pub(crate) index: Option<u64>,
    /// Whether access rules left something out in silence (Consul 1.11 and later say so).
    pub(crate) filtered: bool,
    /// What the agent's clock showed, in whole seconds.
    pub(crate) date: Option<SystemTime>,
    pub(crate) body: Bytes,
}

/// The client: a pool of HTTP/1 connections to every agent.
pub(crate) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    settings: Settings,
    health: Endpoints,
    /// By agent. Asked without a slot, and so by one call at a time.
    signs: Vec<Signs>,
    /// Calls may have moved to another agent: those that are blocked look where.
    moved: watch::Sender<()>,
    /// Held by the blocked query that asks whether the agent is alive.
    asks: Mutex<()>,
    // Blocked queries are counted elsewhere: they would starve everything else.
    slots: Semaphore,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Http {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        let settings = Settings::new(config)?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(settings.connect_timeout));
        // A server that vanished without a word must not hold a blocked query for ever.
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        tcp.set_keepalive_interval(Some(Duration::from_secs(5)));
        tcp.set_keepalive_retries(Some(3));
        let builder = HttpsConnectorBuilder::new();
        let connector = if config.tls.is_some() {
            let builder = builder
                .with_tls_config(quorate_tls::client(&config.tls.clone().unwrap_or_default(), NAME)?)
                .https_only();
            match &settings.tls_server_name {
                Some(name) => {
                    let name = ServerName::try_from(name.clone())
                        .map_err(|_| bad("tls_server_name is not a host name or an address"))?;
                    builder
                        .with_server_name_resolver(FixedServerNameResolver::new(name))
                        .enable_http1()
                        .wrap_connector(tcp)
                }
                None => builder.enable_http1().wrap_connector(tcp),
            }
        } else {
            // Never used for TLS: the scheme of every request is http.
            builder.with_tls_config(quorate_tls::unused(NAME)?).https_or_http().enable_http1().wrap_connector(tcp)
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(settings.connections)
            .build(connector);
        let health = Endpoints::new(settings.agents.len());
        let signs = settings.agents.iter().map(|_| Signs::default()).collect();
        let slots = Semaphore::new(settings.connections);
        Ok(Self { client, settings, health, signs, moved: watch::Sender::new(()), asks: Mutex::new(()), slots })
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The agent that calls go to now.
    pub(crate) fn agent(&self) -> usize {
        self.health.pick()
    }

    /// Leaves an agent that does not answer, or cannot serve.
    pub(crate) fn leave(&self, agent: usize) {
        if self.health.failed(agent) != agent {
            self.moved.send_replace(());
        }
    }

    /// Names an agent in messages.
    pub(crate) fn label(&self, agent: usize) -> &str {
        self.settings.agents[agent].as_str()
    }

    /// Sends a request when a slot is free and waits for the answer for as long as the caller does.
    pub(crate) async fn call(&self, call: Call) -> Result<Answer, Failure> {
        let _slot = self.slots.acquire().await.expect("the semaphore is never closed");
        let agent = call.agent.unwrap_or_else(|| self.health.pick());
        let mut flight = Flight { http: self, agent, since: Instant::now(), settled: false };
        let alone = self.health.count() == 1;
        let answer = tokio::select! {
            biased;
            answer = self.exchange(call, agent) => answer,
            why = forsaken(alone, None, || self.sign(agent)), if !alone => Err(self.forsake(agent, why)),
        };
        flight.settled = true;
        answer
    }

    /// Asks an agent for a leader. A server answers from memory, and anybody.
    async fn sign(&self, agent: usize) -> Sign {
        let call = Call { method: Method::GET, path: "/v1/status/leader".to_owned(), body: Bytes::new(), agent: None };
        let asked = async {
            let request = self.request(call, agent).ok()?;
            let answer = read(self.client.request(request).await.ok()?).await.ok()?;
            let knows_none = answer.body.iter().all(|b| matches!(b, b'"' | b'\n'));
            Some(if answer.status == StatusCode::OK && knows_none { Sign::Leaderless } else { Sign::Serves(None) })
        };
        // What is wrong with it, the request is told by itself.
        let sign =
            async { timeout(SIGN_LIMIT, asked).await.map_or(Sign::Silent, |sign| sign.unwrap_or(Sign::Serves(None))) };
        self.signs[agent].get(sign).await
    }

    fn forsake(&self, agent: usize, why: Forsaken) -> Failure {
        self.leave(agent);
        let why = match why {
            Forsaken::Silent => "it has answered nothing since the request was sent",
            Forsaken::Leaderless | Forsaken::LeaderChanged => "it knows no leader",
        };
        Failure { sent: true, message: format!("no answer from {}: {why}", self.label(agent)) }
    }

    /// Sends a query that the server may hold for up to `patience`, and no longer than a request may take after that.
    ///
    /// It is for tasks of our own, which have no other limit. It takes no slot, and follows when all
    /// other calls leave the agent it is held at.
    pub(crate) async fn block(&self, call: Call, patience: Duration) -> Result<Answer, Failure> {
        let limit = patience + self.settings.request_timeout;
        let ends = Instant::now() + limit;
        loop {
            let agent = self.health.pick();
            tokio::select! {
                answer = self.exchange(call.clone(), agent) => return answer,
                () = sleep_until(ends) => {
                    self.leave(agent);
                    let message = format!("no answer from {} within {limit:?}", self.label(agent));
                    return Err(Failure { sent: true, message });
                }
                () = self.abandoned(agent) => {}
                () = self.deserted(agent), if self.health.count() > 1 => self.leave(agent),
            }
        }
    }

    /// Returns when the agent is silent, or has known no leader for long: a blocked query alone would not find out before its end.
    async fn deserted(&self, agent: usize) {
        // One query asks for all of them.
        let _asks = self.asks.lock().await;
        loop {
            sleep(QUIET).await;
            if !matches!(self.sign(agent).await, Sign::Serves(_))
                && timeout(QUIET, forsaken(false, None, || self.sign(agent))).await.is_ok()
            {
                return;
            }
        }
    }

    /// Returns when calls have gone to another agent for some time.
    async fn abandoned(&self, agent: usize) {
        let mut moved = self.moved.subscribe();
        loop {
            while self.health.pick() == agent {
                if moved.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
            // Long enough for an answer that is on its way, and for a change of mind.
            sleep(ABANDONED_AFTER).await;
            if self.health.pick() != agent {
                return;
            }
        }
    }

    async fn exchange(&self, call: Call, agent: usize) -> Result<Answer, Failure> {
        let request = self.request(call, agent)?;
        let answer = match self.client.request(request).await {
            Ok(response) => read(response).await.map_err(|message| Failure { sent: true, message }),
            Err(error) => Err(Failure { sent: may_have_left(&error), message: chain(&error) }),
        };
        match &answer {
            Ok(answer) if !is_agent_trouble(answer.status, &answer.body) => self.health.succeeded(agent),
            _ => {
                self.leave(agent);
            }
        }
        answer.map_err(|failure| Failure {
            message: format!("no answer from {}: {}", self.label(agent), failure.message),
            ..failure
        })
    }

    fn request(&self, call: Call, agent: usize) -> Result<Request<Full<Bytes>>, Failure> {
        let malformed = |e: hyper::http::Error| Failure { sent: false, message: format!("malformed request: {e}") };
        let uri = Uri::builder()
            .scheme(self.settings.scheme.clone())
            .authority(self.settings.agents[agent].clone())
            .path_and_query(call.path)
            .build()
            .map_err(malformed)?;
        let mut request = Request::builder().method(call.method).uri(uri);
        let unsent = |e: quorate_core::Error| Failure { sent: false, message: e.to_string() };
        if let Some(token) = self.settings.token().map_err(unsent)? {
            request = request.header(TOKEN, token);
        }
        if let Some(login) = self.settings.login().map_err(unsent)? {
            request = request.header(AUTHORIZATION, login);
        }
        request.body(Full::new(call.body)).map_err(malformed)
    }
}

/// A request under way. Callers give up by dropping it, so this is where a silent agent is noticed.
struct Flight<'a> {
    http: &'a Http,
    agent: usize,
    since: Instant,
    settled: bool,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        // A waiter that changed its mind is no sign of a sick agent; one that waited for long is.
        if !self.settled && self.since.elapsed() >= self.http.settings.request_timeout / 2 {
            self.http.leave(self.agent);
        }
    }
}

async fn read(response: hyper::Response<hyper::body::Incoming>) -> Result<Answer, String> {
    let (head, body) = response.into_parts();
    let header = |name: &HeaderName| head.headers.get(name).and_then(|v| v.to_str().ok());
    let index = header(&INDEX).and_then(|text| text.parse().ok());
    let filtered = header(&FILTERED) == Some("true");
    let date = header(&DATE).and_then(|text| httpdate::parse_http_date(text).ok());
    let body = Limited::new(body, ANSWER_LIMIT).collect().await.map_err(|e| chain(&*e))?.to_bytes();
    Ok(Answer { status: head.status, index, filtered, date, body })
}

/// Whether bytes of the request may have reached the server.
fn may_have_left(error: &hyper_util::client::legacy::Error) -> bool {
    if error.is_connect() {
        return false;
    }
    let mut source = error.source();
    while let Some(e) = source {
        if let Some(e) = e.downcast_ref::<hyper::Error>() {
            // hyper says "canceled" only for a request that it never began to write.
            return !e.is_canceled();
        }
        source = e.source();
    }
    true
}

fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let next = e.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = e.source();
    }
    text
}
