//! Registrations: an instance that others find for as long as this process wants.
//!
//! Promise: as [`presence`](crate::presence) says. An instance is found no longer than the session's TTL and the backend's
//! [`expiry_lag`](crate::Profile::expiry_lag) after its process died.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Health, Instance, JsonRecords, RecordFormat, Registry, catalog::Catalog, service_dir};
use crate::{
    backend::LeaseId,
    coordinator::Coordinator,
    error::{Error, Result},
    key::Key,
    presence::{KeySpot, Presence, PresenceState, PresenceStates, Spot},
};

/// A registered instance. Made by [`Coordinator::register`]. Dropping it deregisters in the background.
#[must_use = "the instance is deregistered as soon as this is dropped"]
pub struct Registration {
    instance: Mutex<Instance>,
    presence: Presence,
    format: &'static dyn RecordFormat,
}

impl Registration {
    pub(super) fn start(coord: &Coordinator, instance: Instance) -> Result<Self> {
        let backend = coord.backend();
        let told = |error: Error| error.on(backend.profile().backend);
        instance.validate().map_err(told)?;
        let dir = service_dir(&instance.service).map_err(told)?;
        let key = Key::new(&dir, &instance.id).map_err(told)?;
        let (spot, format): (Arc<dyn Spot>, &'static dyn RecordFormat) = match backend.registry() {
            Registry::Keys(format) => (Arc::new(KeySpot { backend: backend.clone(), key }), format),
            Registry::Native(catalog) => {
                let (service, id) = (instance.service.clone(), instance.id.clone());
                (Arc::new(CatalogSpot { catalog, service, id }), &JsonRecords)
            }
        };
        let value = encode(coord, format, &instance)?;
        let presence = Presence::start(coord, spot, value);
        Ok(Self { instance: Mutex::new(instance), presence, format })
    }

    /// The instance as it is wanted now.
    pub fn instance(&self) -> Instance {
        self.instance.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the instance can be found as it is wanted now.
    ///
    /// # Errors
    /// `Denied`, `InvalidInput` or `Unsupported` if the coordinator refuses the record: it is asked again, with pauses,
    /// for as long as this value lives. `SessionLost` if it was closed.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn ready(&self) -> Result<()> {
        self.presence.settled().await
    }

    /// Changes what the instance says of itself. Nothing is awaited, and nothing is lost: also during an outage, what is
    /// wanted last is what will be found. [`ready`](Self::ready) waits for it.
    ///
    /// # Errors
    /// `InvalidInput` for a bad value, or if the change touches service or id; `SessionLost` if it was closed.
    pub fn update(&self, change: impl FnOnce(&mut Instance)) -> Result<()> {
        self.presence.change(|| {
            let mut now = self.instance.lock().unwrap_or_else(PoisonError::into_inner);
            let mut wanted = now.clone();
            change(&mut wanted);
            if (&wanted.service, &wanted.id) != (&now.service, &now.id) {
                return Err(
                    Error::invalid("update", "service and id say which instance it is; register another").key(&*now)
                );
            }
            wanted.validate()?;
            let value = encode(self.presence.coord(), self.format, &wanted)?;
            *now = wanted;
            Ok(value)
        })
    }

    /// From now on no new requests: balancers leave it out. The same as an [`update`](Self::update) of the health.
    ///
    /// # Errors
    /// As for [`update`](Self::update).
    pub fn drain(&self) -> Result<()> {
        self.update(|instance| instance.health = Health::Draining)
    }

    /// Where it stands.
    pub fn state(&self) -> PresenceState {
        self.presence.state()
    }

    /// Follows the state: the current one first, then every change. States in between may be skipped.
    pub fn states(&self) -> PresenceStates {
        self.presence.states()
    }

    /// Deregisters, and waits until the instance cannot be found any more. A second call changes nothing.
    ///
    /// # Errors
    /// `SessionLost` if the runtime was shut down meanwhile.
    ///
    /// # Cancel safety
    /// The first poll deregisters; the background finishes.
    pub async fn close(&self) -> Result<()> {
        self.presence.close().await
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({}, {:?})", self.instance(), self.state())
    }
}

/// What could never be stored is refused before anything is sent.
fn encode(coord: &Coordinator, format: &dyn RecordFormat, instance: &Instance) -> Result<Bytes> {
    let (value, profile) = (format.encode(instance), coord.profile());
    if value.len() > profile.max_value {
        let message = format!("the record has {} bytes, at most {} fit", value.len(), profile.max_value);
        return Err(Error::invalid("register", message).key(instance).on(profile.backend));
    }
    Ok(value)
}

/// A record in a server's own catalog.
#[derive(Debug)]
struct CatalogSpot {
    catalog: Arc<dyn Catalog>,
    service: String,
    id: String,
}

impl CatalogSpot {
    fn instance(&self, value: &[u8]) -> Result<Instance> {
        let decoded = JsonRecords.decode(&self.service, &self.id, value);
        decoded.map_err(|why| Error::invalid("register", why).key(&self.id))
    }
}

#[async_trait]
impl Spot for CatalogSpot {
    fn name(&self) -> String {
        // No name has a zero byte in its encoded form, and these are not keys.
        format!("service\0{}\0{}", self.service, self.id)
    }

    async fn put(&self, lease: &LeaseId, value: &Bytes) -> Result<()> {
        self.catalog.publish(lease, &self.instance(value)?).await
    }

    async fn take(&self, lease: &LeaseId) -> Result<()> {
        // The catalog asks for service and id; the rest is of no account.
        self.catalog.withdraw(lease, &Instance::new(&*self.service, "gone").id(&*self.id)).await
    }

    async fn look(&self, lease: &LeaseId) -> Result<Option<(Bytes, bool)>> {
        let found = self.catalog.find(lease, &self.service, &self.id).await?;
        Ok(found.map(|entry| {
            let ours = entry.lease.as_ref() == Some(lease);
            // In the form in which it is compared.
            let value = JsonRecords.decode(&self.service, &self.id, &entry.value).map(|i| JsonRecords.encode(&i));
            (value.unwrap_or_default(), ours)
        }))
    }
}
