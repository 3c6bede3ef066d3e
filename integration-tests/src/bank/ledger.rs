//! The bank's book in PostgreSQL: every transfer is in it, too.
//!
//! Promise: the book holds what the accounts hold, at the end and as a total at every moment.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use quorate::{
    Error, ErrorKind, Result,
    commit::{Branch, Vote},
    postgres::{Postgres, Work, async_trait, tokio_postgres},
};
use tokio_postgres::{Client, NoTls};

use super::{ACCOUNTS, EACH};

/// The participant's name.
pub const NAME: &str = "ledger";

/// Changes two balances, as the receipt in the branch's body says.
#[derive(Debug)]
struct Entry;

#[async_trait]
impl Work for Entry {
    async fn run(&self, db: &Client, branch: &Branch) -> Result<Vote, tokio_postgres::Error> {
        // Another transfer may hold the row until its outcome is told: no time to wait for that.
        db.batch_execute("SET LOCAL lock_timeout = 400").await?;
        let receipt = std::str::from_utf8(&branch.body).expect("as written by a transfer");
        for (number, change) in super::changes(receipt) {
            let number = i64::try_from(number).expect("a small number");
            db.execute("UPDATE balance SET amount = amount + $2 WHERE number = $1", &[&number, &change]).await?;
        }
        Ok(Vote::Yes)
    }
}

/// The book, as one process sees it.
#[derive(Debug, Clone)]
pub struct Ledger {
    url: String,
    /// To be enlisted.
    pub participant: Postgres,
}

impl Ledger {
    /// The book at a URL; nothing is sent.
    ///
    /// # Errors
    /// `InvalidInput` for a malformed URL.
    pub fn new(url: &str) -> Result<Self> {
        Ok(Self { url: url.to_owned(), participant: Postgres::connect(NAME, url, Arc::new(Entry))? })
    }

    async fn client(&self) -> Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await.map_err(down)?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Makes the tables, with the same in every account.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn fill(&self) -> Result<()> {
        self.participant.install().await?;
        let db = self.client().await?;
        db.batch_execute("CREATE TABLE balance (number bigint PRIMARY KEY, amount bigint NOT NULL)")
            .await
            .map_err(down)?;
        let sql = "INSERT INTO balance SELECT number, $1 FROM generate_series(0, $2::bigint - 1) AS number";
        let count = i64::try_from(ACCOUNTS).expect("a small number");
        db.execute(sql, &[&EACH, &count]).await.map(drop).map_err(down)
    }

    /// What the book holds now, by account.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn balances(&self) -> Result<BTreeMap<usize, i64>> {
        let read = async {
            let rows = self.client().await?.query("SELECT number, amount FROM balance", &[]).await.map_err(down)?;
            let pair = |row: &tokio_postgres::Row| (usize::try_from(row.get::<_, i64>(0)).expect("small"), row.get(1));
            Ok(rows.iter().map(pair).collect())
        };
        let late = || Error::new(ErrorKind::Unavailable, "read", "the database hangs");
        tokio::time::timeout(Duration::from_secs(10), read).await.unwrap_or_else(|_| Err(late()))
    }

    /// How many branches are prepared.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn in_doubt(&self) -> Result<i64> {
        let row = self.client().await?.query_one("SELECT count(*) FROM pg_prepared_xacts", &[]).await;
        Ok(row.map_err(down)?.get(0))
    }
}

fn down(error: tokio_postgres::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "read", "the database does not answer").because(error)
}
