//! The desk of one process: its name as a driver, and the mail that remote participants send to it.
//!
//! Promise: the driver's key stands on the coordinator's session, so that it goes when this process dies and others take
//! over. Mail is level-triggered: what a transaction's box shows is what the mailbox held at one moment, the last one
//! included.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::Bytes;
use tokio::{
    sync::{OnceCell, watch},
    task::AbortHandle,
    time::sleep,
};

use super::{
    TxId,
    log::Log,
    record::{Mail, decode_or_skip},
};
use crate::{
    backend::{Entry, Nonce},
    coordinator::Coordinator,
    error::Result,
    key::{Key, KeyRange},
    presence::{KeySpot, Presence},
    watch::{Watch, WatchEvent},
};

/// What has arrived for one transaction, by participant.
pub(super) type Letters = BTreeMap<String, Mail>;

type Boxes = Mutex<HashMap<TxId, watch::Sender<Letters>>>;

#[derive(Debug)]
pub(super) struct Desk {
    pub(super) driver: String,
    presence: Presence,
    boxes: Arc<Boxes>,
    /// Started with the first remote participant.
    post: OnceCell<Postman>,
}

/// Ends the task with the desk.
#[derive(Debug)]
struct Postman(AbortHandle);

impl Drop for Postman {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A transaction's box. Dropping it gives it up.
#[derive(Debug)]
pub(super) struct LetterBox {
    id: TxId,
    boxes: Weak<Boxes>,
    pub(super) letters: watch::Receiver<Letters>,
}

impl Drop for LetterBox {
    fn drop(&mut self) {
        if let Some(boxes) = self.boxes.upgrade() {
            boxes.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        }
    }
}

impl Desk {
    pub(super) fn open(coord: &Coordinator, log: &Log) -> Self {
        let driver = Nonce::random().to_string();
        let key = Key::new(&log.drivers, &driver).expect("32 digits are a name");
        let spot = KeySpot { backend: log.backend.clone(), key };
        let presence = Presence::start(coord, Arc::new(spot), Bytes::from_static(b"{\"v\":1}"));
        Self { driver, presence, boxes: Arc::default(), post: OnceCell::new() }
    }

    /// Waits until others can see that this driver lives.
    pub(super) async fn ready(&self) -> Result<()> {
        self.presence.settled().await
    }

    /// A box for a transaction; to be opened before any participant can write to it.
    pub(super) async fn open_box(&self, log: &Log, id: TxId) -> Result<LetterBox> {
        let (sender, letters) = watch::channel(Letters::new());
        self.boxes().insert(id, sender);
        let letter_box = LetterBox { id, boxes: Arc::downgrade(&self.boxes), letters };
        self.post
            .get_or_try_init(|| async {
                let range = KeyRange::prefix(&log.mailbox(&self.driver)?, "")?;
                let watch = log.backend.watch(&range).await?;
                let task = tokio::spawn(deliver(log.clone(), range, watch, self.boxes.clone()));
                Ok::<_, crate::error::Error>(Postman(task.abort_handle()))
            })
            .await?;
        Ok(letter_box)
    }

    fn boxes(&self) -> std::sync::MutexGuard<'_, HashMap<TxId, watch::Sender<Letters>>> {
        self.boxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts mail into boxes until the desk is gone.
async fn deliver(log: Log, range: KeyRange, mut watch: Watch, boxes: Arc<Boxes>) {
    let mut pauses = backoff();
    loop {
        match watch.next().await {
            Some(event) => {
                if matches!(event, WatchEvent::Reset(_)) {
                    pauses = backoff();
                }
                sort(event, &boxes);
            }
            // The watch ended for good; what was missed meanwhile comes with the first event of the next one.
            None => {
                tracing::warn!(end = ?watch.end(), "the watch of the mailbox ended; opening another");
                watch = loop {
                    sleep(pauses.next().unwrap_or(LONGEST)).await;
                    match log.backend.watch(&range).await {
                        Ok(watch) => break watch,
                        Err(error) => tracing::warn!(%error, "the mailbox cannot be watched yet"),
                    }
                };
            }
        }
    }
}

/// The longest pause between two attempts.
pub(super) const LONGEST: Duration = Duration::from_secs(5);

/// The pauses between attempts that have no end.
pub(super) fn backoff() -> backon::ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(LONGEST)
        .with_jitter()
        .without_max_times()
        .build()
}

fn sort(event: WatchEvent, boxes: &Boxes) {
    let boxes = boxes.lock().unwrap_or_else(PoisonError::into_inner);
    match event {
        WatchEvent::Reset(now) => {
            let mut sorted: HashMap<TxId, Letters> = HashMap::new();
            for (id, participant, mail) in now.entries.iter().filter_map(letter) {
                sorted.entry(id).or_default().insert(participant, mail);
            }
            for (id, letter_box) in boxes.iter() {
                letter_box.send_replace(sorted.remove(id).unwrap_or_default());
            }
        }
        WatchEvent::Put(entry) => {
            let Some((id, participant, mail)) = letter(&entry) else { return };
            if let Some(letter_box) = boxes.get(&id) {
                letter_box.send_modify(|letters| drop(letters.insert(participant, mail)));
            }
        }
        // Mail is taken away when its transaction is over.
        WatchEvent::Delete { .. } | WatchEvent::Interrupted(_) => {}
    }
}

fn letter(entry: &Entry) -> Option<(TxId, String, Mail)> {
    let name = entry.key.name()?;
    let (id, participant) = name.split_once('/')?;
    Some((id.parse().ok()?, participant.to_owned(), decode_or_skip(entry)?))
}
