//! A tour of quorate in one process: `cargo run --example tour`, on a server with
//! `cargo run --example tour --features redis -- redis://127.0.0.1:6379`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate::{Config, Coordinator, FencingToken, KvEvent, Result, SessionOptions};
use tokio::time::{Instant, sleep};

/// A storage that remembers the greatest token it has seen and refuses smaller ones: what every resource
/// behind a lock should do.
#[derive(Default)]
struct Storage {
    greatest: Mutex<Option<FencingToken>>,
    rows: Mutex<BTreeMap<&'static str, String>>,
}

impl Storage {
    fn write(&self, token: FencingToken, row: &'static str, value: &str) -> Result<(), String> {
        let mut greatest = self.greatest.lock().expect("no writer panics");
        if greatest.is_some_and(|seen| token < seen) {
            return Err(format!("token {token} is stale, {} has been here", greatest.expect("just seen")));
        }
        *greatest = Some(token);
        self.rows.lock().expect("no writer panics").insert(row, value.to_owned());
        Ok(())
    }
}

fn chapter(number: usize, title: &str) {
    println!("\n{number}. {title}\n{}", "-".repeat(title.len() + 3));
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "memory://tour/tour".to_owned());
    let mut config = Config::parse(&url)?;
    if config.namespace.is_empty() {
        config = config.with_namespace("quorate-tour")?;
    }
    let coord = quorate::connect_with(&config).await?;
    println!("quorate on {}. The same code runs on every backend; only the URL differs.", coord.profile().backend);
    let clock = coord.clock().sample().await?;
    println!(
        "One round trip takes {:.1} ms; the server's clock is {:+.3} s ahead of ours, give or take {:.3} s.",
        clock.round_trip.last.as_secs_f64() * 1e3,
        clock.ahead_seconds,
        clock.error.as_secs_f64()
    );

    contended_lock(&coord).await?;
    dead_holder(&config, &coord).await?;
    stale_write(&coord).await?;
    watched_key(&coord).await?;

    coord.close().await?;
    println!("\nThat is all. The session is closed, and nothing of this tour is left in the store but one key.");
    Ok(())
}

async fn contended_lock(coord: &Coordinator) -> Result<()> {
    chapter(1, "Three tasks want one lock");
    let started = Instant::now();
    let mut tasks = Vec::new();
    for name in ["anna", "bert", "cleo"] {
        let lock = coord.lock("tour/printer");
        tasks.push(tokio::spawn(async move {
            let guard = lock.acquire().await?;
            println!("   {:>4} ms  {name} has it, token {}", started.elapsed().as_millis(), guard.token());
            sleep(Duration::from_millis(40)).await;
            guard.release().await
        }));
        // Arrivals a moment apart, so that the order of arrival is plain to see.
        sleep(Duration::from_millis(5)).await;
    }
    sleep(Duration::from_millis(5)).await;
    let status = coord.lock("tour/printer").status().await?;
    if let Some(holder) = status.holder {
        println!("   meanwhile: held by {}, {} waiting", holder.owner.unwrap_or_default(), status.waiting);
    }
    for task in tasks {
        task.await.expect("the task does not panic")?;
    }
    println!("   Granted in order of arrival, each with a greater token. A release wakes one waiter, not all.");
    Ok(())
}

async fn dead_holder(config: &Config, coord: &Coordinator) -> Result<()> {
    chapter(2, "A holder dies, and the lock is handed over");
    let ttl = coord.profile().min_ttl.max(Duration::from_millis(200));
    let doomed = quorate::connect_with(config).await?;
    let session = doomed.open_session(&SessionOptions { ttl, owner: "doomed".into() }).await?;
    let guard = doomed.lock("tour/oven").on(&session).acquire().await?;
    let started = Instant::now();
    println!(
        "   \"doomed\" holds it with token {} on a session of {:?}, and stops renewing, as a crash would",
        guard.token(),
        session.ttl()
    );
    session.orphan();
    println!("   its own guard knows at once: is_held = {}", guard.is_held());
    let next = coord.lock("tour/oven").acquire().await?;
    println!(
        "   {:>4} ms  the next in line has it, token {}: not before the lease had ended",
        started.elapsed().as_millis(),
        next.token()
    );
    next.release().await
}

async fn stale_write(coord: &Coordinator) -> Result<()> {
    chapter(3, "A stale write is refused");
    let storage = Arc::new(Storage::default());
    let lock = coord.lock("tour/ledger");
    let slow = lock.acquire().await?;
    println!("   A has the lock with token {} and falls asleep; an operator breaks the lock", slow.token());
    lock.break_holder().await?;
    let quick = lock.acquire().await?;
    println!(
        "   B has it now, with token {}, and writes: {:?}",
        quick.token(),
        storage.write(quick.token(), "row", "B")
    );
    match storage.write(slow.token(), "row", "A") {
        Ok(()) => println!("   A's late write got through: this must not happen"),
        Err(refusal) => println!("   A wakes up and writes: refused by the storage, {refusal}"),
    }
    match coord.kv().put_fenced(&slow.fence(), "tour/row", "A").await {
        Ok(_) => println!("   the same in the coordinator's own store got through: this must not happen"),
        Err(error) => println!("   the same in the coordinator's own store: {error}"),
    }
    slow.lost().await;
    println!("   and A's guard has learned of it: is_held = {}", slow.is_held());
    quick.release().await
}

async fn watched_key(coord: &Coordinator) -> Result<()> {
    chapter(4, "A watch follows a key");
    let kv = coord.kv();
    let revision = kv.put("tour/limit", "10").await?;
    let mut watch = kv.watch("tour/limit").await?;
    let writer = kv.clone();
    let writes = tokio::spawn(async move {
        writer.put("tour/limit", "20").await?;
        writer.put("tour/limit", "30").await
    });
    loop {
        match watch.next().await? {
            KvEvent::Reset(entries) => {
                let now = entries.first().map(|e| String::from_utf8_lossy(&e.value).into_owned());
                println!("   to begin with: {}", now.unwrap_or_default());
            }
            KvEvent::Put(entry) => {
                println!("   changed to {} at revision {}", String::from_utf8_lossy(&entry.value), entry.modified);
                if entry.value == "30" {
                    break;
                }
            }
            KvEvent::Delete { key, .. } => println!("   {key} is gone"),
            KvEvent::Interrupted(error) => println!("   out of contact: {error}"),
        }
    }
    writes.await.expect("the task does not panic")?;
    println!(
        "   A compare-and-swap with the first revision is too late: {:?}",
        kv.compare_and_swap("tour/limit", revision, "40").await?
    );
    Ok(())
}
