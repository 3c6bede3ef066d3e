//! Debian packages, without a service being started and without a host being named.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{CONSUL, Missing, in_path};
use crate::servers::Error;

/// The last Debian release with Consul.
const CONSUL_SUITE: &str = "bullseye";

/// Installs what `wanted` names, if it is still missing. Only the packages that bring it are asked for.
///
/// Blocks for up to minutes. Works for root on Debian only; otherwise nothing is changed.
///
/// # Errors
///
/// [`Error::Unsupported`] when this is not root on Debian, with the exact list to install by hand;
/// [`Error::Command`] when apt-get failed, or when something is missing although it succeeded.
pub fn install(wanted: &[Missing]) -> Result<(), Error> {
    let wanted: Vec<Missing> = wanted.iter().copied().filter(|item| !item.is_present()).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() || in_path(Path::new("apt-get")).is_none() {
        return Err(by_hand(&wanted));
    }
    let _quiet = NoServices::enforce()?;
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    if wanted.contains(&CONSUL) && !has_candidate("consul")? {
        add_consul_source()?;
        run(Command::new("apt-get").args(["update", "-qq"]))?;
    }
    let mut packages: Vec<&str> = wanted.iter().flat_map(|item| item.packages.iter().copied()).collect();
    packages.sort_unstable();
    packages.dedup();
    run(Command::new("apt-get")
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(["-o", "Dpkg::Use-Pty=0"])
        .args(&packages)
        .env("DEBIAN_FRONTEND", "noninteractive"))?;
    let still: Vec<Missing> = wanted.into_iter().filter(|item| !item.is_present()).collect();
    if still.is_empty() {
        Ok(())
    } else {
        let names: Vec<&str> = still.iter().map(|item| item.what).collect();
        Err(Error::Command {
            command: format!("apt-get install {}", packages.join(" ")),
            output: format!("it succeeded, yet these are still missing: {}", names.join(", ")),
        })
    }
}

fn by_hand(wanted: &[Missing]) -> Error {
    let mut reason = "packages are installed only by root on Debian; install these by hand:".to_owned();
    for item in wanted {
        reason.push_str(&format!("\n  {}: {}", item.what, item.how()));
    }
    if wanted.contains(&CONSUL) {
        let any = Archive { uri: "(the one of your own Debian source)".to_owned(), signed_by: None };
        reason.push_str(&format!(
            "\nconsul on a newer Debian: {} with\n{}and {} with\n{}then apt-get update && apt-get install consul",
            source_path(),
            any.stanza(CONSUL_SUITE),
            pin_path(),
            pin_to_consul(CONSUL_SUITE),
        ));
    }
    Error::Unsupported { server: "install".to_owned(), reason }
}

fn source_path() -> String {
    format!("/etc/apt/sources.list.d/quorate-{CONSUL_SUITE}.sources")
}

fn pin_path() -> String {
    format!("/etc/apt/preferences.d/quorate-{CONSUL_SUITE}")
}

/// While it lives, package scripts start no service. Gone with it, unless the machine had such a rule.
struct NoServices {
    made: Option<PathBuf>,
}

impl NoServices {
    fn enforce() -> Result<Self, Error> {
        let path = PathBuf::from("/usr/sbin/policy-rc.d");
        if path.exists() {
            return Ok(Self { made: None });
        }
        let mut file = fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o755)
            .open(&path)
            .map_err(|e| Error::writing(&path, e))?;
        let rule = Self { made: Some(path.clone()) };
        file.write_all(b"#!/bin/sh\nexit 101\n").map_err(|e| Error::writing(&path, e))?;
        Ok(rule)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            drop(fs::remove_file(path));
        }
    }
}

fn run(command: &mut Command) -> Result<String, Error> {
    let name = format!("{command:?}");
    let output = command.output().map_err(|e| Error::io(format!("run {name}"), e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Command { command: name, output: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

fn has_candidate(package: &str) -> Result<bool, Error> {
    let policy = run(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"))?;
    Ok(policy.lines().filter_map(|line| line.trim().strip_prefix("Candidate: ")).any(|version| version != "(none)"))
}

/// A source of the older release beside the configured one, from which nothing but consul may come.
fn add_consul_source() -> Result<(), Error> {
    let release = read(Path::new("/etc/os-release"))?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"'))
        .unwrap_or_default();
    let source = configured_sources()?
        .iter()
        .find_map(|text| archive_of(text, codename))
        .ok_or_else(|| Error::Unsupported {
            server: "install consul".to_owned(),
            reason: format!(
                "no apt source of Debian {codename} is configured from which the one of {CONSUL_SUITE} could be derived; add one by hand"
            ),
        })?;
    // The pin first: without it, the older release would be a source of everything.
    write(Path::new(&pin_path()), &pin_to_consul(CONSUL_SUITE))?;
    write(Path::new(&source_path()), &source.stanza(CONSUL_SUITE))
}

fn configured_sources() -> Result<Vec<String>, Error> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    let dir = Path::new("/etc/apt/sources.list.d");
    for entry in fs::read_dir(dir).map_err(|e| Error::reading(dir, e))? {
        paths.push(entry.map_err(|e| Error::reading(dir, e))?.path());
    }
    paths.sort();
    paths
        .iter()
        .filter(|path| path.is_file())
        .filter(|path| path.extension().is_some_and(|ext| ext == "list" || ext == "sources"))
        .map(|path| read(path))
        .collect()
}

/// Where an apt source fetches from, and whose signature it trusts.
#[derive(Debug, PartialEq, Eq)]
struct Archive {
    uri: String,
    signed_by: Option<String>,
}

impl Archive {
    fn stanza(&self, suite: &str) -> String {
        let mut text = format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n", self.uri);
        if let Some(key) = &self.signed_by {
            text.push_str(&format!("Signed-By: {key}\n"));
        }
        text
    }
}

fn pin_to_consul(suite: &str) -> String {
    format!(
        "Package: *\nPin: release n={suite}\nPin-Priority: -1\n\nPackage: consul\nPin: release n={suite}\nPin-Priority: 500\n"
    )
}

/// The archive of the release itself, not of its security fixes, in either format of apt's sources.
fn archive_of(text: &str, codename: &str) -> Option<Archive> {
    let stanzas = text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let has =
            |name: &str, word: &str| field(name).is_some_and(|value| value.split_whitespace().any(|one| one == word));
        let enabled = field("Enabled") != Some("no");
        (enabled && has("Types", "deb") && has("Suites", codename)).then_some(())?;
        Some(Archive {
            uri: field("URIs")?.split_whitespace().next()?.to_owned(),
            signed_by: field("Signed-By").filter(|key| key.starts_with('/')).map(str::to_owned),
        })
    });
    stanzas.or_else(|| text.lines().find_map(|line| one_line(line, codename)))
}

/// `deb [signed-by=/path arch=amd64] URI SUITE COMPONENT...`
fn one_line(line: &str, codename: &str) -> Option<Archive> {
    let rest = line.trim().strip_prefix("deb")?;
    rest.starts_with([' ', '\t']).then_some(())?;
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    (words.next()? == codename).then_some(())?;
    Some(Archive {
        uri,
        signed_by: options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned),
    })
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|e| Error::reading(path, e))
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|e| Error::writing(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb\n# snapshot\nURIs: http://mirror.invalid/debian-security\nSuites: trixie-security\n\
        Signed-By: /usr/share/keyrings/s.gpg\n\nTypes: deb\nURIs: http://mirror.invalid/debian\n\
        Suites: trixie trixie-updates\nComponents: main\nSigned-By: /usr/share/keyrings/d.gpg\n";

    #[test]
    fn consul_source_is_derived_from_the_release_and_not_from_its_security_fixes() {
        let archive = archive_of(DEB822, "trixie").expect("it is configured");
        assert_eq!(archive.uri, "http://mirror.invalid/debian");
        assert_eq!(
            archive.stanza("bullseye"),
            "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bullseye\nComponents: main\n\
             Signed-By: /usr/share/keyrings/d.gpg\n"
        );
    }

    #[test]
    fn refusal_names_every_package_and_how_to_get_consul() {
        let text = by_hand(&[super::super::ETCD, CONSUL]).to_string();
        for part in ["etcd-server", "Suites: bullseye", "Pin-Priority: -1", "Package: consul"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn one_line_sources_are_read_with_and_without_options() {
        let plain = "deb-src http://x.invalid/a trixie main\ndeb http://x.invalid/b trixie main\n";
        let archive = archive_of(plain, "trixie").expect("it is configured");
        assert_eq!((archive.uri.as_str(), archive.signed_by), ("http://x.invalid/b", None));
        let signed = "deb [arch=amd64 signed-by=/k.gpg] http://x.invalid/c trixie main contrib";
        let archive = archive_of(signed, "trixie").expect("it is configured");
        assert_eq!(archive.uri, "http://x.invalid/c");
        assert_eq!(archive.signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn disabled_or_foreign_sources_are_passed_over() {
        let disabled = DEB822.replace("Types: deb\nURIs", "Enabled: no\nTypes: deb\nURIs");
        assert_eq!(archive_of(&disabled, "trixie"), None);
        assert_eq!(archive_of(DEB822, "sid"), None);
        assert_eq!(archive_of("# deb http://x.invalid/a trixie main", "trixie"), None);
    }
}
