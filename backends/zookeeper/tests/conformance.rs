//! dev
use async_trait::async_trait;
use quorate_conformance::{Case, Clients, Outcome, limit, recipe_cases, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
use quorate_zookeeper::ZooKeeper;
use std::{sync::Arc, time::Duration};

#[derive(Debug)]
struct Space(Config);

#[async_trait]
impl Clients for Space {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(ZooKeeper::connect(&self.0).await?))
    }
    fn ttl(&self) -> Duration {
        Duration::from_millis(1500)
    }
}

async fn run(case: Case, url: String) -> Result<(), String> {
    let clients: Arc<dyn Clients> = Arc::new(Space(Config::parse(&url).unwrap()));
    let limit = limit(&*clients).await.map_err(|e| e.to_string())?;
    let begun = std::time::SystemTime::now();
    let outcome = run_case(case, clients, limit).await;
    println!("{}::{} {outcome:?} {:?}", case.group, case.name, begun.elapsed().unwrap());
    match outcome {
        Ok(Outcome::Passed) => Ok(()),
        Ok(Outcome::Refused(why)) => Err(format!("{}: refused {why}", case.name)),
        Err(why) => Err(format!("{}: {why}", case.name)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev() {
    let url = std::env::var("ZK_URL").unwrap();
    let only = std::env::var("ONLY").unwrap_or_default();
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let mut failed = Vec::new();
    let all = if std::env::var("RECIPES").is_ok() { recipe_cases() } else { waist_cases() };
    let gate = Arc::new(tokio::sync::Semaphore::new(8));
    let mut tasks = Vec::new();
    for case in all.into_iter().filter(|c| c.name.contains(&only)) {
        let url = format!("{url}/t{stamp}/{}/{}", case.group, case.name);
        let gate = gate.clone();
        tasks.push(tokio::spawn(async move {
            let _p = gate.acquire().await;
            run(case, url).await
        }));
    }
    for t in tasks {
        failed.extend(t.await.unwrap().err());
    }
    for f in &failed {
        println!("FAILED {f}");
    }
    assert!(failed.is_empty(), "{} failed", failed.len());
}
