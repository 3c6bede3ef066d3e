//! Limits, versions, credentials, and what else can be wrong with a call.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use quorate::{
    ErrorKind, Result,
    commit::{Branch, Finish, Participant, TxId, Vote},
    grpc::{GrpcOptions, GrpcParticipant, ParticipantServer},
};
use quorate_testkit::tls::TlsFiles;
use tokio::time::{Instant, timeout};
use tonic::{
    Request, Response, Status,
    body::Body,
    client::Grpc,
    codegen::{BoxFuture, InterceptedService, Service, http},
    server::NamedService,
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig},
};
use tonic_prost::ProstCodec;

use crate::support::{Book, Process, SOON, Space, eventually, fails, listed};

fn branch(body: impl Into<bytes::Bytes>) -> Branch {
    Branch::new("g", TxId::random(), "ledger", body)
}

fn endpoint(process: &Process) -> Endpoint {
    Endpoint::from_shared(format!("http://{}", process.addr)).expect("a URI")
}

fn anywhere() -> std::net::SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_at_the_limit_passes_and_one_above_it_is_refused_before_it_is_sent() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    let remote = GrpcParticipant::connect_to(endpoint(&process), GrpcOptions::default()).expect("good options");
    assert_eq!(remote.prepare(&branch(vec![7; 4 << 20])).await.expect("an answer"), Vote::Yes);
    let endless = GrpcOptions::default().timeout(Duration::MAX);
    let patient = GrpcParticipant::connect_to(endpoint(&process), endless).expect("good options");
    assert_eq!(patient.in_doubt("g").await.expect("an answer").len(), 1);
    let large = branch(vec![7; (4 << 20) + 1]);
    fails(remote.prepare(&large).await, ErrorKind::InvalidInput, &["4194305 bytes", "4194304"]);
    fails(remote.commit(&large).await, ErrorKind::InvalidInput, &["4194305 bytes"]);
    assert_eq!(book.calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_above_the_servers_own_limit_is_refused_with_a_clear_error() {
    let book = Book::new();
    let service = ParticipantServer::new(book.clone()).max_body(16);
    let process = Process::run(anywhere(), Server::builder().add_service(service)).await;
    let remote = GrpcParticipant::connect_to(endpoint(&process), GrpcOptions::default()).expect("good options");
    let large = branch(vec![7; 2 << 20]);
    fails(remote.prepare(&large).await, ErrorKind::InvalidInput, &["message length too large"]);
    assert_eq!(remote.prepare(&branch("small")).await.expect("an answer"), Vote::Yes);
    assert_eq!(book.calls().len(), 1, "the large one has not arrived");
}

/// Never answers, and notes when it is dropped.
#[derive(Debug, Default)]
struct Hangs {
    begun: AtomicUsize,
    dropped: Arc<AtomicUsize>,
}

struct Noted(Arc<AtomicUsize>);

impl Drop for Noted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

#[async_trait]
impl Participant for Hangs {
    async fn prepare(&self, _: &Branch) -> Result<Vote> {
        self.begun.fetch_add(1, Ordering::AcqRel);
        let _noted = Noted(self.dropped.clone());
        std::future::pending().await
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        self.prepare(branch).await.map(|_| Finish::Done)
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.commit(branch).await
    }

    async fn in_doubt(&self, _: &str) -> Result<Vec<TxId>> {
        Ok(Vec::new())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_ends_in_time_and_is_dropped_at_the_server() {
    let hangs = Arc::new(Hangs::default());
    let process = Process::serve(hangs.clone()).await;
    let options = GrpcOptions::default().timeout(Duration::from_millis(300));
    let remote = GrpcParticipant::connect_to(endpoint(&process), options).expect("good options");
    let started = Instant::now();
    fails(remote.prepare(&branch("x")).await, ErrorKind::Ambiguous, &["prepare g/", "an abort follows"]);
    fails(remote.commit(&branch("x")).await, ErrorKind::Ambiguous, &["it is told again"]);
    fails(remote.abort(&branch("x")).await, ErrorKind::Ambiguous, &["it is told again"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(hangs.begun.load(Ordering::Acquire), 3);
    eventually("dropped there", async || hangs.dropped.load(Ordering::Acquire) == 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_dropped_is_dropped_at_the_server() {
    let hangs = Arc::new(Hangs::default());
    let process = Process::serve(hangs.clone()).await;
    let remote = GrpcParticipant::connect_to(endpoint(&process), GrpcOptions::default()).expect("good options");
    let branch = branch("x");
    let waited = timeout(Duration::from_millis(300), remote.prepare(&branch)).await;
    assert!(waited.is_err() && hangs.begun.load(Ordering::Acquire) == 1);
    eventually("dropped there", async || hangs.dropped.load(Ordering::Acquire) == 1).await;
    assert_eq!(remote.in_doubt("g").await.expect("the connection serves on"), []);
}

/// The server takes one stream at a time, so most requests are still here when it stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_never_left_is_unavailable_and_one_that_did_is_ambiguous() {
    const CALLS: usize = 8;
    let hangs = Arc::new(Hangs::default());
    let router = Server::builder().max_concurrent_streams(1).add_service(ParticipantServer::new(hangs.clone()));
    let mut process = Process::run(anywhere(), router).await;
    let remote = GrpcParticipant::connect_to(endpoint(&process), GrpcOptions::default()).expect("good options");
    let remote = Arc::new(remote);
    assert_eq!(remote.in_doubt("g").await.expect("now the limit is known"), []);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..CALLS {
        let remote = remote.clone();
        calls.spawn(async move { remote.prepare(&branch("x")).await });
    }
    eventually("one is there", async || hangs.begun.load(Ordering::Acquire) == 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    // It closes its port first, so that nobody is let in once more; the one that is there goes on, until it is killed.
    let _served = process.stop();
    let mut kinds = Vec::new();
    for left in (0..CALLS).rev() {
        let call = timeout(SOON, calls.join_next()).await.expect("in time").expect("there are more").expect("no panic");
        kinds.push(call.expect_err("it has stopped").kind());
        if left == 2 {
            process.kill();
        }
    }
    assert_eq!(hangs.begun.load(Ordering::Acquire), 1);
    let count = |kind| kinds.iter().filter(|k| **k == kind).count();
    // Beside the one that is there, hyper holds one that waits for its turn, and of that one it does not tell.
    let (unavailable, ambiguous) = (count(ErrorKind::Unavailable), count(ErrorKind::Ambiguous));
    assert!(unavailable >= CALLS - 2 && ambiguous >= 1 && unavailable + ambiguous == CALLS, "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_at_the_address_is_unavailable_and_somebody_else_is_told() {
    let mut process = Process::serve(Book::new()).await;
    let remote = GrpcParticipant::connect(&format!("http://user:hunter2@{}", process.addr)).expect("a URI");
    process.kill();
    let address = process.addr.to_string();
    eventually("its port is closed", async || tokio::net::TcpStream::connect(process.addr).await.is_err()).await;
    fails(remote.commit(&branch("x")).await, ErrorKind::Unavailable, &[&address, "onnection refused"]);
    let shown = format!("{:?} {remote:?}", remote.prepare(&branch("x")).await);
    assert!(!shown.contains("hunter2"), "{shown}");

    let other = Process::run(anywhere(), Server::builder().add_service(Foreign::default())).await;
    let remote = GrpcParticipant::connect(&format!("http://{}", other.addr)).expect("a URI");
    fails(remote.in_doubt("g").await, ErrorKind::Unsupported, &["in_doubt g on grpc"]);
    assert_eq!(GrpcParticipant::connect("no uri").expect_err("no URI").kind(), ErrorKind::InvalidInput);
    let zero = GrpcOptions::default().timeout(Duration::ZERO);
    let refused = GrpcParticipant::connect_to(endpoint(&other), zero).expect_err("a limit of zero");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
}

/// Requests and replies of a later version.
#[derive(Clone, PartialEq, prost::Message)]
struct Later {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(int32, tag = "2")]
    answer: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LaterRequest {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(string, tag = "2")]
    group: String,
    #[prost(string, tag = "99")]
    news: String,
}

/// Somebody else's server of the same service: it has no `InDoubt`, and answers the rest in version 2, or with a word that
/// nobody knows.
#[derive(Clone, Default)]
pub(crate) struct Foreign {
    mumbles: bool,
}

impl NamedService for Foreign {
    const NAME: &'static str = "quorate.commit.v1.Participant";
}

impl Service<http::Request<Body>> for Foreign {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        struct Answer(Later);
        impl Service<Request<Later>> for Answer {
            type Response = Response<Later>;
            type Error = Status;
            type Future = std::future::Ready<Result<Response<Later>, Status>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, _: Request<Later>) -> Self::Future {
                std::future::ready(Ok(Response::new(self.0.clone())))
            }
        }
        let answer = if self.mumbles { Later { version: 1, answer: 77 } } else { Later { version: 2, answer: 1 } };
        Box::pin(async move {
            if request.uri().path().ends_with("InDoubt") {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let codec: ProstCodec<Later, Later> = ProstCodec::default();
            Ok(tonic::server::Grpc::new(Lenient(codec)).unary(Answer(answer), request).await)
        })
    }
}

/// Reads anything as an empty message.
struct Lenient(ProstCodec<Later, Later>);

impl tonic::codec::Codec for Lenient {
    type Encode = Later;
    type Decode = Later;
    type Encoder = <ProstCodec<Later, Later> as tonic::codec::Codec>::Encoder;
    type Decoder = Skips;

    fn encoder(&mut self) -> Self::Encoder {
        self.0.encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Skips
    }
}

struct Skips;

impl tonic::codec::Decoder for Skips {
    type Item = Later;
    type Error = Status;

    fn decode(&mut self, source: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<Later>, Status> {
        use bytes::Buf as _;
        source.advance(source.remaining());
        Ok(Some(Later::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_another_version_or_without_a_meaning_is_a_clear_error() {
    let later = Process::run(anywhere(), Server::builder().add_service(Foreign::default())).await;
    let remote = GrpcParticipant::connect(&format!("http://{}", later.addr)).expect("a URI");
    let texts = ["version 2", "asked was 1", "update the older side"];
    fails(remote.prepare(&branch("x")).await, ErrorKind::Unsupported, &texts);
    fails(remote.commit(&branch("x")).await, ErrorKind::Unsupported, &texts);
    let mumbling = Process::run(anywhere(), Server::builder().add_service(Foreign { mumbles: true })).await;
    let remote = GrpcParticipant::connect(&format!("http://{}", mumbling.addr)).expect("a URI");
    fails(remote.prepare(&branch("x")).await, ErrorKind::Corrupt, &["answers 77"]);
    fails(remote.abort(&branch("x")).await, ErrorKind::Corrupt, &["answers 77"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_another_version_is_refused_before_the_participant_sees_it() {
    let book = Book::new();
    let process = Process::serve(book.clone()).await;
    for (version, code, text) in
        [(2, tonic::Code::Unimplemented, "version 2"), (0, tonic::Code::InvalidArgument, "no version")]
    {
        for method in ["Prepare", "Commit", "Abort", "InDoubt"] {
            let mut client = Grpc::new(endpoint(&process).connect_lazy());
            client.ready().await.expect("ready");
            let path = format!("/quorate.commit.v1.Participant/{method}").parse().expect("a path");
            let request = LaterRequest { version, group: "g".to_owned(), news: "?".to_owned() };
            let codec: ProstCodec<LaterRequest, Later> = ProstCodec::default();
            let status = client.unary(Request::new(request), path, codec).await.expect_err("refused");
            assert_eq!(status.code(), code, "{method}: {status:?}");
            assert!(status.message().contains(text), "{method}: {status:?}");
        }
    }
    assert_eq!(book.calls(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_token_is_denied_and_tokens_are_in_no_error() {
    let asked = Arc::new(AtomicBool::new(false));
    let seen = asked.clone();
    let guarded = InterceptedService::new(ParticipantServer::new(Book::new()), move |request: Request<()>| {
        seen.store(true, Ordering::Release);
        match request.metadata().get("authorization").and_then(|token| token.to_str().ok()) {
            Some("Bearer right") => Ok(request),
            _ => Err(Status::unauthenticated("no or a wrong token")),
        }
    });
    let process = Process::run(anywhere(), Server::builder().add_service(guarded)).await;
    let with = |token: &'static str| {
        let options = GrpcOptions::default().metadata(move |metadata| {
            metadata.insert("authorization", token.parse().expect("ASCII"));
        });
        GrpcParticipant::connect_to(endpoint(&process), options).expect("good options")
    };
    let wrong = with("Bearer hunter2");
    let error = wrong.prepare(&branch("x")).await.expect_err("denied");
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(asked.load(Ordering::Acquire));
    assert!(!format!("{error} {error:?} {wrong:?}").contains("hunter2"), "{error:?}");
    assert_eq!(with("Bearer right").prepare(&branch("x")).await.expect("let in"), Vote::Yes);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_goes_by_the_endpoint_and_a_certificate_that_is_not_trusted_is_not_spoken_to() {
    let files = TlsFiles::generate().expect("made");
    let read = |path| std::fs::read(path).expect("readable");
    let identity = Identity::from_pem(read(files.server_cert()), read(files.server_key()));
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity).client_ca_root(Certificate::from_pem(read(files.ca()))))
        .expect("good material");
    let book = Book::new();
    let process = Process::run(anywhere(), { server }.add_service(ParticipantServer::new(book.clone()))).await;
    let tls = |authority: &TlsFiles| {
        let identity = Identity::from_pem(read(files.client_cert()), read(files.client_key()));
        let authority = Certificate::from_pem(read(authority.ca()));
        ClientTlsConfig::new().ca_certificate(authority).identity(identity).domain_name("localhost")
    };
    let with = |authority: &TlsFiles| {
        let endpoint = Endpoint::from_shared(format!("https://{}", process.addr)).expect("a URI");
        let endpoint = endpoint.tls_config(tls(authority)).expect("good material");
        GrpcParticipant::connect_to(endpoint, GrpcOptions::default()).expect("good options")
    };
    assert_eq!(with(&files).prepare(&branch("x")).await.expect("an answer"), Vote::Yes);
    let other = TlsFiles::generate().expect("made");
    let refused = timeout(SOON, with(&other).prepare(&branch("x"))).await.expect("in time");
    fails(refused, ErrorKind::Unavailable, &["certificate"]);
    assert_eq!(book.calls().len(), 1);

    // The same where it is found.
    let space = Space::memory();
    let coord = space.coord().await;
    let _registration = listed(&coord, process.addr, "ledger-1", "eu-1").await;
    let trusted = tls(&files);
    let options = GrpcOptions::default().endpoint(move |instance| {
        Endpoint::from_shared(format!("https://{}", instance.endpoint()))?.tls_config(trusted.clone())
    });
    let service = GrpcParticipant::discover_with(&coord, "ledger-service", options).await.expect("followed");
    assert_eq!(service.prepare(&branch("x")).await.expect("an answer"), Vote::Yes);
}
