//! Tests as users write them: what is checked is their own, the coordinator takes a line. Each needs a Docker daemon, and
//! fails without.

#![cfg(feature = "full")]

use std::time::Duration;

use quorate::Coordinator;
use quorate_testcontainers::{consul, etcd, redis, zookeeper};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// The user's code: a job that one of several workers does.
async fn nightly(coord: &Coordinator) -> quorate::Result<bool> {
    let Some(guard) = coord.lock("jobs/nightly").try_acquire().await? else {
        return Ok(false);
    };
    let fresh = coord.kv().get("jobs/nightly-done").await?.is_none();
    if fresh {
        coord.kv().put_fenced(&guard.fence(), "jobs/nightly-done", "yes").await?;
    }
    guard.release().await?;
    Ok(fresh)
}

async fn is_done_once(workers: [Coordinator; 2]) -> Outcome {
    let (one, other) = tokio::join!(nightly(&workers[0]), nightly(&workers[1]));
    assert_ne!(one?, other?, "one of the two did it, and only one");
    Ok(())
}

#[tokio::test]
async fn the_job_is_done_once_on_etcd() -> Outcome {
    let etcd = etcd().await?;
    is_done_once([etcd.connect().await?, etcd.connect().await?]).await
}

#[tokio::test]
async fn the_job_is_done_once_on_redis() -> Outcome {
    let redis = redis().await?;
    is_done_once([redis.connect().await?, redis.connect().await?]).await
}

#[tokio::test]
async fn the_job_is_done_once_on_consul() -> Outcome {
    let consul = consul().await?;
    is_done_once([consul.connect().await?, consul.connect().await?]).await
}

#[tokio::test]
async fn the_job_is_done_once_on_zookeeper() -> Outcome {
    let zookeeper = zookeeper().await?;
    is_done_once([zookeeper.connect().await?, zookeeper.connect().await?]).await
}

/// What production does to a coordinator sooner or later.
#[tokio::test]
async fn a_worker_learns_that_its_lock_is_lost_while_etcd_hangs() -> Outcome {
    let etcd = etcd().await?;
    let config = etcd.config().with_session_ttl(Duration::from_secs(2));
    let coord = quorate::connect_with(&config).await?;
    let guard = coord.lock("jobs/nightly").acquire().await?;

    etcd.pause().await?;
    tokio::time::timeout(Duration::from_secs(3), guard.lost()).await?;
    assert!(!guard.is_held());

    etcd.resume().await?;
    let again = tokio::time::timeout(Duration::from_secs(20), coord.lock("jobs/nightly").acquire()).await??;
    assert!(again.token() > guard.token());
    Ok(())
}
