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
//! All processes must use the same role, since a prepared transaction can be ended by the role that made it only, or by a
//! superuser; the same database; and a `search_path` that leads to the same table. Tested on PostgreSQL 15.
//!
//! # In the database
//! Prepared transactions are named `quorate:<group>:<id>:<participant>`, percent-encoded, 199 bytes at the most. The table
//! `quorate_barrier` has a row for each branch, written in the transaction of its work, or by an abort that found nothing: it
//! tells a branch that was committed from one that never was, and refuses what comes late. See [`Postgres::install`].
//! The role needs the rights to select, insert, update and delete there.
//!
//! While a session prepares, its `application_name` is `quorate:<id>`. An abort that meets such a session waits half a
//! second, and then ends it: the process behind it may be stopped, and would keep its locks for as long.
//!
//! # What it costs
//! Three round trips beside those of the work to prepare, one to commit, three to abort, and a row per branch: see
//! `examples/cost.rs`. A prepare that meets its own branch already prepared waits a tenth of a second first.
//!
//! # By hand, or by a failover
//! What an operator does behind quorate's back is told as [`Finish::Diverged`]: `ROLLBACK PREPARED` when a commit finds
//! neither the prepared transaction nor its row; `COMMIT PREPARED` when an abort finds the row. A failover to a replica that
//! had not received a prepared transaction yet is told like the former: where votes must survive that, replicate
//! synchronously.

mod branch;
mod error;

use std::{fmt, sync::Arc, time::Duration};

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use quorate_core::{
    Error, ErrorKind, Result,
    commit::{Branch, Finish, Participant, TxId, Vote},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_postgres::config::SslMode;

pub use async_trait::async_trait;
pub use deadpool_postgres;
pub use tokio_postgres;

use crate::{branch::Gid, error::told};

/// What a branch does in the database.
#[async_trait]
pub trait Work: fmt::Debug + Send + Sync + 'static {
    /// Does it, within the open transaction of `db`, and votes. It must neither commit nor roll back, except to a
    /// savepoint of its own, and may be called again for the same branch after a failure: whatever it has done before was
    /// rolled back. Settings are for `SET LOCAL`: the session serves other branches afterwards. The isolation level is the
    /// default of the connection, such as `?options=-c%20default_transaction_isolation=serializable` in the URL.
    ///
    /// Locks are waited for as long as `lock_timeout` says. Two branches that wait for each other in two databases are
    /// no deadlock that either of them can see: only the time limit for votes, or a `lock_timeout`, ends it.
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
    /// Fewer than there are connections: prepares that wait for locks must not keep the outcome of those who hold them
    /// from being told.
    prepares: Arc<Semaphore>,
    work: Arc<dyn Work>,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Postgres({}, {:?})", self.name, self.work)
    }
}

/// How many connections `connect` opens.
const CONNECTIONS: usize = 8;
/// How long to wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a server may leave what was sent unacknowledged before the connection counts as lost.
const UNHEARD: Duration = Duration::from_secs(10);
/// How long a call waits for another one of the same branch, before it looks whether that stands prepared by now.
const LOOK_MS: u32 = 100;
/// After so many looks a prepare gives up, and an abort ends the session that prepares.
const PATIENCE: usize = 5;
/// After so many looks an abort says that it cannot.
const LOOKS: usize = 100;

impl Postgres {
    /// A participant over a pool of connections, which brings TLS and limits with it:
    ///
    /// ```no_run
    /// # use std::{sync::Arc, time::Duration};
    /// # use quorate_postgres::{Postgres, Work};
    /// use quorate_postgres::{deadpool_postgres::{Manager, Pool, Runtime}, tokio_postgres};
    /// use tokio_postgres_rustls::MakeRustlsConnect;
    ///
    /// # fn show(work: Arc<dyn Work>, tls: rustls::ClientConfig) -> Result<(), Box<dyn std::error::Error>> {
    /// let config: tokio_postgres::Config = "postgresql://app@db.internal/bank?sslmode=require".parse()?;
    /// let limit = Some(Duration::from_secs(5));
    /// let pool = Pool::builder(Manager::new(config, MakeRustlsConnect::new(tls)))
    ///     .max_size(8)
    ///     .runtime(Runtime::Tokio1)
    ///     .wait_timeout(limit)
    ///     .create_timeout(limit)
    ///     .build()?;
    /// let ledger = Postgres::new("ledger", pool, work);
    /// # Ok(()) }
    /// ```
    ///
    /// `name` is the name under which it is enlisted. A quarter of the connections, at least one, is kept for outcomes; so
    /// the pool should have two or more.
    pub fn new(name: &str, pool: Pool, work: Arc<dyn Work>) -> Self {
        let connections = pool.status().max_size;
        let prepares = connections.saturating_sub((connections / 4).max(1)).max(1);
        Self { name: name.into(), pool, prepares: Arc::new(Semaphore::new(prepares)), work }
    }

    /// A participant over at most eight connections without TLS, opened when they are needed. For TLS, make a pool and use
    /// [`new`](Self::new).
    ///
    /// # Errors
    /// `InvalidInput` for a malformed URL, or one that demands TLS.
    pub fn connect(name: &str, url: &str, work: Arc<dyn Work>) -> Result<Self> {
        // The text of the error could repeat a part of the URL, which may hold a password.
        let mut config: tokio_postgres::Config =
            url.parse().map_err(|_| Error::invalid("connect", "not the URL of a PostgreSQL server"))?;
        if config.get_ssl_mode() == SslMode::Require {
            let error = Error::invalid("connect", "the URL demands TLS, which these connections do not have");
            return Err(error.on(error::NAME).next("make a pool with TLS and give it to Postgres::new"));
        }
        if config.get_tcp_user_timeout().is_none() {
            // Otherwise the kernel goes on sending to a server that has vanished for a quarter of an hour.
            config.tcp_user_timeout(UNHEARD);
        }
        let recycling_method = RecyclingMethod::Fast;
        let manager = Manager::from_config(config, tokio_postgres::NoTls, ManagerConfig { recycling_method });
        let builder = Pool::builder(manager).max_size(CONNECTIONS).runtime(Runtime::Tokio1);
        let pool = builder.wait_timeout(Some(CONNECT)).create_timeout(Some(CONNECT)).build();
        let pool = pool.map_err(|_| Error::invalid("connect", "a pool of connections cannot be built"))?;
        Ok(Self::new(name, pool, work))
    }

    /// Creates the table of branches, if it is not there:
    ///
    /// ```sql
    /// CREATE TABLE IF NOT EXISTS quorate_barrier (
    ///     gid text PRIMARY KEY, state text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ///     seen timestamptz)
    /// ```
    ///
    /// `at` is when the branch was prepared, or aborted unprepared; `seen` is when [`tidy`](Self::tidy) first found the row.
    ///
    /// # Errors
    /// `Denied` without the right to create tables; `Unavailable` if the database cannot be reached.
    ///
    /// # Cancel safety
    /// It may be repeated.
    pub async fn install(&self) -> Result<()> {
        let sql = "CREATE TABLE IF NOT EXISTS quorate_barrier (gid text PRIMARY KEY, state text NOT NULL, \
                   at timestamptz NOT NULL DEFAULT clock_timestamp(), seen timestamptz)";
        let db = self.db("install").await?;
        let installed = db.batch_execute(sql).await;
        // Two that create it at the same time: one of them finds the name taken.
        match installed {
            Err(error) if error.code().is_some_and(error::exists_already) => db.done(Ok(())),
            other => db.done(other.map_err(|e| told("install", &self.name, &e))),
        }
    }

    /// Deletes rows of branches that ended at least this long ago, by the database's clock; returns how many. To be called
    /// from time to time, from anywhere: the first call that finds a row marks it, a later one deletes it.
    ///
    /// A row is needed for as long as a message about its branch may still come: a prepare of a process that was stopped,
    /// or an outcome that is told again. A day is far more than enough. Without it, a commit that is told again is answered
    /// with [`Finish::Diverged`], although all is well; and a late prepare does its work again, and keeps its locks until a
    /// recoverer takes it back.
    ///
    /// # Errors
    /// `Unavailable` if the database cannot be reached.
    ///
    /// # Cancel safety
    /// Some rows may have been deleted.
    pub async fn tidy(&self, older_than: Duration) -> Result<u64> {
        let db = self.db("tidy").await?;
        // Not by `at`: a branch may have been in doubt for long, and its row can be seen only since its commit.
        let mark = "UPDATE quorate_barrier SET seen = clock_timestamp() WHERE seen IS NULL";
        let delete = "DELETE FROM quorate_barrier WHERE seen < clock_timestamp() - make_interval(secs => $1)";
        let deleted = match db.batch_execute(mark).await {
            Ok(()) => db.execute(delete, &[&older_than.as_secs_f64()]).await,
            Err(error) => Err(error),
        };
        db.done(deleted.map_err(|e| told("tidy", &self.name, &e)))
    }

    async fn db(&self, operation: &'static str) -> Result<Connection> {
        let client = self.pool.get().await.map_err(|e| error::no_connection(operation, &self.name, &e))?;
        Ok(Connection { client: Some(client), turn: None })
    }

    /// A connection for work that may wait for locks.
    async fn db_for_work(&self) -> Result<Connection> {
        let late = |_| {
            let message = "no connection in time: all that may prepare are in use";
            Error::new(ErrorKind::Unavailable, "prepare", message).key(&self.name).on(error::NAME)
        };
        let turn = timeout(CONNECT, self.prepares.clone().acquire_owned()).await.map_err(late)?;
        let turn = turn.expect("it is never closed");
        let mut connection = self.db("prepare").await?;
        connection.turn = Some(turn);
        Ok(connection)
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
struct Connection {
    client: Option<Object>,
    /// Kept for as long as the connection.
    turn: Option<OwnedSemaphorePermit>,
}

impl std::ops::Deref for Connection {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &Self::Target {
        self.client.as_ref().expect("taken only when it is given back")
    }
}

impl Connection {
    /// Gives it back for others to use, if all is well with it.
    fn done<T>(mut self, outcome: Result<T>) -> Result<T> {
        if outcome.is_ok() {
            drop(self.client.take());
        }
        outcome
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
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
        let db = self.db_for_work().await?;
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
        for look in 1..=LOOKS {
            let db = self.db("abort").await?;
            let finish = branch::abort(&db, &gid, branch).await;
            if matches!(finish, Ok(None)) && look % PATIENCE == 0 {
                branch::break_off(&db, branch).await;
            }
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
