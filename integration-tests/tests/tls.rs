//! TLS on each server: what fits works, and what does not is refused with an error that says which.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use quorate::{Config, ErrorKind, Tls};
use quorate_testkit::{
    proxy::FaultProxy,
    servers::{self, Server},
    tls::{TlsFiles, TlsOptions},
};
use tokio::time::{Instant, sleep, timeout};

const LIMIT: Duration = Duration::from_secs(4);

async fn start(backend: &str, tls: Option<&TlsFiles>) -> Server {
    let tls = tls.cloned();
    match backend {
        "etcd" => servers::Etcd::start(servers::EtcdOptions { tls, ..Default::default() }).await,
        "redis" => servers::Redis::start(servers::RedisOptions { tls, ..Default::default() }).await,
        "consul" => servers::Consul::start(servers::ConsulOptions { tls, ..Default::default() }).await,
        _ => servers::ZooKeeper::start(servers::ZooKeeperOptions { tls, ..Default::default() }).await,
    }
    .unwrap()
}

fn config(scheme: &str, server: &Server, tls: Option<Tls>) -> Config {
    let config = Config::new(scheme, [server.addr().to_string()]).with_namespace("app").unwrap();
    let config = config.with_timeouts(LIMIT, LIMIT);
    match tls {
        Some(tls) => config.with_tls(tls),
        None => config,
    }
}

fn with_ca(files: &TlsFiles) -> Tls {
    Tls { ca: Some(files.ca()), cert: None, key: None }
}

fn with_both(ca: &TlsFiles, client: &TlsFiles) -> Tls {
    Tls { ca: Some(ca.ca()), cert: Some(client.client_cert()), key: Some(client.client_key()) }
}

async fn works(config: &Config) {
    let coord = quorate::connect_with(config).await.unwrap_or_else(|e| panic!("{e}"));
    let guard = coord.lock("job").acquire().await.unwrap();
    guard.release().await.unwrap();
    coord.close().await.unwrap();
}

/// Refused, and at once, with a word that says which it is; never by an answer that invites to try again.
async fn refused(what: &str, config: &Config, words: &[&str]) {
    let began = Instant::now();
    let answer = timeout(2 * LIMIT, quorate::connect_with(config)).await.unwrap_or_else(|_| panic!("{what}: hangs"));
    let error = answer.err().unwrap_or_else(|| panic!("{what}: accepted"));
    println!("{:>10} {what}: after {:?}: {error:?}", config.scheme, began.elapsed());
    assert_eq!(error.kind(), ErrorKind::Denied, "{what}: {error}");
    let text = error.to_string();
    assert!(words.iter().any(|word| text.contains(word)), "{what}: {error} has none of {words:?}");
    assert!(began.elapsed() < LIMIT, "{what}: refused only after {:?}", began.elapsed());
}

async fn matrix(backend: &str) {
    let (plain, secure) = (backend.to_owned(), format!("{backend}s"));
    let make = |options: TlsOptions| TlsFiles::generate_with(&options).unwrap();
    let stranger = make(TlsOptions::default());

    let mutual = make(TlsOptions::default());
    let server = start(backend, Some(&mutual)).await;
    works(&config(&secure, &server, Some(with_both(&mutual, &mutual)))).await;
    let with = |tls| config(&secure, &server, Some(tls));
    refused("no client certificate", &with(with_ca(&mutual)), &["give cert and key"]).await;
    refused("another authority", &with(with_both(&stranger, &mutual)), &["give the right one with ca"]).await;
    refused("a client of another authority", &with(with_both(&mutual, &stranger)), &["does not accept the client"])
        .await;
    refused("plain text to a server of TLS", &config(&plain, &server, None), &["speaks TLS here"]).await;
    drop(server);

    let old_client = make(TlsOptions { client_expired: true, ..TlsOptions::default() });
    let server = start(backend, Some(&old_client)).await;
    let with = config(&secure, &server, Some(with_both(&old_client, &old_client)));
    refused("an expired client", &with, &["certificate has expired", "and not expired?"]).await;
    drop(server);

    let one_sided = make(TlsOptions { asks_clients: false, ..TlsOptions::default() });
    let server = start(backend, Some(&one_sided)).await;
    works(&config(&secure, &server, Some(with_ca(&one_sided)))).await;
    let with = config(&secure, &server, Some(with_ca(&stranger)));
    refused("another authority", &with, &["give the right one with ca"]).await;
    drop(server);

    let expired = make(TlsOptions { server_expired: true, asks_clients: false, ..TlsOptions::default() });
    let server = start(backend, Some(&expired)).await;
    let with = config(&secure, &server, Some(with_ca(&expired)));
    refused("an expired server", &with, &["the server's certificate has expired"]).await;
    drop(server);

    let elsewhere = vec!["elsewhere.example".to_owned()];
    let named = make(TlsOptions { server_names: elsewhere, asks_clients: false, ..TlsOptions::default() });
    let server = start(backend, Some(&named)).await;
    let with = config(&secure, &server, Some(with_ca(&named)));
    refused("another host name", &with, &["for another name"]).await;
    drop(server);

    let server = start(backend, None).await;
    let with = config(&secure, &server, Some(with_ca(&mutual)));
    let answer = timeout(2 * LIMIT, quorate::connect_with(&with)).await.expect("TLS to plain text hangs");
    let error = answer.expect_err("there is no silent fall-back");
    println!("{secure:>10} TLS to a server of plain text: {error:?}");
    assert!(error.to_string().contains("speak TLS on this port"), "{error}");
}

/// A certificate is replaced while a coordinator is in use, first by one that the server does not accept: then it is this one
/// that new connections show. What was accepted before is accepted again once it is back.
async fn renewal(backend: &str) {
    let files = TlsFiles::generate().unwrap();
    let (stranger, copy) = (TlsFiles::generate().unwrap(), files.copy().unwrap());
    let server = start(backend, Some(&files)).await;
    let way = FaultProxy::start(server.addr()).await.unwrap();
    let mut config = config(&format!("{backend}s"), &server, Some(with_both(&copy, &copy)));
    config.endpoints = vec![way.addr().to_string()];
    // ZooKeeper's client reads the files for each session, so this one is to end soon.
    config.session_ttl = Duration::from_secs(2);
    let coord = quorate::connect_with(&config).await.unwrap();
    let kv = coord.kv();
    kv.put("a", "1").await.unwrap();
    copy.replace_client_by(&stranger).unwrap();
    let works_within = async |limit: Duration| {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if timeout(LIMIT, kv.put("a", "2")).await.is_ok_and(|put| put.is_ok()) {
                return true;
            }
            sleep(Duration::from_millis(50)).await;
        }
        false
    };
    way.cut().await;
    assert!(!works_within(Duration::from_secs(4)).await, "void: the way is cut");
    way.heal().await;
    assert!(!works_within(Duration::from_secs(3)).await, "the replaced certificate was not read");
    copy.replace_client_by(&files).unwrap();
    assert!(works_within(Duration::from_secs(20)).await, "the right certificate was not read again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_is_used_without_a_restart_on_etcd() {
    renewal("etcd").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_is_used_without_a_restart_on_redis() {
    renewal("redis").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_is_used_without_a_restart_on_consul() {
    renewal("consul").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_is_used_without_a_restart_on_zookeeper() {
    renewal("zookeeper").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_refuses_what_does_not_fit_and_says_which() {
    matrix("etcd").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_refuses_what_does_not_fit_and_says_which() {
    matrix("redis").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consul_refuses_what_does_not_fit_and_says_which() {
    matrix("consul").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zookeeper_refuses_what_does_not_fit_and_says_which() {
    matrix("zookeeper").await;
}
