//! Elections while the server goes away and comes back, on a paused clock.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    Candidate, Coordinator, Dir, ErrorKind, Key, Leadership, SessionOptions, SessionState, Txn, Write,
    layer::{Stack, Verb},
};
use quorate_memory::{Faults, Memory};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

const TTL: Duration = Duration::from_secs(10);

fn coord(client: Memory) -> (Coordinator, Faults) {
    let faults = client.faults();
    let backend = Stack::new(Arc::new(client)).standard(Duration::from_secs(2)).build();
    (Coordinator::new(backend, SessionOptions { ttl: TTL, owner: "test".to_owned() }), faults)
}

/// Counts who is inside.
struct Inside(Arc<AtomicUsize>);

impl Inside {
    fn enter(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count.clone())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A candidate that leads for as long as it can, counted in `leading`, its terms in `terms`.
fn candidate(
    coord: &Coordinator,
    candidate: Candidate,
    leading: &Arc<AtomicUsize>,
    terms: &Arc<AtomicUsize>,
) -> JoinHandle<()> {
    let (election, leading, terms) = (coord.election("job"), leading.clone(), terms.clone());
    tokio::spawn(async move {
        let (leading, terms) = (&leading, &terms);
        let work = |leadership: Arc<Leadership>| async move {
            assert!(leadership.is_leader());
            terms.fetch_add(1, Ordering::SeqCst);
            let _inside = Inside::enter(leading);
            std::future::pending::<ControlFlow<()>>().await
        };
        election.run_while_leader(candidate, work).await.unwrap();
    })
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(TTL * 6, waiting).await.unwrap_or_else(|_| panic!("{what} did not come true"));
}

#[tokio::test(start_paused = true)]
async fn the_count_of_leaders_goes_from_one_to_none_to_one_with_the_server() {
    for cautious in [false, true] {
        let (coord, faults) = coord(Memory::new());
        let (leading, terms) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let how = if cautious { Candidate::new("x").cautious() } else { Candidate::new("x") };
        let tasks: Vec<_> = (0..10).map(|_| candidate(&coord, how.clone(), &leading, &terms)).collect();
        let count = || leading.load(Ordering::SeqCst);
        for round in 1..=4 {
            until("one leads", || count() == 1).await;
            sleep(TTL).await;
            assert_eq!((count(), terms.load(Ordering::SeqCst)), (1, round), "exactly one, and it stays");
            faults.cut();
            // A cautious leader steps down at its next renewal, every other one when its lease is over.
            sleep(if cautious { TTL / 2 } else { TTL }).await;
            for _ in 0..100 {
                assert_eq!(count(), 0, "somebody leads without a server");
                sleep(Duration::from_millis(300)).await;
            }
            faults.heal();
        }
        until("one leads again", || count() == 1).await;
        tasks.iter().for_each(JoinHandle::abort);
    }
}

#[tokio::test(start_paused = true)]
async fn a_short_outage_is_no_change_of_leaders_unless_the_candidate_is_cautious() {
    for cautious in [false, true] {
        let (coord, faults) = coord(Memory::new());
        let (leading, terms) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let how = if cautious { Candidate::new("x").cautious() } else { Candidate::new("x") };
        let task = candidate(&coord, how, &leading, &terms);
        until("it leads", || leading.load(Ordering::SeqCst) == 1).await;
        let session = coord.session().await.unwrap();
        faults.cut();
        until("the renewal is overdue", || session.state() == SessionState::Suspect).await;
        sleep(Duration::from_millis(100)).await;
        assert_eq!(leading.load(Ordering::SeqCst), usize::from(!cautious));
        faults.heal();
        until("the session is live again", || session.state() == SessionState::Live).await;
        until("it leads", || leading.load(Ordering::SeqCst) == 1).await;
        assert_eq!(terms.load(Ordering::SeqCst), 1 + usize::from(cautious));
        assert!(session.is_live(), "void: the outage outlasted the session");
        task.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_comes_late_gets_one_leader() {
    let (coord, faults) = coord(Memory::new());
    let (leading, terms) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    faults.cut();
    let task = candidate(&coord, "x".into(), &leading, &terms);
    sleep(TTL * 30).await;
    assert_eq!(terms.load(Ordering::SeqCst), 0);
    faults.heal();
    until("it leads", || leading.load(Ordering::SeqCst) == 1).await;
    sleep(TTL * 3).await;
    assert_eq!((leading.load(Ordering::SeqCst), terms.load(Ordering::SeqCst)), (1, 1));
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_gives_up_before_there_is_a_server_creates_nothing() {
    let store = Memory::new();
    let (coord, faults) = coord(store.client());
    faults.cut();
    let (leading, terms) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let task = candidate(&coord, "x".into(), &leading, &terms);
    let campaign = coord.election("job");
    assert!(timeout(Duration::from_millis(50), campaign.campaign("y")).await.is_err());
    task.abort();
    faults.heal();
    sleep(TTL * 3).await;
    let (other, _) = self::coord(store.client());
    assert_eq!(other.election("job").candidates().await.unwrap(), []);
    assert_eq!(terms.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn an_announcement_whose_reply_is_lost_is_made_once() {
    let (coord, faults) = coord(Memory::new());
    coord.session().await.unwrap();
    let mut observer = coord.election("job").observe().await.unwrap();
    assert_eq!(observer.next().await.unwrap(), None);
    faults.lose_reply([Verb::Commit], 1);
    let leader = coord.election("job").campaign("one").await.unwrap();
    assert_eq!(observer.next().await.unwrap().unwrap().value, "one");
    leader.announce("two").await.unwrap();
    assert_eq!(observer.next().await.unwrap().unwrap().value, "two");
    assert_eq!(faults.pending(), 0, "void: no reply was lost");
    // Lost on the way there and on the way back, again and again: it gets through, in order.
    faults.fail([Verb::Commit], 2, ErrorKind::Ambiguous);
    faults.lose_reply([Verb::Commit], 1);
    leader.announce("three").await.unwrap();
    assert_eq!(observer.next().await.unwrap().unwrap().value, "three");
    assert!(timeout(TTL, observer.next()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_announced_is_announced_when_the_server_is_back() {
    let store = Memory::new();
    let (coord, faults) = coord(store.client());
    let (other, _) = self::coord(store.client());
    let leader = coord.election("job").campaign("one").await.unwrap();
    leader.announce("two").await.unwrap();
    let mut observer = other.election("job").observe().await.unwrap();
    assert_eq!(observer.next().await.unwrap().unwrap().value, "two");
    faults.fail([Verb::Commit], 60, ErrorKind::Unavailable);
    let error = leader.announce("three").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(leader.is_leader(), "leading does not depend on it");
    faults.clear();
    assert_eq!(observer.next().await.unwrap().unwrap().value, "three");
}

#[tokio::test(start_paused = true)]
async fn a_resignation_whose_reply_is_lost_leaves_neither_ticket_nor_record() {
    for lost in 1..=3 {
        let store = Memory::new();
        let (coord, faults) = coord(store.client());
        let (other, _) = self::coord(store.client());
        let leader = coord.election("job").campaign("one").await.unwrap();
        leader.announce("two").await.unwrap();
        faults.lose_reply([Verb::Commit], lost);
        // With one lost reply the repetition tells; with more it is finished in the background.
        assert_eq!(leader.resign().await.is_ok(), lost == 1);
        sleep(TTL).await;
        assert_eq!(faults.pending(), 0, "void: fewer replies were lost");
        let mut observer = other.election("job").observe().await.unwrap();
        assert_eq!(observer.next().await.unwrap(), None);
        assert_eq!(other.election("job").candidates().await.unwrap(), []);
    }
}

#[tokio::test(start_paused = true)]
async fn an_observer_that_was_cut_off_ends_at_the_truth_and_never_goes_back() {
    let store = Memory::new();
    let (watcher, faults) = coord(store.client());
    let (coord, _) = self::coord(store.client());
    let mut observer = watcher.election("job").observe().await.unwrap();
    assert_eq!(observer.next().await.unwrap(), None);
    let mut terms = Vec::new();
    for round in 0..5 {
        let leader = coord.election("job").campaign("x").await.unwrap();
        leader.announce(format!("round {round}")).await.unwrap();
        if round % 2 == 0 {
            faults.cut();
            assert!(timeout(Duration::from_secs(1), async { while observer.next().await.is_ok() {} }).await.is_err());
            assert!(!observer.is_current(), "what is known may be out of date");
            leader.announce(format!("round {round}, unseen")).await.unwrap();
            faults.heal();
        }
        let expected = if round % 2 == 0 { format!("round {round}, unseen") } else { format!("round {round}") };
        loop {
            let Some(seen) = observer.next().await.unwrap() else { continue };
            terms.push(seen.term);
            if seen.value == expected {
                break;
            }
        }
        assert!(observer.is_current());
        leader.resign().await.unwrap();
    }
    assert!(terms.windows(2).all(|pair| pair[0] <= pair[1]), "{terms:?}");
}

/// What a leader's work keeps of its leadership is none after its term.
#[tokio::test(start_paused = true)]
async fn a_leadership_that_the_work_kept_ends_with_the_term() {
    let (coord, _) = coord(Memory::new());
    let (tx, mut kept) = tokio::sync::mpsc::channel(2);
    let election = coord.election("job");
    let tx = &tx;
    let work = |leadership: Arc<Leadership>| async move {
        tx.send(leadership).await.unwrap();
        ControlFlow::Break(())
    };
    election.run_while_leader("x", work).await.unwrap();
    let kept = kept.recv().await.unwrap();
    assert!(!kept.is_leader());
    assert!(kept.announce("still me").await.is_err());
    assert_eq!(election.candidates().await.unwrap(), []);
    election.campaign("y").await.unwrap().resign().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_leadership_that_the_work_kept_ends_when_the_campaign_is_dropped() {
    let (coord, _) = coord(Memory::new());
    let (tx, mut kept) = tokio::sync::mpsc::channel(2);
    let election = coord.election("job");
    let running = tokio::spawn({
        let election = election.clone();
        async move {
            let tx = &tx;
            let work = |leadership: Arc<Leadership>| async move {
                tx.send(leadership).await.unwrap();
                std::future::pending::<ControlFlow<()>>().await
            };
            election.run_while_leader("x", work).await
        }
    });
    let kept = kept.recv().await.unwrap();
    assert!(kept.is_leader());
    running.abort();
    let next = timeout(TTL, election.campaign("y")).await.unwrap().unwrap();
    assert!(next.is_leader() && !kept.is_leader(), "two act as leader at once");
}

#[tokio::test(start_paused = true)]
async fn an_observer_passes_over_an_older_term_and_tells_of_a_record_that_is_none() {
    let store = Memory::new();
    let (coord, _) = coord(store.client());
    let mut observer = coord.election("job").observe().await.unwrap();
    assert_eq!(observer.next().await.unwrap(), None);
    let leader = coord.election("job").campaign("x").await.unwrap();
    assert_eq!(observer.next().await.unwrap().unwrap().term, leader.term());
    let key = Key::new(&Dir::new(["election-leader"]).unwrap(), "job").unwrap();
    let write = async |value: &'static str| {
        let put = Write::Put { key: key.clone(), value: value.into(), lease: None };
        coord.backend().commit(&Txn { checks: vec![], writes: vec![put] }).await.unwrap();
    };
    write(r#"{"term":0,"owner":"former","value":"old"}"#).await;
    assert!(timeout(TTL, observer.next()).await.is_err(), "terms never go back");
    write("no record").await;
    assert_eq!(observer.next().await.unwrap_err().kind(), ErrorKind::Corrupt);
    let seen = coord.election("job").leader().await.unwrap().unwrap();
    assert_eq!((&*seen.value, seen.term), ("x", leader.term()), "the ticket tells who leads");
    // The next announcement repairs it, and the observation goes on.
    leader.announce("y").await.unwrap();
    assert_eq!(observer.next().await.unwrap().unwrap().value, "y");
}
