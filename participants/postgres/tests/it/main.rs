//! PostgreSQL as a participant, on a real server.

mod contract;
mod faults;
mod meetings;
mod support;
mod tls;
