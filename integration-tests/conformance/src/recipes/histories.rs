//! Histories of keys under faults, checked for linearizability.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use quorate_core::{ErrorKind, Kv, Result, Revision, Swap, kv::KeyValue};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{chaos::troubled, coord};
use crate::{
    Clients,
    history::{self, Answer, Call, Event, Order, Reads},
    support::{cases, spawn, within},
};

cases!("history":
    histories_of_keys_are_linearizable_in_calm,
    histories_of_keys_are_linearizable_under_chaos,
);

const CLIENTS: usize = 5;
const EACH: usize = 45;
const KEYS: [&str; 3] = ["x", "y", "z"];

/// One client of the register: it remembers what it saw last, which is what it swaps and deletes against.
struct Client {
    id: usize,
    kv: Kv,
    rng: StdRng,
    values: Arc<AtomicU64>,
    order: Arc<Order>,
    seen: [Option<(u64, Revision)>; KEYS.len()],
    events: [Vec<Event>; KEYS.len()],
}

impl Client {
    fn fresh(&self) -> u64 {
        self.values.fetch_add(1, Ordering::Relaxed)
    }

    async fn step(&mut self) {
        let key = self.rng.random_range(0..KEYS.len());
        let seen = self.seen[key];
        let call = match (self.rng.random_range(0..10), seen) {
            (0..4, _) => Call::Get,
            (4, _) => Call::Put(self.fresh()),
            (5, _) | (_, None) => Call::Create(self.fresh()),
            (6, Some((from, _))) => Call::Delete { from },
            (_, Some((from, _))) => Call::Swap { from, to: self.fresh() },
        };
        let revision = seen.map_or(Revision(0), |(_, revision)| revision);
        let began = self.order.tick();
        let answer = match self.make(KEYS[key], key, call, revision).await {
            Ok(answer) => answer,
            Err(error) if error.kind() == ErrorKind::Ambiguous => Answer::Unknown,
            // Surely nothing happened, so there is nothing to explain. Other kinds have no place here.
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
                return;
            }
        };
        self.events[key].push(Event { client: self.id, call, answer, began, ended: self.order.tick() });
    }

    async fn make(&mut self, name: &str, key: usize, call: Call, at: Revision) -> Result<Answer> {
        let swapped = |swap| match swap {
            Swap::Applied(revision) => Some(revision),
            Swap::Conflict(_) | Swap::Missing => None,
        };
        let (value, applied) = match call {
            Call::Get => {
                self.seen[key] = self.kv.get(name).await?.map(|entry| (number(&entry), entry.modified));
                return Ok(Answer::Found(self.seen[key].map(|(value, _)| value)));
            }
            Call::Put(value) => (Some(value), Some(self.kv.put(name, value.to_string()).await?)),
            Call::Create(value) => (Some(value), self.kv.create(name, value.to_string()).await?),
            Call::Swap { to, .. } => (Some(to), swapped(self.kv.compare_and_swap(name, at, to.to_string()).await?)),
            Call::Delete { .. } => (None, swapped(self.kv.compare_and_delete(name, at).await?)),
        };
        let Some(revision) = applied else { return Ok(Answer::Refused) };
        self.seen[key] = value.map(|value| (value, revision));
        Ok(Answer::Applied)
    }
}

fn number(entry: &KeyValue) -> u64 {
    String::from_utf8_lossy(&entry.value).parse().expect("a number was stored")
}

async fn record(clients: &Arc<dyn Clients>, chaos: bool) {
    let (values, order) = (Arc::new(AtomicU64::new(1)), Arc::new(Order::default()));
    let reads = match coord(clients).await.profile().linearizable_reads {
        true => Reads::Linearizable,
        false => Reads::Sequential,
    };
    let mut tasks = Vec::new();
    for id in 0..CLIENTS {
        let seed = id as u64 + 100;
        let coord = if chaos { troubled(clients, seed).await } else { coord(clients).await };
        let rng = StdRng::seed_from_u64(seed);
        let (seen, events) = Default::default();
        let mut client = Client { id, kv: coord.kv(), rng, values: values.clone(), order: order.clone(), seen, events };
        tasks.push(spawn(async move {
            for _ in 0..EACH {
                client.step().await;
            }
            client.events
        }));
    }
    let mut histories: [Vec<Event>; KEYS.len()] = Default::default();
    for task in &mut tasks {
        let events = within(Duration::from_secs(50), "all calls", &mut task.0).await.expect("no task fails");
        for (history, events) in histories.iter_mut().zip(events) {
            history.extend(events);
        }
    }
    let answered = histories.iter().flatten().filter(|event| event.answer != Answer::Unknown).count();
    // Too few answers would be explained by anything.
    assert!(answered * 10 > CLIENTS * EACH * 3, "only {answered} calls were answered: the run is void");
    for (key, history) in KEYS.iter().zip(&histories) {
        if let Err(why) = history::check(history, reads) {
            panic!("the history of {key} is not {reads:?}: {why}");
        }
    }
}

async fn histories_of_keys_are_linearizable_in_calm(clients: Arc<dyn Clients>) {
    record(&clients, false).await;
}

async fn histories_of_keys_are_linearizable_under_chaos(clients: Arc<dyn Clients>) {
    record(&clients, true).await;
}
