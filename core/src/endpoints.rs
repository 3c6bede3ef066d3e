//! Which of several endpoints to talk to.
//!
//! Promise: calls go to one endpoint until it fails; a dead one is avoided for a growing time and then tried
//! again, so that it neither costs every n-th call nor is forgotten. If all have failed, the one whose
//! rest ends first is tried: a client never gives up by itself.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The first rest of a failed endpoint; doubled with every failure in a row.
const FIRST_REST: Duration = Duration::from_millis(250);
/// The longest rest: a server that is back is used again within this time.
const LONGEST_REST: Duration = Duration::from_secs(15);

/// A set of endpoints, by index, with the health that calls have seen.
#[derive(Debug)]
pub struct Endpoints {
    current: AtomicUsize,
    health: Mutex<Vec<Health>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Health {
    failures: u32,
    rests_until: Option<Instant>,
}

impl Endpoints {
    /// `count` endpoints, all believed to be well. The first choice is random, so that many clients with
    /// one list spread over the servers.
    pub fn new(count: usize) -> Self {
        let count = count.max(1);
        let first = usize::try_from(rand::random::<u32>()).unwrap_or(0) % count;
        Self { current: AtomicUsize::new(first), health: Mutex::new(vec![Health::default(); count]) }
    }

    /// The endpoint to use now.
    pub fn pick(&self) -> usize {
        self.current.load(Ordering::Acquire)
    }

    /// Reports that a call on `index` was answered, whatever the answer.
    pub fn succeeded(&self, index: usize) {
        let mut health = self.health();
        if let Some(h) = health.get_mut(index) {
            *h = Health::default();
        }
    }

    /// Reports that `index` could not be reached or did not answer, and returns the one to use next.
    ///
    /// Late reports about an endpoint that is no longer in use count, but do not move the choice again.
    pub fn failed(&self, index: usize) -> usize {
        let now = Instant::now();
        let mut health = self.health();
        if let Some(h) = health.get_mut(index) {
            let rest = FIRST_REST.saturating_mul(1 << h.failures.min(8)).min(LONGEST_REST);
            h.failures = h.failures.saturating_add(1);
            h.rests_until = Some(now + rest);
        }
        let current = self.current.load(Ordering::Acquire);
        if current != index {
            return current;
        }
        let count = health.len();
        let next = (1..=count)
            .map(|step| (index + step) % count)
            // Ready ones first, in order; otherwise the one that is ready soonest.
            .min_by_key(|&i| health[i].rests_until.filter(|until| *until > now).map_or(Duration::ZERO, |u| u - now))
            .unwrap_or(index);
        self.current.store(next, Ordering::Release);
        next
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.health().len()
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Vec<Health>> {
        self.health.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_dead_endpoint_is_left_and_tried_again_later() {
        let endpoints = Endpoints::new(3);
        let dead = endpoints.pick();
        let second = endpoints.failed(dead);
        assert_ne!(second, dead);
        let third = endpoints.failed(second);
        assert!(third != dead && third != second, "the dead one still rests");
        tokio::time::advance(FIRST_REST).await;
        assert_eq!(endpoints.failed(third), dead, "its rest is over");
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_report_does_not_move_the_choice() {
        let endpoints = Endpoints::new(2);
        let dead = endpoints.pick();
        let next = endpoints.failed(dead);
        assert_eq!(endpoints.failed(dead), next);
        assert_eq!(endpoints.pick(), next);
    }

    #[tokio::test(start_paused = true)]
    async fn with_all_dead_there_is_still_one_to_try() {
        let endpoints = Endpoints::new(2);
        for _ in 0..10 {
            let i = endpoints.failed(endpoints.pick());
            assert!(i < 2);
        }
        endpoints.succeeded(0);
        endpoints.failed(1);
        assert_eq!(endpoints.pick(), 0);
    }
}
