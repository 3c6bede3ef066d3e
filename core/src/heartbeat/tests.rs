//! The table of peers, on instants made by hand.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Cause, Detection, Incarnation, MonitorOptions, PeerEvent, PeerState,
    peers::{Found, Peers},
    record::{Beat, Heard},
};
use crate::backend::Revision;

const SECOND: Duration = Duration::from_secs(1);

/// Suspect after 3 s of silence, dead after 5 s more.
fn options() -> MonitorOptions {
    MonitorOptions { detection: Detection::Deadline { acceptable_pause: 2 * SECOND }, ..MonitorOptions::default() }
}

/// A beat of a record that was created at `created`; every write in these tests is one revision after the last.
fn beat(peer: &str, created: u64, incarnation: u64, seq: u64) -> Heard {
    let record = Beat {
        run: format!("run {incarnation}"),
        incarnation: Some(incarnation),
        seq,
        every_ms: 1000,
        sent_us: 0,
        payload: String::new(),
        echo: None,
        convicted: false,
    };
    Heard {
        peer: peer.to_owned(),
        incarnation: Incarnation(incarnation),
        created: Revision(created),
        modified: Revision(incarnation + seq),
        beat: record,
    }
}

fn convicted(peer: &str, created: u64, incarnation: u64, seq: u64) -> Heard {
    let mut heard = beat(peer, created, incarnation, seq);
    heard.beat.convicted = true;
    heard
}

/// Lets the time pass as a monitor would, confirming what is overdue by a read that shows nothing new.
fn pass(peers: &mut Peers, from: Instant, seconds: u32) -> (Instant, Vec<PeerEvent>) {
    let mut now = from;
    let mut events = Vec::new();
    for _ in 0..seconds * 10 {
        now += SECOND / 10;
        peers.judge(now);
        if let Some((peer, seq)) = peers.overdue(now) {
            peers.convict(&peer, seq, now);
        }
        events.extend(peers.events());
    }
    (now, events)
}

/// What the events say, short: `+a1` alive, `?a1` suspect, `!a1` dead, `^a2` returned, `-a1` left.
fn told(events: &[PeerEvent]) -> String {
    let word = |event: &PeerEvent| match event {
        PeerEvent::Alive { peer, incarnation } => format!("+{peer}{incarnation}"),
        PeerEvent::Suspect { peer, incarnation, .. } => format!("?{peer}{incarnation}"),
        PeerEvent::Dead { peer, incarnation, .. } => format!("!{peer}{incarnation}"),
        PeerEvent::Returned { peer, incarnation, .. } => format!("^{peer}{incarnation}"),
        PeerEvent::Left { peer, incarnation } => format!("-{peer}{incarnation}"),
        PeerEvent::Missed { count } => format!("…{count}"),
    };
    events.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// A table in which `a` and `b` have just beaten for the first time.
fn two(now: Instant) -> Peers {
    let mut peers = Peers::new(options());
    peers.reset(Vec::new(), now);
    peers.record(beat("a", 1, 1, 1), Found::Written, now);
    peers.record(beat("b", 1, 1, 1), Found::Written, now);
    assert_eq!(told(&peers.events()), "+a1 +b1");
    peers
}

/// S-G14.
#[tokio::test]
async fn a_silent_member_is_dropped_once_and_one_with_heartbeats_stays() {
    let mut now = Instant::now();
    let mut peers = two(now);
    let mut events = Vec::new();
    for seq in 2..30 {
        peers.record(beat("a", 1, 1, seq), Found::Written, now);
        let (later, more) = pass(&mut peers, now, 1);
        events.extend(more);
        now = later;
    }
    assert_eq!(told(&events), "?b1 !b1");
    assert!(matches!(events[1], PeerEvent::Dead { cause: Cause::Silence, .. }));
    let states: Vec<_> = peers.list(now, |_| None).into_iter().map(|p| (p.peer, p.state, p.died)).collect();
    let expected = [("a".to_owned(), PeerState::Alive, None), ("b".to_owned(), PeerState::Dead, Some(Incarnation(1)))];
    assert_eq!(states, expected);
}

#[tokio::test]
async fn without_a_confirming_read_nobody_is_dead() {
    let start = Instant::now();
    let mut peers = two(start);
    let late = start + 3600 * SECOND;
    peers.judge(start + 10 * SECOND);
    assert_eq!(told(&peers.events()), "?a1 ?b1");
    peers.judge(late);
    assert_eq!(told(&peers.events()), "");
    assert_eq!(peers.overdue(late), Some(("a".to_owned(), 1)));
    // The read shows a beat that the watch had not told: the verdict is off.
    peers.record(beat("a", 1, 1, 2), Found::Written, late);
    peers.convict("a", 1, late);
    peers.convict("a", 2, late);
    assert_eq!(told(&peers.events()), "+a1");
}

/// S-G22.
#[tokio::test]
async fn a_higher_incarnation_revives_and_older_records_change_nothing() {
    let mut peers = two(Instant::now());
    let (now, events) = pass(&mut peers, Instant::now(), 10);
    assert_eq!(told(&events), "?a1 ?b1 !a1 !b1");
    // Replayed: the dead stay dead.
    assert!(!peers.record(beat("a", 1, 1, 1), Found::Written, now));
    assert_eq!(told(&peers.events()), "");
    peers.record(beat("a", 1, 7, 1), Found::Written, now);
    let events = peers.events();
    let before = Incarnation(1);
    assert!(
        matches!(&events[..], [PeerEvent::Returned { incarnation: Incarnation(7), before: b, .. }] if *b == before)
    );
    for late in [beat("a", 1, 1, 2), convicted("a", 1, 1, 2)] {
        assert!(!peers.record(late, Found::Written, now));
    }
    assert_eq!(told(&peers.events()), "");
    assert_eq!(peers.list(now, |_| None)[0].died, Some(before), "what died is still to be recovered");
}

#[tokio::test]
async fn a_mistake_is_told_as_the_same_run_returning() {
    let mut peers = two(Instant::now());
    let (now, _) = pass(&mut peers, Instant::now(), 10);
    peers.record(beat("a", 1, 1, 12), Found::Written, now);
    assert!(matches!(&peers.events()[..], [PeerEvent::Returned { incarnation, before, .. }] if incarnation == before));
    assert_eq!(peers.list(now, |_| None)[0].died, None);
    assert_eq!(told(&pass(&mut peers, now, 10).1), "?a1 !a1", "and it can die again");
}

#[tokio::test]
async fn a_run_that_is_replaced_has_died_unless_it_had_left() {
    let now = Instant::now();
    let mut peers = two(now);
    peers.record(beat("a", 1, 9, 1), Found::Written, now);
    let events = peers.events();
    assert_eq!(told(&events), "!a1 ^a9");
    assert!(matches!(events[0], PeerEvent::Dead { cause: Cause::Replaced, .. }));
    // The watch skipped the deletion in between, but the record was made anew.
    peers.record(beat("b", 9, 9, 1), Found::Written, now);
    assert_eq!(told(&peers.events()), "-b1 +b9");
    peers.deleted("b");
    peers.deleted("b");
    assert_eq!(told(&peers.events()), "-b9");
}

#[tokio::test]
async fn a_conviction_by_somebody_else_is_a_death_told_once() {
    let now = Instant::now();
    let mut peers = two(now);
    for _ in 0..2 {
        peers.record(convicted("a", 1, 1, 1), Found::Written, now);
    }
    assert_eq!(told(&peers.events()), "!a1");
    peers.record(beat("a", 1, 1, 5), Found::Written, now);
    assert_eq!(told(&peers.events()), "", "no beat of a convicted run counts");
    // A monitor that comes later sees the same.
    let mut later = Peers::new(options());
    later.reset(vec![convicted("a", 1, 1, 1)], now);
    assert_eq!(told(&later.events()), "!a1");
    later.deleted("a");
    assert_eq!(told(&later.events()), "", "forgotten, not left");
}

#[tokio::test]
async fn what_stood_before_the_first_look_is_unknown_until_it_beats_or_is_silent() {
    let start = Instant::now();
    let mut peers = Peers::new(options());
    peers.reset(vec![beat("a", 1, 1, 5), beat("b", 1, 1, 5)], start);
    assert_eq!(told(&peers.events()), "");
    let all = peers.list(start, |_| None);
    assert!(all.iter().all(|p| p.state == PeerState::Unknown && p.heard.is_none() && p.unknown_since == Some(start)));
    peers.record(beat("a", 1, 1, 6), Found::Written, start + SECOND);
    assert_eq!(told(&peers.events()), "+a1");
    assert_eq!(told(&pass(&mut peers, start, 9).1), "?b1 ?a1 !b1");
}

#[tokio::test]
async fn after_an_outage_everybody_gets_a_fresh_chance_and_events_are_not_repeated() {
    let start = Instant::now();
    let mut peers = two(start);
    let (now, events) = pass(&mut peers, start, 7);
    assert_eq!(told(&events), "?a1 ?b1");
    let back = now + 3600 * SECOND;
    peers.reset(vec![beat("a", 1, 1, 900), beat("b", 1, 1, 1)], back);
    assert_eq!(told(&peers.events()), "+a1", "a has beaten meanwhile, b has not");
    let b = &peers.list(back, |_| None)[1];
    assert_eq!((b.state, b.unknown_since), (PeerState::Suspect, Some(back)));
    let (now, events) = pass(&mut peers, back, 7);
    assert_eq!(told(&events), "?a1", "b is not suspected twice, and not convicted before its time");
    assert_eq!(told(&pass(&mut peers, now, 2).1), "!b1 !a1");
}

#[tokio::test]
async fn a_short_pause_of_the_observer_is_not_counted_as_silence() {
    let start = Instant::now();
    let mut peers = two(start);
    let (now, _) = pass(&mut peers, start, 2);
    let woke = now + 5 * SECOND;
    peers.excuse(5 * SECOND, woke);
    let (now, events) = pass(&mut peers, woke, 2);
    assert_eq!(told(&events), "?a1 ?b1", "two seconds before it and one after it make three");
    peers.excuse_all(now);
    assert_eq!(told(&pass(&mut peers, now, 7).1), "", "a fresh start takes the grace back as well");
}

#[tokio::test]
async fn peers_that_vanished_during_an_outage_have_left() {
    let start = Instant::now();
    let mut peers = two(start);
    peers.reset(vec![beat("a", 1, 1, 2)], start + SECOND);
    assert_eq!(told(&peers.events()), "-b1");
}

#[tokio::test]
async fn the_dead_are_forgotten_in_time_and_retried_later() {
    let start = Instant::now();
    let mut peers = two(start);
    let (now, _) = pass(&mut peers, start, 10);
    assert!(peers.forgettable(now).is_none());
    let later = now + options().forget_after;
    assert_eq!(peers.forgettable(later), Some(("a".to_owned(), Revision(2))));
    peers.forget_later("a", later);
    assert_eq!(peers.forgettable(later).expect("the other one").0, "b");
}

/// S-G25.
#[tokio::test]
async fn an_observer_in_trouble_convicts_later() {
    let start = Instant::now();
    let mut peers = two(start);
    peers.health.worsen();
    assert_eq!(told(&pass(&mut peers, start, 12).1), "?a1 ?b1", "8 s without the doubt, 13 s with it");
    peers.health.improve();
    assert_eq!(told(&pass(&mut peers, start + 12 * SECOND, 1).1), "!a1 !b1");
}

#[tokio::test]
async fn probes_take_turns_among_the_living() {
    let start = Instant::now();
    let mut peers = two(start);
    assert_eq!(peers.after("").as_deref(), Some("a"));
    assert_eq!(peers.after("a").as_deref(), Some("b"));
    assert_eq!(peers.after("b").as_deref(), Some("a"));
    peers.record(convicted("a", 1, 1, 1), Found::Written, start);
    assert_eq!(peers.after("b").as_deref(), Some("b"));
}
