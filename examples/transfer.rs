//! Atomic commit between two coordinators: `cargo run --example transfer`, on servers of yours with
//! `cargo run --example transfer --features etcd,redis -- etcd://127.0.0.1:2379 redis://127.0.0.1:6379`.
//!
//! The first holds the log of the transactions and the accounts of one bank, the second the accounts of the other.

use std::{sync::Arc, time::Duration};

use quorate::{
    Config, Coordinator, Result,
    commit::{
        Decision, KeyWork, Keys, Outcome, RecoverOptions, Step, Transactions, TransactionsOptions, consistent_read,
    },
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

/// What one process has: connections to both, and the group of transactions with its two participants.
struct Bank {
    all: Transactions,
    north: Keys,
    south: Keys,
}

const TTL: Duration = Duration::from_secs(2);

async fn connect(url: &str) -> Result<Coordinator> {
    let mut config = Config::parse(url)?.with_session_ttl(TTL);
    if config.namespace.is_empty() {
        config = config.with_namespace("quorate-transfer")?;
    }
    quorate::connect_with(&config).await
}

impl Bank {
    async fn open(urls: &[String; 2], options: TransactionsOptions) -> Result<Self> {
        let (log, other) = (connect(&urls[0]).await?, connect(&urls[1]).await?);
        let all = log.transactions_with("transfers", options)?;
        let north = all.enlist_keys("north", &log)?;
        let south = all.enlist_keys("south", &other)?;
        Ok(Self { all, north, south })
    }

    /// Moves an amount from Anna's account in the north to Bert's in the south, if she has it.
    async fn transfer(&self, amount: i64) -> Result<Outcome> {
        let anna = self.north.get("anna").await?;
        let bert = self.south.get("bert").await?;
        let (had, has) = (number(anna.as_ref()), number(bert.as_ref()));
        let seen = |found: Option<&quorate::kv::KeyValue>| found.map(|found| found.modified).unwrap_or_default();
        // Only if nobody has changed them meanwhile.
        let debit = KeyWork::new().if_unchanged("anna", seen(anna.as_ref()));
        let credit = KeyWork::new().if_unchanged("bert", seen(bert.as_ref()));
        let debit = debit.put("anna", (had - amount).to_string());
        let credit = credit.put("bert", (has + amount).to_string());
        self.all.begin().branch("north", debit).branch("south", credit).commit().await
    }

    async fn show(&self) -> Result<i64> {
        let both = consistent_read(&[(&self.north, "anna"), (&self.south, "bert")]).await?;
        let (anna, bert) = (number(both[0].as_ref()), number(both[1].as_ref()));
        println!("   Anna has {anna}, Bert has {bert}, together {}.", anna + bert);
        Ok(anna + bert)
    }
}

fn number(found: Option<&quorate::kv::KeyValue>) -> i64 {
    found.and_then(|found| std::str::from_utf8(&found.value).ok()?.parse().ok()).unwrap_or_default()
}

fn chapter(number: usize, title: &str) {
    println!("\n{number}. {title}\n{}", "-".repeat(title.len() + 3));
}

fn main() -> Result<()> {
    let mut urls = std::env::args().skip(1);
    let first = urls.next();
    let second = urls.next().or_else(|| first.clone());
    let urls = [
        first.unwrap_or_else(|| "memory://north/transfer".to_owned()),
        second.unwrap_or_else(|| "memory://south/transfer".to_owned()),
    ];
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    // Large, as it holds the way to every backend.
    runtime.block_on(Box::pin(show(&urls)))
}

async fn show(urls: &[String; 2]) -> Result<()> {
    let bank = Bank::open(urls, TransactionsOptions::default()).await?;
    let opening = bank.all.begin().branch("north", KeyWork::new().put("anna", "100"));
    let opened = opening.branch("south", KeyWork::new().put("bert", "100")).commit().await?;
    println!("Two banks, one transaction: {opened:?}");
    let before = bank.show().await?;

    chapter(1, "A transfer that both banks agree to");
    let outcome = bank.transfer(30).await?;
    println!("   {}: {}", outcome.id, outcome.decision);
    bank.show().await?;

    chapter(2, "A transfer that one bank refuses");
    let stale = KeyWork::new().if_absent("bert").put("bert", "1000000");
    let outcome = bank.all.begin().branch("north", KeyWork::new().put("anna", "0")).branch("south", stale);
    let outcome = outcome.commit().await?;
    for refusal in &outcome.refusals {
        println!("   {}: {}; {} says: {}", outcome.id, outcome.decision, refusal.participant, refusal.why);
    }
    bank.show().await?;

    chapter(3, "The driver dies between the votes and the decision");
    died(urls, &bank, |step| matches!(step, Step::Decide(Decision::Commit))).await?;
    println!("   Nothing was decided, so it was aborted.");

    chapter(4, "The driver dies after the decision, before anybody was told");
    died(urls, &bank, |step| matches!(step, Step::Decided(Decision::Commit))).await?;
    println!("   It was decided, so it was carried out.");
    let after = bank.show().await?;
    assert_eq!(before, after, "money was made or lost");
    let doubts = bank.all.in_doubt().await?;
    println!("\nThe total never changed, and {} transactions are in doubt.", doubts.len());
    Ok(())
}

/// Lets a driver, which lives in a runtime of its own, die at a step; another finishes what it left.
async fn died(urls: &[String; 2], bank: &Bank, at: fn(&Step) -> bool) -> Result<()> {
    let reached = Arc::new(Notify::new());
    let (urls, told) = (urls.clone(), reached.clone());
    let options = TransactionsOptions::default().on_step(move |_, step| {
        let told = told.clone();
        Box::pin(async move {
            if at(&step) {
                told.notify_one();
                std::future::pending::<()>().await;
            }
        })
    });
    let process = tokio::runtime::Runtime::new().expect("a runtime starts");
    process.spawn(async move {
        let bank = Bank::open(&urls, options).await?;
        bank.transfer(7).await
    });
    reached.notified().await;
    let killed = Instant::now();
    process.shutdown_background();
    println!("   The driver is dead. Somebody who asks meanwhile:");
    bank.show().await?;
    let short = Duration::from_millis(200);
    let recoverer = bank.all.recover_with(RecoverOptions::default().every(short).grace(short).remember(Duration::ZERO));
    while !bank.all.in_doubt().await?.is_empty() {
        sleep(Duration::from_millis(20)).await;
    }
    drop(recoverer);
    println!(
        "   Finished by another {:.1} s after the death; its session had a TTL of {TTL:?}.",
        killed.elapsed().as_secs_f64()
    );
    bank.show().await.map(drop)
}
