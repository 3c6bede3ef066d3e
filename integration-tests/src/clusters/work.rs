//! What applications do with a cluster, while servers die.
//!
//! Promise: nothing here knows which cluster it is; every wrong answer is counted, and every success has a time.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate::{
    Config, Coordinator, KvEvent,
    discovery::{Instance, Registration},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::site::connect;

/// Longer than an election, so that leases outlast one.
pub const TTL: Duration = Duration::from_secs(6);
/// How many instances are registered.
pub const INSTANCES: usize = 4;
const CONTENDERS: usize = 3;
/// After this long a contender stands in line anew.
const PATIENCE: Duration = Duration::from_secs(5);

/// Successes of one kind, with their times.
#[derive(Debug, Default)]
pub struct Pulse(Mutex<Vec<Instant>>);

impl Pulse {
    fn beat(&self) {
        self.0.lock().expect("no poison").push(Instant::now());
    }

    fn count(&self) -> usize {
        self.0.lock().expect("no poison").len()
    }

    /// The longest time without a success, from the last one before `since` on.
    pub fn longest_gap(&self, since: Instant) -> Duration {
        let beats = self.0.lock().expect("no poison");
        let before = beats.iter().rposition(|beat| *beat <= since).unwrap_or(0);
        let end = [Instant::now()];
        let all: Vec<_> = beats[before..].iter().chain(&end).collect();
        all.windows(2).map(|two| *two[1] - *two[0]).max().unwrap_or_default()
    }

    /// Waits for so many more successes.
    pub async fn more(&self, count: usize, limit: Duration) -> bool {
        let wanted = self.count() + count;
        let more = async {
            while self.count() < wanted {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(limit, more).await.is_ok()
    }
}

/// What has been seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Turns under the lock.
    pub turns: Pulse,
    /// Writes of a key.
    pub writes: Pulse,
    /// Of those writes, told by a watch.
    pub news: Pulse,
    inside: AtomicUsize,
    /// Two held the lock at the same time.
    pub meetings: AtomicUsize,
    /// A token that did not rise.
    pub fallen: AtomicUsize,
    last_token: AtomicU64,
    /// Fenced writes that were confirmed.
    confirmed: AtomicU64,
    /// Those that may have happened.
    unsure: AtomicU64,
    /// The last number that was written for sure.
    written: AtomicU64,
    /// The last number that the watcher was told.
    pub watched: AtomicU64,
    /// The watcher was told an older revision after a newer one, or one twice, without a gap in between.
    pub backwards: AtomicUsize,
    /// The fewest instances that the consumer saw.
    pub fewest: AtomicUsize,
    /// The long hold was lost: this is told to the holder.
    pub held_lost: AtomicUsize,
}

/// The application: everything runs until it is dropped.
pub struct App {
    /// What it has seen.
    pub seen: Arc<Seen>,
    tasks: JoinSet<()>,
    registrations: Vec<Registration>,
    config: Config,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl App {
    /// Starts it, and waits until all of it works.
    pub async fn start(config: &Config) -> Self {
        let config = config.clone().with_session_ttl(TTL);
        let seen = Arc::new(Seen { fewest: AtomicUsize::new(INSTANCES), ..Seen::default() });
        let mut tasks = JoinSet::new();
        for _ in 0..CONTENDERS {
            tasks.spawn(contend(connect(&config).await, seen.clone()));
        }
        tasks.spawn(write(connect(&config).await, seen.clone()));
        tasks.spawn(watch(connect(&config).await, seen.clone()));
        tasks.spawn(hold(connect(&config).await, seen.clone()));
        let provider = connect(&config).await;
        let register = |i| provider.register(Instance::new("orders", format!("10.0.0.{i}:80"))).expect("a good one");
        let registrations: Vec<_> = (1..=INSTANCES).map(register).collect();
        for registration in &registrations {
            timeout(Duration::from_secs(30), registration.ready()).await.expect("in time").expect("registered");
        }
        tasks.spawn(consume(connect(&config).await, seen.clone()));
        let app = Self { seen, tasks, registrations, config };
        assert!(app.seen.turns.more(5, Duration::from_secs(30)).await, "the lock does not work");
        assert!(app.seen.writes.more(5, Duration::from_secs(30)).await, "writes do not work");
        app
    }

    /// Waits until everything works again; tells how long that took from now.
    pub async fn whole_again(&self, limit: Duration) -> Duration {
        let began = Instant::now();
        let (turns, writes) = tokio::join!(self.seen.turns.more(5, limit), self.seen.writes.more(5, limit));
        assert!(turns && writes, "after {limit:?}: turns {turns}, writes {writes}; {:?}", self.tasks);
        for registration in &self.registrations {
            let ready = timeout(limit, registration.ready()).await;
            ready.expect("a registration returns in time").expect("registered");
        }
        // Somebody who comes new finds everything.
        let fresh = connect(&self.config).await.discover("orders").await.expect("followed");
        timeout(limit, fresh.until(|now| now.len() == INSTANCES)).await.expect("every instance is found");
        let written = self.seen.written.load(Ordering::Acquire);
        let told = async {
            while self.seen.watched.load(Ordering::Acquire) < written {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(limit, told).await.expect("the watch goes on");
        began.elapsed()
    }

    /// Stops the work, and compares the counter that only holders write with what they were told. Says what is wrong.
    pub async fn audit(mut self) -> Vec<String> {
        self.tasks.shutdown().await;
        let seen = &self.seen;
        let probe = connect(&self.config).await;
        let count = probe.kv().get("count").await.expect("read").map_or(0, |entry| number(&entry.value));
        let (sure, unsure) = (seen.confirmed.load(Ordering::Acquire), seen.unsure.load(Ordering::Acquire));
        let mut wrong = Vec::new();
        if !(sure..=sure + unsure).contains(&count) {
            wrong.push(format!("the counter is {count}, {sure} steps were confirmed and {unsure} may have happened"));
        }
        for (what, count) in [
            ("two holders at the same time", &seen.meetings),
            ("tokens that do not rise", &seen.fallen),
            ("older values after newer ones", &seen.backwards),
        ] {
            match count.load(Ordering::Acquire) {
                0 => {}
                count => wrong.push(format!("{count} × {what}")),
            }
        }
        wrong
    }
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("we wrote a number")
}

/// Counts itself out, also if its work is dropped.
struct Inside(Arc<Seen>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn contend(coord: Coordinator, seen: Arc<Seen>) {
    loop {
        let Ok(Ok(Some(guard))) = timeout(2 * PATIENCE, coord.lock("job").acquire_within(PATIENCE)).await else {
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        let work = async {
            let before = seen.inside.fetch_add(1, Ordering::AcqRel);
            let _inside = Inside(seen.clone());
            seen.meetings.fetch_add(usize::from(before > 0), Ordering::AcqRel);
            let token = guard.token().get();
            seen.fallen
                .fetch_add(usize::from(seen.last_token.fetch_max(token, Ordering::AcqRel) >= token), Ordering::AcqRel);
            let count = coord.kv().get("count").await?.map_or(0, |entry| number(&entry.value));
            // May have happened as soon as it is sent, and also if this future is dropped.
            seen.unsure.fetch_add(1, Ordering::AcqRel);
            let put = coord.kv().put_fenced(&guard.fence(), "count", (count + 1).to_string()).await;
            let may_have_happened = put.as_ref().is_err_and(|e| e.kind() == quorate::ErrorKind::Ambiguous);
            if !may_have_happened {
                seen.unsure.fetch_sub(1, Ordering::AcqRel);
            }
            put?;
            seen.confirmed.fetch_add(1, Ordering::AcqRel);
            Ok::<_, quorate::Error>(())
        };
        if guard.protect(work).await.is_ok_and(|work| work.is_ok()) {
            seen.turns.beat();
        }
        let _ = timeout(Duration::from_secs(2), guard.release()).await;
        sleep(Duration::from_millis(10)).await;
    }
}

/// Writes rising numbers.
async fn write(coord: Coordinator, seen: Arc<Seen>) {
    for next in 1_u64.. {
        if coord.kv().put("number", next.to_string()).await.is_ok() {
            seen.written.store(next, Ordering::Release);
            seen.writes.beat();
        }
        sleep(Duration::from_millis(25)).await;
    }
}

async fn watch(coord: Coordinator, seen: Arc<Seen>) {
    // By revision, not by number: a write that was given up as unsure may land after the next one.
    let mut last = None;
    loop {
        let Ok(mut watch) = coord.kv().watch("number").await else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        while let Ok(event) = watch.next().await {
            let entry = match event {
                KvEvent::Reset(entries) => {
                    // What was lost with a primary may be told so.
                    last = None;
                    entries.into_iter().max_by_key(|entry| entry.modified)
                }
                KvEvent::Put(entry) => Some(entry),
                _ => None,
            };
            if let Some(entry) = entry {
                seen.backwards.fetch_add(usize::from(last >= Some(entry.modified)), Ordering::AcqRel);
                last = Some(entry.modified);
                seen.watched.store(number(&entry.value), Ordering::Release);
                seen.news.beat();
            }
        }
    }
}

/// Holds a lock for as long as it can.
async fn hold(coord: Coordinator, seen: Arc<Seen>) {
    loop {
        match coord.lock("long").acquire().await {
            Ok(guard) => {
                guard.lost().await;
                seen.held_lost.fetch_add(1, Ordering::AcqRel);
            }
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn consume(coord: Coordinator, seen: Arc<Seen>) {
    let service = loop {
        match coord.discover("orders").await {
            Ok(service) => break service,
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    };
    service.until(|now| now.len() == INSTANCES).await;
    loop {
        seen.fewest.fetch_min(service.now().len(), Ordering::AcqRel);
        sleep(Duration::from_millis(5)).await;
    }
}
