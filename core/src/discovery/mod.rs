//! Discovery: services register their instances, others find them, and an outage of the coordinator takes nobody down.
//!
//! Promise: a registered instance is found on every backend for as long as its process lives and wants to be found, and
//! no longer than the session's TTL and the backend's expiry lag after it died. A consumer always has the last good set at
//! hand, knows how old it may be, and never sees it emptied by an error.
//!
//! ```
//! # use quorate_core::{Coordinator, discovery::Instance};
//! # async fn show(coord: Coordinator) -> quorate_core::Result<()> {
//! let registration = coord.register(Instance::new("orders", "10.0.0.7:8080").tag("v2").zone("eu-1"))?;
//! registration.ready().await?;
//!
//! let mut orders = coord.discover("orders").await?;
//! for instance in orders.now().passing() {
//!     println!("{} at {}", instance.id, instance.endpoint());
//! }
//! let next = orders.changed().await;
//! # drop(next); Ok(())
//! # }
//! ```
//!
//! # On the wire
//! Where the backend keeps records as keys, they are `services/<service>/<id>` of the namespace, on the lease of the
//! session, in the format that its [`Registry`] names; otherwise see the backend's crate.

mod catalog;
mod instance;
mod registration;
mod service;

pub use catalog::{Catalog, JsonRecords, RecordFormat, Registry};
pub use instance::{Health, Instance, MAX_WEIGHT};
pub use registration::Registration;
pub use service::{DiscoverOptions, Instances, Service};

pub use crate::presence::{PresenceState, PresenceStates};
use crate::{coordinator::Coordinator, error::Result, key::Dir};

/// Where the records of a service are, for backends that keep them as keys.
///
/// # Errors
/// `InvalidInput` for an empty or over-long name.
pub fn service_dir(service: &str) -> Result<Dir> {
    Dir::new(["services", service])
}

impl Coordinator {
    /// Registers an instance and keeps it registered until the value is dropped or closed, on the coordinator's own
    /// session. Returns at once; [`Registration::ready`] waits until it can be found. Must be called within a runtime.
    ///
    /// An instance with the same service and id that is registered already is replaced; see
    /// [`PresenceState::Displaced`].
    ///
    /// # Errors
    /// `InvalidInput` for an instance that cannot be registered.
    pub fn register(&self, instance: Instance) -> Result<Registration> {
        Registration::start(self, instance)
    }

    /// The instances of a service, kept up to date. The first set has been read when this returns.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name; otherwise what the backend says. Once this has returned, no error ends it.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn discover(&self, service: &str) -> Result<Service> {
        self.discover_with(service, &DiscoverOptions::default()).await
    }

    /// As [`discover`](Self::discover), with options.
    ///
    /// # Errors
    /// As for [`discover`](Self::discover).
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn discover_with(&self, service: &str, options: &DiscoverOptions) -> Result<Service> {
        Service::open(self, service, options).await
    }
}
