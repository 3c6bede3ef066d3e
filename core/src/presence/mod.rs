//! Presence: a record that is there for as long as this process wants it to be.
//!
//! Promise: the record stands on the coordinator's session, so that it goes when this process dies; while it lives, the
//! record is made again after whatever removed it (the loss of the session, a restart or a wipe of the server, another
//! client's delete), for ever, with backoff and jitter, and always with what is wanted last. Withdrawn means gone: a
//! write that was delayed on its way is taken away again.
//!
//! Two that want the same record do not fight: whoever wrote last has it, the other is told that it was displaced and
//! waits until the record is free, or until it is told again what to write.

pub(crate) mod view;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    backend::{Backend, Check, LeaseId, Txn, Write},
    coordinator::Coordinator,
    error::{Error, ErrorKind, Result},
    key::{Key, KeyRange},
    session::Session,
};

/// Where a record is kept.
#[async_trait]
pub(crate) trait Spot: std::fmt::Debug + Send + Sync + 'static {
    /// Which record it is: the same for all spots of one record on one coordinator.
    fn name(&self) -> String;
    /// Creates or replaces it; from then on it ends with the lease.
    async fn put(&self, lease: &LeaseId, value: &Bytes) -> Result<()>;
    /// Takes it away if it stands on the lease.
    async fn take(&self, lease: &LeaseId) -> Result<()>;
    /// What is there now: the value, and whether it stands on the lease.
    async fn look(&self, lease: &LeaseId) -> Result<Option<(Bytes, bool)>>;
}

/// A record that is a key of the store.
#[derive(Debug)]
pub(crate) struct KeySpot {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) key: Key,
}

#[async_trait]
impl Spot for KeySpot {
    fn name(&self) -> String {
        format!("{}/{}", self.key.dir(), self.key.encoded())
    }

    async fn put(&self, lease: &LeaseId, value: &Bytes) -> Result<()> {
        let write = Write::Put { key: self.key.clone(), value: value.clone(), lease: Some(lease.clone()) };
        self.backend.commit(&Txn { checks: Vec::new(), writes: vec![write] }).await.map(drop)
    }

    async fn take(&self, lease: &LeaseId) -> Result<()> {
        loop {
            let found = self.backend.read(&KeyRange::One(self.key.clone())).await?.entries.pop();
            let Some(entry) = found.filter(|entry| entry.lease.as_ref() == Some(lease)) else { return Ok(()) };
            let checks = vec![Check::Unchanged { key: entry.key.clone(), modified: entry.modified }];
            if self.backend.commit(&Txn { checks, writes: vec![Write::Delete(entry.key)] }).await?.applied {
                return Ok(());
            }
        }
    }

    async fn look(&self, lease: &LeaseId) -> Result<Option<(Bytes, bool)>> {
        let found = self.backend.read(&KeyRange::One(self.key.clone())).await?.entries.pop();
        Ok(found.map(|entry| (entry.value, entry.lease.as_ref() == Some(lease))))
    }
}

/// Which presence of a coordinator has each record: the one that claimed it last.
#[derive(Debug, Default)]
pub(crate) struct Claims(Mutex<Claimed>);

#[derive(Debug, Default)]
struct Claimed {
    last: u64,
    holders: HashMap<String, Claim>,
}

#[derive(Debug, Clone)]
struct Claim {
    number: u64,
    /// Held across a put and a withdrawal, so that a withdrawal that is under way cannot take what was registered anew. All
    /// that claim a record while one has it share this.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Claims {
    fn claimed(&self) -> std::sync::MutexGuard<'_, Claimed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self, name: &str) -> Claim {
        let mut claimed = self.claimed();
        claimed.last += 1;
        let turn = claimed.holders.get(name).map(|holder| holder.turn.clone()).unwrap_or_default();
        let claim = Claim { number: claimed.last, turn };
        claimed.holders.insert(name.to_owned(), claim.clone());
        claim
    }

    fn holds(&self, name: &str, claim: &Claim) -> bool {
        self.claimed().holders.get(name).is_some_and(|holder| holder.number == claim.number)
    }

    fn is_free(&self, name: &str) -> bool {
        !self.claimed().holders.contains_key(name)
    }

    fn release(&self, name: &str, claim: &Claim) {
        let mut claimed = self.claimed();
        if claimed.holders.get(name).is_some_and(|holder| holder.number == claim.number) {
            claimed.holders.remove(name);
        }
    }
}

/// Where a presence stands.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PresenceState {
    /// The record is not known to be there. It is being made, or made again; the error is that of the last attempt.
    Pending(Option<Error>),
    /// The record is there, as wanted.
    Present,
    /// Somebody else wrote the record after us; it is made again when it is free.
    Displaced,
    /// It was withdrawn, or its coordinator was closed. Final.
    Closed,
}

/// The handle to a presence. Dropping it withdraws the record in the background.
#[derive(Debug)]
pub(crate) struct Presence {
    coord: Coordinator,
    /// What is wanted; `None` withdraws.
    wanted: watch::Sender<Option<Bytes>>,
    told: watch::Receiver<Told>,
    /// Serialises those who change what is wanted.
    changing: Mutex<()>,
}

/// What the task has reached.
#[derive(Debug, Clone)]
struct Told {
    state: PresenceState,
    /// The value that the state is about.
    value: Option<Bytes>,
}

impl Presence {
    pub(crate) fn coord(&self) -> &Coordinator {
        &self.coord
    }

    /// Starts to keep the record up. Must be called within a runtime.
    pub(crate) fn start(coord: &Coordinator, spot: Arc<dyn Spot>, value: Bytes) -> Self {
        let (wanted, orders) = watch::channel(Some(value));
        let (tell, told) = watch::channel(Told { state: PresenceState::Pending(None), value: None });
        let name = spot.name();
        let claim = coord.claims().claim(&name);
        let keeper = Keeper {
            coord: coord.clone(),
            spot,
            name,
            claim,
            orders,
            tell,
            unsure: false,
            displaced: false,
            backoff: backoff(),
        };
        tokio::spawn(keeper.run());
        Self { coord: coord.clone(), wanted, told, changing: Mutex::default() }
    }

    /// Changes what is wanted; `change` sees what was wanted until now. Nothing is awaited.
    pub(crate) fn change(&self, change: impl FnOnce() -> Result<Bytes>) -> Result<()> {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.wanted.borrow().is_none() {
            return Err(Error::new(ErrorKind::SessionLost, "update", "it was withdrawn before"));
        }
        let value = change()?;
        // It may have been withdrawn meanwhile, and stays so.
        let taken = self.wanted.send_if_modified(|wanted| {
            let stands = wanted.is_some();
            if stands {
                *wanted = Some(value);
            }
            stands
        });
        if taken { Ok(()) } else { Err(Error::new(ErrorKind::SessionLost, "update", "it was withdrawn before")) }
    }

    pub(crate) fn state(&self) -> PresenceState {
        let told = self.told.borrow().clone();
        match told.state {
            // An update that has not reached the server yet.
            PresenceState::Present if told.value != *self.wanted.borrow() => PresenceState::Pending(None),
            state => state,
        }
    }

    /// Waits until what is wanted now is at the server.
    pub(crate) async fn settled(&self) -> Result<()> {
        let mut told = self.told.clone();
        loop {
            let now = told.borrow_and_update().clone();
            match now.state {
                PresenceState::Present if now.value == *self.wanted.borrow() => return Ok(()),
                PresenceState::Closed => return Err(self.closed()),
                PresenceState::Pending(Some(error)) if is_final(&error) => return Err(error),
                _ => {}
            }
            // The task never ends without saying `Closed`, unless its runtime was shut down.
            told.changed().await.map_err(|_| self.closed())?;
        }
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::SessionLost, "register", "it was withdrawn, or the coordinator was closed")
            .on(self.coord.profile().backend)
    }

    /// Follows the state: the current one first.
    pub(crate) fn states(&self) -> PresenceStates {
        let mut told = self.told.clone();
        told.mark_changed();
        PresenceStates { told }
    }

    /// Withdraws the record and waits until it is gone.
    pub(crate) async fn close(&self) -> Result<()> {
        self.wanted.send_replace(None);
        let mut told = self.told.clone();
        let end = told.wait_for(|told| matches!(told.state, PresenceState::Closed)).await;
        // Whatever could not be confirmed ends with the lease.
        end.map(drop).map_err(|_| self.closed())
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.wanted.send_replace(None);
    }
}

/// The states of a presence as they change; ends after `Closed`. States in between may be skipped.
#[derive(Debug)]
pub struct PresenceStates {
    told: watch::Receiver<Told>,
}

impl PresenceStates {
    /// The next state, or `None` after the final one.
    ///
    /// # Cancel safety
    /// Safe: a state is taken only when this returns it.
    pub async fn next(&mut self) -> Option<PresenceState> {
        self.told.changed().await.ok()?;
        Some(self.told.borrow_and_update().state.clone())
    }
}

/// Whether trying again can only help after somebody has changed something.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Denied | ErrorKind::InvalidInput | ErrorKind::Unsupported)
}

fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .build()
}

/// The task behind a presence.
struct Keeper {
    coord: Coordinator,
    spot: Arc<dyn Spot>,
    orders: watch::Receiver<Option<Bytes>>,
    tell: watch::Sender<Told>,
    name: String,
    /// Several of one coordinator may want one record; all write on the same lease, so only the claim tells them apart.
    claim: Claim,
    /// Somebody else wrote the record after us, and may still live.
    displaced: bool,
    /// A put whose outcome is not known could land late.
    unsure: bool,
    backoff: ExponentialBackoff,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            let Some(value) = self.orders.borrow_and_update().clone() else { break };
            if !self.coord.claims().holds(&self.name, &self.claim) {
                self.stand_back().await;
                continue;
            }
            let session = match self.coord.session().await {
                Ok(session) => session,
                Err(_) if self.coord.is_closed() => break,
                Err(error) => {
                    self.pause(error).await;
                    continue;
                }
            };
            // Whoever was displaced looks before it writes, also on a new session.
            if self.displaced {
                self.guard(&session, &value).await;
                continue;
            }
            let put = {
                let turn = self.claim.turn.clone();
                let _turn = turn.lock().await;
                if !self.coord.claims().holds(&self.name, &self.claim) {
                    continue;
                }
                self.spot.put(session.lease(), &value).await
            };
            match put {
                Ok(()) => {
                    self.backoff = backoff();
                    self.say(PresenceState::Present, Some(&value));
                    self.guard(&session, &value).await;
                }
                Err(error) => {
                    self.unsure |= error.kind() == ErrorKind::Ambiguous;
                    tracing::debug!(spot = ?self.spot, %error, "not registered yet");
                    self.pause(error).await;
                }
            }
        }
        self.withdraw().await;
    }

    /// Another presence of this coordinator has the record: waits until it is given up, or something else is wanted.
    async fn stand_back(&mut self) {
        self.say(PresenceState::Displaced, None);
        let told = timeout(Duration::from_millis(200), self.orders.changed()).await.is_ok();
        // Whoever is withdrawn has nothing to claim: the record is the other one's.
        let wanted = self.orders.borrow().is_some();
        if wanted && (told || self.coord.claims().is_free(&self.name)) {
            self.claim = self.coord.claims().claim(&self.name);
        }
    }

    fn say(&self, state: PresenceState, value: Option<&Bytes>) {
        self.tell.send_replace(Told { state, value: value.cloned() });
    }

    /// Waits before the next attempt; less if what is wanted changes.
    async fn pause(&mut self, error: Error) {
        // A refusal is not asked for again at full speed: somebody has to change something first.
        let floor = if is_final(&error) { Duration::from_secs(2) } else { Duration::ZERO };
        self.say(PresenceState::Pending(Some(error)), None);
        let pause = self.backoff.next().unwrap_or(Duration::from_secs(5)).max(floor);
        let _ = timeout(pause, self.orders.changed()).await;
    }

    /// Returns when the record has to be written again, or something else is wanted.
    async fn guard(&mut self, session: &Session, value: &Bytes) {
        loop {
            // As often as the lease is renewed: what is gone for longer than a TTL is a failure that others see.
            let pause = (session.ttl() / 3).mul_f64(rand::random_range(0.75..1.0));
            let changed = tokio::select! {
                changed = self.orders.changed() => {
                    // Told again what to write: that is claimed.
                    self.displaced = false;
                    changed.is_ok()
                }
                () = session.lost() => false,
                () = sleep(pause) => {
                    if !self.coord.claims().holds(&self.name, &self.claim) {
                        return;
                    }
                    match self.spot.look(session.lease()).await {
                        Ok(Some((found, true))) if found == *value => {
                            self.say_if_new(PresenceState::Present, value);
                            continue;
                        }
                        // Ours, but not as wanted: an older write landed late.
                        Ok(Some((_, true)) | None) => {
                            self.displaced = false;
                            false
                        }
                        Ok(Some((_, false))) => {
                            self.displaced = true;
                            self.say_if_new(PresenceState::Displaced, value);
                            continue;
                        }
                        // An outage says nothing about the record; the session has its own deadline.
                        Err(error) => {
                            tracing::debug!(spot = ?self.spot, %error, "could not look after the record");
                            continue;
                        }
                    }
                }
            };
            if !changed {
                self.say(PresenceState::Pending(None), None);
            }
            return;
        }
    }

    fn say_if_new(&self, state: PresenceState, value: &Bytes) {
        let now = std::mem::discriminant(&self.tell.borrow().state);
        if now != std::mem::discriminant(&state) {
            self.say(state, Some(value));
        }
    }

    /// Takes the record away, and once more after a while if a put may still be on its way.
    async fn withdraw(&mut self) {
        let session = self.coord.current();
        {
            let turn = self.claim.turn.clone();
            let _turn = turn.lock().await;
            // Not if it is another one's by now.
            if let Some(session) = session.as_ref().filter(|_| self.coord.claims().holds(&self.name, &self.claim)) {
                self.take(session).await;
            }
            // A claim from now on is a new registration, and free to write.
            self.coord.claims().release(&self.name, &self.claim);
        }
        self.say(PresenceState::Closed, None);
        if let (Some(session), true) = (session, self.unsure) {
            for pause in [Duration::from_secs(2), Duration::from_secs(10)] {
                tokio::select! {
                    () = session.lost() => return,
                    () = sleep(pause) => {
                        // Whoever registered it anew on this coordinator writes what is wanted now.
                        if !self.coord.claims().is_free(&self.name) {
                            return;
                        }
                        self.take(&session).await;
                    }
                }
            }
        }
    }

    /// Until it is done, or the end of the session does it.
    async fn take(&mut self, session: &Session) {
        let mut backoff = backoff();
        loop {
            let taken = tokio::select! {
                () = session.lost() => return,
                taken = self.spot.take(session.lease()) => taken,
            };
            match taken {
                Ok(()) => return,
                Err(error) if is_final(&error) || error.kind() == ErrorKind::SessionLost => {
                    tracing::warn!(spot = ?self.spot, %error, "left to the end of the session");
                    return;
                }
                Err(error) => tracing::debug!(spot = ?self.spot, %error, "withdrawal owed"),
            }
            sleep(backoff.next().unwrap_or(Duration::from_secs(5))).await;
        }
    }
}
