//! Services in Consul's own catalog.
//!
//! Promise: as `quorate_core::discovery::Catalog` says. An instance of ours is found while its TTL check passes, and that
//! is passed with every renewal of the lease; an instance of anybody else is found with the health that Consul gives it.
//!
//! Two clients that register the same id on the same agent replace each other; on two agents both are registered, the
//! later one is found, and the earlier one is not told.

use std::{collections::HashMap, fmt::Write as _, sync::Arc, time::Duration};

use async_trait::async_trait;
use hyper::StatusCode;
use quorate_core::{
    Dir, Entry, ErrorKind, Key, LeaseId, Result, Revision, Snapshot, Watch,
    discovery::{Catalog, Health, Instance, JsonRecords, MAX_WEIGHT, RecordFormat as _, service_dir},
};
use serde::Deserialize;
use serde_json::{Map, json};
use tokio::sync::watch as signal;

use crate::{
    api::{Api, How},
    error::{Effect, error, refused, session_lost},
    lease::{Leases, REMOVE_CRITICAL_AFTER, deregister, millis},
    path::url,
    watch::{Reader, Target},
};

/// Consul's limits for a service's metadata.
const META_PAIRS: usize = 64;
const META_VALUE: usize = 512;
const META_KEY: usize = 128;
/// How many pairs the record itself may take; the rest is for the metadata that other clients read.
const RECORD_PAIRS: usize = 48;
/// The largest weight that Consul takes.
const WEIGHT_LIMIT: u32 = 65_535;
const CHECK: &str = "the process that registered it is alive";

/// The services of one client.
#[derive(Debug)]
pub(crate) struct Services {
    namespace: Arc<str>,
    reader: Reader,
    leases: Arc<Leases>,
    life: signal::Receiver<()>,
}

/// A service as it is asked for.
#[derive(Debug)]
pub(crate) struct Name {
    namespace: Arc<str>,
    service: String,
    dir: Dir,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Found {
    node: Node,
    service: Service,
    #[serde(default)]
    checks: Vec<Check>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    node: String,
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    #[serde(rename = "ID")]
    id: String,
    service: String,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    address: String,
    #[serde(default)]
    port: i64,
    #[serde(default)]
    meta: Option<HashMap<String, String>>,
    #[serde(default)]
    weights: Option<Weights>,
    #[serde(default)]
    create_index: u64,
    #[serde(default)]
    modify_index: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Weights {
    passing: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    #[serde(rename = "CheckID")]
    id: String,
    status: String,
    #[serde(default)]
    modify_index: u64,
}

impl Services {
    pub(crate) fn new(namespace: &str, reader: Reader, leases: Arc<Leases>, life: signal::Receiver<()>) -> Self {
        Self { namespace: namespace.into(), reader, leases, life }
    }

    fn id(&self, service: &str, id: &str) -> Arc<str> {
        let mut out = "quorate".to_owned();
        for part in [&*self.namespace, service, id] {
            out.push(':');
            push_small(part, &mut out);
        }
        out.into()
    }

    async fn register(
        &self,
        agent: usize,
        ttl: Duration,
        id: &str,
        lease: &LeaseId,
        instance: &Instance,
    ) -> Result<()> {
        const OP: &str = "register";
        let body = json!({
            "ID": id,
            "Name": instance.service,
            "Tags": instance.tags,
            "Address": instance.address,
            "Port": instance.port,
            "Weights": { "Passing": instance.weight.min(WEIGHT_LIMIT), "Warning": 1 },
            "Meta": self.meta(lease, instance)?,
            "Check": {
                "CheckID": check_id(lease, id),
                "Name": CHECK,
                "TTL": format!("{}ms", millis(ttl)),
                "Status": "passing",
                "DeregisterCriticalServiceAfter": REMOVE_CRITICAL_AFTER,
            },
        });
        let path = "/v1/agent/service/register?replace-existing-checks=true";
        let answer = self.reader.api.put(path, body.to_string().into_bytes(), Some(agent)).await;
        let answer = answer.map_err(|f| f.into_error(OP, Effect::Write).key(instance))?;
        match answer.status {
            StatusCode::OK => Ok(()),
            status => Err(refused(OP, Effect::Write, status, &answer.body).key(instance)),
        }
    }

    /// The record in pieces, whose it is, and what of the metadata Consul takes as such.
    fn meta(&self, lease: &LeaseId, instance: &Instance) -> Result<Map<String, serde_json::Value>> {
        let record = String::from_utf8(JsonRecords.encode(instance).into()).expect("JSON is UTF-8");
        let mut meta = Map::new();
        meta.insert("quorate-namespace".to_owned(), json!(*self.namespace));
        meta.insert("quorate-lease".to_owned(), json!(lease.as_str()));
        let mut rest = record.as_str();
        for piece in 0.. {
            if rest.is_empty() {
                break;
            }
            if piece == RECORD_PAIRS {
                let message = format!("the record has {} bytes, more than Consul's metadata can hold", record.len());
                return Err(error(ErrorKind::InvalidInput, "register", message).key(instance));
            }
            let end =
                (1..=rest.len().min(META_VALUE)).rev().find(|end| rest.is_char_boundary(*end)).unwrap_or(rest.len());
            let (head, tail) = rest.split_at(end);
            meta.insert(format!("quorate-{piece}"), json!(head));
            rest = tail;
        }
        let fits = |key: &str, value: &str| {
            let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
            plain
                && !key.is_empty()
                && key.len() <= META_KEY
                && value.len() <= META_VALUE
                && !key.starts_with("consul-")
        };
        for (key, value) in instance.metadata.iter().filter(|(key, value)| fits(key, value)) {
            if meta.len() < META_PAIRS && !key.starts_with("quorate-") {
                meta.insert(key.clone(), json!(value));
            }
        }
        Ok(meta)
    }
}

/// The check of an instance. It names the lease, so that only the lease that registered the instance last passes it.
pub(crate) fn check_id(lease: &LeaseId, id: &str) -> String {
    format!("{lease}:{id}")
}

/// Takes an instance off the agent, if it still stands on this lease.
pub(crate) async fn remove(api: &Api, agent: usize, id: &str, lease: &LeaseId) -> Result<()> {
    match on_agent(api, id, agent).await? {
        Some(service) if lease_of(&service).as_ref() == Some(lease) => deregister(api, id, agent).await,
        _ => Ok(()),
    }
}

/// The service with that id on an agent.
async fn on_agent(api: &Api, id: &str, agent: usize) -> Result<Option<Service>> {
    const OP: &str = "look up";
    let answer = api.fetch(format!("/v1/agent/service/{}", url(id)), Some(agent)).await;
    let answer = answer.map_err(|f| f.into_error(OP, Effect::Read).key(id))?;
    match answer.status {
        StatusCode::OK => serde_json::from_slice(&answer.body)
            .map(Some)
            .map_err(|e| error(ErrorKind::Backend, OP, "the answer describes no service").key(id).because(e)),
        StatusCode::NOT_FOUND => Ok(None),
        status => Err(refused(OP, Effect::Read, status, &answer.body).key(id)),
    }
}

/// Whether a check on that agent is there and not critical.
async fn is_vouched_for(api: &Api, agent: usize, check: &str) -> Result<bool> {
    const OP: &str = "look up";
    let filter = url(&format!("CheckID == \"{check}\"")).to_string();
    let answer = api.fetch(format!("/v1/agent/checks?filter={filter}"), Some(agent)).await;
    let answer = answer.map_err(|f| f.into_error(OP, Effect::Read).key(check))?;
    if answer.status != StatusCode::OK {
        return Err(refused(OP, Effect::Read, answer.status, &answer.body).key(check));
    }
    let found: HashMap<String, AgentCheck> = serde_json::from_slice(&answer.body)
        .map_err(|e| error(ErrorKind::Backend, OP, "the answer lists no checks").key(check).because(e))?;
    Ok(found.get(check).is_some_and(|check| check.status != "critical"))
}

#[derive(Deserialize)]
struct AgentCheck {
    #[serde(rename = "Status")]
    status: String,
}

#[async_trait]
impl Catalog for Services {
    async fn publish(&self, lease: &LeaseId, instance: &Instance) -> Result<()> {
        let (agent, ttl) = self.leases.home(lease).ok_or_else(|| session_lost("register", lease))?;
        let id = self.id(&instance.service, &instance.id);
        self.register(agent, ttl, &id, lease, instance).await?;
        // It is passed with the next renewal. Not now: the agent writes every registration and every first pass to its
        // disk, one after another, and renewals have to wait for that.
        if !self.leases.attach(lease, &id) {
            // The lease ended meanwhile, and did not know of it.
            remove(&self.reader.api, agent, &id, lease).await?;
            return Err(session_lost("register", lease));
        }
        Ok(())
    }

    async fn withdraw(&self, lease: &LeaseId, instance: &Instance) -> Result<()> {
        let id = self.id(&instance.service, &instance.id);
        // Whoever has no home any more has had everything deregistered with it.
        let Some((agent, _)) = self.leases.home(lease) else { return Ok(()) };
        remove(&self.reader.api, agent, &id, lease).await?;
        self.leases.detach(lease, &id);
        Ok(())
    }

    async fn find(&self, lease: &LeaseId, service: &str, id: &str) -> Result<Option<Entry>> {
        // Where it would be written: on another agent it could not be seen.
        let (agent, _) = self.leases.home(lease).ok_or_else(|| session_lost("look up", lease))?;
        let on_agent = on_agent(&self.reader.api, &self.id(service, id), agent).await?;
        let Some(found) = on_agent else { return Ok(None) };
        let key = Key::new(&service_dir(service)?, id)?;
        let owner = lease_of(&found);
        // The agent keeps the service of a dead owner for a minute; nobody finds it any more.
        if let Some(owner) = owner.as_ref().filter(|owner| *owner != lease)
            && !is_vouched_for(&self.reader.api, agent, &check_id(owner, &found.id)).await?
        {
            return Ok(None);
        }
        let value = record_of(&found).unwrap_or_default().into();
        Ok(Some(Entry { key, value, created: Revision(0), modified: Revision(0), lease: owner }))
    }

    async fn watch(&self, service: &str) -> Result<Watch> {
        let (namespace, dir) = (self.namespace.clone(), service_dir(service)?);
        let name = Arc::new(Name { namespace, service: service.to_owned(), dir });
        self.reader.watch(Target::Service(name), self.life.clone()).await
    }
}

impl Name {
    /// Every instance that is alive, in order of the encoded ids.
    pub(crate) async fn read(&self, api: &Api, how: How) -> Result<Snapshot> {
        let path = format!("/v1/health/service/{}?", url(&self.service));
        let found = api.list_of::<Found>("watch", path, how).await.map_err(|e| e.key(&self.dir))?;
        let mut entries: HashMap<Key, Entry> = HashMap::with_capacity(found.items.len());
        for found in found.items.iter().filter(|found| found.service.service == self.service) {
            let Some(entry) = self.entry(found) else { continue };
            // The same id on two agents: the later one counts.
            let known = entries.get(&entry.key).is_some_and(|known| known.created >= entry.created);
            if !known {
                entries.insert(entry.key.clone(), entry);
            }
        }
        let mut entries: Vec<Entry> = entries.into_values().collect();
        entries.sort_unstable_by(|a, b| a.key.encoded().cmp(b.key.encoded()));
        Ok(Snapshot { entries, revision: Revision(found.index) })
    }

    fn entry(&self, found: &Found) -> Option<Entry> {
        let service = &found.service;
        let modified = found.checks.iter().map(|check| check.modify_index).max().unwrap_or(0);
        let (created, modified) = (Revision(service.create_index), Revision(modified.max(service.modify_index)));
        let critical = |check: &Check| check.status == "critical" || check.status == "maintenance";
        let ours = service.meta.as_ref().and_then(|meta| meta.get("quorate-namespace"));
        let (id, value) = match ours {
            Some(namespace) if **namespace != *self.namespace => return None,
            Some(_) => {
                // Without its check nobody vouches for it.
                let own = check_id(&lease_of(service)?, &service.id);
                if !found.checks.iter().any(|check| check.id == own && !critical(check)) {
                    return None;
                }
                let value = record_of(service)?;
                let mut instance = JsonRecords.decode(&self.service, "", value.as_bytes()).ok()?;
                let id = serde_json::from_str::<Id>(&value).ok()?.id;
                if found.checks.iter().any(critical) {
                    instance.health = Health::Failing;
                }
                (id.clone(), JsonRecords.encode(&instance.id(id)))
            }
            None => {
                let mut instance = foreign(&self.service, found);
                if found.checks.iter().any(critical) {
                    instance.health = Health::Failing;
                }
                (instance.id.clone(), JsonRecords.encode(&instance))
            }
        };
        let key = Key::new(&self.dir, &id).ok()?;
        Some(Entry { key, value, created, modified, lease: lease_of(service) })
    }
}

#[derive(Deserialize)]
struct Id {
    id: String,
}

/// An instance that another client registered; its id says on which node, because ids are the node's.
fn foreign(name: &str, found: &Found) -> Instance {
    let service = &found.service;
    let address = if service.address.is_empty() { &found.node.address } else { &service.address };
    let mut instance = Instance::new(name, address.as_str()).id(format!("{}/{}", found.node.node, service.id));
    instance.address.clone_from(address);
    instance.port = u16::try_from(service.port).unwrap_or(0);
    instance.tags = service.tags.iter().flatten().cloned().collect();
    instance.metadata = service.meta.iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    let weight = service.weights.as_ref().map_or(1, |weights| weights.passing);
    instance.weight = u32::try_from(weight).unwrap_or(1).clamp(1, MAX_WEIGHT);
    instance
}

fn lease_of(service: &Service) -> Option<LeaseId> {
    service.meta.as_ref()?.get("quorate-lease").map(|lease| LeaseId::new(lease.as_str()))
}

/// The record of an instance of ours, put together again.
fn record_of(service: &Service) -> Option<String> {
    let meta = service.meta.as_ref()?;
    let pieces: String =
        (0..RECORD_PAIRS).map_while(|i| meta.get(&format!("quorate-{i}"))).map(String::as_str).collect();
    (!pieces.is_empty()).then_some(pieces)
}

/// Consul takes ids that differ in case only for the same, and a slash ends some of its paths.
fn push_small(part: &str, out: &mut String) {
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' => out.push(char::from(byte)),
            _ => write!(out, "%{byte:02x}").expect("a String takes every write"),
        }
    }
}
