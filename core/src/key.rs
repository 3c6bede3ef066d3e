//! Keys: where things live in a store, the same on every backend.
//!
//! Promise: every name from 1 to [`MAX_NAME`] bytes of UTF-8 is usable, two different names never meet in
//! one place on any backend, and a longer or empty name is refused before anything is sent.
//!
//! # On the wire
//! A key is a directory and a name. Names are stored readable; only what some server cannot store is
//! percent-encoded: `%` itself, control characters, characters that ZooKeeper refuses (U+E000–U+F8FF,
//! U+FFF0–U+FFFF, everything beyond U+FFFF), a dot at the start of a segment (`.`, `..`), and an empty segment,
//! which becomes `%-`. In a directory segment `/` is encoded too, so that no directory lies inside
//! another one by accident. The encoding is injective and keeps prefixes: `p` is a prefix of `n` exactly if the
//! encoding of `p` is a prefix of the encoding of `n`.

use std::{fmt, sync::Arc};

use crate::error::{Error, Result};

/// The longest name accepted, in bytes of UTF-8 before encoding.
pub const MAX_NAME: usize = 1024;

/// A directory: a flat group of keys, for example `kv` or `lock/nightly`.
///
/// Directories are made by recipes, never by users; no directory of quorate's holds keys whose names would
/// fall into another directory.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dir(Arc<str>);

impl Dir {
    /// A directory from its segments; each may be any text and is encoded, `/` included.
    ///
    /// # Errors
    /// `InvalidInput` if there is no segment, or one is empty or longer than [`MAX_NAME`].
    pub fn new<'a>(segments: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut path = String::new();
        for segment in segments {
            check_name("directory", segment)?;
            if !path.is_empty() {
                path.push('/');
            }
            encode_segment(segment, true, &mut path);
        }
        if path.is_empty() {
            return Err(Error::invalid("directory", "a directory needs at least one segment"));
        }
        Ok(Self(path.into()))
    }

    /// A directory from a path whose segments are separated by `/`, each encoded on its own.
    ///
    /// This is how a recipe is pointed at a place that another client library chose.
    ///
    /// # Errors
    /// `InvalidInput` if the path is empty, longer than [`MAX_NAME`], or has an empty segment.
    pub fn from_path(path: &str) -> Result<Self> {
        check_name("directory", path)?;
        Self::new(path.strip_prefix('/').unwrap_or(path).split('/'))
    }

    /// A directory from its encoded path, as [`as_str`](Self::as_str) gave it.
    ///
    /// # Errors
    /// `InvalidInput` if the path is not in that form.
    pub fn from_encoded(path: &str) -> Result<Self> {
        let decode = |segment: &str| percent_encoding::percent_decode_str(segment).decode_utf8().map(Into::into);
        let segments: Vec<String> = path
            .split('/')
            .map(decode)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::invalid("directory", "the path is not UTF-8 after decoding").key(path))?;
        let dir = Self::new(segments.iter().map(String::as_str))?;
        if dir.as_str() == path {
            Ok(dir)
        } else {
            Err(Error::invalid("directory", "the path is not encoded").key(path))
        }
    }

    /// The encoded path, without a leading or trailing `/`. This is what backends store.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Dir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Dir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dir({})", self.0)
    }
}

/// One key: a name in a directory.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    dir: Dir,
    // Encoded; may contain `/`. Backends whose servers give `/` a meaning encode it once more.
    name: Arc<str>,
}

impl Key {
    /// The key for `name` in `dir`.
    ///
    /// # Errors
    /// `InvalidInput` if the name is empty or longer than [`MAX_NAME`] bytes.
    pub fn new(dir: &Dir, name: &str) -> Result<Self> {
        check_name("key", name)?;
        Ok(Self { dir: dir.clone(), name: encode_name(name).into() })
    }

    /// The key for a name in its stored form, as a backend read it from the server.
    pub fn from_encoded(dir: &Dir, encoded: impl Into<Arc<str>>) -> Self {
        Self { dir: dir.clone(), name: encoded.into() }
    }

    /// The directory.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// The name in its stored (encoded) form.
    pub fn encoded(&self) -> &str {
        &self.name
    }

    /// The name as the user wrote it, or `None` if another client stored a name that is not in this
    /// encoding.
    pub fn name(&self) -> Option<String> {
        decode_name(&self.name)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{}/{name}", self.dir),
            None => write!(f, "{}/{}", self.dir, self.name),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({}/{})", self.dir, self.name)
    }
}

/// The keys a read or a watch is about, always within one directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeyRange {
    /// Exactly this key.
    One(Key),
    /// Every key of the directory whose encoded name starts with `prefix`; an empty prefix is the whole
    /// directory.
    Prefix {
        /// The directory.
        dir: Dir,
        /// The encoded prefix.
        prefix: Arc<str>,
    },
}

impl KeyRange {
    /// Every key of `dir` whose name starts with `prefix`, which may be empty.
    ///
    /// # Errors
    /// `InvalidInput` if the prefix is longer than [`MAX_NAME`] bytes.
    pub fn prefix(dir: &Dir, prefix: &str) -> Result<Self> {
        if prefix.len() > MAX_NAME {
            return Err(too_long("key prefix", prefix));
        }
        Ok(Self::Prefix { dir: dir.clone(), prefix: encode_prefix(prefix).into() })
    }

    /// The directory.
    pub fn dir(&self) -> &Dir {
        match self {
            Self::One(key) => key.dir(),
            Self::Prefix { dir, .. } => dir,
        }
    }

    /// Whether a key with this encoded name in the range's directory belongs to the range.
    pub fn matches(&self, encoded: &str) -> bool {
        match self {
            Self::One(key) => key.encoded() == encoded,
            Self::Prefix { prefix, .. } => encoded.starts_with(&**prefix),
        }
    }
}

impl fmt::Display for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(key) => key.fmt(f),
            Self::Prefix { dir, prefix } => write!(f, "{dir}/{prefix}*"),
        }
    }
}

fn check_name(operation: &'static str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid(operation, "the name is empty"));
    }
    if name.len() > MAX_NAME {
        return Err(too_long(operation, name));
    }
    Ok(())
}

fn too_long(operation: &'static str, name: &str) -> Error {
    let start: String = name.chars().take(32).collect();
    Error::invalid(operation, format!("the name has {} bytes, at most {MAX_NAME} are allowed", name.len()))
        .key(format!("{start}…"))
}

fn encode_name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for (i, segment) in name.split('/').enumerate() {
        if i > 0 {
            out.push('/');
        }
        encode_segment(segment, false, &mut out);
    }
    out
}

fn encode_prefix(prefix: &str) -> String {
    match prefix.rsplit_once('/') {
        // The last segment is unfinished: an empty one stands for every continuation, not for `%-`.
        Some((head, tail)) => {
            let mut out = encode_name(head);
            out.push('/');
            encode_chars(tail, false, &mut out);
            out
        }
        None => {
            let mut out = String::with_capacity(prefix.len());
            encode_chars(prefix, false, &mut out);
            out
        }
    }
}

fn encode_segment(segment: &str, slash: bool, out: &mut String) {
    if segment.is_empty() {
        out.push_str("%-");
    } else {
        encode_chars(segment, slash, out);
    }
}

fn encode_chars(text: &str, slash: bool, out: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for (i, c) in text.chars().enumerate() {
        let plain = match c {
            '%' => false,
            '.' => i > 0,
            '/' => !slash,
            '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' => false,
            '\u{e000}'..='\u{f8ff}' | '\u{fff0}'..='\u{ffff}' => false,
            c => u32::from(c) <= 0xffff,
        };
        if plain {
            out.push(c);
        } else {
            let mut bytes = [0; 4];
            for b in c.encode_utf8(&mut bytes).bytes() {
                out.push('%');
                out.push(char::from(HEX[usize::from(b >> 4)]));
                out.push(char::from(HEX[usize::from(b & 15)]));
            }
        }
    }
}

fn decode_name(encoded: &str) -> Option<String> {
    let mut out = String::with_capacity(encoded.len());
    for (i, segment) in encoded.split('/').enumerate() {
        if i > 0 {
            out.push('/');
        }
        if segment != "%-" {
            out.push_str(&percent_encoding::percent_decode_str(segment).decode_utf8().ok()?);
        }
    }
    // Only the canonical form is ours; anything else would give one name two places.
    (encode_name(&out) == encoded).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv() -> Dir {
        Dir::new(["kv"]).unwrap()
    }

    const HOSTILE: &[&str] = &[
        "/",
        "//",
        ".",
        "..",
        "...",
        "a/.",
        "a/..",
        "a/../b",
        "a/b",
        "a//b",
        "a/",
        "/a",
        "a",
        "A",
        "a b",
        " ",
        "%",
        "%2F",
        "a%2Fb",
        "%-",
        "a/%-",
        "\0",
        "\n",
        "\u{7f}",
        "é",
        "\u{e000}",
        "\u{ffff}",
        "🦀",
        "*",
        "?",
        "#",
        "\\",
        "{a}",
        "a\u{9f}",
        "~",
        ":",
        "zookeeper",
    ];

    #[test]
    fn hostile_names_map_injectively_and_come_back() {
        let mut seen = std::collections::HashMap::new();
        for name in HOSTILE {
            let key = Key::new(&kv(), name).unwrap();
            assert_eq!(key.name().as_deref(), Some(*name));
            for segment in key.encoded().split('/') {
                assert!(!segment.is_empty() && !segment.starts_with('.'), "{name:?} → {key:?}");
            }
            if let Some(other) = seen.insert(key.encoded().to_owned(), name) {
                panic!("{name:?} and {other:?} share {key:?}");
            }
        }
    }

    #[test]
    fn a_prefix_matches_exactly_the_names_it_begins() {
        for prefix in HOSTILE.iter().chain([&""]) {
            let range = KeyRange::prefix(&kv(), prefix).unwrap();
            for name in HOSTILE {
                let key = Key::new(&kv(), name).unwrap();
                assert_eq!(range.matches(key.encoded()), name.starts_with(prefix), "{prefix:?} of {name:?}");
            }
        }
    }

    #[test]
    fn no_directory_lies_inside_another_by_its_name() {
        let a = Dir::new(["lock", "jobs"]).unwrap();
        let b = Dir::new(["lock", "jobs/nightly"]).unwrap();
        assert_eq!(b.as_str(), "lock/jobs%2Fnightly");
        assert!(!b.as_str().starts_with(&format!("{a}/")));
    }

    #[test]
    fn empty_and_over_long_names_are_refused() {
        for name in ["", &"x".repeat(MAX_NAME + 1)] {
            let kind = Key::new(&kv(), name).unwrap_err().kind();
            assert_eq!(kind, crate::ErrorKind::InvalidInput);
        }
        assert!(Key::new(&kv(), &"x".repeat(MAX_NAME)).is_ok());
    }

    #[test]
    fn a_foreign_name_that_is_not_canonical_has_no_user_name() {
        for raw in ["50%", "%zz", "%41", "a//b", ".x"] {
            assert_eq!(Key::from_encoded(&kv(), raw).name(), None, "{raw}");
        }
    }
}
