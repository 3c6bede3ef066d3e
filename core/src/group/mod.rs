//! Groups: who takes part, and what each says of itself.
//!
//! Promise: a member is listed for as long as its process lives and wants to be listed; joining, leaving and changes are
//! told once each, and every `Left` has had its `Joined`. A set at hand is never emptied by an error.
//!
//! ```
//! # async fn show(coord: quorate_core::Coordinator) -> quorate_core::Result<()> {
//! use quorate_core::group::GroupEvent;
//!
//! let group = coord.group("workers");
//! let membership = group.join("worker-7", "10.0.0.7:9000")?;
//! membership.ready().await?;
//!
//! let members = group.follow().await?;
//! println!("{} members", members.now().len());
//! let mut news = members.events();
//! match news.next().await {
//!     GroupEvent::Joined(member) => println!("{} came", member.id),
//!     GroupEvent::Changed(member) => println!("{} says something else now", member.id),
//!     GroupEvent::Left(member) => println!("{} went", member.id),
//! }
//! # Ok(()) }
//! ```
//!
//! # On the wire
//! A member is the key `group/<name>/<id>` of the namespace, on the lease of its session; its value is what the member
//! says of itself, as it was given.

mod events;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{sync::watch, time::Instant};

pub use events::{GroupEvent, GroupEvents};

use crate::{
    backend::{Backend, Entry, LeaseId, Revision},
    coordinator::Coordinator,
    error::{Error, Result},
    key::{Dir, Key, KeyRange},
    presence::{
        KeySpot, Presence, PresenceState, PresenceStates,
        view::{self, Sight, Source},
    },
    watch::Watch,
};

/// How long a member that is missing after an outage is kept, until those that are alive have joined again.
const LINGER: Duration = Duration::from_secs(15);

/// A member of a group.
#[derive(Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name within the group.
    pub id: String,
    /// What it says of itself.
    pub payload: Bytes,
    /// The revision at which its record was created: one that left and came back has another.
    pub joined: Revision,
    /// The lease it stands on: one that was restarted, or whose session was lost, has another.
    pub session: Option<LeaseId>,
}

// What a member says may be anything: only its length is shown.
impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({:?}, {} bytes, joined {})", self.id, self.payload.len(), self.joined)
    }
}

/// A group by its name. Cheap to make and to clone; it comes into being with its first member.
#[derive(Debug, Clone)]
pub struct Group {
    coord: Coordinator,
    /// A bad name is told at the first use.
    dir: Result<Dir>,
}

impl Coordinator {
    /// A group by name.
    pub fn group(&self, name: &str) -> Group {
        Group { coord: self.clone(), dir: Dir::new(["group", name]) }
    }
}

impl Group {
    fn dir(&self) -> Result<&Dir> {
        self.dir.as_ref().map_err(|error| error.clone().on(self.coord.profile().backend))
    }

    /// Joins, and stays a member until the value is dropped or left, on the coordinator's own session. Returns at once;
    /// [`Membership::ready`] waits until others can see it. Must be called within a runtime.
    ///
    /// A member with the same id is replaced: a process that was restarted need not wait for the end of its former
    /// session. Of two that live, the newer is the member; see [`PresenceState::Displaced`].
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or a payload over the limit.
    pub fn join(&self, id: &str, payload: impl Into<Bytes>) -> Result<Membership> {
        let backend = self.coord.backend();
        let key = Key::new(self.dir()?, id).map_err(|error| error.on(backend.profile().backend))?;
        let payload = fitting(&self.coord, &key, payload.into())?;
        let spot = KeySpot { backend: backend.clone(), key: key.clone() };
        Ok(Membership { id: id.to_owned(), key, presence: Presence::start(&self.coord, Arc::new(spot), payload) })
    }

    /// The members now, in order of their ids: one read.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name; otherwise what the backend says.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn members(&self) -> Result<Vec<Member>> {
        let snapshot = self.coord.backend().read(&KeyRange::prefix(self.dir()?, "")?).await?;
        let mut members: Vec<Member> = snapshot.entries.iter().filter_map(|entry| member(entry).ok()).collect();
        members.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        Ok(members)
    }

    /// One member, if it is there.
    ///
    /// # Errors
    /// As for [`members`](Self::members).
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn member(&self, id: &str) -> Result<Option<Member>> {
        let key = Key::new(self.dir()?, id)?;
        let snapshot = self.coord.backend().read(&KeyRange::One(key)).await?;
        Ok(snapshot.entries.first().and_then(|entry| member(entry).ok()))
    }

    /// Follows the members. The first set has been read when this returns; from then on no error ends it.
    ///
    /// # Errors
    /// As for [`members`](Self::members).
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn follow(&self) -> Result<Members> {
        let range = KeyRange::prefix(self.dir()?, "")?;
        let source = Records { backend: self.coord.backend().clone(), range };
        Ok(Members { told: view::open(source, LINGER).await? })
    }
}

fn fitting(coord: &Coordinator, key: &Key, payload: Bytes) -> Result<Bytes> {
    let profile = coord.profile();
    if payload.len() > profile.max_value {
        let message = format!("the payload has {} bytes, at most {} fit", payload.len(), profile.max_value);
        return Err(Error::invalid("join", message).key(key).on(profile.backend));
    }
    Ok(payload)
}

fn member(entry: &Entry) -> Result<Member, String> {
    let id = entry.key.name().ok_or("the id is not encoded as ours are")?;
    Ok(Member { id, payload: entry.value.clone(), joined: entry.created, session: entry.lease.clone() })
}

/// One's own place in a group. Dropping it leaves in the background.
#[derive(Debug)]
#[must_use = "the group is left as soon as this is dropped"]
pub struct Membership {
    id: String,
    key: Key,
    presence: Presence,
}

impl Membership {
    /// The id it joined with.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Waits until others can see the member as it is wanted now.
    ///
    /// # Errors
    /// `Denied` or `InvalidInput` if the coordinator refuses it: it is asked again, with pauses, for as long as this
    /// value lives. `SessionLost` if the group was left.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn ready(&self) -> Result<()> {
        self.presence.settled().await
    }

    /// Changes what the member says of itself. Nothing is awaited; what is wanted last is what others will see, also
    /// after an outage.
    ///
    /// # Errors
    /// `InvalidInput` for a payload over the limit; `SessionLost` if the group was left.
    pub fn update(&self, payload: impl Into<Bytes>) -> Result<()> {
        let payload = payload.into();
        self.presence.change(|| fitting(self.presence.coord(), &self.key, payload))
    }

    /// Where it stands.
    pub fn state(&self) -> PresenceState {
        self.presence.state()
    }

    /// Follows the state: the current one first, then every change. States in between may be skipped.
    pub fn states(&self) -> PresenceStates {
        self.presence.states()
    }

    /// Leaves, and waits until nobody can see the member any more. A second call changes nothing.
    ///
    /// # Errors
    /// `SessionLost` if the runtime was shut down meanwhile.
    ///
    /// # Cancel safety
    /// The first poll leaves; the background finishes.
    pub async fn leave(&self) -> Result<()> {
        self.presence.close().await
    }
}

#[derive(Debug)]
struct Records {
    backend: Arc<dyn Backend>,
    range: KeyRange,
}

#[async_trait]
impl Source for Records {
    type Item = Member;

    async fn watch(&self) -> Result<Watch> {
        self.backend.watch(&self.range).await
    }

    fn read(&self, entry: &Entry) -> Result<Member, String> {
        member(entry)
    }
}

/// The members of a group, kept up to date. Cheap to clone; all clones share one watch, which ends with the last.
#[derive(Debug, Clone)]
pub struct Members {
    told: watch::Receiver<Arc<Sight<Member>>>,
}

/// The members at one moment.
#[derive(Debug, Clone)]
pub struct MemberSet {
    sight: Arc<Sight<Member>>,
}

impl Members {
    /// The members as they are known now. No I/O.
    pub fn now(&self) -> MemberSet {
        MemberSet { sight: self.told.borrow().clone() }
    }

    /// Waits until a set fulfils the condition, which may be the current one.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn until(&self, mut condition: impl FnMut(&MemberSet) -> bool) -> MemberSet {
        let mut told = self.told.clone();
        loop {
            let now = MemberSet { sight: told.borrow_and_update().clone() };
            if condition(&now) {
                return now;
            }
            if told.changed().await.is_err() {
                // The runtime was shut down: nothing more can come.
                std::future::pending::<()>().await;
            }
        }
    }

    /// What changes from now on: of those that are members already, only what is new about them is told.
    pub fn events(&self) -> GroupEvents {
        GroupEvents::new(self.told.clone())
    }
}

impl MemberSet {
    /// All of them, in order of their ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Member>> {
        self.items().values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.items().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items().is_empty()
    }

    /// The one with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Member>> {
        self.items().get(id)
    }

    /// Since when the coordinator has not been heard of; `None` while the set is up to date.
    pub fn stale_since(&self) -> Option<Instant> {
        self.sight.stale_since
    }

    fn items(&self) -> &BTreeMap<String, Arc<Member>> {
        &self.sight.items
    }
}
