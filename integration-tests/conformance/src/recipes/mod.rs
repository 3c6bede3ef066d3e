//! Cases about the recipes: sessions, locks, elections, keys and values, through the layers that applications use.
//!
//! Promise: as for the waist, no case knows its backend; what is counted, is counted by a layer.

mod atomic;
mod atomic_crash;
mod atomic_keys;
mod atomic_remote;
#[cfg(test)]
mod atomic_script;
mod book;
mod cancel;
mod chaos;
mod clock;
mod counting;
mod discovery;
mod election;
mod election_faults;
mod election_turns;
mod events;
mod fairness;
mod group;
mod heartbeat;
mod histories;
mod keys;
mod late;
mod locks;
mod loss;
mod partition;
mod recovery;
mod registrations;
mod sessions;
mod stm;

use std::{sync::Arc, time::Duration};

use quorate_core::{Backend, Coordinator, SessionOptions, layer::Stack};

use crate::{Case, Clients};

pub(crate) fn cases() -> Vec<Case> {
    [
        locks::cases(),
        fairness::cases(),
        loss::cases(),
        sessions::cases(),
        keys::cases(),
        cancel::cases(),
        chaos::cases(),
        counting::cases(),
        clock::cases(),
        late::cases(),
        stm::cases(),
        histories::cases(),
        discovery::cases(),
        registrations::cases(),
        group::cases(),
        partition::cases(),
        heartbeat::cases(),
        recovery::cases(),
        election::cases(),
        election_turns::cases(),
        election_faults::cases(),
        atomic::cases(),
        atomic_crash::cases(),
        atomic_remote::cases(),
        atomic_keys::cases(),
    ]
    .concat()
}

/// What `quorate::connect` puts around a backend.
pub(crate) fn standard(backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
    Stack::new(backend).standard(Duration::from_secs(10)).build()
}

/// A coordinator on a client of its own, whose session outlasts any pause of a busy machine.
pub(crate) async fn coord(clients: &Arc<dyn Clients>) -> Coordinator {
    coord_over(standard(crate::support::client(clients).await), Duration::from_secs(30))
}

/// A coordinator whose session has the short TTL.
pub(crate) async fn short_coord(clients: &Arc<dyn Clients>) -> Coordinator {
    coord_over(standard(crate::support::client(clients).await), clients.ttl())
}

pub(crate) fn coord_over(backend: Arc<dyn Backend>, ttl: Duration) -> Coordinator {
    Coordinator::new(backend, SessionOptions { ttl, owner: "conformance".to_owned() })
}

/// The tickets that stand in a lock's line.
pub(crate) async fn tickets(coord: &Coordinator, name: &str) -> usize {
    let status = coord.lock(name).status().await.expect("a lock can be looked at");
    usize::from(status.holder.is_some()) + status.waiting
}

/// Waits until so many tickets stand in a lock's line.
pub(crate) async fn until_tickets(coord: &Coordinator, name: &str, count: usize) {
    crate::support::eventually(&format!("{count} tickets in the line"), async || tickets(coord, name).await == count)
        .await;
}
