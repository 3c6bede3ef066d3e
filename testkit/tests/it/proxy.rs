//! The proxy in front of an echo server that counts what reached it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use quorate_testkit::proxy::{Direction, FaultProxy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use crate::common::Outcome;

const SOON: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(150);

struct Echo {
    addr: SocketAddr,
    received: Arc<AtomicUsize>,
}

impl Echo {
    async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let received = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&received);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(length @ 1..) = stream.read(&mut bytes).await {
                        count.fetch_add(length, Ordering::SeqCst);
                        if stream.write_all(&bytes[..length]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self { addr, received })
    }

    fn received(&self) -> usize {
        self.received.load(Ordering::SeqCst)
    }

    async fn wait_received(&self, bytes: usize) -> Outcome {
        let reached = async {
            while self.received() < bytes {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        Ok(timeout(SOON, reached).await?)
    }
}

async fn rig() -> io::Result<(Echo, FaultProxy, TcpStream)> {
    let echo = Echo::start().await?;
    let proxy = FaultProxy::start(echo.addr).await?;
    let client = TcpStream::connect(proxy.addr()).await?;
    client.set_nodelay(true)?;
    Ok((echo, proxy, client))
}

async fn echoed(client: &mut TcpStream, text: &str) -> io::Result<String> {
    client.write_all(text.as_bytes()).await?;
    read(client, text.len()).await
}

async fn read(client: &mut TcpStream, length: usize) -> io::Result<String> {
    let mut bytes = vec![0; length];
    timeout(SOON, client.read_exact(&mut bytes)).await??;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn is_silent(client: &mut TcpStream) -> bool {
    timeout(SILENCE, client.read_u8()).await.is_err()
}

/// A reset, not an orderly end.
async fn is_reset(client: &mut TcpStream) -> bool {
    let read = timeout(SOON, client.read_u8()).await;
    matches!(read, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn turns_count_round_trips_and_pipelined_requests_once() -> Outcome {
    let (_echo, proxy, mut client) = rig().await?;
    for round in 1..=5 {
        assert_eq!(echoed(&mut client, "ping").await?, "ping");
        assert_eq!(proxy.turns(), round);
    }
    proxy.hold(Direction::ToServer);
    client.write_all(b"one").await?;
    tokio::task::yield_now().await;
    client.write_all(b"two").await?;
    let both = async {
        while proxy.counters().bytes_to_server < 26 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(SOON, both).await?;
    proxy.heal().await;
    read(&mut client, 6).await?;
    let counters = proxy.counters();
    assert_eq!(counters.turns, 6, "{counters:?}");
    assert_eq!((counters.accepted, counters.open), (1, 1));
    assert_eq!((counters.bytes_to_server, counters.bytes_to_client), (26, 26));
    Ok(())
}

#[tokio::test]
async fn large_streams_pass_unchanged_in_both_directions() -> Outcome {
    let (_echo, _proxy, client) = rig().await?;
    let sent: Vec<u8> = (0..8_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut from, mut to) = client.into_split();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        to.write_all(&sent).await?;
        to.shutdown().await
    });
    let mut got = Vec::new();
    timeout(4 * SOON, from.read_to_end(&mut got)).await??;
    writer.await??;
    assert!(got == expected, "{} bytes came back", got.len());
    Ok(())
}

#[tokio::test]
async fn delay_applies_per_direction_and_ends_with_heal() -> Outcome {
    let (_echo, proxy, mut client) = rig().await?;
    proxy.delay(Direction::ToServer, Duration::from_millis(60));
    proxy.delay(Direction::ToClient, Duration::from_millis(40));
    let begin = Instant::now();
    echoed(&mut client, "slow").await?;
    assert!(begin.elapsed() >= Duration::from_millis(100));
    proxy.heal().await;
    let begin = Instant::now();
    echoed(&mut client, "fast").await?;
    assert!(begin.elapsed() < Duration::from_millis(100));
    Ok(())
}

#[tokio::test]
async fn cut_resets_connections_and_refuses_new_ones_until_healed() -> Outcome {
    let (_echo, proxy, mut client) = rig().await?;
    echoed(&mut client, "ping").await?;
    for _ in 0..3 {
        proxy.cut().await;
        assert_eq!(proxy.counters().open, 0);
        assert!(is_reset(&mut client).await);
        let refused = TcpStream::connect(proxy.addr()).await;
        let kind = refused.err().map(|error| error.kind());
        assert_eq!(kind, Some(io::ErrorKind::ConnectionRefused));
        proxy.heal().await;
        client = TcpStream::connect(proxy.addr()).await?;
        assert_eq!(echoed(&mut client, "again").await?, "again");
    }
    Ok(())
}

#[tokio::test]
async fn dropped_connections_are_reset_and_new_ones_accepted() -> Outcome {
    let (_echo, proxy, mut client) = rig().await?;
    echoed(&mut client, "ping").await?;
    proxy.drop_connections().await;
    assert!(is_reset(&mut client).await);
    let mut client = TcpStream::connect(proxy.addr()).await?;
    assert_eq!(echoed(&mut client, "again").await?, "again");
    assert_eq!(proxy.counters().accepted, 2);
    Ok(())
}

#[tokio::test]
async fn held_requests_reach_the_server_only_after_heal() -> Outcome {
    let (echo, proxy, mut client) = rig().await?;
    proxy.hold(Direction::ToServer);
    client.write_all(b"late").await?;
    assert!(is_silent(&mut client).await);
    assert_eq!(echo.received(), 0);
    proxy.heal().await;
    assert_eq!(read(&mut client, 4).await?, "late");
    Ok(())
}

#[tokio::test]
async fn held_answers_arrive_only_after_heal_though_the_request_was_served() -> Outcome {
    let (echo, proxy, mut client) = rig().await?;
    proxy.hold(Direction::ToClient);
    client.write_all(b"done").await?;
    echo.wait_received(4).await?;
    assert!(is_silent(&mut client).await);
    proxy.heal().await;
    assert_eq!(read(&mut client, 4).await?, "done");
    Ok(())
}

#[tokio::test]
async fn swallowed_bytes_never_arrive_and_the_torn_connection_ends_with_heal() -> Outcome {
    for direction in [Direction::ToServer, Direction::ToClient] {
        let (echo, proxy, mut client) = rig().await?;
        echoed(&mut client, "ping").await?;
        proxy.blackhole(direction);
        client.write_all(b"lost").await?;
        assert!(is_silent(&mut client).await, "{direction:?}");
        let reached = if direction == Direction::ToServer { 4 } else { 8 };
        assert_eq!(echo.received(), reached, "{direction:?}");
        assert_eq!(proxy.counters().bytes_swallowed, 4);
        proxy.heal().await;
        assert!(is_reset(&mut client).await, "{direction:?}");
        let mut client = TcpStream::connect(proxy.addr()).await?;
        assert_eq!(echoed(&mut client, "again").await?, "again");
    }
    Ok(())
}

#[tokio::test]
async fn cut_after_forward_serves_the_request_and_loses_the_answer() -> Outcome {
    let (echo, proxy, mut client) = rig().await?;
    proxy.cut_after_forward(2);
    for round in 1..=2 {
        client.write_all(b"commit").await?;
        assert!(is_reset(&mut client).await);
        assert_eq!(echo.received(), 6 * round);
        client = TcpStream::connect(proxy.addr()).await?;
    }
    assert_eq!(echoed(&mut client, "third").await?, "third");
    let lost = async {
        while proxy.counters().answers_lost < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    Ok(timeout(SOON, lost).await?)
}

#[tokio::test]
async fn cut_after_forward_waits_for_the_request_that_contains_the_bytes() -> Outcome {
    let (_echo, proxy, mut client) = rig().await?;
    proxy.cut_after_forward_of("orders/42", 1);
    assert_eq!(echoed(&mut client, "keep-alive").await?, "keep-alive");
    client.write_all(b"put orders/42 x").await?;
    assert!(is_reset(&mut client).await);
    Ok(())
}

#[tokio::test]
async fn upstream_can_be_changed_for_new_connections() -> Outcome {
    let (first, proxy, mut old) = rig().await?;
    echoed(&mut old, "ping").await?;
    let second = Echo::start().await?;
    proxy.set_upstream(second.addr);
    let mut new = TcpStream::connect(proxy.addr()).await?;
    echoed(&mut new, "hello").await?;
    echoed(&mut old, "ping").await?;
    assert_eq!((first.received(), second.received()), (8, 5));
    Ok(())
}

#[tokio::test]
async fn dead_upstream_resets_the_client() -> Outcome {
    let (_echo, proxy, _client) = rig().await?;
    let nobody = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    proxy.set_upstream(nobody);
    let mut client = TcpStream::connect(proxy.addr()).await?;
    assert!(is_reset(&mut client).await);
    Ok(())
}

#[tokio::test]
async fn dropped_proxy_closes_everything() -> Outcome {
    let (_echo, proxy, mut client) = rig().await?;
    echoed(&mut client, "ping").await?;
    let addr = proxy.addr();
    drop(proxy);
    let closed = timeout(SOON, client.read_u8()).await?;
    assert!(closed.is_err());
    assert!(TcpStream::connect(addr).await.is_err());
    Ok(())
}
