//! The whole contract against a real server, each case in a namespace of its own.

mod support;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use quorate_conformance::{Case, Clients, Outcome, limit, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
use quorate_redis::Redis;
use quorate_testkit::servers::{Redis as Servers, RedisOptions};

#[derive(Debug)]
struct InNamespace(Config);

#[async_trait]
impl Clients for InNamespace {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Redis::connect(&self.0).await?))
    }

    // Sessions must survive a machine that runs other builds and tests at the same time.
    fn ttl(&self) -> Duration {
        Duration::from_secs(2)
    }
}

async fn run(case: Case, clients: Arc<dyn Clients>) -> Result<(), String> {
    let limit = limit(&*clients).await.map_err(|e| e.to_string())?;
    let outcome = run_case(case, clients, limit).await;
    println!("{}::{} {outcome:?}", case.group, case.name);
    match outcome {
        Ok(Outcome::Passed) => Ok(()),
        Ok(Outcome::Refused(why)) => Err(format!("{}: nothing is refused here, but: {why}", case.name)),
        Err(why) => Err(format!("{}: {why}", case.name)),
    }
}

/// Runs every case, some at a time, each at the URL that begins with `base`.
async fn all(cases: Vec<Case>, base: &str) {
    let outcomes = stream::iter(cases).map(|case| {
        let config = Config::parse(&format!("{base}/{}/{}", case.group, case.name)).expect("a valid URL");
        run(case, Arc::new(InNamespace(config)))
    });
    let failed: Vec<String> =
        outcomes.buffer_unordered(24).filter_map(|outcome| async { outcome.err() }).collect().await;
    assert_eq!(failed, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_on_one_server() {
    let server = support::server().await;
    all(waist_cases(), &format!("redis://{}", server.addr())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_in_a_cluster() {
    let cluster = Servers::cluster(RedisOptions::default(), false).await.unwrap();
    all(waist_cases(), &format!("redis+cluster://{}", cluster.nodes()[0].addr())).await;
}
