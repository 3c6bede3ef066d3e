//! Records of services as Go's gRPC naming (`client/v3/naming/endpoints`) reads them.
//!
//! Promise: a Go client that resolves `<namespace>/services/<service>` gets our instances' addresses, and its own
//! endpoints are instances to us.
//!
//! The value is `{"Op":0,"Addr":"host:port","Metadata":{"quorate":{…}}}`; below `quorate` is the record of
//! [`JsonRecords`]. Of an endpoint that another client wrote, the address is known, and what of its metadata are strings.
//! gRPC naming has no health: its clients see draining instances like all others.

use bytes::Bytes;
use quorate_core::discovery::{Instance, JsonRecords, RecordFormat};
use serde_json::{Value, json};

#[derive(Debug)]
pub(crate) struct GrpcNaming;

impl RecordFormat for GrpcNaming {
    fn encode(&self, instance: &Instance) -> Bytes {
        json!({ "Op": 0, "Addr": instance.endpoint(), "Metadata": { "quorate": instance } }).to_string().into()
    }

    fn decode(&self, service: &str, id: &str, value: &[u8]) -> Result<Instance, String> {
        let record: Value = serde_json::from_slice(value)
            .map_err(|e| format!("not JSON, at line {} column {}", e.line(), e.column()))?;
        let metadata = &record["Metadata"];
        if let Some(ours) = metadata.get("quorate") {
            return JsonRecords.decode(service, id, ours.to_string().as_bytes());
        }
        let address = record["Addr"].as_str().filter(|address| !address.is_empty()).ok_or("it has no Addr")?;
        let mut instance = Instance::new(service, address).id(id);
        for (name, value) in metadata.as_object().into_iter().flatten() {
            if let Some(text) = value.as_str() {
                instance = instance.meta(name, text);
            }
        }
        Ok(instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_comes_back_and_go_reads_its_address() {
        let instance = Instance::new("s", "h:1").id("i").tag("t").weight(3).meta("k", "v");
        let value = GrpcNaming.encode(&instance);
        assert_eq!(GrpcNaming.decode("s", "i", &value), Ok(instance));
        let seen: Value = serde_json::from_slice(&value).unwrap();
        assert_eq!((&seen["Op"], &seen["Addr"]), (&json!(0), &json!("h:1")));
    }

    #[test]
    fn what_go_wrote_is_an_instance() {
        let value = br#"{"Op":0,"Addr":"10.0.0.1:80","Metadata":null}"#;
        assert_eq!(GrpcNaming.decode("s", "i", value), Ok(Instance::new("s", "10.0.0.1:80").id("i")));
        let value = br#"{"Op":0,"Addr":"h:80","Metadata":{"build":"7","n":1}}"#;
        assert_eq!(GrpcNaming.decode("s", "i", value), Ok(Instance::new("s", "h:80").id("i").meta("build", "7")));
        for bad in [&b"{}"[..], b"[]", b"", br#"{"Addr":7}"#, br#"{"Metadata":{"quorate":{}}}"#] {
            assert!(GrpcNaming.decode("s", "i", bad).is_err());
        }
    }
}
