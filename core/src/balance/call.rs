//! Calls: a request that is tried again on another instance.
//!
//! Promise: every attempt is reported to the balancer, one that hangs as a failure; no attempt begins after the limit,
//! and none is on its way when the call has returned; nothing is sent twice unless the caller said that it may be. A
//! failed call tells of every attempt, in their order.

use std::{
    error::Error as StdError,
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::time::{Instant, sleep, timeout};

use super::{Balancer, Pick, member::State};
use crate::discovery::Instance;

/// How often a request is tried, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallPolicy {
    /// How many attempts there are, the first one included; at least one. Three by default. The error of a call holds
    /// one entry for each.
    pub attempts: u32,
    /// After this an attempt without an outcome is given up, and its instance has failed; at most `limit`. A second by
    /// default. It is how an instance that hangs is found out: choose a time that one that works keeps to.
    pub attempt_limit: Duration,
    /// After this the call ends, however many attempts are left. Five seconds by default; `Duration::MAX` for no limit.
    pub limit: Duration,
    /// While there are instances that have not been tried, the next attempt follows at once. When all have been, each
    /// further attempt waits for this long, twice as long each time, with up to as much again at random. 20
    /// milliseconds by default.
    pub pause: Duration,
    /// What `pause` grows to. A second by default.
    pub longest_pause: Duration,
}

impl Default for CallPolicy {
    fn default() -> Self {
        Self {
            attempts: 3,
            attempt_limit: Duration::from_secs(1),
            limit: Duration::from_secs(5),
            pause: Duration::from_millis(20),
            longest_pause: Duration::from_secs(1),
        }
    }
}

impl CallPolicy {
    fn pauses(&self) -> ExponentialBackoff {
        let pauses = ExponentialBuilder::default().with_min_delay(self.pause).with_max_delay(self.longest_pause);
        pauses.with_jitter().without_max_times().build()
    }
}

/// Why an attempt has no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause<E> {
    /// It failed with this error.
    Failed(E),
    /// It had no outcome in time, and was dropped. Whether the instance has carried it out is not known.
    Elapsed,
}

/// What a failed attempt says about its instance, and about the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The instance has failed, and the request may be sent to another: it surely was not carried out, or may be twice.
    Elsewhere,
    /// The instance has failed, and the request may have been carried out: it must not be sent again.
    Failed,
    /// The error is an answer as a working instance gives it; another one would say the same. Of an attempt that was
    /// [`Elapsed`](Cause::Elapsed): nothing is held against the instance.
    Answered,
}

/// An attempt without a result.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt<E> {
    /// Where the request was sent.
    pub instance: Arc<Instance>,
    /// Why there is no result.
    pub cause: Cause<E>,
    /// How long it took.
    pub took: Duration,
}

/// Why a call ended without a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ended {
    /// No instance may be picked: there is none, or all are ejected. There may have been attempts before.
    NoInstance,
    /// As many attempts as the policy allows have failed.
    Attempts,
    /// The limit of the whole call is over.
    Limit,
    /// The last attempt was judged to be the last.
    Judged,
    /// Too many calls had to be sent again lately: see [`Builder::retry_budget`](super::Builder::retry_budget).
    Budget,
}

/// A call without a result: why it ended, and every attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CallError<E> {
    /// Why no further attempt was made.
    pub ended: Ended,
    /// All attempts, the first one first.
    pub attempts: Vec<Attempt<E>>,
}

impl<E> CallError<E> {
    /// The error of the last attempt that had one.
    pub fn into_last(self) -> Option<E> {
        self.attempts.into_iter().rev().find_map(|attempt| match attempt.cause {
            Cause::Failed(error) => Some(error),
            Cause::Elapsed => None,
        })
    }
}

impl Balancer {
    /// Sends a request to an instance and, if that fails, to another one, as the policy and `judge` allow. Each attempt
    /// is a [`Pick`] of its own, reported by what became of it. Whoever has been tried is not tried again before all
    /// that may be picked have been.
    ///
    /// `attempt` sends the request, once each time; a limit of its own is not needed. `judge` says what a failed attempt
    /// means; `|_| Verdict::Elsewhere` is right only for requests that may be carried out twice.
    ///
    /// An attempt that took the whole [`attempt_limit`](CallPolicy::attempt_limit) is a failure of its instance, one
    /// that the limit of the call cut shorter than that is not.
    ///
    /// # Errors
    /// As [`Ended`] lists them, with the attempts. Without any instance, at once.
    ///
    /// # Cancel safety
    /// A dropped call drops its attempt, which then counts as neither success nor failure: the caller gave up for
    /// reasons of its own. Put limits into the policy, not around the call, or an instance that hangs is never found
    /// out. Whether a request that was on its way has been carried out is not known.
    ///
    /// ```
    /// use quorate_core::balance::{Balancer, CallPolicy, Cause, Strategy, Verdict};
    /// # use std::{io, sync::Arc};
    /// # use quorate_core::{discovery::Instance};
    /// # async fn send(_: String) -> io::Result<u32> { Ok(42) }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let balancer = Balancer::new(Strategy::peak_ewma());
    /// # balancer.set([Arc::new(Instance::new("shop", "10.0.0.1:80"))]);
    /// let judge = |cause: &Cause<io::Error>| match cause {
    ///     Cause::Failed(error) if error.kind() == io::ErrorKind::ConnectionRefused => Verdict::Elsewhere, // never arrived
    ///     _ => Verdict::Failed,
    /// };
    /// let answer = balancer.call(&CallPolicy::default(), judge, |instance| send(instance.endpoint())).await;
    /// # assert_eq!(answer.unwrap(), 42);
    /// # }
    /// ```
    pub async fn call<T, E, F>(
        &self,
        policy: &CallPolicy,
        judge: impl FnMut(&Cause<E>) -> Verdict,
        attempt: impl FnMut(Arc<Instance>) -> F,
    ) -> Result<T, CallError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        self.run(None, policy, judge, attempt).await
    }

    /// As [`call`](Self::call), beginning with the instance that the key belongs to, where the strategy goes by keys;
    /// then with the one that would have the key without those that were tried.
    ///
    /// # Errors
    /// As for [`call`](Self::call).
    ///
    /// # Cancel safety
    /// As for [`call`](Self::call).
    pub async fn call_for<T, E, F>(
        &self,
        key: &[u8],
        policy: &CallPolicy,
        judge: impl FnMut(&Cause<E>) -> Verdict,
        attempt: impl FnMut(Arc<Instance>) -> F,
    ) -> Result<T, CallError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        self.run(Some(key), policy, judge, attempt).await
    }

    async fn run<T, E, F>(
        &self,
        key: Option<&[u8]>,
        policy: &CallPolicy,
        mut judge: impl FnMut(&Cause<E>) -> Verdict,
        mut attempt: impl FnMut(Arc<Instance>) -> F,
    ) -> Result<T, CallError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let started = Instant::now();
        self.inner.budget.iter().for_each(Budget::earn);
        let (mut attempts, mut round) = (Vec::new(), Round::default());
        // What one attempt has if nothing else has taken of the call's time.
        let allowed = policy.attempt_limit.min(policy.limit);
        let ended = loop {
            let pick = match self.next(key, policy, started, &mut round).await {
                Ok(pick) => pick,
                Err(ended) => break ended,
            };
            let left = policy.limit.saturating_sub(started.elapsed());
            let begun = Instant::now();
            let cause = match timeout(allowed.min(left), attempt(Arc::clone(pick.instance()))).await {
                Ok(Ok(result)) => {
                    pick.success();
                    return Ok(result);
                }
                Ok(Err(error)) => Cause::Failed(error),
                Err(_) => Cause::Elapsed,
            };
            let verdict = judge(&cause);
            let (elapsed, instance) = (matches!(cause, Cause::Elapsed), Arc::clone(pick.instance()));
            let cut_short = elapsed && left < allowed;
            tracing::debug!(%instance, ?verdict, elapsed, "an attempt failed");
            attempts.push(Attempt { instance, cause, took: begun.elapsed() });
            match verdict {
                Verdict::Answered if !elapsed => pick.success(),
                Verdict::Elsewhere | Verdict::Failed if !cut_short => pick.failure(),
                _ => drop(pick),
            }
            if cut_short {
                break Ended::Limit;
            }
            if verdict != Verdict::Elsewhere {
                break Ended::Judged;
            }
            if attempts.len() >= policy.attempts.max(1) as usize {
                break Ended::Attempts;
            }
            if !self.inner.budget.as_ref().is_none_or(Budget::take) {
                break Ended::Budget;
            }
        };
        Err(CallError { ended, attempts })
    }

    /// Somebody who has not been tried in this round; when all have been, a pause later, the first of another round.
    async fn next(
        &self,
        key: Option<&[u8]>,
        policy: &CallPolicy,
        started: Instant,
        round: &mut Round,
    ) -> Result<Pick, Ended> {
        let left = || policy.limit.saturating_sub(started.elapsed());
        if left().is_zero() {
            return Err(Ended::Limit);
        }
        let mut pick = if round.repeats.is_none() { self.inner.pick(key, &round.tried) } else { None };
        if pick.is_none() {
            if round.tried.is_empty() {
                return Err(Ended::NoInstance);
            }
            let pauses = round.repeats.get_or_insert_with(|| policy.pauses());
            let pause = pauses.next().unwrap_or(policy.longest_pause);
            sleep(pause.min(left())).await;
            if left().is_zero() {
                return Err(Ended::Limit);
            }
            pick = self.inner.pick(key, &round.tried);
            if pick.is_none() {
                // A new round, beginning with anybody but the last of the old one.
                let last = round.tried.split_off(round.tried.len() - 1);
                round.tried.clear();
                pick = self.inner.pick(key, &last).or_else(|| self.inner.pick(key, &[]));
            }
        }
        let pick = pick.ok_or(Ended::NoInstance)?;
        round.tried.push(Arc::clone(pick.state()));
        Ok(pick)
    }
}

/// What calls may be sent again, in hundredths of an attempt: each call earns its share, each repeat costs one.
#[derive(Debug)]
pub(super) struct Budget {
    share: u32,
    saved: AtomicU32,
}

impl Budget {
    const ONE: u32 = 100;
    /// For clients that have only begun, or seldom call.
    const FIRST: u32 = 10 * Self::ONE;
    /// What can be saved, so that good times do not pay for a storm.
    const MOST: u32 = 100 * Self::ONE;

    pub(super) fn new(percent: u32) -> Self {
        Self { share: percent.min(Self::MOST), saved: AtomicU32::new(Self::FIRST) }
    }

    fn earn(&self) {
        let more = |saved: u32| (saved < Self::MOST).then(|| (saved + self.share).min(Self::MOST));
        let _ = self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    fn take(&self) -> bool {
        self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| saved.checked_sub(Self::ONE)).is_ok()
    }
}

/// Who has been tried since the call began, or since all had been.
#[derive(Default)]
struct Round {
    /// Not by name: who left and came anew is somebody else.
    tried: Vec<Arc<State>>,
    /// The pauses, once all have been tried.
    repeats: Option<ExponentialBackoff>,
}

/// So many attempts are shown.
const SHOWN: usize = 5;

impl<E: fmt::Display> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.ended {
            Ended::NoInstance => "no instance may be picked",
            Ended::Attempts => "all attempts failed",
            Ended::Limit => "the limit of the call is over",
            Ended::Judged => "the request failed and is not sent again",
            Ended::Budget => "the request failed, and too many are sent again already",
        })?;
        for (place, attempt) in self.attempts.iter().take(SHOWN).enumerate() {
            f.write_str(if place == 0 { ": " } else { "; " })?;
            match &attempt.cause {
                Cause::Failed(error) => write!(f, "{}: {error}", attempt.instance)?,
                Cause::Elapsed => write!(f, "{}: no answer within {:?}", attempt.instance, attempt.took)?,
            }
        }
        match self.attempts.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl<E: StdError + 'static> StdError for CallError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.attempts.iter().rev().find_map(|attempt| match &attempt.cause {
            Cause::Failed(error) => Some(error as &(dyn StdError + 'static)),
            Cause::Elapsed => None,
        })
    }
}
