//! quorate-etcd against real etcd servers: the whole contract, other clients, access, outages, and cost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::cloned_ref_to_slice_refs, reason = "`assert_eq!(ahead, [ticket.clone()])` reads as what it asserts")]

mod access;
mod chaos;
mod cluster;
mod conformance;
mod cost;
mod interop;
mod naming;
mod outage;
mod restart;
mod support;
mod tickets;
