//! Servers in containers: the daemon, and the images.
//!
//! Promise: a daemon that answers already is used as it is; where there is none, one is installed and started as root on
//! Debian, and stopped when the handle is dropped or when this process ends, however it ends. Every container of the run
//! goes with the handle.

use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use quorate_testkit::install;

use crate::{
    DockerArgs,
    run::{self, Outcome, has, headline},
};

/// A Docker daemon, and the images that were brought for it.
pub(crate) struct Docker {
    /// Its standard input is the pipe whose end tells it that we are gone.
    session: Child,
    /// What whoever uses the containers must find in its environment.
    environment: Vec<(String, String)>,
}

impl Docker {
    /// A daemon with the images of these servers.
    pub(crate) fn start(servers: &[&str], no_install: bool) -> Outcome<Self> {
        let answers = has("docker", "version");
        run::install_these(&if answers { Vec::new() } else { install::docker_daemon() }, no_install)?;
        headline(if answers { "the Docker daemon that answers" } else { "a Docker daemon of our own" });
        let run = format!("xtask-{}", std::process::id());
        let mut session = Command::new("sh")
            .arg(script("session.sh"))
            .arg(&run)
            .arg(folder())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Its own group: Ctrl-C in the terminal reaches us, and through us the session, in that order.
            .process_group(0)
            .spawn()
            .map_err(|e| format!("session.sh did not start: {e}"))?;
        let stdout = session.stdout.take().expect("stdout was asked for as a pipe");
        let mut docker = Self { session, environment: vec![("QUORATE_RUN".to_owned(), run)] };
        let mut host = String::new();
        if !BufReader::new(stdout).read_line(&mut host).is_ok_and(|length| length > 0) {
            return Err(
                "containers need a Docker daemon, and there is none (see above); name one with DOCKER_HOST, or \
                        leave containers out with --servers process (.ci/run --no-containers)"
                    .to_owned(),
            );
        }
        if !host.trim().is_empty() {
            docker.environment.push(("DOCKER_HOST".to_owned(), host.trim().to_owned()));
        }
        docker.images(servers)?;
        Ok(docker)
    }

    /// What a command needs to find the daemon and the images.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        self.environment.clone()
    }

    fn images(&mut self, servers: &[&str]) -> Outcome {
        headline("the servers' images");
        let mut command = Command::new("sh");
        command.arg(script("images.sh")).args(servers).envs(self.environment());
        let output = command.stderr(Stdio::inherit()).output().map_err(|e| format!("images.sh did not start: {e}"))?;
        if !output.status.success() {
            return Err(format!("the images cannot be had: {}", output.status));
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let (name, image) = line.split_once('=').ok_or_else(|| format!("images.sh said {line:?}"))?;
            println!("   {image}");
            self.environment.push((name.to_owned(), image.to_owned()));
        }
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        drop(self.session.stdin.take());
        self.session.wait().ok();
    }
}

fn script(name: &str) -> PathBuf {
    run::root().join("docker").join(name)
}

/// Where a daemon of our own keeps its images from run to run.
fn folder() -> PathBuf {
    let chosen = std::env::var_os("QUORATE_DOCKER_ROOT").map(PathBuf::from);
    chosen.unwrap_or_else(|| std::env::temp_dir().join("quorate-docker"))
}

/// `cargo xtask docker`.
pub(crate) fn run(args: &DockerArgs) -> Outcome {
    let servers: Vec<_> = args.server.iter().map(String::as_str).collect();
    let docker = Docker::start(&servers, args.no_install)?;
    let Some((program, rest)) = args.command.split_first() else { return Ok(()) };
    let mut command = Command::new(program);
    command.args(rest).envs(docker.environment());
    let status = run::status(&mut command)?;
    if status.success() { Ok(()) } else { Err(format!("{program}: {status}")) }
}
