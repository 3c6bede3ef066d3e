//! The raw side on Consul, with hyper over kept connections: a key acquired and released for a session.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use quorate_testkit::servers::{self, ConsulOptions, Server};

use super::{
    Contest, Pair, Raw, Round, VALUE,
    hand_off::{pause, timed},
};
use crate::Outcome;

const ROUND: &str = "/v1/kv/raw/round";

#[derive(Debug, Clone, Copy)]
pub(crate) struct Consul;

#[async_trait]
impl Contest for Consul {
    fn name(&self) -> &'static str {
        "consul"
    }

    fn raw_is(&self) -> &'static str {
        "KV acquire + KV release; put → answer of a blocking query that stands"
    }

    fn owner_changes(&self) -> f64 {
        200.0
    }

    async fn start(&self) -> Result<Server, servers::Error> {
        servers::Consul::start(ConsulOptions::default()).await
    }

    async fn connect(&self, server: &Server) -> Outcome<Raw> {
        let (one, other) = (Http::new(server), Http::new(server));
        // Without a TTL it stands as long as its node does: nothing is renewed beside the measurement.
        let options = r#"{"LockDelay": "0s", "Behavior": "delete"}"#;
        let answer = one.send(Method::PUT, "/v1/session/create", options).await?;
        let session: serde_json::Value = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
        let session = session["ID"].as_str().ok_or("consul, raw: the session has no ID")?.to_owned();
        one.send(Method::PUT, ROUND, VALUE).await?;
        let index = other.send(Method::GET, ROUND, "").await?.index;
        let pair = Acquire { http: one.clone(), session };
        Ok(Raw { pair: Arc::new(pair), round: Box::new(PutAndQuery { writer: one, listener: other, index }) })
    }
}

/// A client with a pool of connections.
#[derive(Clone)]
struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
}

struct Answer {
    body: Bytes,
    index: u64,
}

impl Http {
    fn new(server: &Server) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(tcp);
        Self { client, base: format!("http://{}", server.addr()) }
    }

    async fn send(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Outcome<Answer> {
        let failed = |e: &dyn std::fmt::Display| format!("consul, raw {method} {path}: {e}");
        let request = Request::builder().method(method.clone()).uri(format!("{}{path}", self.base));
        let request = request.body(Full::new(body.into())).map_err(|e| failed(&e))?;
        let answer = self.client.request(request).await.map_err(|e| failed(&e))?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await.map_err(|e| failed(&e))?.to_bytes();
        if !head.status.is_success() {
            return Err(failed(&format!("{} {}", head.status, String::from_utf8_lossy(&body))));
        }
        let index = head.headers.get("x-consul-index").and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Answer { body, index: index.unwrap_or_default() })
    }
}

struct Acquire {
    http: Http,
    session: String,
}

impl Acquire {
    async fn put(&self, name: &str, verb: &str) -> Outcome {
        let path = format!("/v1/kv/raw/{name}?{verb}={}", self.session);
        let answer = self.http.send(Method::PUT, &path, VALUE).await?;
        if answer.body.starts_with(b"true") { Ok(()) } else { Err(format!("consul, raw {verb}: {name} was in use")) }
    }
}

#[async_trait]
impl Pair for Acquire {
    async fn pair(&self, name: &str) -> Outcome {
        self.put(name, "acquire").await?;
        self.put(name, "release").await
    }
}

struct PutAndQuery {
    writer: Http,
    listener: Http,
    /// Of the last write that the listener has heard of.
    index: u64,
}

#[async_trait]
impl Round for PutAndQuery {
    async fn round(&mut self, settle: Duration) -> Outcome<Duration> {
        let (listener, index) = (self.listener.clone(), self.index);
        let heard = async move {
            let answer = listener.send(Method::GET, &format!("{ROUND}?index={index}&wait=30s"), "").await?;
            if answer.index > index { Ok(answer.index) } else { Err("consul, raw: the query has timed out".to_owned()) }
        };
        // Each value is another one: a write that changes nothing moves no index, and nobody would hear of it.
        let put = async { self.writer.send(Method::PUT, ROUND, format!("{VALUE}{index:020}")).await.map(drop) };
        let (index, time) = timed(heard, pause(settle), put).await?;
        self.index = index;
        Ok(time)
    }
}
