//! Records of services as Apache Curator's service discovery reads them.
//!
//! Promise: a Curator `ServiceDiscovery` with the base path `/<namespace>/services` finds our instances, and what it
//! registered are instances to us.
//!
//! The node is `<base>/<service>/<id>`, ephemeral; its value has Curator's fields `name`, `id`, `address`, `port`,
//! `sslPort`, `payload`, `registrationTimeUTC`, `serviceType` and `uriSpec`. What Curator has no field for is in the
//! payload, a `java.util.HashMap` with `tags`, `metadata`, `weight`, `zone` and `health`; an instance that has none of it
//! has no payload, so that clients without a payload class read it. One that takes no requests also has Curator's
//! `enabled: false`, which versions before 4 do not know.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use quorate_core::discovery::{Health, Instance, JsonRecords, RecordFormat};
use serde_json::{Map, Value, json};

#[derive(Debug)]
pub(crate) struct Curator;

/// The fields of our own record that Curator has no field for.
const EXTRA: [&str; 5] = ["tags", "metadata", "weight", "zone", "health"];

impl RecordFormat for Curator {
    fn encode(&self, instance: &Instance) -> Bytes {
        let plain = *instance == Instance::new("", "").of(instance);
        let payload = if plain {
            Value::Null
        } else {
            let mut all = json!(instance);
            let mut payload = Map::from_iter([("@class".to_owned(), json!("java.util.HashMap"))]);
            payload.extend(EXTRA.iter().filter_map(|name| Some(((*name).to_owned(), all.get_mut(name)?.take()))));
            Value::Object(payload)
        };
        // For people: nothing is decided by it.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut record = json!({
            "name": instance.service,
            "id": instance.id,
            "address": instance.address,
            "port": (instance.port != 0).then_some(instance.port),
            "sslPort": null,
            "payload": payload,
            "registrationTimeUTC": u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            "serviceType": "DYNAMIC",
            "uriSpec": null,
        });
        if !instance.is_passing() {
            record["enabled"] = json!(false);
        }
        record.to_string().into()
    }

    fn decode(&self, service: &str, id: &str, value: &[u8]) -> Result<Instance, String> {
        let record: Value = serde_json::from_slice(value)
            .map_err(|e| format!("not JSON, at line {} column {}", e.line(), e.column()))?;
        let mut fields = Map::new();
        if let Some(payload) = record["payload"].as_object() {
            fields.extend(EXTRA.iter().filter_map(|name| Some(((*name).to_owned(), payload.get(*name)?.clone()))));
        }
        for (name, value) in [("address", &record["address"]), ("port", &record["port"])] {
            if !value.is_null() {
                fields.insert(name.to_owned(), value.clone());
            }
        }
        if !fields.contains_key("port") && record["sslPort"].is_u64() {
            fields.insert("port".to_owned(), record["sslPort"].clone());
        }
        fields.insert("service".to_owned(), json!(service));
        fields.insert("id".to_owned(), json!(id));
        let mut instance = decode_fields(service, id, &fields).or_else(|why| {
            // Another client's payload may use our words for something else.
            let told = fields.keys().any(|name| EXTRA.contains(&name.as_str()));
            fields.retain(|name, _| !EXTRA.contains(&name.as_str()));
            if told { decode_fields(service, id, &fields) } else { Err(why) }
        })?;
        if record["enabled"] == json!(false) && instance.is_passing() {
            instance.health = Health::Draining;
        }
        Ok(instance)
    }
}

fn decode_fields(service: &str, id: &str, fields: &Map<String, Value>) -> Result<Instance, String> {
    JsonRecords.decode(service, id, Value::Object(fields.clone()).to_string().as_bytes())
}

/// The plain instance at the place of another one.
trait Of {
    fn of(self, other: &Instance) -> Self;
}

impl Of for Instance {
    fn of(mut self, other: &Instance) -> Self {
        self.service.clone_from(&other.service);
        self.id.clone_from(&other.id);
        self.address.clone_from(&other.address);
        self.port = other.port;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_comes_back_with_curators_fields() {
        let mut instance = Instance::new("s", "h:1").id("i").tag("t").weight(3).meta("k", "v").zone("z");
        instance.health = Health::Failing;
        let value = Curator.encode(&instance);
        assert_eq!(Curator.decode("s", "i", &value), Ok(instance));
        let seen: Value = serde_json::from_slice(&value).unwrap();
        assert_eq!((&seen["name"], &seen["port"], &seen["enabled"]), (&json!("s"), &json!(1), &json!(false)));
        let plain = Instance::new("s", "h").id("i");
        let value = Curator.encode(&plain);
        assert_eq!(Curator.decode("s", "i", &value), Ok(plain));
        let seen: Value = serde_json::from_slice(&value).unwrap();
        assert!(seen["payload"].is_null() && seen["port"].is_null() && seen.get("enabled").is_none());
    }

    #[test]
    fn what_curator_wrote_is_an_instance() {
        let value = br#"{"name":"s","id":"x","address":"10.0.0.1","port":80,"sslPort":null,"payload":{"@class":"a.B","weight":"heavy"},
            "registrationTimeUTC":1,"serviceType":"DYNAMIC","uriSpec":null,"enabled":false}"#;
        let instance = Curator.decode("s", "i", value).unwrap();
        assert_eq!((instance.endpoint().as_str(), instance.id.as_str(), instance.weight), ("10.0.0.1:80", "i", 1));
        assert_eq!(instance.health, Health::Draining);
        for bad in [&b"{}"[..], b"[]", b"", br#"{"address":7}"#, br#"{"address":"h","port":-1}"#] {
            assert!(Curator.decode("s", "i", bad).is_err());
        }
    }
}
