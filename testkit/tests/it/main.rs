//! Real servers on loopback, and the proxy in front of them.

mod clusters;
mod common;
mod install;
mod proxy;
mod servers;
