//! Who is let in: users and TLS.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use quorate_core::{Backend, Config, ErrorKind, Tls};
use quorate_testkit::{
    servers::{ZooKeeper as Launcher, ZooKeeperOptions},
    tls::TlsFiles,
};
use quorate_zookeeper::ZooKeeper;
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_owner_gets_in_and_the_others_are_told_so() {
    let server = server().await;
    let owner = config(&[server.addr()]).with_login("app", "s:ecret");
    let backend = connect(&owner).await;
    let lease = keep(&backend, TTL).await;
    commit(&backend, [], [put(&key("a"), "1"), put_on(&lease.id, &key("b"), "1")]).await.unwrap();
    let place = join(&backend, &line("a"), &lease.id).await;
    let again = connect(&owner).await;
    assert_eq!(again.read(&all()).await.unwrap().entries.len(), 2);
    assert_eq!(again.line(&line("a")).await.unwrap().tickets, std::slice::from_ref(&place.ticket));

    for stranger in [owner.clone().with_login("app", "wrong"), config(&[server.addr()])] {
        let error = ZooKeeper::connect(&stranger).await.expect_err("not the owner");
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
        assert!(!format!("{error:?} {error}").contains("wrong"), "{error:?}");
    }
    // Every node that we make belongs to us, not only the topmost.
    let raw = zookeeper_client::Client::connect(&server.addr().to_string()).await.unwrap();
    let ticket = format!("/tests/{}", place.ticket);
    let generations = raw.list_children("/tests/.gen").await;
    assert_eq!(generations.unwrap_err(), zookeeper_client::Error::NoAuth);
    for path in ["/tests", "/tests/kv", "/tests/kv/a", "/tests/kv/b", "/tests/lock", &ticket] {
        assert_eq!(raw.get_data(path).await.unwrap_err(), zookeeper_client::Error::NoAuth, "{path}");
    }
}

/// What was let in at first may be shut out later: by an access list that somebody else set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_in_the_middle_is_denied_and_ends_a_watch() {
    let server = server().await;
    let backend = client(&server).await;
    let lease = keep(&backend, TTL).await;
    commit(&backend, [], [put(&key("a"), "1")]).await.unwrap();
    let admin = zookeeper_client::Client::connect(&server.addr().to_string()).await.unwrap();
    admin.auth("digest", b"admin:x").await.unwrap();
    let only_me = [zookeeper_client::Acl::new(zookeeper_client::Permission::ALL, zookeeper_client::AuthId::authed())];
    for path in ["/tests/kv", "/tests/kv/a"] {
        admin.set_acl(path, &only_me, None).await.unwrap();
    }
    let denied = [
        commit(&backend, [], [put(&key("a"), "2")]).await.unwrap_err(),
        commit(&backend, [], [put(&key("b"), "2"), put(&key("c"), "2")]).await.unwrap_err(),
        commit(&backend, [], [put_on(&lease.id, &key("b"), "2")]).await.unwrap_err(),
        backend.read(&all()).await.unwrap_err(),
        backend.watch(&all()).await.unwrap_err(),
        backend.enqueue(&entry(&kv(), &lease.id)).await.unwrap_err(),
    ];
    for error in denied {
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_a_client_certificate_works_and_less_is_refused() {
    let files = TlsFiles::generate().unwrap();
    let options = ZooKeeperOptions { tls: Some(files.clone()), ..options() };
    let server = Launcher::start(options).await.unwrap_or_else(|e| panic!("{e}"));
    let limit = std::time::Duration::from_secs(4);
    let base = Config::new("zookeepers", [format!("localhost:{}", server.port())])
        .with_namespace("tests")
        .unwrap()
        .with_timeouts(limit, limit)
        .with_session_ttl(TTL);
    let full = Tls { ca: Some(files.ca()), cert: Some(files.client_cert()), key: Some(files.client_key()) };

    let backend = connect(&base.clone().with_tls(full.clone())).await;
    let lease = keep(&backend, TTL).await;
    let place = join(&backend, &line("a"), &lease.id).await;
    let fenced = commit(&backend, [standing(&place)], [put(&key("a"), "1")]).await.unwrap();
    assert!(fenced.applied);
    assert_eq!(get(&backend, &key("a")).await.unwrap().modified, fenced.revision);
    let by_address = Config { endpoints: vec![server.addr().to_string()], ..base.clone().with_tls(full.clone()) };
    connect(&by_address).await;

    let strangers = TlsFiles::generate().unwrap();
    let refused = [
        Tls { cert: None, key: None, ..full.clone() },
        Tls { ca: Some(strangers.ca()), ..full.clone() },
        Tls { ca: None, ..full.clone() },
    ];
    for tls in refused {
        let error = ZooKeeper::connect(&base.clone().with_tls(tls.clone())).await.expect_err("refused");
        let kinds = [ErrorKind::Unavailable, ErrorKind::Denied, ErrorKind::InvalidInput];
        assert!(kinds.contains(&error.kind()), "{tls:?}: {error:?}");
    }
    let broken = Tls { cert: Some(files.ca()), key: Some(files.ca()), ..full };
    let error = ZooKeeper::connect(&base.with_tls(broken)).await.expect_err("a certificate is no key");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_address_is_an_address() {
    let server = server().await;
    let listener = tokio::net::TcpListener::bind("[::1]:0").await.expect("this machine has IPv6 on loopback");
    let (by_v6, by_v4) = (listener.local_addr().unwrap(), server.addr());
    let relay = tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(by_v4).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let config = Config::parse(&format!("zookeeper://{by_v6}/tests")).unwrap();
    let backend = connect(&config).await;
    assert!(commit(&backend, [], [put(&key("a"), "1")]).await.unwrap().applied);
    relay.abort();
}
