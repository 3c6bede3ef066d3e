//! What a balancer of tower sees of a service, on tokio's clock.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::poll_fn, poll};
use quorate_core::{
    Coordinator, Instance, SessionOptions,
    discovery::{DiscoverOptions, Health, Registration, Service},
};
use quorate_memory::Memory;
use quorate_tower::Discover;
use tokio::time::{advance, sleep};
use tower::{
    Service as _, ServiceExt as _,
    balance::p2c::Balance,
    discover::Change,
    load::{Constant, Load},
    service_fn,
};

const SECOND: Duration = Duration::from_secs(1);

fn coordinator(memory: Memory) -> Coordinator {
    Coordinator::new(Arc::new(memory), SessionOptions::default())
}

fn instance(id: &str) -> Instance {
    Instance::new("shop", format!("10.0.0.1:{id}")).id(id)
}

async fn register(coord: &Coordinator, instance: Instance) -> Registration {
    let registration = coord.register(instance).expect("a good instance");
    registration.ready().await.expect("registered");
    registration
}

/// What is told until nothing more comes, as `+id endpoint` and `-id`.
async fn changes(discover: &mut Discover<String>) -> Vec<String> {
    // Everything that is under way arrives.
    sleep(Duration::from_millis(5)).await;
    let mut told = Vec::new();
    while let Some(Some(Ok(change))) = discover.next().now_or_never() {
        told.push(match change {
            Change::Insert(key, service) => format!("+{key} {service}"),
            Change::Remove(key) => format!("-{key}"),
        });
    }
    told
}

fn endpoints(service: &Service) -> Discover<String> {
    Discover::new(service, |instance: &Instance| Ok::<_, io::Error>(instance.endpoint()))
}

#[tokio::test(start_paused = true)]
async fn who_comes_is_inserted_once_and_who_goes_drains_or_fails_is_removed_once() {
    let coord = coordinator(Memory::new());
    let a = register(&coord, instance("1")).await;
    let service = coord.discover("shop").await.expect("followed");
    let mut discover = endpoints(&service);
    assert_eq!(changes(&mut discover).await, ["+1 10.0.0.1:1"], "the set at hand");
    assert!(changes(&mut discover).await.is_empty());
    let b = register(&coord, instance("2")).await;
    let c = register(&coord, instance("3")).await;
    assert_eq!(changes(&mut discover).await, ["+2 10.0.0.1:2", "+3 10.0.0.1:3"]);
    a.update(|_| {}).expect("the same record again");
    assert!(changes(&mut discover).await.is_empty(), "the same set again");
    a.drain().expect("kept");
    b.update(|instance| instance.health = Health::Failing).expect("kept");
    assert_eq!(changes(&mut discover).await, ["-1", "-2"]);
    c.close().await.expect("closed");
    a.close().await.expect("closed");
    assert_eq!(changes(&mut discover).await, ["-3"], "1 was removed before");
    b.update(|instance| instance.health = Health::Passing).expect("kept");
    assert_eq!(changes(&mut discover).await, ["+2 10.0.0.1:2"], "back");
}

#[tokio::test(start_paused = true)]
async fn a_new_address_or_metadata_makes_a_new_service_and_a_new_weight_does_not() {
    let coord = coordinator(Memory::new());
    let service = coord.discover("shop").await.expect("followed");
    let (mut plain, mut weighing) = (endpoints(&service), endpoints(&service).remake_for_weight());
    let a = register(&coord, instance("1")).await;
    assert_eq!(changes(&mut plain).await, ["+1 10.0.0.1:1"]);
    assert_eq!(changes(&mut weighing).await, ["+1 10.0.0.1:1"]);
    a.update(|instance| instance.weight = 7).expect("kept");
    assert!(changes(&mut plain).await.is_empty(), "the weight alone");
    assert_eq!(changes(&mut weighing).await, ["+1 10.0.0.1:1"], "asked for");
    a.update(|instance| (instance.weight, instance.port) = (8, 99)).expect("kept");
    assert_eq!(changes(&mut plain).await, ["+1 10.0.0.1:99"], "in the place of the old one");
    a.update(|instance| drop(instance.metadata.insert("shard".to_owned(), "4".to_owned()))).expect("kept");
    assert_eq!(changes(&mut plain).await, ["+1 10.0.0.1:99"]);
}

#[tokio::test(start_paused = true)]
async fn changes_that_were_undone_before_anybody_looked_are_not_told() {
    let coord = coordinator(Memory::new());
    let service = coord.discover("shop").await.expect("followed");
    let mut discover = endpoints(&service);
    let a = register(&coord, instance("1")).await;
    assert_eq!(changes(&mut discover).await.len(), 1);
    for _ in 0..50 {
        register(&coord, instance("2")).await.close().await.expect("closed");
        a.drain().expect("kept");
        a.ready().await.expect("drained");
        a.update(|instance| instance.health = Health::Passing).expect("kept");
        a.ready().await.expect("passing");
    }
    assert!(changes(&mut discover).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_the_factory_skips_that_instance_only_and_is_told_and_tried_again() {
    let coord = coordinator(Memory::new());
    let service = coord.discover("shop").await.expect("followed");
    let (broken, calls) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU32::new(0)));
    let told = Arc::new(Mutex::new(Vec::new()));
    let (b, c, t) = (Arc::clone(&broken), Arc::clone(&calls), Arc::clone(&told));
    let make = move |instance: &Instance| {
        c.fetch_add(1, Ordering::SeqCst);
        match b.load(Ordering::SeqCst) && instance.port.is_multiple_of(2) {
            true => Err(io::Error::other("no even ports")),
            false => Ok(instance.endpoint()),
        }
    };
    let skipped = move |instance: &Instance, error: &quorate_tower::BoxError| {
        t.lock().expect("no panic").push(format!("{}: {error}", instance.id));
    };
    let mut discover = Discover::new(&service, make).on_skipped(skipped);
    let _one = register(&coord, instance("1")).await;
    let two = register(&coord, instance("2")).await;
    let three = register(&coord, instance("3")).await;
    assert_eq!(changes(&mut discover).await, ["+1 10.0.0.1:1", "+3 10.0.0.1:3"]);
    assert_eq!(*told.lock().expect("no panic"), ["2: no even ports"]);
    // Other changes are no reason to ask for it again; time is, with longer and longer pauses.
    three.update(|instance| instance.zone = Some("eu-1".to_owned())).expect("kept");
    assert_eq!(changes(&mut discover).await, ["+3 10.0.0.1:3"]);
    assert_eq!(calls.load(Ordering::SeqCst), 4);
    for _ in 0..600 {
        advance(SECOND / 10).await;
        assert!(changes(&mut discover).await.is_empty());
    }
    let tries = told.lock().expect("no panic").len();
    assert!((7..=14).contains(&tries), "{tries} tries in a minute");
    broken.store(false, Ordering::SeqCst);
    advance(21 * SECOND).await;
    assert_eq!(changes(&mut discover).await, ["+2 10.0.0.1:2"]);
    // One whose new record has no service loses the old one, and gets one again for a record that has.
    broken.store(true, Ordering::SeqCst);
    two.update(|instance| instance.port = 4).expect("kept");
    assert_eq!(changes(&mut discover).await, ["-2"]);
    two.update(|instance| instance.port = 5).expect("kept");
    assert_eq!(changes(&mut discover).await, ["+2 10.0.0.1:5"], "a new record is tried at once");
    let before = calls.load(Ordering::SeqCst);
    for _ in 0..100 {
        advance(SECOND).await;
        assert!(changes(&mut discover).await.is_empty());
    }
    assert_eq!(calls.load(Ordering::SeqCst), before, "nobody is left to be tried");
    // One that left after it failed is forgotten: nobody tries it, and it is new when it comes again.
    two.update(|instance| instance.port = 6).expect("kept");
    assert_eq!(changes(&mut discover).await, ["-2"]);
    two.close().await.expect("closed");
    assert!(changes(&mut discover).await.is_empty());
    broken.store(false, Ordering::SeqCst);
    let _two = register(&coord, instance("6").id("2")).await;
    assert_eq!(changes(&mut discover).await, ["+2 10.0.0.1:6"]);
}

/// The timer of a factory that failed wakes whoever polls, without a change of the set.
#[tokio::test(start_paused = true)]
async fn a_factory_that_recovers_is_asked_without_a_change_of_the_set() {
    let coord = coordinator(Memory::new());
    let _one = register(&coord, instance("1")).await;
    let service = coord.discover("shop").await.expect("followed");
    let mut calls = 0;
    let mut discover = Discover::new(&service, move |instance: &Instance| {
        calls += 1;
        if calls < 4 { Err(io::Error::other("not yet")) } else { Ok(instance.endpoint()) }
    });
    let change = tokio::time::timeout(SECOND * 5, discover.next()).await.expect("woken");
    assert!(matches!(change, Some(Ok(Change::Insert(key, _))) if &*key == "1"));
}

#[tokio::test(start_paused = true)]
async fn an_outage_changes_nothing_and_who_does_not_come_back_goes_in_the_end() {
    let store = Memory::new();
    let (near, far) = (store.client(), store.client());
    let (near_faults, far_faults) = (near.faults(), far.faults());
    let (near, far) = (coordinator(near), coordinator(far));
    let _one = register(&far, instance("1")).await;
    let mut options = DiscoverOptions::default();
    options.linger = 30 * SECOND;
    let service = near.discover_with("shop", &options).await.expect("followed");
    let mut discover = endpoints(&service);
    assert_eq!(changes(&mut discover).await.len(), 1);
    near_faults.cut();
    far_faults.cut();
    for _ in 0..100 {
        advance(SECOND * 6).await;
        assert!(changes(&mut discover).await.is_empty(), "ten minutes without a coordinator");
    }
    assert!(service.now().stale_since().is_some(), "the fault bites");
    near_faults.heal();
    service.until(|now| now.stale_since().is_none()).await;
    advance(SECOND * 20).await;
    assert!(changes(&mut discover).await.is_empty(), "the server shows nobody; not yet believed");
    advance(SECOND * 20).await;
    assert_eq!(changes(&mut discover).await, ["-1"]);
    far_faults.heal();
    advance(SECOND * 20).await;
    assert_eq!(changes(&mut discover).await, ["+1 10.0.0.1:1"]);
}

#[tokio::test(start_paused = true)]
async fn each_of_several_gets_every_change() {
    let coord = coordinator(Memory::new());
    let mut service = coord.discover("shop").await.expect("followed");
    let mut all: Vec<_> = (0..3).map(|_| endpoints(&service)).collect();
    let _one = register(&coord, instance("1")).await;
    service.until(|now| now.len() == 1).await;
    // The handle was given the set; who is made of it begins with that set all the same.
    service.changed().await;
    all.push(endpoints(&service));
    for discover in &mut all {
        assert_eq!(changes(discover).await, ["+1 10.0.0.1:1"]);
    }
}

type Answers = Arc<Mutex<BTreeMap<String, u32>>>;

/// A service that notes who was called, all with the same load.
fn counted(
    instance: &Instance,
    answers: &Answers,
) -> impl tower::Service<(), Error = io::Error> + Load<Metric = u8> + use<> {
    let (endpoint, answers) = (instance.endpoint(), Arc::clone(answers));
    let service = service_fn(move |()| {
        *answers.lock().expect("no panic").entry(endpoint.clone()).or_default() += 1;
        std::future::ready(Ok::<_, io::Error>(()))
    });
    Constant::new(service, 0)
}

#[tokio::test(start_paused = true)]
async fn a_balancer_waits_for_the_first_spreads_calls_and_moves_over_when_one_drains() {
    let coord = coordinator(Memory::new());
    let service = coord.discover("shop").await.expect("followed");
    let answers = Answers::default();
    let noted = Arc::clone(&answers);
    let mut balance =
        Balance::new(Discover::new(&service, move |instance: &Instance| Ok::<_, io::Error>(counted(instance, &noted))));
    assert!(poll!(Box::pin(balance.ready())).is_pending(), "nobody is no error");
    let one = register(&coord, instance("1")).await;
    let _two = register(&coord, instance("2")).await;
    service.until(|now| now.len() == 2).await;
    for _ in 0..7_000 {
        balance.ready().await.expect("ready").call(()).await.expect("answered");
    }
    let counts = std::mem::take(&mut *answers.lock().expect("no panic"));
    assert!(counts.len() == 2 && counts.values().all(|count| count.abs_diff(3_500) < 875), "{counts:?}");
    one.drain().expect("kept");
    service.until(|now| now.passing().count() == 1).await;
    for _ in 0..100 {
        balance.ready().await.expect("ready").call(()).await.expect("answered");
    }
    assert_eq!(*answers.lock().expect("no panic"), BTreeMap::from([("10.0.0.1:2".to_owned(), 100)]));
    // Waiting for somebody is woken by the registration alone.
    drop(one);
    _two.close().await.expect("closed");
    service.until(|now| now.is_empty()).await;
    let waiting = tokio::spawn(async move { poll_fn(|cx| balance.poll_ready(cx)).await.map(|()| balance) });
    sleep(SECOND).await;
    assert!(!waiting.is_finished());
    let _three = register(&coord, instance("3")).await;
    waiting.await.expect("no panic").expect("ready");
}

#[tokio::test(start_paused = true)]
async fn the_newest_service_of_an_instance_takes_the_calls() {
    let coord = coordinator(Memory::new());
    let service = coord.discover("shop").await.expect("followed");
    let answers = Answers::default();
    let noted = Arc::clone(&answers);
    let mut balance =
        Balance::new(Discover::new(&service, move |instance: &Instance| Ok::<_, io::Error>(counted(instance, &noted))));
    let one = register(&coord, instance("1")).await;
    balance.ready().await.expect("ready").call(()).await.expect("answered");
    one.update(|instance| instance.port = 99).expect("kept");
    service.until(|now| now.get("1").is_some_and(|one| one.port == 99)).await;
    for _ in 0..10 {
        balance.ready().await.expect("ready").call(()).await.expect("answered");
    }
    let counts = answers.lock().expect("no panic").clone();
    assert_eq!(counts, BTreeMap::from([("10.0.0.1:1".to_owned(), 1), ("10.0.0.1:99".to_owned(), 10)]));
    assert_eq!(balance.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn of_two_the_one_that_is_ready_is_called_and_one_that_breaks_is_dropped() {
    let coord = coordinator(Memory::new());
    let service = coord.discover("shop").await.expect("followed");
    let broken = Arc::new(AtomicBool::new(false));
    let b = Arc::clone(&broken);
    let make = move |instance: &Instance| {
        let (busy, broken) = (instance.id == "busy", Arc::clone(&b));
        let ready = poll_fn(move |_| match (busy, broken.load(Ordering::SeqCst)) {
            (true, false) => Poll::Pending,
            (true, true) => Poll::Ready(Err(io::Error::other("broken"))),
            (false, _) => Poll::Ready(Ok(())),
        });
        let id = instance.id.clone();
        Ok::<_, io::Error>(Constant::new(Gate { ready: Box::pin(ready), id }, 0))
    };
    let mut balance = Balance::new(Discover::new(&service, make));
    let _busy = register(&coord, instance("1").id("busy")).await;
    let _idle = register(&coord, instance("2").id("idle")).await;
    service.until(|now| now.len() == 2).await;
    for _ in 0..10 {
        assert_eq!(balance.ready().await.expect("ready").call(()).await.expect("answered"), "idle");
    }
    assert_eq!(balance.len(), 2);
    broken.store(true, Ordering::SeqCst);
    // Whoever broke is looked at when something wakes it: here, its next registration.
    _busy.update(|instance| instance.port = 9).expect("kept");
    service.until(|now| now.get("busy").is_some_and(|one| one.port == 9)).await;
    assert_eq!(balance.ready().await.expect("ready").call(()).await.expect("answered"), "idle");
    assert_eq!(balance.len(), 1, "dropped, and no error of the balancer");
}

type Readiness = std::pin::Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

struct Gate {
    ready: Readiness,
    id: String,
}

impl tower::Service<()> for Gate {
    type Response = String;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<String>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        self.ready.as_mut().poll(cx)
    }

    fn call(&mut self, (): ()) -> Self::Future {
        std::future::ready(Ok(self.id.clone()))
    }
}
