//! Waiting for a ticket to go.
//!
//! Promise: a waiter is woken when its ticket is gone, whoever removed it, and one removal wakes nobody else; a wait
//! survives lost connections and restarted servers; the connections that waits take are bounded.
//!
//! # Why waits are shared and bounded
//! A wait is a blocking query, which occupies one HTTP/1 connection. An agent takes 200 connections from one
//! address (`http_max_conns_per_client`) and resets further ones. It also does not notice that a client has gone
//! away: the connection of a blocked query that was dropped counts until the query's time is over. So
//!
//! - a query for one ticket serves every waiter for it, outlives them until its time is over, and is there
//!   for the next one;
//! - at most [`SINGLE`] tickets have a query of their own. Beyond that, the waiters of one line share a query for
//!   the names in that line ([`WHOLE`] lines at most), which wakes once per client, not once per waiter;
//! - beyond that too, a wait ends after some time unasked, as the waist allows, and the caller looks.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use quorate_core::{ErrorKind, Result, Ticket};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::sleep,
};

use crate::{
    api::{Api, How},
    line::Lines,
    path::Space,
    txn::ticket_path,
};

const OP: &str = "gone";
/// How long the servers hold a query. Short, because a dropped one counts until its end.
const WAIT: Duration = Duration::from_secs(15);
/// How many tickets are waited for with a query of their own.
const SINGLE: usize = 48;
/// How many lines are waited for as a whole.
const WHOLE: usize = 16;
/// How many looks per second the waits without a query cause together.
const LOOKS_PER_SECOND: u32 = 50;

/// The waits of one client.
#[derive(Debug)]
pub(crate) struct Waits {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    api: Arc<Api>,
    space: Arc<Space>,
    lines: Arc<Lines>,
    /// Queries under way, by stored key of the ticket.
    tickets: Mutex<HashMap<String, watch::Sender<bool>>>,
    /// Queries under way, by stored directory of the line.
    whole: Mutex<HashMap<String, watch::Sender<View>>>,
    single_permits: Arc<Semaphore>,
    whole_permits: Arc<Semaphore>,
    waiting_blindly: AtomicU32,
    /// Closed when the client is dropped.
    alive: watch::Receiver<()>,
}

/// The names in a line at some index.
#[derive(Debug, Default)]
struct View {
    names: HashSet<String>,
    index: u64,
}

impl Waits {
    pub(crate) fn new(api: Arc<Api>, space: Arc<Space>, lines: Arc<Lines>, alive: watch::Receiver<()>) -> Self {
        let shared = Shared {
            api,
            space,
            lines,
            tickets: Mutex::default(),
            whole: Mutex::default(),
            single_permits: Arc::new(Semaphore::new(SINGLE)),
            whole_permits: Arc::new(Semaphore::new(WHOLE)),
            waiting_blindly: AtomicU32::new(0),
            alive,
        };
        Self { shared: Arc::new(shared) }
    }

    pub(crate) async fn gone(&self, ticket: &Ticket) -> Result<()> {
        let shared = &self.shared;
        let path = ticket_path(&shared.space, &ticket.line, &ticket.name);
        if let Some(mut gone) = shared.clone().single(ticket, &path) {
            // An error means that the query was given up: the caller looks, as after every wait.
            gone.wait_for(|gone| *gone).await.ok();
            return Ok(());
        }
        // No query of its own: first where it stands now, so that older views do not count.
        let found = shared.api.get(OP, &path, How::Consistent).await?;
        let Some(pair) = found.items.into_iter().next() else {
            shared.lines.left(ticket);
            return Ok(());
        };
        let dir = shared.space.dir(&ticket.line);
        match shared.clone().whole(&dir) {
            Some(mut view) => {
                let name = &*ticket.name;
                view.wait_for(|view| view.index >= pair.modify_index && !view.names.contains(name)).await.ok();
            }
            None => shared.wait_blindly().await,
        }
        Ok(())
    }

    /// Wakes the waiters of this client for a ticket that it has just taken out itself, ahead of the server's word.
    pub(crate) fn left(&self, ticket: &Ticket) {
        let path = ticket_path(&self.shared.space, &ticket.line, &ticket.name);
        if let Some(gone) = lock(&self.shared.tickets).get(&path) {
            gone.send_replace(true);
        }
        if let Some(view) = lock(&self.shared.whole).get(&self.shared.space.dir(&ticket.line)) {
            view.send_if_modified(|view| view.names.remove(&*ticket.name));
        }
    }
}

impl Shared {
    /// Joins or starts the query for a ticket; `None` if there are too many.
    fn single(self: Arc<Self>, ticket: &Ticket, path: &str) -> Option<watch::Receiver<bool>> {
        let mut tickets = lock(&self.tickets);
        if let Some(gone) = tickets.get(path) {
            return Some(gone.subscribe());
        }
        let permit = self.single_permits.clone().try_acquire_owned().ok()?;
        let (sender, receiver) = watch::channel(false);
        tickets.insert(path.to_owned(), sender);
        drop(tickets);
        let token = self.lines.token(ticket).unwrap_or(0);
        let (path, ticket, mut alive) = (path.to_owned(), ticket.clone(), self.alive.clone());
        tokio::spawn(async move {
            let _permit: OwnedSemaphorePermit = permit;
            let query = self.watch_ticket(&ticket, &path, token);
            tokio::select! {
                () = query => {}
                _ = alive.changed() => {}
            }
        });
        Some(receiver)
    }

    /// Follows one ticket until it is gone or nobody waits for it any more.
    async fn watch_ticket(&self, ticket: &Ticket, path: &str, token: u64) {
        let mut index = token;
        let mut pause = Pause::default();
        loop {
            match self.api.get(OP, path, How::since(index, WAIT)).await {
                // Of a later state than the ticket, or from a majority: a deposed leader must not wake anybody.
                Ok(found) if found.items.is_empty() && found.index > index => {
                    self.lines.left(ticket);
                    if let Some(gone) = lock(&self.tickets).remove(path) {
                        gone.send_replace(true);
                    }
                    return;
                }
                Ok(found) => {
                    index = if found.items.is_empty() { 0 } else { next_index(index, found.index) };
                    pause = Pause::default();
                }
                Err(error) => {
                    tracing::debug!(%error, "a wait is interrupted and will be made again");
                    index = 0;
                    pause.sleep().await;
                    if error.kind() != ErrorKind::Unavailable {
                        // Repeating it may never help (a name that no URL can carry, a token that was revoked).
                        // The caller's next look says more.
                        sleep(Duration::from_secs(1)).await;
                        lock(&self.tickets).remove(path);
                        return;
                    }
                }
            }
            // Under the lock, so that nobody joins a query that ends without a word.
            let mut tickets = lock(&self.tickets);
            if tickets.get(path).is_none_or(|gone| gone.receiver_count() == 0) {
                tickets.remove(path);
                return;
            }
        }
    }

    /// Joins or starts the query for the names of a line; `None` if there are too many.
    fn whole(self: Arc<Self>, dir: &str) -> Option<watch::Receiver<View>> {
        let mut whole = lock(&self.whole);
        if let Some(view) = whole.get(dir) {
            return Some(view.subscribe());
        }
        let permit = self.whole_permits.clone().try_acquire_owned().ok()?;
        let (sender, receiver) = watch::channel(View::default());
        whole.insert(dir.to_owned(), sender);
        drop(whole);
        let (dir, mut alive) = (dir.to_owned(), self.alive.clone());
        tokio::spawn(async move {
            let _permit: OwnedSemaphorePermit = permit;
            tokio::select! {
                () = self.watch_line(&dir) => {}
                _ = alive.changed() => {}
            }
        });
        Some(receiver)
    }

    async fn watch_line(&self, dir: &str) {
        let mut index = 0;
        let mut pause = Pause::default();
        loop {
            let found = self.api.keys(OP, dir, How::since(index, WAIT)).await;
            {
                // Under the lock, so that nobody joins a query that ends without a word.
                let mut whole = lock(&self.whole);
                let Some(sender) = whole.get(dir).filter(|view| view.receiver_count() > 0) else {
                    whole.remove(dir);
                    return;
                };
                if let Ok(found) = &found {
                    let names = found.items.iter().filter_map(|key| key.strip_prefix(dir)).map(str::to_owned);
                    sender.send_replace(View { names: names.collect(), index: found.index });
                }
            }
            match found {
                Ok(found) => {
                    index = next_index(index, found.index);
                    pause = Pause::default();
                }
                Err(error) => {
                    tracing::debug!(%error, "the wait for a line is interrupted and will be made again");
                    index = 0;
                    pause.sleep().await;
                }
            }
        }
    }

    /// Returns after some time, the longer the more there are of its kind.
    async fn wait_blindly(&self) {
        struct Count<'a>(&'a AtomicU32);
        impl Drop for Count<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let waiting = self.waiting_blindly.fetch_add(1, Ordering::Relaxed) + 1;
        let _count = Count(&self.waiting_blindly);
        let time = Duration::from_secs(1).max(Duration::from_secs(1) * waiting / LOOKS_PER_SECOND);
        sleep(time.mul_f64(rand::random_range(0.75..1.25))).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The index to wait on next: one that ran backwards (the data was restored, or old deletions were forgotten) makes
/// the next query answer at once.
pub(crate) fn next_index(last: u64, now: u64) -> u64 {
    if now < last { 0 } else { now.max(1) }
}

/// Growing, jittered pauses between attempts that fail.
#[derive(Debug, Default)]
pub(crate) struct Pause(u32);

impl Pause {
    pub(crate) async fn sleep(&mut self) {
        let longest = Duration::from_millis(50 << self.0.min(6));
        self.0 += 1;
        sleep(longest.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}
