//! The clock of the member in use.
//!
//! Promise: one request, which needs no right and touches no data.
//!
//! etcd's gRPC answers bear no time. Its HTTP side, on the same port, dates its answers, in whole seconds; `/version` is
//! served to everybody who may connect.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use http_body_util::Empty;
use hyper::{Response, Uri, body::Incoming, header::DATE};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use quorate_core::{Error, ErrorKind, Result, ServerClock};

use crate::{BACKEND, config::Options, connect::Pool};

const VERB: &str = "clock";
/// An idle connection is closed before the usual firewall forgets it.
const IDLE: Duration = Duration::from_secs(90);

type Http = Client<HttpsConnector<HttpConnector>, Empty<bytes::Bytes>>;

/// A client for the HTTP side; made at the first use, and again after a failure, with the TLS files as they are then.
#[derive(Debug, Default)]
pub(crate) struct Clock(Mutex<Option<Http>>);

impl Clock {
    pub(crate) async fn ask(&self, pool: &Pool) -> Result<ServerClock> {
        let endpoint = pool.endpoint();
        let uri = format!("{endpoint}/version").parse::<Uri>();
        let uri = uri.map_err(|e| Error::invalid(VERB, format!("{endpoint} is no URI")).on(BACKEND).because(e))?;
        let http = self.client(&pool.options).await?;
        let answer = http.get(uri).await.map_err(|e| {
            self.slot().take();
            let message = format!("no answer from the HTTP side of {endpoint}");
            Error::new(ErrorKind::Unavailable, VERB, message).on(BACKEND).because(e)
        })?;
        shown(&answer).ok_or_else(|| {
            let message = format!("{endpoint} answered {} and bears no date", answer.status());
            let next = "a proxy in between may take the date away, or serve gRPC only";
            Error::new(ErrorKind::Unsupported, VERB, message).on(BACKEND).next(next)
        })
    }

    async fn client(&self, options: &Options) -> Result<Http> {
        if let Some(http) = self.slot().clone() {
            return Ok(http);
        }
        let (tls, limit) = (options.tls(), options.connect_timeout);
        let made = tokio::task::spawn_blocking(move || match tls {
            Some(tls) => Ok((quorate_tls::client(&tls, BACKEND)?, true)),
            None => Ok((quorate_tls::unused(BACKEND)?, false)),
        });
        let stopped = |e| Error::new(ErrorKind::Unavailable, VERB, "the runtime is stopping").on(BACKEND).because(e);
        let (config, secure) = made.await.map_err(stopped)??;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(limit));
        let builder = HttpsConnectorBuilder::new().with_tls_config(config);
        let builder = if secure { builder.https_only() } else { builder.https_or_http() };
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(1)
            .build(builder.enable_http1().wrap_connector(tcp));
        Ok(self.slot().insert(http).clone())
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Http>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shown(answer: &Response<Incoming>) -> Option<ServerClock> {
    let date = httpdate::parse_http_date(answer.headers().get(DATE)?.to_str().ok()?).ok()?;
    let earliest = date.duration_since(UNIX_EPOCH).ok()?;
    Some(ServerClock { earliest, latest: earliest + Duration::from_secs(1) })
}
