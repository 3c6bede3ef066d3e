//! The server's side: any participant as a service of gRPC.
//!
//! Promise: see [`ParticipantServer`].

use std::{
    convert::Infallible,
    fmt,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::FutureExt as _;
use quorate_core::{
    ErrorKind, Result,
    commit::{Branch, Finish, Participant, TxId, Vote},
};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Body as HttpBody, BoxFuture, Service, StdError, http},
    server::{Grpc, NamedService},
};
use tonic_prost::ProstCodec;

use crate::{
    DEFAULT_MAX_BODY, OVERHEAD,
    message::{self, BranchRequest, FinishReply, InDoubtReply, InDoubtRequest, PrepareReply, SERVICE, VERSION, Verb},
    status::{of_error, plain, said},
};

/// How many ids one answer to `InDoubt` holds.
const PAGE: usize = 10_000;

/// A [`Participant`] as a service that is added to a server of [`tonic`], beside any others:
///
/// ```no_run
/// # use std::sync::Arc;
/// # use quorate_core::commit::Participant;
/// use quorate_grpc::ParticipantServer;
/// # async fn show(ledger: Arc<dyn Participant>) -> Result<(), Box<dyn std::error::Error>> {
/// let server = tonic::transport::Server::builder().add_service(ParticipantServer::new(ledger));
/// server.serve("0.0.0.0:7070".parse()?).await?;
/// # Ok(()) }
/// ```
///
/// # What is promised
/// - The participant is asked exactly what the caller asks, and its answer, an error's kind too, is what the caller gets.
/// - A panic in it is an error of that call; the text of the panic stays here.
/// - A call whose caller has gone, or whose time limit (`grpc-timeout`) has passed, is dropped at its current await: the
///   contract of [`Participant`] allows that.
/// - A request of another version, or larger than the limit, is refused with an error that says so, before the
///   participant sees it.
///
/// Who may call is not asked here: put an interceptor before it, or require client certificates.
#[derive(Clone)]
pub struct ParticipantServer {
    participant: Arc<dyn Participant>,
    max_body: usize,
}

impl ParticipantServer {
    /// The service of this participant. It takes bodies of up to 4 MiB.
    pub fn new(participant: Arc<dyn Participant>) -> Self {
        Self { participant, max_body: DEFAULT_MAX_BODY }
    }

    /// Takes bodies of up to this many bytes. Callers have a limit of their own:
    /// [`GrpcOptions::max_body`](crate::GrpcOptions::max_body).
    #[must_use]
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes;
        self
    }
}

impl fmt::Debug for ParticipantServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParticipantServer({:?})", self.participant)
    }
}

impl NamedService for ParticipantServer {
    const NAME: &'static str = SERVICE;
}

impl<B> Service<http::Request<B>> for ParticipantServer
where
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let (participant, limit) = (self.participant.clone(), self.max_body.saturating_add(OVERHEAD));
        let verbs = [Verb::Prepare, Verb::Commit, Verb::Abort, Verb::InDoubt];
        let verb = verbs.into_iter().find(|verb| verb.path() == request.uri().path());
        Box::pin(async move {
            Ok(match verb {
                Some(Verb::Prepare) => {
                    let call = Unary(move |asked| prepare(participant.clone(), asked));
                    Grpc::new(ProstCodec::default()).max_decoding_message_size(limit).unary(call, request).await
                }
                Some(verb @ (Verb::Commit | Verb::Abort)) => {
                    let call = Unary(move |asked| finish(participant.clone(), verb, asked));
                    Grpc::new(ProstCodec::default()).max_decoding_message_size(limit).unary(call, request).await
                }
                Some(Verb::InDoubt) => {
                    let call = Unary(move |asked| in_doubt(participant.clone(), asked));
                    Grpc::new(ProstCodec::default()).max_decoding_message_size(limit).unary(call, request).await
                }
                None => Status::unimplemented(format!("{SERVICE} has no such method")).into_http(),
            })
        })
    }
}

/// An async function as what [`Grpc::unary`] calls.
struct Unary<F>(F);

impl<F, W, Q, R> Service<Request<Q>> for Unary<F>
where
    F: FnMut(Q) -> W,
    W: Future<Output = Result<R, Status>> + Send + 'static,
{
    type Response = Response<R>;
    type Error = Status;
    type Future = BoxFuture<Response<R>, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let work = (self.0)(request.into_inner());
        Box::pin(async move { work.await.map(Response::new) })
    }
}

async fn prepare(participant: Arc<dyn Participant>, asked: BranchRequest) -> Result<PrepareReply, Status> {
    let branch = branch_of(&asked)?;
    let (vote, why) = match guarded(participant.prepare(&branch)).await? {
        Vote::Yes => (message::Vote::Yes, String::new()),
        Vote::ReadOnly => (message::Vote::ReadOnly, String::new()),
        Vote::No(why) => (message::Vote::No, why),
        other => return Err(unknown_answer(&format!("{other:?}"))),
    };
    Ok(PrepareReply { version: VERSION, vote: vote.into(), why: plain(&why) })
}

async fn finish(participant: Arc<dyn Participant>, verb: Verb, asked: BranchRequest) -> Result<FinishReply, Status> {
    let branch = branch_of(&asked)?;
    let told = match verb {
        Verb::Commit => participant.commit(&branch),
        _ => participant.abort(&branch),
    };
    let (finish, what) = match guarded(told).await? {
        Finish::Done => (message::Finish::Done, String::new()),
        Finish::Diverged(what) => (message::Finish::Diverged, what),
        other => return Err(unknown_answer(&format!("{other:?}"))),
    };
    Ok(FinishReply { version: VERSION, finish: finish.into(), what: plain(&what) })
}

/// One page: the ids above `after`, in order.
async fn in_doubt(participant: Arc<dyn Participant>, asked: InDoubtRequest) -> Result<InDoubtReply, Status> {
    check_version(asked.version)?;
    let after = match &*asked.after {
        "" => None,
        after => Some(after.parse::<TxId>().map_err(|error| of_error(&error))?),
    };
    let mut found = guarded(participant.in_doubt(&asked.group)).await?;
    found.sort_unstable();
    found.dedup();
    let rest = found.split_off(after.map_or(0, |after| found.partition_point(|id| *id <= after)));
    let transactions = rest.iter().take(PAGE).map(TxId::to_string).collect();
    Ok(InDoubtReply { version: VERSION, transactions, more: rest.len() > PAGE })
}

/// A panic is an answer: that there is none.
async fn guarded<T>(call: impl Future<Output = Result<T>>) -> Result<T, Status> {
    // What a panic may have left half-done is the participant's own, as it is in a task of its own.
    match AssertUnwindSafe(call).catch_unwind().await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(of_error(&error)),
        Err(_) => Err(said(ErrorKind::Ambiguous, "the participant panicked")),
    }
}

fn unknown_answer(what: &str) -> Status {
    said(ErrorKind::Unsupported, &format!("version {VERSION} of the protocol cannot say {what}"))
}

fn branch_of(asked: &BranchRequest) -> Result<Branch, Status> {
    check_version(asked.version)?;
    let id: TxId = asked.transaction.parse().map_err(|error| of_error(&error))?;
    Ok(Branch::new(&asked.group, id, &asked.participant, asked.body.clone()))
}

/// Without the participant's word, so that the caller may ask an instance that is up to date.
fn check_version(theirs: u32) -> Result<(), Status> {
    match theirs {
        VERSION => Ok(()),
        0 => Err(Status::invalid_argument("the request states no version of the protocol")),
        newer => Err(Status::unimplemented(format!(
            "the caller speaks version {newer} of the protocol, this server version {VERSION}"
        ))),
    }
}
