//! The raw side on ZooKeeper, with zookeeper-client: an ephemeral sequential node created and deleted.
//!
//! quorate lists the line behind each creation, in the same round trip; the raw side does not.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate_testkit::servers::{self, Server, ZooKeeperOptions};
use zookeeper_client::{Acls, Client, CreateMode, EventType};

use super::{
    Contest, Pair, Raw, Round, VALUE,
    hand_off::{pause, timed},
};
use crate::Outcome;

const ROUND: &str = "/raw/round";

#[derive(Debug, Clone, Copy)]
pub(crate) struct ZooKeeper;

#[async_trait]
impl Contest for ZooKeeper {
    fn name(&self) -> &'static str {
        "zookeeper"
    }

    fn raw_is(&self) -> &'static str {
        "create ephemeral sequential + delete; delete → event of a watch that stands"
    }

    fn owner_changes(&self) -> f64 {
        1500.0
    }

    async fn start(&self) -> Result<Server, servers::Error> {
        servers::ZooKeeper::start(ZooKeeperOptions::default()).await
    }

    async fn connect(&self, server: &Server) -> Outcome<Raw> {
        let address = server.addr().to_string();
        let connect = || async { Client::connect(&address).await.map_err(failed("connect")) };
        let (one, other) = (connect().await?, connect().await?);
        one.mkdir("/raw", &CreateMode::Persistent.with_acls(Acls::anyone_all())).await.map_err(failed("mkdir"))?;
        Ok(Raw { pair: Arc::new(Nodes(one.clone())), round: Box::new(DeleteAndWatch { writer: one, listener: other }) })
    }
}

fn failed(what: &'static str) -> impl Fn(zookeeper_client::Error) -> String {
    move |e| format!("zookeeper, raw {what}: {e}")
}

struct Nodes(Client);

#[async_trait]
impl Pair for Nodes {
    async fn pair(&self, name: &str) -> Outcome {
        // All in one directory: the raw side has no line to list, so that nothing hangs on it.
        let stem = format!("/raw/{name}-");
        let options = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());
        let created = self.0.create(&stem, VALUE.as_bytes(), &options).await.map_err(failed("create"))?;
        self.0.delete(&format!("{stem}{}", created.1), None).await.map_err(failed("delete"))
    }
}

struct DeleteAndWatch {
    writer: Client,
    listener: Client,
}

#[async_trait]
impl Round for DeleteAndWatch {
    async fn round(&mut self, settle: Duration) -> Outcome<Duration> {
        let options = CreateMode::Persistent.with_acls(Acls::anyone_all());
        self.writer.create(ROUND, VALUE.as_bytes(), &options).await.map_err(failed("create"))?;
        let (_, _, watcher) = self.listener.get_and_watch_data(ROUND).await.map_err(failed("watch"))?;
        let heard = async move {
            let event = watcher.changed().await;
            let expected = event.event_type == EventType::NodeDeleted;
            if expected { Ok(()) } else { Err(format!("zookeeper, raw watch: {event:?}")) }
        };
        let delete = async { self.writer.delete(ROUND, None).await.map_err(failed("delete")) };
        timed(heard, pause(settle), delete).await.map(|((), time)| time)
    }
}
