//! Holds: the tickets that guards stand on, and the watch over each.
//!
//! Promise: the holder of a ticket that somebody else removed learns of it: at once if it waits for that or
//! has held the ticket for longer than [`WATCH_AFTER`], otherwise when that time is over. A hold that is
//! shorter costs nothing at the server.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::SessionCore;
use crate::backend::{Enqueue, Place, Revision, Ticket};

/// How long a ticket is held before it is watched unasked.
pub(super) const WATCH_AFTER: Duration = Duration::from_millis(250);

const HELD: u8 = 0;
const LOST: u8 = 1;
const RELEASED: u8 = 2;

/// One held ticket.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) ticket: Ticket,
    pub(crate) token: Revision,
    /// The request that made the ticket, if an attempt at it was unsure and could land late.
    pub(crate) unsure: Option<Arc<Enqueue>>,
    since: Instant,
    state: AtomicU8,
    watched: AtomicBool,
    /// Somebody waits for the loss: watch it now.
    urgent: AtomicBool,
    changed: Notify,
}

impl Hold {
    /// Whether the ticket has not been seen gone.
    pub(crate) fn stands(&self) -> bool {
        self.state.load(Ordering::Acquire) == HELD
    }

    /// Whether somebody else took the ticket away.
    pub(crate) fn was_taken(&self) -> bool {
        self.state.load(Ordering::Acquire) == LOST
    }

    /// Ends the hold by its owner's wish. `false` if it was lost before, or released.
    pub(crate) fn release(&self) -> bool {
        self.finish(RELEASED)
    }

    fn finish(&self, state: u8) -> bool {
        let first = self.state.compare_exchange(HELD, state, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if first {
            self.changed.notify_waiters();
        }
        first
    }

    /// Returns when the ticket was seen gone or was released.
    pub(crate) async fn ended(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Registered before the look: `notify_waiters` wakes only who is registered.
            changed.as_mut().enable();
            if !self.stands() {
                return;
            }
            changed.await;
        }
    }
}

/// The holds of one session.
#[derive(Debug, Default)]
pub(super) struct Holds {
    // By the address of the ticket's name, which the hold keeps alive.
    held: Mutex<HashMap<usize, Arc<Hold>>>,
    /// A hold is to be watched before its time.
    pub(super) urgent: Notify,
}

fn slot(hold: &Hold) -> usize {
    hold.ticket.name.as_ptr() as usize
}

impl Holds {
    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Arc<Hold>>> {
        self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The holds that are to be watched from now on.
    pub(super) fn due(&self) -> Vec<Arc<Hold>> {
        let now = Instant::now();
        let held = self.held();
        let due = held.values().filter(|hold| {
            let wanted = hold.urgent.load(Ordering::Acquire) || now.duration_since(hold.since) >= WATCH_AFTER;
            wanted && !hold.watched.swap(true, Ordering::AcqRel)
        });
        due.cloned().collect()
    }
}

impl SessionCore {
    /// Registers a ticket as held.
    pub(crate) fn hold(&self, place: Place, unsure: Option<Arc<Enqueue>>) -> Arc<Hold> {
        let hold = Arc::new(Hold {
            ticket: place.ticket,
            token: place.token,
            unsure,
            since: Instant::now(),
            state: AtomicU8::new(HELD),
            watched: AtomicBool::new(false),
            urgent: AtomicBool::new(false),
            changed: Notify::new(),
        });
        self.holds.held().insert(slot(&hold), hold.clone());
        hold
    }

    /// Takes a hold off the register.
    pub(crate) fn unhold(&self, hold: &Hold) {
        self.holds.held().remove(&slot(hold));
    }

    /// Makes sure that the ticket is watched from now on.
    pub(crate) fn watch_now(&self, hold: &Hold) {
        if !hold.urgent.swap(true, Ordering::AcqRel) {
            self.holds.urgent.notify_one();
        }
    }
}

/// Waits until the ticket is gone and says so, or until the hold ends otherwise.
pub(super) async fn guard(core: Arc<SessionCore>, hold: Arc<Hold>) {
    let mut pause = Duration::from_millis(10);
    loop {
        let waited = tokio::select! {
            () = hold.ended() => return,
            waited = core.backend.gone(&hold.ticket) => waited,
        };
        match core.backend.look(&hold.ticket, 0).await {
            Ok(None) => {
                if hold.finish(LOST) {
                    core.unhold(&hold);
                    tracing::warn!(ticket = %hold.ticket, "a held ticket was removed by somebody else");
                }
                return;
            }
            Ok(Some(_)) if waited.is_ok() => {}
            Ok(Some(_)) | Err(_) => pause = (pause * 2).min(Duration::from_secs(1)),
        }
        // `gone` may return early; it must not turn into a loop at full speed.
        tokio::select! {
            () = hold.ended() => return,
            () = sleep(pause) => {}
        }
    }
}
