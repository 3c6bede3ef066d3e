//! What happens in a group, told once each.
//!
//! Promise: the events are the difference between what was told before and what is known now. A member that left and came
//! back between two looks, or was replaced by its own next session, is told as both; one that came and went unseen is not told at all.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use tokio::sync::watch;

use super::Member;
use crate::presence::view::Sight;

/// Something happened in a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupEvent {
    /// A member came.
    Joined(Arc<Member>),
    /// A member says something else of itself.
    Changed(Arc<Member>),
    /// A member went; this is how it was known last.
    Left(Arc<Member>),
}

/// The events of a group from a moment on. Made by [`Members::events`](super::Members::events).
#[derive(Debug)]
pub struct GroupEvents {
    told: watch::Receiver<Arc<Sight<Member>>>,
    known: BTreeMap<String, Arc<Member>>,
    // At most two for every member of two sets.
    queue: VecDeque<GroupEvent>,
}

impl GroupEvents {
    pub(super) fn new(mut told: watch::Receiver<Arc<Sight<Member>>>) -> Self {
        let known = told.borrow_and_update().items.clone();
        Self { told, known, queue: VecDeque::new() }
    }

    /// The next event.
    ///
    /// # Cancel safety
    /// Safe: an event is taken only when this returns it.
    pub async fn next(&mut self) -> GroupEvent {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return event;
            }
            if self.told.changed().await.is_err() {
                // The runtime was shut down: nothing more can come.
                std::future::pending::<()>().await;
            }
            let now = self.told.borrow_and_update().clone();
            self.queue.extend(differences(&self.known, &now.items));
            self.known.clone_from(&now.items);
        }
    }
}

/// First who went, then the rest, each in order of the ids.
fn differences(before: &BTreeMap<String, Arc<Member>>, now: &BTreeMap<String, Arc<Member>>) -> Vec<GroupEvent> {
    let is_same = |a: &Member, b: &Member| (a.joined, &a.session) == (b.joined, &b.session);
    let gone = before.iter().filter(|(id, old)| now.get(*id).is_none_or(|new| !is_same(old, new)));
    let mut events: Vec<_> = gone.map(|(_, old)| GroupEvent::Left(old.clone())).collect();
    for (id, new) in now {
        match before.get(id).filter(|old| is_same(old, new)) {
            None => events.push(GroupEvent::Joined(new.clone())),
            Some(old) if old.payload != new.payload => events.push(GroupEvent::Changed(new.clone())),
            Some(_) => {}
        }
    }
    events
}
