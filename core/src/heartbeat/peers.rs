//! What a monitor knows of its peers: records, silence and excuses in, events out. No I/O.
//!
//! Promise: every event is a change of state, told once; an older incarnation changes nothing; silence that was excused
//! convicts nobody.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::{ClockOffset, Incarnation, MonitorOptions, record::Heard};
use crate::{
    backend::Revision,
    detect::{Detector, Health},
};

/// What a monitor takes a peer for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerState {
    /// Its record was there when the monitor began to look; whether it still beats is not known yet.
    Unknown,
    /// It beats.
    Alive,
    /// It is silent for longer than its detector finds likely.
    Suspect,
    /// It was silent for the grace as well, or another run has taken its place, or a recovery has begun for it.
    Dead,
}

/// Why a peer counts as dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// It was silent.
    Silence,
    /// A later run of the same peer has begun, and this one had not left.
    Replaced,
    /// Another monitor's recovery has begun for it.
    Convicted,
}

/// A change of state of a peer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum PeerEvent {
    /// It beats: for the first time here, or again after it was suspected.
    Alive {
        /// Which peer.
        peer: String,
        /// Which run of it.
        incarnation: Incarnation,
    },
    /// It is silent; nothing is decided yet.
    Suspect {
        /// Which peer.
        peer: String,
        /// Which run of it.
        incarnation: Incarnation,
        /// In the unit of the detector.
        suspicion: f64,
    },
    /// It is dead. No clean leave is told so.
    Dead {
        /// Which peer.
        peer: String,
        /// Which run of it.
        incarnation: Incarnation,
        /// Why.
        cause: Cause,
    },
    /// A peer that was dead beats.
    Returned {
        /// Which peer.
        peer: String,
        /// Which run of it beats now.
        incarnation: Incarnation,
        /// Which run was dead. The same one if that was a mistake and no recovery had begun.
        before: Incarnation,
    },
    /// It left by itself.
    Left {
        /// Which peer.
        peer: String,
        /// Which run of it.
        incarnation: Incarnation,
    },
    /// The reader was too slow for this many events: see [`Monitor::peers`](super::Monitor::peers).
    Missed {
        /// How many.
        count: u64,
    },
}

/// A look at a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerStatus {
    /// Its name.
    pub peer: String,
    /// The run whose record stands.
    pub incarnation: Incarnation,
    /// What it is taken for.
    pub state: PeerState,
    /// How much its silence is worth, in the unit of the detector; it is suspected from
    /// [`threshold`](Detector::threshold) on.
    pub suspicion: f64,
    /// How long ago it was heard here; `None` if only its record was found.
    pub heard: Option<Duration>,
    /// Since when nothing is known of it: the monitor began to look, or could not hear, then, and the peer has not been
    /// heard since.
    pub unknown_since: Option<Instant>,
    /// The last run that died, unless it was heard again.
    pub died: Option<Incarnation>,
    /// How often it says that it beats.
    pub every: Duration,
    /// The text that its beats carry.
    pub payload: String,
    /// How far its wall clock is ahead of ours, if this group value also has a publisher. For people only.
    pub offset: Option<ClockOffset>,
}

#[derive(Debug)]
struct Peer {
    latest: Heard,
    detector: Box<dyn Detector>,
    state: PeerState,
    heard: Option<Instant>,
    unknown_since: Option<Instant>,
    /// Set exactly in `Suspect`; the grace counts from here.
    suspect_since: Option<Instant>,
    /// Set exactly in `Dead`.
    dead_since: Option<Instant>,
    died: Option<Incarnation>,
}

/// Where a record was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// In a snapshot: it may be old.
    Standing,
    /// It was just written.
    Written,
}

/// All peers of a group.
#[derive(Debug)]
pub(super) struct Peers {
    options: MonitorOptions,
    peers: BTreeMap<String, Peer>,
    /// The observer's own: it stretches the grace.
    pub(super) health: Health,
    /// Not yet taken by [`Peers::events`]. Emptied after every step, so it is bounded by the peers.
    events: Vec<PeerEvent>,
}

impl Peers {
    pub(super) fn new(options: MonitorOptions) -> Self {
        Self { options, peers: BTreeMap::new(), health: Health::default(), events: Vec::new() }
    }

    fn grace(&self) -> Duration {
        self.health.scale(self.options.grace)
    }

    pub(super) fn events(&mut self) -> Vec<PeerEvent> {
        std::mem::take(&mut self.events)
    }

    /// Takes note of a record. Says whether it is a beat that was not known before.
    pub(super) fn record(&mut self, heard: Heard, found: Found, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(&heard.peer) else {
            self.first(heard, found, now);
            return found == Found::Written;
        };
        let known = peer.latest.incarnation;
        if heard.incarnation < known {
            tracing::debug!(peer = heard.peer, incarnation = %heard.incarnation, "late record of an older run");
            return false;
        }
        if heard.incarnation > known {
            self.next_run(heard, now);
            return true;
        }
        if heard.beat.convicted {
            let told = peer.state == PeerState::Dead;
            peer.latest = heard;
            if !told {
                peer.die(Cause::Convicted, now, &mut self.events);
            }
            return false;
        }
        if peer.latest.beat.convicted || heard.beat.seq <= peer.latest.beat.seq {
            return false;
        }
        peer.beat(heard, now, &mut self.events);
        true
    }

    /// A peer that was not known.
    fn first(&mut self, heard: Heard, found: Found, now: Instant) {
        let mut detector = self.options.detection.detector(heard.every());
        detector.heartbeat(now);
        let written = found == Found::Written;
        if !written {
            // Silence counts from now, but the time up to the first beat is no interval.
            detector.excuse(now);
        }
        let mut peer = Peer {
            detector,
            state: if written { PeerState::Alive } else { PeerState::Unknown },
            heard: written.then_some(now),
            unknown_since: (!written).then_some(now),
            suspect_since: None,
            dead_since: None,
            died: None,
            latest: heard,
        };
        if peer.latest.beat.convicted {
            peer.die(Cause::Convicted, now, &mut self.events);
        } else if written {
            self.events.push(peer.alive());
        }
        self.peers.insert(peer.latest.peer.clone(), peer);
    }

    /// A later run of a known peer.
    fn next_run(&mut self, heard: Heard, now: Instant) {
        let Some(mut before) = self.peers.remove(&heard.peer) else { return };
        let was_dead = before.state == PeerState::Dead;
        // A record that was made anew after the last one we saw was deleted in between: that run had left.
        let left = !was_dead && heard.created > before.latest.modified;
        if left {
            self.events.push(before.left());
        } else if !was_dead {
            before.die(Cause::Replaced, now, &mut self.events);
        }
        self.first(heard, Found::Written, now);
        // What `first` told is right unless there is a death that it does not know of.
        let Some(peer) = self.peers.get_mut(&before.latest.peer) else { return };
        if left || peer.state == PeerState::Dead {
            return;
        }
        peer.died = before.died;
        self.events.pop();
        let (peer, incarnation) = (peer.latest.peer.clone(), peer.latest.incarnation);
        self.events.push(PeerEvent::Returned { peer, incarnation, before: before.latest.incarnation });
    }

    /// The record is gone: the peer left, or was dead and is forgotten.
    pub(super) fn deleted(&mut self, peer: &str) {
        if let Some(gone) = self.peers.remove(peer)
            && gone.state != PeerState::Dead
        {
            self.events.push(gone.left());
        }
    }

    /// Starts from a snapshot. Silence before it is excused.
    pub(super) fn reset(&mut self, records: Vec<Heard>, now: Instant) {
        self.excuse_all(now);
        let standing: std::collections::HashSet<_> = records.iter().map(|heard| heard.peer.clone()).collect();
        let gone: Vec<_> = self.peers.keys().filter(|peer| !standing.contains(*peer)).cloned().collect();
        for peer in gone {
            self.deleted(&peer);
        }
        for heard in records {
            self.record(heard, Found::Standing, now);
        }
    }

    /// This process could not look for `pause`: no silence counts for that time.
    pub(super) fn excuse(&mut self, pause: Duration, now: Instant) {
        for peer in self.peers.values_mut() {
            if let Some(since) = peer.detector.silent_since() {
                peer.detector.excuse((since + pause).min(now));
            }
            peer.suspect_since = peer.suspect_since.map(|since| (since + pause).min(now));
        }
    }

    /// Nothing could be heard until now: every peer gets a fresh chance.
    pub(super) fn excuse_all(&mut self, now: Instant) {
        for peer in self.peers.values_mut().filter(|peer| peer.state != PeerState::Dead) {
            peer.detector.excuse(now);
            peer.unknown_since.get_or_insert(now);
            peer.suspect_since = peer.suspect_since.map(|_| now);
        }
    }

    /// Suspects whose silence is too long.
    pub(super) fn judge(&mut self, now: Instant) {
        for peer in self.peers.values_mut() {
            let available = peer.detector.is_available(now);
            match peer.state {
                PeerState::Unknown | PeerState::Alive if !available => {
                    peer.state = PeerState::Suspect;
                    peer.suspect_since = Some(now);
                    self.events.push(PeerEvent::Suspect {
                        peer: peer.latest.peer.clone(),
                        incarnation: peer.latest.incarnation,
                        suspicion: peer.detector.suspicion(now),
                    });
                }
                // Excused: the grace begins when the silence is too long again.
                PeerState::Suspect if available => peer.suspect_since = Some(now),
                _ => {}
            }
        }
    }

    /// The first peer that only a look at the store can save.
    pub(super) fn overdue(&self, now: Instant) -> Option<(String, u64)> {
        let grace = self.grace();
        let overdue = self.peers.values().find(|peer| peer.is_overdue(grace, now))?;
        Some((overdue.latest.peer.clone(), overdue.latest.beat.seq))
    }

    /// A look that was made after the grace was over, and came back just now, has shown no beat after `seq`.
    pub(super) fn convict(&mut self, peer: &str, seq: u64, now: Instant) {
        let grace = self.grace();
        if let Some(peer) = self.peers.get_mut(peer)
            && peer.latest.beat.seq == seq
            && peer.is_overdue(grace, now)
        {
            peer.die(Cause::Silence, now, &mut self.events);
        }
    }

    /// The peer after this one, in turn, that is not dead.
    pub(super) fn after(&self, last: &str) -> Option<String> {
        let living = |entry: &(&String, &Peer)| entry.1.state != PeerState::Dead;
        let mut living = self.peers.iter().filter(living).map(|(name, _)| name);
        let first = living.clone().next();
        living.find(|name| name.as_str() > last).or(first).cloned()
    }

    /// A peer that has been dead for long enough to be forgotten, with the revision of its record.
    pub(super) fn forgettable(&self, now: Instant) -> Option<(String, Revision)> {
        let old = |peer: &&Peer| peer.dead_since.is_some_and(|since| now - since >= self.options.forget_after);
        self.peers.values().find(old).map(|peer| (peer.latest.peer.clone(), peer.latest.modified))
    }

    /// The record of a dead peer could not be removed yet: others have their turn first.
    pub(super) fn forget_later(&mut self, peer: &str, now: Instant) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.dead_since = peer.dead_since.map(|_| now);
        }
    }

    /// Peers with a run that died: what a recovery has to do, or has done.
    pub(super) fn died(&self) -> Vec<(String, Incarnation, u64)> {
        let died = |peer: &Peer| peer.died.map(|died| (peer.latest.peer.clone(), died, peer.latest.beat.seq));
        self.peers.values().filter_map(died).collect()
    }

    pub(super) fn list(&self, now: Instant, offset: impl Fn(&str) -> Option<ClockOffset>) -> Vec<PeerStatus> {
        let look = |peer: &Peer| PeerStatus {
            peer: peer.latest.peer.clone(),
            incarnation: peer.latest.incarnation,
            state: peer.state,
            suspicion: peer.detector.suspicion(now),
            heard: peer.heard.map(|heard| now.saturating_duration_since(heard)),
            unknown_since: peer.unknown_since,
            died: peer.died,
            every: peer.latest.every(),
            payload: peer.latest.beat.payload.clone(),
            offset: offset(&peer.latest.peer),
        };
        self.peers.values().map(look).collect()
    }
}

impl Peer {
    fn is_overdue(&self, grace: Duration, now: Instant) -> bool {
        let over = |since: Instant| now.saturating_duration_since(since) >= grace;
        self.state == PeerState::Suspect && !self.detector.is_available(now) && self.suspect_since.is_some_and(over)
    }

    /// A later beat of the same run.
    fn beat(&mut self, heard: Heard, now: Instant, events: &mut Vec<PeerEvent>) {
        self.detector.heartbeats(heard.beat.seq - self.latest.beat.seq, now);
        self.latest = heard;
        self.heard = Some(now);
        (self.unknown_since, self.suspect_since, self.dead_since) = (None, None, None);
        match std::mem::replace(&mut self.state, PeerState::Alive) {
            PeerState::Alive => {}
            PeerState::Unknown | PeerState::Suspect => events.push(self.alive()),
            PeerState::Dead => {
                // It was a mistake: nobody has died.
                self.died = None;
                let (peer, incarnation) = (self.latest.peer.clone(), self.latest.incarnation);
                events.push(PeerEvent::Returned { peer, incarnation, before: incarnation });
            }
        }
    }

    fn die(&mut self, cause: Cause, now: Instant, events: &mut Vec<PeerEvent>) {
        self.state = PeerState::Dead;
        (self.suspect_since, self.dead_since) = (None, Some(now));
        let (peer, incarnation) = (self.latest.peer.clone(), self.latest.incarnation);
        self.died = Some(incarnation);
        tracing::info!(peer, %incarnation, ?cause, "peer is dead");
        events.push(PeerEvent::Dead { peer, incarnation, cause });
    }

    fn alive(&self) -> PeerEvent {
        PeerEvent::Alive { peer: self.latest.peer.clone(), incarnation: self.latest.incarnation }
    }

    fn left(&self) -> PeerEvent {
        PeerEvent::Left { peer: self.latest.peer.clone(), incarnation: self.latest.incarnation }
    }
}
