//! The runs of the conformance suite on five real coordinators, and the cases that need processes, servers and
//! networks to break.
//!
//! Promise: a server that cannot be started fails every case of its backend and says how to get it; nothing
//! passes because it did not run. The cases about the contract itself are in `quorate-conformance`.

pub mod actor;
pub mod bank;
pub mod clusters;
pub mod commit;
pub mod gray;
pub mod heartbeats;
pub mod jitter;
pub mod leaders;
pub mod outage;
pub mod process;
pub mod registry;
pub mod secured;
pub mod server;
pub mod site;

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use quorate_conformance::Outcome;

use site::Site;

/// A case that needs more than clients: other processes, or a server of its own to break.
#[derive(Clone, Copy)]
pub struct SiteCase {
    /// The promise, in snake_case.
    pub name: &'static str,
    /// `process`, `heartbeat`, `leaders`, `commit`, `gray`, `outage`, and others whose cases have a server of their own.
    pub group: &'static str,
    /// The test. It panics if the promise is broken.
    pub run: fn(Arc<Site>) -> BoxFuture<'static, Outcome>,
}

impl fmt::Debug for SiteCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.group, self.name)
    }
}

/// The cases of a group, named by their functions.
// A macro because only a macro can take the name of a function.
macro_rules! cases {
    ($group:literal: $($case:ident),+ $(,)?) => {
        /// The cases of this module.
        pub fn cases() -> Vec<$crate::SiteCase> {
            vec![$($crate::SiteCase {
                name: stringify!($case),
                group: $group,
                run: |site| Box::pin(async move { quorate_conformance::Outcome::from($case(site).await) }),
            }),+]
        }
    };
}
pub(crate) use cases;
