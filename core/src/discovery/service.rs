//! The consumer's side: the instances of one service, always at hand.
//!
//! Promise: a look costs no I/O and is never emptied by an error; see [`presence::view`](crate::presence).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{sync::watch, time::Instant};

use super::{Instance, JsonRecords, RecordFormat, Registry, catalog::Catalog, service_dir};
use crate::{
    backend::{Backend, Entry, Revision},
    coordinator::Coordinator,
    error::Result,
    key::KeyRange,
    presence::view::{self, Sight, Source},
    watch::Watch,
};

/// How a service is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiscoverOptions {
    /// For how long after an outage no instance is taken out: the time in which those that are alive register again at a
    /// server that lost its data, or their leases. Zero gives up at once what a server does not show. Between outages an
    /// instance that goes is gone at once.
    pub linger: Duration,
}

impl Default for DiscoverOptions {
    fn default() -> Self {
        Self { linger: Duration::from_secs(15) }
    }
}

/// The instances of one service, kept up to date. Made by [`Coordinator::discover`]; cheap to clone, all clones share one
/// watch, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Service {
    name: Arc<str>,
    told: watch::Receiver<Arc<Sight<Instance>>>,
}

/// The instances of a service at one moment.
#[derive(Debug, Clone)]
pub struct Instances {
    sight: Arc<Sight<Instance>>,
}

impl Service {
    pub(super) async fn open(coord: &Coordinator, name: &str, options: &DiscoverOptions) -> Result<Self> {
        let dir = service_dir(name).map_err(|e| e.on(coord.profile().backend))?;
        let home = match coord.backend().registry() {
            Registry::Keys(format) => {
                let range = KeyRange::prefix(&dir, "")?;
                Home::Keys { backend: coord.backend().clone(), range, format }
            }
            Registry::Native(catalog) => Home::Native(catalog),
        };
        let name: Arc<str> = name.into();
        let mut told = view::open(Records { service: name.clone(), home }, options.linger).await?;
        told.mark_changed();
        Ok(Self { name, told })
    }

    /// The service's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The instances as they are known now. No I/O.
    pub fn now(&self) -> Instances {
        Instances { sight: self.told.borrow().clone() }
    }

    /// Waits for the next set that differs from the one this handle was given last. The first call returns the current
    /// one. Sets in between may be skipped, never the last.
    ///
    /// # Cancel safety
    /// Safe: a set is taken only when this returns it.
    pub async fn changed(&mut self) -> Instances {
        if self.told.changed().await.is_err() {
            // The task ends with the last handle, or with the runtime: there is nothing more to come.
            std::future::pending::<()>().await;
        }
        Instances { sight: self.told.borrow_and_update().clone() }
    }

    /// Waits until a set fulfils the condition, which may be the current one.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn until(&self, mut condition: impl FnMut(&Instances) -> bool) -> Instances {
        let mut handle = Self { name: self.name.clone(), told: self.told.clone() };
        handle.told.mark_changed();
        loop {
            let now = handle.changed().await;
            if condition(&now) {
                return now;
            }
        }
    }
}

impl Instances {
    /// All of them, in order of their ids, whatever their health.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Instance>> {
        self.sight.items.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sight.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sight.items.is_empty()
    }

    /// The one with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Instance>> {
        self.sight.items.get(id)
    }

    /// Those that take requests.
    pub fn passing(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.iter().filter(|instance| instance.is_passing())
    }

    /// Those that carry the tag.
    pub fn tagged<'a>(&'a self, tag: &'a str) -> impl Iterator<Item = &'a Arc<Instance>> {
        self.iter().filter(move |instance| instance.tags.contains(tag))
    }

    /// Those in the zone.
    pub fn in_zone<'a>(&'a self, zone: &'a str) -> impl Iterator<Item = &'a Arc<Instance>> {
        self.iter().filter(move |instance| instance.zone.as_deref() == Some(zone))
    }

    /// Since when the coordinator has not been heard of; `None` while the set is up to date.
    pub fn stale_since(&self) -> Option<Instant> {
        self.sight.stale_since
    }

    /// For how long the coordinator has not been heard of; `None` while the set is up to date.
    pub fn stale_for(&self) -> Option<Duration> {
        self.sight.stale_since.map(|since| since.elapsed())
    }

    /// The store's revision of this set, or the highest that it shows.
    pub fn revision(&self) -> Revision {
        self.sight.revision
    }

    /// Records below the service's name that are left out because they could not be read: their names, and why.
    pub fn unreadable(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.sight.unreadable.iter().map(|(name, why)| (name.as_str(), &**why))
    }
}

#[derive(Debug)]
struct Records {
    service: Arc<str>,
    home: Home,
}

#[derive(Debug)]
enum Home {
    Keys { backend: Arc<dyn Backend>, range: KeyRange, format: &'static dyn RecordFormat },
    Native(Arc<dyn Catalog>),
}

#[async_trait]
impl Source for Records {
    type Item = Instance;

    async fn watch(&self) -> Result<Watch> {
        match &self.home {
            Home::Keys { backend, range, .. } => backend.watch(range).await,
            Home::Native(catalog) => catalog.watch(&self.service).await,
        }
    }

    fn read(&self, entry: &Entry) -> Result<Instance, String> {
        let id = entry.key.name().ok_or("the id is not encoded as ours are")?;
        let format: &dyn RecordFormat = match &self.home {
            Home::Keys { format, .. } => *format,
            Home::Native(_) => &JsonRecords,
        };
        let instance = format.decode(&self.service, &id, &entry.value)?;
        // Others may write what we would refuse.
        instance.validate().map_err(|error| error.to_string())?;
        Ok(instance)
    }
}
