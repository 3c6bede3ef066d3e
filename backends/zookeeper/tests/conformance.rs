//! The whole contract, and the recipes over it, on a real server.

mod support;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_conformance::{Case, Clients, Outcome, limit, recipe_cases, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
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

async fn run_all(cases: Vec<Case>) -> Vec<String> {
    let server = support::server().await;
    let gate = Arc::new(Semaphore::new(AT_ONCE));
    let tasks: Vec<_> = cases
        .into_iter()
        .map(|case| {
            let path = format!("conformance/{}/{}", case.group, case.name);
            let config = support::config(&[server.addr()]).with_namespace(&path).unwrap();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_on_zookeeper() {
    let mut failed = run_all(waist_cases()).await;
    // An ephemeral node can only be made by its own session, so one transaction cannot put keys on two leases. The
    // profile cannot say that yet; what the case must see meanwhile is the refusal, and nothing else may fail.
    let two_leases = failed.iter().position(|why| why.starts_with("all_puts_of_a_commit_carry_its_revision"));
    let why = failed.remove(two_leases.expect("refused until the profile can declare it"));
    assert!(why.contains("[unsupported]") && why.contains("keys on two leases"), "{why}");
    assert_eq!(failed, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recipes_work_on_zookeeper() {
    assert_eq!(run_all(recipe_cases()).await, Vec::<String>::new());
}
