//! The whole contract, with both kinds of leases.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use quorate_conformance::{Case, Clients, Outcome, limit, run_case, waist_cases};
use quorate_consul::Consul;
use quorate_core::{Backend, Config, Result};
use quorate_testkit::servers::{self, ConsulOptions};

/// An agent takes 200 connections from one address; a case has up to ten clients.
const AT_ONCE: usize = 8;

#[derive(Debug)]
struct OnServer(Config);

#[async_trait]
impl Clients for OnServer {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Consul::connect(&self.0).await?))
    }

    fn ttl(&self) -> Duration {
        Duration::from_secs(2)
    }
}

async fn run(case: Case, clients: Arc<dyn Clients>) -> Option<String> {
    let limit = limit(&*clients).await.expect("a client connects");
    let outcome = run_case(case, clients, limit).await;
    println!("{}::{} {outcome:?}", case.group, case.name);
    match outcome {
        Ok(Outcome::Passed) => None,
        other => Some(format!("{}::{}: {other:?}", case.group, case.name)),
    }
}

async fn all(cases: Vec<Case>, base: Config) {
    let runs = stream::iter(cases).map(|case| {
        let config = base.clone().with_namespace(&format!("{}/{}", case.group, case.name)).unwrap();
        run(case, Arc::new(OnServer(config)))
    });
    let failed: Vec<String> = runs.buffer_unordered(AT_ONCE).filter_map(async |failed| failed).collect().await;
    assert_eq!(failed, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_with_leases_on_agent_checks() {
    let server = super::common::server().await;
    all(waist_cases(), Config::new("consul", [server.addr().to_string()])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_with_plain_sessions() {
    let ttl = Duration::from_secs(2);
    let options = ConsulOptions { session_ttl_min: ttl, ..ConsulOptions::default() };
    let server = servers::Consul::start(options).await.unwrap();
    let config = Config::new("consul", [server.addr().to_string()]).with_option("session", "ttl").with_session_ttl(ttl);
    all(waist_cases(), config).await;
}
