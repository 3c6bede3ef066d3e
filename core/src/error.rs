//! One error type for every backend.
//!
//! Promise: [`Error::kind`] tells what may be done next, the message names operation, key, backend and the
//! next step, and no secret is ever part of it. Losing a race is not an error anywhere in quorate.

use std::{error::Error as StdError, fmt, sync::Arc};

/// The result of every fallible call in quorate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the one respect that matters to the caller: what may be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The arguments can never work. Nothing was sent.
    InvalidInput,
    /// This backend cannot do it, or the feature is not compiled in. See the backend's `Profile`.
    Unsupported,
    /// The server refused these credentials. Repeating is pointless until they change.
    Denied,
    /// Surely not applied: the server could not be reached or refused the work. It may be repeated.
    Unavailable,
    /// The reply was lost: the write may or may not have happened. Read before repeating.
    Ambiguous,
    /// The lease behind the call has ended; whatever stood on it is lost.
    SessionLost,
    /// What is stored under the key is not what this library wrote or the type asked for.
    Corrupt,
    /// The server answered with an error that fits none of the above.
    Backend,
}

impl ErrorKind {
    /// A short lower-case name, stable across versions; used as a label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid_input",
            Self::Unsupported => "unsupported",
            Self::Denied => "denied",
            Self::Unavailable => "unavailable",
            Self::Ambiguous => "ambiguous",
            Self::SessionLost => "session_lost",
            Self::Corrupt => "corrupt",
            Self::Backend => "backend",
        }
    }

    fn next_step(self) -> &'static str {
        match self {
            Self::InvalidInput => "correct the arguments",
            Self::Unsupported => "see the backend's profile, or choose another backend",
            Self::Denied => "check user, password, token and access rules",
            Self::Unavailable => "nothing was applied; it may be repeated",
            Self::Ambiguous => "the write may have happened; read before retrying",
            Self::SessionLost => "what stood on the session is lost; open a new one and start again",
            Self::Corrupt => "look at the stored value; it was not written in this layout",
            Self::Backend => "see the cause",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error with its kind, the operation, the key and the backend it concerns.
///
/// `Display` reads like `commit kv/orders/42 on etcd: reply lost; the write may have happened; read before
/// retrying`.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    backend: &'static str,
    key: Option<String>,
    message: String,
    next: Option<String>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` in `operation` (a verb such as `"commit"`), with what happened in plain words.
    pub fn new(kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            operation,
            backend: "",
            key: None,
            message: message.into(),
            next: None,
            source: None,
        }))
    }

    /// Shorthand for an [`ErrorKind::InvalidInput`] error.
    pub fn invalid(operation: &'static str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, operation, message)
    }

    /// Names the backend, by the name its `Profile` carries.
    #[must_use]
    pub fn on(mut self, backend: &'static str) -> Self {
        self.inner().backend = backend;
        self
    }

    /// Names the key, directory or lease that the call was about. Never pass a value or a credential.
    #[must_use]
    pub fn key(mut self, key: impl fmt::Display) -> Self {
        self.inner().key = Some(key.to_string());
        self
    }

    /// Replaces the standard advice of the kind by a more precise next step.
    #[must_use]
    pub fn next(mut self, step: impl Into<String>) -> Self {
        self.inner().next = Some(step.into());
        self
    }

    /// Keeps the cause. Its text is shown by error reporters, so it must be free of secrets.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.inner().source = Some(Arc::from(source.into()));
        self
    }

    /// Turns the error into one of another kind, keeping everything else.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.inner().kind = kind;
        self
    }

    fn inner(&mut self) -> &mut Inner {
        Arc::make_mut(&mut self.0)
    }

    /// What may be done next.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The verb that failed, for example `"enqueue"`.
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The backend's name, or an empty string if the call never got as far.
    pub fn backend(&self) -> &'static str {
        self.0.backend
    }

    /// The key the call was about, as a reader would write it.
    pub fn subject(&self) -> Option<&str> {
        self.0.key.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &self.0;
        f.write_str(e.operation)?;
        if let Some(key) = &e.key {
            // Keys come from users: a newline in one must not forge a second line in a log.
            write!(f, " {}", key.escape_debug())?;
        }
        if !e.backend.is_empty() {
            write!(f, " on {}", e.backend)?;
        }
        write!(f, ": {}", e.message)?;
        if let Some(source) = &e.source {
            write!(f, " ({source})")?;
        }
        write!(f, "; {}", e.next.as_deref().unwrap_or(e.kind.next_step()))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_operation_key_backend_and_next_step() {
        let e = Error::new(ErrorKind::Ambiguous, "commit", "reply lost").key("orders/42").on("etcd");
        assert_eq!(
            e.to_string(),
            "commit orders/42 on etcd: reply lost; the write may have happened; read before retrying"
        );
    }

    #[test]
    fn a_newline_in_a_key_cannot_forge_a_log_line() {
        let e = Error::invalid("get", "bad").key("a\nERROR forged");
        assert!(!e.to_string().contains('\n'));
    }
}
