//! Each backend beside its raw client, in the same run, as ratios.
//!
//! Promise: every figure is taken from a real server that this run has started, beside the raw client's figure for
//! the same work on the same server, in alternating blocks of a fraction of a second; what is compared with a target
//! is the ratio. A missed target is a result and not a failure; a server that is missing, a call that fails and a
//! lock that is granted twice are failures, and end the run with an error.
//!
//! ```text
//! cargo xtask bench                                       # installs what is missing, then everything, about 4 minutes
//! cargo run --release -p quorate-benches -- etcd,redis    # two of the backends
//! cargo run --release -p quorate-benches -- memory        # what needs no server: quorate itself, and the balancers
//! cargo run --release -p quorate-benches -- --quick       # everything in about a minute, rougher
//! ```
//!
//! # Why not criterion
//! criterion measures one function after another and compares with an earlier run of the same one. Here the question
//! is what a lock costs above its client, and a machine drifts by more than that between two runs, and between two
//! minutes of one. So the two sides take turns, in the order A B B A that also takes a steady drift out. Three of
//! the four measures are not the time of a function anyhow: a rate of many tasks, a rate of hand-offs, and a time
//! between two clients. Times are kept in HDR histograms, to three digits.

#![cfg_attr(
    not(all(feature = "memory", feature = "etcd", feature = "redis", feature = "consul", feature = "zookeeper")),
    allow(dead_code, reason = "some parts are of use to the backends only that were left out")
)]

#[cfg(feature = "memory")]
mod balance;
#[cfg(feature = "memory")]
mod memory;
mod report;
mod samples;
#[cfg(any(feature = "etcd", feature = "redis", feature = "consul", feature = "zookeeper"))]
mod servers;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use crate::{report::Report, samples::Budget};

/// What went wrong, in a sentence for the person at the terminal.
type Outcome<T = ()> = Result<T, String>;

#[derive(Parser)]
#[command(name = "quorate-benches", about = "Measures each backend against its raw client, and prints ratios")]
struct Cli {
    /// The backends, in this order; all if none is named.
    #[arg(value_delimiter = ',')]
    backends: Vec<Backend>,
    /// A fifth of the time: rougher figures.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Memory,
    Etcd,
    Redis,
    Consul,
    Zookeeper,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cfg!(debug_assertions) {
        eprintln!(
            "error: the dev profile is several times slower than what users run; measure with `cargo run --release`"
        );
        return ExitCode::FAILURE;
    }
    let backends = if cli.backends.is_empty() { Backend::value_variants().to_vec() } else { cli.backends };
    let budget = if cli.quick { Budget::quick() } else { Budget::full() };
    report::headline(&budget);
    let mut failed = false;
    for backend in backends {
        match measure(backend, budget) {
            Ok(reports) => reports.iter().for_each(|report| print!("{report}")),
            Err(message) => {
                eprintln!("\nerror: {message}");
                failed = true;
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn measure(backend: Backend, budget: Budget) -> Outcome<Vec<Report>> {
    match backend {
        #[cfg(feature = "memory")]
        Backend::Memory => Ok(vec![memory::measure(budget)?, balance::measure(budget)?]),
        #[cfg(feature = "etcd")]
        Backend::Etcd => Ok(vec![servers::measure(&servers::Etcd, budget)?]),
        #[cfg(feature = "redis")]
        Backend::Redis => Ok(vec![servers::measure(&servers::Redis, budget)?]),
        #[cfg(feature = "consul")]
        Backend::Consul => Ok(vec![servers::measure(&servers::Consul, budget)?]),
        #[cfg(feature = "zookeeper")]
        Backend::Zookeeper => Ok(vec![servers::measure(&servers::ZooKeeper, budget)?]),
        #[allow(unreachable_patterns, reason = "with every feature there is nothing left")]
        other => {
            let name = other.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            Err(format!("{name} is not compiled in; add `--features {name}`"))
        }
    }
}
