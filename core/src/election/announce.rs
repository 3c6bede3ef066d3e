//! Telling observers who leads.
//!
//! Promise: the record is only ever written by who leads at that moment, as the store sees it; each leadership's values
//! appear in the order in which they were announced, also if a request is delayed on its way and lands late. What could
//! not be written is tried again for as long as the leadership lasts.
//!
//! Every write stands under two conditions: the leader's ticket stands, and the record is still as the leader knows it.
//! The first fences former leaders off, the second a late request of the leader itself.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch::{Receiver, Sender},
    time::sleep,
};

use super::record;
use crate::{
    backend::{Check, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::{Key, KeyRange},
    line::Fence,
    session::{Hold, SessionCore},
};

/// How often one announcement is attempted before its caller is told of the failure.
const ATTEMPTS: usize = 4;
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A value to announce, with its number: a later one replaces an earlier one that was not written yet.
type Wanted = (u64, Arc<str>);
/// The number of the last announcement that was attempted, and what became of it.
type Told = (u64, Result<()>);

/// A leader's way to its observers.
pub(super) struct Announcer {
    wanted: Sender<Wanted>,
    told: Receiver<Told>,
}

impl Announcer {
    /// Announces the first value in the background, and later ones when asked, until the hold ends.
    pub(super) fn start(core: &Arc<SessionCore>, hold: &Arc<Hold>, key: Key, value: Arc<str>) -> Self {
        let (wanted, wishes) = tokio::sync::watch::channel((1, value));
        let (outcomes, told) = tokio::sync::watch::channel((0, Ok(())));
        let teller = Teller { core: core.clone(), hold: hold.clone(), key, known: Known::Absent };
        tokio::spawn(teller.tell(wishes, outcomes));
        Self { wanted, told }
    }

    /// Returns once this value, or a later one, was written; `None` if the hold ended before.
    pub(super) async fn announce(&self, value: &str) -> Option<Result<()>> {
        let mut number = 0;
        self.wanted.send_modify(|wanted| {
            number = wanted.0 + 1;
            *wanted = (number, value.into());
        });
        let mut told = self.told.clone();
        let told = told.wait_for(|told| told.0 >= number).await.ok()?;
        Some(told.1.clone())
    }
}

/// What the leader knows of the record.
#[derive(Clone, Copy)]
enum Known {
    /// It does not exist. Also the first guess: a leader that went has taken it along.
    Absent,
    At(Revision),
    /// A write of ours may have happened, or somebody else wrote or deleted it.
    Unsure,
}

struct Teller {
    core: Arc<SessionCore>,
    hold: Arc<Hold>,
    key: Key,
    known: Known,
}

impl Teller {
    async fn tell(mut self, mut wishes: Receiver<Wanted>, outcomes: Sender<Told>) {
        let (core, hold) = (self.core.clone(), self.hold.clone());
        let working = async {
            let mut pause = Duration::from_millis(20);
            loop {
                let (number, value) = wishes.borrow_and_update().clone();
                let outcome = self.write(&value).await;
                let again = outcome.as_ref().is_err_and(|error| worth_repeating(error.kind()));
                if let Err(error) = &outcome {
                    tracing::warn!(key = %self.key, %error, again, "observers do not know yet who leads");
                }
                let _replaced = outcomes.send_replace((number, outcome));
                let wished = if again {
                    let paused = sleep(pause.mul_f64(rand::random_range(0.5..1.5)));
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    tokio::select! {
                        wished = wishes.changed() => wished,
                        () = paused => Ok(()),
                    }
                } else {
                    pause = Duration::from_millis(20);
                    wishes.changed().await
                };
                if wished.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = hold.ended() => {}
            () = core.over() => {}
            () = working => {}
        }
    }

    async fn write(&mut self, value: &str) -> Result<()> {
        let bytes = record::record(self.hold.token, &self.core.owner, value);
        let fence = Fence::new(self.hold.ticket.clone(), self.hold.token);
        let mut failed = None;
        for _ in 0..ATTEMPTS {
            let as_known = match self.known {
                Known::Absent => Check::Absent(self.key.clone()),
                Known::At(modified) => Check::Unchanged { key: self.key.clone(), modified },
                Known::Unsure => match self.core.backend.read(&KeyRange::One(self.key.clone())).await?.entries.pop() {
                    Some(entry) if entry.value == bytes => {
                        self.known = Known::At(entry.modified);
                        return Ok(());
                    }
                    Some(entry) => Check::Unchanged { key: self.key.clone(), modified: entry.modified },
                    None => Check::Absent(self.key.clone()),
                },
            };
            let lease = Some(self.core.lease.clone());
            let put = Write::Put { key: self.key.clone(), value: bytes.clone(), lease };
            let txn = Txn { checks: vec![fence.check(), as_known], writes: vec![put] };
            // Also if this is dropped half-way, the next one looks first.
            self.known = Known::Unsure;
            match self.core.backend.commit(&txn).await {
                Ok(commit) if commit.applied => {
                    self.known = Known::At(commit.revision);
                    return Ok(());
                }
                Ok(commit) if commit.culprit == Some(0) => {
                    self.core.watch_now(&self.hold);
                    let message = "refused: the leader's ticket is gone";
                    return Err(self.error(ErrorKind::SessionLost, message));
                }
                Ok(_) => {}
                Err(error) if worth_repeating(error.kind()) => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(failed.unwrap_or_else(|| self.error(ErrorKind::Backend, "the record changes all the time")))
    }

    fn error(&self, kind: ErrorKind, message: &str) -> Error {
        Error::new(kind, "announce", message).key(&self.key).on(self.core.backend.profile().backend)
    }
}

fn worth_repeating(kind: ErrorKind) -> bool {
    !matches!(kind, ErrorKind::SessionLost | ErrorKind::InvalidInput | ErrorKind::Unsupported)
}
