//! Elections: work that runs while leading, and what everything costs.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{Coordinator, ErrorKind, FencingToken, Leadership, layer::Verb};
use tokio::time::sleep;

use super::{
    chaos::troubled,
    coord,
    counting::counted_waiters,
    election::{is_traceless, lead, until_standing},
};
use crate::{
    Clients,
    support::{QUIET, Running, SOON, cases, eventually, refused, spawn, within},
};

cases!("election":
    work_runs_once_per_term_until_it_says_stop,
    rotation_visits_every_candidate,
    work_is_cancelled_when_the_leader_is_deposed_and_runs_again_in_a_later_term,
    dropped_work_is_dropped_before_anybody_else_leads,
    a_closed_coordinator_or_session_ends_the_campaigns_for_good,
    gained_and_lost_alternate_under_chaos,
    gained_and_lost_alternate_while_leaders_are_deposed,
    an_uncontended_campaign_is_one_call_and_so_is_a_resignation,
    one_resignation_wakes_one_of_a_hundred_candidates,
);

/// What one candidate's work does: an automaton that accepts `gained lost gained lost …`, each term once.
#[derive(Debug, Default)]
struct Record {
    leading: AtomicBool,
    gained: Mutex<Vec<FencingToken>>,
    lost: AtomicUsize,
}

/// Leading, until this is dropped.
struct Term(Arc<Record>);

impl Record {
    fn gain(self: &Arc<Self>, leadership: &Leadership) -> Term {
        assert!(leadership.is_leader(), "gained without leading");
        assert!(!self.leading.swap(true, Ordering::SeqCst), "gained twice without losing in between");
        self.gained.lock().expect("no poison").push(leadership.term());
        Term(self.clone())
    }

    fn terms(&self) -> Vec<FencingToken> {
        self.gained.lock().expect("no poison").clone()
    }

    /// The automaton is in a final state.
    fn assert_balanced(&self) {
        assert!(!self.leading.load(Ordering::SeqCst), "gained and never lost");
        let terms = self.terms();
        assert_eq!(terms.len(), self.lost.load(Ordering::SeqCst));
        assert!(terms.windows(2).all(|pair| pair[0] < pair[1]), "a term was entered again: {terms:?}");
    }
}

impl Drop for Term {
    fn drop(&mut self) {
        assert!(self.0.leading.swap(false, Ordering::SeqCst) || std::thread::panicking(), "lost without having gained");
        self.0.lost.fetch_add(1, Ordering::SeqCst);
    }
}

async fn work_runs_once_per_term_until_it_says_stop(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let record = Arc::new(Record::default());
    let mut running = spawn({
        let (election, record) = (a.election("job"), record.clone());
        async move {
            let (record, runs) = (&record, &AtomicUsize::new(0));
            election
                .run_while_leader("me", |leadership: Arc<Leadership>| async move {
                    let _term = record.gain(&leadership);
                    let run = runs.fetch_add(1, Ordering::SeqCst) + 1;
                    tokio::task::yield_now().await;
                    if run < 5 { ControlFlow::Continue(()) } else { ControlFlow::Break(run) }
                })
                .await
        }
    });
    assert_eq!(running.soon("five terms").await.expect("no error"), 5);
    record.assert_balanced();
    assert_eq!(record.terms().len(), 5);
    is_traceless(&b, "job").await;
}

async fn rotation_visits_every_candidate(clients: Arc<dyn Clients>) {
    const ROUNDS: usize = 3;
    let (coords, barrier) = ([coord(&clients).await, coord(&clients).await], coord(&clients).await);
    let first = lead(&barrier.election("job"), "first").await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks: Vec<Running<()>> = Vec::new();
    for i in 0..4 {
        let (election, order) = (coords[i % 2].election("job"), order.clone());
        tasks.push(spawn(async move {
            let (order, turns) = (&order, &AtomicUsize::new(0));
            let work = |_: Arc<Leadership>| async move {
                order.lock().expect("no poison").push(i);
                if turns.fetch_add(1, Ordering::SeqCst) + 1 < ROUNDS {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            };
            election.run_while_leader(format!("{i}"), work).await.expect("no error");
        }));
        until_standing(&barrier, "job", i + 2).await;
    }
    first.resign().await.expect("resigned");
    for task in &mut tasks {
        task.soon("a candidate").await;
    }
    let order = order.lock().expect("no poison").clone();
    // Each goes to the end of the line; who resigned may be overtaken on the way there, by the one before at most.
    assert_eq!(order[..4], [0, 1, 2, 3]);
    for i in 0..4 {
        assert_eq!(order.iter().filter(|turn| **turn == i).count(), ROUNDS, "{order:?}");
    }
}

async fn work_is_cancelled_when_the_leader_is_deposed_and_runs_again_in_a_later_term(clients: Arc<dyn Clients>) {
    let (a, operator) = (coord(&clients).await, coord(&clients).await);
    let record = Arc::new(Record::default());
    let running = spawn({
        let (election, record) = (a.election("job"), record.clone());
        async move {
            let record = &record;
            let work = |leadership: Arc<Leadership>| async move {
                let _term = record.gain(&leadership);
                std::future::pending::<ControlFlow<()>>().await
            };
            election.run_while_leader("me", work).await
        }
    });
    let election = operator.election("job");
    for terms in 1..=3 {
        eventually("it leads", async || record.terms().len() == terms).await;
        // Twice in quick succession: the second hits nobody, or a term that has just begun.
        election.depose().await.expect("answered").expect("somebody led");
        election.depose().await.expect("answered");
        eventually("it is cancelled", async || record.lost.load(Ordering::SeqCst) >= terms).await;
        let entered = record.terms().len();
        if entered > terms {
            // The second one has hit: it is part of the count from now on.
            break;
        }
    }
    let entered = record.terms().len();
    eventually("the only candidate leads again", async || {
        record.terms().len() >= entered && record.leading.load(Ordering::SeqCst)
    })
    .await;
    drop(running);
    is_traceless(&operator, "job").await;
    record.assert_balanced();
}

async fn dropped_work_is_dropped_before_anybody_else_leads(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let record = Arc::new(Record::default());
    let running = spawn({
        let (election, record) = (a.election("job"), record.clone());
        async move {
            let record = &record;
            let work = |leadership: Arc<Leadership>| async move {
                let _term = record.gain(&leadership);
                std::future::pending::<ControlFlow<()>>().await
            };
            election.run_while_leader("me", work).await
        }
    });
    eventually("it leads", async || record.leading.load(Ordering::SeqCst)).await;
    let mut next = spawn(async move {
        let leader = lead(&b.election("job"), "next").await;
        (leader.term(), leader)
    });
    until_standing(&a, "job", 2).await;
    drop(running);
    let (term, _leader) = next.soon("the next leader").await;
    assert!(!record.leading.load(Ordering::SeqCst), "two at once");
    record.assert_balanced();
    assert!(record.terms() < vec![term]);
}

async fn a_closed_coordinator_or_session_ends_the_campaigns_for_good(clients: Arc<dyn Clients>) {
    let a = coord(&clients).await;
    let held = lead(&coord(&clients).await.election("job"), "held").await;
    let options = quorate_core::SessionOptions { ttl: Duration::from_secs(30), owner: "x".into() };
    let session = a.open_session(&options).await.expect("a session");
    let never = |_: Arc<Leadership>| std::future::ready(ControlFlow::<()>::Continue(()));
    let on_session = a.election("job").on(&session);
    let mut on_session = spawn(async move { on_session.run_while_leader("x", never).await });
    let on_own = a.election("job");
    let mut on_own = spawn(async move { on_own.run_while_leader("y", never).await });
    until_standing(&a, "job", 3).await;
    session.close().await.expect("closed");
    refused(on_session.soon("the end").await, ErrorKind::SessionLost, "a candidate on a closed session");
    assert!(!on_own.0.is_finished());
    a.close().await.expect("closed");
    assert!(on_own.soon("the end").await.is_err(), "a closed coordinator has no candidates");
    held.resign().await.expect("resigned");
}

/// Candidates that come back again and again; how many terms each wants.
async fn candidates(
    coords: Vec<Coordinator>,
    terms: usize,
    inside: &Arc<AtomicUsize>,
) -> Vec<(Arc<Record>, Running<()>)> {
    let mut all = Vec::new();
    for (i, coord) in coords.into_iter().enumerate() {
        let record = Arc::new(Record::default());
        let (mine, inside) = (record.clone(), inside.clone());
        let task = spawn(async move {
            let (mine, inside, led) = (&mine, &*inside, &AtomicUsize::new(0));
            let work = |leadership: Arc<Leadership>| async move {
                let _term = mine.gain(&leadership);
                inside.fetch_add(1, Ordering::SeqCst);
                let _inside = Inside(inside);
                let term = led.fetch_add(1, Ordering::SeqCst) + 1;
                sleep(Duration::from_millis(1)).await;
                if term < terms { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            };
            coord.election("job").run_while_leader(format!("{i}"), work).await.expect("chaos is no end");
        });
        all.push((record, task));
    }
    all
}

struct Inside<'a>(&'a AtomicUsize);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits for all candidates, and judges their records together.
async fn judge(candidates: Vec<(Arc<Record>, Running<()>)>, least: usize) {
    let mut all = HashSet::new();
    let mut count = 0;
    for (record, mut task) in candidates {
        within(Duration::from_secs(50), "all terms", &mut task.0).await.expect("no candidate fails");
        record.assert_balanced();
        count += record.terms().len();
        all.extend(record.terms());
    }
    assert_eq!(all.len(), count, "two candidates led in the same term");
    assert!(count >= least, "only {count} terms: the run is void");
}

async fn gained_and_lost_alternate_under_chaos(clients: Arc<dyn Clients>) {
    const TERMS: usize = 6;
    let mut coords = Vec::new();
    for seed in 0..6 {
        coords.push(troubled(&clients, seed).await);
    }
    let inside = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let watching = spawn({
        let (inside, most) = (inside.clone(), most.clone());
        async move {
            loop {
                most.fetch_max(inside.load(Ordering::SeqCst), Ordering::SeqCst);
                tokio::task::yield_now().await;
                sleep(Duration::from_micros(500)).await;
            }
        }
    });
    let running = candidates(coords, TERMS, &inside).await;
    judge(running, 6 * TERMS).await;
    drop(watching);
    assert!(most.load(Ordering::SeqCst) <= 1, "two led at once");
    is_traceless(&coord(&clients).await, "job").await;
}

async fn gained_and_lost_alternate_while_leaders_are_deposed(clients: Arc<dyn Clients>) {
    // Candidates pause longer after each short term, up to 10 s: not so many that it takes minutes.
    const TERMS: usize = 7;
    let operator = coord(&clients).await;
    let mut coords = Vec::new();
    for _ in 0..3 {
        coords.push(coord(&clients).await);
    }
    let inside = Arc::new(AtomicUsize::new(0));
    let running = candidates(coords, TERMS, &inside).await;
    let deposed = Arc::new(AtomicUsize::new(0));
    let deposing = spawn({
        let (election, deposed) = (operator.election("job"), deposed.clone());
        async move {
            loop {
                if election.depose().await.expect("answered").is_some() {
                    deposed.fetch_add(1, Ordering::SeqCst);
                }
                sleep(Duration::from_millis(7)).await;
            }
        }
    });
    judge(running, 3 * TERMS).await;
    drop(deposing);
    assert!(deposed.load(Ordering::SeqCst) > 0, "void: nobody was deposed");
    assert_eq!(inside.load(Ordering::SeqCst), 0);
    is_traceless(&operator, "job").await;
}

async fn an_uncontended_campaign_is_one_call_and_so_is_a_resignation(clients: Arc<dyn Clients>) {
    let (coord, counted) = counted_waiters(&clients).await;
    let election = coord.election("job");
    // The first use of the name may cost more.
    lead(&election, "x").await.resign().await.expect("resigned");
    sleep(QUIET).await;
    counted.reset();
    let leader = lead(&election, "x").await;
    eventually("it is announced", async || counted.returned(Verb::Commit) == 1).await;
    // One to join, and one in the background to announce.
    assert_eq!(counted.work(), HashMap::from([(Verb::Enqueue, 1), (Verb::Commit, 1)]));
    leader.announce("y").await.expect("announced");
    assert_eq!(counted.calls(Verb::Commit), 2, "an announcement is one call");
    leader.resign().await.expect("resigned");
    assert_eq!(counted.work(), HashMap::from([(Verb::Enqueue, 1), (Verb::Commit, 3)]));
}

async fn one_resignation_wakes_one_of_a_hundred_candidates(clients: Arc<dyn Clients>) {
    const WAITERS: usize = 100;
    const BATCH: usize = 10;
    let holder = coord(&clients).await;
    let first = lead(&holder.election("job"), "first").await;
    let (coord, counted) = counted_waiters(&clients).await;
    let mut observer = holder.election("job").observe().await.expect("observing works");
    super::election::until_seen(&mut observer, Some("first")).await;
    let (tx, mut elected) = tokio::sync::mpsc::channel(WAITERS);
    let mut waiters: Vec<Running<()>> = Vec::new();
    for i in 0..WAITERS {
        let (election, tx) = (coord.election("job"), tx.clone());
        waiters.push(spawn(async move {
            let leader = election.campaign(format!("{i}")).await.expect("elected");
            tx.send(leader).await.expect("the case listens");
        }));
        // Not all at once: some servers count the connections that one machine makes.
        if waiters.len().is_multiple_of(BATCH) {
            until_standing(&holder, "job", waiters.len() + 1).await;
        }
    }
    eventually("all wait and are listed", async || {
        let before = (counted.calls(Verb::Gone), counted.returned(Verb::Commit));
        sleep(QUIET).await;
        before.0 >= WAITERS && before == (counted.calls(Verb::Gone), counted.returned(Verb::Commit))
    })
    .await;
    assert_eq!(counted.calls(Verb::Commit), WAITERS, "a waiting candidate makes itself known with one call");
    counted.reset();
    first.resign().await.expect("resigned");
    let next = within(SOON, "the next leader", elected.recv()).await.expect("a candidate is left");
    sleep(QUIET).await;
    assert!(elected.try_recv().is_err() && next.is_leader(), "one resignation, one leader");
    assert_eq!(counted.returned(Verb::Gone), 1, "one resignation wakes one candidate");
    assert_eq!(counted.calls(Verb::Look), 1, "a hand-over is one notification and one look");
    assert_eq!(counted.calls(Verb::Commit), 1, "and one announcement");
    while !waiters.is_empty() {
        waiters.truncate(waiters.len() - BATCH);
        // The one that leads has ended its task.
        until_standing(&holder, "job", waiters.len().max(1)).await;
    }
    next.resign().await.expect("resigned");
    is_traceless(&holder, "job").await;
}
