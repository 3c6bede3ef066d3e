//! The bank over two backends at a time, with everybody killed at random: `bank/etcd_and_redis`.
//!
//! By environment: `QUORATE_BANK_SECONDS`, how long transfers are made in each run.

use std::{process::ExitCode, time::Duration};

use libtest_mimic::{Arguments, Failed, Trial};
use quorate_integration_tests::bank::run::{Plan, run};
use tokio::runtime::Runtime;

const RUNS: [[&str; 2]; 2] = [["etcd", "redis"], ["consul", "zookeeper"]];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each run has more processes than there are cores.
    arguments.test_threads = Some(1);
    let seconds = std::env::var("QUORATE_BANK_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
    let length = Duration::from_secs(seconds.unwrap_or(20));
    let trials = RUNS.map(|backends| {
        let program = env!("CARGO_BIN_EXE_quorate-teller").into();
        let plan = Plan { backends: backends.to_vec(), length, program };
        Trial::test(format!("bank/{}", backends.join("_and_")), move || {
            let runtime = Runtime::new().expect("a runtime starts");
            let figures = runtime.block_on(run(&plan)).map_err(Failed::from)?;
            println!("{figures}");
            Ok(())
        })
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}
