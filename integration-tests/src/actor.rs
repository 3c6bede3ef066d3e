//! A child process that holds locks on command, to be killed and stopped.
//!
//! Promise: the child ends with the value that stands for it.

use std::{os::unix::process::ExitStatusExt as _, process::Stdio, sync::OnceLock, time::Duration};

use quorate::Config;
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{sleep, timeout},
};

use crate::site::Site;

/// Where the `quorate-actor` binary is; the runner, which cargo tells, sets it.
pub static BINARY: OnceLock<&'static str> = OnceLock::new();

/// Longer than any answer takes, the start of the process and its first session included.
const PATIENCE: Duration = Duration::from_secs(30);

/// The child.
#[derive(Debug)]
pub struct Actor {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Actor {
    /// Starts the actor on a place.
    ///
    /// # Panics
    /// If the binary is not known or cannot be started.
    pub fn start(config: &Config) -> Self {
        let program = BINARY.get().expect("the runner has set the path of the actor's binary");
        let mut child = Command::new(program)
            .arg(Site::url_of(config))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the actor's binary starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, input, output }
    }

    /// Sends a command.
    ///
    /// # Panics
    /// If the child is gone.
    pub async fn send(&mut self, command: &str) {
        self.input.write_all(format!("{command}\n").as_bytes()).await.expect("the actor reads");
    }

    /// The next answer.
    ///
    /// # Panics
    /// If there is none in time.
    pub async fn answer(&mut self) -> String {
        let line = timeout(PATIENCE, self.output.next_line()).await.expect("the actor answers in time");
        line.expect("the pipe is readable").expect("the actor is alive")
    }

    /// Sends a command and waits for the answer.
    ///
    /// # Panics
    /// As the two.
    pub async fn ask(&mut self, command: &str) -> String {
        self.send(command).await;
        self.answer().await
    }

    /// The number at the end of the answer.
    ///
    /// # Panics
    /// If the answer does not begin with `word` or end with a number.
    pub async fn ask_number(&mut self, command: &str, word: &str) -> u64 {
        let answer = self.ask(command).await;
        let number = answer.strip_prefix(word).unwrap_or_else(|| panic!("{command}: {answer}"));
        number.trim().parse().unwrap_or_else(|_| panic!("{command}: {answer}"))
    }

    /// Kills it with SIGKILL and waits for its end.
    ///
    /// # Panics
    /// If it cannot be killed.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("a child can be killed");
    }

    /// Waits for its end, which is by SIGKILL and not by our hand.
    ///
    /// # Panics
    /// If it ends otherwise, or not in time.
    pub async fn killed(&mut self) {
        let end =
            timeout(PATIENCE, self.child.wait()).await.expect("it dies in time").expect("a child can be waited for");
        assert_eq!(end.signal(), Some(Signal::KILL.as_raw()), "{end}");
    }

    /// Waits until it is stopped, not by our hand.
    ///
    /// # Panics
    /// If it is not in time.
    pub async fn stopped(&self) {
        let pid = self.child.id().expect("it has not been waited for");
        let state = async || {
            let text = tokio::fs::read_to_string(format!("/proc/{pid}/stat")).await.expect("the process is there");
            text.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next())
        };
        let stopped = async {
            while state().await != Some('T') {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, stopped).await.expect("it stops in time");
    }

    /// Stops it with SIGSTOP.
    ///
    /// # Panics
    /// If `kill` cannot be run.
    pub async fn pause(&self) {
        self.signal("-STOP").await;
    }

    /// Lets it go on with SIGCONT.
    ///
    /// # Panics
    /// If `kill` cannot be run.
    pub async fn resume(&self) {
        self.signal("-CONT").await;
    }

    async fn signal(&self, signal: &str) {
        let pid = self.child.id().expect("it has not been waited for").to_string();
        let sent = Command::new("kill").args([signal, &pid]).status().await.expect("kill can be run");
        assert!(sent.success(), "{signal}");
    }

    /// Ends its input and waits until it has closed its session and ended by itself.
    ///
    /// # Panics
    /// If it fails or does not end.
    pub async fn exit(mut self) {
        drop(self.input);
        let end = async {
            while let Some(line) = self.output.next_line().await.expect("the pipe is readable") {
                assert!(line == "bye", "{line}");
            }
            self.child.wait().await.expect("a child can be waited for")
        };
        assert!(timeout(PATIENCE, end).await.expect("it ends in time").success());
    }
}
