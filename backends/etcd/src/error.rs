//! What etcd's errors mean for the caller, and for the endpoint that gave them.
//!
//! Promise: `Unavailable` is said of a write only if it surely was not applied: no connection was made, the request was
//! taken back before it was written, or the server said that it refused it. Every other lost answer of a write is
//! `Ambiguous`.

use std::{error::Error as StdError, fmt, sync::Arc};

use quorate_core::{Error, ErrorKind};
use tonic::{Code, ConnectError, Status};

use crate::BACKEND;

/// A request: its verb, and whether a lost answer leaves doubt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) verb: &'static str,
    pub(crate) writes: bool,
}

impl Call {
    pub(crate) const fn read(verb: &'static str) -> Self {
        Self { verb, writes: false }
    }

    pub(crate) const fn write(verb: &'static str) -> Self {
        Self { verb, writes: true }
    }

    /// What a lost answer means.
    pub(crate) fn doubt(self) -> ErrorKind {
        if self.writes { ErrorKind::Ambiguous } else { ErrorKind::Unavailable }
    }
}

/// Who is to blame, and so what the next call should do differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The request itself, or nobody: go on as before.
    Nobody,
    /// This member does not serve now: use another one.
    Endpoint,
    /// This connection or its token is of no use any more: make a new one.
    Connection,
}

/// What went wrong. Can be told to many waiters, unlike an [`Error`].
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) kind: ErrorKind,
    /// Whether a server said so: it is there, whatever it said.
    pub(crate) said: bool,
    message: Arc<str>,
    next: Option<&'static str>,
}

impl Fault {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Arc<str>>) -> Self {
        Self { kind, said: false, message: message.into(), next: None }
    }

    pub(crate) fn error(&self, verb: &'static str) -> Error {
        let error = Error::new(self.kind, verb, &*self.message).on(BACKEND);
        match self.next {
            Some(next) => error.next(next),
            None => error,
        }
    }

    /// Names the right that a refusal is about.
    pub(crate) fn with_right(self, said: &str) -> Self {
        match said.contains("permission denied") {
            true => {
                self.next("the user's role needs readwrite on the prefix of the namespace, with the slash at its end")
            }
            false => self,
        }
    }

    fn next(mut self, next: &'static str) -> Self {
        self.next = Some(next);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Fault {}

/// Judges an error of the client library.
pub(crate) fn judge(call: Call, error: &etcd_client::Error) -> (Fault, Blame) {
    use etcd_client::Error as E;
    match error {
        E::GRpcStatus(status) if status.source().is_some() => lost(call, status),
        E::GRpcStatus(status) => said(call, status.code(), status.message()),
        E::LeaseKeepAliveError(text) if text == "lease not found" => (lease_ended(), Blame::Nobody),
        // Raised before a connection is made: by the URI, the TLS material or the token.
        E::InvalidArgs(_) | E::InvalidUri(_) | E::TransportError(_) | E::InvalidMetadataValue(_) => {
            (Fault::new(ErrorKind::InvalidInput, chain(error)), Blame::Nobody)
        }
        // The stream of a keep-alive or a watch has ended.
        _ => (Fault::new(call.doubt(), chain(error)), Blame::Endpoint),
    }
}

pub(crate) fn lease_ended() -> Fault {
    Fault { said: true, ..Fault::new(ErrorKind::SessionLost, "the server no longer knows the lease") }
}

/// The connection failed: was anything sent?
fn lost(call: Call, status: &Status) -> (Fault, Blame) {
    let text = chain(status);
    if refused_certificate(&text) {
        return (Fault::new(ErrorKind::Denied, text).next("check the client's certificate and key"), Blame::Endpoint);
    }
    if causes(status).any(|cause| cause.is::<ConnectError>()) {
        return (Fault::new(ErrorKind::Unavailable, text), Blame::Endpoint);
    }
    // The code `Cancelled` does not tell: a stream that the server has reset may have it, too.
    let never_left_its_queue =
        causes(status).any(|cause| cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled));
    let kind = if never_left_its_queue { ErrorKind::Unavailable } else { call.doubt() };
    (Fault::new(kind, text), Blame::Connection)
}

/// With TLS 1.3 the server refuses a client's certificate only after the handshake, by one of these alerts.
fn refused_certificate(text: &str) -> bool {
    let alert = text.split_once("received fatal alert: ").map_or("", |(_, alert)| alert);
    ["CertificateRequired", "BadCertificate", "UnknownCA", "CertificateUnknown", "CertificateExpired", "AccessDenied"]
        .iter()
        .any(|known| alert.starts_with(known))
}

/// The server answered with an error. Its texts are part of etcd's API: its own clients tell errors by them.
fn said(call: Call, code: Code, text: &str) -> (Fault, Blame) {
    let short = text.strip_prefix("etcdserver: ").unwrap_or(text);
    let is = |known: &[&str]| known.iter().any(|known| short.starts_with(known));
    let fault = |kind| Fault { said: true, ..Fault::new(kind, format!("the server says: {short}")) };
    if short == "requested lease not found" {
        return (lease_ended(), Blame::Nobody);
    }
    // A token that is unknown (a restart) or older than the last change of users: a new one may serve.
    if is(&["invalid auth token", "revision of auth store is old"]) {
        return (fault(ErrorKind::Unavailable), Blame::Connection);
    }
    // The password may be replaced by now: the next call logs in anew.
    if is(&["authentication failed"]) {
        return (fault(ErrorKind::Denied), Blame::Connection);
    }
    if matches!(code, Code::PermissionDenied | Code::Unauthenticated)
        || is(&["user name", "permission denied", "authentication is not enabled"])
    {
        return (fault(ErrorKind::Denied).with_right(text), Blame::Nobody);
    }
    // Said before the request was proposed to the cluster.
    if is(&["no leader", "not capable", "rpc not supported for learner", "raft proposal dropped"])
        || text == "raft proposal dropped"
    {
        return (fault(ErrorKind::Unavailable), Blame::Endpoint);
    }
    if is(&["too many requests"]) {
        return (fault(ErrorKind::Unavailable), Blame::Nobody);
    }
    if is(&["mvcc: database space exceeded"]) {
        let next = "nothing was applied; compact and defragment the server, then disarm its NOSPACE alarm";
        return (fault(ErrorKind::Backend).next(next), Blame::Nobody);
    }
    if is(&["grpc: received message larger than max"]) {
        return (fault(ErrorKind::InvalidInput), Blame::Nobody);
    }
    match code {
        Code::InvalidArgument | Code::OutOfRange => (fault(ErrorKind::InvalidInput), Blame::Nobody),
        Code::Unimplemented => (fault(ErrorKind::Unsupported), Blame::Nobody),
        Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition | Code::ResourceExhausted | Code::DataLoss => {
            (fault(ErrorKind::Backend), Blame::Nobody)
        }
        // "leader changed", "request timed out", "server stopped" and what else may be said half-way.
        _ => (fault(call.doubt()), Blame::Endpoint),
    }
}

fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |cause: &&'a (dyn StdError + 'static)| (*cause).source())
}

/// The texts of an error and its causes, each once: `Status` prints its causes in debug form, which is no message.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    for cause in causes(error) {
        let text = match cause.downcast_ref::<Status>() {
            Some(status) => status.message().to_owned(),
            None => cause.to_string(),
        };
        if !text.is_empty() && !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
    }
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUT: Call = Call::write("commit");
    const GET: Call = Call::read("read");

    fn kinds(code: Code, text: &str) -> (ErrorKind, ErrorKind, Blame) {
        let error = || etcd_client::Error::GRpcStatus(Status::new(code, text));
        let (write, blame) = judge(PUT, &error());
        (write.kind, judge(GET, &error()).0.kind, blame)
    }

    #[test]
    fn an_answer_that_leaves_doubt_is_ambiguous_for_writes_only() {
        use ErrorKind::{Ambiguous, Unavailable};
        for text in [
            "etcdserver: leader changed",
            "etcdserver: request timed out",
            "etcdserver: request timed out, possibly due to previous leader failure",
            "etcdserver: server stopped",
            "something new",
        ] {
            assert_eq!(kinds(Code::Unavailable, text), (Ambiguous, Unavailable, Blame::Endpoint), "{text}");
        }
        assert_eq!(kinds(Code::Unknown, "context canceled").0, Ambiguous);
    }

    #[test]
    fn what_the_server_refused_before_proposing_it_was_surely_not_applied() {
        use ErrorKind::Unavailable;
        assert_eq!(kinds(Code::Unavailable, "etcdserver: no leader"), (Unavailable, Unavailable, Blame::Endpoint));
        assert_eq!(kinds(Code::Unknown, "raft proposal dropped").0, Unavailable);
        let busy = kinds(Code::ResourceExhausted, "etcdserver: too many requests");
        assert_eq!(busy, (Unavailable, Unavailable, Blame::Nobody));
    }

    #[test]
    fn refusals_are_told_apart() {
        let kind = |code, text| kinds(code, text).0;
        assert_eq!(kind(Code::NotFound, "etcdserver: requested lease not found"), ErrorKind::SessionLost);
        assert_eq!(kind(Code::PermissionDenied, "etcdserver: permission denied"), ErrorKind::Denied);
        let login = "etcdserver: authentication failed, invalid user ID or password";
        assert_eq!(kind(Code::InvalidArgument, login), ErrorKind::Denied);
        assert_eq!(kind(Code::InvalidArgument, "etcdserver: user name is empty"), ErrorKind::Denied);
        assert_eq!(kind(Code::InvalidArgument, "etcdserver: request is too large"), ErrorKind::InvalidInput);
        assert_eq!(kind(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"), ErrorKind::Backend);
        let stale = kinds(Code::InvalidArgument, "etcdserver: revision of auth store is old");
        assert_eq!((stale.0, stale.2), (ErrorKind::Unavailable, Blame::Connection));
    }

    #[test]
    fn without_a_connection_nothing_was_sent_and_with_one_nobody_knows() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let unsent = Status::from_error(Box::new(ConnectError(refused.into())));
        let (fault, blame) = judge(PUT, &etcd_client::Error::GRpcStatus(unsent));
        assert_eq!((fault.kind, blame), (ErrorKind::Unavailable, Blame::Endpoint));
        let broken = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert_eq!(judge(PUT, &etcd_client::Error::GRpcStatus(broken)).0.kind, ErrorKind::Ambiguous);
        // A stream that the server resets with CANCEL has the same code as a request that never left.
        let reset = Status::from_error(Box::new(h2::Error::from(h2::Reason::CANCEL)));
        assert_eq!(reset.code(), Code::Cancelled);
        assert_eq!(judge(PUT, &etcd_client::Error::GRpcStatus(reset)).0.kind, ErrorKind::Ambiguous);
    }

    #[test]
    fn a_refused_client_certificate_is_denied() {
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, "received fatal alert: BadCertificate");
        let (fault, _) = judge(GET, &etcd_client::Error::GRpcStatus(Status::from_error(Box::new(io))));
        assert_eq!(fault.kind, ErrorKind::Denied);
    }
}
