//! A coordinator in a container for a test, in one line.
//!
//! ```no_run
//! # #[cfg(feature = "etcd")]
//! # async fn test() -> Result<(), Box<dyn std::error::Error>> {
//! let etcd = quorate_testcontainers::etcd().await?;
//! let coord = etcd.connect().await?;
//!
//! let guard = coord.lock("jobs/nightly").acquire().await?;
//! etcd.restart().await?; // or kill(), pause() and resume(): what production will do to it
//! # drop(guard);
//! # Ok(())
//! # }
//! ```
//!
//! Promises:
//! - A [`Server`] that was returned grants sessions: it was asked for one.
//! - Its address stays the same for as long as the handle lives, through any restart.
//! - It is reachable from this machine only: it is published on 127.0.0.1.
//! - Dropping the handle removes the container and its data, in any runtime and outside of all. A process that is killed
//!   leaves them; one that is interrupted too, unless the feature `watchdog` is on. All carry the label
//!   `org.quorate.testcontainers`.
//!
//! # What it needs
//! A Docker daemon on this machine, found as `docker` finds it: by `DOCKER_HOST`, or at its usual socket. Missing images are
//! pulled.
//!
//! # Features
//! `etcd`, `redis`, `consul`, `zookeeper`: one per server, none by default; `full` for all four.
//!
//! # Images
//! One environment variable each names another image, tag or digest included; what takes the same command does.
//!
//! | server | image | variable |
//! |---|---|---|
//! | etcd | `localhost/quorate/etcd:local`, which `docker/images.sh etcd` builds | `QUORATE_ETCD_IMAGE`: name here the image that etcd's makers publish |
//! | Redis | `redis:7.0.15` | `QUORATE_REDIS_IMAGE` |
//! | Valkey | `valkey/valkey:8.1.1` | `QUORATE_VALKEY_IMAGE` |
//! | Consul | `consul:1.8.7` | `QUORATE_CONSUL_IMAGE` |
//! | ZooKeeper | `zookeeper:3.8.0` | `QUORATE_ZOOKEEPER_IMAGE` |

mod error;
mod images;
mod port;
mod server;

pub use error::Error;
pub use images::Kind;
pub use server::Server;

/// Starts etcd: one server, which grants sessions of 1 s as asked.
///
/// # Errors
///
/// [`Error`] says what the daemon answered, or what the server wrote last.
///
/// # Cancel safety
///
/// A container that was being created may be left behind.
#[cfg(feature = "etcd")]
pub async fn etcd() -> Result<Server, Error> {
    Server::start(Kind::Etcd).await
}

/// Starts Redis: one server, which has every write on disk before it answers.
///
/// # Errors
///
/// As [`Server::start`].
///
/// # Cancel safety
///
/// A container that was being created may be left behind.
#[cfg(feature = "redis")]
pub async fn redis() -> Result<Server, Error> {
    Server::start(Kind::Redis).await
}

/// Starts Valkey, set up as [`redis`].
///
/// # Errors
///
/// As [`Server::start`].
///
/// # Cancel safety
///
/// A container that was being created may be left behind.
#[cfg(feature = "redis")]
pub async fn valkey() -> Result<Server, Error> {
    Server::start(Kind::Valkey).await
}

/// Starts Consul: one server that keeps its data on disk.
///
/// # Errors
///
/// As [`Server::start`].
///
/// # Cancel safety
///
/// A container that was being created may be left behind.
#[cfg(feature = "consul")]
pub async fn consul() -> Result<Server, Error> {
    Server::start(Kind::Consul).await
}

/// Starts ZooKeeper: one server, which grants sessions of 1 s to 10 s as asked.
///
/// # Errors
///
/// As [`Server::start`].
///
/// # Cancel safety
///
/// A container that was being created may be left behind.
#[cfg(feature = "zookeeper")]
pub async fn zookeeper() -> Result<Server, Error> {
    Server::start(Kind::ZooKeeper).await
}
