//! The contract of a quorate backend as named test cases.
//!
//! Promise: every sentence that the docs of [`Backend`] promise is asserted by at least one case, each case is
//! named for what it promises, and no case knows which backend it runs on: where backends may differ, it asks
//! [`Backend::profile`]. A case never passes silently; what a server cannot give must be declared in the profile
//! and refused, and is reported as [`Outcome::Refused`].
//!
//! # Run it on your own backend
//! Implement [`Clients`], which opens connections of the backend under test, and run every case of
//! [`waist_cases`] with [`run_case`], each in a namespace of its own:
//!
//! ```
//! # use std::{sync::Arc, time::Duration};
//! # use quorate_conformance::{Clients, limit, run_case, waist_cases};
//! # async fn run(open: impl AsyncFn() -> quorate_core::Result<Arc<dyn Clients>>) -> quorate_core::Result<()> {
//! for case in waist_cases() {
//!     let clients = open().await?; // your own: a fresh namespace of a running server
//!     let limit = limit(&*clients).await?;
//!     let outcome = run_case(case, clients, limit).await;
//!     println!("{}::{} {outcome:?}", case.group, case.name);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Nothing but the server's time-outs makes a case slow: those that wait for a lease to end take
//! [`Clients::ttl`] plus the profile's `expiry_lag`.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "`assert_eq!(line, [ticket.clone()])` reads as what it asserts")]

mod history;
mod keys;
mod kv;
mod lease;
mod line;
mod recipes;
mod support;
mod ticket;
mod txn;
mod wait;
mod watch;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use quorate_core::{Backend, Result};

/// How a case reaches the backend under test.
#[async_trait]
pub trait Clients: fmt::Debug + Send + Sync + 'static {
    /// A new client with a connection of its own, on the same server and namespace as every other client of
    /// this value.
    ///
    /// # Errors
    /// Whatever connecting fails with; the case fails with it.
    async fn client(&self) -> Result<Arc<dyn Backend>>;

    /// A short TTL that this server grants as asked. Cases wait for it in real time.
    fn ttl(&self) -> Duration;
}

/// How a case ended, if it did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The promise was kept.
    Passed,
    /// The profile declares that this server cannot give it, and the call was refused accordingly.
    Refused(String),
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::Passed
    }
}

/// One promise of the contract.
#[derive(Clone, Copy)]
pub struct Case {
    /// The promise, in snake_case; unique among all cases.
    pub name: &'static str,
    /// What it is about: `lease`, `kv`, `txn`, `keys`, `line`, `ticket`, `wait` or `watch`.
    pub group: &'static str,
    /// The test. It panics if the promise is broken.
    pub run: fn(Arc<dyn Clients>) -> BoxFuture<'static, Outcome>,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.group, self.name)
    }
}

/// Every case about the waist itself.
pub fn waist_cases() -> Vec<Case> {
    [
        lease::cases(),
        kv::cases(),
        txn::cases(),
        keys::cases(),
        line::cases(),
        ticket::cases(),
        wait::cases(),
        watch::cases(),
    ]
    .concat()
}

/// Every case about the recipes that stand on the waist: sessions, locks, elections, keys and values.
///
/// A backend that passes [`waist_cases`] should pass these without a change; they are slower.
pub fn recipe_cases() -> Vec<Case> {
    recipes::cases()
}

/// A time limit for one case that only a hanging backend reaches.
///
/// # Errors
/// Whatever [`Clients::client`] fails with.
pub async fn limit(clients: &dyn Clients) -> Result<Duration> {
    let lag = clients.client().await?.profile().expiry_lag;
    Ok(Duration::from_secs(60) + 4 * (clients.ttl() + lag))
}

/// Runs one case, on a task of its own.
///
/// # Errors
/// The message of the panic if the promise is broken, or that the case did not end within `limit`.
///
/// # Cancel safety
/// Dropping it ends the case.
pub async fn run_case(case: Case, clients: Arc<dyn Clients>, limit: Duration) -> Result<Outcome, String> {
    let mut task = support::Running(tokio::spawn((case.run)(clients)));
    match tokio::time::timeout(limit, &mut task.0).await {
        Ok(Ok(outcome)) => Ok(outcome),
        Ok(Err(e)) if e.is_panic() => {
            let panic = e.into_panic();
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Err(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panic without a message").to_owned())
        }
        Ok(Err(_)) => Err("the runtime was shut down".to_owned()),
        Err(_) => Err(format!("{case:?} did not end within {limit:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_group_has_cases() {
        let mut names: Vec<_> = waist_cases().iter().map(|c| c.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for group in ["lease", "kv", "txn", "keys", "line", "ticket", "wait", "watch"] {
            assert!(waist_cases().iter().any(|c| c.group == group), "{group}");
        }
    }

    #[derive(Debug)]
    struct NoServer;

    #[async_trait]
    impl Clients for NoServer {
        async fn client(&self) -> Result<Arc<dyn Backend>> {
            Err(quorate_core::Error::new(quorate_core::ErrorKind::Unavailable, "connect", "no server"))
        }
        fn ttl(&self) -> Duration {
            Duration::from_secs(1)
        }
    }

    #[tokio::test]
    async fn without_a_server_no_case_passes() {
        for case in waist_cases() {
            let outcome = run_case(case, Arc::new(NoServer), Duration::from_secs(5)).await;
            assert!(outcome.is_err(), "{case:?} passed without a server");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_case_that_hangs_is_ended_at_its_limit() {
        let hangs = Case { name: "hangs", group: "lease", run: |_| Box::pin(std::future::pending()) };
        let outcome = run_case(hangs, Arc::new(NoServer), Duration::from_secs(5)).await;
        assert!(outcome.is_err_and(|e| e.contains("did not end")));
    }
}
