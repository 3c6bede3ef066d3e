//! Asking the sentinels who is the primary.
//!
//! Promise: the newest word counts. After a failover the sentinels learn of it one by one, and for that long a
//! former primary that was restarted looks like a primary; so all are asked at once and the answer of the
//! highest epoch is taken. A sentinel that does not answer delays this by [`GRACE`] and no more.

use std::{collections::HashMap, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use quorate_core::ErrorKind;
use redis::{AsyncConnectionConfig, Client, RedisError, Value};
use tokio::time::{Instant, sleep_until};

use crate::{
    config::{Address, Options},
    error::{Failure, classify_connect},
};

/// How long the others are waited for once one sentinel has answered.
const GRACE: Duration = Duration::from_millis(250);

/// The primary by this name, as the sentinels see it. The caller limits the time.
pub(crate) async fn primary(options: &Options, master: &str) -> Result<Address, Failure> {
    let mut asked: FuturesUnordered<_> =
        options.endpoints.iter().map(async |sentinel| (sentinel, ask(options, sentinel, master).await)).collect();
    let mut newest: Option<(u64, Address)> = None;
    let mut failure: Option<Failure> = None;
    let mut by = Instant::now();
    loop {
        let answer = tokio::select! {
            answer = asked.next() => answer,
            () = sleep_until(by), if newest.is_some() => None,
        };
        match answer {
            None => break,
            Some((_, Ok(said))) => {
                if newest.is_none() {
                    by = Instant::now() + GRACE;
                }
                if newest.as_ref().is_none_or(|(epoch, _)| said.0 > *epoch) {
                    newest = Some(said);
                }
            }
            Some((sentinel, Err(f))) => {
                let f = Failure { text: format!("{sentinel}: {}", f.text), ..f };
                failure = Some(match failure {
                    None => f,
                    Some(before) => before.or_more_telling(f),
                });
            }
        }
    }
    match newest {
        Some((_, address)) => Ok(address),
        None => Err(failure.unwrap_or_else(|| Failure::new(ErrorKind::Unavailable, "no sentinel"))),
    }
}

/// Whether this sentinel names another primary than that one. Silence says nothing.
pub(crate) async fn disagrees(options: &Options, sentinel: usize, master: &str, current: &str) -> bool {
    let sentinel = &options.endpoints[sentinel % options.endpoints.len()];
    ask(options, sentinel, master).await.is_ok_and(|(_, primary)| primary.to_string() != current)
}

async fn ask(options: &Options, sentinel: &Address, master: &str) -> Result<(u64, Address), Failure> {
    let mut answer = says(options, sentinel, master, false).await;
    // Most sentinels have no password even where the servers have one.
    if options.has_login() && answer.as_ref().is_err_and(|e| e.code() == Some("NOAUTH")) {
        answer = says(options, sentinel, master, true).await;
    }
    let answer = answer.map_err(|e| match e.detail() {
        Some(detail) if detail.contains("No such master") => {
            Failure::new(ErrorKind::Unavailable, format!("the sentinel knows no primary named {master:?}"))
        }
        _ => classify_connect(&e),
    })?;
    let fields: HashMap<String, String> = redis::from_redis_value(answer).map_err(|_| malformed())?;
    let field = |name: &str| fields.get(name).ok_or_else(malformed);
    let port = field("port")?.parse().map_err(|_| malformed())?;
    let epoch = field("config-epoch")?.parse().map_err(|_| malformed())?;
    Ok((epoch, Address { host: field("ip")?.clone(), port }))
}

async fn says(options: &Options, sentinel: &Address, master: &str, login: bool) -> Result<Value, RedisError> {
    let client = Client::open(options.sentinel(sentinel, login)?)?;
    let settings = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(options.connect_timeout))
        .set_response_timeout(Some(options.connect_timeout));
    let mut conn = client.get_multiplexed_async_connection_with_config(&settings).await?;
    conn.send_packed_command(redis::cmd("SENTINEL").arg("MASTER").arg(master)).await?.extract_error()
}

fn malformed() -> Failure {
    Failure::new(ErrorKind::Backend, "the sentinel's answer is malformed")
}
