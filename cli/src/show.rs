//! Commands that look, and those that write once.
//!
//! Promise: a line for each thing, its parts separated by tabs; with `--json` an object for each. `get` alone prints a value
//! as it is. What was asked for and is not there is status 1, without a line.

use std::{
    ffi::OsStr,
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::unix::ffi::OsStrExt as _,
    time::SystemTime,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use quorate::{
    Coordinator, KvEvent,
    commit::{Decision, DoubtState, TxId},
    discovery::{Health, Instances},
    election::Leader,
    kv::KeyValue,
    lock::Holder,
};
use serde_json::{Value, json};

use crate::{Failure, Outcome, exit};

/// How it is printed.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    json: bool,
}

impl Out {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    fn line(self, parts: &[&str], object: &Value) -> Result<(), Failure> {
        let line = if self.json { object.to_string() } else { parts.join("\t") };
        write(format!("{line}\n").as_bytes())
    }
}

fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = out.write_all(bytes).and_then(|()| out.flush());
    written.map_err(|e| Failure::new(exit::SOFTWARE, format!("standard output: {e}")))
}

/// Bytes as a JSON value: a text if they are one.
fn value(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({ "base64": BASE64_STANDARD.encode(bytes) }),
    }
}

fn seconds(time: Option<SystemTime>) -> Option<f64> {
    time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|since| since.as_secs_f64())
}

fn when(time: Option<SystemTime>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

pub(crate) async fn status(coord: &Coordinator, out: Out, name: &str) -> Outcome {
    let status = coord.lock(name).status().await?;
    let waiting = status.waiting.to_string();
    match &status.holder {
        None => out.line(&["free", &waiting], &json!({ "holder": null, "waiting": status.waiting }))?,
        Some(holder) => {
            let (parts, object) = described(holder);
            let parts = [&["held".to_owned(), waiting][..], &parts].concat();
            let object = json!({ "holder": object, "waiting": status.waiting });
            out.line(&parts.iter().map(String::as_str).collect::<Vec<_>>(), &object)?;
        }
    }
    Ok(0)
}

fn described(holder: &Holder) -> (Vec<String>, Value) {
    let owner = holder.owner.clone();
    let parts = vec![holder.token.to_string(), owner.clone().unwrap_or_else(|| "-".to_owned()), when(holder.since)];
    (parts, json!({ "token": holder.token.get(), "owner": owner, "since": seconds(holder.since) }))
}

pub(crate) async fn break_lock(coord: &Coordinator, out: Out, name: &str) -> Outcome {
    let Some(holder) = coord.lock(name).break_holder().await? else { return Ok(exit::NOTHING) };
    let (parts, object) = described(&holder);
    out.line(&parts.iter().map(String::as_str).collect::<Vec<_>>(), &object)?;
    Ok(0)
}

pub(crate) async fn leader(coord: &Coordinator, out: Out, name: &str, follow: bool) -> Outcome {
    let election = coord.election(name);
    if !follow {
        let leader = election.leader().await?;
        let status = if leader.is_some() { 0 } else { exit::NOTHING };
        return leader.map_or(Ok(()), |leader| told(out, Some(&leader))).map(|()| status);
    }
    let mut observer = election.observe().await?;
    loop {
        let leader = observer.next().await?;
        told(out, leader.as_ref())?;
    }
}

fn told(out: Out, leader: Option<&Leader>) -> Result<(), Failure> {
    match leader {
        None => out.line(&["-"], &Value::Null),
        Some(leader) => {
            let object = json!({ "term": leader.term.get(), "value": leader.value, "owner": leader.owner });
            let owner = leader.owner.as_deref().unwrap_or("-");
            out.line(&[&leader.term.to_string(), &leader.value, owner], &object)
        }
    }
}

pub(crate) async fn instances(coord: &Coordinator, out: Out, name: &str, follow: bool) -> Outcome {
    let mut service = coord.discover(name).await?;
    if !follow {
        let now = service.now();
        listed(out, &now)?;
        return Ok(if now.is_empty() { exit::NOTHING } else { 0 });
    }
    loop {
        let now = service.changed().await;
        listed(out, &now)?;
        // The end of one set, and the beginning of the next.
        if !out.json {
            write(b"\n")?;
        }
    }
}

fn listed(out: Out, instances: &Instances) -> Result<(), Failure> {
    if out.json {
        let all: Vec<_> = instances.iter().map(|instance| json!(&**instance)).collect();
        return out.line(&[], &json!({ "instances": all, "stale": instances.stale_since().is_some() }));
    }
    for instance in instances.iter() {
        let health = match instance.health {
            Health::Passing => "passing",
            Health::Draining => "draining",
            _ => "failing",
        };
        let tags = instance.tags.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        let zone = instance.zone.as_deref().unwrap_or("-");
        let weight = instance.weight.to_string();
        out.line(&[&instance.id, &instance.endpoint(), health, &weight, zone, &tags], &Value::Null)?;
    }
    Ok(())
}

pub(crate) async fn members(coord: &Coordinator, out: Out, name: &str) -> Outcome {
    let members = coord.group(name).members().await?;
    for member in &members {
        let object = json!({ "id": member.id, "payload": value(&member.payload), "joined": member.joined.0 });
        out.line(&[&member.id, &String::from_utf8_lossy(&member.payload), &member.joined.to_string()], &object)?;
    }
    Ok(if members.is_empty() { exit::NOTHING } else { 0 })
}

fn entry(out: Out, entry: &KeyValue) -> Result<(), Failure> {
    let object = json!({
        "key": entry.key, "value": value(&entry.value), "created": entry.created.0, "modified": entry.modified.0,
        "ephemeral": entry.ephemeral,
    });
    out.line(&[&entry.key, &String::from_utf8_lossy(&entry.value)], &object)
}

pub(crate) async fn get(coord: &Coordinator, out: Out, key: &str) -> Outcome {
    let Some(found) = coord.kv().get(key).await? else { return Ok(exit::NOTHING) };
    if out.json {
        entry(out, &found)?;
    } else {
        write(&found.value)?;
        if io::stdout().is_terminal() {
            write(b"\n")?;
        }
    }
    Ok(0)
}

pub(crate) async fn put(coord: &Coordinator, out: Out, key: &str, value: &OsStr) -> Outcome {
    let value = if value == "-" {
        let read = tokio::task::spawn_blocking(|| {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
        });
        let bytes = read.await.map_err(io::Error::from).and_then(|bytes| bytes);
        Bytes::from(bytes.map_err(|e| Failure::new(exit::SOFTWARE, format!("standard input: {e}")))?)
    } else {
        Bytes::copy_from_slice(value.as_bytes())
    };
    let revision = coord.kv().put(key, value).await?;
    out.line(&[&revision.to_string()], &json!({ "modified": revision.0 }))?;
    Ok(0)
}

pub(crate) async fn delete(coord: &Coordinator, key: &str) -> Outcome {
    Ok(if coord.kv().delete(key).await? { 0 } else { exit::NOTHING })
}

pub(crate) async fn list(coord: &Coordinator, out: Out, prefix: &str) -> Outcome {
    let listing = coord.kv().list(prefix).await?;
    for found in &listing.entries {
        entry(out, found)?;
    }
    Ok(if listing.entries.is_empty() { exit::NOTHING } else { 0 })
}

pub(crate) async fn watch(coord: &Coordinator, out: Out, prefix: &str) -> Outcome {
    let mut watch = coord.kv().watch_prefix(prefix).await?;
    loop {
        match watch.next().await? {
            KvEvent::Reset(entries) => {
                let all: Vec<_> = entries.iter().map(|e| json!({ "key": e.key, "value": value(&e.value) })).collect();
                out.line(&["reset", &all.len().to_string()], &json!({ "reset": all }))?;
                if !out.json {
                    entries.iter().try_for_each(|found| changed(out, found))?;
                }
            }
            KvEvent::Put(found) => changed(out, &found)?,
            KvEvent::Delete { key, revision } => {
                let object = json!({ "delete": key, "revision": revision.0 });
                out.line(&["delete", &key, &revision.to_string()], &object)?;
            }
            KvEvent::Interrupted(error) => {
                let text = error.to_string();
                out.line(&["interrupted", &text], &json!({ "interrupted": text }))?;
            }
        }
    }
}

fn changed(out: Out, found: &KeyValue) -> Result<(), Failure> {
    let object = json!({ "put": found.key, "value": value(&found.value), "revision": found.modified.0 });
    let text = String::from_utf8_lossy(&found.value);
    out.line(&["put", &found.key, &found.modified.to_string(), &text], &object)
}

pub(crate) async fn in_doubt(coord: &Coordinator, out: Out, group: &str) -> Outcome {
    let doubts = coord.transactions(group)?.in_doubt().await?;
    for doubt in &doubts {
        let (state, object) = match &doubt.state {
            DoubtState::Undecided => ("undecided".to_owned(), json!("undecided")),
            DoubtState::Decided(decision) => (format!("decided {decision}"), json!({ "decided": decision })),
            DoubtState::Diverged { decision, what } => {
                let said: Vec<_> = what.iter().map(|(who, what)| format!("{who}: {what}")).collect();
                (format!("diverged {decision}: {}", said.join("; ")), json!({ "diverged": decision, "what": what }))
            }
            DoubtState::Unreadable(why) => (format!("unreadable: {why}"), json!({ "unreadable": why })),
            _ => ("unknown".to_owned(), Value::Null),
        };
        let driver = if doubt.driver_lives { "driver lives" } else { "driver gone" };
        let object = json!({
            "id": doubt.id, "state": object, "participants": doubt.participants, "driver_lives": doubt.driver_lives,
            "since": seconds(doubt.since),
        });
        out.line(&[&doubt.id, &state, driver, &when(doubt.since), &doubt.participants.join(",")], &object)?;
    }
    Ok(if doubts.is_empty() { exit::NOTHING } else { 0 })
}

pub(crate) async fn resolve(coord: &Coordinator, out: Out, group: &str, id: &str, decision: Decision) -> Outcome {
    let id: TxId = id.parse()?;
    let stands = coord.transactions(group)?.resolve(id, decision).await?;
    out.line(&[&stands.to_string()], &json!({ "decided": stands }))?;
    // Somebody else was faster.
    Ok(if stands == decision { 0 } else { exit::TAKEN })
}

pub(crate) async fn acknowledge(coord: &Coordinator, group: &str, id: &str) -> Outcome {
    let there = coord.transactions(group)?.acknowledge(id.parse()?).await?;
    Ok(if there { 0 } else { exit::NOTHING })
}

pub(crate) async fn clock(coord: &Coordinator, out: Out) -> Outcome {
    let clock = coord.clock();
    let mut offset = clock.sample().await?;
    // Those that tell whole seconds are told apart by a few.
    for _ in 0..7 {
        offset = clock.sample().await?;
    }
    let (ahead, error) = (offset.ahead_seconds, offset.error.as_secs_f64());
    let object = json!({ "ahead_seconds": ahead, "error_seconds": error });
    out.line(&[&format!("{ahead:+.6} s"), &format!("within {error:.6} s")], &object)?;
    Ok(0)
}
