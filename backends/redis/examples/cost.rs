//! What one lock costs on a server, beside the least that any lock on Redis needs (`SET NX PX` and a script);
//! how long a hand-over takes, and how late the end of a dead client's lease is seen.
//!
//! `cargo run --release -p quorate-redis --example cost -- redis://127.0.0.1:6379/cost`

use std::{env, time::Duration};

use bytes::Bytes;
use quorate_core::{
    Backend, Check, Config, Dir, Enqueue, Key, KeyRange, LeaseId, Nonce, TicketKind, Txn, WatchEvent, Write,
};
use quorate_redis::Redis;
use tokio::time::Instant;

const PAIRS: usize = 100;
const ROUNDS: usize = 200;
const TURNS: usize = 1_000;
const RELEASE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = env::args().nth(1).unwrap_or_else(|| "redis://127.0.0.1:6379/cost".to_owned());
    let config = Config::parse(&url)?;
    let client = redis::Client::open(format!("redis://{}", config.endpoints[0]))?;
    let nodelay = redis::io::tcp::TcpSettings::default().set_nodelay(true);
    let client = redis::Client::open(client.get_connection_info().clone().set_tcp_settings(nodelay))?;
    let mut raw = client.get_multiplexed_async_connection().await?;
    let ours = Redis::connect(&config).await?;
    let script = redis::Script::new(RELEASE);
    let lease = ours.grant(Duration::from_secs(60)).await?.id;
    let (mut raw_times, mut our_times) = (Vec::new(), Vec::new());
    let (mut raw_server, mut our_server) = (0, 0);
    // In turns, so that whatever else the machine does hits both alike.
    for _ in 0..ROUNDS {
        let before = server_time(&mut raw).await?;
        for i in 0..PAIRS {
            let start = Instant::now();
            let value = format!("{i:032x}");
            let mut set = redis::cmd("SET");
            set.arg("cost-raw").arg(&value).arg("NX").arg("PX").arg(10_000);
            let _: redis::Value = set.query_async(&mut raw).await?;
            let _: i64 = script.key("cost-raw").arg(&value).invoke_async(&mut raw).await?;
            raw_times.push(start.elapsed());
        }
        let between = server_time(&mut raw).await?;
        for _ in 0..PAIRS {
            let start = Instant::now();
            let place = ours.enqueue(&entry(&lease)).await?.ok_or("not joined")?;
            let check = Check::Standing { ticket: place.ticket.clone(), token: place.token };
            ours.commit(&Txn { checks: vec![check], writes: vec![Write::Leave(place.ticket)] }).await?;
            our_times.push(start.elapsed());
        }
        raw_server += between - before;
        our_server += server_time(&mut raw).await? - between;
    }
    ours.revoke(&lease).await?;
    report("raw SET NX PX + script", raw_times);
    report("enqueue + leave", our_times);
    let pairs = u64::try_from(PAIRS * ROUNDS)?;
    println!("of which in the server: raw {} µs, ours {} µs", raw_server / pairs, our_server / pairs);
    hand_over(&config).await?;
    lateness(&config).await
}

/// One client holds, another waits; from the holder's release to the waiter's look that finds itself first.
async fn hand_over(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let clients = [Redis::connect(config).await?, Redis::connect(config).await?];
    let leases =
        [clients[0].grant(Duration::from_secs(60)).await?.id, clients[1].grant(Duration::from_secs(60)).await?.id];
    let mut times = Vec::with_capacity(TURNS);
    let mut holder = clients[0].enqueue(&entry(&leases[0])).await?.ok_or("not joined")?;
    for i in 1..=TURNS {
        let (old, new) = (&clients[(i + 1) % 2], &clients[i % 2]);
        let waiter = new.enqueue(&entry(&leases[i % 2])).await?.ok_or("not joined")?;
        let gone = new.gone(&holder.ticket);
        let release = async {
            // The wait has reached the server by then.
            tokio::time::sleep(Duration::from_millis(1)).await;
            let start = Instant::now();
            old.commit(&Txn { checks: vec![], writes: vec![Write::Leave(holder.ticket.clone())] }).await?;
            Ok::<_, quorate_core::Error>(start)
        };
        let woken = async {
            gone.await?;
            new.look(&waiter.ticket, 1).await?;
            Ok(Instant::now())
        };
        let (start, end) = futures_util::future::try_join(release, woken).await?;
        times.push(end - start);
        holder = waiter;
    }
    clients[TURNS % 2].revoke(&leases[TURNS % 2]).await?;
    report("hand-over to a waiting client", times);
    Ok(())
}

/// From the end of a lease that nobody renews to the moment at which a waiter and a watcher see it.
async fn lateness(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let (dead, live) = (Redis::connect(config).await?, Redis::connect(config).await?);
    let key = Key::new(&Dir::new(["kv"])?, "lateness")?;
    let mut watch = live.watch(&KeyRange::One(key.clone())).await?;
    let (mut waits, mut watches) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let ttl = Duration::from_millis(150);
        let lease = dead.grant(ttl).await?.id;
        let end = Instant::now() + ttl;
        let ticket = dead.enqueue(&entry(&lease)).await?.ok_or("not joined")?.ticket;
        let put = Write::Put { key: key.clone(), value: Bytes::new(), lease: Some(lease) };
        dead.commit(&Txn { checks: vec![], writes: vec![put] }).await?;
        let seen = async {
            while !matches!(watch.next().await, Some(WatchEvent::Delete { .. })) {}
            Instant::now()
        };
        let gone = async { live.gone(&ticket).await.map(|()| Instant::now()) };
        let (gone, seen) = futures_util::future::join(gone, seen).await;
        waits.push(gone?.saturating_duration_since(end));
        watches.push(seen.saturating_duration_since(end));
    }
    report("end of a lease, seen by a waiter after", waits);
    report("end of a lease, seen by a watcher after", watches);
    Ok(())
}

fn entry(lease: &LeaseId) -> Enqueue {
    Enqueue {
        line: Dir::new(["lock", "cost"]).expect("a valid name"),
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: Bytes::from_static(b"host:1234"),
        depth: 1,
        when_free: false,
    }
}

/// Microseconds that the server has spent in requests so far; what a script calls counts with the script.
async fn server_time(raw: &mut redis::aio::MultiplexedConnection) -> redis::RedisResult<u64> {
    let stats: String = redis::cmd("INFO").arg("commandstats").query_async(raw).await?;
    let spent = |line: &str| {
        let (_, rest) = line.split_once("usec=")?;
        rest.split(',').next()?.parse::<u64>().ok()
    };
    let counted = |line: &&str| line.starts_with("cmdstat_evalsha:") || line.starts_with("cmdstat_set:");
    Ok(stats.lines().filter(counted).filter_map(spent).sum())
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("{what}: p50 {} µs, p99 {} µs", p50.as_micros(), p99.as_micros());
}
