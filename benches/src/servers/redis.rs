//! The raw side on Redis, with the crate redis: `SET NX PX`, and a script that deletes what is still ours.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use quorate_testkit::servers::{self, RedisOptions, Server};
use redis::{Client, IntoConnectionInfo as _, Script, aio::MultiplexedConnection, io::tcp::TcpSettings};

use super::{
    Contest, Pair, Raw, Round, VALUE,
    hand_off::{pause, timed},
};
use crate::Outcome;

const ROUND: &str = "raw/round";
const COMPARE_AND_DELETE: &str =
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0";

#[derive(Debug, Clone, Copy)]
pub(crate) struct Redis;

#[async_trait]
impl Contest for Redis {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn raw_is(&self) -> &'static str {
        "SET NX PX + EVALSHA of compare-and-delete; PUBLISH → message of a subscription that stands"
    }

    fn owner_changes(&self) -> f64 {
        4000.0
    }

    async fn start(&self) -> Result<Server, servers::Error> {
        servers::Redis::start(RedisOptions::default()).await
    }

    async fn connect(&self, server: &Server) -> Outcome<Raw> {
        let info = server.url().into_connection_info().map_err(failed("connect"))?;
        // Off in the crate's defaults, and on in every client that cares for latency.
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(info).map_err(failed("connect"))?;
        let connection = client.get_multiplexed_async_connection().await.map_err(failed("connect"))?;
        let mut messages = client.get_async_pubsub().await.map_err(failed("connect"))?;
        messages.subscribe(ROUND).await.map_err(failed("subscribe"))?;
        let (script, last) = (Script::new(COMPARE_AND_DELETE), AtomicU64::new(0));
        let pair = SetAndDelete { connection: connection.clone(), script, last };
        let round = Publish { connection, messages: Some(Box::new(messages.into_on_message())) };
        Ok(Raw { pair: Arc::new(pair), round: Box::new(round) })
    }
}

fn failed(what: &'static str) -> impl Fn(redis::RedisError) -> String {
    move |e| format!("redis, raw {what}: {e}")
}

struct SetAndDelete {
    connection: MultiplexedConnection,
    script: Script,
    /// Names the attempts, so that each deletes only its own.
    last: AtomicU64,
}

#[async_trait]
impl Pair for SetAndDelete {
    async fn pair(&self, name: &str) -> Outcome {
        let (key, mut connection) = (format!("raw/{name}"), self.connection.clone());
        let owner = format!("{VALUE}{:020}", self.last.fetch_add(1, Ordering::Relaxed));
        let mut set = redis::cmd("SET");
        set.arg(&key).arg(&owner).arg("NX").arg("PX").arg(30_000);
        let set: Option<String> = set.query_async(&mut connection).await.map_err(failed("SET"))?;
        let mut delete = self.script.key(&key);
        let deleted: i64 = delete.arg(&owner).invoke_async(&mut connection).await.map_err(failed("EVALSHA"))?;
        if set.is_some() && deleted == 1 { Ok(()) } else { Err(format!("redis, raw: {key} was in use")) }
    }
}

type Messages = dyn futures_util::Stream<Item = redis::Msg> + Send + Unpin;

struct Publish {
    connection: MultiplexedConnection,
    /// `None` only within a round.
    messages: Option<Box<Messages>>,
}

#[async_trait]
impl Round for Publish {
    async fn round(&mut self, settle: Duration) -> Outcome<Duration> {
        let mut messages = self.messages.take().ok_or("redis, raw subscription: lost in an earlier round")?;
        let heard = async move {
            messages.next().await.ok_or("redis, raw subscription: ended")?;
            Ok(messages)
        };
        let connection = &mut self.connection;
        let publish = async {
            let mut publish = redis::cmd("PUBLISH");
            publish.arg(ROUND).arg(VALUE);
            publish.query_async::<i64>(connection).await.map(drop).map_err(failed("PUBLISH"))
        };
        let (messages, time) = timed(heard, pause(settle), publish).await?;
        self.messages = Some(messages);
        Ok(time)
    }
}
