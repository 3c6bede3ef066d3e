//! Lines: ephemeral sequential nodes, in the order of their sequence.
//!
//! Promise: standing in line costs one wait (create and list, sent together), a repeated attempt finds its first ticket,
//! and a release wakes exactly who waits for it. What a lease put into a line is asked for on the lease's own
//! connection: only that one is sure to show it, because in an ensemble other servers may lag behind.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, Weak},
};

use futures_util::future::join_all;
use quorate_core::{Dir, Enqueue, ErrorKind, Front, LeaseId, Line, Place, Result, Revision, Ticket, TicketKind};
use zookeeper_client as zk;

use crate::{
    Inner,
    connect::Conn,
    error::Call,
    lease::{Attempt, Open, lock},
    revision, ticket,
};

/// How often a line's node is made again when the server removes it just then for being empty.
const MAKES: usize = 5;

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
}

/// A ticket of ours.
#[derive(Debug, Clone)]
pub(crate) struct Owned {
    lease: LeaseId,
    open: Weak<Open>,
    pub(crate) token: Revision,
    nonce: quorate_core::Nonce,
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
    fn placed(&self, open: &Arc<Open>, entry: &Enqueue, ticket: &Ticket, token: Revision) {
        open.placed(&entry.line, entry.nonce, ticket.clone(), token);
        let owned = Owned { lease: open.id.clone(), open: Arc::downgrade(open), token, nonce: entry.nonce };
        let mut state = lock(&self.state);
        let fresh = state.owned.insert(ticket.clone(), owned).is_none();
        let user = state.lines.entry(entry.line.clone()).or_insert_with(|| (Weak::new(), 0));
        user.0 = Arc::downgrade(open);
        user.1 += usize::from(fresh);
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

    /// A connection that has seen this line.
    fn witness(&self, line: &Dir) -> Option<Arc<Conn>> {
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

pub(crate) async fn enqueue(inner: &Inner, entry: &Enqueue) -> Result<Place> {
    let call = Call::write("enqueue", &entry.line).leased(true);
    if entry.value.len() > inner.profile.max_value {
        let message =
            format!("the value has {} bytes, at most {} are allowed", entry.value.len(), inner.profile.max_value);
        return Err(call.error(ErrorKind::InvalidInput, message));
    }
    let open = inner.leases.get(&entry.lease, &call)?;
    open.conn.ready(&call).await?;
    let known = open.begin(&entry.line, entry.nonce);
    let joined = async {
        if let Some(attempt) = known
            && let Some(place) = find(inner, &open, entry, attempt).await?
        {
            return Ok(place);
        }
        join(inner, &open, entry).await
    };
    joined.await.map_err(|error: zk::Error| {
        // Whatever was created stood on that session.
        if open.conn.is_over() { call.session_lost() } else { open.conn.failed(&call, error) }
    })
}

/// Creates the ticket and lists the line behind it.
async fn join(inner: &Inner, open: &Arc<Open>, entry: &Enqueue) -> Result<Place, zk::Error> {
    let client = &open.conn.client;
    let line = inner.settings.layout.dir(&entry.line);
    let stem = ticket::stem(entry.nonce, entry.kind);
    let path = format!("{line}/{stem}");
    let options = zk::CreateMode::EphemeralSequential.with_acls(inner.settings.acls());
    for make in 0..MAKES {
        if make > 0 {
            // In the same go, ahead of the ticket. Whether it was needed the ticket's own answer tells.
            make_nodes(inner, client, &line);
        }
        let created = client.create(&path, &entry.value, &options);
        let listed = client.list_children(&line);
        let (created, listed) = open.conn.call(async { Ok::<_, zk::Error>((created.await, listed.await)) }).await?;
        let (stat, sequence) = match created {
            Ok(created) => created,
            Err(zk::Error::NoNode) => continue,
            Err(error) => {
                if refused(&error) {
                    open.forget(&entry.line, entry.nonce);
                }
                return Err(error);
            }
        };
        let ticket = Ticket { line: entry.line.clone(), name: format!("{stem}{sequence}").into(), kind: entry.kind };
        let token = revision(stat.czxid);
        inner.tickets.placed(open, entry, &ticket, token);
        return Ok(place(ticket, token, &listed?, entry.depth));
    }
    open.forget(&entry.line, entry.nonce);
    Err(zk::Error::NoNode)
}

/// Whether the server itself said no.
fn refused(error: &zk::Error) -> bool {
    use zk::Error as E;
    matches!(error, E::NoAuth | E::InvalidAcl | E::NoChildrenForEphemerals | E::QuotaExceeded | E::Throttled)
}

/// Sends for the creation of this node and of those above it, and does not wait.
pub(crate) fn make_nodes(inner: &Inner, client: &zk::Client, path: &str) {
    let layout = &inner.settings.layout;
    // The namespace itself is missing after a server has lost its data.
    let persistent = zk::CreateMode::Persistent.with_acls(inner.settings.acls());
    for node in layout.namespace_nodes() {
        drop(client.create(node, b"", &persistent));
    }
    let container = zk::CreateMode::Container.with_acls(inner.settings.acls());
    for node in layout.nodes_down_to(path) {
        drop(client.create(node, b"", &container));
    }
}

/// Looks for the ticket of an earlier attempt.
async fn find(inner: &Inner, open: &Arc<Open>, entry: &Enqueue, known: Attempt) -> Result<Option<Place>, zk::Error> {
    let client = &open.conn.client;
    let line = inner.settings.layout.dir(&entry.line);
    // Without the sync, a server that we were moved to might not have seen the attempt yet.
    let synced = client.sync("/");
    let listed = client.list_children(&line);
    let children = match open.conn.call(async { synced.await.and(Ok(listed.await)) }).await? {
        Ok(children) => children,
        Err(zk::Error::NoNode) => return Ok(None),
        Err(error) => return Err(error),
    };
    if let Attempt::Placed { ticket, token } = known {
        if children.iter().any(|name| **name == *ticket.name) {
            return Ok(Some(place(ticket, token, &children, entry.depth)));
        }
        inner.tickets.forget(&ticket);
        open.begin(&entry.line, entry.nonce);
        return Ok(None);
    }
    // Another lease may use the same nonce: only the owner tells them apart.
    let begin = ticket::uuid_part(entry.nonce);
    let paths: Vec<String> =
        children.iter().filter(|name| name.starts_with(&begin)).map(|name| format!("{line}/{name}")).collect();
    let stats: Vec<_> = paths.iter().map(|path| client.check_stat(path)).collect();
    let stats = open.conn.call(async { Ok::<_, zk::Error>(join_all(stats).await) }).await?;
    for (path, stat) in paths.iter().zip(stats) {
        let Some(stat) = stat? else { continue };
        if stat.ephemeral_owner != open.conn.session() {
            continue;
        }
        let name = &path[line.len() + 1..];
        let kind = ticket::read(name).map_or(entry.kind, |mark| mark.kind);
        let ticket = Ticket { line: entry.line.clone(), name: name.into(), kind };
        let token = revision(stat.czxid);
        inner.tickets.placed(open, entry, &ticket, token);
        return Ok(Some(place(ticket, token, &children, entry.depth)));
    }
    Ok(None)
}

/// The place of a ticket among these children: at least the `depth` nearest ahead, and one if there is any.
fn place(ticket: Ticket, token: Revision, children: &[String], depth: usize) -> Place {
    let order = ticket::in_order(children);
    let own = order.iter().position(|(_, _, name)| **name == *ticket.name).unwrap_or(order.len());
    let ahead = order[..own].iter().rev().take(depth.max(1));
    let ahead = ahead.map(|(_, kind, name)| known(&ticket.line, name, *kind)).collect();
    Place { ticket, token, ahead }
}

fn known(line: &Dir, name: &str, kind: TicketKind) -> Ticket {
    Ticket { line: line.clone(), name: name.into(), kind }
}

pub(crate) async fn look(inner: &Inner, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
    let call = Call::read("look", ticket);
    let line = inner.settings.layout.dir(&ticket.line);
    let path = inner.settings.layout.ticket(ticket);
    let owned = inner.tickets.get(ticket).and_then(|owned| Some((owned.conn()?, owned.token)));
    let (conn, children, token) = if let Some((conn, token)) = owned {
        conn.ready(&call).await?;
        let listed = conn.call(conn.client.list_children(&line)).await;
        (conn, listed, Some(token))
    } else {
        let conn = inner.base.conn(&call).await?;
        let synced = conn.client.sync("/");
        let stat = conn.client.check_stat(&path);
        let listed = conn.client.list_children(&line);
        let work = async {
            synced.await?;
            Ok::<_, zk::Error>((stat.await?, listed.await))
        };
        match conn.call(work).await {
            Ok((stat, listed)) => (conn.clone(), listed, stat.map(|stat| revision(stat.czxid))),
            Err(error) => return Err(conn.failed(&call, error)),
        }
    };
    let children = match children {
        Ok(children) => children,
        Err(zk::Error::NoNode) => Vec::new(),
        Err(error) => return Err(conn.failed(&call, error)),
    };
    match token {
        Some(token) if children.iter().any(|name| **name == *ticket.name) => {
            Ok(Some(place(ticket.clone(), token, &children, depth)))
        }
        _ => {
            inner.tickets.forget(ticket);
            Ok(None)
        }
    }
}

pub(crate) async fn line(inner: &Inner, line: &Dir) -> Result<Line> {
    let call = Call::read("line", line);
    let conn = inner.base.conn(&call).await?;
    let path = inner.settings.layout.dir(line);
    loop {
        let synced = conn.client.sync("/");
        let listed = conn.client.list_children(&path);
        let listed = conn.call(async { synced.await.and(Ok(listed.await)) }).await;
        let children = match listed.and_then(|listed| listed) {
            Ok(children) => children,
            Err(zk::Error::NoNode) => return Ok(Line::default()),
            Err(error) => return Err(conn.failed(&call, error)),
        };
        let order = ticket::in_order(&children);
        let Some((_, _, first)) = order.first() else { return Ok(Line::default()) };
        let first = format!("{path}/{first}");
        match conn.call(conn.client.get_data(&first)).await {
            Ok((value, stat)) => {
                let front = Front { token: revision(stat.czxid), value: value.into() };
                let tickets = order.iter().map(|(_, kind, name)| known(line, name, *kind)).collect();
                return Ok(Line { tickets, front: Some(front) });
            }
            // It has left in between: the line has moved on, and so do we.
            Err(zk::Error::NoNode) => {}
            Err(error) => return Err(conn.failed(&call, error)),
        }
    }
}

/// Reads the ticket with a one-shot watch. Reading rather than asking whether it exists, because on a ticket that is
/// gone already that would leave a watch for its return at the server.
pub(crate) async fn gone(inner: &Inner, ticket: &Ticket) -> Result<()> {
    let call = Call::read("gone", ticket);
    let path = inner.settings.layout.ticket(ticket);
    let own = inner.tickets.get(ticket).and_then(|owned| owned.conn());
    let conn = match own.or_else(|| inner.tickets.witness(&ticket.line)) {
        Some(conn) => {
            conn.ready(&call).await?;
            conn
        }
        None => inner.base.conn(&call).await?,
    };
    let watched = conn.call(conn.client.get_and_watch_data(&path)).await;
    let watcher = match watched {
        Ok((_, _, watcher)) => watcher,
        Err(zk::Error::NoNode) => return Ok(()),
        Err(error) => return Err(conn.failed(&call, error)),
    };
    // The wait must not keep the session open: it may be the one that is closed.
    drop(conn);
    // Survives reconnects: the library hands the watch to the next server, which tells what was missed. Ends with
    // the session at the latest; dropped, the library takes the watch back.
    watcher.changed().await;
    Ok(())
}
