//! What a service says about one of its instances.
//!
//! Promise: what was registered is what others find, on every backend; what a foreign client wrote is read as far as
//! its layout says it, with the defaults of [`Instance::new`] for the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The largest weight of an instance.
pub const MAX_WEIGHT: u32 = 1_000_000;

/// One instance of a service.
///
/// Equal services and ids mean the same instance; the rest is what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Instance {
    /// The service it belongs to. Any name that a [`Key`](crate::Key) may have.
    pub service: String,
    /// Its name within the service.
    pub id: String,
    /// A host name or an IP address, without brackets.
    pub address: String,
    /// The port; zero where the service has none.
    #[serde(default)]
    pub port: u16,
    /// Words to filter by.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub tags: BTreeSet<String>,
    /// Anything else that clients shall know. Not secret: everybody who may read the namespace reads it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Its share of the requests, from 1 to [`MAX_WEIGHT`], relative to the others.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Where it runs, for balancers that prefer what is near.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Whether it takes requests.
    #[serde(default)]
    pub health: Health,
}

/// Whether an instance takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Health {
    /// It does.
    #[default]
    Passing,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// It is registered, but a check of the coordinator or of itself says that it does not work.
    Failing,
}

fn default_weight() -> u32 {
    1
}

impl Instance {
    /// An instance with one `host:port`, weight 1, no tags, no zone, taking requests. IPv6 addresses may stand in
    /// brackets. Its id is the address, until [`id`](Self::id) says otherwise.
    ///
    /// A bad address is told when the instance is registered, as are all other bad values.
    pub fn new(service: impl Into<String>, address: impl Into<String>) -> Self {
        let given = address.into();
        let (address, port) = split(&given);
        Self {
            service: service.into(),
            id: given,
            address,
            port,
            tags: BTreeSet::new(),
            metadata: BTreeMap::new(),
            weight: 1,
            zone: None,
            health: Health::Passing,
        }
    }

    /// Sets the id.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Adds a tag.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.insert(tag.into());
        self
    }

    /// Adds a piece of metadata, or replaces it.
    #[must_use]
    pub fn meta(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }

    /// Sets the weight.
    #[must_use]
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Sets the zone.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// `host:port`, with brackets around an IPv6 address; the bare address where there is no port.
    pub fn endpoint(&self) -> String {
        match (self.port, self.address.contains(':')) {
            (0, _) => self.address.clone(),
            (port, true) => format!("[{}]:{port}", self.address),
            (port, false) => format!("{}:{port}", self.address),
        }
    }

    /// Whether it takes requests.
    pub fn is_passing(&self) -> bool {
        self.health == Health::Passing
    }

    /// `Ok` if it may be registered.
    ///
    /// # Errors
    /// `InvalidInput` for an empty service, id or address, or a weight out of bounds.
    pub fn validate(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::invalid("register", what).key(self));
        for (what, value) in [("service", &self.service), ("id", &self.id), ("address", &self.address)] {
            if value.is_empty() {
                return refuse(format!("the {what} is empty"));
            }
        }
        if !(1..=MAX_WEIGHT).contains(&self.weight) {
            return refuse(format!(
                "the weight is {}, not from 1 to {MAX_WEIGHT}; to take no requests, drain",
                self.weight
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.id)
    }
}

/// The host and the port of `host:port`; port zero where there is none.
fn split(given: &str) -> (String, u16) {
    let bare = given.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if let Some(host) = bare {
        return (host.to_owned(), 0);
    }
    match given.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?))) {
        Some((host, port)) => {
            let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
            // A bare IPv6 address has no port, although its last group may look like one.
            if host.contains(':') && !given.starts_with('[') { (given.to_owned(), 0) } else { (host.to_owned(), port) }
        }
        None => (given.to_owned(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_apart_and_together_again() {
        for (given, address, port) in [
            ("10.0.0.7:8080", "10.0.0.7", 8080),
            ("host", "host", 0),
            ("[::1]:80", "::1", 80),
            ("::1", "::1", 0),
            ("fe80::1:80", "fe80::1:80", 0),
            ("host:http", "host:http", 0),
        ] {
            let instance = Instance::new("s", given);
            assert_eq!((instance.address.as_str(), instance.port), (address, port), "{given}");
            assert_eq!(instance.endpoint(), given);
        }
        assert_eq!(Instance::new("s", "[::1]").address, "::1");
    }

    #[test]
    fn bad_instances_are_refused() {
        let good = Instance::new("s", "h:1");
        assert!(good.validate().is_ok());
        for bad in [
            Instance::new("", "h:1"),
            Instance::new("s", ""),
            good.clone().id(""),
            good.clone().weight(0),
            good.weight(MAX_WEIGHT + 1),
        ] {
            assert_eq!(bad.validate().expect_err("bad").kind(), crate::ErrorKind::InvalidInput, "{bad}");
        }
    }
}
