//! Messages that meet, come twice, are dropped half-way, or are answered by a server that dies.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use quorate_core::{
    ErrorKind,
    commit::{Finish, Participant, Vote},
};
use quorate_postgres::Postgres;
use tokio::time::{sleep, timeout};

use crate::support::{Add, branch, over, world};

/// Polls up to so many times and drops it.
async fn polls<F: Future>(work: F, count: usize) -> Option<F::Output> {
    let (mut work, mut left) = (pin!(work), count);
    poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match work.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_prepare_can_be_aborted_and_holds_up_nobody() {
    let world = world().await;
    for count in 1..60 {
        let branch = branch("-1");
        let vote = polls(world.ledger.prepare(&branch), count).await;
        assert_eq!(world.ledger.abort(&branch).await.expect("confirmed"), Finish::Done, "after {count} polls");
        over(&world.ledger.prepare(&branch).await.expect("a vote"));
        if vote.is_some() {
            assert!(count > 3, "it was never dropped half-way");
            assert_eq!((world.balance().await, world.prepared().await), (100, 0));
            return;
        }
    }
    panic!("it never ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_was_dropped_half_way_can_be_told_again() {
    let world = world().await;
    let mut balance = 100;
    for committed in [true, false] {
        let mut whole = false;
        for count in 1..60 {
            let branch = branch("-1");
            assert_eq!(world.ledger.prepare(&branch).await.expect("a vote"), Vote::Yes);
            let tell = || async {
                match committed {
                    true => world.ledger.commit(&branch).await,
                    false => world.ledger.abort(&branch).await,
                }
            };
            let answer = polls(tell(), count).await;
            assert_eq!(told(tell).await, Finish::Done, "after {count} polls");
            balance -= i64::from(committed);
            assert_eq!((world.balance().await, world.prepared().await), (balance, 0));
            if answer.is_some() {
                assert!(count > 1, "it was never dropped half-way");
                whole = true;
                break;
            }
        }
        assert!(whole, "it never ended");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_at_any_moment_keeps_what_it_has_voted_for() {
    let world = world().await;
    let (mut yes, mut lost) = (0, 0);
    for round in 0..10 {
        let branch = branch("-1");
        let kill = async {
            sleep(Duration::from_micros(rand::random_range(0..6000))).await;
            world.server.kill().await.expect("killed");
        };
        let (vote, ()) = tokio::join!(world.ledger.prepare(&branch), kill);
        world.server.restart().await.expect("up again");
        match vote {
            Ok(vote) => {
                assert_eq!(vote, Vote::Yes);
                yes += 1;
                assert_eq!(world.ledger.in_doubt("bank").await.expect("a list"), [branch.id]);
                assert_eq!(told(|| world.ledger.commit(&branch)).await, Finish::Done);
            }
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{round}: {error}");
                lost += 1;
                assert_eq!(told(|| world.ledger.abort(&branch)).await, Finish::Done);
                over(&world.ledger.prepare(&branch).await.expect("a vote"));
            }
        }
        assert_eq!((world.balance().await, world.prepared().await), (100 - yes, 0));
    }
    println!("{yes} prepared, {lost} lost");
}

/// Asks until there is an answer.
async fn told<F: Future<Output = quorate_core::Result<Finish>>>(ask: impl Fn() -> F) -> Finish {
    let answered = async {
        loop {
            match ask().await {
                Ok(finish) => return finish,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), answered).await.expect("an answer at last")
}

fn a_moment() -> Duration {
    Duration::from_micros(rand::random_range(0..4000))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_that_meets_a_prepare_wins_or_follows_it() {
    let world = world().await;
    let other = world.another(Arc::new(Add));
    let (mut before, mut after) = (0, 0);
    for _ in 0..250 {
        let branch = branch("-1");
        let (ledger, late) = (world.ledger.clone(), branch.clone());
        let preparing = tokio::spawn(async move {
            sleep(a_moment()).await;
            ledger.prepare(&late).await
        });
        // From two processes, as a driver and a recoverer do.
        let abort = async |ledger: &Postgres| {
            sleep(a_moment()).await;
            told(|| ledger.abort(&branch)).await
        };
        let finishes = tokio::join!(abort(&world.ledger), abort(&other));
        assert_eq!(finishes, (Finish::Done, Finish::Done));
        match preparing.await.expect("no panic") {
            // It was there first, and was rolled back; or it found the door closed.
            Ok(Vote::Yes) => after += 1,
            Ok(_) => before += 1,
            Err(error) => assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{error}"),
        }
        over(&world.ledger.prepare(&branch).await.expect("a vote"));
        assert_eq!((world.balance().await, world.prepared().await), (100, 0));
    }
    assert!(before > 0 && after > 0, "they never met: {before}, {after}");
    assert_eq!(world.number("SELECT count(*) FROM quorate_barrier WHERE state = 'aborted'").await, 250);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_come_twice_at_once_do_the_work_once() {
    let world = world().await;
    let other = world.another(Arc::new(Add));
    for round in 1..=60 {
        let branch = branch("-1");
        let prepare = async |ledger: &Postgres| {
            sleep(a_moment()).await;
            loop {
                match ledger.prepare(&branch).await {
                    Ok(vote) => return vote,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
                }
            }
        };
        let votes = tokio::join!(prepare(&world.ledger), prepare(&other));
        assert_eq!(votes, (Vote::Yes, Vote::Yes));
        let commit = async |ledger: &Postgres| {
            sleep(a_moment()).await;
            told(|| ledger.commit(&branch)).await
        };
        let finishes = tokio::join!(commit(&world.ledger), commit(&other));
        assert_eq!(finishes, (Finish::Done, Finish::Done));
        assert_eq!((world.balance().await, world.prepared().await), (100 - round, 0));
    }
}
