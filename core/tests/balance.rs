//! What a balancer promises, on tokio's clock.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    balance::{Balancer, Ejection, PeakEwma, Pick, Strategy},
    discovery::{Health, Instance},
};
use tokio::time::{advance, sleep};

const SECOND: Duration = Duration::from_secs(1);

fn every_strategy() -> [Strategy; 8] {
    [
        Strategy::RoundRobin,
        Strategy::Random,
        Strategy::Weighted,
        Strategy::LeastRequests,
        // Without a malus for failures: these tests make single instances fail on a clock that stands still.
        Strategy::PeakEwma(PeakEwma { failure: Duration::ZERO, ..PeakEwma::default() }),
        Strategy::ConsistentHash,
        Strategy::BoundedHash { percent: 125 },
        Strategy::Sticky,
    ]
}

fn instance(id: impl std::fmt::Display) -> Instance {
    Instance::new("shop", "10.0.0.1:80").id(id.to_string())
}

fn set(balancer: &Balancer, instances: impl IntoIterator<Item = Instance>) {
    balancer.set(instances.into_iter().map(Arc::new));
}

fn numbered(count: usize) -> impl Iterator<Item = Instance> {
    (0..count).map(|i| instance(format!("{i:04}")))
}

fn balancer(strategy: Strategy, instances: impl IntoIterator<Item = Instance>) -> Balancer {
    let balancer = Balancer::new(strategy);
    set(&balancer, instances);
    balancer
}

fn pick(balancer: &Balancer) -> Pick {
    balancer.pick().expect("there is somebody to pick")
}

/// How often each was picked; every request ends before the next begins.
fn counts(balancer: &Balancer, picks: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..picks {
        *counts.entry(pick(balancer).id.clone()).or_default() += 1;
    }
    counts
}

fn fail(balancer: &Balancer, id: &str, times: usize) {
    let mut left = times;
    for _ in 0..100_000 {
        if left == 0 {
            return;
        }
        match pick(balancer) {
            pick if pick.id == id => {
                pick.failure();
                left -= 1;
            }
            pick => drop(pick),
        }
    }
    panic!("{id} was not picked often enough: {left} of {times} left");
}

fn ejected(balancer: &Balancer) -> Vec<String> {
    let out = balancer.status().into_iter().filter(|status| !status.ejected_for.is_zero());
    out.map(|status| status.instance.id.clone()).collect()
}

fn ejecting(strategy: Strategy, ejection: Ejection, instances: impl IntoIterator<Item = Instance>) -> Balancer {
    let balancer = Balancer::builder(strategy).eject(ejection).build();
    set(&balancer, instances);
    balancer
}

#[tokio::test]
async fn where_nobody_may_be_picked_nobody_is() {
    for strategy in every_strategy() {
        let balancer = Balancer::new(strategy.clone());
        assert!(balancer.pick().is_none(), "{strategy:?}: nothing set yet");
        set(&balancer, [instance("a")]);
        assert_eq!(pick(&balancer).id, "a", "{strategy:?}");
        set(&balancer, []);
        assert!(balancer.pick().is_none() && balancer.pick_for(b"key").is_none(), "{strategy:?}: emptied");
    }
}

#[tokio::test]
async fn only_passing_instances_are_picked() {
    let with = |id: &str, health| {
        let mut instance = instance(id);
        instance.health = health;
        instance
    };
    for strategy in every_strategy() {
        let balancer = balancer(strategy.clone(), [with("bad", Health::Failing), with("draining", Health::Draining)]);
        assert!(balancer.pick().is_none(), "{strategy:?}: no panic mode");
        set(&balancer, [with("bad", Health::Failing), instance("good"), with("draining", Health::Draining)]);
        assert_eq!(counts(&balancer, 100), BTreeMap::from([("good".to_owned(), 100)]), "{strategy:?}");
        assert_eq!(balancer.status().len(), 3, "all are told of");
    }
}

#[tokio::test]
async fn round_robin_is_exact() {
    let balancer = balancer(Strategy::RoundRobin, numbered(10));
    let order: Vec<usize> = (0..1_005).map(|_| pick(&balancer).id.parse().expect("a number")).collect();
    assert!(order.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 10), "in the order of ids");
    let counts = counts(&balancer, 7_003);
    assert!(counts.values().max() <= counts.values().min().map(|least| least + 1).as_ref(), "{counts:?}");
}

#[tokio::test]
async fn round_robin_goes_on_when_the_same_set_comes_again() {
    let balancer = balancer(Strategy::RoundRobin, numbered(3));
    let order = (0..30).map(|_| {
        set(&balancer, numbered(3));
        pick(&balancer).id.parse::<usize>().expect("a number")
    });
    let order: Vec<_> = order.collect();
    assert!(order.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 3), "{order:?}");
}

#[tokio::test]
async fn random_is_uniform_within_one_percent() {
    let counts = counts(&balancer(Strategy::Random, numbered(7)), 2_000_000);
    assert_eq!(counts.len(), 7);
    for (id, count) in counts {
        // Nearly six standard deviations; with one million picks they would be four, which one run in 3,000 exceeds.
        let deviation = (count as f64 * 7.0 / 2e6 - 1.0).abs();
        assert!(deviation < 0.01, "{id}: {count}");
    }
}

#[tokio::test]
async fn weighted_proportions_are_exact_in_every_cycle_and_spread_out() {
    let weights = [1, 2, 3, 10];
    let instances = || weights.iter().map(|weight| instance(weight).weight(*weight * 1_000));
    let balancer = balancer(Strategy::Weighted, instances());
    for _ in 0..50 {
        let mut cycle = BTreeMap::new();
        for _ in 0..16 {
            // The same set in the middle of a cycle does not begin it again.
            set(&balancer, instances());
            *cycle.entry(pick(&balancer).id.clone()).or_default() += 1;
        }
        assert_eq!(cycle, weights.iter().map(|weight| (weight.to_string(), *weight as usize)).collect());
    }
    let heavy: Vec<_> = (0..160).map(|_| pick(&balancer).id == "10").collect();
    assert!(heavy.windows(3).all(|three| three.iter().any(|heavy| *heavy)), "never more than two others in a row");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn weighted_proportions_are_exact_with_eight_tasks_too() {
    let balancer = balancer(Strategy::Weighted, (1..=40).map(|weight| instance(weight).weight(weight)));
    let tasks = (0..8).map(|_| {
        let balancer = balancer.clone();
        tokio::spawn(async move { counts(&balancer, 820 * 5) })
    });
    let mut total = BTreeMap::<u32, usize>::new();
    for task in tasks.collect::<Vec<_>>() {
        for (id, count) in task.await.expect("no panic") {
            *total.entry(id.parse().expect("a number")).or_default() += count;
        }
    }
    assert_eq!(total, (1..=40).map(|weight| (weight, weight as usize * 40)).collect());
}

#[tokio::test]
async fn least_requests_fills_the_idle_first_and_by_weight() {
    let even = balancer(Strategy::LeastRequests, numbered(10));
    let mut held: Vec<_> = (0..10).map(|_| pick(&even)).collect();
    assert_eq!(held.iter().map(|pick| pick.id.clone()).collect::<HashSet<_>>().len(), 10);
    let freed = held.swap_remove(4).id.clone();
    assert_eq!(pick(&even).id, freed);

    let weighted = balancer(Strategy::LeastRequests, [instance("light"), instance("heavy").weight(3)]);
    let held: Vec<_> = (0..40).map(|_| pick(&weighted)).collect();
    assert_eq!(held.iter().filter(|pick| pick.id == "light").count(), 10);
}

#[tokio::test]
async fn least_requests_breaks_ties_at_random() {
    let counts = counts(&balancer(Strategy::LeastRequests, numbered(4)), 40_000);
    // Eight deviations of 87.
    assert!(counts.len() == 4 && counts.values().all(|count| count.abs_diff(10_000) < 700), "{counts:?}");
}

/// One request: as long as the instance takes, on the paused clock.
async fn ask(balancer: &Balancer, latency: impl Fn(&str) -> Duration) -> String {
    let pick = pick(balancer);
    let id = pick.id.clone();
    sleep(latency(&id)).await;
    pick.success();
    id
}

#[tokio::test(start_paused = true)]
async fn of_a_slow_and_a_fast_one_the_fast_one_is_preferred_until_the_slow_one_recovers() {
    let balancer = balancer(Strategy::peak_ewma(), [instance("fast"), instance("slow")]);
    let slow = |id: &str| Duration::from_millis(if id == "slow" { 400 } else { 4 });
    let mut to_slow = 0;
    // 40 seconds or more.
    for _ in 0..10_000 {
        to_slow += usize::from(ask(&balancer, slow).await == "slow");
    }
    assert!((1..20).contains(&to_slow), "tried, and left alone: {to_slow} of 10,000");
    let latency = |id: &str| {
        let status = balancer.status().into_iter().find(|status| status.instance.id == id).expect("known");
        status.latency.expect("it is measured")
    };
    assert!(latency("fast") < Duration::from_millis(6), "{:?}", latency("fast"));
    let mut to_slow = 0;
    let started = tokio::time::Instant::now();
    while started.elapsed() < 60 * SECOND {
        to_slow += usize::from(ask(&balancer, |_| Duration::from_millis(4)).await == "slow");
    }
    let mut last = 0;
    for _ in 0..2_000 {
        last += usize::from(ask(&balancer, |_| Duration::from_millis(4)).await == "slow");
    }
    assert!(to_slow > 0 && (500..1_500).contains(&last), "recovered: {to_slow}, then {last} of 2,000");
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_at_once_does_not_look_fast() {
    let balancer = balancer(Strategy::peak_ewma(), [instance("broken"), instance("works")]);
    let mut broken = 0;
    // 100 seconds: it is tried again every 46, when a second has faded to 10 ms.
    for _ in 0..10_000 {
        let pick = pick(&balancer);
        if pick.id == "broken" {
            broken += 1;
            pick.failure();
        } else {
            sleep(Duration::from_millis(10)).await;
            pick.success();
        }
    }
    assert!((1..=4).contains(&broken), "{broken}");
}

#[tokio::test]
async fn two_choices_keep_the_longest_queue_near_ln_ln_n() {
    let longest = |strategy| {
        let balancer = balancer(strategy, numbered(1_000));
        let _held: Vec<_> = (0..1_000).map(|_| pick(&balancer)).collect();
        balancer.status().into_iter().map(|status| status.in_flight).max().expect("a thousand")
    };
    // log2 ln 1,000 is 2.8; at random it is 5 or 6.
    let long = Duration::from_secs(1_000_000);
    let longest = longest(Strategy::PeakEwma(PeakEwma { decay: long, ..PeakEwma::default() }));
    assert!(longest <= 4, "{longest}");
}

#[tokio::test(start_paused = true)]
async fn requests_in_flight_are_counted_until_reported_or_dropped() {
    for strategy in every_strategy() {
        let balancer = balancer(strategy.clone(), numbered(3));
        let in_flight = || balancer.status().iter().map(|status| status.in_flight).sum::<u64>();
        let picks: Vec<_> = (0..30).map(|_| pick(&balancer)).collect();
        assert_eq!(in_flight(), 30, "{strategy:?}");
        set(&balancer, numbered(3).map(|instance| instance.tag("new")));
        assert_eq!(in_flight(), 30, "{strategy:?}: a new set of the same ids keeps the counts");
        for (i, pick) in picks.into_iter().enumerate() {
            match i % 3 {
                0 => pick.success(),
                1 => pick.failure(),
                _ => drop(pick),
            }
        }
        assert_eq!(in_flight(), 0, "{strategy:?}");
        assert!(pick(&balancer).tags.contains("new"), "{strategy:?}: picks give what was set last");
    }
}

#[tokio::test]
async fn a_pick_outlives_its_instance_and_the_balancer() {
    let balancer = ejecting(Strategy::RoundRobin, Ejection { after: 1, ..Ejection::default() }, numbered(4));
    let picks: Vec<_> = (0..4).map(|_| pick(&balancer)).collect();
    set(&balancer, []);
    let mut picks = picks.into_iter();
    picks.next().expect("four").failure();
    assert!(balancer.pick().is_none() && ejected(&balancer).is_empty());
    drop(balancer);
    picks.for_each(Pick::failure);
}

#[tokio::test(start_paused = true)]
async fn an_instance_is_out_only_at_the_threshold_and_back_after_expiry() {
    for strategy in every_strategy() {
        let balancer = ejecting(strategy.clone(), Ejection { after: 3, ..Ejection::default() }, numbered(4));
        let victim = pick(&balancer).id.clone();
        fail(&balancer, &victim, 2);
        assert!(ejected(&balancer).is_empty(), "{strategy:?}: not yet");
        while pick(&balancer).id != victim {}
        let _ = std::iter::repeat_with(|| pick(&balancer)).find(|pick| pick.id == victim).map(Pick::success);
        fail(&balancer, &victim, 2);
        assert!(ejected(&balancer).is_empty(), "{strategy:?}: a success starts the row anew");
        fail(&balancer, &victim, 1);
        assert_eq!(ejected(&balancer), std::slice::from_ref(&victim), "{strategy:?}");
        advance(Duration::from_millis(29_999)).await;
        assert!(!counts(&balancer, 1_000).contains_key(&victim), "{strategy:?}: out for 30 s");
        advance(Duration::from_millis(1)).await;
        let back = counts(&balancer, 1_000).contains_key(&victim);
        assert_eq!(back, strategy != Strategy::Sticky, "{strategy:?}: back, but what is settled stays");
        assert!(ejected(&balancer).is_empty(), "{strategy:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn ejections_grow_with_repeats_up_to_the_cap_and_are_forgiven() {
    let ejection = Ejection { after: 1, base: SECOND, cap: 5 * SECOND, max_percent: 50 };
    let balancer = ejecting(Strategy::RoundRobin, ejection, numbered(2));
    let length = || balancer.status()[0].ejected_for;
    for seconds in [1, 2, 4, 5, 5] {
        fail(&balancer, "0000", 1);
        assert_eq!(length(), seconds * SECOND);
        advance(seconds * SECOND + Duration::from_millis(1)).await;
    }
    advance(5 * SECOND).await;
    fail(&balancer, "0000", 1);
    assert_eq!(length(), SECOND, "five seconds without an ejection begin anew");
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_before_the_return_does_not_eject_again() {
    let balancer = ejecting(Strategy::RoundRobin, Ejection { after: 2, ..Ejection::default() }, numbered(2));
    let late: Vec<_> = std::iter::repeat_with(|| pick(&balancer)).filter(|p| p.id == "0000").take(6).collect();
    fail(&balancer, "0000", 2);
    let mut late = late.into_iter();
    late.by_ref().take(3).for_each(Pick::failure);
    assert_eq!(balancer.status()[0].ejected_for, Duration::from_secs(30), "not prolonged");
    advance(Duration::from_secs(31)).await;
    late.for_each(Pick::failure);
    assert!(ejected(&balancer).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_general_outage_does_not_empty_the_set() {
    for strategy in every_strategy() {
        let balancer = ejecting(strategy.clone(), Ejection { after: 1, ..Ejection::default() }, numbered(9));
        for _ in 0..10_000 {
            pick(&balancer).failure();
        }
        assert_eq!(ejected(&balancer).len(), 4, "{strategy:?}: half of nine, rounded down");
        // Of three, one may be out: the rest comes back when the others leave.
        let out = ejected(&balancer);
        set(&balancer, out[..3].iter().map(instance));
        assert_eq!(ejected(&balancer).len(), 1, "{strategy:?}");
        assert!(balancer.pick().is_some(), "{strategy:?}");
    }
    let single = ejecting(Strategy::Random, Ejection { after: 1, ..Ejection::default() }, numbered(1));
    fail(&single, "0000", 100);
    assert!(ejected(&single).is_empty());
}

#[tokio::test(start_paused = true)]
async fn with_a_share_of_all_a_general_outage_picks_nobody_until_the_first_return() {
    let all = Ejection { after: 1, max_percent: 100, ..Ejection::default() };
    let balancer = ejecting(Strategy::Random, all, numbered(3));
    while let Some(pick) = balancer.pick() {
        pick.failure();
    }
    assert_eq!(ejected(&balancer).len(), 3);
    advance(Duration::from_secs(30)).await;
    assert!(balancer.pick().is_some());
}

#[tokio::test(start_paused = true)]
async fn an_ejection_outlives_a_new_set_and_ends_with_a_departure() {
    let balancer = ejecting(Strategy::RoundRobin, Ejection { after: 1, ..Ejection::default() }, numbered(4));
    fail(&balancer, "0002", 1);
    set(&balancer, numbered(6).map(|instance| instance.weight(7)));
    assert_eq!(ejected(&balancer), ["0002"]);
    set(&balancer, numbered(2));
    set(&balancer, numbered(4));
    assert!(ejected(&balancer).is_empty(), "it left and came anew");
}

#[tokio::test(start_paused = true)]
async fn the_near_zone_is_preferred_while_enough_of_it_may_be_picked() {
    let instances = || (0..8).map(|i| instance(i).zone(if i < 4 { "eu-1" } else { "eu-2" }));
    for strategy in every_strategy() {
        let builder = Balancer::builder(strategy.clone()).prefer_zone("eu-1", 3);
        let balancer = builder.eject(Ejection { after: 1, ..Ejection::default() }).build();
        set(&balancer, instances());
        let near = |counts: &BTreeMap<String, usize>| counts.keys().all(|id| id.as_str() < "4");
        assert!(near(&counts(&balancer, 500)), "{strategy:?}");
        let mut out = Vec::new();
        for _ in 0..2 {
            assert!(near(&counts(&balancer, 500)), "{strategy:?}: three are enough");
            out.push(pick(&balancer).id.clone());
            fail(&balancer, &out[out.len() - 1], 1);
        }
        let all = counts(&balancer, 1_000);
        assert_eq!(all.len(), if strategy == Strategy::Sticky { 1 } else { 6 }, "{strategy:?}: two are not, {all:?}");
        advance(Duration::from_secs(30)).await;
        assert!(near(&counts(&balancer, 500)), "{strategy:?}: near again");
        set(&balancer, instances().skip(4));
        assert!(balancer.pick().is_some(), "{strategy:?}: the others are better than nobody");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_removed_instance_is_never_picked_after_set_has_returned() {
    for strategy in every_strategy() {
        let balancer = balancer(strategy.clone(), numbered(20));
        // Instances below this number have been removed; written after `set` has returned.
        let removed = Arc::new(AtomicUsize::new(0));
        let (done, picks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..8).map(|_| {
            let (balancer, removed) = (balancer.clone(), Arc::clone(&removed));
            let (done, picks) = (Arc::clone(&done), Arc::clone(&picks));
            tokio::spawn(async move {
                while !done.load(Ordering::SeqCst) {
                    let least = removed.load(Ordering::SeqCst);
                    let pick = pick(&balancer);
                    let id: usize = pick.id.parse().expect("a number");
                    assert!(id >= least, "{id} was removed: {least}");
                    if picks.fetch_add(1, Ordering::SeqCst).is_multiple_of(64) {
                        tokio::task::yield_now().await;
                    }
                }
            })
        });
        let tasks: Vec<_> = tasks.collect();
        for least in 1..200 {
            set(&balancer, (least..least + 20).map(|i| instance(format!("{i:04}"))));
            removed.store(least, Ordering::SeqCst);
            let before = picks.load(Ordering::SeqCst);
            while picks.load(Ordering::SeqCst) < before + 16 {
                tokio::task::yield_now().await;
            }
        }
        done.store(true, Ordering::SeqCst);
        for task in tasks {
            task.await.expect("a removed one was picked");
        }
        assert!(balancer.status().iter().all(|status| status.in_flight == 0), "{strategy:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn with_consistent_hashing_only_the_keys_of_who_goes_move() {
    let ejection = Ejection { after: 1, ..Ejection::default() };
    let balancer = ejecting(Strategy::ConsistentHash, ejection, numbered(10));
    let homes = || -> Vec<_> {
        let home = |key: u32| balancer.pick_for(&key.to_be_bytes()).expect("somebody").id.clone();
        (0..10_000).map(home).collect()
    };
    let before = homes();
    assert_eq!(before, homes(), "the same key, the same instance");
    fail(&balancer, "0003", 1);
    let during = homes();
    for (before, during) in before.iter().zip(&during) {
        assert!(if before == "0003" { during != "0003" } else { before == during });
    }
    advance(Duration::from_secs(30)).await;
    assert_eq!(before, homes(), "and back");
    set(&balancer, numbered(10).filter(|instance| instance.id != "0003"));
    assert_eq!(during, homes(), "a departure is as an ejection");
    set(&balancer, numbered(11));
    let after = homes();
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after);
    assert!(moved.clone().all(|(_, after)| after == "0010") && (1..1_000).contains(&moved.count()));
    assert!(counts(&balancer, 1_000).len() == 11, "without a key, any");
}

#[tokio::test]
async fn bounded_hashing_gives_nobody_more_than_its_bound() {
    let balancer = balancer(Strategy::BoundedHash { percent: 125 }, numbered(10));
    let home = balancer.pick_for(b"hot").expect("somebody").id.clone();
    let mut held = Vec::new();
    for total in 1..=1_000_u64 {
        held.push(balancer.pick_for(b"hot").expect("somebody"));
        let most = balancer.status().into_iter().map(|status| status.in_flight).max().expect("ten");
        assert!(most <= (total * 125).div_ceil(1_000), "{most} of {total}");
    }
    assert_eq!(held[0].id, home);
    held.clear();
    assert_eq!(balancer.pick_for(b"hot").expect("somebody").id, home, "home again");
}

#[tokio::test(start_paused = true)]
async fn sticky_stays_until_its_instance_goes_and_then_settles() {
    let balancer = ejecting(Strategy::Sticky, Ejection { after: 1, ..Ejection::default() }, numbered(10));
    let first = pick(&balancer).id.clone();
    for count in [20, 11, 10] {
        set(&balancer, numbered(count));
        assert_eq!(counts(&balancer, 100), BTreeMap::from([(first.clone(), 100)]));
    }
    set(&balancer, numbered(10).filter(|instance| instance.id != first));
    let second = pick(&balancer).id.clone();
    assert_ne!(second, first);
    set(&balancer, numbered(10));
    assert_eq!(pick(&balancer).id, second, "the first is back, and the second stays");
    fail(&balancer, &second, 1);
    let third = pick(&balancer).id.clone();
    advance(Duration::from_secs(60)).await;
    assert!(third != second && pick(&balancer).id == third);
}

#[tokio::test]
async fn of_instances_with_the_same_name_the_last_counts() {
    for strategy in every_strategy() {
        let old = instance("a").tag("old");
        let balancer = balancer(strategy.clone(), [old, instance("a").tag("new")]);
        assert!(pick(&balancer).tags.contains("new"), "{strategy:?}");
        assert_eq!(balancer.status().len(), 1);
        let other = Instance::new("other", "h:1").id("a");
        set(&balancer, [instance("a"), other]);
        assert_eq!(balancer.status().len(), 2, "{strategy:?}: the service is part of the name");
    }
}

#[tokio::test]
async fn a_weight_of_zero_counts_as_one() {
    for strategy in every_strategy() {
        let balancer = balancer(strategy.clone(), numbered(3).map(|instance| instance.weight(0)));
        let counts = counts(&balancer, 1_000);
        assert_eq!(counts.len(), if strategy == Strategy::Sticky { 1 } else { 3 }, "{strategy:?}: {counts:?}");
    }
}
