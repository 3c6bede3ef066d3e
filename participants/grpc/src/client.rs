//! The caller's side: a service of gRPC as a participant.
//!
//! Promise: see [`GrpcParticipant`].

use std::{collections::HashSet, fmt, time::Duration};

use async_trait::async_trait;
use quorate_core::{
    Coordinator, Error, ErrorKind, Result,
    commit::{Branch, Finish, Participant, TxId, Vote},
};
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Status, client::Grpc, codegen::http::uri::PathAndQuery, transport::Endpoint};
use tonic_prost::ProstCodec;

use crate::{
    BACKEND, OVERHEAD,
    message::{self, BranchRequest, FinishReply, InDoubtReply, InDoubtRequest, PrepareReply, VERSION, Verb},
    options::{GrpcOptions, endpoint},
    peers::Peers,
    status::{Failure, judge, plain},
};

/// Longer limits are no limits.
const A_DAY: Duration = Duration::from_secs(86_400);
/// By how much the server's time limit is longer than ours, which knows more to say, and which takes the call back.
const MARGIN: Duration = Duration::from_millis(500);

/// A participant in another service: a [`ParticipantServer`](crate::ParticipantServer), or any other server of the
/// service `quorate.commit.v1.Participant`. It is enlisted in every process that drives or recovers.
///
/// # What is promised
/// - One call reaches one instance. Another is tried only if the first surely never saw the call: no connection could be
///   made, the request did not leave, or what answered is not the service, or not in this version.
/// - A lost answer is an error, never an answer: `Ambiguous`. The transaction takes it for no vote, and aborts; an outcome
///   is told again.
/// - Instances are found by discovery as they come and go. A prepare goes only to those that take requests; one that
///   drains, or fails its checks, is still told outcomes, if nobody else is there.
/// - A call ends within [`GrpcOptions::timeout`].
///
/// # What it relies on
/// All instances of the service reach the same resource: what one of them has prepared, every other can commit.
///
/// # Errors
/// `Unavailable` if the call surely was not applied: nobody could be reached, or the participant itself says so.
/// `Ambiguous` if it was sent, and no answer came: a broken connection, the time limit, a server that stops, a panic there.
/// `Denied` for refused credentials; `Unsupported` if what answers is not the service or does not speak this version;
/// `InvalidInput` for a body above the limit, here or there. Errors of a [`Participant`] keep their kind. No error repeats a
/// body, metadata, or a URI.
///
/// # Cancel safety
/// A call that is dropped is taken back: the server drops what it does for it at its current await. It may have happened.
pub struct GrpcParticipant {
    peers: Peers,
    options: GrpcOptions,
}

impl GrpcParticipant {
    /// Finds the service by its name, and follows its instances from now on.
    ///
    /// # Errors
    /// As for [`Coordinator::discover`]. That there is no instance yet is none.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn discover(coord: &Coordinator, service: &str) -> Result<Self> {
        Self::discover_with(coord, service, GrpcOptions::default()).await
    }

    /// As [`discover`](Self::discover), with options.
    ///
    /// # Errors
    /// As for [`discover`](Self::discover); `InvalidInput` for a time limit of zero.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn discover_with(coord: &Coordinator, service: &str, options: GrpcOptions) -> Result<Self> {
        options.check(service)?;
        let service = coord.discover(service).await?;
        Ok(Self { peers: Peers::found(service, options.clone()), options })
    }

    /// The service at one address, such as `http://10.0.0.7:7070`. Nothing is sent before the first call.
    ///
    /// # Errors
    /// `InvalidInput` if it is no URI.
    pub fn connect(uri: &str) -> Result<Self> {
        // The URI may hold a password, so it is not repeated.
        let endpoint = endpoint(uri).map_err(|_| Error::invalid("connect", "not a URI").on(BACKEND))?;
        Self::connect_to(endpoint, GrpcOptions::default())
    }

    /// The service at an endpoint that was made elsewhere: with TLS, other time limits, keep-alive. Nothing is sent before
    /// the first call.
    ///
    /// # Errors
    /// `InvalidInput` for a time limit of zero.
    pub fn connect_to(endpoint: Endpoint, options: GrpcOptions) -> Result<Self> {
        let peers = Peers::fixed(endpoint);
        options.check(peers.name())?;
        Ok(Self { peers, options })
    }

    /// One call, at as many instances as it takes until one has seen it.
    async fn call<Q, R>(&self, verb: Verb, subject: &str, message: Q) -> Result<R>
    where
        Q: prost::Message + Clone + 'static,
        R: prost::Message + Default + 'static,
    {
        let until = Instant::now() + self.options.timeout.min(A_DAY);
        let answer = timeout_at(until, self.attempts(verb, message, until)).await;
        answer
            .unwrap_or_else(|_| {
                let message = format!("no answer from {} within {:?}", self.peers.name(), self.options.timeout);
                Err(Error::new(ErrorKind::Ambiguous, verb.name(), message).next(doubt(verb)))
            })
            .map_err(|error| error.key(subject).on(BACKEND))
    }

    async fn attempts<Q, R>(&self, verb: Verb, message: Q, until: Instant) -> Result<R>
    where
        Q: prost::Message + Clone + 'static,
        R: prost::Message + Default + 'static,
    {
        // Whom to leave out, and who has had a second chance.
        let (mut tried, mut renewed) = (HashSet::new(), HashSet::new());
        let mut last: Option<Failure> = None;
        while let Some(peer) = self.peers.next(verb, &tried) {
            let peer = match peer {
                Ok(peer) => peer,
                Err((id, failure)) => {
                    tried.insert(id);
                    last = Some(failure);
                    continue;
                }
            };
            let mut request = Request::new(message.clone());
            self.options.fill(request.metadata_mut());
            request.set_timeout(until.saturating_duration_since(Instant::now()) + MARGIN);
            let sent: Result<R, Status> = self.send(peer.channel.clone(), verb, request).await;
            let status = match sent {
                Ok(reply) => {
                    peer.answered();
                    return Ok(reply);
                }
                Err(status) => status,
            };
            let mut failure = judge(&status);
            failure.message = format!("{}: {}", peer.shown, failure.message);
            if failure.stale && renewed.insert(peer.id.clone()) {
                continue;
            }
            tried.insert(peer.id.clone());
            if failure.said {
                peer.answered();
            } else {
                peer.failed();
            }
            if !failure.unseen {
                return Err(told(verb, failure));
            }
            tracing::debug!(service = self.peers.name(), why = failure.message, "not seen by this instance");
            last = Some(failure);
        }
        Err(match last {
            Some(mut failure) => {
                if tried.len() > 1 {
                    failure.message = format!("none of {} instances could be asked; {}", tried.len(), failure.message);
                }
                told(verb, failure)
            }
            None => Error::new(ErrorKind::Unavailable, verb.name(), self.peers.nobody(verb))
                .next("nothing was applied; see whether the service runs and is registered"),
        })
    }

    async fn send<Q, R>(&self, channel: tonic::transport::Channel, verb: Verb, request: Request<Q>) -> Result<R, Status>
    where
        Q: prost::Message + 'static,
        R: prost::Message + Default + 'static,
    {
        let mut grpc = Grpc::new(channel).max_decoding_message_size(self.options.max_body.saturating_add(OVERHEAD));
        grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
        let codec: ProstCodec<Q, R> = ProstCodec::default();
        let reply = grpc.unary(request, PathAndQuery::from_static(verb.path()), codec).await?;
        Ok(reply.into_inner())
    }

    /// The request for a branch.
    fn request(&self, verb: Verb, branch: &Branch) -> Result<BranchRequest> {
        let (size, most) = (branch.body.len(), self.options.max_body);
        if size > most {
            let message = format!("the body has {size} bytes, at most {most} are sent");
            return Err(Error::invalid(verb.name(), message).key(branch).on(BACKEND));
        }
        Ok(BranchRequest {
            version: VERSION,
            group: branch.group.to_string(),
            transaction: branch.id.to_string(),
            participant: branch.participant.to_string(),
            body: branch.body.clone(),
        })
    }

    async fn finish(&self, verb: Verb, branch: &Branch) -> Result<Finish> {
        let request = self.request(verb, branch)?;
        let reply: FinishReply = self.call(verb, &branch.to_string(), request).await?;
        check_version(verb, branch, reply.version)?;
        match message::Finish::try_from(reply.finish) {
            Ok(message::Finish::Done) => Ok(Finish::Done),
            Ok(message::Finish::Diverged) => Ok(Finish::Diverged(plain(&reply.what))),
            Ok(message::Finish::Unspecified) | Err(_) => Err(no_answer(verb, branch, reply.finish)),
        }
    }
}

#[async_trait]
impl Participant for GrpcParticipant {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        let verb = Verb::Prepare;
        let request = self.request(verb, branch)?;
        let reply: PrepareReply = self.call(verb, &branch.to_string(), request).await?;
        check_version(verb, branch, reply.version)?;
        match message::Vote::try_from(reply.vote) {
            Ok(message::Vote::Yes) => Ok(Vote::Yes),
            Ok(message::Vote::ReadOnly) => Ok(Vote::ReadOnly),
            Ok(message::Vote::No) => Ok(Vote::No(plain(&reply.why))),
            Ok(message::Vote::Unspecified) | Err(_) => Err(no_answer(verb, branch, reply.vote)),
        }
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        self.finish(Verb::Commit, branch).await
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        self.finish(Verb::Abort, branch).await
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        let verb = Verb::InDoubt;
        let mut found: Vec<TxId> = Vec::new();
        loop {
            let after = found.last().map(TxId::to_string).unwrap_or_default();
            let request = InDoubtRequest { version: VERSION, group: group.to_owned(), after };
            let reply: InDoubtReply = self.call(verb, group, request).await?;
            check_version(verb, group, reply.version)?;
            let before = found.len();
            for id in &reply.transactions {
                let id = id.parse().map_err(|error: Error| error.with_kind(ErrorKind::Corrupt).on(BACKEND))?;
                // A server that does not keep the order must not keep us here for ever.
                if found.last().is_some_and(|last| *last >= id) {
                    let message = "the service does not list ids in ascending order";
                    return Err(Error::new(ErrorKind::Corrupt, verb.name(), message).key(group).on(BACKEND));
                }
                found.push(id);
            }
            if !reply.more || found.len() == before {
                return Ok(found);
            }
        }
    }
}

impl fmt::Debug for GrpcParticipant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrpcParticipant({:?})", self.peers)
    }
}

/// What a lost answer means for the transaction.
fn doubt(verb: Verb) -> &'static str {
    match verb {
        Verb::Prepare => "it may stand prepared; an abort follows",
        Verb::Commit | Verb::Abort => "it may have happened; it is told again",
        Verb::InDoubt => "it is asked again",
    }
}

fn told(verb: Verb, failure: Failure) -> Error {
    let error = Error::new(failure.kind, verb.name(), failure.message);
    if failure.kind == ErrorKind::Ambiguous { error.next(doubt(verb)) } else { error }
}

fn check_version(verb: Verb, subject: impl fmt::Display, theirs: u32) -> Result<()> {
    if theirs == VERSION {
        return Ok(());
    }
    let message = format!("the service answers in version {theirs} of the protocol, asked was {VERSION}");
    Err(Error::new(ErrorKind::Unsupported, verb.name(), message).key(subject).on(BACKEND).next("update the older side"))
}

fn no_answer(verb: Verb, subject: impl fmt::Display, said: i32) -> Error {
    let message = format!("the service answers {said}, which means nothing in version {VERSION} of the protocol");
    Error::new(ErrorKind::Corrupt, verb.name(), message).key(subject).on(BACKEND)
}
