//! Credentials, permissions, TLS, endpoints, and a server that is short of memory.

mod support;

use std::time::Duration;

use quorate_core::{Backend, Config, ErrorKind, Result, Tls};
use quorate_redis::Redis;
use quorate_testkit::{
    servers::{Credentials, RedisOptions},
    tls::TlsFiles,
};
use support::*;
use tokio::time::Instant;

async fn refused(config: &Config) -> quorate_core::Error {
    match soon("an answer", Redis::connect(config)).await {
        Ok(_) => panic!("connected"),
        Err(e) => e,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_or_missing_password_is_denied_and_never_shown() {
    let login = Credentials::new("default", "s3cret-of-mine");
    let server = started(RedisOptions { login: Some(login), ..RedisOptions::default() }).await;
    let good = Config::parse(&format!("redis://:s3cret-of-mine@{}/t", server.addr())).unwrap();
    let b = open(&good).await;
    lease(&b).await;
    for login in ["", ":wrong-guess@", "nobody:wrong-guess@"] {
        let config = Config::parse(&format!("redis://{login}{}/t", server.addr())).unwrap();
        let e = refused(&config).await;
        assert_eq!(e.kind(), ErrorKind::Denied, "{login:?}: {e}");
        let shown = format!("{e} {e:?} {b:?}");
        assert!(!shown.contains("wrong-guess") && !shown.contains("s3cret"), "{shown}");
    }
}

/// The permissions that the crate's documentation asks for.
const RULES: &[&str] = &[
    "resetkeys",
    "~{quorate/t}:*",
    "resetchannels",
    "&{quorate/t}:*",
    "nocommands",
    "+@connection",
    "+evalsha",
    "+script|load",
    "+subscribe",
    "+unsubscribe",
    "+publish",
    "+time",
    "+hget",
    "+hmget",
    "+hset",
    "+hdel",
    "+zadd",
    "+zrem",
    "+zscore",
    "+zrangebyscore",
    "+zrangebylex",
    "+zrevrangebylex",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_permissions_suffice_and_each_is_needed() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let grant = async |without: Option<&str>| {
        let mut words = vec!["ACL", "SETUSER", "app", "reset", "on", ">pw"];
        words.extend(RULES.iter().copied().filter(|rule| Some(*rule) != without));
        raw.ask::<String>(&words).await;
    };
    let config = Config::parse(&format!("redis://app:pw@{}/t", server.addr())).unwrap();
    grant(None).await;
    let b = open(&config).await;
    let (lease1, line) = (lease(&b).await, dir("lock/a"));
    let mut watch = b.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    let place = join(&b, &line, &lease1).await;
    let second = join(&b, &line, &lease1).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "v", Some(&lease1))])).await.unwrap();
    event(&mut watch).await;
    b.line(&line).await.unwrap();
    b.renew(&lease1).await.unwrap();
    let b2 = b.clone();
    let waiting = tokio::spawn(async move { b2.gone(&place.ticket).await });
    b.revoke(&lease1).await.unwrap();
    soon("the wait ends", waiting).await.unwrap().unwrap();
    assert_eq!(b.look(&second.ticket, 1).await.unwrap(), None);
    event(&mut watch).await;
    drop((watch, b));
    let mut needed = 0;
    for rule in RULES.iter().filter(|rule| rule.starts_with(['+', '~', '&'])) {
        // Leaving a connection is not missed, and the rest of that category is not used.
        if ["+@connection", "+unsubscribe", "+script|load"].contains(rule) {
            continue;
        }
        raw.ask::<String>(&["SCRIPT", "FLUSH"]).await;
        grant(None).await;
        drop(open(&config).await);
        grant(Some(rule)).await;
        let e = refused(&config).await;
        assert_eq!(e.kind(), ErrorKind::Denied, "without {rule}: {e}");
        needed += 1;
    }
    assert!(needed >= 16);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_is_replaced_while_it_is_in_use() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let mut words = vec!["ACL", "SETUSER", "app", "reset", "on", ">old"];
    words.extend(RULES);
    raw.ask::<String>(&words).await;
    let secret = quorate_core::Secret::new("old");
    let config = Config::parse(&format!("redis://{}/t", server.addr())).unwrap().with_login("app", secret.clone());
    let b = open(&config).await;
    let lease = lease(&b).await;
    raw.ask::<String>(&["ACL", "SETUSER", "app", "resetpass", ">new"]).await;
    secret.replace("new");
    // Whatever comes after the loss of the connections logs in with the new one.
    raw.ask::<i64>(&["CLIENT", "KILL", "USER", "app"]).await;
    persist(|| b.renew(&lease)).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "v", Some(&lease))])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_an_own_ca_and_a_client_certificate_works_and_without_them_does_not() {
    let files = TlsFiles::generate().unwrap();
    let server = started(RedisOptions { tls: Some(files.clone()), ..RedisOptions::default() }).await;
    let config = |tls: Tls| Config::new("rediss", [server.addr().to_string()]).with_tls(tls);
    let full = Tls { ca: Some(files.ca()), cert: Some(files.client_cert()), key: Some(files.client_key()) };
    let b = open(&config(full.clone())).await;
    lease(&b).await;
    let mut watch = b.watch(&all()).await.unwrap();
    reset(&mut watch).await;
    let strange = TlsFiles::generate().unwrap();
    for (what, tls) in [
        ("no client certificate", Tls { cert: None, key: None, ..full.clone() }),
        ("another CA", Tls { ca: Some(strange.ca()), ..full.clone() }),
        ("the system's roots", Tls { ca: None, ..full.clone() }),
        (
            "a stranger's certificate",
            Tls { cert: Some(strange.client_cert()), key: Some(strange.client_key()), ..full.clone() },
        ),
    ] {
        let e = refused(&config(tls)).await;
        assert_eq!(e.kind(), ErrorKind::Denied, "{what}: {e}");
    }
    let plain = Config::new("redis", [server.addr().to_string()]);
    assert_eq!(refused(&plain).await.kind(), ErrorKind::Denied);
    let swapped = Tls { ca: Some(files.client_key()), ..full };
    assert_eq!(refused(&config(swapped)).await.kind(), ErrorKind::InvalidInput, "a file without certificates");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_endpoint_among_several_and_a_replica_are_passed_over() -> Result<()> {
    let server = server().await;
    let replica = started(RedisOptions {
        extra_lines: vec![format!("replicaof 127.0.0.1 {}", server.port())],
        ..RedisOptions::default()
    })
    .await;
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("redis://{dead},{},{}/t", replica.addr(), server.addr());
    for _ in 0..6 {
        let started = Instant::now();
        let b = Redis::connect(&Config::parse(&url)?).await?;
        b.grant(Duration::from_secs(1)).await?;
        assert!(!b.profile().linearizable_reads, "one of several may be a former primary");
        assert!(started.elapsed() < Duration::from_secs(3));
    }
    let e = refused(&Config::parse(&format!("redis://{dead},{}/t", replica.addr()))?).await;
    assert_eq!(e.kind(), ErrorKind::Unavailable);
    assert!(e.to_string().contains(&dead.to_string()) && e.to_string().contains("READONLY"), "{e}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_unavailable_within_the_connect_timeout() {
    // 192.0.2.0/24 is set aside for documentation: nothing answers, or the network says so at once.
    for host in ["127.0.0.1:1", "192.0.2.1:6379", "does-not-exist.invalid:6379"] {
        let config = Config::new("redis", [host]).with_timeouts(Duration::from_millis(700), Duration::from_secs(5));
        let started = Instant::now();
        let e = refused(&config).await;
        assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
        assert!(e.to_string().contains(host), "{e}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_refuses_what_adds_data_and_never_renewals_and_releases() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    let b = connect(server.addr()).await;
    let lease1 = lease(&b).await;
    let place = join(&b, &dir("lock/a"), &lease1).await;
    b.commit(&txn(vec![], vec![put(&key("k"), "v", None)])).await.unwrap();
    raw.ask::<String>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let full = |e: quorate_core::Error| assert_eq!(e.kind(), ErrorKind::Backend, "{e}");
    full(b.grant(Duration::from_secs(1)).await.unwrap_err());
    full(b.enqueue(&entry(&dir("lock/b"), &lease1)).await.unwrap_err());
    full(b.commit(&txn(vec![], vec![put(&key("k2"), "v", None)])).await.unwrap_err());
    b.renew(&lease1).await.unwrap();
    assert_eq!(names(&b.read(&all()).await.unwrap()), ["k"]);
    assert!(b.commit(&release(&place)).await.unwrap().applied);
    assert!(b.commit(&txn(vec![], vec![quorate_core::Write::Delete(key("k"))])).await.unwrap().applied);
    b.revoke(&lease1).await.unwrap();
    assert!(b.line(&dir("lock/b")).await.unwrap().tickets.is_empty(), "what was refused was not applied");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn databases_and_namespaces_are_apart() {
    let server = server().await;
    let urls = ["/a", "/b", "/a?db=1", "/a/b", "", "/quorate", "/a%7Db", "/%7D"];
    let mut clients = Vec::new();
    for url in urls {
        let b = open(&config(server.addr(), url)).await;
        b.commit(&txn(vec![], vec![put(&key("k"), url, None)])).await.unwrap();
        let mut watch = b.watch(&all()).await.unwrap();
        reset(&mut watch).await;
        clients.push((b, watch));
    }
    for ((b, watch), url) in clients.iter_mut().zip(urls) {
        let snapshot = b.read(&all()).await.unwrap();
        assert_eq!(snapshot.entries.len(), 1);
        assert_eq!(snapshot.entries[0].value, url.as_bytes());
        b.commit(&txn(vec![], vec![put(&key("k"), "again", None)])).await.unwrap();
        let told = event(watch).await;
        assert!(matches!(&told, quorate_core::WatchEvent::Put(e) if e.value == "again"), "{url}: {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_data_under_our_keys_is_told_as_such() {
    let server = server().await;
    let raw = Raw::of(&server).await;
    raw.ask::<String>(&["SET", "{quorate/test}:z", "not ours"]).await;
    assert_eq!(refused(&config(server.addr(), "/test")).await.kind(), ErrorKind::Corrupt);
}
