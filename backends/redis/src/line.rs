//! Lines: joining, looking, and waiting for a ticket to go.
//!
//! Promise: joining is one round trip however long the line is; a ticket that goes wakes those who wait for
//! it and nobody else; a wait sends one request, and after that only what the whole client sends anyway.

use std::sync::Arc;
use std::time::Duration;

use quorate_core::{Dir, Enqueue, Front, Line, Place, Result, Revision, Ticket, TicketKind};
use redis::{RedisResult, Value};
use tokio::time::sleep;

use crate::{
    error::{Effect, unexpected},
    hub::Told,
    lease::ended,
    link::Server,
    script::{Call, ENQUEUE, LINE, LOOK, Parts, malformed},
    sweep::ask,
    txn::{MAX_VALUE, too_long},
};

/// `<lease>-<nonce>`, and what the ticket asks for if that is not the whole line.
fn name(entry: &Enqueue) -> Arc<str> {
    let kind = match entry.kind {
        TicketKind::Lock => "",
        TicketKind::Read => "-r",
        TicketKind::Write => "-w",
    };
    format!("{}-{}{kind}", entry.lease, entry.nonce).into()
}

fn ticket(line: &Dir, name: String) -> Ticket {
    let kind = match name.rsplit_once('-') {
        Some((_, "r")) => TicketKind::Read,
        Some((_, "w")) => TicketKind::Write,
        _ => TicketKind::Lock,
    };
    Ticket { line: line.clone(), name: name.into(), kind }
}

/// Where a ticket's record is.
pub(crate) fn field(ticket: &Ticket) -> Arc<str> {
    format!("{}\n{}", ticket.line.as_str(), ticket.name).into()
}

/// How many of the nearest to name. At least one: whether anybody is ahead must always show.
fn limit(depth: usize) -> String {
    depth.clamp(1, i32::MAX as usize).to_string()
}

pub(crate) async fn enqueue(server: &Server, entry: &Enqueue) -> Result<Option<Place>> {
    if entry.value.len() > MAX_VALUE {
        return Err(too_long("enqueue", entry.value.len()).key(&entry.line));
    }
    let name = name(entry);
    let call = Call::new(&ENQUEUE, &server.connector.keys)
        .arg(entry.line.as_str())
        .arg(&*name)
        .arg(entry.lease.as_str())
        .arg(&entry.value)
        .arg(limit(entry.depth))
        .arg(if entry.when_free { "1" } else { "0" });
    let value = server.call("enqueue", Effect::Writes, &call).await.map_err(|e| e.key(&entry.line))?;
    let mut parts = Parts::of(value).map_err(|e| unexpected("enqueue", &e).key(&entry.line))?;
    if parts.is_empty() {
        return Ok(None);
    }
    if parts.len() == 1 {
        return Err(ended("enqueue", &entry.lease));
    }
    let ticket = Ticket { line: entry.line.clone(), name, kind: entry.kind };
    let place = place(ticket, &mut parts).map_err(|e| unexpected("enqueue", &e).key(&entry.line))?;
    server.connector.saw(place.token);
    Ok(Some(place))
}

pub(crate) async fn look(server: &Server, of: &Ticket, depth: usize) -> Result<Option<Place>> {
    let call = Call::new(&LOOK, &server.connector.keys).arg(of.line.as_str()).arg(&*of.name).arg(limit(depth));
    let value = server.call("look", Effect::Reads, &call).await.map_err(|e| e.key(of))?;
    let mut parts = Parts::of(value).map_err(|e| unexpected("look", &e).key(of))?;
    if parts.is_empty() {
        return Ok(None);
    }
    place(of.clone(), &mut parts).map(Some).map_err(|e| unexpected("look", &e).key(of))
}

fn place(of: Ticket, parts: &mut Parts) -> RedisResult<Place> {
    let token = Revision(parts.number()?);
    let ahead = tickets(&of.line, &mut parts.parts()?)?;
    Ok(Place { ticket: of, token, ahead })
}

fn tickets(line: &Dir, names: &mut Parts) -> RedisResult<Vec<Ticket>> {
    (0..names.len()).map(|_| Ok(ticket(line, names.text()?))).collect()
}

pub(crate) async fn line(server: &Server, line: &Dir) -> Result<Line> {
    let call = Call::new(&LINE, &server.connector.keys).arg(line.as_str());
    let value = server.call("line", Effect::Reads, &call).await.map_err(|e| e.key(line))?;
    whole(line, value).map_err(|e| unexpected("line", &e).key(line))
}

fn whole(line: &Dir, value: Value) -> RedisResult<Line> {
    let mut parts = Parts::of(value)?;
    if parts.is_empty() {
        return Ok(Line::default());
    }
    let tickets = tickets(line, &mut parts.parts()?)?;
    let front = Front { token: Revision(parts.number()?), value: parts.bytes()?.into() };
    Ok(Line { tickets, front: Some(front) })
}

pub(crate) async fn gone(server: &Server, ticket: &Ticket) -> Result<()> {
    let field = field(ticket);
    let link = server.link("gone").await.map_err(|e| e.key(ticket))?;
    // Noted here before the server is asked: the message may arrive before the answer.
    let Some(mut waiting) = server.connector.hub.wait(&field, link.number) else { return Ok(()) };
    let answer = ask(server, &link, std::slice::from_ref(&field), &[]).await.map_err(|e| e.key(ticket))?;
    drop(link);
    match answer.tickets.first() {
        Some(Some(left)) => server.connector.hub.stands(&field, *left),
        Some(None) => return Ok(()),
        None => return Err(unexpected("gone", &malformed("no ticket")).key(ticket)),
    }
    if waiting.told().await == Told::Unsure {
        // All waits of all clients come back at the same moment after a server's restart.
        sleep(Duration::from_micros(rand::random_range(0..50_000))).await;
    }
    Ok(())
}
