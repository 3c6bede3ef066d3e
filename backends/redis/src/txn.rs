//! Transactions: one script, one round trip, all or nothing.
//!
//! Promise: what can never be applied is refused before anything is sent.

use std::collections::HashSet;

use quorate_core::{Check, Commit, Error, ErrorKind, Key, LeaseId, Result, Revision, Txn, Write};
use redis::{RedisResult, Value};

use crate::{
    error::{Effect, NAME, unexpected},
    lease::ended,
    line::field,
    link::Server,
    script::{COMMIT, Call, Parts, RELEASE, malformed},
};

/// Larger ones hold up everybody else on a server that runs one command at a time.
pub(crate) const MAX_VALUE: usize = 1024 * 1024;
pub(crate) const MAX_TXN: usize = 64;

enum Outcome {
    Done(Commit),
    LeaseEnded(String),
}

pub(crate) async fn commit(server: &Server, txn: &Txn) -> Result<Commit> {
    check(txn)?;
    let commit = send(server, txn).await?;
    if commit.applied {
        server.departed.note(txn);
    }
    Ok(commit)
}

pub(crate) async fn send(server: &Server, txn: &Txn) -> Result<Commit> {
    let call = request(server, txn);
    // Also a transaction without writes ends leases whose time has passed, but nothing of the caller's.
    let effect = if txn.writes.is_empty() { Effect::Reads } else { Effect::Writes };
    let value = server.call("commit", effect, &call).await.map_err(|e| e.key(txn))?;
    match answer(value).map_err(|e| unexpected("commit", &e).key(txn))? {
        Outcome::Done(commit) => {
            server.connector.saw(commit.revision);
            Ok(commit)
        }
        Outcome::LeaseEnded(lease) => Err(ended("commit", &LeaseId::new(lease))),
    }
}

fn check(txn: &Txn) -> Result<()> {
    let size = txn.checks.len() + txn.writes.len();
    if size > MAX_TXN {
        return Err(bad(format!("{size} checks and writes, at most {MAX_TXN} are allowed")));
    }
    let mut written: HashSet<(bool, &str, &str)> = HashSet::with_capacity(txn.writes.len());
    for write in &txn.writes {
        let (target, shown): (_, &dyn std::fmt::Display) = match write {
            Write::Put { key, value, .. } => {
                if value.len() > MAX_VALUE {
                    return Err(too_long("commit", value.len()).key(key));
                }
                ((true, key.dir().as_str(), key.encoded()), key)
            }
            Write::Delete(key) => ((true, key.dir().as_str(), key.encoded()), key),
            Write::Leave(ticket) => ((false, ticket.line.as_str(), &*ticket.name), ticket),
        };
        if !written.insert(target) {
            return Err(bad("it is written twice in one transaction").key(shown));
        }
    }
    Ok(())
}

fn request(server: &Server, txn: &Txn) -> Call {
    // Every release of a lock is this one, so it has a script of its own that does half as much.
    if let ([Check::Standing { ticket, token }], [Write::Leave(left)]) = (&*txn.checks, &*txn.writes)
        && ticket == left
    {
        return Call::new(&RELEASE, &server.connector.keys).arg(field(ticket).as_bytes()).arg(stamp(*token));
    }
    let puts = txn.writes.iter().any(|write| matches!(write, Write::Put { .. }));
    let deletes = txn.writes.iter().any(|write| matches!(write, Write::Delete(_)));
    let keys = match (puts, deletes) {
        (true, _) => "p",
        (false, true) => "k",
        (false, false) => "",
    };
    let mut call = Call::new(&COMMIT, &server.connector.keys).arg(keys).arg(txn.checks.len().to_string());
    for check in &txn.checks {
        match check {
            Check::Absent(key) => call = call.arg("a").arg(path(key)),
            Check::Unchanged { key, modified } => call = call.arg("u").arg(path(key)).arg(stamp(*modified)),
            Check::Standing { ticket, token } => call = call.arg("s").arg(field(ticket).as_bytes()).arg(stamp(*token)),
        }
    }
    for write in &txn.writes {
        match write {
            Write::Put { key, value, lease } => {
                call = call.arg("p").arg(path(key)).arg(value).arg(lease.as_ref().map_or("", LeaseId::as_str));
            }
            Write::Delete(key) => call = call.arg("d").arg(path(key)),
            Write::Leave(ticket) => call = call.arg("l").arg(field(ticket).as_bytes()),
        }
    }
    call
}

fn answer(value: Value) -> RedisResult<Outcome> {
    let mut parts = Parts::of(value)?;
    let outcome = parts.int()?;
    if outcome < 0 {
        return parts.text().map(Outcome::LeaseEnded);
    }
    let revision = Revision(parts.number()?);
    let culprit = match outcome {
        0 => Some(usize::try_from(parts.int()?).map_err(|_| malformed("a negative place"))?),
        _ => None,
    };
    Ok(Outcome::Done(Commit { applied: outcome > 0, revision, culprit }))
}

fn path(key: &Key) -> String {
    format!("{}\n{}", key.dir().as_str(), key.encoded())
}

/// Revisions are compared as texts of 16 digits.
fn stamp(revision: Revision) -> String {
    format!("{:016}", revision.0)
}

pub(crate) fn too_long(operation: &'static str, len: usize) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        operation,
        format!("the value has {len} bytes, at most {MAX_VALUE} are allowed"),
    )
    .on(NAME)
}

fn bad(message: impl Into<String>) -> Error {
    Error::invalid("commit", message).on(NAME)
}
