//! Where keys and tickets are stored, and how tickets are named.
//!
//! Promise: a key is `<namespace>/<dir>/<encoded name>`; a ticket is `<namespace>/<line>/<name>`, where quorate's own
//! names are `<lease in lower-case hex>-<nonce in 32 hex digits>`, followed by `-r` or `-w` in a read–write line. That
//! is the layout of Go's `concurrency` package and `etcdctl lock` with something behind the lease, so those count our
//! tickets as contenders and we count theirs.

use std::sync::Arc;

use quorate_core::{Dir, Enqueue, Error, ErrorKind, Key, KeyRange, LeaseId, Result, Ticket, TicketKind};

use crate::BACKEND;

/// The place of the namespace in etcd's flat key space.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Empty, or the namespace with a `/` behind it.
    root: String,
}

/// A range of stored keys.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) start: Vec<u8>,
    /// Whether `start` is a prefix, or one key.
    pub(crate) prefix: bool,
}

impl Layout {
    pub(crate) fn new(namespace: &str) -> Self {
        let root = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        Self { root }
    }

    fn join(&self, dir: &Dir, name: &str) -> Vec<u8> {
        let dir = dir.as_str();
        let mut path = String::with_capacity(self.root.len() + dir.len() + 1 + name.len());
        path.push_str(&self.root);
        path.push_str(dir);
        path.push('/');
        path.push_str(name);
        path.into_bytes()
    }

    pub(crate) fn key(&self, key: &Key) -> Vec<u8> {
        self.join(key.dir(), key.encoded())
    }

    pub(crate) fn ticket(&self, ticket: &Ticket) -> Vec<u8> {
        self.join(&ticket.line, &ticket.name)
    }

    /// The prefix that all keys or tickets of a directory share.
    pub(crate) fn dir(&self, dir: &Dir) -> Vec<u8> {
        self.join(dir, "")
    }

    pub(crate) fn range(&self, range: &KeyRange) -> Stored {
        match range {
            KeyRange::One(key) => Stored { start: self.key(key), prefix: false },
            KeyRange::Prefix { dir, prefix } => Stored { start: self.join(dir, prefix), prefix: true },
        }
    }

    /// The name of a stored key within its directory.
    ///
    /// # Errors
    /// `Corrupt` if another client stored a name that is not UTF-8.
    pub(crate) fn name<'a>(&self, operation: &'static str, dir: &Dir, stored: &'a [u8]) -> Result<&'a str> {
        let start = self.root.len() + dir.as_str().len() + 1;
        stored.get(start..).and_then(|name| std::str::from_utf8(name).ok()).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, operation, "another client stored a name that is not UTF-8")
                .key(format!("{dir}/{}", String::from_utf8_lossy(stored.get(start..).unwrap_or_default())))
                .on(BACKEND)
        })
    }

    /// The probe that `connect` reads: inside the namespace, so that a role for the namespace covers it.
    pub(crate) fn probe(&self) -> Vec<u8> {
        format!("{}kv/", self.root).into_bytes()
    }
}

/// The name of the ticket that this entry asks for. The same entry has the same name.
pub(crate) fn ticket_of(entry: &Enqueue) -> Ticket {
    let suffix = match entry.kind {
        TicketKind::Lock => "",
        TicketKind::Read => "-r",
        TicketKind::Write => "-w",
    };
    let name = format!("{}-{}{suffix}", entry.lease, entry.nonce);
    Ticket { line: entry.line.clone(), name: name.into(), kind: entry.kind }
}

/// A ticket by its stored name. A name that is not in quorate's layout belongs to another client's lock.
pub(crate) fn ticket(line: &Dir, name: &str) -> Ticket {
    Ticket { line: line.clone(), name: Arc::from(name), kind: kind_of(name) }
}

fn kind_of(name: &str) -> TicketKind {
    let (base, kind) = match name.rsplit_once('-') {
        Some((base, "r")) => (base, TicketKind::Read),
        Some((base, "w")) => (base, TicketKind::Write),
        _ => return TicketKind::Lock,
    };
    let hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match base.split_once('-') {
        Some((lease, nonce)) if !lease.is_empty() && nonce.len() == 32 && hex(lease) && hex(nonce) => kind,
        _ => TicketKind::Lock,
    }
}

/// A lease by etcd's number, in the form that Go's clients use in keys.
pub(crate) fn lease_id(id: i64) -> LeaseId {
    LeaseId::new(format!("{:x}", id.cast_unsigned()))
}

/// etcd's number for a lease.
///
/// # Errors
/// `InvalidInput` if the name is not one of this backend's.
pub(crate) fn lease_number(operation: &'static str, lease: &LeaseId) -> Result<i64> {
    let text = lease.as_str();
    let number = u64::from_str_radix(text, 16).ok().filter(|n| *n != 0 && format!("{n:x}") == text);
    number.map(u64::cast_signed).ok_or_else(|| {
        Error::invalid(operation, "not a lease of this backend: etcd's are hexadecimal numbers").key(lease).on(BACKEND)
    })
}

#[cfg(test)]
mod tests {
    use quorate_core::Nonce;

    use super::*;

    fn line() -> Dir {
        Dir::new(["lock", "jobs/nightly"]).unwrap()
    }

    #[test]
    fn keys_begin_with_the_namespace_or_with_nothing() {
        let key = Key::new(&Dir::new(["kv"]).unwrap(), "a/b").unwrap();
        assert_eq!(Layout::new("").key(&key), b"kv/a/b");
        let layout = Layout::new("team/app");
        let stored = layout.key(&key);
        assert_eq!(stored, b"team/app/kv/a/b");
        assert_eq!(layout.name("read", key.dir(), &stored).unwrap(), "a/b");
        assert_eq!(layout.dir(&line()), b"team/app/lock/jobs%2Fnightly/");
    }

    #[test]
    fn a_ticket_of_ours_tells_its_kind_and_a_foreign_one_is_a_lock() {
        for kind in [TicketKind::Lock, TicketKind::Read, TicketKind::Write] {
            let entry = Enqueue {
                line: line(),
                kind,
                lease: lease_id(0x694d_7d9f_51a2),
                nonce: Nonce(7),
                value: bytes::Bytes::new(),
                depth: 1,
                when_free: false,
            };
            let ours = ticket_of(&entry);
            assert!(ours.name.starts_with("694d7d9f51a2-00000000000000000000000000000007"));
            assert_eq!(ticket(&line(), &ours.name), ours);
        }
        for foreign in ["694d7d9f51a2", "694d7d9f51a2-r", "host-w", "x-0123456789abcdef0123456789abcdef-r", ""] {
            assert_eq!(ticket(&line(), foreign).kind, TicketKind::Lock, "{foreign}");
        }
    }

    #[test]
    fn leases_survive_the_way_to_text_and_back() {
        for id in [1, 0x694d_7d9f_51a2, i64::MAX, -1] {
            assert_eq!(lease_number("renew", &lease_id(id)).unwrap(), id);
        }
        for bad in ["", "0", "xyz", "+5", "0A", "00ff", "12345678901234567"] {
            assert!(lease_number("renew", &LeaseId::new(bad)).is_err(), "{bad}");
        }
    }
}
