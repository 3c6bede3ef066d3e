//! What the status of a call means.
//!
//! Promise: `Unavailable` is said only of what surely was not applied: it was never sent, or the participant itself says so.
//! Every other lost answer is `Ambiguous`. An [`ErrorKind`] of a participant arrives as it was.

use std::{error::Error as StdError, iter::successors};

use quorate_core::{Error, ErrorKind};
use tonic::{Code, ConnectError, Status, metadata::MetadataMap};

/// Names the participant's own kind of error, which codes of gRPC do not tell.
const KIND: &str = "quorate-error-kind";

/// How much of a text from elsewhere is repeated: headers are small, and a percent sign costs three bytes.
const LONGEST: usize = 500;

const KINDS: [ErrorKind; 8] = [
    ErrorKind::InvalidInput,
    ErrorKind::Unsupported,
    ErrorKind::Denied,
    ErrorKind::Unavailable,
    ErrorKind::Ambiguous,
    ErrorKind::SessionLost,
    ErrorKind::Corrupt,
    ErrorKind::Backend,
];

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
    /// The participant surely never saw it: another instance may be asked.
    pub(crate) unseen: bool,
    /// It is unseen because the connection was at its end: the same instance may take it on another.
    pub(crate) stale: bool,
    /// It came as an answer, whatever it says: the instance is there.
    pub(crate) said: bool,
}

impl Failure {
    /// Nothing left this process.
    pub(crate) fn unsent(message: &str) -> Self {
        Self { kind: ErrorKind::Unavailable, message: plain(message), unseen: true, stale: false, said: false }
    }
}

/// The status in which a participant's error travels.
pub(crate) fn of_error(error: &Error) -> Status {
    said(error.kind(), &error.to_string())
}

/// A status with one of our kinds.
pub(crate) fn said(kind: ErrorKind, text: &str) -> Status {
    let code = match kind {
        ErrorKind::InvalidInput => Code::InvalidArgument,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::SessionLost => Code::Aborted,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Backend => Code::FailedPrecondition,
        _ => Code::Unknown,
    };
    let mut metadata = MetadataMap::new();
    metadata.insert(KIND, kind.as_str().parse().expect("lower-case letters are a value"));
    Status::with_metadata(code, plain(text), metadata)
}

/// Judges a status.
pub(crate) fn judge(status: &Status) -> Failure {
    if status.source().is_some() {
        return lost(status);
    }
    let told = status.metadata().get(KIND).and_then(|kind| kind.to_str().ok());
    let told = told.and_then(|told| KINDS.into_iter().find(|kind| kind.as_str() == told));
    let kind = told.unwrap_or_else(|| of_code(status.code()));
    // Said by what stands before the participant: no such service, or another version of it.
    let unseen = told.is_none() && status.code() == Code::Unimplemented;
    Failure { kind, message: format!("the service says: {}", plain(text_of(status))), unseen, stale: false, said: true }
}

fn text_of(status: &Status) -> &str {
    if status.message().is_empty() { status.code().description() } else { status.message() }
}

/// Without the participant's own word.
fn of_code(code: Code) -> ErrorKind {
    match code {
        // Out of range is what a message above the server's limit is.
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidInput,
        Code::Unauthenticated | Code::PermissionDenied => ErrorKind::Denied,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition | Code::ResourceExhausted | Code::DataLoss => {
            ErrorKind::Backend
        }
        // Also `Unavailable`: proxies say it of a request whose answer they have lost.
        _ => ErrorKind::Ambiguous,
    }
}

/// The connection failed: was anything sent?
fn lost(status: &Status) -> Failure {
    let unsent = causes(status).any(|cause| cause.is::<ConnectError>());
    let stale = causes(status).any(|cause| {
        let never_left_its_queue = cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled);
        // By the rules of HTTP/2 (RFC 9113, 8.7) such a request was not processed.
        let refused = cause
            .downcast_ref::<h2::Error>()
            .is_some_and(|e| e.is_reset() && e.is_remote() && e.reason() == Some(h2::Reason::REFUSED_STREAM));
        // So says the server at an orderly end of the last requests that came, and of them only (RFC 9113, 6.8).
        let too_late = cause
            .downcast_ref::<h2::Error>()
            .is_some_and(|e| e.is_go_away() && e.is_remote() && e.reason() == Some(h2::Reason::NO_ERROR));
        never_left_its_queue || refused || too_late
    });
    let unseen = unsent || stale;
    let kind = if unseen { ErrorKind::Unavailable } else { ErrorKind::Ambiguous };
    let mut texts: Vec<String> = Vec::new();
    for cause in causes(status) {
        // `Status` prints its causes in debug form, which is no message.
        let text = cause.downcast_ref::<Status>().map_or_else(|| cause.to_string(), |s| s.message().to_owned());
        if !text.is_empty() && !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
    }
    Failure { kind, message: plain(&texts.join(": ")), unseen, stale, said: false }
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    successors(Some(status as &(dyn StdError + 'static)), |cause: &&(dyn StdError + 'static)| (*cause).source())
}

/// One line, and not a long one: it comes from somebody else.
pub(crate) fn plain(text: &str) -> String {
    text.chars().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_participants_error_arrives_with_its_kind_and_text() {
        for kind in KINDS {
            let error = Error::new(kind, "prepare", "as it is").key("g/1/a");
            let failure = judge(&of_error(&error));
            assert_eq!((failure.kind, failure.unseen), (kind, false), "the participant has seen it");
            assert!(failure.message.contains("as it is"), "{failure:?}");
        }
    }

    #[test]
    fn without_the_participants_word_only_what_surely_was_not_applied_is_not_ambiguous() {
        for code in (0..=16).map(Code::from_i32) {
            let failure = judge(&Status::new(code, "x"));
            assert_ne!(failure.kind, ErrorKind::Unavailable, "{code:?} may be said by a proxy");
            assert_eq!(failure.unseen, code == Code::Unimplemented, "{code:?}");
        }
        let kind = |code| judge(&Status::new(code, "x")).kind;
        assert_eq!(kind(Code::DeadlineExceeded), ErrorKind::Ambiguous);
        assert_eq!(kind(Code::Cancelled), ErrorKind::Ambiguous);
        assert_eq!(kind(Code::Internal), ErrorKind::Ambiguous);
        assert_eq!(kind(Code::Unauthenticated), ErrorKind::Denied);
        assert_eq!(kind(Code::PermissionDenied), ErrorKind::Denied);
        assert_eq!(kind(Code::InvalidArgument), ErrorKind::InvalidInput);
        assert_eq!(kind(Code::Unimplemented), ErrorKind::Unsupported);
    }

    #[test]
    fn without_a_connection_nothing_was_sent_and_with_one_nobody_knows() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let unsent = judge(&Status::from_error(Box::new(ConnectError(refused.into()))));
        assert_eq!((unsent.kind, unsent.unseen), (ErrorKind::Unavailable, true));
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let broken = judge(&Status::from_error(Box::new(broken)));
        assert_eq!((broken.kind, broken.unseen), (ErrorKind::Ambiguous, false));
        let cancelled = judge(&Status::from_error(Box::new(h2::Error::from(h2::Reason::CANCEL))));
        assert_eq!((cancelled.kind, cancelled.unseen), (ErrorKind::Ambiguous, false));
        let late = judge(&Status::from_error(Box::new(tonic::TimeoutExpired(()))));
        assert_eq!((late.kind, late.unseen), (ErrorKind::Ambiguous, false));
    }

    #[test]
    fn a_foreign_text_forges_no_line_and_stays_short() {
        let text = format!("a\nb\u{1b}[0m{}", "x".repeat(10_000));
        let message = judge(&Status::unknown(text)).message;
        assert!(!message.contains(char::is_control) && message.len() < 600, "{message}");
    }
}
