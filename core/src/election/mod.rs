//! Election: one leader at a time, with a term that fences.
//!
//! Promise: at most one [`Leadership`] of an election is valid at a time, under the same assumptions as for a
//! [lock](crate::lock): clocks whose rates differ by no more than [`DRIFT`](crate::session::DRIFT), and nobody who removes
//! tickets by hand. Every leader has a greater term than the one before; the term is the fencing token. Candidates lead in
//! the order in which they joined, unless priorities say otherwise. Code that runs after the last look at the guard is
//! fenced only if the resource, or a transaction, checks the term.
//!
//! ```
//! # use std::{ops::ControlFlow, sync::Arc};
//! # use quorate_core::{Coordinator, Result};
//! # async fn schedule() {}
//! # async fn show(coord: Coordinator) -> Result<()> {
//! let election = coord.election("scheduler");
//! let leadership = election.campaign("10.0.0.7:8080").await?;
//! leadership.protect(schedule()).await?;
//! leadership.resign().await?;
//!
//! // Or for ever, term after term, until the work says that it is done:
//! election
//!     .run_while_leader("10.0.0.7:8080", |leadership| async move {
//!         println!("leading in term {}", leadership.term());
//!         schedule().await;
//!         ControlFlow::Break(())
//!     })
//!     .await
//! # }
//! ```
//!
//! # What it costs
//! Joining is one call; it leads at once if nobody is in the line. A leader announces itself in the background (one call;
//! two if the one before it did not take its record along). A candidate that waits makes itself known with one call, and
//! is woken once, by the one before it; with a priority it then makes one more call. Resigning is one call. Observers watch
//! one key.
//!
//! # On the wire
//! The line is the directory `election/<name>` of the namespace, with `/` in the name as `%2F`. Its tickets are in the
//! layout of the backend's lock clients where it has one. On etcd that is also the layout of `etcdctl elect`, which
//! therefore contends for `<namespace>/election/<name>`; on ZooKeeper it is the one that Curator's `LeaderSelector` uses.
//! Such a client leads like any other, and [`Election::leader`] tells its proposal; but it writes no record, so observers
//! see nobody while it leads, and it sees our values as the JSON that they are:
//!
//! | what | where | value |
//! |---|---|---|
//! | ticket | the line | `{"owner":"4711@host","since_ms":1700000000000,"value":"10.0.0.7:8080"}`, and `"priority":2` if it has one |
//! | leader | key `<name>` of the directory `election-leader`, on the leader's lease | `{"term":17,"owner":"4711@host","value":"10.0.0.7:8080"}` |
//! | who waits | keys of the directory `election-candidate/<name>`, named like the tickets, each on its candidate's lease | as the ticket |
//!
//! Only the leader writes the leader's record, under the condition that its ticket stands; it goes with the ticket.
//!
//! # Resuming
//! A leader that stores its [`fence`](Leadership::fence) can be made to resign by it from any process, also after it is gone:
//! [`Election::resign_by`]. A second campaign of the same session does not take over the term of the first: it is a
//! candidate of its own and waits. [`Leadership::announce`] changes the value within a term.

mod announce;
mod campaign;
mod leadership;
mod observe;
mod record;
mod run;

use std::{future::Future, ops::ControlFlow, sync::Arc, time::SystemTime};

use futures_util::future::{try_join, try_join3};

pub use leadership::Leadership;
pub use observe::Observer;

use crate::{
    backend::{Txn, Write},
    coordinator::Coordinator,
    error::{Error, Result},
    key::KeyRange,
    line::Fence,
    lock::FencingToken,
    session::Session,
};

/// The longest value that a candidate may propose and a leader announce, in bytes.
pub const MAX_VALUE: usize = 16 * 1024;

fn check_value(operation: &'static str, value: &str) -> Result<()> {
    if value.len() > MAX_VALUE {
        let message = format!("the value has {} bytes, at most {MAX_VALUE} are allowed", value.len());
        return Err(Error::invalid(operation, message));
    }
    Ok(())
}

/// Who stands for election, and how.
///
/// A text is a candidate with that value and nothing else.
#[derive(Clone, PartialEq, Eq)]
pub struct Candidate {
    value: String,
    priority: Option<i32>,
    cautious: bool,
}

impl Candidate {
    /// A candidate that proposes this value: what others shall know of it when it leads, often an address. At most
    /// [`MAX_VALUE`] bytes, empty allowed.
    pub fn new(value: impl Into<String>) -> Self {
        Self { value: value.into(), priority: None, cautious: false }
    }

    /// Lets candidates of a higher priority go first.
    ///
    /// When its turn comes after waiting, this candidate looks who else waits; if somebody of higher priority does, it
    /// goes to the end of the line, once for each such candidate. That is all: nobody is put out of office, a
    /// candidate that finds the line empty leads at once, one that has not been [listed](Election::candidates) yet when
    /// the look is taken is not seen, and candidates without a priority neither yield nor are yielded to.
    #[must_use]
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Steps down on suspicion: as soon as a renewal is overdue or failed, instead of when the session is lost. That is up to
    /// two thirds of the TTL earlier, at the price of leaders that change when nothing was lost.
    ///
    /// The leadership that was given up so does not come back: campaign again, as
    /// [`run_while_leader`](Election::run_while_leader) does.
    #[must_use]
    pub fn cautious(mut self) -> Self {
        self.cautious = true;
        self
    }
}

// Values may be secrets of the application: only their length is shown, here and below.
impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { value, priority, cautious } = self;
        write!(f, "Candidate({} bytes, priority {priority:?}, cautious {cautious})", value.len())
    }
}

impl<T: Into<String>> From<T> for Candidate {
    fn from(value: T) -> Self {
        Self::new(value)
    }
}

/// Who leads.
#[derive(Clone, PartialEq, Eq)]
pub struct Leader {
    /// The term: grows with every leader.
    pub term: FencingToken,
    /// What the leader announced last, or else proposed.
    pub value: String,
    /// Who it says it is; `None` for clients of other libraries.
    pub owner: Option<String>,
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Leader(term {}, {} bytes, owner {:?})", self.term, self.value.len(), self.owner)
    }
}

/// One of the candidates of an election.
#[derive(Clone, PartialEq, Eq)]
pub struct Candidacy {
    /// Who it says it is; `None` for clients of other libraries, and while it is not listed yet.
    pub owner: Option<String>,
    /// What it proposes, or for the leader what it announced last; `None` as for the owner.
    pub value: Option<String>,
    /// Its priority, if it has one.
    pub priority: Option<i32>,
    /// When it joined the line, by its own wall clock: for people, never for decisions.
    pub waiting_since: Option<SystemTime>,
    /// Its term, if it is the leader.
    pub term: Option<FencingToken>,
}

impl Candidacy {
    /// Whether this is the leader.
    pub fn leads(&self) -> bool {
        self.term.is_some()
    }
}

impl std::fmt::Debug for Candidacy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { owner, priority, term, .. } = self;
        write!(f, "Candidacy(owner {owner:?}, priority {priority:?}, term {term:?})")
    }
}

/// An election by its name. Cheap to make and to clone; nothing is sent before the first call.
#[derive(Debug, Clone)]
pub struct Election {
    coord: Coordinator,
    /// A bad name is told at the first use, so that making an election needs no `?`.
    places: Result<record::Places>,
    session: Option<Session>,
}

impl Election {
    pub(crate) fn new(coord: Coordinator, name: &str) -> Self {
        Self { coord, places: record::Places::of(name), session: None }
    }

    /// The same election, with candidates that stand on this session instead of the coordinator's own.
    #[must_use]
    pub fn on(mut self, session: &Session) -> Self {
        self.session = Some(session.clone());
        self
    }

    /// Stands for election and waits in line until this is the leader. Observers learn of it a little later: the
    /// announcement is made in the background, and the leadership does not depend on it.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name or value; `SessionLost` if the session ended while waiting: such a candidate is never
    /// elected later; `Unavailable`, `Ambiguous` or `Denied` if the line could not be joined. In no case is a place left
    /// behind for longer than it takes to reach the server, or the lease to end.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the place in the line is given up in the background.
    pub async fn campaign(&self, candidate: impl Into<Candidate>) -> Result<Leadership> {
        self.stand(&candidate.into()).await
    }

    async fn stand(&self, candidate: &Candidate) -> Result<Leadership> {
        campaign::boxed(self, candidate).await
    }

    /// Runs `work` whenever this is the leader, for ever: it stands for election, runs `work` until it returns or the
    /// leadership is lost, and stands again.
    ///
    /// - `work` only runs while this is the leader, by the local clock and what has been heard; once that is over it is
    ///   dropped at its current await, before anybody else can have become leader. (Work that blocks its thread
    ///   cannot be stopped; fence its writes.)
    /// - It is entered at most once per term, and never twice at the same time. What it keeps of the leadership afterwards is
    ///   no leadership any more.
    /// - [`ControlFlow::Break`] resigns and ends; [`ControlFlow::Continue`] resigns and goes to the end of the line at once.
    /// - After a loss or an error (also if the coordinator is down, for however long, or refuses the credentials) it goes on
    ///   after a pause, which doubles up to 10 s, with jitter, and starts small again after a leadership that lasted as
    ///   long. A session that was lost is replaced, unless it was given with [`on`](Self::on).
    ///
    /// # Errors
    /// `InvalidInput` and `Unsupported`; what happens once the coordinator is closed; `SessionLost` if a session given with
    /// [`on`](Self::on) has ended.
    ///
    /// # Cancel safety
    /// Dropped, `work` is dropped first and then the leadership or the place in the line is given up in the background.
    pub async fn run_while_leader<T, F, Fut>(&self, candidate: impl Into<Candidate>, work: F) -> Result<T>
    where
        F: FnMut(Arc<Leadership>) -> Fut,
        Fut: Future<Output = ControlFlow<T>>,
    {
        run::run(self, &candidate.into(), work).await
    }

    /// Observes who leads: see [`Observer`].
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or what the backend's `watch` says.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn observe(&self) -> Result<Observer> {
        let record = &self.places()?.record;
        let backend = self.coord.backend().clone();
        let watch = backend.watch(&KeyRange::One(record.clone())).await?;
        Ok(Observer::new(watch, record.clone(), backend))
    }

    /// Who leads, if anybody does: the first in line, who may not have noticed yet. One round trip, of two calls.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or what the backend says.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn leader(&self) -> Result<Option<Leader>> {
        let line = &self.places()?.line;
        let (line, announced) = try_join(self.coord.backend().line(line), self.announced()).await?;
        Ok(line.front.as_ref().map(|front| newest(record::front(front), announced)))
    }

    /// All candidates, in the order of the line: the first leads. One round trip, of three calls.
    ///
    /// # Errors
    /// As for [`leader`](Self::leader).
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn candidates(&self) -> Result<Vec<Candidacy>> {
        let (places, backend) = (self.places()?, self.coord.backend());
        let entries = places.entries()?;
        let (line, entries, announced) =
            try_join3(backend.line(&places.line), backend.read(&entries), self.announced()).await?;
        let mut candidates = Vec::with_capacity(line.tickets.len());
        for ticket in &line.tickets {
            let own = places.entry(ticket)?;
            let entry = entries.entries.iter().find(|entry| entry.key == own);
            candidates.push(record::candidacy(entry.map(|entry| &*entry.value)));
        }
        if let (Some(first), Some(front)) = (candidates.first_mut(), &line.front) {
            let leader = record::front(front);
            *first = record::candidacy(Some(&front.value));
            first.term = Some(leader.term);
            // The first in the line as it was read, whoever has announced itself since.
            let announced = announced.filter(|announced| announced.term == leader.term);
            first.value = Some(announced.unwrap_or(leader).value);
        }
        Ok(candidates)
    }

    /// Ends a leadership by its fence, from any process; `false` if it has ended already, or is one of another
    /// election. For a leader that stored its fence before it went away.
    ///
    /// # Errors
    /// As for [`leader`](Self::leader), and `Ambiguous` if the reply was lost.
    ///
    /// # Cancel safety
    /// Dropped half-way, the leadership may or may not have been ended.
    pub async fn resign_by(&self, fence: &Fence) -> Result<bool> {
        let places = self.places()?;
        if fence.line() != &places.line {
            return Ok(false);
        }
        let record = Write::Delete(places.record.clone());
        let own = Write::Delete(places.entry(fence.ticket())?);
        let txn: Txn = fence.leave_and([record, own]);
        Ok(self.coord.backend().commit(&txn).await?.applied)
    }

    /// Puts the leader out of office, for an operator: the next in line leads at once.
    ///
    /// The old leader is not stopped. It learns of the loss within about a second, or at its deadline if it is cut off; until
    /// then it takes itself for the leader. Its fenced writes and announcements are refused from now on.
    /// Returns who was put out, or `None` if nobody led or the leader left by itself in the meantime.
    ///
    /// # Errors
    /// As for [`leader`](Self::leader).
    ///
    /// # Cancel safety
    /// Dropped half-way, the leader may or may not have been put out.
    pub async fn depose(&self) -> Result<Option<Leader>> {
        let line = self.coord.backend().line(&self.places()?.line).await?;
        let (Some(ticket), Some(front)) = (line.tickets.first(), &line.front) else { return Ok(None) };
        let applied = self.resign_by(&Fence::new(ticket.clone(), front.token)).await?;
        tracing::warn!(%ticket, applied, "leader deposed by an operator");
        Ok(applied.then(|| record::front(front)))
    }

    /// What the leader's record says.
    async fn announced(&self) -> Result<Option<Leader>> {
        let key = &self.places()?.record;
        let now = self.coord.backend().read(&KeyRange::One(key.clone())).await?;
        // A record that somebody else wrote over is repaired by the next announcement; the ticket tells as well.
        Ok(now.entries.first().and_then(|entry| record::leader(key, &entry.value).ok()))
    }

    fn places(&self) -> Result<&record::Places> {
        self.places.as_ref().map_err(Clone::clone)
    }

    async fn session(&self) -> Result<Session> {
        match &self.session {
            Some(session) => session.check().map(|()| session.clone()),
            None => self.coord.session().await,
        }
    }
}

/// Of what the line says and what was announced, the newer; of the same term, what was announced.
fn newest(front: Leader, announced: Option<Leader>) -> Leader {
    announced.filter(|announced| announced.term >= front.term).unwrap_or(front)
}
