//! The messages of `proto/quorate/commit/v1/participant.proto`, written by hand so that nobody needs protoc to build.
//!
//! Promise: what these encode is what protoc's own code reads, and the reverse; the tests ask protoc.

use std::fmt;

use bytes::Bytes;

/// What this library speaks.
pub(crate) const VERSION: u32 = 1;

/// The service's full name.
pub(crate) const SERVICE: &str = "quorate.commit.v1.Participant";

#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub(crate) struct BranchRequest {
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
    #[prost(string, tag = "2")]
    pub(crate) group: String,
    #[prost(string, tag = "3")]
    pub(crate) transaction: String,
    #[prost(string, tag = "4")]
    pub(crate) participant: String,
    #[prost(bytes = "bytes", tag = "5")]
    pub(crate) body: Bytes,
}

// The body may be a secret of the application: only its length is shown.
impl fmt::Debug for BranchRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, group, transaction, participant, body } = self;
        write!(f, "BranchRequest(v{version} {group}/{transaction}/{participant}, {} bytes)", body.len())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Vote {
    Unspecified = 0,
    Yes = 1,
    ReadOnly = 2,
    No = 3,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct PrepareReply {
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
    #[prost(enumeration = "Vote", tag = "2")]
    pub(crate) vote: i32,
    #[prost(string, tag = "3")]
    pub(crate) why: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Finish {
    Unspecified = 0,
    Done = 1,
    Diverged = 2,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct FinishReply {
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
    #[prost(enumeration = "Finish", tag = "2")]
    pub(crate) finish: i32,
    #[prost(string, tag = "3")]
    pub(crate) what: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct InDoubtRequest {
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
    #[prost(string, tag = "2")]
    pub(crate) group: String,
    #[prost(string, tag = "3")]
    pub(crate) after: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct InDoubtReply {
    #[prost(uint32, tag = "1")]
    pub(crate) version: u32,
    #[prost(string, repeated, tag = "2")]
    pub(crate) transactions: Vec<String>,
    #[prost(bool, tag = "3")]
    pub(crate) more: bool,
}

/// One method of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Prepare,
    Commit,
    Abort,
    InDoubt,
}

impl Verb {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Commit => "commit",
            Self::Abort => "abort",
            Self::InDoubt => "in_doubt",
        }
    }

    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Prepare => "/quorate.commit.v1.Participant/Prepare",
            Self::Commit => "/quorate.commit.v1.Participant/Commit",
            Self::Abort => "/quorate.commit.v1.Participant/Abort",
            Self::InDoubt => "/quorate.commit.v1.Participant/InDoubt",
        }
    }
}
