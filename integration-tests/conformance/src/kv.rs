//! Single keys: what is read back, which revisions it carries, and which lease it stands on.

use std::sync::Arc;

use bytes::Bytes;
use quorate_core::{Dir, Enqueue, ErrorKind, Key, KeyRange, Revision, Write};

use crate::{
    Clients,
    support::{
        actor, all, cases, client, commit, dir, eventually, get, keep, key, kv, line, put, put_on, read, refused, txn,
        unchanged, value, write,
    },
};

cases!("kv":
    what_was_put_is_read_back_with_its_revisions,
    a_missing_key_reads_as_nothing,
    overwriting_raises_modified_and_keeps_created,
    revisions_rise_over_deletion_and_recreation,
    keys_and_tickets_draw_from_one_rising_counter,
    empty_and_binary_values_survive,
    the_largest_value_is_kept_and_a_larger_one_refused,
    directories_do_not_mix,
    what_one_client_wrote_another_reads,
    many_keys_are_read_completely_and_in_order,
    a_key_belongs_to_the_lease_that_wrote_it_last,
    a_key_moved_off_its_lease_stays,
    a_key_moved_onto_a_lease_goes_with_it,
    a_key_rewritten_on_its_lease_still_goes_with_it,
    a_put_on_an_ended_lease_writes_nothing,
    tickets_are_not_listed_among_keys,
);

async fn what_was_put_is_read_back_with_its_revisions(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let revision = write(&a.backend, [put_on(&a.lease.id, &key("a"), "one")]).await;
    let entry = get(&a.backend, &key("a")).await.expect("the key is there");
    assert_eq!(entry.key, key("a"));
    assert_eq!(entry.value, "one");
    assert_eq!(entry.modified, revision, "the commit's revision is the entry's, ready for the next CAS");
    assert_eq!(entry.created, revision);
    assert_eq!(entry.lease.as_ref(), Some(&a.lease.id));
    write(&a.backend, [put(&key("b"), "two")]).await;
    assert_eq!(get(&a.backend, &key("b")).await.expect("the key is there").lease, None);
}

async fn a_missing_key_reads_as_nothing(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    assert_eq!(get(&backend, &key("a")).await, None);
    assert_eq!(read(&backend, &all()).await.entries, []);
    write(&backend, [put(&key("a"), "1")]).await;
    write(&backend, [Write::Delete(key("a"))]).await;
    assert_eq!(get(&backend, &key("a")).await, None);
    assert_eq!(read(&backend, &all()).await.entries, []);
}

async fn overwriting_raises_modified_and_keeps_created(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let first = write(&backend, [put(&key("a"), "1")]).await;
    let second = write(&backend, [put(&key("a"), "2")]).await;
    // The same value once more is a write all the same.
    let third = write(&backend, [put(&key("a"), "2")]).await;
    assert!(first < second && second < third, "{first} {second} {third}");
    let entry = get(&backend, &key("a")).await.expect("the key is there");
    assert_eq!((entry.created, entry.modified), (first, third));
    assert_eq!(entry.value, "2");
}

async fn revisions_rise_over_deletion_and_recreation(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let mut last = Revision(0);
    for round in 0..5 {
        let revision = write(&backend, [put(&key("a"), "1")]).await;
        assert!(revision > last, "round {round}: {revision} after {last}");
        let entry = get(&backend, &key("a")).await.expect("the key is there");
        assert_eq!(entry.created, revision, "a deleted key is created anew");
        write(&backend, [Write::Delete(key("a"))]).await;
        last = revision;
    }
    // The stale revision of the first life is worth nothing in the next.
    let now = write(&backend, [put(&key("a"), "2")]).await;
    let stale = commit(&backend, [unchanged(&key("a"), last)], [put(&key("a"), "3")]).await;
    assert_eq!(stale.culprit, Some(0), "{last} is not {now}");
}

async fn keys_and_tickets_draw_from_one_rising_counter(clients: Arc<dyn Clients>) {
    let (a, b) = (actor(&clients).await, actor(&clients).await);
    let mut last = Revision(0);
    for round in 0..5 {
        let actor = if round % 2 == 0 { &a } else { &b };
        let written = write(&actor.backend, [put(&key(&round.to_string()), "1")]).await;
        let place = actor.join(&line("x")).await;
        assert!(last < written && written < place.token, "{last} {written} {}", place.token);
        last = place.token;
        actor.leave(&place.ticket).await;
    }
}

async fn empty_and_binary_values_survive(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let bytes: Vec<u8> = (0..=255).chain(b"\r\n\0\xff\xfe".iter().copied()).collect();
    for (name, content) in [("empty", &b""[..]), ("bytes", &bytes), ("nul", b"\0"), ("json", b"{\"a\":\"\\n\"}")] {
        write(&a.backend, [put(&key(name), content)]).await;
        assert_eq!(value(&a.backend, &key(name)).await.as_deref(), Some(content), "{name}");
        let entry = Enqueue { value: Bytes::copy_from_slice(content), ..a.entry(&line(name)) };
        let place = a.enqueue(&entry).await;
        let front = a.backend.line(&line(name)).await.expect("a line can be listed").front.expect("a front");
        assert_eq!((front.token, &front.value[..]), (place.token, content), "{name}");
    }
}

async fn the_largest_value_is_kept_and_a_larger_one_refused(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let most = a.backend.profile().max_value;
    // Beyond a MiB a value is no coordination data; servers without a limit are not filled up to find that out.
    let large = vec![b'x'; most.min(1 << 20)];
    write(&a.backend, [put(&key("a"), &large)]).await;
    assert_eq!(value(&a.backend, &key("a")).await.as_deref(), Some(&large[..]));
    if most <= 64 << 20 {
        let larger = vec![b'y'; most + 1];
        let too_large = a.backend.commit(&txn([], [put(&key("a"), &larger), put(&key("b"), "1")])).await;
        refused(too_large, ErrorKind::InvalidInput, "a value over max_value");
        assert_eq!(value(&a.backend, &key("a")).await.map(|v| v.len()), Some(large.len()), "nothing was written");
        assert_eq!(get(&a.backend, &key("b")).await, None);
        let entry = Enqueue { value: larger.into(), ..a.entry(&line("x")) };
        refused(a.backend.enqueue(&entry).await, ErrorKind::InvalidInput, "a ticket's value over max_value");
        assert_eq!(a.tickets(&line("x")).await, []);
    }
}

async fn directories_do_not_mix(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let nested = |segments: [&str; 2]| Dir::new(segments).expect("valid names");
    let dirs = [dir("k"), dir("kv"), dir("kv2"), dir("kv_other"), nested(["member", "x"]), nested(["member", "x/a"])];
    for (i, dir) in dirs.iter().enumerate() {
        write(&backend, [put(&Key::new(dir, "a").expect("a valid name"), i.to_string())]).await;
        write(&backend, [put(&Key::new(dir, "b").expect("a valid name"), i.to_string())]).await;
    }
    for (i, dir) in dirs.iter().enumerate() {
        let entries = read(&backend, &KeyRange::prefix(dir, "").expect("a valid prefix")).await.entries;
        let names: Vec<_> = entries.iter().filter_map(|e| e.key.name()).collect();
        assert_eq!(names, ["a", "b"], "{dir}");
        assert!(entries.iter().all(|e| e.value == i.to_string()), "{dir}: {entries:?}");
    }
}

async fn what_one_client_wrote_another_reads(clients: Arc<dyn Clients>) {
    let (a, b) = (client(&clients).await, client(&clients).await);
    for i in 0..20 {
        let name = key(&i.to_string());
        write(&a, [put(&name, "1")]).await;
        if b.profile().linearizable_reads {
            assert!(get(&b, &name).await.is_some(), "reads are declared linearizable");
        }
        eventually("the other client sees the write", || async { get(&b, &name).await.is_some() }).await;
    }
}

async fn many_keys_are_read_completely_and_in_order(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let names: Vec<_> = (0..150).map(|i| format!("{}/{i}", if i % 3 == 0 { "x" } else { "y" })).collect();
    for name in &names {
        write(&backend, [put(&key(name), "1")]).await;
    }
    assert_eq!(read(&backend, &all()).await.entries.len(), names.len());
    for prefix in ["x/", "y/", "x/1", "z", "x/149", "y/149"] {
        let range = KeyRange::prefix(&kv(), prefix).expect("a valid prefix");
        let count = names.iter().filter(|name| name.starts_with(prefix)).count();
        assert_eq!(read(&backend, &range).await.entries.len(), count, "{prefix}");
    }
}

async fn a_key_belongs_to_the_lease_that_wrote_it_last(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let second = keep(&a.backend).await;
    write(&a.backend, [put_on(&a.lease.id, &key("a"), "1")]).await;
    write(&a.backend, [put_on(&second.id, &key("a"), "2")]).await;
    assert_eq!(get(&a.backend, &key("a")).await.and_then(|e| e.lease), Some(second.id.clone()));
    a.backend.revoke(&a.lease.id).await.expect("revoking works");
    assert_eq!(value(&a.backend, &key("a")).await.as_deref(), Some(&b"2"[..]));
    a.backend.revoke(&second.id).await.expect("revoking works");
    assert_eq!(get(&a.backend, &key("a")).await, None);
}

async fn a_key_moved_off_its_lease_stays(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    write(&a.backend, [put_on(&a.lease.id, &key("a"), "1")]).await;
    write(&a.backend, [put(&key("a"), "2")]).await;
    a.backend.revoke(&a.lease.id).await.expect("revoking works");
    let entry = get(&a.backend, &key("a")).await.expect("the key no longer stands on the lease");
    assert_eq!((&entry.value[..], entry.lease), (&b"2"[..], None));
}

async fn a_key_moved_onto_a_lease_goes_with_it(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let first = write(&a.backend, [put(&key("a"), "1")]).await;
    let second = write(&a.backend, [put_on(&a.lease.id, &key("a"), "2")]).await;
    assert!(first < second);
    let entry = get(&a.backend, &key("a")).await.expect("the key is there");
    assert_eq!((entry.modified, entry.lease), (second, Some(a.lease.id.clone())));
    a.backend.revoke(&a.lease.id).await.expect("revoking works");
    assert_eq!(get(&a.backend, &key("a")).await, None);
}

async fn a_key_rewritten_on_its_lease_still_goes_with_it(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    for content in ["1", "2", "3"] {
        write(&a.backend, [put_on(&a.lease.id, &key("a"), content)]).await;
    }
    // A deleted key that somebody else made anew must not go with the lease of its first life.
    write(&a.backend, [put_on(&a.lease.id, &key("b"), "1")]).await;
    write(&a.backend, [Write::Delete(key("b"))]).await;
    write(&a.backend, [put(&key("b"), "2")]).await;
    a.backend.revoke(&a.lease.id).await.expect("revoking works");
    assert_eq!(get(&a.backend, &key("a")).await, None);
    assert_eq!(value(&a.backend, &key("b")).await.as_deref(), Some(&b"2"[..]));
}

async fn a_put_on_an_ended_lease_writes_nothing(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let ended = keep(&a.backend).await;
    a.backend.revoke(&ended.id).await.expect("revoking works");
    write(&a.backend, [put(&key("old"), "1")]).await;
    for late in [
        txn([], [put_on(&ended.id, &key("new"), "2")]),
        txn([], [put_on(&ended.id, &key("old"), "2")]),
        txn([], [put(&key("other"), "2"), put_on(&ended.id, &key("new"), "2")]),
        txn([], [Write::Delete(key("old")), put_on(&ended.id, &key("new"), "2")]),
    ] {
        refused(a.backend.commit(&late).await, ErrorKind::SessionLost, &format!("{late:?}"));
        let entries = read(&a.backend, &all()).await.entries;
        assert_eq!(entries.len(), 1, "after {late:?}: {entries:?}");
        assert_eq!(entries[0].value, "1");
    }
}

async fn tickets_are_not_listed_among_keys(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    a.join(&line("x")).await;
    a.join(&dir("kv2")).await;
    write(&a.backend, [put(&key("a"), "1")]).await;
    let names: Vec<_> = read(&a.backend, &all()).await.entries.into_iter().map(|e| e.key).collect();
    assert_eq!(names, [key("a")]);
}
