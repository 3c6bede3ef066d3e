//! Runs every case on every backend, each as a test of its own name: `etcd/lock/grants_follow_arrival`.
//!
//! By environment:
//! - `QUORATE_BACKENDS`: names, separated by commas;
//! - `QUORATE_EXTERNAL`: the URL of a server to use instead of one that is started;
//! - `QUORATE_SERVERS`: `process` or `docker`, how servers are started; in containers `QUORATE_VALKEY` puts Valkey for Redis;
//! - `QUORATE_TOPOLOGY`: `single`, `cluster` or `sentinel`, what is started;
//! - `QUORATE_SECURED`: servers with TLS, for a user with the least rights;
//! - `QUORATE_SHARE`: only one in so many cases of the contract;
//! - `QUORATE_RESULTS`: a file to which every outcome is written.
//!
//! On clusters and secured servers the cases that break servers are left out.

use std::{
    fs::File,
    io::Write as _,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};

use libtest_mimic::{Arguments, Failed, Trial};
use quorate_conformance::{Case, Outcome, limit, recipe_cases, run_case, waist_cases};
use quorate_integration_tests::{
    SiteCase, actor, commit, gray, heartbeats, jitter, leaders, outage, process, registry,
    site::{BACKENDS, Site, SiteClients, Topology},
};
use tokio::runtime::{Handle, Runtime};

/// A site, or why there is none.
type Start = Result<Arc<Site>, String>;

/// Where outcomes are written for whoever started this run.
#[derive(Clone)]
struct Results(Option<Arc<Mutex<File>>>);

impl Results {
    fn note(&self, backend: &str, case: &str, outcome: &Result<Outcome, String>) {
        let Some(file) = &self.0 else { return };
        let (word, text) = match outcome {
            Ok(Outcome::Passed) => ("passed", ""),
            Ok(Outcome::Refused(why)) => ("refused", why.as_str()),
            Err(why) => ("failed", why.as_str()),
        };
        let line = format!("{backend}\t{case}\t{word}\t{}\n", text.replace(['\n', '\t'], " "));
        file.lock().expect("no poison").write_all(line.as_bytes()).expect("the results can be written");
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Cases wait for leases more than they compute: more at once than there are cores.
    arguments.test_threads = arguments.test_threads.or(Some(8));
    actor::BINARY.set(env!("CARGO_BIN_EXE_quorate-actor")).expect("set here only");
    let runtime = Runtime::new().expect("a runtime starts");
    let results = std::env::var_os("QUORATE_RESULTS")
        .map(|path| Arc::new(Mutex::new(File::create(path).expect("the file for the results can be made"))));
    let results = Results(results);
    let starts = runtime.block_on(sites());
    let mut trials = Vec::new();
    for (backend, start) in &starts {
        trials.extend(contract(&runtime, &results, backend, start));
        trials.extend(site_cases(&runtime, &results, backend, start));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(starts);
    runtime.shutdown_timeout(Duration::from_secs(5));
    if conclusion.has_failed() || conclusion.num_passed == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn sites() -> Vec<(&'static str, Start)> {
    if let Ok(url) = std::env::var("QUORATE_EXTERNAL") {
        let site = Site::external(&url).expect("QUORATE_EXTERNAL is a URL of a backend");
        return vec![(site.backend, Ok(Arc::new(site)))];
    }
    let chosen = std::env::var("QUORATE_BACKENDS").unwrap_or_else(|_| BACKENDS.join(","));
    let chosen = BACKENDS.into_iter().filter(|b| chosen.split(',').any(|c| c == *b));
    let topology = Topology::chosen();
    let plain = !secured() && topology == Topology::Single;
    let chosen: Vec<_> = chosen.filter(|b| plain || *b != "memory").collect();
    let starts = chosen.into_iter().map(|b| async move {
        let start = match topology {
            Topology::Single if secured() => Site::start_secured(b).await,
            Topology::Single => Site::start(b).await,
            _ => Site::start_cluster(b, topology).await,
        };
        (b, start.map(Arc::new))
    });
    futures_util::future::join_all(starts).await
}

fn secured() -> bool {
    std::env::var_os("QUORATE_SECURED").is_some()
}

/// On Consul every agent keeps records of its own: of two registrations with one id at two agents the newer one is found, but
/// the earlier is not told of it, as the docs of the backend say.
const TWINS: [&str; 3] = [
    "of_two_with_one_id_the_newer_is_found_and_the_other_is_told",
    "when_the_newer_of_two_with_one_id_dies_the_older_takes_over",
    "a_displaced_registration_leaves_the_record_alone_after_the_loss_of_its_session",
];

fn contract(runtime: &Runtime, results: &Results, backend: &'static str, start: &Start) -> Vec<Trial> {
    let share = std::env::var("QUORATE_SHARE").map_or(1, |share| share.parse().expect("QUORATE_SHARE is a number"));
    let cases = waist_cases().into_iter().chain(recipe_cases()).step_by(share);
    cases
        .map(|case: Case| {
            let (handle, results, start) = (runtime.handle().clone(), results.clone(), start.clone());
            trial(handle, results, backend, &format!("{}/{}", case.group, case.name), async move {
                let site = start?;
                let twins = site.backend == "consul" && TWINS.contains(&case.name);
                let clients = if twins { SiteClients::of_one_server(&site) } else { SiteClients::new(&site) };
                let limit = limit(&*clients).await.map_err(|e| e.to_string())?;
                run_case(case, clients, limit).await
            })
        })
        .collect()
}

/// Cases that break processes, servers or the way to them: on memory, which has neither processes nor servers, only
/// those that break the way, and those that break a server not on one that is somebody else's, a cluster, or secured.
fn site_cases(runtime: &Runtime, results: &Results, backend: &'static str, start: &Start) -> Vec<Trial> {
    let memory = backend == "memory";
    let external = !memory && (secured() || start.as_ref().is_ok_and(|site| !site.is_ours()));
    let outages = match memory || external {
        true => Vec::new(),
        false => [outage::cases(), registry::cases(), commit::restarts::cases(), leaders::outage::cases()].concat(),
    };
    let processes = match memory {
        true => Vec::new(),
        false => [process::cases(), heartbeats::cases(), leaders::cases(), commit::kills::cases()].concat(),
    };
    let ways = if external { Vec::new() } else { gray::cases() };
    let proxies = if memory || external { Vec::new() } else { jitter::cases() };
    let shared = [processes, ways, proxies].concat();
    let cases = shared.into_iter().map(|c| (c, false)).chain(outages.into_iter().map(|c| (c, true)));
    cases
        .map(|(case, own_server): (SiteCase, bool)| {
            let (handle, results, start) = (runtime.handle().clone(), results.clone(), start.clone());
            trial(handle, results, backend, &format!("{}/{}", case.group, case.name), async move {
                let shared = start?;
                let site = if own_server { Arc::new(Site::start(backend).await?) } else { shared };
                let run = tokio::spawn((case.run)(site));
                match tokio::time::timeout(Duration::from_secs(150), run).await {
                    Ok(Ok(outcome)) => Ok(outcome),
                    Ok(Err(panic)) => Err(panic.to_string()),
                    Err(_) => Err("it did not end within 150 s".to_owned()),
                }
            })
        })
        .collect()
}

fn trial(
    handle: Handle,
    results: Results,
    backend: &'static str,
    name: &str,
    work: impl Future<Output = Result<Outcome, String>> + Send + 'static,
) -> Trial {
    let case = name.to_owned();
    Trial::test(format!("{backend}/{name}"), move || {
        let outcome = handle.block_on(work);
        results.note(backend, &case, &outcome);
        outcome.map(|_| ()).map_err(Failed::from)
    })
}
