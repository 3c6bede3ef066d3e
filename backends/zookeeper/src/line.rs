//! Lines: ephemeral sequential nodes, in the order of their sequence.
//!
//! Promise: a release wakes exactly who waits for it, and what a lease put into a line is asked for on the lease's own
//! connection: only that one is sure to show it, because in an ensemble other servers may lag behind.

use quorate_core::{Dir, Front, Line, Place, Result, Revision, Ticket, TicketKind};
use zookeeper_client as zk;

use crate::{Inner, connect::on_own_task, error::Call, revision, ticket};

/// What quorate writes on the node of a line that it made, so that its clients know it by the length: see
/// [`join`](crate::join).
pub(crate) const MARK: &[u8] = b"quorate";

/// The place of a ticket among these children: at least the `depth` nearest ahead, and one if there is any.
pub(crate) fn place(ticket: Ticket, token: Revision, children: &[String], depth: usize) -> Place {
    let order = ticket::in_order(children);
    let own = order.iter().position(|(_, _, name)| **name == *ticket.name).unwrap_or(order.len());
    let ahead = order[..own].iter().rev().take(depth.max(1));
    let ahead = ahead.map(|(_, kind, name)| known(&ticket.line, name, *kind)).collect();
    Place { ticket, token, ahead }
}

fn known(line: &Dir, name: &str, kind: TicketKind) -> Ticket {
    Ticket { line: line.clone(), name: name.into(), kind }
}

/// Notes what a line looks like in which one ticket of ours stands.
pub(crate) fn saw(inner: &Inner, line: &Dir, children: &[String], stat: &zk::Stat) {
    // Unless somebody gave it an access list of its own.
    let made_here = usize::try_from(stat.data_length) == Ok(MARK.len()) && stat.aversion == 0;
    inner.tickets.saw(line, made_here, children.len() <= 1);
}

pub(crate) async fn look(inner: &Inner, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
    let call = Call::read("look", ticket);
    let line = inner.settings.layout.dir(&ticket.line);
    let path = inner.settings.layout.ticket(ticket);
    // While its lease's own connection is down, any other tells as well, with a `sync` ahead.
    let owned = inner.tickets.get(ticket).and_then(|owned| Some((owned.conn()?, owned.token)));
    let owned = owned.filter(|(conn, _)| conn.is_connected());
    let (children, token) = if let Some((conn, token)) = owned {
        let (answers, listed) = (conn.answers(), conn.client.get_children(&line));
        // The wait must not keep the session open: see `on_own_task`. This future of the library's does not.
        drop(conn);
        (answers.of(listed).await, Some(token))
    } else {
        let conn = inner.base.conn(&call).await?;
        let synced = conn.client.sync("/");
        let stat = conn.client.check_stat(&path);
        let listed = conn.client.get_children(&line);
        let work = async {
            synced.await?;
            Ok::<_, zk::Error>((stat.await?, listed.await))
        };
        match conn.call(work).await {
            Ok((stat, listed)) => (listed, stat.map(|stat| revision(stat.czxid))),
            Err(error) => return Err(conn.failed(&call, error)),
        }
    };
    let children = match children {
        Ok((children, stat)) => {
            saw(inner, &ticket.line, &children, &stat);
            children
        }
        Err(zk::Error::NoNode) => Vec::new(),
        Err(error) => return Err(call.failed(error)),
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
        Some(conn) if conn.is_connected() => conn,
        _ => inner.base.conn(&call).await?,
    };
    let watched = on_own_task(async move { conn.call(conn.client.get_and_watch_data(&path)).await });
    let watcher = match watched.await {
        Ok((_, _, watcher)) => watcher,
        Err(zk::Error::NoNode) => return Ok(()),
        Err(error) => return Err(call.failed(error)),
    };
    // Survives reconnects: the library hands the watch to the next server, which tells what was missed. Ends with
    // the session at the latest; dropped, the library takes the watch back.
    watcher.changed().await;
    Ok(())
}
