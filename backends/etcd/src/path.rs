//! Where keys and tickets are stored, and how tickets are named.
//!
//! Promise: a key is stored as `<namespace>/<dir>/<encoded name>`; a ticket as `<namespace>/<line>/<key>`, where the keys of
//! quorate's tickets are `<lease in lower-case hex>-<32 hex digits>`, followed by `-r` or `-w` in a read–write line. That
//! is the layout of Go's `concurrency` package and `etcdctl lock` with something behind the lease, so those count our
//! tickets as contenders and we count theirs. Keys may be used again, here and there; a ticket's name is
//! therefore `<key>@<create revision>`, which is unique for ever.

use quorate_core::{Dir, Error, ErrorKind, Key, KeyRange, LeaseId, Result, Revision, Ticket, TicketKind};

use crate::{
    BACKEND,
    reuse::{Family, StoredKey},
};

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

    pub(crate) fn ticket(&self, ticket: &Named<'_>) -> Vec<u8> {
        self.join(ticket.line, ticket.stored)
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

/// A ticket's name, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named<'a> {
    pub(crate) line: &'a Dir,
    /// The stored key, within the line.
    pub(crate) stored: &'a str,
    /// The revision that created it.
    pub(crate) token: i64,
}

/// Takes a ticket's name apart.
///
/// # Errors
/// `InvalidInput` if the name is not one of this backend's.
pub(crate) fn named<'a>(operation: &'static str, ticket: &'a Ticket) -> Result<Named<'a>> {
    let parts = ticket.name.rsplit_once('@');
    let parts = parts.and_then(|(stored, token)| Some((stored, token.parse::<i64>().ok().filter(|t| *t > 0)?)));
    let Some((stored, token)) = parts else {
        let message = "not a ticket of this backend: its name does not end in the revision of its creation";
        return Err(Error::invalid(operation, message).key(ticket).on(BACKEND));
    };
    Ok(Named { line: &ticket.line, stored, token })
}

/// The ticket under a stored key.
pub(crate) fn ticket(line: &Dir, stored: &str, token: i64) -> Ticket {
    let kind = own(stored).map_or(TicketKind::Lock, |(_, _, kind)| kind);
    Ticket { line: line.clone(), name: format!("{stored}@{token}").into(), kind }
}

fn suffix(kind: TicketKind) -> &'static str {
    match kind {
        TicketKind::Lock => "",
        TicketKind::Read => "-r",
        TicketKind::Write => "-w",
    }
}

/// What quorate's tickets are stored as.
pub(crate) fn stored(key: &StoredKey) -> String {
    format!("{:x}-{:032x}{}", key.family.lease.cast_unsigned(), key.tag, suffix(key.family.kind))
}

/// The stored key of a ticket that is in quorate's layout.
pub(crate) fn stored_key(named: &Named<'_>) -> Option<StoredKey> {
    let (lease, tag, kind) = own(named.stored)?;
    Some(StoredKey { family: Family { line: named.line.clone(), lease, kind }, tag })
}

/// Lease, tag and kind, if the key is in quorate's layout; otherwise it belongs to another client's lock.
fn own(stored: &str) -> Option<(i64, u128, TicketKind)> {
    let kinds = [TicketKind::Read, TicketKind::Write];
    let kind = kinds.into_iter().find(|kind| stored.ends_with(suffix(*kind))).unwrap_or(TicketKind::Lock);
    let (lease, tag) = stored.strip_suffix(suffix(kind))?.split_once('-')?;
    let hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if tag.len() != 32 || !hex(tag) || !hex(lease) {
        return None;
    }
    let lease = u64::from_str_radix(lease, 16).ok()?.cast_signed();
    Some((lease, u128::from_str_radix(tag, 16).ok()?, kind))
}

/// A lease by etcd's number, in the form that Go's clients use in keys.
pub(crate) fn lease_id(id: i64) -> LeaseId {
    LeaseId::new(format!("{:x}", id.cast_unsigned()))
}

/// etcd's revisions are positive.
pub(crate) fn revision(number: i64) -> Revision {
    Revision(number.max(0).cast_unsigned())
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
            let key = StoredKey { family: Family { line: line(), lease: 0x694d_7d9f_51a2, kind }, tag: 7 };
            assert!(stored(&key).starts_with("694d7d9f51a2-00000000000000000000000000000007"));
            let ours = ticket(&line(), &stored(&key), 12);
            assert_eq!(ours.kind, kind);
            let named = named("look", &ours).unwrap();
            assert_eq!(named.token, 12);
            assert_eq!(stored_key(&named), Some(key));
        }
        for foreign in ["694d7d9f51a2", "694d7d9f51a2-r", "host-w", "x-0123456789abcdef0123456789abcdef-r", "", "a@b"] {
            let theirs = ticket(&line(), foreign, 5);
            assert_eq!(theirs.kind, TicketKind::Lock, "{foreign}");
            let named = named("look", &theirs).unwrap();
            assert_eq!((named.stored, named.token, stored_key(&named)), (foreign, 5, None));
        }
    }

    #[test]
    fn a_name_from_elsewhere_is_refused() {
        for name in ["", "x", "@", "x@", "x@0", "x@-1", "x@y", "x@99999999999999999999"] {
            let ticket = Ticket { line: line(), name: name.into(), kind: TicketKind::Lock };
            assert_eq!(named("look", &ticket).unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
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
