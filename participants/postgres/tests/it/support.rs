//! A server of its own for each test, with one account on it.

use std::sync::Arc;

use quorate_core::commit::{Branch, Finish, TxId, Vote};
use quorate_postgres::{Postgres, Work, async_trait, tokio_postgres};
use quorate_testkit::servers::{Postgres as Launcher, PostgresOptions, Server};
use tokio_postgres::Client;

/// Adds the number in its body to the account, which may not fall below zero.
#[derive(Debug)]
pub(crate) struct Add;

#[async_trait]
impl Work for Add {
    async fn run(&self, db: &Client, branch: &Branch) -> Result<Vote, tokio_postgres::Error> {
        let amount: i64 = std::str::from_utf8(&branch.body).expect("text").parse().expect("a number");
        if amount == 0 {
            return Ok(Vote::ReadOnly);
        }
        let changed = db.execute("UPDATE account SET balance = balance + $1 WHERE id = 1", &[&amount]).await?;
        Ok(if changed == 1 { Vote::Yes } else { Vote::No("no such account".to_owned()) })
    }
}

/// Runs the statements in its body, one a line. What stands behind a `?` may fail unnoticed; at `hang` it stands still, at `panic` it panics.
#[derive(Debug)]
pub(crate) struct Script;

#[async_trait]
impl Work for Script {
    async fn run(&self, db: &Client, branch: &Branch) -> Result<Vote, tokio_postgres::Error> {
        for line in std::str::from_utf8(&branch.body).expect("text").lines() {
            match line.strip_prefix('?') {
                Some(sql) => drop(db.batch_execute(sql).await),
                None if line == "hang" => std::future::pending().await,
                None if line == "panic" => panic!("as it was told"),
                None => db.batch_execute(line).await?,
            }
        }
        Ok(Vote::Yes)
    }
}

/// A statement that takes one from the account and locks its row.
pub(crate) const TAKE: &str = "UPDATE account SET balance = balance - 1 WHERE id = 1";

pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) ledger: Postgres,
}

pub(crate) fn url(server: &Server) -> String {
    format!("postgresql://quorate@{}/postgres", server.addr())
}

pub(crate) async fn world() -> World {
    world_with(Arc::new(Add)).await
}

pub(crate) async fn world_with(work: Arc<dyn Work>) -> World {
    let server = Launcher::start(PostgresOptions::default()).await.expect("PostgreSQL starts");
    let ledger = Postgres::connect("ledger", &url(&server), work).expect("a URL");
    ledger.install().await.expect("the table is there");
    let world = World { server, ledger };
    world
        .sql(
            "CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0)); \
             INSERT INTO account VALUES (1, 100)",
        )
        .await;
    world
}

impl World {
    /// The same participant in another process.
    pub(crate) fn another(&self, work: Arc<dyn Work>) -> Postgres {
        Postgres::connect("ledger", &url(&self.server), work).expect("a URL")
    }

    pub(crate) async fn client(&self) -> Client {
        let (client, connection) =
            tokio_postgres::connect(&url(&self.server), tokio_postgres::NoTls).await.expect("up");
        tokio::spawn(connection);
        client
    }

    pub(crate) async fn sql(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.expect("it is understood");
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        self.client().await.query_one(sql, &[]).await.expect("it is understood").get(0)
    }

    pub(crate) async fn balance(&self) -> i64 {
        self.number("SELECT balance FROM account WHERE id = 1").await
    }

    pub(crate) async fn prepared(&self) -> i64 {
        self.number("SELECT count(*) FROM pg_prepared_xacts").await
    }
}

pub(crate) fn branch(body: &str) -> Branch {
    Branch::new("bank", TxId::random(), "ledger", body.to_owned())
}

pub(crate) fn over(vote: &Vote) {
    assert!(matches!(vote, Vote::No(_)), "{vote:?}");
}

pub(crate) fn diverged(finish: &Finish) {
    assert!(matches!(finish, Finish::Diverged(_)), "{finish:?}");
}
