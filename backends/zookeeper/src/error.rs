//! What the server's refusals mean to the caller.
//!
//! Promise: `Unavailable` is said of a write only if it was surely not applied; a write whose reply was lost is
//! `Ambiguous`, whichever way the reply was lost.

use std::fmt;

use quorate_core::{Error, ErrorKind};
use zookeeper_client as zk;

/// The backend's name in messages.
pub(crate) const NAME: &str = "zookeeper";

/// A call, as errors name it.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) verb: &'static str,
    pub(crate) subject: &'a (dyn fmt::Display + Sync),
    /// Whether a lost reply leaves it open what happened.
    pub(crate) writes: bool,
    /// Whether the connection is a lease's, so that the end of its session is the end of the lease.
    pub(crate) leased: bool,
}

impl<'a> Call<'a> {
    pub(crate) fn read(verb: &'static str, subject: &'a (dyn fmt::Display + Sync)) -> Self {
        Self { verb, subject, writes: false, leased: false }
    }

    pub(crate) fn write(verb: &'static str, subject: &'a (dyn fmt::Display + Sync)) -> Self {
        Self { verb, subject, writes: true, leased: false }
    }

    pub(crate) fn leased(self, leased: bool) -> Self {
        Self { leased, ..self }
    }

    pub(crate) fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, self.verb, message).key(self.subject).on(NAME)
    }

    pub(crate) fn session_lost(&self) -> Error {
        self.error(ErrorKind::SessionLost, "the session has ended, or was not opened by this client")
    }

    /// The error for what the client library reported.
    pub(crate) fn failed(&self, cause: zk::Error) -> Error {
        let (kind, message) = self.meaning(&cause);
        let error = self.error(kind, message).because(cause);
        if kind == ErrorKind::Denied {
            return error
                .next("the user needs all permissions on the namespace's node, or may create it in its parent");
        }
        error
    }

    fn meaning(&self, cause: &zk::Error) -> (ErrorKind, &'static str) {
        use zk::Error as E;
        match cause {
            // The server refused it, or it never left: a closed session takes nothing.
            E::SessionExpired | E::ClientClosed if self.leased => (ErrorKind::SessionLost, "the session has ended"),
            E::SessionExpired | E::ClientClosed | E::SessionMoved => {
                (ErrorKind::Unavailable, "the session was replaced")
            }
            E::NoAuth | E::AuthFailed | E::InvalidAcl => (ErrorKind::Denied, "the server refused access"),
            E::Throttled | E::NotReadOnly | E::NoHosts => (ErrorKind::Unavailable, "the server does not serve now"),
            E::Unimplemented => {
                (ErrorKind::Unsupported, "the server does not know this operation; 3.6 or later is needed")
            }
            E::BadArguments(_) => (ErrorKind::InvalidInput, "the path or the arguments are not possible"),
            E::NoNode
            | E::NodeExists
            | E::BadVersion
            | E::NotEmpty
            | E::NoChildrenForEphemerals
            | E::QuotaExceeded
            | E::NoWatcher
            | E::MarshallingError
            | E::ReconfigDisabled
            | E::RuntimeInconsistent
            | E::UnexpectedErrorCode(_) => (ErrorKind::Backend, "the server refused it"),
            // Connection lost, timed out, or an answer that could not be read.
            _ if self.writes => (ErrorKind::Ambiguous, "reply lost"),
            _ => (ErrorKind::Unavailable, "reply lost"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_reply_of_a_write_is_never_called_unavailable() {
        for cause in [zk::Error::ConnectionLoss, zk::Error::Timeout, zk::Error::UnexpectedError("x".into())] {
            assert_eq!(Call::write("commit", &"k").failed(cause.clone()).kind(), ErrorKind::Ambiguous);
            assert_eq!(Call::read("read", &"k").failed(cause).kind(), ErrorKind::Unavailable);
        }
    }

    #[test]
    fn the_end_of_a_session_is_the_end_of_the_lease_only_on_its_own_connection() {
        let call = Call::write("commit", &"k");
        assert_eq!(call.leased(true).failed(zk::Error::SessionExpired).kind(), ErrorKind::SessionLost);
        assert_eq!(call.failed(zk::Error::SessionExpired).kind(), ErrorKind::Unavailable);
    }
}
