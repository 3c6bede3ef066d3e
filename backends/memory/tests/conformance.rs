//! The whole contract, in real time and on a paused clock, with and without a namespace.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_conformance::{Case, Clients, Outcome, limit, run_case, waist_cases};
use quorate_core::{Backend, Config, Result};
use quorate_memory::Memory;

/// Clients of a store of its own.
#[derive(Debug)]
struct Private(Memory);

#[async_trait]
impl Clients for Private {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(self.0.client()))
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(600)
    }
}

/// Clients of one named store, each in a namespace within that of its neighbour.
#[derive(Debug)]
struct Named(Config);

#[async_trait]
impl Clients for Named {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Memory::connect(&self.0).await?))
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
        Ok(Outcome::Refused(why)) => Err(format!("{}: nothing is refused in memory, but: {why}", case.name)),
        Err(why) => Err(format!("{}: {why}", case.name)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_in_real_time() {
    let cases: Vec<_> =
        waist_cases().into_iter().map(|c| tokio::spawn(run(c, Arc::new(Private(Memory::new()))))).collect();
    let mut failed = Vec::new();
    for case in cases {
        failed.extend(case.await.unwrap().err());
    }
    assert_eq!(failed, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_in_neighbouring_namespaces_of_one_store() {
    let keep = Memory::connect(&Config::parse("memory://conformance").unwrap()).await.unwrap();
    let mut cases = Vec::new();
    for case in waist_cases() {
        let url = format!("memory://conformance/{}", ["team", case.group, case.name].join("/"));
        cases.push(tokio::spawn(run(case, Arc::new(Named(Config::parse(&url).unwrap())))));
    }
    let mut failed = Vec::new();
    for case in cases {
        failed.extend(case.await.unwrap().err());
    }
    assert_eq!(failed, Vec::<String>::new());
    drop(keep);
}

#[test]
fn the_contract_holds_on_a_paused_clock() {
    let started = std::time::SystemTime::now();
    let mut failed = Vec::new();
    for case in waist_cases() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        failed.extend(runtime.block_on(run(case, Arc::new(Private(Memory::new())))).err());
    }
    assert_eq!(failed, Vec::<String>::new());
    let took = started.elapsed().unwrap();
    assert!(took < Duration::from_secs(60), "paused time must not be waited for: {took:?}");
}
