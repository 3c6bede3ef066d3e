//! Leases.
//!
//! Promise: a renewal that answers was carried out by the server after the call began. Renewals of several leases do
//! not wait for each other.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::{LeaseKeepAliveStream, LeaseKeeper};
use quorate_core::{ErrorKind, Lease, LeaseId, Result};
use tokio::time::Instant;

use crate::{
    Inner,
    connect::Link,
    error::{Blame, Call, Fault, lease_ended},
    path::{lease_id, lease_number},
};

/// etcd counts in whole seconds; its limit keeps the TTL in nanoseconds within 63 bits.
pub(crate) const MAX_TTL: Duration = Duration::from_secs(9_000_000_000);

/// How many idle streams may pile up before the map is swept for those of leases that must have ended.
const SWEEP_AT: usize = 64;

/// The keep-alive streams that are not in use right now.
///
/// A renewal takes its stream out and puts it back with its answer read. A stream with an answer outstanding never
/// comes back: a later renewal would take the old answer for its own and believe in a deadline that is too late.
#[derive(Default)]
pub(crate) struct KeepAlives {
    idle: Mutex<HashMap<i64, KeepAlive>>,
}

impl std::fmt::Debug for KeepAlives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeepAlives({})", self.idle().len())
    }
}

struct KeepAlive {
    link: Arc<Link>,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    /// As answered last; zero if the server does not know the lease.
    ttl: Duration,
    /// No renewal of the lease is known after this: it has ended.
    ends: Instant,
}

impl KeepAlives {
    fn idle(&self) -> MutexGuard<'_, HashMap<i64, KeepAlive>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, id: i64) -> Option<KeepAlive> {
        self.idle().remove(&id)
    }

    fn put(&self, id: i64, stream: KeepAlive) {
        let mut idle = self.idle();
        // Only when the map is about to grow, so that a sweep is paid for by as many renewals.
        if idle.len() >= SWEEP_AT && idle.len() == idle.capacity() {
            let now = Instant::now();
            idle.retain(|_, stream| stream.ends > now);
        }
        idle.insert(id, stream);
    }
}

pub(crate) async fn grant(inner: &Inner, ttl: Duration) -> Result<Lease> {
    let ttl = ttl.min(MAX_TTL);
    // Rounded up: the TTL is a promise to wait at least that long.
    let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX).max(1);
    let granted = inner.pool.call(Call::write("grant"), |c| {
        let mut lease = c.lease.clone();
        async move { lease.grant(seconds, None).await }
    });
    let granted = granted.await?;
    Ok(Lease { id: lease_id(granted.id()), ttl: duration(granted.ttl()) })
}

pub(crate) async fn revoke(inner: &Inner, lease: &LeaseId) -> Result<()> {
    let id = lease_number("revoke", lease)?;
    drop(inner.keep_alives.take(id));
    inner.keys.forget(id);
    let revoked = inner.pool.call(Call::write("revoke"), |c| {
        let mut lease = c.lease.clone();
        async move { lease.revoke(id).await }
    });
    match revoked.await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::SessionLost => Ok(()),
        Err(error) => Err(error.key(lease)),
    }
}

pub(crate) async fn renew(inner: &Inner, lease: &LeaseId) -> Result<Duration> {
    let id = lease_number("renew", lease)?;
    renew_number(inner, id).await.map_err(|fault| fault.error("renew").key(lease))
}

async fn renew_number(inner: &Inner, id: i64) -> Result<Duration, Fault> {
    let link = inner.pool.link().await?;
    let asked = inner.pool.asked(&link);
    let renewed = renew_over(inner, &link, id).await;
    asked.answered();
    let mut stream = renewed?;
    inner.pool.praise(&link);
    if stream.ttl.is_zero() {
        inner.keys.forget(id);
        return Err(lease_ended());
    }
    stream.ends = Instant::now() + stream.ttl;
    let ttl = stream.ttl;
    inner.keep_alives.put(id, stream);
    Ok(ttl)
}

/// Renews over the lease's stream, or a new one; returns it with the answer.
async fn renew_over(inner: &Inner, link: &Arc<Link>, id: i64) -> Result<KeepAlive, Fault> {
    const CALL: Call = Call::write("renew");
    // A stream over a connection that has been left behind may never answer.
    let idle = inner.keep_alives.take(id).filter(|stream| Arc::ptr_eq(&stream.link, link));
    // A stream that has ended while it was idle says nothing about the lease, and asking twice does no harm.
    if let Some(stream) = idle
        && let Some(renewed) = ask(stream).await
    {
        return Ok(renewed);
    }
    let opened = link.clients().lease.clone().keep_alive(id).await;
    let (keeper, answers) = opened.map_err(|error| inner.pool.fault(link, CALL, &error))?;
    let stream = KeepAlive { link: link.clone(), keeper, answers, ttl: Duration::ZERO, ends: Instant::now() };
    // The answer that opened the stream does not show its TTL, so there is a second one.
    ask(stream).await.ok_or_else(|| {
        inner.pool.blame(link, Blame::Endpoint);
        Fault::new(CALL.doubt(), "the keep-alive stream has ended")
    })
}

/// Renews over this stream; `None` if it has ended.
async fn ask(mut stream: KeepAlive) -> Option<KeepAlive> {
    stream.keeper.keep_alive().await.ok()?;
    stream.ttl = duration(stream.answers.message().await.ok()??.ttl());
    Some(stream)
}

fn duration(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
