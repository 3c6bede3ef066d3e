//! Real servers on loopback, and the proxy in front of them.

mod clusters;
mod common;
mod proxy;
mod servers;
