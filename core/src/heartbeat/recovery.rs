//! Recovery: an action for each dead peer, once across the group.
//!
//! Promise: see [`Recovery`].

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use futures_util::{
    future::BoxFuture,
    stream::{FuturesUnordered, StreamExt as _},
};
use tokio::{
    sync::broadcast::error::RecvError,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    Incarnation, PeerEvent, Shared, as_read,
    monitor::Task,
    put_txn,
    record::{Heard, Ledger, decode, encode},
};
use crate::{
    backend::{Check, Entry},
    error::{Error, ErrorKind, Result},
    key::{Dir, Key, KeyRange},
    lock::{Fence, Lock, LockGuard},
};

/// How many peers are recovered at a time by one monitor.
const AT_ONCE: usize = 16;
/// How long after a failure it is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// How often a recovery looks again when what it read has changed.
const ATTEMPTS: usize = 8;

/// A peer that has died.
#[derive(Debug, Clone)]
pub struct Death {
    /// Which peer.
    pub peer: String,
    /// Which run of it died. What earlier runs left behind belongs to this recovery too, if they were not recovered.
    pub incarnation: Incarnation,
    /// The hold under which the action runs. Writes that carry it are refused once somebody else has taken over.
    pub fence: Fence,
}

/// Runs an action for each dead peer, until it is dropped.
///
/// # What is promised
/// Every monitor of the group that has a recovery competes for the lock of the dead peer. The winner first **begins**:
/// in one transaction, fenced by the lock, it marks the peer's record as convicted and notes the recovery as pending. If the
/// peer has beaten since it was judged, nothing begins. Once it has begun, no beat of that incarnation is accepted any
/// more: a peer that was only slow finds out with its next beat, and beats again under a new incarnation.
///
/// Then the action runs, under [`LockGuard::protect`], and its completion is recorded, fenced by the lock. So the **start**
/// of the action is *at least once*: if the recoverer dies or loses the lock half-way, or the action fails, it is run
/// again, there or by the next in line, also if the peer has returned meanwhile. The **record of completion** is *exactly
/// once* per peer and incarnation, and after it the action is not run again. An action whose recoverer dies between its
/// last effect and the record runs again: make it repeatable, or fence its writes with [`Death::fence`].
///
/// A recovery of an incarnation stands for all earlier ones of that peer. A peer that leaves cleanly is not recovered.
#[derive(Debug)]
#[must_use = "it stops when dropped"]
pub struct Recovery {
    handle: JoinHandle<()>,
}

pub(super) type Action = Arc<dyn Fn(Death) -> BoxFuture<'static, Result<()>> + Send + Sync>;

impl Recovery {
    pub(super) fn start(monitor: Arc<Task>, action: Action) -> Self {
        // Subscribed before the first look, so that no death falls in between.
        let events = monitor.subscribe();
        let run = Run { work: Work { shared: monitor.shared.clone(), action }, monitor, todo: BTreeMap::new() };
        Self { handle: tokio::spawn(run.run(events)) }
    }
}

impl Drop for Recovery {
    /// An action under way is dropped at its current await; its lock is released in the background.
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// What is to be done for one peer.
#[derive(Debug, Clone, Copy)]
struct Todo {
    incarnation: Incarnation,
    /// The last beat that was seen of it, if this monitor has judged it.
    seq: Option<u64>,
    /// Not before.
    at: Instant,
    under_way: bool,
    done: bool,
}

/// The task.
struct Run {
    work: Work,
    monitor: Arc<Task>,
    /// One per peer; those that are done stay as long as the monitor knows the peer as dead.
    todo: BTreeMap<String, Todo>,
}

type Outcome = (String, Incarnation, Result<()>);

impl Run {
    async fn run(mut self, mut events: tokio::sync::broadcast::Receiver<PeerEvent>) {
        let mut working: FuturesUnordered<BoxFuture<'static, Outcome>> = FuturesUnordered::new();
        let mut look_for_pending = true;
        loop {
            if look_for_pending {
                look_for_pending = self.pending().await.is_err();
            }
            self.collect();
            let now = Instant::now();
            for (peer, todo) in &mut self.todo {
                if !todo.done && !todo.under_way && todo.at <= now && working.len() < AT_ONCE {
                    todo.under_way = true;
                    working.push(Box::pin(self.work.clone().recover(peer.clone(), todo.incarnation, todo.seq)));
                }
            }
            let waiting = self.todo.values().filter(|todo| !todo.done && !todo.under_way).map(|todo| todo.at).min();
            let again = if look_for_pending { Some(now + AGAIN) } else { waiting };
            tokio::select! {
                event = events.recv() => match event {
                    Err(RecvError::Closed) => return,
                    // Whatever it was: the monitor's table is what counts.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                },
                Some((peer, incarnation, outcome)) = working.next() => self.ended(&peer, incarnation, outcome),
                () = sleep_until(again.unwrap_or(now).max(now + Duration::from_millis(10))), if again.is_some() => {}
            }
        }
    }

    /// Recoveries that somebody began and did not complete, whether or not a record of the dead still stands.
    async fn pending(&mut self) -> Result<()> {
        let dir = &self.work.shared.places()?.ledger;
        let entries = self.work.shared.backend().read(&KeyRange::prefix(dir, "")?).await?.entries;
        for entry in entries {
            let pending = decode::<Ledger>(&entry).and_then(|ledger| ledger.pending);
            if let (Some(peer), Some(incarnation)) = (entry.key.name(), pending) {
                self.add(peer, incarnation, None);
            }
        }
        Ok(())
    }

    fn collect(&mut self) {
        let died = self.monitor.died();
        let known: std::collections::HashSet<_> = died.iter().map(|(peer, ..)| peer.clone()).collect();
        self.todo.retain(|peer, todo| !todo.done || known.contains(peer));
        for (peer, incarnation, seq) in died {
            self.add(peer, incarnation, Some(seq));
        }
    }

    fn add(&mut self, peer: String, incarnation: Incarnation, seq: Option<u64>) {
        let new = Todo { incarnation, seq, at: Instant::now(), under_way: false, done: false };
        let todo = self.todo.entry(peer).or_insert(new);
        // Heard again after this was settled, and then silent again: another death of the same run.
        let again = todo.done && todo.incarnation == incarnation && todo.seq < seq;
        if !todo.under_way && (todo.incarnation < incarnation || again) {
            *todo = new;
        }
    }

    fn ended(&mut self, peer: &str, incarnation: Incarnation, outcome: Result<()>) {
        let Some(todo) = self.todo.get_mut(peer) else { return };
        todo.under_way = false;
        match outcome {
            Ok(()) => todo.done = todo.incarnation == incarnation,
            Err(error) => {
                tracing::warn!(peer, %incarnation, %error, "a recovery was not completed, trying again");
                todo.at = Instant::now() + AGAIN.mul_f64(rand::random_range(0.5..1.5));
            }
        }
    }
}

#[derive(Clone)]
struct Work {
    shared: Arc<Shared>,
    action: Action,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Work")
    }
}

/// What the ledger and the peer's record say under the lock.
struct Found {
    ledger: Ledger,
    ledger_entry: Option<Entry>,
    beat: Option<Heard>,
}

impl Work {
    async fn recover(self, peer: String, incarnation: Incarnation, seq: Option<u64>) -> Outcome {
        let outcome = self.under_lock(&peer, incarnation, seq).await;
        (peer, incarnation, outcome)
    }

    async fn under_lock(&self, peer: &str, incarnation: Incarnation, seq: Option<u64>) -> Result<()> {
        let places = self.shared.places()?;
        let ledger = Key::new(&places.ledger, peer)?;
        // A look first: most monitors come when all is done and need no lock.
        if self.find(&ledger, peer).await?.ledger.covers(incarnation) {
            return Ok(());
        }
        let line = Dir::new(["recover", places.group.as_str(), peer]);
        let guard = Lock::new(self.shared.coord.clone(), line).acquire().await?;
        let outcome = self.settle(&guard, &ledger, peer, incarnation, seq).await;
        // Not released, it is given back in the background.
        let _ = guard.release().await;
        outcome
    }

    /// Completes what is pending, then begins and completes this one, if it is still to be done.
    async fn settle(
        &self,
        guard: &LockGuard,
        ledger: &Key,
        peer: &str,
        incarnation: Incarnation,
        seq: Option<u64>,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let found = self.find(ledger, peer).await?;
            if let Some(pending) = found.ledger.pending {
                self.act(guard, peer, pending).await?;
                self.complete(guard, ledger, pending).await?;
                continue;
            }
            if found.ledger.covers(incarnation) || !self.begin(guard, ledger, found, incarnation, seq).await? {
                return Ok(());
            }
        }
        Err(self.error(ledger, "what was read changed again and again"))
    }

    async fn find(&self, ledger: &Key, peer: &str) -> Result<Found> {
        let ledger_entry = self.shared.entry(ledger).await?;
        let beat = self.shared.entry(&Key::new(&self.shared.places()?.beats, peer)?).await?;
        let corrupt = || Error::new(ErrorKind::Corrupt, "recover", "the ledger is not in this form").key(ledger);
        let decoded = match &ledger_entry {
            Some(entry) => decode(entry).ok_or_else(corrupt)?,
            None => Ledger::default(),
        };
        Ok(Found { ledger: decoded, ledger_entry, beat: beat.as_ref().and_then(Heard::of) })
    }

    /// Notes the recovery as pending and stops the beats of the dead, in one step. `false` if there is nothing to begin.
    /// `true` also if something had changed: look again.
    async fn begin(
        &self,
        guard: &LockGuard,
        ledger: &Key,
        found: Found,
        incarnation: Incarnation,
        seq: Option<u64>,
    ) -> Result<bool> {
        // No record: it left after all, or was dead for so long that it is forgotten.
        let Some(beat) = found.beat.filter(|beat| beat.incarnation >= incarnation) else { return Ok(false) };
        let key = Key::new(&self.shared.places()?.beats, &beat.peer)?;
        let mut checks = vec![guard.fence().check(), as_read(ledger, found.ledger_entry.as_ref())];
        let pending = Ledger { pending: Some(incarnation), ..found.ledger };
        let mut puts = vec![(ledger.clone(), encode(&pending))];
        // A later run shows that this one is over; its record is left alone.
        if beat.incarnation == incarnation && !beat.beat.convicted {
            if seq.is_none_or(|seq| beat.beat.seq > seq) {
                return Ok(false);
            }
            checks.push(Check::Unchanged { key: key.clone(), modified: beat.modified });
            let convicted =
                super::record::Beat { convicted: true, incarnation: Some(incarnation.get()), echo: None, ..beat.beat };
            puts.push((key, encode(&convicted)));
        }
        let commit = self.shared.backend().commit(&put_txn(checks, puts)).await?;
        guard.check()?;
        if commit.applied {
            tracing::info!(peer = beat.peer, %incarnation, "recovery begins");
        }
        Ok(true)
    }

    async fn act(&self, guard: &LockGuard, peer: &str, incarnation: Incarnation) -> Result<()> {
        let death = Death { peer: peer.to_owned(), incarnation, fence: guard.fence() };
        guard.protect((self.action)(death)).await?
    }

    /// Records the completion, if the lock still stands at the server.
    async fn complete(&self, guard: &LockGuard, ledger: &Key, incarnation: Incarnation) -> Result<()> {
        let done = encode(&Ledger { done: Some(incarnation), pending: None });
        // Only the holder of the lock writes the ledger, so the fence is all that it needs.
        let commit =
            self.shared.backend().commit(&put_txn(vec![guard.fence().check()], [(ledger.clone(), done)])).await;
        match commit {
            Ok(commit) if commit.applied => {
                tracing::info!(key = %ledger, %incarnation, "recovery is complete");
                Ok(())
            }
            Ok(_) => {
                let message = "the lock ended before the completion was recorded; the action will run again";
                Err(Error::new(ErrorKind::SessionLost, "recover", message).key(ledger).on(self.shared.name()))
            }
            // Whether it was recorded, the ledger knows.
            Err(error) if error.kind() == ErrorKind::Ambiguous => {
                let entry = self.shared.entry(ledger).await?;
                let recorded = entry.as_ref().and_then(decode::<Ledger>).is_some_and(|l| l.covers(incarnation));
                if recorded { Ok(()) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }

    fn error(&self, key: &Key, message: &str) -> Error {
        Error::new(ErrorKind::Unavailable, "recover", message).key(key).on(self.shared.name())
    }
}
