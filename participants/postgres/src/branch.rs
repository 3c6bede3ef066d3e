//! The statements of one branch.
//!
//! Promise: the row of a branch and its work stand or fall together. While a prepared transaction stands, its row can
//! neither be seen nor written by others: whoever needs to know looks for the prepared transaction as well.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use quorate_core::{
    Error, ErrorKind, Result,
    commit::{Branch, Finish, TxId, Vote},
};
use tokio_postgres::{Client, error::SqlState};

use crate::{
    LOCK_MS, Work,
    error::{NAME, refusal, told, unsure},
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
    let lost = |e: tokio_postgres::Error| told("prepare", branch, &e);
    if is_prepared(db, gid).await.map_err(lost)? {
        return Ok(Vote::Yes);
    }
    db.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = {LOCK_MS}")).await.map_err(lost)?;
    let insert = "INSERT INTO quorate_barrier (gid, state) VALUES ($1, 'prepared') ON CONFLICT DO NOTHING";
    let inserted = match db.execute(insert, &[&gid.as_str()]).await {
        Ok(inserted) => inserted,
        // Somebody else is preparing the same branch, or has done so since the look.
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            db.batch_execute("ROLLBACK").await.map_err(lost)?;
            if is_prepared(db, gid).await.map_err(lost)? {
                return Ok(Vote::Yes);
            }
            let message = "the same branch is being prepared by somebody else";
            return Err(Error::new(ErrorKind::Unavailable, "prepare", message).key(branch).on(NAME));
        }
        Err(error) => return Err(lost(error)),
    };
    if inserted == 0 {
        db.batch_execute("ROLLBACK").await.map_err(lost)?;
        return Ok(Vote::No("it is over".to_owned()));
    }
    db.batch_execute("SET LOCAL lock_timeout = DEFAULT").await.map_err(lost)?;
    let vote = match work.run(db, branch).await {
        Ok(Vote::Yes) => return seal(db, gid, branch).await,
        Ok(vote) => vote,
        Err(error) if error.code().is_some() => Vote::No(refusal(&error)),
        Err(error) => return Err(lost(error)),
    };
    db.batch_execute("ROLLBACK").await.map_err(lost)?;
    Ok(vote)
}

/// The moment from which both outcomes can be reached whatever crashes.
async fn seal(db: &Client, gid: &Gid, branch: &Branch) -> Result<Vote> {
    let Err(error) = db.batch_execute(&format!("PREPARE TRANSACTION '{}'", gid.as_str())).await else {
        return Ok(Vote::Yes);
    };
    match error.code() {
        Some(code)
            if *code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
                || *code == SqlState::CONFIGURATION_LIMIT_EXCEEDED =>
        {
            let error = Error::new(ErrorKind::Unsupported, "prepare", refusal(&error)).key(branch).on(NAME);
            Err(error.next("set max_prepared_transactions to at least the number of branches in flight"))
        }
        Some(code) if *code == SqlState::OUT_OF_MEMORY => {
            let error = Error::new(ErrorKind::Unavailable, "prepare", refusal(&error)).key(branch).on(NAME);
            Err(error.next("raise max_prepared_transactions: all of them are in use"))
        }
        // Refused, and rolled back by that: a deferred constraint, a serialization failure.
        Some(_) => Ok(Vote::No(refusal(&error))),
        None => Err(unsure("prepare", branch, &error)),
    }
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

/// `None` if a prepare of the same branch is on its way: it ends soon, or can be rolled back soon.
pub(crate) async fn abort(db: &Client, gid: &Gid, branch: &Branch) -> Result<Option<Finish>> {
    if let Err(error) = db.batch_execute(&format!("ROLLBACK PREPARED '{}'", gid.as_str())).await
        && error.code() != Some(&SqlState::UNDEFINED_OBJECT)
    {
        return Err(ending("abort", branch, &error));
    }
    // Whatever comes late finds this row.
    let lost = |e: tokio_postgres::Error| unsure("abort", branch, &e);
    db.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = {LOCK_MS}")).await.map_err(lost)?;
    let insert = "INSERT INTO quorate_barrier (gid, state) VALUES ($1, 'aborted') ON CONFLICT DO NOTHING";
    match db.execute(insert, &[&gid.as_str()]).await {
        Ok(_) => db.batch_execute("COMMIT").await.map_err(lost)?,
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            db.batch_execute("ROLLBACK").await.map_err(lost)?;
            return Ok(None);
        }
        Err(error) => return Err(lost(error)),
    }
    Ok(Some(match state(db, gid).await.map_err(|e| told("abort", branch, &e))?.as_deref() {
        Some("prepared") => Finish::Diverged("it was committed before".to_owned()),
        _ => Finish::Done,
    }))
}

fn ending(operation: &'static str, branch: &Branch, error: &tokio_postgres::Error) -> Error {
    // Another connection is ending it at this moment.
    if error.code() == Some(&SqlState::OBJECT_IN_USE) {
        return Error::new(ErrorKind::Unavailable, operation, refusal(error)).key(branch).on(NAME);
    }
    unsure(operation, branch, error)
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
