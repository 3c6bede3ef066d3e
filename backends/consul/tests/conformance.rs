//! The whole contract on a real Consul.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use quorate_conformance::{Clients, Outcome, limit, run_case, waist_cases};
use quorate_consul::Consul;
use quorate_core::{Backend, Config, Result};

#[derive(Debug)]
struct Space(Config, Duration);

#[async_trait]
impl Clients for Space {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Consul::connect(&self.0).await?))
    }

    fn ttl(&self) -> Duration {
        self.1
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds() {
    let url = std::env::var("CONSUL_URL").unwrap_or("consul://127.0.0.1:41500".into());
    let only = std::env::var("ONLY").unwrap_or_default();
    let cases: Vec<_> = waist_cases().into_iter().filter(|c| c.name.contains(&only)).collect();
    let runs = stream::iter(cases).map(|case| {
        let config =
            Config::parse(&url).unwrap().with_namespace(&format!("t{}/{}", std::process::id(), case.name)).unwrap();
        async move {
            let clients = Arc::new(Space(config, Duration::from_secs(2)));
            let limit = limit(&*clients).await.unwrap();
            let began = tokio::time::Instant::now();
            let outcome = run_case(case, clients, limit).await;
            println!("{}::{} {outcome:?} {:?}", case.group, case.name, began.elapsed());
            match outcome {
                Ok(Outcome::Passed) => None,
                other => Some(format!("{} {other:?}", case.name)),
            }
        }
    });
    let failed: Vec<String> = runs.buffer_unordered(8).filter_map(|x| async { x }).collect().await;
    assert_eq!(failed, Vec::<String>::new());
}
