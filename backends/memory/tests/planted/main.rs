//! Does the conformance suite find what it is there to find? A backend with one flaw at a time is put before it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod election;
mod flawed;
mod table;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_conformance::{Case, Clients, limit, recipe_cases, run_case, waist_cases};
use quorate_core::{Backend, Result};
use quorate_memory::Memory;

use crate::flawed::{Flaw, Flawed, Shared};

#[derive(Debug)]
struct FlawedClients {
    store: Memory,
    flaw: Option<Flaw>,
    shared: Arc<Shared>,
}

#[async_trait]
impl Clients for FlawedClients {
    async fn client(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Flawed { inner: self.store.client().into(), flaw: self.flaw, shared: self.shared.clone() }))
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(600)
    }
}

/// The names of the cases that fail.
fn failures(flaw: Option<Flaw>, cases: Vec<Case>) -> Vec<&'static str> {
    let mut failed = Vec::new();
    for case in cases {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let outcome = runtime.block_on(async {
            let clients = Arc::new(FlawedClients { store: Memory::new(), flaw, shared: Arc::default() });
            let limit = limit(&*clients).await.unwrap();
            run_case(case, clients, limit).await
        });
        if outcome.is_err() {
            failed.push(case.name);
        }
    }
    failed
}

#[test]
fn without_a_flaw_nothing_fails() {
    let cases = [waist_cases(), recipe_cases()].concat();
    assert_eq!(failures(None, cases), Vec::<&str>::new());
}

/// All flaws in one test: the hook that keeps their panics quiet belongs to the whole process.
#[test]
fn every_planted_flaw_is_found_by_the_case_that_names_the_promise() {
    let cases: Vec<_> = waist_cases().iter().map(|case| case.name).collect();
    let mut missed = Vec::new();
    for (flaw, by) in table::PLANTED {
        let failed = quietly(|| failures(Some(*flaw), waist_cases()));
        println!("{flaw:?} fails {} cases: {failed:?}", failed.len());
        for case in *by {
            assert!(cases.contains(case), "there is no case {case}");
            if !failed.contains(case) {
                missed.push(format!("{flaw:?} is not noticed by {case}, only by {failed:?}"));
            }
        }
        // A flaw that breaks everything shows nothing about the cases that name it.
        if failed.len() > cases.len() * 2 / 3 {
            missed.push(format!("{flaw:?} fails nearly everything: {failed:?}"));
        }
    }
    // The recipes are slower, so only the cases that must notice are run.
    for (flaw, by) in table::PLANTED_UNDER_RECIPES.iter().chain(election::PLANTED_UNDER_ELECTIONS) {
        let named = |case: &Case| by.contains(&case.name);
        let cases: Vec<_> = recipe_cases().into_iter().filter(named).collect();
        assert_eq!(cases.len(), by.len(), "not all of these are cases: {by:?}");
        let failed = quietly(|| failures(Some(*flaw), cases));
        println!("{flaw:?} fails {failed:?}");
        missed.extend(by.iter().filter(|case| !failed.contains(case)).map(|case| format!("{flaw:?} passes {case}")));
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

/// Hundreds of expected panics need no backtrace each.
fn quietly<T>(run: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let value = run();
    std::panic::set_hook(hook);
    value
}
