//! Whom to call: one endpoint, or the instances of a service as discovery shows them.
//!
//! Promise: a prepare goes only to an instance that takes requests; an outcome goes to any that is registered, those that
//! take requests first. Nobody is offered twice to one call. A connection that did not answer is not used again.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quorate_core::{
    balance::{Balancer, Ejection, Pick, Strategy},
    discovery::{Health, Instance, Instances, Service},
};
use tokio::time::Instant;
use tonic::transport::{self, Channel, Endpoint};

use crate::{message::Verb, options::GrpcOptions, status::Failure};

/// After how long without an answer a call that is given up speaks against the connection.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where calls go.
pub(crate) enum Peers {
    Fixed(Fixed),
    Found(Found),
}

/// One endpoint.
pub(crate) struct Fixed {
    /// Host and port, without what else may stand in a URI.
    name: String,
    endpoint: Box<Endpoint>,
    /// Made by the first call, and after one that was not answered.
    channel: Mutex<Option<Channel>>,
}

/// A service that is followed.
pub(crate) struct Found {
    service: Service,
    balancer: Balancer,
    options: GrpcOptions,
    /// Connections by the instance's id, with what they were made for.
    channels: Mutex<HashMap<String, (Arc<Instance>, Channel)>>,
}

impl Peers {
    pub(crate) fn fixed(endpoint: Endpoint) -> Self {
        let uri = endpoint.uri();
        let name = match uri.port() {
            Some(port) => format!("{}:{port}", uri.host().unwrap_or_default()),
            None => uri.host().unwrap_or("the endpoint").to_owned(),
        };
        Self::Fixed(Fixed { name, endpoint: Box::new(endpoint), channel: Mutex::default() })
    }

    pub(crate) fn found(service: Service, options: GrpcOptions) -> Self {
        let balancer = options.balancer.clone();
        let balancer =
            balancer.unwrap_or_else(|| Balancer::builder(Strategy::peak_ewma()).eject(Ejection::default()).build());
        balancer.follow(&service);
        Self::Found(Found { service, balancer, options, channels: Mutex::default() })
    }

    /// The service's name, or the endpoint's.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Fixed(fixed) => &fixed.name,
            Self::Found(found) => found.service.name(),
        }
    }

    /// The next to be asked by a call that has tried these; `None` if there is nobody else. What an instance says of itself
    /// may be of no use: then its id, and why.
    pub(crate) fn next(&self, verb: Verb, tried: &HashSet<String>) -> Option<Result<Peer<'_>, (String, Failure)>> {
        match self {
            Self::Fixed(fixed) => tried.is_empty().then(|| {
                let channel = lock(&fixed.channel).get_or_insert_with(|| fixed.endpoint.connect_lazy()).clone();
                Ok(Peer::new(self, fixed.name.clone(), fixed.name.clone(), channel, None))
            }),
            Self::Found(found) => {
                let (instance, pick) = found.next(verb, tried)?;
                let shown = format!("{} at {}", instance.id, instance.endpoint());
                Some(match found.channel(&instance) {
                    Ok(channel) => Ok(Peer::new(self, instance.id.clone(), shown, channel, pick)),
                    Err(error) => {
                        if let Some(pick) = pick {
                            pick.failure();
                        }
                        Err((instance.id.clone(), Failure::unsent(&format!("{shown}: no usable address: {error}"))))
                    }
                })
            }
        }
    }

    /// Why there is nobody to ask.
    pub(crate) fn nobody(&self, verb: Verb) -> String {
        let Self::Found(found) = self else { return "there is no endpoint".to_owned() };
        let (name, now) = (found.service.name(), found.service.now());
        let stale = match now.stale_for() {
            Some(time) => format!(" (the coordinator has not been heard of for {time:.0?})"),
            None => String::new(),
        };
        if now.is_empty() {
            return format!("no instance of {name:?} is registered{stale}");
        }
        let draining = now.iter().filter(|i| i.health == Health::Draining).count();
        let others = now.len() - now.passing().count() - draining;
        let all = now.len();
        match verb {
            Verb::Prepare => {
                format!(
                    "none of the {all} instances of {name:?} takes requests: {draining} draining, {others} failing{stale}"
                )
            }
            _ => format!("none of the {all} instances of {name:?} is left to be asked{stale}"),
        }
    }

    /// Later calls make a connection of their own.
    fn forget(&self, id: &str) {
        match self {
            Self::Fixed(fixed) => *lock(&fixed.channel) = None,
            Self::Found(found) => drop(lock(&found.channels).remove(id)),
        }
    }
}

impl Found {
    fn next(&self, verb: Verb, tried: &HashSet<String>) -> Option<(Arc<Instance>, Option<Pick>)> {
        let now = self.service.now();
        // A balancer has no memory of one call: it may offer the same again, or one that has just left.
        for _ in 0..2 * now.len() {
            let Some(pick) = self.balancer.pick() else { break };
            let current = now.get(&pick.instance().id).filter(|i| i.is_passing() && !tried.contains(&i.id));
            if let Some(current) = current {
                return Some((current.clone(), Some(pick)));
            }
        }
        let place = |health| match health {
            Health::Passing => 0,
            Health::Draining => 1,
            _ => 2,
        };
        let left = now.iter().filter(|i| !tried.contains(&i.id));
        let next = left.filter(|i| verb != Verb::Prepare || i.is_passing()).min_by_key(|i| place(i.health));
        next.map(|instance| (instance.clone(), None))
    }

    fn channel(&self, instance: &Arc<Instance>) -> Result<Channel, transport::Error> {
        let mut channels = lock(&self.channels);
        let known = channels.get(&instance.id).filter(|(made_for, _)| same_place(made_for, instance));
        if let Some((_, channel)) = known {
            return Ok(channel.clone());
        }
        let endpoint = self.options.make(instance)?;
        let channel = endpoint.connect_lazy();
        channels.insert(instance.id.clone(), (instance.clone(), channel.clone()));
        self.sweep(&mut channels, &self.service.now());
        Ok(channel)
    }

    /// Connections to instances that have gone are of no use; calls that are out keep theirs.
    fn sweep(&self, channels: &mut HashMap<String, (Arc<Instance>, Channel)>, now: &Instances) {
        channels.retain(|id, _| now.get(id).is_some());
    }
}

/// Whether one connection serves both: health and weight do not say where an instance is.
fn same_place(a: &Instance, b: &Instance) -> bool {
    (&a.address, a.port, &a.tags, &a.metadata, &a.zone) == (&b.address, b.port, &b.tags, &b.metadata, &b.zone)
}

/// One attempt of a call. Given up or failed after [`PATIENCE`], it speaks against the instance and its connection: HTTP/2
/// holds on to a connection that nobody answers on for as long as TCP does, which is a quarter of an hour.
pub(crate) struct Peer<'a> {
    peers: &'a Peers,
    pub(crate) id: String,
    /// For errors.
    pub(crate) shown: String,
    pub(crate) channel: Channel,
    pick: Option<Pick>,
    since: Instant,
    answered: bool,
}

impl<'a> Peer<'a> {
    fn new(peers: &'a Peers, id: String, shown: String, channel: Channel, pick: Option<Pick>) -> Self {
        Self { peers, id, shown, channel, pick, since: Instant::now(), answered: false }
    }

    /// The service has answered, whatever it said.
    pub(crate) fn answered(mut self) {
        self.answered = true;
        if let Some(pick) = self.pick.take() {
            pick.success();
        }
    }

    /// The connection failed.
    pub(crate) fn failed(mut self) {
        if let Some(pick) = self.pick.take() {
            pick.failure();
        }
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        if !self.answered && self.since.elapsed() >= PATIENCE {
            self.peers.forget(&self.id);
            if let Some(pick) = self.pick.take() {
                pick.failure();
            }
        }
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
