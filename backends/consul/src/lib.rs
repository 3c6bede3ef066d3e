//! Consul backend for quorate
