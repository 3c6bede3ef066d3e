//! Redis and Valkey backend for quorate
