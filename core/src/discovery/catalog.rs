//! Where a coordinator keeps the records of services.
//!
//! Promise: recipes see one kind of record. A backend says once, by its [`Registry`], whether records are keys in a
//! layout that other clients of its server read, or live in a catalog that the server has by itself.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

use super::Instance;
use crate::{
    backend::{Entry, LeaseId},
    error::Result,
    watch::Watch,
};

/// How a backend keeps the records of services.
#[derive(Debug, Clone)]
pub enum Registry {
    /// As keys `services/<service>/<id>` on the session's lease, with values in this format.
    Keys(&'static dyn RecordFormat),
    /// In a catalog of the server's own.
    Native(Arc<dyn Catalog>),
}

/// The form of a service's record, as other clients of the same server know it.
pub trait RecordFormat: fmt::Debug + Send + Sync {
    /// The value to store. It must hold everything that [`decode`](Self::decode) needs to give the same instance back.
    fn encode(&self, instance: &Instance) -> Bytes;

    /// The instance in a value, which another client may have written.
    ///
    /// # Errors
    /// What is wrong with it, in words; without the value, which may be anything.
    fn decode(&self, service: &str, id: &str, value: &[u8]) -> Result<Instance, String>;
}

/// A server's own service catalog.
///
/// Records are given and returned as keys of the directory `services/<service>` with values in [`JsonRecords`], whatever
/// the server makes of them; instances that other clients registered are among them.
#[async_trait]
pub trait Catalog: fmt::Debug + Send + Sync + 'static {
    /// Creates or replaces the record; from then on it ends with the lease. May be repeated.
    ///
    /// # Errors
    /// `SessionLost` if the lease has ended, `InvalidInput` for what the server cannot store.
    async fn publish(&self, lease: &LeaseId, instance: &Instance) -> Result<()>;

    /// Takes the record away if it stands on this lease. May be repeated.
    async fn withdraw(&self, lease: &LeaseId, instance: &Instance) -> Result<()>;

    /// The record as it is now where the lease's owner would write it, with the lease it stands on if that is known; `None`
    /// if there is none.
    ///
    /// # Errors
    /// `SessionLost` if the lease has ended.
    async fn find(&self, lease: &LeaseId, service: &str, id: &str) -> Result<Option<Entry>>;

    /// Watches all records of a service, as [`Backend::watch`](crate::Backend::watch) does keys.
    async fn watch(&self, service: &str) -> Result<Watch>;
}

/// quorate's own form: the fields of [`Instance`] as a JSON object.
///
/// `{"service":"orders","id":"orders-7","address":"10.0.0.7","port":8080,"tags":["v2"],"metadata":{"build":"abc"},
/// "weight":1,"zone":"eu-1","health":"passing"}`; fields at their default may be missing, unknown ones are ignored.
#[derive(Debug, Clone, Copy)]
pub struct JsonRecords;

impl RecordFormat for JsonRecords {
    fn encode(&self, instance: &Instance) -> Bytes {
        serde_json::to_vec(instance).expect("strings and numbers are always JSON").into()
    }

    fn decode(&self, service: &str, id: &str, value: &[u8]) -> Result<Instance, String> {
        let instance: Instance = serde_json::from_slice(value)
            .map_err(|e| format!("not the JSON of an instance, at line {} column {}", e.line(), e.column()))?;
        // The place decides: a record that was copied is not the instance it was copied from.
        Ok(Instance { service: service.to_owned(), id: id.to_owned(), ..instance })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_comes_back_as_it_was() {
        let instance = Instance::new("s", "[::1]:80").id("é/..").tag("a").tag("b").meta("k", "v\n").weight(7).zone("z");
        let value = JsonRecords.encode(&instance);
        assert_eq!(JsonRecords.decode("s", "é/..", &value), Ok(instance));
        let sparse = br#"{"service":"x","id":"y","address":"h","later":{"field":1}}"#;
        assert_eq!(JsonRecords.decode("s", "i", sparse), Ok(Instance::new("s", "h").id("i")));
    }

    #[test]
    fn garbage_is_told_without_repeating_it() {
        let error = JsonRecords.decode("s", "i", b"{\"hunter2").expect_err("no JSON");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
