//! A process of the bank that is kept running, however often it dies.
//!
//! Promise: it dies of SIGKILL and of nothing else, and what it wrote before is read to the end.

use std::{
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
};

use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    sync::Notify,
    task::JoinHandle,
};

use super::run::Record;

/// How a process of the bank is started.
#[derive(Debug, Clone)]
pub struct Program {
    /// The teller's binary.
    pub path: PathBuf,
    /// Its arguments; no secrets.
    pub args: Vec<String>,
}

/// Keeps one process running.
#[derive(Debug)]
pub struct Keeper {
    kill: Arc<Notify>,
    last: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Starts the process; what it writes goes to the record.
    pub fn start(program: Program, record: Arc<Mutex<Record>>) -> Self {
        let (kill, last) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let task = tokio::spawn(keep(program, record, kill.clone(), last.clone()));
        Self { kill, last, task }
    }

    /// Kills it; it is started again.
    pub fn kill(&self) {
        self.kill.notify_one();
    }

    /// Kills it for the last time, and returns when everything that it wrote is in the record.
    ///
    /// # Panics
    /// If it could not be kept running.
    pub async fn end(self) {
        self.last.notify_one();
        self.task.await.expect("the keeper does not panic");
    }
}

async fn keep(program: Program, record: Arc<Mutex<Record>>, kill: Arc<Notify>, last: Arc<Notify>) {
    let mut over = false;
    while !over {
        let mut child = Command::new(&program.path)
            .args(&program.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the teller's binary starts");
        // It ends with us, whatever becomes of us. Taken, because waiting for the child would close it.
        let _input = child.stdin.take();
        let reading = read(&mut child, record.clone());
        let by_us = tokio::select! {
            _ = child.wait() => false,
            () = kill.notified() => true,
            () = last.notified() => {
                over = true;
                true
            }
        };
        if by_us {
            child.start_kill().expect("a child can be killed");
        }
        let end = child.wait().await.expect("a child can be waited for");
        reading.await.expect("the reader does not panic");
        let mut record = record.lock().expect("no poison");
        match end.signal() == Some(Signal::KILL.as_raw()) {
            true if by_us => record.kills += 1,
            true => record.deaths += 1,
            false => record.wrong.push(format!("a process ended by itself: {end}")),
        }
        over |= record.wrong.len() > 10;
    }
}

fn read(child: &mut Child, record: Arc<Mutex<Record>>) -> JoinHandle<()> {
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    tokio::spawn(async move {
        while let Some(line) = lines.next_line().await.expect("the pipe is readable") {
            record.lock().expect("no poison").note(&line);
        }
    })
}
