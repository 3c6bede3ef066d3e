//! What one lock costs on a server, beside the least that any lock on Redis needs: `SET NX PX` and a script.
//!
//! `cargo run --release -p quorate-redis --example cost -- redis://127.0.0.1:6379/cost`

use std::{env, time::Duration};

use bytes::Bytes;
use quorate_core::{Backend, Check, Config, Dir, Enqueue, Nonce, TicketKind, Txn, Write};
use quorate_redis::Redis;
use tokio::time::Instant;

const PAIRS: usize = 5_000;
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
    for _ in 0..3 {
        let mut times = Vec::with_capacity(PAIRS);
        let script = redis::Script::new(RELEASE);
        for i in 0..PAIRS {
            let start = Instant::now();
            let value = format!("{i:032x}");
            let mut set = redis::cmd("SET");
            set.arg("cost-raw").arg(&value).arg("NX").arg("PX").arg(10_000);
            let _: redis::Value = set.query_async(&mut raw).await?;
            let _: i64 = script.key("cost-raw").arg(&value).invoke_async(&mut raw).await?;
            times.push(start.elapsed());
        }
        report("raw SET NX PX + script", times);
        let lease = ours.grant(Duration::from_secs(60)).await?.id;
        let line = Dir::new(["lock", "cost"])?;
        let mut times = Vec::with_capacity(PAIRS);
        for _ in 0..PAIRS {
            let start = Instant::now();
            let entry = Enqueue {
                line: line.clone(),
                kind: TicketKind::Lock,
                lease: lease.clone(),
                nonce: Nonce::random(),
                value: Bytes::from_static(b"host:1234"),
                depth: 1,
                when_free: false,
            };
            let place = ours.enqueue(&entry).await?.ok_or("not joined")?;
            let check = Check::Standing { ticket: place.ticket.clone(), token: place.token };
            ours.commit(&Txn { checks: vec![check], writes: vec![Write::Leave(place.ticket)] }).await?;
            times.push(start.elapsed());
        }
        report("enqueue + leave", times);
        ours.revoke(&lease).await?;
    }
    Ok(())
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("{what}: p50 {} µs, p99 {} µs", p50.as_micros(), p99.as_micros());
}
