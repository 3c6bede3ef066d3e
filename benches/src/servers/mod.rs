//! The four servers: quorate and the raw client do the same work, in turns.
//!
//! Promise: both sides run in one process, on one runtime and on one server, with connections of the same kind; the
//! raw side is written as its library's users would write it, with no step that quorate needs and it does not.

mod commits;
#[cfg(feature = "consul")]
mod consul;
mod contended;
mod discovery;
#[cfg(feature = "etcd")]
mod etcd;
mod hand_off;
mod pairs;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "zookeeper")]
mod zookeeper;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate::Coordinator;
use quorate_testkit::servers::Server;
use tokio::time::timeout;

#[cfg(feature = "consul")]
pub(crate) use self::consul::Consul;
#[cfg(feature = "etcd")]
pub(crate) use self::etcd::Etcd;
#[cfg(feature = "redis")]
pub(crate) use self::redis::Redis;
#[cfg(feature = "zookeeper")]
pub(crate) use self::zookeeper::ZooKeeper;
use crate::{Outcome, report::Report, samples::Budget};

/// Beyond what the budgets say: start-up, warm-up, and a machine that is busy with something else.
const SLACK: Duration = Duration::from_secs(60);

/// What the raw side writes; as long as what a lock of quorate's writes.
const VALUE: &str = r#"{"owner":"4711@host","since_ms":1700000000000}"#;

/// A server, and its raw client.
#[async_trait]
pub(crate) trait Contest: Sync {
    /// The backend's name.
    fn name(&self) -> &'static str;

    /// What the raw side's pair and round are.
    fn raw_is(&self) -> &'static str;

    /// Owner changes each second with 32 contenders: twice what the best fair lock of others gave on the
    /// reference machine (ARCHITECTURE.md).
    fn owner_changes(&self) -> f64;

    /// Starts the server.
    async fn start(&self) -> Result<Server, quorate_testkit::servers::Error>;

    /// Connects the raw client.
    async fn connect(&self, server: &Server) -> Outcome<Raw>;
}

/// The raw client.
pub(crate) struct Raw {
    pair: Arc<dyn Pair>,
    round: Box<dyn Round>,
}

/// One side of a comparison of acquire + release.
#[async_trait]
pub(crate) trait Pair: Send + Sync {
    /// Acquires and releases what has this name.
    async fn pair(&self, name: &str) -> Outcome;
}

/// One side of a comparison of what one client does and another hears.
#[async_trait]
pub(crate) trait Round: Send {
    /// The time from the moment when one client begins its write to the moment when the other has heard of it.
    ///
    /// Between the other's beginning to listen and the write lies a pause of `settle`.
    async fn round(&mut self, settle: Duration) -> Outcome<Duration>;
}

/// quorate's side.
struct Ours(Coordinator);

#[async_trait]
impl Pair for Ours {
    async fn pair(&self, name: &str) -> Outcome {
        let guard = self.0.lock(name).acquire().await.map_err(|e| e.to_string())?;
        guard.release().await.map_err(|e| e.to_string())
    }
}

async fn coordinator(server: &Server) -> Outcome<Coordinator> {
    let url = format!("{}/bench", server.url());
    // Large, as it holds the way to every backend.
    Box::pin(quorate::connect(&url)).await.map_err(|e| e.to_string())
}

pub(crate) fn measure(contest: &'static dyn Contest, budget: Budget) -> Outcome<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(async {
        // On a worker, as the tasks of an application are; the thread of `block_on` would be woken from afar.
        tokio::spawn(measured(contest, budget)).await.map_err(|e| format!("{}: {e}", contest.name()))?
    })
}

async fn measured(contest: &'static dyn Contest, budget: Budget) -> Outcome<Report> {
    let server = contest.start().await.map_err(|e| format!("{} was not measured: {e}", contest.name()))?;
    let name = contest.name();
    let mut raw = contest.connect(&server).await?;
    let ours = Arc::new(Ours(coordinator(&server).await?));
    let mut rows = Vec::new();
    let mut notes = vec![format!("raw: {}", contest.raw_is())];

    progress(name, "acquire + release, one task");
    let latency = within(budget.latency, pairs::latency(&*raw.pair, &ours, budget.latency)).await?;
    rows.extend(latency.rows("acquire + release", 1.15));
    progress(name, "acquire + release, 64 tasks");
    rows.push(within(budget.throughput, pairs::throughput(&raw.pair, &ours, budget.throughput)).await?);
    progress(name, "32 contenders");
    let line = contended::contended(&server, &mut *raw.round, contest.owner_changes(), budget.contended);
    let (row, note) = within(budget.contended, line).await?;
    rows.push(row);
    notes.push(note);
    progress(name, "hand-off between two clients");
    let mut hand_off = hand_off::HandOff::new(&server).await?;
    let times = hand_off::compare(&mut *raw.round, &mut hand_off, budget.hand_off);
    let times = within(budget.hand_off, times).await?;
    notes.push(format!("{} pairs and {} hand-offs timed on either side", latency.count(), times.count()));
    rows.extend(times.rows("hand-off", 1.5));
    progress(name, "atomic commit");
    rows.extend(within(budget.commits, commits::measure(&*raw.pair, &ours.0, budget.commits)).await?);
    progress(name, "discovery");
    let figures = discovery::measure(&server, &mut *raw.round, budget.discovery);
    rows.extend(within(budget.discovery, figures).await?);
    Ok(Report { title: format!("{name}, one server"), sides: ("raw client", "quorate"), rows, notes })
}

fn progress(name: &str, what: &str) {
    eprintln!("{name}: {what}");
}

async fn within<T>(budget: Duration, work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    let limit = budget * 2 + SLACK;
    timeout(limit, work).await.unwrap_or_else(|_| Err(format!("not finished after {limit:?}: something hangs")))
}
