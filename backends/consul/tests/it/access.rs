//! Who gets in, and how it is told to those who do not: tokens, TLS, agents that do not answer.

use std::{net::SocketAddr, time::Duration};

use quorate_consul::Consul;
use quorate_core::{Backend, Config, ErrorKind, KeyRange, Txn};
use quorate_testkit::{
    proxy::{Direction, FaultProxy},
    servers::{self, ConsulOptions, Secret, Server},
    tls::TlsFiles,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time::Instant};

use crate::common::{all, commit, config, grant, key, leftovers, line, put, raw, value};

const ROOT: &str = "5e11f9c0-1f2b-4c7e-8a53-0c8d1f1e7b11";

async fn ruled() -> Server {
    let options = ConsulOptions { token: Some(Secret::new(ROOT)), ..ConsulOptions::default() };
    servers::Consul::start(options).await.unwrap()
}

/// A token with these rules.
async fn token(addr: SocketAddr, name: &str, rules: &str) -> String {
    let policy = json!({ "Name": name, "Rules": rules }).to_string();
    let (status, body) = raw(addr, "PUT", "/v1/acl/policy", ROOT, &policy).await;
    assert_eq!(status, 200, "{body}");
    let token = json!({ "Policies": [{ "Name": name }] }).to_string();
    let (_, body) = raw(addr, "PUT", "/v1/acl/token", ROOT, &token).await;
    serde_json::from_str::<Value>(&body).unwrap()["SecretID"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_token_that_consul_does_not_know_is_denied_and_not_shown() {
    let server = ruled().await;
    for wrong in ["5e11f9c0-1f2b-4c7e-8a53-0c8d1f1e7b12", "not even a uuid"] {
        let e = Consul::connect(&config(server.addr()).with_token(wrong)).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
        assert!(!format!("{e} {e:?}").contains(wrong), "{e}");
    }
    let e = Consul::connect(&config(server.addr()).with_token("line\nbreak")).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    Consul::connect(&config(server.addr()).with_token(ROOT)).await.unwrap();
}

#[tokio::test]
async fn a_token_is_replaced_while_it_is_in_use() {
    let server = ruled().await;
    let rules = r#"key_prefix "app/" { policy = "write" } session_prefix "" { policy = "write" }"#;
    let (first, second) = (token(server.addr(), "one", rules).await, token(server.addr(), "two", rules).await);
    let secret = quorate_core::Secret::new(first);
    let client = Consul::connect(&config(server.addr()).with_token(secret.clone())).await.unwrap();
    commit(&client, [put("a", "1", None)]).await;
    secret.replace(ROOT.replace('5', "6"));
    assert_eq!(client.read(&all()).await.unwrap_err().kind(), ErrorKind::Denied, "the new one is sent");
    secret.replace(second);
    commit(&client, [put("a", "2", None)]).await;
    assert_eq!(value(&client, "a").await.unwrap().0, "2");
}

#[tokio::test]
async fn without_the_right_to_services_leases_are_plain_sessions_and_the_profile_says_so() {
    let server = ruled().await;
    let rules = r#"key_prefix "app/" { policy = "write" } session_prefix "" { policy = "write" }"#;
    let less = token(server.addr(), "less", rules).await;
    let more = format!(r#"{rules} service_prefix "quorate-session" {{ policy = "write" }}"#);
    let more = token(server.addr(), "more", &more).await;

    let plain = Consul::connect(&config(server.addr()).with_token(&less)).await.unwrap();
    assert_eq!(plain.profile().min_ttl, Duration::from_secs(10));
    assert!(plain.profile().expiry_lag >= Duration::from_secs(10));
    let lease = plain.grant(Duration::from_secs(2)).await.unwrap();
    assert_eq!(lease.ttl, Duration::from_secs(10), "raised to what the server gives");
    commit(&plain, [put("a", "1", Some(&lease.id))]).await;
    plain.renew(&lease.id).await.unwrap();
    plain.revoke(&lease.id).await.unwrap();
    assert_eq!(value(&plain, "a").await, None);

    let e =
        Consul::connect(&config(server.addr()).with_token(&less).with_option("session", "agent")).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Denied, "{e}");

    let fast = Consul::connect(&config(server.addr()).with_token(&more)).await.unwrap();
    assert_eq!(fast.profile().min_ttl, Duration::from_secs(1));
    let lease = fast.grant(Duration::from_secs(2)).await.unwrap();
    assert_eq!(lease.ttl, Duration::from_secs(2));
    fast.renew(&lease.id).await.unwrap();
    fast.revoke(&lease.id).await.unwrap();
}

#[tokio::test]
async fn what_a_token_may_not_do_is_denied_and_never_looks_empty() {
    let server = ruled().await;
    let root = Consul::connect(&config(server.addr()).with_token(ROOT)).await.unwrap();
    commit(&root, [put("a", "1", None)]).await;
    let rules = r#"key_prefix "other/" { policy = "write" } session_prefix "" { policy = "write" }"#;
    let other = token(server.addr(), "other", rules).await;
    let client = Consul::connect(&config(server.addr()).with_token(&other)).await.unwrap();
    let lease = grant(&client, Duration::from_secs(10)).await;
    let write = Txn { checks: Vec::new(), writes: vec![put("a", "2", None)] };
    let lock = line("a");
    for (what, error) in [
        ("read a key", client.read(&KeyRange::One(key("a"))).await.unwrap_err()),
        ("read a range", client.read(&all()).await.unwrap_err()),
        ("watch a range", client.watch(&all()).await.unwrap_err()),
        ("write", client.commit(&write).await.unwrap_err()),
        ("join a line", client.enqueue(&crate::common::entry(&lock, &lease)).await.unwrap_err()),
        ("list a line", client.line(&lock).await.unwrap_err()),
    ] {
        assert_eq!(error.kind(), ErrorKind::Denied, "{what}");
        assert!(error.to_string().contains("needs key_prefix write"), "{what}: the missing right is named: {error}");
    }
    client.revoke(&lease).await.unwrap();
}

#[tokio::test]
async fn tls_proves_both_sides() {
    let tls = TlsFiles::generate().unwrap();
    let stranger = TlsFiles::generate().unwrap();
    let server =
        servers::Consul::start(ConsulOptions { tls: Some(tls.clone()), ..ConsulOptions::default() }).await.unwrap();
    let with = |ca: &TlsFiles, own: Option<&TlsFiles>| {
        let own = own.map(|own| (own.client_cert(), own.client_key()));
        let (cert, key) = own.unzip();
        let material = quorate_core::Tls { ca: Some(ca.ca()), cert, key };
        Config::new("consuls", [server.addr().to_string()]).with_tls(material).with_namespace("app").unwrap()
    };
    let client = Consul::connect(&with(&tls, Some(&tls))).await.unwrap();
    commit(&client, [put("a", "over TLS", None)]).await;
    assert_eq!(value(&client, "a").await.unwrap().0, "over TLS");
    let lease = grant(&client, Duration::from_secs(2)).await;
    client.renew(&lease).await.unwrap();
    client.revoke(&lease).await.unwrap();

    for (what, config) in [
        ("a server of a stranger", with(&stranger, Some(&tls))),
        ("a client without a certificate", with(&tls, None)),
        ("a client of a stranger", with(&tls, Some(&stranger))),
        ("another name than asked for", with(&tls, Some(&tls)).with_option("tls_server_name", "elsewhere.example")),
    ] {
        let e = Consul::connect(&config).await.expect_err(what);
        let kinds = [ErrorKind::Denied, ErrorKind::Unavailable];
        assert!(kinds.contains(&e.kind()), "{what}: {e}");
    }
    let mut missing = with(&tls, None);
    missing.tls.as_mut().unwrap().ca = Some("/does/not/exist.pem".into());
    assert_eq!(Consul::connect(&missing).await.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn connecting_to_nobody_ends_in_time_and_names_the_endpoints() {
    // One refuses, one takes the connection and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addrs = [silent.local_addr().unwrap(), closed.local_addr().unwrap()];
    drop(closed);
    let config = Config::new("consul", addrs.map(|a| a.to_string()))
        .with_timeouts(Duration::from_secs(2), Duration::from_secs(2));
    let began = Instant::now();
    let e = Consul::connect(&config).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    assert!(addrs.iter().all(|a| e.to_string().contains(&a.to_string())), "{e}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn dead_and_silent_endpoints_among_several_do_no_harm() {
    let server = crate::common::server().await;
    let silent = FaultProxy::start(server.addr()).await.unwrap();
    silent.blackhole(Direction::ToClient);
    let dead = FaultProxy::start(server.addr()).await.unwrap();
    dead.cut().await;
    for _ in 0..4 {
        // The first choice is random: several clients, so that each endpoint is it.
        let endpoints = [silent.addr(), dead.addr(), server.addr()].map(|a| a.to_string());
        let config = Config::new("consul", endpoints).with_namespace("app").unwrap();
        let client = Consul::connect(&config).await.unwrap();
        let lease = grant(&client, Duration::from_secs(5)).await;
        for i in 0..20 {
            commit(&client, [put(&format!("k{i}"), "v", Some(&lease))]).await;
        }
        client.renew(&lease).await.unwrap();
        client.revoke(&lease).await.unwrap();
    }
    assert_eq!(leftovers(server.addr()).await, (0, 0));
}
