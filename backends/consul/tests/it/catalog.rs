//! Services as Consul's own clients register and see them.

use std::{net::SocketAddr, time::Duration};

use quorate_core::{
    Coordinator, SessionOptions,
    discovery::{Health, Instance, Instances, Service},
};
use tokio::{net::TcpListener, process::Command, time::timeout};

use crate::common::{LONG, client, raw, raw_json, server};

async fn consul(addr: SocketAddr, args: &[&str]) -> String {
    let output = Command::new("consul")
        .args(args)
        .env("CONSUL_HTTP_ADDR", addr.to_string())
        .output()
        .await
        .expect("the program consul is installed");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn until(service: &Service, condition: impl FnMut(&Instances) -> bool) -> Instances {
    timeout(LONG, service.until(condition)).await.expect("in time")
}

async fn coord(addr: SocketAddr, ttl: Duration) -> Coordinator {
    Coordinator::new(client(addr).await, SessionOptions { ttl, ..SessionOptions::default() })
}

#[tokio::test]
async fn consuls_own_clients_see_our_instances() {
    let server = server().await;
    let coord = coord(server.addr(), Duration::from_secs(10)).await;
    let instance = Instance::new("orders", "10.0.0.7:8080").id("Orders/7").tag("v2").weight(3).meta("build", "abc");
    let registration = coord.register(instance).unwrap();
    timeout(LONG, registration.ready()).await.expect("in time").unwrap();
    let services = consul(server.addr(), &["catalog", "services", "-tags"]).await;
    assert!(services.lines().any(|line| line.starts_with("orders") && line.contains("v2")), "{services}");
    let passing = raw_json(server.addr(), "/v1/health/service/orders?passing").await;
    let [found] = passing.as_array().unwrap().as_slice() else { panic!("{passing}") };
    let service = &found["Service"];
    assert_eq!(
        (service["Address"].as_str(), service["Port"].as_u64(), service["Weights"]["Passing"].as_u64()),
        (Some("10.0.0.7"), Some(8080), Some(3))
    );
    assert_eq!(service["Meta"]["build"], "abc");
    assert_eq!(service["ID"], "quorate:app:orders:%4frders%2f7");
    registration.close().await.unwrap();
    assert_eq!(raw_json(server.addr(), "/v1/health/service/orders").await.as_array().map(Vec::len), Some(0));
}

#[tokio::test]
async fn instances_of_others_are_found_with_the_health_of_their_checks() {
    let server = server().await;
    let coord = coord(server.addr(), Duration::from_secs(10)).await;
    let orders = coord.discover("orders").await.unwrap();
    consul(
        server.addr(),
        &["services", "register", "-name=orders", "-id=theirs", "-address=10.1.1.1", "-port=80", "-tag=x"],
    )
    .await;
    let now = until(&orders, |now| now.len() == 1).await;
    let theirs = now.iter().next().unwrap();
    assert_eq!(
        (theirs.endpoint(), theirs.health, theirs.tags.contains("x")),
        ("10.1.1.1:80".into(), Health::Passing, true)
    );
    assert!(theirs.id.ends_with("/theirs"), "{theirs}");

    // Checked over TCP by the agent: first somebody answers, then nobody.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let open = listener.local_addr().unwrap();
    let check = format!(r#"{{"TCP":"{open}","Interval":"1s","Timeout":"1s","Status":"passing"}}"#);
    let body =
        format!(r#"{{"Name":"orders","ID":"checked","Address":"127.0.0.1","Port":{},"Check":{check}}}"#, open.port());
    let (status, answer) = raw(server.addr(), "PUT", "/v1/agent/service/register", "", &body).await;
    assert_eq!(status, 200, "{answer}");
    until(&orders, |now| now.passing().count() == 2).await;
    drop(listener);
    let now = until(&orders, |now| now.passing().count() == 1).await;
    assert_eq!(now.iter().filter(|i| i.health == Health::Failing).map(|i| i.port).collect::<Vec<_>>(), [open.port()]);
    consul(server.addr(), &["services", "deregister", "-id=checked"]).await;
    until(&orders, |now| now.len() == 1).await;
}
