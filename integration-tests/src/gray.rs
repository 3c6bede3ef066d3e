//! Gray failures: instances that look one way to the coordinator and another to their clients (P. Huang et al., "Gray
//! Failure: The Achilles' Heel of Cloud-Scale Systems", 2017).
//!
//! Promise: who takes requests is decided by what became of requests. An instance that is registered and beats, but
//! hangs, is taken out as fast as its clients' limits allow; one that only the coordinator cannot hear of stays in use.
//! The instances are real TCP servers behind proxies, with paths of their own to the coordinator.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use quorate::{
    Config, Coordinator, SessionOptions,
    balance::{Balancer, CallError, CallPolicy, Ejection, Strategy, Verdict},
    discovery::{Instance, Registration, Service},
    heartbeat::{Monitor, PeerEvent, Publisher},
    layer::Stack,
    memory::{Faults, Memory},
};
use quorate_testkit::proxy::{Direction, FaultProxy};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    cases,
    heartbeats::{EVERY, options},
    outage::proxied,
    site::{Site, connect_long},
};

cases!("gray":
    an_instance_that_beats_and_gets_no_requests_is_taken_out_in_time,
    an_instance_that_beats_and_whose_answers_are_lost_is_taken_out_in_time,
    an_instance_that_the_coordinator_cannot_hear_of_stays_in_use,
    an_instance_that_does_not_hear_of_the_coordinator_stays_in_use,
);

const INSTANCES: usize = 4;
const CALLERS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(30);
/// Far more than a working instance takes on a busy machine.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(1);
const EJECTION: Ejection =
    Ejection { after: 3, base: Duration::from_secs(6), cap: Duration::from_secs(60), max_percent: 50 };
/// From the first request that hangs to the last one that is sent: so many failures in a row, each of a request that
/// took its whole limit, and the wait for the next turn of the round robin. If all came from one caller; several are
/// faster.
const DETECTION: Duration = Duration::from_millis(3 * (1000 + 100));
/// For a busy machine.
const SLACK: Duration = Duration::from_secs(1);

/// The instance's way to the coordinator.
enum Way {
    Proxy(FaultProxy),
    Memory(Faults),
}

impl Way {
    /// Nothing gets through either way, or nothing gets to the instance.
    fn cut(&self, one_way: bool) {
        match (self, one_way) {
            (Self::Proxy(proxy), false) => {
                proxy.hold(Direction::ToServer);
                proxy.hold(Direction::ToClient);
            }
            (Self::Proxy(proxy), true) => proxy.hold(Direction::ToClient),
            (Self::Memory(faults), false) => faults.cut(),
            // The nearest there is: calls do not return.
            (Self::Memory(faults), true) => faults.pause(),
        }
    }

    async fn heal(&self) {
        match self {
            Self::Proxy(proxy) => proxy.heal().await,
            Self::Memory(faults) => {
                faults.heal();
                faults.resume();
            }
        }
    }
}

/// A server that answers each byte with its number.
struct Node {
    id: String,
    coord: Coordinator,
    way: Way,
    /// What its clients connect to.
    front: FaultProxy,
    _registration: Registration,
    _beats: Publisher,
    _server: JoinSet<()>,
}

impl Node {
    async fn start(number: usize, site: &Site, config: &Config) -> Self {
        let id = format!("node-{number}");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let front = FaultProxy::start(listener.local_addr().expect("bound")).await.expect("a free port");
        let mut server = JoinSet::new();
        server.spawn(serve(listener, u8::try_from(number).expect("few")));
        let (coord, way) = apart(site, config).await;
        let instance = Instance::new("echo", front.addr().to_string()).id(&id);
        let registration = coord.register(instance).expect("a good instance");
        timeout(PATIENCE, registration.ready()).await.expect("in time").expect("registered");
        let beats = coord.heartbeat("echo").beat(&id, EVERY).expect("good names");
        Self { id, coord, way, front, _registration: registration, _beats: beats, _server: server }
    }
}

/// A coordinator whose way to the server can be cut.
async fn apart(site: &Site, config: &Config) -> (Coordinator, Way) {
    if site.backend != "memory" {
        let (proxy, through) = proxied(site, config).await;
        return (quorate::connect_with(&through).await.expect("the server is there"), Way::Proxy(proxy));
    }
    let memory = Memory::connect(config).await.expect("a good URL");
    let faults = memory.faults();
    let backend = Stack::new(Arc::new(memory)).standard(config.request_timeout).build();
    let options = SessionOptions { ttl: config.session_ttl, ..SessionOptions::default() };
    (Coordinator::new(backend, options), Way::Memory(faults))
}

async fn serve(listener: TcpListener, answer: u8) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((mut stream, _)) = accepted else { continue };
                open.spawn(async move {
                    while stream.read_u8().await.is_ok() && stream.write_u8(answer).await.is_ok() {}
                });
            }
            Some(_) = open.join_next() => {}
        }
    }
}

async fn ask(address: SocketAddr) -> io::Result<u8> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_u8(0).await?;
    stream.read_u8().await
}

/// What the clients have seen.
#[derive(Default)]
struct Seen {
    over: AtomicBool,
    /// Attempts: to whom, from when to when, and whether it was answered.
    attempts: Mutex<Vec<(String, Instant, Instant, bool)>>,
    errors: Mutex<Vec<CallError<io::Error>>>,
}

/// Notes an attempt also if it is dropped, as those are that hang.
struct Note<'a>(&'a Seen, String, Instant, bool);

impl Note<'_> {
    fn answered(mut self) {
        self.3 = true;
    }
}

impl Drop for Note<'_> {
    fn drop(&mut self) {
        let Self(seen, id, begun, answered) = self;
        seen.attempts.lock().expect("no panic").push((id.clone(), *begun, Instant::now(), *answered));
    }
}

async fn requests(balancer: Balancer, seen: Arc<Seen>) {
    let policy = CallPolicy { attempts: 3, attempt_limit: ATTEMPT_LIMIT, ..CallPolicy::default() };
    while !seen.over.load(Ordering::Relaxed) {
        let attempt = |instance: Arc<Instance>| {
            let note = Note(&seen, instance.id.clone(), Instant::now(), false);
            async move {
                let answer = ask(instance.endpoint().parse().expect("an address")).await?;
                note.answered();
                Ok(answer)
            }
        };
        if let Err(error) = balancer.call(&policy, |_| Verdict::Elsewhere, attempt).await {
            seen.errors.lock().expect("no panic").push(error);
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Instances in use, and everybody who looks at them.
struct Fleet {
    nodes: Vec<Node>,
    service: Service,
    monitor: Monitor,
    balancer: Balancer,
    seen: Arc<Seen>,
    callers: JoinSet<()>,
}

impl Fleet {
    async fn start(site: &Site) -> Self {
        // No cut of these cases is as long as the lease.
        let config = site.config().with_session_ttl(Duration::from_secs(12));
        let config = config.with_timeouts(Duration::from_secs(2), Duration::from_secs(1));
        let coord = connect_long(&config).await;
        let monitor = coord.heartbeat("echo").monitor(options()).expect("good options");
        let mut nodes = Vec::new();
        for number in 0..INSTANCES {
            nodes.push(Node::start(number, site, &config).await);
        }
        let service = coord.discover("echo").await.expect("followed");
        timeout(PATIENCE, service.until(|now| now.passing().count() == INSTANCES)).await.expect("all are found");
        let balancer = Balancer::builder(Strategy::RoundRobin).eject(EJECTION).build();
        balancer.follow(&service);
        let (seen, mut callers) = (Arc::new(Seen::default()), JoinSet::new());
        for _ in 0..CALLERS {
            callers.spawn(requests(balancer.clone(), Arc::clone(&seen)));
        }
        let fleet = Self { nodes, service, monitor, balancer, seen, callers };
        let all: BTreeSet<_> = fleet.nodes.iter().map(|node| node.id.clone()).collect();
        fleet.answers_of(&all, Instant::now()).await;
        timeout(PATIENCE, async {
            while fleet.monitor.peers().len() < INSTANCES {
                sleep(EVERY).await;
            }
        })
        .await
        .expect("all beat");
        fleet
    }

    /// Waits until each of them has answered a request that was sent after this instant.
    async fn answers_of(&self, ids: &BTreeSet<String>, after: Instant) {
        let all = async {
            loop {
                let answered = |(id, begun, _, answered): &(String, Instant, Instant, bool)| {
                    (*answered && *begun > after).then(|| id.clone())
                };
                let who: BTreeSet<_> =
                    self.seen.attempts.lock().expect("no panic").iter().filter_map(answered).collect();
                if who.is_superset(ids) {
                    return;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, all).await.expect("they answer in time");
    }

    fn ejected(&self) -> Vec<String> {
        let out = self.balancer.status().into_iter().filter(|status| !status.ejected_for.is_zero());
        out.map(|status| status.instance.id.clone()).collect()
    }

    /// Ends the requests, and says whether every one was answered, by whomever.
    async fn end(&mut self) {
        self.seen.over.store(true, Ordering::Relaxed);
        while let Some(caller) = timeout(PATIENCE, self.callers.join_next()).await.expect("the callers end") {
            caller.expect("no panic");
        }
        let errors = self.seen.errors.lock().expect("no panic");
        assert!(errors.is_empty(), "{} calls failed, the first: {}", errors.len(), errors[0]);
    }
}

async fn hangs(site: &Site, direction: Direction) {
    let mut fleet = Fleet::start(site).await;
    let victim = &fleet.nodes[1];
    let hung = Instant::now();
    victim.front.hold(direction);
    let out = async {
        while !fleet.ejected().contains(&victim.id) {
            sleep(Duration::from_millis(2)).await;
        }
        hung.elapsed()
    };
    let took = timeout(PATIENCE, out).await.expect("it is ejected");
    assert!(took <= DETECTION + SLACK, "taken out after {took:?}, bound {DETECTION:?}");
    // Nothing is sent to it, while the coordinator and the monitor go on to say that all is well.
    sleep(EJECTION.base / 2).await;
    assert_eq!(fleet.ejected(), std::slice::from_ref(&victim.id), "nobody else");
    let now = fleet.service.now();
    assert!(now.get(&victim.id).is_some_and(|one| one.is_passing()) && now.stale_since().is_none());
    let peer = fleet.monitor.peers().into_iter().find(|peer| peer.peer == victim.id).expect("watched");
    assert!(peer.heard.is_some_and(|ago| ago < Duration::from_secs(1)), "it beats: {peer:?}");
    let log = fleet.seen.attempts.lock().expect("no panic").clone();
    let to_victim: Vec<_> = log.iter().filter(|(id, ..)| *id == victim.id).collect();
    let late = to_victim.iter().filter(|(_, begun, ..)| *begun > hung + took + SLACK).count();
    assert_eq!(late, 0, "requests were sent to it after it was taken out");
    let lost = to_victim.iter().filter(|(_, _, ended, answered)| *ended > hung && !answered).count();
    assert!(lost >= EJECTION.after as usize, "the fault bites: {lost} attempts hung");
    println!("      {}: out {took:?} after it began to hang, bound {DETECTION:?}, {lost} attempts hung", site.backend);
    // It comes back when it answers again.
    victim.front.heal().await;
    let healed = Instant::now();
    fleet.answers_of(&BTreeSet::from([victim.id.clone()]), healed).await;
    assert!(healed.elapsed() <= EJECTION.base * 2 + SLACK, "{:?}", healed.elapsed());
    fleet.end().await;
}

async fn an_instance_that_beats_and_gets_no_requests_is_taken_out_in_time(site: Arc<Site>) {
    hangs(&site, Direction::ToServer).await;
}

async fn an_instance_that_beats_and_whose_answers_are_lost_is_taken_out_in_time(site: Arc<Site>) {
    hangs(&site, Direction::ToClient).await;
}

async fn only_unheard(site: &Site, one_way: bool) {
    let mut fleet = Fleet::start(site).await;
    let victim = &fleet.nodes[1];
    let mut events = fleet.monitor.events();
    let cut = Instant::now();
    victim.way.cut(one_way);
    // The fault bites: the one cannot use the coordinator, and those who go by its beats suspect it.
    let read = async {
        let read = victim.coord.kv().get("k").await;
        assert!(read.is_err(), "the way is cut: {read:?}");
        std::future::pending::<()>().await;
    };
    let suspected = async {
        loop {
            if let PeerEvent::Suspect { peer, .. } = events.next().await.expect("the monitor runs")
                && peer == victim.id
            {
                return;
            }
        }
    };
    tokio::select! {
        () = read => {}
        suspected = timeout(PATIENCE, suspected) => suspected.expect("it is suspected"),
    }
    let silent = cut.elapsed();
    assert!(silent < Duration::from_secs(9), "the lease would be over: {silent:?}");
    assert!(fleet.ejected().is_empty());
    // And takes requests all the time.
    fleet.answers_of(&BTreeSet::from([victim.id.clone()]), Instant::now()).await;
    let healed = Instant::now();
    victim.way.heal().await;
    sleep(Duration::from_secs(2)).await;
    let log = fleet.seen.attempts.lock().expect("no panic").clone();
    let failed = log.iter().filter(|(.., answered)| !answered).count();
    assert_eq!(failed, 0, "no request of anybody failed");
    let mut begun: Vec<_> = log.iter().filter(|(id, ..)| *id == victim.id).map(|(_, begun, ..)| *begun).collect();
    begun.retain(|begun| *begun >= cut);
    begun.sort_unstable();
    let gap = begun.windows(2).map(|two| two[1] - two[0]).max().expect("it was asked");
    assert!(gap < ATTEMPT_LIMIT * 2, "it got nothing for {gap:?}");
    assert!(fleet.service.now().get(&victim.id).is_some_and(|one| one.is_passing()));
    let during = begun.iter().filter(|begun| **begun < healed).count();
    println!("      {}: suspected {silent:?} after the cut, {during} requests meanwhile, none failed", site.backend);
    fleet.end().await;
}

async fn an_instance_that_the_coordinator_cannot_hear_of_stays_in_use(site: Arc<Site>) {
    only_unheard(&site, false).await;
}

async fn an_instance_that_does_not_hear_of_the_coordinator_stays_in_use(site: Arc<Site>) {
    only_unheard(&site, true).await;
}
