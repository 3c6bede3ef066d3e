//! Joining a line.
//!
//! Promise: a repeated attempt finds its first ticket, and one that failed for sure left none.
//!
//! # What it costs
//! A client that knows nothing of the line creates its ticket and lists the line behind it. Both are sent together and
//! awaited once, but the client library leaves Nagle's algorithm on: on a connection whose peer delays its
//! acknowledgements, the list leaves when the create is answered.
//!
//! So a line that was empty when last seen is *claimed*, in one request: delete the line's node, create it again, and
//! the ticket in it. The server refuses to delete a node with children, so this succeeds exactly if nobody is in the
//! line, whichever library they use, and then no list is needed. It is also how "join only if free" is asked in one
//! step. If it is refused, nothing was changed. Only lines that quorate made are claimed (they carry
//! [`MARK`] as their data, and nobody has changed their access list), because the node that is created again is a
//! container with the access list of our own, and what another client made may be something else. Whoever watches the
//! line's own node sees it go and come.

use std::sync::Arc;

use futures_util::future::join_all;
use quorate_core::{Enqueue, ErrorKind, Place, Result, Revision, Ticket};
use zookeeper_client as zk;

use crate::{
    Inner,
    connect::on_own_task,
    error::Call,
    layout::Layout,
    lease::{Attempt, Open},
    line::{MARK, place, saw},
    multi::{Multi, Refused},
    revision, ticket,
};

/// How many steps an attempt takes at most: the line's node may come and go meanwhile.
const STEPS: usize = 12;

pub(crate) async fn enqueue(inner: &Arc<Inner>, entry: &Enqueue) -> Result<Option<Place>> {
    let call = Call::write("enqueue", &entry.line).leased(true);
    if entry.value.len() > inner.profile.max_value {
        let most = inner.profile.max_value;
        let message = format!("the value has {} bytes, at most {most} are allowed", entry.value.len());
        return Err(call.error(ErrorKind::InvalidInput, message));
    }
    let open = inner.leases.get(&entry.lease, &call)?;
    let joining = join_on(inner.clone(), open, entry.clone());
    let joined = on_own_task(joining).await;
    // Whatever was created stood on that session; and the answer may have waited long to be polled.
    inner.leases.get(&entry.lease, &call)?;
    joined
}

async fn join_on(inner: Arc<Inner>, open: Arc<Open>, entry: Enqueue) -> Result<Option<Place>> {
    let call = Call::write("enqueue", &entry.line).leased(true);
    open.conn.ready(&call).await?;
    let turn = open.turn(&entry.line, entry.nonce);
    let mine = turn.lock().await;
    let joined = Joining { inner: &inner, open: &open, entry: &entry, call }.run().await;
    drop(mine);
    drop(turn);
    open.tidy(&entry.line, entry.nonce);
    joined
}

/// What to try next.
enum Step {
    /// Take a line that is believed to be empty.
    Claim,
    /// Make the line, and be the first in it.
    Make,
    /// See whether anybody is there.
    Look,
    /// Join at the end.
    Join,
}

/// How a step ended that brought no place.
enum Answer {
    Placed(Place),
    /// Somebody is there, or came first.
    Taken,
    /// The line's node, or one above it, is missing.
    Missing,
}

struct Joining<'a> {
    inner: &'a Inner,
    open: &'a Arc<Open>,
    entry: &'a Enqueue,
    call: Call<'a>,
}

impl Joining<'_> {
    async fn run(&self) -> Result<Option<Place>> {
        let found = match self.open.begin(&self.entry.line, self.entry.nonce) {
            Some(attempt) => self.find(attempt).await?,
            None => None,
        };
        match found {
            Some(place) => Ok(Some(place)),
            None => self.stand().await,
        }
    }

    async fn stand(&self) -> Result<Option<Place>> {
        let line = self.inner.settings.layout.dir(&self.entry.line);
        let mut step = match self.inner.tickets.is_free(&self.entry.line) {
            Some(true) => Step::Claim,
            Some(false) if self.entry.when_free => Step::Look,
            _ => Step::Join,
        };
        for _ in 0..STEPS {
            let answer = match step {
                Step::Claim => self.claim(&line, true).await?,
                Step::Make => self.claim(&line, false).await?,
                Step::Join => self.join(&line).await?,
                Step::Look => match self.look(&line).await? {
                    Some(next) => {
                        step = next;
                        continue;
                    }
                    None => {
                        self.forget();
                        return Ok(None);
                    }
                },
            };
            step = match (step, answer) {
                (_, Answer::Placed(place)) => return Ok(Some(place)),
                (Step::Claim, Answer::Taken) if self.entry.when_free => Step::Look,
                (_, Answer::Taken) => Step::Join,
                (Step::Make, Answer::Missing) => {
                    make_nodes(self.inner, &self.open.conn.client, Layout::parent(&line));
                    Step::Make
                }
                (_, Answer::Missing) => Step::Make,
            };
        }
        self.forget();
        Err(self.call.error(ErrorKind::Unavailable, "the line's node came and went too often"))
    }

    /// Makes the line's node (again, if there is one) and the ticket as the only one in it.
    async fn claim(&self, line: &str, again: bool) -> Result<Answer> {
        let mut multi = Multi::new(&self.open.conn, self.inner.settings.acls());
        if again {
            multi.delete(line, -1);
        }
        let made = multi.create(line, MARK, zk::CreateMode::Container);
        let stem = format!("{line}/{}", ticket::stem(self.entry.nonce, self.entry.kind));
        let created = multi.create(&stem, &self.entry.value, zk::CreateMode::EphemeralSequential);
        let done = match multi.commit(&self.call).await? {
            Ok(done) => done,
            Err(Refused { index, error }) => {
                // Also if we may not delete it: then it is no line to claim.
                self.inner.tickets.saw(&self.entry.line, error != zk::Error::NoAuth, false);
                return match error {
                    zk::Error::NoNode => Ok(Answer::Missing),
                    zk::Error::NotEmpty | zk::Error::NodeExists => Ok(Answer::Taken),
                    zk::Error::NoAuth if again && index <= made => Ok(Answer::Taken),
                    error => Err(self.refused(error)),
                };
            }
        };
        let failed = |error| self.open.conn.failed(&self.call, error);
        let unreadable = || failed(zk::Error::UnexpectedError("a multi was answered in another order".to_owned()));
        let path = done.path(created).ok_or_else(unreadable)?;
        let zxid = match done.zxid() {
            Some(zxid) => zxid,
            None => {
                let stat = self.open.conn.call(self.open.conn.client.check_stat(path)).await.map_err(failed)?;
                stat.ok_or_else(unreadable)?.czxid
            }
        };
        self.inner.tickets.saw(&self.entry.line, true, true);
        let (ticket, token) = self.placed(path.rsplit_once('/').map_or(path, |(_, name)| name), zxid);
        Ok(Answer::Placed(Place { ticket, token, ahead: Vec::new() }))
    }

    /// Creates the ticket and lists the line behind it.
    async fn join(&self, line: &str) -> Result<Answer> {
        let client = &self.open.conn.client;
        let stem = ticket::stem(self.entry.nonce, self.entry.kind);
        let path = format!("{line}/{stem}");
        let options = zk::CreateMode::EphemeralSequential.with_acls(self.inner.settings.acls());
        let created = client.create(&path, &self.entry.value, &options);
        let listed = client.get_children(line);
        let answers = self.open.conn.call(async { Ok::<_, zk::Error>((created.await, listed.await)) });
        let (created, listed) = answers.await.map_err(|error| self.open.conn.failed(&self.call, error))?;
        let (stat, sequence) = match created {
            Ok(created) => created,
            Err(zk::Error::NoNode) => return Ok(Answer::Missing),
            Err(error) => return Err(self.refused(error)),
        };
        // Noted before the list is looked at: if that failed, a repeated attempt knows its ticket.
        let (ticket, token) = self.placed(&format!("{stem}{sequence}"), stat.czxid);
        let (children, stat) = listed.map_err(|error| self.open.conn.failed(&self.call, error))?;
        saw(self.inner, &self.entry.line, &children, &stat);
        Ok(Answer::Placed(place(ticket, token, &children, self.entry.depth)))
    }

    /// Whether anybody is in the line; what to do next if not.
    async fn look(&self, line: &str) -> Result<Option<Step>> {
        let client = &self.open.conn.client;
        let synced = client.sync("/");
        let listed = client.get_children(line);
        let (children, stat) = match self.open.conn.call(async { synced.await.and(Ok(listed.await)) }).await {
            Ok(Ok(listed)) => listed,
            Ok(Err(zk::Error::NoNode)) => return Ok(Some(Step::Make)),
            Ok(Err(error)) | Err(error) => return Err(self.refused(error)),
        };
        if children.iter().any(|name| ticket::read(name).is_some()) {
            return Ok(None);
        }
        saw(self.inner, &self.entry.line, &children, &stat);
        // What is there is no ticket: nobody stands in the line, but it cannot be claimed.
        let free = children.is_empty() && self.inner.tickets.is_free(&self.entry.line) == Some(true);
        Ok(Some(if free { Step::Claim } else { Step::Join }))
    }

    /// Looks for the ticket of an earlier attempt.
    async fn find(&self, known: Attempt) -> Result<Option<Place>> {
        let (client, session) = (&self.open.conn.client, self.open.conn.session());
        let failed = |error| self.open.conn.failed(&self.call, error);
        let line = self.inner.settings.layout.dir(&self.entry.line);
        // Without the sync, a server that we were moved to might not have seen the attempt yet.
        let synced = client.sync("/");
        let listed = client.list_children(&line);
        let listed = self.open.conn.call(async { synced.await.and(Ok(listed.await)) }).await.map_err(failed)?;
        let children = match listed {
            Ok(children) => children,
            Err(zk::Error::NoNode) => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        if let Attempt::Placed { ticket, token } = known {
            if children.iter().any(|name| **name == *ticket.name) {
                self.open.placed(&self.entry.line, self.entry.nonce, ticket.clone(), token);
                return Ok(Some(place(ticket, token, &children, self.entry.depth)));
            }
            self.inner.tickets.forget(&ticket);
            self.open.begin(&self.entry.line, self.entry.nonce);
            return Ok(None);
        }
        // Another lease may use the same nonce: only the owner tells them apart.
        let begin = ticket::uuid_part(self.entry.nonce);
        let names: Vec<_> = children.iter().filter(|name| name.starts_with(&begin)).collect();
        let paths: Vec<_> = names.iter().map(|name| format!("{line}/{name}")).collect();
        let stats: Vec<_> = paths.iter().map(|path| client.check_stat(path)).collect();
        let stats = async { Ok::<_, zk::Error>(join_all(stats).await) };
        for (name, stat) in names.into_iter().zip(self.open.conn.call(stats).await.map_err(failed)?) {
            if let Some(stat) = stat.map_err(failed)?
                && stat.ephemeral_owner == session
            {
                let (ticket, token) = self.placed(name, stat.czxid);
                return Ok(Some(place(ticket, token, &children, self.entry.depth)));
            }
        }
        Ok(None)
    }

    fn placed(&self, name: &str, zxid: i64) -> (Ticket, Revision) {
        let kind = ticket::read(name).map_or(self.entry.kind, |mark| mark.kind);
        let ticket = Ticket { line: self.entry.line.clone(), name: name.into(), kind };
        let token = revision(zxid);
        self.inner.tickets.placed(self.open, self.entry, &ticket, token);
        (ticket, token)
    }

    fn forget(&self) {
        self.open.forget(&self.entry.line, self.entry.nonce);
    }

    /// The error for an answer that tells whether a ticket may have been created.
    fn refused(&self, error: zk::Error) -> quorate_core::Error {
        let error = self.open.conn.failed(&self.call, error);
        if error.kind() != ErrorKind::Ambiguous {
            self.forget();
        }
        error
    }
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
