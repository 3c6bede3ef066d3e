//! Connecting: proving that an agent is there, knows us, and has a leader behind it.
//!
//! Promise: bounded by `connect_timeout` over all endpoints together; what kind of lease there will be is settled
//! here, because the profile says so.

use std::{sync::Arc, time::Duration};

use hyper::StatusCode;
use quorate_core::{Config, ErrorKind, Result};
use tokio::time::{Instant, timeout};

use crate::{
    api::Api,
    config::SessionKind,
    error::{Effect, error, excerpt, refused},
    http::Http,
    lease::{probe, session_ttl_min},
};

const OP: &str = "connect";

/// What leases there will be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sessions {
    pub(crate) kind: SessionKind,
    /// The smallest TTL of a plain session.
    pub(crate) ttl_min: Duration,
}

/// An API client of which one agent has answered, and the leases it will give.
pub(crate) async fn open(config: &Config) -> Result<(Arc<Api>, Sessions)> {
    let api = Arc::new(Api::new(Http::new(config)?));
    let settings = api.http.settings();
    let deadline = Instant::now() + settings.connect_timeout;
    let count = u32::try_from(settings.agents.len()).unwrap_or(u32::MAX);
    let mut last = None;
    for _ in 0..count {
        let agent = api.http.agent();
        // A share each, so that one agent that swallows everything leaves time for the others.
        let limit = (settings.connect_timeout / count).min(deadline.saturating_duration_since(Instant::now()));
        match timeout(limit, prove(&api, agent)).await {
            Ok(Ok(sessions)) => return Ok((api, sessions)),
            Ok(Err(error)) if error.kind() == ErrorKind::Unavailable => last = Some(error),
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                api.http.leave(agent);
                last = Some(error(ErrorKind::Unavailable, OP, format!("no answer within {limit:?}")));
            }
        }
    }
    let endpoints: Vec<&str> = (0..settings.agents.len()).map(|i| api.http.label(i)).collect();
    let last = last.unwrap_or_else(|| error(ErrorKind::Unavailable, OP, "there was no time to try"));
    Err(last.key(endpoints.join(", ")))
}

async fn prove(api: &Arc<Api>, agent: usize) -> Result<Sessions> {
    let settings = api.http.settings();
    let access = access(api, agent).await?;
    let answer = api.fetch("/v1/status/leader", Some(agent)).await.map_err(|f| f.into_error(OP, Effect::Read))?;
    if answer.status != StatusCode::OK {
        return Err(refused(OP, Effect::Read, answer.status, &answer.body));
    }
    if answer.body.iter().filter(|b| !matches!(**b, b'"' | b'\n')).count() == 0 {
        api.http.leave(agent);
        return Err(error(ErrorKind::Unavailable, OP, format!("{} knows no leader", api.http.label(agent))));
    }
    api.is_ruled(access == Access::Ruled);
    let kind = match settings.session {
        Some(SessionKind::Ttl) => SessionKind::Ttl,
        wanted => match registers(api, agent, access).await {
            Ok(()) => SessionKind::Agent,
            Err(e) if e.kind() == ErrorKind::Denied && wanted.is_none() => {
                tracing::info!(error = %e, "the agent takes no services from us: leases are sessions with a TTL");
                SessionKind::Ttl
            }
            Err(e) => return Err(e),
        },
    };
    Ok(Sessions { kind, ttl_min: session_ttl_min(api, agent).await? })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// There are no access rules.
    Open,
    /// There are, or it cannot be told.
    Ruled,
}

/// Asks the agent who we are.
async fn access(api: &Api, agent: usize) -> Result<Access> {
    let answer = api.fetch("/v1/acl/token/self", Some(agent)).await.map_err(|f| f.into_error(OP, Effect::Read))?;
    let text = excerpt(&answer.body);
    match answer.status {
        StatusCode::UNAUTHORIZED if text.contains("ACL support disabled") => Ok(Access::Open),
        // Without a token there is nobody to know; an endpoint that is blocked tells nothing.
        StatusCode::FORBIDDEN if api.http.settings().has_token() && text.contains("ACL not found") => {
            Err(error(ErrorKind::Denied, OP, "Consul does not know this token"))
        }
        StatusCode::OK | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => Ok(Access::Ruled),
        status => Err(refused(OP, Effect::Read, status, &answer.body)),
    }
}

/// Whether we may register services. Where nothing can forbid it but a blocked path, removing a service that
/// does not exist tells as much and leaves no trace.
async fn registers(api: &Arc<Api>, agent: usize, access: Access) -> Result<()> {
    if access == Access::Ruled {
        return probe(api, agent).await;
    }
    let path = "/v1/agent/service/deregister/quorate-session-none";
    let answer = api.put(path, Vec::new(), Some(agent)).await.map_err(|f| f.into_error(OP, Effect::Read))?;
    match answer.status {
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => Err(refused(OP, Effect::Read, answer.status, &answer.body)),
        _ => Ok(()),
    }
}
