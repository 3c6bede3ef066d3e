//! Chaos: faults by seed, over every verb, for tests of what stands above.
//!
//! Promise: with the same seed and the same order of calls, the same faults happen. A fault is one that a real
//! network can produce, so whatever breaks under it would break in production.

use std::{future::Future, sync::Mutex, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{Op, Verb, Wrap};
use crate::error::{Error, ErrorKind, Result};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The request is never sent: `Unavailable`.
    Refuse,
    /// The request is carried out and the reply is lost: `Ambiguous` for writes, `Unavailable` for reads.
    LoseReply,
    /// The request is sent after a pause of up to this long.
    Delay(Duration),
    /// The reply arrives after a pause of up to this long.
    DelayReply(Duration),
}

/// How often a fault strikes which verbs.
#[derive(Debug, Clone)]
pub struct Rule {
    /// What goes wrong.
    pub fault: Fault,
    /// From 0 (never) to 1 (always).
    pub probability: f64,
    /// The verbs concerned; all where empty.
    pub verbs: Vec<Verb>,
}

/// Makes calls fail on purpose.
#[derive(Debug)]
pub struct Chaos {
    rules: Vec<Rule>,
    rng: Mutex<StdRng>,
}

impl Chaos {
    /// Applies the rules, each drawn for on its own at every call, by a generator that starts from `seed`.
    pub fn new(seed: u64, rules: Vec<Rule>) -> Self {
        Self { rules, rng: Mutex::new(StdRng::seed_from_u64(seed)) }
    }

    /// A bit of everything: each fault strikes a call with this probability.
    pub fn uniform(seed: u64, probability: f64, longest_delay: Duration) -> Self {
        let faults = [Fault::Refuse, Fault::LoseReply, Fault::Delay(longest_delay), Fault::DelayReply(longest_delay)];
        Self::new(seed, faults.map(|fault| Rule { fault, probability, verbs: Vec::new() }).into())
    }

    /// Draws once per rule and delay, so that the sequence depends on the order of calls alone.
    fn draw(&self, verb: Verb) -> Vec<(Fault, Duration)> {
        let mut rng = self.rng.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let concerned = self.rules.iter().filter(|r| r.verbs.is_empty() || r.verbs.contains(&verb));
        concerned
            .filter_map(|rule| {
                let strikes = rng.random_bool(rule.probability.clamp(0.0, 1.0));
                let part: f64 = rng.random();
                strikes.then(|| match rule.fault {
                    Fault::Delay(longest) | Fault::DelayReply(longest) => (rule.fault, longest.mul_f64(part)),
                    fault => (fault, Duration::ZERO),
                })
            })
            .collect()
    }
}

impl Wrap for Chaos {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        let faults = self.draw(op.verb);
        let failed = |kind, what| {
            tracing::debug!(?op, what, "chaos");
            Err(Error::new(kind, op.verb.as_str(), what).key(op.subject).on(op.backend))
        };
        for (fault, pause) in &faults {
            match fault {
                Fault::Refuse => return failed(ErrorKind::Unavailable, "refused on purpose"),
                Fault::Delay(_) => tokio::time::sleep(*pause).await,
                Fault::LoseReply | Fault::DelayReply(_) => {}
            }
        }
        let outcome = call().await;
        for (fault, pause) in &faults {
            match fault {
                Fault::LoseReply if op.verb.writes() => {
                    return failed(ErrorKind::Ambiguous, "reply lost on purpose");
                }
                Fault::LoseReply => return failed(ErrorKind::Unavailable, "reply lost on purpose"),
                Fault::DelayReply(_) => tokio::time::sleep(*pause).await,
                Fault::Refuse | Fault::Delay(_) => {}
            }
        }
        outcome
    }
}
