//! The names of tickets, and why they have slots.
//!
//! Promise: taking tickets out of a line leaves at most one tombstone per slot, however many tickets come and go; a
//! ticket is never taken out by a request that was meant for another one.
//!
//! Consul remembers a deleted key for 15 to 30 minutes, and listing a prefix walks over all deleted keys below it, on
//! each server, within the Raft log's single thread for a transaction. A lock that is taken 50 times a second under
//! names that are never used twice would have 45,000 of them, which cost 7 ms per join when measured. A deletion of a
//! *prefix* leaves one tombstone with that prefix as its name, and the next one replaces it. So a ticket is named
//! `<session>-<client>.<slot>-<nonce>`, where no other ticket of this client has the same slot in the same line, and is
//! taken out by deleting everything that begins with `<session>-<client>.<slot>-`.
//!
//! That is only done together with a check that this very ticket stands: a late copy of an older request must not
//! delete the slot's next ticket.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use quorate_core::{Enqueue, LeaseId, Nonce, TicketKind};

use crate::lease::is_session_id;

/// Length of a session's id.
const SESSION: usize = 36;
/// Length of a client's tag, in hex digits.
const TAG: usize = 8;
/// Length of a nonce, in hex digits.
const NONCE: usize = 32;

/// The slots of attempts to join.
type Attempts = HashMap<(LeaseId, Nonce), u32>;

/// A name for an attempt to join.
pub(crate) struct Named {
    pub(crate) name: Arc<str>,
    /// Whether no request has carried it yet.
    pub(crate) fresh: bool,
}

/// The slots of one client.
#[derive(Debug)]
pub(crate) struct Slots {
    // Two clients may use one lease, and must not meet in a slot.
    tag: u32,
    /// By stored directory of the line: the attempts that stand or may stand.
    lines: Mutex<HashMap<String, Attempts>>,
}

impl Slots {
    pub(crate) fn new() -> Self {
        Self { tag: rand::random(), lines: Mutex::default() }
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<String, Attempts>> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The name for an attempt to join: the same one each time, until it is freed.
    pub(crate) fn name(&self, dir: &str, entry: &Enqueue) -> Named {
        let mut lines = self.lines();
        let taken = lines.entry(dir.to_owned()).or_default();
        let attempt = (entry.lease.clone(), entry.nonce);
        let known = taken.get(&attempt).copied();
        let slot = known.unwrap_or_else(|| {
            let mut used: Vec<u32> = taken.values().copied().collect();
            used.sort_unstable();
            let gap = (0..).zip(&used).find_map(|(slot, used)| (slot != *used).then_some(slot));
            let free = gap.unwrap_or_else(|| u32::try_from(used.len()).unwrap_or(u32::MAX));
            taken.insert(attempt, free);
            free
        });
        drop(lines);
        let suffix = match entry.kind {
            TicketKind::Lock => "",
            TicketKind::Read => "-r",
            TicketKind::Write => "-w",
        };
        let name = format!("{}-{:08x}.{slot:x}-{}{suffix}", entry.lease, self.tag, entry.nonce).into();
        Named { name, fresh: known.is_none() }
    }

    /// The ticket is gone, or was never made and never will be.
    pub(crate) fn free(&self, dir: &str, name: &str) {
        let Some(parts) = Parts::of(name) else { return };
        let Ok(nonce) = u128::from_str_radix(parts.nonce, 16) else { return };
        let mut lines = self.lines();
        if let Some(taken) = lines.get_mut(dir) {
            taken.remove(&(LeaseId::new(parts.session), Nonce(nonce)));
            if taken.is_empty() {
                lines.remove(dir);
            }
        }
    }

    /// The lease has ended: its slots are prefixed by a session that nothing can stand on any more.
    pub(crate) fn lease_ended(&self, lease: &LeaseId) {
        self.lines().retain(|_, taken| {
            taken.retain(|(of, _), _| of != lease);
            !taken.is_empty()
        });
    }
}

/// A ticket's name, taken apart.
pub(crate) struct Parts<'a> {
    session: &'a str,
    /// Everything up to the nonce: what is deleted to take the ticket out.
    pub(crate) slot: &'a str,
    nonce: &'a str,
}

impl<'a> Parts<'a> {
    /// `None` if it is not a name that [`Slots::name`] makes.
    pub(crate) fn of(name: &'a str) -> Option<Self> {
        let session = name.get(..SESSION).filter(|s| is_session_id(s))?;
        let (tag, rest) = name.get(SESSION..)?.strip_prefix('-')?.split_once('.')?;
        let (number, rest) = rest.split_once('-')?;
        let nonce = rest.get(..NONCE)?;
        let hex = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        let ours =
            tag.len() == TAG && hex(tag) && hex(number) && hex(nonce) && matches!(&rest[NONCE..], "" | "-r" | "-w");
        ours.then(|| Self { session, slot: &name[..name.len() - rest.len()], nonce })
    }

    /// Whether this is a ticket of the same attempt to join.
    pub(crate) fn is_of(&self, entry: &Enqueue) -> bool {
        self.session == entry.lease.as_str() && self.nonce == entry.nonce.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use quorate_core::Dir;

    fn attempt(nonce: u128) -> Enqueue {
        Enqueue {
            line: Dir::new(["l"]).unwrap(),
            kind: TicketKind::Write,
            lease: LeaseId::new("3764062a-9882-1bfd-aa62-187177c18cb0"),
            nonce: Nonce(nonce),
            value: Bytes::new(),
            depth: 1,
            when_free: false,
        }
    }

    fn slot(name: &str) -> &str {
        Parts::of(name).unwrap().slot
    }

    fn name(slots: &Slots, dir: &str, nonce: u128) -> Arc<str> {
        let named = slots.name(dir, &attempt(nonce));
        assert!(named.fresh);
        named.name
    }

    #[test]
    fn an_attempt_keeps_its_name_and_a_slot_is_used_again_only_when_freed() {
        let slots = Slots::new();
        let (a, b) = (name(&slots, "l/", 1), name(&slots, "l/", 2));
        let again = slots.name("l/", &attempt(1));
        assert!(a == again.name && !again.fresh);
        assert_ne!(slot(&a), slot(&b));
        assert_eq!(slot(&a), slot(&name(&slots, "other/", 3)), "lines do not share slots");
        slots.free("l/", &a);
        let c = name(&slots, "l/", 4);
        assert_eq!(slot(&a), slot(&c));
        assert_ne!(a, c);
        slots.lease_ended(&attempt(1).lease);
        assert!(slots.lines().is_empty());
    }

    #[test]
    fn no_slot_is_a_prefix_of_another() {
        let slots = Slots::new();
        let names: Vec<_> = (0..300).map(|n| name(&slots, "l/", n)).collect();
        for (i, a) in names.iter().enumerate() {
            assert!(Parts::of(a).unwrap().is_of(&attempt(i.try_into().unwrap())));
            assert_eq!(names.iter().filter(|b| b.starts_with(slot(a))).count(), 1);
        }
    }

    #[test]
    fn only_our_own_names_have_a_slot() {
        let ours = name(&Slots::new(), "l/", 1);
        for foreign in
            ["", ".lock", "3764062a-9882-1bfd-aa62-187177c18cb0", &ours[..ours.len() - 1], &format!("{ours}x")]
        {
            assert!(Parts::of(foreign).is_none(), "{foreign}");
        }
    }
}
