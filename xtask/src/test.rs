//! `cargo xtask test`.

use std::collections::BTreeMap;

use crate::{
    Backend, TestArgs,
    run::{self, Outcome, cargo, headline, must, status},
    table::{self, Own, Row},
};

pub(crate) fn test(args: &TestArgs) -> Outcome {
    run::install(args.no_install)?;
    let backends = match &args.external {
        Some(url) => vec![Backend::of_url(url).ok_or("--external needs a URL such as etcd://host:2379/namespace")?],
        None => Backend::chosen(&args.backend),
    };
    let everything = args.case.is_none() && args.external.is_none();
    let mut own = BTreeMap::new();
    if everything {
        if args.backend.is_empty() {
            let shared = ["-p", "quorate-core", "-p", "quorate-conformance", "-p", "quorate-testkit", "-p", "xtask"];
            // Not --all-targets, which builds the examples as tests: some tests run them as programs.
            must("unit and doc tests of what all backends share", cargo(&["test"]).args(shared))?;
            must("participants over gRPC, on real servers", &mut cargo(&["test", "-p", "quorate-grpc"]))?;
            must("the facade's unit and doc tests, and its examples", &mut cargo(&["test", "-p", "quorate"]))?;
        }
        for backend in &backends {
            let package = format!("quorate-{}", backend.name());
            headline(&format!("the own unit, doc and server tests of {}", backend.name()));
            own.insert(backend.name().to_owned(), own_tests(&package)?);
        }
    }
    let mut rows = conformance(&backends, args.external.as_deref(), args.case.as_deref(), false)?;
    settle(args, &backends, &mut rows)?;
    for (name, passed) in own {
        rows.entry(name).or_insert_with(Row::default).own = Some(passed);
    }
    let names: Vec<_> = backends.iter().map(|b| b.name()).collect();
    if table::print(&names, &rows) { Ok(()) } else { Err("not everything passed; see the table".to_owned()) }
}

/// Timing tests of real servers can fail because the machine stood still. They get one more run, one after
/// another, and the table says so.
fn own_tests(package: &str) -> Outcome<Own> {
    if status(&mut cargo(&["test", "-p", package, "--no-fail-fast"]))?.success() {
        return Ok(Own::Passed);
    }
    headline(&format!("something failed; the tests of {package} once more, one after another"));
    let again = status(&mut cargo(&["test", "-p", package, "--no-fail-fast", "--", "--test-threads=1"]))?;
    Ok(if again.success() { Own::PassedAlone } else { Own::Failed })
}

/// Runs cases that failed among all others once more alone, if there are few: many failures are no accident.
fn settle(args: &TestArgs, backends: &[Backend], rows: &mut BTreeMap<String, Row>) -> Outcome {
    for backend in backends {
        let Some(row) = rows.get_mut(backend.name()).filter(|row| row.failed.len() <= 3) else { continue };
        for case in std::mem::take(&mut row.failed) {
            headline(&format!("{}/{case} failed; once more, alone", backend.name()));
            let again = conformance(&[*backend], args.external.as_deref(), Some(&case), true)?;
            let passed = again.get(backend.name()).is_some_and(|row| row.failed.is_empty());
            if passed { row.shaky.push(case) } else { row.failed.push(case) }
        }
        row.passed += row.shaky.len();
    }
    Ok(())
}

fn conformance(
    backends: &[Backend],
    external: Option<&str>,
    case: Option<&str>,
    exact: bool,
) -> Outcome<BTreeMap<String, Row>> {
    headline("conformance cases on real servers");
    // Not there yet if CARGO_TARGET_DIR points elsewhere.
    let folder = run::root().join("target");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{} cannot be made: {e}", folder.display()))?;
    let results = folder.join(format!("conformance-{}.tsv", std::process::id()));
    let names: Vec<_> = backends.iter().map(|b| b.name()).collect();
    let mut command = cargo(&["test", "-p", "quorate-integration-tests", "--test", "conformance", "--"]);
    command.env("QUORATE_RESULTS", &results).env("QUORATE_BACKENDS", names.join(","));
    if let Some(url) = external {
        // By environment, not by argument: a URL may hold a password, and arguments are public.
        command.env("QUORATE_EXTERNAL", url);
    }
    match case {
        Some(case) if exact => command.args(["--exact", &format!("{}/{case}", names.join(","))]),
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
