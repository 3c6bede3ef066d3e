//! Leases: Consul sessions that end in time.
//!
//! Promise: a lease is never ended by the servers before its TTL has passed since the last confirmed renewal
//! (see the profile for what an agent may do to it), and a client that dies leaves nothing for good.
//!
//! # Two kinds
//! A Consul session with a TTL lasts at least 10 s and may stand for twice its TTL. So the better kind has two
//! clocks: a service `quorate-session` with a TTL check of the asked TTL is registered on the agent, and a session is
//! created that stands on this check and has a TTL of its own (10 s or the asked one, if longer). When the owner
//! dies, the check turns critical after the TTL and the servers end the session in the same step; when the agent dies
//! with it, the session's own TTL ends it. `serfHealth` is left out on purpose: it would let a network partition end
//! a lease while its holder may still trust it.
//!
//! The check has to belong to a service: a critical check of the node would take every other service of that node
//! out of discovery. The service of a dead owner is removed by the agent after a minute.
//!
//! Where the agent refuses registrations, the session has only its own TTL.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use hyper::StatusCode;
use quorate_core::{Error, ErrorKind, Lease, LeaseId, Result};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    api::Api,
    config::SessionKind,
    error::{Effect, Failure, error, excerpt, refused, session_lost},
    http::Answer,
    path::url,
};

/// The name of the services whose checks carry leases; their ids begin with it.
pub(crate) const SERVICE: &str = "quorate-session";
/// The smallest TTL of a lease that stands on a check.
pub(crate) const CHECK_TTL_MIN: Duration = Duration::from_secs(1);
/// Consul's default `session_ttl_min`.
const SESSION_TTL_MIN: Duration = Duration::from_secs(10);
/// The longest TTL of a session.
pub(crate) const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The least that Consul accepts.
pub(crate) const REMOVE_CRITICAL_AFTER: &str = "1m";
/// How many instances are passed at once.
const AT_ONCE: usize = 8;
/// How many leases are remembered before those that nobody renews any more are forgotten.
const REMEMBERED: usize = 256;

/// The leases of one client.
#[derive(Debug)]
pub(crate) struct Leases {
    api: Arc<Api>,
    kind: SessionKind,
    // In milliseconds; raised or lowered to what the servers say when they refuse a TTL.
    session_ttl_min: AtomicU64,
    homes: Mutex<HashMap<LeaseId, Home>>,
}

/// What is behind a lease.
#[derive(Debug, Clone)]
struct Home {
    /// The agent that has the check; every renewal goes there.
    agent: usize,
    service: Option<Arc<str>>,
    /// Instances of services that live as long as the lease, by their ids on the agent; see `catalog`.
    records: Vec<Arc<str>>,
    ttl: Duration,
    /// When the last renewal that was confirmed had been sent.
    confirmed: Instant,
}

impl Home {
    /// Takes everything off the agent that stands for the lease: its own service, and the instances that are still its.
    async fn deregister(&self, api: &Api, lease: &LeaseId) -> Result<()> {
        let own = async {
            match &self.service {
                Some(service) => deregister(api, service, self.agent).await,
                None => Ok(()),
            }
        };
        let records = self.records.iter().map(|id| crate::catalog::remove(api, self.agent, id, lease));
        let (own, records) = tokio::join!(own, futures_util::future::join_all(records));
        records.into_iter().fold(own, Result::and)
    }
}

#[derive(Deserialize)]
struct Created {
    #[serde(rename = "ID")]
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SessionInfo {
    #[serde(default)]
    name: String,
    service_checks: Option<Vec<ServiceCheck>>,
}

#[derive(Deserialize)]
struct ServiceCheck {
    #[serde(rename = "ID")]
    id: String,
}

impl Leases {
    pub(crate) fn new(api: Arc<Api>, kind: SessionKind, session_ttl_min: Duration) -> Self {
        let session_ttl_min = AtomicU64::new(millis(session_ttl_min));
        Self { api, kind, session_ttl_min, homes: Mutex::default() }
    }

    fn homes(&self) -> MutexGuard<'_, HashMap<LeaseId, Home>> {
        self.homes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) async fn grant(&self, ttl: Duration) -> Result<Lease> {
        let sent = Instant::now();
        let agent = self.api.http.agent();
        let (id, ttl, service) = match self.kind {
            SessionKind::Agent => {
                let ttl = ttl.clamp(CHECK_TTL_MIN, TTL_MAX);
                let mut service = Registered::new(self.api.clone(), agent);
                service.register(ttl).await?;
                // A check that was never passed turns critical when the agent restarts, whatever it was registered as.
                let (created, passed) =
                    tokio::join!(self.create(agent, ttl, Some(&service.id)), self.pass("grant", &service.id, agent));
                let (id, _) = created?;
                // Whatever became of it: without its service the session is no lease.
                let unsure =
                    |e: Error| if e.kind() == ErrorKind::Ambiguous { e.with_kind(ErrorKind::Unavailable) } else { e };
                if !passed.map_err(unsure)? {
                    return Err(error(ErrorKind::Unavailable, "grant", "the agent forgot the check it had just taken"));
                }
                (id, ttl, Some(service.keep()))
            }
            SessionKind::Ttl => {
                let (id, ttl) = self.create(agent, ttl.min(TTL_MAX), None).await?;
                (id, ttl, None)
            }
        };
        let id = LeaseId::new(id);
        let mut homes = self.homes();
        if homes.len() >= REMEMBERED {
            homes.retain(|_, home| home.confirmed.elapsed() < home.ttl * 2);
        }
        homes.insert(id.clone(), Home { agent, service, records: Vec::new(), ttl, confirmed: sent });
        Ok(Lease { id, ttl })
    }

    /// Creates the session; returns its id and its own TTL.
    async fn create(&self, agent: usize, ttl: Duration, service: Option<&str>) -> Result<(String, Duration)> {
        const OP: &str = "grant";
        let give_up = Instant::now() + self.api.http.settings().request_timeout;
        let mut pause = Duration::from_millis(2);
        loop {
            let min = Duration::from_millis(self.session_ttl_min.load(Ordering::Relaxed));
            let own = ttl.max(min);
            let checks: Vec<_> = service.iter().map(|id| json!({ "ID": format!("service:{id}") })).collect();
            let body = json!({
                // The asked TTL is in the name for operators, and for a client that takes a lease over.
                "Name": format!("quorate {}ms", if service.is_some() { millis(ttl) } else { millis(own) }),
                "TTL": format!("{}ms", millis(own)),
                "Behavior": "delete",
                "LockDelay": "0s",
                "NodeChecks": [],
                "ServiceChecks": checks,
            });
            let answer = self.api.put("/v1/session/create", body.to_string().into_bytes(), Some(agent)).await;
            let answer = answer.map_err(|f| f.into_error(OP, Effect::Write))?;
            if answer.status == StatusCode::OK {
                let created: Created = serde_json::from_slice(&answer.body)
                    .map_err(|e| error(ErrorKind::Backend, OP, "the answer names no session").because(e))?;
                return Ok((created.id, own));
            }
            let text = excerpt(&answer.body);
            if let Some(allowed) = allowed_min(&text)
                && allowed != min
            {
                self.session_ttl_min.store(millis(allowed), Ordering::Relaxed);
                continue;
            }
            // The agent tells the servers of the new check in the background.
            if !(text.contains("Missing check") || text.contains("critical state")) {
                return Err(refused(OP, Effect::Write, answer.status, &answer.body));
            }
            if Instant::now() + pause >= give_up {
                let message = format!("the agent's new check did not reach the servers in time: {text}");
                return Err(error(ErrorKind::Unavailable, OP, message));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    pub(crate) async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        const OP: &str = "renew";
        if !is_session_id(lease.as_str()) {
            return Err(session_lost(OP, lease));
        }
        let Some(home) = self.homes().get(lease).cloned() else { return self.take_over(lease).await };
        let sent = Instant::now();
        let renewal = self.renew_session(lease, &home);
        let stands = match &home.service {
            Some(service) => {
                let (renewed, passed) = tokio::join!(renewal, self.pass(OP, service, home.agent));
                // Either "no" is final, whatever happened to the other request.
                match (renewed, passed) {
                    (Ok(None), _) | (_, Ok(false)) => false,
                    (Err(e), _) | (_, Err(e)) => return Err(e.key(lease)),
                    // Answered after the TTL: the check may have turned critical before it was passed, and the
                    // servers may end the session in the next moment.
                    (Ok(Some(_)), Ok(true)) => home.confirmed.elapsed() < home.ttl,
                }
            }
            None => renewal.await.map_err(|e| e.key(lease))?.is_some(),
        };
        if !stands {
            self.homes().remove(lease);
            self.end_in_background(lease, &home);
            return Err(session_lost(OP, lease));
        }
        if let Some(home) = self.homes().get_mut(lease) {
            home.confirmed = home.confirmed.max(sent);
        }
        self.pass_records(lease, home.agent, &home.records);
        Ok(home.ttl)
    }

    /// Renews a lease that another client was granted.
    async fn take_over(&self, lease: &LeaseId) -> Result<Duration> {
        const OP: &str = "renew";
        let sent = Instant::now();
        let agent = self.api.http.agent();
        let here = Home { agent, service: None, records: Vec::new(), ttl: Duration::ZERO, confirmed: sent };
        let Some(info) = self.renew_session(lease, &here).await.map_err(|e| e.key(lease))? else {
            return Err(session_lost(OP, lease));
        };
        let ttl = info.name.strip_prefix("quorate ").and_then(|t| t.strip_suffix("ms")).and_then(|t| t.parse().ok());
        let Some(ttl) = ttl.map(Duration::from_millis) else {
            return Err(error(ErrorKind::Unsupported, OP, "the session was not granted by quorate").key(lease));
        };
        let check = info.service_checks.unwrap_or_default().into_iter().next();
        let service: Option<Arc<str>> = check.and_then(|c| c.id.strip_prefix("service:").map(Into::into));
        let agent = match &service {
            None => here.agent,
            Some(service) => self.find_check(lease, service).await?,
        };
        let home = Home { agent, service, records: Vec::new(), ttl, confirmed: sent };
        self.homes().insert(lease.clone(), home);
        Ok(ttl)
    }

    /// Passes a check on whichever of the agents has it; returns that agent.
    async fn find_check(&self, lease: &LeaseId, service: &str) -> Result<usize> {
        let mut unreachable = None;
        for agent in 0..self.api.http.settings().agents.len() {
            match self.pass("renew", service, agent).await {
                Ok(true) => return Ok(agent),
                Ok(false) => {}
                Err(e) => unreachable = Some(e.key(lease)),
            }
        }
        Err(unreachable.unwrap_or_else(|| {
            let message = "the session stands on a check of an agent that is not among the endpoints";
            error(ErrorKind::Unsupported, "renew", message).key(lease)
        }))
    }

    /// `None` if there is no such session.
    async fn renew_session(&self, lease: &LeaseId, home: &Home) -> Result<Option<SessionInfo>> {
        const OP: &str = "renew";
        let agent = home.service.is_some().then_some(home.agent);
        let answer = self.api.put(format!("/v1/session/renew/{lease}"), Vec::new(), agent).await;
        let answer = answer.map_err(|f| f.into_error(OP, Effect::Write))?;
        match answer.status {
            StatusCode::OK => {
                let found: Vec<SessionInfo> = serde_json::from_slice(&answer.body)
                    .map_err(|e| error(ErrorKind::Backend, OP, "the answer describes no session").because(e))?;
                Ok(found.into_iter().next())
            }
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(refused(OP, Effect::Write, status, &answer.body)),
        }
    }

    /// Where a lease of this client lives, and its TTL; `None` if it has ended as far as this client knows.
    pub(crate) fn home(&self, lease: &LeaseId) -> Option<(usize, Duration)> {
        let homes = self.homes();
        homes.get(lease).filter(|home| home.confirmed.elapsed() < home.ttl).map(|home| (home.agent, home.ttl))
    }

    /// Ties an instance to a lease: it is kept passing, and ends, with it. `false` if the lease has ended.
    pub(crate) fn attach(&self, lease: &LeaseId, record: &Arc<str>) -> bool {
        let mut homes = self.homes();
        let Some(home) = homes.get_mut(lease) else { return false };
        if !home.records.contains(record) {
            home.records.push(record.clone());
        }
        true
    }

    pub(crate) fn detach(&self, lease: &LeaseId, record: &str) {
        if let Some(home) = self.homes().get_mut(lease) {
            home.records.retain(|other| &**other != record);
        }
    }

    /// Keeps the lease's instances alive. Apart from the renewal itself: what locks stand on does not wait for them. One
    /// whose check is gone was replaced or removed, and is for its owner to look after.
    fn pass_records(&self, lease: &LeaseId, agent: usize, records: &[Arc<str>]) {
        if records.is_empty() {
            return;
        }
        let checks: Vec<String> = records.iter().map(|id| crate::catalog::check_id(lease, id)).collect();
        let api = self.api.clone();
        in_background(api.http.settings().request_timeout, async move {
            let passes = futures_util::stream::iter(checks).map(async |check| {
                if let Err(error) = pass(&api, "renew", &check, agent).await {
                    tracing::debug!(%check, %error, "an instance was not renewed");
                }
            });
            passes.buffer_unordered(AT_ONCE).collect::<()>().await;
        });
    }

    /// `false` if the agent has no such check.
    async fn pass(&self, operation: &'static str, service: &str, agent: usize) -> Result<bool> {
        pass(&self.api, operation, &format!("service:{service}"), agent).await
    }

    pub(crate) async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        const OP: &str = "revoke";
        if !is_session_id(lease.as_str()) {
            return Ok(());
        }
        // Of a lease that another client was granted, the check is left to its owner, who learns of the end with
        // the next renewal, and to the agent, which removes it after a minute. Taken out first: an instance that is
        // published meanwhile finds no lease, and takes itself back.
        let home = self.homes().remove(lease);
        let removed = async {
            match &home {
                Some(home) => home.deregister(&self.api, lease).await,
                None => Ok(()),
            }
        };
        let (destroyed, removed) = tokio::join!(destroy(&self.api, lease), removed);
        let destroyed = destroyed.map_err(|f| f.into_error(OP, Effect::Write).key(lease));
        let outcome = destroyed.and_then(|answer| match answer.status {
            StatusCode::OK => Ok(()),
            status => Err(refused(OP, Effect::Write, status, &answer.body).key(lease)),
        });
        if let Err(error) = removed {
            tracing::debug!(%lease, %error, "the agent removes what is left of the lease by itself later");
            // Instances would be found until then, so the caller may try again.
            if let Some(home) = home.filter(|home| !home.records.is_empty()) {
                self.homes().entry(lease.clone()).or_insert(home);
                return outcome.and(Err(error.key(lease)));
            }
        }
        outcome
    }

    fn end_in_background(&self, lease: &LeaseId, home: &Home) {
        let (api, lease, home) = (self.api.clone(), lease.clone(), home.clone());
        in_background(api.http.settings().request_timeout, async move {
            tokio::join!(destroy(&api, &lease), home.deregister(&api, &lease)).0.ok();
        });
    }
}

/// The smallest TTL of a session that the servers accept: they name it when they refuse a smaller one.
pub(crate) async fn session_ttl_min(api: &Api, agent: usize) -> Result<Duration> {
    let body = json!({ "TTL": "1ns", "Behavior": "delete", "NodeChecks": [] }).to_string().into_bytes();
    let answer = api.put("/v1/session/create", body, Some(agent)).await;
    let answer = answer.map_err(|f| f.into_error("connect", Effect::Read))?;
    // A client without the right to sessions never sees the limit, nor does it meet it.
    Ok(allowed_min(&excerpt(&answer.body)).unwrap_or(SESSION_TTL_MIN))
}

/// Registers a service with a TTL check and removes it, to learn whether the agent allows it.
pub(crate) async fn probe(api: &Arc<Api>, agent: usize) -> Result<()> {
    let mut service = Registered::new(api.clone(), agent);
    service.register(SESSION_TTL_MIN).await?;
    let id = service.keep();
    deregister(api, &id, agent).await
}

/// A service that is removed again unless it is kept: a grant may fail or be dropped half-way. The session that
/// may exist by then ends with the check.
struct Registered {
    api: Arc<Api>,
    agent: usize,
    id: Arc<str>,
    kept: bool,
}

impl Registered {
    fn new(api: Arc<Api>, agent: usize) -> Self {
        // Nothing to remove before something was sent.
        Self { api, agent, id: format!("{SERVICE}-{:032x}", rand::random::<u128>()).into(), kept: true }
    }

    async fn register(&mut self, ttl: Duration) -> Result<()> {
        let body = json!({
            "Name": SERVICE,
            "ID": &*self.id,
            "Check": {
                "Name": "the owner of the session is alive",
                "TTL": format!("{}ms", millis(ttl)),
                "Status": "passing",
                "DeregisterCriticalServiceAfter": REMOVE_CRITICAL_AFTER,
            },
        });
        self.kept = false;
        let body = body.to_string().into_bytes();
        let answer = self.api.put("/v1/agent/service/register", body, Some(self.agent)).await;
        // Without a session there is no lease: whatever was lost here may be tried again.
        let answer = answer.map_err(|f| f.into_error("grant", Effect::Read))?;
        match answer.status {
            StatusCode::OK => Ok(()),
            status => Err(refused("grant", Effect::Read, status, &answer.body)),
        }
    }

    fn keep(mut self) -> Arc<str> {
        self.kept = true;
        self.id.clone()
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let (api, id, agent) = (self.api.clone(), self.id.clone(), self.agent);
        in_background(api.http.settings().request_timeout, async move {
            deregister(&api, &id, agent).await.ok();
        });
    }
}

/// Runs a last courtesy to the servers, which manage without it. Bounded, so that it does not outlive the client
/// by more than one request.
fn in_background(limit: Duration, work: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(timeout(limit, work));
    }
}

/// Passes a TTL check; `false` if the agent has no such check.
async fn pass(api: &Api, operation: &'static str, check: &str, agent: usize) -> Result<bool> {
    let answer = api.put(format!("/v1/agent/check/pass/{}", url(check)), Vec::new(), Some(agent)).await;
    let answer = answer.map_err(|f| f.into_error(operation, Effect::Write))?;
    let text = excerpt(&answer.body);
    let unknown = text.contains("does not have associated TTL") || text.contains("Unknown check");
    match answer.status {
        StatusCode::OK => Ok(true),
        StatusCode::NOT_FOUND => Ok(false),
        StatusCode::INTERNAL_SERVER_ERROR if unknown => Ok(false),
        status => Err(refused(operation, Effect::Write, status, &answer.body)),
    }
}

async fn destroy(api: &Api, lease: &LeaseId) -> Result<Answer, Failure> {
    api.put(format!("/v1/session/destroy/{lease}"), Vec::new(), None).await
}

/// Removes a service from the agent; `Ok` also if it was not there.
pub(crate) async fn deregister(api: &Api, service: &str, agent: usize) -> Result<()> {
    const OP: &str = "deregister";
    let answer = api.put(format!("/v1/agent/service/deregister/{}", url(service)), Vec::new(), Some(agent)).await;
    let answer = answer.map_err(|f| f.into_error(OP, Effect::Write).key(service))?;
    let text = excerpt(&answer.body);
    match answer.status {
        StatusCode::OK | StatusCode::NOT_FOUND => Ok(()),
        // Older agents say it so.
        StatusCode::INTERNAL_SERVER_ERROR if text.contains("Unknown service") => Ok(()),
        status => Err(refused(OP, Effect::Write, status, &answer.body).key(service)),
    }
}

pub(crate) fn is_invalid_session(what: &str) -> bool {
    what.contains("invalid session")
}

/// Whether Consul could know a session of this name; it answers 500 to others.
pub(crate) fn is_session_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 36
        && bytes
            .iter()
            .enumerate()
            .all(|(i, b)| if matches!(i, 8 | 13 | 18 | 23) { *b == b'-' } else { b.is_ascii_hexdigit() })
}

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The lower bound in `Invalid Session TTL '1000000000', must be between [10s=24h0m0s]`.
fn allowed_min(text: &str) -> Option<Duration> {
    let (_, range) = text.split_once("Invalid Session TTL")?;
    let (_, range) = range.split_once('[')?;
    go_duration(range.split(['=', ']']).next()?)
}

/// A duration as Go prints it: `10s`, `1m30s`, `500ms`, `1h0m0.5s`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 0.001,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        rest = tail;
    }
    (total > Duration::ZERO).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_own_limit_is_read_from_their_refusal() {
        let text = "Invalid Session TTL '1000000000', must be between [1m30.5s=24h0m0s]";
        assert_eq!(allowed_min(text), Some(Duration::from_millis(90_500)));
        assert_eq!(
            allowed_min("Invalid Session TTL '1', must be between [500ms=24h0m0s]"),
            Some(Duration::from_millis(500))
        );
        assert_eq!(allowed_min("Missing check 'service:x' registration"), None);
    }

    #[test]
    fn only_what_could_be_a_session_is_asked_for() {
        assert!(is_session_id("3764062a-9882-1bfd-aa62-187177c18cb0"));
        for bad in ["", "zzz", "3764062a-9882-1bfd-aa62-187177c18cb", "3764062a-9882-1bfd-aa62-187177c18c/0"] {
            assert!(!is_session_id(bad), "{bad}");
        }
    }
}
