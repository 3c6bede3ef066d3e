//! Services that Go's gRPC naming and ours share, seen by etcd's own command-line client.

use std::{net::SocketAddr, sync::Arc};

use quorate_core::{Coordinator, SessionOptions, discovery::Instance};
use serde_json::{Value, json};
use tokio::process::Command;

use super::support::{connect, server, within};

async fn etcdctl(addr: SocketAddr, args: &[&str]) -> String {
    let output = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .arg(format!("--endpoints=http://{addr}"))
        .args(args)
        .output()
        .await
        .expect("etcdctl is installed with the package etcd-client");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn our_instances_are_endpoints_of_go_and_theirs_are_instances() {
    let server = server().await;
    let coord = Coordinator::new(Arc::new(connect(server.addr()).await), SessionOptions::default());
    let instance = Instance::new("orders", "10.0.0.7:8080").id("orders-7").tag("v2").weight(3);
    let registration = coord.register(instance.clone()).unwrap();
    within("the registration", registration.ready()).await.unwrap();
    let stored = etcdctl(server.addr(), &["get", "--print-value-only", "app/services/orders/orders-7"]).await;
    let stored: Value = serde_json::from_str(&stored).unwrap();
    assert_eq!((&stored["Op"], &stored["Addr"]), (&json!(0), &json!("10.0.0.7:8080")));

    // As `endpoints.Manager.AddEndpoint` stores it, on a lease of its own.
    let orders = coord.discover("orders").await.unwrap();
    let granted = etcdctl(server.addr(), &["lease", "grant", "60"]).await;
    let lease = granted.split(' ').nth(1).unwrap();
    let endpoint = r#"{"Op":0,"Addr":"10.0.0.9:8080","Metadata":{"build":"7"}}"#;
    etcdctl(server.addr(), &["put", "app/services/orders/10.0.0.9:8080", endpoint, "--lease", lease]).await;
    let now = within("their endpoint", orders.until(|now| now.len() == 2)).await;
    assert_eq!(**now.get("orders-7").unwrap(), instance);
    let theirs = now.get("10.0.0.9:8080").unwrap();
    assert_eq!((theirs.endpoint(), theirs.metadata["build"].as_str()), ("10.0.0.9:8080".to_owned(), "7"));
    etcdctl(server.addr(), &["lease", "revoke", lease]).await;
    within("its end", orders.until(|now| now.len() == 1)).await;
    registration.close().await.unwrap();
    within("nobody", orders.until(quorate_core::discovery::Instances::is_empty)).await;
    assert_eq!(etcdctl(server.addr(), &["get", "--prefix", "app/services/"]).await, "");
}
