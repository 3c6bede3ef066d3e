//! One lock that 32 tasks of four clients want all the time: how often it changes hands.
//!
//! The raw client has no fair queue to compare with, so beside it stands the least that a change of hands could be:
//! one write and its notification at another client, one round after the other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate::Coordinator;
use quorate_testkit::servers::Server;
use tokio::{task::JoinSet, time::Instant};

use super::{Round, coordinator};
use crate::{
    Outcome,
    report::{Figure, Row, Target},
    samples::Spread,
};

const CONTENDERS: usize = 32;
const CLIENTS: usize = 4;
const BLOCKS: u32 = 4;

pub(super) async fn contended(
    server: &Server,
    raw: &mut dyn Round,
    target: f64,
    limit: Duration,
) -> Outcome<(Row, String)> {
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(coordinator(server).await?);
    }
    let block = limit / (BLOCKS * 3 / 2 + 1);
    fight(&clients, block / 4).await?;
    let (mut rounds, mut changes) = (Spread::default(), Spread::default());
    let (mut least, mut most) = (u64::MAX, 0);
    for _ in 0..BLOCKS {
        rounds.add(rate(raw, block / 2).await?);
        let fight = fight(&clients, block).await?;
        changes.add(fight.changes as f64 / block.as_secs_f64());
        least = least.min(fight.grants.iter().copied().min().unwrap_or_default());
        most = most.max(fight.grants.iter().copied().max().unwrap_or_default());
    }
    let (rounds, changes) = (rounds.at(0.5), changes.at(0.5));
    let row = Row {
        what: format!("{CONTENDERS} contenders, owner changes"),
        raw: Some(Figure::Rate(rounds)),
        ours: Figure::Rate(changes),
        ratio: Some((rounds / changes, None)),
        target: Target::AtLeast(target),
    };
    let note = format!(
        "contenders: {CONTENDERS} tasks on {CLIENTS} clients, {least} to {most} grants for each in a block; raw is \
         write + notification rounds"
    );
    Ok((row, note))
}

/// Rounds each second, one after the other.
async fn rate(raw: &mut dyn Round, block: Duration) -> Outcome<f64> {
    let until = Instant::now() + block;
    let (mut rounds, mut time) = (0.0, Duration::ZERO);
    while Instant::now() < until {
        time += raw.round(Duration::ZERO).await?;
        rounds += 1.0;
    }
    Ok(rounds / time.as_secs_f64())
}

struct Fight {
    changes: u64,
    /// Of each contender.
    grants: Vec<u64>,
}

/// What the contenders share: the referee.
#[derive(Default)]
struct Referee {
    held: AtomicBool,
    owner: AtomicUsize,
    token: AtomicU64,
    changes: AtomicU64,
}

impl Referee {
    /// A grant; refuses what a lock must never do.
    fn granted(&self, contender: usize, token: u64) -> Outcome {
        if self.held.swap(true, Ordering::AcqRel) {
            return Err("the lock was granted while somebody held it".to_owned());
        }
        let before = self.token.swap(token, Ordering::AcqRel);
        if before >= token {
            return Err(format!("token {token} was granted after {before}"));
        }
        if self.owner.swap(contender, Ordering::AcqRel) != contender {
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn released(&self) {
        self.held.store(false, Ordering::Release);
    }
}

async fn fight(clients: &[Coordinator], block: Duration) -> Outcome<Fight> {
    let referee = Arc::new(Referee { owner: AtomicUsize::new(usize::MAX), ..Referee::default() });
    let until = Instant::now() + block;
    let mut contenders = JoinSet::new();
    for contender in 0..CONTENDERS {
        let (lock, referee) = (clients[contender % clients.len()].lock("contended"), referee.clone());
        contenders.spawn(async move {
            let mut grants = 0;
            loop {
                let guard = lock.acquire().await.map_err(|e| e.to_string())?;
                // What is granted after the end is only there to empty the line.
                let over = Instant::now() >= until;
                if !over {
                    referee.granted(contender, guard.token().get())?;
                    grants += 1;
                    referee.released();
                }
                guard.release().await.map_err(|e| e.to_string())?;
                if over {
                    return Ok::<u64, String>(grants);
                }
            }
        });
    }
    let mut grants = Vec::new();
    while let Some(contender) = contenders.join_next().await {
        grants.push(contender.map_err(|e| e.to_string())??);
    }
    Ok(Fight { changes: referee.changes.load(Ordering::Relaxed), grants })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_and_a_token_that_falls_are_caught() {
        let referee = Referee { owner: AtomicUsize::new(usize::MAX), ..Referee::default() };
        assert!(referee.granted(1, 10).is_ok());
        assert!(referee.granted(2, 11).is_err(), "nobody has released it");
        referee.released();
        assert!(referee.granted(2, 10).is_err(), "it was granted before");
    }

    #[test]
    fn a_grant_to_the_same_contender_is_no_change_of_owner() {
        let referee = Referee { owner: AtomicUsize::new(usize::MAX), ..Referee::default() };
        for (contender, token) in [(1, 1), (1, 2), (2, 3)] {
            referee.granted(contender, token).unwrap();
            referee.released();
        }
        assert_eq!(referee.changes.load(Ordering::Relaxed), 2);
    }
}
