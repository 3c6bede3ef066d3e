//! Reading keys, and transactions.
//!
//! Promise: reads are linearizable; a transaction is one etcd transaction and one round trip.

use std::collections::HashSet;

use etcd_client::{
    Compare, CompareOp, DeleteResponse, GetOptions, PutOptions, Txn as Request, TxnOp, TxnOpResponse, TxnResponse,
};
use quorate_core::{Check, Commit, Error, KeyRange, LeaseId, Result, Revision, Snapshot, Ticket, Txn, Write};

use crate::{
    BACKEND, Inner,
    error::Call,
    path::{lease_number, named, revision, stored_key},
    reuse::StoredKey,
    watch::entry,
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

/// A write, ready to be sent.
enum Step<'a> {
    Put { path: Vec<u8>, value: &'a [u8], lease: i64 },
    Delete { path: Vec<u8> },
    Leave(Leave),
}

/// A ticket to be taken out of its line.
struct Leave {
    path: Vec<u8>,
    token: i64,
    /// Whether to delete the key whoever stands under it: a check of the transaction guards it, or a late create is
    /// to be caught.
    plainly: bool,
    /// Our own key, if it is one.
    key: Option<StoredKey>,
}

impl Leave {
    fn new(inner: &Inner, checks: &[Check], ticket: &Ticket) -> Result<Self> {
        let named = named(COMMIT, ticket)?;
        let key = stored_key(&named);
        let guarded = checks.iter().any(|check| matches!(check, Check::Standing { ticket: t, .. } if t == ticket));
        let plainly = guarded || key.as_ref().is_some_and(|key| inner.keys.in_doubt(key, named.token));
        Ok(Self { path: inner.layout.ticket(&named), token: named.token, plainly, key })
    }

    fn stands(&self) -> Compare {
        Compare::create_revision(self.path.clone(), CompareOp::Equal, self.token)
    }

    fn op(&self) -> TxnOp {
        let delete = TxnOp::delete(self.path.clone(), None);
        if self.plainly { delete } else { TxnOp::txn(Request::new().when([self.stands()]).and_then([delete])) }
    }

    /// Draws the consequence for the key.
    fn done(&self, inner: &Inner, deleted: bool) {
        match &self.key {
            Some(key) if deleted => inner.keys.left(key, self.token),
            Some(key) => inner.keys.lost(key, self.token),
            None => {}
        }
    }
}

impl Step<'_> {
    fn path(&self) -> (&[u8], Option<i64>) {
        match self {
            Self::Put { path, .. } | Self::Delete { path } => (path, None),
            // A key may be used again by another ticket.
            Self::Leave(leave) => (&leave.path, Some(leave.token)),
        }
    }
}

/// Applies a transaction.
pub(crate) async fn commit(inner: &Inner, txn: &Txn) -> Result<Commit> {
    let mut steps = prepare(inner, txn)?;
    let call = Call { verb: COMMIT, writes: !txn.writes.is_empty() };
    let outcome = match steps.pop() {
        Some(step) if steps.is_empty() && txn.checks.is_empty() => single(inner, call, step).await,
        last => {
            steps.extend(last);
            general(inner, call, &txn.checks, &steps).await
        }
    };
    outcome.map_err(|error| error.key(txn))
}

/// Refuses what can never work, and makes the rest ready.
fn prepare<'a>(inner: &Inner, txn: &'a Txn) -> Result<Vec<Step<'a>>> {
    let refuse = |message: String| Err(Error::invalid(COMMIT, message).key(txn).on(BACKEND));
    let count = txn.checks.len() + txn.writes.len();
    if count > MAX_TXN {
        return refuse(format!("{count} checks and writes, at most {MAX_TXN} are allowed"));
    }
    let mut steps = Vec::with_capacity(txn.writes.len());
    for write in &txn.writes {
        steps.push(match write {
            Write::Put { key, value, lease } => {
                if value.len() > MAX_VALUE {
                    return refuse(format!("the value has {} bytes, at most {MAX_VALUE} are allowed", value.len()));
                }
                Step::Put { path: inner.layout.key(key), value, lease: put_lease(lease.as_ref())? }
            }
            Write::Delete(key) => Step::Delete { path: inner.layout.key(key) },
            Write::Leave(ticket) => Step::Leave(Leave::new(inner, &txn.checks, ticket)?),
        });
    }
    if steps.len() > 1 && steps.iter().map(Step::path).collect::<HashSet<_>>().len() < steps.len() {
        return refuse("a key is written twice".to_owned());
    }
    Ok(steps)
}

/// etcd's number of the lease; 0 for none.
fn put_lease(lease: Option<&LeaseId>) -> Result<i64> {
    lease.map_or(Ok(0), |lease| lease_number(COMMIT, lease))
}

/// One write without a check.
async fn single(inner: &Inner, call: Call, step: Step<'_>) -> Result<Commit> {
    let header = match step {
        Step::Put { path, value, lease } => {
            let (value, options) = (value.to_vec(), PutOptions::new().with_lease(lease));
            let put = inner.pool.call(call, |c| {
                let mut kv = c.kv.clone();
                async move { kv.put(path, value, Some(options)).await }
            });
            put.await?.take_header()
        }
        Step::Delete { path } => delete(inner, call, path).await?.take_header(),
        Step::Leave(leave) if leave.plainly => {
            let header = delete(inner, call, leave.path.clone()).await?.take_header();
            leave.done(inner, true);
            header
        }
        Step::Leave(leave) => {
            let delete = [TxnOp::delete(leave.path.clone(), None)];
            let request = Request::new().when([leave.stands()]).and_then(delete);
            let mut answer = transact(inner, call, request).await?;
            leave.done(inner, answer.succeeded());
            answer.take_header()
        }
    };
    Ok(Commit { applied: true, revision: revision(header.map_or(0, |h| h.revision())), culprit: None })
}

async fn delete(inner: &Inner, call: Call, path: Vec<u8>) -> Result<DeleteResponse> {
    let delete = inner.pool.call(call, |c| {
        let mut kv = c.kv.clone();
        async move { kv.delete(path, None).await }
    });
    delete.await
}

async fn transact(inner: &Inner, call: Call, request: Request) -> Result<TxnResponse> {
    let answer = inner.pool.call(call, |c| {
        let mut kv = c.kv.clone();
        async move { kv.txn(request).await }
    });
    answer.await
}

async fn general(inner: &Inner, call: Call, checks: &[Check], steps: &[Step<'_>]) -> Result<Commit> {
    let mut compares = Vec::with_capacity(checks.len());
    let mut otherwise = Vec::new();
    for check in checks {
        let (path, compare) = compare(inner, check)?;
        compares.push(compare);
        // With one check there is no question which one did not hold.
        if checks.len() > 1 {
            otherwise.push(TxnOp::get(path, Some(GetOptions::new().with_keys_only())));
        }
    }
    let ops = steps.iter().map(|step| match step {
        Step::Put { path, value, lease } => {
            TxnOp::put(path.clone(), *value, Some(PutOptions::new().with_lease(*lease)))
        }
        Step::Delete { path } => TxnOp::delete(path.clone(), None),
        Step::Leave(leave) => leave.op(),
    });
    let ops: Vec<_> = ops.collect();
    let answer = transact(inner, call, Request::new().when(compares).and_then(ops).or_else(otherwise)).await?;
    let applied = answer.succeeded();
    let culprit = (!applied).then(|| culprit(checks, &answer));
    if applied {
        settle(inner, steps, &answer);
    } else if let Some(Check::Standing { ticket, token }) = culprit.and_then(|i| checks.get(i)) {
        let named = named(COMMIT, ticket)?;
        // With the right token, the ticket is gone.
        if let Some(key) = stored_key(&named).filter(|_| number(*token) == named.token) {
            inner.keys.lost(&key, named.token);
        }
    }
    let now = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
    Ok(Commit { applied, revision: revision(now), culprit })
}

/// Draws the consequences for the keys of the tickets that have left.
fn settle(inner: &Inner, steps: &[Step<'_>], answer: &TxnResponse) {
    let leaves = || {
        steps.iter().enumerate().filter_map(|(i, step)| match step {
            Step::Leave(leave) => Some((i, leave)),
            _ => None,
        })
    };
    if leaves().all(|(_, leave)| leave.plainly) {
        leaves().for_each(|(_, leave)| leave.done(inner, true));
        return;
    }
    let answers = answer.op_responses();
    for (i, leave) in leaves() {
        let deleted = leave.plainly || matches!(answers.get(i), Some(TxnOpResponse::Txn(txn)) if txn.succeeded());
        leave.done(inner, deleted);
    }
}

/// The revisions at which a key was created and last written; 0 for a key that is not there.
type Revisions = (i64, i64);

fn number(revision: Revision) -> i64 {
    // A number that etcd never gave matches no key.
    i64::try_from(revision.0).unwrap_or(-1)
}

fn compare(inner: &Inner, check: &Check) -> Result<(Vec<u8>, Compare)> {
    // 0 would hold for a key that is not there; no key has -1.
    let positive = |n: i64| if n > 0 { n } else { -1 };
    Ok(match check {
        Check::Absent(key) => {
            let path = inner.layout.key(key);
            (path.clone(), Compare::create_revision(path, CompareOp::Equal, 0))
        }
        Check::Unchanged { key, modified } => {
            let path = inner.layout.key(key);
            (path.clone(), Compare::mod_revision(path, CompareOp::Equal, positive(number(*modified))))
        }
        Check::Standing { ticket, token } => {
            let named = named(COMMIT, ticket)?;
            let path = inner.layout.ticket(&named);
            let token = if number(*token) == named.token { named.token } else { -1 };
            (path.clone(), Compare::create_revision(path, CompareOp::Equal, token))
        }
    })
}

fn holds(check: &Check, (created, modified): Revisions) -> bool {
    match check {
        Check::Absent(_) => created == 0,
        Check::Unchanged { modified: expected, .. } => created != 0 && modified == number(*expected),
        Check::Standing { ticket, token } => {
            let named = named(COMMIT, ticket).map(|named| named.token);
            named.is_ok_and(|named| created == named && created == number(*token))
        }
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
