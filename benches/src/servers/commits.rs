//! Atomic commit: what the protocol costs beside two writes of the raw client, and beyond what participants do.
//!
//! The participants are in this process and do nothing, so that only the log is measured. A commit is answered after two
//! round trips, begin and decide; the third, forget, follows behind.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use quorate::commit::{Branch, Finish, Participant, Transactions, TxId, Vote};
use tokio::{task::JoinSet, time::Instant};

use super::Pair;
use crate::{
    Outcome,
    report::{Figure, Row, Target},
    samples::{Samples, Spread},
};

const BLOCK: usize = 20;
const TASKS: usize = 32;
const MOST: usize = 16;

/// Agrees to everything.
#[derive(Debug)]
struct Agrees;

#[async_trait]
impl Participant for Agrees {
    async fn prepare(&self, _: &Branch) -> quorate::Result<Vote> {
        Ok(Vote::Yes)
    }

    async fn commit(&self, _: &Branch) -> quorate::Result<Finish> {
        Ok(Finish::Done)
    }

    async fn abort(&self, _: &Branch) -> quorate::Result<Finish> {
        Ok(Finish::Done)
    }

    async fn in_doubt(&self, _: &str) -> quorate::Result<Vec<TxId>> {
        Ok(Vec::new())
    }
}

fn name(place: usize) -> String {
    format!("p{place}")
}

async fn commit(all: &Transactions, participants: usize) -> Outcome {
    let tx = (0..participants).fold(all.begin(), |tx, place| tx.branch(&name(place), "30"));
    let outcome = tx.commit().await.map_err(|e| e.to_string())?;
    if outcome.is_committed() { Ok(()) } else { Err(format!("not committed: {outcome:?}")) }
}

async fn commits(all: &Transactions, participants: usize) -> Outcome<Samples> {
    let mut samples = Samples::new();
    for _ in 0..BLOCK {
        let started = Instant::now();
        commit(all, participants).await?;
        samples.add(started.elapsed());
    }
    Ok(samples)
}

async fn pairs(raw: &dyn Pair) -> Outcome<Samples> {
    let mut samples = Samples::new();
    for _ in 0..BLOCK {
        let started = Instant::now();
        raw.pair("orders").await?;
        samples.add(started.elapsed());
    }
    Ok(samples)
}

pub(super) async fn measure(raw: &dyn Pair, coord: &quorate::Coordinator, limit: Duration) -> Outcome<Vec<Row>> {
    let all = coord.transactions("bench").map_err(|e| e.to_string())?;
    for place in 0..MOST {
        all.enlist(&name(place), Arc::new(Agrees)).map_err(|e| e.to_string())?;
    }
    // The session and the driver's key are made once.
    commits(&all, 1).await?;
    let mut rows = latency(raw, &all, limit).await?;
    rows.push(rate(&all, limit / 4).await?);
    Ok(rows)
}

async fn latency(raw: &dyn Pair, all: &Transactions, limit: Duration) -> Outcome<Vec<Row>> {
    let (mut theirs, mut one, mut most) = (Samples::new(), Samples::new(), Samples::new());
    let (mut to_raw, mut to_one) = (Spread::default(), Spread::default());
    let until = Instant::now() + limit;
    while Instant::now() < until {
        // There and back again: a steady drift of the machine falls on all alike.
        let first = (pairs(raw).await?, commits(all, 1).await?, commits(all, MOST).await?);
        let (c, b, a) = (commits(all, MOST).await?, commits(all, 1).await?, pairs(raw).await?);
        for (a, b, c) in [first, (a, b, c)] {
            to_raw.add(b.p50().as_secs_f64() / a.p50().as_secs_f64());
            to_one.add(c.p50().as_secs_f64() / b.p50().as_secs_f64());
            theirs.merge(&a);
            one.merge(&b);
            most.merge(&c);
        }
    }
    let row = |what: &str, raw: &Samples, ours: &Samples, spread: &Spread, target| Row {
        what: what.to_owned(),
        raw: Some(Figure::Time(raw.p50())),
        ours: Figure::Time(ours.p50()),
        ratio: Some((spread.at(0.5), Some((spread.at(0.25), spread.at(0.75))))),
        target,
    };
    Ok(vec![
        row("commit, 1 participant, beside two writes", &theirs, &one, &to_raw, Target::None),
        row("commit, 16 participants, beside 1", &one, &most, &to_one, Target::RatioAtMost(1.2)),
    ])
}

async fn rate(all: &Transactions, block: Duration) -> Outcome<Row> {
    let until = Instant::now() + block;
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let all = all.clone();
        tasks.spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < until {
                commit(&all, 4).await?;
                done += 1;
            }
            Ok::<_, String>(done)
        });
    }
    let mut done = 0;
    while let Some(task) = tasks.join_next().await {
        done += task.map_err(|e| e.to_string())??;
    }
    Ok(Row {
        what: format!("commits, 4 participants, {TASKS} tasks"),
        raw: None,
        ours: Figure::Rate(done as f64 / block.as_secs_f64()),
        ratio: None,
        target: Target::None,
    })
}
