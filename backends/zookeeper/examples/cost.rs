//! What calls cost beside the bare client library, on one server and in one run.
//!
//! `cargo run --release -p quorate-zookeeper --example cost -- zookeeper://127.0.0.1:2181/cost`

use std::{sync::Arc, time::Duration};

use quorate_core::{
    Backend, Check, Config, Dir, Enqueue, Key, KeyRange, LeaseId, Nonce, Place, Result, TicketKind, Txn, Write,
};
use quorate_zookeeper::ZooKeeper;
use tokio::time::Instant;
use zookeeper_client::{Acls, Client, CreateMode};

const ROUNDS: usize = 1500;

#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn show(mut self, what: &str) {
        self.0.sort();
        let at = |share: f64| self.0[((self.0.len() - 1) as f64 * share) as usize].as_micros();
        println!("{what:<44} p50 {:>6} µs   p99 {:>6} µs", at(0.5), at(0.99));
    }
}

/// Renews now and then, outside of what is measured.
struct Keep(Instant);

impl Keep {
    async fn renew(&mut self, backend: &ZooKeeper, lease: &LeaseId) -> Result<()> {
        if self.0.elapsed() > Duration::from_millis(500) {
            backend.renew(lease).await?;
            self.0 = Instant::now();
        }
        Ok(())
    }
}

fn entry(line: &Dir, lease: &LeaseId) -> Enqueue {
    Enqueue {
        line: line.clone(),
        kind: TicketKind::Lock,
        lease: lease.clone(),
        nonce: Nonce::random(),
        value: "owner".into(),
        depth: 1,
        when_free: false,
    }
}

async fn join(backend: &ZooKeeper, line: &Dir, lease: &LeaseId) -> Result<Place> {
    Ok(backend.enqueue(&entry(line, lease)).await?.expect("not asked for a free line"))
}

fn release(place: &Place) -> Txn {
    let (ticket, token) = (place.ticket.clone(), place.token);
    Txn { checks: vec![Check::Standing { ticket: ticket.clone(), token }], writes: vec![Write::Leave(ticket)] }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("give the URL of a server")?;
    let config = Config::parse(&url)?;
    let backend = Arc::new(ZooKeeper::connect(&config).await?);
    let raw = Client::connector().connect(&config.endpoints.join(",")).await?;
    let namespace = format!("/{}", config.namespace);
    lines(&backend, &raw, &namespace).await?;
    keys(&backend, &raw, &namespace).await?;
    for depth in [2, 100, 1000] {
        hand_over(&backend, depth).await?.show(&format!("hand-over in a line of {depth}"));
    }
    Ok(())
}

fn show<const N: usize>(times: [Times; N], names: [&str; N]) {
    for (times, name) in times.into_iter().zip(names) {
        times.show(name);
    }
}

/// Taken in turns, as everything here, so that all meet the same weather.
async fn lines(
    backend: &ZooKeeper,
    raw: &Client,
    namespace: &str,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let lease = backend.grant(Duration::from_secs(30)).await?.id;
    let mut keep = Keep(Instant::now());
    let (empty, busy) = (Dir::new(["lock", "empty"])?, Dir::new(["lock", "busy"])?);
    backend.commit(&release(&join(backend, &empty, &lease).await?)).await?;
    join(backend, &busy, &lease).await?;
    let acls = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());
    let dir = format!("{namespace}/lock/busy");
    let path = format!("{dir}/_c_01234567-89ab-cdef-0123-456789abcdef-lock-");
    let mut times: [Times; 6] = Default::default();
    for _ in 0..ROUNDS {
        keep.renew(backend, &lease).await?;
        let t = Instant::now();
        let (_, sequence) = raw.create(&path, b"owner", &acls).await?;
        times[0].0.push(t.elapsed());
        let t = Instant::now();
        raw.delete(&format!("{path}{sequence}"), None).await?;
        times[1].0.push(t.elapsed());
        let t = Instant::now();
        let place = join(backend, &empty, &lease).await?;
        times[2].0.push(t.elapsed());
        let t = Instant::now();
        backend.commit(&release(&place)).await?;
        times[3].0.push(t.elapsed());
        let t = Instant::now();
        let created = raw.create(&path, b"owner", &acls);
        let listed = raw.list_children(&dir);
        let (_, sequence) = created.await?;
        listed.await?;
        times[4].0.push(t.elapsed());
        raw.delete(&format!("{path}{sequence}"), None).await?;
        let t = Instant::now();
        let place = join(backend, &busy, &lease).await?;
        times[5].0.push(t.elapsed());
        backend.commit(&release(&place)).await?;
    }
    show(
        times,
        [
            "raw: create",
            "raw: delete",
            "enqueue, line empty",
            "release",
            "raw: create + list, together",
            "enqueue, line occupied",
        ],
    );
    Ok(backend.revoke(&lease).await?)
}

async fn keys(
    backend: &ZooKeeper,
    raw: &Client,
    namespace: &str,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let lease = backend.grant(Duration::from_secs(30)).await?.id;
    let mut keep = Keep(Instant::now());
    let kv = Dir::new(["kv"])?;
    let (key, fenced) = (Key::new(&kv, "plain")?, Key::new(&kv, "fenced")?);
    let put = |key: &Key, checks: Vec<Check>| Txn {
        checks,
        writes: vec![Write::Put { key: key.clone(), value: "value".into(), lease: None }],
    };
    let standing = join(backend, &Dir::new(["lock", "fence"])?, &lease).await?;
    backend.commit(&put(&key, vec![])).await?;
    let plain = format!("{namespace}/kv/plain");
    let mut times: [Times; 6] = Default::default();
    for _ in 0..ROUNDS {
        keep.renew(backend, &lease).await?;
        let t = Instant::now();
        raw.set_data(&plain, b"value", None).await?;
        times[0].0.push(t.elapsed());
        let t = Instant::now();
        backend.commit(&put(&key, vec![])).await?;
        times[1].0.push(t.elapsed());
        let t = Instant::now();
        raw.get_data(&plain).await?;
        times[2].0.push(t.elapsed());
        let t = Instant::now();
        let entry = backend.read(&KeyRange::One(key.clone())).await?.entries.pop().ok_or("it is there")?;
        times[3].0.push(t.elapsed());
        let t = Instant::now();
        let check = Check::Unchanged { key: key.clone(), modified: entry.modified };
        assert!(backend.commit(&put(&key, vec![check])).await?.applied);
        times[4].0.push(t.elapsed());
        let t = Instant::now();
        let check = Check::Standing { ticket: standing.ticket.clone(), token: standing.token };
        assert!(backend.commit(&put(&fenced, vec![check])).await?.applied);
        times[5].0.push(t.elapsed());
    }
    show(
        times,
        [
            "raw: set",
            "put",
            "raw: get",
            "read (sync + generation + get)",
            "compare-and-swap after a read",
            "fenced put",
        ],
    );
    Ok(backend.revoke(&lease).await?)
}

/// From the release of the first to the answer that makes the second the first.
async fn hand_over(backend: &Arc<ZooKeeper>, depth: usize) -> Result<Times> {
    let lease = backend.grant(Duration::from_secs(30)).await?.id;
    let line = Dir::new(["lock", "hand-over"])?;
    let mut keep = Keep(Instant::now());
    let mut places = std::collections::VecDeque::new();
    for _ in 0..depth {
        keep.renew(backend, &lease).await?;
        places.push_back(join(backend, &line, &lease).await?);
    }
    let mut times = Times::default();
    for _ in 0..200 {
        keep.renew(backend, &lease).await?;
        let (first, second) = (places.pop_front().expect("deep"), places[0].clone());
        let waiter = tokio::spawn({
            let (backend, first, second) = (backend.clone(), first.ticket.clone(), second.ticket.clone());
            async move {
                loop {
                    backend.gone(&first).await?;
                    let place = backend.look(&second, 1).await?.expect("it stands");
                    if place.ahead.is_empty() {
                        return Ok::<_, quorate_core::Error>(Instant::now());
                    }
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        let t = Instant::now();
        backend.commit(&release(&first)).await?;
        times.0.push(waiter.await.expect("no panic")? - t);
        places.push_back(join(backend, &line, &lease).await?);
    }
    backend.revoke(&lease).await?;
    Ok(times)
}
