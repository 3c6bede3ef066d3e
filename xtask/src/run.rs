//! Running other programs, and installing what they need.

use std::{
    path::PathBuf,
    process::{Command, ExitStatus},
};

use quorate_testkit::install::{self, Missing};

/// What went wrong, in a sentence for the person at the terminal.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// The repository's folder.
pub(crate) fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from("xtask"), PathBuf::from);
    manifest.parent().map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// A `cargo` command in the repository's folder.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(args).current_dir(root());
    command
}

/// Runs a command to its end, its output going to ours.
pub(crate) fn status(command: &mut Command) -> Outcome<ExitStatus> {
    command.status().map_err(|e| format!("{} did not start: {e}", command.get_program().display()))
}

/// Runs a command that must succeed.
pub(crate) fn must(what: &str, command: &mut Command) -> Outcome {
    headline(what);
    let status = status(command)?;
    if status.success() { Ok(()) } else { Err(format!("{what}: {status}")) }
}

pub(crate) fn headline(what: &str) {
    println!("\n── {what}");
}

/// Whether a program can be started.
pub(crate) fn has(program: &str, arg: &str) -> bool {
    let quiet = std::process::Stdio::null;
    Command::new(program).arg(arg).stdout(quiet()).stderr(quiet()).status().is_ok_and(|s| s.success())
}

/// Installs what is missing, or only says what is.
pub(crate) fn install(only_say: bool) -> Outcome {
    install_these(&install::missing(), only_say)
}

/// The same for these, if they are missing.
pub(crate) fn install_these(wanted: &[Missing], only_say: bool) -> Outcome {
    let missing: Vec<_> = wanted.iter().copied().filter(|item| !item.is_present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    headline("installing what is missing");
    for item in &missing {
        println!("   {}: {}", item.what, item.how());
    }
    if only_say {
        return Err("something is missing (see above) and --no-install was given".to_owned());
    }
    install::install(&missing).map_err(|e| e.to_string())
}
