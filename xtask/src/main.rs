//! The commands of the repository.
//!
//! Promise: `cargo xtask test` brings a fresh machine to a table of what passed on every backend, by itself as
//! root on Debian 12, and says exactly what to install everywhere else; whatever it started is stopped when it
//! ends, also by Ctrl-C or a kill.

mod bench;
mod binaries;
mod check;
mod containers;
mod run;
mod table;
mod test;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The commands of the quorate repository")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing, start servers, run every test, show a table.
    Test(TestArgs),
    /// Measure each backend against its raw client, and print ratios.
    Bench(BenchArgs),
    /// Format, lints, docs, every feature alone, the MSRV, and the dependency rules.
    Check,
    /// Install what the tests need and is missing, and nothing else.
    Install,
    /// Run a command with a Docker daemon and the servers' images: without one, bring the images and no more.
    Docker(DockerArgs),
}

/// Options of `cargo xtask test`.
#[derive(Args)]
struct TestArgs {
    /// Only this backend; may be given more than once.
    #[arg(long, value_name = "NAME")]
    backend: Vec<Backend>,
    /// Only conformance cases whose name contains this text; nothing else is run.
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,
    /// Install nothing; say what is missing.
    #[arg(long)]
    no_install: bool,
    /// Only the conformance cases, over TLS and for a user with the least rights; all of them, where a whole run takes one in
    /// three.
    #[arg(long, conflicts_with = "external")]
    secured: bool,
    /// Run the conformance cases on this server instead of one that is started here.
    #[arg(long, value_name = "URL")]
    external: Option<String>,
    /// Only the conformance cases, on clusters: three servers of etcd, Consul and ZooKeeper, a Redis Cluster, and Redis with
    /// Sentinels.
    #[arg(long, conflicts_with_all = ["external", "secured"])]
    clusters: bool,
    /// How servers are started. In containers only the conformance suite is run, on every backend that has a server, the
    /// blows at clusters, and what starts containers for users.
    #[arg(long, value_enum, default_value_t = Servers::Process, conflicts_with = "external")]
    servers: Servers,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Servers {
    Process,
    Docker,
}

/// Options of `cargo xtask docker`.
#[derive(Args)]
struct DockerArgs {
    /// Only this server's image; may be given more than once.
    #[arg(long, value_name = "NAME")]
    server: Vec<String>,
    /// Install nothing; say what is missing.
    #[arg(long)]
    no_install: bool,
    /// What to run, after `--`: it finds DOCKER_HOST and the images' names in its environment.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Options of `cargo xtask bench`.
#[derive(Args)]
struct BenchArgs {
    /// Only this backend; may be given more than once.
    #[arg(long, value_name = "NAME")]
    backend: Vec<Backend>,
    /// Install nothing; say what is missing.
    #[arg(long)]
    no_install: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Memory,
    Etcd,
    Redis,
    Consul,
    Zookeeper,
}

impl Backend {
    const ALL: [Self; 5] = [Self::Memory, Self::Etcd, Self::Redis, Self::Consul, Self::Zookeeper];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Etcd => "etcd",
            Self::Redis => "redis",
            Self::Consul => "consul",
            Self::Zookeeper => "zookeeper",
        }
    }

    /// The backend of a URL's scheme.
    fn of_url(url: &str) -> Option<Self> {
        let scheme = url.split("://").next()?.split('+').next()?;
        Self::ALL.into_iter().find(|b| b.name() == scheme || scheme.strip_suffix('s') == Some(b.name()))
    }

    fn chosen(given: &[Self]) -> Vec<Self> {
        if given.is_empty() { Self::ALL.to_vec() } else { given.to_vec() }
    }
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Test(args) => test::test(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Check => check::check(),
        Command::Install => run::install(false),
        Command::Docker(args) => containers::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("\nerror: {message}");
            ExitCode::FAILURE
        }
    }
}
