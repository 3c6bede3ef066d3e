//! Real servers on free loopback ports, with temporary data, alone or as a cluster.
//!
//! ```no_run
//! # async fn run() -> Result<(), quorate_testkit::servers::Error> {
//! use quorate_testkit::servers::{Etcd, EtcdOptions};
//!
//! let etcd = Etcd::start(EtcdOptions::default()).await?;
//! println!("{}", etcd.url()); // etcd://127.0.0.1:PORT
//! etcd.kill().await?; // as a power failure would
//! etcd.restart().await?; // same port, same data
//! # Ok(())
//! # }
//! ```
//!
//! Promises:
//! - A [`Server`] that `start` returned has answered in its own protocol, and the answer came from this
//!   process and not from an older server on the port.
//! - It is killed when the handle is dropped, and also when the process that started it is killed with
//!   SIGKILL; its temporary data goes with it.
//! - Its port stays reserved while it is down, so that a restart finds it free.
//! - A handle is bound to no tokio runtime: it may be started in one and used in another.
//!
//! Linux only: the supervisor is a POSIX shell.

mod cluster;
mod consul;
mod error;
mod etcd;
mod port;
mod postgres;
mod probe;
mod process;
mod redis;
mod secret;
mod server;
mod zookeeper;

pub use cluster::Cluster;
pub use consul::{Consul, ConsulOptions};
pub use error::Error;
pub use etcd::{Etcd, EtcdOptions};
pub(crate) use port::{Port, loopback};
pub use postgres::{Postgres, PostgresOptions};
pub use redis::{Persistence, Redis, RedisCluster, RedisOptions, RedisSentinel};
pub use secret::{Credentials, Secret};
pub use server::{Kind, Server};
pub use zookeeper::{ZooKeeper, ZooKeeperOptions};
