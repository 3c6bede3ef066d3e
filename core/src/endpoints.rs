//! Which of several endpoints to talk to.
//!
//! Promise: calls go to one endpoint until it fails; a dead one is avoided for a growing time and then tried
//! again, so that it neither costs every n-th call nor is forgotten. If all have failed, the one of the others whose
//! rest ends first is tried: a client never gives up by itself. A server that is cut off from its clients or from the
//! other servers closes no connection: [`forsaken`] finds out about it long before the limit of a request.

use std::{
    future::Future,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout},
};

/// The first rest of a failed endpoint; doubled with every failure in a row.
const FIRST_REST: Duration = Duration::from_millis(250);
/// The longest rest: a server that is back is used again within this time.
const LONGEST_REST: Duration = Duration::from_secs(15);

/// From here on a request takes long. Shorter than any election, so that the leader of before is still known.
const LONG: Duration = Duration::from_millis(150);
/// How often a server is asked while a request takes long.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// Without any sign for this long a server is left. Longer than the pauses of a busy server, and than most elections.
const GIVEN_UP: Duration = Duration::from_millis(1500);
/// A process that was stopped itself finds that one question was answered late: it must ask again.
const ASKED_AT_LEAST: u32 = 2;

/// A server that has not given a sign within this has given none. Enough for a new connection with TLS over a long way.
pub const SIGN_LIMIT: Duration = Duration::from_millis(750);

/// What a server says of itself while it owes an answer to something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// It serves: under the leader of this term, if it tells, which rises with every election.
    Serves(Option<u64>),
    /// It knows no leader.
    Leaderless,
    /// It answers nothing.
    Silent,
}

/// Why an answer is not worth waiting for any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forsaken {
    /// What was on its way to the leader of before may be lost with it.
    LeaderChanged,
    /// The server has known no leader for long, while others may have one.
    Leaderless,
    /// The server has answered nothing for long.
    Silent,
}

/// Waits beside a request that is not answered yet, and returns when its answer is not worth waiting for any longer. Asks
/// nothing before the request takes long; then `ask` asks the server for a sign of life, through [`Signs`], and waits for it no
/// longer than [`SIGN_LIMIT`].
///
/// Whoever has only one endpoint, `alone`, has nowhere else to go: it waits to its limit for one that is silent or knows no
/// leader, and is told of another leader all the same. `before` is the term of the last answer before the request was sent,
/// if servers tell terms.
///
/// # Cancel safety
/// It holds nothing.
pub async fn forsaken<F, Fut>(alone: bool, before: Option<u64>, ask: F) -> Forsaken
where
    F: Fn() -> Fut + Send,
    Fut: Future<Output = Sign> + Send,
{
    sleep(LONG).await;
    let mut first_term = None;
    // Since when it has been like that, and how often it was seen.
    let (mut leaderless, mut silent, mut late) = (None, None, None);
    loop {
        let asked = Instant::now();
        match ask().await {
            Sign::Serves(term) => {
                (leaderless, silent) = (None, None);
                if first_term.is_some() && term > first_term {
                    // What the new leader has of it is answered now.
                    sleep(ASK_EVERY).await;
                    return Forsaken::LeaderChanged;
                }
                if before.is_some() && term > before {
                    // Elected before we asked first: perhaps also before the request, which is then merely slow.
                    seen(&mut late, asked);
                }
                first_term = first_term.or(term);
            }
            Sign::Leaderless => {
                silent = None;
                seen(&mut leaderless, asked);
            }
            Sign::Silent => {
                leaderless = None;
                seen(&mut silent, asked);
            }
        }
        let long = |state: Option<(Instant, u32)>| {
            state.is_some_and(|(since, times)| since.elapsed() >= GIVEN_UP && times >= ASKED_AT_LEAST)
        };
        if long(late) {
            return Forsaken::LeaderChanged;
        }
        if !alone && long(leaderless) {
            return Forsaken::Leaderless;
        }
        if !alone && long(silent) {
            return Forsaken::Silent;
        }
        sleep(ASK_EVERY).await;
    }
}

/// The signs of one server, or of one connection. Of many requests that take long at the same time one asks for all: a server
/// that is slow because it has much to do is not asked by each of them.
#[derive(Debug, Default)]
pub struct Signs(Mutex<Option<(Instant, Sign)>>);

impl Signs {
    /// Asks, or takes the sign that somebody else was asking for meanwhile.
    ///
    /// # Cancel safety
    /// Dropped while it asks, the next one asks.
    pub async fn get(&self, ask: impl Future<Output = Sign>) -> Sign {
        let since = Instant::now();
        // Whoever asks is somebody's future, which may not be polled any more: not waited for without a limit.
        let Ok(mut last) = timeout(2 * SIGN_LIMIT, self.0.lock()).await else { return ask.await };
        match *last {
            Some((told, sign)) if told > since => sign,
            _ => {
                let sign = ask.await;
                *last = Some((Instant::now(), sign));
                sign
            }
        }
    }
}

fn seen(state: &mut Option<(Instant, u32)>, now: Instant) {
    state.get_or_insert((now, 0)).1 += 1;
}

/// A set of endpoints, by index, with the health that calls have seen.
#[derive(Debug)]
pub struct Endpoints {
    current: AtomicUsize,
    health: std::sync::Mutex<Vec<Health>>,
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
        Self { current: AtomicUsize::new(first), health: std::sync::Mutex::new(vec![Health::default(); count]) }
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
        // Never the one that has failed just now: the others may be back long before their rest is over.
        let next = (1..count)
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
    async fn who_fails_now_is_left_also_for_one_that_failed_more_often_before() {
        let endpoints = Endpoints::new(3);
        // An outage of all, after which one of them works.
        for _ in 0..20 {
            endpoints.failed(endpoints.pick());
            tokio::time::advance(Duration::from_millis(300)).await;
        }
        let works = endpoints.pick();
        endpoints.succeeded(works);
        assert_ne!(endpoints.failed(works), works, "the others may be back as well");
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_report_does_not_move_the_choice() {
        let endpoints = Endpoints::new(2);
        let dead = endpoints.pick();
        let next = endpoints.failed(dead);
        assert_eq!(endpoints.failed(dead), next);
        assert_eq!(endpoints.pick(), next);
    }

    /// Waits beside a request of which the server gives these signs, the last one for ever.
    async fn told(alone: bool, before: Option<u64>, signs: &'static [Sign]) -> Option<(Forsaken, Duration)> {
        let (began, asked) = (Instant::now(), AtomicUsize::new(0));
        let ask = async || {
            let asked = asked.fetch_add(1, Ordering::Relaxed);
            let sign = signs[asked.min(signs.len() - 1)];
            if sign == Sign::Silent {
                sleep(SIGN_LIMIT).await;
            }
            sign
        };
        let told = tokio::time::timeout(Duration::from_secs(60), forsaken(alone, before, ask)).await.ok()?;
        Some((told, began.elapsed()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_server_that_gives_signs_is_waited_for() {
        use Sign::{Leaderless, Serves, Silent};
        assert_eq!(told(false, None, &[Serves(None)]).await, None);
        assert_eq!(told(false, None, &[Serves(Some(7))]).await, None);
        assert_eq!(told(false, Some(7), &[Serves(Some(7))]).await, None);
        // An election, and a pause of the server.
        assert_eq!(told(false, None, &[Leaderless, Leaderless, Silent, Leaderless, Serves(Some(7))]).await, None);
        assert_eq!(told(true, Some(6), &[Silent]).await, None, "there is nobody else to ask");
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_stopped_itself_asks_again_before_it_leaves_a_server() {
        let asked = AtomicUsize::new(0);
        let ask = async || {
            if asked.fetch_add(1, Ordering::Relaxed) > 0 {
                return Sign::Serves(None);
            }
            // The answer had come, but nobody ran who could have seen it.
            sleep(Duration::from_secs(60)).await;
            Sign::Silent
        };
        let told = tokio::time::timeout(Duration::from_secs(120), forsaken(false, None, ask)).await;
        assert!(told.is_err(), "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_who_want_a_sign_at_once_one_asks_and_one_that_is_not_polled_holds_up_nobody_for_long() {
        let (signs, asked) = (Signs::default(), AtomicUsize::new(0));
        let ask = async || {
            asked.fetch_add(1, Ordering::Relaxed);
            sleep(SIGN_LIMIT).await;
            Sign::Silent
        };
        let all = futures_util::future::join_all((0..100).map(|_| signs.get(ask()))).await;
        assert!(all.iter().all(|sign| *sign == Sign::Silent));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(signs.get(async { Sign::Leaderless }).await, Sign::Leaderless, "an old sign is none");

        let mut stuck = Box::pin(signs.get(ask()));
        assert!(futures_util::poll!(&mut stuck).is_pending());
        let began = Instant::now();
        assert_eq!(signs.get(async { Sign::Leaderless }).await, Sign::Leaderless);
        assert!(began.elapsed() <= 2 * SIGN_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_a_leaderless_and_a_changed_server_are_left_within_two_seconds() {
        use Sign::{Leaderless, Serves, Silent};
        for (before, signs, expected) in [
            (None, &[Silent][..], Forsaken::Silent),
            (None, &[Leaderless], Forsaken::Leaderless),
            (Some(7), &[Serves(Some(7)), Leaderless, Serves(Some(8))], Forsaken::LeaderChanged),
            (Some(7), &[Serves(Some(8))], Forsaken::LeaderChanged),
        ] {
            let (told, after) = told(false, before, signs).await.expect("it is told");
            assert_eq!(told, expected);
            assert!(after <= Duration::from_millis(2150), "{told:?} after {after:?}");
        }
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
