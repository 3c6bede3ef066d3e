//! One server of a cluster, whichever way it was started.

use std::{process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_testkit::servers::Server;
use tokio::process::Command;

/// Why a server could not be broken or mended.
pub type Outcome = Result<(), String>;

/// What a server is cut off from. Its connections are not closed: nothing arrives any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The other servers only: clients reach it still, and it does not know what the others do.
    Servers,
    /// Everybody.
    Everybody,
}

/// One server of a cluster.
#[async_trait]
pub trait Node: Send + Sync + std::fmt::Debug {
    /// Its name among the others.
    fn name(&self) -> String;

    /// Whether it says that it leads; not if it does not answer.
    async fn leads(&self) -> bool;

    /// Kills it at once; its data stays.
    async fn kill(&self) -> Outcome;

    /// Stops it in order.
    async fn stop(&self) -> Outcome;

    /// Starts it again with its data.
    async fn start(&self) -> Outcome;

    /// Waits until it answers.
    async fn ready(&self) -> Outcome;

    /// Freezes it.
    async fn pause(&self) -> Outcome;

    /// Thaws it.
    async fn resume(&self) -> Outcome;

    /// Cuts it off.
    async fn cut_off(&self, from: Cut) -> Outcome;

    /// Ends every cut.
    async fn rejoin(&self) -> Outcome;

    /// What a Redis answers; empty if it does not.
    async fn ask(&self, words: &[&str]) -> String;
}

#[async_trait]
impl Node for Server {
    fn name(&self) -> String {
        Self::name(self).to_owned()
    }

    async fn leads(&self) -> bool {
        self.pid().is_some() && self.is_leader().await.unwrap_or(false)
    }

    async fn kill(&self) -> Outcome {
        said(Self::kill(self).await)
    }

    async fn stop(&self) -> Outcome {
        said(Self::stop(self).await)
    }

    async fn start(&self) -> Outcome {
        said(self.launch().await)
    }

    async fn ready(&self) -> Outcome {
        said(self.wait_ready().await)
    }

    async fn pause(&self) -> Outcome {
        said(Self::pause(self))
    }

    async fn resume(&self) -> Outcome {
        said(Self::resume(self))
    }

    async fn cut_off(&self, _: Cut) -> Outcome {
        Err("processes of one machine share its network: start the servers in containers".to_owned())
    }

    async fn rejoin(&self) -> Outcome {
        Ok(())
    }

    async fn ask(&self, words: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port().to_string()]).args(words);
        answer(command).await
    }
}

/// What a command prints within a second; empty if it does not.
pub(super) async fn answer(mut command: Command) -> String {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(1), command.output()).await;
    output.ok().and_then(Result::ok).map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
}

fn said<E: std::fmt::Display>(outcome: Result<(), E>) -> Outcome {
    outcome.map_err(|e| e.to_string())
}

pub(super) fn all(servers: &[Arc<Server>]) -> Vec<Arc<dyn Node>> {
    servers.iter().map(|server| server.clone() as Arc<dyn Node>).collect()
}
