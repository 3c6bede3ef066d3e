//! The fence: a hold, as a condition of a transaction.

use serde::{Deserialize, Serialize};

use crate::{
    backend::{Check, Revision, Ticket, TicketKind, Txn, Write},
    key::Dir,
    lock::FencingToken,
};

/// A hold, as a condition of a transaction. It can be sent to another process that writes on the holder's
/// behalf; it is not a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    ticket: Ticket,
    token: Revision,
}

impl Fence {
    pub(crate) fn new(ticket: Ticket, token: Revision) -> Self {
        Self { ticket, token }
    }

    pub(crate) fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    pub(crate) fn line(&self) -> &Dir {
        &self.ticket.line
    }

    /// Takes the ticket out of its line, if it still stands.
    pub(crate) fn leave(&self) -> Txn {
        self.leave_and([])
    }

    /// Takes the ticket out of its line, if it still stands, and makes these writes in the same step.
    pub(crate) fn leave_and(&self, also: impl IntoIterator<Item = Write>) -> Txn {
        let writes = [Write::Leave(self.ticket.clone())].into_iter().chain(also).collect();
        Txn { checks: vec![self.check()], writes }
    }

    /// The token of the hold.
    pub fn token(&self) -> FencingToken {
        self.token.into()
    }

    pub(crate) fn check(&self) -> Check {
        Check::Standing { ticket: self.ticket.clone(), token: self.token }
    }
}

/// The wire form; `kind` is there so that fences of other recipes can be told apart.
#[derive(Serialize, Deserialize)]
struct FenceText {
    kind: FenceKind,
    line: String,
    ticket: String,
    token: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FenceKind {
    Lock,
    Read,
    Write,
}

impl Serialize for Fence {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (line, ticket) = (self.ticket.line.as_str().to_owned(), self.ticket.name.to_string());
        let kind = match self.ticket.kind {
            TicketKind::Lock => FenceKind::Lock,
            TicketKind::Read => FenceKind::Read,
            TicketKind::Write => FenceKind::Write,
        };
        FenceText { kind, line, ticket, token: self.token.0 }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Fence {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = FenceText::deserialize(deserializer)?;
        let line = Dir::from_encoded(&text.line).map_err(serde::de::Error::custom)?;
        let kind = match text.kind {
            FenceKind::Lock => TicketKind::Lock,
            FenceKind::Read => TicketKind::Read,
            FenceKind::Write => TicketKind::Write,
        };
        let ticket = Ticket { line, name: text.ticket.into(), kind };
        Ok(Self { ticket, token: Revision(text.token) })
    }
}
