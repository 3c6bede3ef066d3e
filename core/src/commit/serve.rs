//! Serving: a participant that drivers in other processes reach through the store.
//!
//! Promise: see [`Serving`].

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};

use super::{
    Branch, Decision, Finish, Participant, Transactions, TxId, Vote,
    deliver::{finish, guarded},
    desk::{LONGEST, backoff},
    record::{Mail, Parked, Says, VERSION, Work, WorkState, decode_or_skip, encode},
    recover::{abort_forgotten, is_taken_over},
    steps::Step,
};
use crate::{
    backend::{Check, Entry, Revision, Txn, Write},
    error::{Error, ErrorKind, Result},
    key::{Dir, KeyRange},
    lock::{Lock, LockGuard},
    watch::WatchEvent,
};

/// How many branches are prepared at a time.
const AT_ONCE: usize = 64;
/// A prepare is not hurried: its driver has the limit, and tells when it has given up.
const A_DAY: Duration = Duration::from_secs(86_400);
/// How often the participant is asked for what came late.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Serves a participant by its name, until it is dropped.
///
/// # What is promised
/// - One process serves a name at a time, under a lock whose fence is part of every vote and every confirmation; others
///   that serve the same name stand by. They must reach the same resource.
/// - A vote counts only if the branch has not been aborted meanwhile, in one step at the server.
/// - A process that dies with a branch prepared finds it again when it is back, or its stand-by does: it is asked to
///   prepare once more, and told the outcome once more.
/// - Nothing is decided here. Until the outcome is told, the branch stays prepared.
#[must_use = "it stops when dropped"]
pub struct Serving {
    handle: JoinHandle<()>,
    serves: watch::Receiver<bool>,
}

impl Serving {
    /// Waits until this process is the one that serves.
    ///
    /// # Errors
    /// `Unavailable` if the runtime was shut down.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn ready(&self) -> Result<()> {
        let mut serves = self.serves.clone();
        let ready = serves.wait_for(|serves| *serves).await;
        ready.map(drop).map_err(|_| Error::new(ErrorKind::Unavailable, "serve", "its task was stopped"))
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serving(active: {})", *self.serves.borrow())
    }
}

impl Drop for Serving {
    /// What is under way is dropped at its current await; what was prepared stays prepared.
    fn drop(&mut self) {
        self.handle.abort();
    }
}

impl Transactions {
    /// Serves a participant to drivers in any process that add it with [`Transaction::remote`](super::Transaction::remote).
    ///
    /// # Errors
    /// `InvalidInput` for a bad name.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn serve(&self, name: &str, participant: Arc<dyn Participant>) -> Result<Serving> {
        self.check_name(name)?;
        let dir = self.log().work_dir(name)?;
        let (tell, serves) = watch::channel(false);
        let server = Server { all: self.clone(), name: name.into(), participant, dir };
        Ok(Serving { handle: tokio::spawn(server.run(tell)), serves })
    }
}

struct Server {
    all: Transactions,
    name: Arc<str>,
    participant: Arc<dyn Participant>,
    dir: Dir,
}

impl Server {
    async fn run(self, tell: watch::Sender<bool>) {
        let line = Dir::new(["txserve", self.all.group(), &self.name]);
        let lock = Lock::new(self.all.inner.coord.clone(), line);
        let mut pauses = backoff();
        loop {
            match lock.acquire().await {
                Ok(guard) => {
                    let guard = Arc::new(guard);
                    let served = guard.protect(self.serve(&guard, &tell)).await;
                    tell.send_replace(false);
                    match served {
                        Ok(Ok(())) => pauses = backoff(),
                        Ok(Err(error)) | Err(error) => {
                            tracing::warn!(participant = %self.name, %error, "it is not served now; trying again");
                        }
                    }
                }
                Err(error) => tracing::warn!(participant = %self.name, %error, "it cannot be served yet"),
            }
            sleep(pauses.next().unwrap_or(LONGEST)).await;
        }
    }

    /// Until the watch ends.
    async fn serve(&self, guard: &Arc<LockGuard>, tell: &watch::Sender<bool>) -> Result<()> {
        let mut watch = self.all.log().backend.watch(&KeyRange::prefix(&self.dir, "")?).await?;
        let mut desk = Desk { jobs: JoinSet::new(), current: HashMap::new(), room: Arc::new(Semaphore::new(AT_ONCE)) };
        let mut look = Instant::now();
        let own = [(self.name.to_string(), self.participant.clone())];
        let mut sweep = JoinSet::new();
        loop {
            tokio::select! {
                event = watch.next() => match event {
                    Some(WatchEvent::Reset(now)) => {
                        let found: Vec<_> = now.entries.iter().filter_map(id_of).collect();
                        desk.keep(|id| found.contains(id));
                        for entry in &now.entries {
                            self.begin(guard, &mut desk, entry);
                        }
                        tell.send_replace(true);
                    }
                    Some(WatchEvent::Put(entry)) => self.begin(guard, &mut desk, &entry),
                    Some(WatchEvent::Delete { key, .. }) => {
                        let gone = key.name().and_then(|name| name.parse::<TxId>().ok());
                        desk.keep(|id| Some(*id) != gone);
                    }
                    Some(WatchEvent::Interrupted(_)) => {}
                    None => return watch.end().map_or(Ok(()), Err),
                },
                Some(_) = desk.jobs.join_next(), if !desk.jobs.is_empty() => {}
                Some(_) = sweep.join_next(), if !sweep.is_empty() => {}
                () = sleep_until(look) => {
                    if sweep.is_empty() {
                        let (all, own) = (self.all.clone(), own.clone());
                        sweep.spawn(async move { abort_forgotten(&all, &own).await });
                    }
                    look = Instant::now() + LOOK_EVERY.mul_f64(rand::random_range(0.75..1.25));
                }
            }
        }
    }

    fn begin(&self, guard: &Arc<LockGuard>, desk: &mut Desk, entry: &Entry) {
        let (Some(id), Some(work)) = (id_of(entry), decode_or_skip::<Work>(entry)) else { return };
        if desk.current.get(&id).is_some_and(|(revision, _)| *revision == entry.modified) {
            return;
        }
        let (group, participant) = (self.all.log().group.clone(), self.name.clone());
        let branch = Branch { group, id, participant, body: work.body.clone(), served: true };
        let job = Job {
            all: self.all.clone(),
            participant: self.participant.clone(),
            guard: guard.clone(),
            unchanged: Check::Unchanged { key: entry.key.clone(), modified: entry.modified },
            delete: Write::Delete(entry.key.clone()),
            branch,
            work,
        };
        // Only prepares wait for room: one of them may be waiting for what an outcome lets go.
        let room = (job.work.state == WorkState::Prepare).then(|| desk.room.clone());
        let task = desk.jobs.spawn(async move {
            let _place = match &room {
                // The semaphore is never closed.
                Some(room) => Some(room.acquire().await),
                None => None,
            };
            if let Err(error) = job.run().await {
                tracing::warn!(branch = %job.branch, %error, "left to whoever serves it next");
            }
        });
        if let Some((_, earlier)) = desk.current.insert(id, (entry.modified, task)) {
            earlier.abort();
        }
    }
}

/// The work in hand, by transaction: one job each, for the last state of its record.
struct Desk {
    jobs: JoinSet<()>,
    current: HashMap<TxId, (Revision, AbortHandle)>,
    room: Arc<Semaphore>,
}

impl Desk {
    fn keep(&mut self, wanted: impl Fn(&TxId) -> bool) {
        self.current.retain(|id, (_, task)| {
            let keep = wanted(id);
            if !keep {
                task.abort();
            }
            keep
        });
    }
}

fn id_of(entry: &Entry) -> Option<TxId> {
    entry.key.name()?.parse().ok()
}

/// One state of one work record.
struct Job {
    all: Transactions,
    participant: Arc<dyn Participant>,
    guard: Arc<LockGuard>,
    /// That the work record is still in this state.
    unchanged: Check,
    delete: Write,
    branch: Branch,
    work: Work,
}

impl Job {
    async fn run(&self) -> Result<()> {
        match self.work.state {
            WorkState::Prepare => self.vote().await,
            WorkState::Commit => self.end(Decision::Commit).await,
            WorkState::Abort => self.end(Decision::Abort).await,
        }
    }

    async fn vote(&self) -> Result<()> {
        let hook = &self.all.inner.options.hook;
        hook.at(self.branch.id, || Step::Prepare(self.branch.participant.to_string())).await;
        let (participant, branch) = (self.participant.clone(), self.branch.clone());
        let (says, why) = match guarded(A_DAY, async move { participant.prepare(&branch).await }).await {
            Ok(Vote::Yes) => (Says::Yes, String::new()),
            Ok(Vote::ReadOnly) => (Says::ReadOnly, String::new()),
            Ok(Vote::No(why)) => (Says::No, why),
            Err(why) => (Says::Failed, why),
        };
        // Whoever is out has nothing to be told.
        let out = matches!(says, Says::ReadOnly | Says::No);
        let writes = [self.mail(says, &why)?].into_iter().chain(out.then(|| self.delete.clone())).collect();
        self.write(writes).await?;
        hook.at(self.branch.id, || Step::Voted(self.branch.participant.to_string())).await;
        Ok(())
    }

    async fn end(&self, decision: Decision) -> Result<()> {
        let (limit, hook) = (self.all.inner.options.within, self.all.inner.options.hook.clone());
        let finish = finish(self.participant.clone(), self.branch.clone(), decision, limit, hook).await;
        let mut writes = vec![self.delete.clone()];
        // Nobody waits for the confirmation of an abort.
        if decision == Decision::Commit {
            writes.push(self.mail(Says::Done, "")?);
        }
        if let Finish::Diverged(what) = finish {
            tracing::error!(branch = %self.branch, %decision, what, "a heuristic outcome");
            let key = self.all.log().parked_key(self.branch.id, &self.branch.participant)?;
            let value = encode(&Parked { v: VERSION, decision, what });
            writes.push(Write::Put { key, value, lease: None });
        }
        self.write(writes).await
    }

    fn mail(&self, says: Says, why: &str) -> Result<Write> {
        let key = self.all.log().mail_key(&self.work.driver, self.branch.id, &self.branch.participant)?;
        let mail = Mail { v: VERSION, says, why: why.chars().take(500).collect() };
        Ok(Write::Put { key, value: encode(&mail), lease: None })
    }

    /// Writes while the work record is as it was and this process serves. Repeated until it is known: doing it twice is
    /// the same as once, because the second finds the record changed or writes the same again.
    async fn write(&self, writes: Vec<Write>) -> Result<()> {
        let txn = Txn { checks: vec![self.guard.fence().check(), self.unchanged.clone()], writes };
        let mut pauses = backoff();
        loop {
            match self.all.log().backend.commit(&txn).await {
                // If not applied: it was aborted or confirmed meanwhile, or somebody else serves now. Both are seen.
                Ok(_) => return Ok(()),
                Err(error) if is_taken_over(error.kind()) || error.kind() == ErrorKind::InvalidInput => {
                    return Err(error);
                }
                Err(error) => tracing::debug!(branch = %self.branch, %error, "not written yet"),
            }
            sleep(pauses.next().unwrap_or(LONGEST)).await;
        }
    }
}
