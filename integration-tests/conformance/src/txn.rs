//! Transactions: all or nothing, the first failed check by its index, and races with one winner.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{Check, ErrorKind, KeyRange, Revision, Write};

use crate::{
    Clients, Outcome,
    support::{
        actor, all, cases, client, commit, get, keep, key, kv, line, poll_and_drop, put, put_on, read, refused, spawn,
        standing, txn, txn_too_large, unchanged, value, write,
    },
};

cases!("txn":
    creating_a_key_has_one_winner,
    compare_and_swap_has_one_winner_per_revision,
    no_increment_is_lost,
    a_failed_check_writes_nothing,
    the_culprit_is_the_first_check_that_fails,
    a_stale_revision_deletes_nothing,
    deleting_what_is_not_there_applies,
    checks_alone_change_nothing,
    all_puts_of_a_commit_carry_its_revision,
    one_commit_puts_keys_on_two_leases,
    keys_and_tickets_change_together,
    readers_never_see_half_a_commit,
    a_commit_dropped_half_way_is_applied_whole_or_not_at_all,
    a_key_or_ticket_written_twice_is_refused,
    the_largest_transaction_works_and_a_larger_one_is_refused,
);

async fn creating_a_key_has_one_winner(clients: Arc<dyn Clients>) {
    let backends = [client(&clients).await, client(&clients).await, client(&clients).await];
    for round in 0..5 {
        let name = key(&format!("round-{round}"));
        let mut tasks: Vec<_> = (0..20)
            .map(|i| {
                let (backend, name) = (backends[i % backends.len()].clone(), name.clone());
                spawn(async move {
                    let answer = commit(&backend, [Check::Absent(name.clone())], [put(&name, i.to_string())]).await;
                    answer.applied.then_some((i, answer.revision))
                })
            })
            .collect();
        let mut winners = Vec::new();
        for task in &mut tasks {
            winners.extend(task.soon("a create").await);
        }
        assert_eq!(winners.len(), 1, "of 20 creates one is applied: {winners:?}");
        let entry = get(&backends[0], &name).await.expect("the winner's key is there");
        assert_eq!((entry.value, entry.modified), (Bytes::from(winners[0].0.to_string()), winners[0].1));
    }
}

async fn compare_and_swap_has_one_winner_per_revision(clients: Arc<dyn Clients>) {
    let backends = [client(&clients).await, client(&clients).await, client(&clients).await];
    let mut revision = write(&backends[0], [put(&key("a"), "start")]).await;
    for _ in 0..5 {
        let mut tasks: Vec<_> = (0..20)
            .map(|i| {
                let backend = backends[i % backends.len()].clone();
                spawn(async move {
                    let answer = commit(&backend, [unchanged(&key("a"), revision)], [put(&key("a"), "next")]).await;
                    answer.applied.then_some(answer.revision)
                })
            })
            .collect();
        let mut winners = Vec::new();
        for task in &mut tasks {
            winners.extend(task.soon("a compare-and-swap").await);
        }
        assert_eq!(winners.len(), 1, "one swap per revision: {winners:?}");
        assert!(winners[0] > revision);
        revision = winners[0];
    }
}

async fn no_increment_is_lost(clients: Arc<dyn Clients>) {
    const TASKS: usize = 20;
    const EACH: usize = 5;
    let backends = [client(&clients).await, client(&clients).await];
    write(&backends[0], [put(&key("count"), "0")]).await;
    let mut tasks: Vec<_> = (0..TASKS)
        .map(|i| {
            let backend = backends[i % backends.len()].clone();
            spawn(async move {
                let (mut revisions, mut refused) = (Vec::new(), 0);
                while revisions.len() < EACH {
                    let entry = get(&backend, &key("count")).await.expect("the counter is there");
                    let count: usize = String::from_utf8_lossy(&entry.value).parse().expect("a number");
                    // Lets the others read the same count, also where nothing else makes a task wait.
                    tokio::task::yield_now().await;
                    let next = put(&key("count"), (count + 1).to_string());
                    let answer = commit(&backend, [unchanged(&key("count"), entry.modified)], [next]).await;
                    if answer.applied {
                        revisions.push(answer.revision);
                    } else {
                        refused += 1;
                    }
                }
                (revisions, refused)
            })
        })
        .collect();
    let mut revisions = HashSet::new();
    let mut raced = 0;
    for task in &mut tasks {
        let done = crate::support::within(crate::support::SOON * 3, "all increments", &mut task.0).await;
        let (own, refused) = done.expect("no increment failed");
        assert!(own.is_sorted(), "one task's revisions rise: {own:?}");
        revisions.extend(own);
        raced += refused;
    }
    assert!(raced > 0, "void: no two increments met");
    assert_eq!(revisions.len(), TASKS * EACH, "every applied swap has a revision of its own");
    assert_eq!(value(&backends[0], &key("count")).await, Some(Bytes::from((TASKS * EACH).to_string())));
}

async fn a_failed_check_writes_nothing(clients: Arc<dyn Clients>) -> Outcome {
    let a = actor(&clients).await;
    if let Some(refused) = txn_too_large(&a.backend, 5).await {
        return refused;
    }
    let revision = write(&a.backend, [put(&key("a"), "1")]).await;
    write(&a.backend, [put(&key("b"), "1")]).await;
    let place = a.join(&line("x")).await;
    let writes = || {
        [
            put(&key("a"), "2"),
            Write::Delete(key("b")),
            put_on(&a.lease.id, &key("c"), "2"),
            Write::Leave(place.ticket.clone()),
        ]
    };
    for check in [
        Check::Absent(key("a")),
        unchanged(&key("a"), Revision(revision.0 + 1)),
        unchanged(&key("missing"), revision),
        Check::Standing { ticket: place.ticket.clone(), token: Revision(place.token.0 + 1) },
    ] {
        let answer = commit(&a.backend, [check.clone()], writes()).await;
        assert_eq!((answer.applied, answer.culprit), (false, Some(0)), "{check:?}");
        let entries = read(&a.backend, &all()).await.entries;
        let seen: Vec<_> = entries.iter().map(|e| (e.key.encoded(), &e.value[..])).collect();
        assert_eq!(seen, [("a", &b"1"[..]), ("b", b"1")], "after {check:?}");
        assert_eq!(a.tickets(&line("x")).await, [place.ticket.clone()], "after {check:?}");
    }
    Outcome::Passed
}

async fn the_culprit_is_the_first_check_that_fails(clients: Arc<dyn Clients>) -> Outcome {
    let a = actor(&clients).await;
    if let Some(refused) = txn_too_large(&a.backend, 4).await {
        return refused;
    }
    let revision = write(&a.backend, [put(&key("a"), "1")]).await;
    let place = a.join(&line("x")).await;
    let stale = Revision(revision.0 - 1);
    let (good, bad) = (
        [unchanged(&key("a"), revision), Check::Absent(key("none")), standing(&place)],
        [
            unchanged(&key("a"), stale),
            Check::Absent(key("a")),
            Check::Standing { ticket: place.ticket.clone(), token: Revision(place.token.0 + 7) },
        ],
    );
    for culprit in 0..3 {
        // From `culprit` on everything fails; before it everything holds.
        let checks: Vec<_> = (0..3).map(|i| if i < culprit { good[i].clone() } else { bad[i].clone() }).collect();
        let answer = commit(&a.backend, checks.clone(), [put(&key("new"), "1")]).await;
        assert_eq!(answer.culprit, Some(culprit), "{checks:?}");
    }
    let answer = commit(&a.backend, good, [put(&key("new"), "1")]).await;
    assert!(answer.applied, "all checks hold: {answer:?}");
    Outcome::Passed
}

async fn a_stale_revision_deletes_nothing(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let stale = write(&backend, [put(&key("a"), "1")]).await;
    let fresh = write(&backend, [put(&key("a"), "2")]).await;
    let delete = async |revision| commit(&backend, [unchanged(&key("a"), revision)], [Write::Delete(key("a"))]).await;
    assert_eq!(delete(stale).await.culprit, Some(0));
    assert!(get(&backend, &key("a")).await.is_some());
    assert!(delete(fresh).await.applied);
    assert_eq!(get(&backend, &key("a")).await, None);
    assert_eq!(delete(fresh).await.culprit, Some(0), "a deleted key has no revision");
}

async fn deleting_what_is_not_there_applies(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let place = a.join(&line("x")).await;
    a.leave(&place.ticket).await;
    for missing in [Write::Delete(key("never")), Write::Leave(place.ticket.clone())] {
        assert!(commit(&a.backend, [], [missing.clone()]).await.applied, "{missing:?}");
        let both = commit(&a.backend, [], [missing.clone(), put(&key("a"), "1")]).await;
        assert!(both.applied, "{missing:?}");
        assert_eq!(get(&a.backend, &key("a")).await.map(|e| e.modified), Some(both.revision), "{missing:?}");
    }
}

async fn checks_alone_change_nothing(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let revision = write(&a.backend, [put(&key("a"), "1")]).await;
    let place = a.join(&line("x")).await;
    for (check, holds) in [
        (unchanged(&key("a"), revision), true),
        (Check::Absent(key("none")), true),
        (standing(&place), true),
        (Check::Absent(key("a")), false),
    ] {
        let answer = commit(&a.backend, [check.clone()], []).await;
        assert_eq!(answer.applied, holds, "{check:?}");
    }
    assert_eq!(get(&a.backend, &key("a")).await.map(|e| e.modified), Some(revision));
    assert_eq!(a.tickets(&line("x")).await, [place.ticket]);
}

async fn all_puts_of_a_commit_carry_its_revision(clients: Arc<dyn Clients>) -> Outcome {
    let a = actor(&clients).await;
    if let Some(refused) = txn_too_large(&a.backend, 3).await {
        return refused;
    }
    let before = write(&a.backend, [put(&key("b"), "0")]).await;
    let puts = [put(&key("c"), "1"), put_on(&a.lease.id, &key("a"), "1"), put_on(&a.lease.id, &key("b"), "1")];
    let revision = write(&a.backend, puts).await;
    assert!(before < revision);
    let entries = read(&a.backend, &all()).await.entries;
    assert_eq!(entries.len(), 3);
    assert!(entries.iter().all(|e| e.modified == revision), "{revision}: {entries:?}");
    Outcome::Passed
}

async fn one_commit_puts_keys_on_two_leases(clients: Arc<dyn Clients>) -> Outcome {
    let a = actor(&clients).await;
    let other = keep(&a.backend).await;
    let both = txn([], [put_on(&a.lease.id, &key("a"), "1"), put_on(&other.id, &key("b"), "1")]);
    let most = a.backend.profile().txn_leases;
    if most < 2 {
        refused(a.backend.commit(&both).await, ErrorKind::Unsupported, "keys on two leases");
        assert!(read(&a.backend, &all()).await.entries.is_empty(), "nothing of a refused commit is applied");
        return Outcome::Refused(format!("txn_leases is {most}, the case needs 2"));
    }
    assert!(a.backend.commit(&both).await.expect("answered").applied);
    a.backend.revoke(&other.id).await.expect("revoked");
    let left: Vec<_> = read(&a.backend, &all()).await.entries.into_iter().map(|e| e.key).collect();
    assert_eq!(left, [key("a")]);
    Outcome::Passed
}

async fn keys_and_tickets_change_together(clients: Arc<dyn Clients>) -> Outcome {
    let a = actor(&clients).await;
    if let Some(refused) = txn_too_large(&a.backend, 6).await {
        return refused;
    }
    let old = write(&a.backend, [put(&key("old"), "1")]).await;
    let (x, y) = (a.join(&line("x")).await, a.join(&line("y")).await);
    let answer = commit(
        &a.backend,
        [standing(&x), standing(&y), unchanged(&key("old"), old)],
        [Write::Delete(key("old")), put(&key("new"), "1"), Write::Leave(x.ticket.clone())],
    )
    .await;
    assert!(answer.applied, "{answer:?}");
    let names: Vec<_> = read(&a.backend, &all()).await.entries.into_iter().map(|e| e.key).collect();
    assert_eq!(names, [key("new")]);
    assert_eq!(a.tickets(&line("x")).await, []);
    assert_eq!(a.tickets(&line("y")).await, [y.ticket]);
    Outcome::Passed
}

async fn readers_never_see_half_a_commit(clients: Arc<dyn Clients>) {
    let backends = [client(&clients).await, client(&clients).await];
    write(&backends[0], [put(&key("a"), "start"), put(&key("b"), "start")]).await;
    let writers: Vec<_> = (0..2)
        .map(|w| {
            let backend = backends[w].clone();
            spawn(async move {
                for i in 0.. {
                    let both = format!("{w}-{i}");
                    write(&backend, [put(&key("a"), &both), put(&key("b"), &both)]).await;
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    let mut seen = HashSet::new();
    for i in 0..200 {
        let entries = read(&backends[i % 2], &all()).await.entries;
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].value, entries[1].value, "one commit wrote both: {entries:?}");
        assert_eq!(entries[0].modified, entries[1].modified);
        seen.insert(entries[0].modified);
        tokio::task::yield_now().await;
    }
    assert!(seen.len() > 2, "void: the readers saw only {} commits", seen.len());
    assert!(writers.iter().all(|w| !w.0.is_finished()), "a writer failed");
}

async fn a_commit_dropped_half_way_is_applied_whole_or_not_at_all(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    for polls in 0..6 {
        let (old, new) = (key(&format!("{polls}/old")), key(&format!("{polls}/new")));
        write(&a.backend, [put(&old, "1")]).await;
        let moved = txn([], [Write::Delete(old), put_on(&a.lease.id, &new, "1")]);
        poll_and_drop(polls, a.backend.commit(&moved)).await;
        let range = KeyRange::prefix(&kv(), &format!("{polls}/")).expect("a valid prefix");
        // It may still be carried out, but then in one step.
        for _ in 0..20 {
            let entries = read(&a.backend, &range).await.entries;
            assert_eq!(entries.len(), 1, "after {polls} polls: {entries:?}");
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
}

async fn a_key_or_ticket_written_twice_is_refused(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let place = a.join(&line("x")).await;
    for twice in [
        [put(&key("a"), "1"), put(&key("a"), "2")],
        [put(&key("a"), "1"), Write::Delete(key("a"))],
        [Write::Delete(key("a")), Write::Delete(key("a"))],
        [Write::Leave(place.ticket.clone()), Write::Leave(place.ticket.clone())],
    ] {
        refused(a.backend.commit(&txn([], twice.clone())).await, ErrorKind::InvalidInput, &format!("{twice:?}"));
    }
    assert_eq!(get(&a.backend, &key("a")).await, None);
    assert_eq!(a.tickets(&line("x")).await, [place.ticket]);
}

async fn the_largest_transaction_works_and_a_larger_one_is_refused(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let most = backend.profile().max_txn;
    let name = |i: usize| key(&format!("{i:04}"));
    // Servers without a limit are not loaded beyond what any recipe needs.
    let used = most.min(128);
    let (checks, writes) = (used / 2, used - used / 2);
    let answer =
        commit(&backend, (0..checks).map(|i| Check::Absent(name(i))), (0..writes).map(|i| put(&name(i), "1"))).await;
    assert!(answer.applied, "{answer:?}");
    let entries = read(&backend, &all()).await.entries;
    assert_eq!(entries.len(), writes);
    assert!(entries.iter().all(|e| e.modified == answer.revision), "one commit, one revision");
    if most <= 10_000 {
        let over = txn((0..=most / 2).map(|i| Check::Absent(name(i))), (0..=most / 2).map(|i| put(&name(i), "2")));
        refused(backend.commit(&over).await, ErrorKind::InvalidInput, "more than max_txn");
        assert!(read(&backend, &all()).await.entries.iter().all(|e| e.value == "1"), "nothing was written");
    }
}
