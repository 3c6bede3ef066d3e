//! The calls of Consul's HTTP API that this backend makes, typed.
//!
//! Promise: every read is linearizable (`consistent`) unless it is a blocking query, which the servers answer
//! from the leader; a status that a caller has a meaning for is a value, everything else an error.

use std::{borrow::Cow, sync::OnceLock, time::Duration};

use base64::{Engine as _, display::Base64Display, engine::general_purpose::STANDARD};
use bytes::Bytes;
use hyper::{Method, StatusCode};
use quorate_core::{ErrorKind, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    error::{Effect, Failure, error, refused},
    http::{Answer, Call, Http},
    path::url,
};

/// A key as Consul stores it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Pair {
    pub(crate) key: String,
    #[serde(default, deserialize_with = "decode")]
    pub(crate) value: Bytes,
    #[serde(default)]
    pub(crate) session: Option<String>,
    pub(crate) create_index: u64,
    pub(crate) modify_index: u64,
}

/// What a read found.
#[derive(Debug)]
pub(crate) struct Found<T> {
    pub(crate) items: Vec<T>,
    /// The index to wait on: of the newest change in the range, at least.
    pub(crate) index: u64,
}

/// How a read is made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum How {
    /// At once, confirmed by a majority.
    Consistent,
    /// The same, for a task of our own: with a time limit.
    Bounded,
    /// When the range has changed since the index, or the time is over.
    Blocking { index: u64, wait: Duration },
}

impl How {
    /// What a task sends that waits for a change since `index`; 0: that has seen nothing yet.
    pub(crate) fn since(index: u64, wait: Duration) -> Self {
        if index == 0 { Self::Bounded } else { Self::Blocking { index, wait } }
    }
}

/// One operation of a transaction.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Op<'a> {
    #[serde(rename = "KV")]
    kv: KvOp<'a>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
struct KvOp<'a> {
    verb: &'static str,
    key: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Base64<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    flags: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<&'a str>,
}

#[derive(Debug, Clone, Copy)]
struct Base64<'a>(&'a [u8]);

impl Serialize for Base64<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0, &STANDARD))
    }
}

impl<'a> Op<'a> {
    fn new(verb: &'static str, key: impl Into<Cow<'a, str>>) -> Self {
        Self { kv: KvOp { verb, key: key.into(), value: None, flags: None, index: None, session: None } }
    }

    pub(crate) fn check_absent(key: impl Into<Cow<'a, str>>) -> Self {
        Self::new("check-not-exists", key)
    }

    pub(crate) fn check_index(key: impl Into<Cow<'a, str>>, index: u64) -> Self {
        let mut op = Self::new("check-index", key);
        op.kv.index = Some(index);
        op
    }

    /// Holds if the key exists and stands on no session.
    pub(crate) fn check_no_session(key: impl Into<Cow<'a, str>>) -> Self {
        let mut op = Self::new("check-session", key);
        op.kv.session = Some("");
        op
    }

    /// Writes and leaves the key on the session it stands on.
    pub(crate) fn set(key: impl Into<Cow<'a, str>>, value: &'a [u8], flags: u64) -> Self {
        Self::new("set", key).valued(value, flags)
    }

    /// As `set`, if the key was last written at `index`; 0: if it does not exist.
    pub(crate) fn cas(key: impl Into<Cow<'a, str>>, value: &'a [u8], flags: u64, index: u64) -> Self {
        let mut op = Self::new("cas", key).valued(value, flags);
        op.kv.index = Some(index);
        op
    }

    /// Writes and puts the key on the session, unless it stands on another one.
    pub(crate) fn lock(key: impl Into<Cow<'a, str>>, value: &'a [u8], flags: u64, session: &'a str) -> Self {
        let mut op = Self::new("lock", key).valued(value, flags);
        op.kv.session = Some(session);
        op
    }

    /// Deletes, whatever session the key stands on.
    pub(crate) fn delete(key: impl Into<Cow<'a, str>>) -> Self {
        Self::new("delete", key)
    }

    /// Deletes if the key was last written at `index`; a key that does not exist is no obstacle.
    pub(crate) fn delete_cas(key: impl Into<Cow<'a, str>>, index: u64) -> Self {
        let mut op = Self::new("delete-cas", key);
        op.kv.index = Some(index);
        op
    }

    /// Deletes every key that starts with this; leaves one tombstone.
    pub(crate) fn delete_tree(prefix: impl Into<Cow<'a, str>>) -> Self {
        Self::new("delete-tree", prefix)
    }

    /// Returns every key that starts with this.
    pub(crate) fn get_tree(prefix: impl Into<Cow<'a, str>>) -> Self {
        Self::new("get-tree", prefix)
    }

    fn valued(mut self, value: &'a [u8], flags: u64) -> Self {
        self.kv.value = Some(Base64(value));
        self.kv.flags = Some(flags);
        self
    }
}

/// What became of a transaction.
#[derive(Debug)]
pub(crate) enum TxnAnswer {
    /// All of it was applied; the keys that its operations return, in their order.
    Done(Vec<Pair>),
    /// Nothing was applied; every operation that failed, in order.
    Refused(Vec<OpError>),
}

/// Why one operation of a transaction failed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct OpError {
    pub(crate) op_index: usize,
    pub(crate) what: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TxnReply {
    results: Option<Vec<TxnResult>>,
    errors: Option<Vec<OpError>>,
}

#[derive(Deserialize)]
struct TxnResult {
    #[serde(rename = "KV")]
    kv: Option<Pair>,
}

fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let Some(text) = Option::<Cow<'_, str>>::deserialize(deserializer)? else { return Ok(Bytes::new()) };
    STANDARD.decode(text.as_bytes()).map(Bytes::from).map_err(serde::de::Error::custom)
}

fn parse<T: for<'de> Deserialize<'de>>(operation: &'static str, body: &[u8]) -> Result<T> {
    serde_json::from_slice(body)
        .map_err(|e| error(ErrorKind::Backend, operation, "the answer is not what Consul's API describes").because(e))
}

/// The typed client.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) http: Http,
    /// Whether the servers have access rules, as far as connecting found out.
    ruled: OnceLock<bool>,
}

impl Api {
    pub(crate) fn new(http: Http) -> Self {
        Self { http, ruled: OnceLock::new() }
    }

    /// Notes whether the servers have access rules.
    pub(crate) fn is_ruled(&self, ruled: bool) {
        self.ruled.get_or_init(|| ruled);
    }

    /// One key; no item if it does not exist.
    pub(crate) async fn get(&self, operation: &'static str, key: &str, how: How) -> Result<Found<Pair>> {
        self.kv(operation, key, "", how).await
    }

    /// Every key that starts with `prefix`.
    pub(crate) async fn list(&self, operation: &'static str, prefix: &str, how: How) -> Result<Found<Pair>> {
        self.kv(operation, prefix, "recurse&", how).await
    }

    /// The names of every key that starts with `prefix`.
    pub(crate) async fn keys(&self, operation: &'static str, prefix: &str, how: How) -> Result<Found<String>> {
        self.kv(operation, prefix, "keys&", how).await
    }

    async fn kv<T: for<'de> Deserialize<'de>>(
        &self,
        operation: &'static str,
        key: &str,
        of: &str,
        how: How,
    ) -> Result<Found<T>> {
        let path = format!("/v1/kv/{}?", url(key));
        let failed = |f: Failure| f.into_error(operation, Effect::Read).key(key);
        let answer = self.look(format!("{path}{of}"), how).await.map_err(failed)?;
        if answer.status == StatusCode::NOT_FOUND && !of.is_empty() && self.ruled.get() == Some(&true) {
            // To a token without the right to read a range, Consul before 1.11 shows an empty one. About a
            // single key it tells the truth.
            if !matches!(how, How::Blocking { .. }) {
                let probe = self.look(path, how).await.map_err(failed)?;
                if probe.status == StatusCode::FORBIDDEN {
                    return Err(refused(operation, Effect::Read, probe.status, &probe.body).key(key));
                }
            }
        }
        let items = match answer.status {
            StatusCode::OK => parse(operation, &answer.body),
            StatusCode::NOT_FOUND if answer.index.is_some() => Ok(Vec::new()),
            status => Err(refused(operation, Effect::Read, status, &answer.body)),
        }
        .map_err(|e| e.key(key))?;
        if answer.filtered {
            let message = "the access rules hide a part of what was asked for";
            return Err(error(ErrorKind::Denied, operation, message).key(key));
        }
        let index = answer
            .index
            .ok_or_else(|| error(ErrorKind::Backend, operation, "the answer has no X-Consul-Index").key(key))?;
        Ok(Found { items, index })
    }

    /// What an endpoint of the health or catalog API lists.
    pub(crate) async fn list_of<T: for<'de> Deserialize<'de>>(
        &self,
        operation: &'static str,
        path: String,
        how: How,
    ) -> Result<Found<T>> {
        let answer = self.look(path, how).await.map_err(|f| f.into_error(operation, Effect::Read))?;
        if answer.status != StatusCode::OK {
            return Err(refused(operation, Effect::Read, answer.status, &answer.body));
        }
        if answer.filtered {
            let message = "the access rules hide a part of what was asked for";
            return Err(error(ErrorKind::Denied, operation, message));
        }
        let items = parse(operation, &answer.body)?;
        let index = answer.index;
        let index = index.ok_or_else(|| error(ErrorKind::Backend, operation, "the answer has no X-Consul-Index"))?;
        Ok(Found { items, index })
    }

    /// A read; `path` ends with `?` or `&`.
    async fn look(&self, path: String, how: How) -> Result<Answer, Failure> {
        let call = |query: String| Call {
            method: Method::GET,
            path: format!("{path}{query}"),
            body: Bytes::new(),
            agent: None,
        };
        match how {
            How::Consistent => self.http.call(call("consistent".to_owned())).await,
            How::Bounded => self.http.block(call("consistent".to_owned()), Duration::ZERO).await,
            // The server adds up to a sixteenth to the time, so that waits do not end together.
            How::Blocking { index, wait } => {
                let query = format!("index={index}&wait={}ms", wait.as_millis());
                self.http.block(call(query), wait + wait / 16).await
            }
        }
    }

    /// Applies all operations or none.
    pub(crate) async fn txn(&self, operation: &'static str, effect: Effect, ops: &[Op<'_>]) -> Result<TxnAnswer> {
        let body = serde_json::to_vec(ops).expect("the operations are plain data");
        if body.len() > TXN_LIMIT {
            let message = format!("the transaction has {} bytes on the wire, Consul takes {TXN_LIMIT}", body.len());
            return Err(error(ErrorKind::InvalidInput, operation, message));
        }
        let answer = self.put("/v1/txn?consistent", body, None).await;
        let answer = answer.map_err(|f| f.into_error(operation, effect))?;
        match answer.status {
            StatusCode::OK | StatusCode::CONFLICT => {}
            status => return Err(refused(operation, effect, status, &answer.body)),
        }
        let reply: TxnReply = parse(operation, &answer.body)?;
        if answer.status == StatusCode::OK {
            return Ok(TxnAnswer::Done(reply.results.unwrap_or_default().into_iter().filter_map(|r| r.kv).collect()));
        }
        Ok(TxnAnswer::Refused(reply.errors.unwrap_or_default()))
    }

    /// A `PUT`; its answer is the caller's to read.
    pub(crate) async fn put(
        &self,
        path: impl Into<String>,
        body: Vec<u8>,
        agent: Option<usize>,
    ) -> Result<Answer, Failure> {
        self.http.call(Call { method: Method::PUT, path: path.into(), body: body.into(), agent }).await
    }

    /// A `GET`; its answer is the caller's to read.
    pub(crate) async fn fetch(&self, path: impl Into<String>, agent: Option<usize>) -> Result<Answer, Failure> {
        self.http.call(Call { method: Method::GET, path: path.into(), body: Bytes::new(), agent }).await
    }
}

/// The largest transaction that Consul takes with its default `txn_max_req_len`, in bytes of JSON.
pub(crate) const TXN_LIMIT: usize = 512 << 10;
