//! gRPC servers that come, go and die under load, and a client that notices none of it:
//! `cargo run -p quorate-tower --example grpc`, on a server with
//! `cargo run -p quorate-tower --features quorate/etcd --example grpc -- etcd://127.0.0.1:2379`.
//!
//! Servers register when they listen, drain before they stop, and some are killed. The client follows the registrations
//! and sends each call by tower's two choices and peak EWMA; a call may be carried out twice, so one that failed is sent
//! again. Exits with an error if a single call fails.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    error::Error,
    future::{Ready, ready},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes};
use futures_util::FutureExt as _;
use quorate::{Config, Coordinator, Instance, Service as Followed};
use quorate_tower::{BoxError, Discover, Resting};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tonic::{
    Request, Response, Status,
    body::Body,
    client,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{
        BoxFuture,
        http::{self, uri::PathAndQuery},
    },
    server,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};
use tower::{
    Service, ServiceExt as _,
    balance::p2c::Balance,
    buffer::Buffer,
    load::{CompleteOnResponse, PeakEwma},
    retry::{Policy, Retry},
    service_fn,
    timeout::Timeout,
};

const SERVERS: usize = 5;
const CALLERS: usize = 8;
const ATTEMPTS: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a server goes on after it has said that it drains: longer than clients need to hear of it.
const GRACE: Duration = Duration::from_millis(300);

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// Messages as they are: what a build script makes of a .proto file would say the same at more length.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// The server's side of `/demo.Names/Tell`: answers with its name.
#[derive(Debug, Clone)]
struct Names(String);

impl server::NamedService for Names {
    const NAME: &'static str = "demo.Names";
}

impl Service<http::Request<Body>> for Names {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let name = Bytes::from(self.0.clone());
        let tell = service_fn(move |_: Request<Bytes>| {
            let name = name.clone();
            async move {
                sleep(Duration::from_millis(2)).await;
                Ok::<_, Status>(Response::new(name))
            }
        });
        Box::pin(async move { Ok(server::Grpc::new(Raw).unary(tell, request).await) })
    }
}

/// A server with a runtime and a connection of its own, so that it can be killed as a process is.
struct Node {
    name: String,
    runtime: Option<Runtime>,
    stop: Option<oneshot::Sender<()>>,
    stopped: oneshot::Receiver<()>,
}

/// Dropping it kills the server, whatever it is doing.
impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Node {
    fn start(number: usize, config: &Config) -> Outcome<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let name = format!("server-{number:02}");
        let (stop, stopping) = oneshot::channel();
        let (done, stopped) = oneshot::channel();
        let (own, config) = (name.clone(), config.clone());
        runtime.spawn(async move {
            if let Err(error) = serve(own.clone(), &config, stopping).await {
                println!("   {own} gives up: {error}");
            }
            let _ = done.send(());
        });
        Ok(Self { name, runtime: Some(runtime), stop: Some(stop), stopped })
    }

    /// Ends when the last request has been answered and the server has left.
    async fn stop(mut self) -> Outcome {
        drop(self.stop.take());
        timeout(PATIENCE, &mut self.stopped).await??;
        Ok(())
    }
}

async fn serve(name: String, config: &Config, stopping: oneshot::Receiver<()>) -> Outcome {
    let coord = quorate::connect_with(config).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    // It listens, so it may be found.
    let address = listener.local_addr()?.to_string();
    let registration = coord.register(Instance::new("names", address).id(&name))?;
    registration.ready().await?;
    let stop = async {
        let _ = stopping.await;
        // First nobody begins to call it, then it stops listening. What has begun is finished.
        if registration.drain().is_ok() {
            let _ = registration.ready().await;
        }
        sleep(GRACE).await;
    };
    let server = Server::builder().add_service(Names(name));
    server.serve_with_incoming_shutdown(TcpIncoming::from(listener), stop).await?;
    registration.close().await?;
    coord.close().await?;
    Ok(())
}

/// The client's side, of one server.
#[derive(Debug, Clone)]
struct Tell(client::Grpc<Channel>);

impl Service<Bytes> for Tell {
    type Response = Bytes;
    type Error = Status;
    type Future = BoxFuture<Bytes, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, message: Bytes) -> Self::Future {
        let mut grpc = self.0.clone();
        Box::pin(async move {
            grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let path = PathAndQuery::from_static("/demo.Names/Tell");
            Ok(grpc.unary(Request::new(message), path, Raw).await?.into_inner())
        })
    }
}

/// Sends what failed again: the balancer has put to rest whoever failed, so it goes to another.
#[derive(Debug, Clone)]
struct Again {
    left: u32,
    retries: Arc<AtomicU64>,
}

impl Policy<Bytes, Bytes, BoxError> for Again {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Bytes, outcome: &mut Result<Bytes, BoxError>) -> Option<Ready<()>> {
        if outcome.is_ok() || self.left == 0 {
            return None;
        }
        self.left -= 1;
        self.retries.fetch_add(1, Relaxed);
        Some(ready(()))
    }

    fn clone_request(&mut self, message: &Bytes) -> Option<Bytes> {
        Some(message.clone())
    }
}

/// What the callers have seen.
#[derive(Debug, Default)]
struct Board {
    over: AtomicBool,
    calls: AtomicU64,
    retries: Arc<AtomicU64>,
    slowest: AtomicU64,
    failed: Mutex<Vec<String>>,
    /// By the server's name, since the last chapter.
    answers: Mutex<BTreeMap<String, u64>>,
}

/// A client whose clones share the connections to all servers. Must be called within a runtime.
fn client(service: &Followed) -> impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Clone + use<> {
    let discover = Discover::new(service, |instance: &Instance| {
        let endpoint = Endpoint::from_shared(format!("http://{}", instance.endpoint()))?;
        let channel = endpoint.connect_timeout(Duration::from_secs(1)).connect_lazy();
        let one = Timeout::new(Tell(client::Grpc::new(channel)), Duration::from_secs(1));
        let one = Resting::new(one, Duration::from_secs(1), |_: &BoxError| true);
        Ok::<_, tonic::transport::Error>(PeakEwma::new(
            one,
            Duration::from_millis(5),
            1e9,
            CompleteOnResponse::default(),
        ))
    });
    Buffer::new(Balance::new(discover), 4 * CALLERS)
}

/// Calls until it is over.
async fn call(
    client: impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Clone,
    board: Arc<Board>,
) {
    while !board.over.load(Relaxed) {
        let again = Again { left: ATTEMPTS - 1, retries: Arc::clone(&board.retries) };
        let started = Instant::now();
        let outcome = timeout(PATIENCE, Retry::new(again, client.clone()).oneshot(Bytes::from_static(b"who?"))).await;
        board.calls.fetch_add(1, Relaxed);
        board.slowest.fetch_max(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX), Relaxed);
        match outcome {
            Ok(Ok(name)) => {
                let name = String::from_utf8_lossy(&name).into_owned();
                *board.answers.lock().expect("no caller panics").entry(name).or_default() += 1;
            }
            Ok(Err(error)) => board.failed.lock().expect("no caller panics").push(error.to_string()),
            Err(_) => board.failed.lock().expect("no caller panics").push("no answer".to_owned()),
        }
    }
}

fn chapter(number: usize, title: &str) {
    println!("\n{number}. {title}\n{}", "-".repeat(title.len() + 3));
}

/// Who answered since the last look.
fn display(board: &Board) {
    let answers = std::mem::take(&mut *board.answers.lock().expect("no caller panics"));
    let most = answers.values().copied().max().unwrap_or(1);
    for (name, count) in answers {
        println!("   {name}  {count:>5} {}", "#".repeat(usize::try_from(count * 30 / most).unwrap_or(0)));
    }
    println!("   calls sent again: {}", board.retries.swap(0, Relaxed));
}

async fn found(service: &Followed, count: usize) -> Outcome {
    timeout(PATIENCE, service.until(|now| now.passing().count() == count)).await?;
    Ok(())
}

fn main() -> Outcome {
    let url = std::env::args().nth(1).unwrap_or_else(|| "memory://grpc/grpc".to_owned());
    let mut config = Config::parse(&url)?;
    if config.namespace.is_empty() {
        config = config.with_namespace("quorate-grpc")?;
    }
    // Short, so that a death is noticed while somebody looks.
    let config = config.with_session_ttl(Duration::from_secs(2));
    Runtime::new()?.block_on(show(&config))
}

async fn show(config: &Config) -> Outcome {
    let coord: Coordinator = quorate::connect_with(config).await?;
    println!("quorate on {}. The same code runs on every backend; only the URL differs.", coord.profile().backend);
    let service = coord.discover("names").await?;
    let (board, client) = (Arc::new(Board::default()), client(&service));
    let started = Instant::now();
    let callers: Vec<_> = (0..CALLERS).map(|_| tokio::spawn(call(client.clone(), Arc::clone(&board)))).collect();

    chapter(1, "Five servers start; the callers are there already");
    sleep(Duration::from_millis(200)).await;
    let mut nodes = (1..=SERVERS).map(|number| Node::start(number, config)).collect::<Outcome<Vec<_>>>()?;
    found(&service, SERVERS).await?;
    sleep(Duration::from_secs(1)).await;
    display(&board);

    chapter(2, "Each is replaced by a new one, one after another");
    for number in 1..=SERVERS {
        nodes.push(Node::start(SERVERS + number, config)?);
        found(&service, SERVERS + 1).await?;
        nodes.remove(0).stop().await?;
        found(&service, SERVERS).await?;
    }
    display(&board);

    chapter(3, "Two are killed");
    let killed = Instant::now();
    for _ in 0..2 {
        println!("   killed: {}", nodes.remove(0).name);
    }
    found(&service, SERVERS - 2).await?;
    println!("   gone from discovery after {} ms, with a session of 2 s", killed.elapsed().as_millis());
    display(&board);

    chapter(4, "Two new ones start");
    for number in 1..=2 {
        nodes.push(Node::start(2 * SERVERS + number, config)?);
    }
    found(&service, SERVERS).await?;
    sleep(Duration::from_secs(1)).await;
    display(&board);

    board.over.store(true, Relaxed);
    for caller in callers {
        timeout(PATIENCE, caller).await??;
    }
    let (calls, failed) = (board.calls.load(Relaxed), board.failed.lock().expect("no caller panics").clone());
    let took = started.elapsed().as_secs_f64();
    let slowest = board.slowest.load(Relaxed);
    println!("\n{calls} calls in {took:.1} s, {} failed; the slowest took {slowest} ms.", failed.len());
    for node in nodes {
        node.stop().await?;
    }
    coord.close().boxed().await?;
    match failed.first() {
        Some(first) => Err(format!("{} calls failed, the first one with: {first}", failed.len()).into()),
        None => Ok(()),
    }
}
