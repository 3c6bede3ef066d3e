//! Acquire + release without contention: the time of one pair, and how many pairs 64 tasks get done.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::Instant};

use super::{Ours, Pair};
use crate::{
    Outcome,
    report::{Figure, Row, Target},
    samples::{Samples, Spread},
};

/// Pairs in one block of the latency.
const BLOCK: usize = 25;
const TASKS: usize = 64;

/// The times of both sides.
pub(super) struct Duel {
    pub(super) raw: Samples,
    pub(super) ours: Samples,
    /// Ours over theirs, of the medians of each two blocks beside each other.
    pub(super) ratios: Spread,
}

impl Duel {
    pub(super) fn new() -> Self {
        Self { raw: Samples::new(), ours: Samples::new(), ratios: Spread::default() }
    }

    /// Takes in two blocks that were measured beside each other.
    pub(super) fn add(&mut self, raw: &Samples, ours: &Samples) {
        self.ratios.add(ours.p50().as_secs_f64() / raw.p50().as_secs_f64());
        self.raw.merge(raw);
        self.ours.merge(ours);
    }

    pub(super) fn count(&self) -> u64 {
        self.ours.len().min(self.raw.len())
    }

    pub(super) fn rows(&self, what: &str, limit: f64) -> [Row; 2] {
        let row = |quantile: &str, raw: Duration, ours: Duration, spread, target| Row {
            what: format!("{what}, {quantile}"),
            raw: Some(Figure::Time(raw)),
            ours: Figure::Time(ours),
            ratio: Some((ours.as_secs_f64() / raw.as_secs_f64(), spread)),
            target,
        };
        let spread = Some((self.ratios.at(0.25), self.ratios.at(0.75)));
        [
            row("p50", self.raw.p50(), self.ours.p50(), spread, Target::RatioAtMost(limit)),
            row("p99", self.raw.p99(), self.ours.p99(), None, Target::None),
        ]
    }
}

pub(super) async fn latency(raw: &dyn Pair, ours: &Ours, limit: Duration) -> Outcome<Duel> {
    for _ in 0..2 {
        block(raw).await?;
        block(ours).await?;
    }
    let mut duel = Duel::new();
    let until = Instant::now() + limit;
    while Instant::now() < until {
        // A B B A: a steady drift of the machine falls on both sides alike.
        let (first, second) = (block(raw).await?, block(ours).await?);
        duel.add(&first, &second);
        let (first, second) = (block(ours).await?, block(raw).await?);
        duel.add(&second, &first);
    }
    Ok(duel)
}

async fn block(side: &dyn Pair) -> Outcome<Samples> {
    let mut samples = Samples::new();
    for _ in 0..BLOCK {
        let started = Instant::now();
        side.pair("orders").await?;
        samples.add(started.elapsed());
    }
    Ok(samples)
}

pub(super) async fn throughput(raw: &Arc<dyn Pair>, ours: &Arc<Ours>, limit: Duration) -> Outcome<Row> {
    let ours: Arc<dyn Pair> = ours.clone();
    let block = limit / 12;
    // Opens what is opened on first use: connections of a pool, directories of 64 names.
    rate(raw, block / 2).await?;
    rate(&ours, block / 2).await?;
    let (mut theirs, mut own, mut ratios) = (Spread::default(), Spread::default(), Spread::default());
    for round in 0..6 {
        let (a, b) = if round % 2 == 0 {
            let a = rate(raw, block).await?;
            (a, rate(&ours, block).await?)
        } else {
            let b = rate(&ours, block).await?;
            (rate(raw, block).await?, b)
        };
        theirs.add(a);
        own.add(b);
        ratios.add(a / b);
    }
    Ok(Row {
        what: format!("acquire + release, {TASKS} tasks, {TASKS} names"),
        raw: Some(Figure::Rate(theirs.at(0.5))),
        ours: Figure::Rate(own.at(0.5)),
        ratio: Some((theirs.at(0.5) / own.at(0.5), Some((ratios.at(0.25), ratios.at(0.75))))),
        target: Target::RatioAtMost(1.2),
    })
}

/// Pairs each second.
async fn rate(side: &Arc<dyn Pair>, block: Duration) -> Outcome<f64> {
    let until = Instant::now() + block;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let side = side.clone();
        tasks.spawn(async move {
            let name = format!("orders-{task}");
            let mut done = 0_u64;
            loop {
                side.pair(&name).await?;
                // A pair that ends after the block belongs to no block.
                if Instant::now() >= until {
                    return Ok::<_, String>(done);
                }
                done += 1;
            }
        });
    }
    let mut done = 0;
    while let Some(task) = tasks.join_next().await {
        done += task.map_err(|e| e.to_string())??;
    }
    Ok(done as f64 / block.as_secs_f64())
}
