//! What is missing on this machine, and how to get it.
//!
//! - [`missing`] looks and changes nothing.
//! - [`install`] brings what is missing with apt-get, as root on Debian; anywhere else it refuses and says
//!   exactly what to install. It may be run again and again, and no package starts a service.
//! - [`python_venv`] brings Python packages into a folder of their own.
//!
//! No host is named here: Consul, which left Debian after bullseye, comes from the archive that this
//! machine is configured for already.

mod apt;
mod python;

use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};

pub use apt::install;
pub use python::{Python, python_venv};

use crate::servers::Error;

/// Something that the tests need from the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// What was looked for: a program, or a file.
    pub what: &'static str,
    /// The Debian packages that bring it.
    pub packages: &'static [&'static str],
    /// What to know beside the names of the packages.
    pub note: &'static str,
}

impl Missing {
    /// Whether this machine has it.
    pub fn is_present(&self) -> bool {
        is_present(self)
    }

    /// What to do about it, for a person.
    pub fn how(&self) -> String {
        let mut how = format!("install the Debian package {}", self.packages.join(" "));
        if !self.note.is_empty() {
            write!(how, " ({})", self.note).expect("writing to a String cannot fail");
        }
        how
    }
}

const fn program(what: &'static str, packages: &'static [&'static str]) -> Missing {
    Missing { what, packages, note: "" }
}

pub(crate) const ETCD: Missing = program("etcd", &["etcd-server"]);
pub(crate) const ETCDCTL: Missing = program("etcdctl", &["etcd-client"]);
pub(crate) const REDIS: Missing = program("redis-server", &["redis-server"]);
const SENTINEL: Missing = program("redis-sentinel", &["redis-sentinel"]);
pub(crate) const CONSUL: Missing = Missing {
    what: "consul",
    packages: &["consul"],
    note: "in Debian up to bullseye; on a newer release from a bullseye source pinned to this one package",
};
/// Asks Consul's DNS, as any other host would.
const DIG: Missing = program("dig", &["bind9-dnsutils"]);
pub(crate) const JAVA: Missing = program("java", &["default-jre-headless"]);
const ZOOKEEPER: Missing = program("/usr/share/java/zookeeper.jar", &["zookeeper"]);
const LOGGER: Missing = program("/usr/share/java/slf4j-simple.jar", &["libslf4j-java"]);
const NETTY: Missing = program("/usr/share/java/netty-codec.jar", &["libnetty-java"]);
const PROTOC: Missing = program("protoc", &["protobuf-compiler"]);
const PROTOS: Missing = program("/usr/include/google/protobuf/timestamp.proto", &["libprotobuf-dev"]);

/// Debian keeps the programs of each version in a folder of its own, outside of `PATH`.
pub(crate) const PSQL_SERVER: Missing = program("postgres", &["postgresql"]);

const CURATOR: Missing = program("/usr/share/java/curator-recipes.jar", &["libcurator-recipes-java"]);
const JAVAC: Missing = program("javac", &["default-jdk-headless"]);
pub(crate) const PYTHON: Missing = program("python3", &["python3", "python3-venv"]);
const VENV: Missing =
    Missing { what: "ensurepip", packages: &["python3-venv"], note: "a module of python3; pip does as well" };

const DOCKER: Missing = program("docker", &["docker.io"]);
const DOCKERD: Missing = program("dockerd", &["docker.io"]);
const IPTABLES: Missing = program("iptables", &["iptables"]);
const DEBOOTSTRAP: Missing = program("debootstrap", &["debootstrap"]);

const ALL: [Missing; 17] = [
    ETCD,
    ETCDCTL,
    REDIS,
    SENTINEL,
    CONSUL,
    DIG,
    JAVA,
    ZOOKEEPER,
    LOGGER,
    NETTY,
    PROTOC,
    PROTOS,
    CURATOR,
    JAVAC,
    PYTHON,
    VENV,
    PSQL_SERVER,
];

/// What the servers and the build need and this machine lacks. Empty means that all tests can run.
pub fn missing() -> Vec<Missing> {
    ALL.into_iter().filter(|item| !is_present(item)).collect()
}

/// What the build needs, and nothing that only runs need.
pub fn of_build() -> Vec<Missing> {
    vec![PROTOC, PROTOS]
}

/// What a Docker daemon needs that is started here, and images that are made here.
pub fn docker_daemon() -> Vec<Missing> {
    vec![DOCKER, DOCKERD, IPTABLES, DEBOOTSTRAP]
}

fn is_present(item: &Missing) -> bool {
    let by_variable = match item.what {
        // Where they were unpacked by hand, the build and the launchers are told by these.
        "protoc" => std::env::var_os("PROTOC").is_some(),
        _ if item == &PROTOS => std::env::var_os("PROTOC_INCLUDE").is_some(),
        _ if item == &ZOOKEEPER || item == &LOGGER || item == &NETTY => std::env::var_os(ZOOKEEPER_JARS).is_some(),
        // Debian's python3 comes without the means to install anything for it.
        _ if item == &VENV => return python::can_install(),
        _ if item == &PSQL_SERVER => return postgres_programs().is_ok(),
        _ => false,
    };
    by_variable || find(item).is_ok()
}

/// The program's path.
pub(crate) fn find(item: &Missing) -> Result<PathBuf, Error> {
    let path = Path::new(item.what);
    let found = if path.is_absolute() { path.is_file().then(|| path.to_owned()) } else { in_path(path) };
    found.ok_or_else(|| Error::missing(path, &item.how()))
}

/// The first file of that name in `PATH`, or where Debian keeps servers that only root's `PATH` has.
pub(crate) fn in_path(name: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// The folder with `postgres` and `initdb`: of the newest version, where there are several.
pub(crate) fn postgres_programs() -> Result<PathBuf, Error> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<_> = versions.map(|version| version.path().join("bin")).collect();
    folders.sort_by_key(|folder| folder.parent().and_then(|v| v.file_name()?.to_str()?.parse::<u32>().ok()));
    let in_path = in_path(Path::new("postgres")).and_then(|program| Some(program.parent()?.to_owned()));
    let found = folders.into_iter().rev().chain(in_path).find(|bin| bin.join("initdb").is_file());
    found.ok_or_else(|| Error::missing("postgres", &PSQL_SERVER.how()))
}

/// A class path of jars, separated by colons, for a ZooKeeper that was unpacked by hand.
const ZOOKEEPER_JARS: &str = "QUORATE_ZOOKEEPER_CLASSPATH";

pub(crate) fn zookeeper_class_path() -> Result<OsString, Error> {
    if let Some(jars) = std::env::var_os(ZOOKEEPER_JARS) {
        return Ok(jars);
    }
    let mut jars = vec![find(&ZOOKEEPER)?, find(&LOGGER)?];
    // Needed for TLS only, and not in the manifest of Debian's jar as the others are.
    let netty = ["codec", "resolver", "transport-native-unix-common"];
    jars.extend(netty.iter().map(|part| PathBuf::from(format!("/usr/share/java/netty-{part}.jar"))));
    std::env::join_paths(jars)
        .map_err(|e| Error::io("put the class path of ZooKeeper together", std::io::Error::other(e)))
}
