//! `cargo xtask bench`.

use crate::{
    Backend, BenchArgs,
    run::{self, Outcome, cargo, must},
};

pub(crate) fn bench(args: &BenchArgs) -> Outcome {
    run::install(args.no_install)?;
    let names: Vec<_> = Backend::chosen(&args.backend).iter().map(|b| b.name()).collect();
    let mut command = cargo(&["run", "--release", "-p", "quorate-benches", "--", &names.join(",")]);
    must("benches, each backend beside its raw client in the same run", &mut command)
}
