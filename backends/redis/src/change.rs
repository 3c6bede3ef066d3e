//! The message that tells watchers of a directory what a script changed.
//!
//! Form: `revision SP revision-before SP count LF`, then for each change `P namelen valuelen created left lease
//! LF name value` or `D namelen LF name`. A count of -1 says that the changes were too many to tell, a value
//! length of -1 that the value was too long; `left` is how long the lease has to go, in microseconds, or -1.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use quorate_core::{LeaseId, Revision};

/// Everything that one script changed in one directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    /// The revision of the change before this one: a gap in this chain is a lost message.
    pub(crate) before: u64,
    /// `None` if there were too many to tell.
    pub(crate) keys: Option<Vec<Changed>>,
}

/// What happened to one key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) name: Arc<str>,
    /// `None`: it was deleted.
    pub(crate) put: Option<Put>,
}

/// What a key now holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Put {
    /// `None` if the value was too long to tell.
    pub(crate) value: Option<Bytes>,
    pub(crate) created: Revision,
    pub(crate) lease: Option<LeaseId>,
    left: Option<Duration>,
}

impl Change {
    /// Reads a message; `None` if it is malformed.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let mut rest = payload;
        let head = line(&mut rest)?;
        let mut words = head.split(' ');
        let revision = words.next()?.parse().ok()?;
        let before = words.next()?.parse().ok()?;
        let count: i64 = words.next()?.parse().ok()?;
        let keys = (count >= 0).then(|| (0..count).map(|_| changed(&mut rest)).collect::<Option<Vec<_>>>());
        let keys = match keys {
            Some(None) => return None,
            other => other.flatten(),
        };
        Some(Self { revision, before, keys })
    }

    /// When the first of the leases that keys were put on ends, if it is not renewed.
    pub(crate) fn first_deadline(&self) -> Option<Duration> {
        self.keys.iter().flatten().filter_map(|key| key.put.as_ref()?.left).min()
    }
}

fn changed(rest: &mut &[u8]) -> Option<Changed> {
    let head = line(rest)?;
    let mut words = head.split(' ');
    let put = match words.next()? {
        "P" => true,
        "D" => false,
        _ => return None,
    };
    let name_len = words.next()?.parse().ok()?;
    if !put {
        return Some(Changed { name: name(rest, name_len)?, put: None });
    }
    let value_len: i64 = words.next()?.parse().ok()?;
    let created = Revision(words.next()?.parse().ok()?);
    let left: i64 = words.next()?.parse().ok()?;
    let lease = words.next().filter(|lease| !lease.is_empty()).map(LeaseId::new);
    let name = name(rest, name_len)?;
    let value = match usize::try_from(value_len) {
        Ok(len) => Some(Bytes::copy_from_slice(take(rest, len)?)),
        Err(_) => None,
    };
    let left = u64::try_from(left).ok().map(Duration::from_micros);
    Some(Changed { name, put: Some(Put { value, created, lease, left }) })
}

fn line<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let end = rest.iter().position(|b| *b == b'\n')?;
    let line = std::str::from_utf8(&rest[..end]).ok()?;
    *rest = &rest[end + 1..];
    Some(line)
}

fn name(rest: &mut &[u8], len: usize) -> Option<Arc<str>> {
    Some(std::str::from_utf8(take(rest, len)?).ok()?.into())
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_names_with_line_feeds_and_spaces_arrive_whole() {
        let change =
            Change::parse(b"12 11 3\nP 3 5 0000000000000009 1500 abc\na b\n\n x\nD 1\nzP 1 -1 0000000000000012 -1 \nq")
                .unwrap();
        assert_eq!((change.revision, change.before), (12, 11));
        assert_eq!(change.first_deadline(), Some(Duration::from_micros(1500)));
        let keys = change.keys.unwrap();
        let put = keys[0].put.as_ref().unwrap();
        assert_eq!((&*keys[0].name, &**put.value.as_ref().unwrap()), ("a b", &b"\n\n x\n"[..]));
        assert_eq!((put.created, put.lease.as_ref().unwrap().as_str()), (Revision(9), "abc"));
        assert_eq!((&*keys[1].name, &keys[1].put), ("z", &None));
        let last = keys[2].put.as_ref().unwrap();
        assert_eq!((&last.value, &last.lease), (&None, &None));
    }

    #[test]
    fn what_is_cut_or_foreign_is_no_change() {
        for payload in [&b""[..], b"hello", b"1 2", b"1 2 3\n", b"1 2 1\nP 5 1 1 -1 \nab", b"1 2 1\nX 1\na"] {
            assert_eq!(Change::parse(payload), None, "{payload:?}");
        }
    }

    #[test]
    fn too_many_changes_are_a_gap() {
        assert_eq!(Change::parse(b"9 8 -1\n"), Some(Change { revision: 9, before: 8, keys: None }));
    }
}
