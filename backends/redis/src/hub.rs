//! Who in this process waits for what: the server's messages come in here and go to waits and watches.
//!
//! Promise: nothing here waits or fails; a message for nobody is dropped; memory is bounded by the waits and
//! watches there are. One channel carries the news of all tickets of this client, so that a wait costs no
//! subscription.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use quorate_core::Dir;
use redis::Value;
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

use crate::{change::Change, error::Failure, script::Keys, watch::Cell};

/// How often what is waited for and watched is checked although no message came.
pub(crate) const BACKSTOP: Duration = Duration::from_secs(5);
/// Added to a deadline that the server told, so that it has passed there when it is asked again.
const AFTER: Duration = Duration::from_millis(2);

/// What a wait is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The ticket is gone.
    Gone,
    /// There is a new connection: the ticket may be gone.
    Unsure,
}

/// Whether a directory's messages arrive.
#[derive(Debug, Clone)]
pub(crate) enum Live {
    Not,
    /// On the link of this number.
    On(u64),
    /// The server refused the subscription on the link of this number.
    Refused(u64, Failure),
}

/// The table of waits and watches.
#[derive(Debug)]
pub(crate) struct Hub {
    client: String,
    inner: Mutex<Inner>,
    /// There is something to do sooner than the sweeper thinks.
    pub(crate) wake: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    // The number of the link that is up, or 0.
    link: u64,
    waits: HashMap<Arc<str>, Wait>,
    // By the directory's path.
    feeds: HashMap<String, Feed>,
    hellos: HashMap<String, oneshot::Sender<()>>,
    next: u64,
    // When the sweeper wakes by itself; `None`: not before it is woken.
    sleeps_until: Option<Instant>,
}

#[derive(Debug)]
struct Wait {
    tellers: Vec<(u64, oneshot::Sender<Told>)>,
    due: Instant,
}

#[derive(Debug)]
struct Feed {
    dir: Dir,
    cells: Vec<Arc<Cell>>,
    live: watch::Sender<Live>,
    due: Instant,
    // What `due` was set to when the server was last asked.
    asked: Instant,
}

/// What the sweeper is to check now.
#[derive(Debug, Default)]
pub(crate) struct Due {
    pub(crate) tickets: Vec<Arc<str>>,
    pub(crate) dirs: Vec<Dir>,
}

impl Hub {
    pub(crate) fn new() -> Self {
        Self { client: format!("{:016x}", rand::random::<u64>()), inner: Mutex::default(), wake: Notify::new() }
    }

    /// This client's name at the server: 16 characters.
    pub(crate) fn client(&self) -> &str {
        &self.client
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds this lock; if it did, the tables would still be whole.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A message arrived.
    pub(crate) fn message(&self, keys: &Keys, data: &[Value]) {
        let [Value::BulkString(channel), Value::BulkString(payload), ..] = data else { return };
        let Ok(channel) = std::str::from_utf8(channel) else { return };
        if let Some(dir) = keys.dir_of(channel) {
            self.changed(dir, payload);
        } else if let Ok(text) = std::str::from_utf8(payload) {
            if let Some(field) = text.strip_prefix('t') {
                self.gone(field);
            } else if let Some(nonce) = text.strip_prefix('h') {
                let told = self.inner().hellos.remove(nonce);
                // Nobody listens any more if the attempt was given up.
                told.map(|tell| tell.send(()));
            }
        }
    }

    fn changed(&self, dir: &str, payload: &[u8]) {
        // A message that is not ours, or cut: the chain of revisions shows the gap.
        let Some(change) = Change::parse(payload) else { return };
        let change = Arc::new(change);
        let cells = {
            let mut inner = self.inner();
            let Some(feed) = inner.feeds.get_mut(dir) else { return };
            if let Some(left) = change.first_deadline() {
                feed.due = feed.due.min(Instant::now() + BACKSTOP.min(left.saturating_add(after_watch())));
            }
            let (cells, due) = (feed.cells.clone(), feed.due);
            self.hurry(&mut inner, due);
            cells
        };
        for cell in cells {
            cell.apply(&change);
        }
    }

    /// A ticket is gone: whoever waits for it is told.
    pub(crate) fn gone(&self, field: &str) {
        let wait = self.inner().waits.remove(field);
        tell_all(wait, Told::Gone);
    }

    /// A link is up. Waits that were established on an earlier one may have missed their message.
    pub(crate) fn up(&self, number: u64) {
        let waits: Vec<Wait> = {
            let mut inner = self.inner();
            inner.link = number;
            inner.waits.drain().map(|(_, wait)| wait).collect()
        };
        for wait in waits {
            tell_all(Some(wait), Told::Unsure);
        }
        self.wake.notify_one();
    }

    /// The link is down.
    pub(crate) fn down(&self) {
        self.inner().link = 0;
    }

    /// The backend is shut down: nothing will come any more.
    pub(crate) fn close(&self) {
        self.up(0);
    }

    /// Expects the greeting with this nonce.
    pub(crate) fn expect_hello(&self, nonce: String, tell: oneshot::Sender<()>) -> Hello<'_> {
        self.inner().hellos.insert(nonce.clone(), tell);
        Hello { hub: self, nonce }
    }

    /// Takes note of a wait; to be called before the server is asked to tell. `None` if the link of this
    /// number is no longer the one in use.
    pub(crate) fn wait(self: &Arc<Self>, field: &Arc<str>, link: u64) -> Option<Waiting> {
        let (tell, told) = oneshot::channel();
        let mut inner = self.inner();
        if inner.link != link {
            return None;
        }
        inner.next += 1;
        let id = inner.next;
        let due = Instant::now() + backstop();
        let wait = inner.waits.entry(field.clone()).or_insert_with(|| Wait { tellers: Vec::new(), due });
        wait.tellers.push((id, tell));
        let due = wait.due;
        self.hurry(&mut inner, due);
        drop(inner);
        Some(Waiting { hub: self.clone(), field: field.clone(), id, told })
    }

    /// The ticket stands; its lease has this long to go.
    pub(crate) fn stands(&self, field: &str, left: Duration) {
        let due = Instant::now() + backstop().min(left.saturating_add(AFTER + jitter(5)));
        let mut inner = self.inner();
        if let Some(wait) = inner.waits.get_mut(field) {
            wait.due = due;
            self.hurry(&mut inner, due);
        }
    }

    /// Adds a watch to its directory's feed.
    pub(crate) fn join(self: &Arc<Self>, dir: &Dir, cell: Arc<Cell>) -> Joined {
        let mut inner = self.inner();
        let due = Instant::now() + backstop();
        let feed = inner.feeds.entry(dir.as_str().to_owned()).or_insert_with(|| {
            let (live, _) = watch::channel(Live::Not);
            Feed { dir: dir.clone(), cells: Vec::new(), live, due, asked: due }
        });
        feed.cells.push(cell.clone());
        let live = feed.live.subscribe();
        drop(inner);
        self.wake.notify_one();
        Joined { hub: self.clone(), dir: dir.clone(), cell, live }
    }

    /// The first lease of the namespace ends after this time at the earliest.
    pub(crate) fn deadline(&self, dir: &Dir, left: Duration) {
        let due = Instant::now() + backstop().min(left.saturating_add(after_watch()));
        let mut inner = self.inner();
        if let Some(feed) = inner.feeds.get_mut(dir.as_str()) {
            feed.due = feed.due.min(due);
            self.hurry(&mut inner, due);
        }
    }

    /// The sweeper asked: the directory's mark is this, and the namespace's first lease ends then.
    pub(crate) fn checked(&self, dir: &Dir, mark: u64, left: Duration) {
        let mut inner = self.inner();
        let Some(feed) = inner.feeds.get_mut(dir.as_str()) else { return };
        let due = Instant::now() + backstop().min(left.saturating_add(after_watch()));
        // A message that came after the server had answered may have told of an earlier end of a lease.
        feed.due = if feed.due < feed.asked { due.min(feed.due) } else { due };
        let cells = feed.cells.clone();
        drop(inner);
        for cell in cells {
            cell.check(mark);
        }
    }

    /// The directories that are watched.
    pub(crate) fn watched(&self) -> Vec<Dir> {
        self.inner().feeds.values().map(|feed| feed.dir.clone()).collect()
    }

    pub(crate) fn set_live(&self, dir: &Dir, live: Live) {
        if let Some(feed) = self.inner().feeds.get(dir.as_str()) {
            feed.live.send_replace(live);
        }
    }

    /// What is due now or very soon: what is checked anyway is checked together.
    pub(crate) fn due(&self, tickets: usize, dirs: usize) -> Due {
        let now = Instant::now();
        let mut inner = self.inner();
        let soon = match inner.first_due() {
            Some(first) if first <= now => now + BACKSTOP / 10,
            _ => return Due::default(),
        };
        let retry = now + BACKSTOP / 10;
        let mut due = Due::default();
        for (field, wait) in inner.waits.iter_mut().filter(|(_, w)| w.due <= soon).take(tickets) {
            due.tickets.push(field.clone());
            // Should the question fail, it is asked again.
            wait.due = retry + Duration::from_millis(1);
        }
        for feed in inner.feeds.values_mut().filter(|f| f.due <= soon).take(dirs) {
            due.dirs.push(feed.dir.clone());
            feed.due = retry + Duration::from_millis(1);
            feed.asked = feed.due;
        }
        due
    }

    /// When the sweeper has to look next; taken note of, so that it is woken if that changes.
    pub(crate) fn sleep_until(&self) -> Option<Instant> {
        let mut inner = self.inner();
        inner.sleeps_until = inner.first_due();
        inner.sleeps_until
    }

    fn hurry(&self, inner: &mut Inner, due: Instant) {
        if inner.sleeps_until.is_none_or(|until| due < until) {
            inner.sleeps_until = Some(due);
            self.wake.notify_one();
        }
    }
}

impl Inner {
    fn first_due(&self) -> Option<Instant> {
        let waits = self.waits.values().map(|wait| wait.due);
        waits.chain(self.feeds.values().map(|feed| feed.due)).min()
    }
}

fn tell_all(wait: Option<Wait>, told: Told) {
    for (_, tell) in wait.into_iter().flat_map(|wait| wait.tellers) {
        // A wait that was dropped needs no word.
        let _ = tell.send(told);
    }
}

fn jitter(millis: u64) -> Duration {
    Duration::from_micros(rand::random_range(0..=millis * 1000))
}

fn backstop() -> Duration {
    BACKSTOP - jitter(500)
}

// Watchers are many and no one of them comes first, so they are spread out more than waiters.
fn after_watch() -> Duration {
    AFTER + jitter(30)
}

/// Takes the expectation of a greeting back.
pub(crate) struct Hello<'a> {
    hub: &'a Hub,
    nonce: String,
}

impl Drop for Hello<'_> {
    fn drop(&mut self) {
        self.hub.inner().hellos.remove(&self.nonce);
    }
}

/// A wait for a ticket; dropping it takes it back.
#[derive(Debug)]
pub(crate) struct Waiting {
    hub: Arc<Hub>,
    field: Arc<str>,
    id: u64,
    told: oneshot::Receiver<Told>,
}

impl Waiting {
    /// Returns when there is news.
    pub(crate) async fn told(&mut self) -> Told {
        (&mut self.told).await.unwrap_or(Told::Unsure)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut inner = self.hub.inner();
        if let Some(wait) = inner.waits.get_mut(&self.field) {
            wait.tellers.retain(|(id, _)| *id != self.id);
            if wait.tellers.is_empty() {
                inner.waits.remove(&self.field);
            }
        }
    }
}

/// A watch's place in its directory's feed; dropping it takes it out.
#[derive(Debug)]
pub(crate) struct Joined {
    hub: Arc<Hub>,
    dir: Dir,
    pub(crate) cell: Arc<Cell>,
    pub(crate) live: watch::Receiver<Live>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut inner = self.hub.inner();
        if let Some(feed) = inner.feeds.get_mut(self.dir.as_str()) {
            feed.cells.retain(|cell| !Arc::ptr_eq(cell, &self.cell));
            if feed.cells.is_empty() {
                inner.feeds.remove(self.dir.as_str());
            }
        }
        drop(inner);
        self.hub.wake.notify_one();
    }
}
