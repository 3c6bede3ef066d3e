//! Lines: tickets in order of their tokens.
//!
//! Promise: a ticket is found by its own name alone, looking at a neighbour costs the same in a line of any length,
//! and leaving wakes only those who wait for that ticket.

use std::sync::Arc;

use bytes::Bytes;
use quorate_core::{Dir, Enqueue, Front, Line, Place, Revision, Ticket, TicketKind};
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::Instant,
};

use crate::store::{Directory, State, directory, number};

#[derive(Debug)]
pub(crate) struct Standing {
    name: Arc<str>,
    kind: TicketKind,
    value: Bytes,
    lease: u64,
    nonce: u128,
    // Made by the first who waits for this ticket.
    waiters: Option<Arc<Notify>>,
}

impl Standing {
    /// Wakes those who wait for this ticket, which is out of its line.
    pub(crate) fn left(self) {
        if let Some(waiters) = self.waiters {
            waiters.notify_waiters();
        }
    }

    fn ticket(&self, line: &Dir) -> Ticket {
        Ticket { line: line.clone(), name: self.name.clone(), kind: self.kind }
    }
}

impl State {
    /// `None` if the lease has ended, `Some(None)` if only a free line was wanted and this one is not.
    pub(crate) fn enqueue(&mut self, path: &str, entry: &Enqueue) -> Option<Option<Place>> {
        let id = number(entry.lease.as_str())?;
        let nonce = entry.nonce.0;
        let lease = self.leases.get_mut(&id)?;
        let line = directory(&mut self.directories, path);
        let mut attempts = lease.tickets.range((nonce, 0)..=(nonce, u64::MAX));
        if let Some(((_, token), _)) = attempts.find(|(_, at)| ***at == *path) {
            return Some(place(line, &entry.line, *token, entry.depth));
        }
        if entry.when_free && !line.tickets.is_empty() {
            return Some(None);
        }
        self.revision += 1;
        let token = self.revision;
        let standing = Standing {
            name: decimal(token),
            kind: entry.kind,
            value: entry.value.clone(),
            lease: id,
            nonce,
            waiters: None,
        };
        let place = Place {
            ticket: standing.ticket(&entry.line),
            token: Revision(token),
            ahead: ahead(line, &entry.line, token, entry.depth),
        };
        line.tickets.insert(token, standing);
        lease.tickets.insert((nonce, token), line.path.clone());
        Some(Some(place))
    }

    pub(crate) fn look(&self, path: &str, ticket: &Ticket, depth: usize) -> Option<Place> {
        let line = self.directories.get(path)?;
        place(line, &ticket.line, number(&ticket.name)?, depth)
    }

    pub(crate) fn line(&self, path: &str, line: &Dir) -> Line {
        let Some(directory) = self.directories.get(path) else { return Line::default() };
        let tickets = directory.tickets.values().map(|standing| standing.ticket(line)).collect();
        let front = directory.tickets.first_key_value();
        let front = front.map(|(token, s)| Front { token: Revision(*token), value: s.value.clone() });
        Line { tickets, front }
    }

    /// The token of the ticket, if it stands.
    pub(crate) fn standing(&self, path: &str, ticket: &Ticket) -> Option<u64> {
        let token = number(&ticket.name)?;
        self.directories.get(path)?.tickets.contains_key(&token).then_some(token)
    }

    /// Something that ends when the ticket leaves, and when its lease ends unless it is renewed; `None` if the
    /// ticket is gone.
    pub(crate) fn wait(&mut self, path: &str, ticket: &Ticket) -> Option<(OwnedNotified, Instant)> {
        let token = number(&ticket.name)?;
        let standing = self.directories.get_mut(path)?.tickets.get_mut(&token)?;
        let deadline = self.leases.get(&standing.lease)?.deadline;
        // Made under the lock: it is told of every departure from now on, polled or not.
        let left = standing.waiters.get_or_insert_with(Arc::default).clone().notified_owned();
        Some((left, deadline))
    }

    pub(crate) fn leave(&mut self, path: &str, ticket: &Ticket) {
        let Some(token) = number(&ticket.name) else { return };
        let Some(line) = self.directories.get_mut(path) else { return };
        let Some(standing) = line.tickets.remove(&token) else { return };
        let emptied = line.tickets.is_empty();
        if let Some(lease) = self.leases.get_mut(&standing.lease) {
            lease.tickets.remove(&(standing.nonce, token));
        }
        standing.left();
        if emptied {
            self.tidy();
        }
    }
}

fn place(line: &Directory, dir: &Dir, token: u64, depth: usize) -> Option<Place> {
    let ticket = line.tickets.get(&token)?.ticket(dir);
    Some(Place { ticket, token: Revision(token), ahead: ahead(line, dir, token, depth) })
}

fn ahead(line: &Directory, dir: &Dir, token: u64, depth: usize) -> Vec<Ticket> {
    // At least one: an empty answer means being first.
    line.tickets.range(..token).rev().take(depth.max(1)).map(|(_, standing)| standing.ticket(dir)).collect()
}

/// The number in decimal, in one allocation.
fn decimal(mut number: u64) -> Arc<str> {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    std::str::from_utf8(&digits[start..]).expect("digits are ASCII").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tickets_are_their_tokens_and_nothing_else_is() {
        for token in [1, 9, 10, 1234567890, u64::MAX] {
            assert_eq!(&*decimal(token), token.to_string());
            assert_eq!(number(&decimal(token)), Some(token));
        }
        for name in ["", "+1", "01", " 1", "1 ", "-1", "x", "18446744073709551616", "1.0"] {
            assert_eq!(number(name), None, "{name:?}");
        }
    }
}
