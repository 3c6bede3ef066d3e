//! Work that misbehaves, sessions that stand still, settings that do not suit: what still holds.

use std::{sync::Arc, time::Duration};

use quorate_core::{
    ErrorKind,
    commit::{Branch, Finish, Participant, Vote},
};
use quorate_postgres::{Postgres, Work, async_trait, tokio_postgres};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use crate::support::{Add, Script, TAKE, branch, diverged, over, url, world, world_with};

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
async fn answers_are_kept_by_a_server_that_dies_although_it_confirms_commits_early() {
    let world = world().await;
    world.sql("ALTER ROLE quorate SET synchronous_commit = off").await;
    let ledger = world.another(Arc::new(Add));
    let die = async || {
        world.server.kill().await.expect("killed");
        world.server.restart().await.expect("up again");
    };
    for taken in 1..=3 {
        let (aborted, committed) = (branch("-30"), branch("-1"));
        assert_eq!(ledger.abort(&aborted).await.expect("confirmed"), Finish::Done);
        die().await;
        over(&ledger.prepare(&aborted).await.expect("a vote"));
        assert_eq!(ledger.prepare(&committed).await.expect("a vote"), Vote::Yes);
        die().await;
        assert_eq!(ledger.commit(&committed).await.expect("confirmed"), Finish::Done);
        die().await;
        assert_eq!(ledger.commit(&committed).await.expect("confirmed"), Finish::Done);
        assert_eq!((world.balance().await, world.prepared().await), (100 - taken, 0));
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_serializable_is_voted_down_where_the_connection_asks_for_it() {
    let world = world_with(Arc::new(Script)).await;
    world.sql("INSERT INTO account VALUES (2, 100)").await;
    let url = format!("{}?options=-c%20default_transaction_isolation%3Dserializable", url(&world.server));
    let ledger = Postgres::connect("ledger", &url, Arc::new(Script)).expect("a URL");
    // Each reads both accounts and writes one: whichever is first, the other has read what it changes.
    let skewed = |id: u8| {
        let sum = "(SELECT sum(balance) FROM account)";
        branch(&format!("UPDATE account SET balance = balance - 100 WHERE id = {id} AND {sum} >= 200"))
    };
    let (first, second) = (skewed(1), skewed(2));
    assert_eq!(ledger.prepare(&first).await.expect("a vote"), Vote::Yes);
    let Vote::No(why) = ledger.prepare(&second).await.expect("a vote") else { panic!("both were prepared") };
    assert!(why.contains("40001"), "{why}");
    assert_eq!(ledger.abort(&second).await.expect("confirmed"), Finish::Done);
    assert_eq!(ledger.commit(&first).await.expect("confirmed"), Finish::Done);
    for _ in 0..2 {
        over(&ledger.prepare(&first).await.expect("a vote"));
        over(&ledger.prepare(&second).await.expect("a vote"));
    }
    assert_eq!(world.number("SELECT sum(balance)::bigint FROM account").await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_work_leaves_nothing() {
    let world = world_with(Arc::new(Script)).await;
    let branch = branch(&format!("{TAKE}\npanic"));
    let (ledger, told) = (world.ledger.clone(), branch.clone());
    assert!(tokio::spawn(async move { ledger.prepare(&told).await }).await.expect_err("no vote").is_panic());
    let finish = timeout(SOON, world.ledger.abort(&branch)).await.expect("it is not held up").expect("confirmed");
    assert_eq!(finish, Finish::Done);
    assert_eq!((world.balance().await, world.prepared().await), (100, 0));
}
