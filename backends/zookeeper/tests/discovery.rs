//! Services that Curator's service discovery and ours share, seen by kazoo.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{path::PathBuf, process::Stdio, time::Duration};

use quorate_core::{
    Coordinator, SessionOptions,
    discovery::{Health, Instance, Instances},
};
use quorate_testkit::install::python_venv;
use support::*;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Prints what is registered; then registers as Curator does, says so, and stays until its input ends.
const SCRIPT: &str = r#"
import json, sys
from kazoo.client import KazooClient
zk = KazooClient(hosts=sys.argv[1])
zk.start()
base = sys.argv[2] + "/services/orders"
value, stat = zk.get(base + "/orders-7")
print(json.dumps({"record": json.loads(value), "ephemeral": stat.ephemeralOwner != 0}), flush=True)
theirs = {"name": "orders", "id": "theirs", "address": "10.0.0.9", "port": 80, "sslPort": None, "payload": None,
          "registrationTimeUTC": 1, "serviceType": "DYNAMIC", "uriSpec": None, "enabled": False}
zk.create(base + "/theirs", json.dumps(theirs).encode(), ephemeral=True)
print("registered", flush=True)
sys.stdin.readline()
zk.stop()
"#;

#[tokio::test]
async fn our_instances_are_curators_and_curators_are_ours() {
    let server = server().await;
    let backend = client(&server).await;
    let coord = Coordinator::new(backend, SessionOptions::default());
    let instance = Instance::new("orders", "10.0.0.7:8080").id("orders-7").tag("v2").weight(3);
    let registration = coord.register(instance.clone()).unwrap();
    timeout(PATIENCE, registration.ready()).await.expect("in time").unwrap();

    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kazoo");
    let python = python_venv(&dir, &["kazoo"]).unwrap_or_else(|e| panic!("{e}"));
    let mut command = Command::from(python.command());
    command.args(["-c", SCRIPT]).arg(server.addr().to_string()).arg("/tests");
    let mut kazoo =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("python is there");
    let mut said = BufReader::new(kazoo.stdout.take().unwrap()).lines();
    let mut line = async || timeout(PATIENCE, said.next_line()).await.expect("in time").unwrap().expect("a line");
    let seen: serde_json::Value = serde_json::from_str(&line().await).unwrap();
    let record = &seen["record"];
    assert_eq!((record["name"].as_str(), record["address"].as_str()), (Some("orders"), Some("10.0.0.7")));
    assert_eq!((record["port"].as_u64(), record["serviceType"].as_str()), (Some(8080), Some("DYNAMIC")));
    assert_eq!(seen["ephemeral"], true);

    assert_eq!(line().await, "registered");
    let orders = coord.discover("orders").await.unwrap();
    let both = timeout(PATIENCE, orders.until(|now| now.len() == 2)).await.expect("in time");
    assert_eq!(**both.get("orders-7").unwrap(), instance);
    let theirs = both.get("theirs").unwrap();
    assert_eq!((theirs.endpoint().as_str(), theirs.health), ("10.0.0.9:80", Health::Draining));
    drop(kazoo.stdin.take());
    timeout(PATIENCE, orders.until(|now| now.len() == 1)).await.expect("it goes with its client");
    registration.close().await.unwrap();
    timeout(PATIENCE, orders.until(Instances::is_empty)).await.expect("in time");
}
