//! Real coordinators on loopback, and a fault proxy, for tests and benches
