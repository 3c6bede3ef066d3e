//! Hand-off: from the start of a release in one client to the grant in another.
//!
//! Beside it the least that could be: one write by one raw client, and the notification of it at another that
//! listens already.

use std::time::Duration;

use async_trait::async_trait;
use quorate::{Coordinator, LockGuard};
use quorate_testkit::servers::Server;
use tokio::time::{Instant, sleep, timeout};

use super::{Round, coordinator, pairs::Duel};
use crate::{Outcome, samples::Samples};

const BLOCK: usize = 10;
/// Long enough for the next in line to have asked to be told: some ten round trips.
const SETTLE: Duration = Duration::from_millis(10);
/// A notification that takes this long was lost.
const LOST: Duration = Duration::from_secs(20);

pub(super) async fn compare(raw: &mut dyn Round, ours: &mut dyn Round, limit: Duration) -> Outcome<Duel> {
    let mut duel = Duel::new();
    block(raw).await?;
    block(ours).await?;
    let until = Instant::now() + limit;
    while Instant::now() < until {
        let (first, second) = (block(raw).await?, block(ours).await?);
        duel.add(&first, &second);
        let (first, second) = (block(ours).await?, block(raw).await?);
        duel.add(&second, &first);
    }
    Ok(duel)
}

async fn block(side: &mut dyn Round) -> Outcome<Samples> {
    let mut samples = Samples::new();
    for _ in 0..BLOCK {
        samples.add(side.round(SETTLE).await?);
    }
    Ok(samples)
}

/// Lets `heard` listen in a task of its own, waits for `ready`, and gives what was heard with the time that this was
/// after the beginning of `write`.
pub(super) async fn timed<T: Send + 'static>(
    heard: impl Future<Output = Outcome<T>> + Send + 'static,
    ready: impl Future<Output = Outcome>,
    write: impl Future<Output = Outcome>,
) -> Outcome<(T, Duration)> {
    let heard = tokio::spawn(async move { heard.await.map(|what| (what, Instant::now())) });
    ready.await?;
    let started = Instant::now();
    write.await?;
    let heard = timeout(LOST, heard).await.map_err(|_| format!("nothing was heard within {LOST:?}"))?;
    let (what, at) = heard.map_err(|e| e.to_string())??;
    Ok((what, at.duration_since(started)))
}

pub(super) async fn pause(settle: Duration) -> Outcome {
    sleep(settle).await;
    Ok(())
}

/// Two clients that hand one lock to and fro.
pub(super) struct HandOff {
    /// Whose turn it is to hold comes first.
    clients: [Coordinator; 2],
    guard: Option<LockGuard>,
}

impl HandOff {
    pub(super) async fn new(server: &Server) -> Outcome<Self> {
        Ok(Self { clients: [coordinator(server).await?, coordinator(server).await?], guard: None })
    }
}

#[async_trait]
impl Round for HandOff {
    async fn round(&mut self, settle: Duration) -> Outcome<Duration> {
        let [holder, next] = self.clients.each_ref().map(|client| client.lock("hand-off"));
        let guard = match self.guard.take() {
            Some(guard) => guard,
            None => holder.acquire().await.map_err(|e| e.to_string())?,
        };
        let token = guard.token();
        let heard = async move { next.acquire().await.map_err(|e| e.to_string()) };
        let ready = async {
            while holder.status().await.map_err(|e| e.to_string())?.waiting == 0 {
                sleep(settle / 10).await;
            }
            pause(settle).await
        };
        let release = async { guard.release().await.map_err(|e| e.to_string()) };
        let (guard, time) = timed(heard, ready, release).await?;
        if guard.token() <= token {
            return Err(format!("token {} was granted after {token}", guard.token()));
        }
        self.guard = Some(guard);
        self.clients.reverse();
        Ok(time)
    }
}
