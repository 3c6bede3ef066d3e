//! From what came back, or did not, to the kinds of error that the waist promises.
//!
//! Promise: `Unavailable` only where the request surely was not carried out. A write whose bytes may have left
//! without an answer is `Ambiguous`, and so is one that the servers gave up in the middle of.

use hyper::StatusCode;
use quorate_core::{Error, ErrorKind};

/// The name in messages and in the profile.
pub(crate) const NAME: &str = "consul";

/// How much of a server's message is repeated in an error.
const MESSAGE_LIMIT: usize = 200;

/// What a request does, and so what a lost answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It changes nothing.
    Read,
    /// It changes something.
    Write,
}

/// A request without an answer.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Whether any of its bytes may have reached the server.
    pub(crate) sent: bool,
    /// What happened; free of secrets.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn into_error(self, operation: &'static str, effect: Effect) -> Error {
        let kind = if self.sent && effect == Effect::Write { ErrorKind::Ambiguous } else { ErrorKind::Unavailable };
        Error::new(kind, operation, self.message).on(NAME)
    }
}

pub(crate) fn error(kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Error {
    let error = Error::new(kind, operation, message).on(NAME);
    match (kind, right(operation)) {
        (ErrorKind::Denied, Some(right)) => error.next(right),
        _ => error,
    }
}

/// The rule that a token without it lacks: Consul says no more than "Permission denied".
fn right(operation: &str) -> Option<&'static str> {
    match operation {
        "connect" => None,
        "grant" | "renew" | "revoke" => Some(
            "the token needs session_prefix \"\" write, and for leases of kind agent service_prefix \"quorate-session\" write",
        ),
        "register" | "deregister" | "look up" => Some("the token needs service_prefix write for that service"),
        "watch" => {
            Some("the token needs key_prefix write for the namespace; to follow a service, service and node read")
        }
        _ => Some("the token needs key_prefix write for the namespace"),
    }
}

pub(crate) fn session_lost(operation: &'static str, lease: impl std::fmt::Display) -> Error {
    error(ErrorKind::SessionLost, operation, "Consul has no such session (any more)").key(lease)
}

/// Texts of 5xx answers after which nothing was or will be applied.
const NOT_APPLIED: &[&str] = &[
    "No cluster leader",
    "No known Consul servers",
    "No path to datacenter",
    "node is not the leader",
    "timed out enqueuing operation",
    "leadership transfer in progress",
    "Not ready to serve consistent reads",
    "failed to get conn",
    "rpc error getting client",
    "rate limit",
    "connection refused",
];

/// The error for an answer that is not a success and that the caller has no meaning for.
pub(crate) fn refused(operation: &'static str, effect: Effect, status: StatusCode, body: &[u8]) -> Error {
    let text = excerpt(body);
    let kind = kind_of(effect, status, &text);
    error(kind, operation, format!("the agent answered {}: {text}", status.as_u16()))
}

/// Whether this answer says that the agent cannot serve now, while another one may.
pub(crate) fn is_agent_trouble(status: StatusCode, body: &[u8]) -> bool {
    match status {
        StatusCode::TOO_MANY_REQUESTS => true,
        // Consul answers 500 to much that is no trouble of the agent, such as a TTL that is too small.
        StatusCode::INTERNAL_SERVER_ERROR => {
            let text = excerpt(body);
            let infrastructure = ["rpc error", "leadership", "raft"];
            NOT_APPLIED.iter().chain(&infrastructure).any(|known| text.contains(known))
        }
        s => s.is_server_error(),
    }
}

pub(crate) fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let mut short: String =
        text.trim().chars().take(MESSAGE_LIMIT).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if short.is_empty() {
        short.push_str("no message");
    }
    short
}

fn kind_of(effect: Effect, status: StatusCode, text: &str) -> ErrorKind {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::Denied,
        StatusCode::PAYLOAD_TOO_LARGE => ErrorKind::InvalidInput,
        StatusCode::TOO_MANY_REQUESTS => ErrorKind::Unavailable,
        s if s.is_server_error() => {
            if text.contains("Permission denied") || text.contains("ACL not found") {
                ErrorKind::Denied
            } else if effect == Effect::Read || NOT_APPLIED.iter().any(|known| text.contains(known)) {
                ErrorKind::Unavailable
            } else {
                ErrorKind::Ambiguous
            }
        }
        _ => ErrorKind::Backend,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_the_servers_gave_up_on_is_ambiguous_and_one_they_refused_is_not() {
        let kind =
            |effect, text: &str| refused("commit", effect, StatusCode::INTERNAL_SERVER_ERROR, text.as_bytes()).kind();
        assert_eq!(kind(Effect::Write, "leadership lost while committing log"), ErrorKind::Ambiguous);
        assert_eq!(kind(Effect::Write, "rpc error making call: EOF"), ErrorKind::Ambiguous);
        assert_eq!(kind(Effect::Write, "No cluster leader"), ErrorKind::Unavailable);
        assert_eq!(kind(Effect::Read, "rpc error making call: EOF"), ErrorKind::Unavailable);
        assert_eq!(kind(Effect::Write, "rpc error making call: Permission denied"), ErrorKind::Denied);
    }

    #[test]
    fn an_answer_cannot_flood_or_forge_a_log() {
        let shown = excerpt("x\n".repeat(10_000).as_bytes());
        assert!(shown.chars().count() <= MESSAGE_LIMIT && !shown.contains('\n'));
    }
}
