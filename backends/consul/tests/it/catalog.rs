//! Services as Consul's own clients register and see them.

use std::{net::SocketAddr, time::Duration};

use quorate_consul::Consul;
use quorate_core::{
    Backend as _, Config, Coordinator, LeaseId, SessionOptions,
    discovery::{Catalog, Health, Instance, Instances, Registry, Service},
};
use quorate_testkit::{
    proxy::{Direction, FaultProxy},
    servers::{self, ConsulOptions},
};
use tokio::{
    net::TcpListener,
    process::Command,
    time::{Instant, sleep, timeout},
};

use crate::common::{LONG, client, grant, raw, raw_json, server};

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

async fn dig(port: u16, arguments: &[&str]) -> String {
    let port = port.to_string();
    let common = ["@127.0.0.1", "-p", &port, "+short", "+tries=5", "+time=2"];
    let output = Command::new("dig").args(common).args(arguments).output().await.expect("the program dig is installed");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whoever knows nothing of quorate nor of Consul finds our instances by DNS.
#[tokio::test]
async fn dns_answers_with_our_living_instances_and_with_no_others() {
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = servers::Consul::start(ConsulOptions { dns: Some(port), ..ConsulOptions::default() }).await.unwrap();
    let way = FaultProxy::start(server.addr()).await.unwrap();
    let (a, b) = (coord(server.addr(), Duration::from_secs(10)).await, coord(way.addr(), Duration::from_secs(2)).await);
    let one = a.register(Instance::new("orders", "10.0.0.7:8080").id("1").tag("v2").weight(3)).unwrap();
    let two = b.register(Instance::new("orders", "10.0.0.8:8081").id("2").weight(5)).unwrap();
    for registration in [&one, &two] {
        timeout(LONG, registration.ready()).await.expect("in time").unwrap();
    }
    let sorted = |answer: String| {
        let mut lines: Vec<_> = answer.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    let addresses = async || sorted(dig(port, &["A", "orders.service.consul"]).await);
    assert_eq!(addresses().await, ["10.0.0.7", "10.0.0.8"]);
    // Priority, weight, port, name.
    let services = sorted(dig(port, &["SRV", "orders.service.consul"]).await);
    let numbers: Vec<_> =
        services.iter().filter_map(|line| line.rsplit_once(' ').map(|(numbers, _)| numbers)).collect();
    assert_eq!(numbers, ["1 3 8080", "1 5 8081"], "{services:?}");
    assert_eq!(sorted(dig(port, &["A", "v2.orders.service.consul"]).await), ["10.0.0.7"], "by tag");
    assert_eq!(dig(port, &["A", "bills.service.consul"]).await, "");
    // Nothing renews the second one's session any more.
    way.cut().await;
    let end = Instant::now() + LONG;
    while addresses().await != ["10.0.0.7"] {
        assert!(Instant::now() < end, "a dead instance is still answered: {:?}", addresses().await);
        sleep(Duration::from_millis(50)).await;
    }
    one.close().await.unwrap();
    assert_eq!(addresses().await, [""; 0]);
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

/// A check that is removed leaves no index behind by which a watcher could know that something has changed.
#[tokio::test]
async fn health_that_returns_is_told_also_if_the_failing_check_was_removed() {
    let server = server().await;
    let coord = coord(server.addr(), Duration::from_secs(10)).await;
    let body = r#"{"Name":"orders","ID":"theirs","Address":"10.1.1.1","Port":80}"#;
    let (status, answer) = raw(server.addr(), "PUT", "/v1/agent/service/register", "", body).await;
    assert_eq!(status, 200, "{answer}");
    let orders = coord.discover("orders").await.unwrap();
    until(&orders, |now| now.passing().count() == 1).await;
    for round in 1..=3 {
        let check = r#"{"Name":"disk","ID":"disk","ServiceID":"theirs","TTL":"60s","Status":"critical"}"#;
        let (status, answer) = raw(server.addr(), "PUT", "/v1/agent/check/register", "", check).await;
        assert_eq!(status, 200, "{answer}");
        let now = until(&orders, |now| now.passing().count() == 0).await;
        assert_eq!(now.len(), 1, "{round}: it fails, and is there");
        // A younger check, so that the highest index stays when the older one is removed.
        let check = r#"{"Name":"net","ID":"net","ServiceID":"theirs","TTL":"60s","Status":"passing"}"#;
        let (status, answer) = raw(server.addr(), "PUT", "/v1/agent/check/register", "", check).await;
        assert_eq!(status, 200, "{answer}");
        sleep(Duration::from_millis(300)).await;
        if round == 2 {
            let (status, answer) = raw(server.addr(), "PUT", "/v1/agent/check/pass/disk", "", "").await;
            assert_eq!(status, 200, "{answer}");
            until(&orders, |now| now.passing().count() == 1).await;
        }
        let (status, answer) = raw(server.addr(), "PUT", "/v1/agent/check/deregister/disk", "", "").await;
        assert_eq!(status, 200, "{answer}");
        until(&orders, |now| now.passing().count() == 1).await;
    }
}

fn catalog(client: &Consul) -> std::sync::Arc<dyn Catalog> {
    match client.registry() {
        Registry::Native(catalog) => catalog,
        Registry::Keys(_) => panic!("services are kept in Consul's catalog"),
    }
}

async fn owner(catalog: &dyn Catalog, lease: &LeaseId) -> Option<LeaseId> {
    catalog.find(lease, "orders", "1").await.unwrap().and_then(|found| found.lease)
}

#[tokio::test]
async fn the_end_of_a_lease_leaves_alone_what_its_successor_has_registered_anew() {
    let server = server().await;
    let client = client(server.addr()).await;
    let (first, second) =
        (grant(&client, Duration::from_secs(10)).await, grant(&client, Duration::from_secs(10)).await);
    let (catalog, instance) = (catalog(&client), Instance::new("orders", "10.0.0.7:80").id("1"));
    catalog.publish(&first, &instance).await.unwrap();
    catalog.publish(&second, &instance).await.unwrap();
    client.revoke(&first).await.unwrap();
    assert_eq!(owner(&*catalog, &second).await.as_ref(), Some(&second), "it went with the lease before");
    let found = raw_json(server.addr(), "/v1/health/service/orders?passing").await;
    assert_eq!(found.as_array().map(Vec::len), Some(1), "{found}");
    // By withdrawal as by revocation.
    let third = grant(&client, Duration::from_secs(10)).await;
    catalog.publish(&third, &instance).await.unwrap();
    catalog.withdraw(&second, &instance).await.unwrap();
    assert_eq!(owner(&*catalog, &third).await.as_ref(), Some(&third));
    client.revoke(&third).await.unwrap();
    assert_eq!(raw_json(server.addr(), "/v1/health/service/orders").await.as_array().map(Vec::len), Some(0));
}

/// What an agent was told is known to that agent alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_is_looked_for_where_its_lease_lives_whichever_agent_is_in_use() {
    let cluster = servers::Consul::cluster(ConsulOptions::default()).await.unwrap();
    let addrs = cluster.addrs();
    let proxies = [FaultProxy::start(addrs[0]).await.unwrap(), FaultProxy::start(addrs[1]).await.unwrap()];
    let endpoints = proxies.each_ref().map(|proxy| proxy.addr().to_string());
    let config = Config::new("consul", endpoints).with_namespace("app").unwrap();
    let client = std::sync::Arc::new(Consul::connect(&config).await.unwrap());
    let lease = grant(&client, Duration::from_secs(60)).await;
    let (catalog, instance) = (catalog(&client), Instance::new("orders", "10.0.0.7:80").id("1"));
    // Which agent is in use is the client's own choice.
    let turns = || proxies.each_ref().map(|proxy| proxy.counters().turns);
    let before = turns();
    catalog.publish(&lease, &instance).await.unwrap();
    let used = proxies.iter().zip(before.iter().zip(turns())).find(|(_, (before, now))| now > before);
    let (used, _) = used.expect("it went to one of them");
    used.cut().await;
    // Calls go to the other agent from now on.
    let failed = timeout(LONG, client.read(&crate::common::all())).await.expect("at once");
    assert!(failed.is_err(), "void: the agent of the lease was not in use");
    timeout(LONG, client.read(&crate::common::all())).await.expect("at once").expect("the other agent serves");
    used.heal().await;
    assert_eq!(owner(&*catalog, &lease).await.as_ref(), Some(&lease), "the other agent does not know of it");
}

/// Whatever stands on a lease is renewed after the lease: locks do not wait for instances.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_does_not_wait_for_the_instances_of_the_lease() {
    const INSTANCES: usize = 120;
    const WAY: Duration = Duration::from_millis(100);
    let server = server().await;
    let proxy = FaultProxy::start(server.addr()).await.unwrap();
    let client = client(proxy.addr()).await;
    let lease = grant(&client, Duration::from_secs(30)).await;
    let catalog = catalog(&client);
    let published = (0..INSTANCES).map(|i| {
        let (catalog, lease) = (catalog.clone(), lease.clone());
        async move { catalog.publish(&lease, &Instance::new("orders", "h:1").id(i.to_string())).await.unwrap() }
    });
    futures_util::future::join_all(published).await;
    proxy.delay(Direction::ToServer, WAY);
    for _ in 0..3 {
        let began = Instant::now();
        client.renew(&lease).await.unwrap();
        // All of them, eight at a time, take fifteen round trips and more.
        assert!(began.elapsed() < 8 * WAY, "a renewal took {:?}", began.elapsed());
        sleep(WAY).await;
    }
    proxy.delay(Direction::ToServer, Duration::ZERO);
    let passing = async || {
        let found = raw_json(server.addr(), "/v1/health/service/orders?passing").await;
        found.as_array().map_or(0, Vec::len)
    };
    assert_eq!(passing().await, INSTANCES, "and the instances are kept up all the same");
}
