//! The publisher: one beat after the other, each a compare-and-swap on the one before.
//!
//! Promise: a beat that could not be written is made up for by the next one; the publisher ends only by leaving, by being
//! superseded, or with its runtime, and [`Publisher::status`] says which. A run that a recovery has convicted beats again
//! only under a new incarnation.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Incarnation, RoundTrip, Shared, as_read,
    clock::MinFilter,
    put_txn,
    record::{Beat, Heard, encode},
    stopped,
};
use crate::{
    backend::{Check, Entry, Nonce, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::Key,
};

/// How often one beat looks again after a refusal that it can act on.
const ATTEMPTS: usize = 4;
/// How long a publisher that leaves goes on trying to say so.
const LEAVE_FOR: Duration = Duration::from_secs(60);

/// Where a publisher stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PublisherState {
    /// The first beat has not been confirmed yet.
    Starting,
    /// The last beat was confirmed.
    Beating,
    /// The last beat was not confirmed; the next one tries again.
    Failing,
    /// A later run of the same peer has taken over. Final.
    Superseded,
    /// It has left and its record is gone. Final.
    Left,
    /// It ended without its record being removed: it was [orphaned](Publisher::orphan), its runtime was shut down, or
    /// nobody answered for a minute after it was told to leave. Final; monitors will take the silence for a death.
    Stopped,
}

impl PublisherState {
    fn is_final(self) -> bool {
        matches!(self, Self::Superseded | Self::Left | Self::Stopped)
    }
}

/// A look at a publisher.
#[derive(Debug, Clone)]
pub struct PublisherStatus {
    /// Where it stands.
    pub state: PublisherState,
    /// Its incarnation, once the first beat was confirmed. A new one after a conviction: what was done for the dead
    /// incarnation may have been done to work that this process still thinks its own.
    pub incarnation: Option<Incarnation>,
    /// How often it was declared dead and recovered, or its record removed, while it lived.
    pub convictions: u64,
    /// Beats tried so far.
    pub beats: u64,
    /// When the last confirmed beat left.
    pub confirmed: Option<Instant>,
    /// Why the last beat was not confirmed.
    pub error: Option<Error>,
    /// The round trip of a beat to the coordinator and back.
    pub round_trip: Option<RoundTrip>,
}

/// Beats for one peer until it is dropped. Dropping it leaves in the background.
#[derive(Debug)]
#[must_use = "the peer leaves as soon as the publisher is dropped"]
pub struct Publisher {
    peer: String,
    status: watch::Receiver<PublisherStatus>,
    /// Dropping it tells the task to leave; sending says to stop without leaving.
    leave: Option<oneshot::Sender<()>>,
}

impl Publisher {
    pub(super) fn start(shared: Arc<Shared>, peer: &str, every: Duration, payload: &str) -> Result<Self> {
        let key = Key::new(&shared.places()?.beats, peer).map_err(|e| e.on(shared.name()))?;
        let status = PublisherStatus {
            state: PublisherState::Starting,
            incarnation: None,
            convictions: 0,
            beats: 0,
            confirmed: None,
            error: None,
            round_trip: None,
        };
        let (told, status) = watch::channel(status);
        let (leave, leaving) = oneshot::channel();
        let run = Run {
            shared,
            key,
            peer: peer.to_owned(),
            every,
            payload: payload.to_owned(),
            name: Nonce::random().to_string(),
            own: None,
            unsure: false,
            seq: 0,
            round_trips: MinFilter::default(),
            failing: false,
            told,
        };
        tokio::spawn(run.run(leaving));
        Ok(Self { peer: peer.to_owned(), status, leave: Some(leave) })
    }

    /// The peer that it beats for.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Where it stands now. No I/O.
    pub fn status(&self) -> PublisherStatus {
        settled(&self.status)
    }

    /// Returns when the status has changed since the last call, or at once if the publisher has ended.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn changed(&mut self) -> PublisherStatus {
        // It fails only when the task is gone, which the status tells.
        let _ = self.status.changed().await;
        settled(&self.status)
    }

    /// Waits until a beat has been confirmed; returns the incarnation.
    ///
    /// # Errors
    /// `Unavailable` if the publisher ended before. It does not fail for being unable to write: give it a time limit.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn beating(&self) -> Result<Incarnation> {
        let mut status = self.status.clone();
        let reached = status.wait_for(|s| s.state == PublisherState::Beating || s.state.is_final()).await;
        let incarnation = reached.ok().filter(|s| !s.state.is_final()).and_then(|s| s.incarnation);
        incarnation.ok_or_else(|| {
            settled(&self.status)
                .error
                .unwrap_or_else(|| stopped("heartbeat", "the publisher has ended").key(&self.peer))
        })
    }

    /// Stops and leaves the record where it is, as a crash would: monitors will tell a death.
    pub fn orphan(mut self) {
        if let Some(leave) = self.leave.take() {
            // It fails only if the task has ended, which is what is wanted.
            let _ = leave.send(());
        }
    }

    /// Stops and removes the record, so that monitors tell `Left`. `Ok` also if the peer was superseded.
    ///
    /// # Errors
    /// If the record could not be removed for a minute: monitors will tell a death.
    ///
    /// # Cancel safety
    /// Dropped half-way, it leaves in the background.
    pub async fn leave(mut self) -> Result<()> {
        self.leave.take();
        let mut status = self.status.clone();
        let _ = status.wait_for(|s| s.state.is_final()).await;
        let last = settled(&self.status);
        match last.state {
            PublisherState::Left | PublisherState::Superseded => Ok(()),
            _ => Err(last.error.unwrap_or_else(|| stopped("leave", "the record was not removed").key(&self.peer))),
        }
    }
}

/// The status, or `Stopped` if the task went without a word.
fn settled(status: &watch::Receiver<PublisherStatus>) -> PublisherStatus {
    let gone = status.has_changed().is_err();
    let mut now = status.borrow().clone();
    if gone && !now.state.is_final() {
        now.state = PublisherState::Stopped;
    }
    now
}

/// The last beat of this run that is known to stand in the store.
#[derive(Debug, Clone, Copy)]
struct Own {
    incarnation: Incarnation,
    modified: Revision,
}

/// The publisher's task.
struct Run {
    shared: Arc<Shared>,
    key: Key,
    peer: String,
    every: Duration,
    payload: String,
    /// Names the run in its records.
    name: String,
    own: Option<Own>,
    /// Whether a write may have happened that `own` does not show.
    unsure: bool,
    seq: u64,
    round_trips: MinFilter<()>,
    /// Whether the exchange was told that this publisher cannot write.
    failing: bool,
    told: watch::Sender<PublisherStatus>,
}

/// How a beat ended, if it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beaten {
    Confirmed,
    Superseded,
}

impl Run {
    async fn run(mut self, mut leaving: oneshot::Receiver<()>) {
        let mut next = Instant::now();
        // A call that hangs must not stop the beats after it; a slow coordinator must not fail each of them.
        let limit = (self.every * 2).clamp(Duration::from_secs(1), Duration::from_secs(10));
        loop {
            tokio::select! {
                biased;
                bye = &mut leaving => return self.end(bye.is_ok()).await,
                () = sleep_until(next) => {}
            }
            let sent = Instant::now();
            next = (next + self.every).max(sent);
            // Dropped half-way the beat may still be written: `unsure` was set before it left.
            let beaten = tokio::select! {
                biased;
                bye = &mut leaving => return self.end(bye.is_ok()).await,
                beaten = timeout(limit, self.beat()) => beaten.unwrap_or_else(|_| {
                    let message = format!("no answer within {limit:?}");
                    Err(Error::new(ErrorKind::Ambiguous, "heartbeat", message).key(&self.key).on(self.shared.name()))
                }),
            };
            match beaten {
                Ok(Beaten::Confirmed) => self.confirmed(sent),
                Ok(Beaten::Superseded) => {
                    tracing::warn!(peer = self.peer, "a later run of this peer has taken over; no more beats");
                    self.told.send_modify(|status| status.state = PublisherState::Superseded);
                    return;
                }
                Err(error) => self.failed(error),
            }
        }
    }

    fn confirmed(&mut self, sent: Instant) {
        self.set_failing(false);
        let (incarnation, beats) = (self.own.map(|own| own.incarnation), self.seq);
        let round_trip = self.round_trips.best().map(|(round_trip, ())| round_trip);
        self.told.send_modify(|status| {
            status.state = PublisherState::Beating;
            (status.incarnation, status.beats, status.round_trip) = (incarnation, beats, round_trip);
            (status.confirmed, status.error) = (Some(sent), None);
        });
    }

    fn failed(&mut self, error: Error) {
        tracing::warn!(peer = self.peer, %error, "a beat was not confirmed; the next one tries again");
        self.set_failing(true);
        let beats = self.seq;
        self.told.send_modify(|status| {
            status.state = PublisherState::Failing;
            (status.beats, status.error) = (beats, Some(error));
        });
    }

    fn set_failing(&mut self, failing: bool) {
        if self.failing != failing {
            self.failing = failing;
            self.shared.exchange.failing(failing);
        }
    }

    async fn beat(&mut self) -> Result<Beaten> {
        self.seq += 1;
        for _ in 0..ATTEMPTS {
            let check = match self.own.filter(|_| !self.unsure) {
                Some(own) => Check::Unchanged { key: self.key.clone(), modified: own.modified },
                None => match self.look().await? {
                    Some(check) => check,
                    None => return Ok(Beaten::Superseded),
                },
            };
            if self.write(check).await? {
                return Ok(Beaten::Confirmed);
            }
            // Somebody else wrote: who, is seen by a look.
            self.unsure = true;
        }
        let message = format!("the record changed under {ATTEMPTS} attempts in a row");
        Err(Error::new(ErrorKind::Unavailable, "heartbeat", message).key(&self.key).on(self.shared.name()))
    }

    /// Finds out what stands in the store and what the next write must find there; `None` if it is a later run's.
    async fn look(&mut self) -> Result<Option<Check>> {
        let entry = self.shared.entry(&self.key).await?;
        let found = entry.as_ref().and_then(Heard::of);
        match (found.filter(|heard| !heard.beat.convicted), self.own) {
            (Some(heard), _) if heard.beat.run == self.name => {
                self.own = Some(Own { incarnation: heard.incarnation, modified: heard.modified });
            }
            (Some(heard), Some(own)) if heard.incarnation > own.incarnation => return Ok(None),
            // A late write of an older run got in, past the check that ours carry: it is overwritten.
            (Some(heard), Some(own)) if heard.incarnation < own.incarnation => {}
            // Convicted or removed: this run is over, its process goes on.
            (_, Some(own)) => {
                tracing::warn!(peer = self.peer, incarnation = %own.incarnation, "declared dead while alive");
                (self.own, self.name) = (None, Nonce::random().to_string());
                self.told.send_modify(|status| status.convictions += 1);
            }
            (_, None) => {}
        }
        Ok(Some(as_read(&self.key, entry.as_ref())))
    }

    /// Writes the beat if the check holds.
    async fn write(&mut self, check: Check) -> Result<bool> {
        let incarnation = self.own.map(|own| own.incarnation);
        let sent = Instant::now();
        let beat = Beat {
            run: self.name.clone(),
            incarnation: incarnation.map(Incarnation::get),
            seq: self.seq,
            every_ms: u64::try_from(self.every.as_millis()).unwrap_or(u64::MAX).max(1),
            sent_us: crate::clock::wall_us(),
            payload: self.payload.clone(),
            echo: self.shared.exchange.echo(&self.peer, sent),
            convicted: false,
        };
        if let Some(incarnation) = incarnation {
            self.shared.exchange.sending(&self.peer, incarnation.get(), self.seq, sent);
        }
        let txn = put_txn(vec![check], [(self.key.clone(), encode(&beat))]);
        // Taken back by the answer only: without one, the write may have happened.
        self.unsure = true;
        let commit = self.shared.backend().commit(&txn).await?;
        self.unsure = false;
        if commit.applied {
            self.round_trips.push(sent.elapsed(), ());
            let incarnation = incarnation.unwrap_or_else(|| commit.revision.into());
            self.own = Some(Own { incarnation, modified: commit.revision });
        }
        Ok(commit.applied)
    }

    /// Ends the run: leaves the record as it is, or removes it, for as long as that may help.
    async fn end(mut self, orphan: bool) {
        if orphan {
            return self.told.send_modify(|status| status.state = PublisherState::Stopped);
        }
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        let (state, error) = loop {
            match self.remove().await {
                Ok(state) => break (state, None),
                Err(error) if begun.elapsed() >= LEAVE_FOR => break (PublisherState::Stopped, Some(error)),
                Err(error) => tracing::debug!(peer = self.peer, %error, "leaving failed, trying again"),
            }
            sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        };
        self.told.send_modify(|status| (status.state, status.error) = (state, error));
    }

    /// One attempt to remove the record, if it is still this run's.
    async fn remove(&mut self) -> Result<PublisherState> {
        for _ in 0..ATTEMPTS {
            let entry = match timeout(Duration::from_secs(10), self.shared.entry(&self.key)).await {
                Ok(entry) => entry?,
                Err(_) => return Err(stopped("leave", "no answer within 10 s").key(&self.key)),
            };
            let Some(state) = self.to_remove(entry.as_ref()) else {
                let entry = entry.expect("what is to be removed was found");
                let check = Check::Unchanged { key: self.key.clone(), modified: entry.modified };
                let txn = Txn { checks: vec![check], writes: vec![Write::Delete(self.key.clone())] };
                if self.shared.backend().commit(&txn).await?.applied {
                    return Ok(PublisherState::Left);
                }
                continue;
            };
            return Ok(state);
        }
        Err(stopped("leave", "the record changed again and again").key(&self.key))
    }

    /// `None` if the record is this run's own, otherwise what that means for a publisher that leaves.
    fn to_remove(&self, entry: Option<&Entry>) -> Option<PublisherState> {
        match entry.and_then(Heard::of) {
            Some(heard) if heard.beat.run == self.name && !heard.beat.convicted => None,
            Some(heard) if heard.beat.run != self.name && self.own.is_some() => Some(PublisherState::Superseded),
            // Never written, removed already, or convicted: nothing of ours is left to beat.
            _ => Some(PublisherState::Left),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.set_failing(false);
    }
}
