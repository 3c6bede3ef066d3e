//! Watches: a persistent watch tells which keys to read again.
//!
//! Promise: as [`quorate_core::watch`] says. Reads of one watch follow each other on one session, so they never go
//! back; a new session begins with a `sync`. After every interruption the watch is set anew and the range read
//! whole: the server does not tell what was missed (ZOOKEEPER-4698), and the client library does not hand
//! persistent watches to the next server.
//!
//! Several changes of a key between two reads arrive as one. A key that came and went between them is not mentioned.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture, future::join_all};
use quorate_core::{
    Error, ErrorKind, Key, KeyRange, Result, Revision, Snapshot, Watch, WatchEvent, WatchSender,
    watch::{WATCH_CAPACITY, channel},
};
use tokio::time::sleep;
use zookeeper_client as zk;

use crate::{
    Inner,
    config::Settings,
    connect::{Base, Conn},
    error::{Call, NAME},
    layout, read, revision,
    seen::Seen,
};

/// How many keys are read at once.
const AT_ONCE: usize = 256;
/// The first and the longest pause between attempts to set the watch again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// One watch, as its task sees it. Holds no lease and no backend: it ends when the backend goes.
struct Task {
    base: Base,
    settings: Arc<Settings>,
    range: KeyRange,
    sender: WatchSender,
    /// What the reader was told last: the revision of every key that it believes to exist.
    told: HashMap<Key, Revision>,
}

/// The watch at the server, and the connection that it is set on.
struct Line {
    conn: Arc<Conn>,
    events: zk::PersistentWatcher,
}

pub(crate) async fn watch(inner: &Inner, range: &KeyRange) -> Result<Watch> {
    let (sender, watch) = channel(WATCH_CAPACITY);
    let (base, settings) = (inner.base.clone(), inner.settings.clone());
    let mut task = Task { base, settings, range: range.clone(), sender, told: HashMap::new() };
    let (line, snapshot) = task.establish().await?;
    task.reset(snapshot);
    tokio::spawn(task.run(line));
    Ok(watch)
}

type Answers = Vec<(Key, Result<(Vec<u8>, zk::Stat), zk::Error>)>;

impl Task {
    /// Sets the watch and then reads the range, so that nothing falls between.
    async fn establish(&self) -> Result<(Line, Snapshot)> {
        let call = Call::read("watch", &self.range);
        let conn = self.base.conn(&call).await?;
        let (path, mode) = match &self.range {
            KeyRange::One(key) => (self.settings.layout.key(key), zk::AddWatchMode::Persistent),
            KeyRange::Prefix { dir, .. } => (self.settings.layout.dir(dir), zk::AddWatchMode::PersistentRecursive),
        };
        let failed = |error| conn.failed(&call, error);
        let events = conn.call(conn.client.watch(&path, mode)).await.map_err(failed)?;
        // Nothing is remembered for transactions: what others write should not push out what we write.
        let snapshot = read::read(&conn, &self.settings.layout, &Seen::default(), &self.range).await.map_err(failed)?;
        Ok((Line { conn, events }, snapshot))
    }

    fn reset(&mut self, snapshot: Snapshot) {
        self.told = snapshot.entries.iter().map(|entry| (entry.key.clone(), entry.modified)).collect();
        // A reset always finds room.
        let _ = self.sender.send(WatchEvent::Reset(snapshot));
    }

    async fn run(mut self, mut line: Line) {
        let base = self.base.clone();
        loop {
            let interrupted = tokio::select! {
                () = self.sender.closed() => return,
                () = base.shut_down() => return,
                interrupted = follow(&self.settings, &self.range, &self.sender, &mut self.told, &mut line) => interrupted,
            };
            if let Interruption::Gap(error) = interrupted {
                tracing::debug!(backend = NAME, range = %self.range, %error, "watch interrupted");
                let _ = self.sender.send(WatchEvent::Interrupted(error));
            }
            let restored = tokio::select! {
                () = self.sender.closed() => return,
                () = base.shut_down() => return,
                restored = self.restore() => restored,
            };
            match restored {
                Ok((next, snapshot)) => {
                    // The new watch is set before the old one is taken back: they are the same one to the server.
                    line = next;
                    self.reset(snapshot);
                }
                Err(error) => return self.sender.fail(error),
            }
        }
    }

    /// Sets the watch again, however long that takes; fails only if access is refused.
    async fn restore(&self) -> Result<(Line, Snapshot)> {
        let mut pause = BACKOFF.0;
        loop {
            match self.establish().await {
                Ok(established) => return Ok(established),
                Err(error) if matches!(error.kind(), ErrorKind::Denied | ErrorKind::Unsupported) => return Err(error),
                Err(error) => tracing::debug!(backend = NAME, range = %self.range, %error, "watch not restored yet"),
            }
            sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }
}

/// Why a watch must be set again.
enum Interruption {
    Gap(Error),
    /// The reader is too slow; it gets everything anew.
    Lagged,
}

/// Reads and passes on what changes, until that is no longer certain.
async fn follow(
    settings: &Settings,
    range: &KeyRange,
    sender: &WatchSender,
    told: &mut HashMap<Key, Revision>,
    line: &mut Line,
) -> Interruption {
    // Keys to read again. Bounded by the keys of the range, those that came and went included.
    let mut dirty: BTreeSet<Key> = BTreeSet::new();
    let mut reading: Option<BoxFuture<'static, Result<Answers, zk::Error>>> = None;
    loop {
        if reading.is_none() && !dirty.is_empty() {
            reading = Some(read_again(settings, &line.conn, &mut dirty));
        }
        tokio::select! {
            // Drained at once whatever the reads do: the library's queue has no bound of its own.
            event = line.events.changed() => match event.event_type {
                zk::EventType::Session => return Interruption::Gap(lost_contact(range)),
                _ => dirty.extend(key_of(settings, range, &event.path)),
            },
            answers = async { reading.as_mut().expect("polled only when there is one").await }, if reading.is_some() => {
                reading = None;
                let delivered = match answers {
                    Ok(answers) => deliver(sender, told, answers),
                    Err(error) => Err(Interruption::Gap(line.conn.failed(&Call::read("watch", range), error))),
                };
                if let Err(interruption) = delivered {
                    return interruption;
                }
            }
        }
    }
}

fn lost_contact(range: &KeyRange) -> Error {
    let next = "what is known may be stale until the next reset";
    Call::read("watch", range).error(ErrorKind::Unavailable, "contact to the server was lost").next(next)
}

/// The key that an event is about, if it belongs to the range.
fn key_of(settings: &Settings, range: &KeyRange, path: &str) -> Option<Key> {
    let dir = settings.layout.dir(range.dir());
    let name = layout::encoded(path.strip_prefix(&dir)?.strip_prefix('/')?)?;
    // Nodes below a key are not ours.
    if path[dir.len() + 1..].contains('/') || !range.matches(&name) {
        return None;
    }
    Some(Key::from_encoded(range.dir(), name))
}

fn read_again(
    settings: &Settings,
    conn: &Arc<Conn>,
    dirty: &mut BTreeSet<Key>,
) -> BoxFuture<'static, Result<Answers, zk::Error>> {
    let later = dirty.iter().nth(AT_ONCE).cloned().map_or_else(BTreeSet::new, |key| dirty.split_off(&key));
    let keys: Vec<Key> = std::mem::replace(dirty, later).into_iter().collect();
    let paths: Vec<String> = keys.iter().map(|key| settings.layout.key(key)).collect();
    let conn = conn.clone();
    async move {
        let reads: Vec<_> = paths.iter().map(|path| conn.client.get_data(path)).collect();
        let answers = conn.call(async { Ok::<_, zk::Error>(join_all(reads).await) }).await?;
        Ok(keys.into_iter().zip(answers).collect())
    }
    .boxed()
}

/// Tells the reader what is new, in the order of the revisions.
fn deliver(sender: &WatchSender, told: &mut HashMap<Key, Revision>, answers: Answers) -> Result<(), Interruption> {
    let mut events: Vec<(Revision, WatchEvent)> = Vec::with_capacity(answers.len());
    for (key, answer) in answers {
        match answer {
            Ok((value, stat)) => {
                let modified = revision(stat.mzxid);
                if told.insert(key.clone(), modified) != Some(modified) {
                    events.push((modified, WatchEvent::Put(read::entry(key, value, &stat))));
                }
            }
            Err(zk::Error::NoNode) => {
                if let Some(last) = told.remove(&key) {
                    // It went after it was last written; the server does not say when.
                    let revision = Revision(last.0 + 1);
                    events.push((revision, WatchEvent::Delete { key, revision }));
                }
            }
            Err(error) => {
                let call = Call::read("watch", &key);
                return Err(Interruption::Gap(call.failed(error)));
            }
        }
    }
    events.sort_by_key(|(revision, _)| *revision);
    for (_, event) in events {
        sender.send(event).map_err(|_| Interruption::Lagged)?;
    }
    Ok(())
}
