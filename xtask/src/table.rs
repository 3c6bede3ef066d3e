//! The table at the end of a test run.
//!
//! Promise: a row that did not run says so; no row counts as passed because nothing was run.

use std::{collections::BTreeMap, fs, path::Path};

use crate::run::Outcome;

/// What became of the cases of one backend.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) passed: usize,
    pub(crate) failed: Vec<String>,
    pub(crate) refused: Vec<String>,
    /// Cases that failed among all others and passed alone.
    pub(crate) shaky: Vec<String>,
    /// Outcome of the backend's own tests; `None` if they were not run.
    pub(crate) own: Option<Own>,
}

/// What became of a backend's own tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    Passed,
    /// Something failed, and nothing did when they were run again one after another.
    PassedAlone,
    Failed,
}

/// Reads the results that the conformance run writes: `backend<TAB>case<TAB>passed|failed|refused<TAB>text`.
pub(crate) fn read(file: &Path) -> Outcome<BTreeMap<String, Row>> {
    let text = fs::read_to_string(file).map_err(|e| format!("the run left no results: {e}"))?;
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for line in text.lines() {
        let mut parts = line.splitn(4, '\t');
        let (Some(backend), Some(case), Some(outcome)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(format!("a line of the results is malformed: {line:?}"));
        };
        let row = rows.entry(backend.to_owned()).or_default();
        match outcome {
            "passed" => row.passed += 1,
            "failed" => row.failed.push(case.to_owned()),
            "refused" => row.refused.push(format!("{case}: {}", parts.next().unwrap_or_default())),
            _ => return Err(format!("an unknown outcome in the results: {line:?}")),
        }
    }
    Ok(rows)
}

/// Prints the table; `true` if nothing failed and every expected row ran.
pub(crate) fn print(expected: &[&str], rows: &BTreeMap<String, Row>) -> bool {
    println!("\n{:<12} {:>7} {:>7} {:>20}   own tests", "backend", "passed", "failed", "refused as declared");
    let mut good = true;
    for name in expected {
        let Some(row) = rows.get(*name) else {
            println!("{name:<12} {:>7}", "did not run");
            good = false;
            continue;
        };
        let own = match row.own {
            None => "not run",
            Some(Own::Passed) => "passed",
            Some(Own::PassedAlone) => "passed, but only one after another",
            Some(Own::Failed) => "FAILED",
        };
        println!("{name:<12} {:>7} {:>7} {:>20}   {own}", row.passed, row.failed.len(), row.refused.len());
        good &= row.failed.is_empty() && row.own != Some(Own::Failed) && row.passed > 0;
    }
    for (name, row) in rows {
        for case in &row.failed {
            println!("   FAILED   {name}/{case}");
        }
        for case in &row.shaky {
            println!("   SHAKY    {name}/{case}: failed among others, passed alone");
        }
        for case in &row.refused {
            println!("   refused  {name}/{case}");
        }
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Outcome<BTreeMap<String, Row>> {
        let file = std::env::temp_dir().join(format!("quorate-table-{}-{}", std::process::id(), text.len()));
        fs::write(&file, text).expect("the temporary folder is writable");
        let rows = read(&file);
        fs::remove_file(&file).expect("just written");
        rows
    }

    #[test]
    fn a_backend_without_results_is_no_success() {
        let rows = rows("etcd\tlock/a\tpassed\t\n").expect("well formed");
        assert!(print(&["etcd"], &rows));
        assert!(!print(&["etcd", "redis"], &rows));
    }

    #[test]
    fn a_failure_is_named_and_counts() {
        let rows = rows("etcd\tlock/a\tpassed\t\netcd\tlock/b\tfailed\twhy\n").expect("well formed");
        assert_eq!(rows["etcd"].failed, ["lock/b"]);
        assert!(!print(&["etcd"], &rows));
    }

    #[test]
    fn malformed_results_are_an_error() {
        assert!(rows("etcd\n").is_err());
        assert!(rows("etcd\tcase\tmaybe\t").is_err());
    }
}
