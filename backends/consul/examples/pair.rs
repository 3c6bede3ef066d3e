//! What a lock costs at the waist, next to the cheapest possible client: joining a free line and leaving it, the same
//! with other tasks on one client, and handing a place over to the next in line.
//!
//! `cargo run --release -p quorate-consul --example pair` starts a Consul of its own.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_consul::Consul;
use quorate_core::{Backend, Check, Config, Dir, Enqueue, LeaseId, Nonce, Place, TicketKind, Txn, Write};
use quorate_testkit::servers::{self, ConsulOptions};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::Instant,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let server = servers::Consul::start(ConsulOptions::default()).await?;
    let client = Arc::new(Consul::connect(&Config::new("consul", [server.addr().to_string()])).await?);
    let lease = client.grant(Duration::from_secs(600)).await?.id;
    let mut raw = Raw::connect(server.addr()).await?;
    for round in 0..3 {
        let mut times = [(); 3].map(|()| Vec::new());
        // In turn, because the machine is never quiet.
        for _ in 0..1000 {
            let began = Instant::now();
            pair(&client, &lease, "a").await?;
            times[0].push(began.elapsed());
            let began = Instant::now();
            raw.fair_pair(&lease).await?;
            times[1].push(began.elapsed());
            let began = Instant::now();
            raw.pair(&lease).await?;
            times[2].push(began.elapsed());
        }
        let [ours, same, plain] = times.map(median);
        let ratio = |of: Duration, to: Duration| of.as_secs_f64() / to.as_secs_f64();
        println!(
            "round {round}: a pair {ours:?}; the same two requests by hand {same:?} (ratio {:.2}); \
             acquire and release of one key by hand {plain:?} (ratio {:.2})",
            ratio(ours, same),
            ratio(ours, plain),
        );
    }
    many(&client, &lease, 64, 50).await?;
    hand_over(server.addr(), 500).await?;
    Ok(())
}

async fn join(client: &Consul, lease: &LeaseId, line: &str) -> Outcome<Place> {
    let entry = Enqueue {
        line: Dir::new(["lock", line])?,
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: Bytes::from_static(b"host pid"),
        depth: 1,
        when_free: false,
    };
    client.enqueue(&entry).await?.ok_or_else(|| "no place".into())
}

async fn leave(client: &Consul, place: Place) -> Outcome<()> {
    let standing = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    let release = Txn { checks: vec![standing], writes: vec![Write::Leave(place.ticket)] };
    if client.commit(&release).await?.applied { Ok(()) } else { Err("lost".into()) }
}

async fn pair(client: &Consul, lease: &LeaseId, line: &str) -> Outcome<()> {
    let place = join(client, lease, line).await?;
    leave(client, place).await
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

async fn many(client: &Arc<Consul>, lease: &LeaseId, tasks: u32, pairs: u32) -> Outcome<()> {
    let began = Instant::now();
    let running: Vec<_> = (0..tasks)
        .map(|task| {
            let (client, lease) = (client.clone(), lease.clone());
            tokio::spawn(async move {
                for _ in 0..pairs {
                    pair(&client, &lease, &format!("line-{task}")).await?;
                }
                Outcome::Ok(())
            })
        })
        .collect();
    for task in running {
        task.await??;
    }
    let rate = f64::from(tasks * pairs) / began.elapsed().as_secs_f64();
    println!("{tasks} tasks on one client, a line each: {rate:.0} pairs a second");
    Ok(())
}

/// From the moment a holder begins to leave to the moment the next one knows that it is first, on two clients.
async fn hand_over(addr: SocketAddr, count: usize) -> Outcome<()> {
    let config = Config::new("consul", [addr.to_string()]);
    let clients = [Arc::new(Consul::connect(&config).await?), Arc::new(Consul::connect(&config).await?)];
    let leases =
        [clients[0].grant(Duration::from_secs(600)).await?.id, clients[1].grant(Duration::from_secs(600)).await?.id];
    let mut times = Vec::with_capacity(count);
    let mut held = join(&clients[0], &leases[0], "handed").await?;
    for turn in 0..count {
        let (holder, next) = (&clients[turn % 2], clients[(turn + 1) % 2].clone());
        let place = join(&next, &leases[(turn + 1) % 2], "handed").await?;
        let waiting = tokio::spawn(async move {
            let mut place = place;
            while let Some(ahead) = place.ahead.first() {
                next.gone(ahead).await?;
                place = next.look(&place.ticket, 1).await?.ok_or("gone")?;
            }
            Outcome::Ok((place, Instant::now()))
        });
        tokio::time::sleep(Duration::from_millis(3)).await;
        let began = Instant::now();
        leave(holder, held).await?;
        let (place, woken) = waiting.await??;
        times.push(woken - began);
        held = place;
    }
    times.sort_unstable();
    println!("hand-over: median {:?}, p99 {:?}", times[count / 2], times[count * 99 / 100]);
    Ok(())
}

/// HTTP by hand on one connection: nothing can be cheaper.
struct Raw {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Raw {
    async fn connect(addr: SocketAddr) -> Outcome<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 4096] })
    }

    /// What everybody does who fights for one key.
    async fn pair(&mut self, lease: &LeaseId) -> Outcome<()> {
        for verb in ["acquire", "release"] {
            let answer = self.put(&format!("/v1/kv/raw?{verb}={lease}"), "host pid").await?;
            if answer.trim() != "true" {
                return Err(answer.into());
            }
        }
        Ok(())
    }

    /// What our client sends.
    async fn fair_pair(&mut self, lease: &LeaseId) -> Outcome<()> {
        let slot = format!("lock/raw/{lease}-00000000.0-");
        let key = format!("{slot}{}", Nonce::random());
        let join = format!(
            r#"[{{"KV":{{"Verb":"check-not-exists","Key":"{key}"}}}},{{"KV":{{"Verb":"lock","Key":"{key}","Value":"aG9zdCBwaWQ=","Flags":0,"Session":"{lease}"}}}},{{"KV":{{"Verb":"get-tree","Key":"lock/raw/"}}}}]"#
        );
        let answer = self.put("/v1/txn", &join).await?;
        let (_, index) = answer.split_once(r#""CreateIndex":"#).ok_or("no index")?;
        let index = index.split(',').next().unwrap_or_default();
        let leave = format!(
            r#"[{{"KV":{{"Verb":"check-index","Key":"{key}","Index":{index}}}}},{{"KV":{{"Verb":"delete-tree","Key":"{slot}"}}}}]"#
        );
        self.put("/v1/txn", &leave).await.map(drop)
    }

    async fn put(&mut self, path: &str, body: &str) -> Outcome<String> {
        let length = body.len();
        let request = format!("PUT {path} HTTP/1.1\r\nHost: consul\r\nContent-Length: {length}\r\n\r\n{body}");
        self.stream.write_all(request.as_bytes()).await?;
        // These answers are small enough to come in one piece.
        let n = self.stream.read(&mut self.buffer).await?;
        let answer = String::from_utf8_lossy(&self.buffer[..n]);
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("half an answer")?;
        if head.starts_with("HTTP/1.1 200") { Ok(body.to_owned()) } else { Err(answer.into_owned().into()) }
    }
}
