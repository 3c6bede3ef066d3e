//! The test programs of the workspace, built once.
//!
//! Promise: what runs here is what `cargo test --workspace` would run, in the same folders, without a build of the
//! dependencies for each package's own choice of features.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::run::{Outcome, cargo, headline, status};

/// One test program, or an example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binary {
    pub(crate) package: String,
    /// `unit tests`, or the name of an integration test or of an example.
    pub(crate) target: String,
    pub(crate) is_example: bool,
    executable: PathBuf,
    folder: PathBuf,
}

impl Binary {
    /// The command that runs it as cargo would.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.executable);
        command.current_dir(&self.folder).env("CARGO_MANIFEST_DIR", &self.folder);
        command
    }

    /// Runs it; `true` if all its tests passed.
    pub(crate) fn passes(&self, args: &[&str]) -> Outcome<bool> {
        println!("\n   {} {}", self.package, self.target);
        Ok(status(self.command().arg("--quiet").args(args))?.success())
    }
}

/// Builds every test program of the workspace, and every example.
pub(crate) fn build() -> Outcome<Vec<Binary>> {
    headline("build of all tests");
    // Not --all-targets, which builds the examples as tests: some tests run them as programs.
    let mut command = cargo(&["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = command.stderr(Stdio::inherit()).output().map_err(|e| format!("cargo did not start: {e}"))?;
    if !output.status.success() {
        return Err(format!("the tests do not build: {}", output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let found: Vec<_> = text.lines().filter_map(binary).collect();
    if found.is_empty() { Err("cargo named no test program".to_owned()) } else { Ok(found) }
}

/// The test program that a line of cargo's messages names.
fn binary(line: &str) -> Option<Binary> {
    let message: Value = serde_json::from_str(line).ok()?;
    let executable = message["executable"].as_str()?;
    let is = |kinds: &[&str]| {
        let kind = message["target"]["kind"].as_array().into_iter().flatten().filter_map(Value::as_str);
        kind.into_iter().any(|kind| kinds.contains(&kind))
    };
    let (is_test, is_example) = (message["profile"]["test"] == true, is(&["example"]));
    if is_test == is_example {
        return None;
    }
    let target = if is(&["lib", "bin"]) { "unit tests" } else { message["target"]["name"].as_str()? };
    Some(Binary {
        package: package(message["package_id"].as_str()?)?,
        target: target.to_owned(),
        is_example,
        executable: executable.into(),
        folder: Path::new(message["manifest_path"].as_str()?).parent()?.into(),
    })
}

/// The name in `path+file:///somewhere/name#0.1.0` or `path+file:///somewhere#name@0.1.0`.
fn package(id: &str) -> Option<String> {
    let (place, rest) = id.rsplit_once('#')?;
    let name = rest.split_once('@').map_or_else(|| place.rsplit('/').next(), |(name, _)| Some(name))?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_by_its_id() {
        assert_eq!(package("path+file:///a/quorate-x#0.1.0").as_deref(), Some("quorate-x"));
        assert_eq!(package("path+file:///a/core#quorate-core@0.1.0").as_deref(), Some("quorate-core"));
        assert_eq!(package("nonsense"), None);
    }

    #[test]
    fn only_test_programs_and_examples_count() {
        let line = |kind: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///a/core#quorate-core@0.1.0",
                "manifest_path":"/a/core/Cargo.toml","target":{{"kind":["{kind}"],"name":"hash"}},
                "profile":{{"test":{test}}},"executable":{executable}}}"#
            )
            .replace('\n', "")
        };
        let found = binary(&line("test", true, "\"/t/hash-1\"")).expect("a test program");
        assert_eq!((found.package.as_str(), found.target.as_str()), ("quorate-core", "hash"));
        assert_eq!(found.folder, Path::new("/a/core"));
        assert_eq!(binary(&line("lib", true, "null")), None, "a library is none");
        assert!(binary(&line("example", false, "\"/t/tour\"")).is_some_and(|example| example.is_example));
        assert_eq!(binary(&line("bin", false, "\"/t/xtask\"")), None, "a program is none");
        assert_eq!(binary("no json"), None);
    }
}
