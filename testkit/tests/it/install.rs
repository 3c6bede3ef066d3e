//! What the machine lacks, and Python packages in a folder of their own.

use quorate_testkit::install::{install, missing, python_venv};

use crate::common::Outcome;

#[test]
fn nothing_is_missing_where_these_tests_pass_and_installing_nothing_changes_nothing() -> Outcome {
    let missing = missing();
    let names: Vec<_> = missing.iter().map(|item| item.what).collect();
    assert!(missing.is_empty(), "missing: {names:?}");
    Ok(install(&missing)?)
}

#[test]
fn python_package_is_installed_once_and_found_again() -> Outcome {
    let dir = tempfile::tempdir()?;
    for _ in 0..2 {
        let python = python_venv(dir.path(), &["kazoo"])?;
        let code = "import kazoo; print(kazoo.__file__)";
        let output = python.command().args(["-c", code]).output()?;
        let file = String::from_utf8(output.stdout)?;
        assert!(file.starts_with(&dir.path().display().to_string()), "{file}");
    }
    Ok(())
}
