//! The command that runs under a hold.
//!
//! Promise: dropping the future kills the command at once, with what it started if it has no terminal. What ends us by
//! SIGTERM, SIGHUP or SIGINT is passed on to it, and its end is ours.

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::ExitStatus,
};

use rustix::process::{Pid, Signal as Sent, kill_process, kill_process_group};
use tokio::{
    process::{Child, Command},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{Failure, exit};

/// What asks us to end.
pub(crate) struct Signals {
    term: Signal,
    hangup: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Every listener gets every signal. From the first one on none of them ends this process by itself.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let on = |kind| signal(kind).map_err(|e| Failure::new(exit::SOFTWARE, format!("listen to signals: {e}")));
        Ok(Self {
            term: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            interrupt: on(SignalKind::interrupt())?,
        })
    }

    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Sent {
        tokio::select! {
            _ = self.term.recv() => Sent::TERM,
            _ = self.hangup.recv() => Sent::HUP,
            _ = self.interrupt.recv() => Sent::INT,
        }
    }
}

/// As shells say it.
pub(crate) fn ended_by(signal: Sent) -> u8 {
    u8::try_from(signal.as_raw()).map_or(u8::MAX, |number| number.saturating_add(128))
}

fn said(status: ExitStatus) -> u8 {
    let raw = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(raw).unwrap_or(u8::MAX)
}

struct Running {
    child: Child,
    /// It leads a group of its own. With a terminal it must stay in ours, which is the one that may read from it.
    leads_group: bool,
}

impl Running {
    fn start(words: &[OsString], environment: &[(&str, String)]) -> Result<Self, Failure> {
        let (program, arguments) = words.split_first().ok_or_else(|| Failure::new(exit::USAGE, "no command"))?;
        let mut command = std::process::Command::new(program);
        command.args(arguments).envs(environment.iter().map(|(name, value)| (name, value)));
        let leads_group = !io::stdin().is_terminal();
        if leads_group {
            command.process_group(0);
        }
        let started = Command::from(command).kill_on_drop(true).spawn();
        let child = started.map_err(|e| {
            let status = if e.kind() == io::ErrorKind::NotFound { exit::NOT_FOUND } else { exit::SOFTWARE };
            Failure::new(status, format!("{}: {e}", program.display()))
        })?;
        Ok(Self { child, leads_group })
    }

    /// Does nothing once it has ended and that was seen: its number may be somebody else's by then.
    fn send(&self, signal: Sent) {
        let number = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = number {
            // Gone meanwhile: its end is seen soon.
            if self.leads_group {
                kill_process_group(pid, signal).ok()
            } else {
                kill_process(pid, signal).ok()
            };
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.send(Sent::KILL);
    }
}

/// Runs a command to its end, and returns its status as a shell would say it.
pub(crate) async fn run(words: &[OsString], environment: &[(&str, String)]) -> Result<u8, Failure> {
    let mut signals = Signals::listen()?;
    let mut running = Running::start(words, environment)?;
    loop {
        tokio::select! {
            ended = running.child.wait() => {
                return ended.map(said).map_err(|e| Failure::new(exit::SOFTWARE, format!("wait for the command: {e}")));
            }
            signal = signals.next() => {
                // Ctrl-C reaches everybody at a terminal without us.
                if signal != Sent::INT || running.leads_group {
                    running.send(signal);
                }
            }
        }
    }
}
