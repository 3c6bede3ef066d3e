//! What a user's test looks like, and what the helper promises. Each needs a Docker daemon, and fails without.

#![cfg(feature = "full")]

use std::{net::TcpStream, time::Duration};

use quorate_testcontainers::{Kind, Server};

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[tokio::test]
async fn a_lock_is_taken_in_a_container_in_four_lines() -> Outcome {
    let etcd = quorate_testcontainers::etcd().await?;
    let coord = etcd.connect().await?;
    let guard = coord.lock("jobs/nightly").acquire().await?;
    guard.release().await?;
    Ok(())
}

/// As users would see whether their service comes through a restart of its coordinator.
#[tokio::test]
async fn every_server_keeps_its_data_through_a_kill_and_loses_it_when_wiped() -> Outcome {
    for kind in [Kind::Etcd, Kind::Redis, Kind::Consul, Kind::ZooKeeper] {
        let server = Server::start(kind).await?;
        let (address, id) = (server.addr(), server.id());
        let coord = server.connect().await?;
        coord.kv().put("config/limit", "10").await?;

        server.kill().await?;
        assert!(TcpStream::connect(server.addr()).is_err(), "{kind} answers after it was killed");
        server.restart().await?;
        assert_eq!((server.addr(), server.id()), (address, id.clone()), "{kind}");
        assert!(server.connect().await?.kv().get("config/limit").await?.is_some(), "{kind} lost what it had answered");

        server.restart_wiped().await?;
        assert_eq!(server.addr(), address, "{kind}");
        assert_ne!(server.id(), id, "{kind}");
        assert!(server.connect().await?.kv().get("config/limit").await?.is_none(), "{kind} still has it");
    }
    Ok(())
}

#[tokio::test]
async fn a_paused_server_answers_nobody_until_it_is_resumed() -> Outcome {
    let redis = quorate_testcontainers::redis().await?;
    let coord = redis.connect().await?;
    redis.pause().await?;
    let get = tokio::time::timeout(Duration::from_millis(500), coord.kv().get("a")).await;
    assert!(get.is_err(), "a frozen server answered: {get:?}");
    redis.resume().await?;
    assert!(coord.kv().get("a").await?.is_none());
    Ok(())
}

#[test]
fn a_handle_may_be_dropped_outside_of_any_runtime_and_takes_its_container_with_it() -> Outcome {
    let runtime = tokio::runtime::Runtime::new()?;
    let server = runtime.block_on(quorate_testcontainers::zookeeper())?;
    let address = server.addr();
    assert!(TcpStream::connect(address).is_ok());
    drop(runtime);
    drop(server);
    assert!(TcpStream::connect(address).is_err(), "it still answers");
    Ok(())
}
