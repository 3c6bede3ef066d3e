//! `cargo xtask test`.

use std::collections::BTreeMap;

use quorate_testkit::install;

use crate::{
    Backend, Servers, TestArgs,
    binaries::{self, Binary},
    containers::Docker,
    run::{self, Outcome, cargo, headline, must, status},
    table::{self, Own, Row},
};

pub(crate) fn test(args: &TestArgs) -> Outcome {
    if args.servers == Servers::Docker {
        return in_containers(args);
    }
    run::install(args.no_install)?;
    if args.clusters {
        let backends = with_servers(&args.backend)?;
        return settled(&binaries::build()?, cluster_passes(&backends, &[]), args.case.as_deref());
    }
    let backends = match &args.external {
        Some(url) => vec![Backend::of_url(url).ok_or("--external needs a URL such as etcd://host:2379/namespace")?],
        None => Backend::chosen(&args.backend),
    };
    let everything = args.case.is_none() && args.external.is_none() && !args.secured;
    let binaries = binaries::build()?;
    let mut own = BTreeMap::new();
    if everything {
        if args.backend.is_empty() {
            shared_tests(&binaries)?;
        }
        for backend in &backends {
            headline(&format!("the own unit and server tests of {}", backend.name()));
            own.insert(backend.name().to_owned(), own_tests(&binaries, &package(*backend))?);
        }
    }
    let suite = find(&binaries, SUITE)?;
    let mut tables = Vec::new();
    for pass in passes(args, &backends, everything) {
        let mut rows = conformance(suite, &pass, &pass.backends, args.case.as_deref(), false)?;
        settle(suite, &pass, &mut rows)?;
        for (name, passed) in own.iter().filter(|_| pass.is_plain()) {
            rows.entry(name.clone()).or_insert_with(Row::default).own = Some(*passed);
        }
        tables.push((pass, rows));
    }
    let bank = !everything || !args.backend.is_empty() || bank(&binaries)?;
    told(&tables)?;
    if bank { Ok(()) } else { Err("the bank over several backends failed; see above".to_owned()) }
}

/// The conformance suite on servers in containers, the blows at clusters of them, and the tests of what starts containers for
/// users.
fn in_containers(args: &TestArgs) -> Outcome {
    run::install_these(&install::of_build(), args.no_install)?;
    let backends = with_servers(&args.backend)?;
    let everything = args.case.is_none() && args.backend.is_empty() && !args.clusters;
    let mut servers: Vec<_> = backends.iter().map(|b| b.name()).collect();
    if everything {
        servers.push("valkey");
    }
    let docker = Docker::start(&servers, args.no_install)?;
    let binaries = binaries::build()?;
    let mut environment = vec![("QUORATE_SERVERS".to_owned(), "docker".to_owned())];
    environment.extend(docker.environment());
    if args.clusters {
        return settled(&binaries, cluster_passes(&backends, &environment), args.case.as_deref());
    }
    let mut passes = Vec::new();
    if everything {
        for binary in binaries.iter().filter(|binary| is_for_users(binary)) {
            let mut command = binary.command();
            command.envs(docker.environment());
            must(&format!("{} of {}", binary.target, binary.package), &mut command)?;
        }
        // Two at a time, as many servers as there are.
        let mut command = find(&binaries, BLOWS)?.command();
        command.envs(environment.clone()).args(["--nocapture", "--test-threads=2"]);
        must("clusters in containers, whose servers are killed, frozen, cut off and restarted", &mut command)?;
        let mut environment = environment.clone();
        environment.push(("QUORATE_VALKEY".to_owned(), "1".to_owned()));
        environment.push(("QUORATE_SHARE".to_owned(), SHARE.to_owned()));
        passes.push(Pass { title: "the same on Valkey, one in three", backends: vec![Backend::Redis], environment });
    }
    passes.insert(0, Pass { title: "conformance cases on real servers in containers", backends, environment });
    settled(&binaries, passes, args.case.as_deref())
}

/// Those of the chosen backends that have servers.
fn with_servers(chosen: &[Backend]) -> Outcome<Vec<Backend>> {
    let mut backends = Backend::chosen(chosen);
    backends.retain(|backend| *backend != Backend::Memory);
    if backends.is_empty() {
        return Err("memory has no server that could be in a container or in a cluster".to_owned());
    }
    Ok(backends)
}

fn cluster_passes(backends: &[Backend], environment: &[(String, String)]) -> Vec<Pass> {
    let pass = |title, topology: &str, backends| {
        let mut environment = environment.to_vec();
        environment.push(("QUORATE_TOPOLOGY".to_owned(), topology.to_owned()));
        Pass { title, backends, environment }
    };
    let mut passes =
        vec![pass("conformance cases on clusters; redis is a Redis Cluster", "cluster", backends.to_vec())];
    if backends.contains(&Backend::Redis) {
        passes.push(pass("conformance cases on Redis with Sentinels", "sentinel", vec![Backend::Redis]));
    }
    passes
}

/// Runs the conformance cases of these passes, and shows a table for each.
fn settled(binaries: &[Binary], passes: Vec<Pass>, case: Option<&str>) -> Outcome {
    let suite = find(binaries, SUITE)?;
    let mut tables = Vec::new();
    for pass in passes {
        let mut rows = conformance(suite, &pass, &pass.backends, case, false)?;
        settle(suite, &pass, &mut rows)?;
        tables.push((pass, rows));
    }
    told(&tables)
}

/// Prints a table for each pass.
fn told(tables: &[(Pass, BTreeMap<String, Row>)]) -> Outcome {
    let mut good = true;
    for (pass, rows) in tables {
        println!("\n{}", pass.title);
        let names: Vec<_> = pass.backends.iter().map(|b| b.name()).collect();
        good &= table::print(&names, rows);
    }
    if good { Ok(()) } else { Err("not everything passed; see the tables".to_owned()) }
}

/// One run of the conformance cases.
struct Pass {
    title: &'static str,
    backends: Vec<Backend>,
    /// By environment, not by argument: a URL may hold a password, and arguments are public.
    environment: Vec<(String, String)>,
}

impl Pass {
    fn is_plain(&self) -> bool {
        self.environment.is_empty()
    }
}

/// One case in so many is enough to use every right, or every command, when all cases run elsewhere anyway.
const SHARE: &str = "3";

fn passes(args: &TestArgs, backends: &[Backend], everything: bool) -> Vec<Pass> {
    let mut passes = Vec::new();
    if !args.secured {
        let environment = args.external.iter().map(|url| ("QUORATE_EXTERNAL".to_owned(), url.clone())).collect();
        passes.push(Pass { title: "conformance cases on real servers", backends: backends.to_vec(), environment });
    }
    let servers: Vec<_> = backends.iter().copied().filter(|backend| *backend != Backend::Memory).collect();
    if (everything || args.secured) && !servers.is_empty() {
        let mut environment = vec![("QUORATE_SECURED".to_owned(), "1".to_owned())];
        if everything {
            environment.push(("QUORATE_SHARE".to_owned(), SHARE.to_owned()));
        }
        let title = "the same over TLS, for a user with the least rights";
        passes.push(Pass { title, backends: servers, environment });
    }
    passes
}

/// Transactions that span backends. Never run again: a wrong total is no accident.
fn bank(binaries: &[Binary]) -> Outcome<bool> {
    headline("a bank over several backends, everybody killed at random");
    find(binaries, BANK)?.passes(&[])
}

fn package(backend: Backend) -> String {
    format!("quorate-{}", backend.name())
}

/// The program with the cases that run on every backend.
const SUITE: (&str, &str) = ("quorate-integration-tests", "conformance");

/// The program that strikes clusters.
const BLOWS: (&str, &str) = ("quorate-integration-tests", "clusters");

/// Whether it holds tests of containers for users, which need a Docker daemon.
fn is_for_users(binary: &Binary) -> bool {
    binary.package == "quorate-testcontainers" && binary.target != "unit tests"
}

/// The program with the bank that spans backends.
const BANK: (&str, &str) = ("quorate-integration-tests", "bank");

fn find<'a>(binaries: &'a [Binary], which: (&str, &str)) -> Outcome<&'a Binary> {
    let found = binaries.iter().find(|b| (b.package.as_str(), b.target.as_str()) == which);
    found.ok_or_else(|| format!("{} of {} was not built", which.1, which.0))
}

/// What belongs to no backend, the documentation's examples of all, and the examples that need no server.
fn shared_tests(binaries: &[Binary]) -> Outcome {
    headline("tests of what all backends share");
    let of_backends: Vec<_> = Backend::ALL.into_iter().map(package).collect();
    let later = |binary: &Binary| {
        [SUITE, BANK].contains(&(binary.package.as_str(), binary.target.as_str())) || is_for_users(binary)
    };
    for binary in binaries.iter().filter(|b| !b.is_example && !of_backends.contains(&b.package)) {
        if !later(binary) && run_twice(binary)? == Own::Failed {
            return Err(format!("tests of {} failed: {}", binary.package, binary.target));
        }
    }
    must("doc tests", &mut cargo(&["test", "--quiet", "--workspace", "--doc"]))?;
    for which in [("quorate", "tour"), ("quorate", "transfer"), ("quorate-tower", "grpc")] {
        must(&format!("example {}", which.1), &mut find(binaries, which)?.command())?;
    }
    Ok(())
}

fn own_tests(binaries: &[Binary], package: &str) -> Outcome<Own> {
    let mut own = Own::Passed;
    for binary in binaries.iter().filter(|b| !b.is_example && b.package == package) {
        match run_twice(binary)? {
            Own::Passed => {}
            Own::PassedAlone => own = Own::PassedAlone,
            Own::Failed => return Ok(Own::Failed),
        }
    }
    Ok(own)
}

/// Timing tests of real servers can fail because the machine stood still. A program that failed gets one more run, its
/// tests one after another, and the output says so.
fn run_twice(binary: &Binary) -> Outcome<Own> {
    if binary.passes(&[])? {
        return Ok(Own::Passed);
    }
    headline(&format!("something failed; {} {} once more, one after another", binary.package, binary.target));
    Ok(if binary.passes(&["--test-threads=1"])? { Own::PassedAlone } else { Own::Failed })
}

/// Runs cases that failed among all others once more alone, if there are few: many failures are no accident.
fn settle(suite: &Binary, pass: &Pass, rows: &mut BTreeMap<String, Row>) -> Outcome {
    for backend in &pass.backends {
        let Some(row) = rows.get_mut(backend.name()).filter(|row| row.failed.len() <= 3) else { continue };
        for case in std::mem::take(&mut row.failed) {
            headline(&format!("{}/{case} failed; once more, alone", backend.name()));
            let again = conformance(suite, pass, &[*backend], Some(&case), true)?;
            let passed = again.get(backend.name()).is_some_and(|row| row.failed.is_empty());
            if passed { row.shaky.push(case) } else { row.failed.push(case) }
        }
        row.passed += row.shaky.len();
    }
    Ok(())
}

fn conformance(
    suite: &Binary,
    pass: &Pass,
    backends: &[Backend],
    case: Option<&str>,
    exact: bool,
) -> Outcome<BTreeMap<String, Row>> {
    headline(pass.title);
    // Not there yet if CARGO_TARGET_DIR points elsewhere.
    let folder = run::root().join("target");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{} cannot be made: {e}", folder.display()))?;
    let results = folder.join(format!("conformance-{}.tsv", std::process::id()));
    let names: Vec<_> = backends.iter().map(|b| b.name()).collect();
    let mut command = suite.command();
    command.env("QUORATE_RESULTS", &results).env("QUORATE_BACKENDS", names.join(",")).env("QUORATE_SERVERS", "process");
    command.envs(pass.environment.iter().map(|(name, value)| (name, value)));
    match case {
        Some(case) if exact => {
            // All of them are there to choose from.
            command.env_remove("QUORATE_SHARE").args(["--exact", &format!("{}/{case}", names.join(","))])
        }
        Some(case) => command.arg(case),
        None => &mut command,
    };
    let finished = status(&mut command)?;
    let rows = table::read(&results);
    let _ = std::fs::remove_file(&results);
    let rows = rows?;
    if !finished.success() && rows.values().all(|row| row.failed.is_empty()) {
        return Err(format!("the conformance run broke off: {finished}"));
    }
    Ok(rows)
}
