//! Hostile names: every name works, as a key and as a line, and no two meet in one place.

use std::sync::Arc;

use quorate_core::{Dir, Key, KeyRange, Write};

use crate::{
    Clients,
    support::{actor, all, cases, client, get, kv, put, read, value, write},
};

cases!("keys":
    hostile_names_are_kept_apart_as_keys,
    hostile_names_are_kept_apart_as_lines,
    a_prefix_reads_exactly_the_names_it_begins,
    deleting_a_hostile_name_deletes_no_sibling,
);

/// Names that some server, file system, pattern language or path rule treats in a special way.
#[rustfmt::skip] // one to a line they would fill two screens
const HOSTILE: &[&str] = &[
    "/", "//", ".", "..", "...", "a", "A", "a/", "/a", "a/b", "a//b", "a/.", "a/..", "a/../b", "a/b/c/d/e/f", "a b",
    " ", " a", "a ", "%", "%%", "%2F", "%2f", "a%2Fb", "%-", "a/%-", "%-/a", "\0", "a\0", "\n", "\r\n", "\t", "\u{7f}",
    "\u{85}", "é", "e\u{301}", "ß", "SS", "\u{200b}", "\u{e000}", "\u{f8ff}", "\u{fff0}", "\u{fffd}", "\u{ffff}", "🦀",
    "a🦀b", "中文", "*", "?", "[a]", "{a}", "a}", "#", "\\", "~", ":", ";", ",", "=", "&", "+", "a+b", "\"", "'", "`", "$HOME",
    "<a>", "|", "zookeeper", "_c_a-lock-0000000001", "-r", "-w", "0", "-1", "null",
];

fn names() -> Vec<String> {
    let mut names: Vec<String> = HOSTILE.iter().copied().map(str::to_owned).collect();
    names.push("x".repeat(1024));
    names.push("x".repeat(1023));
    // Four bytes each, and twelve once encoded.
    names.push("🦀".repeat(256));
    names.push("d/".repeat(100) + "e");
    names
}

async fn hostile_names_are_kept_apart_as_keys(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let names = names();
    for (i, name) in names.iter().enumerate() {
        write(&backend, [put(&Key::new(&kv(), name).expect("a valid name"), i.to_string())]).await;
    }
    for (i, name) in names.iter().enumerate() {
        let found = value(&backend, &Key::new(&kv(), name).expect("a valid name")).await;
        assert_eq!(found.as_deref(), Some(i.to_string().as_bytes()), "{name:?}");
    }
    let mut expected: Vec<_> = names.iter().map(|n| Key::new(&kv(), n).expect("a valid name")).collect();
    expected.sort_by(|a, b| a.encoded().cmp(b.encoded()));
    let entries = read(&backend, &all()).await.entries;
    let listed: Vec<_> = entries.iter().map(|e| e.key.clone()).collect();
    assert_eq!(listed, expected, "the listing has every name, in order");
    for entry in entries {
        let name = entry.key.name().expect("written by this library");
        assert_eq!(entry.value, names.iter().position(|n| *n == name).expect("one of ours").to_string());
    }
}

async fn hostile_names_are_kept_apart_as_lines(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let lines: Vec<_> = names().iter().map(|n| Dir::new(["lock", n.as_str()]).expect("a valid name")).collect();
    let mut places = Vec::new();
    for line in &lines {
        let place = a.join(line).await;
        assert_eq!(place.ahead, [], "{line} is free although its siblings are held");
        places.push(place);
    }
    for (line, place) in lines.iter().zip(&places) {
        assert_eq!(a.tickets(line).await, [place.ticket.clone()], "{line}");
        a.leave(&place.ticket).await;
        assert_eq!(a.tickets(line).await, [], "{line}");
    }
}

async fn a_prefix_reads_exactly_the_names_it_begins(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let names = names();
    for name in &names {
        write(&backend, [put(&Key::new(&kv(), name).expect("a valid name"), name)]).await;
    }
    for prefix in
        ["", "a", "a/", "a//", "a/.", "/", ".", "%", "%-", "a%", " ", "\0", "é", "🦀", "x", "d/d/", "A", "{", "*", "no"]
    {
        let range = KeyRange::prefix(&kv(), prefix).expect("a valid prefix");
        let mut found: Vec<_> = read(&backend, &range).await.entries.into_iter().map(|e| e.value).collect();
        let mut expected: Vec<_> = names.iter().filter(|n| n.starts_with(prefix)).map(String::as_bytes).collect();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "prefix {prefix:?}");
    }
}

async fn deleting_a_hostile_name_deletes_no_sibling(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let names: Vec<_> = names().iter().map(|n| Key::new(&kv(), n).expect("a valid name")).collect();
    for name in &names {
        write(&backend, [put(name, "1")]).await;
    }
    for (i, name) in names.iter().enumerate() {
        write(&backend, [Write::Delete(name.clone())]).await;
        assert_eq!(get(&backend, name).await, None);
        if i % 10 == 0 {
            assert_eq!(read(&backend, &all()).await.entries.len(), names.len() - i - 1, "after {name}");
        }
    }
    assert_eq!(read(&backend, &all()).await.entries, []);
}
