//! The monitor: one watch, one clock, and doubts about itself first.
//!
//! Promise: silence is judged only while this process runs, the watch is unbroken, reads are answered and the group's own
//! beats are accepted. What could not be heard is excused: a short pause of this process by its length, a long one, and
//! every outage, by a fresh start for all. Nobody is convicted without a read that was sent after the grace was over.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt as _, OptionFuture};
use tokio::{
    sync::broadcast,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Death, PeerEvent, PeerStatus, Recovery, RoundTrip, Shared, as_read,
    clock::MinFilter,
    peers::{Found, Peers},
    record::{Heard, Ledger, decode},
};
use crate::{
    backend::{Check, Entry, Revision, Txn, Write},
    detect::{Deadline, Detector, Health, PhiAccrual, PhiOptions},
    error::{Error, Result},
    key::{Dir, Key, KeyRange},
    watch::{Watch, WatchEvent},
};

/// How many events a slow reader may be behind.
const EVENTS: usize = 1024;

/// How silence becomes suspicion.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Detection {
    /// φ-accrual. The first interval is the one that the peer's record declares.
    PhiAccrual(PhiOptions),
    /// A fixed time: the interval that the peer's record declares, and this pause.
    Deadline {
        /// How late a beat may be.
        acceptable_pause: Duration,
    },
    /// A detector of your own, made from the interval that the peer's record declares.
    Custom(fn(Duration) -> Box<dyn Detector>),
}

impl Detection {
    pub(super) fn detector(&self, every: Duration) -> Box<dyn Detector> {
        match self {
            Self::PhiAccrual(options) => {
                Box::new(PhiAccrual::new(PhiOptions { first_interval: every, ..options.clone() }))
            }
            Self::Deadline { acceptable_pause } => Box::new(Deadline::new(every, *acceptable_pause)),
            Self::Custom(make) => make(every),
        }
    }
}

/// How a monitor shall be.
///
/// A peer that stops is told `Dead` about interval + acceptable pause + a few σ + `grace` after its last beat: some 10 s with
/// the defaults and a beat per second.
#[derive(Debug, Clone)]
pub struct MonitorOptions {
    /// How silence becomes suspicion. φ-accrual with its defaults.
    pub detection: Detection,
    /// How long a suspect may still be heard before it is dead, times the observer's own [`Health`] score + 1. 5 s. At least `probe_every` + `stall`, so that no outage
    /// of the coordinator that goes unnoticed is long enough to convict.
    pub grace: Duration,
    /// How often silence is looked at. 100 ms.
    pub tick: Duration,
    /// How often one key is read, to see that the coordinator answers and that the watch is not behind. 1 s.
    pub probe_every: Duration,
    /// A read that takes longer is an outage. 2 s.
    pub stall: Duration,
    /// After a pause of this process that is longer, every peer gets a fresh start; a shorter one is not counted as silence.
    /// 1 s.
    pub max_pause: Duration,
    /// When the record of a dead peer is deleted. 1 h.
    pub forget_after: Duration,
}

impl Default for MonitorOptions {
    fn default() -> Self {
        Self {
            detection: Detection::PhiAccrual(PhiOptions::default()),
            grace: Duration::from_secs(5),
            tick: Duration::from_millis(100),
            probe_every: Duration::from_secs(1),
            stall: Duration::from_secs(2),
            max_pause: Duration::from_secs(1),
            forget_after: Duration::from_secs(3600),
        }
    }
}

impl MonitorOptions {
    fn check(&self) -> Result<()> {
        if self.tick.is_zero() || self.probe_every.is_zero() || self.stall.is_zero() {
            return Err(Error::invalid("monitor", "tick, probe_every and stall must not be zero"));
        }
        if self.grace < self.probe_every + self.stall {
            return Err(Error::invalid("monitor", "grace must be at least probe_every + stall"));
        }
        Ok(())
    }
}

/// Watches over a group until it and all its recoveries are dropped.
#[derive(Debug)]
pub struct Monitor {
    task: Arc<Task>,
    events: PeerEvents,
}

/// What the monitor's task and its handles share.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) shared: Arc<Shared>,
    view: Arc<View>,
    /// Never read; others are made from it. The sender is the watcher's alone, so that its end is the end of the events.
    events: broadcast::Receiver<PeerEvent>,
    handle: JoinHandle<()>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

#[derive(Debug)]
struct View {
    peers: Mutex<Peers>,
    contact: Mutex<Contact>,
}

/// Whether the monitor can hear.
#[derive(Debug, Default)]
struct Contact {
    /// The watch is broken, or not open yet.
    interrupted: bool,
    /// The last read was not answered in time.
    unanswered: bool,
    error: Option<Error>,
    round_trips: MinFilter<()>,
}

impl View {
    fn peers(&self) -> MutexGuard<'_, Peers> {
        // Nothing panics under these locks but a user's own detector; the table is whole then, too.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn contact(&self) -> MutexGuard<'_, Contact> {
        self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Task {
    /// Peers with a run that died, and the last beat that was seen.
    pub(super) fn died(&self) -> Vec<(String, super::Incarnation, u64)> {
        self.view.peers().died()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<PeerEvent> {
        self.events.resubscribe()
    }
}

impl Monitor {
    pub(super) fn start(shared: Arc<Shared>, options: MonitorOptions) -> Result<Self> {
        options.check()?;
        let dir = shared.places()?.beats.clone();
        let (sender, events) = broadcast::channel(EVENTS);
        let contact = Contact { interrupted: true, ..Contact::default() };
        let peers = Mutex::new(Peers::new(options.clone()));
        let view = Arc::new(View { peers, contact: Mutex::new(contact) });
        let watcher = Watcher {
            options,
            dir,
            view: view.clone(),
            events: sender,
            blind: true,
            last_look: Instant::now(),
            next_judgement: Instant::now(),
            next_probe: Instant::now(),
            last_probed: String::new(),
            probe: None,
            forgetting: None,
            shared: shared.clone(),
        };
        let handle = tokio::spawn(watcher.run());
        let task = Task { shared, view, events: events.resubscribe(), handle };
        Ok(Self { task: Arc::new(task), events: PeerEvents { events } })
    }

    /// The next event since the monitor was made; `None` after the monitor's task has ended,
    /// which only a panicking [`Detection::Custom`] or the end of its runtime brings about.
    ///
    /// # Cancel safety
    /// Safe: an event is taken only when this returns it.
    pub async fn next(&mut self) -> Option<PeerEvent> {
        self.events.next().await
    }

    /// Another stream of the events from now on.
    pub fn events(&self) -> PeerEvents {
        PeerEvents { events: self.task.subscribe() }
    }

    /// What is known of every peer now. No I/O.
    pub fn peers(&self) -> Vec<PeerStatus> {
        let exchange = &self.task.shared.exchange;
        self.task.view.peers().list(Instant::now(), |peer| exchange.offset(peer))
    }

    /// Whether peers could be heard at the last look. While it is false nobody is suspected or convicted.
    pub fn hears(&self) -> bool {
        let contact = self.task.view.contact();
        !contact.interrupted && !contact.unanswered && !self.task.shared.exchange.is_failing()
    }

    /// How the monitor itself has been doing: each long pause and each read without an answer worsens it, each answered
    /// read improves it. The grace is stretched by the score + 1, so that an observer in trouble convicts later.
    pub fn health(&self) -> Health {
        self.task.view.peers().health
    }

    /// Why peers could not be heard, the last time they could not.
    pub fn last_error(&self) -> Option<Error> {
        self.task.view.contact().error.clone()
    }

    /// The round trip of the monitor's own reads to the coordinator and back.
    pub fn round_trip(&self) -> Option<RoundTrip> {
        self.task.view.contact().round_trips.best().map(|(round_trip, ())| round_trip)
    }

    /// Runs `action` for every peer that dies, once across all monitors of the group that do the same; see [`Recovery`]
    /// for what is promised. The session of the group's coordinator holds the locks.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn on_death<F, Fut>(&self, action: F) -> Recovery
    where
        F: Fn(Death) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        Recovery::start(self.task.clone(), Arc::new(move |death| action(death).boxed()))
    }
}

/// Events of a monitor. A reader that is more than 1,024 behind is told how many it missed.
#[derive(Debug)]
pub struct PeerEvents {
    events: broadcast::Receiver<PeerEvent>,
}

impl PeerEvents {
    /// The next event; `None` after the monitor has ended.
    ///
    /// # Cancel safety
    /// Safe: an event is taken only when this returns it.
    pub async fn next(&mut self) -> Option<PeerEvent> {
        match self.events.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(count)) => Some(PeerEvent::Missed { count }),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// A read of one peer's record.
struct Probe {
    peer: String,
    sent: Instant,
    /// The last beat seen when it was sent, if the peer's grace was over then.
    overdue: Option<u64>,
    answer: BoxFuture<'static, Result<Option<Entry>>>,
}

/// The monitor's task.
struct Watcher {
    shared: Arc<Shared>,
    options: MonitorOptions,
    dir: Dir,
    view: Arc<View>,
    events: broadcast::Sender<PeerEvent>,
    /// Whether peers could not be heard at the last look.
    blind: bool,
    /// When this task ran last. It runs at least once per tick, unless it is kept from it.
    last_look: Instant,
    next_judgement: Instant,
    next_probe: Instant,
    last_probed: String,
    probe: Option<Probe>,
    /// The peer whose record is being deleted, with the work.
    forgetting: Option<(String, BoxFuture<'static, Result<()>>)>,
}

enum Woken {
    Event(Option<WatchEvent>),
    Probe(Result<Option<Entry>>),
    Forgotten(Result<()>),
    Tick,
}

impl Watcher {
    async fn run(mut self) {
        let mut pause = Duration::from_millis(50);
        loop {
            let range = KeyRange::prefix(&self.dir, "").expect("an empty prefix is valid");
            let opened = match self.shared.backend().watch(&range).await {
                Ok(watch) => {
                    pause = Duration::from_millis(50);
                    self.follow(watch).await
                }
                Err(error) => error,
            };
            tracing::warn!(dir = %self.dir, error = %opened, "the watch over heartbeats ended, opening another");
            self.interrupted(opened);
            sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    fn interrupted(&mut self, error: Error) {
        let mut contact = self.view.contact();
        (contact.interrupted, contact.error) = (true, Some(error));
        self.blind = true;
    }

    /// Looks at everything until the watch ends; returns why it did.
    async fn follow(&mut self, mut watch: Watch) -> Error {
        // Opening the watch is no pause of this process.
        self.last_look = Instant::now();
        loop {
            let woken = self.wake(&mut watch).await;
            let now = Instant::now();
            self.excuse_own_pause(now);
            match woken {
                Woken::Event(Some(event)) => self.event(event, now),
                Woken::Event(None) => {
                    return watch.end().unwrap_or_else(|| super::stopped("watch", "the client was closed"));
                }
                Woken::Probe(answer) => self.probed(answer, now),
                Woken::Forgotten(outcome) => self.forgotten(&outcome, now),
                Woken::Tick => {}
            }
            if now >= self.next_judgement {
                self.next_judgement = now + self.options.tick;
                self.judge(now);
            }
            let events = self.view.peers().events();
            for event in events {
                // It fails only while nobody listens.
                let _ = self.events.send(event);
            }
        }
    }

    async fn wake(&mut self, watch: &mut Watch) -> Woken {
        let probing = self.probe.is_some();
        let forgetting = self.forgetting.is_some();
        let probe = OptionFuture::from(self.probe.as_mut().map(|probe| &mut probe.answer));
        let forgotten = OptionFuture::from(self.forgetting.as_mut().map(|(_, work)| work));
        tokio::select! {
            event = watch.next() => Woken::Event(event),
            Some(answer) = probe, if probing => Woken::Probe(answer),
            Some(outcome) = forgotten, if forgetting => Woken::Forgotten(outcome),
            () = sleep_until(self.next_judgement.min(self.last_look + self.options.tick)) => Woken::Tick,
        }
    }

    /// What peers said while this process stood still could not be heard.
    fn excuse_own_pause(&mut self, now: Instant) {
        let late = now.saturating_duration_since(self.last_look).saturating_sub(self.options.tick);
        self.last_look = now;
        if late > self.options.max_pause {
            tracing::warn!(?late, "this process was paused; every peer gets a fresh start");
            let mut peers = self.view.peers();
            peers.health.worsen();
            peers.excuse_all(now);
        } else if late > self.options.tick {
            self.view.peers().excuse(late, now);
        }
    }

    fn event(&mut self, event: WatchEvent, now: Instant) {
        match event {
            WatchEvent::Reset(snapshot) => {
                let records: Vec<_> = snapshot.entries.iter().filter_map(Heard::of).collect();
                self.shared.exchange.keep(&records);
                self.view.peers().reset(records, now);
                self.view.contact().interrupted = false;
            }
            WatchEvent::Put(entry) => self.heard(&entry, Found::Written, now),
            WatchEvent::Delete { key, .. } => {
                if let Some(peer) = key.name() {
                    self.view.peers().deleted(&peer);
                    self.shared.exchange.forget(&peer);
                }
            }
            WatchEvent::Interrupted(error) => self.interrupted(error),
        }
    }

    fn heard(&self, entry: &Entry, found: Found, now: Instant) {
        let Some(heard) = Heard::of(entry) else { return };
        if self.view.peers().record(heard.clone(), found, now) {
            self.shared.exchange.heard(&heard, now, crate::clock::wall_us());
        }
    }

    fn judge(&mut self, now: Instant) {
        self.probe(now);
        let deaf = {
            let contact = self.view.contact();
            contact.interrupted || contact.unanswered
        };
        let blind = deaf || self.shared.exchange.is_failing();
        let mut peers = self.view.peers();
        if self.blind && !blind {
            peers.excuse_all(now);
        }
        self.blind = blind;
        if blind {
            return;
        }
        peers.judge(now);
        if self.forgetting.is_none()
            && let Some((peer, modified)) = peers.forgettable(now)
        {
            let work = forget(self.shared.clone(), peer.clone(), modified).boxed();
            self.forgetting = Some((peer, work));
        }
    }

    /// Sends a read if one is due and none is under way: of a peer that is to be convicted, or of the next in turn.
    fn probe(&mut self, now: Instant) {
        if self.probe.is_some() {
            return;
        }
        let peers = self.view.peers();
        let overdue = if self.blind { None } else { peers.overdue(now) };
        let (peer, overdue) = match overdue {
            Some((peer, seq)) => (peer, Some(seq)),
            None if now < self.next_probe => return,
            None => match peers.after(&self.last_probed) {
                Some(peer) => (peer, None),
                None => return,
            },
        };
        let (shared, limit) = (self.shared.clone(), self.options.stall);
        let key = Key::new(&self.dir, &peer).expect("it was read under this name");
        let answer = async move {
            let late = |_| super::stopped("read", "no answer in time").key(&key).on(shared.name());
            timeout(limit, shared.entry(&key)).await.map_err(late)?
        };
        self.next_probe = now + self.options.probe_every;
        self.last_probed = peer.clone();
        self.probe = Some(Probe { peer, sent: now, overdue, answer: answer.boxed() });
    }

    fn probed(&mut self, answer: Result<Option<Entry>>, now: Instant) {
        let Some(Probe { peer, sent, overdue, .. }) = self.probe.take() else { return };
        let entry = match answer {
            Ok(entry) => {
                self.view.peers().health.improve();
                let mut contact = self.view.contact();
                contact.unanswered = false;
                contact.round_trips.push(now - sent, ());
                entry
            }
            Err(error) => {
                tracing::warn!(%error, "the coordinator does not answer; nobody is judged until it does");
                self.view.peers().health.worsen();
                let mut contact = self.view.contact();
                (contact.unanswered, contact.error) = (true, Some(error));
                self.blind = true;
                return;
            }
        };
        if let Some(entry) = entry {
            self.heard(&entry, Found::Written, now);
            // Not if something went wrong since it was sent: silence is then excused at the next look.
            if let Some(seq) = overdue.filter(|_| !self.blind) {
                self.view.peers().convict(&peer, seq, now);
            }
        }
    }

    fn forgotten(&mut self, outcome: &Result<()>, now: Instant) {
        let Some((peer, _)) = self.forgetting.take() else { return };
        if let Err(error) = outcome {
            tracing::debug!(peer, %error, "the record of a dead peer was not removed");
        }
        // Gone, it is told by the watch; otherwise it stays dead for as long again.
        self.view.peers().forget_later(&peer, now);
    }
}

/// Deletes the record of a dead peer and what its recoveries wrote, unless one is pending or the peer has come back.
async fn forget(shared: Arc<Shared>, peer: String, modified: Revision) -> Result<()> {
    let places = shared.places()?;
    let (beat, ledger) = (Key::new(&places.beats, &peer)?, Key::new(&places.ledger, &peer)?);
    let entry = shared.entry(&ledger).await?;
    let stays = |entry: &Entry| decode::<Ledger>(entry).is_none_or(|ledger| ledger.pending.is_some());
    if entry.as_ref().is_some_and(stays) {
        return Ok(());
    }
    let checks = vec![Check::Unchanged { key: beat.clone(), modified }, as_read(&ledger, entry.as_ref())];
    let keys: HashSet<_> = std::iter::once(beat).chain(entry.map(|_| ledger)).collect();
    shared.backend().commit(&Txn { checks, writes: keys.into_iter().map(Write::Delete).collect() }).await?;
    Ok(())
}
