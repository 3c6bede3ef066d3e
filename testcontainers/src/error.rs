use std::{error, fmt};

/// Why there is no server: what was tried, and what came of it.
#[derive(Debug)]
pub struct Error {
    doing: String,
    reason: String,
    /// Seen only in the source chain: its text is in `reason`.
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(doing: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { doing: doing.into(), reason: reason.into(), source: None }
    }

    pub(crate) fn caused(doing: impl Into<String>, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        let mut reason = source.to_string();
        let mut below = source.source();
        while let Some(cause) = below {
            let text = cause.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            below = cause.source();
        }
        Self { doing: doing.into(), reason, source: Some(source) }
    }

    /// Whether the daemon could not publish the port because somebody else listens there.
    pub(crate) fn is_port_taken(&self) -> bool {
        ["port is already allocated", "address already in use"].iter().any(|text| self.reason.contains(text))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.doing, self.reason)
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
