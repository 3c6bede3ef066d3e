//! The whole contract of the waist on a real server. The recipes over it are run by the integration tests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_conformance::{Case, Clients, Outcome, limit, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
use quorate_testkit::servers::ZooKeeper as Launcher;
use quorate_zookeeper::ZooKeeper;
use tokio::sync::Semaphore;

/// Cases that run at once: each has several sessions to keep on a machine that may have two cores.
const AT_ONCE: usize = 6;

/// Clients of one namespace.
#[derive(Debug)]
struct Space(Config);

#[async_trait]
impl Clients for Space {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(ZooKeeper::connect(&self.0).await?))
    }

    fn ttl(&self) -> Duration {
        support::TTL
    }
}

async fn run(case: Case, config: Config) -> Result<(), String> {
    let clients: Arc<dyn Clients> = Arc::new(Space(config));
    let limit = limit(&*clients).await.map_err(|e| e.to_string())?;
    let outcome = run_case(case, clients, limit).await;
    println!("{}::{} {outcome:?}", case.group, case.name);
    match outcome {
        Ok(Outcome::Passed) => Ok(()),
        Ok(Outcome::Refused(why)) => Err(format!("{}: refused: {why}", case.name)),
        Err(why) => Err(format!("{}: {why}", case.name)),
    }
}

async fn run_all(cases: Vec<Case>, servers: &[SocketAddr]) -> Vec<String> {
    let gate = Arc::new(Semaphore::new(AT_ONCE));
    let tasks: Vec<_> = cases
        .into_iter()
        .map(|case| {
            let path = format!("conformance/{}/{}", case.group, case.name);
            let config = support::config(servers).with_namespace(&path).unwrap();
            let gate = gate.clone();
            tokio::spawn(async move {
                let _turn = gate.acquire().await.unwrap();
                run(case, config).await
            })
        })
        .collect();
    let mut failed = Vec::new();
    for task in tasks {
        failed.extend(task.await.unwrap().err());
    }
    failed
}

/// All but one: an ephemeral node can only be made by its own session, so one transaction cannot put keys on two
/// leases. The profile says so, and the case saw the refusal.
async fn the_contract_holds(servers: &[SocketAddr]) {
    let unusual = run_all(waist_cases(), servers).await;
    assert_eq!(unusual, ["one_commit_puts_keys_on_two_leases: refused: txn_leases is 1, the case needs 2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_on_one_server() {
    the_contract_holds(&[support::server().await.addr()]).await;
}

/// Every session is on another server as likely as not, and servers lag behind each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_on_an_ensemble() {
    let cluster = Launcher::cluster(support::options()).await.unwrap_or_else(|e| panic!("{e}"));
    the_contract_holds(&cluster.addrs()).await;
    for node in cluster.nodes() {
        // Claiming deletes and creates a node in one transaction: the servers' trees must still agree.
        assert!(!node.log_tail().contains("igest"), "{}", node.log_tail());
    }
}
