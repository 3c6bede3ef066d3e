//! Trace and metrics: what every call did, for `tracing` and the `metrics` facade.
//!
//! Promise: names and labels are stable; keys appear in traces only, values and credentials nowhere.
//!
//! | metric | kind | labels |
//! |---|---|---|
//! | `quorate_calls_total` | counter | `backend`, `verb`, `outcome` (`ok` or the error's kind) |
//! | `quorate_call_seconds` | histogram | `backend`, `verb` |

use std::{collections::HashMap, fmt, future::Future, sync::Mutex};

use metrics::{Counter, Histogram};
use tokio::time::Instant;
use tracing::Instrument as _;

use super::{Op, Verb, Wrap};
use crate::error::{ErrorKind, Result};

/// A span `quorate` per call, with verb, subject and backend, and an event for every error.
#[derive(Debug, Clone, Copy)]
pub struct Trace;

impl Wrap for Trace {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return call().await;
        }
        let span = tracing::debug_span!(
            "quorate",
            verb = op.verb.as_str(),
            subject = %op.subject,
            backend = op.backend
        );
        async {
            let outcome = call().await;
            if let Err(error) = &outcome {
                tracing::debug!(kind = %error.kind(), %error, "failed");
            }
            outcome
        }
        .instrument(span)
        .await
    }
}

/// Counts calls and their time through the `metrics` facade.
///
/// The handles are bound to the recorder installed when the layer is made: install yours before connecting.
pub struct Metrics {
    backend: &'static str,
    verbs: Vec<(Counter, Histogram)>,
    // Errors are rare: their counters are made when first needed.
    errors: Mutex<HashMap<(Verb, ErrorKind), Counter>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Metrics({})", self.backend)
    }
}

impl Metrics {
    /// Metrics labelled with the backend's name.
    pub fn new(backend: &'static str) -> Self {
        let verbs = Verb::ALL
            .iter()
            .map(|verb| {
                let verb = verb.as_str();
                (
                    metrics::counter!("quorate_calls_total", "backend" => backend, "verb" => verb, "outcome" => "ok"),
                    metrics::histogram!("quorate_call_seconds", "backend" => backend, "verb" => verb),
                )
            })
            .collect();
        Self { backend, verbs, errors: Mutex::default() }
    }

    fn count_error(&self, verb: Verb, kind: ErrorKind) {
        let mut errors = self.errors.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        errors
            .entry((verb, kind))
            .or_insert_with(|| {
                metrics::counter!(
                    "quorate_calls_total",
                    "backend" => self.backend, "verb" => verb.as_str(), "outcome" => kind.as_str()
                )
            })
            .increment(1);
    }
}

impl Wrap for Metrics {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        let started = Instant::now();
        let outcome = call().await;
        let (ok, seconds) = &self.verbs[op.verb as usize];
        match &outcome {
            Ok(_) => ok.increment(1),
            Err(error) => self.count_error(op.verb, error.kind()),
        }
        seconds.record(started.elapsed());
        outcome
    }
}
