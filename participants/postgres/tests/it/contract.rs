//! What a participant owes, shown on a real server.

use std::{sync::Arc, time::Duration};

use quorate_core::{
    Coordinator, ErrorKind, SessionOptions,
    commit::{Branch, Decision, Finish, Participant, RecoverOptions, TxId, Vote},
};
use quorate_memory::Memory;
use quorate_postgres::Postgres;
use quorate_testkit::servers::{Postgres as Launcher, PostgresOptions};

use crate::support::{Add, World, branch, over, url, world};

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_takes_effect_with_its_outcome_and_once() {
    let world = world().await;
    let ledger = &world.ledger;
    let (kept, dropped) = (branch("-30"), branch("-20"));
    for _ in 0..2 {
        assert_eq!(ledger.prepare(&kept).await.expect("a vote"), Vote::Yes, "the same answer again");
    }
    assert_eq!(world.balance().await, 100, "nothing is seen before the outcome");
    let named = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'quorate:%'";
    assert_eq!(world.number(named).await, 0, "a session is called after a branch only while it prepares it");
    assert_eq!(ledger.in_doubt("bank").await.expect("a list"), [kept.id]);
    assert_eq!(ledger.in_doubt("ban").await.expect("a list"), [], "another group");
    for _ in 0..2 {
        assert_eq!(ledger.commit(&kept).await.expect("confirmed"), Finish::Done);
    }
    assert_eq!(world.balance().await, 70);
    over(&ledger.prepare(&kept).await.expect("a vote"));
    assert!(matches!(ledger.abort(&kept).await.expect("an answer"), Finish::Diverged(_)), "it was committed");

    assert_eq!(ledger.prepare(&dropped).await.expect("a vote"), Vote::Yes);
    for _ in 0..2 {
        assert_eq!(ledger.abort(&dropped).await.expect("confirmed"), Finish::Done);
    }
    over(&ledger.prepare(&dropped).await.expect("a vote"));
    assert!(matches!(ledger.commit(&dropped).await.expect("an answer"), Finish::Diverged(_)), "it was rolled back");
    assert_eq!((world.balance().await, world.prepared().await), (70, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_comes_after_its_abort_leaves_nothing() {
    let world = world().await;
    let never = branch("-30");
    assert_eq!(world.ledger.abort(&never).await.expect("confirmed"), Finish::Done);
    over(&world.ledger.prepare(&never).await.expect("a vote"));
    assert_eq!((world.balance().await, world.prepared().await), (100, 0));
    assert_eq!(world.ledger.tidy(Duration::from_secs(3600)).await.expect("tidied"), 0, "it is needed still");
    assert_eq!(world.ledger.tidy(Duration::ZERO).await.expect("tidied"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_refuses_is_a_vote_and_repeats_no_values() {
    let world = world().await;
    let refused = world.ledger.prepare(&branch("-1234567")).await.expect("a vote");
    let Vote::No(why) = refused else { panic!("{refused:?}") };
    assert!(why.contains("23514") && why.contains("account_balance_check"), "{why}");
    assert!(!why.contains("1234567"), "{why}");
    assert_eq!(world.ledger.prepare(&branch("0")).await.expect("a vote"), Vote::ReadOnly);
    assert_eq!((world.balance().await, world.prepared().await), (100, 0));
    let wrong = Branch::new("bank", TxId::random(), "another", "-1");
    assert_eq!(world.ledger.prepare(&wrong).await.expect_err("not its name").kind(), ErrorKind::InvalidInput);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_prepared_survives_the_death_of_the_server() {
    let world = world().await;
    let (kept, dropped) = (branch("-30"), branch("0"));
    assert_eq!(world.ledger.prepare(&kept).await.expect("a vote"), Vote::Yes);
    world.server.kill().await.expect("killed");
    let down = world.ledger.prepare(&dropped).await.expect_err("nobody is there");
    assert_eq!(down.kind(), ErrorKind::Unavailable, "{down}");
    let down = world.ledger.commit(&kept).await.expect_err("nobody is there");
    assert!(matches!(down.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{down}");
    world.server.restart().await.expect("up again");
    assert_eq!(world.ledger.in_doubt("bank").await.expect("a list"), [kept.id]);
    assert_eq!(world.ledger.commit(&kept).await.expect("confirmed"), Finish::Done);
    assert_eq!(world.balance().await, 70);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_ended_by_hand_is_told_if_it_ended_otherwise() {
    let world = world().await;
    let by_hand = async |verb: &str| {
        let branch = branch("-30");
        assert_eq!(world.ledger.prepare(&branch).await.expect("a vote"), Vote::Yes);
        let found = world.client().await.query_one("SELECT gid FROM pg_prepared_xacts", &[]).await;
        let gid: String = found.expect("one").get(0);
        world.sql(&format!("{verb} PREPARED '{gid}'")).await;
        branch
    };
    let finish = world.ledger.commit(&by_hand("ROLLBACK").await).await.expect("an answer");
    assert!(matches!(&finish, Finish::Diverged(what) if what.contains("by hand")), "{finish:?}");
    let finish = world.ledger.abort(&by_hand("COMMIT").await).await.expect("an answer");
    assert!(matches!(&finish, Finish::Diverged(what) if what.contains("committed")), "{finish:?}");
    assert_eq!(world.ledger.commit(&by_hand("COMMIT").await).await.expect("confirmed"), Finish::Done);
    assert_eq!(world.ledger.abort(&by_hand("ROLLBACK").await).await.expect("confirmed"), Finish::Done);
    let finish = world.ledger.commit(&branch("-30")).await.expect("an answer");
    assert!(matches!(&finish, Finish::Diverged(what) if what.contains("never prepared")), "{finish:?}");
    assert_eq!(world.balance().await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_prepare_says_what_to_set() {
    let server = Launcher::start(PostgresOptions { prepared: 0, ..PostgresOptions::default() })
        .await
        .expect("PostgreSQL starts");
    let ledger = Postgres::connect("ledger", &url(&server), Arc::new(Add)).expect("a URL");
    let missing = ledger.prepare(&branch("1")).await.expect_err("there is no table");
    assert!(missing.to_string().contains("Postgres::install"), "{missing}");
    ledger.install().await.expect("the table is there");
    let world = World { server, ledger };
    world.sql("CREATE TABLE account (id bigint, balance bigint); INSERT INTO account VALUES (1, 100)").await;
    let refused = world.ledger.prepare(&branch("1")).await.expect_err("it cannot");
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("max_prepared_transactions"), "{refused}");
    assert_eq!(world.balance().await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_never_shown() {
    let bad = Postgres::connect("ledger", "postgresql://app:hunter2@[::1/bank", Arc::new(Add)).expect_err("malformed");
    let good = Postgres::connect("ledger", "postgresql://app:hunter2@127.0.0.1:1/bank", Arc::new(Add)).expect("a URL");
    let down = good.prepare(&branch("1")).await.expect_err("nobody is there");
    for text in [format!("{bad:?}"), format!("{good:?}"), format!("{down:?} {down}")] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_spans_the_database_and_keys_and_what_came_late_is_taken_back() {
    let world = world().await;
    let coord = Coordinator::new(Arc::new(Memory::new()), SessionOptions::default());
    let all = coord.transactions("bank").expect("a good name");
    all.enlist("ledger", Arc::new(world.ledger.clone())).expect("enlisted");
    let keys = all.enlist_keys("keys", &coord).expect("enlisted");
    let credit = || quorate_core::commit::KeyWork::new().put("bert", "30");
    let tx = all.begin().branch("ledger", "-30").branch("keys", credit());
    assert!(tx.commit().await.expect("an outcome").is_committed());
    assert_eq!(world.balance().await, 70);
    assert!(keys.get("bert").await.expect("reading works").is_some());
    let tx = all.begin().branch("ledger", "-300").branch("keys", credit());
    assert_eq!(tx.commit().await.expect("an outcome").decision, Decision::Abort);
    assert_eq!(world.balance().await, 70);

    // The prepare of a process that everybody has forgotten.
    let orphan = branch("-70");
    assert_eq!(world.ledger.prepare(&orphan).await.expect("a vote"), Vote::Yes);
    let short = Duration::from_millis(100);
    let _recoverer = all.recover_with(RecoverOptions::default().every(short).grace(short));
    tokio::time::timeout(Duration::from_secs(10), async {
        while world.prepared().await > 0 {
            tokio::time::sleep(short).await;
        }
    })
    .await
    .expect("a recoverer takes it back");
    assert_eq!(world.balance().await, 70);
}
