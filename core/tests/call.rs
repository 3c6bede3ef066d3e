//! What calls over a balancer promise, on tokio's clock.

use std::{
    collections::BTreeSet,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    balance::{Balancer, CallError, CallPolicy, Cause, Ejection, Ended, Strategy, Verdict},
    discovery::Instance,
};
use tokio::time::{Instant, sleep, timeout};

const MILLI: Duration = Duration::from_millis(1);

fn every_strategy() -> [Strategy; 8] {
    [
        Strategy::RoundRobin,
        Strategy::Random,
        Strategy::Weighted,
        Strategy::LeastRequests,
        Strategy::peak_ewma(),
        Strategy::ConsistentHash,
        Strategy::BoundedHash { percent: 125 },
        Strategy::Sticky,
    ]
}

fn set(balancer: &Balancer, ids: impl IntoIterator<Item = &'static str>) {
    balancer.set(ids.into_iter().map(|id| Arc::new(Instance::new("shop", "10.0.0.1:80").id(id))));
}

fn balancer(strategy: Strategy, ids: impl IntoIterator<Item = &'static str>) -> Balancer {
    let balancer = Balancer::new(strategy);
    set(&balancer, ids);
    balancer
}

fn tries(attempts: u32) -> CallPolicy {
    CallPolicy { attempts, ..CallPolicy::default() }
}

fn elsewhere(_: &Cause<String>) -> Verdict {
    Verdict::Elsewhere
}

fn places(error: &CallError<String>) -> Vec<&str> {
    error.attempts.iter().map(|attempt| attempt.instance.id.as_str()).collect()
}

fn in_flight(balancer: &Balancer) -> u64 {
    balancer.status().iter().map(|status| status.in_flight).sum()
}

async fn fails(instance: Arc<Instance>) -> Result<(), String> {
    Err(format!("{} is broken", instance.id))
}

#[tokio::test(start_paused = true)]
async fn two_broken_of_three_are_passed_over_and_every_error_is_told_in_order() {
    for strategy in every_strategy() {
        for round in 0..20 {
            let balancer = balancer(strategy.clone(), ["bad-1", "bad-2", "good"]);
            let send = async |instance: Arc<Instance>| match instance.id.as_str() {
                "good" => Ok("answer"),
                id => Err(format!("{id} is broken")),
            };
            assert_eq!(balancer.call(&tries(3), elsewhere, send).await, Ok("answer"), "{strategy:?}, {round}");
            let only_bad = async |instance| fails(instance).await;
            let error = balancer.call(&tries(2), elsewhere, only_bad).await.expect_err("all fail");
            assert_eq!((error.ended, error.attempts.len()), (Ended::Attempts, 2), "{strategy:?}");
            for attempt in &error.attempts {
                assert_eq!(attempt.cause, Cause::Failed(format!("{} is broken", attempt.instance.id)), "{strategy:?}");
            }
            assert_ne!(places(&error)[0], places(&error)[1], "{strategy:?}: another one");
            let shown = error.to_string();
            let [first, second] = [0, 1].map(|i| shown.find(&format!("{} is broken", places(&error)[i])));
            assert!(first.is_some() && first < second, "{shown}");
            assert_eq!(error.clone().into_last(), Some(format!("{} is broken", places(&error)[1])));
            assert_eq!(in_flight(&balancer), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_is_tried_again_before_all_have_been_and_then_after_a_pause() {
    for strategy in every_strategy() {
        let balancer = balancer(strategy.clone(), ["a", "b", "c", "d", "e"]);
        let started = Instant::now();
        let times = Mutex::new(Vec::new());
        let send = |instance| {
            times.lock().expect("no panic").push(started.elapsed());
            fails(instance)
        };
        let policy = CallPolicy { limit: Duration::MAX, ..tries(15) };
        let error = balancer.call(&policy, elsewhere, send).await.expect_err("all fail");
        let places = places(&error);
        for round in places.chunks(5) {
            assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), 5, "{strategy:?}: {places:?}");
        }
        assert!(places.windows(2).all(|two| two[0] != two[1]), "{strategy:?}: {places:?}");
        let times = times.lock().expect("no panic").clone();
        assert_eq!(times[4], Duration::ZERO, "{strategy:?}: the others at once");
        for (n, pair) in times[4..].windows(2).enumerate() {
            let (pause, least) = (pair[1] - pair[0], (20 * MILLI * (1 << n.min(6))).min(Duration::from_secs(1)));
            assert!(pause >= least && pause <= least * 2 + 2 * MILLI, "{strategy:?}: pause {n} is {pause:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn round_robin_goes_on_to_the_next() {
    let balancer = balancer(Strategy::RoundRobin, ["0", "1", "2", "3", "4", "5", "6"]);
    for _ in 0..10 {
        let error = balancer.call(&tries(7), elsewhere, fails).await.expect_err("all fail");
        let order: Vec<usize> = places(&error).iter().map(|id| id.parse().expect("a number")).collect();
        assert!(order.windows(2).all(|two| two[1] == (two[0] + 1) % 7), "{order:?}");
    }
}

#[tokio::test]
async fn a_key_goes_where_it_would_go_without_those_that_were_tried() {
    let ids = ["a", "b", "c", "d", "e"];
    let balancer = balancer(Strategy::ConsistentHash, ids);
    for key in 0..200_u32 {
        let key = key.to_be_bytes();
        let error = balancer.call_for(&key, &tries(2), elsewhere, fails).await.expect_err("all fail");
        let places = places(&error);
        assert_eq!(balancer.pick_for(&key).expect("five").id, places[0]);
        let without = Balancer::new(Strategy::ConsistentHash);
        set(&without, ids.into_iter().filter(|id| *id != places[0]));
        assert_eq!(without.pick_for(&key).expect("four").id, places[1]);
    }
}

#[tokio::test(start_paused = true)]
async fn no_instance_is_an_error_of_its_own_and_at_once() {
    let balancer = Balancer::builder(Strategy::RoundRobin)
        .eject(Ejection { after: 1, max_percent: 100, ..Ejection::default() })
        .build();
    let started = Instant::now();
    let error = balancer.call(&CallPolicy::default(), elsewhere, fails).await.expect_err("nobody is there");
    assert_eq!((error.ended, error.attempts.len()), (Ended::NoInstance, 0));
    assert_eq!(started.elapsed(), Duration::ZERO);
    // Its own failures eject everybody.
    set(&balancer, ["a", "b"]);
    let error = balancer.call(&tries(9), elsewhere, fails).await.expect_err("all fail");
    assert_eq!((error.ended, error.attempts.len()), (Ended::NoInstance, 2), "told of, although ejected");
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_the_call_beats_the_attempts() {
    let balancer = balancer(Strategy::RoundRobin, ["blocked"]);
    let count = AtomicU32::new(0);
    let policy = CallPolicy { limit: MILLI, ..tries(1_000) };
    let started = Instant::now();
    let send = async |_| {
        count.fetch_add(1, Ordering::Relaxed);
        sleep(10 * MILLI).await;
        Ok::<_, String>("late")
    };
    let error = balancer.call(&policy, elsewhere, send).await.expect_err("it answers too late");
    assert_eq!((error.ended, error.attempts.len(), count.load(Ordering::Relaxed)), (Ended::Limit, 1, 1));
    assert!(started.elapsed() <= 2 * MILLI, "{:?}", started.elapsed());
    // Also where attempts fail at once, and the time goes by in pauses.
    let policy = CallPolicy { limit: 500 * MILLI, ..tries(1_000) };
    let started = Instant::now();
    let error = balancer.call(&policy, elsewhere, fails).await.expect_err("all fail");
    assert!(error.ended == Ended::Limit && (3..8).contains(&error.attempts.len()), "{error:?}");
    assert!((500..=501).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    let nothing = CallPolicy { limit: Duration::ZERO, ..tries(3) };
    let error = balancer.call(&nothing, elsewhere, fails).await.expect_err("no time");
    assert_eq!((error.ended, error.attempts.len()), (Ended::Limit, 0));
}

#[tokio::test(start_paused = true)]
async fn without_limits_a_call_waits_as_long_as_it_takes() {
    let balancer = balancer(Strategy::RoundRobin, ["slow"]);
    let policy = CallPolicy { attempt_limit: Duration::MAX, limit: Duration::MAX, ..tries(1) };
    let send = async |_| {
        sleep(Duration::from_secs(86_400)).await;
        Ok::<_, String>(())
    };
    assert_eq!(balancer.call(&policy, elsewhere, send).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn what_hangs_is_given_up_tried_elsewhere_and_ejected() {
    for strategy in every_strategy() {
        let balancer = Balancer::builder(strategy.clone()).eject(Ejection { after: 3, ..Ejection::default() }).build();
        set(&balancer, ["hangs", "works", "works-too"]);
        let policy = CallPolicy { attempt_limit: 100 * MILLI, ..tries(2) };
        let hung = AtomicU32::new(0);
        let started = Instant::now();
        for _ in 0..1_000 {
            let send = async |instance: Arc<Instance>| {
                if instance.id == "hangs" {
                    hung.fetch_add(1, Ordering::Relaxed);
                    pending::<()>().await;
                }
                Ok(())
            };
            assert_eq!(balancer.call(&policy, elsewhere, send).await, Ok(()), "{strategy:?}: another one answers");
        }
        let hung = hung.into_inner();
        assert!(hung <= 3, "{strategy:?}: {hung}, out after three in a row");
        // Two choices avoid it from the first failure on, and what is settled may be settled elsewhere.
        assert!(hung == 3 || matches!(strategy, Strategy::PeakEwma(_) | Strategy::Sticky), "{strategy:?}: {hung}");
        assert!(started.elapsed() <= 310 * MILLI, "{strategy:?}: {:?}", started.elapsed());
        assert_eq!(in_flight(&balancer), 0, "{strategy:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_cut_short_by_the_limit_of_the_call_is_not_held_against_its_instance() {
    let balancer = Balancer::builder(Strategy::RoundRobin).eject(Ejection { after: 1, ..Ejection::default() }).build();
    set(&balancer, ["a", "b", "c", "d"]);
    let policy = CallPolicy { attempt_limit: 100 * MILLI, limit: 150 * MILLI, ..tries(2) };
    let error = balancer.call(&policy, elsewhere, |_| pending::<Result<(), String>>()).await.expect_err("all hang");
    assert_eq!((error.ended, error.attempts.len()), (Ended::Limit, 2));
    let ejected = |balancer: &Balancer| -> Vec<String> {
        let out = balancer.status().into_iter().filter(|status| !status.ejected_for.is_zero());
        out.map(|status| status.instance.id.clone()).collect()
    };
    assert_eq!(ejected(&balancer), [places(&error)[0]], "the second had half its time");
    // But the first attempt has all the time there is.
    let policy = CallPolicy { attempt_limit: Duration::MAX, limit: 50 * MILLI, ..tries(1) };
    let balancer = Balancer::builder(Strategy::RoundRobin).eject(Ejection { after: 1, ..Ejection::default() }).build();
    set(&balancer, ["a", "b", "c", "d"]);
    let error = balancer.call(&policy, elsewhere, |_| pending::<Result<(), String>>()).await.expect_err("it hangs");
    assert_eq!(ejected(&balancer), places(&error));
}

#[tokio::test(start_paused = true)]
async fn a_request_is_sent_again_only_where_the_verdict_allows_it() {
    let ejection = Ejection { after: 1, ..Ejection::default() };
    for (verdict, ended, sent, ejected) in [
        (Verdict::Elsewhere, Ended::Attempts, 2, 2),
        (Verdict::Failed, Ended::Judged, 1, 1),
        (Verdict::Answered, Ended::Judged, 1, 0),
    ] {
        for hangs in [false, true] {
            let balancer = Balancer::builder(Strategy::Random).eject(ejection.clone()).build();
            set(&balancer, ["a", "b", "c", "d"]);
            let send = async |_| if hangs { pending().await } else { Err::<(), _>("no such order".to_owned()) };
            let judge = |cause: &Cause<String>| {
                assert_eq!(*cause == Cause::Elapsed, hangs);
                verdict
            };
            let error = balancer.call(&tries(2), judge, send).await.expect_err("no result");
            assert_eq!((error.ended, error.attempts.len()), (ended, sent), "{verdict:?}");
            let out = balancer.status().into_iter().filter(|status| !status.ejected_for.is_zero()).count();
            assert_eq!(out, ejected, "{verdict:?}, hangs: {hangs}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_counts_as_neither() {
    let balancer = Balancer::builder(Strategy::RoundRobin).eject(Ejection { after: 1, ..Ejection::default() }).build();
    set(&balancer, ["a", "b"]);
    let policy = CallPolicy::default();
    for _ in 0..10 {
        let call = balancer.call(&policy, elsewhere, |_| pending::<Result<(), String>>());
        let mut call = Box::pin(call);
        assert!(timeout(MILLI, &mut call).await.is_err());
        assert_eq!(in_flight(&balancer), 1);
        drop(call);
        assert_eq!(in_flight(&balancer), 0);
    }
    assert!(balancer.status().iter().all(|status| status.ejected_for.is_zero()));
    // In the pause, too.
    let mut call = Box::pin(balancer.call(&policy, elsewhere, fails));
    set(&balancer, ["a"]);
    assert!(timeout(MILLI, &mut call).await.is_err());
    assert_eq!(in_flight(&balancer), 0);
}

#[tokio::test(start_paused = true)]
async fn who_comes_during_a_call_is_tried_and_who_goes_is_not() {
    let balancer = balancer(Strategy::RoundRobin, ["old"]);
    let send = async |instance: Arc<Instance>| {
        if instance.id == "new" {
            return Ok("answer");
        }
        set(&balancer, ["new"]);
        Err("it goes".to_owned())
    };
    assert_eq!(balancer.call(&tries(2), elsewhere, send).await, Ok("answer"));
    let send = async |_| {
        set(&balancer, []);
        Err::<(), _>("it goes".to_owned())
    };
    let error = balancer.call(&tries(9), elsewhere, send).await.expect_err("nobody is left");
    assert_eq!((error.ended, error.attempts.len()), (Ended::NoInstance, 1));
}

#[tokio::test(start_paused = true)]
async fn a_budget_bounds_what_is_sent_again_and_is_earned_by_calls() {
    let balancer = Balancer::builder(Strategy::RoundRobin).retry_budget(20).build();
    set(&balancer, ["a", "b", "c"]);
    let (sent, broken) = (AtomicU32::new(0), AtomicBool::new(true));
    let send = async |_| {
        sent.fetch_add(1, Ordering::Relaxed);
        if broken.load(Ordering::Relaxed) { Err("overloaded".to_owned()) } else { Ok(()) }
    };
    let mut out_of_budget = 0;
    for _ in 0..1_000 {
        let error = balancer.call(&tries(3), elsewhere, send).await.expect_err("all fail");
        assert!(matches!(error.ended, Ended::Attempts | Ended::Budget), "{error}");
        out_of_budget += u32::from(error.ended == Ended::Budget);
    }
    assert_eq!(sent.swap(0, Ordering::Relaxed), 1_000 + 10 + 200, "ten to begin with, and 20 of each hundred");
    assert!(out_of_budget > 800, "{out_of_budget}");
    // What good times have earned is soon used up.
    broken.store(false, Ordering::Relaxed);
    for _ in 0..10_000 {
        assert_eq!(balancer.call(&tries(3), elsewhere, send).await, Ok(()));
    }
    broken.store(true, Ordering::Relaxed);
    sent.store(0, Ordering::Relaxed);
    for _ in 0..100 {
        let _ = balancer.call(&tries(3), elsewhere, send).await;
    }
    let repeats = sent.into_inner() - 100;
    assert!((119..=120).contains(&repeats), "{repeats}");
}

#[tokio::test]
async fn a_call_can_be_spawned() {
    let balancer = balancer(Strategy::peak_ewma(), ["a"]);
    let call = tokio::spawn(async move {
        let policy = CallPolicy::default();
        balancer.call(&policy, elsewhere, |instance| async move { Ok(instance.endpoint()) }).await
    });
    assert_eq!(call.await.expect("no panic"), Ok("10.0.0.1:80".to_owned()));
}
