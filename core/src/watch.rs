//! Watches: level-triggered, bounded, and honest about gaps.
//!
//! Promise: a watch may skip versions in between but never the last one, never goes back, and after any gap
//! (reconnect, compaction, a reader that is too slow) sends a new [`WatchEvent::Reset`] instead of pretending.
//! Memory per watch is bounded by the capacity and the largest snapshot.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::Notify;

use crate::{
    backend::{Entry, Revision, Snapshot},
    error::Error,
    key::Key,
};

/// How many changes a slow reader may be behind before it is sent a `Reset`.
pub const WATCH_CAPACITY: usize = 1024;

/// What a watch tells.
#[derive(Debug)]
pub enum WatchEvent {
    /// Everything the range holds. Forget what was known before.
    Reset(Snapshot),
    /// A key was created or changed.
    Put(Entry),
    /// A key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: Key,
        /// The revision of the deletion, or a lower bound of it.
        revision: Revision,
    },
    /// Contact to the server was lost; what is known may be stale. The next event is a `Reset`.
    Interrupted(Error),
}

/// A running watch. Dropping it ends it at the server.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
}

impl Watch {
    /// The next event, or `None` after the watch has ended for good; [`Watch::end`] then tells why.
    ///
    /// # Cancel safety
    /// Nothing is lost: an event is taken only when this returns it.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        loop {
            // Registered before the look, so that a push between look and wait is not lost.
            let pushed = self.shared.pushed.notified();
            {
                let mut state = self.shared.state();
                if let Some(event) = state.queue.pop_front() {
                    return Some(event);
                }
                if state.ended {
                    return None;
                }
            }
            pushed.await;
        }
    }

    /// Why the watch ended, once `next` has returned `None`; `None` if the backend was shut down.
    pub fn end(&self) -> Option<Error> {
        self.shared.state().end.take()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state().reader_gone = true;
        self.shared.dropped.notify_one();
    }
}

/// The backend's side of a watch. Dropping it ends the watch.
#[derive(Debug)]
pub struct WatchSender {
    shared: Arc<Shared>,
    capacity: usize,
}

/// The reader is too far behind: the queue was emptied. Read the range again and send a `Reset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lagged;

/// A watch with room for `capacity` changes.
pub fn channel(capacity: usize) -> (WatchSender, Watch) {
    let shared = Arc::new(Shared::default());
    (WatchSender { shared: shared.clone(), capacity: capacity.max(1) }, Watch { shared })
}

impl WatchSender {
    /// Hands an event to the reader; never waits.
    ///
    /// # Errors
    /// [`Lagged`] if the reader has left `capacity` events unread. They are dropped, this one included, and
    /// so is every further change until a `Reset` is sent, which always succeeds.
    pub fn send(&self, event: WatchEvent) -> Result<(), Lagged> {
        let mut state = self.shared.state();
        match &event {
            // A snapshot supersedes everything before it, so at most one is ever queued.
            WatchEvent::Reset(_) => {
                state.queue.clear();
                state.lagged = false;
            }
            WatchEvent::Interrupted(_) => {
                if matches!(state.queue.back(), Some(WatchEvent::Interrupted(_))) {
                    return Ok(());
                }
            }
            WatchEvent::Put(_) | WatchEvent::Delete { .. } => {
                if state.lagged || state.queue.len() >= self.capacity {
                    state.queue.clear();
                    state.lagged = true;
                    return Err(Lagged);
                }
            }
        }
        state.queue.push_back(event);
        drop(state);
        self.shared.pushed.notify_one();
        Ok(())
    }

    /// Ends the watch for good: the reader sees what is queued and then the end.
    pub fn fail(self, error: Error) {
        self.shared.state().end = Some(error);
    }

    /// Whether the reader has dropped the watch.
    pub fn is_closed(&self) -> bool {
        self.shared.state().reader_gone
    }

    /// Returns when the reader drops the watch.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn closed(&self) {
        loop {
            let dropped = self.shared.dropped.notified();
            if self.is_closed() {
                // Pass it on: another waiter on this sender must see it too.
                self.shared.dropped.notify_one();
                return;
            }
            dropped.await;
        }
    }
}

impl Drop for WatchSender {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.pushed.notify_one();
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    pushed: Notify,
    dropped: Notify,
}

#[derive(Debug, Default)]
struct State {
    // At most `capacity` changes plus one Reset and one Interrupted.
    queue: VecDeque<WatchEvent>,
    lagged: bool,
    ended: bool,
    reader_gone: bool,
    end: Option<Error>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock; if it did, the queue would still be whole.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Dir;

    fn delete(revision: u64) -> WatchEvent {
        let key = Key::new(&Dir::new(["kv"]).unwrap(), "a").unwrap();
        WatchEvent::Delete { key, revision: Revision(revision) }
    }

    #[tokio::test]
    async fn a_slow_reader_gets_a_reset_instead_of_a_gap() {
        let (tx, mut rx) = channel(2);
        tx.send(delete(1)).unwrap();
        tx.send(delete(2)).unwrap();
        assert_eq!(tx.send(delete(3)), Err(Lagged));
        assert_eq!(tx.send(delete(4)), Err(Lagged), "a change must not slip in ahead of the reset");
        tx.send(WatchEvent::Reset(Snapshot { revision: Revision(4), ..Snapshot::default() })).unwrap();
        tx.send(delete(5)).unwrap();
        assert!(matches!(rx.next().await, Some(WatchEvent::Reset(s)) if s.revision.0 == 4));
        assert!(matches!(rx.next().await, Some(WatchEvent::Delete { revision: Revision(5), .. })));
    }

    #[tokio::test]
    async fn the_reader_sees_what_is_queued_and_then_why_it_ended() {
        let (tx, mut rx) = channel(2);
        tx.send(delete(1)).unwrap();
        tx.fail(Error::invalid("watch", "why"));
        assert!(rx.next().await.is_some());
        assert!(rx.next().await.is_none());
        assert!(rx.end().is_some());
    }

    #[tokio::test]
    async fn the_sender_learns_that_the_reader_went() {
        let (tx, rx) = channel(2);
        let waiting = tokio::spawn(async move { tx.closed().await });
        tokio::task::yield_now().await;
        drop(rx);
        waiting.await.unwrap();
    }
}
