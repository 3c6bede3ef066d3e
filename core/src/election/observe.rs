//! Seeing who leads.
//!
//! Promise: the leader there is when the observation begins comes first, then every change; leaders in between may be
//! skipped, the last one never; terms never go back, whatever happens to the connection. An observer costs a watch of one
//! key, however many candidates there are.

use std::sync::Arc;

use super::{Leader, record};
use crate::{
    backend::Backend,
    error::{Error, ErrorKind, Result},
    key::Key,
    lock::FencingToken,
    watch::{Watch, WatchEvent},
};

/// A running observation of an election. Dropping it ends it. Made by [`Election::observe`](super::Election::observe).
#[derive(Debug)]
pub struct Observer {
    watch: Watch,
    key: Key,
    /// Kept, so that the connection lives for as long as somebody observes.
    backend: Arc<dyn Backend>,
    /// What was told last; `None` before the first.
    last: Option<Option<Leader>>,
    /// The greatest term told.
    newest: Option<FencingToken>,
    current: bool,
    end: Option<Error>,
}

impl Observer {
    pub(super) fn new(watch: Watch, key: Key, backend: Arc<dyn Backend>) -> Self {
        Self { watch, key, backend, last: None, newest: None, current: false, end: None }
    }

    /// The leader there is, at the first call, and then at each change the new one; `None` when nobody leads, or the new
    /// leader has not announced itself yet.
    ///
    /// It waits through interruptions: [`is_current`](Self::is_current) tells of them.
    ///
    /// # Errors
    /// `Corrupt` if somebody else wrote something into the leader's record; the observation goes on. Any other error is
    /// the end (for example `Denied`, or the client was closed), and comes again at every later call.
    ///
    /// # Cancel safety
    /// Nothing is lost: a change is taken only when this returns it.
    pub async fn next(&mut self) -> Result<Option<Leader>> {
        loop {
            let Some(event) = self.watch.next().await else { return Err(self.ended()) };
            let seen = match event {
                WatchEvent::Reset(now) => {
                    self.current = true;
                    now.entries.into_iter().find(|entry| entry.key == self.key).map(|entry| entry.value)
                }
                WatchEvent::Put(entry) => Some(entry.value),
                WatchEvent::Delete { .. } => None,
                WatchEvent::Interrupted(error) => {
                    tracing::debug!(key = %self.key, %error, "who leads is not known for certain now");
                    self.current = false;
                    continue;
                }
            };
            let seen = seen
                .map(|value| record::leader(&self.key, &value).map_err(|e| e.on(self.backend.profile().backend)))
                .transpose()?;
            if let Some(term) = seen.as_ref().map(|leader| leader.term) {
                if self.newest.is_some_and(|newest| term < newest) {
                    continue;
                }
                self.newest = Some(term);
            }
            if self.last.as_ref() != Some(&seen) {
                self.last = Some(seen.clone());
                return Ok(seen);
            }
        }
    }

    /// Whether there is contact to the server, as far as [`next`](Self::next) has got. While there is none, what was told
    /// last may be out of date.
    pub fn is_current(&self) -> bool {
        self.current
    }

    fn ended(&mut self) -> Error {
        self.current = false;
        let watch = &self.watch;
        let end = self.end.get_or_insert_with(|| {
            watch.end().unwrap_or_else(|| {
                Error::new(ErrorKind::Unavailable, "observe", "the watch has ended: the client was closed")
            })
        });
        end.clone()
    }
}
