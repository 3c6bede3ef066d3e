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
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // In turn, because the machine is never quiet.
        for _ in 0..1000 {
            let began = Instant::now();
            pair(&client, &lease, "a").await?;
            ours.push(began.elapsed());
            let began = Instant::now();
            raw.pair(&lease).await?;
            theirs.push(began.elapsed());
        }
        let (ours, theirs) = (median(ours), median(theirs));
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        println!("round {round}: a pair {ours:?}, raw acquire and release {theirs:?}, ratio {ratio:.2}");
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

    async fn pair(&mut self, lease: &LeaseId) -> Outcome<()> {
        for verb in ["acquire", "release"] {
            let request =
                format!("PUT /v1/kv/raw?{verb}={lease} HTTP/1.1\r\nHost: consul\r\nContent-Length: 8\r\n\r\nhost pid");
            self.stream.write_all(request.as_bytes()).await?;
            let n = self.stream.read(&mut self.buffer).await?;
            let answer = String::from_utf8_lossy(&self.buffer[..n]);
            if !answer.ends_with("true") && !answer.ends_with("true\n") {
                return Err(answer.into_owned().into());
            }
        }
        Ok(())
    }
}
