//! Reading and watching ranges of keys.
//!
//! Promise: as the trait says. A watch subscribes first, reads then, and applies only messages that follow
//! upon what it has read without a gap; anything else (a lost message, a new connection, a reader that is
//! too slow, a value too long for a message) makes it read again and send a `Reset`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use quorate_core::{
    Entry, Error, ErrorKind, Key, KeyRange, LeaseId, Result, Revision, Snapshot, Watch, WatchEvent, WatchSender,
    watch::{WATCH_CAPACITY, channel},
};
use redis::{RedisResult, Value};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use crate::{
    change::{Change, Changed},
    error::{Effect, NAME, unexpected},
    hub::{Joined, Live},
    link::{Link, Server, State},
    script::{Call, Parts, READ, malformed},
    sweep::micros,
};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// One watch: what it last knew, and whether it can go on from there.
#[derive(Debug)]
pub(crate) struct Cell {
    range: KeyRange,
    sender: WatchSender,
    state: Mutex<CellState>,
    /// The watch cannot go on and must read again.
    stale: Notify,
}

#[derive(Debug)]
struct CellState {
    // The revision of the last change of the directory that this watch knows of.
    at: u64,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    /// Must read again.
    Stale,
    /// Reads; changes that come meanwhile are kept, at most `WATCH_CAPACITY`.
    Reading(VecDeque<Arc<Change>>),
    /// Goes along with the messages.
    Live,
}

impl Cell {
    fn state(&self) -> MutexGuard<'_, CellState> {
        // No code panics while it holds this lock; if it did, the watch would read again.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A message arrived.
    pub(crate) fn apply(&self, change: &Arc<Change>) {
        let mut state = self.state();
        match &mut state.mode {
            Mode::Stale => {}
            Mode::Reading(kept) if kept.len() < WATCH_CAPACITY => kept.push_back(change.clone()),
            Mode::Reading(_) => self.give_up(&mut state),
            Mode::Live => self.follow(&mut state, change),
        }
    }

    /// The server says that the directory last changed at `mark`, and every message before that was seen.
    pub(crate) fn check(&self, mark: u64) {
        let mut state = self.state();
        if matches!(state.mode, Mode::Live) && state.at < mark {
            self.give_up(&mut state);
        }
    }

    // The lock is held while events are sent, so that no older version overtakes a newer one.
    fn follow(&self, state: &mut CellState, change: &Change) {
        if change.revision <= state.at {
            return;
        }
        let Some(keys) = change.keys.as_ref().filter(|_| change.before == state.at) else {
            return self.give_up(state);
        };
        for key in keys.iter().filter(|key| self.range.matches(&key.name)) {
            let Some(event) = self.event(key, change.revision) else { return self.give_up(state) };
            if self.sender.send(event).is_err() {
                return self.give_up(state);
            }
        }
        state.at = change.revision;
    }

    /// `None` if the message does not tell enough.
    fn event(&self, changed: &Changed, revision: u64) -> Option<WatchEvent> {
        let key = Key::from_encoded(self.range.dir(), changed.name.clone());
        let revision = Revision(revision);
        Some(match &changed.put {
            None => WatchEvent::Delete { key, revision },
            Some(put) => WatchEvent::Put(Entry {
                key,
                value: put.value.clone()?,
                created: put.created,
                modified: revision,
                lease: put.lease.clone(),
            }),
        })
    }

    fn give_up(&self, state: &mut CellState) {
        state.mode = Mode::Stale;
        self.stale.notify_one();
    }

    fn begin(&self) {
        self.state().mode = Mode::Reading(VecDeque::new());
    }

    fn complete(&self, snapshot: Snapshot, mark: u64) {
        let mut state = self.state();
        let kept = match std::mem::replace(&mut state.mode, Mode::Live) {
            Mode::Reading(kept) => Some(kept),
            Mode::Stale | Mode::Live => None,
        };
        // A Reset is never refused.
        let _ = self.sender.send(WatchEvent::Reset(snapshot));
        state.at = mark;
        match kept {
            None => self.give_up(&mut state),
            Some(kept) => {
                for change in kept {
                    if matches!(state.mode, Mode::Live) {
                        self.follow(&mut state, &change);
                    }
                }
            }
        }
    }

    fn is_stale(&self) -> bool {
        matches!(self.state().mode, Mode::Stale)
    }
}

/// Reads a range.
pub(crate) async fn read(server: &Server, range: &KeyRange) -> Result<Snapshot> {
    let call = request(server, range, false);
    let value = server.call("read", Effect::Reads, &call).await.map_err(|e| e.key(range))?;
    let seen = answer(range, value).map_err(|e| unexpected("read", &e).key(range))?;
    server.connector.saw(seen.snapshot.revision);
    Ok(seen.snapshot)
}

fn request(server: &Server, range: &KeyRange, watch: bool) -> Call {
    let (kind, name) = match (range, watch) {
        (KeyRange::One(key), false) => ("one", key.encoded()),
        (KeyRange::One(key), true) => ("watch-one", key.encoded()),
        (KeyRange::Prefix { prefix, .. }, false) => ("prefix", &**prefix),
        (KeyRange::Prefix { prefix, .. }, true) => ("watch-prefix", &**prefix),
    };
    Call::new(&READ, &server.connector.keys).arg(kind).arg(range.dir().as_str()).arg(name)
}

struct Seen {
    snapshot: Snapshot,
    mark: u64,
    first: Option<Duration>,
}

fn answer(range: &KeyRange, value: Value) -> RedisResult<Seen> {
    let mut parts = Parts::of(value)?;
    let revision = Revision(parts.number()?);
    let (mark, first) = (parts.number()?, micros(parts.int()?));
    let mut entries = Vec::with_capacity(parts.len() / 3);
    while !parts.is_empty() {
        let key = Key::from_encoded(range.dir(), parts.text()?);
        let (created, modified, lease) = meta(&parts.text()?).ok_or_else(|| malformed("a key's record"))?;
        entries.push(Entry { key, value: Bytes::from(parts.bytes()?), created, modified, lease });
    }
    Ok(Seen { snapshot: Snapshot { entries, revision }, mark, first })
}

/// `created SP modified SP lease`, the numbers in 16 digits.
fn meta(text: &str) -> Option<(Revision, Revision, Option<LeaseId>)> {
    let mut words = text.splitn(3, ' ');
    let created = Revision(words.next()?.parse().ok()?);
    let modified = Revision(words.next()?.parse().ok()?);
    let lease = words.next()?;
    Some((created, modified, (!lease.is_empty()).then(|| LeaseId::new(lease))))
}

/// Starts a watch: the first snapshot is in its queue when this returns.
pub(crate) async fn start(server: &Arc<Server>, range: &KeyRange) -> Result<Watch> {
    let (sender, watch) = channel(WATCH_CAPACITY);
    let state = Mutex::new(CellState { at: 0, mode: Mode::Stale });
    let cell = Arc::new(Cell { range: range.clone(), sender, state, stale: Notify::new() });
    let mut joined = server.connector.hub.join(range.dir(), cell);
    let on = establish(server, &mut joined).await?;
    tokio::spawn(run(server.clone(), joined, on));
    Ok(watch)
}

/// Subscribes and reads; returns the number of the link that the messages come from.
async fn establish(server: &Server, joined: &mut Joined) -> Result<u64> {
    let limit = server.connector.options.connect_timeout + server.connector.options.request_timeout;
    timeout(limit, subscribe_and_read(server, joined)).await.unwrap_or_else(|_| {
        let message = format!("not established within {limit:?}");
        Err(Error::new(ErrorKind::Unavailable, "watch", message).on(NAME))
    })
}

async fn subscribe_and_read(server: &Server, joined: &mut Joined) -> Result<u64> {
    let range = joined.cell.range.clone();
    let mut state = server.subscribe();
    loop {
        let link = server.link("watch").await.map_err(|e| e.key(&range))?;
        if !subscribed(&mut joined.live, &mut state, &link).await.map_err(|e| e.key(&range))? {
            continue;
        }
        joined.cell.begin();
        let value = server.on_data(&link, "watch", &request(server, &range, true)).await.map_err(|e| e.key(&range))?;
        let seen = answer(&range, value).map_err(|e| unexpected("watch", &e).key(&range))?;
        if let Some(first) = seen.first {
            server.connector.hub.deadline(range.dir(), first);
        }
        server.connector.saw(seen.snapshot.revision);
        joined.cell.complete(seen.snapshot, seen.mark);
        return Ok(link.number);
    }
}

/// Waits until the directory's messages arrive on this link; `false` if the link is no longer the one.
async fn subscribed(live: &mut watch::Receiver<Live>, state: &mut watch::Receiver<State>, link: &Link) -> Result<bool> {
    loop {
        match &*live.borrow_and_update() {
            Live::On(number) if *number == link.number => return Ok(true),
            Live::Refused(number, failure) if *number == link.number => return Err(failure.error("watch")),
            _ => {}
        }
        if !is_up(&state.borrow_and_update(), link.number) {
            return Ok(false);
        }
        tokio::select! {
            changed = live.changed() => if changed.is_err() { return Ok(false) },
            changed = state.changed() => if changed.is_err() { return Ok(false) },
        }
    }
}

fn is_up(state: &State, number: u64) -> bool {
    matches!(state, State::Up(link) if link.number == number)
}

/// Keeps a watch going until its reader drops it or the backend is shut down.
async fn run(server: Arc<Server>, mut joined: Joined, mut on: u64) {
    let cell = joined.cell.clone();
    let mut state = server.subscribe();
    let mut pause = FIRST_PAUSE;
    loop {
        let lost = tokio::select! {
            () = cell.sender.closed() => return,
            lost = cannot_go_on(&cell, &mut state, on) => lost,
        };
        match lost {
            Lost::Closed => return,
            Lost::Gap => {}
            Lost::Link => interrupted(&cell, Error::new(ErrorKind::Unavailable, "watch", "the connection was lost")),
        }
        tokio::select! {
            () = cell.sender.closed() => return,
            established = establish(&server, &mut joined) => match established {
                Ok(number) => (on, pause) = (number, FIRST_PAUSE),
                Err(e) => {
                    if matches!(*state.borrow(), State::Closed) {
                        return;
                    }
                    interrupted(&cell, e);
                    tokio::select! {
                        () = cell.sender.closed() => return,
                        () = sleep(pause.mul_f64(rand::random_range(0.5..1.0))) => {}
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    // Nothing was established: try again at once.
                    on = 0;
                }
            },
        }
    }
}

fn interrupted(cell: &Cell, error: Error) {
    // Never refused; the reader sees one of them however many are sent.
    let _ = cell.sender.send(WatchEvent::Interrupted(error.on(NAME).key(&cell.range)));
}

enum Lost {
    Closed,
    Link,
    Gap,
}

async fn cannot_go_on(cell: &Cell, state: &mut watch::Receiver<State>, on: u64) -> Lost {
    loop {
        match &*state.borrow_and_update() {
            State::Closed => return Lost::Closed,
            now if !is_up(now, on) => return if on == 0 { Lost::Gap } else { Lost::Link },
            _ => {}
        }
        if cell.is_stale() {
            // Many watches may have lost the same message.
            sleep(Duration::from_micros(rand::random_range(0..10_000))).await;
            return Lost::Gap;
        }
        tokio::select! {
            () = cell.stale.notified() => {}
            changed = state.changed() => if changed.is_err() { return Lost::Closed },
        }
    }
}
