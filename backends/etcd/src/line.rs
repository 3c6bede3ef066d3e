//! Standing in line.
//!
//! Promise: joining is one transaction, which writes the ticket and reads who is ahead; a look is one range; a hand-off
//! is one notification and one look. Any key under the line counts as a ticket, whoever wrote it, in the order of
//! create revisions: so do `etcdctl lock` and Go's `concurrency` count.

use std::time::Duration;

use bytes::Bytes;
use etcd_client::{
    Compare, CompareOp, GetOptions, GetResponse, KeyValue, PutOptions, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse, TxnResponse,
};
use quorate_core::{Dir, Enqueue, Error, ErrorKind, Front, Line, Place, Result, Ticket};
use tokio::time::{sleep, timeout};

use crate::{
    BACKEND, Inner,
    error::{Call, Fault},
    path::{Named, Stored, lease_number, named, revision, stored, stored_key, ticket},
    reuse::Claim,
    stream::{Ending, Signal},
    txn::MAX_VALUE,
};

const ENQUEUE: Call = Call::write("enqueue");
const LOOK: Call = Call::read("look");
const LINE: Call = Call::read("line");
const GONE: Call = Call::read("gone");

/// What became of a request to join.
enum Joined {
    Place(Place),
    /// Somebody is in the line, and the request was to join an empty one.
    NotFree,
    /// The key belongs to somebody else's ticket.
    KeyTaken,
}

/// A ticket and the `depth` nearest ahead of it. Never none: an empty answer says that the ticket is the first.
fn nearest(depth: usize) -> GetOptions {
    let limit = i64::try_from(depth.max(1)).unwrap_or(i64::MAX).saturating_add(1);
    GetOptions::new().with_prefix().with_keys_only().with_limit(limit).with_sort(SortTarget::Create, SortOrder::Descend)
}

pub(crate) async fn enqueue(inner: &Inner, entry: &Enqueue) -> Result<Option<Place>> {
    let lease = lease_number(ENQUEUE.verb, &entry.lease)?;
    if entry.value.len() > MAX_VALUE {
        let message = format!("the value has {} bytes, at most {MAX_VALUE} are allowed", entry.value.len());
        return Err(Error::invalid(ENQUEUE.verb, message).key(&entry.line).on(BACKEND));
    }
    loop {
        // Ends: a key that was taken is not offered again, and one that nobody has used cannot be taken.
        match join(inner, entry, lease, inner.keys.claim(entry, lease)).await? {
            Joined::Place(place) => return Ok(Some(place)),
            Joined::NotFree => return Ok(None),
            Joined::KeyTaken => {}
        }
    }
}

async fn join(inner: &Inner, entry: &Enqueue, lease: i64, claim: Claim<'_>) -> Result<Joined> {
    let stored = stored(&claim.key);
    let line = inner.layout.dir(&entry.line);
    let path = [line.as_slice(), stored.as_bytes()].concat();
    let mut compares = vec![Compare::create_revision(path.clone(), CompareOp::Equal, 0)];
    let put = TxnOp::put(path.clone(), entry.value.to_vec(), Some(PutOptions::new().with_lease(lease)));
    let mut writes = vec![put];
    if entry.when_free {
        // Holds for every key of the range, and so for an empty range too. Then nobody is ahead.
        compares.push(Compare::create_revision(line, CompareOp::Equal, 0).with_prefix());
    } else {
        writes.push(TxnOp::get(line, Some(nearest(entry.depth))));
    }
    let own = TxnOp::get(path.clone(), Some(GetOptions::new().with_keys_only()));
    let request = Txn::new().when(compares).and_then(writes).or_else([own]);
    let answer = inner.pool.call(ENQUEUE, |c| {
        let mut kv = c.kv.clone();
        async move { kv.txn(request).await }
    });
    let answer = match answer.await {
        Ok(answer) => answer,
        Err(error) => {
            unanswered(inner, claim, lease, error.kind());
            return Err(error.key(&entry.line));
        }
    };
    let got = reads(&answer).next();
    if answer.succeeded() {
        let token = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        claim.stands(token);
        let own = Named { line: &entry.line, stored: &stored, token };
        let ahead = match got {
            Some(got) => ahead(inner, ENQUEUE, &own, &got)?.ok_or_else(|| unclear(entry))?,
            None => Vec::new(),
        };
        return Ok(Joined::Place(place(&own, ahead)));
    }
    match got.and_then(|got| got.kvs().first().map(KeyValue::create_revision)) {
        None if entry.when_free => {
            claim.wrote_nothing();
            Ok(Joined::NotFree)
        }
        None => Err(unclear(entry)),
        Some(_) if claim.must_be_free() => {
            claim.taken();
            Ok(Joined::KeyTaken)
        }
        // This attempt was carried out before.
        Some(token) => {
            claim.stands(token);
            let own = Named { line: &entry.line, stored: &stored, token };
            match look_from(inner, Call::read(ENQUEUE.verb), &own, entry.depth).await {
                Ok(Some(place)) => Ok(Joined::Place(place)),
                Ok(None) => Err(unclear(entry)),
                // The look was not answered, but the ticket stands: nobody may conclude that nothing was written.
                Err(error) if error.kind() == ErrorKind::Unavailable => Err(error.with_kind(ErrorKind::Ambiguous)),
                Err(error) => Err(error),
            }
        }
    }
}

/// Draws the consequence of a failed request to join for its key.
fn unanswered(inner: &Inner, claim: Claim<'_>, lease: i64, kind: ErrorKind) {
    match kind {
        ErrorKind::Unavailable | ErrorKind::Denied | ErrorKind::InvalidInput | ErrorKind::Unsupported => {
            claim.wrote_nothing();
        }
        ErrorKind::SessionLost => {
            claim.wrote_nothing();
            inner.keys.forget(lease);
        }
        // The claim is dropped unsettled.
        _ => {}
    }
}

/// Nobody ahead means "first": that is never concluded from an answer that does not show the ticket itself.
fn unclear(entry: &Enqueue) -> Error {
    let fault = Fault::new(ErrorKind::Ambiguous, "the answer does not show the ticket: it was removed meanwhile");
    fault.error(ENQUEUE.verb).key(&entry.line)
}

fn reads(answer: &TxnResponse) -> impl Iterator<Item = GetResponse> {
    answer.op_responses().into_iter().filter_map(|response| match response {
        TxnOpResponse::Get(got) => Some(got),
        _ => None,
    })
}

fn place(own: &Named<'_>, ahead: Vec<Ticket>) -> Place {
    Place { ticket: ticket(own.line, own.stored, own.token), token: revision(own.token), ahead }
}

pub(crate) async fn look(inner: &Inner, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
    let own = named(LOOK.verb, ticket)?;
    let place = look_from(inner, LOOK, &own, depth).await?;
    if place.is_none()
        && let Some(key) = stored_key(&own)
    {
        inner.keys.lost(&key, own.token);
    }
    Ok(place)
}

async fn look_from(inner: &Inner, call: Call, own: &Named<'_>, depth: usize) -> Result<Option<Place>> {
    let line = inner.layout.dir(own.line);
    let options = nearest(depth).with_max_create_revision(own.token);
    let got = inner.pool.call(call, |c| {
        let mut kv = c.kv.clone();
        async move { kv.get(line, Some(options)).await }
    });
    let got = got.await.map_err(|error| error.key(ticket(own.line, own.stored, own.token)))?;
    Ok(ahead(inner, call, own, &got)?.map(|ahead| place(own, ahead)))
}

/// Who stands ahead of a ticket, of tickets in descending order; `None` if it is not among them.
fn ahead(inner: &Inner, call: Call, own: &Named<'_>, got: &GetResponse) -> Result<Option<Vec<Ticket>>> {
    let path = inner.layout.ticket(own);
    let mut rest = got.kvs().iter().skip_while(|kv| kv.key() != path || kv.create_revision() != own.token);
    if rest.next().is_none() {
        return Ok(None);
    }
    rest.map(|kv| read_ticket(inner, call, own.line, kv)).collect::<Result<_>>().map(Some)
}

fn read_ticket(inner: &Inner, call: Call, line: &Dir, kv: &KeyValue) -> Result<Ticket> {
    Ok(ticket(line, inner.layout.name(call.verb, line, kv.key())?, kv.create_revision()))
}

pub(crate) async fn line(inner: &Inner, dir: &Dir) -> Result<Line> {
    let path = inner.layout.dir(dir);
    let in_order = || GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
    let request = Txn::new().and_then([
        TxnOp::get(path.clone(), Some(in_order().with_keys_only())),
        TxnOp::get(path, Some(in_order().with_limit(1))),
    ]);
    let answer = inner.pool.call(LINE, |c| {
        let mut kv = c.kv.clone();
        async move { kv.txn(request).await }
    });
    let answer = answer.await.map_err(|error| error.key(dir))?;
    let mut parts = reads(&answer);
    let (Some(all), Some(mut first)) = (parts.next(), parts.next()) else { return Ok(Line::default()) };
    let tickets = all.kvs().iter().map(|kv| read_ticket(inner, LINE, dir, kv)).collect::<Result<_>>()?;
    let front = first.take_kvs().into_iter().next().map(|kv| {
        let token = revision(kv.create_revision());
        Front { token, value: Bytes::from(kv.into_key_value().1) }
    });
    Ok(Line { tickets, front })
}

pub(crate) async fn gone(inner: &Inner, ticket: &Ticket) -> Result<()> {
    let named = named(GONE.verb, ticket)?;
    let path = inner.layout.ticket(&named);
    let one = Stored { start: path.clone(), prefix: false };
    let mut watching =
        inner.streams.open(GONE, &one, true).await.map_err(|fault| fault.error(GONE.verb).key(ticket))?;
    // First the watch, then the look: a removal before the watch shows in the look, one after it in the watch.
    let there = inner.pool.call(GONE, |c| {
        let mut kv = c.kv.clone();
        async move { kv.get(path, Some(GetOptions::new().with_keys_only())).await }
    });
    let limit = inner.pool.options.request_timeout;
    let there = match timeout(limit, there).await {
        Ok(there) => there.map_err(|error| error.key(ticket))?,
        Err(_) => {
            let fault = Fault::new(GONE.doubt(), format!("no answer within {limit:?}"));
            return Err(fault.error(GONE.verb).key(ticket));
        }
    };
    if there.kvs().first().is_none_or(|kv| kv.create_revision() != named.token) {
        return Ok(());
    }
    if let Some(Signal::Ended(Ending::Fault(fault))) = watching.next().await {
        tracing::debug!(%ticket, %fault, "wait interrupted");
        // All waiters of this process look again now; not all at once, and never in a tight loop.
        sleep(Duration::from_millis(100).mul_f64(rand::random_range(0.1..1.0))).await;
    }
    Ok(())
}
