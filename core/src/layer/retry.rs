//! Retry: repeats what surely was not applied, or what may be applied twice.
//!
//! Promise: `Ambiguous` is repeated only for repeatable calls; everything else that may have been applied is
//! handed to the caller at once. Renewals and waits are not repeated here: the session and the recipes have
//! their own deadlines.

use std::{future::Future, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};

use super::{Op, Verb, Wrap};
use crate::error::{Error, ErrorKind, Result};

/// Repeats failed calls with exponential backoff and full jitter.
#[derive(Debug, Clone)]
pub struct Retry {
    policy: ExponentialBuilder,
}

impl Default for Retry {
    /// Up to five repeats, from 20 ms to 1 s apart.
    fn default() -> Self {
        Self::new(5, Duration::from_millis(20), Duration::from_secs(1))
    }
}

impl Retry {
    /// At most `repeats` repeats after the first attempt, the pause doubling from `shortest` to `longest`,
    /// with jitter.
    pub fn new(repeats: usize, shortest: Duration, longest: Duration) -> Self {
        let policy = ExponentialBuilder::default()
            .with_max_times(repeats)
            .with_min_delay(shortest)
            .with_max_delay(longest)
            .with_jitter();
        Self { policy }
    }
}

fn worth_repeating(op: &Op<'_>, error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Unavailable => true,
        ErrorKind::Ambiguous => op.repeatable,
        _ => false,
    }
}

impl Wrap for Retry {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        let mut outcome = call().await;
        if matches!(op.verb, Verb::Renew | Verb::Gone) {
            return outcome;
        }
        // Once an attempt may have been applied, a later "surely not applied" speaks of itself only.
        let mut unsure = false;
        let mut pauses = None;
        while let Err(error) = &outcome {
            unsure |= error.kind() == ErrorKind::Ambiguous;
            if !worth_repeating(&op, error) {
                break;
            }
            let Some(pause) = pauses.get_or_insert_with(|| self.policy.build()).next() else { break };
            tracing::debug!(?op, %error, ?pause, "repeating");
            tokio::time::sleep(pause).await;
            outcome = call().await;
        }
        match outcome {
            // Whatever a later attempt says, it says of itself; only the end of the lease ends the doubt.
            Err(error) if unsure && op.verb.writes() && error.kind() != ErrorKind::SessionLost => {
                Err(error.with_kind(ErrorKind::Ambiguous))
            }
            outcome => outcome,
        }
    }
}
