//! What it costs to join a free line and to leave it, at the waist: what a lock's acquire and release send.

use std::time::Duration;

use bytes::Bytes;
use quorate_core::{Backend, Check, Dir, Enqueue, Nonce, TicketKind, Txn, Write};
use quorate_memory::Memory;
use tokio::time::Instant;

const PAIRS: u32 = 2_000_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> quorate_core::Result<()> {
    let backend: Box<dyn Backend> = Box::new(Memory::new());
    let lease = backend.grant(Duration::from_secs(600)).await?.id;
    let line = Dir::new(["lock", "jobs/nightly"])?;
    for round in 0..5 {
        let started = Instant::now();
        for i in 0..PAIRS {
            let entry = Enqueue {
                line: line.clone(),
                kind: TicketKind::Lock,
                lease: lease.clone(),
                nonce: Nonce(u128::from(i) << 64 | 7),
                value: Bytes::new(),
                depth: 1,
                when_free: true,
            };
            let place = backend.enqueue(&entry).await?.expect("nobody else is in the line");
            let standing = Check::Standing { ticket: place.ticket.clone(), token: place.token };
            let release = Txn { checks: vec![standing], writes: vec![Write::Leave(place.ticket)] };
            assert!(backend.commit(&release).await?.applied);
        }
        let pair = started.elapsed() / PAIRS;
        println!(
            "round {round}: {} ns a pair, {:.2} million pairs a second",
            pair.as_nanos(),
            1e3 / pair.as_nanos() as f64
        );
    }
    Ok(())
}
