//! Elections: who leads, what observers see, and what stays behind.

use std::{sync::Arc, time::Duration};

use quorate_core::{
    Candidate, Coordinator, Dir, Election, ErrorKind, FencingToken, KeyRange, Leader, Leadership, MAX_NAME,
    election::{MAX_VALUE, Observer},
    layer::{Stack, Verb},
};
use tokio::time::{sleep, timeout};

use super::{coord, coord_over, counting::Counted};
use crate::{
    Clients,
    support::{QUIET, Running, SOON, cases, client, eventually, refused, spawn, within},
};

cases!("election":
    observers_see_each_leader_as_it_changes,
    a_fresh_observer_sees_the_leader_and_its_announcements_in_order,
    announcing_replaces_the_value_and_keeps_the_term,
    a_second_campaign_of_a_session_waits_behind_the_first,
    elections_of_other_names_are_independent,
    a_leadership_is_ended_by_its_fence_from_elsewhere,
    the_leader_and_the_candidates_are_known_until_nobody_stands,
    twenty_candidates_lead_once_each_and_terms_never_go_back,
    a_dropped_leadership_resigns_and_takes_its_record_along,
    a_deposed_leader_cannot_announce_and_leaves_no_record,
    a_leader_whose_ticket_was_removed_cannot_announce_and_leaves_no_record,
    a_fenced_write_of_a_former_leader_is_refused,
    bad_names_and_values_are_refused_before_anything_is_sent,
    hostile_election_names_never_collide,
    a_candidate_of_higher_priority_goes_first_and_deposes_nobody,
    nothing_stays_behind_when_an_election_is_over,
);

pub(super) async fn lead(election: &Election, value: &str) -> Leadership {
    within(SOON, "an election", election.campaign(value)).await.expect("elected")
}

/// What the observer sees next, which must come soon.
pub(super) async fn sees(observer: &mut Observer) -> Option<Leader> {
    within(SOON, "the next observation", observer.next()).await.expect("observing works")
}

/// Follows the observer to this value, over everything in between.
pub(super) async fn until_seen(observer: &mut Observer, value: Option<&str>) {
    while sees(observer).await.as_ref().map(|leader| leader.value.as_str()) != value {}
}

/// Waits until so many stand for election, the leader included.
pub(super) async fn until_standing(coord: &Coordinator, name: &str, count: usize) {
    let election = coord.election(name);
    eventually(&format!("{count} candidates"), async || {
        election.candidates().await.expect("candidates can be listed").len() == count
    })
    .await;
}

async fn until_announced(election: &Election, value: &str) {
    let mut observer = election.observe().await.expect("observing works");
    until_seen(&mut observer, Some(value)).await;
}

/// Asserts that no key of this election is left in the store.
pub(super) async fn is_traceless(coord: &Coordinator, name: &str) {
    let ranges = [Dir::new(["election-leader"]), Dir::new(["election-candidate", name])]
        .map(|dir| KeyRange::prefix(&dir.expect("valid"), "").expect("valid"));
    eventually("no ticket and no key is left", async || {
        let mut left = coord.election(name).candidates().await.expect("candidates can be listed").len();
        for range in &ranges {
            left += coord.backend().read(range).await.expect("reading works").entries.len();
        }
        left == 0
    })
    .await;
}

async fn observers_see_each_leader_as_it_changes(clients: Arc<dyn Clients>) {
    let coords = [coord(&clients).await, coord(&clients).await, coord(&clients).await];
    let mut observers = Vec::new();
    for coord in [&coords[0], &coords[2]] {
        let mut observer = coord.election("job").observe().await.expect("observing works");
        assert_eq!(sees(&mut observer).await, None, "nobody leads yet");
        observers.push(observer);
    }
    let mut leading: Option<Leadership> = None;
    for (i, coord) in coords.iter().enumerate() {
        let election = coord.election("job");
        let value = format!("candidate {i}");
        let mut waiting = spawn(async move { lead(&election, &value).await });
        if let Some(leader) = leading.take() {
            until_standing(coord, "job", 2).await;
            assert!(!waiting.0.is_finished() && leader.is_leader());
            // The last of them does not resign: its session ends.
            match i {
                1 => leader.resign().await.expect("resigned"),
                _ => leader.session().close().await.expect("closed"),
            }
        }
        let leader = waiting.soon("the next leader").await;
        for observer in &mut observers {
            loop {
                // Nobody in between may be seen, and nobody else.
                let Some(seen) = sees(observer).await else { continue };
                assert_eq!((seen.term, seen.value), (leader.term(), format!("candidate {i}")));
                assert_eq!(seen.owner.as_deref(), Some("conformance"));
                break;
            }
        }
        leading = Some(leader);
    }
    // Nobody takes over from the last one, which ends without resigning: what it said of itself ends with its session.
    let last = leading.expect("the last one");
    last.session().close().await.expect("closed");
    for observer in &mut observers {
        assert_eq!(sees(observer).await, None);
        assert!(observer.is_current());
    }
    assert!(!last.is_leader());
}

async fn a_fresh_observer_sees_the_leader_and_its_announcements_in_order(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let leader = lead(&a.election("job"), "one").await;
    until_announced(&a.election("job"), "one").await;
    // Much else happens between the election and the observation.
    for i in 0..20 {
        a.kv().put("unrelated", i.to_string()).await.expect("put");
    }
    let mut observer = b.election("job").observe().await.expect("observing works");
    assert_eq!(sees(&mut observer).await.expect("a leader").value, "one");
    for value in ["two", "three"] {
        leader.announce(value).await.expect("announced");
        let seen = sees(&mut observer).await.expect("a leader");
        assert_eq!((&*seen.value, seen.term), (value, leader.term()));
    }
    // Faster than anybody reads: the last one is what counts.
    for value in ["four", "five", "six", "seven"] {
        leader.announce(value).await.expect("announced");
    }
    until_seen(&mut observer, Some("seven")).await;
}

async fn announcing_replaces_the_value_and_keeps_the_term(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let leader = lead(&a.election("job"), "abc").await;
    leader.announce("def").await.expect("announced");
    let seen = b.election("job").leader().await.expect("a look").expect("somebody leads");
    assert_eq!((&*seen.value, seen.term), ("def", leader.term()));
    // The candidate's own value, announced in the background, must not come back.
    let mut observer = b.election("job").observe().await.expect("observing works");
    assert_eq!(sees(&mut observer).await.expect("a leader").value, "def");
    assert!(timeout(QUIET, observer.next()).await.is_err(), "nothing else happens");
    let candidates = b.election("job").candidates().await.expect("a look");
    assert_eq!(candidates.len(), 1);
    assert_eq!(candidates[0].value.as_deref(), Some("def"));
    leader.resign().await.expect("resigned");
}

async fn a_second_campaign_of_a_session_waits_behind_the_first(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let election = coord.election("job");
    let first = lead(&election, "abc").await;
    let mut second = spawn({
        let election = election.clone();
        async move { lead(&election, "def").await }
    });
    until_standing(&coord, "job", 2).await;
    sleep(QUIET).await;
    assert!(!second.0.is_finished() && first.is_leader(), "one session, and still one leader");
    let term = first.term();
    first.resign().await.expect("resigned");
    let second = second.soon("the second").await;
    assert!(second.term() > term);
    until_announced(&election, "def").await;
}

async fn elections_of_other_names_are_independent(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    a.kv().put("testa", "x").await.expect("put");
    let other = lead(&a.election("testa"), "x").await;
    let below = lead(&a.election("test/a"), "y").await;
    let lock = a.lock("test").acquire().await.expect("granted");
    let mut observer = b.election("test").observe().await.expect("observing works");
    assert_eq!(sees(&mut observer).await, None, "the others' leaders are not ours");
    let leader = lead(&b.election("test"), "z").await;
    assert_eq!(sees(&mut observer).await.expect("a leader").value, "z");
    other.announce("x2").await.expect("announced");
    below.resign().await.expect("resigned");
    lock.release().await.expect("released");
    assert!(timeout(QUIET, observer.next()).await.is_err(), "nothing of other elections is seen");
    assert!(leader.is_leader() && other.is_leader());
}

async fn a_leadership_is_ended_by_its_fence_from_elsewhere(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let mut observer = b.election("job").observe().await.expect("observing works");
    let old = lead(&a.election("job"), "old").await;
    until_seen(&mut observer, Some("old")).await;
    let text = serde_json::to_string(&old.fence()).expect("JSON");
    let fence = serde_json::from_str(&text).expect("JSON");
    assert!(!b.election("other").resign_by(&fence).await.expect("answered"), "the fence of another election");
    assert!(b.election("job").resign_by(&fence).await.expect("answered"));
    assert!(!b.election("job").resign_by(&fence).await.expect("answered"), "it has ended already");
    assert_eq!(sees(&mut observer).await, None, "the record went with the leadership");
    let new = lead(&b.election("job"), "new").await;
    assert_eq!(sees(&mut observer).await.expect("a leader").value, "new");
    within(SOON, "the old leader learns of it", old.lost()).await;
    assert!(!old.is_leader());
    assert!(!b.election("job").resign_by(&fence).await.expect("answered"), "the new leader is not touched");
    refused(old.resign().await, ErrorKind::SessionLost, "resigning from what was lost");
    sleep(QUIET).await;
    assert!(new.is_leader());
    let seen = b.election("job").leader().await.expect("a look").expect("somebody leads");
    assert_eq!(seen.value, "new", "the old leader's clean-up did not take the new one's record");
    until_announced(&b.election("job"), "new").await;
}

async fn the_leader_and_the_candidates_are_known_until_nobody_stands(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let election = b.election("job");
    assert_eq!(election.leader().await.expect("a look"), None);
    assert_eq!(election.candidates().await.expect("a look"), []);
    let first = lead(&a.election("job"), "first").await;
    let mut waiting: Vec<Running<Leadership>> = Vec::new();
    for (i, coord) in [&a, &b, &a].into_iter().enumerate() {
        let election = coord.election("job");
        waiting.push(spawn(async move { election.campaign(format!("waiting {i}")).await.expect("elected") }));
        until_standing(&b, "job", i + 2).await;
    }
    let expected = ["first", "waiting 0", "waiting 1", "waiting 2"];
    eventually("all are listed", async || {
        let candidates = election.candidates().await.expect("a look");
        assert!(candidates[0].leads() && !candidates[1..].iter().any(|candidate| candidate.leads()), "{candidates:?}");
        assert_eq!(candidates[0].term, Some(first.term()));
        assert_eq!(candidates[0].owner.as_deref(), Some("conformance"));
        candidates.iter().map(|c| c.value.as_deref()).eq(expected.map(Some))
    })
    .await;
    let mut term = first.term();
    first.resign().await.expect("resigned");
    for (i, waiting) in waiting.iter_mut().enumerate() {
        let leader = waiting.soon("the next leader").await;
        let seen = election.leader().await.expect("a look").expect("somebody leads");
        assert_eq!((&*seen.value, seen.term), (expected[i + 1], leader.term()));
        assert!(leader.term() > term);
        term = leader.term();
        leader.resign().await.expect("resigned");
    }
    assert_eq!(election.leader().await.expect("a look"), None);
    assert_eq!(election.candidates().await.expect("a look"), []);
}

async fn twenty_candidates_lead_once_each_and_terms_never_go_back(clients: Arc<dyn Clients>) {
    const CANDIDATES: usize = 20;
    let mut observers = Vec::new();
    let done = coord(&clients).await;
    for _ in 0..2 {
        let mut observer = coord(&clients).await.election("job").observe().await.expect("observing works");
        observers.push(spawn(async move {
            let mut terms: Vec<FencingToken> = Vec::new();
            loop {
                let Some(leader) = observer.next().await.expect("observing works") else { continue };
                if leader.value == "done" {
                    return terms;
                }
                terms.push(leader.term);
            }
        }));
    }
    let (terms, inside) = (Arc::new(std::sync::Mutex::new(Vec::new())), Arc::new(tokio::sync::Mutex::new(())));
    let coords = [coord(&clients).await, coord(&clients).await, coord(&clients).await, coord(&clients).await];
    let mut candidates: Vec<Running<()>> = Vec::new();
    for i in 0..CANDIDATES {
        let (election, terms, inside) = (coords[i % 4].election("job"), terms.clone(), inside.clone());
        candidates.push(spawn(async move {
            let leader = election.campaign(format!("candidate {i}")).await.expect("elected");
            let alone = inside.try_lock().expect("two lead at once");
            terms.lock().expect("no poison").push(leader.term());
            tokio::time::sleep(Duration::from_millis(5)).await;
            leader.check().expect("still the leader");
            drop(alone);
            leader.resign().await.expect("resigned");
        }));
    }
    for candidate in &mut candidates {
        within(Duration::from_secs(40), "all terms", &mut candidate.0).await.expect("no candidate fails");
    }
    let last = lead(&done.election("job"), "done").await;
    let terms = terms.lock().expect("no poison").clone();
    assert_eq!(terms.len(), CANDIDATES);
    assert!(terms.windows(2).all(|pair| pair[0] < pair[1]) && terms.last() < Some(&last.term()), "{terms:?}");
    for observer in &mut observers {
        let seen = observer.soon("the observer sees the last leader").await;
        assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "an observer saw terms go back: {seen:?}");
        assert!(seen.iter().all(|term| terms.contains(term)), "an observer saw a term that nobody led: {seen:?}");
    }
}

async fn a_dropped_leadership_resigns_and_takes_its_record_along(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    for announced in [false, true] {
        let leader = lead(&a.election("job"), "x").await;
        if announced {
            leader.announce("y").await.expect("announced");
        }
        drop(leader);
        is_traceless(&b, "job").await;
    }
    lead(&b.election("job"), "z").await.resign().await.expect("resigned");
}

async fn a_deposed_leader_cannot_announce_and_leaves_no_record(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    assert_eq!(b.election("job").depose().await.expect("answered"), None, "nobody leads");
    let old = lead(&a.election("job"), "old").await;
    old.announce("announced").await.expect("announced");
    let deposed = b.election("job").depose().await.expect("answered").expect("somebody led");
    assert_eq!(deposed.term, old.term());
    let new = lead(&b.election("job"), "new").await;
    until_announced(&b.election("job"), "new").await;
    refused(old.announce("still me").await, ErrorKind::SessionLost, "an announcement of a deposed leader");
    within(SOON, "the old leader learns of it", old.lost()).await;
    assert!(old.check().is_err_and(|e| e.kind() == ErrorKind::SessionLost));
    drop(old);
    sleep(QUIET).await;
    let seen = b.election("job").leader().await.expect("a look").expect("somebody leads");
    assert_eq!((&*seen.value, seen.term), ("new", new.term()));
    new.resign().await.expect("resigned");
}

/// A ticket is taken out without its record, by somebody who knows nothing of records.
async fn a_leader_whose_ticket_was_removed_cannot_announce_and_leaves_no_record(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let line = Dir::new(["election", "job"]).expect("valid");
    for notices in [false, true] {
        let leader = lead(&a.election("job"), "x").await;
        leader.announce("y").await.expect("announced");
        let ticket = b.backend().line(&line).await.expect("a look").tickets.remove(0);
        let txn = quorate_core::Txn { checks: Vec::new(), writes: vec![quorate_core::Write::Leave(ticket)] };
        b.backend().commit(&txn).await.expect("removed");
        assert_eq!(b.election("job").leader().await.expect("a look"), None, "a record without a ticket is no leader");
        if notices {
            within(SOON, "the leader learns of it", leader.lost()).await;
        }
        // Nobody has touched the record: it is the ticket that counts.
        refused(leader.announce("still me").await, ErrorKind::SessionLost, "an announcement without a ticket");
        drop(leader);
        is_traceless(&b, "job").await;
    }
}

async fn a_fenced_write_of_a_former_leader_is_refused(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let old = lead(&a.election("job"), "old").await;
    a.kv().put_fenced(&old.fence(), "row", "old").await.expect("it leads");
    b.election("job").depose().await.expect("answered").expect("somebody led");
    let new = lead(&b.election("job"), "new").await;
    b.kv().put_fenced(&new.fence(), "row", "new").await.expect("it leads");
    refused(a.kv().put_fenced(&old.fence(), "row", "stale").await, ErrorKind::SessionLost, "a former leader's write");
    assert_eq!(b.kv().get("row").await.expect("get").expect("exists").value, "new");
}

async fn bad_names_and_values_are_refused_before_anything_is_sent(clients: Arc<dyn Clients>) {
    let counted = Counted::default();
    let backend = Stack::new(client(&clients).await).with(counted.clone()).build();
    let coord = coord_over(backend, SOON);
    for name in [String::new(), "x".repeat(MAX_NAME + 1)] {
        let election = coord.election(&name);
        refused(election.campaign("x").await, ErrorKind::InvalidInput, "campaign");
        refused(election.observe().await, ErrorKind::InvalidInput, "observe");
        refused(election.leader().await, ErrorKind::InvalidInput, "leader");
        refused(election.candidates().await, ErrorKind::InvalidInput, "candidates");
        refused(election.depose().await, ErrorKind::InvalidInput, "depose");
        let never = |_: Arc<Leadership>| std::future::ready(std::ops::ControlFlow::Break(()));
        refused(election.run_while_leader("x", never).await, ErrorKind::InvalidInput, "run_while_leader");
    }
    let large = "x".repeat(MAX_VALUE + 1);
    refused(coord.election("job").campaign(&*large).await, ErrorKind::InvalidInput, "a large value");
    assert_eq!(Verb::ALL.map(|verb| counted.calls(verb)), [0; Verb::ALL.len()], "nothing was sent");
    // The largest value that is allowed works everywhere, also if its JSON is six times as long.
    let largest = "\u{1}".repeat(MAX_VALUE);
    let leader = lead(&coord.election("job"), &largest).await;
    refused(leader.announce(&large).await, ErrorKind::InvalidInput, "a large announcement");
    leader.announce(&largest).await.expect("announced");
    let seen = coord.election("job").leader().await.expect("a look").expect("somebody leads");
    assert!(seen.value == largest);
}

async fn hostile_election_names_never_collide(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    let long = "x".repeat(MAX_NAME);
    let names = ["a", "A", "a/", "/a", "a/b", "a b", ".", "..", "%2F", "a%2Fb", "\0", "\n", "é", "𝄞", "a/b/c", &long];
    let mut leading = Vec::new();
    for name in names {
        let leader = lead(&coord.election(name), name).await;
        leader.announce(name).await.expect("announced");
        leading.push(leader);
    }
    for (name, leader) in names.iter().zip(leading) {
        let seen = coord.election(name).leader().await.expect("a look").expect("somebody leads");
        assert_eq!((&*seen.value, seen.term), (*name, leader.term()));
        leader.resign().await.expect("resigned");
    }
}

async fn a_candidate_of_higher_priority_goes_first_and_deposes_nobody(clients: Arc<dyn Clients>) {
    let coords = [coord(&clients).await, coord(&clients).await];
    let first = lead(&coords[0].election("job"), "first").await;
    let (tx, mut elected) = tokio::sync::mpsc::channel(8);
    let mut waiting: Vec<Running<()>> = Vec::new();
    for (i, priority) in [1, 3, 2, 3, 1].into_iter().enumerate() {
        let (election, tx) = (coords[i % 2].election("job"), tx.clone());
        waiting.push(spawn(async move {
            let candidate = Candidate::new(format!("{i}")).priority(priority);
            let leader = election.campaign(candidate).await.expect("elected");
            tx.send((i, priority)).await.expect("the case listens");
            leader.resign().await.expect("resigned");
        }));
        until_standing(&coords[0], "job", i + 2).await;
    }
    // Priorities are read from what the candidates have said of themselves.
    let election = coords[0].election("job");
    eventually("all are listed", async || {
        let candidates = election.candidates().await.expect("a look");
        candidates[1..].iter().all(|candidate| candidate.priority.is_some())
    })
    .await;
    sleep(QUIET).await;
    assert!(first.is_leader(), "a leader is not deposed by a higher priority");
    first.resign().await.expect("resigned");
    let mut order = Vec::new();
    for _ in 0..5 {
        order.push(within(SOON, "the next leader", elected.recv()).await.expect("one is left"));
    }
    let priorities: Vec<i32> = order.iter().map(|(_, priority)| *priority).collect();
    // Those of the highest priority keep their order; whoever yielded was late in being listed again at the worst.
    assert_eq!(&order[..2], &[(1, 3), (3, 3)], "{order:?}");
    assert_eq!(priorities.iter().sum::<i32>(), 10, "each led once: {order:?}");
    is_traceless(&coords[0], "job").await;
}

async fn nothing_stays_behind_when_an_election_is_over(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let mut tasks: Vec<Running<()>> = Vec::new();
    for i in 0..6 {
        let election = [&a, &b][i % 2].election("job");
        tasks.push(spawn(async move {
            let leader = lead(&election, "x").await;
            leader.resign().await.expect("resigned");
        }));
    }
    for task in &mut tasks {
        task.soon("a candidate").await;
    }
    is_traceless(&a, "job").await;
    assert_eq!(a.kv().list("").await.expect("list").entries, [], "the records of elections are no keys");
}
