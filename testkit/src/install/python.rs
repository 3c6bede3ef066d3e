//! Python packages in a folder of their own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{PYTHON, find};
use crate::servers::Error;

/// A Python that finds the packages asked for.
#[derive(Debug, Clone)]
pub struct Python {
    program: PathBuf,
    /// Set as `PYTHONPATH` where a virtual environment could not be made.
    packages: Option<PathBuf>,
}

impl Python {
    /// A command that runs this Python.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(packages) = &self.packages {
            command.env("PYTHONPATH", packages);
        }
        command
    }

    /// The interpreter.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// What must be in `PYTHONPATH` when it is run without [`Python::command`].
    pub fn python_path(&self) -> Option<&Path> {
        self.packages.as_deref()
    }

    fn imports(&self, modules: &[&str]) -> bool {
        let code = format!("import {}", modules.join(", "));
        let run = self.command().args(["-c", &code]).output();
        run.is_ok_and(|output| output.status.success())
    }
}

/// A Python that can import `modules`, which are also the names pip knows them by, such as `kazoo`. They are
/// installed into `dir` unless they are there already: into a virtual environment, or where this Python
/// cannot make one (Debian without python3-venv) into a plain folder.
///
/// # Errors
///
/// [`Error::MissingProgram`] without `python3`; [`Error::Command`] when pip failed both ways.
pub fn python_venv(dir: &Path, modules: &[&str]) -> Result<Python, Error> {
    let system = find(&PYTHON)?;
    let venv = Python { program: dir.join("venv/bin/python"), packages: None };
    let folder = Python { program: system.clone(), packages: Some(dir.join("packages")) };
    if venv.imports(modules) {
        return Ok(venv);
    }
    if folder.packages.as_deref().is_some_and(Path::is_dir) && folder.imports(modules) {
        return Ok(folder);
    }
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    let make = [OsString::from("-m"), "venv".into(), "--clear".into(), dir.join("venv").into()];
    let first = run(Command::new(&system).args(make)).and_then(|()| run(venv.command().args(pip).args(modules)));
    let first = match first {
        Ok(()) => return Ok(venv),
        Err(error) => error,
    };
    let target = dir.join("packages");
    run(Command::new(&system).args(pip).arg("--target").arg(target).args(modules)).map_err(|second| {
        Error::Command {
            command: format!("pip install {}", modules.join(" ")),
            output: format!("{second}; before that: {first}; the Debian package python3-venv may help"),
        }
    })?;
    Ok(folder)
}

/// Whether `python3` has what [`python_venv`] needs, one way or the other.
pub(super) fn can_install() -> bool {
    let code = "import importlib.util as u; raise SystemExit(not any(map(u.find_spec, ['ensurepip', 'pip'])))";
    find(&PYTHON).is_ok_and(|python| Command::new(python).args(["-c", code]).status().is_ok_and(|s| s.success()))
}

fn run(command: &mut Command) -> Result<(), Error> {
    let name = format!("{command:?}");
    let output = command.output().map_err(|e| Error::io(format!("run {name}"), e))?;
    if output.status.success() {
        return Ok(());
    }
    let (out, err) = (&output.stdout, &output.stderr);
    Err(Error::Command {
        command: name,
        output: String::from_utf8_lossy(if err.is_empty() { out } else { err }).trim().to_owned(),
    })
}
