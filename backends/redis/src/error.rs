//! What a server's answer, or the lack of one, means to the caller.
//!
//! Promise: `Unavailable` is only said where the server surely did not run the script: these refusals come
//! before a script's first write. Only a missing answer leaves a write in doubt.

use quorate_core::{Error, ErrorKind};
use redis::{ErrorKind as Kind, RedisError};

/// The name that this backend carries in errors and in its profile.
pub(crate) const NAME: &str = "redis";

/// Whether a call changes anything: decides what a lost answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Reads,
    Writes,
}

impl Effect {
    /// What it means that no answer came, for this reason.
    pub(crate) fn unanswered(self, why: &str) -> Failure {
        match self {
            Self::Reads => Failure::new(ErrorKind::Unavailable, format!("no answer: {why}")),
            Self::Writes => {
                Failure::new(ErrorKind::Ambiguous, format!("no answer to the request that was sent: {why}"))
            }
        }
    }
}

/// What a failed call tells about the connection it was made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The server answered, and it is the right one.
    Keep,
    /// The connection is dead, or leads to a server that is not (or no longer) the one to talk to.
    Leave,
}

/// Refusals that say "not by me" or "not now": code, and whether another server should be looked for.
const NOT_NOW: &[(&str, Verdict)] = &[
    ("LOADING", Verdict::Keep),
    ("BUSY", Verdict::Keep),
    ("TRYAGAIN", Verdict::Keep),
    ("ASK", Verdict::Keep),
    ("MISCONF", Verdict::Keep),
    ("MOVED", Verdict::Leave),
    ("CLUSTERDOWN", Verdict::Leave),
    ("MASTERDOWN", Verdict::Leave),
    ("READONLY", Verdict::Leave),
    // A primary that was cut off from its replicas; there may be a new one.
    ("NOREPLICAS", Verdict::Leave),
    ("UNKILLABLE", Verdict::Keep),
];

const NO_ACCESS: &[&str] = &["NOAUTH", "WRONGPASS", "NOPERM"];

const NO_ACCESS_IN_SCRIPT: &[&str] = &["The user executing the script can't", "ACL failure in script"];

/// An error without the call it belongs to: kind and text, so that one failed connection attempt can be
/// reported to everybody who waited for it.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) kind: ErrorKind,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// Of two endpoints' failures, the one that the caller can do something about, or both.
    pub(crate) fn or_more_telling(self, other: Self) -> Self {
        let rank = |f: &Self| match f.kind {
            ErrorKind::Denied => 3,
            ErrorKind::Unavailable => 1,
            _ => 2,
        };
        let (mut told, other) = if rank(&other) > rank(&self) { (other, self) } else { (self, other) };
        if rank(&told) == rank(&other) {
            told.text = format!("{}; {}", told.text, other.text);
        }
        told
    }

    pub(crate) fn error(&self, operation: &'static str) -> Error {
        Error::new(self.kind, operation, self.text.clone()).on(NAME)
    }
}

/// Classifies the failure of a call whose request may have left.
pub(crate) fn classify(error: &RedisError, effect: Effect) -> (Failure, Verdict) {
    let text = describe(error);
    match error.kind() {
        Kind::AuthenticationFailed => (Failure::new(ErrorKind::Denied, text), Verdict::Leave),
        Kind::Io => (effect.unanswered(&text), Verdict::Leave),
        Kind::Parse => {
            let kind = if effect == Effect::Reads { ErrorKind::Unavailable } else { ErrorKind::Ambiguous };
            (Failure::new(kind, format!("the answer is not in Redis's protocol: {text}")), Verdict::Leave)
        }
        Kind::RESP3NotSupported => {
            let text = format!("the server is older than Redis 6: {text}");
            (Failure::new(ErrorKind::Unsupported, text), Verdict::Leave)
        }
        _ => refusal(error, text),
    }
}

/// Classifies the failure of an attempt to connect: nothing was sent that changes anything.
pub(crate) fn classify_connect(error: &RedisError) -> Failure {
    let (failure, _) = classify(error, Effect::Reads);
    match failure.kind {
        // TLS handshakes and name look-ups end up here as well: the server could not be reached.
        ErrorKind::Backend if error.code().is_none() => Failure { kind: ErrorKind::Unavailable, ..failure },
        _ => failure,
    }
}

/// An answer that our own scripts never give.
pub(crate) fn unexpected(operation: &'static str, error: &RedisError) -> Error {
    Error::new(ErrorKind::Corrupt, operation, error.to_string()).on(NAME)
}

fn refusal(error: &RedisError, text: String) -> (Failure, Verdict) {
    let detail = error.detail().unwrap_or_default();
    let outer = error.code().unwrap_or_default();
    // Before version 7 the server wraps what stopped a script: "ERR Error running script … -OOM command …", or
    // "@user_script: 1: -OOM command …".
    let wrapped = outer == "ERR" || outer.starts_with("@user_script");
    let said = |code: &str| outer == code || (wrapped && contains_code(detail, code));
    // Within a script, servers of different age put a missing permission into different words.
    let denied = |words: &&str| wrapped && detail.contains(words);
    if NO_ACCESS.iter().any(|code| said(code)) || NO_ACCESS_IN_SCRIPT.iter().any(denied) {
        return (Failure::new(ErrorKind::Denied, text), Verdict::Keep);
    }
    if let Some((_, verdict)) = NOT_NOW.iter().find(|(code, _)| said(code)) {
        return (Failure::new(ErrorKind::Unavailable, format!("the server refused: {text}")), *verdict);
    }
    if said("WRONGTYPE") {
        return (Failure::new(ErrorKind::Corrupt, text), Verdict::Keep);
    }
    if said("OOM") {
        let text = format!("the server's memory is full, nothing was applied: {text}");
        return (Failure::new(ErrorKind::Backend, text), Verdict::Keep);
    }
    (Failure::new(ErrorKind::Backend, text), Verdict::Keep)
}

fn contains_code(detail: &str, code: &str) -> bool {
    detail.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == code)
}

fn describe(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        (Some(code), None) => code.to_owned(),
        (None, _) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(reply: &str) -> RedisError {
        redis::parse_redis_value(reply.as_bytes()).unwrap().extract_error().unwrap_err()
    }

    fn kind(reply: &str) -> (ErrorKind, Verdict) {
        let (failure, verdict) = classify(&server(reply), Effect::Writes);
        (failure.kind, verdict)
    }

    #[test]
    fn a_refusal_is_never_ambiguous() {
        for (reply, expected) in [
            ("-NOAUTH Authentication required.\r\n", (ErrorKind::Denied, Verdict::Keep)),
            ("-WRONGPASS invalid username-password pair\r\n", (ErrorKind::Denied, Verdict::Keep)),
            ("-NOPERM User x has no permissions\r\n", (ErrorKind::Denied, Verdict::Keep)),
            ("-ERR ACL failure in script: User app has no permissions\r\n", (ErrorKind::Denied, Verdict::Keep)),
            ("-LOADING Redis is loading the dataset in memory\r\n", (ErrorKind::Unavailable, Verdict::Keep)),
            ("-READONLY You can't write against a read only replica.\r\n", (ErrorKind::Unavailable, Verdict::Leave)),
            ("-MOVED 3999 127.0.0.1:6381\r\n", (ErrorKind::Unavailable, Verdict::Leave)),
            ("-CLUSTERDOWN The cluster is down\r\n", (ErrorKind::Unavailable, Verdict::Leave)),
            ("-NOREPLICAS Not enough good replicas to write.\r\n", (ErrorKind::Unavailable, Verdict::Leave)),
            ("-OOM command not allowed when used memory > 'maxmemory'.\r\n", (ErrorKind::Backend, Verdict::Keep)),
            ("-WRONGTYPE Operation against a key\r\n", (ErrorKind::Corrupt, Verdict::Keep)),
            (
                "-@user_script: 1: -READONLY You can't write against a read only replica.\r\n",
                (ErrorKind::Unavailable, Verdict::Leave),
            ),
            (
                "-ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write\r\n",
                (ErrorKind::Unavailable, Verdict::Leave),
            ),
        ] {
            assert_eq!(kind(reply), expected, "{reply}");
        }
    }

    #[test]
    fn a_lost_answer_leaves_a_write_in_doubt_and_a_read_repeatable() {
        let lost = RedisError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert_eq!(classify(&lost, Effect::Writes).0.kind, ErrorKind::Ambiguous);
        assert_eq!(classify(&lost, Effect::Reads).0.kind, ErrorKind::Unavailable);
        let late = RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
        assert_eq!(classify(&late, Effect::Writes).0.kind, ErrorKind::Ambiguous);
    }
}
