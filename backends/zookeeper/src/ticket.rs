//! Ticket names: Curator's, which are ours, and kazoo's.
//!
//! Promise: whatever a name says about order and kind is read from it the same way by every client that knows these
//! layouts; a name in none of them is no ticket.
//!
//! | written by | name |
//! |---|---|
//! | quorate, Curator `InterProcessMutex` | `_c_<uuid>-lock-<sequence>` |
//! | quorate, Curator `InterProcessReadWriteLock` | `_c_<uuid>-__READ__<sequence>`, `_c_<uuid>-__WRIT__<sequence>` |
//! | kazoo `Lock`, `WriteLock` | `<32 hex>__lock__<sequence>` |
//! | kazoo `ReadLock` | `<32 hex>__rlock__<sequence>` |
//!
//! The server appends the sequence: ten digits of a signed 32-bit counter per line, which wraps into negative numbers
//! after 2³¹ tickets. A line that is empty for a minute is removed and begins at zero again.

use quorate_core::{Nonce, TicketKind};

const LAYOUTS: [(&str, TicketKind); 5] = [
    ("-lock-", TicketKind::Lock),
    ("-__READ__", TicketKind::Read),
    ("-__WRIT__", TicketKind::Write),
    ("__lock__", TicketKind::Lock),
    ("__rlock__", TicketKind::Read),
];

/// What the name of a ticket says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) sequence: i64,
    pub(crate) kind: TicketKind,
}

/// Reads a node's name; `None` if it is not a ticket.
pub(crate) fn read(name: &str) -> Option<Mark> {
    let head = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let digits = &name[head.len()..];
    let kind_of = |head: &str| LAYOUTS.iter().find(|(layout, _)| head.ends_with(layout)).map(|(_, kind)| *kind);
    // Java's `%010d` counts the sign among the ten places.
    let (kind, sign) = match (kind_of(head), digits.len()) {
        (Some(kind), 10..=19) => (kind, 1),
        _ if (9..=18).contains(&digits.len()) => (kind_of(head.strip_suffix('-')?)?, -1),
        _ => return None,
    };
    Some(Mark { sequence: sign * digits.parse::<i64>().ok()?, kind })
}

/// The name of a new ticket, up to the sequence that the server appends.
pub(crate) fn stem(nonce: Nonce, kind: TicketKind) -> String {
    let mut stem = uuid_part(nonce);
    stem.push_str(match kind {
        TicketKind::Lock => "-lock-",
        TicketKind::Read => "-__READ__",
        TicketKind::Write => "-__WRIT__",
    });
    stem
}

/// How every name of this attempt begins.
pub(crate) fn uuid_part(nonce: Nonce) -> String {
    let hex = nonce.to_string();
    format!("_c_{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The tickets among the children of a line, as they stand in it.
///
/// Live tickets lie less than 2³¹ apart, so if two numbers are further apart the counter has wrapped between them.
pub(crate) fn in_order(children: &[String]) -> Vec<(i64, TicketKind, &str)> {
    let mut tickets: Vec<_> =
        children.iter().filter_map(|name| read(name).map(|mark| (mark.sequence, mark.kind, name.as_str()))).collect();
    let highest = tickets.iter().map(|t| t.0).max().unwrap_or(0);
    let lowest = tickets.iter().map(|t| t.0).min().unwrap_or(0);
    let narrow = i32::try_from(highest).is_ok() && i32::try_from(lowest).is_ok();
    if narrow && highest - lowest > i64::from(i32::MAX) {
        for ticket in tickets.iter_mut().filter(|t| t.0 < 0) {
            ticket.0 += 1 << 32;
        }
    }
    tickets.sort_unstable_by(|a, b| (a.0, a.2).cmp(&(b.0, b.2)));
    tickets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_of_curator_and_kazoo_are_read_and_others_ignored() {
        let mark = |name| read(name).map(|m| (m.sequence, m.kind));
        assert_eq!(mark("_c_0c0e8a1e-6a5c-4f6e-8d5f-0123456789ab-lock-0000000007"), Some((7, TicketKind::Lock)));
        assert_eq!(mark("_c_x-__READ__0000000012"), Some((12, TicketKind::Read)));
        assert_eq!(mark("_c_x-__WRIT__0000000012"), Some((12, TicketKind::Write)));
        assert_eq!(mark("0123456789abcdef0123456789abcdef__lock__0000000003"), Some((3, TicketKind::Lock)));
        assert_eq!(mark("0123456789abcdef0123456789abcdef__rlock__0000000003"), Some((3, TicketKind::Read)));
        for other in ["", "lock", "leases", "x-0000000001", "_c_x-lock-", "_c_x-lock-17", "-lock-00000000010000000000"]
        {
            assert_eq!(mark(other), None, "{other}");
        }
    }

    #[test]
    fn a_wrapped_sequence_is_read_with_its_sign() {
        assert_eq!(read("_c_x-lock--2147483648").unwrap().sequence, -2_147_483_648);
        assert_eq!(read("_c_x-lock--000000005").unwrap().sequence, -5);
        assert_eq!(read("_c_x-__READ__-000000005").unwrap().sequence, -5);
        assert_eq!(read("x__lock__-000000005").unwrap().sequence, -5);
    }

    #[test]
    fn order_survives_the_wrap_of_the_counter() {
        let names: Vec<String> = ["a-lock--2147483648", "b-lock-2147483647", "c-lock--2147483647", "d-lock-2147483646"]
            .map(String::from)
            .to_vec();
        let order: Vec<_> = in_order(&names).into_iter().map(|(_, _, name)| &name[..1]).collect();
        assert_eq!(order, ["d", "b", "a", "c"]);
        let names: Vec<String> = ["a-lock-0000000010", "b-lock--000000003"].map(String::from).to_vec();
        let order: Vec<_> = in_order(&names).into_iter().map(|(_, _, name)| &name[..1]).collect();
        assert_eq!(order, ["b", "a"], "numbers that lie close together are compared as they are");
    }

    #[test]
    fn a_new_name_carries_the_nonce_as_a_uuid() {
        let nonce = Nonce(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        assert_eq!(stem(nonce, TicketKind::Lock), "_c_01234567-89ab-cdef-0123-456789abcdef-lock-");
        assert_eq!(read(&format!("{}0000000000", stem(nonce, TicketKind::Read))).unwrap().kind, TicketKind::Read);
    }
}
