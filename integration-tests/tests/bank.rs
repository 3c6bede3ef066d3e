//! The bank over several backends at a time, with everybody killed at random: `bank/etcd_and_redis`.
//!
//! By environment: `QUORATE_BANK_SECONDS`, how long transfers are made in each run; `QUORATE_BANK_BACKENDS`, one run over
//! these instead (`redis,zookeeper,etcd,postgresql`: the log is on the first).

use std::{process::ExitCode, time::Duration};

use libtest_mimic::{Arguments, Failed, Trial};
use quorate_integration_tests::{
    bank::run::{Plan, VOID, run},
    site::BACKENDS,
};
use tokio::runtime::Runtime;

const RUNS: [[&str; 2]; 2] = [["etcd", "redis"], ["consul", "zookeeper"]];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each run has more processes than there are cores.
    arguments.test_threads = Some(1);
    let seconds = std::env::var("QUORATE_BANK_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
    let length = Duration::from_secs(seconds.unwrap_or(20));
    let trials = runs().into_iter().map(|(backends, book)| {
        let name = format!("bank/{}{}", backends.join("_and_"), if book { "_and_postgresql" } else { "" });
        let plan = Plan { backends, book, length, program: env!("CARGO_BIN_EXE_quorate-teller").into() };
        Trial::test(name, move || {
            let runtime = Runtime::new().expect("a runtime starts");
            let figures = runtime.block_on(async {
                match run(&plan).await {
                    // A machine that stood still; a wrong total is never tried again.
                    Err(why) if why.starts_with(VOID) => run(&plan).await,
                    outcome => outcome,
                }
            });
            let figures = figures.map_err(Failed::from)?;
            println!("{figures}");
            Ok(())
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Backends, and whether there is a book in PostgreSQL as well.
fn runs() -> Vec<(Vec<&'static str>, bool)> {
    let Ok(chosen) = std::env::var("QUORATE_BANK_BACKENDS") else {
        return RUNS.iter().enumerate().map(|(place, backends)| (backends.to_vec(), place == 0)).collect();
    };
    let known = |name: &str| BACKENDS.into_iter().find(|b| *b == name && *b != "memory");
    let (book, backends): (Vec<_>, Vec<_>) = chosen.split(',').partition(|name| *name == "postgresql");
    vec![(backends.into_iter().map(|name| known(name).expect("a backend with a server")).collect(), !book.is_empty())]
}
