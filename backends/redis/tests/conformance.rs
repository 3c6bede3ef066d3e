//! The whole contract against a real server, each case in a namespace of its own.

mod common;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_conformance::{Case, Clients, Outcome, limit, recipe_cases, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
use quorate_redis::Redis;

#[derive(Debug)]
struct OnServer(Config);

#[async_trait]
impl Clients for OnServer {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Redis::connect(&self.0).await?))
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(600)
    }
}

async fn run(case: Case, clients: Arc<dyn Clients>) -> Result<(), String> {
    let limit = limit(&*clients).await.map_err(|e| e.to_string())?;
    let outcome = run_case(case, clients, limit).await;
    println!("{}::{} {outcome:?}", case.group, case.name);
    match outcome {
        Ok(Outcome::Passed) => Ok(()),
        Ok(Outcome::Refused(why)) => Err(format!("{}: nothing is refused, but: {why}", case.name)),
        Err(why) => Err(format!("{}: {why}", case.name)),
    }
}

async fn all(cases: Vec<Case>, url: impl Fn(&Case) -> String) {
    let running: Vec<_> =
        cases.into_iter().map(|c| tokio::spawn(run(c, Arc::new(OnServer(Config::parse(&url(&c)).unwrap()))))).collect();
    let mut failed = Vec::new();
    for case in running {
        failed.extend(case.await.unwrap().err());
    }
    assert_eq!(failed, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds() {
    let server = common::Server::start(&[]).await;
    all(waist_cases(), |c| server.url(&format!("/{}/{}", c.group, c.name))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recipes_hold() {
    let server = common::Server::start(&[]).await;
    all(recipe_cases(), |c| server.url(&format!("/{}/{}", c.group, c.name))).await;
}
