//! PostgreSQL as a participant of quorate's atomic commit.
//!
//! Promise: a branch is one transaction of the database. Its work is done and prepared with `PREPARE TRANSACTION` before
//! it votes yes, and takes effect with the outcome or not at all, whoever crashes: this process, the driver, or the server.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use quorate_core::{Coordinator, commit::{Branch, Vote}};
//! use quorate_postgres::{Postgres, Work, tokio_postgres};
//!
//! #[derive(Debug)]
//! struct Debit;
//!
//! #[quorate_postgres::async_trait]
//! impl Work for Debit {
//!     async fn run(&self, db: &tokio_postgres::Client, branch: &Branch) -> Result<Vote, tokio_postgres::Error> {
//!         let account = std::str::from_utf8(&branch.body).unwrap_or_default();
//!         let changed = db
//!             .execute("UPDATE account SET balance = balance - 30 WHERE id = $1 AND balance >= 30", &[&account])
//!             .await?;
//!         Ok(if changed == 1 { Vote::Yes } else { Vote::No("not enough money".to_owned()) })
//!     }
//! }
//!
//! # async fn show(coord: Coordinator) -> quorate_core::Result<()> {
//! let ledger = Postgres::connect("ledger", "postgresql://app@db.internal/bank", Arc::new(Debit))?;
//! ledger.install().await?;
//! let payments = coord.transactions("payments")?;
//! payments.enlist("ledger", Arc::new(ledger))?;
//! # Ok(()) }
//! ```
//!
//! # The server
//! `max_prepared_transactions` must be greater than zero; it is zero by default. A prepared transaction holds its locks
//! until its outcome is told: run a [`Recoverer`](quorate_core::commit::Recoverer) wherever this participant is enlisted.
//!
//! # In the database
//! Prepared transactions are named `quorate:<group>:<id>:<participant>`, percent-encoded, 200 bytes at the most. The table
//! `quorate_barrier` has a row for each branch, written in the transaction of its work, or by an abort that found nothing: it
//! tells a branch that was committed from one that never was, and refuses what comes late. See [`Postgres::install`].

mod branch;
mod error;

use std::{fmt, sync::Arc, time::Duration};

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use quorate_core::{
    Error, ErrorKind, Result,
    commit::{Branch, Finish, Participant, TxId, Vote},
};

pub use async_trait::async_trait;
pub use deadpool_postgres;
pub use tokio_postgres;

use crate::{branch::Gid, error::told};

/// What a branch does in the database.
#[async_trait]
pub trait Work: fmt::Debug + Send + Sync + 'static {
    /// Does it, within the open transaction of `db`, and votes. It must neither commit nor roll back, and may be called
    /// again for the same branch after a failure: whatever it has done before was rolled back.
    ///
    /// [`Vote::ReadOnly`] and [`Vote::No`] roll back.
    ///
    /// # Errors
    /// A refusal of the database, such as a broken constraint or a deadlock, is a vote against the transaction.
    async fn run(&self, db: &tokio_postgres::Client, branch: &Branch) -> Result<Vote, tokio_postgres::Error>;
}

/// A database as a participant. Cheap to clone; all clones share the connections.
#[derive(Clone)]
pub struct Postgres {
    name: Arc<str>,
    pool: Pool,
    work: Arc<dyn Work>,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Postgres({}, {:?})", self.name, self.work)
    }
}

/// How long to wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a statement of ours waits for a lock, before it looks again who holds it.
const LOCK_MS: u32 = 500;
/// How often an abort that meets a prepare on its way looks again.
const ATTEMPTS: usize = 20;

impl Postgres {
    /// A participant over a pool of connections, which brings TLS and limits with it.
    ///
    /// `name` is the name under which it is enlisted.
    pub fn new(name: &str, pool: Pool, work: Arc<dyn Work>) -> Self {
        Self { name: name.into(), pool, work }
    }

    /// A participant over at most eight connections without TLS, opened when they are needed. For TLS, make a pool and use
    /// [`new`](Self::new).
    ///
    /// # Errors
    /// `InvalidInput` for a malformed URL.
    pub fn connect(name: &str, url: &str, work: Arc<dyn Work>) -> Result<Self> {
        // The text of the error could repeat a part of the URL, which may hold a password.
        let config: tokio_postgres::Config =
            url.parse().map_err(|_| Error::invalid("connect", "not the URL of a PostgreSQL server"))?;
        let recycling_method = RecyclingMethod::Fast;
        let manager = Manager::from_config(config, tokio_postgres::NoTls, ManagerConfig { recycling_method });
        let builder = Pool::builder(manager).max_size(8).runtime(Runtime::Tokio1);
        let pool = builder.wait_timeout(Some(CONNECT)).create_timeout(Some(CONNECT)).build();
        let pool = pool.map_err(|_| Error::invalid("connect", "a pool of connections cannot be built"))?;
        Ok(Self::new(name, pool, work))
    }

    /// Creates the table of branches, if it is not there:
    ///
    /// ```sql
    /// CREATE TABLE IF NOT EXISTS quorate_barrier (
    ///     gid text PRIMARY KEY, state text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp())
    /// ```
    ///
    /// # Errors
    /// `Denied` without the right to create tables; `Unavailable` if the database cannot be reached.
    ///
    /// # Cancel safety
    /// It may be repeated.
    pub async fn install(&self) -> Result<()> {
        let sql = "CREATE TABLE IF NOT EXISTS quorate_barrier (gid text PRIMARY KEY, state text NOT NULL, \
                   at timestamptz NOT NULL DEFAULT clock_timestamp())";
        let db = self.db("install").await?;
        let installed = db.batch_execute(sql).await;
        // Two that create it at the same time: one of them finds the name taken.
        match installed {
            Err(error) if error.code().is_some_and(error::exists_already) => db.done(Ok(())),
            other => db.done(other.map_err(|e| told("install", &self.name, &e))),
        }
    }

    /// Deletes rows of branches that were written longer ago than this, by the database's clock; returns how many.
    ///
    /// A row is needed for as long as a message about its branch may still come: a prepare of a process that was stopped,
    /// or an outcome that is told again. A day is far more than enough.
    ///
    /// # Errors
    /// `Unavailable` if the database cannot be reached.
    ///
    /// # Cancel safety
    /// Some rows may have been deleted.
    pub async fn tidy(&self, older_than: Duration) -> Result<u64> {
        let db = self.db("tidy").await?;
        let sql = "DELETE FROM quorate_barrier WHERE at < clock_timestamp() - make_interval(secs => $1)";
        let deleted = db.execute(sql, &[&older_than.as_secs_f64()]).await;
        db.done(deleted.map_err(|e| told("tidy", &self.name, &e)))
    }

    async fn db(&self, operation: &'static str) -> Result<Connection> {
        let client = self.pool.get().await.map_err(|e| error::no_connection(operation, &self.name, &e))?;
        Ok(Connection(Some(client)))
    }

    fn gid(&self, branch: &Branch) -> Result<Gid> {
        if *branch.participant != *self.name {
            let message = format!("it is enlisted as {:?}, and calls itself {:?}", branch.participant, self.name);
            return Err(Error::invalid("prepare", message).key(branch).on(error::NAME));
        }
        Gid::of(branch)
    }
}

/// A connection of the pool. Dropped before [`done`](Self::done), it is closed: a transaction that was left half-way must not
/// go on holding its locks.
struct Connection(Option<Object>);

impl std::ops::Deref for Connection {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().expect("taken only when it is given back")
    }
}

impl Connection {
    /// Gives it back for others to use, if all is well with it.
    fn done<T>(mut self, outcome: Result<T>) -> Result<T> {
        if outcome.is_ok() {
            drop(self.0.take());
        }
        outcome
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(client) = self.0.take() {
            drop(Object::take(client));
        }
    }
}

#[async_trait]
impl Participant for Postgres {
    /// # Cancel safety
    /// Dropped, the connection is closed, and the server rolls back what was not prepared; a prepare that was sent may still
    /// arrive, and is refused after an abort.
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        let gid = self.gid(branch)?;
        let db = self.db("prepare").await?;
        let vote = branch::prepare(&db, &gid, branch, &*self.work).await;
        db.done(vote)
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        let gid = self.gid(branch)?;
        let db = self.db("commit").await?;
        let finish = branch::commit(&db, &gid, branch).await;
        db.done(finish)
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        let gid = self.gid(branch)?;
        for _ in 0..ATTEMPTS {
            let db = self.db("abort").await?;
            let finish = branch::abort(&db, &gid, branch).await;
            if let Some(finish) = db.done(finish)? {
                return Ok(finish);
            }
        }
        let message = "a prepare of the same branch is under way, and neither ends nor can be rolled back";
        Err(Error::new(ErrorKind::Unavailable, "abort", message).key(branch).on(error::NAME))
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        let db = self.db("in doubt").await?;
        let listed = branch::prepared(&db, group, &self.name).await;
        db.done(listed)
    }
}
