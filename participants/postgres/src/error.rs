//! What the database says, as errors of quorate.
//!
//! Promise: no text of the server is repeated, because it may hold values of rows; its code is.

use std::{error::Error as _, io};

use deadpool_postgres::PoolError;
use quorate_core::{Error, ErrorKind};
use tokio_postgres::error::{Severity, SqlState};

pub(crate) const NAME: &str = "postgresql";

/// A call that is not a write, or whose statement was answered.
pub(crate) fn told(
    operation: &'static str,
    subject: &(dyn std::fmt::Display + Sync),
    error: &tokio_postgres::Error,
) -> Error {
    let (kind, message) = match error.code() {
        Some(code) if *code == SqlState::INSUFFICIENT_PRIVILEGE => (ErrorKind::Denied, refusal(error)),
        Some(code) if *code == SqlState::UNDEFINED_TABLE => {
            let error = Error::new(ErrorKind::Backend, operation, "the table quorate_barrier does not exist");
            return error.key(subject).on(NAME).next("create it, by Postgres::install or by hand");
        }
        Some(_) => (ErrorKind::Backend, refusal(error)),
        None if error.is_closed() || io_error(error).is_some() => {
            (ErrorKind::Unavailable, "the connection was lost".to_owned())
        }
        // The client's own text: a parameter of the wrong type, a column that is not there. It repeats no values.
        None => (ErrorKind::Backend, error.to_string()),
    };
    Error::new(kind, operation, message).key(subject).on(NAME)
}

fn io_error(error: &tokio_postgres::Error) -> Option<&io::Error> {
    error.source()?.downcast_ref()
}

/// Whether a lock was not to be had in time, or the row was written by somebody else since the statement began.
pub(crate) fn is_contention(code: &SqlState) -> bool {
    [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_SERIALIZATION_FAILURE].contains(code)
}

/// Whether the session or the server ended with this error: what it was doing may have been done.
pub(crate) fn is_fatal(error: &tokio_postgres::Error) -> bool {
    let severity = error.as_db_error().and_then(|db| db.parsed_severity());
    matches!(severity, Some(Severity::Fatal | Severity::Panic))
}

/// A statement that changes something: without an answer it may have been carried out.
pub(crate) fn unsure(
    operation: &'static str,
    subject: &(dyn std::fmt::Display + Sync),
    error: &tokio_postgres::Error,
) -> Error {
    let told = told(operation, subject, error);
    if error.code().is_none() || is_fatal(error) { told.with_kind(ErrorKind::Ambiguous) } else { told }
}

/// By code, and by the name of a constraint; without values.
pub(crate) fn refusal(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else { return "the connection was lost".to_owned() };
    let constraint = db.constraint().map(|name| format!(" (constraint {name})")).unwrap_or_default();
    format!("refused by the database with SQLSTATE {}{constraint}", db.code().code())
}

pub(crate) fn no_connection(operation: &'static str, subject: &str, error: &PoolError) -> Error {
    let (kind, message) = match error {
        PoolError::Backend(error) => match error.code() {
            Some(code) if code.code().starts_with("28") => (ErrorKind::Denied, refusal(error)),
            Some(_) => (ErrorKind::Unavailable, refusal(error)),
            None => {
                let cause = io_error(error).map(|io| format!(" ({io})")).unwrap_or_default();
                (ErrorKind::Unavailable, format!("no connection: {error}{cause}"))
            }
        },
        PoolError::Timeout(_) => (ErrorKind::Unavailable, "no connection in time".to_owned()),
        _ => (ErrorKind::Unavailable, "no connection".to_owned()),
    };
    Error::new(kind, operation, message).key(subject).on(NAME)
}

/// What a second `CREATE … IF NOT EXISTS` at the same moment meets.
pub(crate) fn exists_already(code: &SqlState) -> bool {
    [SqlState::UNIQUE_VIOLATION, SqlState::DUPLICATE_TABLE, SqlState::DUPLICATE_OBJECT].contains(code)
}
