//! What this client has put into lines, and what it last saw of them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, Weak},
};

use quorate_core::{Dir, Enqueue, LeaseId, Nonce, Revision, Ticket};

use crate::{
    connect::Conn,
    lease::{Open, lock},
};

/// How many lines are remembered at most for whether they were free.
const CAPACITY: usize = 4096;

/// The tickets that stand on leases of this backend.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    owned: HashMap<Ticket, Owned>,
    /// Per line in which tickets of ours stand: who joined it last, and how many there are.
    lines: HashMap<Dir, (Weak<Open>, usize)>,
    /// Lines that a quorate client made, and whether they were empty but for us when last seen.
    free: HashMap<Dir, bool>,
}

/// A ticket of ours.
#[derive(Debug, Clone)]
pub(crate) struct Owned {
    lease: LeaseId,
    open: Weak<Open>,
    pub(crate) token: Revision,
    nonce: Nonce,
}

impl Owned {
    /// The connection of the ticket's lease, unless that has ended.
    pub(crate) fn conn(&self) -> Option<Arc<Conn>> {
        self.open.upgrade().map(|open| open.conn.clone()).filter(|conn| !conn.is_over())
    }
}

impl Tickets {
    pub(crate) fn get(&self, ticket: &Ticket) -> Option<Owned> {
        lock(&self.state).owned.get(ticket).cloned()
    }

    /// Notes a ticket that was created.
    pub(crate) fn placed(&self, open: &Arc<Open>, entry: &Enqueue, ticket: &Ticket, token: Revision) {
        open.placed(&entry.line, entry.nonce, ticket.clone(), token);
        let owned = Owned { lease: open.id.clone(), open: Arc::downgrade(open), token, nonce: entry.nonce };
        let mut state = lock(&self.state);
        let fresh = state.owned.insert(ticket.clone(), owned).is_none();
        let user = state.lines.entry(entry.line.clone()).or_insert_with(|| (Weak::new(), 0));
        user.0 = Arc::downgrade(open);
        user.1 += usize::from(fresh);
        drop(state);
        // The lease may have ended, and its tickets have been forgotten, just before.
        if open.conn.is_over() {
            self.forget_lease(&open.id);
        }
    }

    /// Forgets a ticket that is gone.
    pub(crate) fn forget(&self, ticket: &Ticket) {
        let mut state = lock(&self.state);
        let Some(owned) = state.owned.remove(ticket) else { return };
        state.left(&ticket.line);
        drop(state);
        if let Some(open) = owned.open.upgrade() {
            open.forget(&ticket.line, owned.nonce);
        }
    }

    pub(crate) fn forget_lease(&self, lease: &LeaseId) {
        let mut state = lock(&self.state);
        let gone: Vec<Ticket> =
            state.owned.iter().filter(|(_, owned)| owned.lease == *lease).map(|(ticket, _)| ticket.clone()).collect();
        for ticket in gone {
            state.owned.remove(&ticket);
            state.left(&ticket.line);
        }
    }

    /// Notes what a line looked like; `made_here` if its node carries our mark.
    pub(crate) fn saw(&self, line: &Dir, made_here: bool, free: bool) {
        let mut state = lock(&self.state);
        match state.free.get_mut(line) {
            Some(known) if made_here => *known = free,
            Some(_) => drop(state.free.remove(line)),
            None if made_here => {
                if state.free.len() >= CAPACITY {
                    state.free.clear();
                }
                state.free.insert(line.clone(), free);
            }
            None => {}
        }
    }

    /// Whether the line was empty when last seen, and of ours nobody stands in it; `None` if that is not known or the
    /// line is not of our making. A guess: whoever relies on it has the server check it.
    pub(crate) fn is_free(&self, line: &Dir) -> Option<bool> {
        let state = lock(&self.state);
        state.free.get(line).map(|free| *free && !state.lines.contains_key(line))
    }

    /// A connection that has seen this line.
    pub(crate) fn witness(&self, line: &Dir) -> Option<Arc<Conn>> {
        let open = lock(&self.state).lines.get(line)?.0.upgrade()?;
        Some(open.conn.clone()).filter(|conn| !conn.is_over())
    }
}

impl State {
    fn left(&mut self, line: &Dir) {
        if let Some(entry) = self.lines.get_mut(line) {
            entry.1 -= 1;
            if entry.1 == 0 {
                self.lines.remove(line);
            }
        }
    }
}
