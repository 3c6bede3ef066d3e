//! Which key a ticket is stored under, so that a busy line stays quick.
//!
//! etcd keeps a deleted key in its index until the next compaction, and whoever reads a line passes over all of them:
//! with a new key for each ticket a pair of acquire and release took 1.1 ms in a new line and 4 ms after 20,000 pairs.
//! So a client uses the key of a ticket that has left for its next ticket of the same lease in the same line; then a line
//! holds as many keys as tickets of one lease ever stood in it at once.
//!
//! Promise: a key is used again only if the removal of its ticket was confirmed and no request that could still write
//! it is under way. So a key that exists when its attempt is repeated was written by that attempt. Where an answer was
//! lost or not waited for, the key is never used again, and leaving deletes whatever stands under it, however late it came.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quorate_core::{Dir, Enqueue, TicketKind};
use tokio::time::Instant;

/// How many lines with unused keys are remembered in each of two generations; forgotten keys cost etcd a new one.
const GENERATION: usize = 2048;
/// How long after its ticket has left a key in doubt is remembered: longer than a request may be on its way.
const REMEMBERED: Duration = Duration::from_secs(60);

/// One attempt to join a line, as its repetitions name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Attempt {
    family: Family,
    nonce: u128,
}

/// The tickets among which keys are exchanged.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Family {
    pub(crate) line: Dir,
    pub(crate) lease: i64,
    pub(crate) kind: TicketKind,
}

/// A key: the attempt for which it was made names it within the family.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct StoredKey {
    pub(crate) family: Family,
    pub(crate) tag: u128,
}

/// The keys of this client's tickets.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Who uses a key. Bounded by the tickets that stand, the attempts that nobody has settled yet, and the doubts of
    /// the last minute.
    users: HashMap<StoredKey, User>,
    /// The keys of attempts that use one made for another attempt.
    borrowed: HashMap<Attempt, u128>,
    /// Keys that no ticket stands under, in two generations: when the young one is full the old one is forgotten.
    young: HashMap<Family, Vec<u128>>,
    old: HashMap<Family, Vec<u128>>,
    /// Keys in doubt whose tickets have left, in that order.
    retired: VecDeque<(Instant, StoredKey)>,
}

#[derive(Debug)]
struct User {
    nonce: u128,
    /// The revision that created its ticket, once it is known.
    token: Option<i64>,
    /// Requests under way that may write the key.
    requests: u32,
    /// A request may have been carried out, or still be, without our knowing.
    doubtful: bool,
    /// The ticket has left; the user is kept for the doubt alone.
    left: bool,
}

impl Keys {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key for an attempt: the same as before if it is repeated.
    pub(crate) fn claim(&self, entry: &Enqueue, lease: i64) -> Claim<'_> {
        let family = Family { line: entry.line.clone(), lease, kind: entry.kind };
        let attempt = Attempt { family, nonce: entry.nonce.0 };
        let mut state = self.state();
        let tag = match state.borrowed.get(&attempt) {
            Some(tag) => *tag,
            None => state.choose(&attempt),
        };
        let key = StoredKey { family: attempt.family.clone(), tag };
        let user = state.users.entry(key.clone());
        let first = matches!(user, Entry::Vacant(_));
        let user =
            user.or_insert(User { nonce: attempt.nonce, token: None, requests: 0, doubtful: false, left: false });
        user.requests += 1;
        user.left = false;
        Claim { keys: self, key, attempt, first, end: End::Unknown }
    }

    /// Whether leaving must delete whatever is stored under the key, and not only the ticket that is known.
    pub(crate) fn in_doubt(&self, key: &StoredKey, token: i64) -> bool {
        // Asked for a ticket that had the key before, the answer is no: its new user must not be harmed.
        self.state().users.get(key).is_some_and(|user| user.doubtful && user.token == Some(token))
    }

    /// Notes that a ticket has left: the server has confirmed that it deleted it.
    pub(crate) fn left(&self, key: &StoredKey, token: i64) {
        let mut state = self.state();
        if let Some(user) = state.users.get(key).filter(|user| user.token == Some(token)) {
            if user.doubtful || user.requests > 0 {
                state.retire(key);
            } else {
                state.remove(key);
                state.free(key);
            }
        }
    }

    /// Notes that a ticket is not there any more, whoever has removed it.
    pub(crate) fn lost(&self, key: &StoredKey, token: i64) {
        let mut state = self.state();
        if let Some(user) = state.users.get(key).filter(|user| user.token == Some(token)) {
            if user.doubtful || user.requests > 0 {
                state.retire(key);
            } else {
                state.remove(key);
            }
        }
    }

    /// Forgets the keys of a lease that has ended.
    pub(crate) fn forget(&self, lease: i64) {
        let mut state = self.state();
        state.users.retain(|key, _| key.family.lease != lease);
        state.borrowed.retain(|attempt, _| attempt.family.lease != lease);
        state.young.retain(|family, _| family.lease != lease);
        state.old.retain(|family, _| family.lease != lease);
        state.retired.retain(|(_, key)| key.family.lease != lease);
    }
}

impl State {
    /// The key of an attempt that has borrowed none yet: its own if that is in use by it, or else one that no ticket
    /// stands under, or else a new one.
    fn choose(&mut self, attempt: &Attempt) -> u128 {
        let own = StoredKey { family: attempt.family.clone(), tag: attempt.nonce };
        let user = self.users.get(&own).map(|user| user.nonce);
        if user == Some(attempt.nonce) {
            return attempt.nonce;
        }
        let tag = match self.unused(&attempt.family) {
            Some(tag) => tag,
            None if user.is_none() => attempt.nonce,
            // An attempt that is over has left its key to another one, and now it is made again.
            None => rand::random(),
        };
        if tag != attempt.nonce {
            self.borrowed.insert(attempt.clone(), tag);
        }
        tag
    }

    fn unused(&mut self, family: &Family) -> Option<u128> {
        for generation in [&mut self.young, &mut self.old] {
            if let Entry::Occupied(mut tags) = generation.entry(family.clone()) {
                let tag = tags.get_mut().pop();
                if tags.get().is_empty() {
                    tags.remove();
                }
                if tag.is_some() {
                    return tag;
                }
            }
        }
        None
    }

    fn remove(&mut self, key: &StoredKey) -> Option<User> {
        let user = self.users.remove(key)?;
        if user.nonce != key.tag {
            self.borrowed.remove(&Attempt { family: key.family.clone(), nonce: user.nonce });
        }
        Some(user)
    }

    fn free(&mut self, key: &StoredKey) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.entry(key.family.clone()).or_default().push(key.tag);
    }

    fn retire(&mut self, key: &StoredKey) {
        let now = Instant::now();
        while let Some((since, _)) = self.retired.front()
            && now.duration_since(*since) > REMEMBERED
            && let Some((_, old)) = self.retired.pop_front()
        {
            if self.users.get(&old).is_some_and(|user| user.left && user.requests == 0) {
                self.remove(&old);
            }
        }
        if let Some(user) = self.users.get_mut(key) {
            user.left = true;
            user.doubtful = true;
            self.retired.push_back((now, key.clone()));
        }
    }
}

/// A key for a request to join. Dropped without an outcome, it leaves the key in doubt.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    keys: &'a Keys,
    pub(crate) key: StoredKey,
    attempt: Attempt,
    /// Whether no earlier request of this attempt is known.
    first: bool,
    end: End,
}

/// How a request to join has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Unknown,
    Known,
    /// Known, and the claim has struck its user off: the key may have another one by now.
    StruckOff,
}

impl Claim<'_> {
    /// Whether a key that exists must be somebody else's: one that was thought to be unused.
    pub(crate) fn must_be_free(&self) -> bool {
        self.first && self.key.tag != self.attempt.nonce
    }

    /// The request was answered: the ticket stands, created at that revision.
    pub(crate) fn stands(mut self, token: i64) {
        self.end = End::Known;
        if let Some(user) = self.keys.state().users.get_mut(&self.key) {
            user.token = Some(token);
        }
    }

    /// The request was answered or surely not carried out: it has written nothing.
    pub(crate) fn wrote_nothing(mut self) {
        self.end = End::Known;
        // An earlier request of this attempt may have written all the same.
        if self.first && self.strike_off(|user| !user.doubtful) && self.key.tag != self.attempt.nonce {
            // The key is as unused as it was before. One that was never made costs nothing to forget.
            self.keys.state().free(&self.key);
        }
    }

    /// Somebody else's ticket stands under the key: never use it again.
    pub(crate) fn taken(mut self) {
        self.end = End::Known;
        self.strike_off(|_| true);
    }

    /// Takes the user off the key, if no other request is under way and it fits.
    fn strike_off(&mut self, fits: impl FnOnce(&User) -> bool) -> bool {
        let mut state = self.keys.state();
        let fits = state.users.get(&self.key).is_some_and(|user| user.requests == 1 && fits(user));
        if fits {
            state.remove(&self.key);
            self.end = End::StruckOff;
        }
        fits
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.end == End::StruckOff {
            return;
        }
        let mut state = self.keys.state();
        if let Some(user) = state.users.get_mut(&self.key) {
            user.requests = user.requests.saturating_sub(1);
            user.doubtful |= self.end == End::Unknown;
        }
    }
}

#[cfg(test)]
mod tests {
    use quorate_core::Nonce;

    use super::*;
    use crate::path::lease_id;

    fn entry(line: &str, nonce: u128) -> Enqueue {
        Enqueue {
            line: Dir::new(["lock", line]).unwrap(),
            kind: TicketKind::Lock,
            lease: lease_id(7),
            nonce: Nonce(nonce),
            value: bytes::Bytes::new(),
            depth: 1,
            when_free: false,
        }
    }

    /// Joins and is answered; the nonce serves as the token, too.
    fn join(keys: &Keys, nonce: u128) -> StoredKey {
        let claim = keys.claim(&entry("a", nonce), 7);
        let key = claim.key.clone();
        claim.stands(nonce as i64);
        key
    }

    #[test]
    fn one_after_another_use_one_key_and_together_they_use_several() {
        let keys = Keys::default();
        for nonce in 1..100 {
            let key = join(&keys, nonce);
            assert_eq!(key.tag, 1);
            keys.left(&key, nonce as i64);
        }
        let (a, b) = (join(&keys, 200), join(&keys, 201));
        assert_eq!((a.tag, b.tag), (1, 201));
        keys.left(&b, 201);
        assert_eq!(join(&keys, 202).tag, 201);
        let elsewhere = keys.claim(&entry("b", 300), 7);
        assert_eq!(elsewhere.key.tag, 300, "another line has keys of its own");
        assert_eq!(keys.claim(&entry("a", 301), 8).key.tag, 301, "and so has another lease");
    }

    #[test]
    fn a_repeated_attempt_keeps_its_key() {
        let keys = Keys::default();
        keys.left(&join(&keys, 1), 1);
        let first = join(&keys, 2);
        assert_eq!(first.tag, 1);
        let again = keys.claim(&entry("a", 2), 7);
        assert_eq!(again.key, first);
        assert!(!again.must_be_free());
        again.stands(2);
        // The attempt whose key it was is made again: it must not take the other's ticket for its own.
        let claim = keys.claim(&entry("a", 1), 7);
        assert_ne!(claim.key, first);
        assert!(claim.must_be_free());
    }

    #[test]
    fn a_key_in_doubt_is_not_used_again_and_leaving_it_deletes_whatever_stands_there() {
        let keys = Keys::default();
        let dropped = keys.claim(&entry("a", 1), 7);
        let key = dropped.key.clone();
        drop(dropped);
        assert_eq!(join(&keys, 1), key, "its repetition finds it");
        assert!(keys.in_doubt(&key, 1));
        keys.left(&key, 1);
        assert_eq!(join(&keys, 2).tag, 2);
        assert!(keys.in_doubt(&key, 1), "a late create must be deleted by a late removal");
        keys.forget(7);
        assert!(!keys.in_doubt(&key, 1));
    }

    #[test]
    fn what_is_said_late_about_an_old_ticket_does_not_touch_the_new_user_of_its_key() {
        let keys = Keys::default();
        let key = join(&keys, 1);
        keys.left(&key, 1);
        drop(keys.claim(&entry("a", 2), 7));
        assert_eq!(join(&keys, 2), key);
        assert!(!keys.in_doubt(&key, 1), "the old one may not delete the new one");
        assert!(keys.in_doubt(&key, 2));
        keys.lost(&key, 1);
        keys.left(&key, 1);
        assert!(keys.in_doubt(&key, 2));
        assert_eq!(keys.claim(&entry("a", 2), 7).key, key, "and a repetition still finds it");
        assert_ne!(join(&keys, 3), key);
    }

    #[test]
    fn a_ticket_that_leaves_while_it_is_asked_for_again_keeps_its_key_from_others() {
        let keys = Keys::default();
        let key = join(&keys, 1);
        let under_way = keys.claim(&entry("a", 1), 7);
        keys.left(&key, 1);
        assert_ne!(join(&keys, 2), key);
        under_way.stands(1);
        assert_ne!(join(&keys, 3), key);
    }

    #[test]
    fn what_was_never_written_can_be_used_at_once_and_what_others_took_never() {
        let keys = Keys::default();
        keys.left(&join(&keys, 1), 1);
        let refused = keys.claim(&entry("a", 2), 7);
        assert_eq!(refused.key.tag, 1);
        refused.wrote_nothing();
        let taken = keys.claim(&entry("a", 3), 7);
        assert_eq!(taken.key.tag, 1);
        assert!(taken.must_be_free());
        taken.taken();
        assert_eq!(keys.claim(&entry("a", 3), 7).key.tag, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_is_bounded() {
        let keys = Keys::default();
        for nonce in 0..1000 {
            drop(keys.claim(&entry("a", nonce), 7));
            let key = join(&keys, nonce);
            keys.left(&key, nonce as i64);
            tokio::time::advance(REMEMBERED / 10).await;
        }
        let state = keys.state();
        assert!(state.users.len() <= 12 && state.retired.len() <= 12, "{} users", state.users.len());
        assert!(state.borrowed.is_empty());
        drop(state);
        for line in 0..10 * GENERATION {
            let claim = keys.claim(&entry(&line.to_string(), 1), 7);
            let key = claim.key.clone();
            claim.stands(1);
            keys.left(&key, 1);
        }
        let state = keys.state();
        assert!(state.young.len() + state.old.len() <= 2 * GENERATION);
    }
}
