//! What goes wrong around a branch, and what still holds: work that misbehaves, sessions that stand still, messages that
//! meet.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use crate::support::{Add, Script, TAKE, branch, diverged, over, url, world, world_with};
use quorate_core::{
    ErrorKind,
    commit::{Branch, Finish, Participant, Vote},
};
use quorate_postgres::{Postgres, Work, async_trait, tokio_postgres};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

const SOON: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn work_that_hides_a_failure_is_not_a_yes() {
    let world = world_with(Arc::new(Script)).await;
    // The database rolls such a transaction back when it is asked to prepare it, and reports no error.
    let hidden = branch(&format!("{TAKE}\n?UPDATE account SET balance = -1\n"));
    over(&world.ledger.prepare(&hidden).await.expect("a vote"));
    assert_eq!(world.prepared().await, 0);
    assert_eq!(world.ledger.abort(&hidden).await.expect("confirmed"), Finish::Done);
    // With a savepoint around it, a failure is the work's own affair.
    let mended =
        branch(&format!("{TAKE}\nSAVEPOINT a\n?UPDATE account SET balance = -1\nROLLBACK TO SAVEPOINT a\nSAVEPOINT b"));
    assert_eq!(world.ledger.prepare(&mended).await.expect("a vote"), Vote::Yes);
    assert_eq!(world.ledger.commit(&mended).await.expect("confirmed"), Finish::Done);
    assert_eq!(world.balance().await, 99);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_ends_its_transaction_is_no_yes_and_is_told() {
    let world = world_with(Arc::new(Script)).await;
    let mut taken = 0;
    for (end, committed) in [("COMMIT", true), ("ROLLBACK", false), ("COMMIT\nBEGIN", true), ("ROLLBACK\nBEGIN", false)]
    {
        for rest in ["", TAKE] {
            let wrong = branch(&format!("{TAKE}\n{end}\n{rest}"));
            let error = world.ledger.prepare(&wrong).await.expect_err("no vote");
            assert!(error.to_string().contains("its transaction"), "{end}: {error}");
            assert_eq!(world.prepared().await, 0, "{end}");
            let finish = world.ledger.abort(&wrong).await.expect("an answer");
            // Outside of a transaction every statement takes effect by itself.
            taken += i64::from(committed) + i64::from(!end.contains("BEGIN") && !rest.is_empty());
            if committed { diverged(&finish) } else { assert_eq!(finish, Finish::Done, "{end}") }
        }
    }
    assert_eq!(world.balance().await, 100 - taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_cannot_be_prepared_is_refused_and_leaves_nothing() {
    let world = world_with(Arc::new(Script)).await;
    for wrong in ["CREATE TEMP TABLE t (x int)", "LISTEN x", "NOTIFY x", "DECLARE c CURSOR WITH HOLD FOR SELECT 1"] {
        let Vote::No(why) = world.ledger.prepare(&branch(&format!("{TAKE}\n{wrong}"))).await.expect("a vote") else {
            panic!("{wrong} was prepared")
        };
        assert!(why.contains("0A000"), "{why}");
    }
    let deferred = "CREATE TABLE late (id bigint UNIQUE DEFERRABLE INITIALLY DEFERRED)";
    world.sql(deferred).await;
    let Vote::No(why) = world.ledger.prepare(&branch("INSERT INTO late VALUES (1), (1)")).await.expect("a vote") else {
        panic!("a broken constraint was prepared")
    };
    assert!(why.contains("23505"), "{why}");
    assert_eq!((world.balance().await, world.prepared().await), (100, 0));
}

/// Gives the database a text where it wants a number.
#[derive(Debug)]
struct Mistyped;

#[async_trait]
impl Work for Mistyped {
    async fn run(&self, db: &Client, _: &Branch) -> Result<Vote, tokio_postgres::Error> {
        db.execute("UPDATE account SET balance = $1", &[&"hunter2"]).await?;
        Ok(Vote::Yes)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_of_the_work_is_not_taken_for_a_lost_connection() {
    let world = world_with(Arc::new(Mistyped)).await;
    let error = world.ledger.prepare(&branch("")).await.expect_err("no vote");
    let text = error.to_string();
    assert!(text.contains("serializing parameter") && !text.contains("lost") && !text.contains("hunter2"), "{text}");
    assert_eq!(world.balance().await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_finds_a_connection_while_prepares_wait_for_locks() {
    let world = world().await;
    let first = branch("-30");
    assert_eq!(world.ledger.prepare(&first).await.expect("a vote"), Vote::Yes);
    // All of them wait for the row that the first has locked: more than there are connections.
    let waiting: Vec<_> = (0..12)
        .map(|_| {
            let ledger = world.ledger.clone();
            tokio::spawn(async move { ledger.prepare(&branch("-1")).await })
        })
        .collect();
    sleep(Duration::from_millis(300)).await;
    let told = timeout(Duration::from_secs(2), world.ledger.commit(&first)).await.expect("it is not held up");
    assert_eq!(told.expect("confirmed"), Finish::Done);
    assert_eq!(world.balance().await, 70);
    for prepare in waiting {
        prepare.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_is_not_held_up_by_a_prepare_that_stands_still() {
    let world = world_with(Arc::new(Script)).await;
    let still = branch(&format!("{TAKE}\nhang"));
    // A process that was stopped in the middle of its prepare holds locks as this one does.
    let (stopped, told) = (world.another(Arc::new(Script)), still.clone());
    let prepare = tokio::spawn(async move { stopped.prepare(&told).await });
    sleep(Duration::from_millis(300)).await;
    let finish = timeout(SOON, world.ledger.abort(&still)).await.expect("it is not held up").expect("confirmed");
    assert_eq!(finish, Finish::Done);
    world.sql(&format!("SET lock_timeout = 1000; {TAKE}")).await;
    prepare.abort();
    over(&world.ledger.prepare(&still).await.expect("a vote"));
    assert_eq!((world.balance().await, world.prepared().await), (99, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_waits_for_a_lock_and_was_given_up_is_ended_by_its_abort() {
    let world = world().await;
    let (first, second) = (branch("-30"), branch("-1"));
    assert_eq!(world.ledger.prepare(&first).await.expect("a vote"), Vote::Yes);
    timeout(Duration::from_millis(300), world.ledger.prepare(&second)).await.expect_err("the row is locked");
    // The server has not noticed that the client is gone, and still waits for the row.
    let finish = timeout(SOON, world.ledger.abort(&second)).await.expect("it is not held up").expect("confirmed");
    assert_eq!(finish, Finish::Done);
    assert_eq!(world.ledger.commit(&first).await.expect("confirmed"), Finish::Done);
    over(&world.ledger.prepare(&second).await.expect("a vote"));
    assert_eq!((world.balance().await, world.prepared().await), (70, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_is_kept_by_a_server_that_dies_although_it_confirms_commits_early() {
    let world = world().await;
    world.sql("ALTER ROLE quorate SET synchronous_commit = off").await;
    let ledger = world.another(Arc::new(Add));
    for _ in 0..3 {
        let branch = branch("-30");
        assert_eq!(ledger.abort(&branch).await.expect("confirmed"), Finish::Done);
        world.server.kill().await.expect("killed");
        world.server.restart().await.expect("up again");
        over(&ledger.prepare(&branch).await.expect("a vote"));
    }
    assert_eq!((world.balance().await, world.prepared().await), (100, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_kept_from_the_moment_it_can_be_seen() {
    let world = world().await;
    let branch = branch("-30");
    let age = Duration::from_secs(2);
    assert_eq!(world.ledger.prepare(&branch).await.expect("a vote"), Vote::Yes);
    // In doubt for longer than rows are kept: then the outcome comes, and comes again.
    sleep(age + Duration::from_millis(200)).await;
    assert_eq!(world.ledger.tidy(age).await.expect("tidied"), 0);
    assert_eq!(world.ledger.commit(&branch).await.expect("confirmed"), Finish::Done);
    assert_eq!(world.ledger.tidy(age).await.expect("tidied"), 0, "the outcome may be told again");
    assert_eq!(world.ledger.commit(&branch).await.expect("confirmed"), Finish::Done);
    sleep(age + Duration::from_millis(200)).await;
    assert_eq!(world.ledger.tidy(age).await.expect("tidied"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_is_busy_is_asked_again() {
    let world = world().await;
    // A standby that does not exist: the server prepares, and does not confirm.
    world.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await;
    world.sql("SELECT pg_reload_conf()").await;
    sleep(Duration::from_millis(300)).await;
    let branch = branch("-30");
    let (ledger, told) = (world.ledger.clone(), branch.clone());
    let prepare = tokio::spawn(async move { ledger.prepare(&told).await });
    sleep(Duration::from_millis(500)).await;
    let busy = world.ledger.commit(&branch).await.expect_err("not yet");
    assert_eq!(busy.kind(), ErrorKind::Unavailable, "{busy}");
    world.sql("ALTER SYSTEM RESET synchronous_standby_names").await;
    world.sql("SELECT pg_reload_conf()").await;
    assert_eq!(timeout(SOON, prepare).await.expect("confirmed").expect("no panic").expect("a vote"), Vote::Yes);
    assert_eq!(world.ledger.commit(&branch).await.expect("confirmed"), Finish::Done);
    assert_eq!(world.balance().await, 70);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_rights_is_denied_and_changes_nothing() {
    let world = world().await;
    world.sql("CREATE ROLE guest LOGIN; GRANT ALL ON account TO guest").await;
    let guest = url(&world.server).replace("quorate@", "guest@");
    let guest = Postgres::connect("ledger", &guest, Arc::new(Add)).expect("a URL");
    let branch = branch("-30");
    assert_eq!(guest.prepare(&branch).await.expect_err("no rights").kind(), ErrorKind::Denied);
    assert_eq!(guest.install().await.expect_err("no rights").kind(), ErrorKind::Denied);
    assert_eq!(world.ledger.prepare(&branch).await.expect("a vote"), Vote::Yes);
    world.sql("GRANT ALL ON quorate_barrier TO guest").await;
    // Another role's prepared transaction.
    assert_eq!(guest.commit(&branch).await.expect_err("not its own").kind(), ErrorKind::Denied);
    assert_eq!(guest.abort(&branch).await.expect_err("not its own").kind(), ErrorKind::Denied);
    assert_eq!(world.ledger.commit(&branch).await.expect("confirmed"), Finish::Done);
}

#[tokio::test]
async fn a_url_that_demands_encryption_is_refused_where_there_is_none() {
    let url = "postgresql://app:hunter2@127.0.0.1:1/bank?sslmode=require";
    let error = Postgres::connect("ledger", url, Arc::new(Add)).expect_err("it would never connect");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("Postgres::new") && !error.to_string().contains("hunter2"), "{error}");
    let down = Postgres::connect("ledger", "postgresql://app@127.0.0.1:1/bank", Arc::new(Add)).expect("a URL");
    let down = down.prepare(&branch("1")).await.expect_err("nobody is there").to_string();
    assert!(down.contains("refused"), "it says why: {down}");
}

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
