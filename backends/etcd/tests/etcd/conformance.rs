//! The contract of the waist, case by case. The recipes over it are run by the integration tests.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_conformance::{Case, Clients, Outcome, limit, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
use quorate_etcd::Etcd;
use tokio::{sync::Semaphore, task::JoinSet};

use super::support::{config, server};

/// How many cases run at the same time: they mostly wait for leases.
const AT_ONCE: usize = 8;

#[derive(Debug)]
struct Clean(Config);

#[async_trait]
impl Clients for Clean {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Etcd::connect(&self.0).await?))
    }

    fn ttl(&self) -> Duration {
        Duration::from_secs(2)
    }
}

async fn run(case: Case, config: Config, turn: Arc<Semaphore>) -> Result<(), String> {
    let _turn = turn.acquire().await.unwrap();
    let clients = Arc::new(Clean(config));
    let limit = limit(&*clients).await.map_err(|e| e.to_string())?;
    let outcome = run_case(case, clients, limit).await;
    println!("{}::{} {outcome:?}", case.group, case.name);
    match outcome {
        Ok(Outcome::Passed) => Ok(()),
        Ok(Outcome::Refused(why)) => Err(format!("{}: etcd refuses nothing, but: {why}", case.name)),
        Err(why) => Err(format!("{}: {why}", case.name)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds() {
    let server = server().await;
    let turn = Arc::new(Semaphore::new(AT_ONCE));
    let mut cases = JoinSet::new();
    for case in waist_cases() {
        let namespace = format!("team/{}/{}", case.group, case.name);
        let config = config([server.addr()]).with_namespace(&namespace).unwrap();
        cases.spawn(run(case, config, turn.clone()));
    }
    assert!(cases.len() > 90, "the suite has shrunk to {} cases", cases.len());
    let mut failed = Vec::new();
    while let Some(case) = cases.join_next().await {
        failed.extend(case.unwrap().err());
    }
    assert_eq!(failed, Vec::<String>::new());
}
