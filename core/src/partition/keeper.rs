//! The task behind a share: compares what is owned with what should be, and acts on the difference.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use super::{Offers, Owned, Partitions, assign};
use crate::{
    coordinator::Coordinator,
    error::Result,
    group::{MemberSet, Members},
    lock::LockGuard,
};

/// How long a partition that its owner gave back unasked is left alone, and the pause after a failed attempt to get one.
const PAUSE: Duration = Duration::from_secs(1);

enum Stage {
    /// Somebody else has it, or nobody yet: we stand in line.
    Waiting(AbortHandle),
    /// It was offered to the user, who may have been told to give it back.
    Owned(watch::Sender<bool>),
    /// Left alone until then.
    Resting(Instant),
}

pub(super) struct Keeper {
    coord: Coordinator,
    scope: String,
    count: u32,
    id: String,
    members: Members,
    offers: Arc<Offers>,
    tell: watch::Sender<Vec<u32>>,
    stages: BTreeMap<u32, Stage>,
    /// Attempts under way, each with its partition.
    attempts: JoinSet<(u32, Result<LockGuard>)>,
    ended: (mpsc::Sender<u32>, mpsc::Receiver<u32>),
    wanted: Vec<bool>,
}

impl Keeper {
    pub(super) fn new(
        partitions: &Partitions,
        id: &str,
        members: Members,
        offers: Arc<Offers>,
        tell: watch::Sender<Vec<u32>>,
    ) -> Self {
        let capacity = usize::try_from(partitions.count).unwrap_or(usize::MAX);
        Self {
            coord: partitions.coord.clone(),
            scope: partitions.scope(),
            count: partitions.count,
            id: id.to_owned(),
            members,
            offers,
            tell,
            stages: BTreeMap::new(),
            attempts: JoinSet::new(),
            ended: mpsc::channel(capacity),
            wanted: vec![false; capacity],
        }
    }

    pub(super) async fn run(mut self) {
        let members = self.members.clone();
        let mut changes = Box::pin(next_set(&members, None));
        // Offers that nobody takes can be lost, which nothing else here would notice.
        let mut rounds = tokio::time::interval(PAUSE);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let rested = self.stages.values().filter_map(|stage| match stage {
                Stage::Resting(until) => Some(*until),
                Stage::Waiting(_) | Stage::Owned(_) => None,
            });
            let rested = rested.min();
            tokio::select! {
                set = &mut changes => {
                    self.want(&set);
                    changes.set(next_set(&members, Some(set)));
                }
                Some(done) = self.attempts.join_next() => {
                    // An attempt that was taken back says nothing.
                    if let Ok((index, outcome)) = done {
                        self.attempted(index, outcome);
                    }
                }
                Some(index) = self.ended.1.recv() => {
                    // Given back because it was revoked, unasked, or because it was lost.
                    let revoked = matches!(self.stages.remove(&index), Some(Stage::Owned(revoke)) if *revoke.borrow());
                    if !revoked {
                        self.stages.insert(index, Stage::Resting(Instant::now() + PAUSE));
                    }
                }
                _ = rounds.tick() => {}
                () = sleep_until(rested.unwrap_or_else(Instant::now)), if rested.is_some() => {
                    let now = Instant::now();
                    self.stages.retain(|_, stage| !matches!(stage, Stage::Resting(until) if *until <= now));
                }
            }
            self.act();
        }
    }

    /// Computes the share. A member that others do not see has none.
    fn want(&mut self, set: &MemberSet) {
        let members: Vec<&str> = set.iter().map(|member| member.id.as_str()).collect();
        let ours = members.iter().position(|id| *id == self.id);
        let owners = assign(self.count, &members);
        for (wanted, owner) in self.wanted.iter_mut().zip(owners) {
            *wanted = ours.is_some() && owner == ours;
        }
    }

    fn act(&mut self) {
        for index in 0..self.count {
            let wanted = self.wanted[index as usize];
            match self.stages.get(&index) {
                None if wanted => {
                    let lock = self.coord.lock(&format!("{}/{index}", self.scope));
                    let attempt = self.attempts.spawn(async move { (index, lock.acquire().await) });
                    self.stages.insert(index, Stage::Waiting(attempt));
                }
                Some(Stage::Waiting(attempt)) if !wanted => {
                    attempt.abort();
                    self.stages.remove(&index);
                }
                Some(Stage::Owned(revoke)) => {
                    revoke.send_if_modified(|revoked| std::mem::replace(revoked, *revoked || !wanted) != *revoked);
                }
                _ => {}
            }
        }
        self.offers.take_back(|owned| *owned.revoked.borrow() || owned.check().is_err());
        let owned = |(index, stage): (&u32, &Stage)| matches!(stage, Stage::Owned(_)).then_some(*index);
        let owned: Vec<u32> = self.stages.iter().filter_map(owned).collect();
        self.tell.send_if_modified(|told| {
            let news = *told != owned;
            *told = owned;
            news
        });
    }

    fn attempted(&mut self, index: u32, outcome: Result<LockGuard>) {
        // Taken back in the moment in which it was granted: the guard is dropped, which releases it.
        if !matches!(self.stages.get(&index), Some(Stage::Waiting(_))) {
            return;
        }
        match outcome {
            Ok(guard) => {
                let (revoke, revoked) = watch::channel(false);
                let ended = self.ended.0.clone();
                let owned = Owned { index, guard: Some(guard), revoked, ended };
                self.stages.insert(index, Stage::Owned(revoke));
                self.offers.add(owned);
            }
            Err(error) => {
                tracing::debug!(scope = self.scope, index, %error, "a partition was not obtained; trying again");
                self.stages.insert(index, Stage::Resting(Instant::now() + PAUSE));
            }
        }
    }
}

/// The current set, or the next one that has other members than `last`.
async fn next_set(members: &Members, last: Option<MemberSet>) -> MemberSet {
    let ids = |set: &MemberSet| set.iter().map(|member| member.id.clone()).collect::<Vec<_>>();
    let last = last.as_ref().map(ids);
    members.until(|now| last.as_ref() != Some(&ids(now))).await
}
