//! `cargo xtask check`: everything that is not a test.

use serde_json::Value;

use crate::run::{self, Outcome, cargo, has, headline, must};

/// What is built for each feature alone, beside all together and none.
const FEATURES: [&str; 8] = ["memory", "etcd", "redis", "consul", "zookeeper", "grpc", "postgres", "tower"];

pub(crate) fn check() -> Outcome {
    run::install(false)?;
    must("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    let deny_warnings = ["--", "-D", "warnings"];
    must("lints", cargo(&["clippy", "--workspace", "--all-targets", "--features", "full"]).args(deny_warnings))?;
    let mut docs = cargo(&["doc", "--workspace", "--no-deps", "--features", "full"]);
    must("docs", docs.env("RUSTDOCFLAGS", "-D warnings"))?;
    must("no feature", &mut cargo(&["check", "-p", "quorate", "-p", "quorate-cli", "--no-default-features"]))?;
    for feature in FEATURES {
        let what = format!("feature {feature} alone");
        let mut clippy = cargo(&["clippy", "-p", "quorate", "--no-default-features", "--features", feature]);
        must(&what, clippy.args(deny_warnings))?;
    }
    light_default()?;
    msrv()?;
    if has("cargo-deny", "--version") {
        must("dependency rules", &mut cargo(&["deny", "--offline", "check", "licenses", "bans", "sources"]))?;
    } else {
        headline(
            "dependency rules: cargo-deny is not installed (cargo install cargo-deny --locked); only the heavy ones are checked",
        );
        heavy_dependencies()?;
    }
    Ok(())
}

/// The default features need no protoc, no OpenSSL, no Java: none of these crates may be in their tree.
fn light_default() -> Outcome {
    headline("the default features build without protoc, OpenSSL and Java");
    let tree = tree(&["-p", "quorate", "-e", "normal,build"])?;
    let heavy = [
        "etcd-client",
        "prost-build",
        "openssl-sys",
        "aws-lc-sys",
        "zookeeper-client",
        "redis",
        "hyper",
        "tokio-postgres",
        "tonic",
        "tower",
    ];
    match heavy.iter().find(|name| tree.lines().any(|line| line.split(' ').next() == Some(**name))) {
        Some(name) => Err(format!("the default features pull in {name}")),
        None => Ok(()),
    }
}

/// No dependency may ask for a newer Rust than we promise; clippy's `incompatible_msrv` does the same for the
/// standard library. Where that toolchain is installed, it builds everything as well.
fn msrv() -> Outcome {
    let manifest = std::fs::read_to_string(run::root().join("Cargo.toml")).map_err(|e| e.to_string())?;
    let promised = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = \"")?.strip_suffix('"'))
        .ok_or("Cargo.toml states no rust-version")?;
    headline(&format!("every dependency builds with Rust {promised}"));
    let output = cargo(&["metadata", "--format-version", "1"]).output().map_err(|e| e.to_string())?;
    let metadata: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata named no packages")?;
    let newer = newer_than(packages, promised);
    if newer.is_empty() { Ok(()) } else { Err(format!("these need a newer Rust than {promised}: {newer:?}")) }
}

/// The packages that say they need a newer Rust. Those that are only for other platforms count as well.
fn newer_than(packages: &[Value], promised: &str) -> Vec<String> {
    // 1.88 and 1.88.0 are the same.
    let number = |text: &str| {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
        [(); 3].map(|()| parts.next().unwrap_or_default())
    };
    let asks = |package: &Value| package["rust_version"].as_str().is_some_and(|r| number(r) > number(promised));
    let named = |package: &Value| format!("{} {}", package["name"], package["version"]).replace('"', "");
    packages.iter().filter(|package| asks(package)).map(named).collect()
}

/// The rules of deny.toml that matter most, without cargo-deny.
fn heavy_dependencies() -> Outcome {
    let tree = tree(&["--workspace", "-e", "normal,build", "--features", "full"])?;
    let mut names: Vec<_> = tree.lines().map(|l| l.split(" (").next().unwrap_or(l).trim()).collect();
    names.sort_unstable();
    names.dedup();
    for banned in ["ring", "openssl", "openssl-sys", "native-tls", "consulrs"] {
        if let Some(found) = names.iter().find(|n| n.split(' ').next() == Some(banned)) {
            return Err(format!("{found} is in the tree; deny.toml says why it must not be"));
        }
    }
    for once in ["tokio", "hyper", "http", "rustls", "tonic", "prost", "aws-lc-rs"] {
        let versions: Vec<_> = names.iter().filter(|n| n.split(' ').next() == Some(once)).collect();
        if versions.len() > 1 {
            return Err(format!("more than one version of {once}: {versions:?}"));
        }
    }
    Ok(())
}

fn tree(args: &[&str]) -> Outcome<String> {
    let mut command = cargo(&["tree", "--prefix", "none"]);
    let output = command.args(args).output().map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(format!("cargo tree failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_that_asks_for_a_newer_rust_is_named() {
        let packages = serde_json::json!([
            {"name": "old", "version": "1.0.0", "rust_version": "1.70"},
            {"name": "same", "version": "1.0.0", "rust_version": "1.88"},
            {"name": "same in full", "version": "1.0.0", "rust_version": "1.88.0"},
            {"name": "silent", "version": "1.0.0", "rust_version": null},
            {"name": "new", "version": "2.1.0", "rust_version": "1.88.1"},
            {"name": "newer", "version": "3.0.0", "rust_version": "1.100"},
        ]);
        let packages = packages.as_array().expect("a list");
        assert_eq!(newer_than(packages, "1.88"), ["new 2.1.0", "newer 3.0.0"]);
    }
}
