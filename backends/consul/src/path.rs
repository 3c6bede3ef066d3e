//! Where keys are stored: from the waist's encoded names to Consul's keys, and to URLs.
//!
//! Promise: the stored key is `<namespace>/<dir>/<encoded name>` exactly, except for characters that Consul
//! refuses in a URL.
//!
//! Consul answers 400 to a URL whose decoded path has a character that Go's `unicode.IsPrint` does not count as
//! printable: a no-break space, a zero-width joiner, whatever the agent's Unicode tables do not know yet. Which
//! ones depends on the agent's version, so every character outside ASCII and a few blocks of letters that have
//! been complete for decades is stored as `%u` and four hex digits. The waist's own encoding never has a `%u`, so
//! this is injective; it goes character by character, so it keeps prefixes.

use std::{borrow::Cow, fmt::Write as _};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use quorate_core::{Dir, Key, KeyRange};

/// What stays as it is in the path of a URL. `%` does not: the stored key has to arrive with its own escapes.
const URL: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The part of Consul's key space that is ours.
#[derive(Debug)]
pub(crate) struct Space {
    // Empty, or ends with a slash.
    root: String,
}

impl Space {
    pub(crate) fn new(namespace: &str) -> Self {
        let mut root = store(namespace).into_owned();
        if !root.is_empty() {
            root.push('/');
        }
        Self { root }
    }

    /// The stored directory, with its closing slash.
    pub(crate) fn dir(&self, dir: &Dir) -> String {
        format!("{}{}/", self.root, store(dir.as_str()))
    }

    /// The stored key.
    pub(crate) fn key(&self, key: &Key) -> String {
        let mut path = self.dir(key.dir());
        path.push_str(&store(key.encoded()));
        path
    }

    /// The stored key, or the stored prefix.
    pub(crate) fn range(&self, range: &KeyRange) -> String {
        match range {
            KeyRange::One(key) => self.key(key),
            KeyRange::Prefix { dir, prefix } => {
                let mut path = self.dir(dir);
                path.push_str(&store(prefix));
                path
            }
        }
    }
}

/// The key that is stored as `name` in the directory, or `None` for a name that this module never writes and
/// that would be taken for another key if it were decoded.
pub(crate) fn restore(dir: &Dir, name: &str) -> Option<Key> {
    if !name.chars().all(is_plain) {
        return None;
    }
    if !name.contains("%u") {
        return Some(Key::from_encoded(dir, name));
    }
    let mut encoded = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find("%u") {
        let (head, tail) = rest.split_at(at);
        encoded.push_str(head);
        match unescape(tail) {
            Some(c) => {
                encoded.push(c);
                rest = &tail[6..];
            }
            None => {
                encoded.push_str("%u");
                rest = &tail[2..];
            }
        }
    }
    encoded.push_str(rest);
    Some(Key::from_encoded(dir, encoded))
}

/// The path of a URL for a stored key.
pub(crate) fn url(stored: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(stored, URL)
}

fn store(encoded: &str) -> Cow<'_, str> {
    if encoded.chars().all(is_plain) {
        return Cow::Borrowed(encoded);
    }
    let mut out = String::with_capacity(encoded.len() * 2);
    for c in encoded.chars() {
        if is_plain(c) {
            out.push(c);
        } else {
            // The waist has encoded everything beyond U+FFFF itself.
            write!(out, "%u{:04X}", u32::from(c)).expect("a String takes every write");
        }
    }
    Cow::Owned(out)
}

fn unescape(text: &str) -> Option<char> {
    let hex = text.get(2..6)?;
    let canonical = hex.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    let c = char::from_u32(u32::from_str_radix(hex, 16).ok()?)?;
    (canonical && !is_plain(c)).then_some(c)
}

/// Whether every version of Consul takes the character in a URL.
pub(crate) fn is_plain(c: char) -> bool {
    c.is_ascii()
        || matches!(c,
            '\u{c0}'..='\u{24f}'
            | '\u{391}'..='\u{3a1}' | '\u{3a3}'..='\u{3e1}'
            | '\u{400}'..='\u{52f}'
            | '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}'
            | '\u{4e00}'..='\u{9fcc}'
            | '\u{ac00}'..='\u{d7a3}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_consul_refuses_is_escaped_and_comes_back() {
        let dir = Dir::new(["kv"]).unwrap();
        for name in ["plain/é", "a\u{a0}b", "\u{200b}", "%u00A0", "50%", "\u{2028}x", "日本 日本", "\u{e000}"] {
            let key = Key::new(&dir, name).unwrap();
            let stored = Space::new("").key(&key);
            let back = restore(&dir, stored.strip_prefix("kv/").unwrap()).unwrap();
            assert_eq!(back, key, "{stored}");
            assert!(stored.chars().all(is_plain));
        }
    }

    #[test]
    fn a_foreign_name_never_takes_the_place_of_another_key() {
        let dir = Dir::new(["kv"]).unwrap();
        assert_eq!(restore(&dir, "a\u{a0}b"), None);
        for raw in ["%u0041", "%u00a0", "%u12", "%u"] {
            assert_eq!(restore(&dir, raw).unwrap().encoded(), raw);
        }
    }

    #[test]
    fn a_url_carries_the_escapes_of_the_stored_key_once() {
        assert_eq!(url("kv/a b/%2E%-").to_string(), "kv/a%20b/%252E%25-");
    }
}
