//! What a process does to itself in the middle of a transaction.
//!
//! Promise: a process that is killed does nothing after the step, and one that is stopped does not go on before it is
//! continued. Neither can catch the signal.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use quorate::{
    Error, Result,
    commit::{Branch, Finish, Participant, Step, TxId, Vote},
};
use rustix::process::{Signal, getpid, kill_process};
use tokio::time::Instant;

/// Sends this process a signal that it cannot catch, when it comes to a step for the n-th time.
#[derive(Clone)]
pub struct Fate {
    step: String,
    nth: usize,
    signal: Signal,
    met: Arc<AtomicUsize>,
}

impl Fate {
    /// By three words: the first word of a [`Step`], or `ask` right before a participant prepares, or `vote` between that and
    /// its vote; a number; `kill` or `stop`.
    ///
    /// # Errors
    /// `InvalidInput` for other words.
    pub fn of(words: &[&str]) -> Result<Self> {
        let wrong = || Error::invalid("fate", format!("{words:?} is not a step, a number, and kill or stop"));
        let [step, nth, signal] = words else { return Err(wrong()) };
        let signal = match *signal {
            "kill" => Signal::KILL,
            "stop" => Signal::STOP,
            _ => return Err(wrong()),
        };
        let nth = nth.parse().map_err(|_| wrong())?;
        Ok(Self { step: (*step).to_owned(), nth, signal, met: Arc::default() })
    }

    /// The hook for [`TransactionsOptions::on_step`](quorate::commit::TransactionsOptions::on_step).
    pub fn hook(&self) -> impl Fn(TxId, Step) -> BoxFuture<'static, ()> + Send + Sync + 'static {
        let fate = self.clone();
        move |_, step| {
            let fate = fate.clone();
            Box::pin(async move {
                let step = step.to_string();
                fate.meet(step.split(' ').next().expect("every text has a first part"));
            })
        }
    }

    fn meet(&self, step: &str) {
        if step == self.step && self.met.fetch_add(1, Ordering::AcqRel) + 1 == self.nth {
            kill_process(getpid(), self.signal).expect("a process may signal itself");
            // A stop reaches the threads one after another: this one does not go on before. It does not yield either: what
            // it was about to do is the first that it does when it is continued.
            let until = Instant::now() + Duration::from_millis(100);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    }
}

impl fmt::Debug for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fate({} {} {:?})", self.step, self.nth, self.signal)
    }
}

/// A participant whose process meets its fate before it prepares, or between that and its vote.
#[derive(Debug)]
pub struct Doomed<P> {
    /// What it does otherwise.
    pub inner: P,
    /// Its fate, at the steps `ask` and `vote`.
    pub fate: Fate,
}

#[async_trait]
impl<P: Participant> Participant for Doomed<P> {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        self.fate.meet("ask");
        let vote = self.inner.prepare(branch).await;
        self.fate.meet("vote");
        vote
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        self.inner.commit(branch).await
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.inner.abort(branch).await
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        self.inner.in_doubt(group).await
    }
}
