//! Watches over keys, with names as the user wrote them.
//!
//! Promise: as [`crate::watch`] says.

use super::{KeyValue, describe};
use crate::{
    backend::Revision,
    error::Error,
    watch::{Watch, WatchEvent},
};

/// What a watch over keys tells.
#[derive(Debug)]
pub enum KvEvent {
    /// Everything the range holds. Forget what was known before.
    Reset(Vec<KeyValue>),
    /// A key was created or changed.
    Put(KeyValue),
    /// A key was deleted, or its session ended.
    Delete {
        /// The key.
        key: String,
        /// The revision of the deletion, or a lower bound of it.
        revision: Revision,
    },
    /// Contact to the server was lost; what is known may be stale. The next event is a `Reset`.
    Interrupted(Error),
}

/// A running watch over keys. Dropping it ends it.
#[derive(Debug)]
pub struct KvWatch {
    watch: Watch,
    end: Option<Error>,
}

impl KvWatch {
    pub(super) fn new(watch: Watch) -> Self {
        Self { watch, end: None }
    }

    /// The next event; the first is a `Reset`.
    ///
    /// # Errors
    /// When the watch has ended for good (for example `Denied`, or the client was closed), and the same again at
    /// every later call: do not go on after it.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn next(&mut self) -> Result<KvEvent, Error> {
        loop {
            let Some(event) = self.watch.next().await else {
                let watch = &self.watch;
                let end = self.end.get_or_insert_with(|| {
                    watch.end().unwrap_or_else(|| {
                        Error::new(crate::ErrorKind::Unavailable, "watch", "it has ended: the client was closed")
                    })
                });
                return Err(end.clone());
            };
            return Ok(match event {
                WatchEvent::Reset(now) => KvEvent::Reset(now.entries.into_iter().filter_map(describe).collect()),
                WatchEvent::Put(entry) => match describe(entry) {
                    Some(entry) => KvEvent::Put(entry),
                    None => continue,
                },
                WatchEvent::Delete { key, revision } => match key.name() {
                    Some(key) => KvEvent::Delete { key, revision },
                    None => continue,
                },
                WatchEvent::Interrupted(error) => KvEvent::Interrupted(error),
            });
        }
    }
}
