use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::{Instant, sleep};

use super::server::{ASK_EVERY, READY_WITHIN};
use super::{Error, Server};

/// Several servers of one kind that form one coordinator. Dropping it kills all of them.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Arc<Server>>,
}

impl Cluster {
    /// Starts all at once, since none is ready before a majority is.
    pub(crate) async fn started(servers: Vec<Server>) -> Result<Self, Error> {
        let nodes = servers.into_iter().map(Arc::new).collect();
        let cluster = Self { nodes };
        cluster.launch_empty().await?;
        Ok(cluster)
    }

    /// The servers, in the order of their names. A clone may be moved into a task that breaks them.
    pub fn nodes(&self) -> &[Arc<Server>] {
        &self.nodes
    }

    /// Where clients connect, one address per server.
    pub fn addrs(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.addr()).collect()
    }

    /// One URL that names every server: `etcd://127.0.0.1:P1,127.0.0.1:P2,127.0.0.1:P3`.
    pub fn url(&self) -> String {
        let addrs: Vec<String> = self.addrs().iter().map(SocketAddr::to_string).collect();
        let scheme = self.nodes[0].kind().scheme();
        format!("{scheme}://{}", addrs.join(","))
    }

    /// The server that says that it leads, waiting up to 60 s for one.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] when none does.
    ///
    /// # Cancel safety
    ///
    /// Reads only.
    pub async fn leader(&self) -> Result<Arc<Server>, Error> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            for node in &self.nodes {
                // One that is down or electing is no leader.
                if node.pid().is_some() && node.is_leader().await.unwrap_or(false) {
                    return Ok(Arc::clone(node));
                }
            }
            if Instant::now() > deadline {
                return Err(self.nodes[0].not_ready("no server of its cluster leads".to_owned()));
            }
            sleep(ASK_EVERY).await;
        }
    }

    /// Stops all, then starts all again with the same data, and waits until each is ready.
    ///
    /// # Errors
    ///
    /// As [`Server::restart`].
    ///
    /// # Cancel safety
    ///
    /// Some servers may be down; call it again.
    pub async fn restart(&self) -> Result<(), Error> {
        self.stop().await?;
        for node in &self.nodes {
            node.launch().await?;
        }
        self.wait_ready().await
    }

    /// Stops all, then starts all again with empty data, and waits until each is ready.
    ///
    /// # Errors
    ///
    /// As [`Server::restart`].
    ///
    /// # Cancel safety
    ///
    /// Some servers may be down; call it again.
    pub async fn restart_wiped(&self) -> Result<(), Error> {
        self.stop().await?;
        self.launch_empty().await
    }

    /// Stops all.
    ///
    /// # Errors
    ///
    /// As [`Server::stop`].
    ///
    /// # Cancel safety
    ///
    /// Some servers may run; call it again.
    pub async fn stop(&self) -> Result<(), Error> {
        for node in &self.nodes {
            node.stop().await?;
        }
        Ok(())
    }

    async fn launch_empty(&self) -> Result<(), Error> {
        for node in &self.nodes {
            node.launch_empty().await?;
        }
        self.wait_ready().await?;
        self.nodes[0].set_up().await
    }

    async fn wait_ready(&self) -> Result<(), Error> {
        for node in &self.nodes {
            node.wait_ready().await?;
        }
        Ok(())
    }
}
