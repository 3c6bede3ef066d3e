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
use tokio::time::{Instant, sleep_until, timeout};
use zookeeper_client as zk;

use crate::{
    Inner, connect,
    connect::Conn,
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
    attempts: Mutex<HashMap<(Dir, Nonce), Attempt>>,
}

/// How far an attempt to join a line has come.
#[derive(Debug, Clone)]
pub(crate) enum Attempt {
    /// A ticket may have been created.
    Unsure,
    /// This one was.
    Placed { ticket: Ticket, token: Revision },
}

impl Open {
    /// Notes that the attempt is about to be made; returns what was known of it before.
    pub(crate) fn begin(&self, line: &Dir, nonce: Nonce) -> Option<Attempt> {
        let mut attempts = lock(&self.attempts);
        match attempts.get(&(line.clone(), nonce)) {
            Some(known) => Some(known.clone()),
            None => {
                attempts.insert((line.clone(), nonce), Attempt::Unsure);
                None
            }
        }
    }

    pub(crate) fn placed(&self, line: &Dir, nonce: Nonce, ticket: Ticket, token: Revision) {
        lock(&self.attempts).insert((line.clone(), nonce), Attempt::Placed { ticket, token });
    }

    /// Forgets an attempt that surely left nothing behind.
    pub(crate) fn forget(&self, line: &Dir, nonce: Nonce) {
        lock(&self.attempts).remove(&(line.clone(), nonce));
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
    let states = open.conn.client.state_watcher();
    tokio::spawn(end_in_time(Arc::downgrade(inner), Arc::downgrade(&open), states, revoked, lease.clone()));
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
    let call = Call::write("renew", id).leased(true);
    let open = inner.leases.get(id, &call)?;
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

/// Ends a lease that was not renewed in time or that somebody revoked, and forgets one that has ended.
async fn end_in_time(
    inner: Weak<Inner>,
    open: Weak<Open>,
    mut states: zk::StateWatcher,
    revoked: zk::OneshotWatcher,
    lease: Lease,
) {
    let mut revoked = std::pin::pin!(revoked.changed());
    // Nothing but calls under way holds a lease that is being closed.
    while let Some(due) = open.upgrade().map(|open| *lock(&open.confirmed) + open.ttl) {
        if states.peek_state().is_terminated() {
            break;
        }
        if due <= Instant::now() {
            tracing::warn!(backend = NAME, lease = %lease.id, "not renewed in time, ending it");
            break;
        }
        tokio::select! {
            _ = states.changed() => {}
            _ = &mut revoked => break,
            () = sleep_until(due) => {}
        }
    }
    if let Some(inner) = inner.upgrade() {
        inner.leases.close(&lease.id);
        inner.tickets.forget_lease(&lease.id);
    }
    // Until then a repeated `revoke` waits as well. The library reports the end in any case; not relied upon.
    let _ = timeout(lease.ttl * 2, terminated(states)).await;
    if let Some(inner) = inner.upgrade() {
        lock(&inner.leases.slots).remove(&lease.id);
    }
}
