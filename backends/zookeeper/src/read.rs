//! Reading ranges.
//!
//! Promise: what is read is at least as new as every write that was answered before the call began: a `sync` travels
//! ahead in the same go. A directory whose names fit into one request (about 256 KiB of them) is read at one moment,
//! as one multi-read that is repeated if a key came or went meanwhile; a larger one, or one that never rests, in
//! pieces, of which each is that new.

use std::time::Duration;

use futures_util::future::join_all;
use quorate_core::{Entry, Error, Key, KeyRange, Revision, ServerClock, Snapshot};
use zookeeper_client as zk;

use crate::{
    Inner,
    connect::Conn,
    error::Call,
    layout::{self, Layout},
    lease,
    multi::Multi,
    revision,
    seen::{Known, Seen},
};

/// How many bytes of names go into one multi-read; the server takes 1 MiB.
const PIECE: usize = 256 * 1024;
/// How often a directory is read again because it changed under the read.
const REPEATS: usize = 5;

pub(crate) fn entry(key: Key, value: Vec<u8>, stat: &zk::Stat) -> Entry {
    Entry {
        key,
        value: value.into(),
        created: revision(stat.czxid),
        modified: revision(stat.mzxid),
        lease: (stat.ephemeral_owner != 0).then(|| lease::name(stat.ephemeral_owner)),
    }
}

pub(crate) async fn read(conn: &Conn, layout: &Layout, seen: &Seen, range: &KeyRange) -> Result<Snapshot, zk::Error> {
    match range {
        KeyRange::One(key) => one(conn, layout, seen, key).await,
        KeyRange::Prefix { .. } => many(conn, layout, range).await,
    }
}

/// The leader's clock: it stamps every write as it takes it. A node that is created, written and deleted in one
/// transaction carries the stamp home, and was never there for anybody else. What a server tells of itself without a write
/// (`mntr`, the admin server) is closed by default or without a clock.
pub(crate) async fn clock(inner: &Inner) -> Result<ServerClock, Error> {
    let node = inner.settings.layout.clock();
    // It leaves nothing, so a lost answer leaves no doubt.
    let call = Call::read("clock", &node);
    let conn = inner.base.conn(&call).await?;
    let mut multi = Multi::new(&conn, inner.settings.acls());
    multi.create(&node, b"", zk::CreateMode::Persistent);
    multi.set(&node, b"", 0);
    multi.delete(&node, 1);
    let done = multi.commit(&call).await?.map_err(|refused| conn.failed(&call, refused.error))?;
    let stamped = done.last_set().map_or(0, |stat| stat.mtime);
    let earliest = Duration::from_millis(u64::try_from(stamped).unwrap_or(0));
    Ok(ServerClock { earliest, latest: earliest + Duration::from_millis(1) })
}

async fn one(conn: &Conn, layout: &Layout, seen: &Seen, key: &Key) -> Result<Snapshot, zk::Error> {
    let path = layout.key(key);
    let generation = layout.generation(Layout::shard(key));
    let synced = conn.client.sync("/");
    // Before the key itself: see `Known::generation`.
    let generation = conn.client.check_stat(&generation);
    let data = conn.client.get_data(&path);
    let work = async {
        synced.await?;
        Ok::<_, zk::Error>((generation.await?, data.await))
    };
    let (generation, data) = conn.call(work).await?;
    match data {
        Ok((value, stat)) => {
            seen.note(&path, Known::of(&stat, generation.map(|stat| stat.version)));
            let entries = vec![entry(key.clone(), value, &stat)];
            Ok(Snapshot { revision: revision(stat.mzxid), entries })
        }
        Err(zk::Error::NoNode) => {
            seen.forget(&path);
            Ok(Snapshot {
                revision: generation.map_or(Revision(0), |stat| revision(stat.mzxid)),
                ..Snapshot::default()
            })
        }
        Err(error) => Err(error),
    }
}

async fn many(conn: &Conn, layout: &Layout, range: &KeyRange) -> Result<Snapshot, zk::Error> {
    let dir = layout.dir(range.dir());
    let synced = conn.client.sync("/");
    let listed = conn.client.get_children(&dir);
    let (children, stat) = match conn.call(async { synced.await.and(Ok(listed.await)) }).await? {
        Ok(listed) => listed,
        Err(zk::Error::NoNode) => return Ok(Snapshot::default()),
        Err(error) => return Err(error),
    };
    let mut latest = revision(stat.pzxid);
    let mut keys = matching(range, &children);
    for _ in 0..REPEATS {
        if keys.is_empty() {
            return Ok(Snapshot { entries: Vec::new(), revision: latest });
        }
        let (entries, now) = pieces(conn, layout, &dir, &keys).await?;
        latest = entries.iter().map(|entry| entry.modified).fold(latest, Revision::max);
        let now = matching(range, &now);
        if now == keys {
            return Ok(Snapshot { entries, revision: latest });
        }
        keys = now;
    }
    // It never rests. Those that went while we read are left out.
    let (entries, _) = pieces(conn, layout, &dir, &keys).await?;
    latest = entries.iter().map(|entry| entry.modified).fold(latest, Revision::max);
    Ok(Snapshot { entries, revision: latest })
}

/// The keys of the range among these children, in order.
fn matching(range: &KeyRange, children: &[String]) -> Vec<Key> {
    let names = children.iter().filter_map(|node| layout::encoded(node)).filter(|name| range.matches(name));
    let mut keys: Vec<Key> = names.map(|name| Key::from_encoded(range.dir(), name)).collect();
    keys.sort_unstable();
    keys
}

/// Reads these keys, and the names in the directory at the same moment as the last of them.
async fn pieces(conn: &Conn, layout: &Layout, dir: &str, keys: &[Key]) -> Result<(Vec<Entry>, Vec<String>), zk::Error> {
    let paths: Vec<String> = keys.iter().map(|key| layout.key(key)).collect();
    let mut requests = Vec::new();
    let mut rest = paths.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|path| {
            bytes += path.len() + 32;
            bytes <= PIECE
        });
        let (piece, after) = rest.split_at(fits.count().max(1));
        rest = after;
        let mut reader = conn.client.new_multi_reader();
        for path in piece {
            reader.add_get_data(path)?;
        }
        if rest.is_empty() {
            reader.add_get_children(dir)?;
        }
        requests.push(reader.commit());
    }
    let replies = conn.call(async { Ok::<_, zk::Error>(join_all(requests).await) }).await?;
    let mut entries = Vec::with_capacity(keys.len());
    let mut names = Vec::new();
    let mut keys = keys.iter();
    for reply in replies {
        for result in reply? {
            match result {
                zk::MultiReadResult::Data { data, stat } => {
                    entries.extend(keys.next().map(|key| entry(key.clone(), data, &stat)));
                }
                zk::MultiReadResult::Children { children } => names = children,
                zk::MultiReadResult::Error { err: zk::Error::NoNode } => {
                    keys.next();
                }
                zk::MultiReadResult::Error { err } => return Err(err),
                _ => return Err(zk::Error::UnexpectedError("an answer of an unknown kind".to_owned())),
            }
        }
    }
    Ok((entries, names))
}
