//! What ten thousand instances of one service cost: `cargo run --release --example many`, on a server with
//! `cargo run --release --example many --features etcd -- etcd://127.0.0.1:2379 10000`.
//!
//! Prints how long it takes to register them all, to read the first set, and until a consumer sees a change, and how much
//! memory each instance takes on either side.

use std::time::Duration;

use quorate::{Config, discovery::Instance};
use tokio::time::{Instant, timeout};

const PATIENCE: Duration = Duration::from_secs(300);
const CHANGES: usize = 100;

/// Bytes of memory that the process has in use, as Linux counts them.
fn memory() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    pages.and_then(|text| text.split(' ').nth(1)?.parse::<usize>().ok()).unwrap_or(0) * 4096
}

fn each(before: usize, count: usize) -> usize {
    memory().saturating_sub(before) / count
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "memory://many/many".to_owned());
    let count: usize = std::env::args().nth(2).map_or(Ok(10_000), |text| text.parse())?;
    let mut config = Config::parse(&url)?.with_session_ttl(Duration::from_secs(60));
    if config.namespace.is_empty() {
        config = config.with_namespace("quorate-many")?;
    }
    let (server, client) = (quorate::connect_with(&config).await?, quorate::connect_with(&config).await?);
    println!("{count} instances of one service on {}", server.profile().backend);

    let (before, started) = (memory(), Instant::now());
    let mut registrations = Vec::with_capacity(count);
    for i in 0..count {
        let address = format!("10.{}.{}.{}:8080", i >> 16, (i >> 8) & 255, i & 255);
        let instance = Instance::new("many", address).tag("v2").meta("build", "4711").zone("eu-1");
        registrations.push(server.register(instance)?);
    }
    for registration in &registrations {
        timeout(PATIENCE, registration.ready()).await??;
    }
    println!("   registered in {:?}, {} bytes each here", started.elapsed(), each(before, count));

    let (before, started) = (memory(), Instant::now());
    let service = client.discover("many").await?;
    let first = service.now().len();
    println!("   first set: {first} instances after {:?}, {} bytes each", started.elapsed(), each(before, count));

    let mut times = Vec::with_capacity(CHANGES);
    for (change, registration) in registrations.iter().step_by((count / CHANGES).max(1)).enumerate() {
        let (id, weight) = (registration.instance().id, u32::try_from(change)? + 2);
        let started = Instant::now();
        registration.update(|instance| instance.weight = weight)?;
        timeout(PATIENCE, service.until(|now| now.get(&id).is_some_and(|one| one.weight == weight))).await?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    println!(
        "   a change is seen after {:?} (median of {}), {:?} at the most",
        times[times.len() / 2],
        times.len(),
        times[times.len() - 1]
    );

    let started = Instant::now();
    server.close().await?;
    timeout(PATIENCE, service.until(|now| now.is_empty())).await?;
    println!("   all gone {:?} after their session was closed", started.elapsed());
    Ok(())
}
