//! A port of 127.0.0.1 that a container keeps through its restarts. Docker would give it another each time.

use std::net::Ipv4Addr;

use rand::RngExt;
use tokio::net::TcpListener;

/// Below the range from which Linux takes the source port of outgoing connections: otherwise a client's
/// connection could sit on the port of a stopped server and make its restart fail.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// A port on which nobody listens now. Another process may take it before the container does, so the start is tried
/// again with another.
pub(crate) async fn free() -> Option<u16> {
    for _ in 0..500 {
        let number = rand::rng().random_range(RANGE);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, number)).await.is_ok() {
            return Some(number);
        }
    }
    None
}
