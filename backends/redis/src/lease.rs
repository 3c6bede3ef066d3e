//! Leases.
//!
//! Promise: a lease ends when its TTL has passed on the server's clock since the last renewal, and whatever
//! stands on it ends in the same step, before anybody can look.

use std::time::Duration;

use quorate_core::{Error, ErrorKind, Lease, LeaseId, Result, ServerClock};
use redis::Value;

use crate::{
    error::{Effect, NAME, unexpected},
    link::Server,
    script::{CLOCK, Call, GRANT, RENEW, REVOKE, malformed},
};

pub(crate) const MIN_TTL: Duration = Duration::from_millis(50);
pub(crate) const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

pub(crate) async fn grant(server: &Server, ttl: Duration) -> Result<Lease> {
    // Rounded up to a millisecond: the server must not end it earlier than asked for.
    let millis = ttl.clamp(MIN_TTL, MAX_TTL).as_micros().div_ceil(1000);
    let ttl = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
    let id = format!("{:016x}", rand::random::<u64>());
    let call = Call::new(&GRANT, &server.connector.keys).arg(&id).arg(millis.to_string());
    server.call("grant", Effect::Writes, &call).await?;
    Ok(Lease { id: LeaseId::new(id), ttl })
}

pub(crate) async fn renew(server: &Server, lease: &LeaseId) -> Result<Duration> {
    let call = Call::new(&RENEW, &server.connector.keys).arg(lease.as_str());
    match server.call("renew", Effect::Writes, &call).await.map_err(|e| e.key(lease))? {
        Value::Int(millis) if millis > 0 => Ok(Duration::from_millis(millis.unsigned_abs())),
        Value::Int(_) => Err(ended("renew", lease)),
        _ => Err(unexpected("renew", &malformed("no number")).key(lease)),
    }
}

/// The clock that the server's timers go by.
pub(crate) async fn clock(server: &Server) -> Result<ServerClock> {
    let call = Call::new(&CLOCK, &server.connector.keys);
    match server.call("clock", Effect::Reads, &call).await? {
        Value::Int(micros) => {
            let earliest = Duration::from_micros(micros.unsigned_abs());
            Ok(ServerClock { earliest, latest: earliest + Duration::from_micros(1) })
        }
        _ => Err(unexpected("clock", &malformed("no number"))),
    }
}

pub(crate) async fn revoke(server: &Server, lease: &LeaseId) -> Result<()> {
    let call = Call::new(&REVOKE, &server.connector.keys).arg(lease.as_str());
    server.call("revoke", Effect::Writes, &call).await.map_err(|e| e.key(lease))?;
    Ok(())
}

pub(crate) fn ended(operation: &'static str, lease: &LeaseId) -> Error {
    Error::new(ErrorKind::SessionLost, operation, "the lease has ended").key(lease).on(NAME)
}
