//! Elections: loss, suspicion, cancellation, and requests that arrive late.

use std::{
    future::Future,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    Candidate, Coordinator, ErrorKind, Leadership, SessionState,
    layer::{Chaos, Fault, Rule, Stack, Verb},
};
use tokio::time::{Instant, sleep};

use super::{
    cancel::{MOST, poll_times, poll_waiting, slow_coord},
    coord, coord_over,
    election::{is_traceless, lead, until_seen, until_standing},
    late::Slow,
    short_coord, standard,
};
use crate::{
    Clients,
    support::{QUIET, SOON, cases, client, eventually, refused, spawn, within},
};

cases!("election":
    a_waiting_candidate_whose_session_is_lost_is_never_elected,
    a_dead_leader_is_followed_after_its_ttl_and_observers_see_it,
    the_leadership_ends_before_anybody_else_leads,
    a_cautious_candidate_steps_down_on_suspicion_and_others_do_not,
    work_of_a_lost_session_runs_again_on_a_new_one,
    a_dropped_campaign_leaves_nothing,
    a_dropped_wait_for_leadership_leaves_nothing,
    a_dropped_resignation_resigns,
    other_dropped_election_calls_leave_an_election_that_works,
    an_announcement_that_lands_late_changes_nothing,
    a_resignation_that_lands_late_does_not_touch_the_next_leader,
);

async fn a_waiting_candidate_whose_session_is_lost_is_never_elected(clients: Arc<dyn Clients>) {
    let (holder, doomed, next) = (coord(&clients).await, coord(&clients).await, coord(&clients).await);
    let leader = lead(&holder.election("job"), "leader").await;
    let session = doomed.session().await.expect("a session");
    let mut waiting = spawn(async move { doomed.election("job").campaign("doomed").await });
    until_standing(&holder, "job", 2).await;
    // It does not know: its next renewal is ten seconds away.
    holder.backend().revoke(session.lease()).await.expect("revoked");
    let mut live = spawn(async move { next.election("job").campaign("next").await });
    leader.resign().await.expect("resigned");
    refused(waiting.soon("the candidate's call").await, ErrorKind::SessionLost, "a campaign on an ended lease");
    let live = live.soon("the live candidate").await.expect("elected");
    assert!(live.is_leader());
}

async fn a_dead_leader_is_followed_after_its_ttl_and_observers_see_it(clients: Arc<dyn Clients>) {
    let (dead, next) = (short_coord(&clients).await, coord(&clients).await);
    let mut observer = next.election("job").observe().await.expect("observing works");
    let leader = lead(&dead.election("job"), "dead").await;
    until_seen(&mut observer, Some("dead")).await;
    let session = dead.session().await.expect("a session");
    next.session().await.expect("a session");
    session.orphan();
    assert!(!leader.is_leader(), "an orphaned session is over for its owner");
    let (deadline, orphaned) = (leader.deadline(), Instant::now());
    let limit = session.ttl() + next.profile().expiry_lag;
    let after = within(limit + SOON, "the next leader", next.election("job").campaign("next")).await.expect("elected");
    assert!(Instant::now() >= deadline, "elected before the dead leader's own deadline");
    let took = orphaned.elapsed();
    assert!(took <= limit + Duration::from_secs(1), "it took {took:?}");
    assert!(after.term() > leader.term());
    until_seen(&mut observer, Some("next")).await;
    drop(after);
    until_seen(&mut observer, None).await;
}

/// A client whose renewals are all lost on the way.
async fn cut_off(clients: &Arc<dyn Clients>, ttl: Duration) -> Coordinator {
    let refuse = Rule { fault: Fault::Refuse, probability: 1.0, verbs: vec![Verb::Renew, Verb::Revoke] };
    coord_over(Stack::new(client(clients).await).with(Chaos::new(1, vec![refuse])).build(), ttl)
}

async fn the_leadership_ends_before_anybody_else_leads(clients: Arc<dyn Clients>) {
    let (a, b) = (cut_off(&clients, clients.ttl()).await, coord(&clients).await);
    let working = Arc::new(AtomicUsize::new(0));
    let leader = lead(&a.election("job"), "cut off").await;
    let (limit, term) = (leader.session().ttl() + b.profile().expiry_lag + SOON, leader.term());
    let mut protected = spawn({
        let working = working.clone();
        async move {
            let work = async move {
                working.store(1, Ordering::SeqCst);
                let _at_work = scopeguard(move || working.store(0, Ordering::SeqCst));
                std::future::pending::<()>().await;
            };
            (leader.protect(work).await, leader)
        }
    });
    eventually("the work runs", async || working.load(Ordering::SeqCst) == 1).await;
    let next = within(limit, "the next leader", b.election("job").campaign("next")).await.expect("elected");
    assert_eq!(working.load(Ordering::SeqCst), 0, "two act as leader at once");
    let (outcome, leader) = protected.soon("the protected work").await;
    refused(outcome, ErrorKind::SessionLost, "protect");
    assert!(!leader.is_leader() && next.is_leader() && next.term() > term);
    refused(leader.announce("still me").await, ErrorKind::SessionLost, "announce");
    refused(leader.resign().await, ErrorKind::SessionLost, "resign");
}

fn scopeguard(then: impl FnMut()) -> impl Drop {
    struct Then<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Then<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    Then(then)
}

async fn a_cautious_candidate_steps_down_on_suspicion_and_others_do_not(clients: Arc<dyn Clients>) {
    let ttl = clients.ttl().max(Duration::from_secs(3));
    let a = cut_off(&clients, ttl).await;
    let plain = lead(&a.election("plain"), "x").await;
    let careful = Candidate::new("x").cautious();
    let cautious = a.election("careful").campaign(careful.clone()).await.expect("elected");
    assert!(cautious.is_leader());
    within(ttl, "stepping down", cautious.lost()).await;
    assert_eq!(cautious.session().state(), SessionState::Suspect);
    assert!(cautious.check().is_err_and(|e| e.kind() == ErrorKind::SessionLost));
    assert!(plain.is_leader(), "by default only a loss is a loss");
    refused(cautious.protect(std::future::ready(())).await, ErrorKind::SessionLost, "protect");
    // The session lives on, so the place is given up now, not at the end of the lease.
    drop(cautious);
    let b = coord(&clients).await;
    let next = lead(&b.election("careful"), "next").await;
    assert!(plain.is_leader(), "void: the session ended before the hand-over");
    // Nobody steps up on a session that is under suspicion.
    next.resign().await.expect("resigned");
    let campaign = a.election("careful");
    let outcome = within(ttl * 2, "the end of the session", campaign.campaign(careful)).await;
    refused(outcome, ErrorKind::SessionLost, "a campaign under suspicion");
    assert!(!plain.is_leader());
}

async fn work_of_a_lost_session_runs_again_on_a_new_one(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let (tx, mut gained) = tokio::sync::mpsc::channel(8);
    let _running = spawn({
        let election = a.election("job");
        async move {
            let tx = &tx;
            let work = |leadership: Arc<Leadership>| async move {
                let lease = leadership.session().lease().clone();
                tx.send((leadership.term(), lease)).await.expect("the case listens");
                std::future::pending::<ControlFlow<()>>().await
            };
            election.run_while_leader("me", work).await
        }
    });
    let mut last = None;
    for _ in 0..3 {
        let limit = clients.ttl() + b.profile().expiry_lag + SOON;
        let (term, lease) = within(limit, "leading", gained.recv()).await.expect("it goes on");
        assert!(last.as_ref().is_none_or(|(before, old)| *before < term && *old != lease), "a new term, a new session");
        b.backend().revoke(&lease).await.expect("revoked");
        last = Some((term, lease));
    }
}

/// Drops what `make` makes after 1, 2, 3 … polls until it ends by itself or waits longer than `patience`, and each time
/// sees that only `others` stand for election.
async fn each_poll<T, F: Future<Output = T>>(
    (coord, others): (&Coordinator, usize),
    patience: Duration,
    mut make: impl FnMut() -> F,
) {
    for polls in 1..=MOST {
        let ended = tokio::time::timeout(patience, poll_times(make(), polls)).await;
        let done = !matches!(ended, Ok(None));
        drop(ended);
        until_standing(coord, "job", others).await;
        if others == 0 {
            is_traceless(coord, "job").await;
            lead(&coord.election("job"), "next").await.resign().await.expect("resigned");
        }
        if done {
            return;
        }
    }
    panic!("it did not end within {MOST} polls");
}

async fn a_dropped_campaign_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let election = a.election("job");
    each_poll((&b, 0), SOON, || election.campaign("dropped")).await;
}

async fn a_dropped_wait_for_leadership_leaves_nothing(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    a.session().await.expect("a session");
    let leader = lead(&b.election("job"), "leader").await;
    let election = a.election("job");
    let patience = Duration::from_millis(200);
    each_poll((&b, 1), patience, || election.campaign(Candidate::new("dropped").priority(1).cautious())).await;
    each_poll((&b, 1), patience, || {
        election.run_while_leader("dropped", |_: Arc<Leadership>| std::future::ready(ControlFlow::<()>::Continue(())))
    })
    .await;
    let candidates = b.election("job").candidates().await.expect("a look");
    assert_eq!(candidates.len(), 1);
    leader.resign().await.expect("resigned");
    is_traceless(&b, "job").await;
}

async fn a_dropped_resignation_resigns(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    for polls in 0..MOST {
        let leader = a.election("job").campaign("x").await.expect("elected");
        leader.announce("y").await.expect("announced");
        let ended = poll_times(leader.resign(), polls).await;
        is_traceless(&b, "job").await;
        if let Some(resigned) = ended {
            resigned.expect("resigned");
            return;
        }
    }
    panic!("a resignation did not end within {MOST} polls");
}

async fn other_dropped_election_calls_leave_an_election_that_works(clients: Arc<dyn Clients>) {
    let (a, b) = (slow_coord(&clients).await, coord(&clients).await);
    let election = a.election("job");
    for polls in 1..8 {
        drop(poll_times(election.leader(), polls).await);
        drop(poll_times(election.candidates(), polls).await);
        if let Some(Ok(mut observer)) = poll_times(election.observe(), polls).await {
            poll_waiting(observer.next(), polls).await;
        }
        let leader = lead(&election, "x").await;
        // Dropped announcements go on; the last one counts, whichever were still under way.
        drop(poll_times(leader.announce("dropped"), polls).await);
        poll_waiting(leader.lost(), polls).await;
        poll_waiting(leader.protect(std::future::pending::<()>()), polls).await;
        assert!(leader.is_leader());
        leader.announce("last").await.expect("announced");
        let seen = b.election("job").leader().await.expect("a look").expect("somebody leads");
        assert_eq!(seen.value, "last");
        leader.resign().await.expect("resigned");
        is_traceless(&b, "job").await;
    }
    for polls in 1..8 {
        let leader = lead(&election, "x").await;
        drop(poll_times(election.resign_by(&leader.fence()), polls).await);
        drop(poll_times(election.depose(), polls).await);
        drop(leader);
        is_traceless(&b, "job").await;
    }
}

async fn an_announcement_that_lands_late_changes_nothing(clients: Arc<dyn Clients>) {
    let slow = Slow::commits(&clients, 1).await;
    let (a, b) = (coord_over(standard(slow.clone()), Duration::from_secs(60)), coord(&clients).await);
    let mut observer = b.election("job").observe().await.expect("observing works");
    // An attempt at the announcement of the candidate's value is still on its way when the next one is made.
    let leader = lead(&a.election("job"), "first").await;
    until_seen(&mut observer, Some("first")).await;
    leader.announce("second").await.expect("announced");
    until_seen(&mut observer, Some("second")).await;
    assert_eq!(slow.landed(), 0, "void: the first announcement was not late");
    eventually("the first announcement lands", async || slow.landed() == 1).await;
    sleep(QUIET).await;
    let seen = b.election("job").leader().await.expect("a look").expect("somebody leads");
    assert_eq!(seen.value, "second", "a late announcement replaced a newer one");
    leader.announce("third").await.expect("announced");
    until_seen(&mut observer, Some("third")).await;
}

async fn a_resignation_that_lands_late_does_not_touch_the_next_leader(clients: Arc<dyn Clients>) {
    let slow = Slow::commits(&clients, 2).await;
    let (a, b) = (coord_over(standard(slow.clone()), Duration::from_secs(60)), coord(&clients).await);
    // The first commit announces, and is given up; the second is the resignation.
    let leader = lead(&a.election("job"), "old").await;
    sleep(Duration::from_millis(5)).await;
    leader.resign().await.expect("its repetition is answered");
    let next = lead(&b.election("job"), "next").await;
    next.announce("announced").await.expect("announced");
    eventually("the late requests land", async || slow.landed() == 2).await;
    sleep(QUIET).await;
    assert!(next.is_leader());
    let seen = a.election("job").leader().await.expect("a look").expect("somebody leads");
    assert_eq!((&*seen.value, seen.term), ("announced", next.term()));
    let mut observer = a.election("job").observe().await.expect("observing works");
    until_seen(&mut observer, Some("announced")).await;
}
