use std::fmt;
use std::io;
use std::path::PathBuf;

/// What went wrong with a server of the harness.
///
/// Every message names the server and the next step. None of them holds a password or a token.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A program is not installed.
    MissingProgram {
        /// The program or file that was looked for.
        program: String,
        /// How to get it on this machine.
        how: String,
    },
    /// Something listens on the port that the server was about to take, so that a readiness probe would
    /// have passed against the wrong server.
    PortInUse {
        /// The server that wanted the port.
        server: String,
        /// The port.
        port: u16,
    },
    /// The server ended, or did not become ready in time.
    NotReady {
        /// The server.
        server: String,
        /// What was awaited, and what was seen last.
        reason: String,
        /// The last lines of the server's own log.
        log_tail: String,
    },
    /// A signal was asked for, but the server does not run.
    NotRunning {
        /// The server.
        server: String,
    },
    /// This kind of server cannot do that.
    Unsupported {
        /// The server.
        server: String,
        /// What cannot be done, and what to do instead.
        reason: String,
    },
    /// A helper command of the server failed, such as `etcdctl auth enable`.
    Command {
        /// The command, without its secrets.
        command: String,
        /// What it printed.
        output: String,
    },
    /// The operating system refused.
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(doing: impl Into<String>, source: io::Error) -> Self {
        Self::Io { doing: doing.into(), source }
    }

    pub(crate) fn reading(path: &std::path::Path, source: io::Error) -> Self {
        Self::io(format!("read {}", path.display()), source)
    }

    pub(crate) fn writing(path: &std::path::Path, source: io::Error) -> Self {
        Self::io(format!("write {}", path.display()), source)
    }

    pub(crate) fn missing(program: impl Into<PathBuf>, how: &str) -> Self {
        Self::MissingProgram { program: program.into().display().to_string(), how: how.to_owned() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingProgram { program, how } => {
                write!(f, "{program} is not installed; {how}")
            }
            Self::PortInUse { server, port } => write!(
                f,
                "start {server}: port {port} of 127.0.0.1 is taken by another process; start again to get other ports"
            ),
            Self::NotReady { server, reason, log_tail } => {
                write!(f, "start {server}: {reason}; its log ends with:\n{log_tail}")
            }
            Self::NotRunning { server } => {
                write!(f, "signal {server}: it does not run; restart() brings it back")
            }
            Self::Unsupported { server, reason } => write!(f, "{server}: {reason}"),
            Self::Command { command, output } => write!(f, "{command} failed: {output}"),
            Self::Io { doing, source } => write!(f, "{doing}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
