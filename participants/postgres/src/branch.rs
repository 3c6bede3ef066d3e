//! The statements of one branch.
//!
//! Promise: the row of a branch and its work stand or fall together. While a prepared transaction stands, its row can
//! neither be seen nor written by others: whoever needs to know looks for the prepared transaction as well.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use quorate_core::{
    Error, ErrorKind, Result,
    commit::{Branch, Finish, TxId, Vote},
};
use tokio_postgres::{Client, SimpleQueryMessage, error::SqlState};

use crate::{
    LOOK_MS, PATIENCE, Work,
    error::{NAME, is_contention, is_fatal, refusal, told, unsure},
};

/// The longest name of a prepared transaction, in bytes.
const LONGEST: usize = 199;

/// Everything but letters, digits and a few signs that mean nothing to anybody.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// The name of a branch in the database.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Gid(String);

impl Gid {
    /// # Errors
    /// `InvalidInput` if group and participant have too long names.
    pub(crate) fn of(branch: &Branch) -> Result<Self> {
        let participant = utf8_percent_encode(&branch.participant, ENCODED);
        let gid = format!("{}{}:{participant}", prefix(&branch.group), branch.id);
        if gid.len() > LONGEST {
            let message = format!("the names of group and participant make {} bytes, at most {LONGEST} fit", gid.len());
            return Err(Error::invalid("prepare", message).key(branch).on(NAME).next("use shorter names"));
        }
        Ok(Self(gid))
    }

    /// Safe to stand between quotes: it has only letters, digits and `-_.:%`.
    fn as_str(&self) -> &str {
        &self.0
    }
}

fn prefix(group: &str) -> String {
    format!("quorate:{}:", utf8_percent_encode(group, ENCODED))
}

pub(crate) async fn prepare(db: &Client, gid: &Gid, branch: &Branch, work: &dyn Work) -> Result<Vote> {
    let transaction = match enter(db, gid, branch).await? {
        Entered::Begun(transaction) => transaction,
        Entered::Prepared => return Ok(Vote::Yes),
        Entered::Over => return Ok(Vote::No("it is over".to_owned())),
    };
    let vote = match work.run(db, branch).await {
        Ok(Vote::Yes) => match flaw(db, &transaction, branch).await? {
            None => return seal(db, gid, branch).await,
            Some(why) => Vote::No(why),
        },
        Ok(vote) => vote,
        Err(error) if error.code().is_some() => Vote::No(refusal(&error)),
        Err(error) => return Err(told("prepare", branch, &error)),
    };
    db.batch_execute("ROLLBACK").await.map_err(|e| told("prepare", branch, &e))?;
    Ok(vote)
}

/// What a prepare finds.
enum Entered {
    /// A fresh transaction, open, with this number; the branch's row is written in it.
    Begun(String),
    /// It was prepared by an earlier call.
    Prepared,
    /// It was committed or aborted.
    Over,
}

async fn enter(db: &Client, gid: &Gid, branch: &Branch) -> Result<Entered> {
    let begin = format!(
        "BEGIN; SET LOCAL lock_timeout = {LOOK_MS}; SET LOCAL application_name = '{}'; \
         INSERT INTO quorate_barrier (gid, state) VALUES ('{}', 'prepared') \
         ON CONFLICT DO NOTHING RETURNING txid_current(); SET LOCAL lock_timeout = DEFAULT",
        session_name(branch),
        gid.as_str()
    );
    let lost = |e: tokio_postgres::Error| told("prepare", branch, &e);
    for _ in 0..PATIENCE {
        let entered = match db.simple_query(&begin).await {
            Ok(answer) => Some(first(&answer)),
            // The row is written by a transaction that stands prepared, or by somebody who is at work on the same branch.
            Err(error) if error.code().is_some_and(is_contention) => None,
            Err(error) => return Err(lost(error)),
        };
        if let Some(Some(transaction)) = entered {
            return Ok(Entered::Begun(transaction));
        }
        db.batch_execute("ROLLBACK").await.map_err(lost)?;
        if entered.is_some() {
            return Ok(Entered::Over);
        }
        // Not looked for before: this is what a call costs that comes again, and not what every call costs.
        if is_prepared(db, gid).await.map_err(lost)? {
            return Ok(Entered::Prepared);
        }
    }
    let message = "the same branch is being prepared or ended by somebody else";
    Err(Error::new(ErrorKind::Unavailable, "prepare", message).key(branch).on(NAME))
}

/// Why a transaction in which the work has voted yes must not be prepared. In one that has failed, or was ended, `PREPARE
/// TRANSACTION` prepares nothing and reports no error.
async fn flaw(db: &Client, transaction: &str, branch: &Branch) -> Result<Option<String>> {
    match db.simple_query("SELECT txid_current_if_assigned()").await {
        Ok(answer) if first(&answer).as_deref() == Some(transaction) => Ok(None),
        Ok(_) => {
            let message = "the work has ended its transaction; what it did before may have taken effect";
            let error = Error::new(ErrorKind::Backend, "prepare", message).key(branch).on(NAME);
            Err(error.next("let it neither commit nor roll back"))
        }
        Err(error) if error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
            Ok(Some("a statement of the work has failed; what may fail needs a savepoint".to_owned()))
        }
        Err(error) => Err(told("prepare", branch, &error)),
    }
}

/// The moment from which both outcomes can be reached whatever crashes.
async fn seal(db: &Client, gid: &Gid, branch: &Branch) -> Result<Vote> {
    let Err(error) = db.batch_execute(&format!("PREPARE TRANSACTION '{}'", gid.as_str())).await else {
        return Ok(Vote::Yes);
    };
    let Some(code) = error.code().filter(|_| !is_fatal(&error)) else {
        return Err(unsure("prepare", branch, &error).with_kind(ErrorKind::Ambiguous));
    };
    if *code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE {
        let error = Error::new(ErrorKind::Unsupported, "prepare", refusal(&error)).key(branch).on(NAME);
        return Err(error.next("set max_prepared_transactions to at least the number of branches in flight"));
    }
    if *code == SqlState::OUT_OF_MEMORY {
        let error = Error::new(ErrorKind::Unavailable, "prepare", refusal(&error)).key(branch).on(NAME);
        return Err(error.next("raise max_prepared_transactions: all of them are in use"));
    }
    // Refused, and rolled back by that: a deferred constraint, a serialization failure.
    let mut why = refusal(&error);
    if *code == SqlState::FEATURE_NOT_SUPPORTED {
        why.push_str("; work with temporary tables, LISTEN, NOTIFY or WITH HOLD cursors cannot be prepared");
    }
    Ok(Vote::No(why))
}

pub(crate) async fn commit(db: &Client, gid: &Gid, branch: &Branch) -> Result<Finish> {
    let Err(error) = db.batch_execute(&format!("COMMIT PREPARED '{}'", gid.as_str())).await else {
        return Ok(Finish::Done);
    };
    if error.code() != Some(&SqlState::UNDEFINED_OBJECT) {
        return Err(ending("commit", branch, &error));
    }
    Ok(match state(db, gid).await.map_err(|e| told("commit", branch, &e))?.as_deref() {
        Some("prepared") => Finish::Done,
        Some(_) => Finish::Diverged("it was rolled back before".to_owned()),
        None => Finish::Diverged("it was never prepared, or was rolled back by hand".to_owned()),
    })
}

/// `None` if a prepare of the same branch is on its way.
pub(crate) async fn abort(db: &Client, gid: &Gid, branch: &Branch) -> Result<Option<Finish>> {
    if let Err(error) = db.batch_execute(&format!("ROLLBACK PREPARED '{}'", gid.as_str())).await
        && error.code() != Some(&SqlState::UNDEFINED_OBJECT)
    {
        return Err(ending("abort", branch, &error));
    }
    // Whatever comes late finds this row, also after a crash of a server that otherwise confirms commits early.
    let insert = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {LOOK_MS}; SET LOCAL synchronous_commit = on; \
         INSERT INTO quorate_barrier (gid, state) VALUES ('{}', 'aborted') ON CONFLICT DO NOTHING; COMMIT",
        gid.as_str()
    );
    match db.batch_execute(&insert).await {
        Ok(()) => {}
        Err(error) if error.code().is_some_and(is_contention) => {
            db.batch_execute("ROLLBACK").await.map_err(|e| told("abort", branch, &e))?;
            return Ok(None);
        }
        Err(error) => return Err(unsure("abort", branch, &error)),
    }
    Ok(Some(match state(db, gid).await.map_err(|e| told("abort", branch, &e))?.as_deref() {
        Some("prepared") => Finish::Diverged("it was committed before".to_owned()),
        _ => Finish::Done,
    }))
}

/// Ends the session that is still preparing a branch of this transaction: its process may have been stopped, or have given
/// up without the server noticing, and it holds locks for as long. Its answer means nothing any more. Without the right to
/// do so, nothing happens, and the abort waits.
pub(crate) async fn break_off(db: &Client, branch: &Branch) {
    // The name is that of the transaction the session is in now: one that has gone on to other work is not hit.
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 \
               AND datname = current_database() AND usename = session_user AND pid <> pg_backend_pid()";
    match db.query(sql, &[&session_name(branch)]).await {
        Ok(ended) => tracing::info!(%branch, sessions = ended.len(), "aborted while it was being prepared"),
        Err(error) => tracing::debug!(%branch, why = %refusal(&error), "its prepare cannot be ended"),
    }
}

/// What a session is called while it prepares a branch: the same for all branches of a transaction, which are aborted
/// together. At most 63 bytes are kept by the server.
fn session_name(branch: &Branch) -> String {
    format!("quorate:{}", branch.id)
}

fn ending(operation: &'static str, branch: &Branch, error: &tokio_postgres::Error) -> Error {
    // Another session is preparing or ending it at this moment.
    if error.code() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) {
        let message = "another session is preparing or ending it at this moment";
        return Error::new(ErrorKind::Unavailable, operation, message).key(branch).on(NAME);
    }
    unsure(operation, branch, error)
}

/// The first value of the first row.
fn first(answer: &[SimpleQueryMessage]) -> Option<String> {
    answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    })
}

/// What the row of a branch says: `prepared` in a row that can be seen means committed.
async fn state(db: &Client, gid: &Gid) -> Result<Option<String>, tokio_postgres::Error> {
    let row = db.query_opt("SELECT state FROM quorate_barrier WHERE gid = $1", &[&gid.as_str()]).await?;
    row.map(|row| row.try_get(0)).transpose()
}

async fn is_prepared(db: &Client, gid: &Gid) -> Result<bool, tokio_postgres::Error> {
    let sql = "SELECT 1 FROM pg_prepared_xacts WHERE gid = $1 AND database = current_database()";
    Ok(db.query_opt(sql, &[&gid.as_str()]).await?.is_some())
}

/// The transactions of a group that stand prepared under this participant's name.
pub(crate) async fn prepared(db: &Client, group: &str, participant: &str) -> Result<Vec<TxId>> {
    let prefix = prefix(group);
    let sql = "SELECT gid FROM pg_prepared_xacts WHERE starts_with(gid, $1) AND database = current_database()";
    let rows = db.query(sql, &[&prefix]).await.map_err(|e| told("in doubt", &group, &e))?;
    let id = |gid: &str| {
        let (id, name) = gid.strip_prefix(&prefix)?.split_once(':')?;
        let ours = percent_decode_str(name).decode_utf8().is_ok_and(|name| name == participant);
        ours.then(|| id.parse().ok()).flatten()
    };
    Ok(rows.iter().filter_map(|row| id(row.try_get(0).ok()?)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_apart_and_within_quotes() {
        let names = ["a", "a:b", "a'b", "a%3Ab", "é", "", " ", "a\"; DROP TABLE x; --"];
        let id = TxId::random();
        let mut seen = std::collections::HashSet::new();
        for group in names {
            for participant in names {
                let gid = Gid::of(&Branch::new(group, id, participant, "")).expect("short enough");
                let plain = gid.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:%".contains(&b));
                assert!(plain, "{gid:?}");
                assert!(seen.insert(gid.clone()), "{gid:?} stands for two");
            }
        }
        let long = Gid::of(&Branch::new(&"g".repeat(200), id, "p", ""));
        assert_eq!(long.expect_err("too long").kind(), ErrorKind::InvalidInput);
    }
}
