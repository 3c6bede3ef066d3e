//! The raw side on etcd, with etcd-client: a transaction that creates a key on a lease, and one that deletes it.

use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{Client, Compare, CompareOp, KvClient, PutOptions, Txn, TxnOp, WatchStream};
use quorate_testkit::servers::{self, EtcdOptions, Server};

use super::{
    Contest, Pair, Raw, Round, VALUE,
    hand_off::{pause, timed},
};
use crate::Outcome;

const ROUND: &str = "raw/round";

#[derive(Debug, Clone, Copy)]
pub(crate) struct Etcd;

#[async_trait]
impl Contest for Etcd {
    fn name(&self) -> &'static str {
        "etcd"
    }

    fn raw_is(&self) -> &'static str {
        "create-transaction on a lease + delete-transaction; put → event of a watch that stands"
    }

    fn owner_changes(&self) -> f64 {
        640.0
    }

    async fn start(&self) -> Result<Server, servers::Error> {
        servers::Etcd::start(EtcdOptions::default()).await
    }

    async fn connect(&self, server: &Server) -> Outcome<Raw> {
        let endpoint = format!("http://{}", server.addr());
        let connect = || async { Client::connect([&endpoint], None).await.map_err(failed("connect")) };
        let (mut one, other) = (connect().await?, connect().await?);
        // Longer than any run: nothing is renewed beside the measurement.
        let lease = one.lease_grant(3600, None).await.map_err(failed("grant"))?.id();
        let mut watch = other.watch_client().watch(ROUND, None).await.map_err(failed("watch"))?;
        let created = watch.message().await.map_err(failed("watch"))?;
        if !created.is_some_and(|answer| answer.created()) {
            return Err("etcd, raw watch: not confirmed".to_owned());
        }
        let pair = Transactions { kv: one.kv_client(), lease };
        Ok(Raw {
            pair: std::sync::Arc::new(pair),
            round: Box::new(PutAndWatch { kv: one.kv_client(), watch: Some(watch) }),
        })
    }
}

fn failed(what: &'static str) -> impl Fn(etcd_client::Error) -> String {
    move |e| format!("etcd, raw {what}: {e}")
}

struct Transactions {
    kv: KvClient,
    lease: i64,
}

#[async_trait]
impl Pair for Transactions {
    async fn pair(&self, name: &str) -> Outcome {
        let (key, mut kv) = (format!("raw/{name}"), self.kv.clone());
        let put = TxnOp::put(&*key, VALUE, Some(PutOptions::new().with_lease(self.lease)));
        let absent = Compare::create_revision(&*key, CompareOp::Equal, 0);
        let created = kv.txn(Txn::new().when([absent]).and_then([put])).await.map_err(failed("create"))?;
        let revision = created.header().map_or(0, etcd_client::ResponseHeader::revision);
        let own = Compare::create_revision(&*key, CompareOp::Equal, revision);
        let delete = Txn::new().when([own]).and_then([TxnOp::delete(&*key, None)]);
        let deleted = kv.txn(delete).await.map_err(failed("delete"))?;
        if created.succeeded() && deleted.succeeded() { Ok(()) } else { Err(format!("etcd, raw: {key} was in use")) }
    }
}

struct PutAndWatch {
    kv: KvClient,
    /// `None` only within a round.
    watch: Option<WatchStream>,
}

#[async_trait]
impl Round for PutAndWatch {
    async fn round(&mut self, settle: Duration) -> Outcome<Duration> {
        let mut watch = self.watch.take().ok_or("etcd, raw watch: lost in an earlier round")?;
        let heard = async move {
            let answer = watch.message().await.map_err(failed("watch"))?;
            if answer.is_some_and(|answer| !answer.events().is_empty()) {
                Ok(watch)
            } else {
                Err("etcd, raw watch: ended".to_owned())
            }
        };
        let kv = &mut self.kv;
        let put = async { kv.put(ROUND, VALUE, None).await.map(drop).map_err(failed("put")) };
        let (watch, time) = timed(heard, pause(settle), put).await?;
        self.watch = Some(watch);
        Ok(time)
    }
}
