//! One server process under a supervisor that ends it when we end.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

const SUPERVISOR: &str = include_str!("supervise.sh");

/// A server that was started and has not been reaped by us yet.
///
/// Dropping it kills the server and waits for its end. This is a process of `std`, not of tokio: a
/// server may outlive the runtime that started it, as when several tests share one.
pub(crate) struct Process {
    /// The supervising shell. Its standard input is the pipe whose end tells it that we are gone, so
    /// `stdin` must stay inside for as long as the server is to live.
    supervisor: Child,
    server: Pid,
}

/// What to run, and where it keeps its things.
pub(crate) struct Program<'a> {
    pub(crate) path: &'a Path,
    pub(crate) args: &'a [OsString],
    /// Removed by the supervisor if we die without clearing up.
    pub(crate) home: &'a Path,
    pub(crate) log: &'a Path,
}

impl Process {
    /// Starts the program. Blocks for the few milliseconds in which the supervisor comes up.
    pub(crate) fn start(program: &Program<'_>) -> io::Result<Self> {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(SUPERVISOR)
            .arg("supervise.sh")
            .arg(program.home)
            .arg(program.log)
            .arg(program.path)
            .args(program.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Its own group: Ctrl-C in the terminal reaches us, and through us the server, in that order.
            .process_group(0);
        // Servers read their settings from such variables; a test must not depend on the caller's shell.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["ETCD_", "CONSUL_", "ZOO", "JVMFLAGS", "SERVER_JVMFLAGS"].iter().any(|prefix| text.starts_with(prefix))
            {
                command.env_remove(&name);
            }
        }
        let mut supervisor = command.spawn()?;
        let stdout = supervisor.stdout.take().expect("stdout was asked for as a pipe");
        let mut line = String::new();
        let server = BufReader::new(stdout)
            .read_line(&mut line)
            .ok()
            .and_then(|_| line.trim().parse().ok())
            .and_then(Pid::from_raw);
        match server {
            Some(server) => Ok(Self { supervisor, server }),
            None => {
                drop(supervisor.stdin.take());
                let status = supervisor.wait()?;
                Err(io::Error::other(format!("the supervising shell ended with {status} before it named the server")))
            }
        }
    }

    /// How the server ended, or `None` while it runs.
    pub(crate) fn ended(&mut self) -> io::Result<Option<String>> {
        Ok(self.supervisor.try_wait()?.map(|status| match status.code() {
            Some(code @ 129..=192) => format!("signal {}", code - 128),
            Some(code) => format!("exit code {code}"),
            None => status.to_string(),
        }))
    }

    /// Signals the server itself, not its supervisor.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill_process(self.server, signal)?)
    }

    /// Signals the server and its children, for one that serves each client by a process of its own: those outlive it for a
    /// moment, and answer.
    pub(crate) fn signal_family(&self, signal: Signal) -> io::Result<()> {
        // Stopped, it neither makes children nor buries them: the ids stay theirs.
        kill_process(self.server, Signal::STOP)?;
        let id = self.server.as_raw_nonzero();
        // It may be on another core, about to make one more.
        for _ in 0..10_000 {
            let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
            if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 'Z'])) {
                break;
            }
            std::thread::yield_now();
        }
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        for child in children.split_whitespace().filter_map(|child| Pid::from_raw(child.parse().ok()?)) {
            // One that has ended already is not reaped yet, and takes no signal.
            kill_process(child, signal).ok();
        }
        self.signal(signal)
    }

    pub(crate) fn id(&self) -> u32 {
        self.server.as_raw_nonzero().get().unsigned_abs()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After the supervisor has been reaped the id may belong to somebody else.
        if matches!(self.supervisor.try_wait(), Ok(None)) {
            kill_process(self.server, Signal::KILL).ok();
        }
        self.supervisor.wait().ok();
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("id", &self.id()).finish()
    }
}

/// The end of a log, at most `limit` bytes.
pub(crate) fn tail(path: &PathBuf, limit: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) if bytes.is_empty() => "(nothing)".to_owned(),
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
        Err(error) => format!("(the log cannot be read: {error})"),
    }
}
