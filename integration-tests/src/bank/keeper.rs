//! A process of the bank that is kept running, however often it dies.
//!
//! Promise: it dies of SIGKILL and of nothing else, and what it wrote before is read to the end.

use std::{
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    sync::mpsc,
    task::JoinHandle,
    time::sleep,
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

/// What is done to a process.
#[derive(Debug, Clone, Copy)]
enum Harm {
    /// Killed, and started again.
    Kill,
    /// Stopped for so long, and continued.
    Stop(Duration),
    /// Killed for the last time.
    End,
}

/// Keeps one process running.
#[derive(Debug)]
pub struct Keeper {
    harm: mpsc::Sender<Harm>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Starts the process; what it writes goes to the record.
    pub fn start(program: Program, record: Arc<Mutex<Record>>) -> Self {
        let (harm, orders) = mpsc::channel(1);
        let task = tokio::spawn(keep(program, record, orders));
        Self { harm, task }
    }

    /// Kills it, unless it is being harmed already; it is started again.
    pub fn kill(&self) {
        // Full: something is being done to it.
        let _ = self.harm.try_send(Harm::Kill);
    }

    /// Stops it for so long, unless it is being harmed already: it goes on with what it was about to do.
    pub fn stop(&self, time: Duration) {
        let _ = self.harm.try_send(Harm::Stop(time));
    }

    /// Kills it for the last time, and returns when everything that it wrote is in the record.
    ///
    /// # Panics
    /// If it could not be kept running.
    pub async fn end(self) {
        // Refused only if the keeper has given up already.
        let _ = self.harm.send(Harm::End).await;
        self.task.await.expect("the keeper does not panic");
    }
}

async fn keep(program: Program, record: Arc<Mutex<Record>>, mut orders: mpsc::Receiver<Harm>) {
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
        let by_us = loop {
            let order = tokio::select! {
                _ = child.wait() => break false,
                order = orders.recv() => order.unwrap_or(Harm::End),
            };
            match order {
                Harm::Stop(time) => {
                    signal(&child, Signal::STOP);
                    sleep(time).await;
                    signal(&child, Signal::CONT);
                    record.lock().expect("no poison").stops += 1;
                }
                Harm::Kill => break true,
                Harm::End => {
                    over = true;
                    break true;
                }
            }
        };
        if by_us {
            // It may have died a moment ago.
            let _ = child.start_kill();
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

/// A child that has not been waited for keeps its number, even if it is dead.
fn signal(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    if let Some(pid) = pid {
        kill_process(pid, signal).expect("a child can be signalled");
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
