//! Partitions: a fixed number of pieces of work, spread over the members of a group.
//!
//! Promise: a partition has at most one owner at a time, as far as a [lock](crate::lock) can say it, and each owner has a
//! greater token than the one before; while members live and can reach the coordinator, every partition has an owner, and
//! the numbers that members own differ by at most one. When a member comes or goes, few partitions move besides those that
//! must, and a new owner starts when the old one has finished or lost its lease.
//!
//! ```
//! # async fn show(coord: quorate_core::Coordinator) -> quorate_core::Result<()> {
//! let mut share = coord.partitions("orders", 32).join("worker-7").await?;
//! loop {
//!     let partition = share.next().await;
//!     tokio::spawn(async move {
//!         // Dropped when the partition is wanted elsewhere, or lost; then the next owner may start.
//!         let _ = partition.run(consume(partition.index(), partition.token())).await;
//!     });
//! }
//! # async fn consume(_: u32, _: quorate_core::FencingToken) {}
//! # }
//! ```
//!
//! # How it is decided
//! Nobody decides: every member computes the same assignment from the same set of members (see [`assign`]), stands in line
//! for the locks of its share, and gives back what is not its share any more. While views differ, the locks keep owners
//! apart.
//!
//! # On the wire
//! The group `partitions/<name>`, and a lock `partitions/<name>/<index>` for each partition.

mod keeper;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, mpsc, watch};

use crate::{
    coordinator::Coordinator,
    error::{Error, Result},
    group::Membership,
    hash,
    lock::{Fence, FencingToken, LockGuard},
};

/// The largest number of partitions.
pub const MAX_PARTITIONS: u32 = 4096;

/// A set of partitions by its name. Cheap to make; nothing is sent before somebody joins.
#[derive(Debug, Clone)]
pub struct Partitions {
    coord: Coordinator,
    name: String,
    count: u32,
}

impl Coordinator {
    /// So many partitions, numbered from 0. All members must say the same number.
    pub fn partitions(&self, name: &str, count: u32) -> Partitions {
        Partitions { coord: self.clone(), name: name.to_owned(), count }
    }
}

impl Partitions {
    fn scope(&self) -> String {
        format!("partitions/{}", self.name)
    }

    /// Joins the members and takes a share. The share grows and shrinks as members come and go, until the value is dropped.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, or a number of partitions that is zero or above [`MAX_PARTITIONS`]; otherwise what
    /// the backend says when the members are first read.
    ///
    /// # Cancel safety
    /// Dropped half-way, the group is left again.
    pub async fn join(&self, id: &str) -> Result<Share> {
        if !(1..=MAX_PARTITIONS).contains(&self.count) {
            let message = format!("there are {} partitions, not from 1 to {MAX_PARTITIONS}", self.count);
            return Err(Error::invalid("join", message).key(&self.name).on(self.coord.profile().backend));
        }
        let group = self.coord.group(&self.scope());
        let membership = group.join(id, "")?;
        let members = group.follow().await?;
        let offers = Arc::new(Offers::default());
        let (owned, seen) = watch::channel(Vec::new());
        let keeper = keeper::Keeper::new(self, id, members, offers.clone(), owned);
        let task = tokio::spawn(keeper.run()).abort_handle();
        Ok(Share { offers, owned: seen, membership, _task: Task(task) })
    }
}

/// One member's share. Dropping it leaves: every partition is revoked, and given back as soon as its [`Owned`] is dropped.
#[derive(Debug)]
#[must_use = "the member leaves as soon as this is dropped"]
pub struct Share {
    offers: Arc<Offers>,
    owned: watch::Receiver<Vec<u32>>,
    membership: Membership,
    _task: Task,
}

/// Partitions that are owned and that the user has not taken yet. They are taken back here when they are revoked or lost:
/// nobody else would notice.
#[derive(Debug, Default)]
struct Offers {
    // At most one for each partition.
    waiting: Mutex<BTreeMap<u32, Owned>>,
    added: Notify,
}

impl Offers {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u32, Owned>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, owned: Owned) {
        let before = self.waiting().insert(owned.index, owned);
        // Dropped after the lock: it gives a partition back.
        drop(before);
        self.added.notify_one();
    }

    /// Takes back what should not be begun any more.
    fn take_back(&self, stale: impl Fn(&Owned) -> bool) {
        let mut waiting = self.waiting();
        let indices: Vec<u32> = waiting.values().filter(|owned| stale(owned)).map(Owned::index).collect();
        let stale: Vec<Owned> = indices.iter().filter_map(|index| waiting.remove(index)).collect();
        drop(waiting);
        drop(stale);
    }
}

#[derive(Debug)]
struct Task(tokio::task::AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Share {
    /// The next partition that this member owns from now on. A partition that is revoked before it is taken here is given
    /// back, and never seen.
    ///
    /// # Cancel safety
    /// Safe: a partition is taken only when this returns it.
    pub async fn next(&mut self) -> Owned {
        loop {
            let added = self.offers.added.notified();
            let first = self.offers.waiting().pop_first();
            if let Some((_, owned)) = first {
                return owned;
            }
            added.await;
        }
    }

    /// The partitions that are owned now, by number.
    pub fn owned(&self) -> Vec<u32> {
        self.owned.borrow().clone()
    }

    /// This member's place in the group.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }
}

/// An owned partition. Dropping it gives it back.
#[derive(Debug)]
#[must_use = "the partition is given back as soon as this is dropped"]
pub struct Owned {
    index: u32,
    guard: Option<LockGuard>,
    revoked: watch::Receiver<bool>,
    // At most one end for each partition is unread, so it always fits.
    ended: mpsc::Sender<u32>,
}

impl Owned {
    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    fn guard(&self) -> &LockGuard {
        self.guard.as_ref().expect("taken only by what consumes the partition")
    }

    /// Grows with every owner. Send it with each write so that storage can refuse a stale one.
    pub fn token(&self) -> FencingToken {
        self.guard().token()
    }

    /// What a transaction needs to be refused once this ownership has ended.
    pub fn fence(&self) -> Fence {
        self.guard().fence()
    }

    /// `Ok` while it is owned, by the local clock and what has been heard. A revoked partition is owned until it is given
    /// back. No I/O.
    ///
    /// # Errors
    /// `SessionLost` otherwise.
    pub fn check(&self) -> Result<()> {
        self.guard().check()
    }

    /// Returns when the partition should be given back soon, because it belongs to somebody else's share now.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn revoked(&self) {
        // An error means that the member has left, which revokes everything.
        let _ = self.revoked.clone().wait_for(|revoked| *revoked).await;
    }

    /// Returns when the partition is lost: somebody else may own it.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn lost(&self) {
        self.guard().lost().await;
    }

    /// Runs `work` until it ends, or until the partition is revoked or lost: then `work` is dropped at its current await,
    /// and the answer is `None`.
    ///
    /// Work that has to finish a step first should not be run by this: it waits for [`revoked`](Self::revoked) itself.
    ///
    /// # Errors
    /// `SessionLost` if the partition was lost.
    ///
    /// # Cancel safety
    /// Dropping it drops `work`; the partition stays owned.
    pub async fn run<F: Future>(&self, work: F) -> Result<Option<F::Output>> {
        let work = async {
            tokio::select! {
                biased;
                () = self.revoked() => None,
                done = work => Some(done),
            }
        };
        self.guard().protect(work).await
    }

    /// Gives the partition back, and waits until the next owner may have it.
    ///
    /// # Errors
    /// As for [`LockGuard::release`].
    ///
    /// # Cancel safety
    /// As for [`LockGuard::release`].
    pub async fn release(mut self) -> Result<()> {
        match self.guard.take() {
            Some(guard) => guard.release().await,
            None => Ok(()),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Nobody listens any more if the member has left.
        let _ = self.ended.try_send(self.index);
    }
}

/// Whose each partition is, by its place in `members`: nobody's if there are no members.
///
/// Every order of the same members gives the same answer. The shares differ by at most one. Each pair of partition and
/// member has a score, as in rendezvous hashing (Thaler and Ravishankar, 1998), and pairs are taken from the highest score
/// down as long as the partition is free and the member's share is not full. Cost: partitions × members × log.
pub fn assign(partitions: u32, members: &[&str]) -> Vec<Option<usize>> {
    let count = usize::try_from(partitions).unwrap_or(usize::MAX);
    let mut owners = vec![None; count];
    if members.is_empty() {
        return owners;
    }
    let (base, mut extra) = (count / members.len(), count % members.len());
    let mut pairs: Vec<(u64, &str, usize, u32)> = Vec::with_capacity(count * members.len());
    for (place, member) in members.iter().enumerate() {
        let member_hash = hash::hash(member.as_bytes());
        pairs.extend((0..partitions).map(|p| (hash::mix(member_hash, u64::from(p)), *member, place, p)));
    }
    // The name settles what the score does not.
    pairs.sort_unstable_by(|a, b| (b.0, b.1, b.3).cmp(&(a.0, a.1, a.3)));
    let mut shares = vec![0; members.len()];
    for (_, _, place, partition) in pairs {
        let owner = &mut owners[partition as usize];
        let full = shares[place] > base || (shares[place] == base && extra == 0);
        if owner.is_some() || full {
            continue;
        }
        if shares[place] == base {
            extra -= 1;
        }
        shares[place] += 1;
        *owner = Some(place);
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("worker-{i}")).collect()
    }

    fn owners(partitions: u32, names: &[String]) -> Vec<Option<String>> {
        let members: Vec<&str> = names.iter().map(String::as_str).collect();
        assign(partitions, &members).into_iter().map(|owner| owner.map(|place| names[place].clone())).collect()
    }

    #[test]
    fn shares_differ_by_at_most_one_and_cover_everything() {
        for members in 1..=20 {
            for partitions in [1, 7, 64, 256] {
                let names = names(members);
                let owners = owners(partitions, &names);
                let share = |name: &String| owners.iter().filter(|owner| owner.as_ref() == Some(name)).count();
                let shares: Vec<usize> = names.iter().map(share).collect();
                assert_eq!(shares.iter().sum::<usize>(), partitions as usize);
                assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
            }
        }
        assert_eq!(assign(3, &[]), [None; 3]);
    }

    #[test]
    fn the_order_of_the_members_does_not_matter() {
        let forward = names(7);
        let backward: Vec<String> = forward.iter().rev().cloned().collect();
        assert_eq!(owners(64, &forward), owners(64, &backward));
    }

    #[test]
    fn few_partitions_move_when_a_member_comes_or_goes() {
        for members in 1..=12 {
            let (before, after) = (owners(240, &names(members)), owners(240, &names(members + 1)));
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
            let must = 240 / (members + 1);
            // What must move is the newcomer's share; the rest is what keeps the shares even.
            assert!(moved <= 2 * must + 2, "{moved} of 240 moved with {members} members, {must} had to");
        }
    }
}
