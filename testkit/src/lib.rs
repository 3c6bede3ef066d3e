//! Real coordinators on loopback, and a fault proxy, for tests and benches.
//!
//! - [`servers`] starts etcd, Redis, Consul and ZooKeeper, alone or as a cluster, on free loopback
//!   ports with temporary data. A handle that exists is a server that answers; a server dies with the
//!   process that started it, however that process ends.
//! - [`tls`] makes a throw-away certificate authority for them.
//! - [`proxy`] stands between a client and a server and breaks the connection in named ways.
//! - [`install`] says what is missing on this machine, and installs it where it can.
//!
//! Nothing here passes without its server: a missing program is an error that says how to get it.

pub mod install;
pub mod proxy;
pub mod servers;
pub mod tls;
