//! Telling a participant the outcome, until it has confirmed.
//!
//! Promise: a participant that fails, panics or hangs is told again, with growing pauses, for as long as the future lives.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    Branch, Decision, Finish, Participant,
    desk::{LONGEST, backoff},
    steps::{Hook, Step},
};
use crate::error::Result;

/// A task that ends with the value.
struct Bound<T>(JoinHandle<T>);

impl<T> Drop for Bound<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs a call to a participant so that a panic or a hang is an answer: why there was none.
pub(super) async fn guarded<T: Send + 'static>(
    limit: Duration,
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T, String> {
    let mut task = Bound(tokio::spawn(call));
    match timeout(limit, &mut task.0).await {
        Ok(Ok(Ok(answer))) => Ok(answer),
        Ok(Ok(Err(error))) => Err(error.to_string()),
        Ok(Err(stopped)) if stopped.is_panic() => Err("it panicked".to_owned()),
        Ok(Err(_)) => Err("it was stopped".to_owned()),
        Err(_) => Err(format!("no answer within {limit:?}")),
    }
}

/// Tells the outcome until it is confirmed.
pub(super) async fn finish(
    participant: Arc<dyn Participant>,
    branch: Branch,
    decision: Decision,
    limit: Duration,
    hook: Hook,
) -> Finish {
    let mut pauses = backoff();
    let name = || branch.participant.to_string();
    loop {
        hook.at(branch.id, || Step::Deliver(name())).await;
        let (participant, told) = (participant.clone(), branch.clone());
        let call = async move {
            match decision {
                Decision::Commit => participant.commit(&told).await,
                Decision::Abort => participant.abort(&told).await,
            }
        };
        match guarded(limit, call).await {
            Ok(finish) => {
                hook.at(branch.id, || Step::Acknowledged(name())).await;
                return finish;
            }
            Err(why) => tracing::warn!(%branch, %decision, why, "not confirmed, telling it again"),
        }
        sleep(pauses.next().unwrap_or(LONGEST)).await;
    }
}
