//! What a branch costs beside the same transaction without quorate: `cargo run --release -p quorate-postgres --example cost`.
//!
//! Both take turns on one server, one transaction at a time, so that what else the machine does hits both.

use std::{sync::Arc, time::Duration};

use quorate_core::commit::{Branch, Finish, Participant, TxId, Vote};
use quorate_postgres::{Postgres, Work, async_trait, tokio_postgres};
use quorate_testkit::servers::{Postgres as Launcher, PostgresOptions};
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};

const ROUNDS: usize = 2_000;
const SQL: &str = "UPDATE account SET balance = balance + 1 WHERE id = 1";

#[derive(Debug)]
struct Add;

#[async_trait]
impl Work for Add {
    async fn run(&self, db: &Client, _: &Branch) -> Result<Vote, tokio_postgres::Error> {
        db.batch_execute(SQL).await?;
        Ok(Vote::Yes)
    }
}

async fn bare(db: &Client, gid: &str) -> Result<[Duration; 2], tokio_postgres::Error> {
    let start = Instant::now();
    db.batch_execute("BEGIN").await?;
    db.batch_execute(SQL).await?;
    db.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
    let prepared = Instant::now();
    db.batch_execute(&format!("COMMIT PREPARED '{gid}'")).await?;
    Ok([prepared - start, prepared.elapsed()])
}

async fn branch(ledger: &Postgres) -> quorate_core::Result<[Duration; 2]> {
    let branch = Branch::new("cost", TxId::random(), "ledger", "");
    let start = Instant::now();
    assert_eq!(ledger.prepare(&branch).await?, Vote::Yes);
    let prepared = Instant::now();
    assert_eq!(ledger.commit(&branch).await?, Finish::Done);
    Ok([prepared - start, prepared.elapsed()])
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = Launcher::start(PostgresOptions::default()).await?;
    let url = format!("postgresql://quorate@{}/postgres", server.addr());
    let ledger = Postgres::connect("ledger", &url, Arc::new(Add))?;
    ledger.install().await?;
    let (db, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    db.batch_execute("CREATE TABLE account (id int, balance bigint); INSERT INTO account VALUES (1, 0)").await?;

    let (mut without, mut with) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        without.push(bare(&db, &format!("bare-{round}")).await?);
        with.push(branch(&ledger).await?);
    }
    for (part, what) in ["prepare", "commit"].into_iter().enumerate() {
        for (samples, who) in [(&without, "bare"), (&with, "quorate")] {
            let mut sorted: Vec<_> = samples.iter().map(|pair| pair[part].as_micros()).collect();
            sorted.sort_unstable();
            println!("{what:8}{who:8} p50 {:5} µs, p99 {:5} µs", sorted[ROUNDS / 2], sorted[ROUNDS * 99 / 100]);
        }
    }
    Ok(())
}
