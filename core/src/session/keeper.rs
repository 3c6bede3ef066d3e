//! The keeper: renews the lease, and declares the session lost in time.
//!
//! Promise: a renewal goes out at about a third of the TTL, one at a time, never in a tight loop. When the
//! session is over, the lease is revoked: what a dead session still holds at the server is owed.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};

use super::{SessionCore, SessionState, nanos};
use crate::error::ErrorKind;

pub(super) async fn keep(core: Arc<SessionCore>) {
    let mut next = core.origin + pause(&core);
    loop {
        tokio::select! {
            () = core.stop.notified() => break,
            () = sleep_until(next.min(core.deadline())) => {}
        }
        if !core.is_live() {
            break;
        }
        let sent = Instant::now();
        // Bounded by the deadline, so that a reply that never comes cannot hide it.
        let limit = core.deadline().saturating_duration_since(sent).min(ttl(&core) / 3);
        let renewal = tokio::select! {
            () = core.stop.notified() => break,
            renewal = timeout(limit, core.backend.renew(&core.lease)) => renewal,
        };
        match renewal {
            Ok(Ok(ttl)) => {
                if !core.confirm(sent, ttl) {
                    break;
                }
                next = sent + pause(&core);
            }
            Ok(Err(error)) if error.kind() == ErrorKind::SessionLost => {
                tracing::warn!(lease = %core.lease, %error, "session lost");
                core.end(SessionState::Lost);
                break;
            }
            Ok(Err(error)) => {
                tracing::warn!(lease = %core.lease, %error, "renewal failed, trying again");
                core.set_state(SessionState::Suspect);
                next = Instant::now() + jittered(ttl(&core) / 20);
            }
            Err(_) => {
                tracing::warn!(lease = %core.lease, ?limit, "no answer to a renewal");
                core.set_state(SessionState::Suspect);
                next = Instant::now() + jittered(ttl(&core) / 20);
            }
        }
    }
    core.end(SessionState::Lost);
    if !core.orphaned.load(std::sync::atomic::Ordering::Acquire) {
        settle(&core).await;
    }
}

/// Revokes the lease, for as long as the server could still know it.
async fn settle(core: &SessionCore) {
    let ttl = ttl(core);
    let give_up = Instant::now() + ttl * 2 + core.backend.profile().expiry_lag;
    let mut wait = Duration::from_millis(50);
    loop {
        match core.backend.revoke(&core.lease).await {
            Ok(()) => return,
            Err(error) if Instant::now() >= give_up => {
                tracing::warn!(lease = %core.lease, %error, "left to the server, which ends it after its ttl");
                return;
            }
            Err(error) => tracing::debug!(lease = %core.lease, %error, "revoke owed"),
        }
        tokio::time::sleep(jittered(wait)).await;
        wait = (wait * 2).min(ttl / 3).max(Duration::from_millis(50));
    }
}

fn ttl(core: &SessionCore) -> Duration {
    Duration::from_nanos(core.ttl.load(std::sync::atomic::Ordering::Acquire))
}

/// A third of the TTL: one renewal may fail and the next is still in time. Jittered downwards, so that
/// many sessions opened at once do not renew at once.
fn pause(core: &SessionCore) -> Duration {
    let third = ttl(core) / 3;
    third - Duration::from_nanos(rand::random_range(0..=nanos(third) / 5))
}

fn jittered(time: Duration) -> Duration {
    let time = time.max(Duration::from_millis(1));
    time / 2 + Duration::from_nanos(rand::random_range(0..=nanos(time)))
}
