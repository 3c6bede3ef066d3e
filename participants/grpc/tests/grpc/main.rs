//! What participants over gRPC promise, on real servers on loopback.

mod atomic;
mod calls;
mod contract;
mod faults;
mod support;
