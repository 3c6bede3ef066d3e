//! Keys as participants of atomic commit.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use quorate_core::{
    Coordinator, Dir, KeyRange,
    commit::{
        Branch, Decision, Finish, KeyWork, Keys, Participant, RecoverOptions, Step, Transactions, TxId, Vote,
        consistent_read,
    },
    kv::KeyValue,
    layer::{Chaos, Stack},
};
use tokio::{sync::Notify, task::JoinSet, time::sleep};

use super::{atomic::quick, book::until_clean, coord, coord_over, standard};
use crate::{
    Clients,
    support::{Running, cases, client, eventually, spawn, within},
};

cases!("commit_keys":
    keys_change_together_or_not_at_all,
    a_branch_of_keys_keeps_its_half_of_the_contract,
    readers_see_a_decided_value_at_once_and_an_undecided_one_never,
    a_held_key_refuses_others_until_it_is_let_go,
    what_a_dead_driver_held_is_let_go_by_whoever_meets_it,
    a_prepare_that_another_server_of_the_keys_sends_late_is_refused,
    transfers_keep_the_total_at_every_consistent_read,
    transfers_keep_the_total_in_chaos,
);

/// Two participants, whose keys are here on one server; what they share is only the store.
struct Bank {
    coord: Coordinator,
    all: Transactions,
    left: Keys,
    right: Keys,
}

async fn bank(clients: &Arc<dyn Clients>, group: &str) -> Bank {
    let (coord, other) = (coord(clients).await, coord(clients).await);
    bank_over(&coord, &other, group)
}

fn bank_over(coord: &Coordinator, other: &Coordinator, group: &str) -> Bank {
    let all = coord.transactions_with(group, quick()).expect("a good name");
    let left = all.enlist_keys("left", coord).expect("enlisted");
    let right = all.enlist_keys("right", other).expect("enlisted");
    Bank { coord: coord.clone(), all, left, right }
}

fn number(found: Option<&KeyValue>) -> i64 {
    found.map_or(0, |found| std::str::from_utf8(&found.value).expect("text").parse().expect("a number"))
}

async fn value(keys: &Keys, key: &str) -> Option<String> {
    let found = keys.get(key).await.expect("reading works");
    found.map(|found| String::from_utf8(found.value.to_vec()).expect("text"))
}

/// Everything that branches of keys keep beside the keys.
async fn leftovers(coord: &Coordinator, group: &str) -> Vec<String> {
    let mut found = Vec::new();
    for dir in [vec!["txintent"], vec!["txbranch", group]] {
        let range = KeyRange::prefix(&Dir::new(dir).expect("valid"), "").expect("valid");
        let entries = coord.backend().read(&range).await.expect("reading works").entries;
        found.extend(entries.into_iter().map(|entry| entry.key.to_string()));
    }
    found
}

async fn until_nothing_is_held(coord: &Coordinator, group: &str) {
    until_clean(coord, group, &[]).await;
    eventually("nothing is held", async || leftovers(coord, group).await.is_empty()).await;
}

async fn keys_change_together_or_not_at_all(clients: Arc<dyn Clients>) {
    let Bank { coord, all, left, right } = bank(&clients, "together").await;
    let first = all.begin().branch("left", KeyWork::new().put("a", "1").put("secret/🔑", "2"));
    let first = first.branch("right", KeyWork::new().if_absent("b").put("b", "3"));
    assert!(first.commit().await.expect("an outcome").is_committed());
    assert_eq!(value(&left, "a").await.as_deref(), Some("1"));
    assert_eq!(value(&left, "secret/🔑").await.as_deref(), Some("2"));
    let b = right.get("b").await.expect("reading works").expect("it is there");

    // The second branch cannot, so the first does not.
    let second = all.begin().branch("left", KeyWork::new().put("a", "9").delete("secret/🔑"));
    let second = second.branch("right", KeyWork::new().if_absent("b").put("b", "9"));
    let outcome = second.commit().await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    assert_eq!((outcome.refusals[0].participant.as_str(), outcome.refusals.len()), ("right", 1));
    assert!(outcome.refusals[0].why.contains("b is not as required"), "{outcome:?}");
    assert_eq!(value(&left, "a").await.as_deref(), Some("1"));

    let third = all.begin().branch("left", KeyWork::new().delete("a").delete("secret/🔑"));
    let third = third.branch("right", KeyWork::new().if_unchanged("b", b.modified).put("b", "4"));
    assert!(third.commit().await.expect("an outcome").is_committed());
    assert_eq!((value(&left, "a").await, value(&right, "b").await), (None, Some("4".to_owned())));
    assert_eq!(coord.kv().list("").await.expect("a list").entries.len(), 1, "plain reads agree");

    let stale = all.begin().branch("right", KeyWork::new().if_unchanged("b", b.modified).put("b", "5"));
    assert_eq!(stale.commit().await.expect("an outcome").decision, Decision::Abort, "it was written since");
    let nonsense = all.begin().branch("left", "hunter2").commit().await.expect("an outcome");
    assert!(!nonsense.is_committed() && !nonsense.refusals[0].why.contains("hunter2"), "{nonsense:?}");
    let most = coord.profile().max_txn;
    let large = (0..most).fold(KeyWork::new(), |work, i| work.put(&format!("k{i}"), "x"));
    let large = all.begin().branch("left", large).commit().await.expect("an outcome");
    assert!(!large.is_committed() && large.refusals[0].why.contains("do not fit"), "{large:?}");
    // The refused ones left nothing; the last may have left a mark, because its outcome was an error.
    until_clean(&coord, "together", &[]).await;
    eventually("nothing is held", async || leftovers(&coord, "together").await.len() <= 1).await;
}

async fn a_branch_of_keys_keeps_its_half_of_the_contract(clients: Arc<dyn Clients>) {
    let Bank { coord, left: keys, .. } = bank(&clients, "contract").await;
    let branch = || Branch::new("contract", TxId::random(), "left", KeyWork::new().put("x", "1"));
    let yes = |vote| assert_eq!(vote, Vote::Yes);
    let over = |vote| assert!(matches!(vote, Vote::No(_)), "{vote:?}");

    let committed = branch();
    yes(keys.prepare(&committed).await.expect("a vote"));
    yes(keys.prepare(&committed).await.expect("the same again"));
    assert_eq!(keys.in_doubt("contract").await.expect("a list"), [committed.id]);
    assert_eq!(keys.in_doubt("another").await.expect("a list"), []);
    for _ in 0..2 {
        assert_eq!(keys.commit(&committed).await.expect("confirmed"), Finish::Done);
    }
    assert_eq!(value(&keys, "x").await.as_deref(), Some("1"));

    let aborted = branch();
    yes(keys.prepare(&aborted).await.expect("a vote"));
    for _ in 0..2 {
        assert_eq!(keys.abort(&aborted).await.expect("confirmed"), Finish::Done);
    }
    over(keys.prepare(&aborted).await.expect("a vote"));

    // The prepare that was delayed until all was over.
    let never = branch();
    assert_eq!(keys.abort(&never).await.expect("confirmed"), Finish::Done);
    over(keys.prepare(&never).await.expect("a vote"));
    assert!(matches!(keys.commit(&never).await.expect("an answer"), Finish::Diverged(_)));
    assert_eq!(keys.in_doubt("contract").await.expect("a list"), []);
    let left = leftovers(&coord, "contract").await;
    assert!(left.iter().all(|name| name.starts_with("txbranch/")), "no key is held: {left:?}");
    yes(keys.prepare(&branch()).await.expect("and the key is free"));
}

/// A driver that stops at a step until it is let go.
struct Stopped {
    driver: Running<quorate_core::Result<quorate_core::commit::Outcome>>,
    go: Arc<Notify>,
}

async fn stopped(clients: &Arc<dyn Clients>, group: &str, at: fn(&Step) -> bool, work: [KeyWork; 2]) -> Stopped {
    let coord = coord(clients).await;
    let (reached, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (hook_reached, hook_go) = (reached.clone(), go.clone());
    let options = quick().on_step(move |_, step| {
        let (reached, go) = (hook_reached.clone(), hook_go.clone());
        Box::pin(async move {
            if at(&step) {
                reached.notify_one();
                go.notified().await;
                go.notify_one();
            }
        })
    });
    let all = coord.transactions_with(group, options).expect("a good name");
    all.enlist_keys("left", &coord).expect("enlisted");
    all.enlist_keys("right", &coord).expect("enlisted");
    let [left, right] = work;
    let driver = spawn(all.begin().branch("left", left).branch("right", right).commit());
    reached.notified().await;
    Stopped { driver, go }
}

async fn readers_see_a_decided_value_at_once_and_an_undecided_one_never(clients: Arc<dyn Clients>) {
    let Bank { coord, all, left, right } = bank(&clients, "visible").await;
    let begun = all.begin().branch("left", KeyWork::new().put("a", "old"));
    let begun = begun.branch("right", KeyWork::new().put("b", "old"));
    assert!(begun.commit().await.expect("an outcome").is_committed());
    let work = || [KeyWork::new().put("a", "new"), KeyWork::new().put("b", "new")];
    let plain = async |key: &str| coord.kv().get(key).await.expect("reading works").expect("there").value;

    let mut undecided = stopped(&clients, "visible", |step| matches!(step, Step::Decide(_)), work()).await;
    assert_eq!((value(&left, "a").await.as_deref(), value(&right, "b").await.as_deref()), (Some("old"), Some("old")));
    assert_eq!(plain("a").await, "old");
    // Somebody who reads does not disturb: it goes on.
    undecided.go.notify_one();
    assert!(undecided.driver.soon("the driver").await.expect("an outcome").is_committed());
    assert_eq!((value(&left, "a").await.as_deref(), value(&right, "b").await.as_deref()), (Some("new"), Some("new")));

    let newer = || [KeyWork::new().put("a", "newer"), KeyWork::new().put("b", "newer")];
    let mut decided = stopped(&clients, "visible", |step| matches!(step, Step::Deliver(_)), newer()).await;
    assert_eq!(plain("b").await, "new", "nobody was told yet");
    assert_eq!(value(&right, "b").await.as_deref(), Some("newer"), "the decision counts");
    assert_eq!(plain("b").await, "newer", "and whoever read it has finished it");
    assert_eq!(plain("a").await, "new", "on its own store only");
    decided.go.notify_one();
    assert!(decided.driver.soon("the driver").await.expect("an outcome").is_committed());
    assert_eq!(value(&left, "a").await.as_deref(), Some("newer"));
    until_nothing_is_held(&coord, "visible").await;
}

async fn a_held_key_refuses_others_until_it_is_let_go(clients: Arc<dyn Clients>) {
    let Bank { coord, all, left, .. } = bank(&clients, "held").await;
    let work = [KeyWork::new().put("a", "first"), KeyWork::new().put("b", "first")];
    let mut first = stopped(&clients, "held", |step| matches!(step, Step::Decide(_)), work).await;
    let second = all.begin().branch("left", KeyWork::new().put("a", "second"));
    let outcome = within(Duration::from_secs(5), "no", second.commit()).await.expect("an outcome");
    assert_eq!(outcome.decision, Decision::Abort);
    assert!(outcome.refusals[0].why.contains("a is held by another transaction"), "{outcome:?}");
    // One that comes a moment before the end waits for it.
    let go = first.go.clone();
    let third = spawn(async move {
        sleep(Duration::from_millis(150)).await;
        go.notify_one();
    });
    let outcome = all.begin().branch("left", KeyWork::new().put("a", "third")).commit().await.expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    assert!(first.driver.soon("the driver").await.expect("an outcome").is_committed());
    assert_eq!(value(&left, "a").await.as_deref(), Some("third"));
    until_nothing_is_held(&coord, "held").await;
    drop(third);
}

async fn what_a_dead_driver_held_is_let_go_by_whoever_meets_it(clients: Arc<dyn Clients>) {
    let Bank { coord, all, left, .. } = bank(&clients, "dead").await;
    // An orphan: prepared, and nobody ever begun it.
    let orphan = Branch::new("dead", TxId::random(), "left", KeyWork::new().put("a", "orphan"));
    assert_eq!(left.prepare(&orphan).await.expect("a vote"), Vote::Yes);
    assert_eq!(value(&left, "a").await, None, "it never happened");
    assert_eq!(leftovers(&coord, "dead").await, Vec::<String>::new(), "and a reader has cleaned up");
    assert_eq!(left.prepare(&orphan).await.expect("a vote"), Vote::Yes);
    let outcome = all.begin().branch("left", KeyWork::new().put("a", "next")).commit().await.expect("an outcome");
    assert!(outcome.is_committed(), "{outcome:?}");
    assert_eq!(value(&left, "a").await.as_deref(), Some("next"));
    until_nothing_is_held(&coord, "dead").await;
}

/// Keys that are served, and what they were asked to prepare.
#[derive(Debug)]
struct Served {
    keys: Keys,
    asked: Mutex<Vec<Branch>>,
}

#[async_trait]
impl Participant for Served {
    async fn prepare(&self, branch: &Branch) -> quorate_core::Result<Vote> {
        self.asked.lock().expect("no poison").push(branch.clone());
        self.keys.prepare(branch).await
    }

    async fn commit(&self, branch: &Branch) -> quorate_core::Result<Finish> {
        self.keys.commit(branch).await
    }

    async fn abort(&self, branch: &Branch) -> quorate_core::Result<Finish> {
        self.keys.abort(branch).await
    }

    async fn in_doubt(&self, group: &str) -> quorate_core::Result<Vec<TxId>> {
        self.keys.in_doubt(group).await
    }
}

/// A server of the keys is stopped with its prepare on the way, and its stand-by does all that is to do. The prepare arrives
/// while the decision still stands in the log: whoever met what it left would commit it once more, over newer values.
async fn a_prepare_that_another_server_of_the_keys_sends_late_is_refused(clients: Arc<dyn Clients>) {
    let group = "late-server";
    let Bank { coord: log, all, left, .. } = bank(&clients, group).await;
    let host = coord(&clients).await;
    let hosted = host.transactions_with(group, quick()).expect("a good name");
    let keys = hosted.enlist_keys("shelf", &host).expect("enlisted");
    let served = Arc::new(Served { keys: keys.clone(), asked: Mutex::default() });
    let serving = hosted.serve("shelf", served.clone()).expect("a good name");
    serving.ready().await.expect("it serves");

    let go = Arc::new(Notify::new());
    let hook_go = go.clone();
    let options = quick().on_step(move |_, step| {
        let go = hook_go.clone();
        Box::pin(async move {
            if step == Step::Forget {
                go.notified().await;
            }
        })
    });
    let slow = log.transactions_with(group, options).expect("a good name");
    let first = slow.begin().remote("shelf", KeyWork::new().put("k", "first")).commit().await.expect("an outcome");
    assert!(first.is_committed(), "{first:?}");
    let second = all.begin().branch("left", KeyWork::new().put("k", "second")).commit().await.expect("an outcome");
    assert!(second.is_committed(), "{second:?}");

    let branch = served.asked.lock().expect("no poison").pop().expect("it was asked");
    let vote = keys.prepare(&branch).await.expect("a vote");
    assert_eq!(value(&left, "k").await.as_deref(), Some("second"), "a transaction was committed twice");
    assert!(matches!(vote, Vote::No(_)), "{vote:?}");
    go.notify_one();
    until_clean(&log, group, &["shelf"]).await;
}

const ACCOUNTS: usize = 4;
const EACH: i64 = 100;

/// Accounts 0..4 on the left, 4..8 on the right.
fn account(bank: &Bank, i: usize) -> (&Keys, &'static str, String) {
    let (keys, name) = if i < ACCOUNTS { (&bank.left, "left") } else { (&bank.right, "right") };
    (keys, name, format!("account/{i}"))
}

async fn open_accounts(bank: &Bank) {
    let work = |from: usize| {
        (from..from + ACCOUNTS).fold(KeyWork::new(), |work, i| work.put(&format!("account/{i}"), EACH.to_string()))
    };
    for (name, from) in [("left", 0), ("right", ACCOUNTS)] {
        // One by one where a step is small.
        let outcome = bank.all.begin().branch(name, work(from)).commit().await.expect("an outcome");
        assert!(outcome.is_committed(), "{outcome:?}");
    }
}

/// One transfer between two accounts; whether it was committed, if that is known.
async fn transfer(bank: &Bank) -> Option<bool> {
    let from = rand::random_range(0..2 * ACCOUNTS);
    let to = (from + rand::random_range(1..2 * ACCOUNTS)) % (2 * ACCOUNTS);
    let amount = rand::random_range(1..10_i64);
    let mut work = std::collections::BTreeMap::new();
    for (i, change) in [(from, -amount), (to, amount)] {
        let (keys, name, key) = account(bank, i);
        let found = keys.get(&key).await.ok()?;
        let seen = found.as_ref()?.modified;
        let next = (number(found.as_ref()) + change).to_string();
        let branch: KeyWork = work.remove(name).unwrap_or_default();
        work.insert(name, branch.if_unchanged(&key, seen).put(&key, next));
    }
    let tx = work.into_iter().fold(bank.all.begin(), |tx, (name, work)| tx.branch(name, work));
    tx.commit().await.ok().map(|outcome| outcome.is_committed())
}

async fn total(bank: &Bank) -> quorate_core::Result<i64> {
    let accounts: Vec<_> = (0..2 * ACCOUNTS).map(|i| account(bank, i)).collect();
    let keys: Vec<_> = accounts.iter().map(|(keys, _, key)| (*keys, key.as_str())).collect();
    Ok(consistent_read(&keys).await?.iter().map(|found| number(found.as_ref())).sum())
}

async fn transfers_keep_the_total_at_every_consistent_read(clients: Arc<dyn Clients>) {
    const EXPECTED: i64 = EACH * 2 * ACCOUNTS as i64;
    let judge = bank(&clients, "bank").await;
    open_accounts(&judge).await;
    let mut running = JoinSet::new();
    for _ in 0..3 {
        let bank = bank(&clients, "bank").await;
        running.spawn(async move {
            let mut committed = 0;
            for _ in 0..25 {
                committed += usize::from(transfer(&bank).await == Some(true));
                sleep(Duration::from_millis(rand::random_range(0..30))).await;
            }
            committed
        });
    }
    let (mut committed, mut looks) = (0, 0);
    while !running.is_empty() {
        tokio::select! {
            Some(done) = running.join_next() => committed += done.expect("no panic"),
            now = async {
                // A paused clock goes on only while everybody waits.
                sleep(Duration::from_millis(5)).await;
                total(&judge).await
            } => {
                // Written all the time is an answer, too.
                if let Ok(now) = now {
                    assert_eq!(now, EXPECTED);
                    looks += 1;
                }
            }
        }
    }
    assert!(committed >= 20 && looks >= 3, "too little happened to show anything: {committed}, {looks}");
    assert_eq!(total(&judge).await.expect("a total"), EXPECTED);
    until_clean(&judge.coord, "bank", &[]).await;
}

async fn transfers_keep_the_total_in_chaos(clients: Arc<dyn Clients>) {
    const EXPECTED: i64 = EACH * 2 * ACCOUNTS as i64;
    let seed: u64 = rand::random();
    let judge = bank(&clients, "chaos-bank").await;
    open_accounts(&judge).await;
    let short = Duration::from_millis(200);
    let options = RecoverOptions::default().every(short).grace(short).remember(Duration::ZERO);
    let mut running = JoinSet::new();
    for driver in 0..3 {
        let chaos = Chaos::uniform(seed ^ driver, 0.05, Duration::from_millis(20));
        let backend = Stack::new(client(&clients).await).with(chaos).standard(Duration::from_secs(5)).build();
        let coord = coord_over(backend, Duration::from_secs(30));
        let bank = bank_over(&coord, &coord, "chaos-bank");
        running.spawn(async move {
            let _recoverer = bank.all.recover_with(options);
            let mut committed = 0;
            for _ in 0..15 {
                committed += usize::from(transfer(&bank).await == Some(true));
            }
            committed
        });
    }
    let mut committed = 0;
    while let Some(done) = running.join_next().await {
        committed += done.expect("no panic");
    }
    assert!(committed >= 10, "too little happened to show anything: {committed}, seed {seed}");
    let quiet = coord_over(standard(client(&clients).await), Duration::from_secs(30));
    let bank = bank_over(&quiet, &quiet, "chaos-bank");
    let _recoverer = bank.all.recover_with(options);
    within(Duration::from_secs(30), "a clean log", until_clean(&quiet, "chaos-bank", &[])).await;
    assert_eq!(total(&bank).await.expect("a total"), EXPECTED, "seed {seed}");
    let held = KeyRange::prefix(&Dir::new(["txintent"]).expect("valid"), "").expect("valid");
    eventually("nothing is held", async || {
        quiet.backend().read(&held).await.expect("reading works").entries.is_empty()
    })
    .await;
}
