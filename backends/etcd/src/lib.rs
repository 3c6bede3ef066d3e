//! etcd backend for quorate
