//! Leases: one ZooKeeper session each.
//!
//! Promise: a lease ends no earlier than its TTL after the last confirmed renewal, and soon after it, also if this
//! process lives on: the client library pings by itself and would keep a session that nobody renews alive for ever.
//! Anybody may revoke it.
//!
//! Only its own connection can close a session. So each lease has a node, `<namespace>/.lease/<id>`, ephemeral on its
//! session: it tells others that the lease lives, and its owner, who watches it, closes the session as soon as
//! somebody writes to it. What the owner does not see, because it is dead or cut off, ends with the TTL.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use quorate_core::{Dir, ErrorKind, Lease, LeaseId, Nonce, Result, Revision, Ticket};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use zookeeper_client as zk;

use crate::{
    Inner, connect,
    connect::{Conn, on_own_task},
    error::{Call, NAME},
    join::make_nodes,
    layout::Layout,
};

/// A lease that is open here.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) id: LeaseId,
    pub(crate) conn: Arc<Conn>,
    ttl: Duration,
    /// When the last confirmation arrived. The server began to count before that.
    confirmed: Mutex<Instant>,
    /// What this client has tried to put into lines, so that a repeated attempt is recognised.
    attempts: Mutex<HashMap<(Dir, Nonce), Attempts>>,
}

/// How far an attempt to join a line has come.
#[derive(Debug, Clone)]
pub(crate) enum Attempt {
    /// A ticket may have been created.
    Unsure,
    /// This one was.
    Placed { ticket: Ticket, token: Revision },
}

/// Attempts to join with one nonce.
#[derive(Debug, Default)]
struct Attempts {
    known: Option<Attempt>,
    /// Held while an attempt is made: a repeated one must not run beside one that was dropped and is about to stop, or
    /// both would create a ticket.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Open {
    /// What an attempt holds while it is made.
    pub(crate) fn turn(&self, line: &Dir, nonce: Nonce) -> Arc<tokio::sync::Mutex<()>> {
        lock(&self.attempts).entry((line.clone(), nonce)).or_default().turn.clone()
    }

    /// Notes that a ticket may be created from now on; returns what was known before.
    pub(crate) fn begin(&self, line: &Dir, nonce: Nonce) -> Option<Attempt> {
        lock(&self.attempts).entry((line.clone(), nonce)).or_default().known.replace(Attempt::Unsure)
    }

    pub(crate) fn placed(&self, line: &Dir, nonce: Nonce, ticket: Ticket, token: Revision) {
        let placed = Attempt::Placed { ticket, token };
        lock(&self.attempts).entry((line.clone(), nonce)).or_default().known = Some(placed);
    }

    /// Forgets an attempt that surely left nothing behind, or whose ticket is gone.
    pub(crate) fn forget(&self, line: &Dir, nonce: Nonce) {
        if let Some(attempt) = lock(&self.attempts).get_mut(&(line.clone(), nonce)) {
            attempt.known = None;
        }
        self.tidy(line, nonce);
    }

    /// Drops the entry of an attempt that is forgotten, unless one is being made or waits for its turn.
    pub(crate) fn tidy(&self, line: &Dir, nonce: Nonce) {
        let mut attempts = lock(&self.attempts);
        let slot = (line.clone(), nonce);
        let over = |attempt: &Attempts| attempt.known.is_none() && Arc::strong_count(&attempt.turn) == 1;
        if attempts.get(&slot).is_some_and(over) {
            attempts.remove(&slot);
        }
    }
}

#[derive(Debug)]
enum Slot {
    Open(Arc<Open>),
    /// Being closed; these are the states of its session.
    Closing(zk::StateWatcher),
}

/// The leases of one backend.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    slots: Mutex<HashMap<LeaseId, Slot>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks; if it did, the maps would still be whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leases {
    /// The open lease of this name.
    pub(crate) fn get(&self, id: &LeaseId, call: &Call<'_>) -> Result<Arc<Open>> {
        match lock(&self.slots).get(id) {
            Some(Slot::Open(open)) if !open.conn.is_over() => Ok(open.clone()),
            _ => Err(call.session_lost()),
        }
    }

    /// Lets go of the session, which closes it as soon as the calls under way have let go as well.
    fn close(&self, id: &LeaseId) -> Option<zk::StateWatcher> {
        let mut slots = lock(&self.slots);
        let slot = slots.get_mut(id)?;
        match slot {
            Slot::Closing(states) => Some(states.clone()),
            Slot::Open(open) => {
                let states = open.conn.client.state_watcher();
                open.conn.close();
                *slot = Slot::Closing(states.clone());
                Some(states)
            }
        }
    }
}

/// The name of the session with this number: as ZooKeeper's own tools print it.
pub(crate) fn name(session: i64) -> LeaseId {
    LeaseId::new(format!("{session:#x}"))
}

pub(crate) async fn grant(inner: &Arc<Inner>, ttl: Duration) -> Result<Lease> {
    let ttl = ttl.clamp(inner.profile.min_ttl, inner.profile.max_ttl);
    let conn = connect::open(&inner.settings, ttl, "grant").await?;
    let id = name(conn.session());
    let revoked = announce(inner, &conn, &id).await?;
    let open = Arc::new(Open {
        id,
        ttl: conn.client.session_timeout(),
        conn: Arc::new(conn),
        confirmed: Mutex::new(Instant::now()),
        attempts: Mutex::default(),
    });
    let lease = Lease { id: open.id.clone(), ttl: open.ttl };
    lock(&inner.leases.slots).insert(open.id.clone(), Slot::Open(open.clone()));
    let ending = Ending {
        inner: Arc::downgrade(inner),
        open: Arc::downgrade(&open),
        states: open.conn.client.state_watcher(),
        over: open.conn.over(),
        lease: lease.clone(),
    };
    tokio::spawn(ending.run(revoked));
    Ok(lease)
}

/// Creates the lease's node and watches it. A lease that fails here is dropped, and its session closed with it.
async fn announce(inner: &Inner, conn: &Conn, id: &LeaseId) -> Result<zk::OneshotWatcher> {
    let call = Call::read("grant", id);
    let path = inner.settings.layout.lease(id);
    let options = zk::CreateMode::Ephemeral.with_acls(inner.settings.acls());
    let mut make = false;
    loop {
        if make {
            make_nodes(inner, &conn.client, Layout::parent(&path));
        }
        let created = conn.client.create(&path, b"", &options);
        let watched = conn.client.get_and_watch_data(&path);
        match conn.call(async { Ok::<_, zk::Error>((created.await?, watched.await?)) }).await {
            Ok((_, (_, _, watcher))) => return Ok(watcher),
            Err(zk::Error::NoNode) if !make => make = true,
            Err(error) => return Err(conn.failed(&call, error)),
        }
    }
}

/// Confirmed by the leader, not by the server we are connected to: that one may be cut off from the others and go on
/// answering reads for a while, when the leader has long ended the session.
pub(crate) async fn renew(inner: &Inner, id: &LeaseId) -> Result<Duration> {
    let open = inner.leases.get(id, &Call::write("renew", id))?;
    on_own_task(async move { confirm(&open).await }).await
}

async fn confirm(open: &Open) -> Result<Duration> {
    let call = Call::write("renew", &open.id).leased(true);
    open.conn.ready(&call).await?;
    match open.conn.call(open.conn.client.sync("/")).await {
        Ok(()) => {
            *lock(&open.confirmed) = Instant::now();
            Ok(open.ttl)
        }
        Err(_) if open.conn.is_over() => Err(call.session_lost()),
        Err(error) => Err(open.conn.failed(&call, error)),
    }
}

pub(crate) async fn revoke(inner: &Inner, id: &LeaseId) -> Result<()> {
    let call = Call::write("revoke", id);
    let Some(states) = inner.leases.close(id) else { return revoke_elsewhere(inner, id, &call).await };
    if timeout(inner.settings.request_timeout, terminated(states)).await.is_err() {
        return Err(call.error(ErrorKind::Ambiguous, "the server has not confirmed the end of the session"));
    }
    Ok(())
}

/// Asks the client that opened the lease to close it, and waits until it has.
async fn revoke_elsewhere(inner: &Inner, id: &LeaseId, call: &Call<'_>) -> Result<()> {
    let conn = inner.base.conn(call).await?;
    let path = inner.settings.layout.lease(id);
    let synced = conn.client.sync("/");
    let asked = conn.client.set_data(&path, b"revoked", None);
    let asked = conn.call(async { synced.await.and(asked.await) }).await;
    let ending = async {
        asked?;
        loop {
            let (_, _, watcher) = conn.call(conn.client.get_and_watch_data(&path)).await?;
            watcher.changed().await;
        }
    };
    match timeout(inner.settings.request_timeout, ending).await {
        Ok(Err(zk::Error::NoNode)) => Ok(()),
        Ok(Err(error)) => Err(conn.failed(call, error)),
        Ok(Ok(())) | Err(_) => {
            let message = "its owner was asked to close it, and has not done so";
            Err(call.error(ErrorKind::Ambiguous, message).next("it ends after its ttl, unless its owner goes on"))
        }
    }
}

async fn terminated(mut states: zk::StateWatcher) {
    while !states.peek_state().is_terminated() {
        states.changed().await;
    }
}

/// What sees to the end of a lease. Nothing in here keeps the session open.
struct Ending {
    inner: Weak<Inner>,
    open: Weak<Open>,
    states: zk::StateWatcher,
    over: watch::Receiver<bool>,
    lease: Lease,
}

impl Ending {
    /// Ends a lease that was not renewed in time or that somebody revoked, and forgets one that has ended.
    async fn run(mut self, revoked: zk::OneshotWatcher) {
        self.due(revoked).await;
        if let Some(inner) = self.inner.upgrade() {
            inner.leases.close(&self.lease.id);
            inner.tickets.forget_lease(&self.lease.id);
        }
        self.gone().await;
        if let Some(inner) = self.inner.upgrade() {
            lock(&inner.leases.slots).remove(&self.lease.id);
        }
    }

    /// Returns when the lease is to be ended, or has been.
    async fn due(&mut self, revoked: zk::OneshotWatcher) {
        let mut revoked = std::pin::pin!(revoked.changed());
        while let Some(due) = self.open.upgrade().map(|open| *lock(&open.confirmed) + open.ttl) {
            if self.states.peek_state().is_terminated() {
                return;
            }
            if due <= Instant::now() {
                tracing::warn!(backend = NAME, lease = %self.lease.id, "not renewed in time, ending it");
                return;
            }
            tokio::select! {
                _ = self.states.changed() => {}
                _ = self.over.wait_for(|over| *over) => return,
                _ = &mut revoked => return,
                () = sleep_until(due) => {}
            }
        }
    }

    /// Returns when the session has ended: until then a repeated `revoke` waits as well. The library reports the end in
    /// any case; that is not relied upon.
    async fn gone(&self) {
        let _ = timeout(self.lease.ttl * 2, terminated(self.states.clone())).await;
    }
}
