//! `cargo xtask test`.

use std::collections::BTreeMap;

use crate::{
    Backend, TestArgs,
    run::{self, Outcome, cargo, headline, must, status},
    table::{self, Row},
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
            must("the facade's unit and doc tests, and its examples", &mut cargo(&["test", "-p", "quorate"]))?;
        }
        for backend in &backends {
            let package = format!("quorate-{}", backend.name());
            headline(&format!("the own unit, doc and server tests of {}", backend.name()));
            let passed = status(&mut cargo(&["test", "-p", &package]))?.success();
            own.insert(backend.name().to_owned(), passed);
        }
    }
    let mut rows = conformance(args, &backends)?;
    for (name, passed) in own {
        rows.entry(name).or_insert_with(Row::default).own = Some(passed);
    }
    let names: Vec<_> = backends.iter().map(|b| b.name()).collect();
    if table::print(&names, &rows) { Ok(()) } else { Err("not everything passed; see the table".to_owned()) }
}

fn conformance(args: &TestArgs, backends: &[Backend]) -> Outcome<BTreeMap<String, Row>> {
    headline("conformance cases on real servers");
    let results = run::root().join("target").join(format!("conformance-{}.tsv", std::process::id()));
    let names: Vec<_> = backends.iter().map(|b| b.name()).collect();
    let mut command = cargo(&["test", "-p", "quorate-integration-tests", "--test", "conformance", "--"]);
    command.env("QUORATE_RESULTS", &results).env("QUORATE_BACKENDS", names.join(","));
    if let Some(url) = &args.external {
        // By environment, not by argument: a URL may hold a password, and arguments are public.
        command.env("QUORATE_EXTERNAL", url);
    }
    if let Some(case) = &args.case {
        command.arg(case);
    }
    let finished = status(&mut command)?;
    let rows = table::read(&results);
    let _ = std::fs::remove_file(&results);
    let rows = rows?;
    if !finished.success() && rows.values().all(|row| row.failed.is_empty()) {
        return Err(format!("the conformance run broke off: {finished}"));
    }
    Ok(rows)
}
