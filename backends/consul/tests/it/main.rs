//! Everything that this backend promises, on real Consul servers.

#[cfg(test)]
mod access;
#[cfg(test)]
mod catalog;
#[cfg(test)]
mod cluster;
#[cfg(test)]
mod common;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod lease;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod wait;
#[cfg(test)]
mod wire;
