//! Participants of an [atomic commit](quorate_core::commit) in other services, over gRPC.
//!
//! Promise: the contract of [`Participant`](quorate_core::commit::Participant) holds across the wire. What the caller's side
//! adds of its own are errors, and each says whether the call surely was not applied.
//!
//! One service puts its participant on its server and registers; every process that drives or recovers transactions
//! enlists it by the service's name:
//!
//! ```
//! # use std::sync::Arc;
//! # use quorate_core::{Coordinator, commit::Participant, discovery::Instance};
//! use quorate_grpc::{GrpcParticipant, ParticipantServer};
//!
//! # async fn serve(coord: Coordinator, ledger: Arc<dyn Participant>) -> Result<(), Box<dyn std::error::Error>> {
//! // in the service
//! let server = tonic::transport::Server::builder().add_service(ParticipantServer::new(ledger));
//! let registration = coord.register(Instance::new("ledger-service", "10.0.0.7:7070"))?;
//! server.serve("10.0.0.7:7070".parse()?).await?;
//! # drop(registration); Ok(()) }
//!
//! # async fn drive(coord: Coordinator) -> quorate_core::Result<()> {
//! // in the processes that drive and recover
//! let payments = coord.transactions("payments")?;
//! payments.enlist("ledger", Arc::new(GrpcParticipant::discover(&coord, "ledger-service").await?))?;
//! let recoverer = payments.recover();
//! let outcome = payments.begin().branch("ledger", "-30").commit().await?;
//! # drop((recoverer, outcome)); Ok(()) }
//! ```
//!
//! The crate brings the client's part of `tonic` only: a process that serves names `tonic` 0.14 in its own manifest, with its
//! features `server` and `router`, and `tls-aws-lc` for TLS.
//!
//! A service that nobody can connect to from outside is reached through the store instead: see
//! [`Transactions::serve`](quorate_core::commit::Transactions::serve).
//!
//! # Rolling out
//! To stop an instance without failing a transaction: [drain](quorate_core::discovery::Registration::drain) its registration,
//! let the server finish what it has (`serve_with_shutdown`), close the registration. Requests that were on their way when
//! it drained are served; it is told outcomes until it has gone, and then the others are.
//!
//! # Limits
//! A body may have 4 MiB, unless both sides are told otherwise; more is `InvalidInput`, at the caller. Texts (why a vote is
//! no, what has diverged, what an error says) are cut at 500 characters.
//!
//! # On the wire
//! The service `quorate.commit.v1.Participant` of `proto/quorate/commit/v1/participant.proto` in this crate, from which
//! clients and servers in other languages are made; see [`PROTO`]. The code here is written by hand, so that building it needs
//! no protoc. Every message carries the version of the protocol; a server that does not speak the caller's answers
//! `UNIMPLEMENTED`, and another instance is asked.

#[cfg(test)]
mod agreement;
mod client;
mod message;
mod options;
mod peers;
mod server;
mod status;

pub use client::GrpcParticipant;
pub use options::GrpcOptions;
pub use server::ParticipantServer;
pub use tonic;

/// The service's definition, for clients and servers in other languages.
pub const PROTO: &str = include_str!("../proto/quorate/commit/v1/participant.proto");

/// What errors name as their backend.
const BACKEND: &str = "grpc";

/// The largest body, unless told otherwise.
const DEFAULT_MAX_BODY: usize = 4 << 20;

/// What a message has beside the body: names, an id, texts.
const OVERHEAD: usize = 1 << 20;
