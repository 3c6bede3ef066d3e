//! What a pick costs: the balancers with 10, 100 and 1,000 instances, for one task and for eight.
//!
//! A pick here is all that a request needs: `pick_for` with a key of its own, and `success`, with the two looks at the
//! clock that measure its latency. The weights go from 1 to 10. Nothing else is in flight, so that the search for the
//! fewest requests finds nothing but equals, which is its worst case.

use std::{sync::Arc, time::Duration};

use quorate::{
    balance::{Balancer, Ejection, Strategy},
    discovery::Instance,
};
use tokio::{runtime::Runtime, time::Instant};

use crate::{
    Outcome,
    report::{Figure, Report, Row, Target},
    samples::{Budget, Spread},
};

const TASKS: u32 = 8;
/// For each task: enough that starting eight tasks does not count.
const BLOCK: u32 = 2_000;

struct Subject {
    what: String,
    balancer: Balancer,
    alone: Spread,
    together: Spread,
}

fn strategies() -> [(&'static str, Strategy); 8] {
    [
        ("round robin", Strategy::RoundRobin),
        ("random", Strategy::Random),
        ("sticky", Strategy::Sticky),
        ("weighted", Strategy::Weighted),
        ("least requests", Strategy::LeastRequests),
        ("two choices, peak EWMA", Strategy::peak_ewma()),
        ("consistent hash", Strategy::ConsistentHash),
        ("bounded hash", Strategy::BoundedHash { percent: 125 }),
    ]
}

fn balancer(strategy: Strategy, count: u32) -> Balancer {
    let balancer = Balancer::builder(strategy).eject(Ejection::default()).build();
    balancer.set((0..count).map(|i| {
        let instance = Instance::new("shop", format!("10.0.{}.{}:80", i / 250, i % 250));
        Arc::new(instance.weight(i % 10 + 1).zone("eu-1"))
    }));
    balancer
}

fn picks(balancer: &Balancer, from: u32) {
    for key in from..from + BLOCK {
        balancer
            .pick_for(&key.to_le_bytes())
            .expect("all are passing, and none is ejected without a failure")
            .success();
    }
}

impl Subject {
    fn new(name: &str, strategy: Strategy, count: u32) -> Self {
        let what = format!("{name}, {count} instances");
        Self { what, balancer: balancer(strategy, count), alone: Spread::default(), together: Spread::default() }
    }

    /// One block of each kind.
    async fn measure(&mut self, cores: f64) {
        let started = Instant::now();
        picks(&self.balancer, 0);
        self.alone.add(nanos(started.elapsed()) / f64::from(BLOCK));
        let started = Instant::now();
        let tasks = (0..TASKS).map(|task| {
            let balancer = self.balancer.clone();
            tokio::spawn(async move { picks(&balancer, task * BLOCK) })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.expect("a task that picks does not panic");
        }
        self.together.add(nanos(started.elapsed()) * cores / f64::from(TASKS * BLOCK));
    }

    fn row(&self) -> Row {
        let median = |spread: &Spread| Figure::Time(Duration::from_nanos(spread.at(0.5) as u64));
        Row {
            what: self.what.clone(),
            raw: Some(median(&self.alone)),
            ours: median(&self.together),
            ratio: None,
            target: Target::None,
        }
    }
}

fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// What the weighted one costs until it has gone round once: per pick, and for how many.
fn first_cycle() -> (f64, u32) {
    // Weights 1 to 10, a hundred of each.
    let (balancer, cycle) = (balancer(Strategy::Weighted, 1_000), 5_500);
    let started = Instant::now();
    for _ in 0..cycle {
        balancer.pick().expect("all are passing").success();
    }
    (nanos(started.elapsed()) / f64::from(cycle), cycle)
}

/// What a change of the set costs whoever calls `set`.
fn change(strategy: Strategy) -> Duration {
    let balancer = balancer(strategy, 1_000);
    let instances: Vec<_> = balancer.status().into_iter().skip(1).map(|status| status.instance).collect();
    let started = Instant::now();
    balancer.set(instances);
    started.elapsed()
}

pub(crate) fn measure(budget: Budget) -> Outcome<Report> {
    eprintln!("memory: picks of the balancers");
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(TASKS as usize);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores).enable_all().build();
    let runtime: Runtime = runtime.map_err(|e| e.to_string())?;
    let mut subjects: Vec<_> = [10, 100, 1_000]
        .into_iter()
        .flat_map(|count| strategies().map(|(name, strategy)| Subject::new(name, strategy, count)))
        .collect();
    let until = Instant::now() + budget.balance;
    // On a worker of its own, as the tasks are: the thread that blocks is not one.
    let subjects = runtime.block_on(async move {
        let rounds = tokio::spawn(async move {
            // Past every first cycle.
            subjects.iter().for_each(|subject| (0..3).for_each(|_| picks(&subject.balancer, 0)));
            while Instant::now() < until {
                for subject in &mut subjects {
                    subject.measure(cores as f64).await;
                }
            }
            subjects
        });
        rounds.await.map_err(|e| e.to_string())
    })?;
    let (first, cycle) = first_cycle();
    let (plain, ring) = (Figure::Time(change(Strategy::RoundRobin)), Figure::Time(change(Strategy::ConsistentHash)));
    Ok(Report {
        title: "balancers, ns per pick and report".to_owned(),
        sides: ("one task", "8 tasks"),
        rows: subjects.iter().map(Subject::row).collect(),
        notes: vec![
            format!("medians of blocks of {BLOCK} picks a task; with 8 tasks, the time of {cores} cores per pick"),
            format!("weighted, 1,000 instances, in its first cycle of {cycle} picks: {first:.0} ns per pick"),
            format!("`set` with one of 1,000 instances gone: {plain}; {ring} with a new ring"),
        ],
    })
}
