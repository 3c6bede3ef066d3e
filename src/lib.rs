//! Locks, elections, discovery, heartbeats and atomic commit that mean the same on etcd, Redis, Consul and
//! ZooKeeper; an in-process backend speaks the same contract for tests.
//!
//! Promise: application code names a backend in one place, the URL. What it may rely on is written with each
//! method and holds on every backend; where a server cannot give it, the call fails with
//! [`ErrorKind::Unsupported`] and the [`Profile`] says so.
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! let coord = quorate::connect("memory://docs/my-app").await?; // or etcd:// redis:// consul:// zookeeper://
//! let guard = coord.lock("jobs/nightly").acquire().await?;
//!
//! println!("token {}: send it with each write", guard.token());
//! guard.protect(async { /* dropped if the lock is lost */ }).await?;
//! coord.kv().put_fenced(&guard.fence(), "report", "done").await?; // refused if the hold has ended
//!
//! guard.release().await?; // a drop does the same in the background
//! coord.close().await?; // before the process ends: what is still held is given up now, not after its TTL
//! # Ok::<(), quorate::Error>(()) })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//! One per backend: `memory` (default), `etcd`, `redis`, `consul`, `zookeeper`. `grpc` for participants of [atomic
//! commit](commit) in other services, `postgres` for databases as such; `tower` hands the instances of a service to tower's
//! balancers, and so to tonic; `full` for all. The form of the URL and its options are in [`config`].

use std::{sync::Arc, time::Duration};

pub use quorate_core::*;

#[cfg(feature = "memory")]
pub use quorate_memory as memory;

#[cfg(feature = "consul")]
pub use quorate_consul as consul;
#[cfg(feature = "etcd")]
pub use quorate_etcd as etcd;
#[cfg(feature = "grpc")]
pub use quorate_grpc as grpc;
#[cfg(feature = "postgres")]
pub use quorate_postgres as postgres;
#[cfg(feature = "redis")]
pub use quorate_redis as redis;
#[cfg(feature = "tower")]
pub use quorate_tower as tower;
#[cfg(feature = "zookeeper")]
pub use quorate_zookeeper as zookeeper;

use layer::Stack;

/// Connects to the coordinator that the URL names, with the standard [layers](layer) around it.
///
/// # Errors
/// `InvalidInput` for a malformed URL or an unknown scheme, `Unsupported` if the scheme's feature is not compiled
/// in, `Unavailable` if no endpoint answers within the connect timeout, `Denied` for wrong credentials. No
/// message repeats the URL, which may hold a password.
///
/// # Cancel safety
/// Nothing is left behind.
pub async fn connect(url: &str) -> Result<Coordinator> {
    connect_with(&Config::parse(url)?).await
}

/// Connects with options from code instead of a URL.
///
/// # Errors
/// As for [`connect`].
///
/// # Cancel safety
/// Nothing is left behind.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
/// use quorate::Config;
/// let config = Config::new("memory", ["docs"]).with_session_ttl(std::time::Duration::from_secs(3));
/// let coord = quorate::connect_with(&config).await?;
/// assert_eq!(coord.session().await?.ttl().as_secs(), 3);
/// # Ok::<(), quorate::Error>(()) })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub async fn connect_with(config: &Config) -> Result<Coordinator> {
    let backend = Stack::new(backend(config).await?).standard(attempt_limit(config)).build();
    Ok(Coordinator::new(backend, SessionOptions { ttl: config.session_ttl, ..SessionOptions::default() }))
}

/// A single attempt gets a second more than the backend's own limit, so that the backend, which knows more,
/// speaks first.
fn attempt_limit(config: &Config) -> Duration {
    config.request_timeout + Duration::from_secs(1)
}

/// Connects the bare backend, without layers: for stacks and recipes of your own.
///
/// # Errors
/// As for [`connect`].
///
/// # Cancel safety
/// Nothing is left behind.
pub async fn backend(config: &Config) -> Result<Arc<dyn Backend>> {
    // Only Redis has several ways to be deployed behind one scheme.
    let family = match config.scheme.split_once('+') {
        Some((family @ ("redis" | "rediss"), _)) => family,
        _ => config.scheme.as_str(),
    };
    match family {
        #[cfg(feature = "memory")]
        "memory" => Ok(Arc::new(quorate_memory::Memory::connect(config).await?)),
        #[cfg(feature = "etcd")]
        "etcd" | "etcds" => Ok(Arc::new(quorate_etcd::Etcd::connect(config).await?)),
        #[cfg(feature = "redis")]
        "redis" | "rediss" => Ok(Arc::new(quorate_redis::Redis::connect(config).await?)),
        #[cfg(feature = "consul")]
        "consul" | "consuls" => Ok(Arc::new(quorate_consul::Consul::connect(config).await?)),
        #[cfg(feature = "zookeeper")]
        "zookeeper" | "zookeepers" => Ok(Arc::new(quorate_zookeeper::ZooKeeper::connect(config).await?)),
        _ => Err(no_backend(family)),
    }
}

fn no_backend(scheme: &str) -> Error {
    const KNOWN: [(&str, &str); 5] =
        [("memory", "memory"), ("etcd", "etcd"), ("redis", "redis"), ("consul", "consul"), ("zookeeper", "zookeeper")];
    let known =
        KNOWN.iter().find(|(name, _)| scheme == *name || *name != "memory" && scheme.strip_suffix('s') == Some(name));
    match known {
        Some((_, feature)) => {
            Error::new(ErrorKind::Unsupported, "connect", format!("the backend for {scheme}:// is not compiled in"))
                .next(format!("enable the feature `{feature}` of the crate `quorate`"))
        }
        None => Error::invalid("connect", format!("unknown scheme {scheme:?}"))
            .next("use memory://, etcd://, redis://, consul:// or zookeeper://"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unknown_scheme_is_named_with_the_known_ones() {
        let e = connect("mysql://u:hunter2@h/app").await.expect_err("no such backend");
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        let shown = format!("{e} {e:?}");
        assert!(shown.contains("mysql") && shown.contains("zookeeper://") && !shown.contains("hunter2"), "{shown}");
    }

    #[cfg(not(feature = "etcd"))]
    #[tokio::test]
    async fn a_backend_that_is_not_compiled_in_says_which_feature_to_enable() {
        let e = connect("etcds://u:hunter2@h/app").await.expect_err("not compiled in");
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("feature `etcd`"), "{e}");
    }
}
