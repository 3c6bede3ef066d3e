//! Reading keys, and transactions.
//!
//! Promise: reads are linearizable; a transaction is one etcd transaction and one round trip.

use std::collections::HashSet;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn as Request, TxnOp, TxnOpResponse, TxnResponse};
use quorate_core::{Check, Commit, Error, KeyRange, Result, Revision, Snapshot, Txn, Write};

use crate::{
    BACKEND, Inner,
    error::Call,
    path::lease_number,
    watch::{entry, revision},
};

/// What etcd accepts by default (`--max-txn-ops`) as checks, as writes, and as reads of the other branch; so
/// never too many together.
pub(crate) const MAX_TXN: usize = 128;
/// Below etcd's default limit of 1.5 MiB for a request (`--max-request-bytes`).
pub(crate) const MAX_VALUE: usize = 1024 * 1024;

const COMMIT: &str = "commit";

impl Inner {
    /// The keys of a range.
    pub(crate) async fn read_range(&self, call: Call, range: &KeyRange) -> Result<Snapshot> {
        let stored = self.layout.range(range);
        let mut options = GetOptions::new();
        if stored.prefix {
            options = options.with_prefix();
        }
        let got = self.pool.call(call, |c| {
            let mut kv = c.kv.clone();
            async move { kv.get(stored.start, Some(options)).await }
        });
        let mut got = got.await.map_err(|error| error.key(range))?;
        let now = got.header().map_or(0, etcd_client::ResponseHeader::revision);
        let mut entries = Vec::with_capacity(got.kvs().len());
        for kv in got.take_kvs() {
            match entry(self, call, range, kv) {
                Ok(entry) => entries.push(entry),
                // One stray key of another client must not make the rest unreadable.
                Err(error) => tracing::warn!(%error, "key skipped"),
            }
        }
        Ok(Snapshot { entries, revision: revision(now) })
    }
}

/// Applies a transaction.
pub(crate) async fn commit(inner: &Inner, txn: &Txn) -> Result<Commit> {
    let paths = validate(inner, txn)?;
    let call = Call { verb: COMMIT, writes: !txn.writes.is_empty() };
    let outcome = match (txn.checks.as_slice(), txn.writes.as_slice()) {
        ([], [write]) => single(inner, call, write, paths).await,
        _ => general(inner, call, txn, paths).await,
    };
    outcome.map_err(|error| error.key(txn))
}

/// Checks what can never work, and returns the stored keys of the writes.
fn validate(inner: &Inner, txn: &Txn) -> Result<Vec<Vec<u8>>> {
    let refuse = |message: String| Err(Error::invalid(COMMIT, message).key(txn).on(BACKEND));
    let count = txn.checks.len() + txn.writes.len();
    if count > MAX_TXN {
        return refuse(format!("{count} checks and writes, at most {MAX_TXN} are allowed"));
    }
    let mut paths = Vec::with_capacity(txn.writes.len());
    for write in &txn.writes {
        paths.push(match write {
            Write::Put { key, value, .. } => {
                if value.len() > MAX_VALUE {
                    return refuse(format!("the value has {} bytes, at most {MAX_VALUE} are allowed", value.len()));
                }
                inner.layout.key(key)
            }
            Write::Delete(key) => inner.layout.key(key),
            Write::Leave(ticket) => inner.layout.ticket(ticket),
        });
    }
    if paths.len() > 1 && paths.iter().collect::<HashSet<_>>().len() < paths.len() {
        return refuse("a key is written twice".to_owned());
    }
    Ok(paths)
}

fn put_options(lease: Option<&quorate_core::LeaseId>) -> Result<PutOptions> {
    let lease = lease.map(|lease| lease_number(COMMIT, lease)).transpose()?;
    // 0 is no lease.
    Ok(PutOptions::new().with_lease(lease.unwrap_or(0)))
}

/// One write without a condition: no transaction needed.
async fn single(inner: &Inner, call: Call, write: &Write, paths: Vec<Vec<u8>>) -> Result<Commit> {
    let path = paths.into_iter().next().unwrap_or_default();
    let header = match write {
        Write::Put { value, lease, .. } => {
            let options = put_options(lease.as_ref())?;
            let value = value.to_vec();
            let put = inner.pool.call(call, |c| {
                let mut kv = c.kv.clone();
                async move { kv.put(path, value, Some(options)).await }
            });
            put.await?.take_header()
        }
        Write::Delete(_) | Write::Leave(_) => {
            if let Write::Leave(_) = write {
                inner.tokens.forget(&path);
            }
            let delete = inner.pool.call(call, |c| {
                let mut kv = c.kv.clone();
                async move { kv.delete(path, None).await }
            });
            delete.await?.take_header()
        }
    };
    Ok(Commit { applied: true, revision: revision(header.map_or(0, |h| h.revision())), culprit: None })
}

async fn general(inner: &Inner, call: Call, txn: &Txn, paths: Vec<Vec<u8>>) -> Result<Commit> {
    let mut compares = Vec::with_capacity(txn.checks.len());
    let mut otherwise = Vec::new();
    for check in &txn.checks {
        let (path, compare) = compare(inner, check);
        compares.push(compare);
        // With one check there is no question which one did not hold.
        if txn.checks.len() > 1 {
            otherwise.push(TxnOp::get(path, Some(GetOptions::new().with_keys_only())));
        }
    }
    let mut writes = Vec::with_capacity(paths.len());
    for (write, path) in txn.writes.iter().zip(paths) {
        writes.push(match write {
            Write::Put { value, lease, .. } => TxnOp::put(path, value.to_vec(), Some(put_options(lease.as_ref())?)),
            Write::Delete(_) => TxnOp::delete(path, None),
            Write::Leave(_) => {
                inner.tokens.forget(&path);
                TxnOp::delete(path, None)
            }
        });
    }
    let request = Request::new().when(compares).and_then(writes).or_else(otherwise);
    let answer = inner.pool.call(call, |c| {
        let mut kv = c.kv.clone();
        async move { kv.txn(request).await }
    });
    let answer = answer.await?;
    let now = revision(answer.header().map_or(0, etcd_client::ResponseHeader::revision));
    let culprit = if answer.succeeded() { None } else { Some(culprit(&txn.checks, &answer)) };
    Ok(Commit { applied: answer.succeeded(), revision: now, culprit })
}

/// The revisions at which a key was created and last written; 0 for a key that is not there.
type Revisions = (i64, i64);

fn number(revision: Revision) -> i64 {
    // A number that etcd never gave matches no key.
    i64::try_from(revision.0).unwrap_or(-1)
}

fn compare(inner: &Inner, check: &Check) -> (Vec<u8>, Compare) {
    match check {
        Check::Absent(key) => {
            let path = inner.layout.key(key);
            (path.clone(), Compare::create_revision(path, CompareOp::Equal, 0))
        }
        Check::Unchanged { key, modified } => {
            let path = inner.layout.key(key);
            // 0 would hold for a key that is not there.
            let modified = Some(number(*modified)).filter(|m| *m > 0).unwrap_or(-1);
            (path.clone(), Compare::mod_revision(path, CompareOp::Equal, modified))
        }
        Check::Standing { ticket, token } => {
            let path = inner.layout.ticket(ticket);
            let token = Some(number(*token)).filter(|t| *t > 0).unwrap_or(-1);
            (path.clone(), Compare::create_revision(path, CompareOp::Equal, token))
        }
    }
}

fn holds(check: &Check, (created, modified): Revisions) -> bool {
    match check {
        Check::Absent(_) => created == 0,
        Check::Unchanged { modified: expected, .. } => created != 0 && modified == number(*expected),
        Check::Standing { token, .. } => created != 0 && created == number(*token),
    }
}

/// The first check that did not hold, by what the other branch has read.
fn culprit(checks: &[Check], answer: &TxnResponse) -> usize {
    let found = answer.op_responses().into_iter().map(|response| match response {
        TxnOpResponse::Get(got) => got.kvs().first().map_or((0, 0), |kv| (kv.create_revision(), kv.mod_revision())),
        _ => (0, 0),
    });
    checks.iter().zip(found).position(|(check, found)| !holds(check, found)).unwrap_or(0)
}
