//! Standing in line.
//!
//! Promise: joining is one transaction, which writes the ticket and reads who is ahead; a look is one range; a hand-off
//! is one notification and one look. Any key under the line counts as a ticket, whoever wrote it, in the order of
//! create revisions: so do `etcdctl lock` and Go's `concurrency` count.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

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
    path::{Stored, lease_number, ticket, ticket_of},
    stream::{Ending, Signal},
    txn::MAX_VALUE,
    watch::revision,
};

const ENQUEUE: Call = Call::write("enqueue");
const LOOK: Call = Call::read("look");
const LINE: Call = Call::read("line");
const GONE: Call = Call::read("gone");

/// How many tokens are kept in each of the two generations.
const GENERATION: usize = 16 * 1024;

/// The tokens of tickets that wait, by stored key, so that a look needs no other request to find its place.
///
/// Bounded: when the young generation is full it becomes the old one, and the old one is forgotten. A forgotten token
/// costs one more round trip.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    generations: Mutex<Generations>,
}

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<Vec<u8>, i64>,
    old: HashMap<Vec<u8>, i64>,
}

impl Tokens {
    fn generations(&self) -> MutexGuard<'_, Generations> {
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, path: &[u8]) -> Option<i64> {
        let generations = self.generations();
        generations.young.get(path).or_else(|| generations.old.get(path)).copied()
    }

    fn keep(&self, path: Vec<u8>, token: i64) {
        let mut generations = self.generations();
        if generations.young.len() >= GENERATION {
            generations.old = std::mem::take(&mut generations.young);
        }
        generations.young.insert(path, token);
    }

    pub(crate) fn forget(&self, path: &[u8]) {
        let mut generations = self.generations();
        generations.young.remove(path);
        generations.old.remove(path);
    }
}

fn header(answer: &TxnResponse) -> i64 {
    answer.header().map_or(0, etcd_client::ResponseHeader::revision)
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
    let ticket = ticket_of(entry);
    let (path, line) = (inner.layout.ticket(&ticket), inner.layout.dir(&entry.line));
    let mut compares = vec![Compare::create_revision(path.clone(), CompareOp::Equal, 0)];
    let put = TxnOp::put(path.clone(), entry.value.to_vec(), Some(PutOptions::new().with_lease(lease)));
    let mut join = vec![put];
    if entry.when_free {
        // Holds for every key of the range, and so for an empty range too. Then nobody is ahead.
        compares.push(Compare::create_revision(line, CompareOp::Equal, 0).with_prefix());
    } else {
        join.push(TxnOp::get(line, Some(nearest(entry.depth))));
    }
    let own = TxnOp::get(path.clone(), Some(GetOptions::new().with_keys_only()));
    let request = Txn::new().when(compares).and_then(join).or_else([own]);
    let answer = inner.pool.call(ENQUEUE, |c| {
        let mut kv = c.kv.clone();
        async move { kv.txn(request).await }
    });
    let answer = answer.await.map_err(|error| error.key(&entry.line))?;
    let got = answer.op_responses().into_iter().find_map(|response| match response {
        TxnOpResponse::Get(got) => Some(got),
        _ => None,
    });
    if answer.succeeded() {
        let token = header(&answer);
        let ahead = match got {
            // Nobody ahead means "first": never to be concluded from an answer that does not show the ticket.
            Some(got) => ahead(inner, ENQUEUE, &entry.line, &path, &got)?.ok_or_else(|| {
                let fault = Fault::new(ErrorKind::Ambiguous, "the answer does not show the ticket just written");
                fault.error(ENQUEUE.verb).key(&entry.line)
            })?,
            None => Vec::new(),
        };
        if !ahead.is_empty() {
            inner.tokens.keep(path, token);
        }
        return Ok(Some(Place { ticket, token: revision(token), ahead }));
    }
    // Either this is a repetition of a call that was carried out, or somebody is in the line.
    let Some(token) = got.and_then(|got| got.kvs().first().map(KeyValue::create_revision)) else { return Ok(None) };
    inner.tokens.keep(path.clone(), token);
    match look_from(inner, ENQUEUE, &ticket, &path, token, entry.depth).await? {
        Some(place) => Ok(Some(place)),
        None => {
            let fault = Fault::new(ENQUEUE.doubt(), "the ticket of an earlier attempt was removed meanwhile");
            Err(fault.error(ENQUEUE.verb).key(&entry.line))
        }
    }
}

pub(crate) async fn look(inner: &Inner, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
    let path = inner.layout.ticket(ticket);
    let token = match inner.tokens.get(&path) {
        Some(token) => token,
        None => {
            let own = path.clone();
            let got = inner.pool.call(LOOK, |c| {
                let mut kv = c.kv.clone();
                async move { kv.get(own, Some(GetOptions::new().with_keys_only())).await }
            });
            let got = got.await.map_err(|error| error.key(ticket))?;
            let Some(kv) = got.kvs().first() else { return Ok(None) };
            let token = kv.create_revision();
            inner.tokens.keep(path.clone(), token);
            token
        }
    };
    let place = look_from(inner, LOOK, ticket, &path, token, depth).await?;
    if place.as_ref().is_none_or(|place| place.ahead.is_empty()) {
        // First in line, or gone: there will be no further look, as a rule.
        inner.tokens.forget(&path);
    }
    Ok(place)
}

async fn look_from(
    inner: &Inner,
    call: Call,
    ticket: &Ticket,
    path: &[u8],
    token: i64,
    depth: usize,
) -> Result<Option<Place>> {
    let line = inner.layout.dir(&ticket.line);
    let options = nearest(depth).with_max_create_revision(token);
    let got = inner.pool.call(call, |c| {
        let mut kv = c.kv.clone();
        async move { kv.get(line, Some(options)).await }
    });
    let got = got.await.map_err(|error| error.key(ticket))?;
    let ahead = ahead(inner, call, &ticket.line, path, &got)?;
    Ok(ahead.map(|ahead| Place { ticket: ticket.clone(), token: revision(token), ahead }))
}

/// Who stands ahead of the ticket at `path`, of tickets in descending order; `None` if it is not among them.
fn ahead(inner: &Inner, call: Call, line: &Dir, path: &[u8], got: &GetResponse) -> Result<Option<Vec<Ticket>>> {
    let mut rest = got.kvs().iter().skip_while(|kv| kv.key() != path);
    if rest.next().is_none() {
        return Ok(None);
    }
    rest.map(|kv| inner.layout.name(call.verb, line, kv.key()).map(|name| ticket(line, name)))
        .collect::<Result<_>>()
        .map(Some)
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
    let mut parts = answer.op_responses().into_iter().filter_map(|response| match response {
        TxnOpResponse::Get(got) => Some(got),
        _ => None,
    });
    let (Some(all), Some(mut first)) = (parts.next(), parts.next()) else { return Ok(Line::default()) };
    let mut tickets = Vec::with_capacity(all.kvs().len());
    for kv in all.kvs() {
        tickets.push(ticket(dir, inner.layout.name(LINE.verb, dir, kv.key())?));
    }
    let front = first.take_kvs().into_iter().next().map(|kv| {
        let token = revision(kv.create_revision());
        Front { token, value: Bytes::from(kv.into_key_value().1) }
    });
    Ok(Line { tickets, front })
}

pub(crate) async fn gone(inner: &Inner, ticket: &Ticket) -> Result<()> {
    let path = inner.layout.ticket(ticket);
    let one = Stored { start: path.clone(), prefix: false };
    let mut watching =
        inner.streams.open(GONE, &one, true).await.map_err(|fault| fault.error(GONE.verb).key(ticket))?;
    // First the watch, then the look: a removal before the watch shows in the look, one after it in the watch.
    let there = inner.pool.call(GONE, |c| {
        let mut kv = c.kv.clone();
        async move { kv.get(path, Some(GetOptions::new().with_count_only())).await }
    });
    let limit = inner.pool.options.request_timeout;
    let there = match timeout(limit, there).await {
        Ok(there) => there.map_err(|error| error.key(ticket))?.count() > 0,
        Err(_) => {
            let fault = Fault::new(GONE.doubt(), format!("no answer within {limit:?}"));
            return Err(fault.error(GONE.verb).key(ticket));
        }
    };
    if !there {
        return Ok(());
    }
    if let Some(Signal::Ended(Ending::Fault(fault))) = watching.next().await {
        tracing::debug!(%ticket, %fault, "wait interrupted");
        // All waiters of this process look again now; not all at once, and never in a tight loop.
        sleep(Duration::from_millis(100).mul_f64(rand::random_range(0.1..1.0))).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembered_tokens_are_bounded_and_the_latest_are_kept() {
        let tokens = Tokens::default();
        let path = |i: usize| i.to_be_bytes().to_vec();
        for i in 0..5 * GENERATION {
            tokens.keep(path(i), 1);
        }
        let generations = tokens.generations();
        assert!(generations.young.len() + generations.old.len() <= 2 * GENERATION);
        drop(generations);
        assert_eq!(tokens.get(&path(5 * GENERATION - 1)), Some(1));
        assert_eq!(tokens.get(&path(0)), None);
    }
}
