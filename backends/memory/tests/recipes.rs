//! The recipes on memory, in real time and on a paused clock.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt as _};
use quorate_conformance::{Case, Clients, Outcome, limit, recipe_cases, run_case};
use quorate_core::{Backend, Result};
use quorate_memory::Memory;

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

async fn run(case: Case) -> Option<String> {
    let clients: Arc<dyn Clients> = Arc::new(Private(Memory::new()));
    let limit = limit(&*clients).await.expect("memory is always there");
    match run_case(case, clients, limit).await {
        Ok(Outcome::Passed) => None,
        other => Some(format!("{case:?}: {other:?}")),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recipes_keep_their_promises_in_real_time() {
    // Not all at once: those that count time would measure the others.
    let cases = stream::iter(recipe_cases()).map(|case| tokio::spawn(run(case))).buffer_unordered(32);
    let failed: Vec<_> = cases.filter_map(async |case| case.expect("run_case catches panics")).collect().await;
    assert!(failed.is_empty(), "{failed:#?}");
}

#[tokio::test(start_paused = true)]
async fn the_recipes_keep_their_promises_on_a_paused_clock() {
    let mut failed = Vec::new();
    for case in recipe_cases() {
        failed.extend(run(case).await);
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
