//! Recovery: finishing what a driver left behind.
//!
//! Promise: see [`Recoverer`].

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until, timeout},
};

use super::{
    Branch, Decision, Finish, Participant, Transactions, TxId,
    deliver::{finish, guarded},
    log::{Divergence, Open, Standing, Verdict, Wish},
    steps::Step,
};
use crate::{
    backend::{Check, Entry},
    error::{ErrorKind, Result},
    key::{Dir, KeyRange},
    lock::{Lock, LockGuard},
    watch::{Watch, WatchEvent},
};

/// How many transactions one recoverer works on at a time.
const AT_ONCE: usize = 16;
/// How long one attempt may take before others get a chance.
const ATTEMPT: Duration = Duration::from_secs(30);

/// How a recoverer works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecoverOptions {
    /// How often the log is looked through. The death of a driver is noticed without that.
    pub every: Duration,
    /// For how long a driver must be missing before its transactions are taken over.
    pub grace: Duration,
    /// How long a recovered transaction stays in the log when all have confirmed, so that a driver that was only cut off
    /// can still learn what became of it.
    pub remember: Duration,
}

impl RecoverOptions {
    /// Sets [`every`](Self::every).
    #[must_use]
    pub fn every(mut self, every: Duration) -> Self {
        self.every = every;
        self
    }

    /// Sets [`grace`](Self::grace).
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets [`remember`](Self::remember).
    #[must_use]
    pub fn remember(mut self, remember: Duration) -> Self {
        self.remember = remember;
        self
    }
}

impl Default for RecoverOptions {
    fn default() -> Self {
        Self { every: Duration::from_secs(5), grace: Duration::from_secs(1), remember: Duration::from_secs(60) }
    }
}

/// Finishes what drivers left behind, until it is dropped. Any number of processes may run one.
///
/// # What is promised
/// - It takes a transaction over when its driver's session has ended, or when it has stood in the log for much longer than
///   its limit; one recoverer at a time, under a lock whose fence is part of every write.
/// - What is not decided is aborted, or, with three phases, committed if all were found in favour. What is decided is carried out, with growing pauses, for ever. It is forgotten only
///   when everyone who has to has confirmed.
/// - Branches of participants that only other processes have enlisted are left to recoverers there.
/// - What stands prepared in an enlisted participant although its transaction is over came late, and is aborted. The body
///   of such a branch is not known any more: it is empty.
/// - What cannot be read is left alone: see [`Transactions::in_doubt`].
#[derive(Debug)]
#[must_use = "it stops when dropped"]
pub struct Recoverer {
    handle: JoinHandle<()>,
}

impl Drop for Recoverer {
    /// What is under way is dropped at its current await; its lock is released in the background.
    fn drop(&mut self) {
        self.handle.abort();
    }
}

impl Transactions {
    /// Starts to recover transactions of this group. Participants may be enlisted before or later.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn recover(&self) -> Recoverer {
        self.recover_with(RecoverOptions::default())
    }

    /// As [`recover`](Self::recover), with options.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn recover_with(&self, options: RecoverOptions) -> Recoverer {
        let every = options.every.max(Duration::from_millis(10));
        let options = RecoverOptions { every, ..options };
        let run = Run { all: self.clone(), options, seen: HashMap::new(), missing: HashMap::new() };
        Recoverer { handle: tokio::spawn(run.run()) }
    }
}

/// What is known of one transaction in the log.
#[derive(Debug)]
struct Seen {
    since: Instant,
    /// Not before.
    next: Instant,
    under_way: bool,
    /// All have confirmed since then.
    finished: Option<Instant>,
}

/// What came of an attempt.
enum Ended {
    /// All have confirmed; it still stands in the log.
    Finished,
    /// It is not in the log any more.
    Forgotten,
    /// Others are at it, or somebody has not confirmed yet.
    Later,
}

struct Run {
    all: Transactions,
    options: RecoverOptions,
    seen: HashMap<TxId, Seen>,
    /// The drivers that transactions name and nobody shows, since when.
    missing: HashMap<String, Instant>,
}

impl Run {
    async fn run(mut self) {
        let mut working: JoinSet<(TxId, Result<Ended>)> = JoinSet::new();
        let mut drivers: Option<Watch> = None;
        let mut next = Instant::now();
        let mut orphans = Instant::now();
        // In a task of its own: a participant that hangs holds up nothing else.
        let mut sweep = JoinSet::new();
        loop {
            if drivers.is_none() {
                drivers = self.watch_drivers().await;
            }
            if next <= Instant::now() {
                next = self.scan(&mut working).await;
            }
            if orphans <= Instant::now() {
                if sweep.is_empty() {
                    let all = self.all.clone();
                    sweep.spawn(async move { abort_forgotten(&all, &all.all_enlisted()).await });
                }
                orphans = Instant::now() + self.options.every.mul_f64(rand::random_range(1.0..2.0));
            }
            tokio::select! {
                gone = driver_gone(&mut drivers) => if gone {
                    next = next.min(Instant::now());
                },
                Some(ended) = working.join_next(), if !working.is_empty() => {
                    if let Ok((id, outcome)) = ended {
                        self.ended(id, outcome);
                    }
                    next = next.min(Instant::now() + self.options.every / 4);
                }
                Some(_) = sweep.join_next(), if !sweep.is_empty() => {}
                () = sleep_until(next.min(orphans)) => {}
            }
        }
    }

    /// Without a watch the looks every now and then do; it only makes them earlier.
    async fn watch_drivers(&self) -> Option<Watch> {
        let range = KeyRange::prefix(&self.all.log().drivers, "").ok()?;
        self.all.log().backend.watch(&range).await.ok()
    }

    /// Looks through the log and begins what is due; returns when to look again.
    async fn scan(&mut self, working: &mut JoinSet<(TxId, Result<Ended>)>) -> Instant {
        let now = Instant::now();
        let regular = now + self.options.every.mul_f64(rand::random_range(0.75..1.25));
        let Ok((found, alive)) = self.look().await.inspect_err(|error| tracing::debug!(%error, "no look at the log"))
        else {
            return regular;
        };
        let mut wanted = regular;
        let (mut standing, mut named) = (HashSet::new(), HashSet::new());
        for entry in found {
            let Ok(tx) = self.all.log().open(entry).inspect_err(|error| tracing::warn!(%error, "left alone")) else {
                continue;
            };
            standing.insert(tx.id);
            named.insert(tx.record.driver.clone());
            let fresh = Seen { since: now, next: now, under_way: false, finished: None };
            let seen = self.seen.entry(tx.id).or_insert(fresh);
            let driver_lives = alive.contains(&tx.record.driver);
            let missing = if driver_lives {
                self.missing.remove(&tx.record.driver);
                None
            } else {
                Some(*self.missing.entry(tx.record.driver.clone()).or_insert(now))
            };
            // Twice the limit is what a driver may need; whoever takes longer is not one that works.
            let overdue = seen.since + 2 * tx.record.within() + 4 * self.options.grace;
            let due = missing.map_or(overdue, |since| (since + self.options.grace).min(overdue)).max(seen.next);
            if seen.under_way {
                continue;
            }
            if due > now || working.len() >= AT_ONCE {
                wanted = wanted.min(due.max(now + Duration::from_millis(10)));
                continue;
            }
            seen.under_way = true;
            let forget = seen.finished.is_some() || self.options.remember.is_zero();
            let (all, id) = (self.all.clone(), tx.id);
            working.spawn(async move { (id, take_over(&all, tx, forget).await) });
        }
        metrics::gauge!("quorate_transactions_open", "group" => self.all.group().to_owned()).set(standing.len() as f64);
        self.seen.retain(|id, seen| seen.under_way || standing.contains(id));
        self.missing.retain(|driver, _| named.contains(driver));
        wanted
    }

    /// The transactions first: one that is seen here has a driver that was seen before it.
    async fn look(&self) -> Result<(Vec<Entry>, HashSet<String>)> {
        let log = self.all.log();
        let found = log.all(&log.txs).await?;
        if found.is_empty() {
            return Ok((found, HashSet::new()));
        }
        let alive = log.all(&log.drivers).await?.iter().filter_map(|entry| entry.key.name()).collect();
        Ok((found, alive))
    }

    fn ended(&mut self, id: TxId, outcome: Result<Ended>) {
        let Some(seen) = self.seen.get_mut(&id) else { return };
        let now = Instant::now();
        seen.under_way = false;
        match outcome {
            Ok(Ended::Finished) => {
                seen.finished = Some(now);
                seen.next = now + self.options.remember;
            }
            Ok(Ended::Forgotten) => drop(self.seen.remove(&id)),
            Ok(Ended::Later) => seen.next = now + self.options.every.mul_f64(rand::random_range(0.5..1.0)),
            Err(error) => {
                tracing::warn!(%id, %error, "not recovered yet, trying again");
                seen.next = now + self.options.every.mul_f64(rand::random_range(0.5..1.0));
            }
        }
    }
}

/// Returns whether a driver has gone; not before something was heard.
async fn driver_gone(drivers: &mut Option<Watch>) -> bool {
    let Some(watch) = drivers else { return std::future::pending().await };
    match watch.next().await {
        Some(WatchEvent::Delete { .. } | WatchEvent::Reset(_)) => true,
        Some(WatchEvent::Put(_) | WatchEvent::Interrupted(_)) => false,
        None => {
            *drivers = None;
            // Not opened again at full speed if it ends at once.
            tokio::time::sleep(Duration::from_secs(1)).await;
            true
        }
    }
}

async fn take_over(all: &Transactions, tx: Open, forget: bool) -> Result<Ended> {
    let line = Dir::new(["txlock", all.group(), &tx.id.to_string()]);
    let Some(guard) = Lock::new(all.inner.coord.clone(), line).try_acquire().await? else { return Ok(Ended::Later) };
    // It may be over since it was seen.
    let outcome = match all.log().entry(&tx.key).await {
        Ok(Some(entry)) if entry.modified == tx.revision => {
            let attempt = timeout(ATTEMPT, carry_out(all, &guard, &tx, forget));
            guard.protect(attempt).await.and_then(|done| done.unwrap_or(Ok(Ended::Later)))
        }
        Ok(_) => Ok(Ended::Forgotten),
        Err(error) => Err(error),
    };
    // Not released, it is given back in the background.
    let _ = guard.release().await;
    outcome
}

async fn carry_out(all: &Transactions, guard: &LockGuard, tx: &Open, forget: bool) -> Result<Ended> {
    let (log, hook) = (all.log(), &all.inner.options.hook);
    hook.at(tx.id, || Step::TakenOver).await;
    let fence = || Some(guard.fence().check());
    let decision = match log.standing(tx.id).await? {
        Standing::Decided(decision) => decision,
        Standing::Unknown => return Ok(Ended::Forgotten),
        Standing::Undecided => match decide(all, tx, &fence).await? {
            Some(decision) => decision,
            None => return Ok(Ended::Forgotten),
        },
    };
    let waiting = log.tell_waiting(tx, decision, fence()).await?;
    let (mut open, diverged) = tell(all, tx, decision).await;
    if decision == Decision::Commit {
        open.extend(waiting);
    }
    if !open.is_empty() {
        tracing::debug!(id = %tx.id, %decision, ?open, "not confirmed by all yet");
        return Ok(Ended::Later);
    }
    // What an operator has to see is written with the forgetting, so that it is written once.
    if !forget && diverged.is_empty() {
        return Ok(Ended::Finished);
    }
    hook.at(tx.id, || Step::Forget).await;
    log.forget(tx, decision, &diverged, fence()).await?;
    hook.at(tx.id, || Step::Forgotten).await;
    Ok(Ended::Forgotten)
}

/// Decides what nobody has decided: commits what was found ready, and aborts the rest. `None` if it is over.
async fn decide(all: &Transactions, tx: &Open, fence: &impl Fn() -> Option<Check>) -> Result<Option<Decision>> {
    let (log, hook) = (all.log(), &all.inner.options.hook);
    let mut wanted = if log.is_ready(tx).await? { Decision::Commit } else { Decision::Abort };
    loop {
        hook.at(tx.id, || Step::Decide(wanted)).await;
        let why = "given up by its driver: that is gone, or overdue";
        let wish = Wish { why, fence: fence(), also: None };
        match log.decide(tx, wanted, &wish, &mut Vec::new()).await? {
            Verdict::Made => {
                tracing::info!(id = %tx.id, decision = %wanted, "an undecided transaction is decided");
                hook.at(tx.id, || Step::Decided(wanted)).await;
                return Ok(Some(wanted));
            }
            Verdict::Stands(decision) => return Ok(Some(decision)),
            // Its driver lives after all, and has found everybody in favour meanwhile.
            Verdict::Ready => wanted = Decision::Commit,
            Verdict::Gone => return Ok(None),
        }
    }
}

/// Tells all branches that this process can reach; returns those that it cannot, and the heuristic outcomes.
async fn tell(all: &Transactions, tx: &Open, decision: Decision) -> (Vec<String>, Vec<Divergence>) {
    let (mut unreached, mut diverged) = (Vec::new(), Vec::new());
    let mut telling = JoinSet::new();
    let limit = tx.record.within().clamp(Duration::from_secs(1), ATTEMPT);
    for branch in tx.record.branches.iter().filter(|branch| !branch.remote) {
        let Some(participant) = all.enlisted(&branch.name) else {
            unreached.push(branch.name.clone());
            continue;
        };
        let (name, hook) = (branch.name.clone(), all.inner.options.hook.clone());
        let branch = Branch {
            group: all.log().group.clone(),
            id: tx.id,
            participant: branch.name.as_str().into(),
            body: branch.body.clone(),
            served: false,
        };
        telling.spawn(async move { (name, finish(participant, branch, decision, limit, hook).await) });
    }
    while let Some(told) = telling.join_next().await {
        // `finish` itself never panics: the participant runs in a task of its own.
        let Ok((participant, Finish::Diverged(what))) = told else { continue };
        tracing::error!(id = %tx.id, participant, %decision, what, "a heuristic outcome");
        diverged.push(Divergence { participant, what });
    }
    (unreached, diverged)
}

/// Aborts what stands prepared although its transaction is over: it came late.
pub(super) async fn abort_forgotten(all: &Transactions, participants: &[(String, Arc<dyn Participant>)]) {
    let limit = all.inner.options.within;
    for (name, participant) in participants {
        let mut over = Vec::new();
        for id in prepared(all, name, participant).await {
            // It was begun before it was prepared: unknown now means over.
            if let Ok(Standing::Unknown) = all.log().standing(id).await {
                over.push(id);
            }
        }
        if over.is_empty() {
            continue;
        }
        // A transaction that ended between the two looks has left nothing prepared. What still stands is never told.
        let still = prepared(all, name, participant).await;
        for id in over.into_iter().filter(|id| still.contains(id)) {
            let branch = Branch::new(all.group(), id, name, "");
            let told = participant.clone();
            tracing::warn!(%branch, "prepared although its transaction is over: aborted");
            if let Err(why) = guarded(limit, async move { told.abort(&branch).await.map(drop) }).await {
                tracing::warn!(%id, participant = name, why, "not aborted yet");
            }
        }
    }
}

async fn prepared(all: &Transactions, name: &str, participant: &Arc<dyn Participant>) -> Vec<TxId> {
    let (asked, group) = (participant.clone(), all.group().to_owned());
    let answer = guarded(all.inner.options.within, async move { asked.in_doubt(&group).await }).await;
    answer.unwrap_or_else(|why| {
        tracing::debug!(participant = name, why, "cannot be asked what is in doubt");
        Vec::new()
    })
}

/// Whether an error means that somebody else has taken over.
pub(super) fn is_taken_over(kind: ErrorKind) -> bool {
    kind == ErrorKind::SessionLost
}
